"""What docstrings of this package need before they become pages.

Names between single backticks become links to what they name, if the site shows it; one that begins with ``zoo.`` must exist.
Lines that describe several names at once (``width, height: of the image``) are repeated for each of them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import griffe

# Warnings below MkDocs' own logger make a strict build fail.
_log = logging.getLogger("mkdocs.docstrings")

_SEVERAL = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)
_NAME = re.compile(r"(?<![`\w])`([A-Za-z_][\w.]*)`(?!`)")


class Docstrings(griffe.Extension):
    """Prepare all docstrings once everything is loaded, so that names can be looked up anywhere."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        # The catalogue's `zoo.list` hides the built-in type from annotations below the package.
        pkg.members.pop("list")
        for part in _all(pkg):
            if part.docstring:
                part.docstring.value = linked(separated(part.docstring.value), part, pkg)


def _all(part: griffe.Object) -> Iterator[griffe.Object]:
    yield part
    for member in part.members.values():
        if not member.is_alias:
            yield from _all(member)


def separated(text: str) -> str:
    """A line of its own for each name."""

    def lines(match: re.Match[str]) -> str:
        margin, names, about = match.groups()
        return "\n".join(f"{margin}{name}: {about}" for name in names.split(", "))

    return _SEVERAL.sub(lines, text)


def linked(text: str, part: griffe.Object, package: griffe.Module) -> str:
    """Names between single backticks as links that may lead nowhere, if what they name is on no page."""

    def link(match: re.Match[str]) -> str:
        name = match[1]
        path = found(name, part, package)
        if path is None:
            if name.startswith("zoo."):
                _log.warning("%s: the docstring names %s, which is not there", part.path, name)
            return match[0]
        return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'

    return _NAME.sub(link, text)


def found(name: str, part: griffe.Object, package: griffe.Module) -> str | None:
    """The path of an object of the package by a name in the scope of another one; ``None`` if there is none."""
    try:
        if name == "zoo.list":
            return "zoo.registry.names"
        if name.startswith("zoo."):
            target = package[name.removeprefix("zoo.")]
        else:
            first, _, rest = name.partition(".")
            path = part.resolve(first)
            if not path.startswith("zoo."):
                return None
            target = package[f"{path}.{rest}".removeprefix("zoo.").rstrip(".")]
        return (target.final_target if target.is_alias else target).path
    except (KeyError, griffe.GriffeError):
        return None

"""JSON and YAML that others wrote, read as data and within bounds. Does not import torch."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

#: Bytes of the longest document that is read; catalogues and configurations have some thousands.
LONGEST = 16 << 20
#: Values in the largest document, those behind a YAML alias counted every time.
MOST_VALUES = 500_000
#: Levels of the deepest one.
DEEPEST = 100


class Loader(yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader):  # type: ignore[misc]
    """Safe YAML that refuses duplicate keys; PyYAML silently keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key is a list or a mapping", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a document.

    Raises:
        OSError: it cannot be read.
        ValueError: it is longer than `LONGEST` or no UTF-8.
    """
    with Path(path).open("rb") as file:
        content = file.read(LONGEST + 1)
    if len(content) > LONGEST:
        raise ValueError(f"it has more than {LONGEST >> 20} MiB, which no catalogue or configuration needs")
    return content.decode("utf-8")


def parse_json(text: str) -> Any:
    """The content of a JSON document.

    Raises:
        ValueError: it is not valid, or larger or deeper than the bounds allow.
    """
    try:
        return _bounded(json.loads(text))
    except RecursionError as error:
        raise ValueError(f"it has more than {DEEPEST} levels") from error


def parse_yaml(text: str, loader: type[Any] = yaml.SafeLoader, *, bounded: bool = True) -> Any:
    """The content of a YAML document, plain values only.

    Args:
        text: the document.
        loader: a safe one of PyYAML.
        bounded: look at its size and depth first; our own documents need no such look.

    Raises:
        ValueError: it is not valid, or larger or deeper than the bounds allow.
    """
    try:
        if bounded:
            _require_shallow(text)
        document = yaml.load(text, Loader=loader)
        return _bounded(document) if bounded else document
    except RecursionError as error:
        raise ValueError(f"it has more than {DEEPEST} levels") from error
    except (yaml.YAMLError, TypeError, AttributeError, KeyError, OverflowError) as error:
        # PyYAML lets errors of its own constructors out: unhashable keys, dates and numbers that there are none of.
        raise ValueError(str(error)) from error


def _require_shallow(text: str) -> None:
    """Refuse deep nesting before it is composed: the composer calls itself for every level."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"it has more than {DEEPEST} levels")


def _bounded(document: Any) -> Any:
    """The document itself, if it is small enough to be walked through and printed."""
    waiting = [(document, 1)]
    values = 0
    while waiting:
        value, depth = waiting.pop()
        values += 1
        if values > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES} values, counting what aliases repeat")
        if depth > DEEPEST:
            raise ValueError(f"it has more than {DEEPEST} levels, or an alias of itself")
        if isinstance(value, Mapping):
            waiting.extend((item, depth + 1) for item in value.values())
        elif isinstance(value, list | tuple | set):
            waiting.extend((item, depth + 1) for item in value)
    return document

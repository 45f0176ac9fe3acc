"""The English of the public surface: phrases that are refused, and how a docstring begins."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [path for folder in ("zoo", "codecs", "eval", "weights") for path in sorted((ROOT / folder).rglob("*.py"))]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "eval/README.md")),
    *sorted((ROOT / "cards").rglob("*.md")),
]

PHRASES = re.compile(r"\b(so many|as far as|of which|those only)\b", re.IGNORECASE)
# A public docstring leads with the noun or the verb. "Whether" stands in front of a yes or no.
# Relative pronouns: a sentence has one relative clause.
RELATIVE = re.compile(r"\b(which|who|whom|whose)\b", re.IGNORECASE)
OPENINGS = re.compile(r"(what|how|where|which|when|those|that|as)\b", re.IGNORECASE)


def docstrings(tree: ast.Module, public: bool = False) -> Iterator[str]:
    """Docstrings of a module; of its public names alone if asked."""

    def walk(node: ast.AST, hidden: bool) -> Iterator[str]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            hidden = hidden or getattr(node, "name", "").startswith("_")
            if (text := ast.get_docstring(node)) and not (public and hidden):
                yield text
            # What is defined inside of a function is nobody's to read.
            hidden = hidden or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, hidden)

    return walk(tree, False)


def helps(tree: ast.Module) -> Iterator[str]:
    """Texts that the command line shows, ``help="…"``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "help" and isinstance(node.value, ast.Constant):
            yield str(node.value.value)


def nested(text: str) -> list[str]:
    """Sentences with more than one relative pronoun; code and examples are not counted."""
    prose = re.sub(r"``.*?``|`.*?`", "X", text.split(">>>")[0], flags=re.DOTALL)
    sentences = [" ".join(sentence.split()) for sentence in re.split(r"(?<=[.;:!?])\s+|\n\n", prose)]
    return [sentence for sentence in sentences if len(RELATIVE.findall(sentence)) > 1]


def refused(text: str) -> list[str]:
    flat = " ".join(text.split())
    return [flat[max(0, found.start() - 60) : found.end() + 30] for found in PHRASES.finditer(flat)]


@pytest.mark.parametrize("folder", ["zoo", "codecs", "eval", "weights"])
def test_docstrings(folder: str) -> None:
    wrong = []
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] != folder:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = path.relative_to(ROOT)
        wrong += [f"{name}: …{found}" for text in [*docstrings(tree), *helps(tree)] for found in refused(text)]
        wrong += [f"{name}: {text.splitlines()[0]}" for text in docstrings(tree, public=True) if OPENINGS.match(text)]
        wrong += [f"{name}: {found}" for text in docstrings(tree, public=True) for found in nested(text)]
    assert not wrong, "\n".join(wrong)


def test_pages() -> None:
    wrong = [f"{path.relative_to(ROOT)}: …{found}" for path in PAGES for found in refused(path.read_text(encoding="utf-8"))]
    assert not wrong, "\n".join(wrong)


def test_what_is_looked_at() -> None:
    """Inside of classes, over line ends, in help texts; private names may begin as they like."""
    text = '''
"""Module."""
class Public:
    """How it
    is."""
    def method(self):
        """As far
        as that goes."""
        def inner():
            """What is inside."""
    def _private(self):
        """Which it is."""
option = typer.Option(help="the first so many")
'''
    tree = ast.parse(text)
    assert [bool(OPENINGS.match(found)) for found in docstrings(tree, public=True)] == [False, True, True]
    assert len(list(docstrings(tree))) == 5
    assert [found for found in docstrings(tree) if refused(found)] == ["As far\nas that goes."]
    assert refused(*helps(tree)) == ["the first so many"]
    assert not OPENINGS.match("Assign") and not OPENINGS.match("Whether")
    assert nested("A maker, whose parts\nare known. One which stays.") == []
    assert nested("A maker, whose parts\nare known, which stays.") == ["A maker, whose parts are known, which stays."]

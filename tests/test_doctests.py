"""Examples in docstrings run as shown."""

from __future__ import annotations

import ast
import doctest
from importlib import import_module
from pathlib import Path

import pytest
import torch

import zoo

ROOT = Path(__file__).parent.parent


def examples() -> list[doctest.DocTest]:
    """The examples of every docstring, found in the source: decorators hide them from doctest's own finder."""
    parser = doctest.DocTestParser()
    found = []
    for path in sorted((ROOT / "zoo").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if ">>>" not in text:
            continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        pending = [(module, ast.parse(text))]
        while pending:
            name, node = pending.pop()
            inner = [child for child in node.body if isinstance(child, ast.FunctionDef | ast.ClassDef)]
            pending += [(f"{name}.{child.name}", child) for child in inner]
            if ">>>" in (docstring := ast.get_docstring(node) or ""):
                test = parser.get_doctest(docstring, {"__name__": module}, name, str(path), getattr(node, "lineno", 0))
                found.append(test)
    return found


EXAMPLES = examples()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example(example: doctest.DocTest) -> None:
    """With `zoo`, `torch` and the names of its own module at hand."""
    example.globs = vars(import_module(example.globs["__name__"])) | {"zoo": zoo, "torch": torch}
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(example, out=report.append, clear_globs=False)
    assert not runner.failures, "".join(report)


def test_the_public_surface_has_examples() -> None:
    named = {example.name for example in EXAMPLES}
    assert named >= {
        "zoo",
        "zoo.compress.sequence.shorten",
        "zoo.hub.loading.load",
        "zoo.latents.Latents",
        "zoo.media.audio.read_audio",
        "zoo.media.image.prepare.prepare_image",
        "zoo.quantization.conversion.quantize",
        "zoo.registry.get",
        "zoo.registry.names",
        "zoo.spec.Frame",
        "zoo.spec.Spec",
        "zoo.tokenizer.audio.AudioTokenizer.decode",
        "zoo.tokenizer.audio.AudioTokenizer.encode",
        "zoo.tokenizer.base.Tokenizer.options",
        "zoo.tokenizer.bytes.FileTokenizer.encode",
        "zoo.tokenizer.image.ImageTokenizer.decode",
        "zoo.tokens.Tokens",
        "zoo.tokens.Tokens.keep",
        "zoo.tokens.Tokens.truncate",
        "zoo.vocabulary.Vocabulary",
        "zoo.vocabulary.Vocabulary.join",
        "zoo.vocabulary.Vocabulary.preset",
        "zoo.vocabulary.Vocabulary.split",
        "zoo.vocabulary.Vocabulary.to_text",
    }

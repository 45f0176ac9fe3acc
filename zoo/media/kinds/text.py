"""Answers of texts to what every room asks: see `zoo.modality`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.media.text import write_text
from zoo.spec import Spec

#: Texts have all sorts of names, source code above all: files of all kinds.
EXTENSIONS = None


def write(path: str | os.PathLike[str], decoded: str | bytes, sample_rate: int | None) -> Path:
    """Write what a tokenizer of texts decoded, a string in UTF-8."""
    return write_text(path, decoded)


def trial() -> str:
    """A little text, to try a name with."""
    return "trial"


def figures(spec: Spec, meta: Mapping[str, Any], bits: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The bits of an encoded text."""
    return {}, {"bits": bits}

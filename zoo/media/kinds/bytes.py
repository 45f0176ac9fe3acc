"""Answers of files to what every room asks: see `zoo.modality`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.media.files import write_bytes
from zoo.spec import Spec

#: Files of all kinds.
EXTENSIONS = None


def write(path: str | os.PathLike[str], decoded: bytes, sample_rate: int | None) -> Path:
    """Write the file that a tokenizer of files decoded."""
    return write_bytes(path, decoded)


def trial() -> bytes:
    """A little file, to try a name with."""
    return b"trial"


def figures(spec: Spec, meta: Mapping[str, Any], bits: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The bits of an encoded file."""
    return {}, {"bits": bits}

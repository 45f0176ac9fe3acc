"""Answers of texts to what every room asks: see `zoo.modality`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zoo.media import genome
from zoo.media.text import write_text
from zoo.spec import Spec

#: Texts have all sorts of names, source code above all: files of all kinds.
EXTENSIONS = None
#: A string is the text itself.
STRINGS = True
#: Files of many texts: FASTA and FASTQ.
RECORDS = genome.EXTENSIONS
#: What such a record has besides its text.
RECORD_COLUMNS = ("name", "qualities")


def write(path: str | os.PathLike[str], decoded: str | bytes, sample_rate: int | None) -> Path:
    """Write what a tokenizer of texts decoded, a string in UTF-8."""
    return write_text(path, decoded)


def trial() -> str:
    """A little text, to try a name with."""
    return "trial"


def figures(spec: Spec, meta: Mapping[str, Any], bits: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The bits of an encoded text."""
    return {}, {"bits": bits}


def spans(file: Any) -> Iterator[tuple[str, int, int]]:
    """Names, offsets and sizes of the records of an open file; see `zoo.media.genome.spans`."""
    return genome.spans(file)


def record(content: bytes) -> tuple[str, Mapping[str, str | None]]:
    """The text of one record, and what it has besides, by `RECORD_COLUMNS`."""
    name, sequence, qualities = genome.one(content)
    return sequence, {"name": name, "qualities": qualities}

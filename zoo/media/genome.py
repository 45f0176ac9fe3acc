"""Sequences of nucleotides: FASTA and FASTQ files, read through dnaio, letters, and the other strand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from zoo.errors import InputError, MissingExtraError

#: Letters of nucleotides and of what is known of them (IUPAC-IUB 1984, Nucleic Acids Res. 13:3021).
IUPAC = "ACGTURYKMBDHVSWN"
#: Files of sequences.
EXTENSIONS = tuple(
    f".{kind}{packed}" for kind in ("fa", "fasta", "fna", "ffn", "fq", "fastq") for packed in ("", ".gz", ".bz2", ".xz", ".zst")
)

_PAIRS = "ATCGRYKMBVDH"
_COMPLEMENTS = {"U": "A"} | dict(zip(_PAIRS[::2] + _PAIRS[1::2], _PAIRS[1::2] + _PAIRS[::2], strict=True))
_TABLE = str.maketrans(_COMPLEMENTS | {letter.lower(): other.lower() for letter, other in _COMPLEMENTS.items()})
_BYTES = bytes(ord(chr(byte).translate(_TABLE)) for byte in range(256))

TextT = TypeVar("TextT", str, bytes)


class Record(NamedTuple):
    """One sequence of a file.

    Attributes:
        name: the header without its sign.
        sequence: letters as they are in the file, its lines joined.
        qualities: of FASTQ, one character for each letter; ``None`` of FASTA.
    """

    name: str
    sequence: str
    qualities: str | None


def read(source: str | os.PathLike[str] | Any) -> Iterator[Record]:
    """The records of a FASTA or FASTQ file, one at a time; compressed files by their extension or, of open files, content.

    Args:
        source: a path, or a file open for reading bytes.

    Raises:
        MissingExtraError: dnaio is not installed.
        InputError: there is no such file, or it is not sound FASTA or FASTQ, such as qualities that do not fit their sequence.
    """
    try:
        import dnaio
    except ImportError as error:
        raise MissingExtraError('FASTA and FASTQ need dnaio: pip install "tokenizer-zoo[genome]"') from error
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else getattr(source, "name", "the file")
    file: Any = source if not isinstance(source, str | os.PathLike) else Path(source)
    try:
        with dnaio.open(file) as reader:
            for record in reader:
                yield Record(record.name, record.sequence, record.qualities)
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from error
    except (dnaio.FileFormatError, dnaio.UnknownFileFormat, ValueError, EOFError) as error:
        raise InputError(f"{name} is not sound FASTA or FASTQ: {error}") from error


def reverse_complement(sequence: TextT) -> TextT:
    """The other strand, in its own reading direction.

    A↔T, C↔G, R↔Y, K↔M, B↔V and D↔H change places and U becomes A; S, W, N, gaps and all else stay, and so does the case.

    >>> reverse_complement("AACGTnRU")
    'AYnACGTT'
    """
    if isinstance(sequence, bytes):
        return sequence.translate(_BYTES)[::-1]
    return sequence.translate(_TABLE)[::-1]

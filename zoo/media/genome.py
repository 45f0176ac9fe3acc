"""Sequences of nucleotides: FASTA and FASTQ files, read through dnaio, letters, and the other strand."""

from __future__ import annotations

import io
import os
import re
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

_HEADER = re.compile(rb"\n>([^\n]*)(?=\n)")
_BLOCK = 1 << 20


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
    if isinstance(file, io.RawIOBase):
        # dnaio looks at the beginning, and goes back where it cannot peek.
        file = io.BufferedReader(file)
    try:
        with dnaio.open(file) as reader:
            for record in reader:
                yield Record(record.name, record.sequence, record.qualities)
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from error
    except dnaio.UnknownFileFormat as error:
        raise InputError(f"{name} is not sound FASTA or FASTQ: it begins neither with '>' nor with '@'") from error
    except (dnaio.FileFormatError, ValueError, EOFError) as error:
        raise InputError(f"{name} is not sound FASTA or FASTQ: {error}") from error


def one(content: bytes) -> Record:
    """The record that stands alone in some bytes; errors as for `read`, also if there are none or several."""
    try:
        records = list(read(io.BytesIO(content)))
    except InputError as error:
        # Lines are counted from the record's first one.
        raise InputError(error.reason.replace("the file", "the record", 1).replace(" file at line", " at its line")) from error
    if len(records) != 1:
        raise InputError(f"there are {len(records)} records of FASTA or FASTQ where one should be")
    return records[0]


class Span(NamedTuple):
    """Place of a record in a file.

    Attributes:
        name: the first word of its header.
        offset, size: in bytes.
    """

    name: str
    offset: int
    size: int


def spans(file: Any) -> Iterator[Span]:
    """Places of the records of a FASTA or FASTQ file, in order and in bounded memory; `one` reads what lies there.

    A record of FASTA ends where the next one begins, one of FASTQ with its fourth line. What is in front of the first header of
    FASTA counts as the first record's, so that reading that says what is wrong.

    Args:
        file: open for reading bytes, unpacked.

    Raises:
        InputError: no record of FASTQ begins where one should.
    """
    start, line = 0, file.readline(_BLOCK)
    while line and not line.strip():
        start, line = start + len(line), file.readline(_BLOCK)
    if line:
        yield from _spans_of_fastq(file, start, line) if line.startswith(b"@") else _spans_of_fasta(file, start, line)


def _spans_of_fasta(file: Any, start: int, text: bytes) -> Iterator[Span]:
    # A line end in front of the first line makes it one like all others.
    text, position = b"\n" + text, start - 1
    name: str | None = None
    while block := file.read(_BLOCK):
        text += block
        for found in _HEADER.finditer(text):
            if name is not None:
                yield Span(name, start, position + found.start() + 1 - start)
                start = position + found.start() + 1
            name = _first_word(found[1])
        # Only the beginning of a header is needed again.
        last = text.rfind(b"\n")
        kept = text[last:] if last >= 0 and text[last + 1 : last + 2] in (b"", b">") else b""
        position, text = position + len(text) - len(kept), kept
    if text.startswith(b"\n>") and name is not None:
        yield Span(name, start, position + 1 - start)
        start = position + 1
    name = _first_word(text[2:].partition(b"\n")[0]) if text.startswith(b"\n>") else name
    yield Span(name or "", start, position + len(text) - start)


def _spans_of_fastq(file: Any, start: int, line: bytes) -> Iterator[Span]:
    while line:
        if not line.startswith(b"@"):
            if line.strip():
                raise InputError(f"no record of FASTQ begins at byte {start}")
            start, line = start + len(line), file.readline()
            continue
        while not line.endswith(b"\n") and (more := file.readline()):
            line += more
        size = len(line) + sum(len(file.readline()) for _ in range(3))
        yield Span(_first_word(line[1:]), start, size)
        start, line = start + size, file.readline()


def _first_word(header: bytes) -> str:
    return next(iter(header.decode("utf-8", "backslashreplace").split()), "")


def reverse_complement(sequence: TextT) -> TextT:
    """The other strand, in its own reading direction.

    A↔T, C↔G, R↔Y, K↔M, B↔V and D↔H change places and U becomes A; S, W, N, gaps and all else stay, and so does the case.

    >>> reverse_complement("AACGTnRU")
    'AYnACGTT'
    """
    if isinstance(sequence, bytes):
        return sequence.translate(_BYTES)[::-1]
    return sequence.translate(_TABLE)[::-1]

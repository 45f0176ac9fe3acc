"""Texts: strings, which are the text itself, bytes and files, read as bytes of UTF-8 or of anything else, and written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zoo.errors import InputError
from zoo.media.bytes import MAX_BYTES, Octets, read_bytes
from zoo.media.files import write_bytes
from zoo.utf8 import utf8

#: Longest name of a file that a text is taken for in a hint.
_LONGEST_PATH = 4096


def read_text(item: Any, max_bytes: int = MAX_BYTES) -> tuple[Octets, bool]:
    """The bytes of a text, and whether it was a string.

    Args:
        item: a string, which is the text itself and never the name of a file; bytes, UTF-8 or not; a `pathlib.Path` or an open
            file, whose bytes count; a mapping with ``"text"``, ``"bytes"`` or ``"path"``.
        max_bytes: refuse more, counted in UTF-8.

    Raises:
        InputError: it is none of these, is too large, cannot be read, or is a string with a lone surrogate.
    """
    if isinstance(item, Mapping) and isinstance(item.get("text"), str):
        item = item["text"]
    if type(item).__module__.partition(".")[0] == "pyarrow" and hasattr(item, "as_py"):
        item = item.as_py()
    if isinstance(item, str):
        encoded = utf8(item)
        if len(encoded) > max_bytes:
            raise InputError(f"{len(encoded)} bytes are more than max_bytes = {max_bytes}{file_hint(item)}")
        return np.frombuffer(encoded, np.uint8), True
    holds_bytes = isinstance(item, bytes | bytearray | memoryview | os.PathLike | Mapping)
    if not holds_bytes and not callable(getattr(item, "read", None)):
        raise InputError(f"expected a text: a string, bytes, a pathlib.Path or an open file, not {type(item).__name__}")
    return read_bytes(item, max_bytes), False


def characters(octets: Octets) -> str:
    """The string that bytes are in UTF-8.

    Raises:
        InputError: they are none; names the offset of the first byte that does not fit.
    """
    try:
        return octets.tobytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"the byte 0x{error.object[error.start]:02x} at offset {error.start} does not belong to UTF-8, and this tokenizer "
            "reads characters"
        ) from error


def file_hint(text: str) -> str:
    """Hint for the message about a text that is the name of a file; empty for any other text."""
    one_line = 0 < len(text) <= _LONGEST_PATH and len(text.splitlines()) == 1 and "\0" not in text
    try:
        named = one_line and os.path.isfile(text)
    except (OSError, ValueError):
        named = False
    return "; a string is the text itself: pass pathlib.Path(...) to read the file of this name" if named else ""


def write_text(path: str | os.PathLike[str], text: str | bytes) -> Path:
    """Write a text as bytes, a string in UTF-8."""
    return write_bytes(path, text.encode() if isinstance(text, str) else text)

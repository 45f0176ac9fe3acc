"""Packed files: unpacked while they are read."""

from __future__ import annotations

import lzma
import os
import zlib
from typing import Any

from zoo.engine.places import Places
from zoo.errors import ArgumentError

#: How a file is packed, by its extension, in fsspec's words.
_PACKED = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
#: Errors of what is packed, and is damaged or cut off.
PACKING_ERRORS = (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError)


def is_packed(place: str) -> bool:
    """Whether a file has to be unpacked, by its extension."""
    return os.path.splitext(place)[1].lower() in _PACKED


def opened(place: str, places: Places) -> Any:
    """A file open for reading, unpacked.

    Raises:
        ArgumentError: there is nothing here that unpacks it.
    """
    file = places.open(place)
    if not is_packed(place):
        return file
    from fsspec.compression import compr

    kind = _PACKED[os.path.splitext(place)[1].lower()]
    if kind not in compr:
        raise ArgumentError(f"{place} is packed by {kind}, and no library is installed that unpacks it")
    return compr[kind](file, mode="rb")

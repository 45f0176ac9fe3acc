"""Packed files: unpacked while they are read."""

from __future__ import annotations

import lzma
import os
import zlib
from threading import Lock
from typing import Any

from zoo.engine.places import Places
from zoo.errors import ArgumentError

#: How a file is packed, by its extension, in fsspec's words.
_PACKED = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
#: Errors of what is packed, and is damaged or cut off.
PACKING_ERRORS = (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError)


#: The file that was read last in this process, by its place and stamp: the next unit goes on in it, mostly.
_LAST: dict[tuple[str, str], Any] = {}
_LOCK = Lock()


def set_aside(place: str, stamp: str, file: Any) -> None:
    """Leave an unpacked file open for who reads it next; another one that was left so is closed."""
    with _LOCK:
        others = [_LAST.pop(key) for key in list(_LAST)]
        _LAST[place, stamp] = file
    for other in others:
        other.close()


def taken_up(place: str, stamp: str) -> Any:
    """The file that was left open, which is nobody else's from now on; ``None`` if it is another one."""
    with _LOCK:
        return _LAST.pop((place, stamp), None)


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

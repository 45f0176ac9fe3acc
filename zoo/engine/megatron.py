"""The layout of Megatron's ``IndexedDataset``: ``.bin`` holds the ids of all sequences, ``.idx`` their lengths and places."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.errors import ArgumentError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
#: Numbers of types in the file.
CODES: dict[str, int] = {
    "uint8": 1,
    "int8": 2,
    "int16": 3,
    "int32": 4,
    "int64": 5,
    "float64": 6,
    "float32": 7,
    "uint16": 8,
}


def index_bytes(dtype: Any, lengths: NDArray[Any] | Sequence[int], documents: NDArray[Any] | Sequence[int]) -> bytes:
    """The content of an ``.idx`` file: numbers are little-endian.

    Args:
        dtype: type of the ids.
        lengths: ids of each sequence, in the order of the ``.bin`` file.
        documents: first sequence of every document, and the number of sequences.

    Raises:
        ArgumentError: a sequence has more than 2³¹ - 1 ids.
    """
    kind = np.dtype(dtype)
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and sizes.max() > np.iinfo(np.int32).max:
        raise ArgumentError(f"a sequence of {sizes.max()} ids is too long for Megatron's index")
    pointers = (np.cumsum(sizes) - sizes) * kind.itemsize
    return b"".join(
        [
            MAGIC,
            struct.pack("<QBQQ", VERSION, CODES[kind.name], len(sizes), len(documents)),
            sizes.astype("<i4").tobytes(),
            pointers.astype("<i8").tobytes(),
            np.asarray(documents, "<i8").tobytes(),
        ]
    )


def ids_bytes(ids: Iterable[NDArray[Any]]) -> Iterable[bytes]:
    """The content of a ``.bin`` file in pieces."""
    return (np.ascontiguousarray(piece, piece.dtype.newbyteorder("<")).tobytes() for piece in ids)

"""Files as they are: read byte for byte, and written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from zoo.errors import InputError
from zoo.media.items import file_item

Octets = NDArray[np.uint8]

#: Largest file unless the caller says otherwise: ids take eight times as much memory.
MAX_BYTES = 1 << 28


def read_bytes(item: Any, max_bytes: int = MAX_BYTES) -> Octets:
    """The bytes of a file, or of what holds them.

    Args:
        item: a path, bytes, an open file, a mapping with ``"bytes"`` or ``"path"``, an array or tensor ``[length]`` of whole
            numbers in 0..255, or a list of them.
        max_bytes: refuse more.

    Raises:
        InputError: it cannot be read, is too large or is not made of bytes.
    """
    item = file_item(item)
    if isinstance(item, str | os.PathLike):
        path = regular_file(item)
        _check_size(path.stat().st_size, max_bytes)
        try:
            return np.fromfile(path, np.uint8)
        except OSError as error:
            raise InputError(f"{os.fspath(item)} cannot be read: {error.strerror}") from error
    if isinstance(item, bytes | bytearray | memoryview):
        content = item.tobytes() if isinstance(item, memoryview) else item
        _check_size(len(content), max_bytes)
        return np.frombuffer(content, np.uint8)
    return _from_array(item.detach().cpu().numpy() if isinstance(item, Tensor) else item, max_bytes)


def _from_array(array: NDArray[Any], max_bytes: int) -> Octets:
    if array.ndim != 1:
        raise InputError(f"bytes must be [length], not of shape {array.shape}")
    _check_size(len(array), max_bytes)
    if array.dtype == np.uint8 or not array.size:
        return array.astype(np.uint8)
    if array.dtype.kind not in "iu":
        raise InputError(f"bytes must be whole numbers, not {array.dtype}")
    if array.min() < 0 or array.max() >= 256:
        raise InputError(f"bytes must lie in 0..255, these reach from {array.min()} to {array.max()}")
    return array.astype(np.uint8)


def regular_file(source: str | os.PathLike[str]) -> Path:
    """The path of a file that can be read from start to end.

    Raises:
        InputError: there is no such file, or it is a folder or a device.
    """
    path, name = Path(source), os.fspath(source)
    if path.is_dir():
        raise InputError(f"{name} is a folder")
    if not path.exists():
        raise InputError(f"{name} does not exist")
    if not path.is_file():
        raise InputError(f"{name} is no regular file")
    return path


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise InputError(
            f"{size} bytes are more than max_bytes = {max_bytes}, and ids take eight times as much memory: raise that limit, "
            "or go through the file with encode_chunks"
        )

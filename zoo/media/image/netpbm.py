"""Netpbm: samples of more than 8 bits (PGM, PPM) and floating point (PFM) in full, where Pillow rounds or refuses."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.errors import InputError
from zoo.media.image.levels import Range, unit_levels, unit_values

# A token of a header, after white space and comments.
_TOKEN = re.compile(rb"(?:\s|#[^\r\n]*[\r\n])*([^\s#]{1,32})")
_MAGIC = (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf", b"PF")
_HEADER_BYTES = 1 << 16
_COMMENT = re.compile(rb"#[^\r\n]*")
# Digits and a space.
_PLAIN_BYTES = 2


@dataclass(frozen=True)
class Header:
    """Facts about the samples, from a file's header.

    Attributes:
        channels: 1 or 3.
        width, height: pixels.
        largest: maxval, 0 for floating point.
        is_plain: samples are written in digits.
        little_endian: of floating point.
        offset: where the samples begin.
    """

    channels: int
    width: int
    height: int
    largest: int
    is_plain: bool
    little_endian: bool
    offset: int


def is_netpbm(start: bytes) -> bool:
    """Whether a file begins as PBM, PGM, PPM or PFM does."""
    return start[:2] in _MAGIC and start[2:3] in (b" ", b"\t", b"\n", b"\r", b"\v", b"\f", b"#")


def read_header(handle: Any) -> Header | None:
    """The header of a PGM, PPM or PFM file of more than 8 bits; ``None`` for what Pillow reads."""
    handle.seek(0)
    start = handle.read(_HEADER_BYTES)
    magic = start[:2]
    if magic not in (b"P2", b"P3", b"P5", b"P6", b"Pf", b"PF"):
        return None
    tokens: list[bytes] = []
    position = 2
    for _ in range(3):
        match = _TOKEN.match(start, position)
        if match is None:
            return None
        tokens.append(match[1])
        position = match.end()
    is_float = magic in (b"Pf", b"PF")
    try:
        width, height = int(tokens[0]), int(tokens[1])
        scale = float(tokens[2]) if is_float else int(tokens[2])
    except ValueError:
        return None
    if is_float:
        if scale == 0 or not math.isfinite(scale):
            return None
    elif not 255 < scale < 65_536:
        return None
    channels = 3 if magic in (b"P3", b"P6", b"PF") else 1
    # One character of white space ends the header.
    return Header(channels, width, height, 0 if is_float else int(scale), magic in (b"P2", b"P3"), scale < 0, position + 1)


def read_samples(handle: Any, header: Header, name: str, range: Range | None) -> NDArray[np.float32]:
    """Pixels in [0, 1], ``[height, width, 1|3]``.

    Args:
        handle: the file.
        header: of a size that was checked.
        name: of the file, for messages.
        range: black and white of floating point, [0, 1] by default. The scale that a PFM file names is not applied.

    Raises:
        InputError: the file is truncated or damaged, or its values lie outside the range.
    """
    shape = (header.height, header.width, header.channels)
    count = math.prod(shape)
    handle.seek(header.offset)
    if header.is_plain:
        return unit_levels(_plain_samples(handle, count, header.largest, name).reshape(shape), header.largest)
    kind = np.dtype(">u2") if header.largest else np.dtype("<f4" if header.little_endian else ">f4")
    _check_length(handle, header.offset, count * kind.itemsize, name)
    samples = np.frombuffer(handle.read(count * kind.itemsize), kind).reshape(shape)
    if not header.largest:
        # Rows run from the bottom to the top.
        return unit_values(samples[::-1].astype(np.float32), "unit" if range is None else range, name=name)
    if int(samples.max()) > header.largest:
        raise InputError(f"{name} is damaged: a sample of {samples.max()}, more than its maxval of {header.largest}")
    return unit_levels(samples, header.largest)


def _plain_samples(handle: Any, count: int, largest: int, name: str) -> NDArray[Any]:
    _check_length(handle, handle.tell(), count * _PLAIN_BYTES - 1, name)
    words = _COMMENT.sub(b" ", handle.read()).split()[:count]
    if len(words) < count or not all(word.isdigit() and len(word) <= 10 for word in words):
        raise InputError(f"{name} is truncated or damaged: {len(words)} samples for the {count} of its header")
    samples = np.array([int(word) for word in words], np.int64)
    if int(samples.max()) > largest:
        raise InputError(f"{name} is damaged: a sample of {samples.max()}, more than its maxval of {largest}")
    return samples.astype(np.uint16)


def _check_length(handle: Any, offset: int, length: int, name: str) -> None:
    held = handle.seek(0, 2) - offset
    handle.seek(offset)
    if held < length:
        raise InputError(f"{name} is truncated: {max(0, held)} bytes of samples, where its header asks for {length}")

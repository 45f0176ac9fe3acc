"""FLAC: its header may give no number of samples, or a wrong one; the last frame tells where the stream ends."""

from __future__ import annotations

import re
from io import BufferedIOBase
from typing import NamedTuple

from zoo.errors import InputError
from zoo.media.containers.spliced import Piece, Track, find_all, read_at, spliced

_STREAMINFO = 34
_LARGEST_FRAME = 1 << 21
_SYNC = re.compile(rb"\xff[\xf8\xf9]", re.DOTALL)
_BLOCK_SIZES = {1: 192} | {code: 576 << (code - 2) for code in range(2, 6)} | {code: 256 << (code - 8) for code in range(8, 16)}


def _crc_table(polynomial: int, bits: int) -> list[int]:
    table = []
    for byte in range(256):
        value = byte << (bits - 8)
        for _ in range(8):
            value = (value << 1) ^ polynomial if value >> (bits - 1) else value << 1
        table.append(value & ((1 << bits) - 1))
    return table


_CRC8, _CRC16 = _crc_table(0x107, 8), _crc_table(0x18005, 16)


def _crc8(content: bytes) -> int:
    value = 0
    for byte in content:
        value = _CRC8[value ^ byte]
    return value


def _crc16(content: bytes) -> int:
    value = 0
    for byte in content:
        value = (value << 8) & 0xFFFF ^ _CRC16[value >> 8 ^ byte]
    return value


class _Frame(NamedTuple):
    """A frame's header: where its samples lie in the stream, and what all frames of a stream have in common."""

    first: int
    size: int
    rate_and_depth: tuple[int, int]


def _parse_frame(content: bytes, block_size: int) -> _Frame | None:
    """The frame header at the start of ``content``, if there is one; ``block_size`` is that of streams with a fixed one."""
    if len(content) < 6 or content[3] & 1:
        return None
    variable = content[1] & 1
    size_code, rate_code = content[2] >> 4, content[2] & 0xF
    if size_code == 0 or rate_code == 15 or content[3] >> 4 > 10:
        return None
    # The number is coded as UTF-8 is, to up to 36 bits.
    lead = content[4]
    more = 0 if lead < 0x80 else 8 - (lead ^ 0xFF).bit_length() - 1
    if more < 0 or more > 6 or (lead >= 0x80 and more == 0) or len(content) < 5 + more + 5:
        return None
    number = lead if more == 0 else lead & ((1 << (6 - more)) - 1)
    for byte in content[5 : 5 + more]:
        if byte >> 6 != 2:
            return None
        number = number << 6 | byte & 0x3F
    position = 5 + more
    if size_code in (6, 7):
        width = size_code - 5
        size = int.from_bytes(content[position : position + width], "big") + 1
        position += width
    else:
        size = _BLOCK_SIZES[size_code]
    position += {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if position >= len(content) or _crc8(content[:position]) != content[position]:
        return None
    return _Frame(number if variable else number * block_size, size, (rate_code, content[3] >> 1 & 7))


def flac_tracks(handle: BufferedIOBase, start: int, end: int, name: str) -> list[Track] | None:
    """The recordings of FLAC files one behind the other; ``None`` where the header cannot be read.

    Raises:
        InputError: the stream has fewer samples than its header says, or breaks off inside a frame.
    """
    starts = [start]
    for position in find_all(handle, b"fLaC", start + 4, end):
        if read_at(handle, position + 4, 4) in (b"\x00\x00\x00\x22", b"\x80\x00\x00\x22"):
            starts.append(position)
    tracks = []
    for begin, stop in zip(starts, [*starts[1:], end], strict=True):
        track = _track(handle, begin, stop, name)
        if track is None:
            return None
        tracks.append(track)
    return tracks


def _track(handle: BufferedIOBase, start: int, end: int, name: str) -> Track | None:
    head = read_at(handle, start, 8 + _STREAMINFO)
    if len(head) < 8 + _STREAMINFO or head[4] & 0x7F:
        return None
    info = head[8:]
    block_size = int.from_bytes(info[:2], "big")
    claim = int.from_bytes(info[13:18], "big") & ((1 << 36) - 1)
    position, last = start + 4, False
    while not last:
        block = read_at(handle, position, 4)
        if len(block) < 4:
            return None
        last = bool(block[0] & 0x80)
        position += 4 + int.from_bytes(block[1:], "big")
    first = _parse_frame(read_at(handle, position, 32), block_size)
    if first is None:
        # Nothing to measure: the decoder says what is wrong.
        return Track(spliced(handle, [(start, end - start)]))
    stop, complete = _end(handle, position, end, block_size, first)
    samples = stop - first.first
    if claim > samples:
        raise InputError(f"{name} is truncated: the frames end after {samples} of {claim} samples")
    if claim == 0 and not complete:
        raise InputError(f"{name} is truncated: it breaks off inside a frame before sample {samples}")
    patched = (int.from_bytes(info[10:18], "big") & ~((1 << 36) - 1) | samples).to_bytes(8, "big")
    # The checksum of the samples is of no use where their number was not known.
    pieces: list[Piece] = [head[:18], patched, head[26:], (start + len(head), end - start - len(head))]
    return Track(spliced(handle, pieces), samples=samples)


def _end(handle: BufferedIOBase, first: int, end: int, block_size: int, like: _Frame) -> tuple[int, bool]:
    """Behind the last sample of the last frame, and whether that frame is whole."""
    window = max(first, end - _LARGEST_FRAME)
    tail = read_at(handle, window, end - window)
    frames = []
    for match in _SYNC.finditer(tail):
        frame = _parse_frame(tail[match.start() : match.start() + 32], block_size)
        if frame is not None and frame.rate_and_depth == like.rate_and_depth:
            frames.append((match.start(), frame))
    # A frame continues another one; what looks like a header by chance does not.
    ends = {frame.first + frame.size for _, frame in frames} | {like.first}
    for offset, frame in reversed(frames):
        if frame.first in ends:
            return frame.first + frame.size, _crc16(tail[offset:]) == 0
    return like.first + like.size, False

"""Integers as consecutive big-endian fields of 1 to 32 bits, as ``.zt`` files hold them.

`bitfields.c` packs long runs; NumPy packs short ones, and all where there is no C compiler. Both give the same bytes.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int64]
Bytes = NDArray[np.uint8]

#: Fields from which compiling or loading the C kernel pays.
MANY = 1 << 20
#: Fields that NumPy packs at a time: enough to outweigh the calls, few enough for the processor's cache.
BLOCK = 1 << 17


def packed_bytes(frames: int, bits: Sequence[int]) -> int:
    """Bytes of ``frames`` times one field for each of ``bits``."""
    return -(-frames * sum(bits) // 8)


def pack(codes: Codes, bits: Sequence[int], packed: Bytes) -> None:
    """Write codes side by side, frame by frame, and fill the last byte up with zeros.

    Args:
        codes: int64 ``[frames, places]``, each at least 0 and below ``2 ** bits`` of its place.
        bits: ``[places]``, from 1 to 32.
        packed: uint8 ``[packed_bytes(frames, bits)]``, written to.
    """
    codes, bits = _simplest(codes, bits)
    done = _pack_natively(codes, bits, packed) if _is_for_c(codes.size, bits) else 0
    rest, out = codes[done:], packed[done * sum(bits) // 8 :]
    if len(bits) == 1:
        _pack_equal(rest.reshape(-1), bits[0], out)
    else:
        _pack_mixed(rest, bits, out)


def unpack(packed: Bytes, frames: int, bits: Sequence[int]) -> Codes:
    """The codes ``[frames, places]`` that `pack` was given."""
    codes = np.empty((frames, len(bits)), np.int64)
    flat, bits = _simplest(codes, bits)
    done = _unpack_natively(packed, bits, flat) if _is_for_c(codes.size, bits) else 0
    rest, content = flat[done:], packed[done * sum(bits) // 8 :]
    if len(bits) == 1:
        _unpack_equal(content, bits[0], rest.reshape(-1))
    else:
        _unpack_mixed(content, bits, rest)
    return codes


def _simplest(codes: Codes, bits: Sequence[int]) -> tuple[Codes, Sequence[int]]:
    """The same fields with a single place where all places have as many bits."""
    codes = np.ascontiguousarray(codes)
    return (codes.reshape(-1, 1), bits[:1]) if len(set(bits)) == 1 else (codes, bits)


# ----------------------------------------------------------------------------------------------------------------------- C


def _is_for_c(fields: int, bits: Sequence[int]) -> bool:
    # NumPy converts whole integers at the speed of memory.
    return fields >= MANY and tuple(bits) not in ((8,), (16,), (32,))


def _library() -> ctypes.CDLL | None:
    # Short runs do without PyTorch, which the compiled kernels bring along.
    from zoo.kernels import native

    return native.library("bitfields.c")


def _address(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _pack_natively(codes: Codes, bits: Sequence[int], packed: Bytes) -> int:
    """Pack frames from the start on; returns how many."""
    if (library := _library()) is None:
        return 0
    widths = np.array(bits, np.int64)
    frames, places = map(ctypes.c_int64, codes.shape)
    library.zoo_pack_fields(_address(codes), frames, places, _address(widths), _address(packed))
    return len(codes)


def _unpack_natively(packed: Bytes, bits: Sequence[int], codes: Codes) -> int:
    """Unpack frames from the start on; returns how many."""
    if (library := _library()) is None:
        return 0
    # Eight frames end on a whole byte. Fields are read as eight bytes, which must not reach beyond the last one.
    widths = np.tile(np.array(bits, np.int64), 8)
    starts = np.cumsum(widths) - widths
    offset, before, beside = starts // 8, starts % 8, 64 - widths
    size = int(widths.sum()) // 8
    groups = max(0, min(len(codes) // 8, (len(packed) - 8 - int(offset[-1])) // size + 1))
    numbers = map(ctypes.c_int64, (groups, len(widths), size))
    library.zoo_unpack_fields(_address(packed), *numbers, *map(_address, (offset, before, beside, codes)))
    return 8 * groups


# ------------------------------------------------------------------------------------------------------------------- NumPy
#
# Eight to 32 fields at a time: neighbours are joined, two halves of a machine word into one field, until a word is 64 bits
# wide; then one, two or four words whose fields make whole bytes are a group. All of it is arithmetic on whole arrays.


@dataclass(frozen=True)
class _Grouping:
    """How fields of some bits are joined: into words of ``width`` bits, and ``words`` of them into whole bytes."""

    narrow: int
    width: int
    words: int

    @classmethod
    def of(cls, bits: int) -> _Grouping:
        narrow = 8 if bits <= 8 else 16 if bits <= 16 else 32
        width = bits * (64 // narrow)
        return cls(narrow, width, 8 // math.gcd(width, 8))

    @property
    def fields(self) -> int:
        return self.words * 64 // self.narrow

    @property
    def bytes(self) -> int:
        return self.words * self.width // 8

    @property
    def units(self) -> int:
        return -(-self.bytes // 8)

    @property
    def places(self) -> list[tuple[int, int]]:
        """For each word of a group, the 64-bit unit it begins in, and the left shift that puts it there.

        A shift below zero is one to the right, and the rest of the word goes into the next unit.
        """
        starts = (divmod(word * self.width, 64) for word in range(self.words))
        return [(unit, 64 - used - self.width) for unit, used in starts]


def _pack_equal(codes: Codes, bits: int, packed: Bytes) -> None:
    group = _Grouping.of(bits)
    if bits == group.narrow:
        np.copyto(packed.view(f">u{bits // 8}"), codes, casting="unsafe")
        return
    # The units of the last group reach beyond it.
    buffer = np.empty(-(-min(len(codes), BLOCK) // group.fields) * group.bytes + 8, np.uint8)
    for start in range(0, len(codes), BLOCK):
        fields = codes[start : start + BLOCK].astype(f"<u{group.narrow // 8}")
        if missing := -len(fields) % group.fields:
            fields = np.concatenate([fields, np.zeros(missing, fields.dtype)])
        width, size = bits, group.narrow
        while size < 64:
            pairs = fields.view(f"<u{size // 4}")
            fields = pairs & ((1 << size) - 1)
            fields <<= width
            fields |= pairs >> size
            width, size = 2 * width, 2 * size
        units = _join(fields.reshape(-1, group.words), group)
        for unit, values in enumerate(units):
            np.ndarray(len(values), ">u8", buffer.data, 8 * unit, (group.bytes,))[:] = values
        part = packed[start * bits // 8 : packed_bytes(min(start + BLOCK, len(codes)), [bits])]
        part[:] = buffer[: len(part)]


def _join(words: NDArray[Any], group: _Grouping) -> list[NDArray[Any]]:
    """Words ``[groups, words]`` as the 64-bit units that they fill from the high end, each ``[groups]``.

    The last unit of a group reaches into the following groups and holds what they begin with, so that it does not matter which
    of them is written first.
    """
    units: list[Any] = [0] * group.units
    for word, (unit, shift) in enumerate(group.places):
        if shift >= 0:
            units[unit] |= words[:, word] << shift
        else:
            units[unit] |= words[:, word] >> -shift
            units[unit + 1] |= words[:, word] << (64 + shift)
    # Bytes of the last unit that are filled, and how many groups these come from.
    filled, groups = group.bytes - 8 * (group.units - 1), 1
    while filled < 8:
        units[-1][:-groups] |= units[0][groups:] >> 8 * filled
        filled, groups = (2 * filled, 2 * groups) if group.units == 1 else (8, 1)
    return units


def _unpack_equal(packed: Bytes, bits: int, codes: Codes) -> None:
    group = _Grouping.of(bits)
    if bits == group.narrow:
        codes[:] = packed.view(f">u{bits // 8}")
        return
    for start in range(0, len(codes), BLOCK):
        stop = min(start + BLOCK, len(codes))
        groups = -(-(stop - start) // group.fields)
        # What is read of the last group reaches beyond it.
        reach = groups * group.bytes + 8
        part = packed[start * bits // 8 :][:reach]
        if len(part) < reach:
            part = np.concatenate([part, np.zeros(reach - len(part), np.uint8)])
        units = [np.ndarray(groups, ">u8", part.data, 8 * unit, (group.bytes,)).astype("<u8") for unit in range(group.units)]
        fields, width, size = _split(units, group), group.width, 64
        while size > group.narrow:
            width, size = width // 2, size // 2
            high = fields >> width
            fields &= (1 << width) - 1
            fields <<= size
            fields |= high
            fields = fields.view(f"<u{size // 8}")
        codes[start:stop] = fields[: stop - start]


def _split(units: Sequence[NDArray[Any]], group: _Grouping) -> NDArray[Any]:
    """The words ``[groups * words]`` that `_join` was given."""
    if group.words == 1:
        return units[0] >> (64 - group.width)
    words = np.empty((len(units[0]), group.words), np.uint64)
    for word, (unit, shift) in enumerate(group.places):
        field = units[unit] >> shift if shift >= 0 else units[unit] << -shift | units[unit + 1] >> (64 + shift)
        np.bitwise_and(field, (1 << group.width) - 1, out=words[:, word])
    return words.reshape(-1)


def _pack_mixed(codes: Codes, bits: Sequence[int], packed: Bytes) -> None:
    """Fields of several widths, one bit of all frames at a time, in blocks that end on whole bytes."""
    shifts = [(place, shift) for place, width in enumerate(bits) for shift in range(width - 1, -1, -1)]
    for start in range(0, len(codes), BLOCK):
        block = codes[start : start + BLOCK]
        columns = np.empty((len(block), len(shifts)), np.uint8)
        for column, (place, shift) in enumerate(shifts):
            columns[:, column] = block[:, place] >> shift & 1
        part = np.packbits(columns)
        packed[start * len(shifts) // 8 :][: len(part)] = part


def _unpack_mixed(packed: Bytes, bits: Sequence[int], codes: Codes) -> None:
    wide = sum(bits)
    for start in range(0, len(codes), BLOCK):
        stop = min(start + BLOCK, len(codes))
        fields = np.unpackbits(packed[start * wide // 8 : -(-stop * wide // 8)], count=(stop - start) * wide)
        columns, first = fields.reshape(-1, wide), 0
        for place, width in enumerate(bits):
            weights = 1 << np.arange(width - 1, -1, -1, dtype=np.int64)
            codes[start:stop, place] = columns[:, first : first + width] @ weights
            first += width

"""Layout of codes and signs in bytes, as the kernels and their callers agree on it."""

from __future__ import annotations

import torch
from jaxtyping import UInt8
from torch import Tensor

from zoo.errors import InputError

#: Bytes that rows are padded to.
WORD = 8


def row_bytes(length: int) -> int:
    """Bytes of a packed row of ``length`` signs."""
    return -(-length // (8 * WORD)) * WORD


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes of a row of codes."""
    return -(-columns // 4) * 3 if bits == 6 else -(-columns * bits // 8)


def pack(codes: UInt8[Tensor, "*rows columns"], bits: int) -> UInt8[Tensor, "*rows bytes"]:
    """Codes of 4, 6 or 8 bits side by side along the last axis, lowest bits first; a row ends on a whole byte (6 bits: three).

    Two codes make a byte, or four make three; what is missing to that is filled up with zero codes.
    """
    if bits == 8:
        return codes.contiguous()
    group = 8 // bits if bits == 4 else 4
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % group))
    parts = codes.unflatten(-1, (-1, group)).unbind(-1)
    if bits == 4:
        return parts[0] | (parts[1] << 4)
    a, b, c, d = parts
    return torch.stack([a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)], dim=-1).flatten(-2)


def unpack(packed: UInt8[Tensor, "*rows bytes"], bits: int, columns: int) -> UInt8[Tensor, "*rows columns"]:
    """The inverse of `pack`; ``columns`` is the number of codes in a row.

    Raises:
        InputError: the rows have another length.
    """
    if packed.shape[-1] != packed_bytes(columns, bits):
        raise InputError(f"{columns} codes of {bits} bits are not {packed.shape[-1]} bytes")
    if bits == 8:
        return packed
    if bits == 4:
        codes = torch.stack([packed & 15, packed >> 4], dim=-1)
    else:
        a, b, c = packed.unflatten(-1, (-1, 3)).unbind(-1)
        codes = torch.stack([a & 63, (a >> 6) | ((b & 15) << 2), (b >> 4) | ((c & 3) << 4), c >> 2], dim=-1)
    return codes.flatten(-2)[..., :columns]


def block_size(columns: int, scales: int) -> int:
    """Columns that share a scale: the power of two with ``scales`` blocks in a row; all if there is one scale."""
    if scales == 1:
        return columns
    size = 1
    while size * scales < columns:
        size *= 2
    return size

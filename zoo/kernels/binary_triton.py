"""Products of packed signs on a GPU.

Few rows are bound by reading the weights: they are read as they are, and differing bits counted. Many rows are bound by the
arithmetic: bits become signs in int8 within the registers, and tensor cores multiply them, exactly, into int32.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Int32, Shaped, UInt8
from torch import Tensor

from zoo.kernels.packing import row_bytes

_BITS = 32
_PACK_WORDS = 64
_MOST_ROWS = 16


def pack_signs(x: Shaped[Tensor, "*rows length"]) -> UInt8[Tensor, "*rows bytes"]:
    """`zoo.kernels.binary.pack_signs`, in one pass over the numbers."""
    length = x.shape[-1]
    flat = x.reshape(-1, length)
    packed = torch.empty(len(flat), row_bytes(length) // 4, dtype=torch.int32, device=x.device)
    words = packed.shape[1]
    if packed.numel():
        _pack[(len(flat), triton.cdiv(words, _PACK_WORDS))](
            flat, packed, length, words, *flat.stride(), WORDS_AT_ONCE=_PACK_WORDS
        )
    return packed.view(torch.uint8).reshape(*x.shape[:-1], row_bytes(length))


def multiply(
    a: UInt8[Tensor, "rows bytes"], b: UInt8[Tensor, "outputs bytes"], length: int, count_bits: bool
) -> Int32[Tensor, "rows outputs"]:
    """Products of packed rows of signs, by counting bits or on tensor cores."""
    rows, outputs, words = len(a), len(b), a.shape[1] // 4
    product = torch.empty(rows, outputs, dtype=torch.int32, device=a.device)
    if not product.numel():
        return product
    left, right = a.view(torch.int32), b.view(torch.int32)
    if count_bits:
        block_rows = min(_MOST_ROWS, triton.next_power_of_2(rows))
        block_outputs = max(1, 16 // block_rows)
        _count[(triton.cdiv(outputs, block_outputs), triton.cdiv(rows, block_rows))](
            left,
            right,
            product,
            rows,
            outputs,
            length,
            WORDS=words,
            BLOCK_ROWS=block_rows,
            BLOCK_OUTPUTS=block_outputs,
            BLOCK_WORDS=min(256, triton.next_power_of_2(words)),
            HARDWARE=torch.version.cuda is not None and a.device.type == "cuda",
        )
        return product
    block_rows = 128 if rows > 64 else max(16, triton.next_power_of_2(rows))
    _multiply[(triton.cdiv(rows, block_rows), triton.cdiv(outputs, 128))](
        left,
        right,
        product,
        rows,
        outputs,
        length,
        WORDS=words,
        BLOCK_ROWS=block_rows,
        BLOCK_OUTPUTS=128,
        BLOCK_WORDS=4,
        num_warps=8,
        num_stages=3,
    )
    return product


@triton.jit
@no_type_check
def _pack(x, packed, length, words, row_stride, stride, WORDS_AT_ONCE: tl.constexpr):
    """Words of one row of signs."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * WORDS_AT_ONCE + tl.arange(0, WORDS_AT_ONCE)
    bit = tl.arange(0, 32)
    element = word[:, None] * 32 + bit[None, :]
    value = tl.load(x + row * row_stride + element.to(tl.int64) * stride, mask=element < length, other=0)
    negative = (value < 0).to(tl.int32)
    tl.store(packed + row * words + word, tl.sum(negative << bit[None, :], 1), mask=word < words)


@triton.jit
@no_type_check
def _ones(word, HARDWARE: tl.constexpr):
    """Bits that are set."""
    if HARDWARE:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
    pairs = word - ((word >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F
    sixteens = eights + (eights >> 8)
    return (sixteens + (sixteens >> 16)) & 0x3F


@triton.jit
@no_type_check
def _count(
    a,
    b,
    product,
    rows,
    outputs,
    length,
    WORDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Products of a few rows with a few outputs, by counting the bits that differ."""
    output = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    different = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.int32)
    for start in range(0, WORDS, BLOCK_WORDS):
        word = start + tl.arange(0, BLOCK_WORDS)
        inside = word[None, :] < WORDS
        weights = tl.load(
            b + output[:, None].to(tl.int64) * WORDS + word[None, :], mask=inside & (output[:, None] < outputs), other=0
        )
        inputs = tl.load(a + row[:, None].to(tl.int64) * WORDS + word[None, :], mask=inside & (row[:, None] < rows), other=0)
        different += tl.sum(_ones(inputs[:, None, :] ^ weights[None, :, :], HARDWARE), 2)
    here = row[:, None].to(tl.int64) * outputs + output[None, :]
    tl.store(product + here, length - 2 * different, mask=(row[:, None] < rows) & (output[None, :] < outputs))


@triton.jit
@no_type_check
def _signs(words, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """The signs of rows of words, 1 and -1 in int8."""
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape((1 - 2 * bits).to(tl.int8), [ROWS, WORDS * 32])


@triton.jit
@no_type_check
def _multiply(
    a,
    b,
    product,
    rows,
    outputs,
    length,
    WORDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """Products of many rows with many outputs, as int8 on tensor cores."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    output = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.int32)
    for start in range(0, WORDS, BLOCK_WORDS):
        word = start + tl.arange(0, BLOCK_WORDS)
        inside = word[None, :] < WORDS
        inputs = tl.load(a + row[:, None].to(tl.int64) * WORDS + word[None, :], mask=inside & (row[:, None] < rows), other=0)
        weights = tl.load(
            b + output[:, None].to(tl.int64) * WORDS + word[None, :], mask=inside & (output[:, None] < outputs), other=0
        )
        left = _signs(inputs, BLOCK_ROWS, BLOCK_WORDS)
        right = _signs(weights, BLOCK_OUTPUTS, BLOCK_WORDS)
        total += tl.dot(left, tl.trans(right), out_dtype=tl.int32)
    # Padding is positive on both sides: every padded bit added 1.
    padding = tl.cdiv(WORDS, BLOCK_WORDS) * BLOCK_WORDS * 32 - length
    here = row[:, None].to(tl.int64) * outputs + output[None, :]
    tl.store(product + here, total - padding, mask=(row[:, None] < rows) & (output[None, :] < outputs))

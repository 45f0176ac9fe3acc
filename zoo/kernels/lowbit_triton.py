"""Products with packed low-bit weights on a GPU: codes are decoded in registers, next to the product that they feed.

The codes that share a byte, or three, go to separate products, with every second or fourth column of the inputs, so nothing has
to be put in order. Decoding is shifts and one exact scaling, as in `zoo.quantization.rounding`.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, UInt8
from torch import Tensor

from zoo.kernels.formats import FloatFormat
from zoo.kernels.packing import block_size

_BLOCK_BATCH = 16
_BLOCK_ROWS = 32
# Groups of codes that a program multiplies at a time; of one, two or four codes.
_BLOCK_GROUPS = {8: 128, 4: 64, 6: 32}
_PER_GROUP = {8: 1, 4: 2, 6: 4}


def product(
    x: Float[Tensor, "batch columns"],
    codes: UInt8[Tensor, "rows bytes"],
    scale: Float[Tensor, "rows scales"],
    format: FloatFormat,
) -> Float[Tensor, "batch rows"]:
    """``x @ weight.T`` for a packed weight, in the precision of ``x`` with sums in float32."""
    x, scale = x.contiguous(), scale.contiguous()
    batch, columns = x.shape
    rows, row_bytes = codes.shape
    y = torch.empty(batch, rows, device=x.device, dtype=x.dtype)
    bits = format.stored_bits
    _multiply[(triton.cdiv(rows, _BLOCK_ROWS), triton.cdiv(batch, _BLOCK_BATCH))](
        x,
        codes.contiguous(),
        scale,
        y,
        batch,
        rows,
        columns,
        row_bytes,
        scale.shape[1],
        block_size(columns, scale.shape[1]),
        BITS=bits,
        GROUPS=triton.cdiv(columns, _PER_GROUP[bits]),
        PER_GROUP=_PER_GROUP[bits],
        GROUP_BYTES=3 if bits == 6 else 1,
        MAGNITUDE_MASK=(1 << (format.exponent_bits + format.mantissa_bits)) - 1,
        SIGN_SHIFT=format.bits - 1,
        SIGNED=format.signed,
        MANTISSA_BITS=format.mantissa_bits,
        EXPONENT_BITS=format.exponent_bits,
        REBIAS=127 - format.bias,
        STEP=format.smallest_step,
        SCALED_INSIDE=scale.shape[1] > 1,
        EXACT=x.dtype == torch.float32,
        BLOCK_BATCH=_BLOCK_BATCH,
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_GROUPS=_BLOCK_GROUPS[bits],
    )
    return y


@triton.jit
@no_type_check
def _decode(
    code,
    MAGNITUDE_MASK: tl.constexpr,
    SIGN_SHIFT: tl.constexpr,
    SIGNED: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    REBIAS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Values of codes in float32."""
    magnitude = code & MAGNITUDE_MASK
    value = magnitude.to(tl.float32) * STEP
    if EXPONENT_BITS > 0:
        normal = ((magnitude << (23 - MANTISSA_BITS)) + (REBIAS << 23)).to(tl.float32, bitcast=True)
        value = tl.where(magnitude < (1 << MANTISSA_BITS), value, normal)
    if SIGNED:
        value = tl.where(((code >> SIGN_SHIFT) & 1) == 1, -value, value)
    return value


@triton.jit
@no_type_check
def _multiply(
    x,
    codes,
    scale,
    y,
    n_batch,
    n_rows,
    n_columns,
    row_bytes,
    n_scales,
    block,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    MAGNITUDE_MASK: tl.constexpr,
    SIGN_SHIFT: tl.constexpr,
    SIGNED: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    REBIAS: tl.constexpr,
    STEP: tl.constexpr,
    SCALED_INSIDE: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    """A tile of outputs; a group is the codes that share one or three bytes."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    item = tl.program_id(1) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    offset = tl.arange(0, BLOCK_GROUPS)
    row_codes = codes + row[:, None].to(tl.int64) * row_bytes
    total = tl.zeros([BLOCK_BATCH, BLOCK_ROWS], tl.float32)
    for start in range(0, GROUPS, BLOCK_GROUPS):
        group = start + offset
        byte = group * GROUP_BYTES
        inside = (row[:, None] < n_rows) & (byte[None, :] < row_bytes)
        word = tl.load(row_codes + byte[None, :], mask=inside, other=0).to(tl.int32)
        if GROUP_BYTES == 3:
            word += tl.load(row_codes + byte[None, :] + 1, mask=inside, other=0).to(tl.int32) << 8
            word += tl.load(row_codes + byte[None, :] + 2, mask=inside, other=0).to(tl.int32) << 16
        for member in tl.static_range(PER_GROUP):
            code = (word >> (member * BITS)) & ((1 << BITS) - 1)
            value = _decode(code, MAGNITUDE_MASK, SIGN_SHIFT, SIGNED, MANTISSA_BITS, EXPONENT_BITS, REBIAS, STEP)
            column = group * PER_GROUP + member
            if SCALED_INSIDE:
                places = row[:, None] * n_scales + (column // block)[None, :]
                value *= tl.load(scale + places, mask=(row[:, None] < n_rows) & (column[None, :] < n_columns), other=0)
            places = item[:, None].to(tl.int64) * n_columns + column[None, :]
            inputs = tl.load(x + places, mask=(item[:, None] < n_batch) & (column[None, :] < n_columns), other=0)
            if EXACT:
                total = tl.dot(inputs, tl.trans(value), total, input_precision="ieee")
            else:
                total = tl.dot(inputs, tl.trans(value.to(inputs.dtype)), total)
    if not SCALED_INSIDE:
        total *= tl.load(scale + row, mask=row < n_rows, other=0)[None, :]
    out = item[:, None].to(tl.int64) * n_rows + row[None, :]
    tl.store(y + out, total.to(y.dtype.element_ty), mask=(item[:, None] < n_batch) & (row[None, :] < n_rows))

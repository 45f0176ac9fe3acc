"""Products with packed low-bit weights, decoded on the way: on a CPU in registers or tile by tile, on a GPU in the kernel.

Values of at most 8 bits are exact in float32, bfloat16 and, with up to 5 exponent bits, in float16, so every path gives the
product with the dequantized weight up to the order of its sums. What runs where, and the measurements behind it:

- few inputs on a CPU: `lowbit.c`, which reads the packed bytes once and no more; where there is no C compiler or no AVX-512,
  the same tiles as for many inputs;
- many inputs on a CPU: tiles of the weight decoded into a buffer, each multiplied at once, so that memory follows the packed
  size;
- few inputs on a GPU: `lowbit_triton`; many inputs: one decoded weight and the library's product.
"""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8, Int64, UInt8
from torch import Tensor

from zoo.kernels import native, packing
from zoo.kernels.formats import FloatFormat, format_named, values
from zoo.moved import names_of

#: Inputs up to which decoding in registers beats decoding into memory; `zoo bench quantize` shows both sides of it.
FEW_ROWS_CPU = 32
FEW_ROWS_CUDA = 64
# Numbers of a decoded tile: 4 MB, which a second-level cache nearly holds.
_TILE_NUMBERS = 1 << 20
_CHUNK = 32
_MOST_BATCH = 8


def product(
    x: Float[Tensor, "*batch columns"],
    codes: UInt8[Tensor, "rows bytes"],
    scale: Float[Tensor, "rows scales"],
    format: FloatFormat,
) -> Float[Tensor, "*batch rows"]:
    """``x @ weight.T`` for a packed weight, in the precision of ``x``.

    Args:
        x: inputs.
        codes: packed codes of each row, see `zoo.kernels.packing.pack`.
        scale: what the values of a row, or of equal blocks of it, are multiplied with.
        format: of the codes.
    """
    return torch.ops.zoo.lowbit_product(x, codes, scale, format.name)


@torch.library.custom_op(
    "zoo::lowbit_product",
    mutates_args=(),
    # Written out, because the checker of the test suite hides the annotations.
    schema="(Tensor x, Tensor codes, Tensor scale, str format_name) -> Tensor",
)
def _product(x: Tensor, codes: Tensor, scale: Tensor, format_name: str) -> Tensor:
    format = format_named(format_name)
    flat = x.reshape(-1, x.shape[-1])
    if not len(flat):
        return x.new_empty(*x.shape[:-1], len(codes))
    if format.max > torch.finfo(x.dtype).max:
        flat = flat.float()
    if x.device.type == "cpu":
        few = len(flat) <= FEW_ROWS_CPU and compiled(format, flat.shape[1], scale.shape[1])
        y = in_registers(flat, codes, scale, format) if few else in_tiles(flat, codes, scale, format)
    elif x.device.type == "cuda" and len(flat) <= FEW_ROWS_CUDA:
        from zoo.kernels import lowbit_triton

        y = lowbit_triton.product(flat, codes, scale, format)
    else:
        y = F.linear(flat, dequantize(codes, scale, format, flat.shape[1], x.dtype))
    return y.to(x.dtype).view(*x.shape[:-1], len(codes))


@_product.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, format_name: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(codes))


def dequantize(
    codes: UInt8[Tensor, "rows bytes"],
    scale: Float[Tensor, "rows scales"],
    format: FloatFormat,
    columns: int,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "rows columns"]:
    """The weight itself: values times scales, rounded to ``dtype``."""
    weight = decoded(codes, format, columns)
    if scale.shape[1] == 1:
        weight = weight.mul_(scale)
    else:
        weight = weight.mul_(scale.repeat_interleave(packing.block_size(columns, scale.shape[1]), 1)[:, :columns])
    return weight.to(dtype)


def in_tiles(
    x: Float[Tensor, "batch columns"],
    codes: UInt8[Tensor, "rows bytes"],
    scale: Float[Tensor, "rows scales"],
    format: FloatFormat,
) -> Float[Tensor, "batch rows"]:
    """The product by tiles of the weight that are decoded one after the other.

    One scale per row multiplies the result, so that the values stay exact in bfloat16; float16 has no room for that.
    """
    tile = max(16, _TILE_NUMBERS // x.shape[1])
    parts = []
    for start in range(0, len(codes), tile):
        rows = slice(start, start + tile)
        if scale.shape[1] == 1 and x.dtype != torch.float16:
            values = decoded(codes[rows], format, x.shape[1]).to(x.dtype)
            parts.append(F.linear(x, values).float().mul_(scale[rows, 0]).to(x.dtype))
        else:
            parts.append(F.linear(x, dequantize(codes[rows], scale[rows], format, x.shape[1], x.dtype)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def integer_factor(format: FloatFormat) -> float | None:
    """Factor that turns all values of a format into integers of 8 bits; ``None`` if they do not fit."""
    return 1 / format.smallest_step if format.max <= 127 * format.smallest_step else None


def product_of_integers(
    x: Int8[Tensor, "batch columns"], codes: UInt8[Tensor, "rows bytes"], format: FloatFormat
) -> Float[Tensor, "batch rows"]:
    """Exact products of integers with the values of a format times its `integer_factor`, before any scale, in float32."""
    factor = integer_factor(format)
    assert factor is not None
    tile = max(16, 4 * _TILE_NUMBERS // x.shape[1])
    parts = []
    for start in range(0, len(codes), tile):
        integers = (decoded(codes[start : start + tile], format, x.shape[1]) * factor).to(torch.int8)
        parts.append(torch._int_mm(x, integers.T).float())
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def in_registers(
    x: Float[Tensor, "batch columns"],
    codes: UInt8[Tensor, "rows bytes"],
    scale: Float[Tensor, "rows scales"],
    format: FloatFormat,
) -> Float[Tensor, "batch rows"]:
    """The product by the compiled kernel, eight inputs at a time; sums are in float32."""
    function = _native(format, x.shape[1], scale.shape[1])
    assert function is not None
    table, factor = _table(format)
    scale = (scale * factor).contiguous()
    bits, columns = format.stored_bits, x.shape[1]
    chunks = -(-columns // _CHUNK)
    tail_bytes = codes.shape[1] - (chunks - 1) * _CHUNK * bits // 8
    block = packing.block_size(columns, scale.shape[1])
    y = torch.empty(len(x), len(codes), dtype=torch.float32, device=x.device)
    codes = codes.contiguous()
    for start in range(0, len(x), _MOST_BATCH):
        inputs = _in_chunks(x[start : start + _MOST_BATCH].float(), bits)
        batch = inputs.shape[1]
        native.over_rows(
            function,
            len(codes),
            batch * codes.numel() * 8 // bits,
            *map(
                ctypes.c_void_p, (codes.data_ptr(), scale.data_ptr(), inputs.data_ptr(), y[start:].data_ptr(), table.data_ptr())
            ),
            *map(
                ctypes.c_int64,
                (
                    codes.shape[1],
                    chunks,
                    scale.shape[1],
                    block // _CHUNK if scale.shape[1] > 1 else 0,
                    scale.shape[1] > 1 and block < _CHUNK,
                    tail_bytes if tail_bytes < _CHUNK * bits // 8 else 0,
                    len(codes),
                    batch,
                    bits,
                    format.mantissa_bits,
                ),
            ),
        )
    return y.to(x.dtype)


def compiled(format: FloatFormat, columns: int, scales: int) -> bool:
    """Whether the compiled kernel multiplies with such weights on this machine."""
    return _native(format, columns, scales) is not None


def _native(format: FloatFormat, columns: int, scales: int) -> ctypes._NamedFuncPointer | None:
    """The compiled kernel if there is one for this format and these blocks."""
    library = native.library("lowbit.c")
    if library is None or not library.zoo_lowbit_supported() or not format.signed:
        return None
    # The sign has to be the highest of the stored bits. Eight of them are read as float16, which has no more exponents and
    # keeps the largest one for infinity.
    reserved = format.exponent_bits > 5 or (format.exponent_bits == 5 and format.specials == "finite")
    if format.stored_bits != format.bits or (format.bits == 8 and reserved):
        return None
    block = packing.block_size(columns, scales)
    if scales > 1 and block % _CHUNK and (block != _CHUNK // 2 or scales % 2):
        return None
    function = library.zoo_lowbit_product
    function.restype = None
    function.argtypes = [ctypes.c_int64] * 2 + [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 10
    return function


@functools.lru_cache(maxsize=64)
def _table(format: FloatFormat) -> tuple[Float[Tensor, " values"], float]:
    """What the kernel looks up, and what its results are multiplied with."""
    if format.stored_bits == 8:
        return torch.zeros(1, dtype=torch.float32), 2.0 ** (15 - format.bias)
    table = values(format)
    return table[: 1 << (format.bits - 1)].contiguous() if format.bits == 6 else table, 1.0


def _in_chunks(x: Float[Tensor, "batch columns"], bits: int) -> Float[Tensor, "chunks batch 32"]:
    """Inputs in the order in which the kernel meets them: of 4-bit codes, the even columns of a chunk first."""
    chunks = F.pad(x, (0, -x.shape[1] % _CHUNK)).unflatten(1, (-1, _CHUNK)).transpose(0, 1)
    if bits == 4:
        chunks = chunks.unflatten(2, (-1, 2)).transpose(2, 3).flatten(2)
    return chunks.contiguous()


def decoded(codes: UInt8[Tensor, "rows bytes"], format: FloatFormat, columns: int) -> Float[Tensor, "rows columns"]:
    """Values before scaling; two at a time where a byte holds two codes."""
    bits = format.stored_bits
    if bits == 4:
        pairs = _pairs(format, str(codes.device)).index_select(0, codes.flatten().to(torch.int32))
        return pairs.view(torch.float32).view(len(codes), -1)[:, :columns]
    table = F.pad(values(format, codes.device), (0, (1 << bits) - (1 << format.bits)))
    return table.index_select(0, packing.unpack(codes, bits, columns).flatten().to(torch.int32)).view(len(codes), columns)


@functools.lru_cache(maxsize=64)
def _pairs(format: FloatFormat, device: str) -> Int64[Tensor, " bytes"]:
    """For every byte, the values of its lower and its upper half, side by side."""
    table = F.pad(values(format, device), (0, 16 - (1 << format.bits)))
    byte = torch.arange(256, device=device)
    return torch.stack([table[byte & 15], table[byte >> 4]], 1).view(torch.int64)[:, 0]


#: What lies in `zoo.kernels.packing`, for one release.
__getattr__ = names_of(__name__, {"block_size": "zoo.kernels.packing"})

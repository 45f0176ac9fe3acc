"""Products of vectors of signs, packed one bit each.

The format: bit 1 is negative, bit 0 positive or zero; little-endian bits, the first element in bit 0 of byte 0; every row is
padded with 0 bits to a multiple of 64. ``numpy.packbits(x < 0, bitorder="little")`` gives this layout. Padding cancels, so the
product of two rows of K signs is ``K - 2 * popcount(a xor b)``: an integer, the same on every device and by every way.
"""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8, Int32, Int64, Shaped, UInt8
from torch import Tensor

from zoo.errors import InputError
from zoo.kernels import native, packing
from zoo.moved import names_of
from zoo.precision import exact_float32

Execution = Literal["native", "numpy", "int8", "float32", "triton popcount", "triton int8"]


# Without a compiler NumPy counts bits one row of inputs at a time; from this many rows on, signs as int8 are faster.
_NUMPY_ROWS = 24
# A GPU counts bits up to this many rows, and multiplies signs on its tensor cores beyond.
_GPU_POPCOUNT_ROWS = 16
# Unpacked weights, and rows of unpacked inputs, in memory at a time.
_UNPACKED_BYTES = 4 << 20
# Signs multiplied in the time of one operation of another kernel.
_SIGNS_PER_OPERATION = 128
_SOURCE = "binary.c"


def pack_signs(x: Float[Tensor, "*rows length"] | Int8[Tensor, "*rows length"]) -> UInt8[Tensor, "*rows bytes"]:
    """The signs of numbers, one bit each; zero counts as positive, and so does a NaN."""
    return torch.ops.zoo.pack_signs(x.detach())


def unpack_signs(packed: UInt8[Tensor, "rows bytes"], length: int) -> Int8[Tensor, "rows length"]:
    """Signs, 1 and -1, of packed rows."""
    # Eight signs at a time: a table of words is several times faster than shifting bits.
    words = _sign_table(packed.device).index_select(0, packed.flatten().int())
    return words.view(torch.int8).view(len(packed), 8 * packed.shape[1])[:, :length]


def binary_matmul(
    a: UInt8[Tensor, "rows bytes"], b: UInt8[Tensor, "outputs bytes"], length: int
) -> Int32[Tensor, "rows outputs"]:
    """Products of packed rows of ``length`` signs with each other.

    Raises:
        InputError: the rows are not as long as ``length`` signs are.
    """
    if a.shape[1] != packing.row_bytes(length) or b.shape[1] != packing.row_bytes(length):
        raise InputError(f"rows of {length} signs have {packing.row_bytes(length)} bytes, not {a.shape[1]} and {b.shape[1]}")
    return torch.ops.zoo.binary_matmul(a, b, length)


def choose_execution(rows: int, device: torch.device) -> Execution:
    """Choose how to multiply that many rows; it decides the time and never the numbers.

    Measured by ``zoo study binary-speed`` (`eval/results/bench-binary.json`): on a processor that counts the bits of whole
    vectors, the compiled kernel is the fastest at any number of rows. Without a compiler NumPy's bit count wins up to two dozen
    rows, and signs as int8 beyond. A GPU counts bits at an eighth of the rate of its tensor cores, so it does so only where
    reading the weights takes longer.
    """
    if device.type == "cuda":
        if not find_spec("triton"):
            return "float32"
        return "triton popcount" if rows <= _GPU_POPCOUNT_ROWS else "triton int8"
    if device.type != "cpu":
        return "float32"
    if native.library(_SOURCE) is not None:
        return "native"
    return "numpy" if rows < _NUMPY_ROWS and hasattr(np, "bitwise_count") else "int8"


# ------------------------------------------------------------------------------------------------------------- operators


_LIBRARY = torch.library.Library("zoo", "FRAGMENT")
_LIBRARY.define("pack_signs(Tensor x) -> Tensor")
_LIBRARY.define("binary_matmul(Tensor a, Tensor b, SymInt length) -> Tensor")


@torch.library.impl(_LIBRARY, "pack_signs", "CompositeExplicitAutograd")
def _pack_signs(x: Tensor) -> Tensor:
    if x.device.type == "cuda" and find_spec("triton"):
        from zoo.kernels import binary_triton

        return binary_triton.pack_signs(x)
    negative = x < 0
    if x.device.type == "cpu":
        # NumPy takes ten times as long where the last axis is strided.
        packed = torch.from_numpy(np.packbits(negative.contiguous().numpy(), axis=-1, bitorder="little"))
    else:
        bits = F.pad(negative, (0, -x.shape[-1] % 8)).unflatten(-1, (-1, 8))
        weights = 2 ** torch.arange(8, device=x.device, dtype=torch.uint8)
        packed = (bits * weights).sum(-1, dtype=torch.uint8)
    return F.pad(packed, (0, packing.row_bytes(x.shape[-1]) - packed.shape[-1]))


@torch.library.impl(_LIBRARY, "binary_matmul", "CompositeExplicitAutograd")
def _binary_matmul(a: Tensor, b: Tensor, length: int) -> Tensor:
    return multiply(a.contiguous(), b.contiguous(), length, choose_execution(len(a), a.device))


def _unfilled_signs(x: Tensor) -> Tensor:
    # Sizes may be symbols here, which `row_bytes` does not take.
    return x.new_empty(*x.shape[:-1], -(-x.shape[-1] // (8 * packing.WORD)) * packing.WORD, dtype=torch.uint8)


def _unfilled_product(a: Tensor, b: Tensor, length: Any) -> Tensor:
    return a.new_empty(len(a), len(b), dtype=torch.int32)


torch.library.register_fake("zoo::pack_signs", _unfilled_signs, lib=_LIBRARY)
torch.library.register_fake("zoo::binary_matmul", _unfilled_product, lib=_LIBRARY)


# ------------------------------------------------------------------------------------------------------------ executions


def multiply(
    a: UInt8[Tensor, "rows bytes"], b: UInt8[Tensor, "outputs bytes"], length: int, execution: Execution
) -> Int32[Tensor, "rows outputs"]:
    """`binary_matmul` in a given way, for tests and measurements."""
    if not length:
        return torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device)
    if execution == "native":
        return _native(a, b, length)
    if execution == "numpy":
        return _numpy(a, b, length)
    if execution == "int8":
        return _int8(a, b, length)
    if execution == "float32":
        with exact_float32(a.device):
            return (unpack_signs(a, length).float() @ unpack_signs(b, length).float().T).to(torch.int32)
    from zoo.kernels import binary_triton

    return binary_triton.multiply(a, b, length, count_bits=execution == "triton popcount")


def _native(a: Tensor, b: Tensor, length: int) -> Tensor:
    compiled = native.library(_SOURCE)
    assert compiled is not None
    rows, outputs, words = len(a), len(b), a.shape[1] // packing.WORD
    product = torch.empty(rows, outputs, dtype=torch.int32)
    function = compiled.binary_matmul
    function.restype = None
    function.argtypes = [*[ctypes.c_long] * 2, *[ctypes.c_void_p] * 3, *[ctypes.c_long] * 3, ctypes.c_int32]
    pointers = (a.data_ptr(), b.data_ptr(), product.data_ptr())
    if product.numel():
        work = rows * outputs * length // _SIGNS_PER_OPERATION
        native.over_rows(function, outputs, work, *pointers, rows, outputs, words, length)
    return product


def _numpy(a: Tensor, b: Tensor, length: int) -> Tensor:
    weights, rows = b.numpy().view(np.uint64), a.numpy().view(np.uint64)
    different, counts = np.empty_like(weights), np.empty(weights.shape, dtype=np.uint8)
    total = torch.empty(len(a), len(b), dtype=torch.int32)
    for row, sums in zip(rows, total, strict=True):
        np.bitwise_count(np.bitwise_xor(weights, row, out=different), out=counts)
        torch.sum(torch.from_numpy(counts), 1, dtype=torch.int32, out=sums)
    return total.mul_(-2).add_(length)


def _int8(a: Tensor, b: Tensor, length: int) -> Tensor:
    product = torch.empty(len(a), len(b), dtype=torch.int32)
    at_a_time = max(1, _UNPACKED_BYTES // length)
    for rows, results in zip(a.split(at_a_time), product.split(at_a_time), strict=True):
        signs = unpack_signs(rows, length)
        for start in range(0, len(b), at_a_time):
            weights = unpack_signs(b[start : start + at_a_time], length)
            results[:, start : start + at_a_time] = torch._int_mm(signs, weights.T)
    return product


@cache
def _sign_table(device: torch.device) -> Shaped[Tensor, " 256"]:
    """The eight signs of every byte, as one word of eight int8."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return (1 - 2 * bits).to(torch.int8).view(torch.int64)[:, 0]


# ----------------------------------------------------------------------------------------------------------- convolution


class Geometry(NamedTuple):
    """Steps of a kernel over rows and columns; a convolution in one dimension has one row.

    Attributes:
        kernel, stride, dilation: along rows and columns.
        margins: zeros to the left, to the right, above and below; they count as 0, not as a sign.
        groups: blocks of channels with outputs of their own.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    margins: tuple[int, int, int, int] = (0, 0, 0, 0)
    groups: int = 1

    def result(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of the result.

        Raises:
            InputError: the kernel does not fit in.
        """
        left, right, above, below = self.margins
        sizes = (rows + above + below, columns + left + right)
        spans = [dilation * (kernel - 1) + 1 for kernel, dilation in zip(self.kernel, self.dilation, strict=True)]
        if any(size < span for size, span in zip(sizes, spans, strict=True)):
            raise InputError(f"{rows} x {columns} inputs, with margins {sizes}, are fewer than the kernel spans, {spans}")
        high, wide = ((size - span) // step + 1 for size, span, step in zip(sizes, spans, self.stride, strict=True))
        return high, wide


def binary_conv(
    x: Float[Tensor, "batch channels rows columns"], weight: UInt8[Tensor, "outputs bytes"], geometry: Geometry
) -> Int32[Tensor, "batch outputs rows_out columns_out"]:
    """Convolve the signs of numbers with packed signs.

    Args:
        x: numbers whose signs count; zero counts as positive.
        weight: one packed row per output; its order is row, column, channel.
        geometry: how the kernel slides.

    Raises:
        InputError: the input is smaller than the kernel.
    """
    batch, _, rows, columns = x.shape
    high, wide = geometry.result(rows, columns)
    outputs = len(weight) // geometry.groups
    products = []
    for group, signs in enumerate(x.chunk(geometry.groups, dim=1)):
        length = geometry.kernel[0] * geometry.kernel[1] * signs.shape[1]
        own = slice(group * outputs, (group + 1) * outputs)
        pixels = _pack_pixels(signs)
        rows_of_signs = _windows(F.pad(pixels, (0, 0, *geometry.margins)), geometry).flatten(0, 2).flatten(1)
        # Weights come first, so that places end up side by side and channels need not be moved.
        found = binary_matmul(weight[own], _as_packed(rows_of_signs), length).view(outputs, batch, high, wide)
        if any(geometry.margins):
            # Margins were taken for 1. The mean of that and of what -1 gives is what 0 gives.
            places = _border(geometry, rows, columns).to(x.device)
            negative = _windows(F.pad(pixels, (0, 0, *geometry.margins), value=_NEGATIVE[pixels.dtype]), geometry)
            border = negative[:, places // wide, places % wide].flatten(0, 1).flatten(1)
            other = binary_matmul(weight[own], _as_packed(border), length).view(outputs * batch, len(places))
            images = found.view(outputs * batch, high * wide)
            images.index_copy_(1, places, (images.index_select(1, places) + other) // 2)
        products.append(found)
    product = products[0] if len(products) == 1 else torch.cat(products)
    return product.transpose(0, 1)


# A pixel all of whose signs are negative: eight signs to a byte, or one.
_NEGATIVE = {torch.uint8: 255, torch.int8: -1}


def _pack_pixels(x: Tensor) -> Tensor:
    """[batch, rows, columns, bytes]: the signs of the channels of every pixel, packed where they fill whole bytes."""
    channels = x.shape[1]
    if channels % 8:
        return -(x < 0).permute(0, 2, 3, 1).to(torch.int8)
    return pack_signs(x.permute(0, 2, 3, 1))[..., : channels // 8]


def _as_packed(rows: Shaped[Tensor, "rows bytes"]) -> UInt8[Tensor, "rows padded"]:
    """Rows of signs in the packed format: bytes of eight signs need padding only."""
    return pack_signs(rows) if rows.dtype == torch.int8 else F.pad(rows, (0, -rows.shape[1] % packing.WORD))


def _windows(pixels: Shaped[Tensor, "batch rows columns bytes"], geometry: Geometry) -> Tensor:
    """What the kernel sees at every place, [batch, rows_out, columns_out, kernel rows, kernel columns, bytes], as a view."""
    pixels = pixels.contiguous()
    batch, rows, columns, size = pixels.shape
    high, wide = geometry._replace(margins=(0, 0, 0, 0)).result(rows, columns)
    image, row, column, byte = pixels.stride()
    steps = (row * geometry.stride[0], column * geometry.stride[1], row * geometry.dilation[0], column * geometry.dilation[1])
    return pixels.as_strided((batch, high, wide, *geometry.kernel, size), (image, *steps, byte))


@lru_cache(maxsize=256)
def _border(geometry: Geometry, rows: int, columns: int) -> Int64[Tensor, " places"]:
    """The places of the result, row by row, that see a margin."""
    margin = F.pad(torch.zeros(1, rows, columns, 1, dtype=torch.bool), (0, 0, *geometry.margins), value=True)
    return _windows(margin, geometry)[0].flatten(2).any(2).flatten().nonzero()[:, 0]


#: What lies in `zoo.kernels.packing`, for one release.
__getattr__ = names_of(__name__, dict.fromkeys(("WORD", "row_bytes"), "zoo.kernels.packing"))

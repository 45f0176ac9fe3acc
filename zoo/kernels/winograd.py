"""Convolutions of 3x3 by Winograd's minimal filtering (arXiv 1509.09308): 16 or 36 products for 4 or 16 pixels, not 36 or 144.

Maps are cut into tiles that overlap by two pixels. Each tile, and each kernel, is taken to as many places as a tile has
pixels, where the convolution is a product of matrices; what comes out is taken back to pixels. With tiles of 4, for 2 x 2
pixels, rounding is less than that of the direct convolution, as there are fewer sums; with tiles of 6, for 4 x 4 pixels, it is
about three times as much.

A few tiles at a time stay in a core's cache on their way. How many never depends on the map, and items are taken one by one,
so that an item gets the same numbers in every batch. Kernels are taken to the places at each call: that is a few percent of the
work, and keeping them would take two to four times the memory of the weights.
"""

from __future__ import annotations

import ctypes
import math
import threading
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.kernels import native

#: Rows of a product.
SLAB = 64
# Channels that the kernels in C take at a time, and at most.
_LANES, _MOST_CHANNELS = 16, 2048
# Fewer channels, or fewer tiles than a slab, are not worth the way there and back.
_LEAST_CHANNELS = 64
# Bytes of a kernel at the places.
_MOST_BYTES = 40 << 20

Maps = Float[Tensor, "batch _channels _rows _columns"]


def pays(inputs: int, outputs: int, rows: int, columns: int, side: int) -> bool:
    """Whether a convolution of this size is quicker by tiles; ``rows`` and ``columns`` are those of its result."""
    tiles = -(-rows // (side - 2)) * -(-columns // (side - 2))
    return (
        tiles >= SLAB
        and all(channels % _LANES == 0 and _LEAST_CHANNELS <= channels <= _MOST_CHANNELS for channels in (inputs, outputs))
        and 4 * side * side * inputs * outputs <= _MOST_BYTES
    )


def convolve(
    x: Maps,
    weight: Float[Tensor, "outputs inputs 3 3"],
    bias: Float[Tensor, " outputs"] | None,
    side: int,
    *,
    added: Maps | None = None,
    enlarged: bool = False,
) -> Maps | None:
    """The convolution with one zero on every side, in float32 on the CPU, channels last; the channels are multiples of 16.

    ``None`` where there are no compiled kernels: tiles by PyTorch's operators take longer than its convolution.

    Args:
        x: maps.
        weight, bias: as of PyTorch's convolution.
        side: of a tile, 4 or 6.
        added: maps that are added to the result.
        enlarged: whether every pixel of ``x`` stands for four, two by two.
    """
    library = native.library("winograd.c")
    if library is None:
        return None
    x = x.contiguous(memory_format=torch.channels_last)
    batch, inputs, rows, columns = x.shape
    rows, columns, outputs = rows << enlarged, columns << enlarged, weight.shape[0]
    out = torch.empty((batch, outputs, rows, columns), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if added is not None:
        added = added.contiguous(memory_format=torch.channels_last)
    shift = torch.zeros(outputs, dtype=x.dtype, device=x.device) if bias is None else bias.contiguous()
    kernel = _scratch.of("kernel", side * side, inputs, outputs)
    # Rows of the last slab that no tile fills are multiplied too.
    places = _scratch.of("places", side * side, SLAB, inputs)
    products = _scratch.of("products", side * side, SLAB, outputs)
    into, to_places, to_pixels = (getattr(library, f"zoo_{name}_{side}") for name in ("kernels", "tiles_in", "tiles_out"))
    _over(into, inputs, kernel.numel(), _address(weight), *_integers(*weight.stride(), inputs, outputs), _address(kernel))
    tiles = -(-rows // (side - 2)) * -(-columns // (side - 2))
    for index in range(batch):
        item, result = _address(x[index]), _address(out[index])
        extra = None if added is None else _address(added[index])
        for start in range(0, tiles, SLAB):
            count = min(SLAB, tiles - start)
            sizes = _integers(rows, columns, inputs, int(enlarged), start, SLAB)
            _over(to_places, count, places.numel(), item, *sizes, _address(places))
            torch.bmm(places, kernel, out=products)
            sizes = _integers(rows, columns, outputs, start, SLAB)
            _over(to_pixels, count, products.numel(), _address(products), *sizes, _address(shift), extra, result)
    return out


class _Scratch(threading.local):
    """Memory of a thread that the next convolution uses again: new memory costs more than a small convolution."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def of(self, name: str, *shape: int) -> Float[Tensor, "places rows columns"]:
        """Finite numbers of this shape, any."""
        count = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < count:
            with torch.inference_mode(False):
                held = self._held[name] = torch.zeros(count, dtype=torch.float32, device="cpu")
        return held[:count].view(shape)


_scratch = _Scratch()


def _over(function: Any, rows: int, work: int, *arguments: Any) -> None:
    def of_rows(first: int, last: int, *rest: Any) -> None:
        function(ctypes.c_int64(first), ctypes.c_int64(last), *rest)

    native.over_rows(of_rows, rows, work, *arguments)


def _integers(*values: int) -> tuple[ctypes.c_int64, ...]:
    return tuple(map(ctypes.c_int64, values))


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())

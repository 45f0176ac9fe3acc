"""A group norm for images whose channels lie next to each other, in C: `zoo.nn.norm` says why PyTorch's is not enough."""

from __future__ import annotations

import ctypes

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.kernels import native

# Pixels whose sums are added up in one thread.
_BLOCK = 512


def group_norm(
    x: Float[Tensor, "batch channels height width"],
    groups: int,
    weight: Float[Tensor, " channels"],
    bias: Float[Tensor, " channels"],
    eps: float,
    *,
    silu: bool = False,
    out: Float[Tensor, "batch channels height width"] | None = None,
) -> Float[Tensor, "batch channels height width"] | None:
    """Normalise a batch on the CPU in channels-last layout, which the result has as well; float32 or bfloat16.

    Sums are taken of deviations from a mean nearby and put together in float64, in an order that does not depend on the number
    of threads. ``None`` where there is no compiled kernel.

    Args:
        x: the batch.
        groups, weight, bias, eps: as of PyTorch's norm.
        silu: whether the result is multiplied with its logistic function, before it is rounded.
        out: where the result goes, laid out as ``x``; it may be ``x``.
    """
    library = native.library("norm.c")
    if library is None:
        return None
    items, channels, height, width = x.shape
    pixels = height * width
    blocks = -(-pixels // _BLOCK)
    out = torch.empty_like(x) if out is None else out
    scratch = torch.zeros(2, blocks, channels, dtype=torch.float64, device="cpu")
    scales = torch.empty(2, channels, dtype=torch.float32, device="cpu")
    # The second half of each; slices would take longer than the sums of a small image.
    sums, scale = _address(scratch), _address(scales)
    squares, shift = _address(scratch, blocks * channels), _address(scales, channels)
    factors = weight.detach().float().contiguous(), bias.detach().float().contiguous()
    half, active = ctypes.c_int64(x.dtype == torch.bfloat16), ctypes.c_int64(silu)
    size = tuple(map(ctypes.c_int64, (pixels, channels, _BLOCK)))
    settings = ctypes.c_int64(groups), ctypes.c_double(eps), *map(_address, factors)
    if torch.get_num_threads() == 1 or items * pixels * channels < native.LITTLE:
        count = ctypes.c_int64(items)
        library.zoo_group_norm(_address(x), count, half, *size, *settings, sums, squares, scale, shift, active, _address(out))
        return out
    for item, result in zip(x, out, strict=True):
        scratch.zero_()
        work = item.numel()
        _over_blocks(library.zoo_channel_sums, blocks, work, _address(item), half, *size, sums, squares)
        library.zoo_group_scales(sums, squares, ctypes.c_int64(blocks), *size[:2], *settings, scale, shift)
        changed = half, *size, scale, shift, active, _address(result)
        _over_blocks(library.zoo_scale_and_shift, blocks, work, _address(item), *changed)
    return out


def _over_blocks(function: object, blocks: int, work: int, *arguments: object) -> None:
    def of_rows(first: int, last: int, *rest: object) -> None:
        assert callable(function)
        function(ctypes.c_int64(first), ctypes.c_int64(last), *rest)

    native.over_rows(of_rows, blocks, work, *arguments)


def _address(tensor: Tensor, place: int = 0) -> ctypes.c_void_p:
    """Where a number of a contiguous tensor lies."""
    return ctypes.c_void_p(tensor.data_ptr() + place * tensor.element_size())

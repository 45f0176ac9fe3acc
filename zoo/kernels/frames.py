"""Norms and activations of frames between the products of decoders of sound: a frame's result in one pass in C.

Frames are float32 rows of channels on a CPU. Every function gives ``None`` where there is no compiled kernel or it does not
take the input, as where a gradient is asked for; the caller then does the same by PyTorch's operators, equal but for rounding.
A frame's result does not depend on what else is in the batch.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from zoo.kernels import native

Frames = Float[Tensor, "batch frames channels"]
Inside = Bool[Tensor, "batch frames 1"]
_HALF = torch.bfloat16


def depthwise_norm(
    x: Frames,
    inside: Inside | None,
    weight: Float[Tensor, "channels 1 kernel"],
    bias: Float[Tensor, " channels"],
    scale: Float[Tensor, " channels"],
    shift: Float[Tensor, " channels"],
    eps: float,
    dtype: torch.dtype,
) -> Frames | None:
    """A depth-wise convolution, zero outside of the items, and layer norm, rounded to ``dtype``."""
    library = _library(x, dtype)
    if library is None:
        return None
    batch, frames, channels = x.shape
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    factors = [weight[:, 0].T.float().contiguous(), *(values.float().contiguous() for values in (bias, scale, shift))]
    mask = None if inside is None else inside.contiguous()
    sizes = (frames, channels, weight.shape[2], dtype == _HALF)
    arguments = [*map(_address, (x, mask, *factors, out)), *map(ctypes.c_int64, sizes), ctypes.c_double(eps)]
    _over_rows(library.zoo_depthwise_norm, batch * frames, x.numel() * weight.shape[2], arguments)
    return out


def add_scaled(x: Frames, y: Frames, scale: Float[Tensor, " channels"]) -> Frames | None:
    """``x + scale * y`` where ``y`` is in bfloat16; in float32 PyTorch's own operator is as quick."""
    library = _library(x, y.dtype)
    if library is None or y.dtype != _HALF:
        return None
    x, y, factor, out = x.contiguous(), y.contiguous(), scale.float().contiguous(), torch.empty_like(x)
    arguments = [*map(_address, (x, y, factor, out)), ctypes.c_int64(x.shape[-1])]
    _over_rows(library.zoo_add_scaled, x.shape[0] * x.shape[1], x.numel(), arguments)
    return out


def scaled_silu(
    x: Frames,
    inside: Inside | None,
    scale: Float[Tensor, "batch 1 channels"],
    shift: Float[Tensor, "batch 1 channels"],
    before: int,
    after: int,
    dtype: torch.dtype,
) -> Float[Tensor, "batch padded channels"] | None:
    """SiLU of ``x * scale + shift``, zero outside of the items, between that many frames of zeros, rounded to ``dtype``."""
    library = _library(x, dtype)
    if library is None or x.stride(2) != 1 or x.stride(1) != x.shape[2]:
        return None
    batch, frames, channels = x.shape
    out = torch.empty(batch, before + frames + after, channels, dtype=dtype, device=x.device)
    out[:, :before] = 0
    out[:, before + frames :] = 0
    mask = None if inside is None else inside.contiguous()
    scale, shift = scale.expand(batch, 1, channels).contiguous(), shift.expand(batch, 1, channels).contiguous()
    sizes = (frames, channels, dtype == _HALF, x.stride(0), out.shape[1], before)
    arguments = [*map(_address, (x, mask, scale, shift, out)), *map(ctypes.c_int64, sizes)]
    _over_rows(library.zoo_scaled_silu, batch * frames, 8 * x.numel(), arguments)
    return out


def elu(x: Frames, out: Frames | None) -> Frames | None:
    """Exponential linear unit, to 2 units of float32 at 1; into ``out`` if it is given."""
    library = _library(x, x.dtype)
    if library is None:
        return None
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if any(some.stride(2) != 1 or some.stride(1) != some.shape[2] for some in (x, out)):
        return None
    batch, frames, channels = x.shape
    arguments = [*map(_address, (x, out)), *map(ctypes.c_int64, (frames, channels, x.stride(0), out.stride(0)))]
    _over_rows(library.zoo_elu, batch * frames, 8 * x.numel(), arguments)
    return out


def _library(x: Tensor, dtype: torch.dtype) -> Any | None:
    """The compiled kernels, if they take frames like these and give that type."""
    if x.dtype != torch.float32 or dtype not in (torch.float32, _HALF) or not x.numel():
        return None
    if torch.is_grad_enabled() or not native.unwatched(x):
        return None
    return native.library("frames.c")


def _over_rows(function: Any, rows: int, work: int, arguments: list[Any]) -> None:
    def of_rows(first: int, last: int) -> None:
        function(ctypes.c_int64(first), ctypes.c_int64(last), *arguments)

    native.over_rows(of_rows, rows, work)


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())

"""Blocks along the last axis that share a scale: OCP's microscaling (MX) formats and NVFP4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from zoo.errors import InputError
from zoo.kernels.formats import FloatFormat, format_named
from zoo.quantization.rounding import decode, encode

Rounding = Literal["floor", "ceil"]

MX_BLOCK = 32
NVFP4_BLOCK = 16
_E8M0_BIAS = 127
_E4M3 = format_named("e4m3fn")
_E2M1 = format_named("e2m1")


@dataclass(frozen=True)
class Blocks:
    """Numbers in blocks.

    Attributes:
        codes: one per number, with zero codes up to a whole number of blocks.
        scale: one byte per block: an exponent (E8M0) or an E4M3 code.
        tensor_scale: what all values are multiplied with besides; 1 in MX.
    """

    codes: UInt8[Tensor, "*rows columns"]
    scale: UInt8[Tensor, "*rows blocks"]
    tensor_scale: Float[Tensor, ""]


def quantize_mx(
    x: Float[Tensor, "*rows columns"], format: FloatFormat, block: int = MX_BLOCK, rounding: Rounding = "floor"
) -> Blocks:
    """Microscaling: the scale of a block is a power of two, stored as its exponent plus 127.

    Args:
        x: finite numbers.
        format: of the elements.
        block: numbers that share a scale.
        rounding: ``"floor"``: the exponent of the largest magnitude less that of the largest element, so that the mantissa may
            saturate (OCP MX specification 1.0, section 6.3); ``"ceil"``: the smallest power of two with which nothing does.

    Raises:
        InputError: a number is not finite.
    """
    blocks = _in_blocks(x, block)
    largest = blocks.abs().amax(-1)
    # frexp's mantissa lies in [1/2, 1).
    if rounding == "floor":
        exponent = torch.frexp(largest).exponent - 1 - format.largest_exponent
    else:
        # In float32, as the quotient is specified, although its rounding can cost a power of two.
        mantissa, exponent = torch.frexp(largest / format.max)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    exponent = torch.where(largest > 0, exponent, -_E8M0_BIAS).clamp(-_E8M0_BIAS, _E8M0_BIAS)
    codes = encode(_times_power(blocks, -exponent[..., None]), format)
    return Blocks(codes.flatten(-2), (exponent + _E8M0_BIAS).to(torch.uint8), torch.ones((), device=x.device))


def quantize_nvfp4(
    x: Float[Tensor, "*rows columns"], tensor_scale: Float[Tensor, ""] | float | None = None, block: int = NVFP4_BLOCK
) -> Blocks:
    """NVFP4: E2M1 elements and an E4M3 scale for each block, never below the smallest normal one.

    Args:
        x: finite numbers.
        tensor_scale: divides all block scales; 1 where the format has none; by default the largest magnitude over what the
            two formats reach, ``448 * 6``.
        block: numbers that share a scale.

    Raises:
        InputError: a number is not finite.
    """
    blocks = _in_blocks(x, block)
    if tensor_scale is None:
        largest = x.abs().amax() if x.numel() else x.new_zeros(())
        smallest = torch.finfo(torch.float32).tiny
        tensor_scale = torch.where(largest > 0, (largest / (_E4M3.max * _E2M1.max)).clamp(min=smallest), 1.0)
    tensor_scale = torch.as_tensor(tensor_scale, dtype=torch.float32, device=x.device)
    scale = (blocks.abs().amax(-1) / _E2M1.max / tensor_scale).clamp(_E4M3.min_normal, _E4M3.max)
    scale_codes = encode(scale, _E4M3)
    factor = tensor_scale * decode(scale_codes, _E4M3)
    return Blocks(encode(blocks / factor[..., None], _E2M1).flatten(-2), scale_codes, tensor_scale)


def block_scales(scale: UInt8[Tensor, "*rows blocks"], kind: str) -> Float[Tensor, "*rows blocks"]:
    """Block scales from their bytes, ``kind`` being ``"e8m0"`` or ``"e4m3"``."""
    if kind == "e4m3":
        return decode(scale, _E4M3)
    return _times_power(torch.ones(scale.shape, device=scale.device), scale.to(torch.int32) - _E8M0_BIAS)


def dequantize(blocks: Blocks, format: FloatFormat, kind: str, columns: int) -> Float[Tensor, "*rows columns"]:
    """Values in float32, without what was added to fill the last block."""
    scale = block_scales(blocks.scale, kind) * blocks.tensor_scale
    elements = decode(blocks.codes, format).unflatten(-1, (scale.shape[-1], -1))
    return (elements * scale[..., None]).flatten(-2)[..., :columns]


def _in_blocks(x: Float[Tensor, "*rows columns"], block: int) -> Float[Tensor, "*rows blocks block"]:
    if not bool(x.isfinite().all()):
        raise InputError("blocks hold finite numbers only")
    return torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))


def _times_power(x: Float[Tensor, "*shape"], exponent: Tensor) -> Float[Tensor, "*shape"]:
    """``x * 2**exponent``, in two steps, because a single power of two can be outside of float32."""
    half = exponent.div(2, rounding_mode="floor")
    return torch.ldexp(torch.ldexp(x, half), exponent - half)

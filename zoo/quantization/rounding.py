"""Rounding to small formats, bit by bit.

Round to nearest, ties to the even code; subnormals are kept, what is too large saturates, NaN stays NaN. Nothing but
exact scaling, integer arithmetic and one IEEE 754 addition, so that a CPU, a GPU and a compiler agree on every bit.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from zoo.errors import InputError
from zoo.kernels.formats import FloatFormat, values
from zoo.moved import names_of

# Of float32.
_MANTISSA_BITS = 23
_EXPONENT = 0x7F800000


def round_to(x: Float[Tensor, "*shape"], format: FloatFormat) -> Float[Tensor, "*shape"]:
    """The nearest value of a format, in float32; ties go to the even code, infinities to the largest value, NaN stays.

    Of an unsigned format, negative numbers become zero.
    """
    x = x.float()
    clipped = x.clamp(-format.max if format.signed else 0.0, format.max)
    if format.exponent_bits == 0:
        rounded = (clipped * (1 / format.smallest_step)).round() * format.smallest_step
    elif format.mantissa_bits == 0:
        rounded = _round_to_power(clipped, format)
    else:
        # The sum has no room for more mantissa bits than the format has, so that adding rounds, as IEEE 754 prescribes.
        power = (clipped.view(torch.int32) & _EXPONENT).view(torch.float32).clamp(min=format.min_normal)
        large = power * (1.5 * 2.0 ** (_MANTISSA_BITS - format.mantissa_bits))
        rounded = (clipped + large) - large
    return torch.copysign(rounded, x) if format.signed else rounded


def _round_to_power(x: Float[Tensor, "*shape"], format: FloatFormat) -> Float[Tensor, "*shape"]:
    """Nearest power of two, ties to the even exponent field; magnitudes only. Significands have no parity without mantissa."""
    magnitude = x.abs()
    bits = magnitude.view(torch.int32) - format.exponent_offset
    field = (bits + ((1 << (_MANTISSA_BITS - 1)) - 1) + ((bits >> _MANTISSA_BITS) & 1)) >> _MANTISSA_BITS
    power = ((field << _MANTISSA_BITS) + format.exponent_offset).view(torch.float32)
    below = (magnitude * (1 / format.smallest_step)).round() * format.smallest_step
    # Not a number compares as false and has to come out as it is.
    return torch.where(magnitude >= format.min_normal, power, below)


def encode(x: Float[Tensor, "*shape"], format: FloatFormat) -> UInt8[Tensor, "*shape"]:
    """Codes of the nearest values.

    Raises:
        InputError: a number is NaN and the format has no code for it.
    """
    rounded = round_to(x, format)
    invalid = rounded.isnan()
    if format.specials == "finite" and bool(invalid.any()):
        raise InputError(f"NaN cannot be stored as {format.name}")
    magnitude = rounded.abs()
    code = (magnitude * (1 / format.smallest_step)).to(torch.int32)
    if format.exponent_bits:
        shifted = magnitude.view(torch.int32) - format.exponent_offset
        normal = shifted >> (_MANTISSA_BITS - format.mantissa_bits)
        code = torch.where(magnitude < format.min_normal, code, normal)
    if format.specials != "finite":
        code = torch.where(invalid, format.nan_code, code)
    if format.signed:
        code = code | (rounded.view(torch.int32) < 0).to(torch.int32) * format.sign_bit
    return code.to(torch.uint8)


def decode(codes: UInt8[Tensor, "*shape"], format: FloatFormat, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """Values of codes; exact in bfloat16 as well."""
    table = values(format, codes.device).to(dtype)
    return table.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)


class _StraightThrough(torch.autograd.Function):
    """Scaled rounding whose gradient is that of the clipping, and of the step through the clipping value."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "*shape"], maxval: Float[Tensor, "*scales"], format: FloatFormat
    ) -> Float[Tensor, "*shape"]:
        scale = maxval / format.max
        rounded = torch.where(scale > 0, round_to(x / scale, format) * scale, 0.0)
        ctx.format = format
        ctx.save_for_backward(x, maxval, rounded)
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "*shape"]) -> tuple[Tensor, Tensor, None]:
        x, maxval, rounded = ctx.saved_tensors
        lowest = -maxval if ctx.format.signed else torch.zeros_like(maxval)
        # On the border a maximum passes half of the gradient to either argument.
        inside = torch.where((x == maxval) | (x == lowest), 0.5, ((x < maxval) & (x > lowest)).to(x.dtype))
        clipped = (1 - inside) * torch.where(x > 0, 1.0, -1.0 if ctx.format.signed else 0.0)
        stepped = torch.where(inside == 1, (rounded - x) / maxval, 0.0)
        return grad * inside, (grad * (clipped + stepped)).sum_to_size(maxval.shape), None


def fake_quantize(
    x: Float[Tensor, "*shape"], format: FloatFormat, maxval: Float[Tensor, "*scales"] | float
) -> Float[Tensor, "*shape"]:
    """Clip to ``maxval`` and round to a format scaled such that ``maxval`` is its largest value; ``Q(x)`` of the method.

    Gradients go straight through the rounding: to ``x`` inside the clipping range, to ``maxval`` outside and through the size
    of the steps (Kuzmin et al. 2022, "FP8 Quantization: The Power of the Exponent", section 4).

    Args:
        x: numbers, computed with in float32.
        format: grid to round to.
        maxval: clipping value, one number or a tensor that broadcasts with ``x``; where it is zero the result is zero.
    """
    return _StraightThrough.apply(x.float(), torch.as_tensor(maxval, dtype=torch.float32, device=x.device), format)


#: The way numbers are packed, for one release.
__getattr__ = names_of(__name__, dict.fromkeys(("pack", "packed_bytes", "unpack"), "zoo.kernels.packing"))

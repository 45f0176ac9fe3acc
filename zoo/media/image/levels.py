"""Levels of pixels: samples of any depth and photometric interpretation become RGB in [-1, 1], opaque and upright."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from zoo.errors import ArgumentError, InputError

#: What black and white are in floating-point pixels: the names that ``range`` may have.
RANGES = {"unit": (0.0, 1.0), "signed": (-1.0, 1.0)}
#: A named range, or the values of black and white.
Range = str | Sequence[float]

# How far arrays may reach beyond their range, as a share of it: decoders overshoot, 0..255 or raw statistics reach further.
_OVERSHOOT = 0.25
# Files come out of no decoder. Half a level of 8 bits is let through, which is more than any rounding.
_ROUNDING = 0.5 / 255
# Rec. 601, as TIFF's YCbCrCoefficients are by default.
_RED_LUMA, _GREEN_LUMA, _BLUE_LUMA = 0.299, 0.587, 0.114


def limits(values: Range) -> tuple[float, float]:
    """Black and white of a range.

    Raises:
        ArgumentError: it is no range.
    """
    if isinstance(values, str):
        if values not in RANGES:
            raise ArgumentError(f"range must be one of {', '.join(RANGES)} or a pair (black, white), not {values!r}")
        return RANGES[values]
    try:
        low, high = (float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"range must be one of {', '.join(RANGES)} or a pair (black, white), not {values!r}") from error
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ArgumentError(f"range must go from a finite value of black up to one of white, not from {low:g} to {high:g}")
    return low, high


def unit_levels(levels: NDArray[Any], largest: int) -> NDArray[np.float32]:
    """Integers 0 to ``largest`` as float32 in [0, 1]."""
    # float32 holds every integer of 24 bits.
    exact: Any = np.float32 if largest < 1 << 24 else np.float64
    return np.asarray(levels.astype(exact) / exact(largest), np.float32)


def unit_values(values: NDArray[Any], range: Range, *, name: str, overshoot: bool = False) -> NDArray[np.float32]:
    """Numbers between the black and the white of a range as float32 in [0, 1].

    Args:
        values: floating-point or signed numbers.
        range: a named range, or the values of black and white.
        name: what holds the values, for messages.
        overshoot: let values reach a quarter of the range beyond it.

    Raises:
        InputError: values are not finite or lie outside the range.
    """
    low, high = limits(range)
    check_range(values, low, high, name=name, overshoot=overshoot)
    # Differences of float16 and of integers would overflow.
    exact: Any = np.float32 if values.dtype in (np.float16, np.float32) else np.float64
    return np.asarray((values.astype(exact) - exact(low)) / exact(high - low), np.float32)


def check_range(values: NDArray[Any] | Tensor, low: float, high: float, *, name: str, overshoot: bool) -> None:
    """Refuse numbers that are not finite or lie outside of black and white, with what they look like."""
    smallest, largest = float(values.min()), float(values.max())
    if not (np.isfinite(smallest) and np.isfinite(largest)):
        raise InputError(f"{name} holds NaN or infinite pixels")
    margin = (high - low) * (_OVERSHOOT if overshoot else _ROUNDING)
    if smallest < low - margin or largest > high + margin:
        let_through = f" (from {low - margin:g} to {high + margin:g} is let through)" if overshoot else ""
        raise InputError(
            f"floating-point pixels of {name} must lie in [{low:g}, {high:g}]{let_through}, these reach from {smallest:g} to "
            f"{largest:g}: {_advice(smallest, largest, overshoot)}"
        )


def _advice(smallest: float, largest: float, is_array: bool) -> str:
    pair = "pass range=(black, white) with the values that black and white have"
    if smallest >= -1 - _ROUNDING and largest <= 1 + _ROUNDING:
        return "pass range='signed' if -1 is black and 1 is white"
    if smallest >= 0 and largest <= 255:
        return "pass 0..255 as uint8, or range=(0, 255)" if is_array else "pass range=(0, 255) if 255 is white"
    if smallest >= 0 and largest <= 65_535:
        return "pass 0..65535 as uint16, or range=(0, 65535)" if is_array else "pass range=(0, 65535) if 65535 is white"
    if smallest >= -32_768 and largest <= 32_767 and is_array:
        return "pass 0..255 as uint8, 0..65535 as uint16, or range=(-32768, 32767) if these are 16-bit integers with a sign"
    return pair


def signed_pixels(unit: NDArray[np.float32]) -> Float[Tensor, "3 height width"]:
    """Opaque RGB in [-1, 1]: transparent pixels are laid on white, grey becomes RGB.

    Args:
        unit: ``[height, width, channels]`` in [0, 1]: grey, grey and opacity, RGB, or RGB and opacity.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(np.moveaxis(unit, 2, 0)))
    if len(pixels) in (2, 4):
        opacity = pixels[-1:].clamp(0, 1)
        pixels = pixels[:-1] * opacity + (1 - opacity)
    return (pixels * 2 - 1).expand(3, -1, -1).contiguous()


def unpremultiplied(colours: NDArray[np.float32], opacity: NDArray[np.float32]) -> NDArray[np.float32]:
    """Colours that were multiplied by their opacity, as they were before; nothing is left of wholly transparent ones."""
    return np.divide(colours, opacity, out=np.ones_like(colours), where=opacity > 0)


def rgb_of_cmyk(ink: NDArray[np.float32]) -> NDArray[np.float32]:
    """RGB in [0, 1] of cyan, magenta, yellow and black in [0, 1], without a colour profile."""
    return (1 - ink[..., :3]) * (1 - ink[..., 3:4])


def rgb_of_ycbcr(samples: NDArray[np.float32], largest: int) -> NDArray[np.float32]:
    """RGB in [0, 1] of luma and chroma of full range, whose zero is the level ``(largest + 1) / 2``."""
    luma = samples[..., 0]
    blue_chroma, red_chroma = (samples[..., i] - np.float32((largest + 1) / 2 / largest) for i in (1, 2))
    red = luma + 2 * (1 - _RED_LUMA) * red_chroma
    blue = luma + 2 * (1 - _BLUE_LUMA) * blue_chroma
    green = (luma - _RED_LUMA * red - _BLUE_LUMA * blue) / _GREEN_LUMA
    return np.asarray(np.stack([red, green, blue], axis=-1).clip(0, 1), np.float32)


def upright(array: NDArray[Any], orientation: Any) -> NDArray[Any]:
    """An array ``[height, width, ...]`` turned as an EXIF orientation says; unknown ones are ignored."""
    if orientation in (5, 6, 7, 8):
        array = np.swapaxes(array, 0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array

"""Images in the sizes that the models were trained with: by padding, or by the rules of those who use them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from zoo.errors import InputError
from zoo.media.image.prepare import eight_bit_levels

Pixels = Float[Tensor, "3 height width"]
Levels = UInt8[Tensor, "3 height width"]

#: Both sides of what a preset makes are multiples of this.
UNIT = 16
#: Pixels that Emu3.5's own function aims at by default; its configurations use 518,400 and 1,048,576 as well.
EMU_AREA = 512 * 512
_APERTUS_LARGEST, _APERTUS_SMALLEST = 1_960_000, 16_384
_APERTUS_ASPECT = 200
_SEED_VOKEN_SIZE = 256


def exact_pixels(pixels: Float[Tensor, "3 height width"]) -> Float[Tensor, "3 height width"]:
    """Images of 8 bits scaled as the originals do it, in float64; others as they are."""
    levels = eight_bit_levels(pixels)
    return pixels if levels is None else scaled(levels)


def scaled(levels: UInt8[Tensor, "3 height width"]) -> Float[Tensor, "3 height width"]:
    """0 to 255 as -1 to 1."""
    return (levels.double() / 127.5 - 1).float()


def eight_bits(pixels: Float[Tensor, "3 height width"]) -> UInt8[Tensor, "3 height width"]:
    """The nearest levels of 8 bits, on which the presets work."""
    return ((pixels.double() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def padded(pixels: Float[Tensor, "3 height width"], size: tuple[int, int]) -> Float[Tensor, "3 padded_height padded_width"]:
    """An image in the middle of a larger one of mid-grey; odd pixels lie right and below."""
    top, left = margins((pixels.shape[1], pixels.shape[2]), size)
    height, width = size
    return F.pad(pixels, (left, width - pixels.shape[2] - left, top, height - pixels.shape[1] - top))


def margins(own: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Rows above and columns left of an image that was `padded`."""
    return (size[0] - own[0]) // 2, (size[1] - own[1]) // 2


# ----------------------------------------------------------------------------------------------------------------- presets


def emu_size(height: int, width: int, area: int = EMU_AREA) -> tuple[int, int]:
    """Height and width that Emu3.5 resizes an image to, upwards as well: about an area, in multiples of 16.

    Raises:
        InputError: a side would vanish, or more than a billion pixels come out.
    """
    aspect = width / height
    rows = int(math.sqrt(area / aspect))
    size = (rows + UNIT // 2) // UNIT * UNIT, (int(rows * aspect) + UNIT // 2) // UNIT * UNIT
    if min(size) < 1 or size[0] * size[1] > 1 << 30:
        raise InputError(f"{width} x {height} pixels are too oblong for an area of {area}: pad or cut the image")
    return size


def apertus_size(height: int, width: int) -> tuple[int, int]:
    """Height and width that Apertus 1.5 resizes an image to: the nearest multiples of 16, if they are not too many or too few.

    Raises:
        InputError: one side is more than 200 times as long as the other.
    """
    if max(height, width) / min(height, width) > _APERTUS_ASPECT:
        raise InputError(f"{width} x {height} pixels are too oblong: one side is more than {_APERTUS_ASPECT} times the other")
    # Half to even, as Python rounds.
    rows, columns = round(height / UNIT) * UNIT, round(width / UNIT) * UNIT
    if rows * columns > _APERTUS_LARGEST:
        shrink = math.sqrt(height * width / _APERTUS_LARGEST)
        return tuple(max(UNIT, math.floor(side / shrink / UNIT) * UNIT) for side in (height, width))  # type: ignore[return-value]
    if rows * columns < _APERTUS_SMALLEST:
        grow = math.sqrt(_APERTUS_SMALLEST / (height * width))
        return math.ceil(height * grow / UNIT) * UNIT, math.ceil(width * grow / UNIT) * UNIT
    return rows, columns


def _emu(levels: Levels, area: int) -> Float[Tensor, "3 _ _"]:
    """Pillow's bicubic filter."""
    return scaled(emu_resized(levels, area))


def emu_resized(levels: UInt8[Tensor, "3 _ _"], area: int = EMU_AREA) -> UInt8[Tensor, "3 _ _"]:
    """An image as Emu3.5 resizes it, by Pillow's bicubic filter."""
    from PIL import Image
    from torchvision.transforms.v2 import functional

    height, width = emu_size(levels.shape[1], levels.shape[2], area)
    image = functional.to_pil_image(levels).resize((width, height), Image.Resampling.BICUBIC)
    return functional.pil_to_tensor(image)


def _apertus(levels: Levels, area: int) -> Float[Tensor, "3 _ _"]:
    """torchvision's bicubic filter, which differs from Pillow's, and a scaling in float32."""
    return (apertus_resized(levels).float() - 127.5) / 127.5


def apertus_resized(levels: UInt8[Tensor, "3 _ _"]) -> UInt8[Tensor, "3 _ _"]:
    """An image as Apertus 1.5 resizes it, by torchvision's bicubic filter with antialiasing."""
    from torchvision.transforms.v2 import InterpolationMode, functional

    size = list(apertus_size(levels.shape[1], levels.shape[2]))
    return functional.resize(levels, size, interpolation=InterpolationMode.BICUBIC, antialias=True)


def _seed_voken(levels: Levels, area: int) -> Float[Tensor, "3 _ _"]:
    """The shorter side resized to 256 without antialiasing, and the centre cut out."""
    height, width = levels.shape[1:]
    scale = _SEED_VOKEN_SIZE / min(height, width)
    size = round(height * scale), round(width * scale)
    resized = F.interpolate(levels[None].float(), size, mode="bilinear", align_corners=False)[0].round().to(torch.uint8)
    top, left = (size[0] - _SEED_VOKEN_SIZE) // 2, (size[1] - _SEED_VOKEN_SIZE) // 2
    return scaled(resized[:, top : top + _SEED_VOKEN_SIZE, left : left + _SEED_VOKEN_SIZE])


@dataclass(frozen=True)
class Preset:
    """Somebody's way to bring images to a size.

    Attributes:
        apply: levels of 8 bits, and the area that is aimed at, to pixels.
        fit: how an original is restored, as `zoo.media.restore_image` names it.
    """

    apply: Callable[[Tensor, int], Tensor]
    fit: str


PRESETS = {
    "emu3.5": Preset(_emu, "stretch"),
    "apertus": Preset(_apertus, "stretch"),
    "seed-voken": Preset(_seed_voken, "crop"),
}

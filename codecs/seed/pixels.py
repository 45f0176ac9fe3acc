"""Images brought to the model's size by bicubic interpolation, which `zoo.media` leaves to those who need it."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from zoo import media
from zoo.errors import InputError

Interpolation = Literal["bicubic", "bilinear"]
_LEVELS = 255


def prepare(source: Any, size: int, fit: str, interpolation: str, max_pixels: int) -> media.PreparedImage:
    """Read an image and bring it to ``size`` x ``size``.

    ``bicubic`` is what the original tokenizer does with images and files, ``bilinear`` what its demo scripts and the data of
    SEED-LLaMA were prepared with; both resize 8-bit pixels as Pillow does, whether they come as bytes or as floats.

    Raises:
        InputError: as `zoo.media.prepare_image` does, or the interpolation is unknown.
    """
    if interpolation not in get_args(Interpolation):
        raise InputError(f"interpolation must be one of {', '.join(get_args(Interpolation))}, not {interpolation!r}")
    if interpolation == "bilinear" or fit not in media.FITS or fit == "none":
        return media.prepare_image(source, (size, size), fit, max_pixels)
    image = media.prepare_image(source, (size, size), "none", max_pixels)
    if image.pixels.shape[1:] == (size, size):
        return media.PreparedImage(image.pixels, image.meta | {"fit": fit})
    return media.PreparedImage(_fit(image.pixels, size, fit), image.meta | {"fit": fit})


def _fit(pixels: Float[Tensor, "3 height width"], size: int, fit: str) -> Float[Tensor, "3 size size"]:
    from torchvision.transforms.v2 import functional as F

    height, width = pixels.shape[1:]
    if fit == "stretch":
        return _resize(pixels, size, size)
    if fit == "crop":
        return _resize(F.center_crop(pixels, [min(height, width)] * 2), size, size)
    longer = max(height, width)
    rows, columns = max(1, round(size * height / longer)), max(1, round(size * width / longer))
    top, left = round((size - rows) / 2), round((size - columns) / 2)
    padded = pixels.new_zeros(3, size, size)
    padded[:, top : top + rows, left : left + columns] = _resize(pixels, rows, columns)
    return padded


def _resize(pixels: Float[Tensor, "3 height width"], rows: int, columns: int) -> Float[Tensor, "3 rows columns"]:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    levels = (pixels + 1) * (_LEVELS / 2)
    whole = levels.round()
    eight_bit = bool((levels - whole).abs().max() < 1e-3 and whole.min() >= 0 and whole.max() <= _LEVELS)
    # Pillow clips and rounds where the cubic overshoots; torchvision's kernels for floats do not, which moves ids.
    image = F.to_pil_image(whole.to(torch.uint8)) if eight_bit else pixels
    resized = F.resize(image, [rows, columns], interpolation=InterpolationMode.BICUBIC, antialias=True)
    if not eight_bit:
        return resized.clamp(-1, 1)
    unit = F.to_dtype(F.pil_to_tensor(resized), torch.float32, scale=True)
    return F.normalize(unit, [0.5] * 3, [0.5] * 3)

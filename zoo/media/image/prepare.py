"""Images brought to a model's size as torchvision would, and back again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from zoo.errors import ArgumentError, InputError
from zoo.media.files import replacing
from zoo.media.image.levels import Range
from zoo.media.image.reading import FORMATS, MAX_PIXELS, READ_ONLY_FORMATS, check_pixels, load

if TYPE_CHECKING:
    from PIL import Image

#: How an image is brought to a model's size; see `prepare_image`. ``.zt`` files hold the position: append, never reorder.
FITS = ("crop", "stretch", "pad", "none")
#: How pixels are interpolated where an image is resized.
INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class PreparedImage:
    """An image as a model takes it, and what is needed to put its reconstruction back.

    Attributes:
        pixels: float32, nominally in [-1, 1].
        meta: ``width`` and ``height`` that the image had (upright, before it was resized), and ``fit``.
    """

    pixels: Float[Tensor, "3 height width"]
    meta: dict[str, Any]


def prepare_image(
    source: Any,
    size: tuple[int, int],
    fit: str = "crop",
    max_pixels: int = MAX_PIXELS,
    interpolation: str = "bilinear",
    range: Range | None = None,
) -> PreparedImage:
    """Read an image from a file or take it from an array, and bring it to a size.

    Transparent images are laid on white, EXIF orientation is applied, grey becomes RGB, and colour profiles are ignored.
    Samples of any depth are read in full, but for AVIF and for PIL images of colour, which Pillow has cut down to 8 bits.
    TIFF of 12 bits and the like, compressed TIFF of 16-bit colour and JPEG 2000 of more than 8 bits need imagecodecs (the extra
    ``image``), HEIC needs pillow-heif (the extra ``heic``). Images of 8 bits are resized by Pillow, as torchvision's ``Resize``
    and ``CenterCrop`` do and tokenizers were trained with; all others as tensors, with antialiasing. An image that
    has the size already is not changed by a single bit.

    Args:
        source: a path, the bytes of an image file, an open file, an item of a Hugging Face data set, a PIL image, an array
            ``[height, width]`` or ``[height, width, 1|3|4]`` or
            a tensor ``[1|3|4, height, width]``. uint8 is 0..255, uint16 is 0..65535; see ``range`` for floating point. An
            opened PIL image is read from its file, unless it was decoded before.
        size: ``(height, width)`` of the result.
        fit: ``"crop"`` resizes the image to cover the size and cuts away what stands out on both sides; ``"pad"`` resizes it to
            lie within the size, between bars of mid-grey; ``"stretch"`` ignores its proportions; ``"none"`` ignores ``size``.
        max_pixels: larger images are refused, files before they are decoded.
        interpolation: ``"bilinear"`` or ``"bicubic"``. The latter resizes floats that stand on the 256 levels of 8 bits as
            those, because Pillow clips and rounds where the cubic overshoots.
        range: what black and white are in floating point (alpha too): ``"unit"`` for 0 and 1, ``"signed"`` for -1 and 1, or the
            two values. By default files (TIFF, PFM) are ``"unit"``, arrays and tensors ``"signed"``. Arrays and tensors may
            reach a quarter of the range beyond it, files may not. TIFF files of signed integers are read with two values only.

    Raises:
        InputError: the source is of the wrong kind, rank, type or range, empty, not finite, unreadable, truncated, animated or
            too large.

    >>> image = prepare_image(torch.full((3, 20, 40), 255, dtype=torch.uint8), (16, 16), fit="pad")
    >>> list(image.pixels.shape), image.pixels[0, 8, 8].item(), image.meta
    ([3, 16, 16], 1.0, {'width': 40, 'height': 20, 'fit': 'pad'})
    """
    if fit not in FITS:
        raise ArgumentError(f"fit must be one of {', '.join(FITS)}, not {fit!r}")
    if interpolation not in INTERPOLATIONS:
        raise ArgumentError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, not {interpolation!r}")
    image = load(source, max_pixels, range)
    height, width = _size(image)
    pixels = _to_tensor(image) if fit == "none" else _fit(image, size, fit, interpolation)
    return PreparedImage(pixels, {"width": width, "height": height, "fit": fit})


def restore_image(
    pixels: Float[Tensor, "3 height width"], meta: Mapping[str, Any], max_pixels: int = MAX_PIXELS
) -> Float[Tensor, "3 original_height original_width"]:
    """Undo the geometry of `prepare_image`: an image of the size that ``meta`` remembers.

    A cropped image goes back to its place and the margins that were cut away are mid-grey (0); bars are cut away.

    Raises:
        InputError: ``meta`` is not what `prepare_image` gives, or asks for more than ``max_pixels``.
    """
    try:
        width, height, fit = int(meta["width"]), int(meta["height"]), meta["fit"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"without its width, height and fit an image cannot be restored; its meta is {dict(meta)}") from error
    if width < 1 or height < 1 or fit not in FITS:
        raise InputError(f"an image of {width} x {height} pixels and fit {fit!r} cannot be restored")
    check_pixels(width, height, max_pixels, "the original image")
    model_size = (pixels.shape[1], pixels.shape[2])
    if fit == "none" and model_size != (height, width):
        raise InputError(
            f"an image of {width} x {height} pixels was not resized, but {model_size[1]} x {model_size[0]} came back"
        )
    if fit == "crop":
        top, bottom, left, right = _visible_box((height, width), model_size)
        restored = pixels.new_zeros(3, height, width)
        restored[:, top:bottom, left:right] = _resize(pixels, (bottom - top, right - left))
        return restored
    if fit == "pad":
        inner = _inner_size((height, width), model_size)
        top, left = _centred(inner, model_size)
        pixels = pixels[:, top : top + inner[0], left : left + inner[1]]
    return _resize(pixels, (height, width))


def write_image(path: str | os.PathLike[str], pixels: Float[Tensor, "3 height width"]) -> Path:
    """Write an image file of 8 bits per channel, its format chosen by the extension; values are clipped to [-1, 1].

    Raises:
        InputError: no image format has that extension.
    """
    from PIL import Image

    path = Path(path)
    kind = next((kind for kind, extensions in FORMATS.items() if path.suffix.lower() in extensions), None)
    Image.init()
    # Other libraries may have taught Pillow to write what is only read here, imageio HEIC for one.
    if kind in READ_ONLY_FORMATS or kind not in Image.SAVE:
        raise InputError(f"cannot write {path.name}: no image format {path.suffix!r} that is written")
    levels = pixels.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    with replacing(path) as temporary:
        # The compressing formats' own default costs more than many a tokenizer loses.
        Image.fromarray(levels.cpu().permute(1, 2, 0).numpy()).save(temporary, format=kind, quality=95)
    return path


# ----------------------------------------------------------------------------------------------------------------- geometry


def _size(image: Image.Image | Tensor) -> tuple[int, int]:
    """Height and width."""
    if isinstance(image, Tensor):
        return image.shape[1], image.shape[2]
    return image.height, image.width


def _to_tensor(image: Image.Image | Tensor) -> Float[Tensor, "3 height width"]:
    """float32 in [-1, 1], with the roundings of torchvision's ``ToTensor`` and ``Normalize(0.5, 0.5)``."""
    if isinstance(image, Tensor):
        return image.contiguous()
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return (levels / 255).sub_(0.5).div_(0.5)


def _resize(image: Any, size: tuple[int, int], interpolation: str = "bilinear") -> Any:
    """An image of Pillow, or pixels, in another size, with the filters of torchvision's ``resize``.

    Importing torchvision takes as long as importing torch itself, and all images but few need no more of it.
    """
    from PIL import Image

    if _size(image) == size:
        return image
    if interpolation == "bicubic" and isinstance(image, Tensor):
        levels = eight_bit_levels(image)
        image = image if levels is None else Image.fromarray(levels.cpu().permute(1, 2, 0).numpy())
    if not isinstance(image, Tensor):
        return image.resize((size[1], size[0]), Image.Resampling[interpolation.upper()])
    resized = F.interpolate(image[None], list(size), mode=interpolation, align_corners=False, antialias=True)[0]
    return resized.clamp(image.min(), image.max()) if interpolation == "bicubic" else resized


def eight_bit_levels(pixels: Float[Tensor, "3 height width"]) -> UInt8[Tensor, "3 height width"] | None:
    """The levels 0 to 255 that floats in [-1, 1] stand on; ``None`` if one of them lies between two."""
    levels = (pixels + 1) * 127.5
    whole = levels.round()
    exact = bool((levels - whole).abs().max() < 1e-3 and whole.min() >= 0 and whole.max() <= 255)
    return whole.to(torch.uint8) if exact else None


def _fit(image: Image.Image | Tensor, size: tuple[int, int], fit: str, interpolation: str) -> Float[Tensor, "3 height width"]:
    own = _size(image)
    if fit == "stretch":
        return _to_tensor(_resize(image, size, interpolation))
    if fit == "crop":
        covering = _covering_size(own, size)
        if covering[0] * covering[1] > MAX_PIXELS:
            raise InputError(
                f"{own[1]} x {own[0]} pixels are too oblong to crop: covering {size[1]} x {size[0]} takes an image of "
                f"{covering[1]} x {covering[0]}; pad, stretch or cut it"
            )
        top, left = round((covering[0] - size[0]) / 2), round((covering[1] - size[1]) / 2)
        whole = _resize(image, covering, interpolation)
        if isinstance(whole, Tensor):
            return whole[:, top : top + size[0], left : left + size[1]].contiguous()
        return _to_tensor(whole.crop((left, top, left + size[1], top + size[0])))
    inner = _inner_size(own, size)
    top, left = _centred(inner, size)
    # Mid-grey lies between two levels of 8 bits, so the bars are added to the tensor.
    padded = torch.zeros(3, *size, dtype=torch.float32, device="cpu")
    padded[:, top : top + inner[0], left : left + inner[1]] = _to_tensor(_resize(image, inner, interpolation))
    return padded


def _covering_size(own: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The smallest size of the same proportions that covers ``size``, the longer side rounded down as torchvision does."""
    (own_height, own_width), (height, width) = own, size
    if height * own_width >= width * own_height:
        return height, height * own_width // own_height
    return width * own_height // own_width, width


def _inner_size(own: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The largest size of the same proportions that lies within ``size``."""
    (own_height, own_width), (height, width) = own, size
    if height * own_width <= width * own_height:
        return height, max(1, round(height * own_width / own_height))
    return max(1, round(width * own_height / own_width)), width


def _centred(inner: tuple[int, int], outer: tuple[int, int]) -> tuple[int, int]:
    """Top and left of an area in the middle of another one, rounded as torchvision's ``CenterCrop`` does."""
    return round((outer[0] - inner[0]) / 2), round((outer[1] - inner[1]) / 2)


def _visible_box(own: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of the part of an image that a crop of ``size`` shows, in whole pixels, at least one each."""
    covering = _covering_size(own, size)
    box: list[int] = []
    for start, cut, resized, original in zip(_centred(size, covering), size, covering, own, strict=True):
        first = min(round(start * original / resized), original - 1)
        box += [first, max(first + 1, round((start + cut) * original / resized))]
    top, bottom, left, right = box
    return top, bottom, left, right

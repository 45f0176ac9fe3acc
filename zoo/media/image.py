"""Images: files through Pillow, arrays and tensors as they are; brought to a model's size by torchvision, and back again.

An image tensor is float32 ``[3, height, width]`` in [-1, 1]. Decoders overshoot that range a little, and nothing clips them
before they are written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from zoo.errors import ArgumentError, InputError
from zoo.media.files import FILE_TYPES, open_source, replacing

if TYPE_CHECKING:
    from PIL import Image

# Formats that are read, by Pillow's names. Others are left out on purpose: EPS and PDF would run another program.
_FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "JPEG2000": (".jp2", ".j2k"),
}
IMAGE_EXTENSIONS = tuple(extension for extensions in _FORMATS.values() for extension in extensions)

#: How an image is brought to a model's size; see `prepare_image`. ``.zt`` files hold the position: append, never reorder.
FITS = ("crop", "stretch", "pad", "none")
#: How pixels are interpolated where an image is resized.
INTERPOLATIONS = ("bilinear", "bicubic")
#: Most pixels that an image may have unless the caller says otherwise.
MAX_PIXELS = 100_000_000
# Beyond this no decoder's overshoot is meant, but 0..255 or raw statistics.
_LARGEST_VALUE = 1.5
_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")


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
) -> PreparedImage:
    """Read an image from a file or take it from an array, and bring it to a size.

    Transparent images are laid on white, EXIF orientation is applied, grey becomes RGB, and colour profiles are ignored.
    Images of 8 bits are resized by Pillow, as torchvision's ``Resize`` and ``CenterCrop`` do and tokenizers were trained with;
    16-bit and float images as tensors, with antialiasing. An image that has the size already is not changed by a single bit.

    Args:
        source: a path, the bytes of an image file, a PIL image, an array ``[height, width]`` or ``[height, width, 1|3|4]`` or
            a tensor ``[1|3|4, height, width]``. uint8 is 0..255, uint16 is 0..65535, floating point is in [-1, 1] (alpha too).
        size: ``(height, width)`` of the result.
        fit: ``"crop"`` resizes the image to cover the size and cuts away what stands out on both sides; ``"pad"`` resizes it to
            lie within the size, between bars of mid-grey; ``"stretch"`` ignores its proportions; ``"none"`` ignores ``size``.
        max_pixels: larger images are refused, files before they are decoded.
        interpolation: ``"bilinear"`` or ``"bicubic"``. The latter resizes floats that stand on the 256 levels of 8 bits as
            those, because Pillow clips and rounds where the cubic overshoots.

    Raises:
        InputError: the source is of the wrong kind, rank, type or range, empty, not finite, unreadable, truncated, animated or
            too large.
    """
    if fit not in FITS:
        raise ArgumentError(f"fit must be one of {', '.join(FITS)}, not {fit!r}")
    if interpolation not in INTERPOLATIONS:
        raise ArgumentError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, not {interpolation!r}")
    image = _load(source, max_pixels)
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
    _check_pixels(width, height, max_pixels, "the original image")
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
    from torchvision.transforms.v2 import functional as F

    path = Path(path)
    kind = next((kind for kind, extensions in _FORMATS.items() if path.suffix.lower() in extensions), None)
    Image.init()
    if kind not in Image.SAVE:
        raise InputError(f"cannot write {path.name}: no image format {path.suffix!r}")
    levels = pixels.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    with replacing(path) as temporary:
        # The compressing formats' own default costs more than many a tokenizer loses.
        F.to_pil_image(levels.cpu()).save(temporary, format=kind, quality=95)
    return path


# ------------------------------------------------------------------------------------------------------------------ reading


def _load(source: Any, max_pixels: int) -> Image.Image | Tensor:
    """The image upright and opaque: PIL's RGB where it has 8 bits, a tensor in [-1, 1] otherwise."""
    from PIL import Image

    if isinstance(source, FILE_TYPES):
        return _read_file(source, max_pixels)
    if isinstance(source, Image.Image):
        with _decoding("the PIL image"):
            # Nobody chose the first frame of an image that was only opened.
            if source.tell() == 0:
                _check_single(source, "the PIL image")
            _check_pixels(*source.size, max_pixels, "the PIL image")
            return _from_pil(source)
    if isinstance(source, Tensor | np.ndarray):
        array = _channels_last(source)
        _check_pixels(array.shape[1], array.shape[0], max_pixels, "the array")
        return _from_array(array)
    raise InputError(f"expected a path, bytes, a PIL image, an array or a tensor, not {type(source).__name__}")


def _read_file(source: Any, max_pixels: int) -> Image.Image | Tensor:
    handle, name = open_source(source, "image")
    with handle, _decoding(name):
        image = _open(handle, name)
        _check_pixels(*image.size, max_pixels, name)
        _check_single(image, name)
        return _from_pil(image)


def _open(handle: Any, name: str) -> Image.Image:
    """Read an image's header.

    Goes through Pillow's registry of formats because ``Image.open`` has a limit on pixels that is global to the process.
    """
    from PIL import Image

    Image.init()
    start = handle.read(16)
    for kind in _FORMATS:
        factory, accept = Image.OPEN.get(kind, (None, None))
        if factory is None or (accept is not None and accept(start) is not True):
            continue
        handle.seek(0)
        image: Image.Image = factory(handle, "")
        return image
    raise InputError(f"{name} is not an image file that can be read; formats are {', '.join(_FORMATS)}")


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn whatever Pillow's decoders raise over damaged content into an `InputError`."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"{name} is truncated, damaged or of an unknown kind: {error}") from error


def _check_single(image: Image.Image, name: str) -> None:
    frames = getattr(image, "n_frames", 1)
    # A photograph with previews or a gain map beside it is one picture all the same.
    if frames > 1 and image.format != "MPO":
        raise InputError(f"{name} is animated or has pages, {frames} frames in all: pass one of them, as a PIL image")


def _check_pixels(width: int, height: int, max_pixels: int, name: str) -> None:
    if width < 1 or height < 1:
        raise InputError(f"{name} is empty: {width} x {height} pixels")
    if width * height > max_pixels:
        raise InputError(
            f"{name} has {width} x {height} = {width * height} pixels, more than max_pixels = {max_pixels}: "
            "scale it down, or raise that limit"
        )


def _from_pil(image: Image.Image) -> Image.Image | Tensor:
    """A decoded image, upright and opaque."""
    from PIL import Image, ImageOps

    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        return _from_array(np.asarray(image)[..., None])
    if image.mode in _SIXTEEN_BIT_MODES:
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65_535:
            raise InputError(f"integer pixels must lie in 0..65535, these reach from {levels.min()} to {levels.max()}")
        transparent = levels == image.info.get("transparency")
        return _from_array(np.where(transparent, 65_535, levels).astype(np.uint16)[..., None])
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _channels_last(source: Tensor | NDArray[Any]) -> NDArray[Any]:
    """An array ``[height, width, channels]`` of uint8, uint16 or float32."""
    shape = tuple(source.shape)
    if isinstance(source, Tensor):
        if source.ndim != 3 or shape[0] not in (1, 3, 4):
            raise InputError(f"an image tensor must be [1|3|4, height, width], not of shape {shape}")
        source = source.detach().cpu().permute(1, 2, 0)
        array = (source.float() if source.is_floating_point() else source).numpy()
    else:
        if source.ndim not in (2, 3) or (source.ndim == 3 and shape[2] not in (1, 3, 4)):
            raise InputError(f"an image array must be [height, width] or [height, width, 1|3|4], not of shape {shape}")
        array = source.astype(np.float32) if np.issubdtype(source.dtype, np.floating) else source
        array = array.reshape(*shape[:2], -1) if 0 not in shape else array[..., None]
    if array.dtype.newbyteorder("=") not in (np.uint8, np.uint16, np.float32):
        raise InputError(f"pixels must be uint8, uint16 or floating point, not {array.dtype}")
    return array


def _from_array(array: NDArray[Any]) -> Image.Image | Tensor:
    """An array ``[height, width, 1|3|4]``, opaque: PIL's RGB where it has 8 bits, a tensor in [-1, 1] otherwise."""
    from PIL import Image

    if array.dtype == np.uint8:
        return _from_pil(Image.fromarray(array[..., 0] if array.shape[2] == 1 else array))
    pixels = torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, 2, 0)).astype(np.float32))
    if array.dtype == np.float32:
        _check_range(pixels)
    else:
        pixels = pixels / 65_535 * 2 - 1
    if len(pixels) == 4:
        opacity = (pixels[3:].clamp(-1, 1) + 1) / 2
        pixels = pixels[:3] * opacity + (1 - opacity)
    return pixels.expand(3, -1, -1)


def _check_range(pixels: Float[Tensor, "channels height width"]) -> None:
    if not torch.isfinite(pixels).all():
        raise InputError("the image holds NaN or infinite pixels")
    low, high = float(pixels.min()), float(pixels.max())
    if low < -_LARGEST_VALUE or high > _LARGEST_VALUE:
        raise InputError(
            f"floating-point pixels must lie in [-1, 1] (up to {_LARGEST_VALUE} is let through), these reach from {low:g} to "
            f"{high:g}: pass 0..255 as uint8, 0..65535 as uint16"
        )


# ----------------------------------------------------------------------------------------------------------------- geometry


def _size(image: Image.Image | Tensor) -> tuple[int, int]:
    """Height and width."""
    if isinstance(image, Tensor):
        return image.shape[1], image.shape[2]
    return image.height, image.width


def _to_tensor(image: Image.Image | Tensor) -> Float[Tensor, "3 height width"]:
    """float32 in [-1, 1], with the roundings of torchvision's ``ToTensor`` and ``Normalize(0.5, 0.5)``."""
    from torchvision.transforms.v2 import functional as F

    if isinstance(image, Tensor):
        return image.contiguous()
    # v2's own conversion multiplies by 1 / 255, which is not the same in the last bit.
    return F.normalize(F.pil_to_tensor(image) / 255, [0.5] * 3, [0.5] * 3)


def _resize(image: Any, size: tuple[int, int], interpolation: str = "bilinear") -> Any:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    if interpolation == "bicubic" and isinstance(image, Tensor) and _size(image) != size:
        levels = _eight_bit_levels(image)
        image = image if levels is None else F.to_pil_image(levels)
    resized = F.resize(image, list(size), interpolation=InterpolationMode(interpolation), antialias=True)
    overshoots = interpolation == "bicubic" and isinstance(image, Tensor)
    return resized.clamp(image.min(), image.max()) if overshoots else resized


def _eight_bit_levels(pixels: Float[Tensor, "3 height width"]) -> UInt8[Tensor, "3 height width"] | None:
    """The levels 0 to 255 that floats in [-1, 1] stand on; ``None`` if one of them lies between two."""
    levels = (pixels + 1) * 127.5
    whole = levels.round()
    exact = bool((levels - whole).abs().max() < 1e-3 and whole.min() >= 0 and whole.max() <= 255)
    return whole.to(torch.uint8) if exact else None


def _fit(image: Image.Image | Tensor, size: tuple[int, int], fit: str, interpolation: str) -> Float[Tensor, "3 height width"]:
    from torchvision.transforms.v2 import functional as F

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
        return _to_tensor(F.center_crop(_resize(image, covering, interpolation), list(size)))
    inner = _inner_size(own, size)
    top, left = _centred(inner, size)
    # Mid-grey lies between two levels of 8 bits, so the bars are added to the tensor.
    padded = torch.zeros(3, *size)
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

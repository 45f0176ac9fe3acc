"""Images as they come: files, PIL images, arrays and tensors, upright and opaque.

Pillow reads what has 8 bits. What it would cut down to 8 bits, scale wrongly or refuse goes through a module of its own:
`tiff`, `png`, `netpbm`, `jpeg2000`, `heif`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.errors import InputError
from zoo.media.files import FILE_TYPES, open_source
from zoo.media.image import heif, jpeg2000, netpbm, png, tiff
from zoo.media.image.levels import RANGES, Range, check_range, limits, signed_pixels, unit_values, upright
from zoo.media.items import image_item

if TYPE_CHECKING:
    from PIL import Image

# Formats that are read, by Pillow's names. Others are left out on purpose: EPS and PDF would run another program.
FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "JPEG2000": (".jp2", ".j2k"),
    "HEIF": (".heic", ".heif"),
}
READ_ONLY_FORMATS = ("HEIF",)
IMAGE_EXTENSIONS = tuple(extension for extensions in FORMATS.values() for extension in extensions)

#: Most pixels that an image may have unless the caller says otherwise.
MAX_PIXELS = 100_000_000
_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
# Formats whose files Pillow may cut down, and that a PIL image that was only opened is read from anew.
_DEEP_FORMATS = ("PNG", "TIFF", "PPM", "JPEG2000")
_START_BYTES = 64
_ORIENTATION = 0x0112


def load(source: Any, max_pixels: int, range: Range | None) -> Image.Image | Tensor:
    """The image upright and opaque: PIL's RGB where it has 8 bits, a tensor in [-1, 1] otherwise."""
    from PIL import Image

    if range is not None:
        limits(range)
    source = image_item(source)
    if isinstance(source, FILE_TYPES):
        handle, name = open_source(source, "image")
        with handle, _decoding(name):
            return _read_file(handle, name, max_pixels, range)
    if isinstance(source, Image.Image):
        with _decoding("the PIL image"):
            content = _file_of(source)
            if content is not None:
                return _read_file(content, "the PIL image", max_pixels, range)
            # An image that was only opened is still at frame 0, so the caller has not picked one.
            if source.tell() == 0:
                _check_single(source, "the PIL image")
            check_pixels(*source.size, max_pixels, "the PIL image")
            return _from_pil(source, "the PIL image", range)
    if isinstance(source, Tensor | np.ndarray):
        array = _channels_last(source)
        check_pixels(array.shape[1], array.shape[0], max_pixels, "the array")
        return _from_array(array, range)
    raise InputError(f"expected a path, bytes, a PIL image, an array or a tensor, not {type(source).__name__}")


def image_info(source: Any) -> tuple[int, int]:
    """Width and height of an image, upright, from its header alone.

    Args:
        source: whatever `zoo.media.prepare_image` takes.

    Raises:
        InputError: the source is no image, or its header is damaged. Pixels are not looked at.
    """
    from PIL import Image

    source = image_item(source)
    if isinstance(source, Tensor | np.ndarray):
        height, width = _channels_last(source).shape[:2]
        return width, height
    if isinstance(source, Image.Image):
        with _decoding("the PIL image"):
            return _upright_size(source)
    if not isinstance(source, FILE_TYPES):
        raise InputError(f"expected a path, bytes, a PIL image, an array or a tensor, not {type(source).__name__}")
    handle, name = open_source(source, "image")
    with handle, _decoding(name):
        kind = _kind(handle)
        if kind == "HEIF":
            return heif.open_heif(handle, name).size
        if kind == "TIFF":
            with tiff.open_page(handle, name) as page:
                return tiff.page_size(page)
        samples = netpbm.read_header(handle) if kind == "PPM" else None
        if samples is not None:
            return samples.width, samples.height
        image = _open(handle, name, kind)
        if kind == "PNG":
            _give_exif(image, png.read_header(handle, name))
        return _upright_size(image)


def is_still(handle: io.BufferedIOBase) -> bool:
    """Whether a file is of a kind that holds pictures, rather than films; animations in GIF are films here."""
    return _kind(handle) not in (None, "GIF")


def check_pixels(width: int, height: int, max_pixels: int, name: str) -> None:
    """Refuse empty images and those of more than ``max_pixels``."""
    if width < 1 or height < 1:
        raise InputError(f"{name} is empty: {width} x {height} pixels")
    if width * height > max_pixels:
        raise InputError(
            f"{name} has {width} x {height} = {width * height} pixels, more than max_pixels = {max_pixels}: "
            "scale it down, or raise that limit"
        )


# -------------------------------------------------------------------------------------------------------------------- files


def _read_file(handle: io.BufferedIOBase, name: str, max_pixels: int, range: Range | None) -> Image.Image | Tensor:
    kind = _kind(handle)
    if kind == "HEIF":
        file = heif.open_heif(handle, name)
        width, height = file.size
        check_pixels(width, height, max_pixels, name)
        return _opaque(heif.read_heif(file))
    if kind == "TIFF":
        return _read_tiff(handle, name, max_pixels, range)
    if kind == "PPM" and (samples := netpbm.read_header(handle)) is not None:
        check_pixels(samples.width, samples.height, max_pixels, name)
        return signed_pixels(netpbm.read_samples(handle, samples, name, range))
    image = _open(handle, name, kind)
    check_pixels(*image.size, max_pixels, name)
    _check_single(image, name)
    if kind == "JPEG2000" and (components := jpeg2000.read_header(handle)).is_deep:
        return signed_pixels(jpeg2000.read_deep(handle, components, image.size, name))
    if kind == "PNG":
        chunks = png.read_header(handle, name)
        png.check_content(chunks, name)
        _give_exif(image, chunks)
        if png.is_deep(chunks):
            return signed_pixels(upright(png.read_deep(handle, chunks, name), _orientation(image)))
        png.scale_transparency(image, chunks)
    return _from_pil(image, name, range)


def _read_tiff(handle: io.BufferedIOBase, name: str, max_pixels: int, range: Range | None) -> Image.Image | Tensor:
    with tiff.open_page(handle, name) as page:
        check_pixels(page.imagewidth, page.imagelength, max_pixels, name)
        tiff.check_claim(page, name)
        image = _open_pillow_page(handle, page.index) if tiff.pillow_reads(page) else None
        if image is None:
            return signed_pixels(tiff.read_page(page, name, range))
        # A page of another size would have gone past the limit.
        check_pixels(*image.size, max_pixels, name)
    return _from_pil(image, name, range)


def _open_pillow_page(handle: io.BufferedIOBase, index: int) -> Image.Image | None:
    """A page of a TIFF file by Pillow; ``None`` where it knows no mode for it, or for the pages before."""
    from PIL import TiffImagePlugin

    opened: Any = handle
    opened.seek(0)
    try:
        image = TiffImagePlugin.TiffImageFile(opened, "")
        if index:
            image.seek(index)
    except (SyntaxError, EOFError, KeyError, TypeError, ValueError, OSError):
        return None
    return image


def _kind(handle: io.BufferedIOBase) -> str | None:
    """The format that a file begins as, by Pillow's name."""
    from PIL import Image

    Image.init()
    handle.seek(0)
    start = handle.read(_START_BYTES)
    if heif.is_heif(start):
        return "HEIF"
    if netpbm.is_netpbm(start):
        return "PPM"
    for kind in FORMATS:
        _, accept = Image.OPEN.get(kind, (None, None))
        if accept is not None and accept(start[:16]) is True:
            return kind
    return None


def _open(handle: io.BufferedIOBase, name: str, kind: str | None) -> Image.Image:
    """Read an image's header.

    Goes through Pillow's registry of formats because ``Image.open`` has a limit on pixels that is global to the process.
    """
    from PIL import Image

    factory, _ = Image.OPEN.get(kind or "", (None, None))
    if factory is None:
        raise InputError(f"{name} is not an image file that can be read; formats are {', '.join(FORMATS)}")
    opened: Any = handle
    opened.seek(0)
    image: Image.Image = factory(opened, "")
    return image


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn whatever decoders raise over damaged content into an `InputError`."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"{name} is truncated, damaged or of an unknown kind: {error}") from error


def _check_single(image: Image.Image, name: str) -> None:
    frames = getattr(image, "n_frames", 1)
    # A photograph with previews or a gain map beside it is one picture all the same, and so is the image that stands for an
    # animation where that cannot be played.
    if frames > 1 and image.format != "MPO" and not getattr(image, "default_image", False):
        raise InputError(f"{name} is animated or has pages, {frames} frames in all: pass one of them, as a PIL image")


def _give_exif(image: Image.Image, chunks: png.Header) -> None:
    """Pillow finds an eXIf chunk behind the pixels only once it has decoded them."""
    if chunks.exif is not None:
        image.info.setdefault("exif", chunks.exif)


def _orientation(image: Image.Image) -> int:
    from PIL import Image

    # PNG's own method decodes the file.
    return int(Image.Image.getexif(image).get(_ORIENTATION, 1))


def _upright_size(image: Image.Image) -> tuple[int, int]:
    # Pillow turns TIFF by itself.
    turned = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else image.size


# --------------------------------------------------------------------------------------------------------------- PIL images


def _file_of(image: Image.Image) -> io.BytesIO | None:
    """The content of the file that a PIL image was opened from, as long as nobody has decoded or changed it."""
    from PIL import ImageFile

    if not isinstance(image, ImageFile.ImageFile) or image.format not in _DEEP_FORMATS or image.tell() or not image.tile:
        return None
    handle = image.fp
    if handle is None or getattr(handle, "closed", False):
        return None
    position = handle.tell()
    handle.seek(0)
    content = io.BytesIO(handle.read())
    handle.seek(position)
    return content


def _from_pil(image: Image.Image, name: str, range: Range | None) -> Image.Image | Tensor:
    """A PIL image, upright and opaque."""
    from PIL import ImageOps

    is_file = image.format is not None
    tiff.check_loaded(image, name)
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        values = np.asarray(image)[..., None]
        if is_file and range is None:
            range = "unit"
        return _from_array(values, range)
    if image.mode in _SIXTEEN_BIT_MODES:
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65_535:
            raise InputError(f"integer pixels must lie in 0..65535, these reach from {levels.min()} to {levels.max()}")
        transparent = levels == image.info.get("transparency")
        return _from_array(np.where(transparent, 65_535, levels).astype(np.uint16)[..., None], None)
    return _on_white(image)


# ------------------------------------------------------------------------------------------------------- arrays and tensors


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


def _from_array(array: NDArray[Any], range: Range | None) -> Image.Image | Tensor:
    """An array ``[height, width, 1|3|4]``, opaque: PIL's RGB where it has 8 bits, a tensor in [-1, 1] otherwise."""
    if array.dtype == np.uint8:
        return _opaque(array)
    if array.dtype == np.float32 and range is not None:
        return signed_pixels(unit_values(array, range, name="the array", overshoot=True))
    pixels = torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, 2, 0)).astype(np.float32))
    if array.dtype == np.float32:
        check_range(array, *RANGES["signed"], name="the array", overshoot=True)
    else:
        pixels = pixels / 65_535 * 2 - 1
    if len(pixels) == 4:
        opacity = (pixels[3:].clamp(-1, 1) + 1) / 2
        pixels = pixels[:3] * opacity + (1 - opacity)
    return pixels.expand(3, -1, -1)


def _opaque(array: NDArray[Any]) -> Image.Image | Tensor:
    """Pixels ``[height, width, 1|2|3|4]``, opaque: PIL's RGB of uint8, a tensor in [-1, 1] of float32 in [0, 1]."""
    from PIL import Image

    if array.dtype != np.uint8:
        return signed_pixels(array)
    return _on_white(Image.fromarray(array[..., 0] if array.shape[2] == 1 else array))


def _on_white(image: Image.Image) -> Image.Image:
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")

"""TIFF: pages are told apart by tifffile, which also decodes what Pillow gets wrong or refuses.

Pillow goes on reading the files of 8 bits and less, and grey of 16 bits. Integers of any other depth, colour of 16 bits,
floating point and MinIsWhite of 16 bits are decoded by tifffile; compressed ones and depths other than 1, 8, 16, 32 and 64
bits need imagecodecs (the extra ``image``).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zoo.errors import InputError
from zoo.media.image.levels import Range, rgb_of_cmyk, rgb_of_ycbcr, unit_levels, unit_values, unpremultiplied, upright

if TYPE_CHECKING:
    from PIL import Image
    from tifffile import TiffFile, TiffPage

# Bits of NewSubfileType.
_REDUCED, _MASK = 1, 4
# PhotometricInterpretation.
_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB, _PALETTE, _CMYK, _YCBCR, _CIELAB = 0, 1, 2, 3, 5, 6, 8
_COLOURS = {_MIN_IS_WHITE: 1, _MIN_IS_BLACK: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4, _YCBCR: 3}
# SampleFormat.
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
# ExtraSamples.
_ASSOCIATED, _UNASSOCIATED = 1, 2
_ORIENTATION = 274
# Compressions that hold whole JPEG images: decoders turn their YCbCr into RGB.
_JPEG = (6, 7, 34892, 33007)
# What Pillow's libtiff is built with everywhere: none, CCITT, LZW, JPEG, deflate, PackBits, LZMA and Zstandard.
_PILLOW_COMPRESSIONS = (1, 2, 3, 4, 5, *_JPEG[:2], 8, 32773, 32946, 34925, 50000)
# The most bytes that one byte can unfold to. Compressions that are not here have no bound that would tell.
_LARGEST_RATIOS = {1: 1, 5: 2731, 8: 1032, 32773: 64, 32946: 1032}
# Pixels of a tile of a small image, which are stored whole.
_LARGEST_LONE_TILE = 1 << 22


@contextmanager
def open_page(handle: Any, name: str) -> Iterator[TiffPage]:
    """The page that is the image: of several pages, the one that is no smaller copy and no mask.

    Raises:
        InputError: there are several such pages, or none.
    """
    import tifffile

    handle.seek(0)
    with tifffile.TiffFile(handle) as file:
        yield _main_page(file, name)


def _main_page(file: TiffFile, name: str) -> TiffPage:
    pages: list[Any] = list(file.pages)
    full = [page for page in pages if not page.subfiletype & (_REDUCED | _MASK)]
    if not full:
        # A preview comes first in camera files, and the picture hangs on it.
        children = [child for page in pages for child in page.pages or () if hasattr(child, "subfiletype")]
        full = [child for child in children if not child.subfiletype & (_REDUCED | _MASK)] or pages[:1]
    if not full:
        raise InputError(f"{name} is a TIFF file without a page")
    if len(full) > 1:
        raise InputError(f"{name} is animated or has pages, {len(full)} frames in all: pass one of them, as a PIL image")
    return full[0]


def page_size(page: TiffPage) -> tuple[int, int]:
    """Width and height, upright."""
    size = page.imagewidth, page.imagelength
    return size if page.tags.valueof(_ORIENTATION) not in (5, 6, 7, 8) else size[::-1]


def pillow_reads(page: TiffPage) -> bool:
    """Whether Pillow decodes a page without loss and with the right levels."""
    depth, photometric = page.bitspersample, page.photometric
    if page.sampleformat != _UNSIGNED or page.compression not in _PILLOW_COMPRESSIONS or len(page.treeindex) > 1:
        return False
    if page.planarconfig != 1 and (page.samplesperpixel > 1 or page.compression == 1):
        # Planes that are not compressed are all taken for 8 bits and black for 0.
        return depth == 8 and (photometric, page.samplesperpixel) in ((_MIN_IS_BLACK, 1), (_RGB, 3), (_CMYK, 4))
    if depth == 8:
        # Raw samples of chroma are taken as if there were one a pixel.
        return photometric in (*_COLOURS, _CIELAB) and not (page.is_subsampled and page.compression == 1)
    if photometric in (_MIN_IS_WHITE, _MIN_IS_BLACK, _PALETTE) and page.samplesperpixel == 1:
        return (depth in (1, 2, 4) and not page.is_tiled) or (depth == 16 and photometric == _MIN_IS_BLACK)
    return False


def check_loaded(image: Image.Image, name: str) -> None:
    """Refuse a PIL image decoded from a TIFF file with wrong levels, judged by its tags.

    Raises:
        InputError: its depth, sign or photometric interpretation is one that Pillow does not scale.
    """
    tags = getattr(image, "tag_v2", None)
    if tags is None or image.mode not in ("I", "I;16", "I;16B", "F"):
        return
    photometric, depths, formats = tags.get(262, 0), set(tags.get(258, (1,))), set(tags.get(339, (1,)))
    if photometric != _MIN_IS_BLACK or (depths, formats) not in (({16}, {_UNSIGNED}), ({32}, {_FLOAT})):
        raise InputError(
            f"{name} was decoded from a TIFF file of {', '.join(map(str, depths))} bits and photometric interpretation "
            f"{photometric}, whose levels Pillow does not scale: pass the file's path or bytes"
        )


def check_claim(page: TiffPage, name: str) -> None:
    """Refuse a page of more pixels than its file can hold, before room is made for them.

    Raises:
        InputError: the file is too small for the size and the depth that the page claims.
    """
    width, height = (page.tilewidth, page.tilelength) if page.is_tiled else (page.imagewidth, page.imagelength)
    if width * height > max(_LARGEST_LONE_TILE, 4 * page.imagewidth * page.imagelength):
        raise InputError(f"{name} is damaged: tiles of {width} x {height} pixels for {page.imagewidth} x {page.imagelength}")
    planes, samples = (1, page.samplesperpixel) if page.planarconfig == 1 else (page.samplesperpixel, 1)
    depths = page.bitspersample if isinstance(page.bitspersample, tuple) else (page.bitspersample,)
    claimed = (math.prod(page.chunked) if page.is_tiled else planes) * height * -(-width * samples * min(depths) // 8)
    ratio, size = _LARGEST_RATIOS.get(page.compression), page.parent.filehandle.size
    if ratio is not None and claimed > ratio * size:
        raise InputError(f"{name} is truncated or damaged: {size} bytes cannot hold the {claimed} of its TIFF header")


def read_page(page: TiffPage, name: str, range: Range | None) -> NDArray[np.float32]:
    """The pixels of a page in [0, 1], upright.

    Args:
        page: of a size that was checked.
        name: of the file, for messages.
        range: black and white of floating-point and signed samples; [0, 1] by default for the former.

    Returns:
        ``[height, width, channels]``: grey, grey and opacity, RGB, or RGB and opacity.

    Raises:
        InputError: the page is damaged, or of a kind that cannot be read, which the message names.
    """
    colours = _check_kind(page, name, range)
    _check_segments(page, name)
    samples = _decode(page, name)
    unit = _unit_samples(page, samples, name, range)
    own, extra = unit[..., :colours], unit[..., colours:]
    largest = (1 << page.bitspersample) - 1
    if page.photometric == _MIN_IS_WHITE:
        own = 1 - own
    elif page.photometric == _PALETTE:
        own = _look_up(page, samples[..., 0], name)
    elif page.photometric == _CMYK:
        own = rgb_of_cmyk(own)
    elif page.photometric == _YCBCR and page.compression not in _JPEG:
        own = rgb_of_ycbcr(own, largest)
    return upright(_with_opacity(page, own, extra), page.tags.valueof(_ORIENTATION))


def _check_kind(page: TiffPage, name: str, range: Range | None) -> int:
    """The number of a page's colour samples; refuses what cannot be read."""
    depth, photometric = page.bitspersample, page.photometric
    colours = _COLOURS.get(photometric)
    if colours is None:
        kind = getattr(photometric, "name", photometric)
        raise InputError(
            f"{name} is a TIFF file of photometric interpretation {kind}, which cannot be read: convert it to RGB or grey"
        )
    if not isinstance(depth, int) or not isinstance(page.sampleformat, int):
        raise InputError(
            f"{name} is a TIFF file whose samples differ in kind ({depth} bits, formats {page.sampleformat}), which cannot be "
            "read: convert it to one number of bits"
        )
    if page.sampleformat == _SIGNED and range is None:
        raise InputError(
            f"{name} is a TIFF file of signed integers, which have no agreed black and white: pass range=(black, white), such "
            f"as range=({-(1 << (depth - 1))}, {(1 << (depth - 1)) - 1})"
        )
    if page.sampleformat not in (_UNSIGNED, _SIGNED, _FLOAT):
        kind = getattr(page.sampleformat, "name", page.sampleformat)
        raise InputError(f"{name} is a TIFF file of {depth}-bit {kind} samples, which cannot be read: convert it")
    if page.sampleformat != _UNSIGNED and photometric not in (_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB):
        raise InputError(f"{name} is a TIFF file of palette, CMYK or YCbCr that is not of unsigned integers: convert it")
    if page.samplesperpixel < colours or page.imagedepth != 1:
        raise InputError(
            f"{name} is a TIFF file of {page.samplesperpixel} samples a pixel where {colours} are needed, or a volume: convert "
            "it to RGB or grey"
        )
    return colours


def _check_segments(page: TiffPage, name: str) -> None:
    """Refuse a page with missing strips or tiles, which would be black."""
    counts, offsets = page.databytecounts, page.dataoffsets
    segments = math.prod(page.chunked)
    size = page.parent.filehandle.size
    present = all(offset > 0 and 0 < count <= size - offset for offset, count in zip(offsets, counts, strict=False))
    if len(counts) != segments or len(offsets) != segments or not present:
        raise InputError(f"{name} is truncated or damaged: strips or tiles of the TIFF file are missing")


def _decode(page: TiffPage, name: str) -> NDArray[Any]:
    """Samples as they are stored, ``[height, width, samples]``."""
    try:
        if page.bitspersample == 24 and page.sampleformat == _UNSIGNED:
            return _three_byte_samples(page)
        samples = page.asarray(maxworkers=1)
    except Exception as error:
        raise InputError(_reason(page, name, error)) from error
    if samples.ndim == 2:
        samples = samples[..., None]
    elif page.planarconfig != 1:
        samples = np.moveaxis(samples, 0, -1)
    return samples


def _three_byte_samples(page: TiffPage) -> NDArray[Any]:
    """Samples of 24 bits, ``[height, width, samples]``; tifffile does not bring their bytes into the file's order."""
    from tifffile import TIFF

    if page.predictor != 1 or page.fillorder != 1:
        raise ValueError("24-bit samples with a predictor or a reversed order of bits")
    height, width = page.imagelength, page.imagewidth
    planes, samples = (1, page.samplesperpixel) if page.planarconfig == 1 else (page.samplesperpixel, 1)
    rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, width)
    down, across = -(-height // rows), -(-width // columns)
    levels = np.zeros((planes, down * rows, across * columns, samples), np.uint32)
    segments: Any = page.parent.filehandle.read_segments(page.dataoffsets, page.databytecounts)
    for content, index in segments:
        plane, position = divmod(index, down * across)
        top, left = position // across * rows, position % across * columns
        held = rows if page.is_tiled else min(rows, height - top)
        length = held * columns * samples * 3
        if page.compression != 1:
            content = TIFF.DECOMPRESSORS[page.compression](content, out=length)
        content = np.frombuffer(content, np.uint8)[:length].reshape(held, columns, samples, 3).astype(np.uint32)
        low, high = (0, 2) if page.parent.byteorder == "<" else (2, 0)
        level = content[..., low] | content[..., 1] << 8 | content[..., high] << 16
        levels[plane, top : top + held, left : left + columns] = level
    levels = levels[:, :height, :width]
    return levels[0] if page.planarconfig == 1 else np.moveaxis(levels[..., 0], 0, -1)


def _reason(page: TiffPage, name: str, error: Exception) -> str:
    compression = getattr(page.compression, "name", page.compression)
    if "imagecodecs" in str(error) and importlib.util.find_spec("imagecodecs") is None:
        return (
            f"{name} is a TIFF file of {page.bitspersample}-bit samples with compression {compression}, which needs "
            "imagecodecs: pip install 'tokenizer-zoo[image]'"
        )
    return (
        f"{name} is truncated, damaged or of an unknown kind (TIFF, {page.bitspersample}-bit samples, compression "
        f"{compression}): {error}"
    )


def _unit_samples(page: TiffPage, samples: NDArray[Any], name: str, range: Range | None) -> NDArray[np.float32]:
    if page.sampleformat == _UNSIGNED:
        return unit_levels(samples, (1 << page.bitspersample) - 1)
    colours = _COLOURS[page.photometric]
    # Samples that are neither colour nor opacity may hold anything.
    used = samples if _has_opacity(page) else samples[..., :colours]
    return unit_values(used[..., : colours + 1], "unit" if range is None else range, name=name)


def _look_up(page: TiffPage, indices: NDArray[Any], name: str) -> NDArray[np.float32]:
    palette = page.colormap
    if palette is None or palette.ndim != 2 or len(palette) != 3 or int(indices.max()) >= palette.shape[1]:
        raise InputError(f"{name} is damaged: its palette is missing or too short")
    return unit_levels(palette.T[indices], 0xFFFF)


def _has_opacity(page: TiffPage) -> bool:
    """Whether the sample behind the colours is opacity; writers of RGB leave out the tag that says so."""
    surplus = page.samplesperpixel - _COLOURS[page.photometric]
    if surplus > 0 and page.extrasamples:
        return page.extrasamples[0] in (_ASSOCIATED, _UNASSOCIATED)
    return surplus == 1 and page.photometric == _RGB


def _with_opacity(page: TiffPage, own: NDArray[np.float32], extra: NDArray[np.float32]) -> NDArray[np.float32]:
    """Grey or RGB, with opacity behind it where the page has some; colours are not multiplied by it."""
    if not _has_opacity(page):
        return own
    opacity = extra[..., :1].clip(0, 1)
    if page.extrasamples[:1] == (_ASSOCIATED,):
        own = unpremultiplied(own, opacity)
    return np.concatenate([own, opacity], axis=-1)

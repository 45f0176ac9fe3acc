"""HEIC and HEIF, through pillow-heif (the extra ``heic``), at the full depth of 10 and 12 bits."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zoo.errors import InputError
from zoo.media.image.levels import unit_levels, unpremultiplied

if TYPE_CHECKING:
    from pillow_heif import HeifFile

_HEVC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_AVIF_BRANDS = {b"avif", b"avis"}
_GENERIC_BRANDS = {b"mif1", b"mif2", b"msf1"}


def is_heif(start: bytes) -> bool:
    """Whether a file begins as HEIC or HEIF does; AVIF, which shares the container, is Pillow's."""
    if start[4:8] != b"ftyp":
        return False
    length = min(int.from_bytes(start[:4], "big"), len(start))
    brands = {start[8:12], *(start[i : i + 4] for i in range(16, length - 3, 4))}
    return bool(brands & (_HEVC_BRANDS | _GENERIC_BRANDS)) and not brands & _AVIF_BRANDS


def open_heif(handle: Any, name: str) -> HeifFile:
    """Read a file's header.

    Raises:
        InputError: pillow-heif is missing, or the file holds several images.
    """
    if importlib.util.find_spec("pillow_heif") is None:
        raise InputError(f"{name} is a HEIC/HEIF file, which needs pillow-heif: pip install 'tokenizer-zoo[heic]'")
    import pillow_heif

    handle.seek(0)
    file = pillow_heif.open_heif(handle, convert_hdr_to_8bit=False)
    if len(file) > 1:
        raise InputError(f"{name} is animated or has pages, {len(file)} frames in all: pass one of them, as a PIL image")
    return file


def read_heif(file: HeifFile) -> NDArray[Any]:
    """Pixels of a file whose size was checked, ``[height, width, 1|2|3|4]``: uint8, or float32 in [0, 1] of more bits.

    libheif turns the image upright.
    """
    samples = np.asarray(file)
    samples = samples[..., None] if samples.ndim == 2 else samples
    if samples.dtype == np.uint8 and not file.premultiplied_alpha:
        return samples
    depth = file.info["bit_depth"]
    # Samples of 10 and 12 bits come shifted to 16.
    unit = unit_levels(samples >> (samples.dtype.itemsize * 8 - depth), (1 << depth) - 1)
    if file.premultiplied_alpha:
        unit[..., :-1] = unpremultiplied(unit[..., :-1], unit[..., -1:])
    return unit

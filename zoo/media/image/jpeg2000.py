"""JPEG 2000 of other than 8 bits: Pillow shifts samples to 8 or 16 bits, after which full scale is not white."""

from __future__ import annotations

import importlib.util
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.errors import InputError
from zoo.media.image.levels import unit_levels

_CODESTREAM = b"\xff\x4f\xff\x51"
_SIZE_FIELDS = ">HHIIIIIIIIH"
# Boxes in front of a codestream are small, but for embedded colour profiles.
_HEADER_BYTES = 1 << 22
_LARGEST_DEPTH = 16
# Enumerated colour spaces of the colr box: of samples that are RGB or grey already, and what others are called.
_PLAIN_COLOURS = (16, 17)
_OTHER_COLOURS = {12: "CMYK", 14: "CIELab", 18: "sYCC"}


@dataclass(frozen=True)
class Header:
    """Facts about the samples, from a file's header.

    Attributes:
        depths: bits of each component.
        signed: whether each component has a sign.
        colours: the enumerated colour space; ``None`` where there is a profile or nothing.
        has_palette: samples are indices.
    """

    depths: tuple[int, ...]
    signed: tuple[bool, ...]
    colours: int | None
    has_palette: bool

    @property
    def is_deep(self) -> bool:
        """Whether a component has other than 8 bits."""
        return any(depth != 8 for depth in self.depths)


def read_header(handle: Any) -> Header:
    """Read the size marker of the codestream and the boxes in front of it; no component where there is no codestream."""
    handle.seek(0)
    start = handle.read(_HEADER_BYTES)
    boxes, marker, codestream = start.partition(_CODESTREAM)
    length = struct.calcsize(_SIZE_FIELDS)
    if not marker or len(codestream) < length:
        return Header((), (), None, False)
    count = struct.unpack(_SIZE_FIELDS, codestream[:length])[-1]
    # Three bytes a component: depth and sign, and the steps of subsampling.
    components = codestream[length : length + 3 * count : 3]
    colours = None
    box = boxes.find(b"colr")
    if box >= 0 and boxes[box + 4 : box + 5] == b"\x01" and len(boxes) >= box + 11:
        colours = int.from_bytes(boxes[box + 7 : box + 11], "big")
    return Header(
        tuple((component & 0x7F) + 1 for component in components),
        tuple(bool(component & 0x80) for component in components),
        colours,
        b"pclr" in boxes,
    )


def read_deep(handle: Any, header: Header, size: tuple[int, int], name: str) -> NDArray[np.float32]:
    """Pixels in [0, 1], ``[height, width, 1|2|3|4]``, each component at its own depth.

    Signed samples are raised by half of their range, as OpenJPEG's own tools do.

    Args:
        handle: the file.
        header: of the file.
        size: width and height, which were checked.
        name: of the file, for messages.

    Raises:
        InputError: imagecodecs (the extra ``image``) is missing, or the file is damaged or of a kind that cannot be read.
    """
    kind = f"{name} is a JPEG 2000 file of {', '.join(map(str, header.depths))} bits"
    if max(header.depths) > _LARGEST_DEPTH:
        raise InputError(f"{kind}, more than the {_LARGEST_DEPTH} that are read: convert it")
    if header.has_palette or len(header.depths) > 4:
        raise InputError(f"{kind} with a palette or more than 4 components, which cannot be read: convert it to RGB")
    if header.colours not in (None, *_PLAIN_COLOURS):
        colours = _OTHER_COLOURS.get(header.colours, f"number {header.colours}")
        raise InputError(f"{kind} in the colour space {colours}, which is read at 8 bits alone: convert it to RGB")
    if importlib.util.find_spec("imagecodecs") is None:
        raise InputError(f"{kind}, which needs imagecodecs: pip install 'tokenizer-zoo[image]'")
    import imagecodecs

    handle.seek(0)
    samples = imagecodecs.jpeg2k_decode(handle.read())
    samples = samples[..., None] if samples.ndim == 2 else samples
    if samples.shape != (size[1], size[0], len(header.depths)):
        raise InputError(f"{kind} and {size[0]} x {size[1]} pixels, whose components differ in size or are damaged: convert it")
    components = [
        unit_levels(samples[..., i].astype(np.int32) + (1 << (depth - 1)) * is_signed, (1 << depth) - 1)
        for i, (depth, is_signed) in enumerate(zip(header.depths, header.signed, strict=True))
    ]
    return np.stack(components, axis=-1)

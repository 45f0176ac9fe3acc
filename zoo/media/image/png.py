"""PNG: transparent samples of every depth, colour of 16 bits, and hidden default images of animations."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from zoo.errors import InputError
from zoo.media.image.levels import unit_levels

if TYPE_CHECKING:
    from PIL import Image

_SIGNATURE_BYTES = 8
# Colour types.
_GREY, _RGB, _GREY_ALPHA, _RGBA = 0, 2, 4, 6
_CHANNELS = {_GREY: 1, _RGB: 3, 3: 1, _GREY_ALPHA: 2, _RGBA: 4}
# Deflate's largest ratio.
_LARGEST_RATIO = 1032


@dataclass(frozen=True)
class Header:
    """Facts about the samples, from a PNG file's header.

    Attributes:
        width, height: pixels.
        depth: bits per sample.
        colour_type: as in IHDR.
        transparency: tRNS of grey and RGB, the samples that are transparent, at the file's depth.
        exif: the content of the eXIf chunk, wherever it stands.
        compressed: bytes of compressed pixels in the default image.
    """

    width: int
    height: int
    depth: int
    colour_type: int
    transparency: tuple[int, ...] | None
    exif: bytes | None
    compressed: int

    @property
    def decoded(self) -> int:
        """Bytes of the pixels, at least."""
        return self.height * -(-self.width * _CHANNELS.get(self.colour_type, 1) * self.depth // 8)


def read_header(handle: Any, name: str) -> Header:
    """Read what the chunks of a PNG file say, without its pixels.

    Raises:
        InputError: there is no IHDR.
    """
    fields: tuple[int, ...] | None = None
    transparency, exif, compressed = b"", None, 0
    for kind, length in _chunks(handle):
        if kind == b"IHDR" and fields is None and length >= 13:
            content = handle.read(13)
            fields = struct.unpack(">IIBB", content[:10]) if len(content) == 13 else None
        elif kind == b"tRNS" and length <= 256:
            transparency = handle.read(length)
        elif kind == b"eXIf" and length < 1 << 16:
            exif = handle.read(length)
        elif kind == b"IDAT":
            compressed += length
    if fields is None:
        raise InputError(f"{name} is truncated, damaged or of an unknown kind: a PNG file without its header")
    width, height, depth, colour_type = fields
    key = None
    count = {_GREY: 1, _RGB: 3}.get(colour_type)
    if count is not None and len(transparency) >= 2 * count:
        # Bits above the depth mean nothing.
        key = tuple(value & ((1 << depth) - 1) for value in struct.unpack(f">{count}H", transparency[: 2 * count]))
    return Header(width, height, depth, colour_type, key, exif, compressed)


def _chunks(handle: Any) -> Iterator[tuple[bytes, int]]:
    """Kinds and lengths of chunks; the handle stands at the content of each."""
    end = handle.seek(0, 2)
    position = _SIGNATURE_BYTES
    while position + 8 <= end:
        handle.seek(position)
        length, kind = struct.unpack(">I4s", handle.read(8))
        yield kind, min(length, end - position - 8)
        if kind == b"IEND":
            return
        position += 12 + length


def check_content(header: Header, name: str) -> None:
    """Refuse a file whose compressed pixels cannot be as many as its header claims, before room is made for them."""
    if header.decoded > _LARGEST_RATIO * header.compressed + _LARGEST_RATIO:
        raise InputError(
            f"{name} is truncated or damaged: {header.width} x {header.height} pixels in {header.compressed} compressed bytes"
        )


def is_deep(header: Header) -> bool:
    """Whether Pillow would cut the samples down to 8 bits."""
    return header.depth == 16 and header.colour_type in (_RGB, _GREY_ALPHA, _RGBA)


def read_deep(handle: Any, header: Header, name: str) -> NDArray[np.float32]:
    """Pixels of 16 bits in [0, 1], ``[height, width, 2|3|4]``; an RGB file with a transparent colour gets opacity.

    Raises:
        InputError: the file is damaged.
    """
    from torchvision.io import ImageReadMode, decode_png

    handle.seek(0)
    with warnings.catch_warnings():
        # torch minds that bytes cannot be written to, which nobody does.
        warnings.simplefilter("ignore", UserWarning)
        content = torch.frombuffer(bytearray(handle.read()), dtype=torch.uint8)
    levels = decode_png(content, ImageReadMode.UNCHANGED)
    channels = _CHANNELS[header.colour_type]
    if levels.dtype != torch.uint16 or tuple(levels.shape) != (channels, header.height, header.width):
        raise InputError(f"{name} is truncated, damaged or of an unknown kind: its pixels are not what its header says")
    samples = levels.permute(1, 2, 0).numpy()
    unit = unit_levels(samples, 0xFFFF)
    if header.transparency is not None:
        hidden = (samples == np.array(header.transparency, np.uint16)).all(-1, keepdims=True)
        unit = np.concatenate([unit, np.where(hidden, 0, 1).astype(np.float32)], axis=-1)
    return unit


def scale_transparency(image: Image.Image, header: Header) -> None:
    """Bring the transparent level of a grey image of less than 8 bits to the scale of 8, to which Pillow brings its pixels."""
    if header.transparency is not None and header.colour_type == _GREY and header.depth < 8:
        image.info["transparency"] = header.transparency[0] * 255 // ((1 << header.depth) - 1)
    elif header.transparency is not None:
        image.info["transparency"] = header.transparency if header.colour_type == _RGB else header.transparency[0]

"""Image files of every depth, written sample by sample from the formats' specifications."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np


def packed(samples: np.ndarray, bits: int, order: str) -> bytes:
    """Rows of samples ``[rows, samples in a row]``: whole bytes in the file's order, others as a string of bits."""
    if bits in (16, 24, 32):
        wide = samples.astype(f"{order}u4").view(np.uint8).reshape(*samples.shape, 4)
        kept = wide[..., : bits // 8] if order == "<" else wide[..., 4 - bits // 8 :]
        return kept.tobytes()
    steps = np.arange(bits - 1, -1, -1)
    string = (samples[..., None] >> steps & 1).astype(np.uint8).reshape(len(samples), -1)
    return np.packbits(string, axis=1).tobytes()


def tiff_file(
    samples: np.ndarray,
    bits: int,
    photometric: int,
    *,
    order: str = "<",
    planar: bool = False,
    tile: int = 0,
    deflate: bool = False,
    tags: Mapping[int, Any] | None = None,
) -> bytes:
    """A TIFF file of integers ``[height, width, samples]``; ``tile`` is the side of its tiles, 0 for strips of 3 rows."""
    height, width, count = samples.shape
    planes = np.moveaxis(samples, 2, 0)[..., None] if planar else samples[None]
    segments = []
    for plane in planes.astype(np.int64):
        if tile:
            plane = np.pad(plane, ((0, -height % tile), (0, -width % tile), (0, 0)))
            for top in range(0, plane.shape[0], tile):
                for left in range(0, plane.shape[1], tile):
                    segments.append(plane[top : top + tile, left : left + tile].reshape(tile, -1))
        else:
            segments += [plane[top : top + 3].reshape(-1, plane.shape[1] * plane.shape[2]) for top in range(0, height, 3)]
    contents = [packed(segment, bits, order) for segment in segments]
    if deflate:
        contents = [zlib.compress(content) for content in contents]
    entries: dict[int, tuple[int, ...]] = {
        256: (width,),
        257: (height,),
        258: (bits,) * count,
        259: (8 if deflate else 1,),
        262: (photometric,),
        277: (count,),
        284: (2 if planar else 1,),
    }
    places = (324, 325) if tile else (273, 279)
    entries |= {322: (tile,), 323: (tile,)} if tile else {278: (3,)}
    offsets, position = [], 8
    for content in contents:
        offsets.append(position)
        position += len(content) + len(content) % 2
    entries |= {places[0]: tuple(offsets), places[1]: tuple(map(len, contents))}
    for tag, value in (tags or {}).items():
        entries[tag] = tuple(value) if isinstance(value, list | tuple) else (value,)
    body = b"".join(content + b"\0" * (len(content) % 2) for content in contents)
    directory, after = struct.pack(order + "H", len(entries)), b""
    end = position + 2 + 12 * len(entries) + 4
    for tag in sorted(entries):
        values = entries[tag]
        long = tag in (*places, 256, 257)
        content = struct.pack(f"{order}{len(values)}{'I' if long else 'H'}", *values)
        if len(content) > 4:
            field, after = struct.pack(order + "I", end + len(after)), after + content + b"\0" * (len(content) % 4)
        else:
            field = content.ljust(4, b"\0")
        directory += struct.pack(order + "HHI", tag, 4 if long else 3, len(values)) + field
    mark = b"II" if order == "<" else b"MM"
    return mark + struct.pack(order + "HI", 42, position) + body + directory + struct.pack(order + "I", 0) + after


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_file(samples: np.ndarray, bits: int, colour_type: int, **chunks: bytes) -> bytes:
    """A PNG file of integers ``[height, width, samples]``, with more chunks before its pixels."""
    height, width, _ = samples.shape
    rows = packed(samples.astype(np.int64).reshape(height, -1), bits, ">")
    length = len(rows) // height
    content = zlib.compress(b"".join(b"\0" + rows[row * length : (row + 1) * length] for row in range(height)))
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    more = b"".join(chunk(kind.encode(), body) for kind, body in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", content) + chunk(b"IEND", b"")

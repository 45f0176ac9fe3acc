"""MP4 and Matroska: whether their boxes are there to the end. FFmpeg does not mind if not."""

from __future__ import annotations

from io import BufferedIOBase

from zoo.errors import InputError
from zoo.media.containers.spliced import read_at

_EBML = b"\x1aE\xdf\xa3"


def check_boxes(handle: BufferedIOBase, start: int, end: int, name: str) -> None:
    """Refuse an MP4, QuickTime, Matroska or WebM file that ends inside one of its boxes; others pass.

    Raises:
        InputError: it does; names the box.
    """
    if read_at(handle, start, 4) == _EBML:
        _check_matroska(handle, start, end, name)
    else:
        _check_mp4(handle, start, end, name)


def _check_mp4(handle: BufferedIOBase, position: int, end: int, name: str) -> None:
    while len(head := read_at(handle, position, 16)) >= 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1 and len(head) == 16:
            length = int.from_bytes(head[8:], "big")
        # A length of 0 reaches to the end of the file.
        if length < 8 or not kind.isalnum():
            return
        if position + length > end:
            raise _truncated(name, f"box {kind.decode('latin-1')!r}", length, end - position)
        position += length


def _check_matroska(handle: BufferedIOBase, position: int, end: int, name: str) -> None:
    while len(head := read_at(handle, position, 12)) == 12:
        width = 9 - head[4].bit_length()
        if width > 8:
            return
        length = int.from_bytes(head[4 : 4 + width], "big") & ((1 << 7 * width) - 1)
        # All ones: a live stream, which reaches to the end of the file.
        if length == (1 << 7 * width) - 1:
            return
        if position + 4 + width + length > end:
            raise _truncated(name, f"element {head[:4].hex()}", length, end - position - 4 - width)
        position += 4 + width + length


def _truncated(name: str, what: str, length: int, there: int) -> InputError:
    return InputError(f"{name} is truncated: the {what} at its top level has {length} bytes, and {there} are there")

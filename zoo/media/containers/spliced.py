"""A readable file made of pieces of another one and of new headers between them."""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Piece = bytes | tuple[int, int] | int
"""New bytes, the start and the length of a range of the underlying file, or a number of zero bytes."""

_SEARCH_BLOCK = 1 << 20


@dataclass(frozen=True)
class Track:
    """One recording inside a file, ready for a decoder.

    Attributes:
        content: a file that a decoder reads to its end.
        decoder: ``"soundfile"`` or ``"av"``.
        samples: how many there are per channel, where the container proves it.
        measured: whether otherwise the decoder's own number is right; if not, only decoding tells.
        order: for each channel in WAV order, where the decoder puts it; ``None`` where it is the same order.
    """

    content: io.BufferedIOBase
    decoder: str = "soundfile"
    samples: int | None = None
    measured: bool = True
    order: tuple[int, ...] | None = None


class Spliced(io.RawIOBase):
    """A read-only view: pieces of ``base`` and new bytes, one behind the other, without copying what lies in ``base``.

    Several views may share a base; each seeks before it reads.
    """

    def __init__(self, base: io.BufferedIOBase, pieces: Sequence[Piece]) -> None:
        self._base = base
        self._pieces: list[Piece] = []
        for piece in pieces:
            last = self._pieces[-1] if self._pieces else None
            if isinstance(piece, tuple) and isinstance(last, tuple) and sum(last) == piece[0]:
                self._pieces[-1] = (last[0], last[1] + piece[1])
            elif _length(piece):
                self._pieces.append(piece)
        self._starts = [0]
        for piece in self._pieces:
            self._starts.append(self._starts[-1] + _length(piece))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        # A decoder that follows a damaged header may seek before the start; it must get an answer, not an exception.
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._starts[-1]}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view) and self._position < self._starts[-1]:
            index = bisect_right(self._starts, self._position) - 1
            piece, offset = self._pieces[index], self._position - self._starts[index]
            count = min(len(view) - done, _length(piece) - offset)
            if isinstance(piece, bytes):
                view[done : done + count] = piece[offset : offset + count]
            elif isinstance(piece, int):
                view[done : done + count] = bytes(count)
            else:
                self._base.seek(piece[0] + offset)
                found = self._base.read(count)
                count = len(found)
                view[done : done + count] = found
                if not count:
                    break
            done += count
            self._position += count
        return done


def _length(piece: Piece) -> int:
    if isinstance(piece, int):
        return piece
    return len(piece) if isinstance(piece, bytes) else piece[1]


def spliced(base: io.BufferedIOBase, pieces: Sequence[Piece]) -> io.BufferedIOBase:
    """`Spliced`, buffered: decoders read a few bytes at a time."""
    return io.BufferedReader(Spliced(base, pieces), 1 << 16)


def read_at(handle: io.BufferedIOBase, start: int, count: int) -> bytes:
    """Up to ``count`` bytes from ``start``; both may be what a damaged header claims."""
    size = handle.seek(0, os.SEEK_END)
    if start >= size:
        return b""
    handle.seek(start)
    return handle.read(max(0, min(count, size - start)))


def find_all(handle: io.BufferedIOBase, mark: bytes, start: int, end: int) -> Iterator[int]:
    """Every position of ``mark`` between two positions, block by block."""
    keep = len(mark) - 1
    while start < end - keep:
        block = read_at(handle, start, min(_SEARCH_BLOCK, end - start))
        if len(block) <= keep:
            return
        found = block.find(mark)
        while found >= 0:
            yield start + found
            found = block.find(mark, found + 1)
        start += len(block) - keep


def id3v2_length(head: bytes) -> int:
    """Bytes of the ID3v2 tag that these (at least ten) bytes begin; 0 where they begin none."""
    if len(head) < 10 or head[:3] != b"ID3" or head[3] == 0xFF or any(byte > 0x7F for byte in head[6:10]):
        return 0
    size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
    return 10 + size + (10 if head[5] & 0x10 else 0)


def without_tags(handle: io.BufferedIOBase, size: int) -> tuple[int, int]:
    """Start and end of the content without the ID3v2, ID3v1, APE and Lyrics3 tags around it."""
    start, end = 0, size
    while length := id3v2_length(read_at(handle, start, 10)):
        start = min(size, start + length)
    while True:
        tail = read_at(handle, max(start, end - 128), min(128, end - start))
        if len(tail) == 128 and tail[:3] == b"TAG":
            end -= 128
        elif tail[-32:-24] == b"APETAGEX" and len(tail) >= 32:
            footer = tail[-32:]
            length = int.from_bytes(footer[12:16], "little") + (32 if footer[23] & 0x80 else 0)
            if not 32 <= length <= end - start:
                return start, end
            end -= length
        elif tail[-9:] == b"LYRICS200" and tail[-15:-9].isdigit() and int(tail[-15:-9]) + 15 <= end - start:
            end -= int(tail[-15:-9]) + 15
        else:
            return start, end

"""MPEG audio (MP3 and layers I and II): a run of frames, most of the time with no word on how many.

libsndfile takes the number of samples from a Xing or Info frame; where there is none, it estimates it from the file's size and
the first frame, and stops there. So the frames are counted by their headers. A right tag is passed on, and the
encoder's delay and padding are cut by it; a wrong one is replaced; and where there is none, an empty ID3 tag behind the
frames, as long as it takes, makes the estimate too large, so that the frames are read to their end.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from io import BufferedIOBase
from typing import NamedTuple

from zoo.errors import InputError
from zoo.media.containers.spliced import Piece, Track, id3v2_length, read_at, spliced

_BIT_RATES = {
    (1, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_BIT_RATES[2, 3] = _BIT_RATES[2, 2]
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
# How far into a file the first frame is looked for, and into its neighbour for a frame of free format.
_LONGEST_LEAD = 1 << 17
_LONGEST_FREE_FRAME = 1 << 13
# Encoders whose tag is known to count the frames behind it and not itself.
_EXACT_ENCODERS = (b"LAME", b"Lavf", b"Lavc", b"GOGO", b"L3.9")


class _Header(NamedTuple):
    """What a frame's header says."""

    kind: tuple[int, int, int, bool]  # version, layer, rate, mono: the same throughout a stream
    samples: int
    length: int  # bytes; of free format only the padding
    free: bool
    side: int  # bytes of side information of layer III, behind which a tag lies

    @property
    def layer(self) -> int:
        return self.kind[1]


@lru_cache(maxsize=4096)
def _parse(word: bytes) -> _Header | None:
    if len(word) < 4 or word[0] != 0xFF or word[1] < 0xE0:
        return None
    version, layer = word[1] >> 3 & 3, 4 - (word[1] >> 1 & 3)
    bit_rate, rate_index, padding = word[2] >> 4, word[2] >> 2 & 3, word[2] >> 1 & 1
    if version == 1 or layer == 4 or bit_rate == 15 or rate_index == 3 or word[3] & 3 == 2:
        return None
    first = version == 3
    rate, mono = _RATES[version][rate_index], word[3] >> 6 == 3
    samples = 384 if layer == 1 else 1152 if layer == 2 or first else 576
    slot = 4 if layer == 1 else 1
    bits = 1000 * _BIT_RATES[1 if first else 2, layer][bit_rate]
    length = (samples // 8 // slot * bits // rate + padding) * slot
    side = (17 if mono else 32) if first else (9 if mono else 17)
    return _Header((version, layer, rate, mono), samples, length, bit_rate == 0, side)


@dataclass
class _Run:
    """Frames of one recording: the tag in front, if there is one, and the ranges of bytes that hold the others."""

    header: bytes
    tag: bytes = b""
    count: int = 0
    longest: int = 0  # of the first few frames
    afresh: bool = True  # whether the first frame needs no bytes of one before it
    ranges: list[tuple[int, int]] = field(default_factory=list)

    def add(self, start: int, length: int) -> None:
        if self.ranges and sum(self.ranges[-1]) == start:
            self.ranges[-1] = (self.ranges[-1][0], self.ranges[-1][1] + length)
        else:
            self.ranges.append((start, length))
        self.count += 1
        if self.count <= 16:
            self.longest = max(self.longest, length)


class _Reader:
    """Bytes of the file through one block that moves along."""

    def __init__(self, handle: BufferedIOBase, end: int) -> None:
        self._handle, self._end = handle, end
        self._start, self._block = 0, b""

    def at(self, position: int, count: int) -> bytes:
        offset = position - self._start
        if offset < 0 or offset + count > len(self._block):
            self._block = read_at(self._handle, position, min(max(count, 1 << 17), self._end - position))
            self._start, offset = position, 0
        return self._block[offset : offset + count]


class _Scanner:
    def __init__(self, handle: BufferedIOBase, start: int, end: int, name: str) -> None:
        self.bytes, self.start, self.end, self.name = _Reader(handle, end), start, end, name
        self._free_lengths: dict[tuple[int, int, int, bool], int] = {}

    def frame(self, position: int) -> tuple[_Header, int] | None:
        """The header at a position and the bytes of its frame."""
        header = _parse(self.bytes.at(position, 4))
        if header is None:
            return None
        if not header.free:
            return header, header.length
        base = self._free_lengths.get(header.kind)
        if base is None:
            base = self._free_length(position, header)
            if base is None:
                return None
            self._free_lengths[header.kind] = base
        return header, base + header.length

    def _free_length(self, position: int, header: _Header) -> int | None:
        """Bytes of an unpadded frame of free format, which only the distance to the next two headers tells."""
        block = self.bytes.at(position, 2 * _LONGEST_FREE_FRAME)
        found = block.find(b"\xff", 4 + header.side)
        while 0 <= found <= _LONGEST_FREE_FRAME:
            following = _parse(block[found : found + 4])
            if following is not None and following.free and following.kind == header.kind:
                base = found - header.length
                third = _parse(block[found + base + following.length :][:4])
                if third is not None and third.free and third.kind == header.kind:
                    return base
            found = block.find(b"\xff", found + 1)
        return None

    def confirmed(self, position: int, times: int = 2) -> tuple[_Header, int] | None:
        """The frame at a position, if as many of its kind follow, or the end of the file does."""
        first = found = self.frame(position)
        for _ in range(times):
            if found is None or first is None or found[0].kind != first[0].kind:
                return None
            position += found[1]
            if position == self.end:
                return first
            found = self.frame(position)
        return first if found is not None and first is not None and found[0].kind == first[0].kind else None

    def search(self, position: int, limit: int) -> int | None:
        """The next position from which frames follow each other."""
        while position < limit:
            block = self.bytes.at(position, min(1 << 16, limit - position))
            offset = block.find(b"\xff")
            if offset < 0:
                position += max(1, len(block))
            elif self.confirmed(position + offset):
                return position + offset
            else:
                position += offset + 1
        return None

    def runs(self) -> Iterator[_Run]:
        """The recordings of the file, one behind the other."""
        position: int | None = self.start
        run: _Run | None = None
        kind = None
        while position is not None and position < self.end:
            found = self.frame(position)
            if found is not None and found[0].kind != kind:
                found = self.confirmed(position)
            if found is None:
                position = self._behind(position, kind)
                continue
            header, length = found
            if position + length > self.end:
                raise InputError(
                    f"{self.name} is truncated: the MPEG frame at byte {position} has {length} bytes, and"
                    f" {self.end - position} are there"
                )
            tag = self.bytes.at(position, length) if self.is_tag(position, header) else b""
            if run is None or tag or header.kind != kind:
                if run is not None:
                    yield run
                run, kind = _Run(self.bytes.at(position, 4), tag), header.kind
                claim = _tag_frames(tag, header)
            if not tag:
                if claim is not None and run.count == claim and header.layer == 3 and self._starts_afresh(position, header):
                    yield run
                    run, claim = _Run(self.bytes.at(position, 4)), None
                if not run.count:
                    run.afresh = header.layer != 3 or self._starts_afresh(position, header)
                run.add(position, length)
            position += length
        if run is not None:
            yield run

    def _behind(self, position: int, kind: object) -> int | None:
        """Where the frames go on behind something that is none; ``None`` at the end."""
        head = self.bytes.at(position, 10)
        if length := id3v2_length(head):
            return position + length
        if kind is not None and len(head) < 4 and head[:1] == b"\xff":
            raise InputError(f"{self.name} is truncated: it breaks off inside the header of an MPEG frame at byte {position}")
        return self.search(position + 1, self.end)

    def is_tag(self, position: int, header: _Header) -> bool:
        if header.layer != 3:
            return False
        head = self.bytes.at(position, 44)
        return head[4 + header.side :][:4] in (b"Xing", b"Info") or head[36:40] == b"VBRI"

    def _starts_afresh(self, position: int, header: _Header) -> bool:
        """Whether a frame of layer III needs no bytes of those before it."""
        head = self.bytes.at(position, 8)
        side = head[4 if head[1] & 1 else 6 :]
        return len(side) > 1 and (side[0] << 1 | side[1] >> 7 if header.kind[0] == 3 else side[0]) == 0


def _tag_offset(tag: bytes, header: _Header) -> int:
    return 36 if tag[36:40] == b"VBRI" else 4 + header.side


def _tag_frames(tag: bytes, header: _Header) -> int | None:
    """How many frames a tag names, if it does."""
    if not tag:
        return None
    body = tag[_tag_offset(tag, header) :]
    if body[:4] == b"VBRI":
        count = int.from_bytes(body[14:18], "big")
    elif len(body) >= 12 and body[7] & 1:
        count = int.from_bytes(body[8:12], "big")
    else:
        return None
    return count if 0 < count < 0x7FFF0000 else None


def _gapless(tag: bytes, header: _Header) -> tuple[bytes, bytes]:
    """The encoder's name in a tag and the three bytes of its delay and padding; empty where there are none."""
    offset = _tag_offset(tag, header)
    if not tag or tag[offset : offset + 4] == b"VBRI":
        return b"", b""
    flags = tag[offset + 7]
    offset += 8 + 4 * (flags & 1) + 4 * (flags >> 1 & 1) + 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)
    extension = tag[offset : offset + 24]
    return (extension[:9], extension[21:24]) if len(extension) == 24 and extension[:4].isalnum() else (b"", b"")


def _xing_frame(word: bytes, header: _Header, count: int, gapless: bytes) -> bytes:
    """A frame that holds nothing but the number of those behind it, and the encoder's delay and padding."""
    for bit_rate in range(1, 15):
        plain = bytes((0xFF, word[1] | 1, bit_rate << 4 | word[2] & 0x0C, word[3]))
        length = _parse(plain).length  # type: ignore[union-attr]
        if length >= 4 + header.side + 12 + 36:
            break
    frame = plain + bytes(header.side) + struct.pack(">4sII", b"Xing", 1, count)
    frame += b"LAME3.100" + bytes(12) + gapless + bytes(12)
    return frame + bytes(length - len(frame))


def _empty_tags(size: int) -> list[Piece]:
    """ID3v2 tags of at least ``size`` bytes in all; a decoder reads each into memory, so none is large."""
    body = 1 << 20
    tag = b"ID3\x04\x00\x00" + bytes(body >> shift & 0x7F for shift in (21, 14, 7, 0))
    return [tag, body] * -(-size // body)


def find_mpeg(handle: BufferedIOBase, start: int, end: int) -> int | None:
    """Find the first MPEG frame, which may be behind a piece of another one."""
    scanner = _Scanner(handle, start, end, "")
    first = scanner.frame(start)
    if first is not None and scanner.confirmed(start, 1):
        return start
    found = scanner.search(start, min(end, start + _LONGEST_LEAD))
    # What is left is a single frame, or one that is cut off: its tag tells it from something else.
    return start if found is None and first is not None and scanner.is_tag(start, first[0]) else found


def mpeg_tracks(handle: BufferedIOBase, start: int, end: int, name: str) -> list[Track]:
    """The recordings of MPEG audio files one behind the other.

    Raises:
        InputError: the file breaks off inside a frame, or has fewer frames than its tag names.
    """
    tracks = []
    for run in _Scanner(handle, start, end, name).runs():
        track = _track(handle, run, name)
        if track is not None:
            tracks.append(track)
    return tracks


def _track(handle: BufferedIOBase, run: _Run, name: str) -> Track | None:
    header = _parse(run.header)
    assert header is not None
    claim = _tag_frames(run.tag, header)
    encoder, gapless = _gapless(run.tag, header)
    # Some encoders count the tag's own frame.
    spare = 0 if encoder.startswith(_EXACT_ENCODERS) else 1
    if claim is not None and claim - spare > run.count:
        raise InputError(f"{name} is truncated: {run.count} of {claim} MPEG frames are there")
    if not run.count:
        return None
    pieces: list[Piece] = list(run.ranges)
    if claim == run.count and run.tag[_tag_offset(run.tag, header) :][:4] != b"VBRI":
        return Track(spliced(handle, [run.tag, *pieces]))
    if gapless:
        return Track(spliced(handle, [_xing_frame(run.header, header, run.count, gapless), *pieces]))
    # Decoders leave out first frames that continue ones which are not there.
    samples = run.count * header.samples if run.afresh else None
    excess = max(0, (run.count + 16) * run.longest - sum(length for _, length in run.ranges))
    return Track(spliced(handle, [*pieces, *_empty_tags(excess)]), samples=samples, measured=False)

"""Ogg: pages of several streams, at the same time or one behind the other (a chain of links)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from io import BufferedIOBase

from zoo.errors import InputError
from zoo.media.containers.flac import flac_tracks
from zoo.media.containers.spliced import Piece, Track, find_all, read_at, spliced

_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
# Where Vorbis and Opus put the channels of WAV's order (front left and right, centre, LFE, back, side), by their number.
_VORBIS_ORDER = {
    3: (0, 2, 1),
    5: (0, 2, 1, 3, 4),
    6: (0, 2, 1, 5, 3, 4),
    7: (0, 2, 1, 6, 5, 3, 4),
    8: (0, 2, 1, 7, 5, 6, 3, 4),
}


def vorbis_order(channels: int) -> tuple[int, ...] | None:
    """For each channel in WAV order, its place in Vorbis and Opus; ``None`` where the orders are the same."""
    return _VORBIS_ORDER.get(channels)


def _checksum(page: bytes) -> int:
    """The CRC of a page, which is zlib's on mirrored bits and without its first and last inversion."""
    mirrored = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)


@dataclass
class _Stream:
    """Pages of one logical stream: ranges of whole pages, and of what they carry."""

    first_packet: bytes
    pages: list[tuple[int, int]] = field(default_factory=list)
    payloads: list[tuple[int, int]] = field(default_factory=list)


def _links(handle: BufferedIOBase, start: int, end: int, name: str) -> list[dict[int, _Stream]]:
    """The streams of every link by their serial number.

    Raises:
        InputError: a page is damaged or cut short.
    """
    links: list[dict[int, _Stream]] = []
    position = start
    opening = False
    while position < end:
        head = read_at(handle, position, 27 + 255)
        if head[:4] != b"OggS":
            following = next(find_all(handle, b"OggS", position, end), None)
            if following is None:
                if b"OggS".startswith(head[: end - position][:4]):
                    raise InputError(f"{name} is truncated: it breaks off inside the Ogg page at byte {position}")
                break
            raise InputError(f"{name} is damaged at byte {position}: no Ogg page begins there; the next one is at {following}")
        segments = head[26] if len(head) > 26 else 0
        length = 27 + segments + sum(head[27 : 27 + segments])
        page = read_at(handle, position, length)
        if len(page) < length or len(page) < 27 or position + length > end:
            raise InputError(f"{name} is truncated: it breaks off inside the Ogg page at byte {position}")
        if _checksum(page[:22] + bytes(4) + page[26:]) != int.from_bytes(page[22:26], "little"):
            raise InputError(f"{name} is damaged: the checksum of the Ogg page at byte {position} is wrong")
        serial = int.from_bytes(page[14:18], "little")
        if page[5] & 2:
            if not opening:
                links.append({})
            opening = True
            links[-1][serial] = _Stream(page[27 + segments :])
        else:
            opening = False
        stream = links[-1].get(serial) if links else None
        if stream is not None:
            stream.pages.append((position, length))
            stream.payloads.append((position + 27 + segments, length - 27 - segments))
        position += length
    return links


def ogg_tracks(handle: BufferedIOBase, start: int, end: int, name: str) -> list[Track] | None:
    """The recording of each link; ``None`` where one holds nothing that libsndfile decodes.

    Raises:
        InputError: a page is damaged or cut short.
    """
    tracks: list[Track] = []
    for link in _links(handle, start, end, name):
        for stream in link.values():
            found = _tracks(handle, stream, name)
            if found:
                tracks += found
                break
        else:
            return None
    return tracks


def _tracks(handle: BufferedIOBase, stream: _Stream, name: str) -> list[Track] | None:
    packet = stream.first_packet
    # The length that libsndfile tells is that of the last page, wherever the stream began.
    pages: list[Piece] = list(stream.pages)
    if packet[:7] == b"\x01vorbis" and len(packet) > 11:
        return [Track(spliced(handle, pages), measured=False, order=vorbis_order(packet[11]))]
    if packet[:8] == b"OpusHead" and len(packet) > 18:
        order = vorbis_order(packet[9]) if packet[18] == 1 else None
        return [Track(spliced(handle, pages), measured=False, order=order)]
    if packet[:5] == b"\x7fFLAC" and packet[9:13] == b"fLaC":
        # libsndfile is often built without FLAC in Ogg; what the pages carry, less nine bytes, is a FLAC file.
        first, *rest = stream.payloads
        native = spliced(handle, [(first[0] + 9, first[1] - 9), *rest])
        return flac_tracks(native, 0, sum(length for _, length in stream.payloads) - 9, name)
    return None

"""Uncompressed containers: RIFF (WAV, RF64, RIFX), W64, AIFF, AU and CAF, whose headers claim how long the samples are.

Programs that write into a pipe cannot go back to fill the lengths in: they leave 0, all ones or a huge number there. Each
reader finds the samples, decides how many bytes of them there are and gives the decoder a header that says so.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from io import BufferedIOBase
from typing import NamedTuple

from zoo.errors import InputError
from zoo.media.containers.spliced import Piece, Track, find_all, read_at, spliced

# What writers leave for a length they do not know, give or take the headers they count in: sox's AIFF, the largest signed
# and unsigned numbers and arecord's 2^31.
_PLACEHOLDERS_32 = ((0x7EFF0000, 0x7F010000), (0x7FFE0000, 0x80010000), (0xFFFE0000, 1 << 32))
_LARGEST_REAL = 1 << 60
_TRAILING_CHUNKS = (
    *(b"LIST", b"list", b"id3 ", b"ID3 ", b"bext", b"iXML", b"axml", b"_PMX", b"cue ", b"smpl", b"inst", b"plst"),
    *(b"PEAK", b"fact", b"cart", b"afsp", b"JUNK", b"junk", b"PAD ", b"FLLR", b"acid", b"chna"),
)
_PCM, _FLOAT, _ALAW, _MULAW, _GSM, _MPEG, _MP3, _EXTENSIBLE = 1, 3, 6, 7, 0x31, 0x50, 0x55, 0xFFFE
# Two frames of GSM 06.10, packed without a gap as Microsoft does, and their samples.
_GSM_BLOCK, _GSM_SAMPLES = 65, 320


class _Format(NamedTuple):
    """A ``fmt`` chunk, and what of it is needed here."""

    content: bytes
    tag: int
    align: int

    @property
    def plain(self) -> bool:
        """Whether every sample takes the same number of bytes."""
        return self.tag in (_PCM, _FLOAT, _ALAW, _MULAW)


class MpegInside(Exception):
    """A WAV file whose data are MPEG audio: the range of bytes they take."""

    def __init__(self, start: int, length: int) -> None:
        super().__init__(start, length)
        self.start, self.length = start, length


def is_placeholder(length: int, bits: int = 32) -> bool:
    """Whether a length is one of those that writers leave for an unknown one."""
    if length <= 0 or length >= _LARGEST_REAL:
        return True
    return bits == 32 and any(low <= length < high for low, high in _PLACEHOLDERS_32)


def bytes_of_samples(claim: int, available: int, align: int, name: str, bits: int = 32) -> int:
    """Number of bytes of samples, from what the header claims and from what lies behind it.

    Args:
        claim: the length in the header.
        available: bytes from the start of the samples to the end of the file.
        align: bytes of one sample of all channels, or of one block.

    Raises:
        InputError: there is less than a definite length claims, or samples of unknown length break off inside one.
    """
    if not is_placeholder(claim, bits):
        if claim <= available and not (bits == 32 and claim < available and (available - claim) % (1 << 32) == 0):
            return claim
        # Recorders that pass 4 GiB without noticing leave the length modulo 2^32.
        if claim <= available or available >= claim // align * align:
            return available
        raise InputError(f"{name} is truncated: {available} of {claim} bytes of samples are there")
    rest = available % align
    if rest:
        raise InputError(
            f"{name} is truncated: it breaks off inside a sample; the {available} bytes behind the header are"
            f" {available // align} samples of {align} bytes and {rest} more"
        )
    return available


def riff_tracks(handle: BufferedIOBase, start: int, end: int, name: str) -> list[Track] | None:
    """The recordings of WAV files one behind the other; ``None`` where there is no samples' chunk.

    Raises:
        InputError: the samples are cut short.
        MpegInside: the data are MPEG audio.
    """
    tracks: list[Track] = []
    while start is not None:
        found = _riff_track(handle, start, end, name)
        if found is None:
            return tracks or None
        track, following = found
        tracks.append(track)
        if following is None:
            break
        start = following
    return tracks


def _riff_track(handle: BufferedIOBase, start: int, end: int, name: str) -> tuple[Track, int | None] | None:
    """One WAV file, and where another one begins behind it."""
    form = read_at(handle, start, 4)
    order = ">" if form == b"RIFX" else "<"
    long_size: int | None = None
    format: _Format | None = None
    fact = b""
    position = start + 12
    while len(chunk := read_at(handle, position, 8)) == 8 and position + 8 <= end:
        kind, length = struct.unpack(f"{order}4sI", chunk)
        body = position + 8
        if kind == b"ds64":
            content = read_at(handle, body, 24)
            long_size = int.from_bytes(content[8:16], "little") if len(content) == 24 else None
        elif kind == b"fmt ":
            format = _wave_format(read_at(handle, body, min(length, 1 << 16)), order)
        elif kind == b"fact":
            fact = read_at(handle, body, min(length, 64))
        elif kind == b"data":
            if format is None:
                return None
            bits = 32
            if long_size is not None and length == 0xFFFFFFFF:
                length, bits = long_size, 64
                if is_placeholder(length & 0xFFFFFFFF) and length <= 0xFFFFFFFF:
                    length = 0
            return _riff_data(handle, order, format, fact, body, length, bits, end, name)
        position = body + length + length % 2
    return None


def _wave_format(content: bytes, order: str) -> _Format | None:
    if len(content) < 16:
        return None
    tag, channels, _, _, align, depth = struct.unpack(f"{order}HHIIHH", content[:16])
    if tag == _EXTENSIBLE and len(content) >= 26:
        tag = struct.unpack(f"{order}H", content[24:26])[0]
    return _Format(content, tag, align or max(1, channels * -(-depth // 8)))


def _riff_data(
    handle: BufferedIOBase, order: str, format: _Format, fact: bytes, body: int, claim: int, bits: int, end: int, name: str
) -> tuple[Track, int | None]:
    following = None
    if is_placeholder(claim, bits):
        if claim == 0 and _are_chunks(handle, body, end, order):
            length = 0
        else:
            next_file = next(_wave_headers(handle, body, end), None)
            stop = _before_trailing_chunks(handle, body, end if next_file is None else next_file, order)
            if (stop - body) % format.align == 1 and (stop - body) % 2 == 0 and read_at(handle, stop - 1, 1) == b"\0":
                stop -= 1  # the byte that makes the chunk even
            length = bytes_of_samples(claim, stop - body, format.align, name, bits)
            following = next_file
    else:
        length = bytes_of_samples(claim, end - body, format.align, name, bits)
        following = _next_form(handle, body + length + length % 2, end, order)
    if format.tag in (_MPEG, _MP3):
        raise MpegInside(body, length)
    samples = length // format.align if format.plain else None
    if format.tag == _GSM:
        # Whole blocks, as ffmpeg and SoX count: what the fact chunk says differs from writer to writer. Of an odd number of
        # blocks libsndfile takes the byte that makes the chunk even for one more.
        samples = length // _GSM_BLOCK * _GSM_SAMPLES
        length = length // _GSM_BLOCK * _GSM_BLOCK
    header = _riff_header(order, format, fact, length)
    return Track(spliced(handle, [header, (body, length)]), samples=samples), following


def _riff_header(order: str, format: _Format, fact: bytes, length: int) -> bytes:
    """A WAV header for ``length`` bytes of samples; RF64 where 32 bits are too few."""
    chunks = _chunk(b"fmt ", format.content, order)
    if fact:
        chunks += _chunk(b"fact", fact, order)
    total = 4 + len(chunks) + 8 + length
    if total <= 0xFFFFFFFF:
        form = b"RIFX" if order == ">" else b"RIFF"
        return struct.pack(f"{order}4sI4s", form, total, b"WAVE") + chunks + struct.pack(f"{order}4sI", b"data", length)
    sizes = struct.pack("<QQQI", total + 36, length, length // format.align, 0)
    opening = struct.pack("<4sI4s", b"RF64", 0xFFFFFFFF, b"WAVE") + _chunk(b"ds64", sizes, "<")
    return opening + chunks + struct.pack("<4sI", b"data", 0xFFFFFFFF)


def _chunk(kind: bytes, content: bytes, order: str) -> bytes:
    return struct.pack(f"{order}4sI", kind, len(content)) + content + b"\0" * (len(content) % 2)


def _next_form(handle: BufferedIOBase, position: int, end: int, order: str) -> int | None:
    """Where the next WAV file begins behind the chunks from ``position`` on."""
    while len(chunk := read_at(handle, position, 12)) == 12:
        kind, length = struct.unpack(f"{order}4sI", chunk[:8])
        if is_wave(chunk):
            return position
        if not _is_name(kind) or position + 8 + length > end:
            return None
        position += 8 + length + length % 2
    return None


def is_wave(head: bytes) -> bool:
    """Whether a file that begins with these twelve bytes is WAV."""
    return head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE"


def _wave_headers(handle: BufferedIOBase, start: int, end: int) -> Iterator[int]:
    for position in find_all(handle, b"WAVE", start, end):
        head = read_at(handle, position - 8, 16)
        if position - 8 >= start and is_wave(head) and head[12:] in (b"fmt ", b"ds64", b"JUNK", b"bext", b"LIST"):
            yield position - 8


def _is_name(kind: bytes) -> bool:
    return all(0x20 <= byte < 0x7F for byte in kind)


def _are_chunks(handle: BufferedIOBase, position: int, end: int, order: str) -> bool:
    """Whether everything up to the end is chunks with definite lengths."""
    while position < end:
        chunk = read_at(handle, position, 8)
        if len(chunk) < 8:
            return False
        kind, length = struct.unpack(f"{order}4sI", chunk)
        if not _is_name(kind) or position + 8 + length > end:
            return False
        position += 8 + length + length % 2
    return True


def _before_trailing_chunks(handle: BufferedIOBase, start: int, end: int, order: str) -> int:
    """Where samples of unknown length end: before known chunks that reach exactly to the end of the file."""
    first = max(start, end - (1 << 17))
    tail = read_at(handle, first, end - first)
    starts = sorted({start for kind in _TRAILING_CHUNKS for start in _occurrences(tail, kind)})
    for offset in starts:
        if (first + offset - start) % 2 == 0 and _are_chunks(handle, first + offset, end, order):
            return first + offset
    return end


def _occurrences(content: bytes, mark: bytes) -> Iterator[int]:
    found = content.find(mark)
    while found >= 0:
        yield found
        found = content.find(mark, found + 1)


_W64_TAIL = bytes.fromhex("f3acd3118cd100c04f8edb8a")
W64_RIFF = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000")


def w64_tracks(handle: BufferedIOBase, start: int, end: int, name: str) -> list[Track] | None:
    """A Wave64 file, given to the decoder as WAV."""
    format: _Format | None = None
    fact = b""
    position = start + 40
    while len(chunk := read_at(handle, position, 24)) == 24:
        kind, length = chunk[:4], int.from_bytes(chunk[16:], "little")
        if chunk[4:16] != _W64_TAIL and kind in (b"fmt ", b"data", b"fact"):
            return None
        body = position + 24
        if kind == b"fmt ":
            format = _wave_format(read_at(handle, body, min(length - 24, 1 << 16)), "<")
        elif kind == b"fact":
            fact = read_at(handle, body, 4)
        elif kind == b"data":
            if format is None:
                return None
            claim = length - 24
            bits = 32 if length <= 0xFFFFFFFF else 64
            track, _ = _riff_data(handle, "<", format, fact, body, max(0, claim), bits, end, name)
            return [track]
        if length < 24:
            return None
        position += -(-length // 8) * 8
    return None


# Bytes of one sample in AIFF-C, by compression type; None takes the sample size of the header.
_AIFC_BYTES = {b"NONE": None, b"twos": None, b"sowt": None, b"raw ": None, b"in24": 3, b"in32": 4, b"42ni": 3, b"23ni": 4}
_AIFC_BYTES |= {b"fl32": 4, b"FL32": 4, b"fl64": 8, b"FL64": 8, b"ulaw": 1, b"ULAW": 1, b"alaw": 1, b"ALAW": 1}


def aiff_tracks(handle: BufferedIOBase, start: int, end: int, name: str) -> list[Track] | None:
    """An AIFF or AIFF-C file; ``None`` where there are no samples or they are of a compressed kind."""
    form = read_at(handle, start + 8, 4)
    common = version = b""
    sound: tuple[int, int] | None = None
    position = start + 12
    while len(chunk := read_at(handle, position, 8)) == 8 and position + 8 <= end:
        kind, length = struct.unpack(">4sI", chunk)
        body = position + 8
        if kind == b"COMM":
            common = read_at(handle, body, min(length, 1 << 12))
        elif kind == b"FVER":
            version = read_at(handle, body, min(length, 64))
        elif kind == b"SSND":
            offset = int.from_bytes(read_at(handle, body, 4), "big")
            sound = (body + 8 + offset, length - 8 - offset)
            if is_placeholder(length) or length <= 8:
                break
        position = body + length + length % 2
    if len(common) < 18 or sound is None or sound[0] > end:
        return None
    channels, frames, depth = struct.unpack(">HIH", common[:8])
    codec = common[18:22] if form == b"AIFC" else b"NONE"
    if codec not in _AIFC_BYTES or not channels:
        return None
    align = channels * (_AIFC_BYTES[codec] or -(-depth // 8))
    body, claim = sound
    if align == 0:
        return None
    if is_placeholder(claim) and not is_placeholder(frames) and frames * align <= end - body:
        claim = frames * align
    length = bytes_of_samples(max(0, claim), end - body, align, name)
    samples = length // align
    chunks = _chunk(b"FVER", version, ">") if version else b""
    chunks += _chunk(b"COMM", common[:2] + struct.pack(">I", samples & 0xFFFFFFFF) + common[6:], ">")
    total = min(0xFFFFFFFF, 4 + len(chunks) + 16 + length)
    opening = struct.pack(">4sI4s", b"FORM", total, form)
    header = opening + chunks + struct.pack(">4sIII", b"SSND", min(0xFFFFFFFF, length + 8), 0, 0)
    return [Track(spliced(handle, [header, (body, length)]), samples=samples)]


_AU_BYTES = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}


def au_tracks(handle: BufferedIOBase, start: int, end: int, name: str) -> list[Track] | None:
    """A Sun/NeXT file; ``None`` where its encoding is a compressed one."""
    head = read_at(handle, start, 24)
    order = ">" if head[:4] == b".snd" else "<"
    if len(head) < 24:
        return None
    offset, claim, encoding, rate, channels = struct.unpack(f"{order}5I", head[4:])
    if encoding not in _AU_BYTES or not channels or start + offset > end or offset < 24:
        return None
    align = channels * _AU_BYTES[encoding]
    body = start + offset
    length = bytes_of_samples(claim, end - body, align, name)
    size = length if length < 0xFFFFFFFF else 0xFFFFFFFF
    header = head[:4] + struct.pack(f"{order}5I", 24, size, encoding, rate, channels)
    return [Track(spliced(handle, [header, (body, length)]), samples=length // align)]


def caf_tracks(handle: BufferedIOBase, start: int, end: int, name: str) -> list[Track] | None:
    """A Core Audio file; compressed ones are passed on as they are."""
    position = start + 8
    align, plain = 1, False
    while len(chunk := read_at(handle, position, 12)) == 12:
        kind, claim = struct.unpack(">4sq", chunk)
        if kind == b"desc":
            description = read_at(handle, position + 12, 32)
            if len(description) < 32:
                return None
            codec, packet = description[8:12], int.from_bytes(description[16:20], "big")
            align, plain = max(1, packet), codec in (b"lpcm", b"alaw", b"ulaw") and packet > 0
        elif kind == b"data":
            # The chunk begins with a count of edits.
            body = position + 16
            if body > end:
                return None
            unknown = claim <= 4 or is_placeholder(claim, 64)
            length = bytes_of_samples(0 if unknown else claim - 4, end - body, align, name, 64)
            header: list[Piece] = [(start, position - start), struct.pack(">4sq", kind, length + 4), (position + 12, 4)]
            pieces = [*header, (body, length)]
            if not plain:
                # The table of packets may lie behind the data.
                pieces.append((body + length, end - body - length))
            return [Track(spliced(handle, pieces), samples=length // align if plain else None)]
        if claim < 0:
            return None
        position += 12 + claim
    return None

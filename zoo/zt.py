"""The ``.zt`` format: sequences of ids, bit-packed, with what decoding needs besides them. ``cards/zt.md`` specifies it.

Pure functions between bytes and a `Header` with one run of ids. Nothing here knows a tokenizer, and nothing imports torch.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.errors import FormatError, InputError
from zoo.kernels.bitfields import pack, packed_bytes, unpack
from zoo.spec import Frame

Ids = NDArray[np.int64]
Buffer = bytes | bytearray | memoryview

MAGIC = b"\x89zt"
# Version 2 has ids in fewer bits than the vocabulary takes; nothing else differs. Version 3 has several codebooks in a frame,
# or items that describe what they keep.
_VERSION, _NARROW_VERSION, _FRAME_VERSION = 1, 2, 3
#: Number of a layout whose fields the file names itself, in version 3.
_DESCRIBED = 7
# Flags of version 3: codebooks of one size, places in the order of the codebooks, places side by side in the id space.
_ONE_SIZE, _IN_ORDER, _SIDE_BY_SIDE = 1, 2, 4
#: Most codebooks, places of a frame, and described fields.
_MOST = 1 << 12
#: Counts are below this.
LARGEST_COUNT = 1 << 48
#: Vocabularies are at most this large, so that an id takes at most 32 bits.
LARGEST_VOCABULARY = 1 << 32
#: Bytes that a tokenizer's name may take in UTF-8.
LONGEST_NAME = 255

#: What an item keeps besides its ids, in the order in which it is written. The position of a layout is its number in a file.
META_LAYOUTS: tuple[tuple[tuple[str, str], ...], ...] = (
    (),
    (("samples", "count"), ("sample_rate", "rate")),
    (("width", "count"), ("height", "count"), ("fit", "fit")),
    (("x", "float"), ("y", "float"), ("z", "float"), ("scale", "float")),
    (("width", "count"), ("height", "count"), ("fit", "fit"), ("rows", "count")),
    (("text", "count"),),
    (
        *(("frames", "count"), ("fps_num", "count"), ("fps_den", "count")),
        *(("width", "count"), ("height", "count"), ("fit", "fit"), ("rows", "count")),
    ),
)
#: Values of a "fit"; a file holds the position. Append, never reorder.
FITS = ("crop", "stretch", "pad", "none")

_COUNT_BYTES = 7
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Header:
    """Everything in a file but its ids.

    Attributes:
        tokenizer: name, at most 255 bytes of UTF-8.
        fingerprint: 16 lower-case hexadecimal digits; empty when unknown.
        vocab_size: ids lie in ``[0, vocab_size)``; from 1 to 2^32.
        lengths: int64 ``[items]``, the number of ids of each item.
        meta: a mapping per item with the keys of one of `META_LAYOUTS`; nothing at all where items keep nothing.
        segments: ends of the segments, strictly increasing.
        frame: codebooks of each step; ``None`` for a single one of ``vocab_size``.
    """

    tokenizer: str
    fingerprint: str
    vocab_size: int
    lengths: Ids
    meta: Sequence[Mapping[str, Any]] = ()
    segments: tuple[int, ...] = ()
    frame: Frame | None = None


def dumps(header: Header, ids: Ids) -> bytes:
    """The content of a file.

    Args:
        header: what goes before the ids.
        ids: int64 ``[sum of the lengths]``, the ids of all items in one run.

    Raises:
        FormatError: something has no place in a file, or header and ids contradict each other.
    """
    if len(ids) != int(header.lengths.sum()):
        raise FormatError(f"{len(ids)} ids do not make items of {int(header.lengths.sum())} ids in all")
    if not 1 <= header.vocab_size <= LARGEST_VOCABULARY:
        raise FormatError(f"a vocabulary of {header.vocab_size} ids cannot be written: it has 1 to 2^32 of them")
    # Read without a sign, an id below zero is a huge one.
    top = int(ids.view(np.uint64).max()) if len(ids) else header.vocab_size - 1
    if top >= header.vocab_size:
        wrong = int(ids.min()) if int(ids.min()) < 0 else top
        raise FormatError(f"id {wrong} is outside the vocabulary of {header.vocab_size}")
    # A file's bytes take 8 bits, although the vocabulary of bytes has an id more for padding.
    bits = bits_of(top + 1)
    layout = _layout(header.meta, len(header.lengths))
    sizes = [end - start for start, end in pairwise([0, *header.segments])]
    if 0 in sizes:
        raise FormatError("one of the segments is empty")
    if header.frame is not None or layout == _DESCRIBED:
        return _frames_bytes(header, ids, layout, sizes)
    version = _NARROW_VERSION if bits < bits_of(header.vocab_size) else _VERSION
    start = b"".join(
        [
            MAGIC,
            bytes([version | layout << 4 | bool(sizes) << 7]),
            _name(header.tokenizer),
            _fingerprint(header.fingerprint),
            _count(header.vocab_size),
            bytes([bits]) if version == _NARROW_VERSION else b"",
            _count(len(header.lengths)),
            _count(len(sizes)) if sizes else b"",
            *map(_count, sizes),
            _leb128(header.lengths),
            _meta_bytes(header.meta, META_LAYOUTS[layout]),
        ]
    )
    return _content(start, ids.reshape(-1, 1), [bits])


def _content(start: bytes, codes: Ids, bits: Sequence[int]) -> bytes:
    """A whole file: ``start``, the codes ``[frames, places]`` and the checksum, written in place since files may be large."""
    stream = io.BytesIO(bytes(len(start) + packed_bytes(len(codes), bits) + 4))
    content = np.frombuffer(stream.getbuffer(), np.uint8)
    content[: len(start)] = np.frombuffer(start, np.uint8)
    pack(codes, bits, content[len(start) : -4])
    content[-4:] = np.frombuffer(struct.pack("<I", zlib.crc32(content[:-4].data)), np.uint8)
    # The stream gives its bytes away without a copy once nothing else looks at them.
    del content
    return stream.getvalue()


def _frames_bytes(header: Header, ids: Ids, layout: int, sizes: Sequence[int]) -> bytes:
    """The content of a file of version 3."""
    frame = header.frame or Frame((header.vocab_size,))
    if frame.vocab_size != header.vocab_size:
        raise FormatError(f"a frame of {frame.vocab_size} ids does not suit a vocabulary of {header.vocab_size}")
    frames = np.asarray(header.lengths) // frame.ids_per_frame
    if (frames * frame.ids_per_frame != header.lengths).any():
        raise FormatError(f"an item is no whole number of frames of {frame.ids_per_frame} ids")
    codes = ids.reshape(-1, frame.ids_per_frame) - np.array(frame.offsets)
    if ((codes < 0) | (codes >= np.array(frame.placed_sizes))).any():
        raise FormatError("an id belongs to another codebook than the one of its place")
    start = b"".join(
        [
            MAGIC,
            bytes([_FRAME_VERSION | layout << 4 | bool(sizes) << 7]),
            _name(header.tokenizer),
            _fingerprint(header.fingerprint),
            _frame_bytes(frame),
            _count(len(header.lengths)),
            _count(len(sizes)) if sizes else b"",
            *map(_count, sizes),
            _leb128(frames),
            _described_bytes(header.meta) if layout == _DESCRIBED else _meta_bytes(header.meta, META_LAYOUTS[layout]),
        ]
    )
    return _content(start, codes, frame.bits_per_place)


def _frame_bytes(frame: Frame) -> bytes:
    one_size = len(set(frame.sizes)) == 1
    in_order = frame.order == tuple(range(frame.codebooks))
    side_by_side = frame.offsets == Frame(frame.sizes, frame.order).offsets
    if max(frame.codebooks, frame.ids_per_frame) > _MOST:
        raise FormatError(f"a frame of {frame.ids_per_frame} ids of {frame.codebooks} codebooks is too large to be written")
    return b"".join(
        [
            bytes([one_size * _ONE_SIZE | in_order * _IN_ORDER | side_by_side * _SIDE_BY_SIDE]),
            _count(frame.codebooks),
            *map(_count, frame.sizes[:1] if one_size else frame.sizes),
            *([] if in_order else map(_count, (frame.ids_per_frame, *frame.order))),
            *([] if side_by_side else map(_count, frame.offsets)),
        ]
    )


def loads(content: Buffer) -> tuple[Header, Ids]:
    """Header and ids of a file's content.

    Raises:
        FormatError: it is truncated, corrupt, of an unknown version, or claims sizes that it does not hold.
    """
    if bytes(content[:3]) != MAGIC:
        other = "; it looks like safetensors: latents are read by zoo.Latents.load" if content[8:9] == b"{" else ""
        raise FormatError(f"not a .zt file{other}")
    if len(content) < 8:
        raise FormatError("the .zt file is truncated")
    version, layout, segmented = content[3] & 15, content[3] >> 4 & 7, bool(content[3] & 0x80)
    if version not in (_VERSION, _NARROW_VERSION, _FRAME_VERSION):
        raise FormatError(f".zt version {version} is not known to this release (it reads {_VERSION} to {_FRAME_VERSION})")
    body = memoryview(content)[:-4]
    if zlib.crc32(body) != struct.unpack("<I", content[-4:])[0]:
        raise FormatError("the .zt file is truncated or corrupt: its checksum does not match")
    if layout >= len(META_LAYOUTS) and (version, layout) != (_FRAME_VERSION, _DESCRIBED):
        raise FormatError(f"meta layout {layout} is not known to this release")

    reader = _Reader(body, 4)
    try:
        name = reader.take(reader.count(limit=LONGEST_NAME)).tobytes().decode()
    except UnicodeDecodeError as error:
        raise FormatError("the tokenizer's name is not UTF-8") from error
    fingerprint = reader.take(8)
    known = fingerprint.hex() if any(fingerprint) else ""
    if version == _FRAME_VERSION:
        return _read_frames(reader, name, known, layout, segmented)
    vocab_size = reader.count(limit=LARGEST_VOCABULARY)
    if vocab_size < 1:
        raise FormatError("the vocabulary is empty")
    bits = reader.take(1)[0] if version == _NARROW_VERSION else bits_of(vocab_size)
    if not 1 <= bits <= bits_of(vocab_size):
        raise FormatError(f"ids of {bits} bits do not suit a vocabulary of {vocab_size}")
    # Every item takes at least one byte, so a count beyond the file's size is a lie that must not allocate anything.
    items = reader.count(limit=len(body))
    sizes = reader.counts(reader.count(limit=len(body))).tolist() if segmented else []
    if 0 in sizes:
        raise FormatError("one of the segments is empty")
    lengths = reader.counts(items)
    meta = reader.meta(META_LAYOUTS[layout], items)
    packed = reader.rest()
    total = sum(lengths.tolist())
    if packed_bytes(total, [bits]) != len(packed):
        raise FormatError(f"{total} ids of {bits} bits do not make {len(packed)} bytes")
    ids = unpack(np.frombuffer(packed, np.uint8), total, [bits]).reshape(-1)
    if vocab_size < 1 << bits and total and int(ids.max()) >= vocab_size:
        raise FormatError(f"id {int(ids.max())} is outside the vocabulary of {vocab_size}")
    return Header(name, known, vocab_size, lengths, meta, tuple(accumulate(sizes))), ids


def _read_frames(reader: _Reader, name: str, fingerprint: str, layout: int, segmented: bool) -> tuple[Header, Ids]:
    """The rest of a file of version 3."""
    frame = _read_frame(reader)
    items = reader.count(limit=len(reader.content))
    sizes = reader.counts(reader.count(limit=len(reader.content))).tolist() if segmented else []
    if 0 in sizes:
        raise FormatError("one of the segments is empty")
    frames = reader.counts(items)
    meta = reader.described(items) if layout == _DESCRIBED else reader.meta(META_LAYOUTS[layout], items)
    packed = reader.rest()
    total = sum(frames.tolist())
    if packed_bytes(total, frame.bits_per_place) != len(packed):
        raise FormatError(f"{total} frames of {frame.bits} bits do not make {len(packed)} bytes")
    codes = unpack(np.frombuffer(packed, np.uint8), total, frame.bits_per_place)
    if (codes >= np.array(frame.placed_sizes)).any():
        raise FormatError("a code is outside its codebook")
    ids = (codes + np.array(frame.offsets)).reshape(-1)
    # A single codebook without an offset is what a header says without a frame.
    plain = frame == Frame((frame.vocab_size,))
    header = Header(
        name,
        fingerprint,
        frame.vocab_size,
        frames * frame.ids_per_frame,
        meta,
        tuple(accumulate(sizes)),
        None if plain else frame,
    )
    return header, ids


def _read_frame(reader: _Reader) -> Frame:
    flags = reader.take(1)[0]
    if flags >= 8:
        raise FormatError(f"flags {flags} of the frame are not known to this release")
    codebooks = reader.count(limit=_MOST)
    sizes = reader.counts(1 if flags & _ONE_SIZE else codebooks).tolist()
    sizes = sizes * codebooks if flags & _ONE_SIZE else sizes
    order = () if flags & _IN_ORDER else tuple(reader.counts(reader.count(limit=_MOST)).tolist())
    places = len(order) or codebooks
    offsets = () if flags & _SIDE_BY_SIDE else tuple(reader.counts(places).tolist())
    try:
        frame = Frame(tuple(sizes), order, offsets)
    except InputError as error:
        raise FormatError(f"the frame cannot be used: {error.reason}") from error
    if frame.vocab_size > LARGEST_VOCABULARY:
        raise FormatError(f"a vocabulary of {frame.vocab_size} ids is out of bounds")
    return frame


def bits_of(vocab_size: int) -> int:
    """Bits of an id: ``ceil(log2(vocab_size))``, and 1 for a vocabulary of one."""
    return max(1, (vocab_size - 1).bit_length())


# -------------------------------------------------------------------------------------------------------------------- fields


def _count(value: int) -> bytes:
    if not 0 <= value < LARGEST_COUNT:
        raise FormatError(f"{value} cannot be written as a count")
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _leb128(values: Ids) -> bytes:
    """Counts one behind the other."""
    if wrong := values[(values < 0) | (values >= LARGEST_COUNT)].tolist():
        raise FormatError(f"{wrong[0]} cannot be written as a count")
    sizes = np.ones(len(values), np.int64)
    for groups in range(1, _COUNT_BYTES):
        sizes += values >= 1 << 7 * groups
    starts = np.cumsum(sizes) - sizes
    encoded = np.empty(int(sizes.sum()), np.uint8)
    for place in range(int(sizes.max(initial=0))):
        long = sizes > place
        encoded[starts[long] + place] = values[long] >> 7 * place & 0x7F | (sizes[long] > place + 1) << 7
    return encoded.tobytes()


def _name(name: str) -> bytes:
    try:
        encoded = name.encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"the tokenizer's name {name!r} cannot be written as UTF-8") from error
    if len(encoded) > LONGEST_NAME:
        raise FormatError(
            f"the tokenizer's name takes {len(encoded)} bytes, more than the {LONGEST_NAME} that a file has for it"
        )
    return _count(len(encoded)) + encoded


def _fingerprint(fingerprint: str) -> bytes:
    if fingerprint and (not _FINGERPRINT.fullmatch(fingerprint) or not any(bytes.fromhex(fingerprint))):
        raise FormatError(f"{fingerprint!r} is no fingerprint of 16 lower-case hexadecimal digits, not all of them zero")
    return bytes.fromhex(fingerprint) if fingerprint else bytes(8)


def _layout(meta: Sequence[Mapping[str, Any]], items: int) -> int:
    if meta and len(meta) != items:
        raise FormatError(f"the meta of {len(meta)} items does not suit {items} sequences")
    keys = {frozenset(item) for item in meta} or {frozenset()}
    for number, fields in enumerate(META_LAYOUTS):
        if keys == {frozenset(key for key, _ in fields)}:
            return number
    return _DESCRIBED


def _meta_bytes(meta: Sequence[Mapping[str, Any]], fields: Sequence[tuple[str, str]]) -> bytes:
    """The fields of every item, item by item."""
    if not fields or not meta:
        return b""
    columns = [_COLUMNS[kind](key, [item[key] for item in meta]) for key, kind in fields]
    rows = np.stack(columns, axis=1).reshape(-1)
    return rows.tobytes() if rows.dtype == "<f4" else _leb128(rows)


def _described_bytes(meta: Sequence[Mapping[str, Any]]) -> bytes:
    """Names and kinds of the fields, then for each item a bit for each field and the fields that it has."""
    keys = sorted({key for item in meta for key in item})
    if len(keys) > _MOST:
        raise FormatError(f"{len(keys)} fields are more than an item can keep")
    kinds = [_kind_of(key, [item[key] for item in meta if key in item]) for key in keys]
    parts = [_count(len(keys)), *(_name(key) + bytes([kind]) for key, kind in zip(keys, kinds, strict=True))]
    for item in meta:
        parts.append(np.packbits([key in item for key in keys]).tobytes())
        parts += [_DESCRIBED_KINDS[kind].write(item[key]) for key, kind in zip(keys, kinds, strict=True) if key in item]
    return b"".join(parts)


def _kind_of(key: str, values: Sequence[Any]) -> int:
    """The kind that all values of a field can be written as."""
    for number, kind in enumerate(_DESCRIBED_KINDS):
        if all(kind.takes(value) for value in values):
            return number
    raise FormatError(f"{key} of {values[0]!r} cannot be written: it must be a number, a text or bytes")


@dataclass(frozen=True)
class _Described:
    """How the values of a described field are told, written and read."""

    takes: Callable[[Any], bool]
    write: Callable[[Any], bytes]
    read: Callable[[_Reader], Any]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(0 <= value < LARGEST_COUNT)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and bool(np.isfinite(value))


def _read_number(reader: _Reader) -> float:
    number: float = struct.unpack("<d", reader.take(8))[0]
    if not math.isfinite(number):
        raise FormatError("the meta holds NaN or infinite numbers")
    return number


def _counts_of(key: str, values: Sequence[Any], below: int = LARGEST_COUNT) -> Ids:
    try:
        exact = [int(value) for value in values]
        wrong = next((i for i, (value, count) in enumerate(zip(values, exact, strict=True)) if value != count), None)
    except (TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"{key} cannot be written as a count: {error}") from error
    if wrong is None:
        wrong = next((i for i, count in enumerate(exact) if not 0 <= count < below), None)
    if wrong is not None:
        raise FormatError(f"item {wrong}: {key} of {values[wrong]} cannot be written as a count")
    return np.array(exact, np.int64)


def _rates_of(key: str, values: Sequence[Any]) -> Ids:
    # What is written is smaller than a rate that 25 divides.
    rates = _counts_of(key, values, below=25 * LARGEST_COUNT // 2)
    if not rates.all():
        raise FormatError(f"item {int(np.flatnonzero(rates == 0)[0])}: {key} is 0")
    return np.where(rates % 25 == 0, rates // 25 * 2, rates * 2 + 1)


def _fits_of(key: str, values: Sequence[Any]) -> Ids:
    if wrong := [value for value in values if value not in FITS]:
        raise FormatError(f"a fit of {wrong[0]!r} cannot be written; it is one of {', '.join(FITS)}")
    return np.array([FITS.index(value) for value in values], np.int64)


def _floats_of(key: str, values: Sequence[Any]) -> NDArray[np.float32]:
    try:
        with np.errstate(over="ignore"):
            numbers = np.array([float(value) for value in values]).astype("<f4")
    except (TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"{key} cannot be written as a float: {error}") from error
    if not np.isfinite(numbers).all():
        wrong = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise FormatError(f"item {wrong}: {key} of {values[wrong]} cannot be written as a finite float32")
    return numbers


#: Kinds of described fields; a file holds the position. Append, never reorder.
_DESCRIBED_KINDS = (
    _Described(_is_whole, lambda value: _count(int(value)), lambda reader: reader.count(LARGEST_COUNT)),
    _Described(_is_number, lambda value: struct.pack("<d", float(value)), _read_number),
    _Described(lambda value: isinstance(value, str), lambda value: _text(value), lambda reader: reader.text()),
    _Described(
        lambda value: isinstance(value, bytes), lambda value: _count(len(value)) + value, lambda reader: reader.octets()
    ),
)


def _text(value: str) -> bytes:
    try:
        encoded = value.encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"the text {value!r} cannot be written as UTF-8") from error
    return _count(len(encoded)) + encoded


_COLUMNS: Mapping[str, Any] = {"count": _counts_of, "rate": _rates_of, "fit": _fits_of, "float": _floats_of}


class _Reader:
    """A cursor over bytes that never reads past the end."""

    def __init__(self, content: memoryview, position: int) -> None:
        self.content, self.position = content, position

    def take(self, size: int) -> memoryview:
        if size > len(self.content) - self.position:
            raise FormatError("the .zt file ends in the middle of a field")
        self.position += size
        return self.content[self.position - size : self.position]

    def rest(self) -> memoryview:
        return self.take(len(self.content) - self.position)

    def count(self, limit: int) -> int:
        value = int(self.counts(1)[0])
        if value > limit:
            raise FormatError(f"a count of {value} in the .zt file is out of bounds")
        return value

    def counts(self, number: int) -> Ids:
        """As many counts, ``[number]``."""
        return self._sized_counts(number)[0]

    def _sized_counts(self, number: int) -> tuple[Ids, Ids]:
        """Counts, and the bytes that each of them takes."""
        window = np.frombuffer(self.content, np.uint8)[self.position : self.position + _COUNT_BYTES * number]
        ends = np.flatnonzero(window < 0x80)[:number]
        starts = np.concatenate([[0], ends + 1])[: len(ends)]
        sizes = ends + 1 - starts
        if sizes.max(initial=0) > _COUNT_BYTES or (len(ends) < number and len(window) == _COUNT_BYTES * number):
            raise FormatError("a count in the .zt file is too long")
        if len(ends) < number:
            raise FormatError("the .zt file ends in the middle of a field")
        values = np.zeros(number, np.int64)
        for place in range(int(sizes.max(initial=0))):
            long = sizes > place
            values[long] |= (window[starts[long] + place] & np.int64(0x7F)) << 7 * place
        if values.max(initial=0) >= LARGEST_COUNT:
            raise FormatError(f"a count of {values.max()} in the .zt file is out of bounds")
        self.position += int(sizes.sum())
        return values, sizes

    def text(self, limit: int = LARGEST_COUNT) -> str:
        try:
            return self.take(self.count(limit)).tobytes().decode()
        except UnicodeDecodeError as error:
            raise FormatError("a text in the .zt file is not UTF-8") from error

    def octets(self) -> bytes:
        return self.take(self.count(LARGEST_COUNT)).tobytes()

    def described(self, items: int) -> tuple[Mapping[str, Any], ...]:
        """Fields that the file names itself; each item has some of them."""
        kinds: dict[str, int] = {}
        for _ in range(self.count(_MOST)):
            key, kind = self.text(LONGEST_NAME), self.take(1)[0]
            if kind >= len(_DESCRIBED_KINDS) or key in kinds:
                raise FormatError(f"the field {key!r} occurs twice, or is of kind {kind}, which is not known to this release")
            kinds[key] = kind
        if not kinds and items:
            raise FormatError("items are said to keep something, and there is no field")
        # At least a byte for each item is there, or nothing is allocated.
        if items * -(-len(kinds) // 8) > len(self.content) - self.position:
            raise FormatError("the .zt file ends in the middle of a field")
        found = []
        for _ in range(items):
            flags = np.unpackbits(np.frombuffer(self.take(-(-len(kinds) // 8)), np.uint8))
            if flags[len(kinds) :].any():
                raise FormatError("an item keeps a field that the file does not name")
            present = [pair for pair, flag in zip(kinds.items(), flags.tolist(), strict=False) if flag]
            found.append({key: _DESCRIBED_KINDS[kind].read(self) for key, kind in present})
        return tuple(found)

    def meta(self, fields: Sequence[tuple[str, str]], items: int) -> tuple[Mapping[str, Any], ...]:
        """The fields of every item. A layout is made of floats, or of integers that are written as counts."""
        if not fields or not items:
            return ()
        keys = [key for key, _ in fields]
        columns: list[list[Any]]
        if all(kind == "float" for _, kind in fields):
            numbers = np.frombuffer(self.take(4 * len(fields) * items), "<f4").reshape(items, len(fields))
            if not np.isfinite(numbers).all():
                raise FormatError("the meta holds NaN or infinite numbers")
            columns = numbers.T.tolist()
        else:
            values, sizes = (column.reshape(items, len(fields)).T for column in self._sized_counts(items * len(fields)))
            columns = [_VALUES[kind](value, size) for (_, kind), value, size in zip(fields, values, sizes, strict=True)]
        return tuple(dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True))


def _count_values(values: Ids, sizes: Ids) -> list[Any]:
    return values.tolist()


def _rate_values(values: Ids, sizes: Ids) -> list[Any]:
    rates = np.where(values & 1, values >> 1, (values >> 1) * 25)
    if not rates.all():
        raise FormatError("a sample rate in the file is 0")
    return rates.tolist()


def _fit_values(values: Ids, sizes: Ids) -> list[Any]:
    # A fit is one byte; a longer count means that its first byte was none.
    numbers = np.where(sizes > 1, values & 0x7F | 0x80, values)
    if wrong := numbers[numbers >= len(FITS)].tolist():
        raise FormatError(f"fit {wrong[0]} is not known to this release")
    return [FITS[value] for value in values.tolist()]


_VALUES: Mapping[str, Any] = {"count": _count_values, "rate": _rate_values, "fit": _fit_values}

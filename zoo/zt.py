"""The ``.zt`` format: sequences of ids, bit-packed, with what decoding needs besides them. ``cards/zt.md`` specifies it.

Pure functions between bytes and a `Header` with one run of ids. Nothing here knows a tokenizer, and nothing imports torch.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.errors import FormatError

Ids = NDArray[np.int64]
Buffer = bytes | bytearray | memoryview

MAGIC = b"\x89zt"
# Version 2 has ids in fewer bits than the vocabulary takes; nothing else differs.
_VERSION, _NARROW_VERSION = 1, 2
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
)
#: Values of a "fit"; a file holds the position. Append, never reorder.
FITS = ("crop", "stretch", "pad", "none")

_COUNT_BYTES = 7
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")
# Ids that are packed at a time: what is computed on the way stays in the processor's cache.
_BLOCK = 1 << 15


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
    """

    tokenizer: str
    fingerprint: str
    vocab_size: int
    lengths: Ids
    meta: Sequence[Mapping[str, Any]] = ()
    segments: tuple[int, ...] = ()


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
    version = _NARROW_VERSION if bits < bits_of(header.vocab_size) else _VERSION
    layout = _layout(header.meta, len(header.lengths))
    sizes = [end - start for start, end in pairwise([0, *header.segments])]
    if 0 in sizes:
        raise FormatError("one of the segments is empty")
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
    packed = pack(ids, bits)
    return b"".join([start, packed, struct.pack("<I", zlib.crc32(packed, zlib.crc32(start)))])


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
    if version not in (_VERSION, _NARROW_VERSION):
        raise FormatError(f".zt version {version} is not known to this release (it reads {_VERSION} and {_NARROW_VERSION})")
    body = memoryview(content)[:-4]
    if zlib.crc32(body) != struct.unpack("<I", content[-4:])[0]:
        raise FormatError("the .zt file is truncated or corrupt: its checksum does not match")
    if layout >= len(META_LAYOUTS):
        raise FormatError(f"meta layout {layout} is not known to this release")

    reader = _Reader(body, 4)
    try:
        name = reader.take(reader.count(limit=LONGEST_NAME)).tobytes().decode()
    except UnicodeDecodeError as error:
        raise FormatError("the tokenizer's name is not UTF-8") from error
    fingerprint = reader.take(8)
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
    if -(-total * bits // 8) != len(packed):
        raise FormatError(f"{total} ids of {bits} bits do not make {len(packed)} bytes")
    ids = unpack(packed, total, bits)
    if vocab_size < 1 << bits and total and int(ids.max()) >= vocab_size:
        raise FormatError(f"id {int(ids.max())} is outside the vocabulary of {vocab_size}")
    known = fingerprint.hex() if any(fingerprint) else ""
    return Header(name, known, vocab_size, lengths, meta, tuple(accumulate(sizes))), ids


def bits_of(vocab_size: int) -> int:
    """Bits of an id: ``ceil(log2(vocab_size))``, and 1 for a vocabulary of one."""
    return max(1, (vocab_size - 1).bit_length())


# ------------------------------------------------------------------------------------------------------------------- packing
#
# Eight to 32 ids at a time: neighbours are joined, two halves of a machine word into one field, until a word is 64 bits wide;
# then one, two or four words whose fields make whole bytes are a group. All of it is arithmetic on whole arrays.


@dataclass(frozen=True)
class _Grouping:
    """How fields of some bits are joined: into words of ``width`` bits, and ``words`` of them into whole bytes."""

    narrow: int
    width: int
    words: int

    @classmethod
    def of(cls, bits: int) -> _Grouping:
        narrow = 8 if bits <= 8 else 16 if bits <= 16 else 32
        width = bits * (64 // narrow)
        return cls(narrow, width, 8 // math.gcd(width, 8))

    @property
    def ids(self) -> int:
        return self.words * 64 // self.narrow

    @property
    def bytes(self) -> int:
        return self.words * self.width // 8

    @property
    def units(self) -> int:
        return -(-self.bytes // 8)

    @property
    def places(self) -> list[tuple[int, int]]:
        """For each word of a group, the 64-bit unit it begins in, and the left shift that puts it there; below zero, a right
        shift, and the rest goes into the next unit."""
        starts = (divmod(word * self.width, 64) for word in range(self.words))
        return [(unit, 64 - used - self.width) for unit, used in starts]


def pack(ids: Ids, bits: int) -> memoryview:
    """Ids ``[count]`` below ``2 ** bits`` as consecutive big-endian fields of 1 to 32 bits, zero-padded to bytes."""
    group = _Grouping.of(bits)
    if bits == group.narrow:
        return ids.astype(f">u{bits // 8}").view(np.uint8).data
    packed = np.empty((-(-len(ids) // group.ids), group.bytes), np.uint8)
    done = 0
    for start in range(0, len(ids), _BLOCK):
        fields = ids[start : start + _BLOCK].astype(f"<u{group.narrow // 8}")
        if missing := -len(fields) % group.ids:
            fields = np.concatenate([fields, np.zeros(missing, fields.dtype)])
        width, size = bits, group.narrow
        while size < 64:
            pairs = fields.view(f"<u{size // 4}")
            fields = pairs & ((1 << size) - 1)
            fields <<= width
            fields |= pairs >> size
            width, size = 2 * width, 2 * size
        joined = _join(fields.reshape(-1, group.words), group)
        # Whole groups are copied as elements of that many bytes.
        whole = np.ndarray(len(joined), f"V{group.bytes}", joined.astype(">u8"), 0, joined.strides[:1])
        packed[done : done + len(joined)].view(f"V{group.bytes}")[:, 0] = whole
        done += len(joined)
    return packed.reshape(-1).data[: -(-len(ids) * bits // 8)]


def _join(words: NDArray[Any], group: _Grouping) -> NDArray[Any]:
    """Words ``[groups, words]`` as the 64-bit units ``[groups, units]`` that they fill from the high end."""
    if group.words == 1:
        return words << (64 - group.width)
    joined = np.zeros((len(words), group.units), np.uint64)
    for word, (unit, shift) in enumerate(group.places):
        if shift >= 0:
            joined[:, unit] |= words[:, word] << shift
        else:
            joined[:, unit] |= words[:, word] >> -shift
            joined[:, unit + 1] |= words[:, word] << (64 + shift)
    return joined


def unpack(packed: Buffer, count: int, bits: int) -> Ids:
    """The ``count`` ids that `pack` was given."""
    group = _Grouping.of(bits)
    if bits == group.narrow:
        return np.frombuffer(packed, f">u{bits // 8}", count).astype(np.int64)
    # What is read of the last group reaches beyond the end.
    content = np.zeros(len(packed) + group.bytes + 8, np.uint8)
    content[: len(packed)] = np.frombuffer(packed, np.uint8)
    ids = np.empty(count, np.int64)
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        groups = -(-(stop - start) // group.ids)
        places = (start * bits // 8 + 8 * unit for unit in range(group.units))
        units = [np.ndarray(groups, ">u8", content, place, (group.bytes,)).astype("<u8") for place in places]
        fields, width, size = _split(units, group), group.width, 64
        while size > group.narrow:
            width, size = width // 2, size // 2
            high = fields >> width
            fields &= (1 << width) - 1
            fields <<= size
            fields |= high
            fields = fields.view(f"<u{size // 8}")
        ids[start:stop] = fields[: stop - start]
    return ids


def _split(units: Sequence[NDArray[Any]], group: _Grouping) -> NDArray[Any]:
    """The words ``[groups * words]`` that `_join` was given."""
    if group.words == 1:
        return units[0] >> (64 - group.width)
    words = np.empty((len(units[0]), group.words), np.uint64)
    for word, (unit, shift) in enumerate(group.places):
        field = units[unit] >> shift if shift >= 0 else units[unit] << -shift | units[unit + 1] >> (64 + shift)
        np.bitwise_and(field, (1 << group.width) - 1, out=words[:, word])
    return words.reshape(-1)


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
    raise FormatError(f"meta with the keys {sorted(map(sorted, keys))} has no place in a .zt file")


def _meta_bytes(meta: Sequence[Mapping[str, Any]], fields: Sequence[tuple[str, str]]) -> bytes:
    """The fields of every item, item by item."""
    if not fields or not meta:
        return b""
    columns = [_COLUMNS[kind](key, [item[key] for item in meta]) for key, kind in fields]
    rows = np.stack(columns, axis=1).reshape(-1)
    return rows.tobytes() if rows.dtype == "<f4" else _leb128(rows)


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

    def meta(self, fields: Sequence[tuple[str, str]], items: int) -> tuple[Mapping[str, Any], ...]:
        """The fields of every item. A layout is made of floats, or of integers of which every one is a count."""
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

"""Token sequences: ids with lengths and what decoding needs besides them, in memory and in a bit-packed file."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from zoo.errors import FormatError, InputError, MismatchError
from zoo.media import FITS, replacing

Meta = Mapping[str, Any]

# What an item keeps besides its ids, in the order in which it is written. The position of a layout is its number in a file.
META_LAYOUTS: tuple[tuple[tuple[str, str], ...], ...] = (
    (),
    (("samples", "count"), ("sample_rate", "rate")),
    (("width", "count"), ("height", "count"), ("fit", "fit")),
    (("x", "float"), ("y", "float"), ("z", "float"), ("scale", "float")),
)

_MAGIC = b"\x89zt"
# Version 2 has ids in fewer bits than the vocabulary takes; nothing else differs.
_VERSION, _NARROW_VERSION = 1, 2
_LARGEST = 1 << 48


@dataclass(frozen=True, eq=False)
class Tokens:
    """A batch of token sequences of one tokenizer.

    Attributes:
        ids: int64 ``[batch, length]``, right-padded with -1.
        lengths: int64 ``[batch]``.
        tokenizer: name of the tokenizer they belong to.
        fingerprint: identity of its checkpoint; ids mean nothing under another one. Empty when unknown.
        vocab_size: ids lie in ``[0, vocab_size)``.
        meta: per item what decoding needs besides the ids, such as the number of samples.
        segments: ends of the scales or stages within the longest sequence, where there are any, in increasing order.
    """

    ids: Int[Tensor, "batch length"]
    lengths: Int[Tensor, " batch"]
    tokenizer: str
    fingerprint: str
    vocab_size: int
    meta: tuple[Meta, ...] = ()
    segments: tuple[int, ...] = field(default=())

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Int[Tensor, " _"]],
        *,
        tokenizer: str,
        fingerprint: str,
        vocab_size: int,
        meta: Sequence[Meta] = (),
        segments: Sequence[int] = (),
    ) -> Tokens:
        """Pad sequences of ids into one batch."""
        lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
        if sequences:
            ids = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=-1).to(torch.int64)
        else:
            ids = torch.empty(0, 0, dtype=torch.int64)
        return cls(ids, lengths.to(ids.device), tokenizer, fingerprint, vocab_size, tuple(meta), tuple(segments))

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int]) -> Tokens:
        """The chosen items, as tokens again; padding that none of them needs is dropped."""
        rows = range(len(self))[index] if isinstance(index, int | slice) else index
        chosen = [rows] if isinstance(rows, int) else list(rows)
        lengths = self.lengths[chosen]
        longest = int(lengths.max()) if chosen else 0
        meta = tuple(self.meta[i] for i in chosen) if self.meta else ()
        return replace(self, ids=self.ids[chosen, :longest], lengths=lengths, meta=meta)

    def __iter__(self) -> Iterator[Tokens]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        lengths = self.lengths.tolist()
        shown = str(lengths) if len(lengths) <= 8 else f"[{', '.join(map(str, lengths[:7]))}, …]"
        return f"Tokens({self.tokenizer}, items={len(self)}, lengths={shown}, vocab_size={self.vocab_size})"

    def unpadded(self) -> list[Int[Tensor, " _"]]:
        """The ids of each item without padding."""
        return [ids[:length] for ids, length in zip(self.ids, self.lengths.tolist(), strict=True)]

    def tolist(self) -> list[list[int]]:
        """The ids of each item as plain lists."""
        return [ids.tolist() for ids in self.unpadded()]

    def equal(self, other: Tokens) -> bool:
        """Whether both hold the same sequences of the same checkpoint with the same meta."""
        same_kind = (self.fingerprint, self.vocab_size, self.segments) == (
            other.fingerprint,
            other.vocab_size,
            other.segments,
        )
        return same_kind and self.tolist() == other.tolist() and self.meta == other.meta

    def to(self, device: torch.device | str) -> Tokens:
        """The same tokens on a device."""
        return replace(self, ids=self.ids.to(device), lengths=self.lengths.to(device))

    def truncate(self, length: int) -> Tokens:
        """The first ``length`` ids of each item; shorter items stay as they are."""
        if length < 1:
            raise InputError(f"cannot truncate to {length} tokens; keep at least 1")
        return replace(
            self,
            ids=self.ids[:, :length],
            lengths=self.lengths.clamp(max=length),
            segments=_segments_within(self.segments, length),
        )

    @staticmethod
    def cat(batches: Sequence[Tokens]) -> Tokens:
        """One batch of several, all of the same checkpoint; prefixes of different lengths join full sequences.

        Raises:
            MismatchError: they are of different checkpoints, or their segments end at different places.
        """
        if not batches:
            raise InputError("nothing to concatenate")
        first = batches[0]
        segments = max((batch.segments for batch in batches), key=lambda ends: ends[-1:])
        for i, other in enumerate(batches):
            if (other.fingerprint, other.vocab_size) != (first.fingerprint, first.vocab_size):
                raise MismatchError(f"tokens of {other.tokenizer} cannot join tokens of {first.tokenizer}", i)
            if other.segments and _segments_within(segments, other.segments[-1]) != other.segments:
                raise MismatchError(f"segments that end at {other.segments} cannot join those that end at {segments}", i)
        with_meta = all(batch.meta for batch in batches)
        return Tokens.from_sequences(
            [ids.to(first.ids.device) for batch in batches for ids in batch.unpadded()],
            tokenizer=first.tokenizer,
            fingerprint=first.fingerprint,
            vocab_size=first.vocab_size,
            meta=[meta for batch in batches for meta in batch.meta] if with_meta else (),
            segments=segments,
        )

    # ---- .zt files
    #
    #   3  magic 0x89 'z' 't'
    #   1  version (low 4 bits), number of the meta layout (next 3 bits), whether there are segments (high bit)
    #      name            count, then that many bytes of UTF-8
    #   8  fingerprint     zeros when unknown
    #      vocab_size      count
    #   1  bits per id     in version 2; ceil(log2(vocab_size)) in version 1
    #      items           count
    #      segments        count, then as many counts, the lengths of the segments, where there are any
    #      lengths         a count per item
    #      meta            the fields of the layout, per item
    #      ids             all items in one run, high bit first, that many bits each, zero-padded to bytes
    #   4  CRC-32 of everything before, little-endian
    #
    # A "count" is an unsigned LEB128 integer below 2^48, a "float" a little-endian float32, a "fit" one byte, the position in
    # FITS, and a "rate" a count: rate / 25 * 2 where 25 divides the rate, rate * 2 + 1 elsewhere.

    def to_bytes(self) -> bytes:
        """The content of a ``.zt`` file."""
        layout = self._layout()
        fingerprint = bytes.fromhex(self.fingerprint) if self.fingerprint else bytes(8)
        name = self.tokenizer.encode()
        lengths = self.lengths.tolist()
        ids = torch.cat([*self.unpadded(), self.ids.new_empty(0)]).cpu().numpy()
        # A file's bytes take 8 bits, although the vocabulary of bytes has an id more for padding.
        bits = _bits(int(ids.max()) + 1) if len(ids) else _bits(self.vocab_size)
        version = _NARROW_VERSION if bits < _bits(self.vocab_size) else _VERSION
        parts = [
            _MAGIC,
            bytes([version | layout << 4 | bool(self.segments) << 7]),
            _count(len(name)),
            name,
            fingerprint,
            _count(self.vocab_size),
            bytes([bits]) if version == _NARROW_VERSION else b"",
            _count(len(self)),
            _count(len(self.segments)) if self.segments else b"",
            *(_count(end - start) for start, end in pairwise([0, *self.segments])),
            *map(_count, lengths),
            *(_WRITE[kind](item[key]) for item in self.meta for key, kind in META_LAYOUTS[layout]),
            _pack(ids, bits),
        ]
        content = b"".join(parts)
        return content + struct.pack("<I", zlib.crc32(content))

    def _layout(self) -> int:
        keys = {tuple(sorted(item)) for item in self.meta} or {()}
        for number, fields in enumerate(META_LAYOUTS):
            if keys == {tuple(sorted(key for key, _ in fields))}:
                return number
        raise FormatError(f"meta with the keys {sorted(keys)} has no place in a .zt file")

    @classmethod
    def from_bytes(cls, content: bytes) -> Tokens:
        """Read the content of a ``.zt`` file.

        Raises:
            FormatError: it is truncated, corrupt, of an unknown version, or claims sizes that it does not hold.
        """
        if content[:3] != _MAGIC:
            other = "; it looks like safetensors: latents are read by zoo.Latents.load" if content[8:9] == b"{" else ""
            raise FormatError(f"not a .zt file{other}")
        if len(content) < 20:
            raise FormatError("the .zt file is truncated")
        version = content[3] & 15
        if version not in (_VERSION, _NARROW_VERSION):
            raise FormatError(f".zt version {version} is not known to this release (it reads {_VERSION} and {_NARROW_VERSION})")
        body = content[:-4]
        if zlib.crc32(body) != struct.unpack("<I", content[-4:])[0]:
            raise FormatError("the .zt file is truncated or corrupt: its checksum does not match")
        layout = content[3] >> 4 & 7
        if layout >= len(META_LAYOUTS):
            raise FormatError(f"meta layout {layout} is not known to this release")

        reader = _Reader(body, 4)
        try:
            name = reader.take(reader.count(limit=255)).decode()
        except UnicodeDecodeError as error:
            raise FormatError("the tokenizer's name is not UTF-8") from error
        fingerprint = reader.take(8)
        vocab_size = reader.count(limit=1 << 32)
        if vocab_size < 1:
            raise FormatError("the vocabulary is empty")
        bits = reader.take(1)[0] if version == _NARROW_VERSION else _bits(vocab_size)
        if not 1 <= bits <= _bits(vocab_size):
            raise FormatError(f"ids of {bits} bits do not suit a vocabulary of {vocab_size}")
        # Every item takes at least one byte, so a count beyond the file's size is a lie that must not allocate anything.
        items = reader.count(limit=len(body))
        sizes = [reader.count() for _ in range(reader.count(limit=len(body)))] if content[3] & 0x80 else []
        if 0 in sizes:
            raise FormatError("one of the segments is empty")
        lengths = [reader.count() for _ in range(items)]
        fields = META_LAYOUTS[layout]
        meta = [{key: _READ[kind](reader) for key, kind in fields} for _ in range(items)] if fields else []
        packed = reader.rest()
        if -(-sum(lengths) * bits // 8) != len(packed):
            raise FormatError(f"{sum(lengths)} ids of {bits} bits do not make {len(packed)} bytes")
        ids = _unpack(packed, sum(lengths), bits)
        if len(ids) and int(ids.max()) >= vocab_size:
            raise FormatError(f"id {int(ids.max())} is outside the vocabulary of {vocab_size}")
        return cls.from_sequences(
            list(torch.from_numpy(ids).split(lengths)) if lengths else [],
            tokenizer=name,
            fingerprint=fingerprint.hex() if any(fingerprint) else "",
            vocab_size=vocab_size,
            meta=meta,
            segments=tuple(accumulate(sizes)),
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a ``.zt`` file, under a temporary name first."""
        with replacing(path) as temporary:
            temporary.write_bytes(self.to_bytes())
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokens:
        """Read a ``.zt`` file.

        Raises:
            FormatError: it is not a sound ``.zt`` file; names the file.
        """
        try:
            return cls.from_bytes(Path(path).read_bytes())
        except FormatError as error:
            raise FormatError(f"{os.fspath(path)}: {error}") from error


def _segments_within(segments: tuple[int, ...], length: int) -> tuple[int, ...]:
    """The segments of a prefix: whole ones, and what is left of the one that the cut goes through."""
    return tuple(dict.fromkeys(min(end, length) for end in segments))


def _bits(vocab_size: int) -> int:
    return max(1, (vocab_size - 1).bit_length())


def _count(value: int) -> bytes:
    value = int(value)
    if not 0 <= value < _LARGEST:
        raise FormatError(f"{value} cannot be written as a count")
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _rate(value: int) -> bytes:
    return _count(value // 25 * 2) if value % 25 == 0 else _count(value * 2 + 1)


def _fit(value: str) -> bytes:
    if value not in FITS:
        raise FormatError(f"a fit of {value!r} cannot be written; it is one of {', '.join(FITS)}")
    return bytes([FITS.index(value)])


class _Reader:
    """A cursor over bytes that never reads past the end."""

    def __init__(self, content: bytes, position: int) -> None:
        self.content, self.position = content, position

    def take(self, size: int) -> bytes:
        if size > len(self.content) - self.position:
            raise FormatError("the .zt file ends in the middle of a field")
        self.position += size
        return self.content[self.position - size : self.position]

    def rest(self) -> bytes:
        return self.take(len(self.content) - self.position)

    def count(self, limit: int = _LARGEST) -> int:
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
            if shift > 48:
                raise FormatError("a count in the .zt file is too long")
        if value > limit:
            raise FormatError(f"a count of {value} in the .zt file is out of bounds")
        return value

    def rate(self) -> int:
        value = self.count()
        return value // 2 if value & 1 else value // 2 * 25

    def float(self) -> float:
        value: float = struct.unpack("<f", self.take(4))[0]
        return value

    def fit(self) -> str:
        number = self.take(1)[0]
        if number >= len(FITS):
            raise FormatError(f"fit {number} is not known to this release")
        return FITS[number]


_WRITE = {"count": _count, "rate": _rate, "float": lambda value: struct.pack("<f", value), "fit": _fit}
_READ = {"count": _Reader.count, "rate": _Reader.rate, "float": _Reader.float, "fit": _Reader.fit}
_PACK_BLOCK = 1 << 16


def _pack(ids: np.ndarray[Any, np.dtype[np.int64]], bits: int) -> bytes:
    """Ids as consecutive ``bits``-bit big-endian fields."""
    shifts = np.arange(bits - 1, -1, -1)
    # Blocks of a multiple of eight ids end on whole bytes.
    blocks = (ids[i : i + _PACK_BLOCK] for i in range(0, len(ids), _PACK_BLOCK))
    return b"".join(np.packbits((block[:, None] >> shifts & 1).astype(np.uint8)).tobytes() for block in blocks)


def _unpack(packed: bytes, count: int, bits: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    weights = 1 << np.arange(bits - 1, -1, -1)
    ids = np.empty(count, np.int64)
    raw = np.frombuffer(packed, np.uint8)
    for start in range(0, count, _PACK_BLOCK):
        stop = min(start + _PACK_BLOCK, count)
        fields = np.unpackbits(raw[start * bits // 8 : -(-stop * bits // 8)], count=(stop - start) * bits)
        ids[start:stop] = fields.reshape(-1, bits) @ weights
    return ids

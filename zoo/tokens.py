"""Token sequences: ids with lengths and what decoding needs besides them, in memory and in a bit-packed file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from zoo import zt
from zoo.errors import FormatError, InputError, ItemError, MismatchError
from zoo.indexing import positions
from zoo.media import file_content, replacing
from zoo.media.items import as_array
from zoo.moved import names_of
from zoo.spec import Frame

Meta = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Tokens:
    """A batch of token sequences of one tokenizer.

    A batch takes memory for the ids that it holds. Padding is made when ``ids`` is read for the first time; nothing else in
    this class needs it.

    Attributes:
        ids: int64 ``[batch, length]``, right-padded with -1.
        lengths: int64 ``[batch]``.
        tokenizer: name of the tokenizer they belong to.
        fingerprint: identity of its checkpoint; ids mean nothing under another one. Empty when unknown.
        vocab_size: ids lie in ``[0, vocab_size)``.
        meta: per item what decoding needs besides the ids, such as the number of samples.
        segments: ends of the scales or stages within the longest sequence, where there are any, in increasing order.
        frame: codebooks of each step, where ids come from several; ids are flat, frame by frame, and lengths are whole frames.

    >>> tokens = Tokens.from_sequences([[5, 6, 7], [8]], tokenizer="mine", fingerprint="", vocab_size=10)
    >>> tokens.ids.tolist(), tokens[-1].tolist(), tokens[[True, False]].tolist()
    ([[5, 6, 7], [8, -1, -1]], [[8]], [[5, 6, 7]])
    """

    ids: Int[Tensor, "batch length"]
    lengths: Int[Tensor, " batch"]
    tokenizer: str
    fingerprint: str
    vocab_size: int
    meta: tuple[Meta, ...] = ()
    segments: tuple[int, ...] = field(default=())
    frame: Frame | None = None

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Any],
        *,
        tokenizer: str,
        fingerprint: str,
        vocab_size: int,
        meta: Sequence[Meta] = (),
        segments: Sequence[int] = (),
        frame: Frame | None = None,
        copy: bool = True,
    ) -> Tokens:
        """One batch of sequences of ids.

        Args:
            sequences: ``[length]`` each: tensors or arrays of any integer type, or lists of integers.
            tokenizer, fingerprint, vocab_size, segments, frame: as the attributes.
            meta: nothing, or a mapping per sequence.
            copy: copy the ids in any case. A single tensor of int64 is shared without.

        Raises:
            InputError: a sequence is not made of integers, or has another rank; or there is not one ``meta`` per sequence.
        """
        rows = [as_ids(sequence, index) for index, sequence in enumerate(sequences)]
        if meta and len(meta) != len(rows):
            raise InputError(f"the meta of {len(meta)} items does not suit {len(rows)} sequences")
        run = rows[0] if len(rows) == 1 and not copy else _joined(rows, torch.device("cpu"))
        lengths = _lengths(rows, run.device)
        return cls._of_run(run, lengths, tokenizer, fingerprint, vocab_size, tuple(meta), tuple(segments), frame)

    @classmethod
    def from_codes(
        cls,
        codes: Sequence[Int[Tensor, "_frames places"]],
        *,
        frame: Frame,
        tokenizer: str,
        fingerprint: str,
        meta: Sequence[Meta] = (),
    ) -> Tokens:
        """One batch of codes ``[frames, places]``, each from 0 within the codebook of its place.

        Raises:
            ItemError: an item has another number of places, or a code is outside its codebook.
        """
        offsets = torch.tensor(frame.offsets)
        sequences = []
        for index, item in enumerate(codes):
            if item.ndim != 2 or item.shape[1] != frame.ids_per_frame:
                raise ItemError(f"codes must be [frames, {frame.ids_per_frame}], not {list(item.shape)}", index)
            if ((item < 0) | (item >= torch.tensor(frame.placed_sizes, device=item.device))).any():
                raise ItemError("a code is outside its codebook", index)
            sequences.append((item.to(torch.int64) + offsets.to(item.device)).reshape(-1))
        return cls.from_sequences(
            sequences,
            tokenizer=tokenizer,
            fingerprint=fingerprint,
            vocab_size=frame.vocab_size,
            meta=meta,
            frame=frame,
            copy=False,
        )

    @classmethod
    def _of_run(
        cls,
        run: Int[Tensor, " total"],
        lengths: Int[Tensor, " batch"],
        tokenizer: str,
        fingerprint: str,
        vocab_size: int,
        meta: tuple[Meta, ...],
        segments: tuple[int, ...],
        frame: Frame | None = None,
    ) -> Tokens:
        """A batch whose ids are given one item behind the other."""
        tokens = cls.__new__(cls)
        vars(tokens).update(
            _run=run,
            lengths=lengths,
            tokenizer=tokenizer,
            fingerprint=fingerprint,
            vocab_size=vocab_size,
            meta=meta,
            segments=segments,
            # A single codebook without an offset is what there is without a frame.
            frame=None if frame is None or frame == Frame((vocab_size,)) else frame,
        )
        return tokens

    if not TYPE_CHECKING:

        def __getattr__(self, name):
            # A batch holds its ids either padded, as ``ids``, or in one run. Padding replaces the run for good, so that
            # there is one truth about ids that are changed in place.
            state = vars(self)
            run = state.get("_run") if name == "ids" else None
            if run is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            padded = state.setdefault("ids", _padded(run, self.lengths))
            state.pop("_run", None)
            return padded

    def __len__(self) -> int:
        return self.lengths.shape[0]

    def __getitem__(self, index: Any) -> Tokens:
        """The chosen items, as tokens again; padding that none of them needs is dropped.

        Args:
            index: an integer, a slice, several integers ``[chosen]``, or a mask of booleans ``[batch]``; the latter two as a
                list, an array or a tensor.

        Raises:
            IndexingError: an index is out of range, or a mask of another length; it is an `InputError` and an ``IndexError``.
        """
        return self._chosen(positions(index, len(self)))

    def __iter__(self) -> Iterator[Tokens]:
        return (self._chosen([i]) for i in range(len(self)))

    def _chosen(self, rows: Sequence[int]) -> Tokens:
        meta = tuple(self.meta[i] for i in rows) if self.meta else ()
        return self._with([self._row(i) for i in rows], meta=meta)

    def __repr__(self) -> str:
        lengths = self.lengths.tolist()
        shown = str(lengths) if len(lengths) <= 8 else f"[{', '.join(map(str, lengths[:7]))}, …]"
        books = f", codebooks={self.frame.codebooks}" if self.frame else ""
        return f"Tokens({self.tokenizer}, items={len(self)}, lengths={shown}, vocab_size={self.vocab_size}{books})"

    def unpadded(self) -> list[Int[Tensor, " _"]]:
        """The ids of each item without padding."""
        return [self._row(i) for i in range(len(self))]

    def tolist(self) -> list[list[int]]:
        """The ids of each item as plain lists."""
        return [ids.tolist() for ids in self.unpadded()]

    def equal(self, other: Tokens) -> bool:
        """Whether both hold the same sequences of the same checkpoint with the same meta."""
        same_kind = (self.fingerprint, self.vocab_size, self.segments, self.frame) == (
            other.fingerprint,
            other.vocab_size,
            other.segments,
            other.frame,
        )
        same_lengths = self.lengths.tolist() == other.lengths.tolist()
        return (
            same_kind and same_lengths and self.meta == other.meta and torch.equal(self._joined().cpu(), other._joined().cpu())
        )

    def to(self, device: torch.device | str) -> Tokens:
        """The same tokens on a device."""
        return self._with([self._joined().to(device)], lengths=self.lengths.to(device))

    @property
    def ids_per_frame(self) -> int:
        """Ids of one frame; 1 with a single codebook."""
        return 1 if self.frame is None else self.frame.ids_per_frame

    def frames(self) -> Int[Tensor, "batch frames ids_per_frame"]:
        """The ids frame by frame, -1 where an item has ended.

        Raises:
            ItemError: an item is no whole number of frames.
        """
        for index, length in enumerate(self.lengths.tolist()):
            if length % self.ids_per_frame:
                raise ItemError(f"{length} ids are no whole number of frames, of {self.ids_per_frame} ids each", index)
        return self.ids.reshape(len(self), -1, self.ids_per_frame)

    def codes(self) -> Int[Tensor, "batch frames ids_per_frame"]:
        """The codes frame by frame, each from 0 within the codebook of its place; -1 where an item has ended.

        Raises:
            ItemError: an item is no whole number of frames.
        """
        frames = self.frames()
        offsets = torch.tensor((0,) if self.frame is None else self.frame.offsets, device=frames.device)
        return torch.where(frames < 0, -1, frames - offsets)

    def keep(self, codebooks: int) -> Tokens:
        """The ids of the first few codebooks of every frame, coarse to fine; they stay as they are.

        Raises:
            InputError: there are fewer codebooks.

        >>> frame = zoo.spec.Frame((8, 4), order=(0, 1, 1))
        >>> codes = torch.tensor([[7, 3, 2], [6, 1, 0]])
        >>> tokens = Tokens.from_codes([codes], frame=frame, tokenizer="mine", fingerprint="")
        >>> tokens.tolist(), tokens.keep(codebooks=1).tolist()
        ([[7, 11, 14, 6, 9, 12]], [[7, 6]])
        """
        kept, places = (self.frame or Frame((self.vocab_size,))).keep(codebooks)
        rows = [row.reshape(-1, self.ids_per_frame)[:, list(places)].reshape(-1) for row in self.unpadded()]
        return self._with(rows, vocab_size=kept.vocab_size, frame=kept)

    def truncate(self, length: int) -> Tokens:
        """The first ``length`` ids of each item; shorter items stay as they are.

        Raises:
            InputError: nothing would be left, or the cut goes through a frame of several codebooks.

        >>> tokens = Tokens.from_sequences([[5, 6, 7], [8]], tokenizer="mine", fingerprint="", vocab_size=10)
        >>> tokens.truncate(2).tolist()
        [[5, 6], [8]]
        """
        if length < 1:
            raise InputError(f"cannot truncate to {length} tokens; keep at least 1")
        if length % self.ids_per_frame:
            raise InputError(
                f"a cut at {length} ids goes through a frame: keep a multiple of {self.ids_per_frame}, or call keep(codebooks)"
            )
        return self._with([row[:length] for row in self.unpadded()], segments=_segments_within(self.segments, length))

    @staticmethod
    def cat(batches: Sequence[Tokens]) -> Tokens:
        """One batch of several, all of the same checkpoint; prefixes of different lengths join full sequences.

        Raises:
            MismatchError: they are of different checkpoints, or their segments end at different places.

        >>> one, other = (zoo.load("byteformer-tiny").encode(content) for content in (b"zoo", b"!"))
        >>> Tokens.cat([one, other]).tolist()
        [[122, 111, 111], [33]]
        """
        if not batches:
            raise InputError("nothing to concatenate")
        first = batches[0]
        segments = max((batch.segments for batch in batches), key=lambda ends: ends[-1:])
        for i, other in enumerate(batches):
            if (other.fingerprint, other.vocab_size, other.frame) != (first.fingerprint, first.vocab_size, first.frame):
                raise MismatchError(f"tokens of {other.tokenizer} cannot join tokens of {first.tokenizer}", i)
            if other.segments and _segments_within(segments, other.segments[-1]) != other.segments:
                raise MismatchError(f"segments that end at {other.segments} cannot join those that end at {segments}", i)
        with_meta = all(batch.meta for batch in batches)
        return Tokens.from_sequences(
            [ids.to(first.lengths.device) for batch in batches for ids in batch.unpadded()],
            tokenizer=first.tokenizer,
            fingerprint=first.fingerprint,
            vocab_size=first.vocab_size,
            meta=[meta for batch in batches for meta in batch.meta] if with_meta else (),
            segments=segments,
            frame=first.frame,
        )

    # ---- .zt files

    def to_bytes(self) -> bytes:
        """The content of a ``.zt`` file, which ``cards/zt.md`` describes.

        Raises:
            FormatError: something has no place in a file, such as ids outside of the vocabulary or an unknown meta.

        >>> tokens = Tokens.from_sequences([[5, 6, 7]], tokenizer="mine", fingerprint="", vocab_size=1024)
        >>> len(tokens.to_bytes()), Tokens.from_bytes(tokens.to_bytes()).equal(tokens)
        (28, True)
        """
        lengths = self.lengths.cpu().numpy().astype(np.int64)
        header = zt.Header(self.tokenizer, self.fingerprint, self.vocab_size, lengths, self.meta, self.segments, self.frame)
        return zt.dumps(header, self._joined().cpu().to(torch.int64).numpy())

    @classmethod
    def from_bytes(cls, content: bytes | bytearray | memoryview) -> Tokens:
        """Read the content of a ``.zt`` file.

        Raises:
            FormatError: it is truncated, corrupt, of an unknown version, or claims sizes that it does not hold.
        """
        header, ids = zt.loads(content)
        return cls._of_run(
            torch.from_numpy(ids),
            torch.from_numpy(header.lengths),
            header.tokenizer,
            header.fingerprint,
            header.vocab_size,
            tuple(header.meta),
            header.segments,
            header.frame,
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
            InputError: there is no such file, or it cannot be read; names it.
            FormatError: it is not a sound ``.zt`` file; names the file.
        """
        try:
            return cls.from_bytes(file_content(path))
        except FormatError as error:
            raise FormatError(f"{os.fspath(path)}: {error}") from error

    # ---- how the ids are held

    @property
    def _starts(self) -> list[int]:
        """Where each item begins in the run, and where the last one ends."""
        if "_places" not in vars(self):
            vars(self)["_places"] = [0, *accumulate(self.lengths.tolist())]
        places: list[int] = vars(self)["_places"]
        return places

    def _row(self, item: int) -> Int[Tensor, " _"]:
        start, end = self._starts[item : item + 2]
        run: Tensor | None = vars(self).get("_run")
        return self.ids[item, : end - start] if run is None else run[start:end]

    def _joined(self) -> Int[Tensor, " total"]:
        """All ids in one run."""
        run: Tensor | None = vars(self).get("_run")
        if run is not None:
            return run
        if self._starts[-1] == self.ids.numel():
            return self.ids.reshape(-1)
        return torch.cat([self._row(i) for i in range(len(self))])

    def _with(self, rows: Sequence[Int[Tensor, " _"]], **changes: Any) -> Tokens:
        """These tokens with other sequences, of the lengths that they have unless ``changes`` says otherwise."""
        run = _joined(rows, self.lengths.device)
        settings: dict[str, Any] = {
            "lengths": _lengths(rows, run.device),
            "tokenizer": self.tokenizer,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "meta": self.meta,
            "segments": self.segments,
            "frame": self.frame,
        }
        return self._of_run(run, **(settings | changes))


def _joined(rows: Sequence[Int[Tensor, " _"]], device: torch.device) -> Int[Tensor, " total"]:
    """All ids in one run, on a device if there are no rows."""
    return torch.cat(list(rows)) if rows else torch.empty(0, dtype=torch.int64, device=device)


def _lengths(rows: Sequence[Int[Tensor, " _"]], device: torch.device) -> Int[Tensor, " batch"]:
    # By way of NumPy, which is quicker for a few numbers.
    lengths = torch.from_numpy(np.array([row.shape[0] for row in rows], np.int64))
    return lengths if device.type == "cpu" else lengths.to(device)


def as_ids(sequence: Any, index: int) -> Int[Tensor, " length"]:
    """A sequence of ids as int64: a tensor or array of any integer type, a list of integers, or what holds one.

    Raises:
        ItemError: it is not made of integers, has another rank, or holds a number beyond int64; names item ``index``.
    """
    if type(sequence) is Tensor and sequence.dtype == torch.int64 and sequence.ndim == 1:
        return sequence
    try:
        row = sequence if isinstance(sequence, Tensor) else as_array(sequence)
    except InputError as error:
        raise ItemError(f"ids must be a sequence of integers: {error.reason}", index) from error
    if row.ndim == 1 and not len(row):
        return torch.empty(0, dtype=torch.int64, device=row.device if isinstance(row, Tensor) else None)
    if row.ndim != 1 or not is_integral(row):
        raise ItemError(f"ids must be a sequence of integers, not {row.dtype} {list(row.shape)}", index)
    if isinstance(row, np.ndarray):
        if row.dtype == np.uint64 and row.max() > np.iinfo(np.int64).max:
            raise ItemError(f"id {row.max()} is beyond every vocabulary", index)
        row = torch.from_numpy(np.array(row, np.int64))
    return row.detach().to(torch.int64)


def is_integral(array: Tensor | np.ndarray) -> bool:
    """Whether an array is of an integer type."""
    if isinstance(array, np.ndarray):
        return array.dtype.kind in "iu"
    return not (array.is_floating_point() or array.is_complex() or array.dtype == torch.bool)


def _padded(run: Int[Tensor, " total"], lengths: Int[Tensor, " batch"]) -> Int[Tensor, "batch length"]:
    sizes = lengths.tolist()
    if len(set(sizes)) <= 1:
        return run.reshape(len(sizes), sizes[0] if sizes else 0)
    ids = run.new_full((len(sizes), max(sizes)), -1)
    for row, start, size in zip(ids, accumulate([0, *sizes]), sizes, strict=False):
        row[:size] = run[start : start + size]
    return ids


def _segments_within(segments: tuple[int, ...], length: int) -> tuple[int, ...]:
    """The segments of a prefix: whole ones, and what is left of the one that the cut goes through."""
    return tuple(dict.fromkeys(min(end, length) for end in segments))


#: A former name, for one release.
__getattr__ = names_of(__name__, {"META_LAYOUTS": "zoo.zt"})

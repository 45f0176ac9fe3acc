"""Token data sets for training: items by row and by key, selections, streams, and conversions to other layouts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from zoo.engine import exports
from zoo.engine.parts import Header
from zoo.engine.places import whole_place
from zoo.engine.selection import Item, Items, Selection
from zoo.engine.shelf import Rows, Shelf
from zoo.engine.store import Store
from zoo.engine.stream import TokenStream
from zoo.errors import ArgumentError, IndexingError, MismatchError
from zoo.indexing import positions
from zoo.spec import Spec
from zoo.tokenizer import Tokenizer
from zoo.tokens import Tokens


class TokenDataset(Selection, torch.utils.data.Dataset[Item]):
    """The items of a folder that ``zoo tokenize`` wrote; ids are read from the files when they are asked for.

    ``data[i]`` and ``data["key"]`` are one `Item`; a slice, several integers or a mask give a smaller data set of the same
    kind, without reading anything. Reading one item reads its block of up to 1024, and the last blocks stay in memory.

    Args:
        folder: of the parts, or its URL.
        columns: which columns of the source are read; all of them by default.
        expect: the tokenizer, its spec, or the fingerprint that the ids must belong to.
        failures: have items that failed too, with the reason; they are left out by default.
        partial: take a data set that is not finished for what is there.

    Raises:
        ArgumentError: the folder holds no parts or not all of them, or has no such column.
        MismatchError: the ids are those of another tokenizer than ``expect``.
        FormatError: a part is damaged, or belongs to another run than the others.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        columns: Sequence[str] | None = None,
        expect: Tokenizer[Any] | Spec | str | None = None,
        failures: bool = False,
        partial: bool = False,
    ) -> None:
        shelf = Shelf(Store(whole_place(folder)), partial)
        if unknown := [name for name in columns or () if name not in shelf.carried]:
            there = ", ".join(shelf.carried) or "none"
            raise ArgumentError(f"{os.fspath(folder)} has no column {unknown[0]!r} of the source; there is {there}")
        if expect is not None:
            _require(shelf.header, expect)
        rows: Rows | None = None
        if not failures and len(shelf.failed):
            sound = np.ones(len(shelf), bool)
            sound[shelf.failed] = False
            rows = np.flatnonzero(sound)
        super().__init__(shelf, shelf.carried if columns is None else tuple(columns), rows)

    def _view(self, rows: Rows) -> TokenDataset:
        view = type(self).__new__(type(self))
        Selection.__init__(view, self.shelf, self.columns, rows)
        return view

    # ---- what it is

    @property
    def tokenizer(self) -> str:
        """Name of the tokenizer."""
        return self.header.tokenizer

    @property
    def fingerprint(self) -> str:
        """Identity of its checkpoint."""
        return self.header.fingerprint

    @property
    def vocab_size(self) -> int:
        """Ids lie in ``[0, vocab_size)``."""
        return self.header.vocab_size

    @property
    def folder(self) -> str:
        """Folder of the parts."""
        return self.shelf.store.place

    def __repr__(self) -> str:
        return f"TokenDataset({self.folder}, {self.tokenizer}, items={len(self)}, vocab_size={self.vocab_size})"

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Number of ids of each item; -1 where it failed."""
        lengths = self.shelf.lengths()
        return lengths if self.rows is None else lengths[self.rows]

    # ---- items

    def __getitem__(self, index: Any) -> Any:
        """An item by its position or its key, or a smaller data set.

        Args:
            index: an integer or a key for one `Item`; a slice, several integers, or a mask of booleans for a `TokenDataset`.

        Raises:
            IndexingError: there is no such item, or a mask has another length.
        """
        if isinstance(index, str):
            return next(self.items([self._row_of(index)]))
        if isinstance(index, slice):
            return self._view(self.all_rows()[index])
        chosen = np.array(positions(index, len(self)), np.int64)
        rows = chosen if self.rows is None else self.rows[chosen]
        # What has no length is one index: an integer of any library.
        if getattr(index, "ndim", None) == 0 or not hasattr(index, "__len__"):
            return next(self.items(rows))
        return self._view(rows)

    def __contains__(self, key: object) -> bool:
        try:
            return isinstance(key, str) and self._row_of(key) >= 0
        except IndexingError:
            return False

    def tokens(self) -> Tokens:
        """The ids of all items as one batch.

        Raises:
            ArgumentError: there is no item, or one of them failed.
        """
        return Items.of(list(self)).tokens

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Columns of all items in memory, ids and all; any of those of the parts.

        Raises:
            ArgumentError: there is no such column.
        """
        names = list(self.names() if columns is None else columns)
        if unknown := [name for name in names if name not in self.shelf.schema.names]:
            raise ArgumentError(f"there is no column {unknown[0]!r}; there are {', '.join(self.shelf.schema.names)}")
        schema = pa.schema([self.shelf.schema.field(name) for name in names])
        tables = [table.select(names) for table in self.shelf.tables(self.rows, names)]
        return pa.concat_tables([schema.empty_table(), *tables])

    def select(self, *, min_length: int | None = None, max_length: int | None = None) -> TokenDataset:
        """The items of some lengths in ids, both ends included; those that failed have none.

        >>> from zoo.engine.dataset import TokenDataset  # doctest: +SKIP
        >>> TokenDataset("tokens/").select(min_length=75, max_length=2250)  # doctest: +SKIP
        """
        lengths = self.lengths
        chosen = lengths >= max(0, min_length or 0)
        if max_length is not None:
            chosen &= lengths <= max_length
        return self._view(self.all_rows()[chosen])

    # ---- training

    def stream(
        self, *, shuffle: int | None = None, rank: int | None = None, world: int | None = None, epoch: int = 0
    ) -> TokenStream:
        """All items once, over all ranks of a training run and all workers of their loaders.

        Args:
            shuffle: seed of the order; ``None`` for that of the data set.
            rank, world: which process this is, of how many; those of ``torch.distributed`` by default, where it is in use.
            epoch: another one has another order.

        Raises:
            ArgumentError: there is no such rank, or it is not known which one this is.
        """
        return TokenStream(self, shuffle=shuffle, rank=rank, world=world, epoch=epoch)

    # ---- other layouts

    def to_datasets(self) -> Any:
        """The same items as a ``datasets.Dataset``, with the columns of the parts; ids are read from the parts.

        Raises:
            MissingExtraError: datasets is not installed.
        """
        return exports.to_datasets(self)

    def to_webdataset(self, path: str | os.PathLike[str], *, shard_items: int = 10_000) -> list[Path]:
        """Write tar shards ``shard-000000.tar``, ... to a folder; returns their paths.

        Each item is ``000000000.npy``, its ids, and ``000000000.json``: key, meta, columns, tokenizer and fingerprint.

        Raises:
            ArgumentError: a column has no place in JSON, or the folder has shards beyond these.
            OutputError: a file cannot be written.
        """
        return exports.to_webdataset(self, Path(path), shard_items)

    def to_megatron(self, path: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write ``path.bin`` and ``path.idx``, the layout of Megatron's ``IndexedDataset``, each item a document.

        Ids are the tokenizer's own, as uint16 or int32; ``zoo pack`` puts them into a vocabulary.

        Raises:
            OutputError: a file cannot be written.
        """
        return exports.to_megatron(self, Path(path))

    def to_shar(self, path: str | os.PathLike[str], *, shard_items: int = 1000) -> dict[str, list[str]]:
        """Write Lhotse Shar: cuts of the durations of the recordings, with the ids as their array ``codes``.

        Raises:
            ArgumentError: items are no sound, or the folder has shards beyond these.
            MissingExtraError: lhotse is not installed.
        """
        return exports.to_shar(self, Path(path), shard_items)

    # ---- rows

    def _row_of(self, key: str) -> int:
        row = self.shelf.row_of(key)
        if row is None or (self.rows is not None and not np.any(self.rows == row)):
            raise IndexingError(f"no item has the key {key!r}")
        return row


def _require(header: Header, expect: Tokenizer[Any] | Spec | str) -> None:
    """Refuse the ids of another checkpoint."""
    if isinstance(expect, str):
        name, fingerprint = "the one expected", expect
    else:
        spec = expect if isinstance(expect, Spec) else expect.spec
        name, fingerprint = spec.name, spec.fingerprint
    if fingerprint != header.fingerprint:
        raise MismatchError(f"the tokens are those of {header.tokenizer} ({header.fingerprint}), not of {name} ({fingerprint})")

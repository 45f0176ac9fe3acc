"""A choice of items of a token data set, and how they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data._utils.collate import default_collate_fn_map

from zoo.engine.parts import Header
from zoo.engine.shelf import Block, Rows, Shelf
from zoo.errors import ArgumentError
from zoo.tokens import Tokens


@dataclass(frozen=True, eq=False)
class Item:
    """One item of a token data set.

    Attributes:
        key: its name in the data set.
        tokens: its ids, a batch of one; ``None`` if it failed.
        columns: what was carried over from the source.
        error: why it failed; ``None`` if it did not.
    """

    key: str
    tokens: Tokens | None
    columns: Mapping[str, Any]
    error: str | None = None


@dataclass(frozen=True, eq=False)
class Items:
    """Several items, as a ``torch.utils.data.DataLoader`` collates them.

    Attributes:
        keys: their names.
        tokens: their ids, one batch.
        columns: a value an item for each column.
    """

    keys: tuple[str, ...]
    tokens: Tokens
    columns: Mapping[str, tuple[Any, ...]]

    @classmethod
    def of(cls, items: Sequence[Item]) -> Items:
        """Collate items.

        Raises:
            ArgumentError: there is none, or one of them failed.
        """
        if not items:
            raise ArgumentError("there is no item to collate")
        if failed := next((item for item in items if item.tokens is None), None):
            raise ArgumentError(f"{failed.key} failed and has no tokens ({failed.error}): leave failures out")
        columns = {name: tuple(item.columns[name] for item in items) for name in items[0].columns}
        tokens = Tokens.cat([item.tokens for item in items if item.tokens is not None])
        return cls(tuple(item.key for item in items), tokens, columns)


# By which a DataLoader without a ``collate_fn`` of its own collates items.
default_collate_fn_map[Item] = lambda batch, *, collate_fn_map=None: Items.of(batch)


class Selection:
    """Items of a data set in some order.

    Attributes:
        shelf: the parts.
        columns: columns of the source that are read.
        rows: of the items; ``None`` for all of them in their order.
    """

    def __init__(self, shelf: Shelf, columns: tuple[str, ...], rows: Rows | None) -> None:
        self.shelf, self.columns, self.rows = shelf, columns, rows

    @property
    def header(self) -> Header:
        """Description of the parts, from the parts themselves."""
        return self.shelf.header

    def __len__(self) -> int:
        return len(self.shelf) if self.rows is None else len(self.rows)

    def __iter__(self) -> Iterator[Item]:
        names = self.names()
        for number, inside in self.shelf.runs(self.rows):
            block = self.shelf.block(number, names)
            yield from (self._item(block, row) for row in inside.tolist())

    def all_rows(self) -> Rows:
        """The rows of the items, counted over all parts."""
        return np.arange(len(self.shelf)) if self.rows is None else self.rows

    def names(self) -> tuple[str, ...]:
        """Columns of the parts that are read."""
        return ("key", "ids", "length", *self.shelf.meta, "segments", *self.columns, "error")

    def items(self, rows: Sequence[int] | Rows) -> Iterator[Item]:
        """Items by their rows in the parts, counted over all of them and with those that failed; their blocks are held."""
        names = self.names()
        numbers = np.asarray(rows, np.int64)
        blocks = self.shelf.blocks_of(numbers)
        inside = numbers - self.shelf.starts[blocks]
        held = {number: self.shelf.block(number, names) for number in np.unique(blocks).tolist()}
        for block, row in zip(blocks.tolist(), inside.tolist(), strict=True):
            yield self._item(held[block], row)

    def _item(self, block: Block, row: int) -> Item:
        columns = {name: block.value(name, row) for name in self.columns}
        error = block.value("error", row)
        key = block.value("key", row)
        if error is not None:
            return Item(key, None, columns, error)
        header, ids = self.shelf.header, block.ids(row)
        meta = {name: value for name in self.shelf.meta if (value := block.value(name, row)) is not None}
        tokens = Tokens.from_sequences(
            [torch.from_numpy(ids.astype(np.int64))],
            tokenizer=header.tokenizer,
            fingerprint=header.fingerprint,
            vocab_size=header.vocab_size,
            meta=(meta,) if self.shelf.meta else (),
            segments=tuple(block.value("segments", row) or ()),
            frame=header.frame,
        )
        return Item(key, tokens, columns)

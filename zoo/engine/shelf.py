"""The parts of a token data set as one long table that is read in blocks: which rows there are, and where."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from zoo.engine.parts import Header, carried_of, part_names, read_header
from zoo.engine.plan import FOLDER, Plan
from zoo.engine.store import Store
from zoo.errors import ArgumentError, FormatError, listing

Rows = NDArray[np.int64]

#: Files that are open at once.
_OPEN = 64
#: Blocks that stay in memory after they were read.
_HELD = 16


class Block:
    """The rows of one row group in memory."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self._lists: dict[str, list[Any]] = {}
        ids = table["ids"].combine_chunks() if "ids" in table.schema.names else pa.array([], pa.list_(pa.int32()))
        if isinstance(ids, pa.ChunkedArray):
            ids = pa.concat_arrays(ids.chunks)
        self.values: NDArray[Any] = ids.values.to_numpy(zero_copy_only=True)
        self.ends: NDArray[Any] = ids.offsets.to_numpy()

    def ids(self, row: int) -> NDArray[Any]:
        """The ids of a row; none where the item failed."""
        return self.values[self.ends[row] : self.ends[row + 1]]

    def value(self, column: str, row: int) -> Any:
        """One cell, as a plain value."""
        if column not in self._lists:
            self._lists[column] = self.table[column].to_pylist()
        return self._lists[column][row]


class Shelf:
    """All parts of a folder. Rows are counted over all of them, in the order of units.

    Files are opened by the process that reads, so that it may be handed to workers of any kind.

    Attributes:
        header: what the parts say about themselves, but for the unit.
        schema: columns of the parts.
        carried, meta: names of the columns that come from the source, and of those that tokens remember.
        starts: first row of every block, and the number of rows.
        amounts: ids in every block, about.

    Raises:
        ArgumentError: there are no parts, or some are still missing and ``partial`` does not allow it.
        FormatError: a part is damaged, or belongs to another run than the others.
    """

    def __init__(self, store: Store, partial: bool) -> None:
        self.store = store
        found = part_names(store.names())
        if not found:
            raise ArgumentError(f"{store.place} holds no parts of a token data set: zoo tokenize writes them")
        if not partial:
            _require_all(store, found)
        self._names = list(found.values())
        self._groups: list[tuple[int, int]] = []
        starts, amounts, failed = [0], [], list[int]()
        for part, name in enumerate(self._names):
            with store.open(name) as file:
                header, schema, metadata = read_header(file, store.path(name))
            if not part:
                self.header, self.schema = _common(header), schema.remove_metadata()
            elif _common(header) != self.header or not schema.remove_metadata().equals(self.schema):
                raise FormatError(f"{store.path(name)} belongs to another run than {store.path(self._names[0])}")
            places = {metadata.schema.column(i).path.partition(".")[0]: i for i in range(metadata.num_columns)}
            for number in range(metadata.num_row_groups):
                group = metadata.row_group(number)
                if not group.num_rows:
                    continue
                statistics = group.column(places["error"]).statistics
                if statistics is None or not statistics.has_null_count or statistics.null_count < group.num_rows:
                    failed.append(len(self._groups))
                self._groups.append((part, number))
                starts.append(starts[-1] + group.num_rows)
                amounts.append(group.column(places["ids"]).num_values)
        self.starts: Rows = np.array(starts, np.int64)
        self.amounts: Rows = np.array(amounts, np.int64)
        self.carried = carried_of(self.schema, self.header)
        # What later releases let tokens remember is not in the parts of earlier ones.
        self.meta = tuple(name for name in self.header.meta if name in self.schema.names)
        self._forget()
        self.failed: Rows = np.concatenate([np.empty(0, np.int64), *map(self._failed_rows, failed)])
        self._lengths: NDArray[np.int32] | None = None
        self._hashes: tuple[Rows, Rows] | None = None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        # Hashes of strings are other ones in another process.
        return vars(self) | {"_files": None, "_blocks": None, "_process": None, "_hashes": None}

    def _forget(self) -> None:
        self._files: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, tuple[str, ...]], Block] = OrderedDict()
        self._process = os.getpid()

    def _failed_rows(self, block: int) -> Rows:
        errors = self.block(block, ("error",)).table["error"]
        return self.starts[block] + np.flatnonzero(np.asarray(errors.is_valid()))

    def identity(self) -> str:
        """Marks that tell these parts from others: checkpoint, options, and rows of every block."""
        digest = hashlib.sha256(json.dumps([self.header.as_dict(), self._names], sort_keys=True).encode())
        digest.update(self.starts.tobytes())
        digest.update(self.amounts.tobytes())
        return digest.hexdigest()

    def paths(self) -> list[str]:
        """Places of the parts that have rows."""
        return [self.store.path(self._names[part]) for part in dict.fromkeys(part for part, _ in self._groups)]

    # ---- reading

    def blocks_of(self, rows: Rows) -> Rows:
        """The block of every row."""
        found: Rows = np.searchsorted(self.starts, rows, side="right") - 1
        return found

    def block(self, number: int, columns: Sequence[str]) -> Block:
        """A block with some of its columns; the last ones are kept.

        Raises:
            FormatError: the part is damaged, or gone.
        """
        if self._process != os.getpid():
            self._forget()
        key = (number, tuple(columns))
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return self._blocks[key]
        part, group = self._groups[number]
        try:
            table = self._file(part).read_row_group(group, columns=list(columns), use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise FormatError(f"{self.store.path(self._names[part])} is damaged, or was replaced: {error}") from error
        block = self._blocks[key] = Block(table)
        if len(self._blocks) > _HELD:
            self._blocks.popitem(last=False)
        return block

    def _file(self, part: int) -> pq.ParquetFile:
        if part in self._files:
            self._files.move_to_end(part)
            return self._files[part]
        name = self._names[part]
        local = self.store.local
        source = self.store.path(name) if local else self.store.open(name)
        file = self._files[part] = pq.ParquetFile(source, memory_map=local)
        if len(self._files) > _OPEN:
            self._files.popitem(last=False)[1].close(force=True)
        return file

    def runs(self, rows: Rows | None) -> Iterator[tuple[int, Rows]]:
        """Rows in their order, as runs within one block: its number, and rows counted from its first one."""
        if rows is None:
            for number, (start, end) in enumerate(pairwise(self.starts.tolist())):
                yield number, np.arange(end - start)
            return
        blocks = self.blocks_of(rows)
        cuts = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist(), len(rows)]
        for start, end in pairwise(cuts):
            if end > start:
                number = int(blocks[start])
                yield number, rows[start:end] - self.starts[number]

    def tables(self, rows: Rows | None, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Columns of rows in their order, one table for each run."""
        for number, inside in self.runs(rows):
            table = self.block(number, columns).table
            yield table if rows is None or np.array_equal(inside, np.arange(len(table))) else table.take(inside)

    def lengths(self) -> NDArray[np.int32]:
        """Number of ids of every row; -1 where the item failed."""
        if self._lengths is None:
            pieces = [table["length"].fill_null(-1).to_numpy() for table in self.tables(None, ("length",))]
            self._lengths = np.concatenate([np.empty(0, np.int32), *pieces])
        return self._lengths

    def row_of(self, key: str) -> int | None:
        """The row of a key; ``None`` if there is none."""
        if self._hashes is None or self._process != os.getpid():
            found = np.empty(len(self), np.int64)
            start = 0
            for table in self.tables(None, ("key",)):
                found[start : start + len(table)] = list(map(hash, table["key"].to_pylist()))
                start += len(table)
            order = np.argsort(found, kind="stable")
            self._hashes = found[order], order
        hashes, order = self._hashes
        first, last = np.searchsorted(hashes, hash(key)), np.searchsorted(hashes, hash(key), side="right")
        for row in order[first:last].tolist():
            [block] = self.blocks_of(np.array([row])).tolist()
            if self.block(block, ("key",)).value("key", row - int(self.starts[block])) == key:
                return int(row)
        return None


def _common(header: Header) -> Header:
    """What the parts of a run have in common: they may have been made on other devices."""
    return replace(header, unit=0, batch_exact=True)


def _require_all(store: Store, found: dict[int, str]) -> None:
    units = max(found) + 1
    if FOLDER in store.names() and (plan := Plan.read(store)) is not None:
        units = max(units, plan.units)
    if missing := [str(unit) for unit in range(units) if unit not in found]:
        raise ArgumentError(
            f"{store.place} lacks {len(missing)} of {units} parts, those of the units {listing(missing)}: run the same "
            "zoo tokenize command again, or pass partial=True"
        )

"""The plan of a run: what is to be done, written once, before anything is."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from zoo.engine.parts import Header, part_names
from zoo.engine.sources import Carried, Listing, Row
from zoo.engine.store import Store, is_temporary
from zoo.errors import ArgumentError, FormatError, ZooError, listing, output_error

FOLDER = "_plan"
NAME = f"{FOLDER}/plan.json"
FAILURES = "failures.parquet"
VERSION = 1

#: Rows after which a row group of the listing may end; it ends with a unit.
_GROUP = 1 << 14
#: Items of the first units where units grow, and the share of all earlier items that a later one has.
_FIRST_ITEMS, _SHARE = 16, 64
_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("unit", pa.int32(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        # As bytes, because the name of a file need not be text.
        pa.field("place", pa.binary(), nullable=False),
        *(pa.field(name, pa.int64(), nullable=False) for name in ("offset", "size", "group", "row", "bytes")),
        pa.field("stamp", pa.string(), nullable=False),
        pa.field("more", pa.string(), nullable=False),
        pa.field("broken", pa.string()),
    ]
)
_FIELDS = tuple(field.name for field in fields(Row))


@dataclass(frozen=True)
class Listed:
    """One listing of a plan: the first, or one by which it was extended.

    Attributes:
        file: its name.
        rows, bytes: items in it, and about how many bytes they are.
        first, units: its units.
        sha256: of the file.
    """

    file: str
    rows: int
    bytes: int
    first: int
    units: int
    sha256: str


@dataclass(frozen=True)
class Plan:
    """Work of a run.

    Attributes:
        header: what its parts say about themselves.
        identity: what a run must have in common with an earlier one in the same folder.
        sources: that were listed.
        carried: columns that are carried over.
        unit_items, unit_bytes: where units end.
        growing: whether the first units are smaller; see `_is_full`.
        loaded: the name by which the tokenizer was loaded; empty if it was handed over.
        listings: what was listed.
    """

    header: Header
    identity: Mapping[str, Any]
    sources: tuple[str, ...]
    carried: tuple[Carried, ...]
    unit_items: int
    unit_bytes: int
    loaded: str = ""
    listings: tuple[Listed, ...] = ()
    growing: bool = False

    @property
    def units(self) -> int:
        """Number of units."""
        return sum(listed.units for listed in self.listings)

    @property
    def items(self) -> int:
        """Number of items."""
        return sum(listed.rows for listed in self.listings)

    @property
    def digest(self) -> str:
        """Identity of the plan: of the checkpoint, the options, the format and the listings."""
        content = [self.identity, [listed.sha256 for listed in self.listings], self.unit_items, self.unit_bytes]
        content += ["growing"] if self.growing else []
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def carried_schema(self) -> pa.Schema:
        """The columns that are carried over, as they are in the parts."""
        return pa.schema([(column.column, column.type) for column in self.carried])

    # ---- the file

    def write(self, store: Store) -> None:
        """Write the plan; from then on the run exists."""
        schema = pa.schema([(column.name, column.type) for column in self.carried])
        content = {
            "version": VERSION,
            "digest": self.digest,
            "header": self.header.as_dict(),
            "identity": dict(self.identity),
            "sources": list(self.sources),
            "carried": [column.column for column in self.carried],
            "carried_schema": base64.b64encode(schema.serialize().to_pybytes()).decode(),
            "unit_items": self.unit_items,
            "unit_bytes": self.unit_bytes,
            "growing": self.growing,
            "loaded": self.loaded,
            "listings": [asdict(listed) for listed in self.listings],
        }
        store.write(NAME, (json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def read(cls, store: Store) -> Plan | None:
        """The plan in a folder, if there is one.

        Raises:
            FormatError: it is damaged or of another version.
            ArgumentError: the folder holds something else.
        """
        try:
            content = json.loads(store.read(NAME))
        except FileNotFoundError:
            others = [name for name in store.names() if name != FOLDER and not is_temporary(name)]
            if others:
                raise ArgumentError(
                    f"{store.place} holds other things ({listing(others, 3)}): choose a folder that is empty or new"
                ) from None
            return None
        except NotADirectoryError as error:
            raise ArgumentError(f"{store.place} is a file: the output must be a folder") from error
        except ValueError as error:
            raise FormatError(f"{store.path(NAME)} is damaged: {error}") from error
        try:
            if content["version"] != VERSION:
                raise FormatError(f"{store.path(NAME)} is of version {content['version']}, not {VERSION}: update the library")
            schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(content["carried_schema"])))
            return cls(
                Header.from_dict(content["header"]),
                content["identity"],
                tuple(content["sources"]),
                tuple(Carried(field.name, name, field.type) for name, field in zip(content["carried"], schema, strict=True)),
                content["unit_items"],
                content["unit_bytes"],
                content["loaded"],
                tuple(Listed(**listed) for listed in content["listings"]),
                content.get("growing", False),
            )
        except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(f"{store.path(NAME)} is damaged: {error}") from error

    # ---- units

    def done(self, store: Store) -> dict[int, str]:
        """The parts that are there, by unit.

        Raises:
            FormatError: one belongs to no unit of the plan.
        """
        found = part_names(store.names())
        if found and max(found) >= self.units:
            raise FormatError(f"{store.path(found[max(found)])} is no part of the plan, which has {self.units} units")
        return found

    def rows(self, store: Store, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[Row]]]:
        """The rows of the wanted units, in order; memory holds one row group of the listing."""
        for listed in self.listings:
            if not any(map(wanted, range(listed.first, listed.first + listed.units))):
                continue
            with store.open(f"{FOLDER}/{listed.file}") as file:
                table = pq.ParquetFile(file)
                place = table.schema_arrow.names.index("unit")
                for group in range(table.num_row_groups):
                    units = table.metadata.row_group(group).column(place).statistics
                    if any(map(wanted, range(units.min, units.max + 1))):
                        rows = table.read_row_group(group, use_threads=False)
                        for unit, run in groupby(_as_rows(rows), key=attrgetter("unit")):
                            if wanted(unit):
                                yield unit, [numbered.row for numbered in run]

    def keys(self, store: Store) -> Iterator[pa.RecordBatch]:
        """``key``, ``unit``, ``size`` and ``stamp`` of all items, in order."""
        for listed in self.listings:
            with store.open(f"{FOLDER}/{listed.file}") as file:
                columns = ["key", "unit", "place", "bytes", "stamp", "more"]
                yield from pq.ParquetFile(file).iter_batches(batch_size=_GROUP, columns=columns, use_threads=False)


@dataclass(frozen=True, slots=True)
class _Numbered:
    unit: int
    row: Row


def _as_rows(table: pa.Table) -> Iterator[_Numbered]:
    columns = {name: table[name].to_pylist() for name in table.schema.names}
    columns["place"] = [os.fsdecode(place) for place in columns["place"]]
    for unit, values in zip(columns["unit"], zip(*(columns[name] for name in _FIELDS), strict=True), strict=True):
        yield _Numbered(unit, Row(*values))


def create(store: Store, plan: Plan, found: Listing) -> Plan:
    """List sources and write the plan of a new run.

    Raises:
        ArgumentError: two items have one key, or a source cannot be listed; nothing is written.
    """
    with _naming_output(store):
        listed = _write_listing(store, "listing.parquet", found, plan, 0, _Known())
    if listed is None:
        raise ArgumentError("the sources are empty")
    plan = replace(plan, carried=found.carried(), listings=(listed,))
    plan.write(store)
    return plan


def extend(store: Store, plan: Plan, sources: Sequence[str], found: Listing) -> tuple[Plan, list[str]]:
    """List sources again and add what is new in units at the end.

    Returns:
        The plan, and the keys of up to 20 items that vanished from the sources.

    Raises:
        ArgumentError: an item has changed, or the new items do not suit the old ones; nothing is written.
    """
    known = _Known()
    for batch in plan.keys(store):
        known.add(batch)
    known.freeze()
    file = f"listing-{len(plan.listings):04d}.parquet"
    with _naming_output(store):
        listed = _write_listing(store, file, found, plan, plan.units, known)
    if known.changed:
        raise ArgumentError(
            f"{known.changes} items have changed since they were listed, such as {listing(known.changed)}: "
            "their tokens are those of the old content. Put them back, or tokenize into another folder with --new"
        )
    carried = found.carried()
    if listed is not None and (other := [column.name for column in carried if column not in plan.carried]):
        raise ArgumentError(f"the column {other[0]!r} of the new items is not one of the earlier ones, or has another type")
    if listed is not None:
        plan = replace(plan, sources=tuple(sources), listings=(*plan.listings, listed))
        plan.write(store)
    elif tuple(sources) != plan.sources:
        plan = replace(plan, sources=tuple(sources))
        plan.write(store)
    return plan, known.vanished(plan, store)


class _Known:
    """Which items were listed before, by hashes: 24 bytes an item."""

    def __init__(self) -> None:
        self._keys, self._contents = array("q"), array("q")
        self.changed: list[str] = []
        self.changes = 0

    def add(self, batch: pa.RecordBatch) -> None:
        for key, size, stamp, more in zip(
            *(batch.column(name).to_pylist() for name in ("key", "bytes", "stamp", "more")), strict=True
        ):
            self._keys.append(hash(key))
            self._contents.append(hash((size, stamp, more)))

    def freeze(self) -> None:
        keys, contents = np.frombuffer(self._keys, np.int64), np.frombuffer(self._contents, np.int64)
        order = np.argsort(keys, kind="stable")
        self._sorted, self._sorted_contents = keys[order], contents[order]
        self._seen = np.zeros(len(keys), bool)

    def has(self, row: Row) -> bool:
        """Whether an item was listed; one that has changed since is remembered."""
        if not len(self._keys):
            return False
        place = int(np.searchsorted(self._sorted, wanted := hash(row.key)))
        if place == len(self._sorted) or self._sorted[place] != wanted:
            return False
        self._seen[place] = True
        if self._sorted_contents[place] != hash((row.bytes, row.stamp, row.more)):
            self.changes += 1
            if len(self.changed) < 5:
                self.changed.append(row.key)
        return True

    def vanished(self, plan: Plan, store: Store, most: int = 20) -> list[str]:
        missing = set(self._sorted[~self._seen].tolist())
        found: list[str] = []
        for batch in plan.keys(store) if missing else ():
            found += [key for key in batch.column("key").to_pylist() if hash(key) in missing]
            if len(found) >= most:
                break
        return found[:most]


def _write_listing(store: Store, file: str, found: Iterable[Row], plan: Plan, first: int, known: _Known) -> Listed | None:
    """Write what is new in a listing; ``None`` if nothing is."""
    hashes = array("q")
    rows: list[Row] = []
    units: list[int] = []
    unit = first
    items = size = total = 0
    with tempfile.TemporaryDirectory(dir=_scratch(store), prefix=".listing-", suffix=".part") as scratch:
        path = Path(scratch) / file
        with pq.ParquetWriter(path, _SCHEMA, compression="zstd", version="2.6") as writer:
            for row in found:
                if known.has(row):
                    continue
                if items and _is_full(items, size, row, rows[-1] if rows else None, plan, len(hashes) - items):
                    unit, items, size = unit + 1, 0, 0
                    if len(rows) >= _GROUP:
                        writer.write_batch(_as_batch(rows, units), row_group_size=len(rows))
                        rows, units = [], []
                rows.append(row)
                units.append(unit)
                hashes.append(hash(row.key))
                items, size, total = items + 1, size + row.bytes, total + row.bytes
            if rows:
                writer.write_batch(_as_batch(rows, units), row_group_size=len(rows))
        if not hashes or known.changed:
            return None
        _require_unique(path, np.frombuffer(hashes, np.int64))
        with path.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        store.adopt(path, f"{FOLDER}/{file}")
    return Listed(file, len(hashes), total, first, unit + 1 - first, digest)


@contextmanager
def _naming_output(store: Store) -> Iterator[None]:
    """Errors of the system while a listing is written; those of sources have names of their own by then."""
    try:
        yield
    except ZooError:
        raise
    except OSError as error:
        raise output_error(store.path(FOLDER), error) from error


def _scratch(store: Store) -> str | None:
    """A folder beside the result, where it is on a disk."""
    if not store.local:
        return None
    os.makedirs(store.path(FOLDER), exist_ok=True)
    return store.path(FOLDER)


def _is_full(items: int, size: int, row: Row, before: Row | None, plan: Plan, earlier: int) -> bool:
    """Whether a unit ends before a row; where it may, with a row group, which is read as a whole.

    Units grow with the items of earlier ones if no size was asked for: results come soon, and at the end no worker has much
    more to do than another, whatever the size of the data set.
    """
    most = min(plan.unit_items, max(_FIRST_ITEMS, earlier // _SHARE)) if plan.growing else plan.unit_items
    if items >= most or size + row.bytes > plan.unit_bytes:
        return True
    new_group = row.kind == "row" and before is not None and (before.place, before.group) != (row.place, row.group)
    return new_group and (2 * items >= most or 2 * size >= plan.unit_bytes)


def _as_batch(rows: list[Row], units: list[int]) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in _FIELDS}
    columns["place"] = [os.fsencode(place) for place in columns["place"]]
    columns["unit"] = units
    return pa.record_batch([pa.array(columns[field.name], field.type) for field in _SCHEMA], schema=_SCHEMA)


def _require_unique(path: Path, hashes: NDArray[Any]) -> None:
    """Refuse two rows with one key; hashes say where to look."""
    ordered = np.sort(hashes)
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not suspects:
        return
    seen: dict[str, str] = {}
    for batch in pq.ParquetFile(path).iter_batches(columns=["key", "place", "kind"]):
        for key, place, kind in zip(*(batch.column(i).to_pylist() for i in range(3)), strict=True):
            if hash(key) not in suspects:
                continue
            place = os.fsdecode(place)
            if key in seen:
                if seen[key] != place:
                    places = f"{seen[key]} and {place}"
                    raise ArgumentError(f"two items have the key {key!r}, {places}: pass the folder above both as one source")
                inside = " or holds two items of that name" if kind in ("record", "range", "cut") else ""
                raise ArgumentError(f"two items have the key {key!r}: {place} is named twice{inside}")
            seen[key] = place

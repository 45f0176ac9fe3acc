"""Content of a folder of parts, and whether it is what was planned."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from zoo.engine.contents import Contents, SourceError
from zoo.engine.parts import Header, failures_in, part_name, part_names, read_header, schema_of
from zoo.engine.plan import FAILURES, NAME, Plan
from zoo.engine.sources import Row
from zoo.engine.store import Store
from zoo.errors import ArgumentError, FormatError
from zoo.modality import modality

#: Bytes that are read ahead when items are encoded again.
_BUDGET = 64 << 20


@dataclass(frozen=True)
class Totals:
    """Counts over the parts that are there.

    Attributes:
        parts, items, failures: how many.
        failed: units with failures.
    """

    parts: int
    items: int
    failures: int
    failed: tuple[int, ...]


def totals_of(store: Store) -> Totals:
    """Counts from the last bytes of every part.

    Raises:
        FormatError: a part is damaged.
    """
    items = failures = 0
    failed = []
    parts = part_names(store.names())
    for unit, name in parts.items():
        with store.open(name) as file:
            _, _, metadata = read_header(file, store.path(name))
        count = failures_in(metadata)
        if count is None:
            count = sum(1 for _ in _failures_of(store, unit))
        items, failures = items + metadata.num_rows, failures + count
        if count:
            failed.append(unit)
    return Totals(len(parts), items, failures, tuple(failed))


def _failures_of(store: Store, unit: int) -> Iterator[dict[str, Any]]:
    for row in _read(store, unit, ["key", "error"]).to_pylist():
        if row["error"] is not None:
            yield {"key": row["key"], "unit": unit, "error": row["error"]}


def _read(store: Store, unit: int, columns: list[str] | None = None) -> pa.Table:
    """A part, or some of its columns.

    Raises:
        FormatError: it is damaged.
    """
    name = part_name(unit)
    try:
        with store.open(name) as file:
            return pq.ParquetFile(file).read(columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise FormatError(
            f"{store.path(name)} is damaged ({error}): delete it, and the command that wrote it makes it anew"
        ) from error


def write_failures(store: Store, totals: Totals) -> None:
    """List the items that failed in a file of their own; there is none if none did."""
    if not totals.failed:
        store.remove(FAILURES)
        return
    schema = pa.schema([("key", pa.string()), ("unit", pa.int32()), ("error", pa.string())])
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema, compression="zstd", version="2.6") as writer:
        for unit in totals.failed:
            writer.write_table(pa.Table.from_pylist(list(_failures_of(store, unit)), schema))
    store.write(FAILURES, sink.getvalue())


def plan_in(store: Store) -> Plan:
    """The plan of a folder.

    Raises:
        ArgumentError: there is none.
    """
    if part_names(store.names()) and NAME.partition("/")[0] not in store.names():
        raise ArgumentError(f"{store.place} has parts, but not the plan that they were made by")
    try:
        plan = Plan.read(store)
    except ArgumentError as error:
        raise ArgumentError(f"{store.place} holds other things, and no token data set") from error
    if plan is None:
        raise ArgumentError(f"{store.place} holds no token data set")
    return plan


def described(store: Store) -> dict[str, Any]:
    """Description of a folder of parts: counts, failures, sizes, identity.

    Raises:
        ArgumentError: there are no parts, and no plan of any.
        FormatError: a part is damaged.
    """
    parts = part_names(store.names())
    plan = None if parts and NAME.partition("/")[0] not in store.names() else plan_in(store)
    totals = totals_of(store)
    header = plan.header if plan else _header(store, next(iter(parts.values())))
    ids, extent = 0, 0.0
    kind = modality(header.modality)
    size = 0
    for unit, name in parts.items():
        table = _read(store, unit, ["length", *(header.meta if kind.extent_unit else ())])
        ids += pc.sum(table["length"]).as_py() or 0
        if kind.extent_unit:
            extent += sum(map(kind.extent, table.drop_columns(["length"]).to_pylist()))
        size += store.size(name)
    content: dict[str, Any] = {
        "tokenizer": header.tokenizer,
        "fingerprint": header.fingerprint,
        "modality": header.modality,
        "options": dict(header.options),
        "items": totals.items,
        "failures": totals.failures,
        "ids": ids,
        "parts": totals.parts,
        "bytes": size,
    }
    if kind.extent_unit:
        content[kind.extent_unit] = round(extent, 4)
    if plan is not None:
        content |= {"units": plan.units, "items_planned": plan.items, "sources": list(plan.sources), "digest": plan.digest}
    return content


def _header(store: Store, name: str) -> Header:
    with store.open(name) as file:
        return read_header(file, store.path(name))[0]


def problems(store: Store, plan: Plan) -> Iterator[str]:
    """Faults of the parts, unit by unit; nothing if every row of the listing is there once, sound and in order."""
    done = plan.done(store)
    for unit, rows in plan.rows(store, lambda _: True):
        if unit not in done:
            yield f"unit {unit} is not done: {len(rows)} items, from {rows[0].key} on"
            continue
        try:
            table = _read(store, unit)
            with store.open(done[unit]) as file:
                header, schema, _ = read_header(file, store.path(done[unit]))
        except FormatError as error:
            yield str(error)
            continue
        yield from (f"{store.path(done[unit])}: {what}" for what in _problems_of(table, header, schema, rows, plan, unit))


def _problems_of(table: pa.Table, header: Header, schema: pa.Schema, rows: list[Row], plan: Plan, unit: int) -> Iterator[str]:
    if replace(header, batch_exact=plan.header.batch_exact) != replace(plan.header, unit=unit):
        yield f"it says {header}, the plan {replace(plan.header, unit=unit)}"
        return
    if not schema.equals(schema_of(header, plan.carried_schema)):
        yield f"its columns are {listing_of(schema)}, not those of the plan"
        return
    if table["key"].to_pylist() != [row.key for row in rows]:
        yield f"its rows are not those of the listing: {table.num_rows} instead of {len(rows)}, or others"
        return
    ids, errors = table["ids"].combine_chunks(), table["error"]
    wrong = np.flatnonzero(np.asarray(pc.equal(ids.is_null(), pc.is_null(errors))))
    if len(wrong):
        yield f"{rows[wrong[0]].key} has both ids and an error, or neither"
    lengths = pc.list_value_length(ids)
    if not lengths.equals(table["length"].combine_chunks()):
        yield "lengths are not those of the ids"
    values = ids.flatten()
    if len(values) and not 0 <= pc.min(values).as_py() <= pc.max(values).as_py() < header.vocab_size:
        yield f"ids are outside the vocabulary of {header.vocab_size}"


def listing_of(schema: pa.Schema) -> str:
    """Columns with their types, for messages."""
    return ", ".join(f"{column.name}: {column.type}" for column in schema)


def recomputed(store: Store, plan: Plan, count: int, tokenizer: Any) -> Iterator[tuple[str, str | None]]:
    """Encode a sample of items again, each alone: keys, with what is wrong, or ``None``.

    Args:
        store: of the parts.
        plan: of the parts.
        count: items that are drawn; the same ones every time. Failed ones are not among them.
        tokenizer: the one that made them.
    """
    from zoo.engine.unit import split_options

    if tokenizer.spec.fingerprint != plan.header.fingerprint:
        raise ArgumentError(
            f"the tokens are those of {plan.header.tokenizer} ({plan.header.fingerprint}), not of {tokenizer.spec.name} "
            f"({tokenizer.spec.fingerprint})"
        )
    preparing, encoding = split_options(tokenizer, plan.header.options)
    for unit, chosen in _sample(store, plan, count).items():
        [(_, rows)] = islice(plan.rows(store, unit.__eq__), 1)
        ids = _read(store, unit, ["ids"])["ids"]
        medium = modality(plan.header.modality)
        contents = Contents([rows[i] for i in chosen], (), medium, budget=_BUDGET, patience=0.0, accept_missing=False)
        try:
            for place, content in zip(chosen, contents, strict=True):
                prepared = tokenizer.prepare([content.content], **preparing)
                [again] = tokenizer.encode_prepared(prepared, **encoding).tolist()
                kept = ids[place].as_py()
                where = next(
                    (i for i, (a, b) in enumerate(zip(again, kept, strict=False)) if a != b), min(len(again), len(kept))
                )
                same = again == kept
                reason = None if same else f"{len(again)} ids instead of {len(kept)}, the first other one at {where}"
                yield rows[place].key, reason
        except SourceError as error:
            yield rows[chosen[0]].key, error.reason


def _sample(store: Store, plan: Plan, count: int) -> Mapping[int, list[int]]:
    """Places of items by unit, evenly drawn among those that did not fail."""
    done = plan.done(store)
    sound = {unit: np.flatnonzero(np.asarray(pc.is_null(_read(store, unit, ["error"])["error"]))) for unit in done}
    total = sum(map(len, sound.values()))
    drawn = iter(sorted(random.Random(plan.digest).sample(range(total), min(count, total))))
    chosen: dict[int, list[int]] = {}
    start, position = 0, next(drawn, None)
    for unit, places in sound.items():
        while position is not None and position < start + len(places):
            chosen.setdefault(unit, []).append(int(places[position - start]))
            position = next(drawn, None)
        start += len(places)
    return chosen

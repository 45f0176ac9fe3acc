"""Contents: the bytes of a unit's items, read ahead by threads within a number of bytes."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from threading import Lock
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from zoo.engine import shar
from zoo.engine.packed import is_packed, opened, set_aside, taken_up
from zoo.engine.places import beside, patiently, places_of
from zoo.engine.sources import HALF, Carried, Row, arrow_batches, is_item
from zoo.engine.store import is_url
from zoo.errors import InputError
from zoo.modality import Modality

#: Files that are read at once; those behind a network wait more than they work.
THREADS = {False: 4, True: 16}
#: Bytes of a table that are held at once.
_BATCH = 32 << 20


class SourceError(InputError):
    """A source is not what was listed: it vanished, changed, or cannot be reached."""


class Content(NamedTuple):
    """One item as it was read.

    Attributes:
        place: of the item in the unit.
        content: the bytes of its media, a text, or samples and their rate; ``None`` if it cannot be read: ``broken`` says why.
        carried: values of the columns that are carried over.
    """

    place: int
    content: bytes | str | tuple[Any, int] | None
    carried: Mapping[str, Any]
    broken: str | None = None


class Contents:
    """The items of a unit, in their order.

    Args:
        rows: of the listing.
        carried: columns that are carried over.
        medium: kind of media.
        budget: bytes that are read ahead; a single item may be larger.
        patience: seconds to wait for a file while its file system is away.
        accept_missing: items that vanished count as broken.

    Raises:
        SourceError: while iterating, of a source that is not what was listed.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        carried: Sequence[Carried],
        medium: Modality,
        *,
        budget: int,
        patience: float,
        accept_missing: bool,
    ) -> None:
        self.rows, self.carried, self.medium = rows, carried, medium
        self.budget, self.patience, self.accept_missing = budget, patience, accept_missing
        self._nothing = {column.column: None for column in carried}
        self._lock = Lock()
        self._packed: dict[tuple[str, str], Any] = {}
        self._manifests: dict[str, tuple[int, bytes]] = {}
        self._checked: set[str] = set()

    def __iter__(self) -> Iterator[Content]:
        try:
            for (kind, place, group), run in groupby(enumerate(self.rows), key=_together):
                if kind == "row":
                    yield from self._of_table(place, group, list(run))
                else:
                    yield from self._ahead(list(run))
        finally:
            for (place, stamp), file in self._packed.items():
                set_aside(place, stamp, file)

    def _ahead(self, run: list[tuple[int, Row]]) -> Iterator[Content]:
        # What is packed is read from its beginning to its end.
        packed = any(row.kind in ("range", "record") and is_packed(row.place) for _, row in run)
        far = any(is_url(row.place) or (row.kind == "line" and "://" in row.more) for _, row in run)
        threads = 1 if packed else THREADS[far]
        pending: deque[tuple[Row, Future[Content]]] = deque()
        held = 0
        with ThreadPoolExecutor(threads) as pool:
            try:
                for index, row in run:
                    while pending and (held + row.bytes > self.budget or len(pending) >= 8 * threads):
                        first, future = pending.popleft()
                        yield future.result()
                        held -= first.bytes
                    pending.append((row, pool.submit(self._read, index, row)))
                    held += row.bytes
                while pending:
                    yield pending.popleft()[1].result()
            finally:
                for _, future in pending:
                    future.cancel()

    def _read(self, index: int, row: Row) -> Content:
        carried = self._carried(row)
        if row.broken is not None:
            return Content(index, None, carried, row.broken)
        if row.kind == "value":
            return Content(index, json.loads(self._line(row))[row.more], carried)
        if row.kind == "line":
            media, stamp = json.loads(row.more)
            return self._checked_read(index, media, row.bytes, stamp, carried, whole=True)
        if row.kind == "file":
            return self._checked_read(index, row.place, row.size, row.stamp, carried, whole=True)
        with self._lock:
            self._check_once(row)
        found = self._checked_read(index, row.place, row.size, row.stamp, carried, whole=False, offset=row.offset)
        if row.kind == "record":
            return self._record(found)
        return self._cut(found, json.loads(row.more)["part"]) if row.kind == "cut" else found

    @staticmethod
    def _cut(found: Content, part: Any) -> Content:
        """The part of a recording that is the item."""
        if part is None or not isinstance(found.content, bytes):
            return found
        try:
            return found._replace(content=shar.taken_out(found.content, *part))
        except Exception as error:
            # The library raises errors of many kinds, and plain ones.
            return found._replace(
                content=None, broken=f"its part of the recording cannot be read: {' '.join(str(error).split())}"
            )

    def _record(self, found: Content) -> Content:
        """The item of a record, and the columns that it has."""
        if not isinstance(found.content, bytes):
            return found
        try:
            item, columns = self.medium.home("media").record(found.content)
        except InputError as error:
            return found._replace(content=None, broken=error.reason)
        carried = {column.column: columns.get(column.name) for column in self.carried}
        return found._replace(content=item, carried=carried)

    def _checked_read(
        self, index: int, place: str, size: int, stamp: str, carried: Mapping[str, Any], *, whole: bool, offset: int = 0
    ) -> Content:
        places = places_of(place)

        def read() -> bytes:
            if whole:
                if places.status(place) != (size, stamp):
                    raise SourceError(f"{place} has changed since it was listed")
                return places.read(place)
            if is_packed(place):
                with self._lock:
                    return self._unpacked(place, stamp, offset, size)
            return places.read(place, offset, size)

        try:
            content = patiently(read, self.patience, _folder_of(place))
        except PermissionError as error:
            return Content(index, None, carried, f"it cannot be read: {error.strerror or error}")
        except FileNotFoundError as error:
            if self.accept_missing:
                return Content(index, None, carried, "it vanished after it was listed")
            raise SourceError(f"{place} has vanished since it was listed") from error
        except OSError as error:
            raise SourceError(f"{place} cannot be read: {error.strerror or error}") from error
        if len(content) != size:
            raise SourceError(f"{place} has changed since it was listed: {len(content)} bytes instead of {size}")
        return Content(index, content, carried)

    def _unpacked(self, place: str, stamp: str, offset: int, size: int) -> bytes:
        """A range of what is packed; going forward costs least."""
        key = (place, stamp)
        if key not in self._packed:
            self._packed[key] = taken_up(place, stamp) or opened(place, places_of(place))
        self._packed[key].seek(offset)
        content: bytes = self._packed[key].read(size)
        return content

    def _check_once(self, row: Row) -> None:
        """Make sure that a file of many items is the one that was listed."""
        if row.place in self._checked:
            return
        try:
            _, stamp = patiently(lambda: places_of(row.place).status(row.place), self.patience, _folder_of(row.place))
        except OSError as error:
            reason = "has vanished" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"
            raise SourceError(f"{row.place} {reason} since it was listed") from error
        if stamp != row.stamp:
            raise SourceError(f"{row.place} has changed since it was listed")
        self._checked.add(row.place)

    # ---- columns that are carried over

    def _carried(self, row: Row) -> Mapping[str, Any]:
        if not self.carried or row.kind in ("file", "record"):
            return self._nothing
        if row.kind == "range":
            kept = json.loads(row.more) if row.more else {}
            return self._nothing | {
                column.column: self._text(row, *kept[column.name]) for column in self.carried if column.name in kept
            }
        if row.kind == "cut":
            kept = json.loads(row.more)["kept"]
            return {column.column: fitted(kept.get(column.name), column.type) for column in self.carried}
        if not row.size:
            return self._nothing
        try:
            content = json.loads(self._line(row))
        except ValueError:
            return self._nothing
        if not isinstance(content, dict):
            return self._nothing
        return {column.column: fitted(content.get(column.name), column.type) for column in self.carried}

    def _text(self, row: Row, offset: int, size: int) -> str:
        if is_packed(row.place):
            with self._lock:
                content = self._unpacked(row.place, row.stamp, offset, size)
        else:
            content = places_of(row.place).read(row.place, offset, size)
        return content.decode("utf-8", "replace")

    def _line(self, row: Row) -> bytes:
        """A line of a manifest; the unit's lines are read at once."""
        with self._lock:
            self._check_once(row)
            if row.place not in self._manifests:
                spans = [(other.offset, other.offset + other.size) for other in self.rows if other.place == row.place]
                start, end = min(first for first, _ in spans), max(last for _, last in spans)
                if is_packed(row.place):
                    block = self._unpacked(row.place, row.stamp, start, end - start)
                else:
                    block = places_of(row.place).read(row.place, start, end - start)
                self._manifests[row.place] = start, block
            start, block = self._manifests[row.place]
            return block[row.offset - start : row.offset - start + row.size]

    # ---- tables

    def _of_table(self, place: str, group: int, run: list[tuple[int, Row]]) -> Iterator[Content]:
        self._check_once(run[0][1])
        column, first, last = run[0][1].more, run[0][1].row, run[-1][1].row
        index = run[0][0]
        size = max(1, min(256, _BATCH // max(1, run[0][1].bytes)))
        try:
            for start, batch in self._batches(place, group, [column, *(carried.name for carried in self.carried)], size):
                low, high = max(first - start, 0), min(last + 1 - start, batch.num_rows)
                if low >= high:
                    if start > last:
                        break
                    continue
                batch = batch.slice(low, high - low)
                kept = {
                    carried.column: batch.column(carried.name).to_pylist()
                    if carried.name in batch.schema.names
                    else [None] * batch.num_rows
                    for carried in self.carried
                }
                for row, value in enumerate(batch.column(column)):
                    columns = {name: values[row] for name, values in kept.items()}
                    yield self._of_value(index, value.as_py(), place, column, columns)
                    index += 1
        except pa.ArrowException as error:
            raise SourceError(f"{place} cannot be read as a table: {error}") from error
        except OSError as error:
            raise SourceError(f"{place} cannot be read: {error}") from error
        if index <= run[-1][0]:
            raise SourceError(f"{place} has changed since it was listed: rows are missing")

    @staticmethod
    def _batches(place: str, group: int, columns: list[str], size: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Record batches of a row group, each with the number of its first row."""
        places = places_of(place)
        if place.lower().endswith(".parquet"):
            start = 0
            with places.open(place) as file:
                table = pq.ParquetFile(file, pre_buffer=is_url(place))
                there = [name for name in columns if name in table.schema_arrow.names]
                for batch in table.iter_batches(batch_size=size, row_groups=[group], columns=there, use_threads=False):
                    yield start, batch
                    start += batch.num_rows
        else:
            for number, batch in enumerate(arrow_batches(place, places)):
                if number == group:
                    yield 0, batch
                    return

    def _of_value(self, index: int, value: Any, place: str, column: str, carried: Mapping[str, Any]) -> Content:
        """What a cell holds: a text, bytes, a path, or either of the two."""
        if isinstance(value, str) and is_item(column, self.medium):
            return Content(index, value, carried)
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, bytes):
            return Content(index, value, carried)
        if not isinstance(value, str) or not value:
            return Content(index, None, carried, "the column holds nothing for it")
        media = beside(place, value)
        places = places_of(media)
        try:
            return Content(index, patiently(lambda: places.read(media), self.patience, _folder_of(media)), carried)
        except FileNotFoundError:
            return Content(index, None, carried, f"{value} does not exist")
        except PermissionError as error:
            return Content(index, None, carried, f"{value} cannot be read: {error.strerror or error}")


def _together(pair: tuple[int, Row]) -> tuple[str, str, int]:
    """What is read in one go: the rows of a row group, or anything that threads read ahead."""
    row = pair[1]
    return ("row", row.place, row.group) if row.kind == "row" else ("", "", 0)


def _folder_of(place: str) -> str:
    return place.rpartition("/")[0] or "/"


def fitted(value: Any, kind: pa.DataType) -> Any:
    """A value of JSON as the type of its column; text for what has no other."""
    if value is None or kind != pa.string():
        return float(value) if value is not None and kind == pa.float64() else value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return HALF.sub("\ufffd", text)

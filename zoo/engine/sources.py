"""Sources: what their items are, in a fixed order and in bounded memory."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from zoo.engine import shar
from zoo.engine.packed import PACKING_ERRORS, opened
from zoo.engine.parts import COLUMNS
from zoo.engine.places import Places, beside, places_of
from zoo.errors import ArgumentError, InputError, listing
from zoo.folders import Skipped
from zoo.modality import Modality, modality

#: Halves of characters, which JSON can spell and UTF-8 cannot.
HALF = re.compile("[\ud800-\udfff]")

#: Where the media of an item are: a file; a range of bytes of one, a record in such a range, or a cut of the recording there; a
#: row of a table; a file that a line of JSON names, or the line itself. The last one is of items that cannot even be listed.
Kind = Literal["file", "range", "record", "cut", "row", "line", "value", "broken"]

#: Files that hold many items, by their extensions.
TARS = (".tar", ".tar.gz", ".tgz")
TABLES = (".parquet", ".arrow", ".ipc", ".feather")
LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_MANY = (*TARS, *TABLES, *LINES)
#: Fields of JSON lines that hold a path, if none is named; a string in them is always one.
_PATHS = ("path", "audio_filepath", "file_name", "file", "filename", "filepath", "audio", "image", "wav", "url")
_END = 512


@dataclass(frozen=True, slots=True)
class Row:
    """One item of a listing.

    Attributes:
        key: its name in the data set.
        kind: how its media are found.
        place: file that holds them; of a line the manifest.
        offset, size: bytes that hold them; of a line those of the line.
        group, row: row group or record batch of a table, and row in it.
        bytes: about how many bytes are read for it.
        stamp: changes when ``place`` does.
        more: of ranges the kept neighbours as JSON; of rows the column; of lines the place and the stamp of the media as JSON;
            of values the field; of cuts what is carried over and which samples they are (`zoo.engine.shar`).
        broken: why it cannot be read, if it was known when it was listed.
    """

    key: str
    kind: Kind
    place: str
    offset: int = 0
    size: int = 0
    group: int = 0
    row: int = 0
    bytes: int = 0
    stamp: str = ""
    more: str = ""
    broken: str | None = None


@dataclass(frozen=True)
class Choice:
    """Choice of what is taken from sources.

    Attributes:
        modality: kind of media.
        extensions: of its files, with the dot; ``None`` for all.
        column: column of tables, field of JSON lines or extension in tars that holds the media; found if ``None``.
        keep: columns that are carried over, ``None`` for those that a kind of source has by itself: all of JSON lines, none of
            the others. ``("*",)`` for all.
    """

    modality: str
    extensions: tuple[str, ...] | None
    column: str | None = None
    keep: tuple[str, ...] | None = None

    def keeps(self, name: str, default: bool) -> bool:
        """Whether a column is carried over."""
        return default if self.keep is None else self.keep == ("*",) or name in self.keep


@dataclass(frozen=True)
class Carried:
    """A column of the sources that is carried over.

    Attributes:
        name: in the sources.
        column: in the parts.
        type: of its values; text for JSON's arrays, objects and mixtures.
    """

    name: str
    column: str
    type: pa.DataType


class Listing:
    """The items of sources; iterate once, then ask for the columns that are carried over.

    Args:
        sources: folders, files, glob patterns, URLs.
        choice: what is taken.
        leave_out: folder that is not looked into: the output's.

    Attributes:
        skipped: what was left out.

    Raises:
        ArgumentError: a source has nothing, or a table has not the column.
    """

    def __init__(self, sources: Sequence[str], choice: Choice, leave_out: str | None = None) -> None:
        self.sources, self.choice = sources, choice
        self._leave_out = None if leave_out is None else f"{leave_out.rstrip('/')}/"
        self.skipped = Skipped(extras=modality(choice.modality).extras)
        self._columns: dict[str, pa.DataType] = {}
        self._with_field: str | None = None
        self._medium = modality(choice.modality)
        self._holds_sound = "samples" in dict(self._medium.meta)

    def __iter__(self) -> Iterator[Row]:
        for source in self.sources:
            found = False
            for row in self._source(source):
                found = True
                yield row
            if not found:
                left_out = f" ({self.skipped})" if str(self.skipped) else ""
                raise ArgumentError(f"{source}: no such file, or nothing for {self.choice.modality} in it{left_out}")

    def carried(self) -> tuple[Carried, ...]:
        """The columns that are carried over; those whose names tokens have begin with ``source_``."""
        if missing := [name for name in self.choice.keep or () if name != "*" and name not in self._columns]:
            there = f"; there are {listing(list(self._columns), 20)}" if self._columns else ""
            raise ArgumentError(f"--keep {missing[0]}: no source has that column{there}")
        taken = {*COLUMNS, *(name for name, _ in modality(self.choice.modality).meta)}
        return tuple(
            # A field that was null everywhere is text.
            Carried(name, f"source_{name}" if name in taken else name, pa.string() if kind == pa.null() else kind)
            for name, kind in self._columns.items()
        )

    # ---- kinds of sources

    def _source(self, source: str) -> Iterator[Row]:
        places = places_of(source)
        try:
            kind = places.kind(source)
            if kind == "folder":
                yield from self._folder(source, places)
            elif kind == "file":
                yield from self._file(os.path.basename(source), source, places, many=True)
            else:
                for name, place in places.matches(source):
                    yield from self._file(name, place, places, many=True)
        except FileNotFoundError as error:
            raise ArgumentError(f"{source}: no such file or folder") from error
        except OSError as error:
            raise ArgumentError(f"{source} cannot be listed: {error.strerror or error}") from error

    def _folder(self, source: str, places: Places) -> Iterator[Row]:
        """The media in a folder; where there are none, the files of many items in it."""
        extensions = self.choice.extensions
        many: list[tuple[str, str]] = []
        media = False
        wanted = None if extensions is None else {*extensions, *(f".{name.rpartition('.')[2]}" for name in _MANY)}
        for name, place in places.below(source, wanted, self.skipped):
            if self._leave_out is not None and place.startswith(self._leave_out):
                continue
            if name.lower().endswith(self._medium.records):
                media = True
                yield from self._file(name, place, places, many=True)
            elif extensions is None or os.path.splitext(name)[1].lower() in extensions:
                media = True
                yield from self._file(name, place, places, many=False)
            elif name.lower().endswith(_MANY):
                many.append((name, place))
        if not media:
            if self._holds_sound:
                many = shar.without_fields(many)
            for name, place in many:
                yield from self._file(name, place, places, many=True)
        else:
            self.skipped.kinds.update(os.path.splitext(name)[1].lower() for name, _ in many)

    def _file(self, name: str, place: str, places: Places, *, many: bool) -> Iterator[Row]:
        key = _text(name.replace(os.sep, "/"))
        low = name.lower()
        size, stamp = places.status(place)
        if many and self._holds_sound and shar.is_cuts(name):
            yield from self._cuts(key, place, places)
        elif many and low.endswith(TARS):
            yield from self._tar(key, place, places, stamp)
        elif many and low.endswith(TABLES):
            yield from self._table(key, place, places, stamp)
        elif many and low.endswith(LINES):
            yield from self._lines(key, place, places, stamp)
        elif many and low.endswith(self._medium.records):
            yield from self._records(key, place, places, stamp)
        else:
            yield Row(key, "file", place, size=size, bytes=size, stamp=stamp)

    # ---- tars

    def _tar(self, key: str, place: str, places: Places, stamp: str) -> Iterator[Row]:
        """Members that are media, with their kept neighbours: files of one sample lie side by side and share their stem."""
        sample: list[tuple[str, int, int]] = []
        with opened(place, places) as file:
            for member in _members(file):
                if isinstance(member, Row):
                    yield from self._sample(key, place, stamp, sample)
                    sample = []
                    yield Row(f"{key}#{member.key}", "broken", place, stamp=stamp, broken=member.broken)
                    continue
                if sample and _stem(member[0]) != _stem(sample[0][0]):
                    yield from self._sample(key, place, stamp, sample)
                    sample = []
                sample.append(member)
        yield from self._sample(key, place, stamp, sample)

    def _sample(self, key: str, place: str, stamp: str, sample: list[tuple[str, int, int]]) -> Iterator[Row]:
        kept = {}
        for name, offset, size in sample:
            extension = os.path.basename(name).partition(".")[2]
            if not self._is_media(name, extension) and self.choice.keeps(extension, False):
                kept[extension] = [offset, size]
                self._carry(extension, pa.string(), place)
        more = json.dumps(kept, sort_keys=True) if kept else ""
        for name, offset, size in sample:
            extension = os.path.basename(name).partition(".")[2]
            if self._is_media(name, extension):
                yield Row(f"{key}#{_text(name)}", "range", place, offset, size, bytes=size, stamp=stamp, more=more)
            elif extension not in kept:
                self.skipped.kinds[f".{extension}" if extension else "without an extension"] += 1

    def _is_media(self, name: str, extension: str) -> bool:
        if self.choice.column is not None:
            return extension.lower() == self.choice.column.lower().lstrip(".")
        if os.path.basename(name).startswith("."):
            return False
        return self.choice.extensions is None or os.path.splitext(name)[1].lower() in self.choice.extensions

    # ---- cuts

    def _cuts(self, key: str, place: str, places: Places) -> Iterator[Row]:
        """Cuts of a shard of Lhotse Shar, each joined with its recording, which lies in a tar beside them in the same order."""
        try:
            tar = shar.recordings_of(place)
            _, stamp = places.status(tar)
        except FileNotFoundError as error:
            raise ArgumentError(f"{place}: there is no {os.path.basename(tar)} beside it") from error
        with places.open(tar) as file:
            members = (member for member in _members(file) if isinstance(member, Row) or shar.is_data(member[0]))
            for number, cut in enumerate(shar.cuts_of(place, places)):
                member = next(members, None)
                if isinstance(cut, str):
                    yield Row(f"{key}#{number}", "broken", place, stamp=stamp, broken=cut)
                    continue
                if reason := _mismatch(cut.name, member, tar):
                    yield Row(f"{key}#{cut.name}", "broken", place, stamp=stamp, broken=reason)
                    continue
                assert isinstance(member, tuple)
                kept = {name: value for name, value in cut.columns.items() if self.choice.keeps(name, True)}
                for name, value in kept.items():
                    self._carry_value(name, value, place)
                more = json.dumps({"kept": kept, "part": cut.part}, sort_keys=True)
                _, offset, size = member
                yield Row(f"{key}#{cut.name}", "cut", tar, offset, size, bytes=size, stamp=stamp, more=more)
            for left in members:
                name = left.key if isinstance(left, Row) else left[0]
                yield Row(f"{os.path.basename(tar)}#{_text(name)}", "broken", tar, stamp=stamp, broken="there is no cut for it")

    # ---- records

    def _records(self, key: str, place: str, places: Places, stamp: str) -> Iterator[Row]:
        """Records of a file that is made of them; where it is damaged, what comes before is there."""
        home = self._medium.home("media")
        for name in home.RECORD_COLUMNS:
            if self.choice.keeps(name, False):
                self._carry(name, pa.string(), place)
        end = 0
        try:
            with opened(place, places) as file:
                for number, (name, offset, size) in enumerate(home.spans(file)):
                    yield Row(f"{key}#{name or f'@{number}'}", "record", place, offset, size, bytes=size, stamp=stamp)
                    end = offset + size
        except (InputError, *PACKING_ERRORS) as error:
            yield _cut_off(key, place, stamp, end, error)

    # ---- tables

    def _table(self, key: str, place: str, places: Places, stamp: str) -> Iterator[Row]:
        number = 0
        for group, (rows, size) in enumerate(self._groups(place, places)):
            for row in range(rows):
                yield Row(
                    f"{key}#{number}", "row", place, group=group, row=row, bytes=size // rows, stamp=stamp, more=self._column
                )
                number += 1

    def _groups(self, place: str, places: Places) -> Iterator[tuple[int, int]]:
        """Rows and bytes of the media of each row group or record batch."""
        try:
            if place.lower().endswith(".parquet"):
                with places.open(place) as file:
                    metadata = pq.ParquetFile(file).metadata
                    self._choose(metadata.schema.to_arrow_schema(), place)
                    for index in range(metadata.num_row_groups):
                        group = metadata.row_group(index)
                        chunks = [group.column(i) for i in range(group.num_columns)]
                        size = sum(
                            chunk.total_uncompressed_size
                            for chunk in chunks
                            if chunk.path_in_schema.partition(".")[0] == self._column
                        )
                        yield group.num_rows, size
            else:
                batches = arrow_batches(place, places)
                self._choose(batches.schema, place)
                for batch in batches:
                    yield batch.num_rows, batch.column(self._column).nbytes
        except (pa.ArrowException, EOFError) as error:
            raise ArgumentError(f"{place} cannot be read as a table: {error}") from error

    def _choose(self, schema: pa.Schema, place: str) -> None:
        """The column of the media, and those that are kept."""
        column = self.choice.column
        if column is None:
            usable = [field.name for field in schema if _holds_media(field.type) or self._is_text(field)]
            named = [name for name in (self.choice.modality, "bytes", "content", "data") if name in usable]
            if len(usable) != 1 and not named:
                raise ArgumentError(
                    f"{place}: which column holds the media? Say --column NAME; there are {listing(schema.names, 20)}"
                )
            column = (named or usable)[0]
        if column not in schema.names:
            raise ArgumentError(f"{place} has no column {column!r}; there are {listing(schema.names, 20)}")
        kind = schema.field(column).type
        if not _holds_media(kind) and not _is_string(kind):
            raise ArgumentError(
                f"{place}: the column {column!r} is {kind}: it must be bytes, a path, or both as 'bytes' and 'path'"
            )
        self._column = column
        for field in schema:
            if field.name != column and self.choice.keeps(field.name, False):
                self._carry(field.name, field.type, place)

    def _is_text(self, field: pa.Field) -> bool:
        return _is_string(field.type) and is_item(field.name, self._medium)

    # ---- JSON lines

    def _lines(self, key: str, place: str, places: Places, stamp: str) -> Iterator[Row]:
        offset = number = 0
        try:
            with opened(place, places) as file:
                for line in file:
                    if line.strip():
                        yield self._line(f"{key}#{number}", place, offset, line, stamp)
                        number += 1
                    offset += len(line)
        except PACKING_ERRORS as error:
            yield _cut_off(key, place, stamp, offset, error)

    def _line(self, key: str, place: str, offset: int, line: bytes, stamp: str) -> Row:
        try:
            content = json.loads(line)
            if not isinstance(content, dict):
                raise ValueError(f"it is {type(content).__name__}, not an object")
        except (ValueError, RecursionError) as error:
            return Row(key, "broken", place, offset, len(line), stamp=stamp, broken=f"the line is no JSON object: {error}")
        field = self._field(content, place)
        is_value = field is not None and isinstance(content.get(field), str) and is_item(field, self._medium)
        for name, value in content.items():
            # The item itself is not carried over unless it is asked for.
            own = name == field and (is_value or isinstance(value, dict))
            if self.choice.keeps(name, not own) and not (own and isinstance(value, dict)):
                self._carry_value(name, value, place)
        if field is None:
            missing = f"no field {self.choice.column!r}" if self.choice.column else "no field that holds one"
            return Row(key, "broken", place, offset, len(line), stamp=stamp, broken=f"it has {missing}")
        if is_value:
            return Row(key, "value", place, offset, len(line), bytes=len(line), stamp=stamp, more=field)
        other = content.get(field)
        other = other.get("path") if isinstance(other, dict) else other
        if not isinstance(other, str) or not other or "\0" in other:
            wanted = "no text" if is_item(field, self._medium) else "no path"
            return Row(key, "broken", place, offset, len(line), stamp=stamp, broken=f"its {field!r} is {wanted}")
        media = beside(place, other)
        try:
            size, media_stamp = places_of(media).status(media)
        except (OSError, UnicodeEncodeError) as error:
            shown = HALF.sub("\ufffd", other)
            reason = f"{shown}: {getattr(error, 'strerror', None) or error}"
            reason = f"{shown} does not exist" if isinstance(error, FileNotFoundError | UnicodeEncodeError) else reason
            return Row(key, "broken", place, offset, len(line), stamp=stamp, broken=reason)
        more = json.dumps([media, media_stamp])
        return Row(key, "line", place, offset, len(line), bytes=size, stamp=stamp, more=more)

    def _field(self, content: dict[str, Any], place: str) -> str | None:
        """The field of the media, or of their path; ``None`` of a line without one in a file that has had lines with one."""
        known = (self._medium.name, *_PATHS) if self._medium.strings else _PATHS
        column = self.choice.column or next((name for name in known if name in content), None)
        if column is None or column not in content:
            if self._with_field == place:
                return None
            what = f"a {self._medium.name} or a path" if self._medium.strings else "a path"
            wanted = f"no field {column!r}" if column else f"no field that is known to hold {what}: say --column NAME"
            raise ArgumentError(f"{place}: a line has {wanted}; there are {listing(list(content), 20)}")
        self._with_field = place
        return column

    # ---- columns that are carried over

    def _carry(self, name: str, kind: pa.DataType, place: str) -> None:
        before = self._columns.setdefault(name, kind)
        if before != kind:
            raise ArgumentError(
                f"{place}: the column {name!r} is {kind}, and {before} in an earlier source: leave it out of --keep"
            )

    def _carry_value(self, name: str, value: Any, place: str) -> None:
        """The type that holds all values of a field so far: whole numbers widen to real ones, anything else to text."""
        if HALF.search(name):
            # No column can be called so.
            return
        kind = _type_of(value)
        before = self._columns.get(name, pa.null())
        if before == kind or kind == pa.null():
            self._columns.setdefault(name, before)
        elif before == pa.null():
            self._columns[name] = kind
        elif {before, kind} == {pa.int64(), pa.float64()}:
            self._columns[name] = pa.float64()
        else:
            self._columns[name] = pa.string()


def _mismatch(name: str, member: tuple[str, int, int] | Row | None, tar: str) -> str | None:
    """Why a member of a tar is not the recording of a cut."""
    tar = os.path.basename(tar)
    if member is None:
        return f"{tar} ends before its recording"
    if isinstance(member, Row):
        return f"its recording in {tar}: {member.broken}"
    if os.path.splitext(member[0])[0] != name:
        return f"{tar} has {member[0]} in its place"
    return "it has no recording" if member[0].endswith(shar.NOTHING) else None


def _cut_off(key: str, place: str, stamp: str, end: int, error: Exception) -> Row:
    """The rest of a file that is damaged from a byte on; errors of the way to it, and of what was asked for, are raised."""
    if isinstance(error, ArgumentError) or (isinstance(error, OSError) and error.errno is not None):
        raise error
    return Row(f"{key}#@{end}", "broken", place, stamp=stamp, broken=f"the file cannot be read beyond byte {end}: {error}")


def is_item(field: str, medium: Modality) -> bool:
    """Whether a string in a column or field is an item itself, and no path."""
    return medium.strings and field not in _PATHS


def arrow_batches(place: str, places: Places) -> Any:
    """The record batches of an Arrow file or stream, mapped into memory where they can be."""
    local = not isinstance(source := _mapped(place, places), bytes)
    buffer = source if local else pa.BufferReader(source)
    try:
        reader = pa.ipc.open_file(buffer)
    except pa.ArrowInvalid:
        buffer.seek(0)
        return pa.ipc.open_stream(buffer)
    return pa.RecordBatchReader.from_batches(reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches)))


def _mapped(place: str, places: Places) -> Any:
    return pa.memory_map(place) if places is places_of(os.sep) else places.read(place)


def _members(file: Any) -> Iterator[tuple[str, int, int] | Row]:
    """Names, offsets and sizes of the files in a tar; a broken row where it cannot be read on.

    ``tarfile`` takes a damaged header for the end, so what stands at the end is looked at.
    """
    end = 0
    last: tarfile.TarInfo | None = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                # That there is a next one says that the last one is whole.
                yield from _member(last)
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                last, end = member, tar.offset
            yield from _member(last)
            last, end = None, tar.offset
            file.seek(end)
            block = file.read(_END)
            while block and not block.strip(b"\0"):
                block = file.read(1 << 20)
            if block:
                reason = "what follows is no header of a member, or a second archive"
                yield Row(f"@{end}", "broken", "", broken=f"the tar is damaged from byte {end} on: {reason}")
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if last is not None and _is_whole(file, last):
            yield from _member(last)
            last = None
        key = f"@{end}" if last is None else _text(last.name)
        yield Row(key, "broken", "", broken=f"the tar cannot be read beyond byte {end}: {error}")


def _member(member: tarfile.TarInfo | None) -> Iterator[tuple[str, int, int] | Row]:
    if member is not None and member.issparse():
        yield Row(_text(member.name), "broken", "", broken="it is a sparse file, which is not read")
    elif member is not None and member.isreg():
        yield member.name, member.offset_data, member.size


def _is_whole(file: Any, member: tarfile.TarInfo) -> bool:
    """Whether the data of a member is all there."""
    try:
        file.seek(max(member.offset_data + member.size - 1, 0))
        return bool(file.read(1))
    except (EOFError, OSError, ValueError):
        return False


def _stem(name: str) -> str:
    """The name of a sample: up to the first dot of the file's name."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def _text(name: str) -> str:
    """A file's name as text; bytes that are none are written out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _holds_media(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 or kind.get_field_index("path") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _type_of(value: Any) -> pa.DataType:
    if value is None:
        return pa.null()
    for python, kind in ((bool, pa.bool_()), (int, pa.int64()), (float, pa.float64())):
        if isinstance(value, python):
            whole = isinstance(value, int) and not -(2**63) <= value < 2**63
            return pa.string() if whole else kind
    return pa.string()

"""Parts: the Parquet files that a run of the engine writes, one per unit of its plan. ``cards/engine.md`` describes them.

Needs pyarrow; does not import torch.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from zoo.errors import ArgumentError, FormatError
from zoo.modality import MetaKind, modality
from zoo.spec import Frame, Spec

#: Version of the format that is written.
FORMAT = 1
#: Key of the file's metadata.
METADATA = b"zoo"
#: Columns that every part has, beside those of the modality's meta and those carried over from the source.
COLUMNS = ("key", "ids", "length", "segments", "error")
#: Rows of one row group: few enough that one item is read without many others.
ROW_GROUP = 1024

_NAME = re.compile(r"part-(\d{6,})\.parquet")
_LARGEST_NARROW = 1 << 16
_META_TYPES: dict[MetaKind, pa.DataType] = {
    "count": pa.int64(),
    "rate": pa.int64(),
    "float": pa.float64(),
    "fit": pa.string(),
    "octets": pa.binary(),
}


@dataclass(frozen=True)
class Header:
    """Description of a part, written into it; all parts of a run agree but for ``unit``.

    Attributes:
        tokenizer, fingerprint, vocab_size, frame: as of `zoo.Tokens`.
        modality: kind of media, a name in `zoo.modality`.
        options: options of encoding that were given.
        batch_exact: whether the ids of an item are bit for bit those that it gets alone. Where that is false, as on a GPU, sums
            of floating point may be taken in another order, and an id at a tie may differ.
        unit: number of the unit in the run's plan.
    """

    tokenizer: str
    fingerprint: str
    vocab_size: int
    modality: str
    frame: Frame | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    batch_exact: bool = True
    unit: int = 0

    @classmethod
    def of_spec(cls, spec: Spec, options: Mapping[str, Any], batch_exact: bool) -> Header:
        """The header of a tokenizer's parts.

        Raises:
            ArgumentError: it is a continuous tokenizer, which has no ids.
        """
        if spec.continuous:
            raise ArgumentError(f"{spec.name} encodes to latents and has no ids: zoo encode writes its latents")
        return cls(spec.name, spec.fingerprint, spec.vocab_size, spec.modality, spec.frame, options, batch_exact)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        frame = None if self.frame is None else {name: list(value) for name, value in asdict(self.frame).items()}
        return {"format": FORMAT} | vars(self) | {"frame": frame, "options": dict(self.options)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Header:
        """The header that `as_dict` gave.

        Raises:
            FormatError: it is of another version, or something is missing.
        """
        if content.get("format") != FORMAT:
            raise FormatError(f"format {content.get('format')!r} is not known, only {FORMAT}: update the library")
        try:
            given = {name: content[name] for name in cls.__dataclass_fields__}
            frame = given["frame"]
            return cls(**given | {"frame": frame and Frame(**{name: tuple(value) for name, value in frame.items()})})
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"the header is not complete: {error}") from error

    @property
    def id_type(self) -> pa.DataType:
        """The narrowest type of ids that pyarrow, torch and NumPy share."""
        return pa.uint16() if self.vocab_size <= _LARGEST_NARROW else pa.int32()

    @property
    def meta(self) -> tuple[str, ...]:
        """Columns of what an item's tokens remember."""
        return tuple(name for name, _ in modality(self.modality).meta)


def _list(kind: pa.DataType) -> pa.DataType:
    # The name that Parquet gives the values of lists, so that what is read has the very schema that was written.
    return pa.list_(pa.field("element", kind))


def schema_of(header: Header, carried: pa.Schema | None = None) -> pa.Schema:
    """Columns of a part in their order, with the header as metadata.

    Args:
        header: what the part says about itself.
        carried: columns of the source that are kept.

    Raises:
        ArgumentError: a carried column has the name of another one.
    """
    fields = [
        pa.field("key", pa.string(), nullable=False),
        pa.field("ids", _list(header.id_type)),
        pa.field("length", pa.int32()),
        *(pa.field(name, _META_TYPES[kind]) for name, kind in modality(header.modality).meta),
        pa.field("segments", _list(pa.int32())),
        *(column.remove_metadata() for column in carried or ()),
        pa.field("error", pa.string()),
    ]
    names = [column.name for column in fields]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise ArgumentError(f"the column {doubled!r} of the source has the name of a column of the tokens: rename it")
    return pa.schema(fields, metadata={METADATA: json.dumps(header.as_dict(), sort_keys=True).encode()})


def carried_of(schema: pa.Schema, header: Header) -> tuple[str, ...]:
    """Names of the columns that were carried over from the source."""
    own = {*COLUMNS, *header.meta}
    return tuple(name for name in schema.names if name not in own)


def part_name(unit: int) -> str:
    """The file of a unit.

    >>> part_name(123)
    'part-000123.parquet'
    """
    return f"part-{unit:06d}.parquet"


def unit_of(name: str) -> int | None:
    """The unit that a file name belongs to; ``None`` if it is none of a part."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found and part_name(int(found[1])) == name else None


def part_names(names: Iterable[str]) -> dict[int, str]:
    """File names that are parts, by unit and in the order of units."""
    return dict(sorted((unit, name) for name in names if (unit := unit_of(name)) is not None))


def part_bytes(schema: pa.Schema, columns: Mapping[str, Sequence[Any] | pa.Array]) -> bytes:
    """The content of a part; the same for the same columns with one version of pyarrow.

    Args:
        schema: of `schema_of`.
        columns: values of every column, in listing order.
    """
    arrays = [column if isinstance(column := columns[kind.name], pa.Array) else pa.array(column, kind.type) for kind in schema]
    table = pa.Table.from_arrays(arrays, schema=schema)
    sink = io.BytesIO()
    # A dictionary of ids is written as packed bits, as many as the ids need.
    pq.write_table(
        table,
        sink,
        row_group_size=ROW_GROUP,
        compression="zstd",
        use_dictionary=[name for name in schema.names if name != "key"],
        version="2.6",
        data_page_version="1.0",
    )
    return sink.getvalue()


def header_of(schema: pa.Schema, name: str) -> Header:
    """The header in a schema's metadata.

    Raises:
        FormatError: there is none, or it is of another version; names the file.
    """
    content = (schema.metadata or {}).get(METADATA)
    if content is None:
        raise FormatError(f"{name} is no part of a token data set: its metadata has no {METADATA.decode()!r}")
    try:
        return Header.from_dict(json.loads(content))
    except ValueError as error:
        raise FormatError(f"{name}: {error}") from error


def read_header(source: Any, name: str | None = None) -> tuple[Header, pa.Schema, pq.FileMetaData]:
    """The header, the schema and the Parquet metadata of a part, from its last bytes.

    Args:
        source: a path or an open file.
        name: what to call it in messages.

    Raises:
        FormatError: it is no part, or damaged; names the file.
    """
    name = str(source) if name is None else name
    try:
        metadata = pq.read_metadata(source)
        schema = metadata.schema.to_arrow_schema()
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise FormatError(
            f"{name} cannot be read as Parquet ({error}): if it is a part, delete it; the command that wrote it makes it anew"
        ) from error
    return header_of(schema, name), schema, metadata


def failures_in(metadata: pq.FileMetaData) -> int | None:
    """Rows with an error, from the statistics; ``None`` if they don't say."""
    place = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == "error")
    failures = 0
    for group in range(metadata.num_row_groups):
        column = metadata.row_group(group).column(place)
        if column.statistics is None or not column.statistics.has_null_count:
            return None
        failures += metadata.row_group(group).num_rows - column.statistics.null_count
    return failures

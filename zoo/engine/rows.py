"""Rows of one length for a language model, and the files that hold them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from zoo.engine.fitting import best_fit
from zoo.engine.megatron import index_bytes
from zoo.engine.parts import part_name

Ids = NDArray[Any]
#: Layouts of the files.
FORMATS = ("parquet", "megatron")
#: Values in a row group, about.
_GROUP = 1 << 19


@dataclass(frozen=True)
class Ragged:
    """Sequences one behind the other: sequence ``i`` is ``values[ends[i] : ends[i + 1]]``."""

    values: Ids
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, values: Ids, lengths: NDArray[Any] | Sequence[int]) -> Ragged:
        """From the values of all sequences and their lengths."""
        return cls(values, np.cumsum(np.append(0, lengths), dtype=np.int64))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Length of every sequence."""
        return np.diff(self.ends)

    def take(self, chosen: NDArray[Any]) -> Ragged:
        """Some of the sequences, in the order given."""
        lengths = self.lengths[chosen]
        taken = np.empty(int(lengths.sum()), self.values.dtype)
        found = Ragged.of(taken, lengths)
        copy_runs(self.values, self.ends[:-1][chosen], taken, found.ends[:-1], lengths)
        return found


def copy_runs(source: Ids, starts: Ids, target: Ids, places: Ids, lengths: Ids) -> None:
    """Copy runs of ``lengths`` from ``starts`` in the source to ``places`` in the target."""
    # A slice costs less than an index for each of its values from about twenty values on.
    for start, place, length in zip(starts.tolist(), places.tolist(), lengths.tolist(), strict=True):
        target[place : place + length] = source[start : start + length]


@dataclass(frozen=True)
class Packed:
    """Documents in rows of one length.

    Attributes:
        ids: ``[rows, length]``.
        loss: ``[rows, length]``, 1 where a model is to learn the id at that place, 0 elsewhere and in padding.
        positions: ``[rows, length]``, places within the document; they begin again with every document and with the padding.
        bounds: for each row where its documents begin and where the last one ends; padding counts as one.
        members: for each row the numbers of its documents, in order.
        padding: ids of padding in each row.
    """

    ids: Ids
    loss: NDArray[np.uint8]
    positions: NDArray[np.int32]
    bounds: Ragged
    members: Ragged
    padding: NDArray[np.int32]


def packed(documents: Ragged, loss: NDArray[np.uint8], numbers: NDArray[Any], length: int, pad: int) -> Packed:
    """Lay documents into rows.

    Args:
        documents: ids of each, 1 to ``length`` of them.
        loss: for each id whether it is learned.
        numbers: what documents are called in ``members``.
        length: of a row.
        pad: id that fills rows up.
    """
    sizes = documents.lengths
    row_of, rows = best_fit(sizes, length)
    order = np.argsort(row_of, kind="stable")
    ordered, home = sizes[order], row_of[order]
    filled = np.bincount(row_of, weights=sizes, minlength=rows).astype(np.int64)
    before = np.cumsum(ordered) - ordered
    # Documents of a row stand one behind the other; padding of earlier rows shifts the later ones.
    places = before + np.cumsum(length - filled)[home] - (length - filled)[home]
    ids = np.full(rows * length, pad, documents.values.dtype)
    learned = np.zeros(rows * length, np.uint8)
    copy_runs(documents.values, documents.ends[:-1][order], ids, places, ordered)
    copy_runs(loss, documents.ends[:-1][order], learned, places, ordered)
    padding = length - filled
    starts = np.sort(np.concatenate([places, (np.arange(rows) * length + filled)[padding > 0]]))
    spans = np.diff(np.append(starts, rows * length))
    positions = np.arange(rows * length, dtype=np.int32) - np.repeat(starts, spans).astype(np.int32)
    held = np.bincount(row_of, minlength=rows)
    # Every row has one bound more than segments: its own end.
    of_row = starts // length if length else starts
    segments = held + (padding > 0)
    bounds = np.empty(len(starts) + rows, np.int32)
    bounds[np.arange(len(starts)) + of_row] = starts - of_row * length
    bounds[np.cumsum(segments + 1) - 1] = length
    return Packed(
        ids.reshape(rows, length),
        learned.reshape(rows, length),
        positions.reshape(rows, length),
        Ragged.of(bounds, segments + 1),
        Ragged.of(numbers[order], held),
        padding.astype(np.int32),
    )


def files_of(content: Packed, unit: int, form: str, keys: Sequence[str], metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a unit by their names; the same bytes for the same rows.

    Args:
        content: the rows.
        unit: its number.
        form: one of `FORMATS`.
        keys: names of the documents.
        metadata: what Parquet files say about themselves, under ``zoo``.
    """
    if form == "megatron":
        return _megatron(content, part_name(unit).removesuffix(".parquet"))
    return {part_name(unit): _parquet(content, keys, metadata)}


def _megatron(content: Packed, stem: str) -> dict[str, bytes]:
    """Each row a document, each document of ours a sequence in it; loss masks are a data set of the same shape."""
    lengths = np.diff(content.bounds.values)
    # Between two rows the difference is the way back to 0.
    lengths = np.delete(lengths, content.bounds.ends[1:-1] - 1)
    documents = np.cumsum(np.append(0, content.bounds.lengths - 1))
    files = {}
    for name, values in ((stem, content.ids), (f"{stem}-loss_mask", content.loss)):
        files[f"{name}.bin"] = values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
        files[f"{name}.idx"] = index_bytes(values.dtype, lengths, documents)
    return files


def _parquet(content: Packed, keys: Sequence[str], metadata: Mapping[str, Any]) -> bytes:
    length = content.ids.shape[1]
    kind = pa.from_numpy_dtype(content.ids.dtype)
    names = pa.array(keys, pa.string()).take(pa.array(content.members.values))
    columns = {
        "input_ids": _fixed(content.ids, kind),
        "position_ids": _fixed(content.positions, pa.int32()),
        "loss_mask": _fixed(content.loss, pa.uint8()),
        "cu_seqlens": _lists(content.bounds, pa.array(content.bounds.values, pa.int32())),
        "keys": _lists(content.members, names),
        "padding": pa.array(content.padding, pa.int32()),
    }
    table = pa.table(columns).replace_schema_metadata({b"zoo": json.dumps(metadata, sort_keys=True).encode()})
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        row_group_size=max(1, _GROUP // max(1, length)),
        compression="zstd",
        compression_level=1,
        use_dictionary=["loss_mask.list.element", "padding"],
        column_encoding={
            "input_ids.list.element": "PLAIN",
            "position_ids.list.element": "DELTA_BINARY_PACKED",
            "cu_seqlens.list.element": "DELTA_BINARY_PACKED",
        },
        version="2.6",
        data_page_version="1.0",
        write_statistics=False,
    )
    return sink.getvalue()


def _fixed(values: Ids, kind: pa.DataType) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), kind), type=_element(pa.list_, kind, values.shape[1]))


def _lists(ragged: Ragged, values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(ragged.ends, pa.int32()), values, type=_element(pa.list_, values.type))


def _element(make: Any, kind: pa.DataType, *size: int) -> pa.DataType:
    # The name that Parquet gives the values of lists, so that what is read has the very schema that was written.
    return make(pa.field("element", kind), *size)

"""Token data sets and texts to rows of one length for a language model: ``zoo pack``.

The unit rule is that of ``zoo tokenize``: a plan is written once, each unit of it gives files that depend on nothing else, and
a record of the unit, written last, says that they are there.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import TypeAdapter

from zoo.engine.corpus import Batch, Corpus, Span, TextIds
from zoo.engine.lock import NAME as LOCK
from zoo.engine.lock import Lock
from zoo.engine.places import whole_place
from zoo.engine.plan import FAILURES, FOLDER
from zoo.engine.rows import FORMATS, Ragged, copy_runs, files_of, packed
from zoo.engine.store import Store, is_temporary
from zoo.engine.templates import Stretch
from zoo.errors import ArgumentError, FormatError, listing
from zoo.vocabulary import Vocabulary

NAME = f"{FOLDER}/pack.json"
VERSION = 1
#: Rows of a unit, and tokens of one, from which on it has fewer of them; long rows need some all the same.
_UNIT_ROWS, _UNIT_TOKENS, _LEAST_ROWS = 1024, 1 << 24, 256
_LONGEST = 1 << 24


@dataclass(frozen=True)
class PackSummary:
    """Content of a folder of rows, and the rows that a call added.

    Attributes:
        out: the folder.
        units, rows: in the folder.
        documents: in the rows; a document that was cut counts once.
        pieces: of documents, as many as there are documents unless some were cut.
        tokens: in the rows, without padding.
        padding: share of padding in all ids.
        failures: documents that are in no row; ``failures.parquet`` says why.
        packed: documents that this call packed.
        seconds: that it took.
    """

    out: str
    units: int
    rows: int
    documents: int
    pieces: int
    tokens: int
    padding: float
    failures: int
    packed: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def pack(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    vocabulary: Vocabulary | str | os.PathLike[str],
    length: int,
    template: str | None = None,
    text: Any = None,
    loss: Sequence[str] | None = None,
    cut: bool = False,
    pad: int = 0,
    form: str = "parquet",
    unit_rows: int | None = None,
    new: bool = False,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> PackSummary:
    """Pack documents into rows of one length: the longest first, each into the row that it fills best, none cut.

    The same call again goes on where an earlier one stopped, and gives the same files.

    Args:
        sources: folders of tokens that `zoo.engine.tokenize` wrote, and files of JSON lines.
        out: folder of the rows, or its URL.
        vocabulary: ids of text and of the tokens' sections, or the file of `zoo.Vocabulary.save`.
        length: ids of a row.
        template: how text and items of a document follow each other, such as ``"{caption}{image}"``: names of sections stand
            for the item between its markers, other names for text, from a column of the data set or a field of the line.
            Without one every item and every line's ``text`` is a document of its own.
        text: the text tokenizer (of transformers or tokenizers), or where one is: a ``tokenizer.json``, a folder or a name.
        loss: names in the template that a model is to learn, ``"literals"`` for the text between them; everything by default.
            A section's markers count as part of it.
        cut: cut documents that are longer than a row; otherwise they fail.
        pad: id that fills rows up.
        form: ``"parquet"``, with ``input_ids``, ``position_ids``, ``loss_mask``, ``cu_seqlens``, ``keys`` and ``padding``; or
            ``"megatron"``, ``.bin`` and ``.idx`` with a document for each row and a sequence for each document in it.
        unit_rows: rows of a unit, about; 1024 by default, fewer of very long ones.
        new: fail if there is something in the folder already.
        on_event: called with a record of each unit.

    Raises:
        ArgumentError: an option is wrong, or those of an earlier call were others, or a source has changed since.
        MismatchError: tokens have no section in the vocabulary.
        FormatError: a file of the folder or of a source is damaged.
        OutputError: a file cannot be written.
    """
    begun = time.monotonic()
    places = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    vocabulary = vocabulary if isinstance(vocabulary, Vocabulary) else Vocabulary.load(vocabulary)
    _require_sound(vocabulary, length, pad, form, unit_rows)
    corpus = Corpus([whole_place(place) for place in places], vocabulary, template, loss)
    if text is None and corpus.has_text:
        raise ArgumentError("there is text to pack: pass the text tokenizer")
    if text is not None and not corpus.has_text:
        raise ArgumentError("there is no text to pack: leave the text tokenizer out")
    texts = None
    if text is not None:
        texts = TextIds.load(text, vocabulary) if isinstance(text, str | os.PathLike) else TextIds(text, vocabulary)
    rows = unit_rows or (_UNIT_ROWS if _UNIT_ROWS * length <= _UNIT_TOKENS else max(_LEAST_ROWS, _UNIT_TOKENS // length))
    layout = TypeAdapter(Vocabulary).dump_python(vocabulary, mode="json")
    settings = {
        "length": length,
        "template": template,
        "loss": None if loss is None else sorted(set(loss)),
        "cut": cut,
        "pad": pad,
        "form": form,
        "unit_rows": rows,
        "vocabulary": hashlib.sha256(json.dumps(layout, sort_keys=True).encode()).hexdigest(),
        "text": texts and texts.identity(),
        "sources": corpus.identity(),
    }
    store = Store(whole_place(out))
    _require_place(store, new)
    with Lock(store) as lock:
        spans = _planned(store, settings, corpus, rows * length)
        store.sweep()
        maker = _Maker(corpus, vocabulary, texts, settings)
        present = set(store.names())
        documents = 0
        records = []
        for unit, span in enumerate(spans):
            record = _record_of(store, unit)
            if record is None or not present.issuperset(record["files"]):
                lock.require()
                record = maker.write(store, unit, span)
                documents += record["documents"] + len(record["failures"])
                if on_event is not None:
                    on_event({"event": "unit", "unit": unit, "units": len(spans)} | _counts(record))
            records.append(record)
        _write_failures(store, records)
    total = {name: sum(record[name] for record in records) for name in ("rows", "documents", "pieces", "tokens", "size")}
    return PackSummary(
        out=store.place,
        units=len(spans),
        rows=total["rows"],
        documents=total["documents"],
        pieces=total["pieces"],
        tokens=total["tokens"],
        padding=1 - total["tokens"] / total["size"] if total["size"] else 0.0,
        failures=sum(len(record["failures"]) for record in records),
        packed=documents,
        seconds=time.monotonic() - begun,
    )


def _require_sound(vocabulary: Vocabulary, length: int, pad: int, form: str, unit_rows: int | None) -> None:
    if not 1 <= length <= _LONGEST:
        raise ArgumentError(f"rows have 1 to {_LONGEST} ids, not {length}")
    if not 0 <= pad < vocabulary.size:
        raise ArgumentError(f"the id of padding must lie in [0, {vocabulary.size}), not {pad}")
    if vocabulary.size > 1 << 31:
        raise ArgumentError(f"ids of a vocabulary of {vocabulary.size} do not fit into int32")
    if form not in FORMATS:
        raise ArgumentError(f"rows are written as {' or '.join(FORMATS)}, not {form!r}")
    if unit_rows is not None and not 1 <= unit_rows * length < 1 << 31:
        raise ArgumentError(f"a unit has 1 to {((1 << 31) - 1) // length} rows of {length} ids, not {unit_rows}")


# ---- the plan


def _require_place(store: Store, new: bool) -> None:
    """Refuse a folder that holds something else, before anything is written to it."""
    names = store.names()
    if new and names:
        raise ArgumentError(f"{store.place} is not empty: choose a folder that is new")
    if NAME.rpartition("/")[2] in store.names(FOLDER):
        return
    others = [name for name in names if name != FOLDER and not is_temporary(name)]
    others += [f"{FOLDER}/{name}" for name in store.names(FOLDER) if f"{FOLDER}/{name}" != LOCK and not is_temporary(name)]
    if others:
        raise ArgumentError(f"{store.place} holds other things ({listing(others, 3)}): choose a folder that is empty or new")


def _planned(store: Store, settings: dict[str, Any], corpus: Corpus, unit_tokens: int) -> list[Span]:
    """The units, of the plan that is there or of a new one.

    Raises:
        ArgumentError: the plan that is there is that of other settings; or there is nothing to pack.
        FormatError: it is damaged.
    """
    try:
        content = json.loads(store.read(NAME))
        version, earlier = content["version"], content["settings"]
        spans = [Span(*span) for span in content["spans"]]
    except FileNotFoundError:
        spans = corpus.spans(unit_tokens)
        if not spans:
            raise ArgumentError("the sources are empty") from None
        plan = {"version": VERSION, "settings": settings, "spans": [[*asdict(span).values()] for span in spans]}
        store.write(NAME, (json.dumps(plan) + "\n").encode())
        return spans
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{store.path(NAME)} is damaged: {error}") from error
    if version != VERSION:
        raise FormatError(f"{store.path(NAME)} is of version {version}, not {VERSION}: update the library")
    # As it is read back.
    wanted = json.loads(json.dumps(settings))
    if other := [name for name in wanted if wanted[name] != earlier.get(name)]:
        shown = {"sources": "the sources", "vocabulary": "the vocabulary", "text": "the text tokenizer"}
        what = ", ".join(shown.get(name, f"{name} ({earlier.get(name)!r}, now {wanted[name]!r})") for name in other)
        raise ArgumentError(f"{store.place} was begun with other settings: {what}. Pack into another folder")
    return spans


def _unit_name(unit: int) -> str:
    return f"{FOLDER}/unit-{unit:06d}.json"


def _record_of(store: Store, unit: int) -> dict[str, Any] | None:
    """What is known about a finished unit; ``None`` if it is not finished."""
    try:
        record: dict[str, Any] = json.loads(store.read(_unit_name(unit)))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise FormatError(f"{store.path(_unit_name(unit))} is damaged: {error}") from error
    return record


def _counts(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"failures": len(record["failures"])}


def _write_failures(store: Store, records: Sequence[dict[str, Any]]) -> None:
    """List the documents that are in no row; there is no file if all of them are."""
    rows = [(key, unit, reason) for unit, record in enumerate(records) for key, reason in record["failures"]]
    if not rows:
        store.remove(FAILURES)
        return
    schema = pa.schema([("key", pa.string()), ("unit", pa.int32()), ("error", pa.string())])
    sink = io.BytesIO()
    columns = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), schema.types, strict=True)]
    pq.write_table(pa.table(columns, schema=schema), sink, compression="zstd", version="2.6")
    store.write(FAILURES, sink.getvalue())


# ---- units


class _Maker:
    """Makes the rows of units."""

    def __init__(self, corpus: Corpus, vocabulary: Vocabulary, texts: TextIds | None, settings: dict[str, Any]) -> None:
        self._corpus, self._vocabulary, self._texts, self._settings = corpus, vocabulary, texts, settings
        self._kind = np.uint16 if vocabulary.size <= 1 << 16 else np.int32

    def write(self, store: Store, unit: int, span: Span) -> dict[str, Any]:
        """Write the files of a unit and its record, which is returned."""
        settings = self._settings
        batch = self._corpus.batch(span)
        documents, loss, numbers = self._documents(batch, self._corpus.sources[span.source][1])
        rows = packed(documents, loss, numbers, settings["length"], settings["pad"])
        metadata = {name: settings[name] for name in ("length", "pad", "vocabulary", "template")}
        metadata |= {"format": VERSION, "vocab_size": self._vocabulary.size, "unit": unit}
        files = files_of(rows, unit, settings["form"], batch.keys, metadata)
        for name, content in files.items():
            store.write(name, content)
        record = {
            "files": list(files),
            "rows": len(rows.ids),
            "documents": len(np.unique(numbers)),
            "pieces": len(numbers),
            "tokens": len(documents.values),
            "size": rows.ids.size,
            "failures": [[batch.keys[place], reason] for place, reason in sorted(batch.bad.items())],
        }
        store.write(_unit_name(unit), json.dumps(record).encode())
        return record

    def _documents(self, batch: Batch, stretches: Sequence[Stretch]) -> tuple[Ragged, NDArray[np.uint8], NDArray[np.int64]]:
        """Documents, or pieces of them, that fit into a row: ids, what is learned of them, and their places in the batch."""
        made = [self._stretch(batch, stretch) for stretch in stretches]
        sizes = np.stack([content.lengths for content in made], axis=1)
        self._refuse(batch, sizes.sum(axis=1))
        good = np.setdiff1d(np.arange(len(batch.keys)), np.fromiter(batch.bad, np.int64, len(batch.bad)))
        sizes = sizes[good]
        ends = np.cumsum(sizes.reshape(-1))
        starts = (ends - sizes.reshape(-1)).reshape(sizes.shape)
        ids = np.empty(int(sizes.sum()), self._kind)
        for number, content in enumerate(made):
            copy_runs(content.values, content.ends[:-1][good], ids, starts[:, number], sizes[:, number])
        learned = np.tile(np.array([stretch.loss for stretch in stretches], np.uint8), len(good))
        loss = np.repeat(learned, sizes.reshape(-1))
        length = self._settings["length"]
        totals = sizes.sum(axis=1)
        pieces = -(-totals // length)
        numbers = np.repeat(good, pieces)
        within = np.arange(len(numbers)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        return Ragged.of(ids, np.minimum(length, np.repeat(totals, pieces) - within * length)), loss, numbers

    def _refuse(self, batch: Batch, totals: NDArray[np.int64]) -> None:
        """Note documents that are empty, or too long for a row."""
        length = self._settings["length"]
        for place in np.flatnonzero(totals == 0).tolist():
            batch.bad.setdefault(place, "it is empty")
        for place in np.flatnonzero(totals > length).tolist() if not self._settings["cut"] else ():
            batch.bad.setdefault(
                place, f"it has {totals[place]} tokens, more than the {length} of a row: cut such ones, or have longer rows"
            )

    def _stretch(self, batch: Batch, stretch: Stretch) -> Ragged:
        """A stretch of every document; empty, and noted, where it cannot be made."""
        return self._items(batch, stretch.section) if stretch.section else self._text(batch, stretch)

    def _items(self, batch: Batch, name: str) -> Ragged:
        rows = self._corpus.item_rows(batch, name)
        there = np.flatnonzero(rows >= 0)
        found, reasons = self._corpus.sets[name].written(rows[there], self._kind)
        for place, reason in reasons.items():
            batch.bad.setdefault(int(there[place]), reason)
        lengths = np.zeros(len(rows), np.int64)
        lengths[there] = found.lengths
        return Ragged.of(found.values, lengths)

    def _text(self, batch: Batch, stretch: Stretch) -> Ragged:
        assert self._texts is not None
        count = len(batch.keys)
        if not stretch.fields:
            [ids] = self._texts.encode(["".join(text for _, text in stretch.parts)])
            if (foreign := self._texts.foreign(literal := np.array(ids, np.int64))).any():
                raise ArgumentError(f"the template cannot be used: {self._texts.complaint(int(literal[foreign][0]))}")
            return Ragged.of(np.tile(literal, count).astype(self._kind), np.full(count, len(literal)))
        columns = [batch.fields[text] if is_field else [text] * count for is_field, text in stretch.parts]
        whole = [
            "" if place in batch.bad else "".join(map(str, parts)) for place, parts in enumerate(zip(*columns, strict=True))
        ]
        encoded = self._texts.encode(whole)
        lengths = np.fromiter(map(len, encoded), np.int64, count)
        values = np.concatenate([np.empty(0, np.int64), *(np.array(ids, np.int64) for ids in encoded)])
        strange = np.flatnonzero(self._texts.foreign(values))
        owners = np.repeat(np.arange(count), lengths)[strange]
        for place, number in zip(owners.tolist(), values[strange].tolist(), strict=True):
            batch.bad.setdefault(place, self._texts.complaint(number))
        # What is foreign is left out with its document, and may not fit the type.
        values[strange] = 0
        return Ragged.of(values.astype(self._kind), lengths)

"""Documents to pack: items of token data sets and lines of JSON, put together by a template."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from zoo.engine.dataset import TokenDataset
from zoo.engine.places import places_of
from zoo.engine.rows import Ragged, copy_runs
from zoo.engine.templates import Stretch, parsed
from zoo.errors import ArgumentError, InputError
from zoo.tokens import Tokens
from zoo.vocabulary import Section, Vocabulary

#: Types of columns that hold text.
_TEXTS = (pa.string(), pa.large_string(), pa.string_view())
#: Bytes of text that are taken for one token where units are planned.
_BYTES_PER_TOKEN = 4
#: Extensions of files with a JSON object on each line.
LINES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Span:
    """Documents of one source that belong together: those of a unit.

    Attributes:
        source: number of the source.
        first, count: documents of it.
        offset, size: bytes of them, in a file of lines.
    """

    source: int
    first: int
    count: int
    offset: int = 0
    size: int = 0


@dataclass
class Batch:
    """Documents of a unit before they are tokenized.

    Attributes:
        keys: their names.
        fields: text by the name of its field; ``None`` where a document has none.
        items: key of the item of each section; ``None`` where a document has none.
        rows: rows of the items instead, where the documents are those of a data set.
        bad: why a document cannot be made, by its place.
    """

    keys: list[str]
    fields: dict[str, list[str | None]] = field(default_factory=dict)
    items: dict[str, list[str | None]] = field(default_factory=dict)
    rows: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)


class Items:
    """A data set and its section of the vocabulary."""

    def __init__(self, place: str, vocabulary: Vocabulary) -> None:
        self.place = place
        self.data = TokenDataset(place)
        header = self.data.header
        none = Tokens.from_sequences(
            [], tokenizer=header.tokenizer, fingerprint=header.fingerprint, vocab_size=header.vocab_size, frame=header.frame
        )
        self.section: Section = vocabulary.section_of(none)

    def identity(self) -> list[Any]:
        """Mark that tells its content from others'."""
        return ["tokens", self.place, self.data.shelf.identity()]

    @cached_property
    def mean(self) -> int:
        """Ids of an item, on average."""
        return int(self.data.lengths.mean()) if len(self.data) else 0

    def ids(self, rows: NDArray[np.int64]) -> Ragged:
        """The ids of items by their rows in the parts, in any order."""
        chosen, place = np.unique(rows, return_inverse=True)
        values, lengths = [np.empty(0, self.data.header.id_type.to_pandas_dtype())], []
        for table in self.data.shelf.tables(chosen, ("ids",)):
            lists = table["ids"].combine_chunks()
            values.append(lists.flatten().to_numpy(zero_copy_only=False))
            lengths.append(pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False))
        found = Ragged.of(np.concatenate(values), np.concatenate([np.empty(0, np.int32), *lengths]))
        return found if np.array_equal(place, np.arange(len(chosen))) else found.take(place)

    def written(self, rows: NDArray[np.int64], kind: Any) -> tuple[Ragged, dict[int, str]]:
        """Items between their markers, in ids of the vocabulary; and why some cannot be written, by their places.

        Args:
            rows: of the items in the parts, in any order.
            kind: type of the ids.
        """
        found, section = self.ids(rows), self.section
        if section.grid is not None:
            return self._grids(rows, found, kind)
        reasons: dict[int, str] = {}
        for length in np.unique(found.lengths).tolist():
            try:
                section.check_length(length)
            except InputError as error:
                reasons |= dict.fromkeys(np.flatnonzero(found.lengths == length).tolist(), error.reason)
        content = Ragged.of(np.empty(len(found.values) + 2 * len(rows), kind), found.lengths + 2)
        firsts = content.ends[:-1]
        content.values[firsts] = section.begin
        content.values[content.ends[1:] - 1] = section.end
        copy_runs(found.values.astype(np.int64) + section.offset, found.ends[:-1], content.values, firsts + 1, found.lengths)
        return content, reasons

    def _grids(self, rows: NDArray[np.int64], found: Ragged, kind: Any) -> tuple[Ragged, dict[int, str]]:
        section = self.section
        if "rows" not in self.data.header.meta:
            raise ArgumentError(f"items of {section.name!r} are grids, and those of {self.place} do not remember their rows")
        chosen, place = np.unique(rows, return_inverse=True)
        tables = [table["rows"].fill_null(0).to_numpy() for table in self.data.shelf.tables(chosen, ("rows",))]
        heights = np.concatenate([np.empty(0, np.int64), *tables])[place].tolist()
        reasons: dict[int, str] = {}
        written = []
        for index, (height, start, end) in enumerate(
            zip(heights, found.ends[:-1].tolist(), found.ends[1:].tolist(), strict=True)
        ):
            ids = torch.from_numpy(found.values[start:end].astype(np.int64))
            try:
                if height < 1 or len(ids) % height:
                    raise InputError(f"its {len(ids)} ids are no whole number of {height} rows")
                written.append(section.write(ids, height).numpy().astype(kind))
            except InputError as error:
                reasons[index] = error.reason
                written.append(np.empty(0, kind))
        return Ragged.of(np.concatenate([np.empty(0, kind), *written]), [len(ids) for ids in written]), reasons


class Corpus:
    """Everything that is packed together.

    Without a template every item and every line is a document of its own: ``{section}`` and ``{text}``. With one, each line of
    the files is a document; where there are no files, each item of the data set that the template names first. Fields are those
    of the line or columns of the data set. The item of a section is the one whose key the line has under the section's name, or
    under ``key``; items of several data sets belong together where they have one key.

    Raises:
        ArgumentError: a source is nothing of the kind, or the template names what is not there.
        MismatchError: tokens have no section in the vocabulary.
    """

    def __init__(
        self, sources: Sequence[str], vocabulary: Vocabulary, template: str | None, loss: Sequence[str] | None
    ) -> None:
        self.sets: dict[str, Items] = {}
        self.files: list[str] = []
        for place in sources:
            kind = places_of(place).kind(place)
            if kind is None:
                raise ArgumentError(f"{place} does not exist")
            if kind == "file":
                if not place.lower().endswith(LINES):
                    raise ArgumentError(f"{place} is neither a folder of tokens nor a file of JSON lines ({', '.join(LINES)})")
                self.files.append(place)
                continue
            items = Items(place, vocabulary)
            if items.section.name in self.sets:
                raise ArgumentError(f"{place} and {self.sets[items.section.name].place} both hold {items.section.name!r}")
            self.sets[items.section.name] = items
        if not sources:
            raise ArgumentError("there is nothing to pack: pass folders of tokens, or files of JSON lines")
        self._sections = {section.name for section in vocabulary.sections}
        self._lay_out(template, loss)

    def _lay_out(self, template: str | None, loss: Sequence[str] | None) -> None:
        """What the documents of each source are."""
        self.sources: list[tuple[str, tuple[Stretch, ...]]] = []
        if template is None:
            names = [*self.sets, *(["text"] if self.files else [])]
            if unknown := [name for name in loss or () if name not in names]:
                raise ArgumentError(f"there is no {unknown[0]!r} to learn; there is {', '.join(names)}")
            self.sources += [(name, (Stretch(name, (), loss is None or name in loss),)) for name in self.sets]
            text = Stretch("", ((True, "text"),), loss is None or "text" in loss)
            self.sources += [(place, (text,)) for place in self.files]
            return
        stretches = parsed(template, self._sections, loss)
        named = list(dict.fromkeys(stretch.section for stretch in stretches if stretch.section))
        if missing := [name for name in named if name not in self.sets]:
            raise ArgumentError(f"the template has {missing[0]!r}, but no source holds such tokens")
        if unused := [name for name in self.sets if name not in named]:
            raise ArgumentError(
                f"the template does not say where the tokens of {unused[0]!r} go, from {self.sets[unused[0]].place}"
            )
        if self.files:
            self.sources = [(place, stretches) for place in self.files]
            return
        base = self.sets[named[0]].data if named else None
        if base is None:
            raise ArgumentError(f"the template {template!r} names no tokens, and there is no file of JSON lines that fills it")
        for name in (name for stretch in stretches for name in stretch.fields):
            if name not in base.columns:
                there = ", ".join([*self._sections, *base.columns])
                raise ArgumentError(f"the template names {name!r}, which is no section and no column: there is {there}")
        self.sources = [(named[0], stretches)]

    @property
    def has_text(self) -> bool:
        """Whether there is text to tokenize."""
        return any(stretch.parts for _, stretches in self.sources for stretch in stretches)

    def identity(self) -> list[list[Any]]:
        """Mark that tells the content of the sources from others'."""
        stamps = [["lines", place, *places_of(place).status(place)] for place in self.files]
        return [*(items.identity() for items in self.sets.values()), *stamps]

    # ---- units

    def spans(self, unit_tokens: int) -> list[Span]:
        """Cut the sources into units of about equal numbers of tokens."""
        found: list[Span] = []
        for number, (name, stretches) in enumerate(self.sources):
            if name in self.sets:
                found += self._spans_of_items(number, self.sets[name], stretches, unit_tokens)
            else:
                found += self._spans_of_lines(number, name, stretches, unit_tokens)
        return found

    def _spans_of_items(self, number: int, items: Items, stretches: Sequence[Stretch], unit_tokens: int) -> list[Span]:
        amounts = items.data.lengths.astype(np.int64) + self._elsewhere(stretches, items.section.name)
        for name in {name for stretch in stretches for name in stretch.fields}:
            start = 0
            for table in items.data.shelf.tables(items.data.rows, (name,)):
                if table.schema.field(name).type not in _TEXTS:
                    raise ArgumentError(f"the column {name!r} is no text but {table.schema.field(name).type}")
                sizes = pc.binary_length(table[name]).fill_null(0).to_numpy()
                amounts[start : start + len(table)] += sizes // _BYTES_PER_TOKEN
                start += len(table)
        return [Span(number, first, count) for first, count in _cuts(amounts, unit_tokens)]

    def _spans_of_lines(self, number: int, place: str, stretches: Sequence[Stretch], unit_tokens: int) -> list[Span]:
        with places_of(place).open(place) as file:
            sizes = np.fromiter((len(line) for line in file), np.int64)
        ends = np.append(0, np.cumsum(sizes))
        amounts = sizes // _BYTES_PER_TOKEN + self._elsewhere(stretches, "")
        return [
            Span(number, first, count, int(ends[first]), int(ends[first + count] - ends[first]))
            for first, count in _cuts(amounts, unit_tokens)
        ]

    def _elsewhere(self, stretches: Sequence[Stretch], own: str) -> int:
        """Tokens of a document that are not known yet, about."""
        names = [stretch.section for stretch in stretches if stretch.section]
        return 2 * len(names) + sum(self.sets[name].mean for name in names if name != own)

    def batch(self, span: Span) -> Batch:
        """The documents of a unit."""
        name, stretches = self.sources[span.source]
        fields = list(dict.fromkeys(name for stretch in stretches for name in stretch.fields))
        sections = list(dict.fromkeys(stretch.section for stretch in stretches if stretch.section))
        if name in self.sets:
            return self._batch_of_items(span, self.sets[name], fields, sections)
        return self._batch_of_lines(span, name, fields, sections)

    def _batch_of_items(self, span: Span, items: Items, fields: list[str], sections: list[str]) -> Batch:
        rows = items.data.all_rows()[span.first : span.first + span.count]
        keys: list[str] = []
        columns: dict[str, list[str | None]] = {name: [] for name in fields}
        for table in items.data.shelf.tables(rows, ("key", *fields)):
            keys += table["key"].to_pylist()
            for name in fields:
                columns[name] += table[name].to_pylist()
        others = [name for name in sections if name != items.section.name]
        batch = Batch(keys, columns, {name: [*keys] for name in others}, {items.section.name: rows})
        _require_fields(batch)
        return batch

    def _batch_of_lines(self, span: Span, place: str, fields: list[str], sections: list[str]) -> Batch:
        content = places_of(place).read(place, span.offset, span.size)
        label = place.rpartition("/")[2]
        batch = Batch([], {name: [] for name in fields}, {name: [] for name in sections})
        for number, line in enumerate(content.split(b"\n"), span.first + 1):
            if not line.strip():
                continue
            reason, record = _record(line)
            if reason:
                batch.bad[len(batch.keys)] = reason
            batch.keys.append(f"{label}#{number}")
            for name in fields:
                value = record.get(name)
                if value is not None and (reason := _no_text(value)):
                    batch.bad.setdefault(len(batch.keys) - 1, f"the field {name!r} {reason}")
                    value = None
                batch.fields[name].append(value)
            for name in sections:
                key = record.get(name, record.get("key"))
                batch.items[name].append(key if isinstance(key, str) else None)
        _require_fields(batch)
        return batch

    def item_rows(self, batch: Batch, section: str) -> NDArray[np.int64]:
        """Rows of the items of a section; -1 where there is none, which the batch notes."""
        if section in batch.rows:
            return batch.rows[section]
        shelf = self.sets[section].data.shelf
        failed = set(shelf.failed.tolist())
        found = np.full(len(batch.keys), -1, np.int64)
        for place, key in enumerate(batch.items[section]):
            row = None if key is None else shelf.row_of(key)
            if key is None:
                batch.bad.setdefault(place, f"it names no item of {section!r}")
            elif row is None:
                batch.bad.setdefault(place, f"{section!r} has no item {key!r}")
            elif row in failed:
                batch.bad.setdefault(place, f"the item {key!r} of {section!r} failed when it was tokenized")
            else:
                found[place] = row
        return found


def _record(line: bytes) -> tuple[str, Mapping[str, Any]]:
    """Why a line cannot be used, or empty; and what it holds."""
    try:
        record = json.loads(line)
    except ValueError as error:
        return f"the line is no JSON: {error}", {}
    return ("", record) if isinstance(record, dict) else ("the line is no JSON object", {})


def _no_text(value: Any) -> str:
    """Why a value cannot be tokenized; empty if it can."""
    if not isinstance(value, str):
        return f"is no text but {type(value).__name__}"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "holds half of a character"
    return ""


def _require_fields(batch: Batch) -> None:
    for name, values in batch.fields.items():
        for place, value in enumerate(values):
            if value is None:
                batch.bad.setdefault(place, f"it has no {name!r}")


def _cuts(amounts: NDArray[np.int64], limit: int) -> Iterator[tuple[int, int]]:
    """First documents and counts of units; a unit ends with the document that fills it."""
    if not len(amounts):
        return
    ends = np.cumsum(np.maximum(amounts, 1))
    unit = (ends - np.maximum(amounts, 1)) // limit
    firsts = np.flatnonzero(np.diff(unit, prepend=-1))
    for first, end in zip(firsts.tolist(), [*firsts[1:].tolist(), len(amounts)], strict=True):
        yield first, end - first


class TextIds:
    """A text tokenizer of ``tokenizers`` or ``transformers`` within a vocabulary."""

    def __init__(self, text: Any, vocabulary: Vocabulary) -> None:
        self._text = text
        self._size = vocabulary.size
        self._taken = [
            (low, high, section.name)
            for section in vocabulary.sections
            for low, high in (
                (section.offset, section.offset + section.vocab_size - 1),
                *((marker, marker) for marker in section.markers),
            )
        ]

    @classmethod
    def load(cls, place: str | os.PathLike[str], vocabulary: Vocabulary) -> TextIds:
        """Read a tokenizer: a ``tokenizer.json``, a folder that transformers saved, or a name on the Hugging Face Hub.

        Raises:
            ArgumentError: it cannot be read.
        """
        name = os.fspath(place)
        try:
            if name.endswith(".json"):
                from tokenizers import Tokenizer

                return cls(Tokenizer.from_file(name), vocabulary)
            from transformers import AutoTokenizer

            return cls(AutoTokenizer.from_pretrained(name), vocabulary)
        except Exception as error:
            # The libraries raise errors of many kinds, and plain ones.
            raise ArgumentError(f"the text tokenizer {name} cannot be read: {' '.join(str(error).split())}") from error

    def identity(self) -> str:
        """Mark that tells it from others."""
        core = getattr(self._text, "backend_tokenizer", self._text)
        content = core.to_str() if hasattr(core, "to_str") else json.dumps(self._text.get_vocab(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts; no special tokens are added."""
        if not texts:
            return []
        if hasattr(self._text, "encode_batch"):
            many = getattr(self._text, "encode_batch_fast", self._text.encode_batch)
            return [encoded.ids for encoded in many(list(texts), add_special_tokens=False)]
        found = self._text(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return [list(ids) for ids in found]

    def foreign(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Mask of the ids that are none of text: outside the vocabulary, or of a section."""
        found = (ids < 0) | (ids >= self._size)
        for low, high, _ in self._taken:
            found |= (ids >= low) & (ids <= high)
        return found

    def complaint(self, number: int) -> str:
        """Why an id is none of text."""
        owner = next((name for low, high, name in self._taken if low <= number <= high), None)
        if owner is None:
            return f"its text has the id {number}, outside the vocabulary of {self._size}"
        return f"its text has the id {number}, which belongs to {owner!r}: it holds a string of that section"

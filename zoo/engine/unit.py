"""One unit: its items are read, prepared and encoded, and its part is written. The same on every machine and every worker."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from zoo.engine.contents import Contents
from zoo.engine.parts import Header, part_bytes, part_name, schema_of
from zoo.engine.store import Store
from zoo.engine.work import Done, Hello, Job, Watch, Work
from zoo.errors import ArgumentError, InputError, ItemError, WeightsError, ZooError
from zoo.modality import modality
from zoo.progress import heard_by
from zoo.tokenizer import Prepared, Tokenizer
from zoo.tokenizer.options import names_of, require_values

#: Bytes of prepared items that go to the network in one call. Part of the format of results: it decides what shares a batch.
CHUNK = 64 << 20


@dataclass
class _Encoded:
    """Items of a unit, by their places in it."""

    ids: dict[int, NDArray[Any]] = field(default_factory=dict)
    meta: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    segments: dict[int, tuple[int, ...]] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)


def run_unit(tokenizer: Tokenizer[Any], work: Work, job: Job, watch: Watch) -> Done:
    """Encode a unit and write its part.

    Raises:
        SourceError: a source is not what was listed; nothing is written.
        ArgumentError: an option is wrong.
        OutputError: the part cannot be written.
    """
    encoder = _Encoder(tokenizer, work, job, watch)
    carried: list[Mapping[str, Any]] = []
    read = 0
    medium = modality(work.header.modality)
    limits: dict[str, Any] = {"budget": work.budget, "patience": work.patience, "accept_missing": work.accept_missing}
    contents = Contents(job.rows, work.carried, medium, **limits)
    for index, content, kept, broken in contents:
        carried.append(kept)
        if content is not None:
            read += _size(content)
        encoder.take(index, content, broken)
        # What is long is not held twice while it is encoded.
        content = None
        encoder.flush(least=CHUNK)
    encoder.flush()
    watch("write", ())
    found = encoder.found
    columns = _columns(job, work, found, carried)
    header = replace(work.header, unit=job.unit)
    schema = schema_of(header, pa.schema([(column.column, column.type) for column in work.carried]))
    Store(work.place).write(part_name(job.unit), part_bytes(schema, columns))
    extent = sum(map(medium.extent, found.meta.values()))
    return Done(job.unit, len(job.rows), len(found.bad), sum(map(len, found.ids.values())), read, extent)


def hello_of(tokenizer: Tokenizer[Any], options: Mapping[str, Any]) -> Hello:
    """Facts that a run has to know of its tokenizer.

    Raises:
        ArgumentError: it has no ids, or takes no such option.
    """
    split_options(tokenizer, options)
    kind = modality(tokenizer.spec.modality)
    device = tokenizer.device.type
    devices = torch.cuda.device_count() if device == "cuda" else 1
    header = Header.of_spec(tokenizer.spec, options, batch_exact=device == "cpu")
    return Hello(header, kind.extensions, kind.limits, kind.extent_unit, device, devices)


class _Encoder:
    """Prepares items one by one, and encodes them when enough have come together."""

    def __init__(self, tokenizer: Tokenizer[Any], work: Work, job: Job, watch: Watch) -> None:
        self._tokenizer, self._work, self._job, self._watch = tokenizer, work, job, watch
        self._preparing, self._encoding = split_options(tokenizer, work.options)
        self._require = modality(work.header.modality).require_within if work.limits else None
        self._waiting: list[tuple[int, Prepared]] = []
        self._held = 0
        self.found = _Encoded()

    def take(self, index: int, content: Any, broken: str | None) -> None:
        """One item, or the reason why there is none."""
        bad = self.found.bad
        if content is None or index in self._job.bad:
            bad[index] = in_a_line(self._job.bad.get(index) or broken or "it cannot be read")
            return
        self._watch("prepare", (index,))
        try:
            # Samples have no header that could be looked at.
            if self._require is not None and not isinstance(content, tuple):
                self._require(content, None, **self._work.limits)
            [prepared] = self._tokenizer.prepare([content], **self._preparing)
            if self._require is not None:
                self._require(None, prepared.meta, **self._work.limits)
        except ArgumentError:
            raise
        except Exception as error:
            bad[index] = reason_of(error)
            return
        if index in self._job.alone:
            self._encode([(index, prepared)])
            return
        self._waiting.append((index, prepared))
        # What is no dictionary reads its tensors when they are asked for, from the content that it holds.
        held = isinstance(prepared.tensors, dict)
        self._held += sum(tensor.nbytes for tensor in prepared.tensors.values()) if held else _size(content)

    def flush(self, least: int = 0) -> None:
        """Encode what has come together, if it is enough, items of one size side by side."""
        if self._held < least:
            return
        waiting, self._waiting, self._held = self._waiting, [], 0
        if waiting:
            self._encode(sorted(waiting, key=lambda pair: (pair[1].amount, pair[0])))

    def _encode(self, items: Sequence[tuple[int, Prepared]]) -> None:
        indices = [index for index, _ in items]
        self._watch("encode", indices)
        try:
            # Every batch that is done is a sign of life.
            with heard_by(lambda: self._watch("encode", indices)):
                tokens = self._tokenizer.encode_prepared([prepared for _, prepared in items], **self._encoding)
        except (ArgumentError, WeightsError):
            raise
        except Exception as error:
            if isinstance(error, ItemError):
                self.found.bad[items[error.index][0]] = reason_of(error)
                self._encode_rest([pair for place, pair in enumerate(items) if place != error.index])
            elif len(items) == 1:
                self.found.bad[items[0][0]] = reason_of(error)
            else:
                # A library's own error does not say whose fault it is; one by one does.
                for pair in items:
                    self._encode([pair])
            return
        self._keep(indices, tokens)

    def _encode_rest(self, items: Sequence[tuple[int, Prepared]]) -> None:
        if items:
            self._encode(items)

    def _keep(self, indices: Sequence[int], tokens: Any) -> None:
        size = self._work.header.vocab_size
        narrow = self._work.header.id_type.to_pandas_dtype()
        metas: Sequence[Mapping[str, Any]] = tokens.meta or ({},) * len(indices)
        for index, ids, meta in zip(indices, tokens.unpadded(), metas, strict=True):
            values = ids.cpu().numpy()
            if len(values) and not 0 <= values.min() <= values.max() < size:
                self.found.bad[index] = f"ids from {values.min()} to {values.max()} are outside the vocabulary of {size}"
                continue
            self.found.ids[index] = values.astype(narrow)
            self.found.meta[index] = meta
            if tokens.segments:
                self.found.segments[index] = tuple(dict.fromkeys(min(end, len(values)) for end in tokens.segments))


def _size(content: bytes | str | tuple[Any, int]) -> int:
    """Bytes of an item as it was read, or characters."""
    return len(content) if isinstance(content, bytes | str) else int(content[0].nbytes)


def split_options(tokenizer: Tokenizer[Any], options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of encoding by who takes them: `prepare`, `encode_prepared`, or both.

    Raises:
        ArgumentError: nobody takes one, or it has another type.
    """
    methods: tuple[Callable[..., Any], ...] = (tokenizer.prepare, tokenizer.encode_prepared)
    taken = [names_of(method) for method in methods]
    if unknown := [name for name in options if not any(name in names for names in taken)]:
        raise ArgumentError(f"{tokenizer.name} takes no option {unknown[0]!r} to encode")
    preparing, encoding = ({name: value for name, value in options.items() if name in names} for names in taken)
    for method, given in zip(methods, (preparing, encoding), strict=True):
        require_values(method, given)
    return preparing, encoding


def reason_of(error: Exception) -> str:
    """Why an item failed, in one line that is the same every time."""
    if isinstance(error, InputError):
        reason = error.reason
    elif isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        reason = "there is not enough memory for it"
    elif isinstance(error, ZooError):
        reason = str(error)
    else:
        reason = f"{type(error).__name__}: {error}"
    return in_a_line(reason)


def in_a_line(reason: str) -> str:
    """A reason in one line, without addresses in memory, which are others in every run."""
    return re.sub(r"\b0x[0-9a-fA-F]{6,}\b", "0x…", " ".join(reason.split())).removesuffix(": ")


def _columns(job: Job, work: Work, found: _Encoded, carried: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Columns of a part, in listing order."""
    count = range(len(job.rows))
    metas = [found.meta.get(index, {}) for index in count]
    columns: dict[str, Any] = {
        "key": [row.key for row in job.rows],
        "ids": _ids([found.ids.get(index) for index in count], work.header.id_type),
        "length": [len(found.ids[index]) if index in found.ids else None for index in count],
        "segments": [found.segments.get(index) for index in count],
        "error": [found.bad.get(index) for index in count],
    }
    columns |= {name: [meta.get(name) for meta in metas] for name in work.header.meta}
    return columns | {column.column: [kept[column.column] for kept in carried] for column in work.carried}


def _ids(sequences: Iterable[NDArray[Any] | None], kind: pa.DataType) -> pa.Array:
    """Sequences as one array of lists, null where there is none."""
    sequences = list(sequences)
    empty = np.empty(0, kind.to_pandas_dtype())
    values = pa.array(np.concatenate([empty, *(ids for ids in sequences if ids is not None)]))
    offsets = np.cumsum([0, *(0 if ids is None else len(ids) for ids in sequences)])
    if offsets[-1] >= 1 << 31:
        raise ArgumentError("a unit has more than 2³¹ ids: choose a smaller --unit-items or --unit-mb")
    missing = pa.array([ids is None for ids in sequences])
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), values, type=pa.list_(pa.field("element", kind)), mask=missing
    )

"""Messages between a run and its workers. Does not import torch."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from zoo.engine.parts import Header
from zoo.engine.sources import Carried, Row
from zoo.errors import ArgumentError, ZooError

Phase = Literal["prepare", "encode", "write"]
#: Told which items of the unit are worked on, so that whoever watches knows whose fault a crash was.
Watch = Callable[[Phase, Sequence[int]], None]


class WorkerError(ZooError):
    """A worker process cannot do its work, whatever the items are: it does not start, or dies between items."""


@dataclass(frozen=True)
class Loading:
    """Instructions for a worker to get its tokenizer.

    Attributes:
        name: of the catalogue, say; ``None`` if the tokenizer itself is given.
        device, files, parts: as of `zoo.load`.
        pickled: the tokenizer itself.
    """

    name: str | None
    device: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    parts: tuple[str, ...] | None = None
    pickled: bytes | None = None

    @classmethod
    def of(cls, tokenizer: Any, **settings: Any) -> Loading:
        """The loading of a tokenizer, or of a name.

        Raises:
            ArgumentError: the tokenizer cannot be handed to another process.
        """
        if isinstance(tokenizer, str):
            return cls(tokenizer, **settings)
        try:
            return cls(None, pickled=pickle.dumps(tokenizer))
        except Exception as error:
            raise ArgumentError(
                f"{type(tokenizer).__name__} cannot be handed to worker processes ({error}): pass a name, or workers=0"
            ) from error

    def load(self) -> Any:
        """The tokenizer."""
        if self.pickled is not None:
            return pickle.loads(self.pickled)
        from zoo import hub

        assert self.name is not None
        return hub.load(self.name, device=self.device, files=dict(self.files) or None, parts=self.parts)


@dataclass(frozen=True)
class Hello:
    """Facts that a run has to know of its tokenizer.

    Attributes:
        header: of the parts.
        extensions: of its media in folders; ``None`` for all files.
        limits: names of the limits that its kind of media has.
        extent_unit: what its data sets are measured in, besides items.
        device: type of the device that it is on.
        devices: how many of them there are.
    """

    header: Header
    extensions: tuple[str, ...] | None
    limits: tuple[str, ...]
    extent_unit: str | None
    device: str
    devices: int


@dataclass(frozen=True)
class Work:
    """Settings that are the same for all units of a run.

    Attributes:
        place: of the folder that parts go to.
        header: of the parts.
        options: of encoding.
        limits: of the modality, such as ``max_seconds``.
        carried: columns that are carried over.
        budget: bytes that are read ahead.
        patience: seconds that a source is waited for.
        accept_missing: items that vanished count as failed.
        item_seconds: that preparing one item may take.
    """

    place: str
    header: Header
    options: Mapping[str, Any]
    limits: Mapping[str, Any]
    carried: tuple[Carried, ...]
    budget: int
    patience: float
    accept_missing: bool
    item_seconds: float


@dataclass(frozen=True)
class Job:
    """One unit.

    Attributes:
        unit: its number.
        rows: its items.
        bad: items that are known to fail, with the reason.
        alone: items that are encoded one by one, because they crashed together.
    """

    unit: int
    rows: Sequence[Row]
    bad: Mapping[int, str] = field(default_factory=dict)
    alone: frozenset[int] = frozenset()

    def without(self, index: int, reason: str) -> Job:
        """The same unit, in which an item has failed."""
        return replace(self, bad={**self.bad, index: reason})


@dataclass(frozen=True)
class Done:
    """Result of a unit.

    Attributes:
        unit: its number.
        items, failures, ids: how many.
        bytes: that were read.
        extent: in the unit of the modality, such as hours.
        seconds: of CPU.
    """

    unit: int
    items: int
    failures: int
    ids: int
    bytes: int
    extent: float
    seconds: float = 0.0

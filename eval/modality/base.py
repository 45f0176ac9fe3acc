"""Interface of a kind of media to the evaluation: its metrics, its baseline, and how an item is read, measured and shown.

A module such as `zoo.eval.modality.audio` is a `Measures`; the ``metrics`` home of a record in `zoo.modality` names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from numpy.typing import NDArray

from zoo.modality import modality
from zoo.spec import Spec

Row = Mapping[str, Any]
MetricFunction = Callable[..., Any]


@dataclass(frozen=True)
class Network:
    """Weights that a metric needs and this package does not hold.

    Attributes:
        load: takes a path (``None`` for the public weights), the device to compute on, and whether to download what is not on
            this machine yet; returns the function that the metric computes. Raises ``OSError`` if the public weights are not
            here and must not or cannot be fetched, and a `ZooError` if the path holds something else.
        accepts: what a path has to name.
        source: where the public ones are; empty if there are none that can be loaded.
    """

    load: Callable[[Path | None, torch.device, bool], MetricFunction]
    accepts: str
    source: str = ""


@dataclass(frozen=True)
class Metric:
    """One figure per item, or one for the whole set.

    Attributes:
        title, unit: for tables and plots.
        higher_is_better: which way is up.
        function: the measurement of an item, ``None`` where a network brings it. It returns ``None`` where the figure is not
            defined for the item.
        about: definition and source in one sentence.
        packages: what has to be importable.
        extra: the extra of this package that installs them.
        network: weights that it cannot do without.
        of_tokens: whether the function takes the tokenizer, an item's tokens and the original instead; the baseline, which has
            no tokens, has no such figure.
        distance: for a figure of the whole set: the function then gives the features ``[dim]`` of a single item, and this one
            compares those of all originals with those of all reconstructions, ``[items, dim]`` each.
    """

    title: str
    unit: str
    higher_is_better: bool
    function: MetricFunction | None
    about: str
    packages: tuple[str, ...] = ()
    extra: str = "eval"
    network: Network | None = None
    of_tokens: bool = False
    distance: Callable[[NDArray[Any], NDArray[Any]], float] | None = None

    def why_skipped(self) -> str | None:
        """Reason why it cannot run, and how to get what is missing; ``None`` if nothing is."""
        missing = [package for package in self.packages if find_spec(package) is None]
        return f'{", ".join(missing)} is not installed: pip install "tokenizer-zoo[{self.extra}]"' if missing else None


@dataclass(frozen=True)
class Variant:
    """A reconstruction from the first tokens of an item.

    Attributes:
        tokens: how many tokens it was decoded from.
        bits: what they take.
        decoded: the media, comparable with its original.
        figures, baseline_figures: title, value and unit of each metric defined for it, and for the baseline of the same bits.
    """

    tokens: int
    bits: int
    decoded: Any
    figures: Sequence[tuple[str, float, str]]
    baseline_figures: Sequence[tuple[str, float, str]]


@runtime_checkable
class Measures(Protocol):
    """Interface of a modality's module to the reconstruction run and the report.

    Media are tensors or, of shapes, meshes, or, of files, their bytes.

    Attributes:
        EXTENSIONS: files that are taken from a folder; ``None`` for all of them.
        METRICS: by name, the most telling first: items are ranked by the first one that is defined.
        BASELINE: short name of the equal-bitrate baseline.
        NOTES: how items are compared and what the baseline is, for the report.
        TEMPLATE: how `shown` looks in the report.
        ON_DEVICE: whether metrics compute where the tokenizer is, rather than on the CPU.

    A module may say ``NEEDS_META = True`` where ids do not decode without what they remember of their item.
    """

    EXTENSIONS: tuple[str, ...] | None
    METRICS: Mapping[str, Metric]
    BASELINE: str
    NOTES: str
    TEMPLATE: str
    ON_DEVICE: bool

    def read(self, path: str, spec: Spec, options: Mapping[str, Any]) -> Any:
        """An item as the tokenizer takes it, read with the options of its ``encode``."""

    def comparable(self, decoded: Any, reference: Any) -> Any:
        """Decoded media in the size and range of the original."""

    def properties(self, reference: Any, spec: Spec) -> dict[str, Any]:
        """Columns that say how large an item is."""

    def baseline(self, reference: Any, spec: Spec, bits: int) -> Any:
        """Equal-bitrate baseline of an item."""

    def measure(self, function: MetricFunction, spec: Spec, *signals: Any) -> Any:
        """Apply a metric's function to an original and its reconstruction, or to one of them."""

    def tokens_per(self, rows: Sequence[Row], spec: Spec) -> dict[str, float]:
        """Tokens that one unit of media takes, by the unit's name."""

    def totals(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Amount of media and speed, for ``metrics.json``."""

    def heading(self, summary: Mapping[str, Any]) -> str:
        """Amount of media and rate, in a line."""

    def tiles(self, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Figures for the top of the report: a number, and what it is."""

    def shown(self, reference: Any, variants: Sequence[Variant], spec: Spec) -> dict[str, Any]:
        """Content of the template for an item; the last variant is decoded from all tokens."""


def measures_of(name: str) -> Measures:
    """The module that measures a kind of media.

    Raises:
        InputError: there are no metrics for it yet.
    """
    return cast(Measures, modality(name).home("metrics"))


def is_measured_by(name: str, module: Any) -> bool:
    """Whether a kind of media is measured by a module such as `zoo.eval.modality.image`.

    Raises:
        InputError: there are no metrics for it yet.
    """
    return measures_of(name) is module

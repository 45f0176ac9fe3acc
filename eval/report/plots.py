"""The plots of the report, as data URIs, drawn so that they read on a light and on a dark page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zoo.eval.modality.base import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, BASELINE, INK = "#4f6bed", "#c2842b", "#8a8f98"


def canvas(width: float, height: float, rows: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure, its size in inches, and its axes one above the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(np.ravel(figure.subplots(rows, 1, **options)))


def as_uri(figure: Figure, kind: str = "svg") -> str:
    """A data URI of the figure: ``"svg"`` for lines, ``"png"`` for pictures."""
    for axis in figure.axes:
        axis.tick_params(which="both", colors=INK, labelsize=8)
        axis.patch.set_alpha(0)
        for label in (axis.title, axis.xaxis.label, axis.yaxis.label):
            label.set_color(INK)
            label.set_fontsize(9)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=130, transparent=True)
    media_type = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return f"data:{media_type};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def histogram(metric: Metric, ours: Sequence[float], baseline: Sequence[float]) -> str:
    """Distribution of a figure over the items."""
    edges = np.histogram_bin_edges([*ours, *baseline], bins=min(40, max(8, len(ours) // 2))).tolist()
    figure, [axis] = canvas(3.6, 2.3)
    axis.hist(baseline, edges, color=BASELINE, alpha=0.55, label="baseline")
    axis.hist(ours, edges, color=OURS, alpha=0.75, label="reconstruction")
    axis.set_title(_title(metric))
    figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=INK, fontsize=7)
    return as_uri(figure)


def rate_distortion(metric: Metric, name: str, curve: Iterable[Mapping[str, Any]]) -> str | None:
    """The mean of a figure against the bits spent, beside the baseline; ``None`` where it is not defined."""
    drawn = [point for point in curve if point["metrics"][name]["ours"] is not None]
    if not drawn:
        return None
    bits = [point["bits"] for point in drawn]
    figure, [axis] = canvas(4.0, 3.0)
    for key, colour, style, label in (("baseline", BASELINE, "--", "baseline"), ("ours", OURS, "-", "reconstruction")):
        values = [np.nan if (value := point["metrics"][name][key]) is None else value for point in drawn]
        axis.plot(bits, values, style, color=colour, marker="o", markersize=4, linewidth=1.8, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(bits, [f"{value:.0f}" for value in bits])
    axis.minorticks_off()
    axis.set_xlabel("bits per item")
    axis.set_title(f"{_title(metric)} {'↑' if metric.higher_is_better else '↓'}")
    axis.grid(color=INK, alpha=0.2, linewidth=0.6)
    axis.legend(frameon=False, labelcolor=INK, fontsize=8)
    return as_uri(figure)


def usage(counts: NDArray[np.int64]) -> str:
    """Number of times that each code occurred, most frequent first, beside an even use."""
    ranked = np.sort(counts)[::-1]
    # Runs of equal counts, so that a large vocabulary draws as fast as a small one.
    edges = np.flatnonzero(np.diff(ranked, prepend=-1, append=-1))
    figure, [axis] = canvas(9.6, 2.6)
    axis.stairs(ranked[edges[:-1]], edges, fill=True, color=OURS, alpha=0.75, linewidth=0)
    axis.axhline(counts.sum() / len(counts), color=BASELINE, linewidth=1, label="even use")
    axis.set_xlim(0, len(counts))
    axis.set_xlabel("codes, most frequent first")
    axis.set_ylabel("occurrences")
    axis.legend(frameon=False, labelcolor=INK, fontsize=8)
    return as_uri(figure)


def positions(entropy: Sequence[float], items: int) -> str:
    """Entropy of the ids at each position, beside the most that this number of items can show."""
    figure, [axis] = canvas(9.6, 2.6)
    axis.stairs(entropy, np.arange(len(entropy) + 1), fill=True, color=OURS, alpha=0.75, linewidth=0)
    axis.axhline(np.log2(items), color=BASELINE, linewidth=1, label=f"log2 of {items} items, the most that can be seen")
    axis.set_xlim(0, len(entropy))
    axis.set_xlabel("position in the sequence")
    axis.set_ylabel("bits")
    axis.legend(frameon=False, labelcolor=INK, fontsize=8, loc="lower right")
    return as_uri(figure)


def _title(metric: Metric) -> str:
    return f"{metric.title} ({metric.unit})" if metric.unit else metric.title

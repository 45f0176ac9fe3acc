"""The picture of what ``zoo tokenize`` does with a data set: ``python cards/site/flow.py`` writes ``cards/engine-flow.png``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

TARGET = Path(__file__).resolve().parent.parent / "engine-flow.png"
INK, LINE = "#1d2433", "#5b6785"
SOURCE, PLAN, WORK, RESULT = "#e8ecf5", "#fdf0d5", "#dcefe3", "#e4e0f4"


def box(axes: Any, x: float, y: float, width: float, height: float, colour: str, title: str, text: str = "") -> None:
    """A box by its lower left corner, with a title and lines of text."""
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", fc=colour, ec=LINE, lw=1)
    axes.add_patch(shape)
    middle = x + width / 2
    if text:
        axes.text(middle, y + height - 0.18, title, ha="center", va="top", size=9.5, color=INK, weight="bold")
        axes.text(middle, y + height - 0.56, text, ha="center", va="top", size=8, color=INK, linespacing=1.4)
    else:
        axes.text(middle, y + height / 2, title, ha="center", va="center", size=9, color=INK)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], style: str = "-|>") -> None:
    """An arrow between two points."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": style, "color": LINE, "lw": 1.3, "shrinkA": 2, "shrinkB": 2})


def draw() -> plt.Figure:
    """Sources on the left, the plan, the workers with what each does, parts on the right."""
    figure, axes = plt.subplots(figsize=(11, 4.5))
    axes.set(xlim=(0, 15.4), ylim=(0, 6.3))
    axes.axis("off")
    box(axes, 0.1, 2.0, 2.2, 2.7, SOURCE, "sources", "folders, globs,\nURLs, tars,\nParquet, Arrow,\nJSON lines")
    box(
        axes,
        3.0,
        2.0,
        2.6,
        2.7,
        PLAN,
        "plan, written once",
        "listing: unique keys\nunits of items\ncheckpoint's fingerprint\noptions",
    )
    arrow(axes, (2.3, 3.35), (3.0, 3.35))
    for worker, bottom in enumerate((3.5, 0.3)):
        frame = FancyBboxPatch((6.4, bottom), 5.9, 2.6, boxstyle="round,pad=0,rounding_size=0.15", fc="white", ec=LINE, lw=1)
        axes.add_patch(frame)
        axes.text(6.6, bottom + 2.36, f"worker {worker + 1}: a unit at a time", size=8.5, color=INK, va="center")
        for place, (name, text) in enumerate(
            (("read", "threads"), ("prepare", "decode,\nresample,\nresize"), ("encode", "batches of\nequal size"))
        ):
            left = 6.6 + 1.95 * place
            box(axes, left, bottom + 0.62, 1.55, 1.45, WORK, name, text)
            if place:
                arrow(axes, (left - 0.4, bottom + 1.35), (left, bottom + 1.35))
        axes.text(
            9.35,
            bottom + 0.3,
            "bytes in flight are limited; a bad item is a row with the reason",
            size=7.5,
            color=INK,
            ha="center",
        )
        arrow(axes, (5.6, 3.35), (6.4, bottom + 1.35))
        box(axes, 13.0, bottom + 0.65, 2.3, 1.4, RESULT, f"part-00000{worker}", "Parquet; there whole\nor not at all")
        arrow(axes, (12.3, bottom + 1.35), (13.0, bottom + 1.35))
    axes.text(
        4.3,
        1.55,
        "killed, interrupted, no room?\nThe same command does the\nunits that have no part yet.",
        ha="center",
        va="top",
        size=8.5,
        color=INK,
        style="italic",
    )
    figure.tight_layout(pad=0.3)
    return figure


if __name__ == "__main__":
    draw().savefig(TARGET, dpi=110)

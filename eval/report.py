"""The report of a reconstruction run: one HTML file that needs nothing else, and a table for the terminal."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from zoo.media import replacing
from zoo.nn.losses import LogMel
from zoo.tokenizer import Tokenizer

Row = Mapping[str, Any]

CLIP_SECONDS = 8.0
SHOWN = 3
OURS, BASELINE, INK = "#4f6bed", "#c2842b", "#8a8f98"


def write(
    path: Path, tokenizer: Tokenizer[Any], measuring: ModuleType, rows: Sequence[Row], summary: Mapping[str, Any]
) -> None:
    """Write ``report.html``: summary, best, median and worst items to hear and see, histograms, token usage."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((resources.files("zoo.eval") / "report.html.j2").read_text(encoding="utf-8"))
    good = [row for row in rows if row["error"] is None]
    ranked_by = next((name for name in summary["metrics"] if summary["metrics"][name]["ours"]), None)
    sections = []
    if ranked_by is not None:
        metric = _metric(measuring, ranked_by)
        for title, chosen in _best_median_worst(good, ranked_by, metric["higher_is_better"]):
            sections.append((title, [_item(tokenizer, measuring, row, summary["metrics"]) for row in chosen]))
    html = template.render(
        summary=summary,
        table=[_table_row(measuring, name, figures) for name, figures in summary["metrics"].items()],
        skipped={_metric(measuring, name)["title"]: reason for name, reason in summary["skipped"].items()},
        sections=sections,
        ranked_by=_metric(measuring, ranked_by)["title"] if ranked_by else "",
        histograms=[picture for name in summary["metrics"] if (picture := _histogram(measuring, name, good))],
        usage=_usage(good, summary["tokens"]["vocab_size"]) if good else None,
    )
    with replacing(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def print_summary(summary: Mapping[str, Any], out: Path) -> None:
    """The figures as a table, and where the report is."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    spec, tokens = summary["tokenizer"], summary["tokens"]
    table = Table(title=f"{spec['name']}: {summary['items'] - summary['failed']} items, {summary['seconds']:.1f} s")
    for column in ("metric", "reconstruction", "8-bit mu-law, same bit rate"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, figures in summary["metrics"].items():
        table.add_row(name, _number(figures["ours"]), _number(figures["mu_law"]))
    for name, reason in summary["skipped"].items():
        table.add_row(f"[dim]{name}[/dim]", f"[dim]skipped: {escape(reason)}[/dim]", "")
    console = Console()
    console.print(table)
    console.print(
        f"{tokens['tokens']} tokens, {spec['bit_rate']:.0f} bit/s; {tokens['used']:.0%} of {tokens['vocab_size']} codes used, "
        f"perplexity {tokens['perplexity']:.0f}"
    )
    for file, reason in summary["errors"].items():
        console.print(f"[red]failed[/red] {escape(file)}: {escape(reason)}")
    console.print(f"report: {out / 'report.html'}")


def _number(statistics: Mapping[str, float] | None) -> str:
    return "undefined" if statistics is None else f"{statistics['mean']:.3f} ± {statistics['std']:.3f}"


def _metric(measuring: ModuleType, name: str) -> dict[str, Any]:
    if name in measuring.METRICS:
        return vars(measuring.METRICS[name])
    return {"title": name.upper(), "unit": "", "higher_is_better": True, "about": measuring.NEEDS_NETWORK[name]}


def _table_row(measuring: ModuleType, name: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    return _metric(measuring, name) | {"ours": figures["ours"], "baseline": figures["mu_law"]}


def _best_median_worst(rows: Sequence[Row], name: str, higher_is_better: bool) -> list[tuple[str, list[Row]]]:
    """Up to three items each of both ends and the middle; with few items, each is shown once."""
    ranked = sorted((row for row in rows if row[name] is not None), key=lambda row: row[name], reverse=higher_is_better)
    if len(ranked) <= 3 * SHOWN:
        return [("All items, best first", ranked)]
    middle = len(ranked) // 2 - SHOWN // 2
    return [
        ("Best", ranked[:SHOWN]),
        ("Median", ranked[middle : middle + SHOWN]),
        ("Worst", ranked[-SHOWN:]),
    ]


def _item(tokenizer: Tokenizer[Any], measuring: ModuleType, row: Row, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """An item to hear and see; its reconstruction is decoded again from the stored ids."""
    rate = tokenizer.spec.sample_rate
    assert rate is not None
    original = measuring.read(row["file"], rate)
    decoded = tokenizer.decode(tokenizer.tokens([torch.tensor(row["ids"])]))[0].float().cpu()[:, : original.shape[1]]
    clip = int(CLIP_SECONDS * rate)
    cut = original.shape[1] > clip
    original, decoded = original[:, :clip], decoded[:, :clip]
    return {
        "name": Path(row["file"]).name,
        "seconds": row["seconds"],
        "tokens": row["tokens"],
        "cut": CLIP_SECONDS if cut else None,
        "figures": [
            (_metric(measuring, name)["title"], row[name], _metric(measuring, name)["unit"])
            for name in metrics
            if row[name] is not None
        ],
        "original": measuring.encoded_clip(original, rate),
        "decoded": measuring.encoded_clip(decoded, rate),
        "picture": _spectrograms(original, decoded, rate),
    }


def _spectrograms(original: Float[Tensor, "1 samples"], decoded: Float[Tensor, "1 samples"], rate: int) -> str:
    """Log-mel spectrograms one above the other on one colour scale, 70 dB deep."""
    import matplotlib.pyplot as plt

    mel = LogMel(rate, hop_length=max(64, original.shape[1] // 900))
    padded = [torch.nn.functional.pad(audio, (0, max(0, 1024 - audio.shape[1]))) for audio in (original, decoded)]
    pictures = [mel(audio)[0].numpy() * (20 / np.log(10)) for audio in padded]
    top = float(pictures[0].max())
    seconds = original.shape[1] / rate
    figure, axes = plt.subplots(2, 1, figsize=(7.2, 3.4), sharex=True, sharey=True, layout="constrained")
    for axis, picture, title in zip(axes, pictures, ("original", "reconstruction"), strict=True):
        axis.imshow(
            picture, origin="lower", aspect="auto", cmap="magma", vmin=top - 70, vmax=top, extent=(0, seconds, 0, len(picture))
        )
        axis.set_ylabel(f"{title}\nmel band", color=INK)
        _quiet(axis)
    axes[1].set_xlabel("seconds", color=INK)
    return _as_uri(figure)


def _histogram(measuring: ModuleType, name: str, rows: Sequence[Row]) -> str | None:
    import matplotlib.pyplot as plt

    ours = [row[name] for row in rows if row[name] is not None]
    baseline = [row[f"baseline_{name}"] for row in rows if row[f"baseline_{name}"] is not None]
    if not ours:
        return None
    metric = _metric(measuring, name)
    edges = np.histogram_bin_edges([*ours, *baseline], bins=min(40, max(8, len(ours) // 2))).tolist()
    figure, axis = plt.subplots(figsize=(3.6, 2.3), layout="constrained")
    axis.hist(baseline, edges, color=BASELINE, alpha=0.55, label="µ-law")
    axis.hist(ours, edges, color=OURS, alpha=0.75, label="reconstruction")
    unit = f" ({metric['unit']})" if metric["unit"] else ""
    axis.set_title(f"{metric['title']}{unit}", color=INK, fontsize=10)
    axis.legend(frameon=False, labelcolor=INK, fontsize=7)
    _quiet(axis)
    return _as_uri(figure)


def _usage(rows: Sequence[Row], vocab_size: int) -> str:
    """How often each code occurred, most frequent first, beside an even use."""
    import matplotlib.pyplot as plt

    counts = np.sort(np.bincount([i for row in rows for i in row["ids"]], minlength=vocab_size))[::-1]
    figure, axis = plt.subplots(figsize=(7.2, 2.3), layout="constrained")
    axis.fill_between(np.arange(vocab_size), counts, step="mid", color=OURS, alpha=0.75, linewidth=0)
    axis.axhline(counts.sum() / vocab_size, color=BASELINE, linewidth=1, label="even use")
    axis.set_xlim(0, vocab_size)
    axis.set_xlabel("codes, most frequent first", color=INK)
    axis.set_ylabel("occurrences", color=INK)
    axis.legend(frameon=False, labelcolor=INK)
    _quiet(axis)
    return _as_uri(figure)


def _quiet(axis: Any) -> None:
    """Axes that read on a light and on a dark page."""
    axis.tick_params(colors=INK, labelsize=8)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    axis.patch.set_alpha(0)


def _as_uri(figure: Any) -> str:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, transparent=True)
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

"""The report of a reconstruction run: one HTML file that needs nothing else, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from zoo.eval.modality.base import Metric, Row, Variant, measures_of
from zoo.eval.plan import Plan
from zoo.eval.report import plots
from zoo.media import replacing

SHOWN = 3

Sections = Sequence[tuple[str, Sequence[Mapping[str, Any]]]]


def write(path: Path, plan: Plan, rows: Sequence[Row], summary: Mapping[str, Any]) -> None:
    """Write ``report.html``: summary, rate against distortion, best, median and worst items, distributions, token usage."""
    import jinja2

    loader = jinja2.FunctionLoader(lambda name: (resources.files("zoo.eval.report") / name).read_text(encoding="utf-8"))
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    metrics = plan.modality.METRICS
    good = [row for row in rows if row["error"] is None]
    ranked_by = next((name for name in plan.functions if summary["metrics"][name]["ours"]), None)
    sections = []
    if ranked_by is not None:
        sections = [
            (title, [_item(plan, row, summary["curve"]) for row in chosen])
            for title, chosen in _best_median_worst(good, ranked_by, metrics[ranked_by].higher_is_better)
        ]
    html = environment.get_template("report.html.j2").render(
        summary=summary,
        modality=plan.modality,
        heading=plan.modality.heading(summary),
        tiles=[*plan.modality.tiles(summary), *_usage_tiles(summary["tokens"])],
        metrics=metrics,
        reported=_reported(metrics, summary),
        curves=_curves(metrics, summary),
        steps=_slider_steps(summary["curve"], sections),
        sections=sections,
        ranked_by=metrics[ranked_by].title if ranked_by else "",
        histograms=_histograms(plan, good),
        usage=_usage(good, summary["tokens"]),
        positions=_positions(summary["tokens"]["position_entropy_bits"], len(good)),
        options=[f"{name} {value}" for settings in summary["options"].values() for name, value in settings.items()],
    )
    with replacing(path) as temporary:
        temporary.write_text(html, encoding="utf-8", errors="backslashreplace")


def print_summary(summary: Mapping[str, Any], out: Path) -> None:
    """The figures as a table, and where the report is."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    spec, tokens = summary["tokenizer"], summary["tokens"]
    heading = measures_of(spec["modality"]).heading(summary)
    table = Table(title=f"{spec['name']}: {summary['items'] - summary['failed']} items, {heading}")
    for column in ("metric", "reconstruction", summary["baseline"]):
        table.add_column(column, justify="left" if column == "metric" else "right")
    undefined = [name for name, figures in summary["metrics"].items() if not (figures["ours"] or figures["baseline"])]
    for name, figures in summary["metrics"].items():
        if name not in undefined:
            table.add_row(name, _number(figures["ours"]), _number(figures["baseline"]))
    console = Console()
    console.print(table)
    if undefined:
        console.print(f"[dim]undefined for these items: {', '.join(undefined)}[/dim]")
    for name, reason in summary["skipped"].items():
        console.print(f"[dim]{name} skipped: {escape(reason)}[/dim]")
    console.print(
        f"{tokens['tokens']} tokens; {tokens['used']:.1%} of {tokens['vocab_size']} codes used, "
        f"perplexity {tokens['perplexity']:.0f}"
    )
    for file, reason in summary["errors"].items():
        console.print(f"[red]failed[/red] {escape(file)}: {escape(reason)}")
    console.print(f"report: {out / 'report.html'}")


def _number(statistics: Mapping[str, float] | None) -> str:
    if statistics is None:
        return "undefined"
    if "value" in statistics:
        return f"{statistics['value']:.3f}"
    return f"{statistics['mean']:.3f} ± {statistics['std']:.3f}"


def _usage_tiles(tokens: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (f"{tokens['used'] * 100:.3g} %", f"of {tokens['vocab_size']} codes used"),
        (f"{tokens['perplexity']:.0f}", f"perplexity, {tokens['entropy_bits']:.2f} bits per token"),
    ]


def _reported(metrics: Mapping[str, Metric], summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Published figures, each with ours of the same name where there is one."""
    names = {metric.title.lower(): name for name, metric in metrics.items()}
    return [{**figure, "ours": _ours(names, figure["metric"], summary)} for figure in summary["reported"]]


def _ours(names: Mapping[str, str], reported: str, summary: Mapping[str, Any]) -> float | None:
    """Our figure for what somebody else calls ``PSNR`` or, of a prefix, ``PSNR, 32 tokens``."""
    title, _, prefix = reported.partition(", ")
    name = names.get(title.lower())
    if name is None or name not in summary["metrics"]:
        return None
    if not prefix:
        ours = summary["metrics"][name]["ours"]
        return ours and ours.get("mean", ours.get("value"))
    points = (point for point in summary["curve"] if f"{point['tokens']:.0f} tokens" == prefix)
    return next((point["metrics"][name]["ours"] for point in points), None)


# ------------------------------------------------------------------------------------------------------------------- items


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


def _item(plan: Plan, row: Row, curve: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An item to hear or see; its reconstructions are decoded again from the stored ids."""
    reference = plan.read(row["file"])
    tokens = plan.tokens_of(row["ids"], reference)
    figures = [*row["prefixes"], row]
    decoded = plan.decoded(tokens, reference, [entry["tokens"] for entry in figures], plan.own_options(reference))
    variants = [
        Variant(entry["tokens"], entry["bits"], media, _defined(plan, entry), _defined(plan, entry, "baseline_"))
        for entry, media in zip(figures, decoded, strict=True)
    ]
    lengths = [entry["tokens"] for entry in figures]
    return {
        "name": Path(row["file"]).name,
        # Which of its variants an item shows at each step of the slider: the whole sequence where it is no longer than that.
        "steps": [
            lengths.index(point["tokens"]) if not point["whole"] and point["tokens"] in lengths else len(lengths) - 1
            for point in curve
        ],
        **plan.modality.shown(reference, variants, plan.tokenizer.spec),
    }


def _defined(plan: Plan, figures: Row, whose: str = "") -> list[tuple[str, float, str]]:
    """Title, value and unit of the figures that are defined for an item."""
    found = [(plan.modality.METRICS[name], figures[f"{whose}{name}"]) for name in plan.functions]
    return [(metric.title, value, metric.unit) for metric, value in found if value is not None]


def _slider_steps(curve: Sequence[Mapping[str, Any]], sections: Sections) -> list[str]:
    """What the slider says at each of its steps; none where there is nothing to choose."""
    if len(curve) < 2 or not any("frames" in item for _, items in sections for item in items):
        return []
    steps = []
    for point in curve:
        count = f"{point['tokens']:.0f} " if point["tokens"] != 1 else ""
        tokens = f"{'all' if point['whole'] else 'the first'} {count}token{'s' if count else ''}"
        steps.append(f"{tokens}, {point['bits']:.0f} bits")
    return steps


# ------------------------------------------------------------------------------------------------------------------- plots


def _curves(metrics: Mapping[str, Metric], summary: Mapping[str, Any]) -> list[str]:
    curve = summary["curve"]
    if len(curve) < 2:
        return []
    return [plot for name in summary["metrics"] if (plot := plots.rate_distortion(metrics[name], name, curve))]


def _histograms(plan: Plan, rows: Sequence[Row]) -> list[str]:
    found = []
    for name in plan.functions:
        ours, baseline = (_values(row[key] for row in rows) for key in (name, f"baseline_{name}"))
        if len(ours) > 1:
            found.append(plots.histogram(plan.modality.METRICS[name], ours, baseline))
    return found


def _values(figures: Iterable[float | None]) -> list[float]:
    return [figure for figure in figures if figure is not None]


def _usage(rows: Sequence[Row], tokens: Mapping[str, Any]) -> str | None:
    if not rows:
        return None
    return plots.usage(np.bincount([i for row in rows for i in row["ids"]], minlength=tokens["vocab_size"]))


def _positions(entropy: Sequence[float] | None, items: int) -> str | None:
    return plots.positions(entropy, items) if entropy else None

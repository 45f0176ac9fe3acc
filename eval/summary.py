"""The figures of a run as a whole: ``metrics.json`` and the Parquet tables."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import zoo
from zoo import registry
from zoo.eval.journal import RunJournal
from zoo.eval.modality.base import Row
from zoo.eval.plan import Plan
from zoo.eval.tokens import position_entropy, usage_statistics
from zoo.machine import device_name
from zoo.media import replacing

#: Figures of the whole set by metric: ``{"ours": …, "baseline": …}``, ``None`` where they are not defined.
Distances = Mapping[str, Mapping[str, float | None]]

_PACKAGES = (
    "torch",
    "torchaudio",
    "torchvision",
    "numpy",
    "pillow",
    "pystoi",
    "pesq",
    "torchmetrics",
    "lpips",
    "torch-fidelity",
    "transformers",
)


def summarise(plan: Plan, rows: Sequence[Row], journal: RunJournal, command: str | None) -> dict[str, Any]:
    """The content of ``metrics.json``."""
    spec, modality = plan.tokenizer.spec, plan.modality
    good = [row for row in rows if row["error"] is None]
    counts = np.bincount([i for row in good for i in row["ids"]], minlength=spec.vocab_size)
    # The square root of a matrix of 2048 rows takes seconds, so no distance is computed twice.
    whole = {name: _set_distances(plan, good, name, None, journal) for name in plan.feature_functions}
    entry = registry.entries().get(spec.name)
    return {
        "tokenizer": spec.as_dict() | {"parameters": plan.tokenizer.num_parameters},
        "options": plan.settings,
        "items": len(rows),
        "failed": len(rows) - len(good),
        **modality.totals(good),
        "metrics": _metrics(plan, good, whole),
        "baseline": modality.BASELINE,
        "curve": _curve(plan, good, journal, whole) if spec.ordered else [],
        "skipped": dict(plan.skipped),
        "reported": [figure.model_dump() for figure in entry.reported] if entry else [],
        "tokens": usage_statistics(counts, modality.tokens_per(good, spec))
        | {"position_entropy_bits": position_entropy([row["ids"] for row in good])},
        "errors": {row["file"]: row["error"] for row in rows if row["error"] is not None},
        "run": {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
            "device": device_name(plan.tokenizer.device),
            "threads": torch.get_num_threads(),
            "versions": _versions(),
        },
    }


def write_tables(rows: Sequence[Row], summary: Mapping[str, Any], folder: Path) -> None:
    """Write one row per item, ids included, and where prefixes decode one row per item and prefix."""
    hidden = {"prefixes", "features"}
    _write_parquet([{key: value for key, value in row.items() if key not in hidden} for row in rows], folder / "items.parquet")
    if not summary["tokenizer"]["ordered"]:
        return
    columns = ["tokens", "bits", *(f"{who}{name}" for name in summary["metrics"] for who in ("", "baseline_"))]
    prefixes = [
        {"file": row["file"]} | {key: figures[key] for key in columns if key in figures}
        for row in rows
        if row["error"] is None
        for figures in (*row["prefixes"], row)
    ]
    _write_parquet(prefixes, folder / "prefixes.parquet")


def _text(value: Any) -> Any:
    """Names of files may hold bytes that are no text; Parquet takes text alone, and gets them as JSON does."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _write_parquet(rows: Sequence[Row], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = dict.fromkeys(key for row in rows for key in row)
    table = pyarrow.table({key: [_text(row.get(key)) for row in rows] for key in columns})
    with replacing(path) as temporary:
        pyarrow.parquet.write_table(table, temporary)


def _metrics(plan: Plan, rows: Sequence[Row], whole: Distances) -> dict[str, dict[str, Any]]:
    """Statistics over the items of every metric, in the modality's order; of the whole set's metrics their one value."""
    found: dict[str, dict[str, Any]] = {}
    for name in plan.modality.METRICS:
        if name in plan.functions:
            ours, baseline = ([row[key] for row in rows] for key in (name, f"baseline_{name}"))
            found[name] = {"ours": _statistics(ours), "baseline": _statistics(baseline)}
        elif name in plan.feature_functions:
            distances = whole[name].items()
            found[name] = {who: None if value is None else {"n": len(rows), "value": value} for who, value in distances}
    return found


def _curve(plan: Plan, rows: Sequence[Row], journal: RunJournal, whole: Distances) -> list[dict[str, Any]]:
    """Mean figures at each prefix length, over the items that are longer, and of whole sequences at the end."""
    points = []
    for length in [*sorted({prefix["tokens"] for row in rows for prefix in row["prefixes"]}), None]:
        found = [figures for row in rows if (figures := _figures_at(row, length)) is not None]
        means: dict[str, Mapping[str, float | None]] = {}
        for name in plan.modality.METRICS:
            if name in plan.functions:
                means[name] = {"ours": _mean(f[name] for f in found), "baseline": _mean(f[f"baseline_{name}"] for f in found)}
            elif name in plan.feature_functions:
                means[name] = whole[name] if length is None else _set_distances(plan, rows, name, length, journal)
        tokens, bits = _mean(f["tokens"] for f in found), _mean(f["bits"] for f in found)
        points.append({"tokens": tokens, "bits": bits, "whole": length is None, "n": len(found), "metrics": means})
    return points


def _figures_at(row: Row, length: int | None) -> Row | None:
    """The figures of a prefix, of the whole sequence without a length, or ``None`` if the item is not that long."""
    if length is None:
        return row
    return next((prefix for prefix in row["prefixes"] if prefix["tokens"] == length), None)


def _set_distances(
    plan: Plan, rows: Sequence[Row], name: str, length: int | None, journal: RunJournal
) -> dict[str, float | None]:
    """A metric of the whole set for reconstructions from ``length`` tokens (from all without one) and for the baseline."""
    distance = plan.modality.METRICS[name].distance
    assert distance is not None
    originals, ours, baselines = [], [], []
    for row in rows:
        lengths = [*(prefix["tokens"] for prefix in row["prefixes"]), None]
        if length in lengths:
            features, position = journal.features(name, row), lengths.index(length)
            originals.append(features[0])
            ours.append(features[1 + position])
            baselines.append(features[1 + len(lengths) + position])
    # A single item has no spread.
    if len(originals) < 2:
        return {"ours": None, "baseline": None}
    reference = np.stack(originals)
    return {"ours": distance(reference, np.stack(ours)), "baseline": distance(reference, np.stack(baselines))}


def _statistics(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean, spread and percentiles of the values that are defined; ``None`` if there are none."""
    defined = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(defined):
        return None
    names = ("p5", "p25", "median", "p75", "p95")
    return {"n": len(defined), "mean": float(defined.mean()), "std": float(defined.std())} | {
        name: float(value) for name, value in zip(names, np.percentile(defined, (5, 25, 50, 75, 95)), strict=True)
    }


def _mean(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "zoo": zoo.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

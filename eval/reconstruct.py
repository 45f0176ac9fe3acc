"""Reconstruct a folder of media and measure what was lost.

    python -m zoo.eval.reconstruct wavtokenizer-tiny --data recordings/ --out report/

Items are read, reconstructed and measured one at a time, and each result is written at once, so that memory stays small and
an interrupted run goes on where it stopped. The result is ``metrics.json``, ``items.parquet`` and one self-contained
``report.html``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

import zoo
from zoo.bench import device_name
from zoo.errors import InputError, MissingExtraError
from zoo.eval.tokens import usage_statistics
from zoo.media import expand_paths, replacing
from zoo.tokenizer import Tokenizer

# The module that measures each modality; another modality is another line here.
MODALITIES = {"audio": "zoo.eval.audio", "speech": "zoo.eval.audio"}
PART_FILE = "items.part.jsonl"
_NEEDED = ("jinja2", "matplotlib", "pyarrow")

Row = dict[str, Any]


def run(
    tokenizer: Tokenizer[Any] | str,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    limit: int | None = None,
    metrics: Sequence[str] | None = None,
    utmos: Callable[[torch.Tensor, int], float] | None = None,
    device: str | None = None,
    resume: bool = True,
    progress: bool = True,
    command: str | None = None,
) -> dict[str, Any]:
    """Reconstruct every item of a data set, measure, and write the report.

    Args:
        tokenizer: a loaded tokenizer or a name for ``zoo.load``.
        data: a folder, file or glob pattern, or several.
        out: folder of the results.
        limit: stop after that many items.
        metrics: names of the metrics to compute; all that can run by default.
        utmos: the UTMOS network as a function of ``(audio [samples], sample_rate)``.
        device: where to load a tokenizer given by name.
        resume: go on from an interrupted run with the same tokenizer and metrics.
        progress: show a progress bar.
        command: how the run was started, for the record.

    Returns:
        The content of ``metrics.json``.

    Raises:
        InputError: there is no media in ``data``, a metric is unknown, or the modality has no metrics yet.
        MissingExtraError: a package of the ``eval`` extra is missing.
    """
    missing = [package for package in _NEEDED if find_spec(package) is None]
    if missing:
        raise MissingExtraError(f'{", ".join(missing)} is not installed: pip install "tokenizer-zoo[eval]"')
    from zoo.eval import report

    if isinstance(tokenizer, str):
        tokenizer = zoo.load(tokenizer, device=device)
    measuring = _measuring(tokenizer)
    chosen, skipped = _choose_metrics(measuring, metrics, utmos is not None)
    sources = [data] if isinstance(data, str | Path) else list(data)
    paths = expand_paths(sources, measuring.EXTENSIONS)[:limit]
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)

    header = {"fingerprint": tokenizer.fingerprint, "metrics": chosen, "zoo": zoo.__version__}
    part = out / PART_FILE
    rows = _finished_rows(part, header) if resume else {}
    with part.open("w" if not rows else "a", encoding="utf-8") as file:
        if not rows:
            print(json.dumps(header), file=file, flush=True)
        results: list[Row] = []
        for path in _with_progress(paths, progress):
            status = path.stat()
            identity = {"file": str(path), "bytes": status.st_size, "modified": status.st_mtime_ns}
            row = rows.get(str(path))
            if row is None or any(row[key] != value for key, value in identity.items()):
                row = identity | _measure(tokenizer, measuring, path, chosen, utmos)
                print(json.dumps(row), file=file, flush=True)
            results.append(row)

    summary = _summarise(tokenizer, measuring, results, chosen, skipped, command)
    _write_parquet(results, out / "items.parquet")
    with replacing(out / "metrics.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    report.write(out / "report.html", tokenizer, measuring, results, summary)
    part.unlink()
    return summary


def _measuring(tokenizer: Tokenizer[Any]) -> ModuleType:
    modality = tokenizer.spec.modality
    if modality not in MODALITIES:
        raise InputError(f"there are no metrics for {modality} yet; there are for {', '.join(MODALITIES)}")
    return importlib.import_module(MODALITIES[modality])


def _choose_metrics(measuring: ModuleType, wanted: Sequence[str] | None, with_utmos: bool) -> tuple[list[str], dict[str, str]]:
    """The metrics to compute, and why the others are not."""
    known = {**measuring.METRICS, **measuring.NEEDS_NETWORK}
    if wanted is not None:
        for name in wanted:
            if name not in known:
                raise InputError(f"unknown metric {name!r}; there are {', '.join(known)}")
    chosen, skipped = [], {}
    for name in wanted if wanted is not None else known:
        if name in measuring.NEEDS_NETWORK:
            reason = None if with_utmos else measuring.NEEDS_NETWORK[name]
        else:
            reason = measuring.METRICS[name].why_skipped()
        if reason is None:
            chosen.append(name)
        else:
            skipped[name] = reason
    return chosen, skipped


def _finished_rows(part: Path, header: dict[str, Any]) -> dict[str, Row]:
    """Rows of an interrupted run with the same settings; a last line that was cut off is dropped."""
    if not part.exists():
        return {}
    lines = part.read_text(encoding="utf-8").split("\n")[:-1]
    if not lines or json.loads(lines[0]) != header:
        return {}
    rows = [json.loads(line) for line in lines[1:]]
    with replacing(part) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return {row["file"]: row for row in rows}


def _with_progress(paths: Sequence[Path], shown: bool) -> Iterator[Path]:
    if not shown:
        yield from paths
        return
    from tqdm.auto import tqdm

    yield from tqdm(paths, desc="reconstruct", unit="item")


def _measure(
    tokenizer: Tokenizer[Any],
    measuring: ModuleType,
    path: Path,
    chosen: Sequence[str],
    utmos: Callable[[torch.Tensor, int], float] | None,
) -> Row:
    """One item: its figures and those of the baseline, or the error that it raised."""
    spec = tokenizer.spec
    rate = spec.sample_rate
    assert rate is not None
    try:
        reference = measuring.read(str(path), rate)
        started = time.perf_counter()
        tokens = tokenizer.encode(reference)
        encoded = time.perf_counter()
        estimate = tokenizer.decode(tokens)[0].float().cpu()
        decoded = time.perf_counter()
    except InputError as error:
        return {"error": error.reason}
    baseline = measuring.mu_law_baseline(reference[0], rate, spec.bit_rate)
    row: Row = {
        "error": None,
        "seconds": reference.shape[1] / rate,
        "tokens": int(tokens.lengths[0]),
        "encode_seconds": encoded - started,
        "decode_seconds": decoded - encoded,
        "ids": tokens.tolist()[0],
    }
    for name in chosen:
        if name == "utmos":
            assert utmos is not None
            row[name], row[f"baseline_{name}"] = utmos(estimate[0], rate), utmos(baseline, rate)
        else:
            function = measuring.METRICS[name].function
            row[name] = function(reference[0], estimate[0], rate)
            row[f"baseline_{name}"] = function(reference[0], baseline, rate)
    return row


def _summarise(
    tokenizer: Tokenizer[Any],
    measuring: ModuleType,
    rows: Sequence[Row],
    chosen: Sequence[str],
    skipped: dict[str, str],
    command: str | None,
) -> dict[str, Any]:
    good = [row for row in rows if row["error"] is None]
    seconds = sum(row["seconds"] for row in good)
    counts = np.bincount([i for row in good for i in row["ids"]], minlength=tokenizer.spec.vocab_size)
    figures = {
        name: {
            "ours": _statistics([row[name] for row in good]),
            "mu_law": _statistics([row[f"baseline_{name}"] for row in good]),
        }
        for name in chosen
    }
    return {
        "tokenizer": tokenizer.spec.as_dict() | {"parameters": tokenizer.num_parameters},
        "items": len(rows),
        "failed": len(rows) - len(good),
        "seconds": seconds,
        "metrics": figures,
        "skipped": skipped,
        "tokens": usage_statistics(counts, tokenizer.spec.token_rate),
        "speed": {
            "encode_real_time_factor": _ratio(sum(row["encode_seconds"] for row in good), seconds),
            "decode_real_time_factor": _ratio(sum(row["decode_seconds"] for row in good), seconds),
        },
        "errors": {row["file"]: row["error"] for row in rows if row["error"] is not None},
        "run": {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
            "device": device_name(tokenizer.device),
            "threads": torch.get_num_threads(),
            "versions": _versions(),
        },
    }


def _statistics(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean, spread and percentiles of the values that are defined; ``None`` if there are none."""
    defined = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(defined):
        return None
    names = ("p5", "p25", "median", "p75", "p95")
    return {"n": len(defined), "mean": float(defined.mean()), "std": float(defined.std())} | {
        name: float(value) for name, value in zip(names, np.percentile(defined, (5, 25, 50, 75, 95)), strict=True)
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "zoo": zoo.__version__}
    for package in ("torch", "torchaudio", "numpy", "pystoi", "pesq", "torchmetrics"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _write_parquet(rows: Sequence[Row], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = dict.fromkeys(key for row in rows for key in row)
    table = pyarrow.table({key: [row.get(key) for row in rows] for key in columns})
    with replacing(path) as temporary:
        pyarrow.parquet.write_table(table, temporary)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 1 if an item failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m zoo.eval.reconstruct", description="Reconstruct media and measure the loss."
    )
    parser.add_argument("name", help="a name in the catalogue, hf-hub:org/repo or local-dir:path")
    parser.add_argument("--data", required=True, nargs="+", help="folders, files or glob patterns")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--metrics", help="comma-separated names; all that can run by default")
    parser.add_argument("--utmos", help="TorchScript file of a UTMOS network")
    parser.add_argument("--device")
    parser.add_argument("--no-resume", action="store_true")
    options = parser.parse_args(arguments)
    utmos = None
    if options.utmos:
        from zoo.eval.audio import utmos_from_torchscript

        utmos = utmos_from_torchscript(options.utmos)
    summary = run(
        options.name,
        options.data,
        options.out,
        limit=options.limit,
        metrics=options.metrics.split(",") if options.metrics else None,
        utmos=utmos,
        device=options.device,
        resume=not options.no_resume,
        command=shlex.join(["python", "-m", "zoo.eval.reconstruct", *arguments]),
    )
    from zoo.eval import report

    report.print_summary(summary, options.out)
    return 1 if summary["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

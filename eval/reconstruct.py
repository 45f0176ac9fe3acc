"""Reconstruct a folder of media and measure what was lost.

    zoo eval wavtokenizer-tiny --data recordings/ --out report/

Items are read, reconstructed and measured one at a time, and each result is written at once, so that memory stays small and
an interrupted run goes on where it stopped. The result is ``metrics.json``, ``items.parquet``, for tokenizers whose prefixes
decode ``prefixes.parquet``, and one self-contained ``report.html``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import zoo
from zoo.errors import ArgumentError, InputError, MissingExtraError
from zoo.eval.journal import RunJournal
from zoo.eval.plan import NetworkSource, Plan, make_plan
from zoo.eval.summary import summarise, write_tables
from zoo.media import Skipped, expand_paths, require_writable, write_json
from zoo.modality import modality
from zoo.tokenizer import Tokenizer

_NEEDED = ("jinja2", "matplotlib", "pyarrow")


def run(
    tokenizer: Tokenizer[Any] | str,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    limit: int | None = None,
    metrics: Sequence[str] | None = None,
    networks: Mapping[str, NetworkSource] | None = None,
    encode: Mapping[str, Any] | None = None,
    decode: Mapping[str, Any] | None = None,
    prefixes: Sequence[int] | None = None,
    device: str | None = None,
    resume: bool = True,
    progress: bool = True,
    command: str | None = None,
    skipped: Skipped | None = None,
) -> dict[str, Any]:
    """Reconstruct every item of a data set, measure, and write the report.

    Args:
        tokenizer: a loaded tokenizer or a name for ``zoo.load``.
        data: a folder, file or glob pattern, or several.
        out: folder of the results.
        limit: stop after that many items.
        metrics: names of the metrics to compute; all that can run by default.
        networks: for metrics by networks: the path of the weights, ``None`` to fetch the public ones, or the network as a
            function with the signature of the modality's metrics. Public ones that are in their caches need no mention.
        encode: options of the tokenizer's ``encode``, such as ``{"fit": "pad"}``.
        decode: options of its ``decode``, such as ``{"steps": 20, "seed": 1}``.
        prefixes: how many first tokens to decode besides all of them, where prefixes decode; 1, 2, 4, … by default.
        device: where to load a tokenizer given by name.
        resume: go on from an interrupted run with the same tokenizer, metrics and options.
        progress: show a progress bar.
        command: how the run was started, for the record.
        skipped: filled with what is left out of folders.

    Returns:
        The content of ``metrics.json``.

    Raises:
        InputError: there is no media in ``data``, a metric or an option is unknown, or the tokenizer cannot be measured.
        MissingExtraError: a package of the ``eval`` extra is missing.
        WeightsError: the weights given for a network are not what it needs.
    """
    missing = [package for package in _NEEDED if find_spec(package) is None]
    if missing:
        raise MissingExtraError(f'{", ".join(missing)} is not installed: pip install "tokenizer-zoo[eval]"')
    from zoo.eval.report import html as report

    loaded: Tokenizer[Any, Any, Any] = zoo.load(tokenizer, device=device) if isinstance(tokenizer, str) else tokenizer
    networks = networks or {}
    plan = make_plan(loaded, metrics=metrics, networks=networks, encode=encode or {}, decode=decode or {}, prefixes=prefixes)
    sources = [data] if isinstance(data, str | Path) else list(data)
    skipped = Skipped() if skipped is None else skipped
    skipped.extras = modality(loaded.spec.modality).extras
    paths = expand_paths(sources, plan.modality.EXTENSIONS, skipped)[:limit]
    out = Path(out)
    require_writable(out, folder=True)

    header = {
        "fingerprint": loaded.fingerprint,
        "metrics": [*plan.functions, *plan.feature_functions],
        "networks": {name: str(source) for name, source in networks.items() if not callable(source)},
        "options": plan.settings,
        "prefixes": plan.prefixes,
        "zoo": zoo.__version__,
    }
    journal = RunJournal(out, header, resume=resume)
    rows = [_finished_or_measured(plan, journal, path) for path in _with_progress(paths, progress)]

    summary = summarise(plan, rows, journal, command)
    write_tables(rows, summary, out)
    write_json(out / "metrics.json", summary, indent=2)
    report.write(out / "report.html", plan, rows, summary)
    journal.remove()
    return summary


def _with_progress(paths: Sequence[Path], shown: bool) -> Iterator[Path]:
    if not shown:
        yield from paths
        return
    from tqdm.auto import tqdm

    yield from tqdm(paths, desc="reconstruct", unit="item")


def _finished_or_measured(plan: Plan, journal: RunJournal, path: Path) -> dict[str, Any]:
    """The row of an item, from the journal if the file is the same as then."""
    status = path.stat()
    identity = {"file": str(path), "bytes": status.st_size, "modified": status.st_mtime_ns}
    row = journal.rows.get(str(path))
    if row is None or any(row[key] != value for key, value in identity.items()):
        measured, features = _measure(plan, path)
        row = identity | measured
        journal.append(row, features)
    return row


def _measure(plan: Plan, path: Path) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """One item: its figures, those of the baseline and of its prefixes, or the error that it raised; and its features.

    Features are those of the original, of the prefixes, of the whole sequence, and in the same order of their baselines.
    """
    spec, modality = plan.tokenizer.spec, plan.modality
    try:
        reference = plan.read(str(path))
        own = plan.own_options(reference)
        started = time.perf_counter()
        tokens = plan.encoded(reference)
        encoded = time.perf_counter()
        length = int(tokens.lengths[0])
        whole = plan.decoded(tokens, reference, [length], own)
        decoded = time.perf_counter()
        prefixes = plan.prefix_lengths(length)
        estimates = [*plan.decoded(tokens, reference, prefixes, own), *whole]
    except ArgumentError:
        raise
    except InputError as error:
        return {"error": error.reason}, {}
    all_bits = [round(count * spec.bits_per_token) for count in (*prefixes, length)]
    baselines = [modality.baseline(reference, spec, bits) for bits in all_bits]
    figures: list[dict[str, Any]] = []
    for count, bits, estimate, rival in zip((*prefixes, length), all_bits, estimates, baselines, strict=True):
        figures.append({"tokens": count, "bits": bits})
        for name, function in plan.functions.items():
            if modality.METRICS[name].of_tokens:
                described = tokens if count == length else tokens.truncate(count)
                figures[-1] |= {name: function(plan.tokenizer, described, reference), f"baseline_{name}": None}
                continue
            figures[-1][name] = modality.measure(function, spec, reference, estimate)
            figures[-1][f"baseline_{name}"] = modality.measure(function, spec, reference, rival)
    row = {
        "error": None,
        **modality.properties(reference, spec),
        **figures[-1],
        "encode_seconds": encoded - started,
        "decode_seconds": decoded - encoded,
        "ids": tokens.tolist()[0],
        "prefixes": figures[:-1],
    }
    features = {
        name: np.stack([modality.measure(function, spec, signal) for signal in (reference, *estimates, *baselines)])
        for name, function in plan.feature_functions.items()
    }
    return row, features

"""Choose the benchmark of a modality, run it, and show the result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from zoo import registry
from zoo.bench.measure import matmul_rate, measure
from zoo.bench.quantized import footprints
from zoo.errors import InputError
from zoo.machine import described
from zoo.media import write_json
from zoo.modality import modality
from zoo.quantization.methods import method_named


def run(
    name: str,
    *,
    batches: Sequence[int] | None = None,
    threads: int | None = None,
    device: str = "cpu",
    repetitions: int = 3,
    peers: bool = True,
    json_path: str | Path | None = None,
    **cases: Any,
) -> dict[str, Any]:
    """Measure a tokenizer of the catalogue and its peers.

    Args:
        name: a name in the catalogue.
        batches: batch sizes; those of the modality by default.
        threads: threads of PyTorch; its own choice if ``None``.
        device: where to run.
        repetitions: measurements per figure, after one warm-up; the median counts.
        peers: measure what others make of the same task as well.
        json_path: write the result there.
        cases: what else the modality varies: ``seconds`` of audio, and ``ragged``, the shortest and the longest of a batch;
            ``lengths`` in tokens and ``steps`` of image decoders, and ``lengths`` in cells of a mesh's grid; ``quantize``,
            methods of `zoo.quantize` to measure the packed model of.

    Returns:
        The measurements with the machine they were taken on.

    Raises:
        RegistryError: no such name.
        InputError: there is no benchmark for its modality, it does not vary one of the ``cases``, or there is no such method.
    """
    entry = registry.get(name)
    benchmark = modality(entry.modality).home("bench")
    chosen = {key: value for key, value in {"batches": batches, **cases}.items() if value is not None}
    if unknown := sorted(chosen.keys() - benchmark.CASES.keys()):
        raise InputError(f"the benchmark for {entry.modality} does not vary {', '.join(unknown)}")
    for method in chosen.get("quantize", ()):
        method_named(method)
    if threads:
        torch.set_num_threads(threads)
    rates = {dtype: matmul_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    results = []
    settings = benchmark.CASES | chosen
    # Models are made outside of inference mode, as programs make them: writes to tensors from inside are not counted.
    with torch.no_grad():
        for job in benchmark.jobs(entry, device, peers, **settings):
            if job.work is not None:
                with torch.inference_mode():
                    results.append(measure(job, rates, repetitions, device))
    content: dict[str, Any] = {
        "name": name,
        "unit": benchmark.UNIT,
        "machine": described(device)
        | {"matmul_gflops": {str(dtype).removeprefix("torch."): rate / 1e9 for dtype, rate in rates.items()}},
        "measurements": [vars(result) for result in results],
    }
    if chosen.get("quantize"):
        call = benchmark.smallest_call(entry, **settings)
        content["models"] = [vars(found) for found in footprints(entry, device, chosen["quantize"], call)]
    if json_path is not None:
        write_json(json_path, content)
    return content


def print_table(content: dict[str, Any]) -> None:
    """The measurements as tables; the last column is a model's CPU time over that of ours in float32."""
    machine, measurements = content["machine"], content["measurements"]
    ours = {(m["direction"], m["case"]): m["cpu"] for m in measurements if m["contender"] == content["name"]}
    console = Console()
    console.print(f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}")
    for direction in dict.fromkeys(m["direction"] for m in measurements):
        table = Table(title=direction)
        for column in ("model", "case", "CPU s", f"{content['unit']}/s", "+MB", "floor", "/ ours"):
            table.add_column(column, justify="left" if column in ("model", "case") else "right")
        chosen = [m for m in measurements if m["direction"] == direction]
        order = list(dict.fromkeys(m["case"] for m in chosen))
        for m in sorted(chosen, key=lambda m: order.index(m["case"])):
            table.add_row(
                m["contender"],
                m["case"],
                f"{m['cpu']:.3f}",
                f"{m['amount'] / m['wall']:.3g}",
                f"{m['memory'] / 1e6:.0f}",
                "" if m["floor_share"] is None else f"{m['floor_share']:.0%}",
                f"{m['cpu'] / ours[direction, m['case']]:.2f}",
            )
        console.print(table)
    if "models" in content:
        print_models(console, content["models"])


def print_models(console: Console, models: Sequence[dict[str, Any]]) -> None:
    """Sizes of models on disk and in memory, as a table."""
    table = Table(title="loading and one call in a process of its own")
    for column in ("model", "weights, MB", "file, MB", "peak memory, MB"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for found in models:
        table.add_row(found["contender"], *(f"{found[f'{what}_bytes'] / 1e6:.1f}" for what in ("weight", "file", "peak")))
    console.print(table)

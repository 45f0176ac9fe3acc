"""The search for a number format from one sort, against trying every candidate on all numbers.

    zoo study search-speed --threads 1 --out eval/results/bench-search.json

All splits of 8 bits that the original tries, mantissas of 1 to 6 bits, with 111 clipping values each, on one tensor. *Full
passes* compute the original's formula (Kuzmin et al. 2022, "FP8 Quantization: The Power of the Exponent") for every candidate;
*full passes, exact exponents* round as `zoo.quantize` does, which is quicker. Times are those of the processor.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from zoo.machine import described
from zoo.media import write_json
from zoo.quantization.fp import FloatFormat, fake_quantize, mantissa_splits, search

BITS = 8
SIDE = 2048

Numbers = Float[Tensor, "rows columns"]
Quantize = Callable[[Numbers, FloatFormat, Float[Tensor, ""]], Numbers]


def by_formula(x: Numbers, format: FloatFormat, maxval: Float[Tensor, ""]) -> Numbers:
    """Rounding as the original computes it, with logarithms and powers."""
    mantissa = format.mantissa_bits
    bias = 2**format.exponent_bits - maxval.log2() + torch.tensor(2 - 2.0**-mantissa).log2() - 1
    clipped = torch.minimum(torch.maximum(x, -maxval), maxval)
    exponent = (clipped.abs().log2() + bias).floor().clamp(min=1)
    step = 2.0 ** (exponent - mantissa - bias)
    return (clipped / step).round() * step


def full_passes(
    x: Numbers, formats: Sequence[FloatFormat], grid: Float[Tensor, " candidates"], quantize: Quantize, label: str
) -> Float[Tensor, "formats candidates"]:
    """Mean squared errors of all candidates, each from all numbers."""
    errors = torch.zeros(len(formats), len(grid))
    with tqdm(total=errors.numel(), desc=label, unit="pass") as bar:
        for row, format in enumerate(formats):
            for column, maxval in enumerate(grid):
                errors[row, column] = (quantize(x, format, maxval) - x).square().mean()
                bar.update()
    return errors


def run(*, side: int = SIDE, threads: int | None = None, json_path: str | Path | None = None) -> dict[str, Any]:
    """Measure the search and both kinds of full passes on a square matrix of normally distributed numbers.

    Args:
        side: its rows and columns.
        threads: threads of PyTorch; its own choice if ``None``.
        json_path: write the result there.

    Returns:
        Seconds, what each way chose, how many times faster the search is, and how far the errors are apart.
    """
    if threads:
        torch.set_num_threads(threads)
    x = torch.randn(side, side, generator=torch.Generator().manual_seed(0)) * 0.02
    formats = mantissa_splits(BITS, profile="qualcomm")
    seconds, found = _timed(lambda: search(x, formats))
    searched = found.error[..., 0]
    measurements = [_measurement("search", seconds, seconds, searched, searched)]
    ways: dict[str, Quantize] = {"full passes": by_formula, "full passes, exact exponents": fake_quantize}
    for contender, quantize in ways.items():
        taken, errors = _timed(functools.partial(full_passes, x, formats, found.grid[:, 0], quantize, contender))
        measurements.append(_measurement(contender, taken, seconds, errors, searched))
    content = {
        "numbers": x.numel(),
        "formats": [format.name for format in formats],
        "candidates": len(found.grid),
        "machine": described(),
        "measurements": measurements,
    }
    if json_path is not None:
        write_json(json_path, content)
    return content


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def _measurement(
    contender: str,
    seconds: float,
    yardstick: float,
    errors: Float[Tensor, "formats candidates"],
    searched: Float[Tensor, "formats candidates"],
) -> dict[str, Any]:
    """Seconds, over those of the search, and the choice; the first of equally good ones."""
    format, candidate = divmod(int(errors.argmin()), errors.shape[1])
    return {
        "contender": contender,
        "cpu": seconds,
        "over_search": seconds / yardstick,
        "format": format,
        "candidate": candidate,
        "largest_difference": float(((errors - searched).abs() / errors).max()),
    }


def print_table(content: dict[str, Any]) -> None:
    """The measurements for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    machine = content["machine"]
    console.print(f"{machine['device']}, {machine['threads']} threads, {content['numbers']} numbers")
    table = Table("", "CPU s", "over search", "format", "candidate", "errors differ by")
    for found in content["measurements"]:
        table.add_row(
            found["contender"],
            f"{found['cpu']:.2f}",
            f"{found['over_search']:.1f}",
            content["formats"][found["format"]],
            f"{found['candidate']} of {content['candidates']}",
            f"{found['largest_difference']:.1e}",
        )
    console.print(table)


def main(
    side: Annotated[int, typer.Option(min=1, help="rows and columns of the matrix")] = SIDE,
    threads: Annotated[int | None, typer.Option(min=1, help="threads of PyTorch")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", "--json", help="write the figures as JSON")] = None,
) -> None:
    """Time the search for a number format against trying every candidate."""
    print_table(run(side=side, threads=threads, json_path=out))

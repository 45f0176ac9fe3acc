"""Packed signs against matrix products in float32, bfloat16 and int8, and training steps of binary layers.

    zoo study binary-speed --threads 1 --out eval/results/bench-binary.json

Times are those of the processor, all threads together, so that other work on the machine disturbs them little; on a GPU they
are wall time. Every product starts from float32 inputs: packing them is part of the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

from zoo.kernels import binary as kernel
from zoo.kernels import native
from zoo.kernels.binary import Execution
from zoo.machine import described, usable_device
from zoo.media import write_json
from zoo.quantization.binary import PackedBinary, binarize
from zoo.quantization.binary_operators import OPERATORS
from zoo.quantization.methods import method_named

ROWS = (1, 2, 4, 8, 16, 24, 32, 64, 256)
WIDTHS = (1024, 4096)

# Milliseconds that a figure is measured for, and the least number of parts of which the fastest counts.
_MILLISECONDS = 60
_PARTS = 5


def milliseconds(work: Callable[[], Any], device: str) -> float:
    """Time of one call, the least of several parts of a measurement, after a call to warm up."""
    on_gpu = device.startswith("cuda")
    clock = time.perf_counter if on_gpu else time.process_time

    def calls(count: int) -> float:
        started = clock()
        for _ in range(count):
            work()
        if on_gpu:
            torch.cuda.synchronize()
        return 1e3 * (clock() - started) / count

    work()
    once = calls(1)
    count = max(1, round(_MILLISECONDS / _PARTS / max(once, 1e-3)))
    return min(once, *(calls(count) for _ in range(_PARTS)))


def executions(device: str) -> list[Execution]:
    """The ways to multiply packed signs that this machine has."""
    if device.startswith("cuda"):
        return ["triton popcount", "triton int8", "float32"]
    found: list[Execution] = []
    if native.library("binary.c") is not None:
        found.append("native")
    if hasattr(np, "bitwise_count"):
        found.append("numpy")
    return [*found, "int8"]


def products(width: int, rows: int, device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Products of ``rows`` inputs with a square matrix, by every contender."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width, width, generator=generator).to(device)
    x = torch.randn(rows, width, generator=generator).to(device)
    rounded = weight.bfloat16()
    packed = kernel.pack_signs(weight)
    yield "float32", lambda: x @ weight.T
    yield "bfloat16", lambda: x.bfloat16() @ rounded.T
    for execution in executions(device):
        # NumPy's time grows with the rows, which says enough at a few dozen of them.
        if execution != "numpy" or rows <= 64:
            yield f"packed, {execution}", partial(_packed_product, x, packed, execution)


def _packed_product(x: torch.Tensor, packed: torch.Tensor, execution: Execution) -> torch.Tensor:
    return kernel.multiply(kernel.pack_signs(x), packed, x.shape[1], execution)


def layers(device: str) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """The layers of BiBench's timing table, at inference: of full precision, and packed."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    for case, layer, shape in _layers():
        layer, x = layer.to(device), torch.randn(shape, generator=generator).to(device)
        packed = PackedBinary.from_float(layer, method_named("binary-bireal"))
        yield case, "full precision", partial(layer, x)
        yield case, "packed", partial(packed, x)


def training_steps(device: str) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Forward and backward passes of the same layers, of full precision and by every method."""
    generator = torch.Generator().manual_seed(0)
    for case, layer, shape in _layers():
        x = torch.randn(shape, generator=generator).to(device)
        for method in ("full precision", *OPERATORS):
            torch.manual_seed(0)
            full = type(layer)(**_sizes(layer))
            trained = full if method == "full precision" else binarize(full, method, skip=())
            yield case, method, partial(_step, trained.to(device), x.clone().requires_grad_())


def _layers() -> list[tuple[str, nn.Linear | nn.Conv2d, tuple[int, ...]]]:
    return [
        ("Linear 1024 to 1024, 512 rows", nn.Linear(1024, 1024), (512, 1024)),
        ("Conv2d 64 to 64, 3 x 3, 8 x 56 x 56", nn.Conv2d(64, 64, 3, padding=1), (8, 64, 56, 56)),
    ]


def _sizes(layer: nn.Linear | nn.Conv2d) -> dict[str, Any]:
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features}
    return {
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "kernel_size": layer.kernel_size,
        "padding": layer.padding,
    }


def _step(layer: nn.Module, x: torch.Tensor) -> None:
    layer(x).sum().backward()


def run(
    *,
    widths: Sequence[int] = WIDTHS,
    rows: Sequence[int] = ROWS,
    threads: int | None = None,
    device: str = "cpu",
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """Measure products, layers and training steps.

    Args:
        widths: of square weight matrices.
        rows: numbers of inputs to multiply with them.
        threads: PyTorch's threads; its own choice if ``None``.
        device: where to run.
        json_path: write the result there.

    Returns:
        Milliseconds of every contender with the machine they were taken on.

    Raises:
        InputError: there is no such device.
    """
    usable_device(device)
    if threads:
        torch.set_num_threads(threads)
    content: dict[str, Any] = {
        "name": "zoo.kernels.binary",
        "unit": "milliseconds of the processor" if device == "cpu" else "milliseconds",
        "machine": described(device),
        "products": [],
        "layers": [],
        "training": [],
    }
    with torch.inference_mode():
        for width in widths:
            for count in rows:
                for contender, work in products(width, count, device):
                    taken = milliseconds(work, device)
                    content["products"].append({"width": width, "rows": count, "contender": contender, "ms": round(taken, 4)})
        for case, contender, work in layers(device):
            content["layers"].append({"case": case, "contender": contender, "ms": round(milliseconds(work, device), 3)})
    for case, method, work in training_steps(device):
        content["training"].append({"case": case, "method": method, "ms": round(milliseconds(work, device), 3)})
    if json_path is not None:
        write_json(json_path, content)
    return content


def print_tables(content: dict[str, Any]) -> None:
    """The measurements for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    machine = content["machine"]
    console.print(f"{machine['device']}, {machine['threads']} threads, {content['unit']}")
    table = Table("width", "rows", "contender", "ms", "float32 over it")
    yardstick: dict[tuple[int, int], float] = {}
    for found in content["products"]:
        yardstick.setdefault((found["width"], found["rows"]), found["ms"])
        ratio = yardstick[found["width"], found["rows"]] / found["ms"]
        table.add_row(str(found["width"]), str(found["rows"]), found["contender"], f"{found['ms']:.3f}", f"{ratio:.1f}")
    console.print(table)
    for title in ("layers", "training"):
        table = Table(title, "", "ms")
        for found in content[title]:
            table.add_row(found["case"], found.get("contender") or found["method"], f"{found['ms']:.1f}")
        console.print(table)


def main(
    threads: Annotated[int | None, typer.Option(min=1, help="threads of PyTorch")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    out: Annotated[Path | None, typer.Option("-o", "--out", "--json", help="write the figures as JSON")] = None,
) -> None:
    """Time products of packed signs and training steps of binary layers."""
    print_tables(run(threads=threads, device=device, json_path=out))

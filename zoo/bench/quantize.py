"""Products with quantized weights against float32 and bfloat16, and against what PyTorch and torchao offer for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.bench.measure import Job, Work, matmul_rate, measure
from zoo.kernels import lowbit
from zoo.kernels.formats import format_named
from zoo.machine import described
from zoo.media import write_json
from zoo.moved import names_of
from zoo.quantization.layers import Granularity, LowBitLayer
from zoo.quantization.methods import method_named

#: The contender that the last column of the table compares with.
NAME = "float32"
UNIT = "input"
SIZES = (4096,)
BATCHES = (1, 4, 8, 16, 32, 256)
MEASURED = ("fp4-e2m1", "mxfp4", "fp6-e3m2", "fp8-e4m3", "int8")

# The range of weights does not change the speed, and looking for it takes longer than everything else.
_UNSEARCHED = Granularity(clip="absmax")


def run(
    *,
    sizes: Sequence[int] = SIZES,
    batches: Sequence[int] = BATCHES,
    threads: int | None = None,
    device: str = "cpu",
    repetitions: int = 7,
    peers: bool = True,
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """Measure linear layers with square weights.

    Args:
        sizes: inputs and outputs of the layer.
        batches: numbers of inputs.
        threads: threads of PyTorch; its own choice if ``None``.
        device: where to run.
        repetitions: measurements per figure, after one warm-up; the median counts.
        peers: measure PyTorch's own packed products, and torchao's weight-only layers where it is installed.
        json_path: write the result there.

    Returns:
        The measurements with the machine they were taken on, in the form that `zoo.bench.print_table` shows, and the bytes of
        each contender's weights at the first size.
    """
    if threads:
        torch.set_num_threads(threads)
    rates = {dtype: matmul_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    results = []
    weights: dict[str, int] = {}
    with torch.inference_mode():
        for size in sizes:
            for contender, (stored, product) in contenders(size, device, peers).items():
                weights.setdefault(contender, stored)
                for batch in batches:
                    job = Job(contender, f"{size} x {size}", f"{batch} inputs", batch, _work(product, batch, size, device))
                    results.append(measure(job, rates, repetitions, device))
    results.sort(key=lambda result: (result.direction, batches.index(int(result.amount))))
    content = {
        "name": NAME,
        "unit": UNIT,
        "machine": described(device)
        | {
            "matmul_gflops": {str(dtype).removeprefix("torch."): rate / 1e9 for dtype, rate in rates.items()},
            "compiled_kernel": lowbit.compiled(format_named("e2m1"), sizes[0], 1),
        },
        "weight_bytes": weights,
        "measurements": [vars(result) for result in results],
    }
    if json_path is not None:
        write_json(json_path, content)
    return content


Product = Callable[[Tensor], Tensor]


def _work(product: Product, batch: int, size: int, device: str) -> Work:
    x = torch.randn(batch, size, generator=torch.Generator().manual_seed(0)).to(device)
    return lambda: product(x)


def contenders(size: int, device: str, peers: bool) -> dict[str, tuple[int, Product]]:
    """Bytes of the weight and the product with it, by name; inputs come in float32."""
    layer = nn.Linear(size, size, bias=False).to(device)
    weight = layer.weight.detach()
    half = weight.bfloat16()
    found: dict[str, tuple[int, Product]] = {
        NAME: (4 * weight.numel(), lambda x: F.linear(x, weight)),
        "bfloat16": (2 * weight.numel(), lambda x: F.linear(x.bfloat16(), half)),
    }
    for name in MEASURED:
        packed = LowBitLayer.packed(layer, method_named(name), _UNSEARCHED)
        found[name] = (stored_bytes(packed), packed)
        if name in ("fp8-e4m3", "int8"):
            both = copy.deepcopy(packed)
            both.quantize_inputs(format_named("int8" if name == "int8" else "e4m3fn"), None)
            found[f"{name}, 8-bit inputs"] = (stored_bytes(packed), both)
        if name == "fp4-e2m1" and device == "cpu":
            found |= _both_ways(packed)
    if peers:
        found |= dict(_of_pytorch(weight, device)) | dict(_of_torchao(layer))
    return found


def stored_bytes(layer: nn.Module) -> int:
    """Bytes of a layer's tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in layer.state_dict().values())


def _both_ways(packed: LowBitLayer) -> dict[str, tuple[int, Product]]:
    """The two ways of a CPU, for any number of inputs, to show where one overtakes the other."""
    arguments = packed.codes, packed.scales(), packed.format
    ways: dict[str, tuple[int, Product]] = {
        "fp4-e2m1, in tiles": (stored_bytes(packed), lambda x: lowbit.in_tiles(x, *arguments))
    }
    if lowbit.compiled(packed.format, packed.columns, 1):
        ways["fp4-e2m1, in registers"] = (stored_bytes(packed), lambda x: lowbit.in_registers(x, *arguments))
    return ways


# Most weights that share a scale and a zero point in the integers of 4 bits of PyTorch and torchao; torchao's own choice.
_GROUP = 128


def _of_pytorch(weight: Tensor, device: str) -> Iterator[tuple[str, tuple[int, Product]]]:
    """PyTorch's own products with integers of 8 and 4 bits, which its CPU kernels have."""
    if device != "cpu":
        return
    scale = weight.abs().amax(1) / 127
    integers = (weight / scale[:, None]).round().to(torch.int8)
    half_scale = scale.bfloat16()
    yield (
        "torch int8 weights",
        (integers.numel() + 2 * len(scale), lambda x: torch._weight_int8pack_mm(x.bfloat16(), integers, half_scale)),
    )
    size = min(_GROUP, weight.shape[1])
    groups = weight.view(len(weight), -1, size)
    low, high = groups.aminmax(dim=2)
    step = (high - low) / 15
    digits = ((groups - low[..., None]) / step[..., None]).round().to(torch.int32).view_as(weight)
    packed = torch._convert_weight_to_int4pack_for_cpu(digits, 1)
    scales = torch.stack([step, low + 8 * step], dim=2).transpose(0, 1).contiguous().bfloat16()
    yield (
        "torch int4 weights",
        (
            packed.numel() + 2 * scales.numel(),
            lambda x: torch._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, size, scales),
        ),
    )


# Where torchao keeps its layers with quantized weights; those of 4 bits for CPUs are among its prototypes.
_TORCHAO = (
    ("torchao.quantization", "Int4WeightOnlyConfig"),
    ("torchao.prototype.quantization.int4", "PrototypeInt4WeightOnlyConfig"),
    ("torchao.quantization", "Int8WeightOnlyConfig"),
    ("torchao.quantization", "Float8WeightOnlyConfig"),
)


def _of_torchao(layer: nn.Linear) -> Iterator[tuple[str, tuple[int, Product]]]:
    """torchao's weight-only layers, in bfloat16, as it recommends; those that it cannot make here are left out."""
    if not find_spec("torchao"):
        return
    quantize_ = import_module("torchao.quantization").quantize_
    for module, name in _TORCHAO:
        theirs = copy.deepcopy(layer).bfloat16()
        try:
            quantize_(theirs, getattr(import_module(module), name)())
            theirs(torch.zeros(1, layer.in_features, device=layer.weight.device, dtype=torch.bfloat16))
        except (AttributeError, ImportError, NotImplementedError, RuntimeError, ValueError, AssertionError):
            continue
        # What a group's scale and zero point take is left out: the classes keep them in different ways.
        bits = 4 if "4" in name else 8
        yield f"torchao {name.removesuffix('Config')}", (layer.weight.numel() * bits // 8, _in_bfloat16(theirs))


def _in_bfloat16(layer: nn.Module) -> Product:
    return lambda x: layer(x.bfloat16())


#: Former names, for one release.
__getattr__ = names_of(__name__, {"METHODS": "zoo.bench.quantize:MEASURED"})

"""The binary track: every binarization method on a model of the zoo, in quality, robustness, size and speed.

    zoo study binary wavtokenizer-tiny --out eval/results/binary-wavtokenizer-tiny.json

The arrangement is that of BiBench (Qin et al., ICML 2023, arXiv 2301.11233). Models, data and training are our own, and short:
numbers compare methods here and say nothing about those in the paper. Each method starts from the model's weights and has the
same number of steps; scores are those of the packed model. The file is written after every method, and the same command goes on
where it was.

The functions `task_metric` to `inference_metric` turn tables of relative values into BiBench's summaries as this project's
specification remembers them; they were not verified against the paper.
"""

from __future__ import annotations

import copy
import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from zoo import registry
from zoo.bench.binary import milliseconds
from zoo.errors import InputError
from zoo.eval.options import MaybeOut, Name, Threads
from zoo.eval.studies.binary_tracks import TRACKS, Track
from zoo.machine import device_name
from zoo.media import write_json
from zoo.quantization import binary
from zoo.quantization.binary_operators import OPERATORS, BinaryLayer

FULL = "full precision"

_RATE = 1e-3
_WARMUP = 20
# Epochs that the methods' schedules see, or as many as there are steps.
_EPOCHS = 20


# --------------------------------------------------------------------------------------------------------------- summaries


def quadratic_mean(values: Sequence[float]) -> float:
    """Root of the mean of squares.

    Raises:
        InputError: there are no values.
    """
    if not values:
        raise InputError("a mean of no values")
    return math.sqrt(fmean(value * value for value in values))


def task_metric(relative: Mapping[str, Sequence[float]]) -> float:
    """Quadratic mean over tasks of the mean binary over full-precision score."""
    return quadratic_mean([fmean(values) for values in relative.values()])


def architecture_metric(relative: Mapping[str, Sequence[float]]) -> float:
    """Quadratic mean over architectures (convolutional, transformer, perceptron) of the mean relative score."""
    return task_metric(relative)


def robustness_metric(full: Mapping[str, float], binarized: Mapping[str, float]) -> float | None:
    """Quadratic mean over corruptions of the full-precision score's drop over the binary one's; ``None`` if nothing drops.

    Corruptions that cost one of the two nothing are left out.

    Args:
        full, binarized: drop of the score by corruption.
    """
    ratios = [full[name] / drop for name, drop in binarized.items() if drop > 0 and full[name] > 0]
    return quadratic_mean(ratios) if ratios else None


def training_metric(seconds: Sequence[tuple[float, float]], scores: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float:
    """Quadratic mean of two ratios, full precision over binary: training time, and spread of scores over settings.

    Args:
        seconds: training times, full precision and binary.
        scores: for every experiment the scores of all settings, full precision and binary.
    """
    times = fmean(full / binarized for full, binarized in seconds)
    return quadratic_mean([times, fmean(pstdev(full) / pstdev(binarized) for full, binarized in scores)])


def compression(parameters: float, binary_parameters: float) -> float:
    """``P / (P_b / 32 + P_f)``: how many times smaller a model gets whose binary weights take one bit."""
    return parameters / (binary_parameters / 32 + parameters - binary_parameters)


def speedup(operations: float, binary_operations: float) -> float:
    """``F / (F_b / 64 + F_f)``: how many times fewer operations, if one handles 64 signs."""
    return operations / (binary_operations / 64 + operations - binary_operations)


def complexity_metric(compressions: Sequence[float], speedups: Sequence[float]) -> float:
    """Quadratic mean of the mean compression and the mean speed-up."""
    return quadratic_mean([fmean(compressions), fmean(speedups)])


def inference_metric(latency: Sequence[tuple[float, float]], storage: Sequence[tuple[float, float]]) -> float:
    """Quadratic mean of two ratios, full precision over binary: latency and storage."""
    ratios = [fmean(full / binarized for full, binarized in pairs) for pairs in (latency, storage)]
    return quadratic_mean(ratios)


# ------------------------------------------------------------------------------------------------------------- measurement


def run(
    name: str,
    *,
    methods: Sequence[str] = tuple(OPERATORS),
    steps: int = 30,
    seed: int = 3407,
    threads: int | None = None,
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """Train, score and time every method on one model.

    Args:
        name: a model of the catalogue whose family is in `TRACKS`.
        methods: names of methods.
        steps: optimiser steps of each.
        seed: of batches and corruptions.
        threads: PyTorch's threads; its own choice if ``None``.
        json_path: where to write after every method, and to go on from.

    Returns:
        The table with the machine it was made on.

    Raises:
        InputError: there is no subject for the model, or no such method.
    """
    for method in methods:
        binary.operator_named(method)
    family = registry.get(name).family
    if family not in TRACKS:
        raise InputError(f"there is no binary track for {family}; there are {', '.join(TRACKS)}")
    if threads:
        torch.set_num_threads(threads)
    content = _resumed(json_path, {"name": name, "steps": steps, "seed": seed, "threads": torch.get_num_threads()})
    pending = [method for method in (FULL, *methods) if method not in content["methods"]]
    if pending:
        subject = TRACKS[family](name, seed)
        content |= {"metric": subject.metric, "complexity": complexity(subject)}
        for method in tqdm(pending, desc=name, unit="method"):
            content["methods"][method] = _evaluate(subject, method, steps)
            if json_path is not None:
                write_json(json_path, content)
    return content


def _resumed(json_path: str | Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    machine = {"device": device_name(torch.device("cpu")), "torch": torch.__version__}
    fresh: dict[str, Any] = {"settings": settings, "machine": machine, "methods": {}}
    if json_path is None or not Path(json_path).exists():
        return fresh
    found = json.loads(Path(json_path).read_text(encoding="utf-8"))
    return found if found.get("settings") == settings else fresh


def _evaluate(subject: Track, method: str, steps: int) -> dict[str, Any]:
    model = copy.deepcopy(subject.teacher)
    found: dict[str, Any] = {}
    if method != FULL:
        binary.binarize(model.get_submodule(subject.part), method, skip=subject.skip)
        found["loss"], found["ms_per_step"] = train(subject, model, steps)
        binary.pack(model)
    with torch.inference_mode():
        found["score"] = subject.score(model)
        found["corrupted"] = {corruption: subject.score(model, corruption) for corruption in subject.corruptions}
        found["inference_ms"] = milliseconds(subject.work(model), "cpu")
    found["bytes"] = sum(_stored_bytes(module) for module in subject.running(model))
    return found


def train(subject: Track, model: nn.Module, steps: int) -> tuple[float, float]:
    """Teach a binarized model; returns the mean loss of the last steps and the processor's milliseconds per step."""
    part = model.get_submodule(subject.part).train().requires_grad_()
    parameters = list(part.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(subject.seed)
    torch.manual_seed(subject.seed)
    subject.loss(model, torch.Generator().manual_seed(0))  # makes the data, which is not to be timed
    losses = []
    epochs = min(_EPOCHS, steps)
    started = time.process_time()
    for step in tqdm(range(steps), desc="train", unit="step", leave=False):
        epoch = step * epochs // steps
        if epoch != (step - 1) * epochs // steps:
            binary.update(part, epoch, epochs)
        for group in optimizer.param_groups:
            group["lr"] = _RATE * min(1, (step + 1) / _WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = subject.loss(model, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    taken = 1e3 * (time.process_time() - started) / steps
    part.eval().requires_grad_(False)
    return fmean(losses[-max(1, steps // 10) :]), taken


def complexity(subject: Track) -> dict[str, float]:
    """Weights and operations of inference, those that become binary, and what theory makes of them."""
    model = copy.deepcopy(subject.teacher)
    binary.binarize(model.get_submodule(subject.part), "bnn", skip=subject.skip)
    layers = {name for name, layer in model.named_modules() if isinstance(layer, BinaryLayer)}
    modules = [subject.teacher.get_submodule(name) for name in layers]
    operations = 0

    def count(layer: nn.Module, inputs: tuple[Any, ...], _: object) -> None:
        nonlocal operations
        weight = layer.get_parameter("weight")
        operations += 2 * inputs[0].numel() // weight.shape[1] * weight.numel()

    hooks = [layer.register_forward_hook(count) for layer in modules]
    work: Callable[[], Any] = subject.work(subject.teacher)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        work()
    for hook in hooks:
        hook.remove()
    parameters = sum(p.numel() for module in subject.running(subject.teacher) for p in module.parameters())
    bits = sum(layer.get_parameter("weight").numel() for layer in modules)
    total = counter.get_total_flops()
    return {
        "parameters": parameters,
        "binary_parameters": bits,
        "operations": total,
        "binary_operations": operations,
        "compression": compression(parameters, bits),
        "speedup": speedup(total, operations),
    }


def _stored_bytes(module: nn.Module) -> int:
    """Size of a safetensors file of what the module stores."""
    return io.BytesIO(save({name: tensor.contiguous() for name, tensor in module.state_dict().items()})).getbuffer().nbytes


# ------------------------------------------------------------------------------------------------------------------ output


def summary(content: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Table of every method, relative to full precision."""
    full = content["methods"][FULL]
    drops = {name: full["score"] - score for name, score in full["corrupted"].items()}
    shown = {}
    for method, found in content["methods"].items():
        own = {name: found["score"] - score for name, score in found["corrupted"].items()}
        shown[method] = {
            "score": found["score"],
            "relative": found["score"] / full["score"],
            "corrupted": fmean(found["corrupted"].values()),
            "robustness": robustness_metric(drops, own),
            "latency": full["inference_ms"] / found["inference_ms"],
            "storage": full["bytes"] / found["bytes"],
            "ms_per_step": found.get("ms_per_step"),
        }
    return shown


def print_table(content: dict[str, Any]) -> None:
    """The results for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    settings, machine, theory = content["settings"], content["machine"], content["complexity"]
    console.print(f"{settings['name']}, {settings['steps']} steps, {machine['device']}, {settings['threads']} threads")
    console.print(f"in theory {theory['compression']:.1f} times smaller, {theory['speedup']:.1f} times fewer operations")
    table = Table("", content["metric"], "of full", "corrupted", "robustness", "times faster", "times smaller", "ms per step")
    for method, row in summary(content).items():
        cells = ["–" if value is None else f"{value:.3f}" for value in row.values()]
        table.add_row(method, *cells)
    console.print(table)


def main(
    name: Name,
    methods: Annotated[str, typer.Option(help="comma-separated")] = ",".join(OPERATORS),
    steps: Annotated[int, typer.Option(min=1, help="optimiser steps of each method")] = 30,
    seed: Annotated[int, typer.Option(help="of batches and corruptions")] = 3407,
    threads: Threads = None,
    out: MaybeOut = None,
) -> None:
    """Train, score and time every binarization method on a model.

    The file is written after every method, and the same command goes on where it was.
    """
    print_table(run(name, methods=methods.split(","), steps=steps, seed=seed, threads=threads, json_path=out))

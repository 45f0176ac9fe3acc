"""Time, memory and arithmetic of one piece of work."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from zoo import registry
from zoo.moved import names_of
from zoo.tokenizer import Tokenizer

Work = Callable[[], Any]

# Seconds from which one repetition is enough: noise is small beside them.
_LONG = 8.0


@dataclass(frozen=True)
class Job:
    """Something to measure.

    Attributes:
        contender: name of the implementation being measured.
        direction: ``encode`` or ``decode``, or what else the modality does.
        case: what goes in, such as ``1 x 10 s``.
        amount: how much of it: seconds of audio, or images.
        work: the work itself; ``None`` where the contender has none to compare.
        module: the model, where its operations shall be counted.
        dtype: whose matrix products are the yardstick.
    """

    contender: str
    direction: str
    case: str
    amount: float
    work: Work | None
    module: nn.Module | None = None
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Measurement:
    """Time, memory and arithmetic of a job.

    Attributes:
        wall, cpu: seconds, the median of the repetitions; ``cpu`` counts all threads.
        memory: peak of what was allocated on top of the model, in bytes.
        flops: floating-point operations, counted by PyTorch, LSTMs by formula; of our own models only.
        floor_share: time at the measured rate of a large matrix product over the time taken.
    """

    contender: str
    direction: str
    case: str
    amount: float
    wall: float
    cpu: float
    memory: int
    flops: int | None
    floor_share: float | None


@dataclass(frozen=True)
class Pair:
    """One piece of work done in two ways.

    Attributes:
        name: of the model.
        case: what goes in.
        ours, original: the two ways.
        alike: whether both return the same ids or numbers, but for rounding; a padded batch changes the original's.
        operations: floating-point operations that the work takes, where they are counted.
        dtype: of its products.
    """

    name: str
    case: str
    ours: Work
    original: Work
    alike: bool = True
    operations: int | None = None
    dtype: torch.dtype = torch.float32


def measure(job: Job, rates: dict[torch.dtype, float], repetitions: int, device: str) -> Measurement:
    """Run a job a few times after one run to warm up; a long one once."""
    assert job.work is not None
    flops = None if job.module is None else count_flops(job.module, job.work)
    started = time.perf_counter()
    job.work()
    if time.perf_counter() - started > _LONG:
        repetitions = 1
    walls, cpus = [], []
    with peak_memory(device) as peak:
        for _ in range(repetitions):
            wall, cpu = time.perf_counter(), time.process_time()
            job.work()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
    wall = sorted(walls)[repetitions // 2]
    return Measurement(
        contender=job.contender,
        direction=job.direction,
        case=job.case,
        amount=job.amount,
        wall=wall,
        cpu=sorted(cpus)[repetitions // 2],
        memory=peak[0],
        flops=flops,
        floor_share=None if flops is None else flops / rates[job.dtype] / wall,
    )


def random_model(entry: registry.Entry, device: str) -> Tokenizer[Any]:
    """A tokenizer at the sizes of the catalogue, with random weights."""
    torch.manual_seed(0)
    cls = registry.family_class(entry.family)
    tokenizer = cls(registry.check_config(entry), name=entry.name).eval().requires_grad_(False).to(device)
    for tensor in tokenizer.state_dict().values():
        if tensor.is_floating_point() and not tensor.any():
            tensor.normal_()  # a codebook of zeros would be one tie of all its codes
    return tokenizer


def count_flops(module: nn.Module, work: Work) -> int:
    """Operations of one call; the LSTMs, which PyTorch's counter does not know, do two per weight, step and item."""
    lstms = 0

    def count(lstm: nn.Module, inputs: tuple[Any, ...], _: object) -> None:
        nonlocal lstms
        steps = inputs[0].shape[0] * inputs[0].shape[1]
        lstms += 2 * steps * sum(weight.numel() for weight in lstm.parameters() if weight.ndim == 2)

    hooks = [lstm.register_forward_hook(count) for lstm in module.modules() if isinstance(lstm, nn.LSTM)]
    try:
        with FlopCounterMode(display=False) as counter:
            work()
    finally:
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops() + lstms


@contextmanager
def peak_memory(device: str) -> Iterator[list[int]]:
    """Peak memory above what is in use at the start; the resident set is sampled every millisecond on a CPU."""
    peak = [0]
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak[0] = torch.cuda.max_memory_allocated() - before
        return
    done = threading.Event()
    before = resident_bytes()

    def sample() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], resident_bytes() - before)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()


def resident_bytes() -> int:
    """Memory of this process that is in RAM; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product, the floor's yardstick.

    The size doubles until one product takes 50 ms: CPUs without bf16 units are up to a hundred times slower in it.
    """
    largest = 2048 if device == "cpu" else 8192
    size = min(256, largest)
    while True:
        left = torch.randn(size, size, device=device, dtype=dtype)
        best = float("inf")
        for _ in range(4):
            started = time.perf_counter()
            _ = left @ left
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        if size == largest or best > 0.05:
            return 2 * size**3 / best
        size *= 2


#: What lies in `zoo.machine`, for one release.
__getattr__ = names_of(__name__, {"device_name": "zoo.machine"})

"""`zoo bench`: how fast a tokenizer is, against its peers and against the arithmetic it cannot avoid.

Speed does not depend on the values of the weights, so models are built at the catalogue's sizes with random weights and
nothing is downloaded. Peers run in the same process, on the same audio, with the same threads.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from zoo import registry
from zoo.errors import InputError
from zoo.media import replacing
from zoo.tokenizer import Tokenizer

Work = Callable[[], Any]

# Seconds from which one repetition is enough: noise is small beside them.
_LONG = 8.0


@dataclass(frozen=True)
class Contender:
    """A model under measurement: ``prepare(audio)`` gives its encode and decode as functions without arguments.

    Either is ``None`` where there is nothing to compare.
    """

    name: str
    module: nn.Module
    prepare: Callable[[Tensor], tuple[Work | None, Work | None]]


@dataclass(frozen=True)
class Measurement:
    """One direction of one contender on one shape of input.

    Attributes:
        wall, cpu: seconds, the median of the repetitions; ``cpu`` counts all threads.
        memory: peak of what was allocated on top of the model, in bytes.
        audio_seconds: of the whole batch.
        flops: floating-point operations, counted by PyTorch, LSTMs by formula; of our own models only.
        floor_share: time at the measured rate of a large matrix product over the time taken.
    """

    contender: str
    direction: str
    batch: int
    seconds: float
    audio_seconds: float
    wall: float
    cpu: float
    memory: int
    flops: int | None
    floor_share: float | None

    @property
    def real_time_factor(self) -> float:
        """Processing time over duration; less than one is faster than real time."""
        return self.wall / self.audio_seconds


def run(
    name: str,
    *,
    seconds: Sequence[float] = (1, 10, 60),
    batches: Sequence[int] = (1, 8),
    threads: int | None = None,
    device: str = "cpu",
    repetitions: int = 3,
    peers: bool = True,
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """Measure a tokenizer of the catalogue and its peers.

    Args:
        name: a name in the catalogue.
        seconds, batches: durations and batch sizes; every combination is run.
        threads: threads of PyTorch; its own choice if ``None``.
        device: where to run.
        repetitions: measurements per figure, after one warm-up; the median counts.
        peers: measure transformers' EnCodec, DAC and Mimi as well.
        json_path: write the result there.

    Returns:
        The measurements with the machine they were taken on.

    Raises:
        RegistryError: no such name.
        InputError: there is no benchmark for its modality.
    """
    entry = registry.get(name)
    if entry.modality not in ("audio", "speech"):
        raise InputError(f"there is no benchmark for {entry.modality} yet")
    if threads:
        torch.set_num_threads(threads)
    rates = {dtype: _matmul_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    results: list[Measurement] = []
    for contender in _contenders(entry, device, peers):
        rate = rates[torch.bfloat16 if "bf16" in contender.name else torch.float32]
        for batch in batches:
            for duration in seconds:
                audio = _audio(batch, duration, registry.check_config(entry).sample_rate).to(device)
                with torch.inference_mode():
                    for direction, work in zip(("encode", "decode"), contender.prepare(audio), strict=True):
                        if work is not None:
                            results.append(_measure(contender, direction, work, batch, duration, rate, repetitions, device))
    content = {
        "name": name,
        "machine": {
            "device": device_name(torch.device(device)),
            "threads": torch.get_num_threads(),
            "matmul_gflops": {str(dtype).removeprefix("torch."): rate / 1e9 for dtype, rate in rates.items()},
            "torch": torch.__version__,
        },
        "measurements": [vars(result) | {"real_time_factor": result.real_time_factor} for result in results],
    }
    if json_path is not None:
        with replacing(json_path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return content


def print_table(content: dict[str, Any]) -> None:
    """The measurements as tables; the last column is a model's CPU time over that of ours in float32."""
    from rich.console import Console
    from rich.table import Table

    machine, measurements = content["machine"], content["measurements"]
    ours = {(m["direction"], m["batch"], m["seconds"]): m["cpu"] for m in measurements if m["contender"] == content["name"]}
    console = Console()
    console.print(f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}")
    for direction in ("encode", "decode"):
        table = Table(title=direction)
        for column in ("model", "batch × s", "CPU s", "× real", "+MB", "floor", "/ ours"):
            table.add_column(column, justify="left" if column == "model" else "right")
        chosen = [m for m in measurements if m["direction"] == direction]
        for m in sorted(chosen, key=lambda m: (m["batch"], m["seconds"])):
            table.add_row(
                m["contender"],
                f"{m['batch']} × {m['seconds']:g}",
                f"{m['cpu']:.3f}",
                f"{1 / m['real_time_factor']:.1f}",
                f"{m['memory'] / 1e6:.0f}",
                "" if m["floor_share"] is None else f"{m['floor_share']:.0%}",
                f"{m['cpu'] / ours[direction, m['batch'], m['seconds']]:.2f}",
            )
        console.print(table)


def _contenders(entry: registry.Entry, device: str, peers: bool) -> Iterator[Contender]:
    torch.manual_seed(0)
    cls = registry.family_class(entry.family)
    tokenizer = cls(registry.check_config(entry), name=entry.name).eval().requires_grad_(False).to(device)
    for tensor in tokenizer.state_dict().values():
        if tensor.is_floating_point() and not tensor.any():
            tensor.normal_()  # a codebook of zeros would be one tie of all its codes
    yield _ours(entry.name, tokenizer)
    tokenizer.set_precision("bf16")
    # Encoders stay in float32 and have nothing new to show.
    yield _ours(f"{entry.name}, bf16", tokenizer, encodes=False)
    if peers and find_spec("transformers"):
        yield from _transformers_peers(tokenizer, device)


def _ours(name: str, tokenizer: Tokenizer[Any], encodes: bool = True) -> Contender:
    def prepare(audio: Tensor) -> tuple[Work | None, Work | None]:
        items = list(audio.cpu())
        tokens = tokenizer.encode(items)
        return (lambda: tokenizer.encode(items)) if encodes else None, lambda: tokenizer.decode(tokens)

    return Contender(name, tokenizer, prepare)


def _transformers_peers(tokenizer: Tokenizer[Any], device: str) -> Iterator[Contender]:
    from transformers import DacConfig, DacModel, EncodecConfig, EncodecModel, MimiConfig, MimiModel

    config = tokenizer.config
    same_encoder = EncodecConfig(
        num_filters=config.n_filters,
        hidden_size=config.latent_dim,
        upsampling_ratios=list(config.ratios),
        num_lstm_layers=config.lstm_layers,
        use_causal_conv=False,
        norm_type="weight_norm",
    )
    twin = EncodecModel(same_encoder).eval().to(device)
    codes = tokenizer.state_dict()["codebook.embed"]

    def search(audio: Tensor) -> Tensor:
        """The same encoder, and the search as the original code writes it."""
        latents = twin.encoder(audio[:, None]).transpose(1, 2).flatten(0, 1)
        return (latents.square().sum(1, keepdim=True) - 2 * latents @ codes.T + codes.square().sum(1)).argmin(1)

    yield Contender("EnCodec, same sizes", twin, lambda audio: (lambda: search(audio), None))

    encodec = EncodecModel(EncodecConfig()).eval().to(device)

    def prepare_encodec(audio: Tensor) -> tuple[Work, Work]:
        encoded = encodec.encode(audio[:, None], bandwidth=6.0)
        return (
            lambda: encodec.encode(audio[:, None], bandwidth=6.0),
            lambda: encodec.decode(encoded.audio_codes, encoded.audio_scales),
        )

    yield Contender("EnCodec 6 kbit/s", encodec, prepare_encodec)

    dac = DacModel(DacConfig(sampling_rate=24_000)).eval().to(device)

    def prepare_dac(audio: Tensor) -> tuple[Work, Work]:
        quantized = dac.encode(audio[:, None]).quantized_representation
        return lambda: dac.encode(audio[:, None]), lambda: dac.decode(quantized)

    yield Contender("DAC", dac, prepare_dac)

    mimi = MimiModel(MimiConfig()).eval().to(device)

    def prepare_mimi(audio: Tensor) -> tuple[Work, Work]:
        codes = mimi.encode(audio[:, None]).audio_codes
        return lambda: mimi.encode(audio[:, None]), lambda: mimi.decode(codes)

    yield Contender("Mimi", mimi, prepare_mimi)


def _measure(
    contender: Contender,
    direction: str,
    work: Work,
    batch: int,
    seconds: float,
    rate: float,
    repetitions: int,
    device: str,
) -> Measurement:
    flops = _count_flops(contender.module, work) if isinstance(contender.module, Tokenizer) else None
    started = time.perf_counter()
    work()
    if time.perf_counter() - started > _LONG:
        repetitions = 1
    walls, cpus = [], []
    with peak_memory(device) as peak:
        for _ in range(repetitions):
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
    wall = sorted(walls)[repetitions // 2]
    return Measurement(
        contender=contender.name,
        direction=direction,
        batch=batch,
        seconds=seconds,
        audio_seconds=batch * seconds,
        wall=wall,
        cpu=sorted(cpus)[repetitions // 2],
        memory=peak[0],
        flops=flops,
        floor_share=None if flops is None else flops / rate / wall,
    )


def _count_flops(module: nn.Module, work: Work) -> int:
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


def _matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product, the floor's yardstick."""
    size = 2048 if device == "cpu" else 8192
    left = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        _ = left @ left
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _audio(batch: int, seconds: float, rate: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, round(seconds * rate), generator=generator) * 0.1


def device_name(device: torch.device) -> str:
    """What the machine calls its GPU or processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(errors="replace").splitlines() if cpu_info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

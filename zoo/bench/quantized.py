"""Packed forms of the official architectures: models to time, and what they take on disk and in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from zoo import hub, registry
from zoo.bench.measure import peak_memory, random_model
from zoo.quantization.conversion import quantize
from zoo.quantization.layers import Granularity
from zoo.saving import WEIGHTS_FILE
from zoo.tokenizer import Tokenizer

# The range of weights changes neither speed nor size, and looking for it takes longer than everything else.
_UNSEARCHED = Granularity(clip="absmax")


@dataclass(frozen=True)
class Call:
    """One call of a tokenizer with ids, in plain values, because another process is to make it.

    Attributes:
        method: of the tokenizer.
        ids: of each item.
        options: of the method.
    """

    method: str
    ids: list[list[int]]
    options: dict[str, Any]


@dataclass(frozen=True)
class Footprint:
    """Sizes of a model on disk and in memory.

    Attributes:
        contender: whose it is.
        weight_bytes: of all tensors in the model.
        file_bytes: of the saved weights.
        peak_bytes: most memory in use while a fresh process loads the model and does one call, above what it had in use before.
    """

    contender: str
    weight_bytes: int
    file_bytes: int
    peak_bytes: int


def quantized_model(entry: registry.Entry, device: str, method: str) -> Tokenizer[Any]:
    """A tokenizer at the sizes of the catalogue with random weights, quantized."""
    return quantize(random_model(entry, device), method, granularity=_UNSEARCHED)


def outline(entry: registry.Entry) -> Tokenizer[Any]:
    """A tokenizer at the sizes of the catalogue without any weights."""
    with torch.device("meta"):
        model: Tokenizer[Any] = registry.family_class(entry.family)(registry.check_config(entry), name=entry.name)
    return model


def footprints(entry: registry.Entry, device: str, methods: Sequence[str], call: Call) -> Iterator[Footprint]:
    """Footprints of the model in float32 and quantized."""
    for method in tqdm((None, *methods), desc="memory", unit="model"):
        model = random_model(entry, device) if method is None else quantized_model(entry, device, method)
        weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        with tempfile.TemporaryDirectory() as folder:
            hub.save_pretrained(model, folder)
            del model
            # Not in this process, which keeps what others have left behind.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                peak = pool.submit(peak_of, folder, entry.name, call, device, torch.get_num_threads()).result()
            size = (Path(folder) / WEIGHTS_FILE).stat().st_size
        yield Footprint(entry.name if method is None else f"{entry.name}, {method}", weights, size, peak)


def peak_of(folder: str, name: str, call: Call, device: str, threads: int) -> int:
    """Most memory in use, in bytes, while the saved model is loaded and called, above what is in use before."""
    torch.set_num_threads(threads)
    # Imports what the model is made of, which is not its own memory.
    outline(registry.get(name))
    with peak_memory(device) as peak, torch.inference_mode():
        tokenizer = hub.load(f"local-dir:{folder}", device=device)
        getattr(tokenizer, call.method)([torch.tensor(ids) for ids in call.ids], **call.options)
    return peak[0]

"""Measures of quantized models: their output for the ids of held-out files, beside float32 and the originals."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.modality import modality
from zoo.tokens import Tokens

#: Files that go through a model together while it is calibrated.
TOGETHER = 8


class Subject(ABC):
    """A tokenizer in float32 and held-out files: their ids, and what the model makes of them.

    Ids are made once: quantization leaves encoders alone.

    Attributes:
        amount: how much there is to measure on, in ``unit``.
    """

    #: What ``amount`` counts.
    unit: ClassVar[str]
    #: Headings and decimals of what `compare` returns, in the order of a table's columns.
    columns: ClassVar[Mapping[str, tuple[str, int]]]

    amount: float

    def __init__(self, tokenizer: Any, files: Sequence[Path]) -> None:
        self.tokenizer = tokenizer
        self.tokens: Tokens = tokenizer.encode(self.read(files))
        self.wanted = self.output(tokenizer, self.tokens)

    @abstractmethod
    def read(self, files: Sequence[Path]) -> list[Any]:
        """The held-out files, as `encode` takes them; keeps what `compare` needs of them."""

    @abstractmethod
    def output(self, model: Any, tokens: Tokens) -> list[Float[Tensor, "*shape"]]:
        """Output of a model for tokens, one tensor for each item; the same noise every time where there is any."""

    @abstractmethod
    def compare(self, found: Sequence[Float[Tensor, "*shape"]]) -> dict[str, float | None]:
        """Figures of an output beside that of float32 and the originals."""

    def calibration(self, files: Sequence[Path]) -> list[Tokens]:
        """Batches of other files' ids, which `output` runs a model on."""
        return [self.tokenizer.encode(list(files[start : start + TOGETHER])) for start in range(0, len(files), TOGETHER)]

    def measure(self, model: Any) -> dict[str, float | None]:
        """Signal-to-noise ratio in dB against float32, the figures of `compare`, and CPU seconds."""
        started = time.process_time()
        found = self.output(model, self.tokens)
        seconds = time.process_time() - started
        return {"snr": signal_to_noise(self.wanted, found), **self.compare(found), "decode_cpu_seconds": seconds}


def subject_of(name: str) -> type[Subject]:
    """The subject of a kind of media, which its record in `zoo.modality` names.

    Raises:
        InputError: there is none for it yet.
    """
    return cast(type[Subject], modality(name).home("quantize").SUBJECT)


def signal_to_noise(wanted: Iterable[Tensor], found: Iterable[Tensor]) -> float:
    """Power of what is wanted over that of the difference, of all items together, in dB; infinite without a difference."""
    pairs = list(zip(wanted, found, strict=True))
    signal = sum(float(reference.square().sum()) for reference, _ in pairs)
    noise = sum(float((item - reference).square().sum()) for reference, item in pairs)
    return 10 * float(torch.tensor(signal / noise).log10()) if noise else float("inf")

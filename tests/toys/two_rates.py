"""A codec of three codebooks at two rates, small enough to be checked by hand: what a multi-rate codec has to be."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.checkpoint import Checkpoint
from zoo.precision import Float32Module
from zoo.spec import Frame, Spec
from zoo.tokenizer import Budget
from zoo.tokenizer.audio import AudioTokenizer
from zoo.tokens import Tokens

HOP = 8


@dataclass(frozen=True)
class TwoRatesConfig:
    """Entries of the three codebooks, coarse first: one code of the first in a frame, two of each of the others."""

    sizes: tuple[int, ...] = (32, 16, 8)
    sample_rate: int = 8000


def convert(state: Mapping[str, Tensor], config: Any) -> tuple[TwoRatesConfig, dict[str, Tensor]]:
    return config or TwoRatesConfig(tuple(len(state[f"book.{i}"]) for i in range(3))), dict(state)


def recognises(keys: Collection[str]) -> bool:
    return set(keys) == {"book.0", "book.1", "book.2"}


class Books(Float32Module, torch.nn.ParameterList):
    """Codebooks, in float32 whatever the model is cast to: ids depend on them."""


class TwoRates(AudioTokenizer[TwoRatesConfig, Tokens]):
    """The mean of 8 samples, then of each half what the mean leaves over, twice: 5 ids in a frame of a millisecond."""

    Config = TwoRatesConfig
    family = "two_rates"
    identity = ("book.0", "book.1", "book.2")
    checkpoint = Checkpoint(recognises=recognises, convert=convert)
    at_once: ClassVar[Mapping[str, Budget]] = {"encode": Budget(4096, 4096), "decode": Budget(512, 512)}

    def __init__(self, config: TwoRatesConfig | None = None, *, name: str = "two-rates") -> None:
        super().__init__(config or TwoRatesConfig(), name)
        reach = (1.0, 0.5, 0.1)
        levels = [torch.linspace(-r, r, size, dtype=torch.float32) for r, size in zip(reach, self.config.sizes, strict=True)]
        self.book = Books(levels)

    @property
    def spec(self) -> Spec:
        frame = Frame(self.config.sizes, order=(0, 1, 2, 1, 2))
        return Spec(
            name=self.name,
            family=self.family,
            modality="audio",
            vocab_size=frame.vocab_size,
            dim=1,
            fingerprint=self.fingerprint,
            sample_rate=self.config.sample_rate,
            hop_length=HOP,
            frame=frame,
            residual=True,
        )

    def encode_waveforms(self, waveforms: Float[Tensor, "batch 1 samples"]) -> Sequence[Tensor]:
        halves = waveforms[:, 0].unflatten(1, (-1, 2, HOP // 2)).mean(-1)
        coarse = self._nearest(0, halves.mean(-1, keepdim=True))
        rest = halves - self.book[0][coarse]
        middle = self._nearest(1, rest)
        fine = self._nearest(2, rest - self.book[1][middle])
        return list(torch.cat([coarse, torch.stack([middle, fine], dim=-1).flatten(-2)], dim=-1))

    def _nearest(self, book: int, values: Tensor) -> Tensor:
        return (values[..., None] - self.book[book]).abs().argmin(-1)

    def decode_values(self, values: Tensor) -> Float[Tensor, "batch 1 samples"]:
        halves = self.book[0][values[..., :1]].expand(*values.shape[:2], 2)
        # Places of the finer codebooks, as far as they were kept: middle and fine of one half, then of the other.
        each = (values.shape[-1] - 1) // 2
        for book in range(1, each + 1):
            halves = halves + self.book[book][values[..., book::each]]
        return halves.repeat_interleave(HOP // 2, dim=-1).flatten(1)[:, None]

    def embed(self, tokens: Any) -> Float[Tensor, "batch length 1"]:
        checked = self.check(tokens)
        codes = checked.codes().to(self.device)
        order = checked.frame.order if checked.frame else (0,)
        vectors = torch.stack([self.book[book][codes[..., place].clamp(min=0)] for place, book in enumerate(order)], dim=-1)
        return (vectors * (codes >= 0)).flatten(1)[..., None].detach()


TOKENIZER = TwoRates

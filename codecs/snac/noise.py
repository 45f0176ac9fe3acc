"""The normal numbers that the decoder's blocks multiply with: one for each time step, the same for all channels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.codecs.snac.config import SNACConfig
from zoo.errors import ArgumentError

#: What `decode` takes: the name of a way to draw, or the numbers themselves, ``[batch, 1, steps]`` for each block.
NoiseOption = str | Sequence[Tensor]


class NoiseSource(ABC):
    """Noise for windows of a batch of items, asked for in time order."""

    @abstractmethod
    def window(self, items: Sequence[int], first: int, stop: int) -> list[Float[Tensor, "_ _ 1"]]:
        """For each block the noise of some items in the latent frames from ``first`` to ``stop``."""


def steps_per_frame(config: SNACConfig) -> tuple[int, ...]:
    """Time steps of a latent frame in each block."""
    return tuple(accumulate(config.decoder_rates, mul))


class SeededNoise(NoiseSource):
    """Noise that depends on an item's seed and on time, on nothing else.

    Block ``k`` draws from a generator of its own, seeded with ``seed + k``, one coarse frame after the other. An item thus gets
    the same noise alone and in a batch, whole and in windows, on every device.

    Args:
        seeds: of each item, from -2⁶³ to what leaves a number of 64 bits for the last block.
        config: of the model.

    Raises:
        ArgumentError: a seed is no such number.
    """

    def __init__(self, seeds: Sequence[int], config: SNACConfig) -> None:
        self.seeds = list(seeds)
        for seed in self.seeds:
            if not isinstance(seed, int) or not -(1 << 63) <= seed <= (1 << 64) - len(config.decoder_rates):
                raise ArgumentError(f"a seed is a whole number of 64 bits, not {seed!r}")
        self._streams = {seed: _Stream(seed, config) for seed in self.seeds}

    def window(self, items: Sequence[int], first: int, stop: int) -> list[Float[Tensor, "_ _ 1"]]:
        wanted = [self.seeds[item] for item in items]
        found = {seed: self._streams[seed].window(first, stop) for seed in dict.fromkeys(wanted)}
        if len(found) == 1:
            return found[wanted[0]]
        return [torch.cat(parts) for parts in zip(*(found[seed] for seed in wanted), strict=True)]


class _Stream:
    """The noise of one seed; as much is kept as the next window may need."""

    def __init__(self, seed: int, config: SNACConfig) -> None:
        self._coarse = config.vq_strides[0]
        self._steps = steps_per_frame(config)
        self._generators = [torch.Generator().manual_seed(seed + block) for block in range(len(self._steps))]
        self._drawn: list[list[Tensor]] = []
        self._forgotten = 0

    def window(self, first: int, stop: int) -> list[Float[Tensor, "1 _ 1"]]:
        begin, end = first // self._coarse, -(-stop // self._coarse)
        while self._forgotten + len(self._drawn) < end:
            self._drawn.append(
                [
                    torch.randn(self._coarse * steps, generator=generator, dtype=torch.float32)
                    for steps, generator in zip(self._steps, self._generators, strict=True)
                ]
            )
        self._drawn = self._drawn[begin - self._forgotten :]
        self._forgotten = begin
        blocks = zip(*self._drawn[: end - begin], strict=True)
        inside = first - begin * self._coarse, stop - begin * self._coarse
        return [
            torch.cat(parts)[None, inside[0] * steps : inside[1] * steps, None]
            for parts, steps in zip(blocks, self._steps, strict=True)
        ]


class GivenNoise(NoiseSource):
    """Noise that was drawn before.

    Args:
        blocks: for each block ``[batch, 1, steps]``, or ``[1, 1, steps]`` for all items.
        config: of the model.
        totals: latent frames of each item.

    Raises:
        ArgumentError: there are not as many tensors as blocks, or one has another shape.
    """

    def __init__(self, blocks: Sequence[Tensor], config: SNACConfig, totals: Sequence[int]) -> None:
        self._steps = steps_per_frame(config)
        if len(blocks) != len(self._steps):
            raise ArgumentError(f"noise of {len(blocks)} blocks does not suit a decoder of {len(self._steps)}")
        for block, steps in zip(blocks, self._steps, strict=True):
            shapes = [(batch, 1, max(totals) * steps) for batch in (len(totals), 1)]
            if tuple(block.shape) not in shapes:
                raise ArgumentError(f"noise must be {list(shapes[0])} here, not {list(block.shape)}")
        self._blocks = [block.to(torch.float32) for block in blocks]

    def window(self, items: Sequence[int], first: int, stop: int) -> list[Float[Tensor, "_ _ 1"]]:
        found = []
        for block, steps in zip(self._blocks, self._steps, strict=True):
            rows = block if len(block) == 1 else block[list(items)]
            found.append(rows[:, 0, first * steps : stop * steps, None])
        return found


def noise_source(
    noise: NoiseOption,
    seeds: Sequence[int],
    generator: torch.Generator | None,
    config: SNACConfig,
    totals: Sequence[int],
    device: torch.device,
) -> NoiseSource | None:
    """Noise that `decode`'s options stand for; ``None`` where none is added.

    Raises:
        ArgumentError: there is no such way to draw, or it takes items of one length.
    """
    if not isinstance(noise, str):
        return GivenNoise(noise, config, totals)
    if noise not in ("seeded", "zero", "official"):
        raise ArgumentError(f"noise must be seeded, zero, official or a list of tensors, not {noise!r}")
    if noise == "zero" or not config.noise:
        return None
    if noise == "seeded":
        return SeededNoise(seeds, config)
    if len(set(totals)) > 1:
        raise ArgumentError("noise='official' is drawn for a whole batch and takes items of one length: use 'seeded'")
    where = device if generator is None else generator.device
    drawn = [
        torch.randn(len(totals), 1, totals[0] * steps, generator=generator, device=where, dtype=torch.float32)
        for steps in steps_per_frame(config)
    ]
    return GivenNoise(drawn, config, totals)

"""Finite scalar quantization (arXiv 2309.15505): every component of a vector is rounded to one of a few levels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.errors import ArgumentError, InputError

# Keeps the outermost levels reachable: the bounding tanh would approach them only at infinity.
_MARGIN = 1e-3


def require_codes(ids: Int[Tensor, "*shape"], size: int) -> None:
    """Refuse ids of no code, for quantizers that would work out a vector for any number.

    Raises:
        InputError: an id is outside of ``[0, size)``.
    """
    if ids.numel() and not 0 <= ids.min() <= ids.max() < size:
        raise InputError(f"ids from {int(ids.min())} to {int(ids.max())} are outside of the {size} codes")


class FSQ(nn.Module):
    """Codes on a grid of ``levels`` per component, in [-1, 1], numbered with the first component as the fastest digit.

    It has no parameters and always computes in float32.

    Args:
        levels: number of values of each component.
        symmetric: whether an even number of values lies around 0 rather than one more below it (arXiv 2411.19842).

    Raises:
        ArgumentError: there is no component, or one has fewer than two values.
    """

    def __init__(self, levels: Sequence[int], *, symmetric: bool = False) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ArgumentError(f"each component has at least two levels, and there is at least one: not {list(levels)}")
        self.levels = tuple(levels)
        self.symmetric = symmetric

    @property
    def vocab_size(self) -> int:
        """Number of codes."""
        return math.prod(self.levels)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of codes, of the one codebook that there is."""
        return (self.vocab_size,)

    def _per_component(self, values: Sequence[int], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=like.device)

    def bound(self, z: Float[Tensor, "*shape components"]) -> Float[Tensor, "*shape components"]:
        """Squash each component into the range of its levels, before rounding (section 3.1)."""
        half_range, offset = self._range(z)
        if self.symmetric:
            return torch.tanh(z.float()) * half_range + offset
        return torch.tanh(z.float() + self.shift(z)) * half_range - offset

    def shift(self, like: Tensor) -> Float[Tensor, " components"]:
        """Offset of each component in front of the tanh: the middle of the range lies at minus that."""
        half_range, offset = self._range(like)
        return torch.atanh(offset / half_range)

    def _range(self, like: Tensor) -> tuple[Float[Tensor, " components"], Float[Tensor, " components"]]:
        """Half the range of each component's levels, and the middle of what is rounded: half a step where their number is even.

        Where codes are symmetric, values count from the lowest level and the middle is half the range.
        """
        levels = self._per_component(self.levels, like)
        if self.symmetric:
            half = (levels - 1).float() / 2
            return half, half
        return (levels - 1).float() * (1 + _MARGIN) / 2, (levels % 2 == 0).float() / 2

    def forward(self, z: Float[Tensor, "*shape components"]) -> Float[Tensor, "*shape components"]:
        """Codes of latents; gradients pass straight through the rounding."""
        bounded = self.bound(z)
        if self.symmetric:
            digits = bounded + ((bounded + 0.5).floor() - bounded).detach()
            return 2 * digits / self._steps(z) - 1
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / self._per_component([level // 2 for level in self.levels], z)

    def ids(self, z: Float[Tensor, "*shape components"]) -> Int[Tensor, "*shape"]:
        """Numbers of the codes of latents, in ``[0, vocab_size)``."""
        half = self._per_component([level // 2 for level in self.levels], z)
        bounded = self.bound(z)
        digits = (bounded + 0.5).floor().to(torch.int64) if self.symmetric else bounded.round().to(torch.int64) + half
        return (digits * self._basis(z)).sum(-1)

    def codes(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape components"]:
        """Codes of numbers, which must lie in ``[0, vocab_size)``."""
        half = self._per_component([level // 2 for level in self.levels], ids)
        digits = ids[..., None] // self._basis(ids) % self._per_component(self.levels, ids)
        return 2 * digits.float() / self._steps(ids) - 1 if self.symmetric else (digits - half).float() / half

    def vectors(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape components"]:
        """The same as `codes`, by the name that all of `zoo.quantizers` have for it.

        Raises:
            InputError: an id is outside the codebook.
        """
        require_codes(ids, self.vocab_size)
        return self.codes(ids)

    def _steps(self, like: Tensor) -> Int[Tensor, " components"]:
        """Steps from the lowest to the highest level of each component."""
        return self._per_component([max(1, level - 1) for level in self.levels], like)

    def _basis(self, like: Tensor) -> Int[Tensor, " components"]:
        return self._per_component([math.prod(self.levels[:i]) for i in range(len(self.levels))], like)

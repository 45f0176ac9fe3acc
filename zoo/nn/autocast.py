"""Weights under autocast, which casts them anew at each call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.derived import Derived
from zoo.kernels import native


def autocast_to(x: Tensor) -> torch.dtype | None:
    """The type that autocast computes in where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class CastOnce:
    """The weight of a layer as autocast would cast it, kept until the weight changes.

    Args:
        lay_out: done to what was cast.
    """

    def __init__(self, lay_out: Callable[[Tensor], Tensor] | None = None) -> None:
        self._lay_out = lay_out
        self._kept: Derived[Tensor] = Derived()

    def of(self, weight: Float[Tensor, "*shape"], x: Float[Tensor, "*_"]) -> Float[Tensor, "*shape"]:
        """The weight to multiply ``x`` with: itself where autocast is off, and where gradients or others watch."""
        dtype = autocast_to(x)
        if dtype is None or weight.dtype != torch.float32 or not native.unwatched(x, weight):
            return weight

        def cast() -> Tensor:
            reduced = weight.detach().to(dtype)
            return reduced if self._lay_out is None else self._lay_out(reduced)

        kept = self._kept.of([weight], cast)
        if kept.dtype != dtype:
            self._kept = Derived()
            kept = self._kept.of([weight], cast)
        return kept

"""The loss of a training step, in one shape for every family: terms by name, each at its weight."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Losses(Mapping[str, Tensor]):
    """Terms of one training step, as a mapping. What is lowered is their sum.

    Attributes:
        terms: scalars by name, each at its weight, differentiable; 0 where a term was left out.
        outputs: tensors that the step made on the way and that somebody else needs, a discriminator say.
    """

    terms: Mapping[str, Float[Tensor, ""]]
    outputs: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> Float[Tensor, ""]:
        """The sum of the terms."""
        return functools.reduce(torch.add, self.terms.values())

    def __getattr__(self, name: str) -> Tensor:
        """Terms and outputs as attributes, as they were; this goes with the next release."""
        found: dict[str, Tensor] = {**vars(self).get("terms", {}), **vars(self).get("outputs", {})}
        if name not in found:
            raise AttributeError(f"there is no loss {name!r}")
        return found[name]

    def __getitem__(self, name: str) -> Tensor:
        return self.terms[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.terms)

    def __len__(self) -> int:
        return len(self.terms)

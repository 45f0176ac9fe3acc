"""Linear layers of networks whose activations are wider than their weights."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear layer that takes its input in any precision and computes in that of its weights."""

    #: Its product is that of ``nn.Linear``, so `zoo.quantize` may pack it.
    plain_product: ClassVar[bool] = True

    def forward(self, x: Float[Tensor, "*batch into"]) -> Float[Tensor, "*batch out"]:
        return super().forward(x.to(self.weight.dtype))

"""Linear layers of networks whose activations are wider than their weights, or that run under autocast."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.nn.autocast import CastOnce, autocast_to

NetworkT = TypeVar("NetworkT", bound=nn.Module)


class Linear(nn.Linear):
    """A linear layer that takes its input in any precision and computes in that of its weights, or in that of autocast.

    Autocast would cast the weights at each call; here they are cast once and kept beside the others.
    """

    #: Its product is that of ``nn.Linear``, so `zoo.quantize` may pack it.
    plain_product: ClassVar[bool] = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._cast = CastOnce()

    def forward(self, x: Float[Tensor, "*batch into"]) -> Float[Tensor, "*batch out"]:
        return F.linear(x.to(autocast_to(x) or self.weight.dtype), self._cast.of(self.weight, x), self.bias)


def own_linear_layers(network: NetworkT) -> NetworkT:
    """Put this `Linear` into a library's network, in place, wherever it has PyTorch's."""
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                with torch.device("meta"):
                    own = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                own.weight, own.bias = layer.weight, layer.bias
                setattr(parent, name, own)
    return network

"""SEANet of EnCodec and its kin as stages: the library's layers, in pieces, with the numbers of a single pass."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from zoo.nn.conv import elu
from zoo.nn.library import in_own_dtype
from zoo.nn.stages import Chain, Reach, Recurrent, Stage, Step, Window

#: Frames that the reflection at the end of a sequence reaches back, on top of what a layer sees.
REFLECTED = 3


class QuickELU(nn.Module):
    """Exponential linear unit by base-2 exponentials; see `zoo.nn.conv.elu`."""

    def forward(self, x: Float[Tensor, "batch channels time"]) -> Float[Tensor, "batch channels time"]:
        return elu(x)


def with_quick_elus(network: nn.Module) -> nn.Module:
    """A network of the library with its activations replaced, which have no tensors."""
    for owner in list(network.modules()):
        for name, own in list(owner.named_children()):
            if isinstance(own, nn.ELU):
                setattr(owner, name, QuickELU())
    return network


def steps_of(network: nn.Module) -> list[Step]:
    """The convolutions of EnCodec's or Mimi's layers, which pad their inputs and cut their outputs themselves."""
    steps = []
    for module in network.modules():
        conv: Any = getattr(module, "conv", getattr(module, "convtr", None))
        if isinstance(conv, nn.ConvTranspose1d):
            [kernel], [stride] = conv.kernel_size, conv.stride
            surplus = kernel - stride
            causal, ratio = getattr(module, "causal", True), getattr(module, "trim_right_ratio", 1.0)
            right = math.ceil(surplus * ratio) if causal else surplus // 2
            steps.append(Step(kernel, stride, 1, surplus - right, True))
        elif isinstance(conv, nn.Conv1d):
            [kernel], [stride], [dilation] = conv.kernel_size, conv.stride, conv.dilation
            surplus = (kernel - 1) * dilation + 1 - stride
            left = surplus if getattr(module, "causal", True) else surplus - surplus // 2
            steps.append(Step(kernel, stride, dilation, left))
    return steps


def convolved(layers: Iterable[nn.Module], *, rows_in: int = 1, rows_out: int = 1, reflected: int = REFLECTED) -> Window:
    """Layers of convolutions as a stage.

    Args:
        layers: first to last.
        rows_in, rows_out: see `Reach`.
        reflected: 0 where the ends of a sequence are zeros.
    """
    network = nn.Sequential(*layers)
    reach = Reach.of(steps_of(network), rows_in=rows_in, rows_out=rows_out, reflected=reflected)
    # A layer that is too short to be reflected has other numbers.
    least = reach.left + reach.right + 1 if reflected else 1
    return Window(lambda x: in_own_dtype(network, x), reach, least=least)


def seanet(layers: nn.ModuleList, *, rows_in: int = 1, rows_out: int = 1) -> Chain:
    """EnCodec's encoder or decoder: convolutions, an LSTM with a skip connection, convolutions."""
    kinds = [type(layer).__name__ for layer in layers]
    place = kinds.index("EncodecLSTM")
    recurrent: Any = layers[place]
    stages: list[Stage] = [
        convolved(list(layers)[:place], rows_in=rows_in),
        Recurrent(recurrent.lstm),
        convolved(list(layers)[place + 1 :], rows_out=rows_out),
    ]
    return Chain(stages)

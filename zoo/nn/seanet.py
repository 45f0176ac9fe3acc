"""SEANet of EnCodec and its kin as stages: the library's layers, in pieces, with the numbers of a single pass."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from zoo.derived import Derived
from zoo.nn.conv import beside, conv1d, conv_transpose1d, elu, reflect_pad
from zoo.nn.library import in_own_dtype
from zoo.nn.stages import Chain, Reach, Recurrent, Run, Stage, Step, Window

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
    modes = {mode for module in network.modules() if (mode := getattr(module, "pad_mode", None)) is not None}
    run: Run = Rows(network) if modes == {"reflect"} else partial(in_own_dtype, network)
    return Window(run, reach, least=least)


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


# ------------------------------------------------------------------------------------------- the library's layers, time-major


class Rows:
    """EnCodec's convolutions one behind the other, ``[batch, channels, time]`` in and out, computed time-major.

    The layers are the library's own, with plain weights. Activations are written to where the next convolution reads them.

    Args:
        layers: of the encoder or the decoder of ``transformers.EncodecModel``, without its LSTM.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._layers = list(layers)

    def __call__(self, x: Float[Tensor, "batch channels _time"]) -> Float[Tensor, "batch channels_out _time_out"]:
        dtype = next(parameter.dtype for layer in self._layers for parameter in layer.parameters())
        return _through(self._layers, x.to(dtype).transpose(1, 2)).transpose(1, 2).float()


def _through(layers: Iterable[Any], rows: Float[Tensor, "batch time channels"]) -> Float[Tensor, "batch out channels_out"]:
    activate = False
    for layer in layers:
        if isinstance(layer, nn.ELU | QuickELU):
            activate = True
        elif hasattr(layer, "block"):
            inner = _through(layer.block, rows)
            rows = inner.add_(rows if isinstance(layer.shortcut, nn.Identity) else _convolved(layer.shortcut, rows, False))
        else:
            rows, activate = _convolved(layer, rows, activate), False
    return rows


def _convolved(
    layer: Any, rows: Float[Tensor, "batch time channels"], activate: bool
) -> Float[Tensor, "batch out channels_out"]:
    """A convolution of the library, with its padding, after an activation if asked to."""
    [step], weight, bias = steps_of(layer), layer.conv.weight, layer.conv.bias
    laid: Derived[Tensor] = vars(layer).setdefault("laid", Derived())
    if step.transposed:
        matrix = laid.of([weight], lambda: beside(weight.detach(), step.stride))
        found = conv_transpose1d(elu(rows) if activate else rows, matrix, bias, step.stride)
        return found[:, step.left : step.left + rows.shape[1] * step.stride]
    if step.kernel > 1:
        right = (step.kernel - 1) * step.dilation + 1 - step.stride - step.left
        rows, activate = reflect_pad(rows, step.left, right, step.stride, activate=activate), False
    # In the order in which the convolution reads them.
    ordered = laid.of([weight], lambda: weight.detach().transpose(1, 2).contiguous().transpose(1, 2))
    return conv1d(elu(rows) if activate else rows, ordered, bias, step.stride, dilation=step.dilation)

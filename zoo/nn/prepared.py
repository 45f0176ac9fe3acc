"""Products whose weights lie as the processor wants them: laid out once, for linear layers and for convolutions over time.

PyTorch lays out the weight of every product anew on a CPU. Beside a few hundred rows that is a quarter of the time in float32,
and more in bfloat16. What is laid out is kept until the weight changes, in as much memory as the weight itself. Each row of a
result depends on its own input alone, whatever the number of rows.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.derived import Derived
from zoo.kernels import native
from zoo.nn.conv import conv1d
from zoo.nn.conv2d import watched

# Rows that the layout is chosen for; it serves any number.
_ROWS = 1024
_laid_out: WeakKeyDictionary[nn.Module, dict[tuple[int, int] | None, Derived[Tensor]]] = WeakKeyDictionary()
_products: Any = torch.ops.mkldnn


def linear(layer: nn.Linear, x: Float[Tensor, "*batch into"], *, gelu: bool = False) -> Float[Tensor, "*batch out"]:
    """A linear layer, and an exact GELU if asked for; ``x`` is in the layer's precision."""
    if not _serves(layer, x):
        y = layer(x)
        return F.gelu(y) if gelu else y
    return _multiplied(layer, x, None, gelu)


def some_outputs(layer: nn.Linear, x: Float[Tensor, "*batch into"], first: int, last: int) -> Float[Tensor, "*batch some"]:
    """The outputs from ``first`` to ``last`` of a linear layer with a bias."""
    outputs = slice(first, last)
    if not _serves(layer, x):
        return F.linear(x, layer.weight[outputs], layer.bias[outputs])
    return _multiplied(layer, x, outputs, False)


def convolve(layer: nn.Conv1d, x: Float[Tensor, "batch time into"]) -> Float[Tensor, "batch time_out out"]:
    """A convolution of stride 1 over time-major activations that are padded already: ``time_out = time - kernel + 1``."""
    if not _serves(layer, x):
        return conv1d(x, layer.weight, layer.bias)
    return _multiplied(layer, _side_by_side(x, layer.kernel_size[0]), None, False)


def _side_by_side(x: Float[Tensor, "batch time into"], kernel: int) -> Float[Tensor, "batch time_out columns"]:
    """The inputs of each step of a convolution, one after the other."""
    batch, time, channels = x.shape
    x = x.contiguous()
    return x.as_strided((batch, time - kernel + 1, kernel * channels), (time * channels, channels, 1)).contiguous()


def _serves(layer: nn.Linear | nn.Conv1d, x: Tensor) -> bool:
    """Whether the product of a layer is computed here: on a CPU, with a weight that stays, where nobody looks on.

    Gradients, counters of operations and hooks want PyTorch's own operators.
    """
    if torch.is_grad_enabled() or not torch.backends.mkldnn.enabled or watched(layer) or not native.unwatched(x):
        return False
    if x.dtype != torch.float32 and not (x.dtype == torch.bfloat16 and _products._is_mkldnn_bf16_supported()):
        return False
    # A write to what was made in inference mode is not counted, and comparing it takes longer than the layout.
    stays = not layer.weight.is_inference() if "weight" in layer._parameters else getattr(layer, "resident", False)
    return stays and getattr(layer, "activations", None) is None and torch.backends.mkldnn.is_available()


def _multiplied(layer: nn.Linear | nn.Conv1d, x: Tensor, outputs: slice | None, gelu: bool) -> Tensor:
    place = None if outputs is None else (outputs.start, outputs.stop)
    kept = _laid_out.setdefault(layer, {}).setdefault(place, Derived())
    weight, bias = layer.weight, layer.bias

    def lay_out() -> Tensor:
        matrix = weight.detach() if outputs is None else weight.detach()[outputs]
        # As the matrix of `_side_by_side`, of a convolution.
        matrix = matrix.transpose(1, 2).flatten(1) if matrix.ndim == 3 else matrix
        laid_out: Tensor = _products._reorder_linear_weight(matrix.contiguous(), _ROWS)
        return laid_out

    addend = bias if bias is None or outputs is None else bias[outputs]
    flat = x.reshape(-1, x.shape[-1])
    matrix = kept.of([weight], lay_out)
    found: Tensor = _products._linear_pointwise(flat, matrix, addend, "gelu" if gelu else "none", [], "none")
    return found.view(*x.shape[:-1], found.shape[-1])

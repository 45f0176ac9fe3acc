"""The block of ConvNeXt (arXiv 2201.03545) over time, as Vocos (arXiv 2306.00814) builds decoders of sound from it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from zoo.nn.conv import conv1d
from zoo.precision import compute_dtype


def convnext(
    x: Float[Tensor, "batch frames channels"],
    mask: Bool[Tensor, "batch frames 1"] | None,
    *,
    depthwise: nn.Conv1d,
    normalise: Callable[[Float[Tensor, "batch frames channels"]], Float[Tensor, "batch frames channels"]],
    expand: nn.Linear,
    contract: nn.Linear,
    scale: Float[Tensor, " channels"],
) -> Float[Tensor, "batch frames channels"]:
    """Depth-wise convolution, norm, two linear layers with a GELU between, layer scale and skip.

    Activations, convolution and norm are in float32. The two products run in the precision of their weights.

    Args:
        x: activations.
        mask: frames inside an item; all if ``None``.
        depthwise: of an odd kernel. The ends are padded by zeros here, whatever its own padding is.
        normalise: over channels.
        expand, contract: the linear layers.
        scale: of what is added to ``x``.
    """
    halo = depthwise.kernel_size[0] // 2
    assert depthwise.bias is not None
    padded = F.pad(x if mask is None else x * mask, (0, 0, halo, halo))
    mixed = conv1d(padded, depthwise.weight.float(), depthwise.bias.float(), groups=x.shape[2])
    hidden = normalise(mixed).to(compute_dtype(expand))
    return torch.addcmul(x, scale.float(), contract(F.gelu(expand(hidden))).float())


def layer_norm(norm: nn.LayerNorm, x: Float[Tensor, "*shape channels"]) -> Float[Tensor, "*shape channels"]:
    """A layer norm in float32, whatever the precision of its weights."""
    return F.layer_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)

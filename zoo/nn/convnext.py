"""The block of ConvNeXt (arXiv 2201.03545) over time, as Vocos (arXiv 2306.00814) builds decoders of sound from it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from zoo.kernels import frames
from zoo.nn.conv import conv1d
from zoo.nn.prepared import linear
from zoo.precision import compute_dtype


class Norm(NamedTuple):
    """A layer norm over channels: what the result is multiplied by, what is added, and what the variance gets."""

    scale: Float[Tensor, " channels"]
    shift: Float[Tensor, " channels"]
    eps: float


def convnext(
    x: Float[Tensor, "batch frames channels"],
    mask: Bool[Tensor, "batch frames 1"] | None,
    *,
    depthwise: nn.Conv1d,
    norm: Norm,
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
        norm: over channels.
        expand, contract: the linear layers.
        scale: of what is added to ``x``.
    """
    assert depthwise.bias is not None
    weight, dtype = depthwise.weight, compute_dtype(expand)
    hidden = frames.depthwise_norm(x, mask, weight, depthwise.bias, norm.scale, norm.shift, norm.eps, dtype)
    if hidden is None:
        halo = depthwise.kernel_size[0] // 2
        padded = F.pad(x if mask is None else x * mask, (0, 0, halo, halo))
        mixed = conv1d(padded, weight.float(), depthwise.bias.float(), groups=x.shape[2])
        hidden = F.layer_norm(mixed, mixed.shape[-1:], norm.scale.float(), norm.shift.float(), norm.eps).to(dtype)
    added = linear(contract, linear(expand, hidden, gelu=True))
    total = frames.add_scaled(x, added, scale)
    return torch.addcmul(x, scale.float(), added.float()) if total is None else total


def layer_norm(norm: nn.LayerNorm, x: Float[Tensor, "*shape channels"]) -> Float[Tensor, "*shape channels"]:
    """A layer norm in float32, whatever the precision of its weights."""
    return F.layer_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)

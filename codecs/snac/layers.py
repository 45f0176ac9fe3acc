"""Layers of encoder and decoder: convolutions that see zeros behind an item's end, Snake, residual units, attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.codecs.snac.config import HEAD_DIM
from zoo.nn.conv import conv1d
from zoo.precision import Float32Module, compute_dtype

#: Ones in the frames of each item of a ragged batch and zeros behind its end; ``None`` where no item ends early.
Mask = Float[Tensor, "batch time 1"]

# Numbers of an activation that a CPU works on at a time: a few copies should stay in its cache.
_BLOCK_NUMBERS = 1 << 19


class Conv(nn.Conv1d):
    """Convolution over ``[batch, time, channels]`` with zeros at both ends of each item; of several samples, so not pointwise.

    The stream of activations is float32; the products are in the type of the weights.
    """

    def forward(
        self, x: Float[Tensor, "batch time channels_in"], mask: Mask | None = None
    ) -> Float[Tensor, "batch time_out channels_out"]:
        dtype = compute_dtype(self)
        if mask is not None:
            x = x * mask
        assert isinstance(self.padding, tuple)
        padding, dilation = self.padding[0], self.dilation[0]
        return conv1d(x.to(dtype), self.weight, self.bias, self.stride[0], self.groups, padding, dilation).float()


class Pointwise(nn.Linear):
    """Convolution of single samples: a matrix product in the type of the weights, from float32 to float32."""

    def forward(self, x: Float[Tensor, "*shape channels_in"]) -> Float[Tensor, "*shape channels_out"]:
        return super().forward(x.to(compute_dtype(self))).float()


class Snake(Float32Module):
    """``x + sin(a x)^2 / a`` with a rate ``a`` for each channel (arXiv 2006.08195); ``x`` where the rate is 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x: Float[Tensor, "batch time channels"]) -> Float[Tensor, "batch time channels"]:
        scale = 1 / (self.alpha + 1e-9)
        if torch.is_grad_enabled():
            return x + scale * torch.sin(self.alpha * x).square()
        wave = (x * self.alpha).sin_()
        return torch.addcmul(x, wave.square_(), scale, out=wave)


class ResidualUnit(nn.Module):
    """A dilated convolution and a pointwise one, each behind a Snake, around a skip connection.

    Args:
        channels: in and out.
        dilation: of the first convolution.
        depthwise: whether that one takes each channel by itself.
    """

    KERNEL = 7
    DILATIONS = (1, 3, 9)

    def __init__(self, channels: int, dilation: int, depthwise: bool) -> None:
        super().__init__()
        reach = (self.KERNEL - 1) // 2 * dilation
        self.snake1 = Snake(channels)
        self.mix = Conv(channels, channels, self.KERNEL, padding=reach, dilation=dilation, groups=channels if depthwise else 1)
        self.snake2 = Snake(channels)
        self.out = Pointwise(channels, channels)

    def forward(self, x: Float[Tensor, "batch time channels"], mask: Mask | None) -> Float[Tensor, "batch time channels"]:
        change = self.out(self.snake2(self.mix(self.snake1(x), mask)))
        return x + change if torch.is_grad_enabled() else change.add_(x)


#: Samples on either side that the units of a block look at.
UNITS_REACH = (ResidualUnit.KERNEL - 1) // 2 * sum(ResidualUnit.DILATIONS)


def residual_units(channels: int, depthwise: bool) -> nn.ModuleList:
    """The three units of a block."""
    return nn.ModuleList([ResidualUnit(channels, dilation, depthwise) for dilation in ResidualUnit.DILATIONS])


class Rotary(Float32Module):
    """Rotary positions within a window (arXiv 2104.09864), the two halves of a head turned against each other."""

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        exponents = torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM
        self.register_buffer("inv_freq", 10_000.0**-exponents)

    def forward(self, x: Float[Tensor, "*heads window width"]) -> Float[Tensor, "*heads window width"]:
        steps = torch.arange(x.shape[-2], dtype=torch.float32, device=x.device)
        angles = (steps[:, None] * self.inv_freq).repeat(1, 2)
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


class LocalAttention(nn.Module):
    """Self-attention within windows of frames that follow each other, with a skip connection; positions count from each window.

    Args:
        channels: a multiple of the width of a head, 64.
        window: frames that see each other; the input has whole windows.
    """

    def __init__(self, channels: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.norm = nn.LayerNorm(channels)
        self.to_qkv = Pointwise(channels, 3 * channels, bias=False)
        self.rotary = Rotary()
        self.to_out = Pointwise(channels, channels, bias=False)

    def forward(self, x: Float[Tensor, "batch time channels"]) -> Float[Tensor, "batch time channels"]:
        norm = self.norm
        normed = F.layer_norm(x, x.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps)
        windows = self.to_qkv(normed).reshape(-1, self.window, 3, x.shape[2] // HEAD_DIM, HEAD_DIM)
        queries, keys, values = windows.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.rotary(queries), self.rotary(keys), values)
        return x + self.to_out(mixed.transpose(1, 2).reshape(x.shape))


def in_blocks(
    run: Callable[[int, int], Float[Tensor, "batch _time_out channels_out"]],
    x: Float[Tensor, "batch time channels"],
    *,
    rows_in: int,
    rows_out: int,
    context: int,
) -> Float[Tensor, "batch time_out channels_out"]:
    """Some layers over a long sequence, on a CPU in blocks that fit its caches.

    Args:
        run: the layers on the steps from one to another, with zeros beyond these.
        x: what goes in.
        rows_in, rows_out: of a step, in what goes in and in what comes out.
        context: steps on either side that the layers look at.
    """
    steps = x.shape[1] // rows_in
    block = max(8 * context, _BLOCK_NUMBERS // (x.shape[0] * x.shape[2] * rows_in))
    if torch.is_grad_enabled() or x.device.type != "cpu" or steps < 2 * block:
        return run(0, steps)
    out: Tensor | None = None
    for start in range(0, steps, block):
        stop = min(start + block, steps)
        first = max(0, start - context)
        found = run(first, min(steps, stop + context))
        if out is None:
            out = found.new_empty(found.shape[0], steps * rows_out, found.shape[2])
        out[:, start * rows_out : stop * rows_out] = found[:, (start - first) * rows_out : (stop - first) * rows_out]
    assert out is not None
    return out

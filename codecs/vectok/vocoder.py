"""Speech vectors to sound: HiFi-GAN's generator (arXiv 2010.05646) as kNN-VC has it, and a small one with an inverse STFT.

Both take vectors ``[batch, frames, dim]`` and give ``frames * hop_length`` samples, and say from how many vectors on either
side a sample is made (``halo``), so that long sound can be made block by block with the numbers of a single pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from zoo.codecs.vectok.config import HiFiGANSizes, ISTFTSizes
from zoo.nn.convnext import Norm, convnext, layer_norm
from zoo.nn.istft import InverseSTFT
from zoo.precision import compute_dtype

# A signal is stored as an image of height 1, channels last: in bfloat16 a CPU convolves it so at two to three times the rate.
Signal = Float[Tensor, "batch channels 1 time"]
Inside = Bool[Tensor, "batch 1 1 time"]

_SLOPE = 0.1
# The original leaves the slope before the last convolution at its library's default.
_LAST_SLOPE = 0.01


class ResidualBlock(nn.Module):
    """Dilated convolutions around which the signal is carried on: in pairs (kind ``"1"``), or single ones."""

    def __init__(self, kind: str, channels: int, kernel: int, dilations: Sequence[int]) -> None:
        super().__init__()

        def convolutions(chosen: Sequence[int]) -> nn.ModuleList:
            return nn.ModuleList(
                nn.Conv1d(channels, channels, kernel, dilation=d, padding=d * (kernel - 1) // 2) for d in chosen
            )

        self.convs: Any = convolutions(dilations)
        self.plain: Any = convolutions([1] * len(dilations)) if kind == "1" else None

    def forward(self, x: Signal, inside: Inside | None) -> Signal:
        for index, conv in enumerate(self.convs):
            y = _convolve(conv, _activate(x, inside))
            if self.plain is not None:
                y = _convolve(self.plain[index], _activate(y, inside, own=True))
            x = x + y if torch.is_grad_enabled() else y.add_(x)
        return x

    @property
    def reach(self) -> int:
        """Steps on either side that a step depends on."""
        return sum(conv.padding[0] for conv in (*self.convs, *(self.plain or ())))


def _activate(x: Signal, inside: Inside | None, slope: float = _SLOPE, own: bool = False) -> Signal:
    """Leaky ReLU, zero where an item has ended: there the next convolution must find its own padding.

    What nobody else reads (``own``) may be overwritten.
    """
    x = F.leaky_relu(x, slope, inplace=own and not torch.is_grad_enabled())
    return x if inside is None else x * inside


def _mean(signals: Iterable[Signal]) -> Signal:
    """The mean of signals, added up one after the other."""
    found = iter(signals)
    total, count = next(found), 1
    for signal in found:
        # The first one may be somebody else's, of a block without convolutions.
        total = total + signal if count == 1 or torch.is_grad_enabled() else total.add_(signal)
        count += 1
    return total / count if torch.is_grad_enabled() else total.div_(count)


def _convolve(conv: nn.Conv1d, x: Signal) -> Float[Tensor, "batch channels_out 1 time"]:
    dilation = conv.dilation[0]
    padding = dilation * (conv.weight.shape[2] - 1) // 2
    return F.conv2d(x, conv.weight[:, :, None], conv.bias, padding=(0, padding), dilation=(1, dilation))


def _raise_rate(conv: nn.ConvTranspose1d, x: Signal) -> Float[Tensor, "batch channels_out 1 time_out"]:
    rate = conv.stride[0]
    padding = (conv.weight.shape[2] - rate) // 2
    return F.conv_transpose2d(x, conv.weight[:, :, None], conv.bias, (1, rate), (0, padding))


class HiFiGAN(nn.Module):
    """A linear layer and stages that raise the rate, each followed by the mean of residual blocks of several kernels."""

    def __init__(self, sizes: HiFiGANSizes, vector_dim: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.lin_pre = nn.Linear(vector_dim, sizes.pre_width)
        self.conv_pre = nn.Conv1d(sizes.pre_width, sizes.channels, 7, padding=3)
        self.ups: Any = nn.ModuleList()
        self.stages: Any = nn.ModuleList()
        channels = sizes.channels
        for rate, kernel in zip(sizes.rates, sizes.kernels, strict=True):
            self.ups.append(nn.ConvTranspose1d(channels, channels // 2, kernel, rate, padding=(kernel - rate) // 2))
            channels //= 2
            self.stages.append(
                nn.ModuleList(
                    ResidualBlock(sizes.resblock, channels, size, dilations)
                    for size, dilations in zip(sizes.resblock_kernels, sizes.resblock_dilations, strict=True)
                )
            )
        self.conv_post = nn.Conv1d(channels, 1, 7, padding=3)

    @property
    def hop_length(self) -> int:
        """Samples per vector."""
        return self.sizes.hop_length

    @property
    def halo(self) -> int:
        """Vectors on either side that a sample depends on."""
        # From the last layer to the first, in steps of each layer's input.
        reach = 3
        for up, blocks in zip(reversed(self.ups), reversed(self.stages), strict=True):
            reach += max(block.reach for block in blocks)
            reach = -(-(reach + up.kernel_size[0] - 1 - up.padding[0]) // up.stride[0])
        return reach + 3

    def forward(
        self, vectors: Float[Tensor, "batch frames dim"], inside: Bool[Tensor, "batch frames"] | None = None
    ) -> Float[Tensor, "batch samples"]:
        """``samples = frames * hop_length``, nominally in [-1, 1]; unspecified where an item is not ``inside``."""
        within = None if inside is None else inside[:, None, None]
        x = self.lin_pre(vectors.to(compute_dtype(self.lin_pre))).transpose(1, 2).unsqueeze(2)
        x = _convolve(self.conv_pre, x if within is None else x * within)
        for up, blocks in zip(self.ups, self.stages, strict=True):
            x = _raise_rate(up, _activate(x, within, own=True))
            if within is not None:
                within = within.repeat_interleave(up.stride[0], dim=3)
            x = _mean(block(x, within) for block in blocks)
        return torch.tanh(_convolve(self.conv_post, _activate(x, within, _LAST_SLOPE, own=True)))[:, 0, 0].float()


class ConvNeXtBlock(nn.Module):
    """A `convnext` block with a plain layer norm."""

    def __init__(self, sizes: ISTFTSizes) -> None:
        super().__init__()
        self.conv = nn.Conv1d(sizes.width, sizes.width, 7, padding=3, groups=sizes.width)
        self.norm = nn.LayerNorm(sizes.width, eps=1e-6)
        self.fc1 = nn.Linear(sizes.width, sizes.ffn_dim)
        self.fc2 = nn.Linear(sizes.ffn_dim, sizes.width)
        self.scale = nn.Parameter(torch.full((sizes.width,), 1 / sizes.blocks))

    def forward(
        self, x: Float[Tensor, "batch frames width"], inside: Bool[Tensor, "batch frames 1"] | None
    ) -> Float[Tensor, "batch frames width"]:
        return convnext(
            x,
            inside,
            depthwise=self.conv,
            norm=Norm(self.norm.weight, self.norm.bias, self.norm.eps),
            expand=self.fc1,
            contract=self.fc2,
            scale=self.scale,
        )


class ISTFTVocoder(nn.Module):
    """Blocks at the rate of the vectors, a spectrum from each, and an inverse STFT."""

    #: Largest magnitude of a spectrum, as in Vocos.
    LIMIT = 100.0

    def __init__(self, sizes: ISTFTSizes, vector_dim: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.conv = nn.Conv1d(vector_dim, sizes.width, 7, padding=3)
        self.norm = nn.LayerNorm(sizes.width, eps=1e-6)
        self.blocks: Any = nn.ModuleList(ConvNeXtBlock(sizes) for _ in range(sizes.blocks))
        self.last_norm = nn.LayerNorm(sizes.width, eps=1e-6)
        self.istft = InverseSTFT(sizes.hop_length)
        self.head = nn.Linear(sizes.width, self.istft.n_fft + 2)

    @property
    def hop_length(self) -> int:
        """Samples per vector."""
        return self.sizes.hop_length

    @property
    def halo(self) -> int:
        """Vectors on either side that a sample depends on."""
        return 3 * (1 + len(self.blocks)) + InverseSTFT.OVERLAP // 2

    def forward(
        self, vectors: Float[Tensor, "batch frames dim"], inside: Bool[Tensor, "batch frames"] | None = None
    ) -> Float[Tensor, "batch samples"]:
        """``samples = frames * hop_length``, nominally in [-1, 1]; silent where an item is not ``inside``."""
        within = None if inside is None else inside[..., None]
        counts = [vectors.shape[1]] * len(vectors) if inside is None else inside.sum(1).tolist()
        x = vectors.to(compute_dtype(self.head))
        x = layer_norm(self.norm, self.conv((x if within is None else x * within).transpose(1, 2)).transpose(1, 2))
        for block in self.blocks:
            x = block(x, within)
        spectrum = self._spectrum(layer_norm(self.last_norm, x).to(compute_dtype(self.head)))
        overlapped = self.istft.overlap_add(spectrum if within is None else spectrum * within)
        waves = [self.istft.finish(row[None], count)[0] for row, count in zip(overlapped, counts, strict=True)]
        return nn.utils.rnn.pad_sequence(waves, batch_first=True)

    def _spectrum(self, x: Float[Tensor, "batch frames width"]) -> Tensor:
        magnitude, phase = self.head(x).float().chunk(2, dim=-1)
        return torch.polar(magnitude.clamp(max=math.log(self.LIMIT)).exp(), phase)

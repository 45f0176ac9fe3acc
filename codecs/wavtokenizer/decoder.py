"""Code vectors to samples: residual blocks with one attention, the ConvNeXt stack, and the inverse STFT.

The stream of activations stays in float32; matrix products run in the precision of their weights. ``mask`` marks the valid
frames of a ragged batch and is ``None`` when all frames are valid. What stands in the invalid frames is arbitrary: it is masked
wherever frames mix (convolution, statistics, keys, overlap-add).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex, Float, Shaped
from torch import Tensor, nn

from zoo.codecs.wavtokenizer.config import GROUPS, WavTokenizerConfig
from zoo.kernels import frames as frames_kernel
from zoo.nn.convnext import Norm, convnext, layer_norm
from zoo.nn.istft import InverseSTFT
from zoo.nn.prepared import convolve, linear, some_outputs
from zoo.precision import Float32Module, compute_dtype

# Fixed in the original code for every checkpoint.
EPS = 1e-6
MAGNITUDE_LIMIT = 100.0

Mask = Bool[Tensor, "batch frames 1"]


def blocks_of(frames: int, block: int) -> Iterator[tuple[int, int]]:
    """Cut ``frames`` into blocks of nearly equal size, at most ``block``; an exported graph is one for any number of frames."""
    if torch.compiler.is_exporting():
        yield 0, frames
        return
    count = -(-frames // block)
    for index in range(count):
        yield index * frames // count, (index + 1) * frames // count


def window_of(
    x: Shaped[Tensor, "batch frames channels"], start: int, stop: int, halo: int
) -> tuple[Shaped[Tensor, "batch window channels"], int]:
    """The frames from ``start`` to ``stop`` with up to ``halo`` more on either side, and how many were added in front."""
    first = max(0, start - halo)
    return x[:, first : stop + halo], start - first


class GroupNorm(Float32Module):
    """Group normalisation over time-major activations, expressed as one scale and shift per item and channel.

    Statistics run over all valid frames, in two passes, so that the normalisation can be applied block by block.
    """

    BLOCK = 1024

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def coefficients(
        self, x: Float[Tensor, "batch frames channels"], mask: Mask | None
    ) -> tuple[Float[Tensor, "batch 1 channels"], Float[Tensor, "batch 1 channels"]]:
        """``scale`` and ``shift`` such that the normalised activations are ``x * scale + shift``."""
        batch, frames, channels = x.shape
        valid = torch.full((batch, 1), frames, dtype=torch.int64, device=x.device) if mask is None else mask.sum(1)
        count = valid * (channels // GROUPS)
        spans = list(blocks_of(frames, self.BLOCK))

        def total(block_values: Iterator[Tensor]) -> Float[Tensor, "batch groups"]:
            """Sum per group over all frames; masked frames contribute nothing."""
            sums = [values.sum(1).view(batch, GROUPS, -1).sum(2) for values in block_values]
            return torch.stack(sums).sum(0)

        def masked(values: Tensor, start: int, stop: int) -> Tensor:
            return values if mask is None else values * mask[:, start:stop]

        mean = total(masked(x[:, a:b], a, b) for a, b in spans) / count
        mean = mean.repeat_interleave(channels // GROUPS, dim=1)[:, None]
        variance = total(masked((x[:, a:b] - mean).square(), a, b) for a, b in spans) / count
        scale = (variance + EPS).rsqrt().repeat_interleave(channels // GROUPS, dim=1)[:, None] * self.weight
        return scale, self.bias - mean * scale


class ResidualBlock(nn.Module):
    """Two convolutions, each behind a group norm and SiLU, around a skip connection."""

    BLOCK = 2048

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(channels)
        self.conv1 = nn.Conv1d(channels, channels, kernel_size=3)
        self.norm2 = GroupNorm(channels)
        self.conv2 = nn.Conv1d(channels, channels, kernel_size=3)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Float[Tensor, "batch frames channels"], mask: Mask | None) -> Float[Tensor, "batch frames channels"]:
        hidden = self._normalise_and_convolve(x, self.norm1, self.conv1, mask)
        return x + self._normalise_and_convolve(hidden, self.norm2, self.conv2, mask)

    def _normalise_and_convolve(
        self, x: Float[Tensor, "batch frames channels"], norm: GroupNorm, conv: nn.Conv1d, mask: Mask | None
    ) -> Float[Tensor, "batch frames channels"]:
        scale, shift = norm.coefficients(x, mask)
        frames = x.shape[1]
        blocks = []
        for start, stop in blocks_of(frames, self.BLOCK):
            window, before = window_of(x, start, stop, halo=1)
            inside = None if mask is None else window_of(mask, start, stop, halo=1)[0]
            margins = 1 - before, 1 - (window.shape[1] - before - (stop - start))
            active = frames_kernel.scaled_silu(window, inside, scale, shift, *margins, compute_dtype(conv))
            if active is None:
                active = F.silu(torch.addcmul(shift, window, scale), inplace=not torch.is_grad_enabled())
                if inside is not None:
                    active = active * inside
                if norm is self.norm2:
                    active = self.dropout(active)
                active = F.pad(active.to(compute_dtype(conv)), (0, 0, *margins))
            blocks.append(convolve(conv, active).float())
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


class Attention(nn.Module):
    """One global self-attention head over all frames, without positions. Queries go block by block."""

    BLOCK = 1024
    #: Scores held at a time per item: fewer queries go together where there are more keys.
    SCORES = 1 << 23

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Float[Tensor, "batch frames channels"], mask: Mask | None) -> Float[Tensor, "batch frames channels"]:
        scale, shift = self.norm.coefficients(x, mask)
        width = x.shape[2]
        spans = list(blocks_of(x.shape[1], min(self.BLOCK, max(16, self.SCORES // x.shape[1]))))

        def normalised(start: int, stop: int) -> Tensor:
            return torch.addcmul(shift, x[:, start:stop], scale).to(compute_dtype(self.qkv))

        keys_values = torch.cat([some_outputs(self.qkv, normalised(a, b), width, 3 * width) for a, b in spans], dim=1)
        keys, values = keys_values.chunk(2, dim=2)
        hidden = None if mask is None else torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -math.inf)
        blocks = []
        for start, stop in spans:
            queries = some_outputs(self.qkv, normalised(start, stop), 0, width) * width**-0.5
            scores = (queries @ keys.transpose(1, 2)).float()
            if hidden is not None:
                scores = scores + hidden.transpose(1, 2)
            attended = scores.softmax(dim=2).to(values.dtype) @ values
            blocks.append(x[:, start:stop] + linear(self.proj_out, attended).float())
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


class AdaptiveLayerNorm(Float32Module):
    """Layer norm whose scale and shift are looked up by bandwidth id."""

    def __init__(self, num_bandwidths: int, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_bandwidths, channels))
        self.shift = nn.Parameter(torch.zeros(num_bandwidths, channels))

    def forward(self, x: Float[Tensor, "batch frames channels"], bandwidth_id: int) -> Float[Tensor, "batch frames channels"]:
        return F.layer_norm(x, x.shape[-1:], self.scale[bandwidth_id], self.shift[bandwidth_id], EPS)


class ConvNeXtBlock(nn.Module):
    """A `convnext` block whose norm depends on the bandwidth."""

    HALO = 3

    def __init__(self, config: WavTokenizerConfig) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(config.dim, config.dim, kernel_size=2 * self.HALO + 1, groups=config.dim)
        self.norm = AdaptiveLayerNorm(config.num_bandwidths, config.dim)
        self.pwconv1 = nn.Linear(config.dim, config.intermediate_dim)
        self.pwconv2 = nn.Linear(config.intermediate_dim, config.dim)
        self.gamma = nn.Parameter(torch.full((config.dim,), 1 / config.num_layers))

    def forward(
        self, x: Float[Tensor, "batch frames channels"], mask: Mask | None, bandwidth_id: int
    ) -> Float[Tensor, "batch frames channels"]:
        return convnext(
            x,
            mask,
            depthwise=self.dwconv,
            norm=Norm(self.norm.scale[bandwidth_id], self.norm.shift[bandwidth_id], EPS),
            expand=self.pwconv1,
            contract=self.pwconv2,
            scale=self.gamma,
        )


class Backbone(nn.Module):
    """Code vectors to decoder frames (paper section 3.3): residual blocks and attention, then the ConvNeXt stack."""

    HALO = 3

    def __init__(self, config: WavTokenizerConfig) -> None:
        super().__init__()
        self.embed = nn.Conv1d(config.latent_dim, config.dim, kernel_size=2 * self.HALO + 1)
        self.pos_net = nn.ModuleList(
            [
                ResidualBlock(config.dim),
                ResidualBlock(config.dim),
                Attention(config.dim),
                ResidualBlock(config.dim),
                ResidualBlock(config.dim),
            ]
        )
        self.pos_norm = GroupNorm(config.dim)
        self.norm = AdaptiveLayerNorm(config.num_bandwidths, config.dim)
        self.convnext = nn.ModuleList([ConvNeXtBlock(config) for _ in range(config.num_layers)])
        self.final_layer_norm = nn.LayerNorm(config.dim, eps=EPS)
        # The original initialises these before it creates pos_net, which keeps PyTorch's defaults.
        for module in (self.embed, *self.convnext.modules()):
            if isinstance(module, nn.Conv1d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def halo(self) -> int:
        """Frames on either side that `refine` needs for an exact result."""
        return ConvNeXtBlock.HALO * len(self.convnext)

    def mix(
        self, latents: Float[Tensor, "batch frames latent"], mask: Mask | None
    ) -> tuple[Float[Tensor, "batch frames channels"], tuple[Tensor, Tensor]]:
        """The part in which every frame depends on the whole sequence; also the coefficients of its last group norm."""
        padded = F.pad(latents.to(compute_dtype(self.embed)), (0, 0, self.HALO, self.HALO))
        x = convolve(self.embed, padded if mask is None else padded * F.pad(mask, (0, 0, self.HALO, self.HALO))).float()
        for layer in self.pos_net:
            x = layer(x, mask)
        return x, self.pos_norm.coefficients(x, mask)

    def refine(
        self,
        x: Float[Tensor, "batch frames channels"],
        coefficients: tuple[Tensor, Tensor],
        mask: Mask | None,
        bandwidth_id: int,
    ) -> Float[Tensor, "batch frames channels"]:
        """The part with a finite receptive field, exact ``halo`` frames away from a cut."""
        scale, shift = coefficients
        x = self.norm(torch.addcmul(shift, x, scale), bandwidth_id)
        for block in self.convnext:
            x = block(x, mask, bandwidth_id)
        return layer_norm(self.final_layer_norm, x)


class Head(nn.Module):
    """Frames to a complex spectrum, log-magnitude and phase side by side, and to samples (Vocos section 3)."""

    def __init__(self, config: WavTokenizerConfig) -> None:
        super().__init__()
        self.istft = InverseSTFT(config.hop_length)
        self.out = nn.Linear(config.dim, self.istft.n_fft + 2)

    def spectrum(self, x: Float[Tensor, "batch frames channels"], mask: Mask | None) -> Complex[Tensor, "batch frames bins"]:
        log_magnitude, phase = linear(self.out, x.to(compute_dtype(self.out))).float().chunk(2, dim=2)
        magnitude = log_magnitude.exp().clamp(max=MAGNITUDE_LIMIT)
        if mask is not None:
            magnitude = magnitude * mask
        return torch.complex(magnitude * phase.cos(), magnitude * phase.sin())


class Synthesis:
    """Backbone and head at work on code vectors: the samples of a batch, in blocks of bounded memory.

    Args:
        backbone, head: the networks.
        budget: decoder frames that go through them at once.
    """

    def __init__(self, backbone: Backbone, head: Head, budget: int) -> None:
        self.backbone = backbone
        self.head = head
        self.budget = budget

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return self.head.istft.hop_length

    @property
    def context(self) -> int:
        """Frames that the convolutions around the global parts reach on either side."""
        return self.backbone.halo + self.backbone.HALO + 2

    def overlapped(
        self, latents: Float[Tensor, "batch frames latent"], mask: Mask | None, bandwidth_id: int
    ) -> Float[Tensor, "batch samples"]:
        """Overlap-added frames, before the envelope is divided out and the ends are cut."""
        batch, frames, _ = latents.shape
        istft, halo = self.head.istft, self.backbone.halo
        hop = self.hop_length
        x, coefficients = self.backbone.mix(latents, mask)
        block = max(8 * halo, self.budget // batch)
        total = x.new_zeros(batch, (frames + istft.OVERLAP - 1) * hop)
        for start, stop in blocks_of(frames, block):
            window, before = window_of(x, start, stop, halo)
            window_mask = None if mask is None else window_of(mask, start, stop, halo)[0]
            refined = self.backbone.refine(window, coefficients, window_mask, bandwidth_id)
            kept = slice(before, before + stop - start)
            spectrum = self.head.spectrum(refined[:, kept], None if mask is None else mask[:, start:stop])
            total[:, start * hop : (stop + istft.OVERLAP - 1) * hop] += istft.overlap_add(spectrum)
        return total

    def finish(self, total: Float[Tensor, "batch samples"], frames: int) -> Float[Tensor, "batch trimmed"]:
        """Samples of the first ``frames`` overlap-added frames: ``trimmed = frames * hop_length``."""
        return self.head.istft.finish(total, frames)

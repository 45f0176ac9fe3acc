"""Speech vectors: WavLM up to the layer that is read (arXiv 2110.13900).

Activations are time-major, ``[batch, time, channels]``. It is written out here because the libraries' versions do not serve:
torchaudio's refuses padded batches, and transformers' computes and averages attention weights that nobody asks for. Both agree
with it to 1e-5, and their weights load.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from zoo.codecs.vectok.config import WavLMSizes
from zoo.nn.conv import conv1d
from zoo.precision import Float32Module

Vectors = Float[Tensor, "batch frames width"]

# Vectors whose convolutions run at a time, and numbers of the attention's bias that are in memory at a time.
_FRONT_FRAMES = 400
_BIAS_NUMBERS = {"cpu": 1 << 24, "cuda": 1 << 28}


class ConvLayer(nn.Module):
    """A strided convolution without bias, layer norm over channels, GELU."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(channels_out, channels_in, kernel))
        nn.init.kaiming_normal_(self.weight)
        self.norm = nn.LayerNorm(channels_out)

    def forward(self, x: Float[Tensor, "batch time channels_in"]) -> Float[Tensor, "batch time_out channels_out"]:
        return F.gelu(self.norm(conv1d(x, self.weight, stride=self.stride)))


class PositionalConv(nn.Module):
    """A wide grouped convolution whose output tells the transformer about order; the kernel is even, so it leans left."""

    def __init__(self, width: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(width, width // groups, kernel))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.normal_(self.weight, std=math.sqrt(4 / (kernel * width)))

    def forward(self, x: Vectors) -> Vectors:
        kernel = self.weight.shape[2]
        padded = F.pad(x.transpose(1, 2), (kernel // 2, (kernel - 1) // 2))
        return F.gelu(F.conv1d(padded, self.weight, self.bias, groups=self.groups)).transpose(1, 2)


class GatedAttention(nn.Module):
    """Self-attention whose relative position bias each query scales for each head by a gate of its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.gate = nn.Linear(width // heads, 8)
        self.gate_scale = nn.Parameter(torch.ones(heads))

    def forward(
        self, x: Vectors, relative: Float[Tensor, "heads distances"], mask: Bool[Tensor, "batch 1 1 frames"] | None
    ) -> Vectors:
        """Args:
        relative: bias of each distance, key less query, from ``1 - frames`` to ``frames - 1``.
        mask: keys that count.
        """
        batch, frames, width = x.shape
        q, k, v = self.qkv(x).view(batch, frames, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        inputs = x.view(batch, frames, self.heads, -1).transpose(1, 2)
        a, b = self.gate(inputs).unflatten(-1, (2, 4)).sum(-1).sigmoid().unbind(-1)
        gate = a * (b * self.gate_scale[:, None] - 1) + 2
        # Row i of the bias begins at distance -i: the rows are windows on the distances, in reverse order.
        rows = relative.unfold(1, frames, 1)
        budget = _BIAS_NUMBERS.get(x.device.type, _BIAS_NUMBERS["cuda"])
        block = max(1, budget // (batch * self.heads * frames))
        attended = []
        for start in range(0, frames, block):
            stop = min(start + block, frames)
            bias = gate[:, :, start:stop, None] * rows[:, frames - stop : frames - start].flip(1)
            if mask is not None:
                bias = bias.masked_fill(~mask, -torch.inf)
            attended.append(F.scaled_dot_product_attention(q[:, :, start:stop], k, v, attn_mask=bias))
        mixed = torch.cat(attended, dim=2) if len(attended) > 1 else attended[0]
        return self.out(mixed.transpose(1, 2).reshape(batch, frames, width))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, sizes: WavLMSizes) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.width)
        self.attention = GatedAttention(sizes.width, sizes.heads)
        self.norm2 = nn.LayerNorm(sizes.width)
        self.fc1 = nn.Linear(sizes.width, sizes.ffn_dim)
        self.fc2 = nn.Linear(sizes.ffn_dim, sizes.width)

    def forward(
        self, x: Vectors, relative: Float[Tensor, "heads distances"], mask: Bool[Tensor, "batch 1 1 frames"] | None
    ) -> Vectors:
        x = x + self.attention(self.norm1(x), relative, mask)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class WavLM(Float32Module):
    """Waveform to speech vectors, always in float32."""

    def __init__(self, sizes: WavLMSizes) -> None:
        super().__init__()
        self.sizes = sizes
        channels = (1, *(width for width, _, _ in sizes.conv_layers))
        self.convs = nn.ModuleList(
            ConvLayer(inputs, *layer) for inputs, layer in zip(channels[:-1], sizes.conv_layers, strict=True)
        )
        self.norm = nn.LayerNorm(channels[-1])
        self.proj = nn.Linear(channels[-1], sizes.width)
        self.position = PositionalConv(sizes.width, sizes.conv_kernel, sizes.conv_groups)
        self.relative = nn.Embedding(sizes.buckets, sizes.heads)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.blocks))

    @property
    def tail(self) -> int:
        """Samples that the last vector sees beyond its hop."""
        return max(0, self.sizes.reach - self.sizes.hop_length)

    def normalise(self, waveform: Float[Tensor, " samples"]) -> Float[Tensor, " samples"]:
        """The whole recording as the network wants it."""
        return F.layer_norm(waveform, waveform.shape) if self.sizes.normalize_waveform else waveform

    def features(self, waveforms: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch frames channels"]:
        """Convolve waveforms; a vector sees ``reach`` samples from ``hop_length`` times its index on."""
        hop, reach = self.sizes.hop_length, self.sizes.reach
        frames = (waveforms.shape[1] - reach) // hop + 1
        parts = []
        for start in range(0, frames, _FRONT_FRAMES):
            stop = min(start + _FRONT_FRAMES, frames)
            x = waveforms[:, start * hop : (stop - 1) * hop + reach, None]
            for conv in self.convs:
                x = conv(x)
            parts.append(x)
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def hidden_states(
        self, waveforms: Float[Tensor, "batch samples"], frames: Sequence[int] | None = None
    ) -> Iterator[Vectors]:
        """The input of the first block, and the output of each.

        Args:
            waveforms: padded at the right.
            frames: vectors of each item, the others are unspecified; all if ``None``.
        """
        x = self.proj(self.norm(self.features(waveforms)))
        mask = None
        if frames is not None and min(frames) < x.shape[1]:
            counts = torch.tensor(frames, dtype=torch.int64, device=x.device)
            inside = torch.arange(x.shape[1], dtype=torch.int64, device=x.device) < counts[:, None]
            # The positional convolution must see silence behind an item, as it does behind a single one.
            x = x * inside[..., None]
            mask = inside[:, None, None]
        x = x + self.position(x)
        distances = torch.arange(1 - x.shape[1], x.shape[1], dtype=torch.int64, device=x.device)
        relative = self.relative(bucket(distances, self.sizes.buckets, self.sizes.max_distance)).T.contiguous()
        yield x
        for block in self.blocks:
            x = block(x, relative, mask)
            yield x

    def forward(self, waveforms: Float[Tensor, "batch samples"], frames: Sequence[int] | None = None) -> Vectors:
        """The output of the block that is read."""
        return next(islice(self.hidden_states(waveforms, frames), self.sizes.layer, None))


def bucket(distances: Int[Tensor, " distances"], buckets: int, max_distance: int) -> Int[Tensor, " distances"]:
    """Bucket of each distance, key less query: one half for each direction, exact while small, logarithmic to the maximum."""
    half = buckets // 2
    exact = half // 2
    size = distances.abs()
    # In float32 and in this order, as the weights were trained: the edges of buckets depend on rounding.
    growth = torch.log(size.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (half - exact)
    wide = (exact + growth).long().clamp(max=half - 1)
    return (distances > 0) * half + torch.where(size < exact, size, wide)

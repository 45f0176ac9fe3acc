"""Spectrograms to vectors: two convolutions and transformer blocks, over recordings that lie one behind the other.

Recordings of different lengths share every matrix product without padding: ``[rows, channels]`` holds the rows of one after
those of another. Only attention and convolutions look from row to row, and these are told where recordings end.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.codecs.s3tokenizer.config import SECOND_STRIDE, S3TokenizerConfig
from zoo.nn.conv import conv1d
from zoo.nn.prepared import linear
from zoo.precision import Float32Module

Rows = Float[Tensor, "_rows _channels"]

_ROTARY_BASE = 10_000.0
_KERNEL = 3


class Layout:
    """Places of recordings among the rows.

    Args:
        lengths: rows of each.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = tuple(lengths)
        self.count = torch.tensor(self.lengths, dtype=torch.int64, device=device)
        self.owner = torch.repeat_interleave(torch.arange(len(self.lengths), dtype=torch.int64, device=device), self.count)
        self.start = self.count.cumsum(0) - self.count
        self.position = torch.arange(len(self.owner), dtype=torch.int64, device=device) - self.start[self.owner]

    def after(self, stride: int) -> Layout:
        """The layout behind a convolution of three taps, padded by a row on each side."""
        return Layout([-(-length // stride) for length in self.lengths], self.count.device)

    def taps(self, stride: int) -> Int[Tensor, "_rows taps"]:
        """Rows that each output of such a convolution sees; one behind the last row where it sees padding."""
        after = self.after(stride)
        inside = after.position[:, None] * stride + torch.arange(-1, _KERNEL - 1, dtype=torch.int64, device=self.count.device)
        seen = (inside >= 0) & (inside < self.count[after.owner, None])
        return torch.where(seen, inside + self.start[after.owner, None], len(self.owner))

    def runs(self) -> list[tuple[int, int, int]]:
        """Neighbours of equal length: their first row, their number and their length."""
        found, start = [], 0
        for length, members in groupby(self.lengths):
            count = len(list(members))
            found.append((start, count, length))
            start += count * length
        return found


class Convolution(nn.Module):
    """A convolution of three taps, padded by a zero row at either end of each recording."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        initial = nn.Conv1d(channels_in, channels_out, _KERNEL)
        assert initial.bias is not None
        self.weight, self.bias = initial.weight, initial.bias

    def forward(self, x: Rows, layout: Layout) -> Rows:
        seen = F.pad(x, (0, 0, 0, 1))[layout.taps(self.stride)]
        return F.linear(seen.flatten(1), self.weight.transpose(1, 2).flatten(1), self.bias)


class Memory(nn.Module):
    """Sum of each row and its neighbours, channel by channel: a sequence memory in feed-forward form (FSMN), and itself."""

    def __init__(self, dim: int, taps: int) -> None:
        super().__init__()
        self.reach = taps // 2
        self.weight = nn.Parameter(nn.Conv1d(dim, dim, taps, groups=dim, bias=False).weight.detach())

    def forward(self, values: Rows, layout: Layout) -> Rows:
        # Zeros between recordings, which one convolution over all of them sees as their padding.
        place = torch.arange(len(values), dtype=torch.int64, device=values.device) + self.reach * (layout.owner + 1)
        apart = values.new_zeros(len(values) + self.reach * (len(layout.lengths) + 1), values.shape[1])
        mixed = conv1d(apart.index_copy(0, place, values)[None], self.weight, groups=values.shape[1])[0]
        return mixed[place - self.reach] + values


class Attention(nn.Module):
    """Attention over a whole recording in both directions; with rotary positions a memory is added to its output."""

    def __init__(self, config: S3TokenizerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.memory = Memory(dim, config.memory) if config.memory else None

    def forward(self, x: Rows, layout: Layout, rotation: tuple[Tensor, Tensor] | None) -> Rows:
        values = self.value(x)
        query, key, value = [rows.unflatten(1, (self.heads, -1)) for rows in (self.query(x), self.key(x), values)]
        if rotation is not None:
            query, key = _rotated(query, rotation), _rotated(key, rotation)
        mixed = torch.empty_like(value)
        for start, count, length in layout.runs():
            rows = slice(start, start + count * length)
            q, k, v = [part[rows].unflatten(0, (count, length)).transpose(1, 2) for part in (query, key, value)]
            mixed[rows] = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
        found: Tensor = self.out(mixed.flatten(1))
        return found if self.memory is None else found + self.memory(values, layout)


class FeedForward(nn.Sequential):
    """Two products with a GELU between, on weights that are laid out once (see `zoo.nn.prepared`)."""

    def forward(self, x: Rows) -> Rows:
        inner, _, outer = self
        assert isinstance(inner, nn.Linear)
        assert isinstance(outer, nn.Linear)
        return linear(outer, linear(inner, x, gelu=True))


class Block(nn.Module):
    """Attention and feed-forward layers, each behind a layer norm and added to the stream."""

    def __init__(self, config: S3TokenizerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.attn_ln = nn.LayerNorm(dim, eps=config.attention_eps)
        self.attn = Attention(config)
        self.mlp_ln = nn.LayerNorm(dim, eps=config.mlp_eps)
        self.mlp = FeedForward(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Rows, layout: Layout, rotation: tuple[Tensor, Tensor] | None) -> Rows:
        x = x + self.attn(self.attn_ln(x), layout, rotation)
        found: Tensor = x + self.mlp(self.mlp_ln(x))
        return found


class Encoder(Float32Module):
    """The first blocks of a speech-recognition encoder; there is no norm behind them. Stays in float32."""

    def __init__(self, config: S3TokenizerConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.conv1 = Convolution(config.bands, config.dim, config.stride)
        self.conv2 = Convolution(config.dim, config.dim, SECOND_STRIDE)
        self.positions = None if config.rotary else nn.Parameter(_sinusoids(config.positions, config.dim))
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])

    def forward(self, mel: Float[Tensor, "frames bands"], lengths: Sequence[int]) -> Float[Tensor, "rows dim"]:
        """One vector per id, those of one recording behind those of another.

        Args:
            mel: frames of the recordings, one behind the other.
            lengths: frames of each.
        """
        layout = Layout(lengths, mel.device)
        x = F.gelu(self.conv1(mel, layout))
        layout = layout.after(self.conv1.stride)
        x = F.gelu(self.conv2(x, layout))
        layout = layout.after(SECOND_STRIDE)
        rotation = None
        if self.positions is not None:
            x = x + self.positions[layout.position]
        else:
            rotation = _rotation(layout.position, self.head_dim)
        for block in self.blocks:
            x = block(x, layout, rotation)
        return x


def _sinusoids(length: int, dim: int) -> Float[Tensor, "length dim"]:
    """Whisper's table: sines of geometric frequencies in the first half, cosines in the second."""
    half = dim // 2
    frequencies = _ROTARY_BASE ** (-torch.arange(half, dtype=torch.float32) / max(half - 1, 1))
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim - 2 * half))


def _rotation(position: Int[Tensor, " rows"], width: int) -> tuple[Float[Tensor, "rows 1 half"], Float[Tensor, "rows 1 half"]]:
    """Cosines and sines of the angles by which each row's pairs of channels are turned."""
    pair = torch.arange(0, width, 2, dtype=torch.float32, device=position.device)
    angles = position.float()[:, None] * (1.0 / _ROTARY_BASE ** (pair / width))
    return angles.cos()[:, None], angles.sin()[:, None]


def _rotated(x: Float[Tensor, "rows heads width"], rotation: tuple[Tensor, Tensor]) -> Float[Tensor, "rows heads width"]:
    """Queries or keys turned by their positions; a pair is one channel of the first half and one of the second."""
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)

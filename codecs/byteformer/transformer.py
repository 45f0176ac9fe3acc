"""Windowed attention and token merging over files of mixed lengths, packed one after the other without padding.

Attention knows no order within its window: positions are in the tokens. A window is therefore a set of tokens. The filler
of a file's last window, equal rows all of them, is one key whose weight is multiplied by their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.codecs.byteformer.config import ByteFormerConfig
from zoo.nn.linear import Linear
from zoo.precision import Float32Module

EPS = 1e-5
# Rows at a time through a feed-forward layer on a CPU, so that its wide inside stays in the caches.
_ROWS_AT_ONCE = 2048

Packed = Float[Tensor, "tokens dim"]
Counts = tuple[int, ...]


class LayerNorm(Float32Module):
    """Layer normalisation, in float32: over channels, or as the original does where its guess of the axis goes wrong."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, EPS)

    def over_tokens(self, x: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch tokens dim"]:
        """Normalise over tokens, as many as there are channels; epsilon is added to the standard deviation."""
        deviation, mean = torch.std_mean(x, dim=-2, correction=0, keepdim=True)
        return (x - mean) / (deviation + EPS) * self.weight[:, None] + self.bias[:, None]

    def packed(self, x: Packed, counts: Counts, axis_rule: bool) -> Packed:
        """Over channels, but over tokens in files that have as many tokens as channels if the rule is on."""
        normalised: Tensor = self(x)
        for start, count in zip(_starts(counts), counts, strict=True):
            if axis_rule and count == x.shape[1]:
                normalised[start : start + count] = self.over_tokens(x[start : start + count])
        return normalised


def _starts(counts: Counts) -> Counts:
    """Where each file begins."""
    return tuple(int(end) - count for end, count in zip(np.cumsum(counts), counts, strict=True))


def needs_axis_rule(counts: Counts, config: ByteFormerConfig) -> list[int]:
    """Files whose token count, after some merge, equals the number of channels."""
    found = []
    for index, count in enumerate(counts):
        lengths = [count]
        for _ in config.merges:
            lengths.append(-(-lengths[-1] // 2))
        # The norms of merges see the count behind each of them; the last norm sees the last one.
        if config.dim in (*lengths[1:], lengths[-1]):
            found.append(index)
    return found


# ---------------------------------------------------------------------------------------------------------------- windows


@dataclass(frozen=True)
class Windows:
    """Windows of packed tokens that attend to each other in a block.

    Attributes:
        full: tokens of the windows without filler.
        run: first token of ``full`` where it is a run of consecutive ones; ``None`` where it is not.
        partial: tokens of the windows with filler, padded with token 0.
        bias: what is added to the attention scores in the partial windows: 0 at tokens, minus infinity at padding and, last,
            the logarithm of the number of filler rows.
        rows: tokens in partial windows.
        slots: where in ``partial``, flattened, they stand.
    """

    full: Int[Tensor, "windows window"]
    run: int | None
    partial: Int[Tensor, "partial most"]
    bias: Float[Tensor, "partial 1 1 keys"]
    rows: Int[Tensor, " some"]
    slots: Int[Tensor, " some"]


def shifted_windows(count: int, window: int, shift: int) -> np.ndarray:
    """Tokens of a file's windows ``[windows, window]``, ``count`` or more where there is filler.

    The file is completed to whole windows and rolled to the left by ``shift``, cyclically: the last window joins its end and
    its beginning (the original drops the mask that would keep them apart).
    """
    padded = -(-count // window) * window
    return ((np.arange(padded) + shift) % padded).reshape(-1, window)


def plan_windows(counts: Counts, window: int, shift: int, device: torch.device) -> Windows:
    """The windows of packed files."""
    full, partial = [], []
    for start, count in zip(_starts(counts), counts, strict=True):
        tokens = shifted_windows(count, window, shift)
        complete = (tokens < count).all(1)
        full.append(tokens[complete] + start)
        partial += [row[row < count] + start for row in tokens[~complete]]
    filled = np.concatenate(full)
    most = max((len(row) for row in partial), default=0)
    padded = np.zeros((len(partial), most), np.int64)
    bias = np.full((len(partial), most + 1), -np.inf, np.float32)
    for index, row in enumerate(partial):
        padded[index, : len(row)] = row
        bias[index, : len(row)] = 0
        bias[index, -1] = math.log(window - len(row))
    is_run = filled.size > 0 and bool((np.diff(filled.ravel()) == 1).all())
    return Windows(
        full=torch.from_numpy(filled).to(device),
        run=int(filled[0, 0]) if is_run else None,
        partial=torch.from_numpy(padded).to(device),
        bias=torch.from_numpy(bias)[:, None, None].to(device),
        rows=torch.from_numpy(np.concatenate([*partial, np.zeros(0, np.int64)])).to(device),
        slots=torch.from_numpy(np.flatnonzero(bias[:, :-1] == 0)).to(device),
    )


# ----------------------------------------------------------------------------------------------------------------- blocks


class Attention(nn.Module):
    """Multi-head attention within windows of packed tokens."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Packed, filler: Float[Tensor, " dim"], windows: Windows) -> Packed:
        """Attention of the normalised tokens; ``filler`` is a normalised row of filler."""
        qkv = self.qkv(x)
        if windows.partial.numel() == 0 and windows.run == 0:
            mixed = self._attend(qkv.unflatten(0, windows.full.shape)).flatten(0, 1)
        else:
            mixed = qkv.new_empty(x.shape)
            if windows.full.numel():
                self._attend_full(qkv, windows, mixed)
            if windows.partial.numel():
                self._attend_partial(qkv, self.qkv(filler), windows, mixed)
        out: Tensor = self.proj(mixed)
        return out.float()

    def _attend_full(self, qkv: Float[Tensor, "tokens three_dim"], windows: Windows, mixed: Packed) -> None:
        if windows.run is None:
            mixed.index_copy_(0, windows.full.flatten(), self._attend(qkv[windows.full]).flatten(0, 1))
        else:
            run = slice(windows.run, windows.run + windows.full.numel())
            mixed[run] = self._attend(qkv[run].unflatten(0, windows.full.shape)).flatten(0, 1)

    def _attend_partial(
        self,
        qkv: Float[Tensor, "tokens three_dim"],
        filler: Float[Tensor, " three_dim"],
        windows: Windows,
        mixed: Packed,
    ) -> None:
        gathered = qkv[windows.partial]
        keys = torch.cat([gathered, filler.expand(len(gathered), 1, -1)], dim=1)
        attended = self._attend(keys, windows.bias.to(qkv.dtype))[:, :-1].flatten(0, 1)
        mixed.index_copy_(0, windows.rows, attended[windows.slots])

    def _attend(
        self, qkv: Float[Tensor, "windows window three_dim"], bias: Float[Tensor, "windows 1 1 window"] | None = None
    ) -> Float[Tensor, "windows window dim"]:
        queries, keys, values = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias).transpose(1, 2).flatten(2)

    def dense(self, x: Float[Tensor, "windows window dim"]) -> Float[Tensor, "windows window dim"]:
        """Attention within whole windows, filler and all."""
        out: Tensor = self.proj(self._attend(self.qkv(x)))
        return out.float()


class FeedForward(nn.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out.float()


class Block(nn.Module):
    """A pre-norm transformer block with windowed attention."""

    def __init__(self, config: ByteFormerConfig, index: int) -> None:
        super().__init__()
        self.window, self.shift = config.window(index), config.shifts[index]
        self.norm1 = LayerNorm(config.dim)
        self.attn = Attention(config.dim, config.heads)
        self.norm2 = LayerNorm(config.dim)
        self.mlp = FeedForward(config.dim, config.hidden)

    def forward(self, x: Packed, windows: Windows) -> Packed:
        # Filler is zero before the norm, so its bias behind it.
        x = x + self.attn(self.norm1(x), self.norm1.bias, windows)
        return torch.cat([part + self.mlp(self.norm2(part)) for part in x.split(self._rows(x))])

    def _rows(self, x: Packed) -> int:
        return _ROWS_AT_ONCE if x.device.type == "cpu" else len(x)

    def over_tokens(self, x: Packed, counts: Counts) -> Packed:
        """The original's arithmetic where windows have as many tokens as there are channels: both norms go over tokens."""
        starts = zip(_starts(counts), counts, strict=True)
        return torch.cat([self._windows_over_tokens(x[start : start + count]) for start, count in starts])

    def _windows_over_tokens(self, x: Packed) -> Packed:
        """One file; filler takes part in everything."""
        tokens = torch.from_numpy(shifted_windows(len(x), self.window, self.shift)).to(x.device)
        windows = F.pad(x, (0, 0, 0, tokens.numel() - len(x)))[tokens]
        windows = windows + self.attn.dense(self.norm1.over_tokens(windows))
        windows = windows + self.mlp(self.norm2.over_tokens(windows))
        return torch.empty_like(windows).flatten(0, 1).index_copy(0, tokens.flatten(), windows.flatten(0, 1))[: len(x)]


class Merge(nn.Module):
    """Pairs of tokens to one, with a norm behind the projection; an odd one out is paired with zeros."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = Linear(2 * dim, dim, bias=False)
        self.norm = LayerNorm(dim)

    def forward(self, x: Packed, counts: Counts, axis_rule: bool) -> tuple[Float[Tensor, "merged dim"], Counts]:
        """The merged tokens and how many of them each file has."""
        merged = tuple(-(-count // 2) for count in counts)
        pairs = self._complete(x, counts).view(-1, 2 * x.shape[1])
        reduced: Tensor = self.reduction(pairs)
        return self.norm.packed(reduced.float(), merged, axis_rule), merged

    def _complete(self, x: Packed, counts: Counts) -> Float[Tensor, "completed dim"]:
        """A zero token behind every file with an odd number of them."""
        if not any(count % 2 for count in counts):
            return x.contiguous()
        zero = x.new_zeros(1, x.shape[1])
        return torch.cat([part for file in x.split(list(counts)) for part in (file, zero[: len(file) % 2])])


class Transformer(nn.Module):
    """Blocks with merges between them, and the last norm."""

    def __init__(self, config: ByteFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.merges = nn.ModuleDict({str(index): Merge(config.dim) for index in config.merges})
        self.norm = LayerNorm(config.dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The original's initialisation."""
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self, x: Packed, counts: Sequence[int], axis_rule: bool | None = None
    ) -> tuple[Float[Tensor, "final dim"], tuple[int, ...]]:
        """Features of packed tokens, and how many of them each file has.

        Args:
            x: tokens of all files, one after the other.
            counts: how many of them each file has, at least 1.
            axis_rule: see `ByteFormerConfig.layernorm_axis_rule`, which it overrides.
        """
        axis_rule = self.config.layernorm_axis_rule if axis_rule is None else axis_rule
        remaining: Counts = tuple(counts)
        plans: dict[tuple[Counts, int, int], Windows] = {}
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            if axis_rule and block.window == self.config.dim:
                x = block.over_tokens(x, remaining)
            else:
                key = remaining, block.window, block.shift % block.window
                if key not in plans:
                    plans[key] = plan_windows(*key, x.device)
                x = block(x, plans[key])
            if str(index) in self.merges:
                x, remaining = self.merges[str(index)](x, remaining, axis_rule)
        return self.norm.packed(x, remaining, axis_rule), remaining

"""The flow's velocity field: noised latents and a prefix of codes to a velocity.

Positions from k on hold one and the same mask token without a position, all registers share one modulation and every token
sees every other. The dropped registers are therefore equal in every layer, and one of them, with the logarithm of their number
added to its attention score, stands for all. The same holds for the null condition, where all registers are equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.codecs.flextok.config import FlexTokConfig
from zoo.codecs.flextok.transformer import (
    Activations,
    Attention,
    FeedForward,
    Patches,
    grid_positions,
    normalise,
    sinusoidal_positions,
    unpatch,
)
from zoo.nn.linear import Linear
from zoo.precision import compute_dtype

# The six vectors of a block's modulation, in the order in which the checkpoint holds them.
GATE_ATTENTION, GATE_MLP, SHIFT_ATTENTION, SCALE_ATTENTION, SHIFT_MLP, SCALE_MLP = range(6)
#: Longest period among the sinusoidal features of the timestep, whatever their number: fixed in the original code.
MAX_PERIOD = 256.0

# One row for patches and one for registers; a batch of one serves all items.
Modulation = Float[Tensor, "#batch 2 6 dim"]


@dataclass(frozen=True)
class Condition:
    """Register tokens of the decoder, of one or several items.

    Attributes:
        registers: what stands after the patches; items with fewer rows are padded.
        log_count: for how many equal rows each one stands, as a logarithm; minus infinity for padding. ``None`` where every
            row stands for itself alone.
    """

    registers: Float[Tensor, "batch rows dim"]
    log_count: Float[Tensor, "batch rows"] | None

    def attention_mask(self, patches: int) -> Float[Tensor, "batch 1 1 keys"] | None:
        """Mask that is added to the attention scores of each key."""
        if self.log_count is None:
            return None
        return F.pad(self.log_count, (patches, 0))[:, None, None]


class TimeEmbedding(nn.Module):
    """Sinusoidal features of the timestep through two linear layers."""

    def __init__(self, dim: int, features: int, max_timestep: float) -> None:
        super().__init__()
        self.num_features, self.max_timestep = features, max_timestep
        self.mlp = nn.Sequential(Linear(features, dim), nn.SiLU(), Linear(dim, dim))

    def features(self, t: Float[Tensor, " steps"]) -> Float[Tensor, "steps frequencies"]:
        """Cosines, then sines, with periods that grow geometrically; an odd one out is zero."""
        half = self.num_features // 2
        index = torch.arange(half, dtype=torch.float32, device=t.device)
        # In this order of operations: phases reach 1000, where one rounding more would show.
        frequencies = (1000.0 / self.max_timestep) * torch.exp(-math.log(MAX_PERIOD) * index / half)
        phases = t.float()[:, None] * frequencies
        return F.pad(torch.cat([phases.cos(), phases.sin()], dim=1), (0, self.num_features % 2))

    def forward(self, t: Float[Tensor, " steps"]) -> Float[Tensor, "steps dim"]:
        embedded: Tensor = self.mlp(self.features(t))
        return embedded.float()


class DecoderBlock(nn.Module):
    """Self-attention and a feed-forward layer, modulated by the timestep: patches and registers each in their own way."""

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__()
        dim = config.decoder_dim
        self.attn = Attention(dim, config.decoder_head_dim)
        self.mlp = FeedForward(dim, config.mlp_ratio)
        self.modulation = Linear(dim, 12 * dim)

    def modulate(self, time: Float[Tensor, "steps dim"]) -> Float[Tensor, "steps 2 6 dim"]:
        """The block's gates, shifts and scales at each timestep; the scales already have their 1 added."""
        vectors = self.modulation(F.silu(time)).float().unflatten(1, (2, 6, -1))
        return vectors + vectors.new_tensor([0, 0, 0, 1, 0, 1])[:, None]

    def forward(
        self,
        x: Activations,
        modulation: Modulation,
        mask: Float[Tensor, "batch 1 1 keys"] | None,
        patches: int,
        patches_only: bool = False,
    ) -> Float[Tensor, "batch _ dim"]:
        """All tokens to all tokens, or to the patches alone where nothing else is needed any more."""
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = modulation.unbind(2)
        h = _affine(normalise(x), scale_attn, shift_attn, patches).to(compute_dtype(self.attn.wq))
        keys, values = self.attn.keys_values(h)
        if patches_only:
            h, x = h[:, :patches], x[:, :patches]
        queries = self.attn.queries(h)
        if mask is not None:
            mask = mask.to(queries.dtype)
        x = _plus_gated(x, self.attn.attend(queries, keys, values, mask), gate_attn, patches)
        return _plus_gated(x, self.mlp(_affine(normalise(x), scale_mlp, shift_mlp, patches)), gate_mlp, patches)


# Of two rows of factors, the first is for patches and the second one for registers.


def _affine(
    x: Activations, scale: Float[Tensor, "#batch 2 dim"], shift: Float[Tensor, "#batch 2 dim"], patches: int
) -> Activations:
    """``x * scale + shift``; without gradients it overwrites ``x``."""
    parts = []
    for kind, part in enumerate(x.split([patches, x.shape[1] - patches], dim=1)):
        own = scale[:, kind, None], shift[:, kind, None]
        if torch.is_grad_enabled():
            parts.append(torch.addcmul(own[1], part, own[0]))
        else:
            part.mul_(own[0]).add_(own[1])
    return torch.cat(parts, dim=1) if parts else x


def _plus_gated(x: Activations, change: Activations, gate: Float[Tensor, "#batch 2 dim"], patches: int) -> Activations:
    """``x + gate * change``; without gradients it overwrites ``change``."""
    parts = []
    sizes = [patches, x.shape[1] - patches]
    for kind, (part, own) in enumerate(zip(x.split(sizes, dim=1), change.split(sizes, dim=1), strict=True)):
        if torch.is_grad_enabled():
            parts.append(torch.addcmul(part, own, gate[:, kind, None]))
        else:
            torch.addcmul(part, own, gate[:, kind, None], out=own)
    return torch.cat(parts, dim=1) if parts else change


class VelocityHead(nn.Module):
    """Patch tokens to the velocity of their latents."""

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__()
        self.modulation = Linear(config.decoder_dim, 2 * config.decoder_dim)
        self.proj = Linear(config.decoder_dim, config.patch_channels)

    def modulate(self, time: Float[Tensor, "steps dim"]) -> Float[Tensor, "steps 2 dim"]:
        """Shift and scale at each timestep; the scale already has its 1 added."""
        vectors = self.modulation(F.silu(time)).float().unflatten(1, (2, -1))
        return vectors + vectors.new_tensor([0, 1])[:, None]

    def forward(self, x: Activations, modulation: Float[Tensor, "#batch 2 dim"]) -> Float[Tensor, "batch patches numbers"]:
        velocity: Tensor = self.proj(torch.addcmul(modulation[:, 0, None], normalise(x), modulation[:, 1, None]))
        return velocity.float()


@dataclass(frozen=True)
class Timestep:
    """Everything that the blocks need of one timestep, for all items or for each.

    Attributes:
        blocks: modulation of each block.
        head: modulation of the head.
    """

    blocks: tuple[Modulation, ...]
    head: Float[Tensor, "#batch 2 dim"]


class Decoder(nn.Module):
    """Velocity of noised latents under a condition (section 3.3)."""

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__()
        dim = config.decoder_dim
        self.config = config
        self.from_codes = Linear(len(config.levels), dim)
        self.register_positions = nn.Parameter(torch.empty(1, 1, dim, config.registers).normal_(std=0.02))
        self.mask_token = nn.Parameter(torch.empty(dim).normal_(std=0.02))
        self.null_token = nn.Parameter(torch.empty(dim).normal_(std=0.02))
        self.patches = Patches(config.patch_size, config.latent_channels, dim)
        self.patch_positions = nn.Parameter(sinusoidal_positions(config.grid, dim), requires_grad=False)
        self.time = TimeEmbedding(dim, config.frequency_embedding_size, config.max_timestep)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_depth))
        self.head = VelocityHead(config)

    # ---- conditions

    def registers(self, codes: Float[Tensor, "batch count components"]) -> Float[Tensor, "batch count dim"]:
        """Register tokens of codes, with their positions."""
        positions = self.register_positions[0, 0, :, : codes.shape[1]].T
        tokens: Tensor = self.from_codes(codes)
        return tokens.float() + positions.float()

    def condition(
        self, codes: Float[Tensor, "batch count components"], keep: Sequence[int], null: Sequence[bool] | None = None
    ) -> Condition:
        """Collapsed condition: the first ``keep`` codes of each item, and one row for all that are dropped.

        Args:
            codes: padded to the longest item.
            keep: codes kept per item, 0 to all registers.
            null: items that get the null condition instead; their ``keep`` is not looked at.
        """
        total = self.config.registers
        null = null or [False] * len(keep)
        kept = [0 if is_null else count for count, is_null in zip(keep, null, strict=True)]
        rows = max(count + (count < total) for count in kept)
        tokens = self.registers(codes[:, : max(kept)])
        registers = tokens.new_zeros(len(kept), rows, tokens.shape[2])
        log_count = tokens.new_full((len(kept), rows), -math.inf)
        for item, (count, is_null) in enumerate(zip(kept, null, strict=True)):
            registers[item, :count] = tokens[item, :count]
            log_count[item, :count] = 0.0
            if count < total:
                registers[item, count] = self.null_token if is_null else self.mask_token
                log_count[item, count] = math.log(total - count)
        return Condition(registers, log_count)

    def dense_condition(
        self, codes: Float[Tensor, "batch registers components"], keep: Int[Tensor, " batch"], null: Tensor | None = None
    ) -> Condition:
        """The condition as it was trained, every register in a row of its own; what training and comparisons use."""
        tokens = self.registers(codes)
        positions = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.int64)
        tokens = torch.where((positions < keep[:, None])[..., None], tokens, self.mask_token.float())
        if null is not None:
            tokens = torch.where(null[:, None, None], self.null_token.float(), tokens)
        return Condition(tokens, None)

    # ---- velocity

    def timesteps(self, t: Float[Tensor, " steps"]) -> list[Timestep]:
        """Modulation of all blocks at each timestep, for all items alike."""
        whole = self.timestep(t)
        count = len(t)
        return [Timestep(tuple(vectors[i : i + 1] for vectors in whole.blocks), whole.head[i : i + 1]) for i in range(count)]

    def timestep(self, t: Float[Tensor, " batch"]) -> Timestep:
        """Modulation at a timestep of its own for each item."""
        time = self.time(t)
        return Timestep(tuple(cast(DecoderBlock, block).modulate(time) for block in self.blocks), self.head.modulate(time))

    def forward(
        self, latents: Float[Tensor, "batch channels rows columns"], timestep: Timestep, condition: Condition
    ) -> Float[Tensor, "batch channels rows columns"]:
        """Velocity ``noise - image`` of scaled latents."""
        height, width = self.config.patch_size
        grid = latents.shape[2] // height, latents.shape[3] // width
        x = self.patches(latents) + grid_positions(self.patch_positions, grid).float()
        patches = x.shape[1]
        mask = condition.attention_mask(patches)
        x = torch.cat([x, condition.registers], dim=1)
        last = len(self.blocks) - 1
        for index, (block, modulation) in enumerate(zip(self.blocks, timestep.blocks, strict=True)):
            x = block(x, modulation, mask, patches, patches_only=index == last)
        return unpatch(self.head(x, timestep.head), grid, self.config.patch_size)

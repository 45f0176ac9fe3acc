"""Latents to register tokens.

Patches never see registers, and a register sees the patches and the registers before it (``causal_last``). The first k
registers therefore come out the same whether or not the others are there, and no mask over patches is needed.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
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
)
from zoo.nn.linear import Linear
from zoo.precision import Float32Module


class EncoderBlock(nn.Module):
    """Self-attention over patches and registers, and a feed-forward layer (section 3.2)."""

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__()
        self.mask_mode = config.encoder_mask
        self.attn = Attention(config.encoder_dim, config.encoder_head_dim)
        self.mlp = FeedForward(config.encoder_dim, config.mlp_ratio)

    def forward(self, x: Activations, patches: int, registers_only: bool = False) -> Float[Tensor, "batch _ dim"]:
        """All tokens to all tokens, or to the registers alone where nothing else is needed any more."""
        attended = self._attend(normalise(x), patches, registers_only)
        x = x[:, -attended.shape[1] :] + attended
        out: Tensor = x + self.mlp(normalise(x))
        return out

    def _attend(self, x: Activations, patches: int, registers_only: bool) -> Float[Tensor, "batch _ dim"]:
        attn = self.attn
        keys, values = attn.keys_values(x)
        first = patches if registers_only else 0
        queries = attn.queries(x[:, first:])
        if self.mask_mode == "full":
            return attn.attend(queries, keys, values)
        if self.mask_mode == "causal" and not registers_only:
            return attn.attend(queries, keys, values, causal=True)
        split = patches - first
        mask = earlier_registers(patches, x.shape[1] - patches, x.device)
        registers = attn.attend(queries[:, :, split:], keys, values, mask)
        if registers_only:
            return registers
        own = attn.attend(queries[:, :, :split], keys[:, :, :patches], values[:, :, :patches])
        return torch.cat([own, registers], dim=1)


def earlier_registers(patches: int, registers: int, device: torch.device) -> Bool[Tensor, "registers keys"]:
    """Sight of each register: every patch, the registers before it and itself."""
    return torch.ones(registers, patches + registers, dtype=torch.bool, device=device).tril(patches)


class Encoder(Float32Module):
    """Patches and registers through the transformer, registers to the space that is quantized. Stays in float32."""

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__()
        dim = config.encoder_dim
        self.config = config
        self.patches = Patches(config.patch_size, config.latent_channels, dim)
        self.positions = nn.Parameter(sinusoidal_positions(config.grid, dim), requires_grad=False)
        self.registers = nn.Parameter(torch.empty(config.registers, dim).normal_(std=0.02))
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_depth))
        self.to_codes = Linear(dim, len(config.levels))

    def embed(self, latents: Float[Tensor, "batch channels rows columns"]) -> Activations:
        """Patch tokens with their positions."""
        height, width = self.config.patch_size
        grid = latents.shape[2] // height, latents.shape[3] // width
        tokens: Tensor = self.patches(latents)
        return tokens + grid_positions(self.positions, grid)

    def trunk(self, latents: Float[Tensor, "batch channels rows columns"], count: int) -> Activations:
        """The first ``count`` registers behind the last block."""
        x = self.embed(latents)
        patches = x.shape[1]
        x = torch.cat([x, self.registers[:count].expand(x.shape[0], -1, -1)], dim=1)
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            x = block(x, patches, registers_only=index == last)
        return x

    def forward(
        self, latents: Float[Tensor, "batch channels rows columns"], count: int | None = None
    ) -> Float[Tensor, "batch count components"]:
        """Vectors for the quantizer to round, of the first ``count`` registers or all of them.

        Fewer than all give what all would give unless the mask is ``full``: then all are computed and the rest is dropped.
        """
        wanted = self.config.registers if count is None else count
        computed = self.config.registers if self.config.encoder_mask == "full" else wanted
        z: Tensor = self.to_codes(normalise(self.trunk(latents, computed)[:, :wanted]))
        return z

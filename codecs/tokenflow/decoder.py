"""Latents to images, and latents to the features of the teacher (paper section 3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.codecs.tokenflow.config import TokenFlowConfig
from zoo.codecs.tokenflow.encoder import convolution_options, middle_block, output_norm, resize, task_layer
from zoo.nn.norm import exact_group_norms, overwriting_activations
from zoo.nn.vit import ViTSizes, vit_blocks
from zoo.precision import compute_dtype

Latents = Float[Tensor, "batch channels rows columns"]


class PixelDecoder(nn.Module):
    """The convolutional decoder of VQGAN, on the pixel part of the latents; it works in the precision of its weights."""

    def __init__(self, config: TokenFlowConfig) -> None:
        from diffusers.models.unets.unet_2d_blocks import AttnUpDecoderBlock2D, UpDecoderBlock2D

        super().__init__()
        self.image_size = config.image_size
        widths = config.decoder_widths
        levels = []
        for level, width in enumerate(widths):
            kind = UpDecoderBlock2D if level else AttnUpDecoderBlock2D
            levels.append(
                kind(
                    in_channels=widths[max(level - 1, 0)],
                    out_channels=width,
                    num_layers=config.decoder_blocks,
                    add_upsample=level < len(widths) - 1,
                    **convolution_options(width, config.norm_groups, attention=level == 0),
                )
            )
        self.post_quant_conv = nn.Conv2d(config.pixel_code_dim, config.latent_channels, 1)
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = middle_block(widths[0], config.norm_groups)
        self.levels = nn.Sequential(*levels)
        self.norm_out = output_norm(widths[-1], config.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)
        overwriting_activations(exact_group_norms(self))

    def forward(self, latents: Latents) -> Float[Tensor, "batch 3 height width"]:
        """Images as float32, nominally in [-1, 1], not clamped."""
        latents = latents.to(compute_dtype(self.conv_in), memory_format=torch.channels_last)
        x = self.levels(self.mid(self.conv_in(self.post_quant_conv(latents))))
        images = self.conv_out(F.silu(self.norm_out(x))).float().contiguous()
        return resize(images, self.image_size)


class SemanticDecoder(nn.Module):
    """Transformer blocks in the manner of BEiT v2 (arXiv 2208.06366) on the semantic part of the latents."""

    def __init__(self, config: TokenFlowConfig) -> None:
        super().__init__()
        dim = config.semantic_dim
        self.patches = nn.Linear(config.semantic_code_dim, dim)
        self.class_token = nn.Parameter(torch.empty(1, dim))
        self.positions = nn.Parameter(torch.empty(1 + config.grid**2, dim))
        self.blocks = vit_blocks(ViTSizes(dim, config.semantic_decoder_depth, config.semantic_decoder_heads, 4 * dim))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self._initialise()
        self.to_features = task_layer(dim, config.feature_dim)

    def _initialise(self) -> None:
        """BEiT's initial weights: small ones, and the smaller the deeper where they are added to the stream."""
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        block: Any
        with torch.no_grad():
            for number, block in enumerate(self.blocks, start=1):
                for layer in (block.attn.proj, block.mlp.fc2):
                    layer.weight.div_((2 * number) ** 0.5)

    def forward(self, latents: Latents) -> Float[Tensor, "batch patches features"]:
        """Features of the patches, row by row, as float32."""
        x = self.patches(latents.flatten(2).transpose(1, 2).to(compute_dtype(self.patches)))
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1) + self.positions
        features: Tensor = self.to_features(self.norm(self.blocks(x)[:, 1:]))
        return features.float()

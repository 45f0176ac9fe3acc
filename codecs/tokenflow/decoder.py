"""Latents to images, and latents to the features of the teacher (paper section 3)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.codecs.tokenflow.config import TokenFlowConfig
from zoo.codecs.tokenflow.encoder import resize, task_layer
from zoo.nn.conv2d import Conv2d
from zoo.nn.vit import ViTSizes, vit_blocks
from zoo.nn.vqgan import ConvDecoder
from zoo.precision import compute_dtype

LatentTensor = Float[Tensor, "batch channels rows columns"]


class PixelDecoder(ConvDecoder):
    """The convolutional decoder of VQGAN, on the pixel part of the latents; it works in the precision of its weights."""

    def __init__(self, config: TokenFlowConfig) -> None:
        super().__init__(
            config.latent_channels,
            config.decoder_widths,
            config.decoder_blocks,
            attention=[0],
            groups=config.norm_groups,
        )
        self.image_size = config.image_size
        self.post_quant_conv = Conv2d(config.pixel_code_dim, config.latent_channels, 1)

    def forward(self, latents: LatentTensor) -> Float[Tensor, "batch 3 height width"]:
        """Images as float32, nominally in [-1, 1], not clamped."""
        latents = latents.to(compute_dtype(self.conv_in), memory_format=torch.channels_last)
        return resize(super().forward(self.post_quant_conv(latents)), self.image_size)


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

    def forward(self, latents: LatentTensor) -> Float[Tensor, "batch patches features"]:
        """Features of the patches, row by row, as float32."""
        x = self.patches(latents.flatten(2).transpose(1, 2).to(compute_dtype(self.patches)))
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1) + self.positions
        features: Tensor = self.to_features(self.norm(self.blocks(x)[:, 1:]))
        return features.float()

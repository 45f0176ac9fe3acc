"""Images to latents: a semantic encoder of transformer blocks beside a convolutional pixel encoder (paper section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.codecs.tokenflow.config import TokenFlowConfig
from zoo.nn.conv2d import Conv2d
from zoo.nn.vit import Activation, ViTSizes, vit_blocks
from zoo.nn.vqgan import ConvEncoder
from zoo.precision import Float32Module

Images = Float[Tensor, "batch 3 height width"]
LatentTensor = Float[Tensor, "batch channels rows columns"]

# What tells CLIP's blocks and SigLIP's apart.
_ACTIVATIONS: dict[str, Activation] = {"clip": "quick_gelu", "siglip": "gelu_tanh"}
_EPS = {"clip": 1e-5, "siglip": 1e-6}


def resize(x: Float[Tensor, "batch channels _ _"], size: int) -> Float[Tensor, "batch channels _ _"]:
    """Bicubic (a = -0.75), edges clamped, no antialiasing: how a TokenFlow resizes whatever does not have the size."""
    return x if x.shape[-1] == size else F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False)


def task_layer(inputs: int, outputs: int) -> nn.Sequential:
    """Two linear layers with a tanh between them; the first one keeps the width."""
    first, second = nn.Linear(inputs, inputs), nn.Linear(inputs, outputs)
    for layer in (first, second):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(first, nn.Tanh(), second)


class SemanticEncoder(nn.Module):
    """The vision tower of CLIP or SigLIP, without what is above the features that TokenFlow uses.

    It takes images in [-1, 1]; CLIP's own normalisation is not applied, as in the original.
    """

    def __init__(self, config: TokenFlowConfig) -> None:
        super().__init__()
        dim, clip = config.semantic_dim, config.teacher == "clip"
        eps = _EPS[config.teacher]
        self.patches = nn.Conv2d(3, dim, config.patch_size, config.patch_size, bias=not clip)
        self.class_token = nn.Parameter(torch.empty(1, dim)) if clip else None
        self.positions = nn.Parameter(torch.empty(config.grid**2 + clip, dim))
        self.norm_pre = nn.LayerNorm(dim, eps=eps) if clip else nn.Identity()
        self.blocks = vit_blocks(
            ViTSizes(
                dim,
                config.semantic_depth,
                config.semantic_heads,
                config.semantic_hidden,
                activation=_ACTIVATIONS[config.teacher],
                eps=eps,
            )
        )
        # SigLIP's features are those before its last block, and its last norm comes after that one.
        self.norm = nn.LayerNorm(dim, eps=eps) if clip else nn.Identity()
        nn.init.trunc_normal_(self.positions, std=0.02)
        if self.class_token is not None:
            nn.init.trunc_normal_(self.class_token, std=0.02)

    def forward(self, images: Images) -> Float[Tensor, "batch patches dim"]:
        """Features of the patches, row by row."""
        if self.class_token is None:
            images = images.clamp(-1, 1)
        x = self.patches(images).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)
        x = self.norm(self.blocks(self.norm_pre(x + self.positions)))
        return x if self.class_token is None else x[:, 1:]


class PixelEncoder(ConvEncoder):
    """The convolutional encoder of VQGAN, with attention at the lowest resolution only."""

    def __init__(self, config: TokenFlowConfig) -> None:
        coarsest = len(config.encoder_widths) - 1
        super().__init__(
            config.encoder_stem,
            config.encoder_widths,
            config.encoder_blocks,
            config.latent_channels,
            attention=[coarsest],
            groups=config.norm_groups,
        )
        self.quant_conv = Conv2d(config.latent_channels, config.pixel_code_dim, 1)

    def forward(self, images: Images) -> LatentTensor:
        return self.quant_conv(super().forward(images)).contiguous()


class Encoder(Float32Module):
    """Both encoders; the parameters stay in float32, because ids flip when they are rounded."""

    def __init__(self, config: TokenFlowConfig) -> None:
        super().__init__()
        self.pixel_size = config.pixel_size
        self.grid = config.grid
        self.semantic = SemanticEncoder(config)
        self.to_codes = task_layer(config.semantic_dim, config.semantic_code_dim)
        self.pixels = PixelEncoder(config)

    def forward(self, images: Images) -> LatentTensor:
        """Semantic and pixel latents of images in [-1, 1], in this order along the channels, not normalised."""
        semantic = self.to_codes(self.semantic(images)).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        pixels = self.pixels(resize(images, self.pixel_size))
        return torch.cat([semantic.float(), pixels.float()], dim=1)

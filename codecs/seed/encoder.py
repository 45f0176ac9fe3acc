"""Images to the vectors that are quantized: vision transformer, causal Q-Former, projection."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.codecs.seed.config import SeedConfig
from zoo.codecs.seed.qformer import QFormer
from zoo.precision import Float32Module

# Mean and standard deviation that CLIP normalises images with, which lie in [0, 1] there.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Vision(nn.Module):
    """EVA-CLIP's vision transformer (arXiv 2211.07636) as timm builds it, but for its last block and final normalisation."""

    def __init__(self, config: SeedConfig) -> None:
        super().__init__()
        from timm.models.eva import Eva

        # Any: timm annotates what may be switched off as missing.
        self.network: Any = Eva(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.vision_dim,
            depth=config.vision_depth,
            num_heads=config.vision_heads,
            # timm rounds the product down.
            mlp_ratio=(config.vision_mlp_dim + 0.5) / config.vision_dim,
            norm_layer=partial(nn.LayerNorm, eps=config.vision_eps),
            num_classes=0,
            global_pool="",
            use_post_transformer_norm=False,
        )

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens dim"]:
        """Class token and patches of images in [-1, 1], in float32; computed in the precision of the weights."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        pixels = (images / 2 + 0.5 - mean) / std
        tokens: Tensor = self.network.forward_features(pixels.to(self.network.pos_embed.dtype))
        return tokens.float()

    def reset_buffers(self) -> None:
        """Keys have no bias: timm fills in zeros, which are in no checkpoint."""
        for block in self.network.blocks:
            block.attn.k_bias = torch.zeros_like(block.attn.q_bias)


class Summary(Float32Module):
    """Causal sequence of vectors to quantize, which sums up what the vision transformer saw; stays in float32."""

    def __init__(self, config: SeedConfig) -> None:
        super().__init__()
        dim = config.qformer_dim
        self.norm = nn.LayerNorm(config.vision_dim, eps=config.summary_eps)
        self.qformer = QFormer(
            dim,
            config.qformer_depth,
            config.qformer_heads,
            config.qformer_mlp_dim,
            config.qformer_act,
            config.qformer_eps,
            context_dim=config.vision_dim,
            cross_attention_every=config.cross_attention_every,
            queries=config.queries,
            causal=config.causal,
        )
        self.to_codes = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, config.code_dim))

    def forward(self, tokens: Float[Tensor, "batch tokens vision"]) -> Float[Tensor, "batch queries dim"]:
        """The Q-Former's output, before the projection."""
        summary: Tensor = self.qformer(self.norm(tokens))
        return summary


class Encoder(nn.Module):
    """Images to the vectors that are quantized."""

    def __init__(self, config: SeedConfig) -> None:
        super().__init__()
        self.vision = Vision(config)
        self.summary = Summary(config)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "batch queries dim"]:
        """The Q-Former's output for images in [-1, 1]; ``dtype`` is that of the vision transformer's products."""
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            tokens = self.vision(images)
        summary: Tensor = self.summary(tokens)
        return summary

"""A random VAT small enough for every test."""

from __future__ import annotations

import torch

from zoo.codecs.vat import VAT, VATConfig
from zoo.codecs.vat.training import follow_residuals

SMALL_VAT = VATConfig(
    width=24,
    heads=2,
    num_points=256,
    num_point_queries=12,
    num_latents=16,
    encoder_layers=2,
    decoder_layers=2,
    latent_dim=3,
    codebook_size=11,
    token_scales=(1, 3, 5, 16),
    plane_size=4,
    upsampler_channels=(8, 12),
    upsampler_layers=0,
    norm_groups=4,
    mid_attention=False,
    triplane_channels=5,
    query_hidden=12,
    query_layers=3,
    resolution=16,
)


def small_vat(seed: int = 0, config: VATConfig = SMALL_VAT) -> VAT:
    """A VAT with random weights, whose gains suit its latents and whose fields have an inside and an outside."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = VAT(config, name=f"small-vat-{seed}").eval().requires_grad_(False)
        points = torch.rand(8, 300, 3) * 2 - 1
        latents, _ = tokenizer.encoder(points, torch.nn.functional.normalize(torch.randn(8, 300, 3), dim=-1))
        for _ in config.token_scales:
            follow_residuals(tokenizer.quantizer, latents, decay=0)
        (field,) = tokenizer.field(tokenizer.quantizer.ids(latents[:1]))
        tokenizer.query.layers[-1].bias -= field(torch.rand(500, 3) * 2 - 1).median()
    tokenizer.fingerprint = tokenizer.compute_fingerprint()
    return tokenizer

"""A random S3Tokenizer small enough for every test."""

from __future__ import annotations

import torch

from zoo.codecs.s3tokenizer import S3Tokenizer, S3TokenizerConfig

SMALL_V2 = S3TokenizerConfig(dim=64, depth=2, heads=1, bands=32)
SMALL_V1 = S3TokenizerConfig(dim=24, depth=1, heads=3, memory=0, positions=1500, stride=1, codebook_size=50, bands=32)


def small_s3tokenizer(config: S3TokenizerConfig = SMALL_V2, seed: int = 0) -> S3Tokenizer:
    """An S3Tokenizer with random weights whose projections are as large as trained ones, so that ids differ."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = S3Tokenizer(config, name="small-s3tokenizer").eval().requires_grad_(False)
        if config.rotary:
            tokenizer.quantizer.weight.mul_(5)
    tokenizer.fingerprint = tokenizer.compute_fingerprint()
    return tokenizer

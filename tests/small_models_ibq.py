"""Random IBQ and Open-MAGVIT2 tokenizers small enough for every test."""

from __future__ import annotations

import torch

from zoo.codecs.ibq import IBQ, IBQConfig

SMALL_IBQ = IBQConfig(stem=32, widths=(32, 32, 64), blocks=1, attention=(2,), latent_channels=12, code_dim=8, codebook_size=300)
SMALL_BITS = IBQConfig(
    quantization="lfq",
    stem=32,
    widths=(32, 32, 64),
    blocks=1,
    attention=(),
    latent_channels=9,
    code_dim=9,
    codebook_size=512,
)


def small_ibq(config: IBQConfig = SMALL_IBQ, seed: int = 0) -> IBQ:
    """A tokenizer with random weights whose codes are long enough for ids to differ."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = IBQ(config, name="small-ibq").eval().requires_grad_(False)
        tokenizer.quantizer.weight.normal_()
    tokenizer.fingerprint = tokenizer.compute_fingerprint()
    return tokenizer

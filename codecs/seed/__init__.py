"""SEED: an image as 32 tokens that keep its meaning. Papers: arXiv 2307.08041 (SEED-1) and 2310.01218 (SEED-2, ICLR 2024).

A frozen vision transformer describes the image in patches, and 32 learned queries sum the patches up. Each query sees the ones
before it. The nearest codes are the tokens. On the way back, a small transformer makes of the tokens the image embedding that
a diffusion model was trained to draw from. What comes back shows the same things, not the same pixels.

Read in this order: `config`, `qformer`, `encoder`, `embedding` (codebook, and tokens to image embedding), `diffusion`,
`tokenizer`, `training`, `checkpoint`.
"""

from __future__ import annotations

from zoo.codecs.seed.config import SeedConfig
from zoo.codecs.seed.tokenizer import Seed

__all__ = ["TOKENIZER", "Seed", "SeedConfig"]

TOKENIZER = Seed

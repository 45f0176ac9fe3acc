"""FlexTok: an image as 1 to 256 ordered tokens. Paper: arXiv 2502.13967 (ICML 2025).

An autoencoder's latents, cut into patches, and a set of register tokens go through a transformer; the registers, rounded to a
grid, are the tokens. Because they were trained with nested dropout, every prefix of them describes the whole image, coarse to
fine. A rectified flow conditioned on the prefix makes latents again.

Read in this order: `config`, `transformer`, `encoder`, `decoder`, `flow` (sampling, loss), `tokenizer`, `training`,
`checkpoint`.
"""

from __future__ import annotations

from zoo.codecs.flextok.config import FlexTokConfig
from zoo.codecs.flextok.tokenizer import FlexTok

__all__ = ["TOKENIZER", "FlexTok", "FlexTokConfig"]

TOKENIZER = FlexTok

"""VAT: a shape as 680 or 2280 ordered tokens, 510 or 3990 bytes. Paper: arXiv 2412.02202.

Points of a surface and their normals are gathered into features that learned latents attend to; the latents follow a
Gaussian, and are quantized over scales of growing token count. A transformer and an upsampler make three feature planes of
them, and a small network makes occupancy of the planes' features. Neither code nor weights were ever published: where the
paper leaves choices open, this is a reference design of this project.

Read in this order: `config`, `transformer`, `encoder`, `quantizer`, `decoder`, `surface` (fields to meshes), `tokenizer`,
`training`, `checkpoint`.
"""

from __future__ import annotations

from zoo.codecs.vat.config import VATConfig
from zoo.codecs.vat.tokenizer import VAT

__all__ = ["TOKENIZER", "VAT", "VATConfig"]

TOKENIZER = VAT

"""IBQ: images as grids of ids from codebooks of up to 262,144 entries; and its relatives Emu3.5 and Open-MAGVIT2.

A convolutional autoencoder whose code is the row of a large codebook with the largest dot product (index back-propagation
quantization, arXiv 2412.02692): the image tokenizers of SEED-Voken, Emu3.5 (arXiv 2510.26583) and, encoder only, Apertus 1.5.
Open-MAGVIT2 (arXiv 2409.04410) has another network and no codebook: the signs of a few numbers are the bits of an id (LFQ).

Read in this order: `config`, `network`, `quantizer`, `preparing`, `tokenizer`, `training`, `checkpoint`.
"""

from __future__ import annotations

from zoo.codecs.ibq.config import IBQConfig
from zoo.codecs.ibq.tokenizer import IBQ

__all__ = ["IBQ", "TOKENIZER", "IBQConfig"]

TOKENIZER = IBQ

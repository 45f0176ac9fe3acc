"""ByteFormer: the bytes of a file as tokens, and a transformer that classifies files by them. Paper: arXiv 2306.00238.

Every byte is an id, so that tokens are the file itself and decoding is exact. The network embeds bytes, shortens the sequence
by a strided convolution, and halves it six more times between blocks of windowed attention. It is what `ByteFormer.embed`,
`ByteFormer.features` and `ByteFormer.classify` compute; decoding does not need it.

Read in this order: `config`, `encodings` (images and audio to files), `transforms` (files to other bytes), `embedding`,
`transformer`, `tokenizer`, `checkpoint`.
"""

from __future__ import annotations

from zoo.codecs.byteformer.config import ByteFormerConfig
from zoo.codecs.byteformer.tokenizer import ByteFormer, Features

__all__ = ["TOKENIZER", "ByteFormer", "ByteFormerConfig", "Features"]

TOKENIZER = ByteFormer

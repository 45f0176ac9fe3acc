"""TokenFlow: an image as tokens with meaning and appearance, scale by scale. Paper: arXiv 2412.03069 (CVPR 2025).

A semantic encoder (CLIP or SigLIP) and a convolutional pixel encoder describe the same grid of patches. Every token is one
index into two codebooks, a semantic and a pixel one, chosen by the sum of both distances, and residual quantization goes from a
grid of 1 x 1 to the full one. A pixel decoder makes the image again, a semantic decoder the features of the teacher.

Read in this order: `config`, `encoder`, `quantizer`, `decoder`, `tokenizer`, `training`, `checkpoint`.
"""

from __future__ import annotations

from zoo.codecs.tokenflow.config import TokenFlowConfig
from zoo.codecs.tokenflow.tokenizer import TokenFlow

__all__ = ["TOKENIZER", "TokenFlow", "TokenFlowConfig"]

TOKENIZER = TokenFlow

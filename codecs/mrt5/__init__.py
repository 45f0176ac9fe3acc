"""MrT5: byte-level T5 whose encoder drops the bytes that it can do without.

Kallini et al., "MrT5: Dynamic Token Merging for Efficient Byte-level Language Models" (arXiv 2410.20771, ICLR 2025). Encoder
and gate are those of `zoo.nn.mrt5`.
"""

from zoo.codecs.mrt5.config import MrT5ModelConfig
from zoo.codecs.mrt5.tokenizer import Kept, MrT5, NetworkOutput

__all__ = ["TOKENIZER", "Kept", "MrT5", "MrT5ModelConfig", "NetworkOutput"]

TOKENIZER = MrT5

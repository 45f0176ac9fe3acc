"""S3Tokenizer: 16 kHz speech as 25 or 50 ids per second of what is said. Encode only.

The supervised semantic speech tokens of CosyVoice 1, 2 and 3: the first blocks of a speech-recognition encoder, and one
quantizer. Papers: arXiv 2407.05407, 2412.10117 and 2505.17589. CosyVoice makes audio of the ids with a flow-matching model and
a vocoder, which belong to its language model and not to the tokenizer.

Recordings of any length are encoded in overlapping windows of 30 seconds; the middles are kept. `windows` has the rule.

Read in this order: `config`, `frontend`, `encoder`, `quantizer`, `windows`, `tokenizer`, `streaming`, `checkpoint`.
"""

from __future__ import annotations

from zoo.codecs.s3tokenizer.config import S3TokenizerConfig
from zoo.codecs.s3tokenizer.tokenizer import S3Tokenizer

__all__ = ["TOKENIZER", "S3Tokenizer", "S3TokenizerConfig"]

TOKENIZER = S3Tokenizer

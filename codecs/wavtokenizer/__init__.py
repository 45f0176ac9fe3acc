"""WavTokenizer: 24 kHz audio as one stream of 40 or 75 tokens per second.

A convolution + LSTM encoder in the manner of EnCodec, one codebook of 4096 vectors, and a decoder in the manner of Vocos
(residual blocks and one global attention, ConvNeXt blocks, inverse STFT). Paper: arXiv 2408.16532 (ICLR 2025).

Activations are stored time-major, ``[batch, time, channels]``, throughout. Both directions work on ragged batches and on
recordings of any length with the numbers of a single whole-sequence pass: the encoder walks through chunks with exact
convolution context and a carried LSTM state, the decoder normalises in two passes, attends in query blocks and runs its
ConvNeXt stack and inverse STFT in blocks with a halo.

Read in this order: `config`, `encoder` (with the codebook), `decoder`, `tokenizer`, `streaming`, `checkpoint`.
"""

from __future__ import annotations

from zoo.codecs.wavtokenizer.config import WavTokenizerConfig
from zoo.codecs.wavtokenizer.streaming import StreamDecoder, StreamEncoder
from zoo.codecs.wavtokenizer.tokenizer import WavTokenizer

__all__ = ["TOKENIZER", "StreamDecoder", "StreamEncoder", "WavTokenizer", "WavTokenizerConfig"]

TOKENIZER = WavTokenizer

"""SNAC: audio as codes of several rates, coarse ones for long stretches of time and fine ones for short stretches.

A convolutional encoder and decoder with Snake activations in the manner of DAC, a residual quantizer whose coarse levels run at
a lower rate than the fine ones, attention within windows in the music models, noise in the decoder. Paper: arXiv 2410.14411.

Activations are stored time-major, ``[batch, time, channels]``, throughout. Recordings of any length and ragged batches go
through both directions in windows with as much context as the networks can see, so that their numbers are those of a single
pass over each item alone.

Read in this order: `config`, `layers`, `encoder`, `quantizer`, `decoder`, `windows`, `noise`, `tokenizer`, `streaming`,
`checkpoint`.
"""

from __future__ import annotations

from zoo.codecs.snac.config import SNACConfig
from zoo.codecs.snac.streaming import StreamDecoder, StreamEncoder
from zoo.codecs.snac.tokenizer import SNAC

__all__ = ["SNAC", "TOKENIZER", "SNACConfig", "StreamDecoder", "StreamEncoder"]

TOKENIZER = SNAC

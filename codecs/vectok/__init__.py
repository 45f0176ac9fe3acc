"""Vec-Tok: speech as about 16 to 20 tokens per second and a voice. Paper: arXiv 2310.07246.

A recording becomes speech vectors, 50 per second, which hold everything. Less their mean over the recording, which carries most
of the speaker, they are rounded to 300 units, and byte-pair encoding joins units to tokens. To decode, a Conformer turns units
back into vectors in the voice of a prompt, some seconds of anybody's speech vectors put in front, and a vocoder makes sound of
them. So the tokens say what was said and the prompt says who speaks.

The authors published neither code nor weights: this is a reference design, exact where its components are public (WavLM,
kNN-VC's matching and vocoder, torchaudio's Conformer, byte-pair encoding), with its free choices named in the model card.

Read in this order: `config`, `wavlm` and `logmel` (vectors), `recording` and `analysis` (of any length), `units` (k-means and
byte pairs), `voice` (prompts and kNN-VC), `inverse`, `vocoder`, `synthesis`, `tokenizer`, `training`, `checkpoint`.
"""

from __future__ import annotations

from zoo.codecs.vectok.config import HiFiGANSizes, InverseSizes, ISTFTSizes, LogMelSizes, VecTokConfig, WavLMSizes
from zoo.codecs.vectok.tokenizer import VecTok
from zoo.codecs.vectok.units import BPE
from zoo.codecs.vectok.voice import Voice

__all__ = [
    "BPE",
    "TOKENIZER",
    "HiFiGANSizes",
    "ISTFTSizes",
    "InverseSizes",
    "LogMelSizes",
    "VecTok",
    "VecTokConfig",
    "Voice",
    "WavLMSizes",
]

TOKENIZER = VecTok

"""Sizes of MrT5."""

from __future__ import annotations

from dataclasses import dataclass

from zoo.nn.mrt5 import MrT5Config


@dataclass(frozen=True)
class MrT5ModelConfig(MrT5Config):
    """Sizes in upstream's names; defaults are those of mrt5-small.

    Attributes:
        num_decoder_layers: blocks of the decoder.
        tie_word_embeddings: the head is the embedding, and the decoder's output is multiplied by ``d_model ** -0.5``.
        parts: ``encoder``, and ``decoder`` for `MrT5.generate` and training.
    """

    num_decoder_layers: int = 4
    tie_word_embeddings: bool = False
    parts: tuple[str, ...] = ("encoder", "decoder")

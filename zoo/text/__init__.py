"""Tools for language models of text and their tokenizers.

    zoo.text.byte_probabilities(model, tokenizer, "the cat and th").bytes[ord("e")]

`byte_probabilities` and `ByteModel` give the exact distribution of the next byte of a model over tokens (arXiv 2410.09303);
`mixture` finds the mixture of data that a tokenizer's merges were trained on (arXiv 2407.16607); `aksharas` splits Tamil and
Kannada into syllables.
"""

from zoo.text.aksharas import akshara_pre_tokenizer, aksharas
from zoo.text.byte_model import ByteEnsemble, ByteModel, NextByte, byte_probabilities, fill_in_the_middle
from zoo.text.mixture import Mixture, mixture
from zoo.text.pieces import Pieces, pieces_of, read_sentencepiece

__all__ = [
    "ByteEnsemble",
    "ByteModel",
    "Mixture",
    "NextByte",
    "Pieces",
    "akshara_pre_tokenizer",
    "aksharas",
    "byte_probabilities",
    "fill_in_the_middle",
    "mixture",
    "pieces_of",
    "read_sentencepiece",
]

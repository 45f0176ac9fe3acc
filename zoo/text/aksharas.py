"""Orthographic syllables (aksharas) of Tamil and Kannada, by the ranges of Unicode.

Unicode's own clusters of characters (rule GB9c of UAX #29) don't join the conjuncts of these scripts.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer


def _kannada() -> str:
    consonant, virama, nukta = "[\u0c95-\u0cb9\u0cde]", "\u0ccd", "\u0cbc"
    sign, end, joiner = "[\u0cbe-\u0ccc\u0cd5\u0cd6]", "[\u0c82\u0c83]", "[\u200c\u200d]"
    syllable = f"(?:{consonant}{nukta}?{virama}{joiner}?)*{consonant}{nukta}?{virama}?{sign}*{end}?"
    return f"{syllable}|[\u0c85-\u0c94]{end}?"


def _tamil() -> str:
    pulli, length = "\u0bcd", "\u0bd7"
    # Signs that stand on both sides of a letter may be written as their two halves.
    sign = f"(?:\u0bc6[\u0bbe{length}]?|\u0bc7\u0bbe?|[\u0bbe-\u0bc2\u0bc8\u0bca-\u0bcc])"
    joined = f"\u0b95{pulli}\u0bb7|[\u0bb6\u0bb8]{pulli}\u0bb0"
    return f"(?:{joined}|[\u0b95-\u0bb9])(?:{pulli}|{sign})?"


#: A regular expression of one syllable or any other character, for `re`, the library ``regex`` and ``tokenizers``.
PATTERN = rf"{_kannada()}|{_tamil()}|[\s\S]"

_UNIT = re.compile(PATTERN)


def aksharas(text: str) -> list[str]:
    """The syllables of Tamil and Kannada in a text, and all other characters one by one; joined, they are the text.

    In Kannada, consonants that a virama binds are one syllable. In Tamil a consonant with pulli ends its own, but for the
    ligatures க்ஷ, ஸ்ர and ஶ்ர.

    >>> zoo.text.aksharas("ಕನ್ನಡ தமிழ்")
    ['ಕ', 'ನ್ನ', 'ಡ', ' ', 'த', 'மி', 'ழ்']
    """
    return _UNIT.findall(text)


def akshara_pre_tokenizer() -> PreTokenizer:
    """The same split for a model of the library ``tokenizers``, which is then trained on syllables.

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = zoo.text.akshara_pre_tokenizer()

    No piece crosses the edge of a syllable. ``BPE`` learns whole syllables. ``Unigram`` begins with what two different
    syllables share, so that it learns parts of them.
    """
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")

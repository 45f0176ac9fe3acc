"""Word-pooled front ends: bytes, and the words that a model pools them by.

HAT (Aleph Alpha's hierarchical models) splits by Unicode word boundaries. T-Free (arXiv 2406.19223) splits by characters
and spaces, and pools by hashed trigrams. Plain white space serves for Learn Your Tokens and Byte2Word, whose sizes are not
public. Ids are always bytes, so everything comes back, and word ends follow from the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import regex
import torch
from jaxtyping import Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from zoo.checkpoint import Checkpoint
from zoo.codecs.word_pool import hat, tfree
from zoo.errors import InputError, naming_item
from zoo.spec import Spec
from zoo.tokenizer.text import TextTokenizer, metas_of
from zoo.tokens import Meta

Boundaries = Literal["hat", "tfree", "whitespace"]


@dataclass(frozen=True)
class WordPoolConfig:
    """Settings of a front end.

    Attributes:
        boundaries: how words are split.
        limit: bytes of the longest word; 0 for no limit.
    """

    boundaries: Boundaries = "hat"
    limit: int = 100

    def __post_init__(self) -> None:
        if self.boundaries not in _SPLITTERS:
            raise InputError(f"boundaries are {', '.join(_SPLITTERS)}, not {self.boundaries!r}")
        if self.limit < 0:
            raise InputError(f"limit is a number of bytes, or 0 for none, not {self.limit}")


class WordPool(TextTokenizer[WordPoolConfig]):
    """Bytes as ids, and the ends of the words that they are pooled by.

    Bytes that are no UTF-8 are words of their own.
    """

    Config = WordPoolConfig
    family = "word_pool"
    identity = ()
    checkpoint = Checkpoint(recognises=lambda keys: False, convert=lambda state, config: (config or WordPoolConfig(), {}))

    def __init__(self, config: WordPoolConfig | None = None, *, name: str = "word-pool") -> None:
        super().__init__(config or WordPoolConfig(), name)

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="text",
            vocab_size=256,
            dim=0,
            lossless=True,
            fingerprint=self.fingerprint,
        )

    def ids(self, octets: UInt8[Tensor, " length"]) -> Int[Tensor, " length"]:
        """The values of the bytes."""
        return octets.to(torch.int64)

    def octets(self, ids: Int[Tensor, " length"], meta: Meta) -> NDArray[np.uint8]:
        """The bytes."""
        return ids.to(torch.uint8).numpy()

    def widths(self, ids: Int[Tensor, " length"], meta: Meta) -> Int[Tensor, " length"]:
        """1 for every id."""
        return torch.ones_like(ids)

    def words(self, tokens: Any) -> list[Int[Tensor, " _"]]:
        """Ends of the words of each item, as offsets in its bytes; the last is its length.

        Raises:
            MismatchError, ItemError: as `decode`.

        >>> tok = zoo.load("hat-words")
        >>> tok.words(tok.encode("Hello, big world!"))[0].tolist()
        [6, 10, 17]
        """
        checked = self.check(tokens)
        found = []
        for index, (ids, meta) in enumerate(zip(checked.unpadded(), metas_of(checked), strict=True)):
            with naming_item(index):
                lengths = [len(word) for word in self.split(self.octets(ids.cpu(), meta).tobytes())]
            found.append(torch.tensor(lengths, dtype=torch.int64).cumsum(0))
        return found

    def split(self, octets: bytes) -> list[bytes]:
        """The words of a text; joined, they are the text."""
        words: list[bytes] = []
        # Bytes that are no UTF-8 become lone surrogates, which are words of their own.
        for part in regex.split("([\udc80-\udcff])", octets.decode(errors="surrogateescape")):
            if part and "\udc80" <= part[0] <= "\udcff":
                words.append(part.encode(errors="surrogateescape"))
            elif part:
                words += [word.encode() for word in _SPLITTERS[self.config.boundaries](part)]
        return hat.limited(words, self.config.limit) if self.config.limit else words


def _whitespace(text: str) -> list[str]:
    """Words with the white space in front of them."""
    return regex.findall(r"\s*\S+|\s+$", text)


_SPLITTERS = {"hat": hat.words, "tfree": tfree.stretches, "whitespace": _whitespace}

TOKENIZER = WordPool

"""Word-pooled front ends: bytes, and the words that a model pools them by.

HAT (Aleph Alpha's hierarchical models) splits by Unicode word boundaries, and pools by attention. T-Free (arXiv 2406.19223)
splits by characters and spaces, and pools by hashed trigrams. Learn Your Tokens and Byte2Word split by white space; their sizes
are not public, so that theirs are shapes to train. Ids are always bytes, so everything comes back, and word ends follow from
the text.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import regex
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from zoo.codecs.word_pool import hat, pools, spelling, tfree
from zoo.codecs.word_pool.checkpoint import CHECKPOINT
from zoo.codecs.word_pool.config import WordPoolConfig
from zoo.errors import naming_item
from zoo.precision import undisturbed
from zoo.spec import Spec
from zoo.tokenizer.text import TextTokenizer, metas_of
from zoo.tokens import Meta

__all__ = ["TOKENIZER", "WordPool", "WordPoolConfig", "hat", "tfree"]


class WordPool(TextTokenizer[WordPoolConfig]):
    """Bytes as ids, and the words that they are pooled by, with vectors where the configuration has a pool.

    Bytes that are no UTF-8 are words of their own. ``network`` makes vectors of words. ``decoder`` reads these, or those that a
    language model of words puts out: see `zoo.codecs.word_pool.spelling`.
    """

    Config = WordPoolConfig
    family = "word_pool"
    identity = ()
    checkpoint = CHECKPOINT

    def __init__(self, config: WordPoolConfig | None = None, *, name: str = "word-pool") -> None:
        super().__init__(config or WordPoolConfig(), name)
        if self.config.pool != "none":
            self.network = pools.NETWORKS[self.config.pool](self.config)
        if self.config.decoder != "none":
            self.decoder = spelling.NETWORKS[self.config.decoder](self.config)

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="text",
            vocab_size=256,
            dim=self.config.dim,
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

    @undisturbed
    def vectors(self, tokens: Any) -> list[Float[Tensor, "words vectors dim"]]:
        """The vectors of the words of each item.

        Of T-Free these are the words of `tfree.words`, its markers among them.

        Raises:
            ArgumentError: there is no pool.
            MismatchError, ItemError: as `decode`; or an item is too long for the network, or is no UTF-8 where trigrams are
                summed.
        """
        if self.config.pool == "none":
            super().embed(tokens)
        checked = self.check(tokens)
        found = []
        for index, (ids, meta) in enumerate(zip(checked.unpadded(), metas_of(checked), strict=True)):
            with naming_item(index):
                words = self.split(self.octets(ids.cpu(), meta).tobytes())
                shape = (0, self.config.vectors, self.config.dim)
                found.append(self.network(words) if words else torch.zeros(shape, device=self.device, dtype=torch.float32))
        return found

    def embed(self, tokens: Any) -> Float[Tensor, "batch words dim"]:
        """The vectors of each item's words, those of a word behind each other; zero where an item has no more words.

        Raises:
            ArgumentError, MismatchError, ItemError: as `vectors`.
        """
        rows = [row.flatten(0, 1) for row in self.vectors(tokens)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

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

"""Decoders: what reads the vectors of words again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.codecs.word_pool.config import WordPoolConfig
from zoo.codecs.word_pool.pools import Words, padded_words, word_transformer

#: What ends a word; bytes are 0 to 255.
END = 256


class PrefixWord(nn.Module):
    """Each word's bytes behind its vectors, all words in parallel: the decoder of Learn Your Tokens."""

    def __init__(self, config: WordPoolConfig) -> None:
        super().__init__()
        self.limit = config.limit
        self.embedding = nn.Embedding(256, config.dim)
        self.positions = nn.Parameter(torch.randn(config.vectors + config.limit, config.dim) * 0.02)
        self.network = word_transformer(config)
        self.head = nn.Linear(config.dim, END + 1)

    def forward(self, vectors: Words, octets: Int[Tensor, "words length"]) -> Float[Tensor, "words steps 257"]:
        """Logits of each byte and of the end behind the bytes before it.

        Args:
            vectors: of the words.
            octets: the known bytes of the words, padded with any byte.

        Returns:
            Logits for one step more than there are bytes.
        """
        x = torch.cat([vectors, self.embedding(octets)], dim=1)
        x = x + self.positions[: x.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        hidden = self.network(x, mask=mask, is_causal=True)
        logits: Tensor = self.head(hidden[:, vectors.shape[1] - 1 :])
        return logits

    def loss(self, vectors: Words, words: Sequence[bytes]) -> Float[Tensor, ""]:
        """Mean cross entropy of the bytes of words, each with its end."""
        octets, mask = (part.to(vectors.device) for part in padded_words(words))
        labels = F.pad(octets, (0, 1)).masked_fill(~F.pad(mask, (0, 1)), -100)
        labels = labels.scatter(1, mask.sum(1, keepdim=True), END)
        return F.cross_entropy(self(vectors, octets).flatten(0, 1), labels.flatten(), ignore_index=-100)

    @torch.no_grad()
    def spell(self, vectors: Words) -> list[bytes]:
        """The most likely bytes of each word, one after the other, up to its end or the longest length."""
        octets = torch.zeros(len(vectors), 0, dtype=torch.int64, device=vectors.device)
        lengths = torch.full((len(vectors),), self.limit, dtype=torch.int64, device=vectors.device)
        for place in range(self.limit):
            best = self(vectors, octets)[:, -1].argmax(-1)
            lengths = torch.where((best == END) & (lengths == self.limit), place, lengths)
            octets = torch.cat([octets, best.clamp(max=END - 1)[:, None]], dim=1)
            if (lengths < self.limit).all():
                break
        return [bytes(row[:length]) for row, length in zip(octets.tolist(), lengths.tolist(), strict=True)]


class Subword(nn.Module):
    """Scores of a vocabulary for a word's vector: the prediction target of Byte2Word."""

    def __init__(self, config: WordPoolConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocabulary)

    def forward(self, vectors: Words) -> Float[Tensor, "words vocabulary"]:
        """Logits of the vocabulary for each word."""
        logits: Tensor = self.head(self.norm(vectors[:, 0]))
        return logits


NETWORKS: dict[str, type[nn.Module]] = {"prefix_word": PrefixWord, "subword": Subword}

"""Pools: the bytes of each word to its vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from zoo.codecs.word_pool import tfree
from zoo.codecs.word_pool.config import WordPoolConfig
from zoo.errors import InputError
from zoo.nn.library import built, sizes_from

#: Bytes of an item that byte layers take: attention's memory grows with the square.
LONGEST = 8192

#: The vectors of the words of a text.
Words = Float[Tensor, "words vectors dim"]


def padded_words(words: Sequence[bytes]) -> tuple[Int[Tensor, "words longest"], Bool[Tensor, "words longest"]]:
    """The bytes of words, padded with 0, and which of them are bytes."""
    rows = [torch.tensor(list(word), dtype=torch.int64) for word in words]
    octets = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(word) for word in words], dtype=torch.int64)
    return octets, torch.arange(octets.shape[1], dtype=torch.int64) < lengths[:, None]


class CrossAttention(nn.Module):
    """Byte layers, and a query of each word over its own bytes: HAT's encoder and its connector.

    Layers are causal and look back over a window of bytes, so that later words change nothing. The query of a word is turned by
    the word's number and the keys by the bytes' (rotary positions). There is no residual connection and no norm behind.
    """

    def __init__(self, config: WordPoolConfig) -> None:
        super().__init__()
        from transformers import MistralConfig, MistralModel

        layers = {"attn_implementation": "sdpa", "vocab_size": 256, **config.byte_layers}
        sizes = self.sizes = sizes_from(MistralConfig.from_dict, layers, "the byte layers")
        self.network = cast(Any, built(lambda: MistralModel(sizes)))
        self.network.norm = nn.Identity()
        inner = config.dim if config.inner is None else config.inner
        kv_heads = config.heads if config.kv_heads is None else config.kv_heads
        if inner % config.heads or config.heads % kv_heads:
            raise InputError(f"a width of {inner} does not go with {config.heads} and {kv_heads} heads")
        self.head_dim = inner // config.heads
        rotary = sizes.head_dim or sizes.hidden_size // sizes.num_attention_heads
        if self.head_dim != rotary:
            raise InputError(
                f"heads of the words are {self.head_dim} wide and those of the bytes {rotary}: positions need one width"
            )
        self.latent_query = nn.Parameter(torch.randn(1, 1, config.dim) * config.dim**-0.5)
        self.q_proj = nn.Linear(config.dim, inner, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(sizes.hidden_size, kv_heads * self.head_dim, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(inner, config.dim, bias=False)
        self.per_head = config.normed == "head"
        if config.normed != "none":
            widths = (self.head_dim,) * 2 if self.per_head else (inner, kv_heads * self.head_dim)
            self.norm_query, self.norm_key = (nn.RMSNorm(width, eps=sizes.rms_norm_eps) for width in widths)

    def forward(self, words: Sequence[bytes]) -> Words:
        """The vector of each word of a text.

        Raises:
            InputError: the text is too long for the byte layers.
        """
        octets = b"".join(words)
        if len(octets) > LONGEST:
            raise InputError(f"{len(octets)} bytes are more than the {LONGEST} that the byte layers take: cut the text")
        device = self.latent_query.device
        hidden = self.network(torch.tensor([list(octets)], dtype=torch.int64, device=device)).last_hidden_state[0]
        mask = padded_words(words)[1].to(device)
        places = mask.flatten().cumsum(0).view(mask.shape).clamp(min=1) - 1
        query = self._heads(self.q_proj(self.latent_query), "norm_query").expand(len(words), -1, -1, -1)
        key = self._heads(self.k_proj(hidden), "norm_key")
        value = self.v_proj(hidden).unflatten(-1, (-1, self.head_dim))
        order = torch.arange(len(words), dtype=torch.int64, device=device)
        query = self._turned(query, order[:, None])
        key = self._turned(key[None], torch.arange(len(octets), dtype=torch.int64, device=device)[None])[0]
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key[places].transpose(1, 2),
            value[places].transpose(1, 2),
            attn_mask=mask[:, None, None],
            enable_gqa=True,
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def _heads(self, x: Float[Tensor, "*batch width"], norm: str) -> Float[Tensor, "*batch heads head_dim"]:
        """Queries or keys head by head, normalised if the configuration says so."""
        own = getattr(self, norm, None)
        if own is None:
            return x.unflatten(-1, (-1, self.head_dim))
        return own(x.unflatten(-1, (-1, self.head_dim))) if self.per_head else own(x).unflatten(-1, (-1, self.head_dim))

    def _turned(
        self, x: Float[Tensor, "rows length heads head_dim"], positions: Int[Tensor, "rows length"]
    ) -> Float[Tensor, "rows length heads head_dim"]:
        """Rotary positions, in halves."""
        from transformers.models.mistral.modeling_mistral import rotate_half

        cos, sin = (part[:, :, None] for part in self.network.rotary_emb(x, positions))
        turned: Tensor = x * cos + rotate_half(x) * sin
        return turned


class ClassVectors(nn.Module):
    """A transformer over each word alone, behind vectors of its own whose outputs are the word's: Learn Your Tokens."""

    def __init__(self, config: WordPoolConfig) -> None:
        super().__init__()
        self.vectors = config.vectors
        self.embedding = nn.Embedding(256, config.dim)
        self.leading = nn.Parameter(torch.randn(config.vectors, config.dim) * 0.02)
        self.positions = nn.Parameter(torch.randn(config.limit, config.dim) * 0.02)
        self.network = word_transformer(config)

    def forward(self, words: Sequence[bytes]) -> Words:
        """The vectors of each word."""
        octets, mask = (part.to(self.leading.device) for part in padded_words(words))
        x = self.embedding(octets) + self.positions[: octets.shape[1]]
        x = torch.cat([self.leading.expand(len(words), -1, -1), x], dim=1)
        hidden = self.network(x, src_key_padding_mask=~F.pad(mask, (self.vectors, 0), value=True))
        return hidden[:, : self.vectors]


class TrigramSum(nn.Module):
    """The sum of the rows of a table that the trigrams of a word are hashed to: T-Free."""

    def __init__(self, config: WordPoolConfig) -> None:
        super().__init__()
        self.trigrams = tfree.Trigrams(config.vocabulary, config.population, config.lowercase)
        self.table = nn.Parameter(torch.randn(config.vocabulary, config.dim) * 0.02)

    def forward(self, words: Sequence[bytes]) -> Words:
        """The vector of each word of the text, and of each marker that T-Free puts between words.

        Raises:
            InputError: the text is no UTF-8.
        """
        octets = b"".join(words)
        try:
            text = octets.decode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"the byte 0x{octets[error.start]:02x} at offset {error.start} does not belong to UTF-8"
            ) from error
        return self.trigrams.embed(self.table, tfree.words(text))[:, None]


def word_transformer(config: WordPoolConfig) -> nn.TransformerEncoder:
    """A small pre-norm transformer over words."""
    layer = nn.TransformerEncoderLayer(
        config.dim, config.heads, config.hidden, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, config.layers, nn.LayerNorm(config.dim), enable_nested_tensor=False)


NETWORKS: dict[str, type[nn.Module]] = {
    "cross_attention": CrossAttention,
    "cls": ClassVectors,
    "hash_sum": TrigramSum,
}

"""The decoder: T5's, which looks past what the encoder deleted."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.codecs.mrt5.config import MrT5ModelConfig
from zoo.nn.mrt5 import FeedForward, MrT5Output, PerHead, SelfAttention, relative_buckets

#: Id that a text begins with.
START = 0


@dataclass
class Cache:
    """Keys and values of a batch, block by block, so that a step computes those of its own token only.

    Attributes:
        own: of the tokens so far.
        encoded: of what the encoder kept.
    """

    own: dict[int, tuple[PerHead, PerHead]] = field(default_factory=dict)
    encoded: dict[int, tuple[PerHead, PerHead]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens so far."""
        return self.own[0][0].shape[2] if self.own else 0


class DecoderBlock(nn.Module):
    """Causal self-attention, attention to what is encoded, and feed-forward, each normalised before."""

    def __init__(self, config: MrT5ModelConfig) -> None:
        super().__init__()
        eps = config.layer_norm_epsilon
        self.attention_norm, self.cross_attention_norm, self.feed_forward_norm = (
            nn.RMSNorm(config.d_model, eps=eps) for _ in range(3)
        )
        self.attention, self.cross_attention = SelfAttention(config), SelfAttention(config)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Float[Tensor, "batch queries dim"],
        bias: Float[Tensor, "1 heads queries keys"],
        hidden: Float[Tensor, "batch kept dim"],
        hidden_bias: Float[Tensor, "batch 1 1 kept"],
        cache: Cache,
        index: int,
    ) -> Float[Tensor, "batch queries dim"]:
        """One block, the ``index``-th: its keys and values are in the cache afterwards."""
        normed = self.attention_norm(x)
        own = self.attention.keys_and_values(normed)
        if index in cache.own:
            keys, values = cache.own[index]
            own = torch.cat([keys, own[0]], dim=2), torch.cat([values, own[1]], dim=2)
        cache.own[index] = own
        x = x + self.attention.attend(normed, *own, bias)
        if index not in cache.encoded:
            cache.encoded[index] = self.cross_attention.keys_and_values(hidden)
        x = x + self.cross_attention.attend(self.cross_attention_norm(x), *cache.encoded[index], hidden_bias)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder(nn.Module):
    """Logits of the next byte."""

    def __init__(self, config: MrT5ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.relative_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_decoder_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)
        if not config.tie_word_embeddings:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(
        self,
        ids: Int[Tensor, "batch queries"],
        embedding: nn.Embedding,
        encoded: MrT5Output,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch queries vocabulary"]:
        """Logits of the ids that come behind these.

        Args:
            ids: decoder input, which begins with `START`; behind what is in the ``cache``, if there is one.
            embedding: the encoder's, which the decoder shares.
            encoded: the encoder's output; its bias is added to the scores of every attention to it.
            cache: of the same batch.
        """
        cache = Cache() if cache is None else cache
        x = embedding(ids).to(self.norm.weight.dtype)
        hidden = encoded.hidden.to(x.dtype)
        lowest = torch.finfo(x.dtype).min
        # In full precision, since it is added to what a gate says.
        hidden_bias = encoded.decoder_bias.to(x.dtype).masked_fill(~encoded.attention_mask, lowest)[:, None, None]
        bias = self._own_bias(cache.length, ids.shape[1], ids.device)
        for index, block in enumerate(self.blocks):
            x = block(x, bias, hidden, hidden_bias, cache, index)
        x = self.norm(x)
        if self.config.tie_word_embeddings:
            return F.linear(x * self.config.d_model**-0.5, embedding.weight.to(x.dtype))
        logits: Tensor = self.head(x)
        return logits

    def _own_bias(self, past: int, queries: int, device: torch.device) -> Float[Tensor, "1 heads _ keys"]:
        """The bias of positions, and that of keys which come later."""
        places = torch.arange(past + queries, device=device, dtype=torch.int64)
        distance = places[None] - places[past:, None]
        config = self.config
        buckets = relative_buckets(
            distance, config.relative_attention_num_buckets, config.relative_attention_max_distance, causal=True
        )
        bias = self.relative_bias(buckets).permute(2, 0, 1)[None]
        return bias.masked_fill(distance > 0, torch.finfo(bias.dtype).min)


def shifted(labels: Int[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
    """Decoder input for labels: what comes before each of them. Labels of -100, which count nothing, are read as padding."""
    return F.pad(labels[:, :-1].clamp(min=START), (1, 0), value=START)

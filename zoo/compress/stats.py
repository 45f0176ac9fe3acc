"""Record of what a method did to the last prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stats:
    """Tokens of the last prompt that had an image, row by row of the batch.

    Attributes:
        visual: placeholders, i.e. visual tokens without the method.
        text: other tokens.
        visual_per_layer: visual tokens that each layer of the language model works on, ``[layers][rows]``.
        cache_per_layer: visual and other tokens in each layer's cache after the prompt, ``[layers][rows]``; empty
            without a cache.
        kept: placeholders of a row, counted from 0, whose token reaches the last layer. Where a method of the tower gives an
            image fewer tokens, these take the image's first placeholders; ``sources`` says what they are.
        sources: for every image the patch that each of its tokens stands at when it enters the language model,
            ``view * patches + index``; -1 where there is none (newlines, tokens made from several patches). Empty for
            methods that leave the tower alone.
    """

    visual: list[int]
    text: list[int]
    visual_per_layer: list[list[int]]
    cache_per_layer: list[list[int]]
    kept: list[Tensor]
    sources: list[Tensor] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Share of visual tokens, averaged over layers and rows, that the language model worked on."""
        alive = sum(sum(layer) for layer in self.visual_per_layer) / len(self.visual_per_layer)
        return alive / max(1, sum(self.visual))

    @property
    def final_share(self) -> float:
        """Share of visual tokens that reaches the last layer."""
        return sum(self.visual_per_layer[-1]) / max(1, sum(self.visual))

    def tokens_per_layer(self, row: int = 0) -> list[int]:
        """Visual and other tokens that each layer works on, of one row."""
        return [layer[row] + self.text[row] for layer in self.visual_per_layer]


def prefill_flops(tokens: Sequence[int], config: Any) -> int:
    """Floating-point operations (two per multiply-add) of a Llama-like language model's layers for a prompt.

    Projections, gated feed-forward and attention of ``2 (4 n d^2 + 3 n d m) + 4 n^2 d`` per layer for equal numbers of heads,
    less where heads share keys; the formula of GlobalCom2. Embeddings, norms, softmax and the head are left out.

    Args:
        tokens: that each layer works on.
        config: text configuration of transformers.
    """
    width, hidden = config.hidden_size, config.intermediate_size
    head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
    inner = head_dim * config.num_attention_heads
    shared = head_dim * config.num_key_value_heads
    per_token = 2 * (2 * width * inner + 2 * width * shared + 3 * width * hidden)
    return sum(count * per_token + 4 * count * count * inner for count in tokens)


def row_counts(marks: Tensor) -> list[int]:
    """Marked positions of each row."""
    return [int(count) for count in marks.sum(1).tolist()]


def cpu_long(index: Tensor) -> Tensor:
    """Indices for a report, off the device."""
    return index.detach().to("cpu", torch.long)

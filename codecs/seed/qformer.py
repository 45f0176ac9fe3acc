"""The Q-Former (arXiv 2301.12597, section 3.1) as transformers builds it, and the plain transformer blocks as timm does."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class QFormer(nn.Module):
    """Learned queries that attend to each other in every layer and to a sequence in every second one or so.

    Args:
        dim, depth, heads, mlp_dim, activation, eps: of the transformer.
        context_dim: width of the sequence that is looked at.
        cross_attention_every: layers from one that looks at it to the next; the first one does.
        queries: number of queries.
        causal: let a query see those before it only (arXiv 2307.08041, section 3.1.1).
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        activation: str,
        eps: float,
        *,
        context_dim: int,
        cross_attention_every: int,
        queries: int,
        causal: bool,
    ) -> None:
        super().__init__()
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        config = Blip2QFormerConfig(
            hidden_size=dim,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=mlp_dim,
            hidden_act=activation,
            layer_norm_eps=eps,
            encoder_hidden_size=context_dim,
            cross_attention_frequency=cross_attention_every,
            use_qformer_text_input=False,
        )
        self.queries = nn.Parameter(torch.empty(1, queries, dim).normal_(std=0.02))
        self.network = Blip2QFormerModel(config)
        self.causal = causal

    def forward(self, context: Float[Tensor, "batch tokens context"]) -> Float[Tensor, "batch queries dim"]:
        queries = self.queries.expand(len(context), -1, -1)
        count = queries.shape[1]
        mask = torch.ones(count, count, dtype=torch.bool, device=context.device).tril() if self.causal else None
        summary: Tensor = self.network(
            query_embeds=queries,
            attention_mask=None if mask is None else mask.expand(len(context), 1, -1, -1),
            encoder_hidden_states=context,
        ).last_hidden_state
        return summary


def transformer_blocks(dim: int, depth: int, heads: int, mlp_ratio: float, eps: float) -> nn.Sequential:
    """Blocks of pre-normalised attention and feed-forward layers, all with biases, without a final normalisation."""
    from timm.models.vision_transformer import Block

    norm: Any = partial(nn.LayerNorm, eps=eps)
    return nn.Sequential(*(Block(dim, heads, mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth)))

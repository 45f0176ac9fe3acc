"""Plain vision transformers: timm's pre-norm blocks (arXiv 2010.11929) at any size, and what their checkpoints need."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.nn.linear import own_linear_layers

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]


@dataclass(frozen=True)
class ViTSizes:
    """Sizes of a stack of blocks.

    Attributes:
        dim: width of a token.
        depth: number of blocks.
        heads: attention heads per block; they divide ``dim``.
        hidden: width of the feed-forward layers.
        activation: ``gelu`` is the exact one, ``gelu_tanh`` its approximation by tanh, ``quick_gelu`` ``x * sigmoid(1.702 x)``.
        eps: of the layer norms.
        qkv_bias: whether queries, keys and values have biases; see `fuse_qkv_bias` for checkpoints in which keys have none.
    """

    dim: int
    depth: int
    heads: int
    hidden: int
    activation: Activation = "gelu"
    eps: float = 1e-6
    qkv_bias: bool = True


def vit_blocks(sizes: ViTSizes) -> nn.Sequential:
    """Blocks ``x += attention(norm(x)); x += mlp(norm(x))`` over ``[batch, tokens, dim]``, without a final norm.

    The keys of a block are ``norm1``, ``attn.qkv``, ``attn.proj``, ``norm2``, ``mlp.fc1`` and ``mlp.fc2``; ``attn.qkv`` holds
    queries, keys and values one after the other.

    Raises:
        ValueError: ``heads`` does not divide ``dim``.
    """
    from timm.layers import GELUTanh, QuickGELU
    from timm.models.vision_transformer import Block

    if sizes.dim % sizes.heads:
        raise ValueError(f"{sizes.heads} heads do not divide a width of {sizes.dim}")
    activations = {"gelu": nn.GELU, "gelu_tanh": GELUTanh, "quick_gelu": QuickGELU}
    blocks = nn.Sequential(
        *(
            Block(
                sizes.dim,
                sizes.heads,
                # timm rounds the product down, and half a unit more keeps it from falling below the wanted width.
                mlp_ratio=(sizes.hidden + 0.5) / sizes.dim,
                qkv_bias=sizes.qkv_bias,
                act_layer=activations[sizes.activation],
                norm_layer=partial(nn.LayerNorm, eps=sizes.eps),  # type: ignore[arg-type]  # any callable does
            )
            for _ in range(sizes.depth)
        )
    )
    return own_linear_layers(blocks)


def fuse_qkv_bias(q_bias: Float[Tensor, " dim"], v_bias: Float[Tensor, " dim"]) -> Float[Tensor, " three_dims"]:
    """The bias of ``attn.qkv`` for a checkpoint with biases of queries and values only, as in BEiT and EVA.

    Zero is exact for the keys: their bias adds the same number to all scores of a query, and the softmax takes it out again.
    """
    return torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])

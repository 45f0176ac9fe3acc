"""The transformer block that encoder and decoder share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

_EPS = 1e-6

Sequence = Float[Tensor, "batch length width"]


class Attention(nn.Module):
    """Multi-head attention of a sequence to a context, with normalised queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.o = nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(width // heads, eps=_EPS)
        self.k_norm = nn.RMSNorm(width // heads, eps=_EPS)

    def forward(self, x: Sequence, context: Float[Tensor, "batch keys width"]) -> Sequence:
        q = self._per_head(self.q(x))
        k, v = map(self._per_head, self.kv(context).chunk(2, dim=-1))
        # Autocast brings half precision here, which the norms' own weights need not have.
        q, k = (norm(part.to(norm.weight.dtype)) for norm, part in ((self.q_norm, q), (self.k_norm, k)))
        return self.o(attend(q, k, v).transpose(1, 2).flatten(2))

    def _per_head(self, x: Sequence) -> Float[Tensor, "batch heads length head"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def attend(
    q: Float[Tensor, "batch heads length head"],
    k: Float[Tensor, "batch heads keys head"],
    v: Float[Tensor, "batch heads keys head"],
) -> Float[Tensor, "batch heads length head"]:
    """Scaled dot-product attention."""
    if torch.is_grad_enabled() and q.requires_grad and q.device.type == "cpu":
        # With its backward pass, the fused kernel takes twice the time of plain products on a CPU.
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class FeedForward(nn.Module):
    """Two layers, the inner one four times as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Sequence) -> Sequence:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention of a sequence to itself, or with ``cross`` to a context, and a feed-forward network; norms come first."""

    def __init__(self, width: int, heads: int, cross: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.norm_context = nn.LayerNorm(width, eps=_EPS) if cross else None
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = FeedForward(width)

    def forward(
        self,
        x: Sequence,
        context: Float[Tensor, "batch keys width"] | None = None,
        *,
        kept: int | None = None,
    ) -> Float[Tensor, "batch kept width"]:
        """The sequence after this block; with ``kept`` only its first ``kept`` elements."""
        normed = self.norm1(x)
        if self.norm_context is not None:
            assert context is not None
            x = x + self.attn(normed, self.norm_context(context))
        else:
            x = x[:, :kept] + self.attn(normed[:, :kept], normed)
        return x + self.mlp(self.norm2(x))


def learned(*shape: int) -> nn.Parameter:
    """Learned vectors at the usual start."""
    return nn.Parameter(torch.empty(shape).normal_(std=0.02))

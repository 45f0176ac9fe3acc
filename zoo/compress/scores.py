"""Attention scores of a few rows from queries and keys, so that no map of length x length is made.

All are computed in float32, whatever the model's precision: rankings depend on them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Scores in memory at a time, in numbers.
_CHUNK = 1 << 24


def cls_attention(
    query: Float[Tensor, "crops dim"],
    keys: Float[Tensor, "crops tokens dim"],
    heads: int,
    valid: Bool[Tensor, "crops tokens"] | None = None,
    *,
    reduce: str = "mean",
) -> Float[Tensor, "crops patches"]:
    """Softmax attention of [CLS] to the patches, over heads, in float32.

    Args:
        query: of [CLS], before it is scaled.
        keys: of all tokens, [CLS] first; the softmax runs over it too and the result leaves it out.
        heads: attention heads of the layer.
        valid: keys that take part; all by default.
        reduce: ``"mean"`` or ``"sum"`` over heads.
    """
    crops, tokens, dim = keys.shape
    query = query.float().view(crops, heads, 1, dim // heads)
    keys = keys.float().view(crops, tokens, heads, dim // heads).transpose(1, 2)
    logits = (query @ keys.transpose(2, 3)).squeeze(2) * (dim // heads) ** -0.5
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None], -torch.inf)
    attention = logits.softmax(-1)[..., 1:]
    return attention.sum(1) if reduce == "sum" else attention.mean(1)


def cls_logits(
    query: Float[Tensor, "crops dim"], keys: Float[Tensor, "crops tokens dim"], heads: int
) -> Float[Tensor, "crops patches"]:
    """Scaled products of [CLS] with the patches before the softmax, averaged over heads, in float32.

    The mean over heads of the products per head is the product over the full width, so it costs one matrix and vector.
    """
    dim = query.shape[-1]
    products = torch.einsum("cd,ctd->ct", query.float(), keys[:, 1:].float())
    return products * ((dim // heads) ** -0.5 / heads)


def attention_of_rows(
    query: Float[Tensor, "batch heads rows head_dim"],
    keys: Float[Tensor, "batch kv_heads length head_dim"],
    row_index: Int[Tensor, "batch rows"],
    row_valid: Bool[Tensor, "batch rows"],
    key_valid: Bool[Tensor, "batch length"],
    scale: float,
) -> tuple[Float[Tensor, "batch length"], Float[Tensor, "batch length"]]:
    """Causal softmax attention of some rows, averaged over heads; its sum and its maximum over these rows, per key.

    Args:
        query: rotated queries of the rows; heads are a multiple of the keys' (grouped-query attention).
        keys: rotated keys of the whole sequence.
        row_index: which position each row is; it sees keys up to there.
        row_valid: rows that count.
        key_valid: keys that may be seen.
        scale: of the products.

    Returns:
        Sum and maximum, in float32; 0 where there is no valid row.
    """
    batch, heads, rows, head_dim = query.shape
    kv_heads, length = keys.shape[1:3]
    keys = keys.float()
    total = keys.new_zeros(batch, length)
    highest = keys.new_zeros(batch, length)
    order = torch.arange(length, device=keys.device)
    step = max(1, _CHUNK // max(1, batch * heads * length))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        grouped = query[:, :, part].float().reshape(batch, kv_heads, -1, head_dim)
        logits = (grouped @ keys.transpose(2, 3)).view(batch, heads, -1, length).mul_(scale)
        seen = key_valid[:, None] & (order <= row_index[:, part, None])
        attention = logits.masked_fill_(~seen[:, None], torch.finfo(logits.dtype).min).softmax(-1).mean(1)
        attention.masked_fill_(~(seen & row_valid[:, part, None]), 0)
        total += attention.sum(1)
        highest = torch.maximum(highest, attention.amax(1))
    return total, highest


def top_counts(
    scores: Float[Tensor, "batch length"], counts: Int[Tensor, " batch"], among: Bool[Tensor, "batch length"]
) -> Bool[Tensor, "batch length"]:
    """Marks in each row the ``counts`` highest scores among the marked positions; of equal ones the first."""
    order = scores.masked_fill(~among, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(scores.shape[1], device=scores.device).expand_as(order))
    return (rank < counts[:, None]) & among


def left_padded(
    marked: Bool[Tensor, "batch length"],
) -> tuple[Int[Tensor, "batch kept"], Bool[Tensor, "batch kept"], bool]:
    """Gathers the marked positions of every row to the right, in order.

    Returns:
        Positions to gather (distinct in each row), which of them are marked ones, and whether all are.
    """
    counts = marked.sum(1)
    fewest, most = torch.stack([counts.min(), counts.max()]).tolist()
    order = marked.to(torch.uint8).argsort(dim=1, stable=True)[:, marked.shape[1] - most :]
    return order, marked.gather(1, order), fewest == most


def gather_tokens(
    hidden: Float[Tensor, "batch length dim"], index: Int[Tensor, "batch kept"]
) -> Float[Tensor, "batch kept dim"]:
    """The tokens at ``index``."""
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))


def nearest_cosine(
    tokens: Float[Tensor, "batch tokens dim"], targets: Float[Tensor, "batch targets dim"]
) -> Float[Tensor, "batch tokens targets"]:
    """Cosine of every token with every target, in float32."""
    return F.normalize(tokens.float(), dim=-1) @ F.normalize(targets.float(), dim=-1).transpose(1, 2)

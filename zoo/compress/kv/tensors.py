"""Arithmetic of the policies, on tensors.

Queries have ``heads`` heads, keys and values ``kv_heads``; head h reads number h // (heads / kv_heads).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Queries = Float[Tensor, "batch heads queries head_dim"]
Keys = Float[Tensor, "batch kv_heads length head_dim"]
Scores = Float[Tensor, "batch kv_heads length"]
#: Which entries of the cache, in increasing order.
Kept = Int[Tensor, "batch kv_heads kept"]
#: Which entries each query head reads.
Selected = Int[Tensor, "batch heads selected"]
Visible = Bool[Tensor, "#batch #heads #queries length"]

# Numbers held at a time while the attention of a whole prompt is summed, 256 MB.
_MOST_LOGITS = 1 << 26


def grouped(query: Queries, kv_heads: int) -> Float[Tensor, "batch kv_heads group queries head_dim"]:
    """Query heads beside those that read the same keys."""
    return query.unflatten(1, (kv_heads, -1))


def attention_logits(query: Queries, key: Keys, scaling: float) -> Float[Tensor, "batch heads queries length"]:
    """Scaled products of queries and keys in float32."""
    products = grouped(query.float(), key.shape[1]) @ key.float()[:, :, None].transpose(-1, -2)
    return products.flatten(1, 2) * scaling


def attention_mass(
    query: Queries,
    key: Keys,
    scaling: float,
    visible: Visible | None = None,
    asking: Bool[Tensor, "batch queries"] | None = None,
) -> Float[Tensor, "batch heads length"]:
    """Attention that each key receives from all queries together, by a softmax in float32.

    Args:
        query: of the last tokens.
        key: of all tokens.
        scaling: of their products.
        visible: which keys each query reads; ``None`` for those up to its own.
        asking: which queries count; ``None`` for all. One that sees nothing gives nothing.
    """
    batch, heads, queries, _ = query.shape
    length = key.shape[2]
    total = key.new_zeros(batch, heads, length, dtype=torch.float32)
    count = max(1, _MOST_LOGITS // (batch * heads * length))
    for start in range(0, queries, count):
        rows = slice(start, start + count)
        logits = attention_logits(query[:, :, rows], key, scaling)
        seen = causal_rows(queries, length, rows, key.device) if visible is None else visible[:, :, rows]
        if asking is not None:
            seen = seen & asking[:, None, rows, None]
        total += logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0).sum(2)
    return total


def causal_rows(queries: int, length: int, rows: slice, device: torch.device) -> Bool[Tensor, "rows length"]:
    """Mask of the ``length`` keys that some of the last ``queries`` tokens read in causal order."""
    own = torch.arange(length - queries, length, device=device)[rows]
    return own[:, None] >= torch.arange(length, device=device)


def h2o_scores(
    attention: Float[Tensor, "batch heads length"], kv_heads: int, previous: Float[Tensor, "batch kv_heads old"] | None = None
) -> Scores:
    """Attention received so far, summed over the heads that share an entry.

    Args:
        attention: what each of the entries received in this call, as `attention_mass` gives it.
        kv_heads: heads of the cache.
        previous: scores of the entries from before; they come first.
    """
    scores = attention.float().unflatten(1, (kv_heads, -1)).sum(2)
    if previous is not None:
        scores[..., : previous.shape[-1]] += previous
    return scores


def h2o_kept(scores: Scores, heavy: int, recent: int) -> Kept:
    """The ``heavy`` entries that received most among all but the last ``recent``, and those; equal ones by age."""
    length = scores.shape[-1]
    if length <= heavy + recent:
        return torch.arange(length, device=scores.device).expand(scores.shape).contiguous()
    order = scores[..., : length - recent].argsort(dim=-1, descending=True, stable=True)
    last = torch.arange(length - recent, length, device=scores.device).expand(*scores.shape[:2], recent)
    return torch.cat([order[..., :heavy].sort(dim=-1).values, last], dim=-1)


def gather_entries(
    entries: Float[Tensor, "batch kv_heads length _"], chosen: Int[Tensor, "batch kv_heads chosen"]
) -> Float[Tensor, "batch kv_heads chosen _"]:
    """Some of the keys or values, other ones for each head."""
    return entries.gather(2, chosen[..., None].expand(-1, -1, -1, entries.shape[-1]))


def merged_values(
    keys: Keys, values: Keys, kept: Kept, valid: Bool[Tensor, "batch kv_heads length"]
) -> Float[Tensor, "batch kv_heads kept head_dim"]:
    """Values of the kept entries, each averaged with those of the evicted ones whose keys are most like its own.

    Weights are the norms of the values; keys stay. This is the rule of kvpress' ``MergingPress``, not EMS (arXiv 2412.08521),
    whose formulas are not public.
    """
    batch, kv_heads, length = valid.shape
    gone = torch.ones_like(valid).scatter_(2, kept, False)
    evicted = gone.nonzero()[:, 2].view(batch, kv_heads, length - kept.shape[2])
    weights = values.float().norm(dim=-1) * valid
    own, theirs = weights.gather(2, kept), weights.gather(2, evicted)
    likeness = F.normalize(gather_entries(keys, evicted).float(), dim=-1) @ F.normalize(
        gather_entries(keys, kept).float(), dim=-1
    ).transpose(-1, -2)
    likeness = likeness.masked_fill(~valid.gather(2, kept)[:, :, None], -torch.inf)
    nearest = likeness.argmax(-1)
    kept_values = gather_entries(values, kept)
    total = kept_values.float() * own[..., None]
    total.scatter_add_(
        2,
        nearest[..., None].expand(-1, -1, -1, values.shape[-1]),
        gather_entries(values, evicted).float() * theirs[..., None],
    )
    weight = own.scatter_add(2, nearest, theirs)[..., None]
    return torch.where(weight > 0, total / weight, kept_values.float()).to(values.dtype)


def channel_mass(
    query: Queries, key: Float[Tensor, "batch kv_heads queries head_dim"], real: Bool[Tensor, "batch queries"] | None = None
) -> Float[Tensor, "heads head_dim"]:
    """Sum of ``|q_c k_c|`` over tokens, by channel of each query head; the largest matter most (Double Sparsity).

    Args:
        query, key: of the same tokens, rotated.
        real: which tokens are no padding.
    """
    products = (grouped(query.float(), key.shape[1]) * key.float()[:, :, None]).abs().flatten(1, 2)
    if real is not None:
        products = products * real[:, None, :, None]
    return products.sum(dim=(0, 2))


def channel_order(mass: Float[Tensor, "heads head_dim"]) -> Int[Tensor, "heads head_dim"]:
    """Channels of each query head, those with most mass first."""
    return mass.argsort(dim=-1, descending=True, stable=True)


def fake_quantized(x: Float[Tensor, "*batch channels"], bits: int) -> Float[Tensor, "*batch channels"]:
    """Each vector rounded to ``2^bits`` steps between its smallest and its largest number; unchanged from 16 bits on."""
    if bits >= 16:
        return x
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    steps = 2**bits - 1
    span = torch.where(high > low, high - low, torch.ones_like(low))
    return ((x - low) * steps / span).round().clamp(0, steps) * span / steps + low


def channel_labels(key: Keys, channels: Int[Tensor, "heads channels"]) -> Float[Tensor, "batch heads length channels"]:
    """The important channels of every key, for each of the query heads that read it."""
    heads = len(channels)
    repeated = key.repeat_interleave(heads // key.shape[1], dim=1)
    return repeated.gather(3, channels[None, :, None].expand(len(key), -1, key.shape[2], -1))


def label_scores(
    query: Float[Tensor, "batch heads 1 head_dim"],
    labels: Float[Tensor, "batch heads length channels"],
    channels: Int[Tensor, "heads channels"],
    bits: int = 16,
) -> Float[Tensor, "batch heads length"]:
    """Products of a query and all keys, estimated from their important channels in ``bits`` bits."""
    reduced = query.float().gather(3, channels[None, :, None].expand(len(query), -1, 1, -1))
    estimate = fake_quantized(reduced, bits) @ fake_quantized(labels.float(), bits).transpose(-1, -2)
    return estimate[:, :, 0] / math.sqrt(channels.shape[1])


def top_tokens(
    scores: Float[Tensor, "batch heads length"], count: int, visible: Bool[Tensor, "#batch #heads length"] | None = None
) -> Selected:
    """The ``count`` best tokens of each head in increasing order, ranked in float32; equal ones by age."""
    ranked = scores.float() if visible is None else scores.float().masked_fill(~visible, -torch.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    return order[..., : min(count, scores.shape[-1])].sort(dim=-1).values


def selected_attention(
    query: Float[Tensor, "batch heads 1 head_dim"],
    key: Keys,
    value: Keys,
    selected: Selected,
    scaling: float,
    visible: Bool[Tensor, "#batch #heads length"] | None = None,
) -> Float[Tensor, "batch heads 1 head_dim"]:
    """Exact attention of one query over the tokens that each head has selected; all others have probability 0."""
    group = query.shape[1] // key.shape[1]
    # Selected by query head, stored by key head: the tokens of a group lie side by side for one gather.
    by_entry = selected.unflatten(1, (-1, group)).flatten(2, 3)
    keys, values = (gather_entries(entries, by_entry).unflatten(2, (group, -1)).flatten(1, 2) for entries in (key, value))
    mask = None
    if visible is not None:
        mask = visible.expand(*selected.shape[:2], -1).gather(2, selected)[:, :, None]
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)

"""Fewer tokens of the zoo's own sequences: vectors dropped or merged, and prefixes as short as an error allows.

    vectors = tok.embed(tokens)
    fewer = zoo.compress.shorten(vectors, keep=0.25, lengths=tokens.lengths)
    fewer.vectors, fewer.lengths

    chosen = adaptive_prefix(tok, images, target=0.1)  # an ordered tokenizer, such as FlexTok
    chosen.tokens.lengths  # a length for each image

The methods look at the vectors only, as there is no attention yet. Items of a ragged batch give what they give alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zoo import media
from zoo.errors import InputError, ItemError, naming_item
from zoo.moved import names_of, warn
from zoo.progress import progress_bar
from zoo.tokenizer import Tokenizer, as_items
from zoo.tokens import Tokens

Vectors = Float[Tensor, "batch length dim"]
Lengths = Int[Tensor, " batch"]
RULES = ("merge", "distinct", "uniform", "random", "prefix")


class Compressed(NamedTuple):
    """A batch of shorter sequences.

    Attributes:
        vectors: in their old order; zero where an item has ended.
        lengths: of the items.
        positions: where in the input each stood; -1 where an item has ended. A merged one stands where its target stood.
        sizes: how many tokens each is the mean of; 0 where an item has ended.
    """

    vectors: Float[Tensor, "batch kept dim"]
    lengths: Int[Tensor, " batch"]
    positions: Int[Tensor, "batch kept"]
    sizes: Int[Tensor, "batch kept"]


def shorten(
    vectors: Vectors,
    keep: float | None = None,
    *,
    count: int | None = None,
    method: str = "merge",
    lengths: Lengths | None = None,
    seed: int = 0,
) -> Compressed:
    """Shorten sequences of vectors, to a share of their tokens or to a number of them.

    Args:
        vectors: what `zoo.Tokenizer.embed` gives.
        keep: share of each item's tokens, in (0, 1] as in `zoo.compress.apply`, rounded and at least one token; 1 keeps all.
        count: number of tokens instead. Items that have no more keep all.
        method: ``merge`` averages the most similar neighbours pair by pair (the bipartite matching of ToMe, arXiv 2210.09461);
            ``distinct`` keeps what is least like the item's mean (GlobalCom2's rule without [CLS], arXiv 2501.05179);
            ``uniform`` keeps equal distances, ``random`` chance, ``prefix`` the first, for ordered tokenizers.
        lengths: tokens of each item, ``tokens.lengths``; all of them by default.
        seed: of ``random``; an item is given the same numbers in any batch.

    Raises:
        InputError: not one of ``keep`` and ``count`` is given, it is out of range, the method is unknown, vectors are not
            finite, or an item is empty or longer than the batch.

    >>> vectors = zoo.load("wavtokenizer-tiny").embed(torch.arange(8)[None])
    >>> shorter = zoo.compress.shorten(vectors, keep=0.25)
    >>> list(vectors.shape), list(shorter.vectors.shape), shorter.lengths.tolist()
    ([1, 8, 96], [1, 2, 96], [2])
    >>> zoo.compress.shorten(vectors, count=3).lengths.tolist()
    [3]
    """
    if method not in RULES:
        raise InputError(f"method is one of {', '.join(RULES)}, not {method!r}")
    lengths = _checked_lengths(vectors, lengths)
    kept = kept_lengths(lengths, keep, count)
    if method == "merge":
        return _merge(vectors, lengths, kept)
    inside = torch.arange(vectors.shape[1], device=vectors.device) < lengths[:, None]
    chosen = _chosen(method, vectors, lengths, kept, inside, seed)
    ones = torch.ones_like(lengths)[:, None].expand(inside.shape)
    positions = torch.arange(vectors.shape[1], device=vectors.device).expand(inside.shape)
    return _compacted(chosen, vectors, positions, ones)


def tokens(vectors: Vectors, keep: float, **options: Any) -> Compressed:
    """Former name of `shorten`, where an integer ``keep`` is a number of tokens; it goes with the next release."""
    if isinstance(keep, int):
        warn("zoo.compress.tokens", f"zoo.compress.shorten, where an integer keep is count={keep},")
        return shorten(vectors, count=keep, **options)
    warn("zoo.compress.tokens", "zoo.compress.shorten")
    return shorten(vectors, keep, **options)


def kept_lengths(lengths: Lengths, keep: float | None = None, count: int | None = None) -> Lengths:
    """Number of tokens that each item keeps, by a share or a number of them.

    Raises:
        InputError: neither or both are given, ``keep`` is not in (0, 1], or ``count`` is no positive integer.
    """
    if (keep is None) == (count is None):
        raise InputError("give either keep, a share of the tokens, or count, a number of them")
    if count is not None:
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise InputError(f"count is a number of tokens, at least 1, not {count!r}")
        return lengths.clamp(max=count)
    assert keep is not None
    if not 0 < keep <= 1:
        raise InputError(f"keep is a share of the tokens in (0, 1], not {keep}; count= takes a number of them")
    return (keep * lengths.double()).round().long().clamp(min=1)


def _checked_lengths(vectors: Vectors, lengths: Lengths | None) -> Lengths:
    batch, length, _ = vectors.shape
    if not batch or not length:
        raise InputError("there are no tokens to compress")
    if lengths is None:
        lengths = torch.full((batch,), length, dtype=torch.int64)
    lengths = lengths.to(vectors.device)
    for index, own in enumerate(lengths.tolist()):
        if not 0 < own <= length:
            raise ItemError(f"its length is {own}, of a batch of {length} tokens", index)
    for index, finite in enumerate(vectors.isfinite().flatten(1).all(1).tolist()):
        if not finite:
            raise ItemError("its vectors are not finite", index)
    return lengths


def _chosen(
    method: str,
    vectors: Vectors,
    lengths: Lengths,
    kept: Lengths,
    inside: Bool[Tensor, "batch length"],
    seed: int,
) -> Bool[Tensor, "batch length"]:
    """Which tokens the methods that drop keep."""
    steps = torch.arange(vectors.shape[1], device=vectors.device).expand(inside.shape)
    if method == "prefix":
        return steps < kept[:, None]
    if method == "uniform":
        # The middles of equal parts: token i goes where the number of parts begun before it grows.
        doubled = 2 * steps * kept[:, None] + lengths[:, None]
        begun = doubled // (2 * lengths[:, None])
        following = (doubled + 2 * kept[:, None]) // (2 * lengths[:, None])
        return inside & (following > begun)
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(vectors.shape[1], generator=generator).to(vectors.device).expand(inside.shape)
    else:
        mean = (vectors * inside[..., None]).sum(1, keepdim=True) / lengths[:, None, None]
        scores = -F.cosine_similarity(vectors.float(), mean.float(), dim=-1)
    order = scores.masked_fill(~inside, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1) < kept[:, None]


def _compacted(
    chosen: Bool[Tensor, "batch length"],
    vectors: Vectors,
    positions: Int[Tensor, "batch length"],
    sizes: Int[Tensor, "batch length"],
) -> Compressed:
    """The chosen tokens without the gaps between them."""
    lengths = chosen.sum(1)
    order = chosen.int().argsort(dim=1, descending=True, stable=True)[:, : int(lengths.max())]
    ended = torch.arange(order.shape[1], device=order.device) >= lengths[:, None]
    return Compressed(
        vectors.gather(1, order[..., None].expand(-1, -1, vectors.shape[-1])).masked_fill(ended[..., None], 0),
        lengths,
        positions.gather(1, order).masked_fill(ended, -1),
        sizes.gather(1, order).masked_fill(ended, 0),
    )


def _merge(vectors: Vectors, lengths: Lengths, kept: Lengths) -> Compressed:
    """Rounds of bipartite matching until all are short enough; a round halves an item at most."""
    inside = torch.arange(vectors.shape[1], device=vectors.device) < lengths[:, None]
    positions = torch.arange(vectors.shape[1], device=vectors.device).expand(inside.shape)
    state = _compacted(inside, vectors, positions, inside.long())
    while bool((state.lengths > kept).any()):
        state = _merge_round(state, kept)
    return state


def _merge_round(state: Compressed, kept: Lengths) -> Compressed:
    """Every second token may join the most similar one of the others; the most similar pairs do."""
    vectors, lengths, positions, sizes = state
    if vectors.shape[1] % 2:
        vectors, positions, sizes = F.pad(vectors, (0, 0, 0, 1)), F.pad(positions, (0, 1)), F.pad(sizes, (0, 1))
    (a, b), (a_size, b_size) = ((x[:, ::2], x[:, 1::2]) for x in (vectors, sizes))
    likeness = F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).transpose(1, 2)
    likeness = likeness.masked_fill((a_size == 0)[:, :, None] | (b_size == 0)[:, None], -torch.inf)
    best, target = likeness.max(-1)
    merges = torch.minimum(lengths - kept, lengths // 2).clamp(min=0)
    rank = best.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    joins = rank < merges[:, None]
    moved = a_size * joins
    weight = b_size.scatter_add(1, target, moved)
    total = (b.float() * b_size[..., None]).scatter_add(
        1, target[..., None].expand(-1, -1, b.shape[-1]), a.float() * moved[..., None]
    )
    untouched = (weight == b_size)[..., None]
    merged = torch.where(untouched, b, (total / weight.clamp(min=1)[..., None]).to(b.dtype))
    left = torch.stack([a_size * ~joins, weight], dim=2).flatten(1)
    return _compacted(left > 0, torch.stack([a, merged], dim=2).flatten(1, 2), positions, left)


# ------------------------------------------------------------------------------------------------------ adaptive prefixes


class AdaptivePrefix(NamedTuple):
    """Prefixes as short as an error allows.

    Attributes:
        tokens: of each item as many as it needs.
        errors: of their reconstructions.
        reached: whether the error is within the target; all tokens are kept where it is not.
    """

    tokens: Tokens
    errors: Float[Tensor, " batch"]
    reached: Bool[Tensor, " batch"]


#: How far a reconstruction is from the item it was made of.
Error = Callable[[Any, Any], float]


def adaptive_prefix(
    tokenizer: Tokenizer[Any],
    items: Any,
    target: float,
    *,
    error: Error | None = None,
    encode: Mapping[str, Any] | None = None,
    decode: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> AdaptivePrefix:
    """Encode items and keep of each the shortest prefix whose reconstruction is within an error.

    Found by bisection, with a decoding of the batch per step: the shortest prefix where the error falls with every token, and
    otherwise a prefix within the target all the same.

    Args:
        tokenizer: whose tokens are ordered.
        items: as for its ``encode``.
        target: largest error allowed.
        error: of an item and its reconstruction. By default for images the root of the mean squared difference at the
            tokenizer's own size, of values in [0, 1]: 0.1 is a PSNR of 20 dB.
        encode, decode: options of the tokenizer's methods.
        progress: show a progress bar.

    Raises:
        InputError: prefixes of the tokenizer do not decode, there is no default error for its media, or an item is bad.
    """
    spec = tokenizer.spec
    if not spec.ordered:
        raise InputError(f"prefixes of {spec.name} do not decode: its tokens are not ordered")
    listed = as_items(items, batch_rank=4)
    if error is None:
        if spec.image_size is None:
            raise InputError(f"there is no default error for {spec.modality}: pass error=")
        error, listed = root_mean_square, _as_seen(tokenizer, listed, encode or {})
    whole = tokenizer.encode(listed, **(encode or {}))
    options = decode or {}

    def errors_of(rows: list[int], counts: list[int]) -> list[float]:
        batch = Tokens.cat([whole[row].truncate(count) for row, count in zip(rows, counts, strict=True)])
        decoded = tokenizer.decode(batch, **options)
        return [float(error(listed[row], media)) for row, media in zip(rows, decoded, strict=True)]

    everyone = list(range(len(whole)))
    enough = whole.lengths.tolist()
    found = errors_of(everyone, enough)
    reached = [value <= target for value in found]
    too_few = [0] * len(whole)
    steps = max(enough).bit_length()
    with progress_bar("shorten", steps, progress, unit="step") as advance:
        while rows := [row for row in everyone if reached[row] and enough[row] - too_few[row] > 1]:
            middles = [(enough[row] + too_few[row]) // 2 for row in rows]
            for row, count, value in zip(rows, middles, errors_of(rows, middles), strict=True):
                if value <= target:
                    enough[row], found[row] = count, value
                else:
                    too_few[row] = count
            advance(1)
    chosen = Tokens.cat([whole[row].truncate(count) for row, count in enumerate(enough)])
    return AdaptivePrefix(chosen, torch.tensor(found), torch.tensor(reached))


def root_mean_square(reference: Float[Tensor, "3 height width"], estimate: Float[Tensor, "3 height width"]) -> float:
    """Root of the mean squared difference of two images in [-1, 1], in units of the range; the estimate is clipped to it."""
    difference = (estimate.float().clamp(-1, 1).to(reference.device) - reference) / 2
    return float(difference.square().mean().sqrt())


def _as_seen(tokenizer: Tokenizer[Any], items: list[Any], encode: Mapping[str, Any]) -> list[Tensor]:
    """Images as the tokenizer takes them, so that what cropping removes is no error."""
    size = tokenizer.spec.image_size
    assert size is not None
    options = {name: encode[name] for name in ("fit", "range", "max_pixels") if name in encode}
    seen = []
    for index, item in enumerate(items):
        with naming_item(index):
            seen.append(media.prepare_image(item, size=size, **options).pixels)
    return seen


#: A former name, for one release.
__getattr__ = names_of(__name__, {"METHODS": "zoo.compress.sequence:RULES"})

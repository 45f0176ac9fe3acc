"""Other methods behind the same call, for comparison; each as small as its idea. None of them needs training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zoo.compress.anatomy import Anatomy
from zoo.compress.method import Encoding, Method, Prompt, Reduced, kept_counts
from zoo.compress.scores import cls_attention, gather_tokens, nearest_cosine, top_counts
from zoo.errors import InputError


class _Keeping(Method):
    """A method that does nothing at a share of 1."""

    keep: float

    @property
    def idle(self) -> bool:
        """A share of 1 leaves the model as it is."""
        return self.keep == 1


# ------------------------------------------------------------------------------------------------ in the language model


class FastV(_Keeping):
    """FastV (arXiv 2403.06764): after an early layer only what the prompt's last token looks at goes on, at its own position.

    Args:
        keep: share of visual tokens that goes on; 0.5 by default.
        layer: first layer that works on fewer tokens, the paper's K (2 or 3); the layer before ranks.
    """

    rows = "last"

    def __init__(self, keep: float | None = None, *, layer: int = 2) -> None:
        self.keep, self.layer = 0.5 if keep is None else keep, layer

    def bind(self, anatomy: Anatomy) -> None:
        """Settles the layer.

        Raises:
            InputError: the model has no such layer.
        """
        super().bind(anatomy)
        if not 1 <= self.layer < len(anatomy.layers):
            raise InputError(f"FastV can start at layers 1 to {len(anatomy.layers) - 1}, not {self.layer}")
        self.pruned = (self.layer - 1,)

    def choose(
        self,
        stage: int,
        attention_sum: Float[Tensor, "batch length"],
        attention_max: Float[Tensor, "batch length"],
        prompt: Prompt,
    ) -> Bool[Tensor, "batch length"]:
        """The tokens with the most attention."""
        return top_counts(attention_sum, kept_counts(prompt.placeholders, self.keep), prompt.visual)


class PyramidDrop(_Keeping):
    """PyramidDrop (arXiv 2410.17247): fewer and fewer visual tokens, by the attention of the prompt's last token.

    Survivors are renumbered, as in the original code. A stage's ranking is that of the layer before it.

    Args:
        keep: share that reaches the last layers; 0.125 by default, the paper's. Stages share the way in equal ratios.
        layers: first layers of the stages; by default the paper's 8, 16 and 24 of 32, as fractions of the model's depth.
    """

    rows = "last"
    renumbers = True

    def __init__(self, keep: float | None = None, *, layers: Sequence[int] | None = None) -> None:
        self.keep = 0.125 if keep is None else keep
        self.layers = None if layers is None else tuple(layers)

    def bind(self, anatomy: Anatomy) -> None:
        """Settles the layers.

        Raises:
            InputError: layers that the model does not have.
        """
        super().bind(anatomy)
        depth = len(anatomy.layers)
        layers = self.layers
        if layers is None:
            layers = tuple(sorted({max(1, depth * stage // 4) for stage in (1, 2, 3)} - {depth}))
        if not layers or sorted(set(layers)) != list(layers) or not 1 <= layers[0] <= layers[-1] < depth:
            raise InputError(f"stages must start at ascending layers within 1 to {depth - 1}, not {list(layers)}")
        self.pruned = tuple(layer - 1 for layer in layers)

    def choose(
        self,
        stage: int,
        attention_sum: Float[Tensor, "batch length"],
        attention_max: Float[Tensor, "batch length"],
        prompt: Prompt,
    ) -> Bool[Tensor, "batch length"]:
        """The tokens with the most attention."""
        share = self.keep ** ((stage + 1) / len(self.pruned))
        counts = (prompt.placeholders.double() * share + 1e-9).long().clamp(min=1)
        return top_counts(attention_sum, counts, prompt.visual)


class Random(_Keeping):
    """Tokens chosen by chance, the same ones for the same number of tokens.

    Args:
        keep: share of visual tokens; 0.25 by default.
        seed: of the choice.
    """

    def __init__(self, keep: float | None = None, *, seed: int = 0) -> None:
        self.keep, self.seed = 0.25 if keep is None else keep, seed

    def before(self, prompt: Prompt) -> Bool[Tensor, "batch length"]:
        """The choice depends on a token's number within its row only, so that a batch changes nothing."""
        rank = prompt.visual.cumsum(1) - 1
        generator = torch.Generator().manual_seed(self.seed)
        draws = torch.rand(prompt.visual.shape[1], generator=generator).to(rank.device)
        return top_counts(draws[rank.clamp(min=0)], kept_counts(prompt.placeholders, self.keep), prompt.visual)


class Uniform(_Keeping):
    """Tokens at equal distances along a row's visual tokens.

    Args:
        keep: share of visual tokens; 0.25 by default.
    """

    def __init__(self, keep: float | None = None) -> None:
        self.keep = 0.25 if keep is None else keep

    def before(self, prompt: Prompt) -> Bool[Tensor, "batch length"]:
        """Of n tokens, k stay where ``floor(rank k / n)`` steps up."""
        total = prompt.placeholders[:, None].clamp(min=1)
        kept = kept_counts(prompt.placeholders, self.keep)[:, None]
        after = prompt.visual.cumsum(1)
        return prompt.visual & (after * kept // total > (after - 1) * kept // total)


# ------------------------------------------------------------------------------------------------------- in the tower


class Pool(_Keeping):
    """Averages over the cells of a coarser grid: the strong simple baseline of arXiv 2502.11501.

    Args:
        keep: share of visual tokens; 0.25 by default. The grid is nearly square, with about as many cells.
    """

    needs_tower = True
    reduces = True

    def __init__(self, keep: float | None = None) -> None:
        self.keep = 0.25 if keep is None else keep

    def bind(self, anatomy: Anatomy) -> None:
        """Settles the grids."""
        super().bind(anatomy)
        self.grid = anatomy.grid
        cells = anatomy.patches * self.keep
        rows = max(1, round(cells**0.5))
        self.cells = (rows, min(anatomy.grid[1], max(1, round(cells / rows))))

    def reduce(self, features: Tensor, encoding: Encoding) -> Reduced:
        """Cells in raster order; each stands at its middle."""
        rows, columns = self.grid
        pooled = F.adaptive_avg_pool2d(features.transpose(1, 2).unflatten(2, (rows, columns)), self.cells)
        middles = [
            (2 * torch.arange(count, device=features.device) + 1) * size // (2 * count)
            for count, size in zip(self.cells, self.grid, strict=True)
        ]
        anchor = (middles[0][:, None] * columns + middles[1]).flatten().expand(len(features), -1)
        return Reduced(pooled.flatten(2).transpose(1, 2), None, anchor)


class VisionZip(_Keeping):
    """VisionZip (arXiv 2412.04467): the tokens that [CLS] looks at, [CLS] itself, and a few means of the rest.

    Args:
        keep: share of visual tokens; 64 of 576 by default. 10 of 64 are means, as in the paper.
        dominant: tokens kept, [CLS] among them; overrides ``keep`` together with ``contextual``.
        contextual: means.
    """

    needs_cls = True
    reduces = True

    def __init__(self, keep: float | None = None, *, dominant: int | None = None, contextual: int | None = None) -> None:
        if (dominant is None) != (contextual is None):
            raise InputError("VisionZip takes both dominant and contextual, or neither")
        if dominant is not None and contextual is not None and (dominant < 1 or contextual < 0):
            raise InputError(f"VisionZip needs a dominant token, not {dominant} and {contextual} contextual ones")
        self.keep, self.dominant, self.contextual = 64 / 576 if keep is None else keep, dominant, contextual

    @property
    def idle(self) -> bool:
        """A share of 1 leaves the model as it is."""
        return self.keep == 1 and self.dominant is None

    def bind(self, anatomy: Anatomy) -> None:
        """Settles the numbers of tokens.

        Raises:
            InputError: more tokens than patches.
        """
        super().bind(anatomy)
        total = max(1, round(anatomy.patches * self.keep))
        contextual = round(total * 10 / 64) if self.contextual is None else self.contextual
        self.counts = (total - contextual if self.dominant is None else self.dominant, contextual)
        if sum(self.counts) > anatomy.patches:
            raise InputError(f"{sum(self.counts)} tokens of {anatomy.patches} patches")
        self.heads = anatomy.tower_heads
        # [CLS] has no place in the image
        self.with_cls = not anatomy.views and self.positions != "keep"
        self.watched = self.states = (anatomy.feature_layer,)

    def reduce(self, features: Tensor, encoding: Encoding) -> Reduced:
        """Dominant tokens in raster order, then contextual ones; means stand at the token that they were gathered around."""
        (layer,) = self.watched
        keys = encoding.keys[layer]
        attention = cls_attention(encoding.queries[layer], keys, self.heads, reduce="sum")
        metric = keys[:, 1:].unflatten(2, (self.heads, -1)).mean(2)
        dominant, contextual = self.counts
        kept, rest = split_top(attention, dominant - int(self.with_cls))
        means, around = contextual_tokens(gather_tokens(features, rest), gather_tokens(metric, rest), contextual)
        parts, anchor = [gather_tokens(features, kept), means], torch.cat([kept, rest.gather(1, around)], 1)
        source = anchor
        if self.with_cls:
            parts.insert(0, encoding.hidden[layer][:, :1])
            source = F.pad(anchor, (1, 0), value=-1)
            anchor = F.pad(anchor, (1, 0), value=0)
        return Reduced(torch.cat(parts, 1), None, anchor, source)


def split_top(scores: Float[Tensor, "views tokens"], count: int) -> tuple[Int[Tensor, "views kept"], Int[Tensor, "views rest"]]:
    """The ``count`` highest scores and the rest, both in raster order."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return order[:, :count].sort(dim=1).values, order[:, count:].sort(dim=1).values


def contextual_tokens(
    features: Float[Tensor, "views tokens dim"], metric: Float[Tensor, "views tokens metric_dim"], count: int
) -> tuple[Float[Tensor, "views count dim"], Int[Tensor, "views count"]]:
    """Tokens at equal distances, each with the mean of the other tokens that are most similar to it added.

    Returns:
        The tokens, and which ones they were gathered around.
    """
    views, tokens, _ = features.shape
    targets = torch.arange(0, tokens, max(1, tokens // max(1, count)), device=features.device)[:count]
    others = torch.ones(tokens, dtype=torch.bool, device=features.device)
    others[targets] = False
    if count == 0 or not len(targets) or tokens == len(targets):
        return features[:, targets], targets.expand(views, -1)
    similarity = nearest_cosine(metric[:, others], metric[:, targets])
    assigned = F.one_hot(similarity.argmax(-1), len(targets)).to(features.dtype)
    total = assigned.transpose(1, 2) @ features[:, others]
    mean = total / assigned.sum(1)[..., None].clamp(min=1)
    return features[:, targets] + mean, targets.expand(views, -1)


class PruMerge(_Keeping):
    """In the style of LLaVA-PruMerge (arXiv 2403.15388): tokens that [CLS] looks at, their neighbours added to them.

    Args:
        keep: share of visual tokens; one sums up the rest. By default the number of tokens is that of the outliers
            of the attention (above the third quartile by more than 1.5 interquartile ranges) and one for the rest.
        neighbours: tokens added to each kept one, weighted by the attention that they get.
    """

    needs_cls = True
    reduces = True

    def __init__(self, keep: float | None = None, *, neighbours: int = 32) -> None:
        if neighbours < 0:
            raise InputError(f"the number of neighbours cannot be {neighbours}")
        self.share, self.neighbours = keep, neighbours

    @property
    def idle(self) -> bool:
        """A share of 1 leaves the model as it is."""
        return self.share == 1

    def bind(self, anatomy: Anatomy) -> None:
        """Settles the layer that ranks, the tower's last."""
        super().bind(anatomy)
        self.watched = (len(anatomy.tower_layers) - 1,)

    def reduce(self, features: Tensor, encoding: Encoding) -> Reduced:
        """Kept tokens in raster order, then the sum of the rest, which stands at the best-scored token left out."""
        (layer,) = self.watched
        keys = encoding.keys[layer]
        # one head over the full width, as in the original code
        attention = cls_attention(encoding.queries[layer], keys, 1)
        views, tokens = attention.shape
        if self.share is None:
            counts = outliers(attention).clamp(1, tokens - 1)
        else:
            counts = attention.new_full((views,), max(1, round(tokens * self.share) - 1), dtype=torch.long)
        marks = top_counts(attention, counts, torch.ones_like(attention, dtype=torch.bool))
        merged, rest = neighbour_sums(features, keys[:, 1:], attention, marks, self.neighbours)
        most = int(counts.max())
        order = (~marks).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        valid = marks.gather(1, order)
        first_left_out = attention.masked_fill(marks, -1).argmax(1, keepdim=True)
        if self.share is not None and round(tokens * self.share) < 2:
            return Reduced(gather_tokens(merged, order), valid, order)
        # the sum comes first, so that padding stays on the right
        return Reduced(
            torch.cat([rest[:, None], gather_tokens(merged, order)], 1),
            torch.cat([torch.ones_like(valid[:, :1]), valid], 1),
            torch.cat([first_left_out, order], 1),
            torch.cat([torch.full_like(first_left_out, -1), order], 1),
        )


def outliers(scores: Float[Tensor, "views tokens"]) -> Int[Tensor, " views"]:
    """Number of scores above the third quartile by more than 1.5 interquartile ranges."""
    low, high = torch.quantile(scores, torch.tensor([0.25, 0.75], device=scores.device), dim=1)
    return (scores > (high + 1.5 * (high - low))[:, None]).sum(1)


def neighbour_sums(
    features: Float[Tensor, "views tokens dim"],
    metric: Float[Tensor, "views tokens metric_dim"],
    weights: Float[Tensor, "views tokens"],
    kept: Bool[Tensor, "views tokens"],
    neighbours: int,
) -> tuple[Float[Tensor, "views tokens dim"], Float[Tensor, "views dim"]]:
    """Adds to every token the weighted sum of the tokens nearest to it, itself left out; and sums up the tokens not kept.

    Args:
        features: to add up.
        metric: cosines of these are compared.
        weights: of the tokens.
        kept: tokens that the second sum leaves out.
        neighbours: how many are added.
    """
    similarity = nearest_cosine(metric, metric)
    similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    near = similarity.topk(min(neighbours, features.shape[1] - 1), dim=2).indices
    chosen = torch.zeros_like(similarity).scatter(2, near, 1)
    weights = weights.to(similarity.dtype)
    sums = (chosen * weights[:, None]) @ features.to(similarity.dtype)
    rest = (weights.masked_fill(kept, 0)[:, None] @ features.to(similarity.dtype)).squeeze(1)
    return features + sums.to(features.dtype), rest.to(features.dtype)


class ToMe(_Keeping):
    """Token merging (arXiv 2210.09461): after every layer of the tower the most similar pairs of tokens become one.

    Pairs merge after a layer and not between its attention and its feed-forward part, which modules of transformers don't part.

    Args:
        keep: share of visual tokens that the tower ends with; 0.25 by default. Every layer merges equally many; where these are
            more than half of what is left it merges in rounds.
        proportional: keys count by the number of patches that they stand for (needs eager or SDPA attention in the tower).
    """

    needs_cls = True
    reduces = True

    def __init__(self, keep: float | None = None, *, proportional: bool = True) -> None:
        self.keep, self.proportional = 0.25 if keep is None else keep, proportional

    def bind(self, anatomy: Anatomy) -> None:
        """Settles how many tokens each layer leaves.

        Raises:
            InputError: attention that takes no bias.
        """
        super().bind(anatomy)
        attention = anatomy.tower.config._attn_implementation
        if self.proportional and attention not in ("eager", "sdpa"):
            raise InputError(f"{attention} attention takes no bias: use proportional=False")
        layers = anatomy.feature_layer + 1
        self.merged = self.watched = tuple(range(layers))
        self.heads = anatomy.tower_heads
        final = max(1, round(anatomy.patches * self.keep))
        gone = anatomy.patches - final
        self.targets = [anatomy.patches - gone * (layer + 1) // layers for layer in range(layers)]

    def merge(self, layer: int, hidden: Tensor, encoding: Encoding) -> Tensor:
        """Merges pairs until the layer's number of tokens is reached."""
        views, tokens = hidden.shape[:2]
        patches = hidden[:, 1:]
        metric = encoding.keys.pop(layer)[:, 1:].unflatten(2, (self.heads, -1)).mean(2)
        anchor, size = encoding.anchor, encoding.size
        if anchor is None or size is None:
            anchor = torch.arange(tokens - 1, device=hidden.device).expand(views, -1)
            size = torch.ones(views, tokens - 1, device=hidden.device)
        while patches.shape[1] > self.targets[layer]:
            count = min(patches.shape[1] - self.targets[layer], patches.shape[1] // 2)
            order, kept = merge_pairs(metric, count)
            patches, metric = (_mean_into(part, size, order, kept) for part in (patches, metric))
            size, anchor = _sum_into(size, order, kept), anchor.gather(1, kept)
        encoding.anchor, encoding.size = anchor, size
        if self.proportional:
            encoding.bias = F.pad(size.log(), (1, 0))
        return torch.cat([hidden[:, :1], patches], 1)

    def reduce(self, features: Tensor, encoding: Encoding) -> Reduced:
        """Features are short already."""
        assert encoding.anchor is not None
        return Reduced(features, None, encoding.anchor)


def merge_pairs(
    metric: Float[Tensor, "views tokens dim"], count: int
) -> tuple[Int[Tensor, "views tokens"], Int[Tensor, "views kept"]]:
    """Bipartite matching: each even token points to the odd one most similar to it, and the best ``count`` pairs merge.

    Returns:
        For every token the place among the kept ones that it goes to, and the kept ones in raster order.
    """
    views, tokens = metric.shape[:2]
    best, partner = nearest_cosine(metric[:, ::2], metric[:, 1::2]).max(2)
    gone = best.argsort(dim=1, descending=True, stable=True)[:, :count]
    leaves = torch.zeros(views, tokens, dtype=torch.bool, device=metric.device).scatter(1, 2 * gone, True)
    place = (~leaves).cumsum(1) - 1
    receiver = place.gather(1, 2 * partner.gather(1, gone) + 1)
    return place.scatter(1, 2 * gone, receiver), leaves.to(torch.uint8).argsort(dim=1, stable=True)[:, : tokens - count]


def _sum_into(values: Tensor, place: Tensor, kept: Tensor) -> Tensor:
    return torch.zeros_like(values[:, : kept.shape[1]]).scatter_add(1, place, values)


def _mean_into(tokens: Tensor, size: Tensor, place: Tensor, kept: Tensor) -> Tensor:
    """Means of merged tokens, weighted by the patches that each stands for."""
    weighted = tokens.float() * size[..., None]
    index = place[..., None].expand_as(weighted)
    total = torch.zeros_like(weighted[:, : kept.shape[1]]).scatter_add(1, index, weighted)
    return (total / _sum_into(size, place, kept)[..., None]).to(tokens.dtype)

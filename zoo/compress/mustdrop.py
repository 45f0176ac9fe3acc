"""MustDrop (arXiv 2411.10803): tokens go in the vision tower, while the prompt is read, and from the cache.

Functions on tensors first, then `MustDrop`, which `zoo.compress.apply` puts into a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zoo.compress.anatomy import Anatomy
from zoo.compress.method import Compat, Encoding, Method, Prompt, Reduced, kept_counts
from zoo.compress.scores import cls_attention, gather_tokens, top_counts
from zoo.errors import InputError

GridSize = tuple[int, int]

# Layers of a 32-layer model after which the original code prunes.
_OFFICIAL_LAYERS, _OFFICIAL_DEPTH = (2, 6, 10, 14), 32


class MergedWindows(NamedTuple):
    """Result of `merge_windows` for a batch; shorter rows are padded on the right.

    Attributes:
        hidden: [CLS], the merged windows from the most uniform on, the untouched tokens in raster order.
        valid: true for tokens, false for padding.
        size: how many tokens each one stands for, 0 for padding.
        anchor: grid index that each one but [CLS] stands at, -1 for padding; a merged window stands at its last token.
        num_merged: windows merged per item.
        dst_idx: last token of each merged window, -1 for padding.
        src_idx: the other tokens of the merged windows, window after window, -1 for padding.
        unm_idx: untouched tokens, -1 for padding.
    """

    hidden: Float[Tensor, "batch kept dim"]
    valid: Bool[Tensor, "batch kept"]
    size: Int[Tensor, "batch kept"]
    anchor: Int[Tensor, "batch patches_kept"]
    num_merged: Int[Tensor, " batch"]
    dst_idx: Int[Tensor, "batch merged"]
    src_idx: Int[Tensor, "batch sources"]
    unm_idx: Int[Tensor, "batch untouched"]


def check_windows(grid: GridSize, window: GridSize) -> None:
    """Raises `InputError` unless windows of ``window`` (rows, columns) tile a grid of ``grid``."""
    if min(window) < 1 or window[0] * window[1] < 2:
        raise InputError(f"a window of {window[0]} x {window[1]} tokens holds nothing to merge")
    if grid[0] % window[0] or grid[1] % window[1]:
        raise InputError(f"windows of {window[0]} x {window[1]} tokens do not tile a grid of {grid[0]} x {grid[1]}")


def _windows(grid: GridSize, window: GridSize, device: torch.device) -> Int[Tensor, "windows members"]:
    """Grid indices of every window's tokens, windows and tokens row-major."""
    (height, width), (rows, columns) = grid, window
    index = torch.arange(height * width, device=device)
    index = index.view(height // rows, rows, width // columns, columns)
    return index.transpose(1, 2).reshape(-1, rows * columns)


def window_similarity(
    patches: Float[Tensor, "batch patches dim"], grid: GridSize, window: GridSize = (3, 3)
) -> Float[Tensor, "batch windows"]:
    """Mean cosine over the ordered pairs of different tokens of each window, in float32.

    With unit vectors ``x`` it is ``(|sum x|^2 - P) / (P (P - 1))``, so no product of pairs is formed.

    Raises:
        InputError: windows that don't tile the grid.
    """
    check_windows(grid, window)
    members = window[0] * window[1]
    unit = F.normalize(patches.float(), dim=-1, eps=1e-8)
    total = unit[:, _windows(grid, window, patches.device)].sum(2)
    return (total.square().sum(-1) - members) / (members * (members - 1))


def merge_windows(
    hidden: Float[Tensor, "batch tokens dim"],
    grid: GridSize,
    *,
    window: GridSize = (3, 3),
    threshold: float = 0.8,
    shared: bool = False,
) -> MergedWindows:
    """Replaces windows of near-identical tokens by their mean.

    Args:
        hidden: output of a layer of the tower, [CLS] first.
        grid: rows and columns of the patches.
        window: rows and columns of a window.
        threshold: least mean cosine of a merged window, in [-1, 1].
        shared: every item merges as many windows as the one with the fewest, as the original code does to keep the batch
            rectangular. Otherwise an item merges what it would alone.

    Raises:
        InputError: windows that don't tile the grid, or a grid that isn't the tokens'.
    """
    batch, tokens, _ = hidden.shape
    patches = tokens - 1
    if grid[0] * grid[1] != patches:
        raise InputError(f"{patches} tokens do not fill a grid of {grid[0]} x {grid[1]}")
    cls, rest = hidden[:, :1], hidden[:, 1:]
    similarity = window_similarity(rest, grid, window)
    members = _windows(grid, window, hidden.device)
    windows, size = members.shape
    counts = (similarity >= threshold).sum(1)
    if shared:
        counts = counts.min().expand(batch)
    fewest, most = torch.stack([counts.min(), counts.max()]).tolist()

    order = similarity.argsort(dim=1, descending=True, stable=True)
    chosen = torch.arange(windows, device=hidden.device) < counts[:, None]
    merged_window = torch.zeros_like(chosen).scatter(1, order, chosen)
    window_of = torch.empty(patches, dtype=torch.long, device=hidden.device)
    window_of[members.flatten()] = torch.arange(windows, device=hidden.device).repeat_interleave(size)
    touched = merged_window[:, window_of]
    untouched = touched.to(torch.uint8).argsort(dim=1, stable=True)

    # One gather from [window means, patches]: first the merged windows of an item, then its untouched tokens.
    means = rest[:, members].float().mean(2).to(hidden.dtype)
    kept = patches - fewest * (size - 1)
    place = torch.arange(kept, device=hidden.device).expand(batch, kept)
    first_untouched = place - counts[:, None]
    is_window = first_untouched < 0
    from_window = order.gather(1, place.clamp(max=windows - 1))
    from_patch = untouched.gather(1, first_untouched.clamp(0, patches - 1))
    source = torch.where(is_window, from_window, windows + from_patch)
    valid = place < (patches - counts * (size - 1))[:, None]
    out = gather_tokens(torch.cat([means, rest], 1), source)

    anchor = torch.where(is_window, members[:, -1][from_window], from_patch).masked_fill(~valid, -1)
    sizes = torch.where(is_window, size, 1).masked_fill(~valid, 0)
    padding = ~chosen[:, :most]
    left = torch.arange(patches - fewest * size, device=hidden.device) < (patches - counts * size)[:, None]
    ones = torch.ones_like(valid[:, :1])
    return MergedWindows(
        torch.cat([cls, out], 1),
        torch.cat([ones, valid], 1),
        torch.cat([ones.long(), sizes], 1),
        anchor,
        counts,
        members[order[:, :most], -1].masked_fill(padding, -1),
        members[order[:, :most], :-1].masked_fill(padding[..., None], -1).flatten(1),
        untouched[:, : left.shape[1]].masked_fill(~left, -1),
    )


def key_counts(tokens: Int[Tensor, " crops"], ratio: float) -> Int[Tensor, " crops"]:
    """Size of the key set for each number of tokens of a crop: the ratio of them, rounded up."""
    return (tokens.double() * ratio).ceil().long()


def key_set(attention: Float[Tensor, "crops tokens"], ratio: float = 0.08) -> Int[Tensor, " keys"]:
    """Tokens that [CLS] looks at most, crop by crop from the most on; those of crop ``c`` are offset by ``c * tokens``.

    Args:
        attention: of [CLS] in the last layer of the tower, see `zoo.compress.scores.cls_attention`.
        ratio: share of the tokens, rounded up.
    """
    crops, tokens = attention.shape
    top = attention.topk(math.ceil(ratio * tokens), dim=1).indices
    return (top + torch.arange(crops, device=top.device)[:, None] * tokens).flatten()


def text_attention(
    attention: Float[Tensor, "batch heads length length"], visual_start: int, visual: int, text: int
) -> tuple[Float[Tensor, "batch visual"], Float[Tensor, "batch visual"]]:
    """Sum and maximum over the last ``text`` rows of the attention, averaged over heads, to ``visual`` tokens.

    For attention maps that exist; inside a model `zoo.compress.scores.attention_of_rows` makes only these rows.
    """
    rows = attention[:, :, -text:, visual_start : visual_start + visual].mean(1)
    return rows.sum(1), rows.amax(1)


def text_filter(
    attention_sum: Float[Tensor, "batch visual"],
    attention_max: Float[Tensor, "batch visual"],
    *,
    global_thr: float,
    individual_thr: float,
) -> Bool[Tensor, "batch visual"]:
    """Marks the tokens that stay: a token goes if both its share of the sum and its maximum are below their thresholds.

    Args:
        attention_sum: attention that a token gets from the text after the image, summed; 0 for tokens that don't count.
        attention_max: the same, at most.
        global_thr: share of the total sum below which a token may go.
        individual_thr: maximum below which a token may go.
    """
    small = attention_sum < global_thr * attention_sum.sum(1, keepdim=True)
    return ~(small & (attention_max < individual_thr))


def unite(keep: Bool[Tensor, " visual"], keys: Int[Tensor, " keys"]) -> tuple[Int[Tensor, " kept"], Int[Tensor, " keys"]]:
    """Sorted union of what stays with the key set, and the key set as sorted positions within that union."""
    keep = keep.clone()
    keep[keys] = True
    return keep.nonzero()[:, 0], (keep.cumsum(0) - 1)[keys].sort().values


def eviction_indices(kept: Sequence[Int[Tensor, "*batch _"]]) -> list[Int[Tensor, "*batch last"]]:
    """Indices that the caches keep of the layers up to each pruning, so that all end with the tokens of the last one.

    Args:
        kept: at each pruning, what it kept as positions in the sequence before it.

    Returns:
        For each pruning, positions in the sequence before it.
    """
    composed = [kept[-1]]
    for index in reversed(kept[:-1]):
        composed.append(index.gather(-1, composed[-1]))
    return composed[::-1]


class MustDrop(Method):
    """All three stages in a model.

    Without ``keep`` thresholds decide, as in the original code, and the number of tokens is an outcome. With ``keep`` each
    pruned layer keeps the tokens with the highest sums, the key set first, in equal ratios from layer to layer.

    Args:
        keep: share of visual tokens to keep: of those that reach the last layer, or on average over layers, see ``budget``.
        compat: ``"official"`` reproduces the original code: all images of a batch merge as many windows as the one with the
            fewest, survivors are renumbered after each pruning, and the views of a LLaVA-NeXT image follow each other flat.
        merge: whether windows are merged in the tower.
        merge_layer: tower layer after which they are.
        merge_threshold: least mean cosine of a merged window.
        merge_window: rows and columns of a window.
        key_ratio: share of the tokens that are never dropped by thresholds.
        key_layer: tower layer whose attention of [CLS] chooses them.
        pruning_layers: language model layers after which tokens go; the original's (2, 6, 10, 14) of 32, or the same
            fractions of a model with fewer than 15 layers.
        global_thr: see `text_filter`; the defaults of both are the original's for 192 of 576 tokens on average.
        individual_thr: likewise.
        budget: what ``keep`` is a share of: ``"final"`` or ``"average"``.
    """

    needs_cls = True
    reduces = True
    rows = "text"
    evicts = True

    def __init__(
        self,
        keep: float | None = None,
        *,
        compat: Compat | None = None,
        merge: bool = True,
        merge_layer: int = 0,
        merge_threshold: float = 0.8,
        merge_window: GridSize = (3, 3),
        key_ratio: float = 0.08,
        key_layer: int = -1,
        pruning_layers: Sequence[int] | None = None,
        global_thr: float = 0.001,
        individual_thr: float = 0.001,
        budget: Literal["final", "average"] = "final",
    ) -> None:
        self.keep, self.compat, self.budget = keep, compat, budget
        self.merging, self.merge_layer, self.merge_threshold, self.merge_window = (
            merge,
            merge_layer,
            merge_threshold,
            merge_window,
        )
        self.key_ratio, self.key_layer = key_ratio, key_layer
        self.pruning_layers = None if pruning_layers is None else tuple(pruning_layers)
        self.global_thr, self.individual_thr = global_thr, individual_thr
        self.renumbers = compat == "official"

    @property
    def idle(self) -> bool:
        """A share of 1 leaves the model as it is."""
        return self.keep == 1

    def bind(self, anatomy: Anatomy) -> None:
        """Settles layers and budgets.

        Raises:
            InputError: windows that don't tile the grid, layers that don't exist, or an average that cannot be reached.
        """
        super().bind(anatomy)
        depth, tower_depth = len(anatomy.layers), len(anatomy.tower_layers)
        check_windows(anatomy.grid, self.merge_window)
        if not 0 <= self.merge_layer < anatomy.feature_layer:
            raise InputError(
                f"windows can be merged after tower layers 0 to {anatomy.feature_layer - 1}, not {self.merge_layer}"
            )
        if not -tower_depth <= self.key_layer < tower_depth:
            raise InputError(f"no tower layer {self.key_layer} among {tower_depth}")
        layers = self.pruning_layers
        if layers is None:
            layers = (
                _OFFICIAL_LAYERS
                if depth > max(_OFFICIAL_LAYERS)
                else tuple(sorted({layer * depth // _OFFICIAL_DEPTH for layer in _OFFICIAL_LAYERS}))
            )
        if not layers or sorted(set(layers)) != list(layers) or not 0 <= layers[0] <= layers[-1] < depth:
            raise InputError(f"layers to prune must be ascending and within 0 to {depth - 1}, not {list(layers)}")
        self.grid, self.heads, self.pruned = anatomy.grid, anatomy.tower_heads, layers
        self.watched = (self.key_layer % tower_depth,)
        self.merged = (self.merge_layer,) if self.merging else ()
        self.packs = anatomy.views and self.compat == "official"
        if self.keep is not None:
            self.shares = stage_shares(self.keep, layers, depth, self.budget)

    def merge(self, layer: int, hidden: Tensor, encoding: Encoding) -> Tensor:
        """Stage one: uniform windows become a token each."""
        merged = merge_windows(
            hidden,
            self.grid,
            window=self.merge_window,
            threshold=self.merge_threshold,
            shared=self.compat == "official",
        )
        encoding.anchor = merged.anchor
        if not bool(merged.valid.all()):
            encoding.valid = merged.valid
        return merged.hidden

    def reduce(self, features: Tensor, encoding: Encoding) -> Reduced:
        """Marks the key set; features are short already."""
        (layer,) = self.watched
        attention = cls_attention(encoding.queries[layer], encoding.keys[layer], self.heads, encoding.valid)
        valid = torch.ones_like(attention, dtype=torch.bool) if encoding.valid is None else encoding.valid[:, 1:]
        anchor = encoding.anchor
        if anchor is None:
            anchor = torch.arange(features.shape[1], device=features.device).expand(features.shape[:2])
        protected = top_counts(attention, key_counts(valid.sum(1), self.key_ratio), valid)
        return Reduced(features, valid, anchor, protected=protected)

    def pack(
        self, features: list[Tensor], sizes: list[tuple[int, int]], newline: Tensor | None, encoding: Encoding
    ) -> list[Tensor]:
        """The original's layout of views: one after another, without newlines, padding included."""
        counts = [len(views) for views in features]
        present = cast(Tensor, encoding.present).split(counts)
        sources, protected = torch.stack(encoding.sources).split(counts), torch.stack(encoding.protected).split(counts)
        encoding.sources = [part[mark] for part, mark in zip(sources, present, strict=True)]
        encoding.protected = [part[mark] for part, mark in zip(protected, present, strict=True)]
        return [views[mark] for views, mark in zip(features, present, strict=True)]

    def choose(
        self,
        stage: int,
        attention_sum: Float[Tensor, "batch length"],
        attention_max: Float[Tensor, "batch length"],
        prompt: Prompt,
    ) -> Bool[Tensor, "batch length"]:
        """Stage two: what the text does not look at goes."""
        attention_sum = attention_sum.masked_fill(~prompt.visual, 0)
        if self.keep is None:
            keep = text_filter(attention_sum, attention_max, global_thr=self.global_thr, individual_thr=self.individual_thr)
            return keep | prompt.protected
        # shares of a row's attention are below 1, so that the key set comes before everything else
        scores = attention_sum / attention_sum.sum(1, keepdim=True).clamp(min=1e-12) + prompt.protected
        return top_counts(scores, kept_counts(prompt.placeholders, self.shares[stage]), prompt.visual)


def stage_shares(keep: float, layers: Sequence[int], depth: int, budget: Literal["final", "average"]) -> list[float]:
    """Shares of visual tokens that stay after each pruned layer, each the same fraction of the one before.

    Args:
        keep: share to reach.
        layers: after which tokens go.
        depth: layers of the model.
        budget: whether ``keep`` is the last of the shares or their average over layers, with 1 before the first.

    Raises:
        InputError: an average below what the layers before the first pruning cost.
    """
    stages = len(layers)
    spans = [end - start for start, end in zip((-1, *layers), (*layers, depth - 1), strict=True)]

    def shares(final: float) -> list[float]:
        return [final ** (stage / stages) for stage in range(1, stages + 1)]

    def average(final: float) -> float:
        return sum(span * share for span, share in zip(spans, [1.0, *shares(final)], strict=True)) / depth

    if budget == "final":
        return shares(keep)
    if keep <= average(0.0):
        raise InputError(
            f"layers up to {layers[0]} of {depth} see all visual tokens, so that their average share is above "
            f"{average(0.0):.3f}; prune earlier layers (pruning_layers) to go below"
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if average(middle) < keep else (low, middle)
    return shares(high)

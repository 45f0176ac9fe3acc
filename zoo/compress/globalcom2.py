"""GlobalCom2 (arXiv 2501.05179): the thumbnail of a LLaVA-NeXT image commands how its crops are shortened.

Functions on one image's tensors first, then `GlobalCom2`, which `zoo.compress.apply` puts into a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zoo.compress.anatomy import Anatomy
from zoo.compress.method import Compat, Encoding, Method, Reduced
from zoo.compress.scores import cls_attention, cls_logits, gather_tokens
from zoo.errors import InputError

GridSize = tuple[int, int]
Rectangle = tuple[int, int, int, int]
Rounding = Literal["llava", "transformers"]
Newline = Literal["valid", "all", "nonempty", "none"]
Placement = Literal["true", "compat"]
Order = Literal["score", "raster"]


class CropSelection(NamedTuple):
    """Selection of the tokens of the crops that stay.

    Attributes:
        keep: marks them on the grids of the crops.
        scores: what they were ranked by; -inf outside the image.
        counts: how many stay of each crop.
    """

    keep: Bool[Tensor, "crops tokens"]
    scores: Float[Tensor, "crops tokens"]
    counts: Int[Tensor, " crops"]


def best_of_thumbnail(
    scores: Float[Tensor, "*views tokens"], ratio: float, order: Order = "score"
) -> Int[Tensor, "*views kept"]:
    """The best-scored tokens of a thumbnail, ``int(tokens * ratio)`` of them.

    Args:
        scores: of [CLS] for each token.
        ratio: share of tokens to keep.
        order: ``"score"`` from the best on, or ``"raster"``.
    """
    best = scores.topk(int(scores.shape[-1] * ratio), dim=-1).indices
    return best.sort(dim=-1).values if order == "raster" else best


def retention_scales(
    thumbnail: Float[Tensor, " tokens"], grid: GridSize, ratio: float, *, temperature: float = 10.0
) -> Float[Tensor, " crops"]:
    """Share of its tokens that each crop keeps, from the thumbnail's scores in the crop's cell (section 3.2), float64.

    Args:
        thumbnail: scores on a square grid.
        grid: rows and columns of crops. Rows and columns of the thumbnail left over by a division belong to the last cells.
        ratio: share of tokens to keep on average, in (0, 1].
        temperature: of the softmax over crops.
    """
    side = _side(thumbnail.shape[0])
    rows, columns = grid
    index = torch.arange(side, device=thumbnail.device)
    row = (index // max(1, side // rows)).clamp(max=rows - 1)
    column = (index // max(1, side // columns)).clamp(max=columns - 1)
    cell = (row[:, None] * columns + column).flatten()
    total = torch.zeros(rows * columns, dtype=torch.float64, device=thumbnail.device)
    total = total.index_add(0, cell, thumbnail.double())
    weight = ((total - total.max()) / temperature).exp()
    share = weight / (weight.sum() + 1e-8)
    return (ratio * (1 + share - share.mean())).clamp(max=1.0)


def valid_rectangle(image_size: GridSize, canvas: GridSize, rounding: Rounding = "transformers") -> Rectangle:
    """Top, bottom, left and right of the image on a canvas of tokens, where padding has been left around it.

    Args:
        image_size: height and width in pixels.
        canvas: rows and columns of tokens.
        rounding: ``"llava"`` truncates the product as the original code does; ``"transformers"`` rounds it to 7 decimals
            first, so that an integer is not missed by a rounding error.
    """
    height, width = image_size
    rows, columns = canvas
    if width / height > columns / rows:
        size = height * (columns / width)
        padding = (rows - int(size if rounding == "llava" else round(size, 7))) // 2
        return padding, rows - padding, 0, columns
    size = width * (rows / height)
    padding = (columns - int(size if rounding == "llava" else round(size, 7))) // 2
    return 0, rows, padding, columns - padding


def global_scores(thumbnail: Float[Tensor, " tokens"], canvas: GridSize, valid: Rectangle) -> Float[Tensor, "rows columns"]:
    """The thumbnail's scores, resized bilinearly to the valid rectangle of the canvas and 0 around it."""
    side = _side(thumbnail.shape[0])
    top, bottom, left, right = valid
    resized = F.interpolate(
        thumbnail.view(1, 1, side, side), size=(bottom - top, right - left), mode="bilinear", align_corners=False
    )
    return F.pad(resized[0, 0], (left, canvas[1] - right, top, canvas[0] - bottom))


def to_crops(canvas: Tensor, grid: GridSize) -> Tensor:
    """Cuts ``[rows, columns, ...]`` into crops ``[crops, tokens, ...]``, both row-major."""
    rows, columns = canvas.shape[0] // grid[0], canvas.shape[1] // grid[1]
    parts = canvas.reshape(grid[0], rows, grid[1], columns, *canvas.shape[2:])
    return parts.transpose(1, 2).reshape(grid[0] * grid[1], rows * columns, *canvas.shape[2:])


def to_canvas(crops: Tensor, grid: GridSize) -> Tensor:
    """Lays crops ``[crops, tokens, ...]`` of square grids out on ``[rows, columns, ...]``."""
    side = _side(crops.shape[1])
    parts = crops.reshape(grid[0], grid[1], side, side, *crops.shape[2:]).transpose(1, 2)
    return parts.reshape(grid[0] * side, grid[1] * side, *crops.shape[2:])


def valid_tokens(canvas: GridSize, grid: GridSize, valid: Rectangle, device: torch.device) -> Bool[Tensor, "crops tokens"]:
    """Marks the tokens of the crops that show the image and not its padding."""
    top, bottom, left, right = valid
    marks = torch.zeros(canvas, dtype=torch.bool, device=device)
    marks[top:bottom, left:right] = True
    return to_crops(marks, grid)


def select_crop_tokens(
    local: Float[Tensor, "crops tokens"],
    commanded: Float[Tensor, "crops tokens"],
    valid: Bool[Tensor, "crops tokens"],
    scales: Float[Tensor, " crops"],
) -> CropSelection:
    """Keeps in each crop the tokens with the highest sum of its own and the thumbnail's scores (section 3.3).

    Args:
        local: scores of the crop's own [CLS].
        commanded: the thumbnail's scores at the same places, see `global_scores`.
        valid: tokens that show the image; both scores are divided by their norm over these.
        scales: share of the valid tokens to keep, see `retention_scales`.
    """
    local = F.normalize(local.masked_fill(~valid, 0), dim=1)
    commanded = F.normalize(commanded.masked_fill(~valid, 0), dim=1)
    scores = (local + commanded).masked_fill(~valid, -torch.inf)
    counts = (valid.sum(1).double() * scales).long()
    order = scores.argsort(dim=1, descending=True, stable=True)
    chosen = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
    return CropSelection(torch.zeros_like(valid).scatter(1, order, chosen), scores, counts)


def official_placement(
    keep: Bool[Tensor, "crops tokens"], valid: Bool[Tensor, "crops tokens"]
) -> tuple[Bool[Tensor, "crops tokens"], Int[Tensor, "crops tokens"]]:
    """Place the kept tokens as the original code does: at the index among the valid ones, read as an index of the whole crop.

    Returns:
        Marks at the places used, and for every place of a crop the token that it shows.
    """
    by_validity = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
    return keep.gather(1, by_validity), by_validity


def _side(tokens: int) -> int:
    side = round(tokens**0.5)
    if side * side != tokens:
        raise InputError(f"{tokens} tokens do not tile a square grid")
    return side


def unlikeness(patches: Float[Tensor, "views tokens dim"]) -> Float[Tensor, "views tokens"]:
    """Scores for towers without [CLS]: the negative cosine of each patch with the mean of its view, in float32."""
    patches = patches.float()
    return -F.cosine_similarity(patches, patches.mean(1, keepdim=True), dim=-1)


def _check_canvases(canvases: Sequence[Sequence[int]], tile: int) -> None:
    for height, width in canvases:
        if height % tile or width % tile:
            raise InputError(f"crops of {tile} x {tile} pixels do not tile a canvas of {height} x {width}")


class Packed(NamedTuple):
    """An image's tokens as the language model gets them.

    Attributes:
        features: thumbnail, then crops row by row with newlines.
        source: which token of ``[thumbnail, crops]`` each is, as ``crop * tokens + index``; -1 for newlines.
        thumbnail: kept tokens of the thumbnail, in their order.
        selection: what is kept of the crops.
        scales: share kept of each crop.
    """

    features: Float[Tensor, "kept dim"]
    source: Int[Tensor, " kept"]
    thumbnail: Int[Tensor, " thumbnail"]
    selection: CropSelection
    scales: Float[Tensor, " crops"]


def compress_image(
    features: Float[Tensor, "views tokens dim"],
    scores: Float[Tensor, "views tokens"],
    newline: Float[Tensor, " dim"] | None,
    image_size: GridSize,
    grid: GridSize,
    *,
    ratio: float,
    temperature: float = 10.0,
    compat: Literal["official"] | None = None,
    order: Order = "score",
    newlines: Newline | None = None,
    placement: Placement | None = None,
    rounding: Rounding | None = None,
) -> Packed:
    """Chooses and packs the tokens of one image.

    Args:
        features: projected features, the thumbnail's first, then the crops' row-major.
        scores: of [CLS] for each of them, see `zoo.compress.scores.cls_logits`.
        newline: appended to rows of the canvas; ``None`` for a model without.
        image_size: height and width in pixels.
        grid: rows and columns of crops.
        ratio: share of tokens to keep, in (0, 1].
        temperature: of the softmax over crops.
        compat: ``"official"`` reproduces the original code: kept tokens of padded images stand in wrong places
            (`official_placement`), newlines follow all rows of the canvas, and what isn't the thumbnail's is rounded to
            float16.
        order: of the thumbnail's tokens: ``"score"`` as in the original code, or ``"raster"``.
        newlines: after which rows: those of the image (``"valid"``, the default and LLaVA-NeXT's own rule), all rows of the
            canvas, rows with tokens, or none.
        placement: ``"true"`` (default), or ``"compat"`` for that of the original code alone.
        rounding: see `valid_rectangle`; ``"transformers"`` by default, ``"llava"`` with ``compat``.

    Raises:
        InputError: a ratio out of range, crops that don't fill the grid, or a grid of tokens that isn't square.
    """
    if not 0 < ratio <= 1:
        raise InputError(f"the share of tokens to keep must be in (0, 1], not {ratio}")
    views, tokens = scores.shape
    if views != 1 + grid[0] * grid[1]:
        raise InputError(f"{views} views are not a thumbnail and {grid[0]} x {grid[1]} crops")
    official = compat == "official"
    newlines = newlines or ("all" if official else "valid")
    placement = placement or ("compat" if official else "true")
    side = _side(tokens)
    canvas = (grid[0] * side, grid[1] * side)
    valid = valid_rectangle(image_size, canvas, rounding or ("llava" if official else "transformers"))

    thumbnail = best_of_thumbnail(scores[0], ratio, order)
    scales = retention_scales(scores[0], grid, ratio, temperature=temperature)
    marks = valid_tokens(canvas, grid, valid, scores.device)
    commanded = to_crops(global_scores(scores[0], canvas, valid), grid)
    selection = select_crop_tokens(scores[1:], commanded, marks, scales)

    keep = selection.keep
    shown = torch.arange(tokens, device=scores.device).expand(views - 1, tokens)
    if placement == "compat":
        keep, shown = official_placement(keep, marks)
    source = shown + torch.arange(1, views, device=scores.device)[:, None] * tokens
    rows = to_canvas(keep, grid)
    line = _newline_rows(rows, valid, newlines if newline is not None else "none")
    layout = torch.cat([to_canvas(source, grid), torch.full_like(line[:, None], -1, dtype=torch.long)], 1)
    crops = layout[torch.cat([rows, line[:, None]], 1)]

    table = features.flatten(0, 1)
    if newline is not None:
        table = torch.cat([table, newline[None].to(table)])
    packed = table[crops]
    if official:
        packed = packed.half().to(features.dtype)
    features = torch.cat([features[0, thumbnail], packed])
    return Packed(features, torch.cat([thumbnail, crops]), thumbnail, selection, scales)


def _newline_rows(rows: Bool[Tensor, "rows columns"], valid: Rectangle, rule: Newline) -> Bool[Tensor, " rows"]:
    """Marks the rows of the canvas that a newline follows."""
    if rule == "nonempty":
        return rows.any(1)
    marks = torch.zeros_like(rows[:, 0])
    if rule == "all":
        marks[:] = True
    elif rule == "valid":
        marks[valid[0] : valid[1]] = True
    return marks


class GlobalCom2(Method):
    """GlobalCom2 in a model. It acts between tower and language model: the scores come from the tower's last layer, so the
    tower's own work stays.

    Images of one view, as all of LLaVA-1.5's, keep the best-scored tokens of it.

    Args:
        keep: share of tokens that a view keeps on average, newlines not counted; 0.25 by default.
        compat: ``"official"``, see `compress_image`.
        temperature: of the softmax over crops.
        score: ``"logit"`` takes products before the softmax as the original code does, ``"softmax"`` attention as the paper
            says, ``"cosine"`` how little a patch is like the mean of its view: the paper's rule for towers without [CLS], and
            the default there.
        order: of the thumbnail's tokens, see `compress_image`.
        newlines: likewise.
        placement: likewise.
        rounding: likewise.
    """

    needs_tower = True

    def __init__(
        self,
        keep: float | None = None,
        *,
        compat: Compat | None = None,
        temperature: float = 10.0,
        score: Literal["logit", "softmax", "cosine"] | None = None,
        order: Order = "score",
        newlines: Newline | None = None,
        placement: Placement | None = None,
        rounding: Rounding | None = None,
    ) -> None:
        if temperature <= 0:
            raise InputError(f"the temperature must be positive, not {temperature}")
        self.keep, self.compat, self.score = 0.25 if keep is None else keep, compat, score
        self.temperature, self.order, self.newlines = temperature, order, newlines
        self.placement, self.rounding = placement, rounding

    @property
    def idle(self) -> bool:
        """A share of 1 leaves the model as it is; the original code drops tokens even then."""
        return self.keep == 1 and self.compat is None

    def bind(self, anatomy: Anatomy) -> None:
        """Settles where scores come from.

        Raises:
            InputError: scores of [CLS] from a tower without, or crops that don't tile the model's canvases.
        """
        super().bind(anatomy)
        self.heads, self.config = anatomy.tower_heads, anatomy.model.config
        self.cosine = self.score == "cosine" or (self.score is None and anatomy.all_patches)
        if not (anatomy.has_cls or (self.cosine and anatomy.all_patches)):
            raise InputError("GlobalCom2 needs the [CLS] token of the vision tower, or score='cosine' and a tower without one")
        if anatomy.views:
            _check_canvases(self.config.image_grid_pinpoints, self.config.vision_config.image_size)
        self.leading = int(anatomy.has_cls)
        if self.cosine:
            self.states = (anatomy.feature_layer,)
        else:
            self.watched = (len(anatomy.tower_layers) - 1,)
        self.packs = anatomy.views
        self.reduces = not anatomy.views

    def _scores(self, encoding: Encoding) -> Float[Tensor, "views tokens"]:
        if self.cosine:
            (layer,) = self.states
            return unlikeness(encoding.hidden[layer][:, self.leading :])
        (layer,) = self.watched
        score = cls_attention if self.score == "softmax" else cls_logits
        return score(encoding.queries[layer], encoding.keys[layer], self.heads)

    def reduce(self, features: Tensor, encoding: Encoding) -> Reduced:
        """The rule of the thumbnail for an image of one view."""
        best = best_of_thumbnail(self._scores(encoding), self.keep, self.order)
        return Reduced(gather_tokens(features, best), None, best)

    def pack(
        self, features: list[Tensor], sizes: list[tuple[int, int]], newline: Tensor | None, encoding: Encoding
    ) -> list[Tensor]:
        """Compresses and packs each image by itself."""
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

        tile = self.config.vision_config.image_size
        scores = self._scores(encoding).split([len(views) for views in features])
        packed = []
        encoding.sources = []
        first = 0
        for views, score, size in zip(features, scores, sizes, strict=True):
            offset, first = first * views.shape[1], first + len(views)
            if len(views) == 1:
                best = best_of_thumbnail(score[0], self.keep, self.order)
                line = [] if newline is None else [newline[None].to(views)]
                packed.append(torch.cat([views[0, best], *line]))
                encoding.sources.append(torch.cat([best + offset, best.new_full((len(line),), -1)]))
                continue
            image = compress_image(
                views,
                score,
                newline,
                size,
                get_anyres_image_grid_shape(size, self.config.image_grid_pinpoints, tile),
                ratio=self.keep,
                temperature=self.temperature,
                compat=self.compat,
                order=self.order,
                newlines=self.newlines,
                placement=self.placement,
                rounding=self.rounding,
            )
            packed.append(image.features)
            encoding.sources.append(torch.where(image.source < 0, -1, image.source + offset))
        return packed

"""Tokenizers of images: reading, resizing, batching and restoring sizes, for all families."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as functional
from jaxtyping import Float
from torch import Tensor, nn

from zoo import media
from zoo.errors import ArgumentError, InputError, ItemError, naming_item
from zoo.latents import Latents
from zoo.progress import progress_bar
from zoo.tokenizer.base import ConfigT, EncodedT, Prepared, Tokenizer, as_items, precision_named, runs_of_equals
from zoo.tokenizer.graphs import Graph, Graphs, Port
from zoo.tokens import Meta, Tokens

Image = Float[Tensor, "3 _height _width"]
Images = Float[Tensor, "batch 3 height width"]
#: Rows and columns of ids.
Grid = tuple[int, int]
#: What takes a batch of images and gives the ids, or the latents, of each.
Encoder = Callable[[Images], Sequence[Tensor]]


class ImageTokenizer(Tokenizer[ConfigT, EncodedT, Image]):
    """A tokenizer of images.

    A family implements `encode_images` and `decode_images` (or `decode`), and lists in ``at_once`` how many images these take.
    It overrides `encode`, `encode_prepared` and `decode` with longer signatures where it has options of its own.

    Attributes:
        fit: how images come to the model's size by default.
        interpolation: how they are resized by default.
    """

    modality = "image"
    fit: ClassVar[str] = "crop"
    interpolation: ClassVar[str] = "bilinear"

    # ---- encode

    def encode(
        self,
        items: Any,
        *,
        fit: str | None = None,
        interpolation: str | None = None,
        encoder_precision: str = "fp32",
        range: media.Range | None = None,
        max_pixels: int = media.MAX_PIXELS,
        progress: bool = False,
    ) -> EncodedT:
        """Images to tokens, or to the latents of a continuous tokenizer.

        Args:
            items: one item or a list of them, each a path, the bytes of an image file, a PIL image, an array ``[height, width,
                channels]`` or a tensor ``[channels, height, width]``; floats in [-1, 1]. A tensor of rank 4 is a list.
            fit: how the image comes to the model's size: ``crop`` (shorter side resized, centre cropped), ``stretch``, ``pad``
                (grey bars), or ``none``: it has a size that the model takes. The family's own by default.
            interpolation: ``bilinear`` or ``bicubic``; the family's own by default.
            encoder_precision: ``bf16`` computes the encoder in bfloat16: quicker, but some ids change.
            range: what black and white are in floating point; see `zoo.media.prepare_image`.
            max_pixels: refuse larger images.
            progress: show a progress bar.

        Raises:
            ItemError: an item is empty, unreadable, too large, not finite or of the wrong kind; names the item.
            InputError: an option has no such value.
            WeightsError: the encoder was not loaded.
        """
        prepared = self.prepare(items, fit=fit, interpolation=interpolation, range=range, max_pixels=max_pixels)
        return self.encode_prepared(prepared, encoder_precision=encoder_precision, progress=progress)

    def prepare(
        self,
        items: Any,
        *,
        fit: str | None = None,
        interpolation: str | None = None,
        range: media.Range | None = None,
        max_pixels: int = media.MAX_PIXELS,
    ) -> list[Prepared]:
        """Images as the network takes them: ``pixels`` ``[3, height, width]`` in [-1, 1]; ``amount`` counts pixels.

        Arguments and errors as for `encode`.
        """
        size = self.spec.image_size
        if size is None and fit not in (None, "none"):
            raise ArgumentError(f"{self.name} takes images of any size as they are: fit={fit!r} has no meaning")
        fit = "none" if size is None else fit or self.fit
        prepared = []
        for index, item in enumerate(as_items(items, batch_rank=4)):
            with naming_item(index):
                image = media.prepare_image(
                    item,
                    size or (0, 0),
                    fit=fit,
                    max_pixels=max_pixels,
                    interpolation=interpolation or self.interpolation,
                    range=range,
                )
                height, width = image.pixels.shape[1:]
                self.require_size(height, width)
                prepared.append(Prepared({"pixels": image.pixels}, image.meta, height * width))
        return prepared

    def require_size(self, height: int, width: int) -> None:
        """Refuse a size that the network does not take: by default any but the model's.

        Raises:
            InputError: it does not fit.
        """
        size = self.spec.image_size
        if size is not None and (height, width) != size:
            raise InputError(
                f"an image of {width} x {height} does not fit: it must have {size[1]} x {size[0]}, or come with another fit"
            )

    def encode_prepared(
        self, items: Sequence[Prepared], *, encoder_precision: str = "fp32", progress: bool = False
    ) -> EncodedT:
        """Encode what `prepare` gave, to tokens or latents; arguments and errors as for `encode`."""
        dtype = precision_named(encoder_precision)
        return self.encode_batches(items, partial(self.encode_images, dtype=dtype), progress)

    def encode_batches(self, items: Sequence[Prepared], encode: Encoder, progress: bool) -> EncodedT:
        """Run an encoder over batches of images of one size, and wrap what it gives for each."""
        self.require("encoder", "encoding")
        found: list[Tensor] = []
        shapes = [item.tensors["pixels"].shape for item in items]
        with progress_bar("encode", len(items), progress, unit="image") as advance:
            for batch in runs_of_equals(shapes, self.budget("encode")):
                found += encode(torch.stack([items[i].tensors["pixels"] for i in batch]).to(self.device))
                advance(len(batch))
        return self.wrap(found, [item.meta for item in items])

    @abstractmethod
    def encode_images(self, images: Images, dtype: torch.dtype) -> Sequence[Tensor]:
        """Ids ``[length]``, or latents ``[channels, rows, columns]``, of each image of a batch of one size.

        Called without gradients and in exact float32; ``dtype`` is what the user lets the encoder compute in.
        """

    # ---- decode

    def decode(
        self,
        tokens: Any,
        *,
        size: str | None = None,
        max_pixels: int = media.MAX_PIXELS,
        progress: bool = False,
    ) -> list[Image]:
        """Tokens, or latents, to images: float tensors ``[3, height, width]``, nominally in [-1, 1], not clamped.

        Args:
            tokens: what `encode` returned, or bare ids ``[batch, length]`` (right-padded with -1) or a list of ``[length]``; of
                a continuous tokenizer latents ``[batch, channels, rows, columns]`` or a list.
            size: ``None`` for the model's size, ``"original"`` for that of the encoded image (what ``crop`` cut off is grey).
            max_pixels: refuse to restore larger originals.
            progress: show a progress bar.

        Raises:
            MismatchError: the tokens belong to another checkpoint.
            InputError: an id or an option is out of range.
            WeightsError: the decoder was not loaded.

        >>> tok = zoo.load("tokenflow-tiny")
        >>> tokens = tok.encode(torch.zeros(3, 48, 80), fit="pad")
        >>> tokens.lengths.tolist(), tokens.meta[0]
        ([341], {'width': 80, 'height': 48, 'fit': 'pad'})
        >>> [list(image.shape) for image in tok.decode(tokens) + tok.decode(tokens, size="original")]
        [[3, 128, 128], [3, 48, 80]]
        """
        self.require("decoder", "decoding to images")
        self.require_known_size(size)
        checked = self.check(tokens)
        images = self.decode_batches(checked, progress)
        return self.restored(images, checked, size, max_pixels)

    def decode_batches(self, encoded: EncodedT, progress: bool) -> list[Image]:
        """Run `decode_images` over batches of items of one length, or of latents of one size."""
        values = encoded.values if isinstance(encoded, Latents) else encoded.unpadded()
        images: list[Tensor] = []
        with progress_bar("decode", len(values), progress, unit="image") as advance:
            for batch in runs_of_equals([value.shape for value in values], self.budget("decode")):
                images += self.decode_images(torch.stack([values[i] for i in batch]).to(self.device))
                advance(len(batch))
        return images

    def decode_images(self, values: Tensor) -> Images:
        """Images of ids ``[batch, length]``, or of latents ``[batch, channels, rows, columns]``, of one length or size.

        Called by `decode`, which a family may override instead.
        """
        raise NotImplementedError(f"{self.family} has its own way to decode")

    def graphs_of(self, encoder: nn.Module | str, decoder: nn.Module | str) -> Graphs:
        """See `Tokenizer.graphs`; of a model whose images have one size.

        Args:
            encoder: takes images ``[batch, 3, height, width]`` in [-1, 1] and gives ids ``[batch, ids]``; or why there is none.
            decoder: takes such ids and gives images; or why there is none.
        """
        spec = self.spec
        assert spec.image_size is not None and spec.max_tokens is not None
        height, width = spec.image_size
        generator = torch.Generator().manual_seed(0)
        # Smooth patches of colour with a little noise.
        coarse = [torch.rand(batch, 3, 6, 6, generator=generator) * 2 - 1 for batch in (2, 1, 3)]
        smooth = [functional.interpolate(own, (height, width), mode="bicubic") for own in coarse]
        images = [(own + 0.05 * torch.randn(own.shape, generator=generator)).clamp(-1, 1) for own in smooth]
        ids = [torch.randint(spec.vocab_size, (batch, spec.max_tokens), generator=generator) for batch in (2, 1, 3)]
        picture, tokens = Port("pixels", ("batch", 3, height, width)), Port("ids", ("batch", spec.max_tokens))

        def encoded(images: Tensor) -> Tensor:
            return self.encode(list(images)).ids  # type: ignore[union-attr]

        def decoded(ids: Tensor) -> Tensor:
            return torch.stack(self.decode(list(ids))).cpu()

        return {
            "encoder": encoder if isinstance(encoder, str) else Graph(encoder, picture, tokens, images, encoded),
            "decoder": decoder if isinstance(decoder, str) else Graph(decoder, tokens, picture, ids, decoded),
        }

    @staticmethod
    def require_known_size(size: str | None) -> None:
        """Refuse another value of ``size`` than there is."""
        if size not in (None, "original"):
            raise ArgumentError(f"size must be None or 'original', not {size!r}")

    @staticmethod
    def restored(images: Sequence[Image], encoded: Tokens | Latents, size: str | None, max_pixels: int) -> list[Image]:
        """Images in the size of their originals, if it is wanted and known."""
        if size is None or not encoded.meta:
            return list(images)
        return [media.restore_image(image, meta, max_pixels) for image, meta in zip(images, encoded.meta, strict=True)]


class LatentImageTokenizer(ImageTokenizer[ConfigT, Latents]):
    """A continuous tokenizer of images: grids of latents, which give images of the size that went in.

    A family implements `encode_images` and `decode_images`, and makes whole cells of an image by `whole_cells`.
    """

    latent_axes = ("rows", "columns")

    def decode(
        self,
        tokens: Latents | Tensor | Sequence[Tensor],
        *,
        size: str | None = "original",
        max_pixels: int = media.MAX_PIXELS,
        progress: bool = False,
    ) -> list[Image]:
        """Latents to images; as `ImageTokenizer.decode`, but in the size of the encoded image unless ``size=None``.

        Without it, or of bare latents, images are whole cells.
        """
        return super().decode(tokens, size=size, max_pixels=max_pixels, progress=progress)

    @staticmethod
    def restored(images: Sequence[Image], encoded: Tokens | Latents, size: str | None, max_pixels: int) -> list[Image]:
        """Images without the margin that made whole cells of them."""
        return without_margins(images, encoded, size)

    def embed(self, tokens: Latents | Tensor | Sequence[Tensor]) -> Float[Tensor, "batch length dim"]:
        """The latents as sequences, row by row, zero where an item has ended."""
        rows = [values.flatten(1).T.to(self.device) for values in self.check(tokens).values]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


# ---- families whose images are grids of cells


def whole_cells(images: Images, factor: int) -> Float[Tensor, "batch 3 padded_height padded_width"]:
    """Images whose right and lower edges are continued up to multiples of ``factor`` pixels."""
    height, width = images.shape[2:]
    return functional.pad(images, (0, -width % factor, 0, -height % factor), mode="replicate")


def without_margins(images: Sequence[Image], encoded: Tokens | Latents, size: str | None) -> list[Image]:
    """Decoded images without the margins that `whole_cells` gave them, where ``size`` asks for that and the size is known."""
    if size is None or not encoded.meta:
        return list(images)
    return [
        image[:, : meta.get("height", image.shape[1]), : meta.get("width", image.shape[2])]
        for image, meta in zip(images, encoded.meta, strict=True)
    ]


def grids_of(tokens: Tokens, grid: Grid | None = None, fewest: int = 1) -> list[Grid]:
    """Rows and columns of ids of each item: what ``meta`` remembers as ``rows``, and of bare ids a square.

    Args:
        tokens: of one id per cell, row by row.
        grid: of all items, whatever they remember.
        fewest: cells of the smallest grid.

    Raises:
        ItemError: the number of ids is not that of the grid, is too small, or nothing tells the grid; names the item.
    """
    found = []
    for index, length in enumerate(tokens.lengths.tolist()):
        with naming_item(index):
            rows, columns = grid or _grid_of(tokens.meta[index] if tokens.meta else {}, length)
            if min(rows, columns) < 1 or rows * columns != length:
                raise InputError(f"{length} ids are no grid of {rows} x {columns}")
            if length < fewest:
                raise ItemError(f"a grid has {fewest} ids at least, not {length}", index)
            found.append((rows, columns))
    return found


def _grid_of(meta: Meta, length: int) -> Grid:
    if "rows" in meta:
        return meta["rows"], length // max(1, meta["rows"])
    side = math.isqrt(length)
    if side * side != length:
        raise InputError(f"{length} ids are no square: pass grid=(rows, columns)")
    return side, side

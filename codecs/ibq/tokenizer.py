"""The tokenizer: images of any size to grids of ids, row by row, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from zoo import media
from zoo.codecs.ibq.checkpoint import CHECKPOINT
from zoo.codecs.ibq.config import IBQConfig
from zoo.codecs.ibq.network import BitDecoder, BitEncoder, Decoder, Encoder
from zoo.codecs.ibq.preparing import EMU_AREA, PRESETS, UNIT, eight_bits, exact_pixels, margins, padded
from zoo.codecs.ibq.quantizer import Bits, Codebook
from zoo.errors import ArgumentError, InputError, WeightsError, naming_item
from zoo.progress import progress_bar
from zoo.spec import Spec
from zoo.tokenizer import Budget, Prepared, precision_named, runs_of_equals
from zoo.tokenizer.image import Grid, Image, Images, ImageTokenizer, grids_of
from zoo.tokens import Meta, Tokens


class IBQ(ImageTokenizer[IBQConfig, Tokens]):
    """The image tokenizers of SEED-Voken (IBQ, Open-MAGVIT2) and of Emu3.5.

    An image gives one id for every 16 x 16 pixels in the usual case, row by row. Whole cells are taken as they are, other
    sizes are padded, and the margin is cut off again where the original's size is asked for. Tokens remember the rows of the
    grid; of bare ids it is a square unless ``grid`` says otherwise. Every norm sees the whole image:
    images are batched where their sizes are equal. Encoding runs in float32 unless `encode` is asked for less.
    """

    Config = IBQConfig
    family = "ibq"
    checkpoint = CHECKPOINT
    identity = ("quantizer.weight",)

    # Images at a time. On a CPU, one by one costs nothing and makes results independent of the batch to the last bit.
    at_once: ClassVar[Mapping[str, Budget]] = {"encode": Budget(1, 8), "decode": Budget(1, 8)}

    def __init__(self, config: IBQConfig | None = None, *, name: str = "ibq") -> None:
        super().__init__(config or IBQConfig(), name)
        bits = self.config.quantization == "lfq"
        self.quantizer = Bits(self.config) if bits else Codebook(self.config)
        if "encoder" in self.config.parts:
            self.encoder = BitEncoder(self.config) if bits else Encoder(self.config)
        if "decoder" in self.config.parts:
            self.decoder = BitDecoder(self.config) if bits else Decoder(self.config)

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="image",
            vocab_size=self.config.codebook_size,
            dim=self.config.code_dim,
            fingerprint=self.fingerprint,
            parts=self.config.parts,
        )

    # ---- encode

    def encode(
        self,
        items: Any,
        *,
        fit: str | None = None,
        interpolation: str | None = None,
        resize: str | None = None,
        area: int = EMU_AREA,
        encoder_precision: str = "fp32",
        range: media.Range | None = None,
        max_pixels: int = media.MAX_PIXELS,
        progress: bool = False,
    ) -> Tokens:
        """Images to tokens.

        Args:
            items: as for `ImageTokenizer.encode`.
            fit: ``None`` pads images that are no whole cells with grey, centred, to multiples of 16 pixels; ``"none"`` leaves
                them as they are: the network then makes cells of what fits (and of what is begun in Open-MAGVIT2), and the
                decoded image is smaller (larger) than the original.
            interpolation: nothing to choose: presets have their own.
            resize: a preset instead: ``"emu3.5"`` (to about ``area`` pixels, Pillow's bicubic filter), ``"apertus"`` (to the
                nearest multiples of 16, torchvision's bicubic filter) or ``"seed-voken"`` (256 x 256, cropped). They work on
                8 bits.
            area: pixels that ``"emu3.5"`` aims at.
            encoder_precision: ``bf16`` computes the encoder in bfloat16: quicker, but about a tenth of the ids change.
            range: what black and white are in floating point; see `zoo.media.prepare_image`.
            max_pixels: refuse larger images.
            progress: show a progress bar.

        Raises:
            ItemError: an item is empty, unreadable, too small, too large, not finite or of the wrong kind; names the item.
            ArgumentError: an option has no such value.
            WeightsError: the encoder was not loaded.
        """
        prepared = self.prepare(
            items, fit=fit, interpolation=interpolation, resize=resize, area=area, range=range, max_pixels=max_pixels
        )
        return self.encode_prepared(prepared, encoder_precision=encoder_precision, progress=progress)

    def prepare(
        self,
        items: Any,
        *,
        fit: str | None = None,
        interpolation: str | None = None,
        resize: str | None = None,
        area: int = EMU_AREA,
        range: media.Range | None = None,
        max_pixels: int = media.MAX_PIXELS,
    ) -> list[Prepared]:
        """Images as the network takes them: ``pixels`` ``[3, height, width]`` in [-1, 1]; ``amount`` counts pixels.

        Arguments and errors as for `encode`.
        """
        if resize is not None and resize not in PRESETS:
            raise ArgumentError(f"resize must be None or one of {', '.join(PRESETS)}, not {resize!r}")
        if resize is not None and (fit is not None or UNIT % self.config.factor):
            raise ArgumentError(f"resize={resize!r} makes multiples of {UNIT} pixels, and leaves fit= nothing to do")
        if area < 1:
            raise ArgumentError(f"area must be at least 1, not {area}")
        plain = super().prepare(items, fit=fit, interpolation=interpolation, range=range, max_pixels=max_pixels)
        prepared = []
        for index, item in enumerate(plain):
            with naming_item(index):
                prepared.append(self._fitted(item, fit, resize, area, max_pixels))
        return prepared

    def _fitted(self, item: Prepared, fit: str | None, resize: str | None, area: int, max_pixels: int) -> Prepared:
        """An image at the size that the network gets, which remembers how many rows of ids it makes."""
        pixels, meta = item.tensors["pixels"], dict(item.meta)
        own = (pixels.shape[1], pixels.shape[2])
        if resize is not None:
            pixels = PRESETS[resize].apply(eight_bits(pixels), area)
            meta["fit"] = PRESETS[resize].fit
        else:
            pixels = exact_pixels(pixels)
            pixels = pixels if fit == "none" else padded(pixels, self.config.padded_size(*own))
        size = (pixels.shape[1], pixels.shape[2])
        if math.prod(size) > max(max_pixels, math.prod(own)):
            raise InputError(f"{size[1]} x {size[0]} pixels would come out, more than max_pixels={max_pixels}")
        grid = self.config.grid_of(*size)
        if min(grid) < 1 or math.prod(grid) < self._fewest_cells:
            raise InputError(
                f"an image of {size[1]} x {size[0]} pixels is too small: {self.name} takes {self._fewest_cells} or more cells "
                f"of {self.config.factor} x {self.config.factor}"
            )
        return Prepared({"pixels": pixels}, meta | {"rows": grid[0]}, math.prod(size))

    @property
    def _fewest_cells(self) -> int:
        """Cells of the smallest grid: the decoder of Open-MAGVIT2 asks for a deviation over the cells."""
        return 2 if self.config.quantization == "lfq" else 1

    def require_size(self, height: int, width: int) -> None:
        """Every size is taken so far; `prepare` refuses what is too small in the end."""

    def encode_prepared(self, items: Sequence[Prepared], *, encoder_precision: str = "fp32", progress: bool = False) -> Tokens:
        dtype = precision_named(encoder_precision)
        return self.encode_batches(items, partial(self.encode_images, dtype=dtype), progress)

    def encode_images(self, images: Images, dtype: torch.dtype) -> Sequence[Int[Tensor, " length"]]:
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            features = self.encoder(images)
        return list(self.quantizer.ids(features).flatten(1))

    # ---- decode

    def decode(
        self,
        tokens: Tokens | Tensor | Sequence[Tensor],
        *,
        grid: Grid | None = None,
        size: str | None = None,
        max_pixels: int = media.MAX_PIXELS,
        progress: bool = False,
    ) -> list[Image]:
        """Tokens to images: float tensors ``[3, height, width]``, nominally in [-1, 1], not clamped.

        Args:
            tokens: what `encode` returned, or bare ids ``[batch, length]`` (right-padded with -1) or a list of ``[length]``.
            grid: rows and columns of ids, of bare ids that are no square.
            size: ``None`` for whole cells, ``"original"`` for the size of the encoded image: margins are cut off, and resized
                images are resized back.
            max_pixels: refuse to restore larger originals.
            progress: show a progress bar.

        Raises:
            MismatchError: the tokens belong to another checkpoint.
            InputError: an id or an option is out of range, or an item is no grid.
            WeightsError: the decoder was not loaded.
        """
        if "decoder" not in self.config.parts:
            raise WeightsError(
                f"{self.name} is encode only as it was loaded: images need its convolutional decoder. Load it with all of its "
                "parts; a checkpoint of Apertus 1.5 has none, and Emu3.5's own file, zoo.load('emu3.5'), decodes its ids"
            )
        self.require_known_size(size)
        checked = self.check(tokens)
        grids = self.grids(checked, grid)
        images: list[Tensor] = []
        values = checked.unpadded()
        with progress_bar("decode", len(values), progress, unit="image") as advance:
            for batch in runs_of_equals(grids, self.budget("decode")):
                ids = torch.stack([values[i] for i in batch]).unflatten(1, grids[batch[0]])
                images += self.decoder(self.quantizer.vectors(ids.to(self.device)).permute(0, 3, 1, 2))
                advance(len(batch))
        if size is None or not checked.meta:
            return images
        return [self._restored(image, meta, max_pixels) for image, meta in zip(images, checked.meta, strict=True)]

    def _restored(self, image: Image, meta: Meta, max_pixels: int) -> Image:
        """A decoded image in the size of its original."""
        if not {"width", "height", "fit"} <= meta.keys():
            return image
        height, width = meta["height"], meta["width"]
        whole = self.config.padded_size(height, width)
        if meta["fit"] != "none" or whole != (image.shape[1], image.shape[2]):
            return media.restore_image(image, meta, max_pixels)
        top, left = margins((height, width), whole)
        return image[:, top : top + height, left : left + width]

    def grids(self, tokens: Tokens, grid: Grid | None = None) -> list[Grid]:
        """Rows and columns of ids of each item.

        Args:
            tokens: of this checkpoint.
            grid: of all items, whatever they remember.

        Raises:
            ItemError: the number of ids is not that of the grid, or nothing tells the grid; names the item.
        """
        return grids_of(tokens, grid, self._fewest_cells)

    def hints(self, item: Any) -> dict[str, Any]:
        """The rows and columns of ids that an image gets, which bare ids do not tell."""
        [prepared] = self.prepare([item])
        return {"grid": self.config.grid_of(*prepared.tensors["pixels"].shape[1:])}

    def as_uint8(self, image: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
        """Levels of 8 bits as the originals make them: clamped and rounded down, where `zoo.media.write_image` rounds."""
        scaled = (image + 1) * 127.5 if self.config.quantization == "ibq" else (image.clamp(-1, 1) + 1) / 2 * 255
        return scaled.clamp(0, 255).to(torch.uint8)

    def embed(self, tokens: Tokens | Tensor | Sequence[Tensor]) -> Float[Tensor, "batch length dim"]:
        """The codes of the ids: rows of the codebook, or -1 and 1 of LFQ; zero where an item has ended."""
        ids = self.check(tokens).ids.to(self.device)
        return self.quantizer.vectors(ids.clamp(min=0)) * (ids >= 0)[..., None]

    # ---- speed

    def compile_modules(self) -> None:
        """Compile the decoder; the first calls, and those at a new size, are slow."""
        self.require("decoder", "compiling")
        self.decoder.compile(dynamic=True)

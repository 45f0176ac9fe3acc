"""Tokenizers of video: reading clips, the frames that stand before or behind them, and restoring their length and size."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from zoo import media
from zoo.errors import ArgumentError, InputError, ItemError, naming_item
from zoo.latents import Latents
from zoo.progress import progress_bar
from zoo.tokenizer.base import ConfigT, EncodedT, Prepared, Tokenizer, as_items
from zoo.tokenizer.films import MOST_HELD, ClipInFile, FrameReader
from zoo.tokens import Tokens

#: A decoded clip, nominally in [-1, 1].
Clip = Float[Tensor, "3 _frames _height _width"]
#: Latent frames, rows and columns.
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Timing:
    """The way from the frames of a clip to latent frames.

    Attributes:
        lead: how often the first frame is repeated in front of the clip.
        total: frames that go through the network; those that are missing behind the clip repeat its last one.
        latents: latent frames.
    """

    lead: int
    total: int
    latents: int


class Fed:
    """The frames that a network is fed: a clip with the frames before and behind it, continued to whole cells.

    A slice ``fed[start:stop]`` is float32 ``[1, 3, frames, rows, columns]`` on the network's device. Nothing else of the
    clip is there in floating point.
    """

    def __init__(self, frames: FrameReader, timing: Timing, cell: tuple[int, int], device: torch.device) -> None:
        self._frames, self._timing, self._cell, self._device = frames, timing, cell, device

    def __len__(self) -> int:
        return self._timing.total

    def __getitem__(self, places: slice) -> Float[Tensor, "1 3 frames rows columns"]:
        start, stop, _ = places.indices(len(self))
        shown = (torch.arange(start, stop) - self._timing.lead).clamp(0, len(self._frames) - 1)
        first, last = int(shown[0]), int(shown[-1])
        pixels = media.pixels_of(self._frames.part(first, last + 1)[shown - first].to(self._device))
        height, width = pixels.shape[2:]
        rows, columns = self._cell
        pixels = F.pad(pixels, (0, -width % columns, 0, -height % rows), mode="replicate")
        return pixels.transpose(0, 1)[None]

    def blocks(self, first: int, others: int) -> Iterator[Float[Tensor, "1 3 frames rows columns"]]:
        """All frames in order: ``first`` of them, and then ``others`` at a time."""
        start, stop = 0, first
        while start < len(self):
            yield self[start:stop]
            start, stop = stop, stop + others


class VideoTokenizer(Tokenizer[ConfigT, EncodedT, Clip]):
    """A tokenizer of clips of any length and size; a still image is a clip of one frame.

    A family implements `cell`, `timing`, `encode_clip` and `decode_clip`. Each clip goes through the network alone, so that its
    ids do not depend on others. Ids are time-major: latent frame by latent frame, row by row.
    """

    modality = "video"
    latent_axes = ("frames", "rows", "columns")

    # ---- what a family implements

    @property
    @abstractmethod
    def cell(self) -> tuple[int, int]:
        """Height and width in pixels that one latent stands for."""

    @abstractmethod
    def timing(self, frames: int) -> Timing:
        """Frames that a clip of a length is fed with, and its latent frames."""

    @abstractmethod
    def encode_clip(self, clip: Fed, generator: torch.Generator | None, sample: bool) -> Tensor:
        """Ids ``[frames, rows, columns]`` or latents ``[channels, frames, rows, columns]`` of one clip.

        Called without gradients and in exact float32. Where ``sample`` is set, latents are drawn from the posterior.
        """

    @abstractmethod
    def decode_clip(self, values: Tensor) -> Iterator[Float[Tensor, "3 frames height width"]]:
        """The frames that the network was fed, block by block, from what `encode_clip` gives."""

    # ---- encode

    def encode(
        self,
        items: Any,
        *,
        fit: str = "none",
        size: int | Sequence[int] | None = None,
        fps: Any = None,
        interpolation: str = "bilinear",
        posterior: str = "mode",
        generator: torch.Generator | None = None,
        max_frames: int = media.MAX_FRAMES,
        max_pixels: int = media.MAX_FRAME_PIXELS,
        progress: bool = False,
    ) -> EncodedT:
        """Clips to tokens, or to the latents of a continuous tokenizer.

        Args:
            items: one item or a list of them; see `zoo.media.read_video`. A tensor of rank 5 is a list, and so is a list of PIL
                images: a clip of images is a list in that list.
            fit: ``none`` takes the clip at its own size; ``crop``, ``stretch`` and ``pad`` bring it to ``size``.
            size: ``(height, width)``, or one number for both.
            fps: frames per second to bring clips to; their own by default.
            interpolation: ``bilinear`` or ``bicubic``, where frames are resized.
            posterior: of continuous tokenizers; ``mode`` takes the posterior's mean, ``sample`` draws from it.
            generator: of the draws.
            max_frames: refuse longer clips.
            max_pixels: refuse clips with larger frames.
            progress: show a progress bar.

        Raises:
            ItemError: an item is empty, unreadable, too long or too large, not finite or of the wrong kind; names the item.
            InputError: an option has no such value.
            WeightsError: the encoder was not loaded.
        """
        prepared = self.prepare(
            items, fit=fit, size=size, fps=fps, interpolation=interpolation, max_frames=max_frames, max_pixels=max_pixels
        )
        return self.encode_prepared(prepared, posterior=posterior, generator=generator, progress=progress)

    def prepare(
        self,
        items: Any,
        *,
        fit: str = "none",
        size: int | Sequence[int] | None = None,
        fps: Any = None,
        interpolation: str = "bilinear",
        max_frames: int = media.MAX_FRAMES,
        max_pixels: int = media.MAX_FRAME_PIXELS,
    ) -> list[Prepared]:
        """Clips as the network takes them: ``frames`` ``[frames, 3, height, width]``, as levels of 8 bits where they are.

        ``amount`` counts pixels. A long film stays in its file: its frames are counted and checked, and decoded again when they
        are asked for or the item is pickled. Arguments and errors as for `encode`.
        """
        prepared = []
        options = {"fit": fit, "size": size, "fps": fps, "interpolation": interpolation}
        options |= {"max_frames": max_frames, "max_pixels": max_pixels}
        for index, item in enumerate(as_items(items, batch_rank=5)):
            with naming_item(index):
                stream = media.stream_video(item, **options)
                frames = stream.read(MOST_HELD if stream.file is not None else None)
                tensors: Mapping[str, Tensor] = ClipInFile(stream, options) if frames is None else {"frames": frames}
                height, width = stream.size
                meta = stream.meta | {"rows": -(-height // self.cell[0])}
                prepared.append(Prepared(tensors, meta, stream.count * height * width))
        return prepared

    def encode_prepared(
        self,
        items: Sequence[Prepared],
        *,
        posterior: str = "mode",
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> EncodedT:
        """Encode what `prepare` gave, clip by clip; arguments and errors as for `encode`."""
        if posterior not in ("mode", "sample"):
            raise ArgumentError(f"posterior must be 'mode' or 'sample', not {posterior!r}")
        if posterior == "sample" and not self.spec.continuous:
            raise ArgumentError(f"{self.name} has ids: there is no posterior to draw from")
        self.require("encoder", "encoding")
        found: list[Tensor] = []
        with progress_bar("encode", len(items), progress, unit="clip") as advance:
            for index, item in enumerate(items):
                frames = FrameReader(item, index)
                clip = Fed(frames, self.timing(len(frames)), self.cell, self.device)
                values = self.encode_clip(clip, generator, posterior == "sample")
                found.append(values if self.spec.continuous else values.flatten())
                advance(1)
        return self.wrap(found, [item.meta for item in items])

    # ---- decode

    def decode(
        self,
        tokens: Any,
        *,
        size: str | None = "original",
        grid: Grid | Sequence[Grid] | None = None,
        max_pixels: int = media.MAX_FRAME_PIXELS,
        progress: bool = False,
    ) -> list[Clip]:
        """Tokens, or latents, to clips: float tensors ``[3, frames, height, width]``, nominally in [-1, 1].

        Args:
            tokens: what `encode` returned, or bare ids ``[batch, length]`` or a list of ``[length]``, which need ``grid``; of a
                continuous tokenizer latents ``[batch, channels, frames, rows, columns]`` or a list.
            size: ``"original"`` for the size that the clip had, ``None`` for whole cells at the model's size.
            grid: latent frames, rows and columns of bare ids: one grid for all of them, or a list. They decode to all frames
                that the network gives.
            max_pixels: refuse to restore clips with larger frames.
            progress: show a progress bar.

        Raises:
            MismatchError: the tokens belong to another checkpoint.
            InputError: an id, a grid or an option is out of range.
            WeightsError: the decoder was not loaded.
        """
        self.require("decoder", "decoding to video")
        if size not in (None, "original"):
            raise ArgumentError(f"size must be None or 'original', not {size!r}")
        checked = self.check(tokens)
        values = list(checked.values) if isinstance(checked, Latents) else self._grids_of_ids(checked, grid)
        if isinstance(checked, Latents) and grid is not None:
            raise ArgumentError("latents have a grid of their own")
        clips: list[Clip] = []
        with progress_bar("decode", len(values), progress, unit="clip") as advance:
            for index, value in enumerate(values):
                meta = checked.meta[index] if checked.meta else None
                with naming_item(index):
                    frames = self._decoded(value.to(self.device), meta)
                    clips.append(frames if size is None or meta is None else media.restore_video(frames, meta, max_pixels))
                advance(1)
        return clips

    def _decoded(self, values: Tensor, meta: Mapping[str, Any] | None) -> Clip:
        """A clip without the frames that were put before and behind it."""
        latents = values.shape[-3]
        first, last = 0, None
        if meta is not None:
            timing = self.timing(_frames_in(meta))
            if timing.latents != latents:
                raise InputError(f"{_frames_in(meta)} frames make {timing.latents} latent frames, not {latents}")
            first, last = timing.lead, timing.lead + _frames_in(meta)
        kept, place = [], 0
        for block in self.decode_clip(values):
            start, stop = max(first - place, 0), None if last is None else max(last - place, 0)
            kept.append(block[:, start:stop].float())
            place += block.shape[1]
        return torch.cat(kept, dim=1)

    def _grids_of_ids(self, tokens: Tokens, grid: Any) -> list[Int[Tensor, "frames rows columns"]]:
        if grid is None:
            if not tokens.meta:
                raise InputError("bare ids need grid=(latent frames, rows, columns)")
            grids = self.grid(tokens)  # type: ignore[arg-type]  # tokens are what a family with ids encodes to
        else:
            one = len(grid) == 3 and all(isinstance(side, int) for side in grid)
            grids = [_sides(side) for side in ([grid] * len(tokens) if one else grid)]
            if len(grids) != len(tokens):
                raise ArgumentError(f"{len(grids)} grids do not suit {len(tokens)} items")
        found = []
        for index, (ids, sides) in enumerate(zip(tokens.unpadded(), grids, strict=True)):
            if len(ids) != sides[0] * sides[1] * sides[2]:
                raise ItemError(f"{len(ids)} ids are no grid of {sides[0]} x {sides[1]} x {sides[2]}", index)
            found.append(ids.reshape(sides))
        return found

    def grid(self, tokens: EncodedT) -> list[Grid]:
        """Latent frames, rows and columns of each item of what `encode` returned.

        Raises:
            ItemError: what an item remembers contradicts its ids.
        """
        if isinstance(tokens, Latents):
            return [_sides(values.shape[1:]) for values in tokens.values]
        if len(tokens.meta) != len(tokens):
            raise InputError("bare ids have no grid: nothing tells how many rows they have")
        grids = []
        for index, (length, meta) in enumerate(zip(tokens.lengths.tolist(), tokens.meta, strict=True)):
            with naming_item(index):
                try:
                    rows = int(meta["rows"])
                except (KeyError, TypeError, ValueError) as error:
                    raise InputError(f"its meta has no number of rows: {dict(meta)}") from error
                latents = self.timing(_frames_in(meta)).latents
                if rows < 1 or length % (latents * rows):
                    raise InputError(f"{length} ids are no {latents} latent frames of {rows} rows")
                grids.append((latents, rows, length // (latents * rows)))
        return grids


def _frames_in(meta: Mapping[str, Any]) -> int:
    try:
        frames = int(meta["frames"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"its meta has no number of frames: {dict(meta)}") from error
    if frames < 1:
        raise InputError(f"a clip of {frames} frames cannot be decoded")
    return frames


def _sides(grid: Any) -> Grid:
    try:
        frames, rows, columns = (int(side) for side in grid)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"a grid is (latent frames, rows, columns), not {grid!r}") from error
    if min(frames, rows, columns) < 1:
        raise ArgumentError(f"a grid has at least one latent frame, row and column, not {grid!r}")
    return frames, rows, columns

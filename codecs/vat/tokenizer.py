"""The tokenizer: shapes to tokens, scale after scale, and any prefix of them to meshes and occupancy."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo import media
from zoo.codecs.vat.checkpoint import CHECKPOINT
from zoo.codecs.vat.config import VATConfig
from zoo.codecs.vat.decoder import Field, Planes, Query, TriplaneDecoder
from zoo.codecs.vat.encoder import Encoder
from zoo.codecs.vat.quantizer import ScaleQuantizer
from zoo.codecs.vat.surface import extract
from zoo.errors import ArgumentError, InputError, ItemError, naming_item
from zoo.precision import exact_float32
from zoo.progress import progress_bar
from zoo.spec import Spec
from zoo.tokenizer import Budget, Prepared
from zoo.tokenizer.shape import ShapeTokenizer
from zoo.tokens import Tokens

if TYPE_CHECKING:
    import trimesh

_log = logging.getLogger("zoo")

# Beyond this a grid takes 5 GB.
_HIGHEST_RESOLUTION = 1024


class VAT(ShapeTokenizer[VATConfig]):
    """The shape tokenizer of arXiv 2412.02202, after a reference design of this project: no code was ever published.

    Meshes, scenes and clouds of points are covered with points and normals in a frame of their own. Each gives the ids of all
    scales, coarse to fine; ``tokens.segments`` says where the scales end, and every prefix decodes. Meshes come back as closed
    ``trimesh.Trimesh`` objects, where and as large as the originals were. Encoding is deterministic and runs in float32,
    whatever the dtype of the model, autocast or TF32 settings, unless `encode` is asked for less.
    """

    Config = VATConfig
    family = "vat"
    checkpoint = CHECKPOINT
    identity = ("quantizer.codebook", "quantizer.gain")

    # Shapes at a time. On a CPU, one by one costs nothing and makes results independent of the batch to the last bit.
    at_once: ClassVar[Mapping[str, Budget]] = {"encode": Budget(1, 16)}

    def __init__(self, config: VATConfig | None = None, *, name: str = "vat") -> None:
        super().__init__(config or VATConfig(), name)
        self.encoder = Encoder(self.config)
        self.quantizer = ScaleQuantizer(self.config)
        self.decoder = TriplaneDecoder(self.config)
        self.query = Query(self.config.triplane_channels, self.config.query_hidden, self.config.query_layers)

    @property
    def spec(self) -> Spec:
        config = self.config
        return Spec(
            name=self.name,
            family=self.family,
            modality="shape",
            vocab_size=config.codebook_size,
            dim=config.latent_dim,
            ordered=True,
            fingerprint=self.fingerprint,
            max_tokens=config.scale_ends[-1],
        )

    # ---- encode

    def encode(
        self,
        items: Any,
        *,
        seed: int = 0,
        normalise: bool = True,
        encoder_precision: str = "fp32",
        tokens: int | None = None,
        max_faces: int = media.MAX_FACES,
        progress: bool = False,
    ) -> Tokens:
        """Shapes to tokens, all of them or the first few.

        Args:
            items, seed, normalise, encoder_precision, max_faces, progress: as for `ShapeTokenizer.encode`.
            tokens: number of tokens to keep; all by default.

        Raises:
            ItemError: an item is empty, degenerate, unreadable, too large, not finite or of the wrong kind; names the item.
        """
        prepared = self.prepare(items, seed=seed, normalise=normalise, max_faces=max_faces)
        return self.encode_prepared(prepared, tokens=tokens, encoder_precision=encoder_precision, progress=progress)

    def encode_prepared(
        self,
        items: Sequence[Prepared],
        *,
        tokens: int | None = None,
        encoder_precision: str = "fp32",
        progress: bool = False,
    ) -> Tokens:
        """Encode what `prepare` gave; arguments and errors as for `encode`."""
        longest = self.config.scale_ends[-1]
        if tokens is not None and not 1 <= tokens <= longest:
            raise ArgumentError(f"tokens must lie in [1, {longest}], not {tokens}")
        encoded = super().encode_prepared(items, encoder_precision=encoder_precision, progress=progress)
        return encoded if tokens is None else encoded.truncate(tokens)

    @property
    def points_per_shape(self) -> int:
        return self.config.num_points

    def encode_points(
        self, points: Float[Tensor, "batch points 3"], normals: Float[Tensor, "batch points 3"], dtype: torch.dtype
    ) -> Sequence[Int[Tensor, " length"]]:
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            mean, _ = self.encoder(points, normals)
        return list(self.quantizer.ids(mean.float()))

    def segments(self, length: int) -> list[int]:
        """Ends of the scales within a sequence of that length."""
        return sorted({min(end, length) for end in self.config.scale_ends} - {0})

    # ---- decode

    def decode(
        self,
        tokens: Tokens | Tensor | Sequence[Tensor],
        *,
        scales: int | None = None,
        resolution: int | None = None,
        dense: bool = False,
        progress: bool = False,
    ) -> list[trimesh.Trimesh]:
        """Tokens to closed meshes, one ``trimesh.Trimesh`` per item, in the coordinates of the originals.

        Args:
            tokens: what `encode` returned, or bare ids ``[batch, length]`` (right-padded with -1) or a list of ``[length]``;
                any prefix. Bare ids decode in the model's frame, [-1, 1].
            scales: number of scales to decode, coarse first.
            resolution: cells of the grid along each side; the configuration's by default.
            dense: evaluate every node of the grid, instead of those that a coarser one shows to be near the surface.
            progress: show a progress bar.

        Raises:
            MismatchError: the tokens belong to another checkpoint.
            InputError: an id, a length or an option is out of range, or an item's meta is no place and size.
            MissingExtraError: the ``shape`` extra is not installed.
        """
        resolution = self.config.resolution if resolution is None else resolution
        if not 2 <= resolution <= _HIGHEST_RESOLUTION:
            raise ArgumentError(f"resolution must lie in [2, {_HIGHEST_RESOLUTION}], not {resolution}")
        media.require_shape_packages()
        tokens = self.check(tokens, scales)
        meshes = []
        with progress_bar("decode", len(tokens), progress, unit="shape") as advance:
            for index in range(len(tokens)):
                meshes.append(self._mesh(tokens, index, resolution, dense))
                advance(1)
        return meshes

    def _mesh(self, tokens: Tokens, index: int, resolution: int, dense: bool) -> trimesh.Trimesh:
        import trimesh

        (field,) = self.field(tokens[index])
        vertices, faces = extract(field.on_grid(resolution), resolution, dense=dense)
        if not len(faces):
            _log.warning("item %d: nothing of the decoded field is inside, so the mesh is empty", index)
        return trimesh.Trimesh(vertices * field.scale + field.centre, faces, process=False)

    def field(self, tokens: Tokens | Tensor | Sequence[Tensor], *, scales: int | None = None) -> list[Field]:
        """The occupancy of each item as a function of points ``[points, 3]``, in the coordinates of the originals.

        Arguments and errors as for `decode`.
        """
        tokens = self.check(tokens, scales)
        frames = [media.frame_of(meta) for meta in tokens.meta] or [media.frame_of({})] * len(tokens)
        planes = [self._decode_planes(tokens.ids[i : i + 1]) for i in range(len(tokens))]
        return [Field(own[0], self.query, *frame) for own, frame in zip(planes, frames, strict=True)]

    def occupancy(
        self, tokens: Tokens | Tensor | Sequence[Tensor], points: Float[Tensor, "*batch points 3"], *, scales: int | None = None
    ) -> Float[Tensor, "batch points"]:
        """Logits of points, positive inside of the shapes.

        Args:
            tokens, scales: as for `decode`.
            points: the same for all items, or ``[batch, points, 3]``; in the coordinates of the originals.

        Raises:
            InputError: as `decode`, or there are points for another number of items.
        """
        fields = self.field(tokens, scales=scales)
        if points.ndim == 3 and len(points) != len(fields):
            raise InputError(f"there are points for {len(points)} items, and {len(fields)} items")
        each = points if points.ndim == 3 else points.expand(len(fields), *points.shape)
        return torch.stack([field(own) for field, own in zip(fields, each, strict=True)])

    def check(self, tokens: Any, scales: int | None = None) -> Tokens:
        tokens = super().check(tokens)
        ends = self.config.scale_ends
        for index, (length, meta) in enumerate(zip(tokens.lengths.tolist(), tokens.meta or ({},) * len(tokens), strict=True)):
            if length > ends[-1]:
                raise ItemError(f"{length} tokens are more than the model's {ends[-1]}", index)
            with naming_item(index):
                media.frame_of(meta)
        if scales is None:
            return tokens
        if not 1 <= scales <= len(ends):
            raise ArgumentError(f"scales must lie in [1, {len(ends)}], not {scales}")
        return tokens.truncate(ends[scales - 1])

    @torch.no_grad()
    def _decode_planes(self, ids: Int[Tensor, "batch length"]) -> Planes:
        with exact_float32(self.device):
            planes: Tensor = self.decoder(self.quantizer.latents(ids.to(self.device)))
        return planes

    # ---- embed, speed

    @torch.no_grad()
    def embed(self, tokens: Tokens | Tensor | Sequence[Tensor]) -> Float[Tensor, "batch length dim"]:
        """The codes of the ids at their scales' gains; zero where an item has ended."""
        return self.quantizer.vectors(self.check(tokens).ids.to(self.device))

    @torch.no_grad()
    def latents(
        self, tokens: Tokens | Tensor | Sequence[Tensor], *, scales: int | None = None
    ) -> Float[Tensor, "batch latents dim"]:
        """The decoder's input: the sum of the scales that the tokens hold."""
        return self.quantizer.latents(self.check(tokens, scales).ids.to(self.device))

    @torch.no_grad()
    def ar_inputs(self, tokens: Tokens | Tensor | Sequence[Tensor]) -> Float[Tensor, "batch positions dim"]:
        """Inputs of a model that predicts scale after scale, for every token but that of the first scale.

        For tokens of k scales these are the inputs of scales 2 to k + 1, or k if it is the last: the sum of the scales before,
        averaged over the runs of latents that the scale's tokens stand for.

        Raises:
            MismatchError: the tokens belong to another checkpoint.
            InputError: the items are not of the same whole number of scales.
        """
        tokens = self.check(tokens)
        lengths = set(tokens.lengths.tolist())
        if len(lengths) > 1 or not lengths <= set(self.config.scale_ends):
            raise InputError(f"all items must end with the same scale, at one of {self.config.scale_ends}")
        return self.quantizer.next_scale_inputs(tokens.ids.to(self.device))

    def compile_modules(self) -> None:
        """Compile the blocks of the decoder and the upsampler; the first calls are slow."""
        for block in self.decoder.blocks:
            block.compile(dynamic=True)
        self.decoder.upsampler.compile(dynamic=True)

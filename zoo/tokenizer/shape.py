"""Tokenizers of shapes: points drawn from meshes and clouds, batched by number."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo import media
from zoo.errors import naming_item
from zoo.progress import progress_bar
from zoo.tokenizer.base import ConfigT, Prepared, Tokenizer, as_items, precision_named, runs_of_equals
from zoo.tokens import Tokens

Points = Float[Tensor, "batch points 3"]


class ShapeTokenizer(Tokenizer[ConfigT, Tokens, Any]):
    """A tokenizer of shapes.

    A family implements `encode_points`, `points_per_shape` and ``decode``, which gives ``trimesh.Trimesh`` objects where and as
    large as the originals were. It lists in ``at_once`` how many shapes are encoded together.
    """

    modality = "shape"

    def encode(
        self,
        items: Any,
        *,
        seed: int = 0,
        normalise: bool = True,
        encoder_precision: str = "fp32",
        max_faces: int = media.MAX_FACES,
        progress: bool = False,
    ) -> Tokens:
        """Shapes to tokens.

        Args:
            items: one item or a list of them, each a path, the bytes of a GLB, OBJ, PLY, STL or OFF file, a
                ``trimesh.Trimesh``, ``Scene`` or ``PointCloud``, an array or tensor ``[points, 3]`` or ``[points, 6]``
                (coordinates, then normals), or a pair ``(points, normals)``. A tensor of rank 3 is a list. Meshes need not be
                closed; `zoo.media.prepare_shape` tells what becomes of each, and what is taken for colours.
            seed: of the points that are drawn from a surface.
            normalise: without it, shapes are taken to lie in [-1, 1] already.
            encoder_precision: ``bf16`` computes the encoder in bfloat16: quicker, but some ids change.
            max_faces: refuse larger meshes and clouds.
            progress: show a progress bar.

        Raises:
            ItemError: an item is empty, degenerate, unreadable, too large, not finite or of the wrong kind; names the item.
        """
        prepared = self.prepare(items, seed=seed, normalise=normalise, max_faces=max_faces)
        return self.encode_prepared(prepared, encoder_precision=encoder_precision, progress=progress)

    def prepare(self, items: Any, *, seed: int = 0, normalise: bool = True, max_faces: int = media.MAX_FACES) -> list[Prepared]:
        """Shapes as the network takes them: ``points`` and ``normals`` ``[points, 3]``; ``amount`` counts points.

        Arguments and errors as for `encode`.
        """
        prepared = []
        for index, item in enumerate(as_items(items, batch_rank=3)):
            with naming_item(index):
                shape = media.prepare_shape(item, self.points_per_shape, seed=seed, normalise=normalise, max_faces=max_faces)
                tensors = {"points": shape.points, "normals": shape.normals}
                prepared.append(Prepared(tensors, shape.meta, len(shape.points)))
        return prepared

    def encode_prepared(self, items: Sequence[Prepared], *, encoder_precision: str = "fp32", progress: bool = False) -> Tokens:
        """Encode what `prepare` gave. Shapes with the same number of points go together, so that nothing is padded."""
        self.require("encoder", "encoding")
        dtype = precision_named(encoder_precision)
        found: dict[int, Tensor] = {}
        with progress_bar("encode", len(items), progress, unit="shape") as advance:
            order = sorted(range(len(items)), key=lambda i: items[i].amount)
            for run in runs_of_equals([items[i].amount for i in order], self.budget("encode")):
                batch = [order[i] for i in run]
                points, normals = (
                    torch.stack([items[i].tensors[name] for i in batch]).to(self.device) for name in ("points", "normals")
                )
                found |= zip(batch, self.encode_points(points, normals, dtype), strict=True)
                advance(len(batch))
        return self.tokens([found[i] for i in range(len(items))], [item.meta for item in items])

    @property
    @abstractmethod
    def points_per_shape(self) -> int:
        """Points that are drawn from a surface; a cloud of fewer points is taken as it is."""

    @abstractmethod
    def encode_points(self, points: Points, normals: Points, dtype: torch.dtype) -> Sequence[Int[Tensor, " length"]]:
        """Ids of each shape of a batch with one number of points.

        Called without gradients and in exact float32; ``dtype`` is what the user lets the encoder compute in.
        """

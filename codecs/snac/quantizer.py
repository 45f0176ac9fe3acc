"""Latents to codes of several rates, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.codecs.snac.config import SNACConfig
from zoo.kernels.codebook import CodebookSearch
from zoo.precision import Float32Module


class Level(nn.Module):
    """One codebook: latents are projected to a few numbers, and the code at the smallest angle is theirs."""

    def __init__(self, latent_dim: int, size: int, dim: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.in_proj = nn.Linear(latent_dim, dim)
        self.codebook = nn.Parameter(torch.empty(size, dim).normal_())
        self.out_proj = nn.Linear(dim, latent_dim)
        self._search = CodebookSearch(unit_widths=(dim,))

    def pooled(self, latents: Float[Tensor, "batch frames latent"]) -> Float[Tensor, "batch steps code_dim"]:
        """Vectors to compare with the codes: the mean of each ``stride`` frames, projected."""
        if self.stride > 1:
            latents = latents.unflatten(1, (-1, self.stride)).mean(2)
        return self.in_proj(latents)

    def ids(self, latents: Float[Tensor, "batch frames latent"]) -> Int[Tensor, "batch steps"]:
        """Ids of the codes at the smallest angle; the smallest id among equals."""
        return self._search(self.pooled(latents), self.codebook)

    def vectors(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape latent"]:
        """The codes as they are stored, not of unit length, projected back."""
        return self.out_proj(F.embedding(ids, self.codebook))


class Quantizer(Float32Module):
    """Residual quantizer: each level gets what is left over by those before it. Stays in float32."""

    def __init__(self, config: SNACConfig) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            [Level(config.latent_dim, config.codebook_size, config.codebook_dim, stride) for stride in config.vq_strides]
        )

    def level(self, index: int) -> Level:
        """One of the levels, coarse to fine."""
        return cast(Level, self.levels[index])

    def ids(self, latents: Float[Tensor, "batch frames latent"]) -> list[Int[Tensor, "batch _"]]:
        """Codes of each level, ``frames / stride`` of them; the frames are a multiple of the first stride."""
        found = []
        for index in range(len(self.levels)):
            level = self.level(index)
            ids = level.ids(latents)
            latents = latents - level.vectors(ids).repeat_interleave(level.stride, dim=1)
            found.append(ids)
        return found

    def vectors(self, ids: Sequence[Int[Tensor, "batch _"]]) -> Float[Tensor, "batch frames latent"]:
        """Vectors of the codes of the first few levels: the sum over levels, each code held for ``stride`` frames."""
        total = None
        for index, own in enumerate(ids):
            level = self.level(index)
            vectors = level.vectors(own).repeat_interleave(level.stride, dim=1)
            total = vectors if total is None else total.add_(vectors) if not torch.is_grad_enabled() else total + vectors
        assert total is not None
        return total

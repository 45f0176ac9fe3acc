"""Residual vector quantization: each codebook gets what is left over by those before it (arXiv 2107.03312, section III-C)."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.kernels.codebook import CodebookSearch
from zoo.precision import Float32Module


class Level(nn.Module):
    """One codebook, ``codebook`` ``[codes, dim]``, behind and in front of projections where it has a width of its own.

    Args:
        size, dim: number and width of its codes.
        latent_dim: width of the latents that are projected to ``dim`` and back; ``None`` for no projections.
        angles: whether the nearest code is that at the smallest angle, not at the smallest distance.
    """

    def __init__(self, size: int, dim: int, latent_dim: int | None = None, *, angles: bool = False) -> None:
        super().__init__()
        self.in_proj = None if latent_dim is None else nn.Linear(latent_dim, dim)
        self.codebook = nn.Parameter(torch.randn(size, dim))
        self.out_proj = None if latent_dim is None else nn.Linear(dim, latent_dim)
        self._search = CodebookSearch(unit_widths=(dim,) if angles else ())

    def ids(self, latents: Float[Tensor, "*shape latent"]) -> Int[Tensor, "*shape"]:
        """Ids of the nearest codes; the smallest id among equals."""
        return self._search(latents if self.in_proj is None else self.in_proj(latents), self.codebook)

    def vectors(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape latent"]:
        """The codes, projected back."""
        codes = F.embedding(ids, self.codebook)
        return codes if self.out_proj is None else self.out_proj(codes)


class ResidualQuantizer(Float32Module):
    """Codebooks of one size, coarse to fine. Stays in float32 under ``.to(dtype)``; arguments as for `Level`.

    Args:
        count: of codebooks.
        outer_dim: width of latents that are projected, without a bias, to ``dim`` in front of the first codebook and back
            behind the sum; ``None`` for no such projections.
    """

    def __init__(
        self,
        count: int,
        size: int,
        dim: int,
        latent_dim: int | None = None,
        *,
        angles: bool = False,
        outer_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.input = None if outer_dim is None else nn.Linear(outer_dim, dim, bias=False)
        self.levels = nn.ModuleList([Level(size, dim, latent_dim, angles=angles) for _ in range(count)])
        self.output = None if outer_dim is None else nn.Linear(dim, outer_dim, bias=False)

    def __len__(self) -> int:
        """Number of codebooks."""
        return len(self.levels)

    def level(self, index: int) -> Level:
        """One of the codebooks, coarse to fine."""
        return cast(Level, self.levels[index])

    def codes(self, latents: Float[Tensor, "batch frames latent"], count: int) -> Int[Tensor, "batch frames count"]:
        """Codes of the first ``count`` codebooks."""
        rest = latents if self.input is None else self.input(latents)
        found = []
        for index in range(count):
            ids = self.level(index).ids(rest)
            if index + 1 < count:
                rest = rest - self.level(index).vectors(ids)
            found.append(ids)
        return torch.stack(found, dim=-1)

    def each(self, codes: Int[Tensor, "batch frames count"]) -> Float[Tensor, "batch frames count latent"]:
        """The vector of each code as it is added to its frame's latents."""
        vectors = torch.stack([self.level(index).vectors(codes[..., index]) for index in range(codes.shape[-1])], dim=2)
        return vectors if self.output is None else self.output(vectors)

    def vectors(self, codes: Int[Tensor, "batch frames count"]) -> Float[Tensor, "batch frames latent"]:
        """Latents that codes of the first few codebooks stand for."""
        total = self.level(0).vectors(codes[..., 0])
        for index in range(1, codes.shape[-1]):
            total = total + self.level(index).vectors(codes[..., index])
        return total if self.output is None else self.output(total)

"""Vectors to ids: a codebook in version 1, ternary digits in later ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.codecs.s3tokenizer.config import S3TokenizerConfig
from zoo.kernels.codebook import CodebookSearch
from zoo.precision import Float32Module

Vectors = Float[Tensor, "*shape dim"]
Ids = Int[Tensor, "*shape"]

# How far out a digit is pressed: the original's 0.999, in float32.
_PRESSED = 0.9990000128746033


class Codebook(Float32Module):
    """The nearest row to a vector of length 1; rows stay as they are stored, so that this is not the largest cosine."""

    def __init__(self, config: S3TokenizerConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(config.codebook_size, config.dim), dim=1))
        self._search = CodebookSearch()

    @property
    def dim(self) -> int:
        """Width of what `vectors` returns."""
        return self.weight.shape[1]

    def ids(self, x: Vectors) -> Ids:
        """Ids of vectors of the encoder."""
        return self._search(F.normalize(x.float(), dim=-1, eps=1e-12), self.weight)

    def vectors(self, ids: Ids) -> Vectors:
        """Rows of the codebook."""
        return F.embedding(ids, self.weight)


class Ternary(Float32Module):
    """Each of a few projections is rounded to -1, 0 or 1; an id is their number in base 3, the first one the lowest digit."""

    def __init__(self, config: S3TokenizerConfig) -> None:
        super().__init__()
        projection = nn.Linear(config.dim, config.digits)
        self.weight, self.bias = projection.weight, projection.bias

    @property
    def dim(self) -> int:
        """Width of what `vectors` returns."""
        return self.weight.shape[0]

    def _powers(self, like: Tensor) -> Int[Tensor, " digits"]:
        return 3 ** torch.arange(self.dim, dtype=torch.int64, device=like.device)

    def project(self, x: Vectors) -> Float[Tensor, "*shape digits"]:
        """Numbers to round, before the tanh."""
        return F.linear(x.float(), self.weight, self.bias)

    def ids(self, x: Vectors) -> Ids:
        """Ids of vectors of the encoder."""
        digits = (self.project(x).tanh() * _PRESSED).round().to(torch.int64) + 1
        return (digits * self._powers(x)).sum(-1)

    def vectors(self, ids: Ids) -> Float[Tensor, "*shape digits"]:
        """The digits, each -1, 0 or 1."""
        return (ids[..., None] // self._powers(ids) % 3 - 1).float()

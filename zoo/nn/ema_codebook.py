"""Codebooks that learn by exponential moving averages of the vectors assigned to them (arXiv 1711.00937, appendix A.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.kernels.codebook import nearest, prepare


@dataclass(frozen=True)
class Quantized:
    """One quantisation: ``vectors`` carry the straight-through gradient, ``commitment`` is ``mean((latent - code)^2)``."""

    vectors: Float[Tensor, "*shape dim"]
    ids: Int[Tensor, "*shape"]
    commitment: Float[Tensor, ""]


class EMACodebook(nn.Module):
    """A codebook updated from batch statistics, with k-means initialisation and replacement of unused codes.

    Args:
        size, dim: number and width of the codes.
        decay: share of the running statistics kept per update.
        dead_below: codes with a smaller running count are replaced by random vectors of the batch.
        official: replace as the released models were trained: the replacement is overwritten by the moving average of the
            same update and so has no effect. The default also resets the running statistics, so that it has one.
    """

    embed: Tensor
    embed_avg: Tensor
    cluster_size: Tensor
    inited: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        dead_below: float = 2.0,
        official: bool = False,
    ) -> None:
        super().__init__()
        self.decay, self.epsilon, self.dead_below, self.official = decay, epsilon, dead_below, official
        self.register_buffer("inited", torch.zeros(1))
        self.register_buffer("cluster_size", torch.zeros(size))
        self.register_buffer("embed", torch.zeros(size, dim))
        self.register_buffer("embed_avg", torch.zeros(size, dim))

    def forward(self, latents: Float[Tensor, "*shape dim"], generator: torch.Generator | None = None) -> Quantized:
        """Quantise with the codes as they are; in training mode update them afterwards."""
        flat = latents.detach().reshape(-1, latents.shape[-1]).float()
        ids = nearest(flat, prepare(self.embed))
        codes = F.embedding(ids, self.embed).reshape(latents.shape)
        if self.training:
            self.update(flat, ids, generator)
        commitment = F.mse_loss(latents, codes.detach())
        vectors = latents + (codes - latents).detach()
        return Quantized(vectors, ids.reshape(latents.shape[:-1]), commitment)

    @torch.no_grad()
    def initialise(
        self, vectors: Float[Tensor, "count dim"], iterations: int, generator: torch.Generator | None = None
    ) -> None:
        """Set the codes to the k-means centres of some vectors."""
        start = vectors[_choose(len(vectors), len(self.embed), generator)]
        centres, counts = kmeans(vectors, start, iterations)
        self.embed.copy_(centres)
        self.embed_avg.copy_(centres * counts[:, None])
        self.cluster_size.copy_(counts)
        self.inited.fill_(1)

    @torch.no_grad()
    def update(
        self,
        flat: Float[Tensor, "count dim"],
        ids: Int[Tensor, " count"],
        generator: torch.Generator | None = None,
        replacement: Float[Tensor, "codes dim"] | None = None,
    ) -> None:
        """One step of the moving averages, unused codes replaced by ``replacement`` (random vectors of the batch)."""
        dead = self.cluster_size < self.dead_below
        if bool(dead.any()):
            if replacement is None:
                replacement = flat[_choose(len(flat), len(self.embed), generator)]
            self.embed[dead] = replacement[dead]
            if not self.official:
                self.embed_avg[dead] = replacement[dead] * self.dead_below
                self.cluster_size[dead] = self.dead_below
        counts = torch.bincount(ids, minlength=len(self.embed)).to(flat)
        sums = torch.zeros_like(self.embed).index_add_(0, ids, flat)
        self.cluster_size.lerp_(counts, 1 - self.decay)
        self.embed_avg.lerp_(sums, 1 - self.decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.epsilon) / (total + len(self.embed) * self.epsilon) * total
        self.embed.copy_(self.embed_avg / smoothed[:, None])


def kmeans(
    vectors: Float[Tensor, "count dim"], centres: Float[Tensor, "codes dim"], iterations: int
) -> tuple[Float[Tensor, "codes dim"], Float[Tensor, " codes"]]:
    """Lloyd's iterations from given centres; an empty cluster keeps its centre. Returns centres and counts."""
    counts = vectors.new_zeros(len(centres))
    for _ in range(iterations):
        ids = nearest(vectors, prepare(centres))
        counts = torch.bincount(ids, minlength=len(centres)).to(vectors)
        means = torch.zeros_like(centres).index_add_(0, ids, vectors) / counts.clamp(min=1)[:, None]
        centres = torch.where((counts > 0)[:, None], means, centres)
    return centres, counts


def _choose(count: int, wanted: int, generator: torch.Generator | None) -> Int[Tensor, " wanted"]:
    """Random positions, without repetition where there are enough."""
    if count >= wanted:
        return torch.randperm(count, generator=generator, dtype=torch.int64)[:wanted]
    return torch.randint(count, (wanted,), generator=generator, dtype=torch.int64)

"""Two codebooks with one index, and residual quantization over scales (paper section 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.codecs.tokenflow.config import TokenFlowConfig
from zoo.codecs.tokenflow.encoder import resize
from zoo.derived import Derived
from zoo.kernels.codebook import nearest as search
from zoo.kernels.codebook import prepare
from zoo.kernels.screening import PreparedCodebook
from zoo.precision import Float32Module

LatentTensor = Float[Tensor, "batch channels grid grid"]
Vectors = Float[Tensor, "batch length channels"]

# Of the soft assignment in the entropy loss; the second one keeps its logarithm finite.
_TEMPERATURE = 0.01
_LOG_EPS = 1e-5


@dataclass(frozen=True)
class Quantized:
    """One quantization with what training needs of it; losses are means over the scales.

    Attributes:
        latents: the sum over scales, which carries the straight-through gradient.
        ids: scale by scale, row by row.
        codebook: ``mean((code - latent)^2)``, which moves the codes.
        commitment: the same number, which moves the latents.
        entropy: mean entropy of the soft assignments less the entropy of their mean; 0 where it was not asked for.
    """

    latents: LatentTensor
    ids: Int[Tensor, "batch length"]
    codebook: Float[Tensor, ""]
    commitment: Float[Tensor, ""]
    entropy: Float[Tensor, ""]


class MultiScaleQuantizer(Float32Module):
    """Latents to ids and back; stays in float32.

    A code is a semantic and a pixel vector, each of length 1, and the nearest code is the one with the smallest sum of squared
    distances in both. Every scale quantizes what the coarser ones left over.
    """

    def __init__(self, config: TokenFlowConfig) -> None:
        super().__init__()
        self.scales = config.scales
        self.grid = config.grid
        self.widths = (config.semantic_code_dim, config.pixel_code_dim)
        # Stored at any length, as in the original; they are normalised when used.
        self.semantic = nn.Parameter(self._new_codes(config.codebook_size, config.semantic_code_dim))
        self.pixels = nn.Parameter(self._new_codes(config.codebook_size, config.pixel_code_dim))
        self._derived: Derived[tuple[Tensor, PreparedCodebook]] = Derived()

    @staticmethod
    def _new_codes(size: int, dim: int) -> Float[Tensor, "codes dim"]:
        return F.normalize(torch.empty(size, dim).uniform_(-1 / size, 1 / size), dim=-1)

    def _unit(self, vectors: Float[Tensor, "*shape channels"]) -> Float[Tensor, "*shape channels"]:
        """The semantic and the pixel part, each at length 1."""
        return torch.cat([F.normalize(part, dim=-1) for part in vectors.split(self.widths, dim=-1)], dim=-1)

    def codes(self) -> Float[Tensor, "codes channels"]:
        """All codes, differentiable."""
        return self._unit(torch.cat([self.semantic, self.pixels], dim=1))

    def _prepared(self) -> tuple[Float[Tensor, "codes channels"], PreparedCodebook]:
        """All codes, and what the search needs of them."""

        @torch.no_grad()
        def compute() -> tuple[Tensor, PreparedCodebook]:
            codes = self.codes()
            return codes, prepare(codes)

        return self._derived.of([self.semantic, self.pixels], compute)

    # ---- latents to ids

    @torch.no_grad()
    def ids(self, latents: LatentTensor, scales: Sequence[int] | None = None) -> Int[Tensor, "batch length"]:
        """Ids of latents, coarse to fine, row by row within a scale; of the given scales, or of all."""
        return torch.cat([nearest for _, nearest in self.searches(latents, scales)], dim=1)

    @torch.no_grad()
    def searches(
        self, latents: LatentTensor, scales: Sequence[int] | None = None
    ) -> Iterator[tuple[Vectors, Int[Tensor, "batch length"]]]:
        """Scale by scale what codes are searched for, and the ids of the nearest ones."""
        codes, prepared = self._prepared()
        residual = latents
        for scale in scales or self.scales:
            queries = self._pooled(residual, scale)
            nearest = search(queries, prepared)
            residual = residual - self._spread(F.embedding(nearest, codes), scale)
            yield queries, nearest

    def _pooled(self, latents: LatentTensor, scale: int) -> Vectors:
        """Normalised means of the areas of a coarser grid, row by row."""
        return self._unit(F.adaptive_avg_pool2d(latents, scale).flatten(2).transpose(1, 2))

    def _spread(self, vectors: Vectors, scale: int) -> LatentTensor:
        """Vectors of a scale over the whole grid."""
        return resize(_as_grid(vectors, scale), self.grid)

    # ---- ids to latents

    def vectors(self, ids: Int[Tensor, "batch length"]) -> Vectors:
        """Codes of ids, zero where an id is -1."""
        return F.embedding(ids.clamp(min=0), self._prepared()[0]) * (ids >= 0)[..., None]

    def latents(self, ids: Int[Tensor, "batch length"]) -> LatentTensor:
        """The sum of the scales that ids of whole scales describe; padding of -1 adds nothing."""
        total = torch.zeros(len(ids), sum(self.widths), self.grid, self.grid, dtype=torch.float32, device=ids.device)
        for scale, vectors in self._by_scale(self.vectors(ids)):
            total = total + self._spread(vectors, scale)
        return total

    def next_scale_inputs(
        self, ids: Int[Tensor, "batch length"], refine: int | None = None
    ) -> Float[Tensor, "batch _ channels"]:
        """Inputs of a model that predicts scale after scale, for each scale but the first.

        As in upstream's text-to-image model, the sum of the scales so far is resized from each scale to the next, and not from
        each to the finest as it is for decoding. The sequence reaches one scale further than the ids unless they are complete.

        Args:
            ids: whole scales, padded with -1.
            refine: number of a scale, counted from 0, whose inputs contain its own codes already, to predict it once more.
        """
        vectors = self.vectors(ids)
        parts = dict(self._by_scale(vectors))
        known: Tensor | None = None
        inputs: list[Tensor] = []
        for number, scale in enumerate(self.scales[: len(parts) + 1]):
            if known is not None:
                known = resize(known, scale)
                inputs.append(known)
            if scale in parts:
                own = _as_grid(parts[scale], scale)
                known = own if known is None else known + own
                if number == refine and inputs:
                    inputs[-1] = known
        return torch.cat([vectors[:, :0], *(grid.flatten(2).transpose(1, 2) for grid in inputs)], dim=1)

    def _by_scale(self, vectors: Vectors) -> Iterator[tuple[int, Float[Tensor, "batch _ channels"]]]:
        """Pairs of a scale and its vectors."""
        start = 0
        for scale in self.scales:
            if start >= vectors.shape[1]:
                return
            yield scale, vectors[:, start : start + scale * scale]
            start += scale * scale

    # ---- training

    def forward(self, latents: LatentTensor, scales: Sequence[int] | None = None, entropy: bool = False) -> Quantized:
        """Quantize for training.

        Gradients pass straight through the codes to the normalised latents of each scale; what a coarser scale took away from
        the latents is a constant.

        Args:
            latents: of the encoders.
            scales: those to use; all by default. Training leaves one out at times.
            entropy: compute the entropy loss, which holds a matrix of queries by codes.
        """
        chosen = tuple(scales or self.scales)
        codes = self.codes()
        prepared = prepare(codes.detach())
        residual, total = latents, torch.zeros_like(latents)
        found, moves, commitments, entropies = [], [], [], []
        for scale in chosen:
            queries = self._pooled(residual, scale)
            nearest = search(queries.detach(), prepared)
            vectors = F.embedding(nearest, codes)
            moves.append(F.mse_loss(vectors, queries.detach()))
            commitments.append(F.mse_loss(queries, vectors.detach()))
            entropies.append(_entropy_loss(queries, codes) if entropy else latents.new_zeros(()))
            spread = self._spread(queries + (vectors - queries).detach(), scale)
            total = total + spread
            residual = residual - spread.detach()
            found.append(nearest)
        mean = [torch.stack(losses).mean() for losses in (moves, commitments, entropies)]
        return Quantized(total, torch.cat(found, dim=1), *mean)


def _as_grid(vectors: Vectors, scale: int) -> Float[Tensor, "batch channels rows columns"]:
    return vectors.transpose(1, 2).unflatten(2, (scale, scale))


def _entropy_loss(queries: Float[Tensor, "batch length channels"], codes: Float[Tensor, "codes channels"]) -> Float[Tensor, ""]:
    """Mean entropy of the soft assignments less the entropy of their mean, as in MAGVIT-v2 (arXiv 2310.05737)."""
    rows = queries.flatten(0, 1)
    # Both halves have length 1, so that the squared distance is 4 less twice the product.
    distances = 4 - 2 * rows @ codes.T
    logits = -distances / _TEMPERATURE
    probabilities = logits.softmax(dim=-1)
    sample_entropy = -(probabilities * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
    mean = probabilities.mean(dim=0)
    mean_entropy = -(mean * (mean + _LOG_EPS).log()).sum()
    return sample_entropy - mean_entropy

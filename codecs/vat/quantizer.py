"""Residual quantization of the latents over scales, one codebook for all of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from zoo.codecs.vat.config import VATConfig
from zoo.derived import Derived
from zoo.kernels.codebook import nearest as search
from zoo.kernels.codebook import prepare
from zoo.kernels.screening import PreparedCodebook
from zoo.precision import Float32Module

LatentTensor = Float[Tensor, "batch latents dim"]
Vectors = Float[Tensor, "batch length dim"]
Ids = Int[Tensor, "batch length"]


class ScaleQuantizer(Float32Module):
    """Latents to ids and back; stays in float32.

    A scale of n tokens cuts the sequence of latents into n runs. Each token is the code nearest to its run's mean residual, and
    that code times the scale's gain is taken off every latent of the run. Averaging and spreading is an orthogonal projection
    and the first code is zero, so no token ever raises the energy of the residual: every prefix is worth decoding.

    Attributes:
        codebook: ``[codes, dim]``; its first row counts as zero, whatever it holds.
        gain: a factor for each scale, positive.
    """

    gain: Tensor

    def __init__(self, config: VATConfig) -> None:
        super().__init__()
        self.scales = config.token_scales
        self.num_latents = config.num_latents
        self.codebook = nn.Parameter(torch.empty(config.codebook_size, config.latent_dim).normal_())
        self.register_buffer("gain", torch.ones(len(config.token_scales)))
        self._derived: Derived[tuple[Tensor, PreparedCodebook]] = Derived()

    def codes(self) -> Float[Tensor, "codes dim"]:
        """All codes, differentiable but for the first, which is zero."""
        return torch.cat([torch.zeros_like(self.codebook[:1]), self.codebook[1:]])

    def _prepared(self) -> tuple[Float[Tensor, "codes dim"], PreparedCodebook]:
        """All codes, and what the search needs of them."""

        def compute() -> tuple[Tensor, PreparedCodebook]:
            codes = self.codes().detach()
            return codes, prepare(codes)

        return self._derived.of([self.codebook], compute)

    # ---- runs of latents

    def _run_starts(self, count: int, device: torch.device) -> Int[Tensor, " bounds"]:
        """Where the runs of a scale begin, and where the last one ends."""
        return torch.arange(count + 1, dtype=torch.int64, device=device) * self.num_latents // count

    def pool(self, latents: LatentTensor, count: int) -> Vectors:
        """The mean of each of ``count`` runs."""
        starts = self._run_starts(count, latents.device)
        lengths = starts.diff()
        # Gathered instead of summed by index, which on a GPU has no fixed order.
        places = torch.arange(int(-(-self.num_latents // count)), dtype=torch.int64, device=latents.device)
        inside = places < lengths[:, None]
        members = latents[:, (starts[:-1, None] + places).clamp(max=self.num_latents - 1)]
        return (members * inside[..., None]).sum(2) / lengths[:, None]

    def spread(self, vectors: Vectors) -> LatentTensor:
        """Each vector over the latents of its run."""
        lengths = self._run_starts(vectors.shape[1], vectors.device).diff()
        return vectors.repeat_interleave(lengths, dim=1, output_size=self.num_latents)

    # ---- latents to ids

    @torch.no_grad()
    def ids(self, latents: LatentTensor) -> Ids:
        """Ids of latents, scale after scale."""
        codes, prepared = self._prepared()
        residual, found = latents, []
        for count, gain in zip(self.scales, self.gain, strict=True):
            pooled = self.pool(residual, count) / gain
            nearest = search(pooled, prepared)
            vectors = F.embedding(nearest, codes)
            # A code that rounding put before the zero vector must not raise the energy.
            helps = (vectors * (2 * pooled - vectors)).sum(-1) > 0
            found.append(nearest * helps)
            residual = residual - self.spread(gain * vectors * helps[..., None])
        return torch.cat(found, dim=1)

    # ---- ids to latents

    def vectors(self, ids: Ids) -> Vectors:
        """Codes of ids times their scale's gain; zero where an id is -1."""
        counts = torch.tensor(self.scales, dtype=torch.int64, device=ids.device)
        gains = self.gain.repeat_interleave(counts, output_size=sum(self.scales))[: ids.shape[1]]
        present: Bool[Tensor, "batch length"] = ids >= 0
        return F.embedding(ids.clamp(min=0), self.codes()) * (gains[:, None] * present[..., None])

    def partial_sums(self, ids: Ids) -> list[LatentTensor]:
        """The latents after each scale that the ids reach; tokens that are missing within a scale add nothing."""
        total = torch.zeros(len(ids), self.num_latents, self.codebook.shape[1], device=ids.device, dtype=self.codebook.dtype)
        sums, vectors, end = [], self.vectors(ids), 0
        for count in self.scales:
            if end >= ids.shape[1]:
                break
            own = vectors[:, end : end + count]
            total = total + self.spread(F.pad(own, (0, 0, 0, count - own.shape[1])))
            sums.append(total)
            end += count
        return sums

    def latents(self, ids: Ids) -> LatentTensor:
        """The latents that any prefix of the ids of shapes describes; padding of -1 adds nothing."""
        return self.partial_sums(ids)[-1]

    def next_scale_inputs(self, ids: Ids) -> Float[Tensor, "batch positions dim"]:
        """The sum after each whole scale of the ids, pooled to the runs of the next scale."""
        sums = self.partial_sums(ids)
        pooled = [self.pool(total, count) for total, count in zip(sums, self.scales[1:], strict=False)]
        return torch.cat([sums[0][:, :0], *pooled], dim=1)

"""The losses of the training step, and how the codebook starts and is kept in use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from zoo.codecs.vat.decoder import sample_planes
from zoo.codecs.vat.encoder import draw, kl_divergence
from zoo.codecs.vat.quantizer import ScaleQuantizer
from zoo.codecs.vat.tokenizer import VAT
from zoo.nn.terms import Losses

LatentTensor = Float[Tensor, "batch latents dim"]

# Weights of points near the surface, of the divergence and of the quantizer; the share of the latents in the quantizer's loss
# is that of arXiv 2404.02905.
NEAR_WEIGHT, KL_WEIGHT, QUANTIZER_WEIGHT, COMMITMENT = 0.5, 2e-4, 0.5, 0.25
# Share of the steps that decode from a few scales only, so that prefixes decode.
SCALE_DROPOUT = 0.25
# A gain follows the size of the residuals this slowly.
GAIN_DECAY = 0.98
# Residuals of each scale that k-means looks at.
_RESIDUALS_PER_SCALE = 4000


@dataclass(frozen=True)
class Batch:
    """Shapes to train on, in the model's frame.

    Attributes:
        points, normals: on the surfaces.
        volume_points, volume_labels: anywhere in [-1, 1]; 1 inside, 0 outside.
        near_points, near_labels: about the surfaces.
    """

    points: Float[Tensor, "batch points 3"]
    normals: Float[Tensor, "batch points 3"]
    volume_points: Float[Tensor, "batch volume 3"]
    volume_labels: Float[Tensor, "batch volume"]
    near_points: Float[Tensor, "batch near 3"]
    near_labels: Float[Tensor, "batch near"]


def losses(tokenizer: VAT, batch: Batch, *, quantize: bool, generator: torch.Generator | None = None) -> Losses:
    """The losses of a batch, differentiable.

    Training has two phases: latents stay continuous in the first, and in the second, after `start_codebook`, they are
    quantized and everything is tuned.

    Args:
        tokenizer: the model. In training mode the gains of its quantizer follow the residuals, and some steps drop scales.
        batch: the shapes.
        quantize: the second phase.
        generator: of the noise and of the dropped scales.

    Returns:
        ``volume`` and ``near``, binary cross-entropy of the occupancy; ``divergence`` of the latents' Gaussian; ``quantizer``,
        how far the sums after each scale are from the latents, 0 where latents stay continuous. Outputs: ``volume_logits``
        and ``near_logits`` ``[batch, points]``, the occupancy.
    """
    mean, log_variance = tokenizer.encoder(batch.points, batch.normals)
    noise = torch.randn(mean.shape, generator=generator, device=generator.device if generator else mean.device)
    latents = draw(mean, log_variance, noise.to(mean.device))
    quantizer_loss = latents.new_zeros(())
    if quantize:
        latents, quantizer_loss = quantized(tokenizer.quantizer, latents, generator)
    planes = tokenizer.decoder(latents)
    logits = tokenizer.query(sample_planes(planes, torch.cat([batch.volume_points, batch.near_points], dim=1)))
    volume_logits, near_logits = logits.split([batch.volume_points.shape[1], batch.near_points.shape[1]], dim=1)
    terms = {
        "volume": F.binary_cross_entropy_with_logits(volume_logits, batch.volume_labels),
        "near": NEAR_WEIGHT * F.binary_cross_entropy_with_logits(near_logits, batch.near_labels),
        "divergence": KL_WEIGHT * kl_divergence(mean, log_variance).mean(),
        "quantizer": QUANTIZER_WEIGHT * quantizer_loss,
    }
    return Losses(terms, {"volume_logits": volume_logits, "near_logits": near_logits})


def quantized(
    quantizer: ScaleQuantizer, latents: LatentTensor, generator: torch.Generator | None = None
) -> tuple[LatentTensor, Float[Tensor, ""]]:
    """The decoder's input in training, with the straight-through gradient, and the quantizer's loss.

    In training mode the gains move towards the root mean square of the residuals they belong to, and a share of the calls
    stops after a random scale.
    """
    if quantizer.training:
        follow_residuals(quantizer, latents.detach())
    sums = quantizer.partial_sums(quantizer.ids(latents.detach()))
    terms = [COMMITMENT * F.mse_loss(latents, total.detach()) + F.mse_loss(total, latents.detach()) for total in sums]
    chosen = sums[-1]
    if quantizer.training:
        device = generator.device if generator else latents.device
        chance, place = torch.rand(2, generator=generator, device=device).tolist()
        if chance < SCALE_DROPOUT:
            chosen = sums[int(place * len(sums))]
    return latents + (chosen - latents).detach(), torch.stack(terms).mean()


@torch.no_grad()
def residuals(quantizer: ScaleQuantizer, latents: LatentTensor) -> list[Float[Tensor, "vectors dim"]]:
    """Residuals that each scale has to quantize, averaged over its runs."""
    sums = quantizer.partial_sums(quantizer.ids(latents))
    left = [latents, *(latents - total for total in sums[:-1])]
    return [quantizer.pool(own, count).flatten(0, 1) for own, count in zip(left, quantizer.scales, strict=True)]


@torch.no_grad()
def follow_residuals(quantizer: ScaleQuantizer, latents: LatentTensor, decay: float = GAIN_DECAY) -> None:
    """Move the gains towards the root mean square of what their scales quantize."""
    size = torch.stack([own.square().mean().sqrt() for own in residuals(quantizer, latents)])
    quantizer.gain.lerp_(size.clamp(min=1e-6).to(quantizer.gain.dtype), 1 - decay)


@torch.no_grad()
def start_codebook(
    quantizer: ScaleQuantizer, latents: LatentTensor, *, generator: torch.Generator | None = None, steps: int = 20
) -> None:
    """Set gains and codes by k-means over the residuals of all scales, each divided by its gain.

    Scales take their turn, because each leaves what the next one sees: a gain is set to the size of its residuals, which
    then join the vectors that the codes are the means of. The first code stays zero.

    Args:
        quantizer: what to set.
        latents: of many shapes.
        generator: picks the first codes.
        steps: of k-means, each time.
    """
    device = generator.device if generator else latents.device
    seen: list[Tensor] = []
    for scale in range(len(quantizer.scales)):
        own = residuals(quantizer, latents)[scale]
        quantizer.gain[scale] = own.square().mean().sqrt().clamp(min=1e-6)
        chosen = torch.randperm(len(own), generator=generator, device=device)[:_RESIDUALS_PER_SCALE]
        seen.append(own[chosen.to(own.device)] / quantizer.gain[scale])
        vectors = torch.cat(seen)
        if scale == 0:
            _redraw(quantizer, torch.arange(1, len(quantizer.codebook), device=own.device), vectors, generator)
        for _ in range(steps):
            _move_codes(quantizer, vectors, generator)


@torch.no_grad()
def redraw_unused(
    quantizer: ScaleQuantizer,
    usage: Int[Tensor, " codes"],
    latents: LatentTensor,
    *,
    threshold: float = 0.02,
    generator: torch.Generator | None = None,
) -> int:
    """Put codes that were hardly used where there are residuals; returns how many.

    Args:
        quantizer: what to change.
        usage: how often each code was used of late.
        latents: of the shapes at hand.
        threshold: a code is dead below this share of its fair share of uses.
        generator: picks the residuals.
    """
    dead = usage < threshold / len(usage) * usage.sum()
    dead[0] = False
    pairs = zip(residuals(quantizer, latents), quantizer.gain, strict=True)
    _redraw(quantizer, dead.nonzero()[:, 0], torch.cat([own / gain for own, gain in pairs]), generator)
    return int(dead.sum())


def _redraw(
    quantizer: ScaleQuantizer,
    codes: Int[Tensor, " dead"],
    vectors: Float[Tensor, "vectors dim"],
    generator: torch.Generator | None,
) -> None:
    """Replace codes by random vectors, moved a little so that no two are the same."""
    device = generator.device if generator else vectors.device
    chosen = torch.randint(len(vectors), (len(codes),), generator=generator, device=device).to(vectors.device)
    noise = torch.randn((len(codes), vectors.shape[1]), generator=generator, device=device).to(vectors.device)
    quantizer.codebook[codes] = (vectors[chosen] + 0.01 * noise).to(quantizer.codebook.dtype)


def _move_codes(quantizer: ScaleQuantizer, vectors: Float[Tensor, "vectors dim"], generator: torch.Generator | None) -> None:
    """One step of k-means in which the first code stays zero; codes that nothing is nearest to are drawn anew."""
    codes = quantizer.codes()
    nearest = torch.cdist(vectors, codes).argmin(1)
    counts = nearest.bincount(minlength=len(codes))
    sums = torch.zeros_like(codes).index_add_(0, nearest, vectors.to(codes.dtype))
    used = counts > 0
    used[0] = False
    quantizer.codebook[used] = sums[used] / counts[used, None]
    _redraw(quantizer, (counts[1:] == 0).nonzero()[:, 0] + 1, vectors, generator)

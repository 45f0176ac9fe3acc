"""The losses of the training step, of IBQ and of Open-MAGVIT2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.codecs.ibq.config import Quantization
from zoo.codecs.ibq.tokenizer import IBQ
from zoo.nn.patch_discriminator import Logits, discriminator_loss
from zoo.nn.terms import Losses

Images = Float[Tensor, "batch 3 height width"]


@dataclass(frozen=True)
class Weights:
    """Weights of the terms, as published.

    Attributes:
        adversarial: what the discriminator says.
        quantization: see `Quantized.loss`.
        entropy: see `Quantized.entropy_loss`.
    """

    adversarial: float
    quantization: float
    entropy: float


#: IBQ's, and Open-MAGVIT2's. Emu3.5's were not published.
WEIGHTS: dict[Quantization, Weights] = {"ibq": Weights(0.1, 1.0, 0.05), "lfq": Weights(0.1, 0.25, 0.1)}


def generator_loss(fake: Logits) -> Float[Tensor, ""]:
    """Loss of the generator: softplus of the negative mean score of each of its images."""
    return F.softplus(-fake.flatten(1).mean(1)).mean()


class LeCAM(nn.Module):
    """Keeps the discriminator's scores near running averages of the other kind's scores (arXiv 2104.03310).

    Args:
        decay: of the averages, which begin at 0 and are updated before they are used.
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    real: Tensor
    fake: Tensor

    @torch.no_grad()
    def update(self, real: Logits, fake: Logits) -> None:
        """Take the scores of a batch of originals and of reconstructions into the averages."""
        self.real.lerp_(real.mean(), 1 - self.decay)
        self.fake.lerp_(fake.mean(), 1 - self.decay)

    def forward(self, real: Logits, fake: Logits) -> Float[Tensor, ""]:
        """The regulariser for scores and the averages as they are."""
        return F.relu(real - self.fake).square().mean() + F.relu(self.real - fake).square().mean()


def discriminator_step_loss(real: Logits, fake: Logits, lecam: LeCAM | None = None, weight: float = 0.05) -> Float[Tensor, ""]:
    """Loss of the discriminator: the hinge loss, and LeCAM, updated now, at its weight (0.01 at 128 pixels)."""
    hinge = discriminator_loss(real, fake)
    if lecam is None:
        return hinge
    lecam.update(real, fake)
    regulariser: Tensor = lecam(real, fake)
    return hinge + weight * regulariser


def losses(
    tokenizer: IBQ,
    images: Images,
    *,
    perceptual: Callable[[Images, Images], Tensor] | None = None,
    discriminator: Callable[[Images], Tensor] | None = None,
    weights: Weights | None = None,
) -> Losses:
    """The generator's losses for a batch of images in [-1, 1], differentiable.

    Args:
        tokenizer: the model.
        images: the batch, of whole cells.
        perceptual: a distance of reconstruction and image, LPIPS in the papers.
        discriminator: see `zoo.nn.patch_discriminator`, and `discriminator_step_loss` for its own step.
        weights: of the terms; the published ones by default.

    Returns:
        ``pixels``, mean absolute difference of the images; ``perceptual``; ``adversarial``; ``quantization`` and ``entropy``,
        see `quantizer.Quantized`. Outputs: ``images``, the reconstruction, which the discriminator's own step needs.

    Raises:
        WeightsError: a part was not loaded.
    """
    for part in ("encoder", "decoder"):
        tokenizer.require(part, "training")
    weights = weights or WEIGHTS[tokenizer.config.quantization]
    quantized = tokenizer.quantizer(tokenizer.encoder(images))
    reconstruction = tokenizer.decoder(quantized.latents)
    nothing = images.new_zeros(())
    adversarial = nothing if discriminator is None else weights.adversarial * generator_loss(discriminator(reconstruction))
    terms = {
        "pixels": F.l1_loss(reconstruction, images),
        "perceptual": nothing if perceptual is None else perceptual(reconstruction, images).mean(),
        "adversarial": adversarial,
        "quantization": weights.quantization * quantized.loss,
        "entropy": weights.entropy * quantized.entropy_loss,
    }
    return Losses(terms, {"images": reconstruction})

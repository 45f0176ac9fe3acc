"""The losses of the training step (paper section 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from zoo.codecs.tokenflow.config import TokenFlowConfig
from zoo.codecs.tokenflow.decoder import PixelDecoder, SemanticDecoder
from zoo.codecs.tokenflow.encoder import Encoder
from zoo.codecs.tokenflow.quantizer import MultiScaleQuantizer
from zoo.nn.patch_discriminator import generator_loss

Images = Float[Tensor, "batch 3 height width"]
Features = Float[Tensor, "batch patches features"]

# The original waits 20,000 steps before it switches the adversarial loss on, at this weight.
ADVERSARIAL_WEIGHT = 0.5


@dataclass(frozen=True)
class Losses:
    """The terms of one step, each at its weight; 0 where a term was left out.

    Attributes:
        pixels: mean squared error of the images.
        perceptual: LPIPS of the images.
        adversarial: what the discriminator says about the reconstruction.
        semantic: distance of the features from the teacher's.
        codebook, commitment, entropy: see `quantizer.Quantized`.
        images: the reconstruction, which the discriminator's own step needs.
    """

    pixels: Float[Tensor, ""]
    perceptual: Float[Tensor, ""]
    adversarial: Float[Tensor, ""]
    semantic: Float[Tensor, ""]
    codebook: Float[Tensor, ""]
    commitment: Float[Tensor, ""]
    entropy: Float[Tensor, ""]
    images: Images

    @property
    def total(self) -> Float[Tensor, ""]:
        """The sum, to be lowered."""
        terms = (self.pixels, self.perceptual, self.adversarial, self.semantic, self.codebook, self.commitment, self.entropy)
        return torch.stack(terms).sum()


def semantic_loss(features: Features, teacher: Features) -> Float[Tensor, ""]:
    """One less the cosine to the teacher's features, averaged over patches. (The paper speaks of an l2 distance.)"""
    return 1 - F.cosine_similarity(features, teacher, dim=-1).mean()


def losses(
    config: TokenFlowConfig,
    encoder: Encoder,
    quantizer: MultiScaleQuantizer,
    decoder: PixelDecoder,
    images: Images,
    *,
    semantic_decoder: SemanticDecoder | None = None,
    teacher: Features | None = None,
    perceptual: Callable[[Images, Images], Tensor] | None = None,
    discriminator: Callable[[Images], Tensor] | None = None,
    adversarial_weight: float = ADVERSARIAL_WEIGHT,
    scales: tuple[int, ...] | None = None,
) -> Losses:
    """The generator's losses for a batch of images in [-1, 1]; see `TokenFlow.training_losses`.

    A teacher's features need the ``semantic_decoder``, which is compared with them.
    """
    quantized = quantizer(encoder(images), scales, entropy=config.entropy > 0)
    semantic, pixels = quantized.latents.split((config.semantic_code_dim, config.pixel_code_dim), dim=1)
    reconstruction = decoder(pixels)
    nothing = images.new_zeros(())
    semantics = nothing
    if teacher is not None:
        assert semantic_decoder is not None
        semantics = semantic_loss(semantic_decoder(semantic), teacher)
    return Losses(
        pixels=F.mse_loss(reconstruction, images),
        perceptual=nothing if perceptual is None else perceptual(reconstruction, images).mean(),
        adversarial=nothing if discriminator is None else adversarial_weight * generator_loss(discriminator(reconstruction)),
        semantic=semantics,
        codebook=quantized.codebook,
        commitment=config.commitment * quantized.commitment,
        entropy=config.entropy * quantized.entropy,
        images=reconstruction,
    )


def drop_scale(scales: tuple[int, ...], probability: float = 0.1, generator: torch.Generator | None = None) -> tuple[int, ...]:
    """The scales of one step: with some probability any one but the first is left out, the last included."""
    if len(scales) < 2 or torch.rand((), generator=generator) >= probability:
        return scales
    dropped = int(torch.randint(1, len(scales), (), generator=generator))
    return scales[:dropped] + scales[dropped + 1 :]

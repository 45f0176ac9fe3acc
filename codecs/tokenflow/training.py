"""The losses of the training step (paper section 3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from zoo.codecs.tokenflow.config import PARTS
from zoo.codecs.tokenflow.tokenizer import TokenFlow
from zoo.nn.patch_discriminator import generator_loss
from zoo.nn.terms import Losses

Images = Float[Tensor, "batch 3 height width"]
Features = Float[Tensor, "batch patches features"]

# The original waits 20,000 steps before it switches the adversarial loss on, at this weight.
ADVERSARIAL_WEIGHT = 0.5


def semantic_loss(features: Features, teacher: Features) -> Float[Tensor, ""]:
    """One less the cosine to the teacher's features, averaged over patches. (The paper speaks of an l2 distance.)"""
    return 1 - F.cosine_similarity(features, teacher, dim=-1).mean()


def losses(
    tokenizer: TokenFlow,
    images: Images,
    *,
    teacher: Features | None = None,
    perceptual: Callable[[Images, Images], Tensor] | None = None,
    discriminator: Callable[[Images], Tensor] | None = None,
    adversarial_weight: float = ADVERSARIAL_WEIGHT,
    scales: tuple[int, ...] | None = None,
) -> Losses:
    """The generator's losses for a batch of images of the model's size in [-1, 1], differentiable.

    Args:
        tokenizer: the model.
        images: the batch.
        teacher: the teacher's features of the images, without which there is no semantic loss.
        perceptual: a distance of reconstruction and image, LPIPS in the paper.
        discriminator: see `zoo.nn.patch_discriminator`; upstream leaves it out during the first 20,000 steps.
        adversarial_weight: of the discriminator's say.
        scales: those to use, see `drop_scale`; all by default.

    Returns:
        ``pixels``, mean squared error of the images; ``perceptual``; ``adversarial``; ``semantic``, distance of the features
        from the teacher's; ``codebook``, ``commitment`` and ``entropy``, see `quantizer.Quantized`. Outputs: ``images``, the
        reconstruction, which the discriminator's own step needs.

    Raises:
        WeightsError: a part that takes part was not loaded.
    """
    for part in ("encoder", "decoder") if teacher is None else PARTS:
        tokenizer.require(part, "training")
    config = tokenizer.config
    quantized = tokenizer.quantizer(tokenizer.encoder(images), scales, entropy=config.entropy > 0)
    semantic, pixels = quantized.latents.split((config.semantic_code_dim, config.pixel_code_dim), dim=1)
    reconstruction = tokenizer.decoder(pixels)
    nothing = images.new_zeros(())
    terms = {
        "pixels": F.mse_loss(reconstruction, images),
        "perceptual": nothing if perceptual is None else perceptual(reconstruction, images).mean(),
        "adversarial": nothing if discriminator is None else adversarial_weight * generator_loss(discriminator(reconstruction)),
        "semantic": nothing if teacher is None else semantic_loss(tokenizer.semantic_decoder(semantic), teacher),
        "codebook": quantized.codebook,
        "commitment": config.commitment * quantized.commitment,
        "entropy": config.entropy * quantized.entropy,
    }
    return Losses(terms, {"images": reconstruction})


def drop_scale(scales: tuple[int, ...], probability: float = 0.1, generator: torch.Generator | None = None) -> tuple[int, ...]:
    """The scales of one step: with some probability any one but the first is left out, the last included."""
    if len(scales) < 2 or torch.rand((), generator=generator) >= probability:
        return scales
    dropped = int(torch.randint(1, len(scales), (), generator=generator))
    return scales[:dropped] + scales[dropped + 1 :]

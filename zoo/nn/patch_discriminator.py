"""The discriminator of image patches (arXiv 1611.07004, section 3.2.2) and the hinge losses that go with it."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Logits = Float[Tensor, "batch 1 rows columns"]

_SLOPE = 0.2
_WIDEST = 8


class PatchDiscriminator(nn.Module):
    """Convolutions whose every output judges a patch of the image: the larger, the more real.

    Args:
        channels: after the first layer; each later one has twice as many, up to 8 times.
        layers: of stride 2; two more follow with stride 1.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        modules: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(_SLOPE)]
        width = channels
        for layer in range(1, layers + 1):
            inputs, width = width, channels * min(2**layer, _WIDEST)
            # The norm that follows has a bias of its own.
            convolution = nn.Conv2d(inputs, width, 4, stride=2 if layer < layers else 1, padding=1, bias=False)
            modules += [convolution, nn.BatchNorm2d(width), nn.LeakyReLU(_SLOPE)]
        self.main = nn.Sequential(*modules, nn.Conv2d(width, 1, 4, padding=1))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Logits:
        logits: Tensor = self.main(images)
        return logits


def discriminator_loss(real: Logits, fake: Logits) -> Float[Tensor, ""]:
    """Hinge loss of the discriminator, half of ``mean(relu(1 - real)) + mean(relu(1 + fake))``."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_loss(fake: Logits) -> Float[Tensor, ""]:
    """Loss of the generator: the mean score of its images, negated."""
    return -fake.mean()

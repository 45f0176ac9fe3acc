"""Starting points in closed form for small networks: principal components, regressions, convolutions that hand pixels on.

A short training on a CPU does not find what linear algebra finds in a second: with these, it starts at the best linear map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.weights.data.image import Images

LatentTensor = Float[Tensor, "batch channels rows columns"]
Rows = Float[Tensor, "rows channels"]

# Constants in the channels of a decoder that hold nothing else. They make up most of what a norm measures, so that it does not
# take brightness and contrast away; and a point around which SiLU is almost linear.
DECODER_CONSTANT, DECODER_POINT = 2.0, 3.0
CENTRE = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
ACROSS = torch.tensor([[0.0, 0.0, 0.0], [-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])


def as_cells(images: Images, side: int) -> Float[Tensor, "batch rows columns pixels"]:
    """The pixels of square cells, channel by channel."""
    rows_of_cells = images.unfold(2, side, side).unfold(3, side, side)
    return rows_of_cells.permute(0, 2, 3, 1, 4, 5).flatten(3)


def principal(
    vectors: Float[Tensor, "count width"], components: int
) -> tuple[Float[Tensor, " width"], Float[Tensor, "components width"], Float[Tensor, " components"]]:
    """Mean, principal axes and the standard deviations along them."""
    mean = vectors.mean(dim=0)
    values, axes = torch.linalg.eigh((vectors - mean).T @ (vectors - mean) / len(vectors))
    return mean, axes.T.flip(0)[:components].contiguous(), values.flip(0)[:components].clamp(min=1e-6).sqrt()


def least_squares(
    features: Rows, targets: Float[Tensor, "rows outputs"], ridge: float = 1e-6
) -> tuple[Float[Tensor, "outputs channels"], Float[Tensor, " outputs"]]:
    """Weight ``[outputs, inputs]`` and bias of the linear map of features that comes closest to the targets.

    ``ridge`` is a share of the mean variance of the features. Sums are taken in double precision: features may be constants
    everywhere but at the border of an image, and their small differences still count.
    """
    mean, goal = features.mean(dim=0, dtype=torch.float64), targets.mean(dim=0, dtype=torch.float64)
    covariance, product = torch.zeros(len(mean), len(mean)).double(), torch.zeros(len(mean), len(goal)).double()
    for some, wanted in zip(features.split(1 << 16), targets.split(1 << 16), strict=True):
        centred = some - mean
        covariance += centred.T @ centred / len(features)
        product += centred.T @ (wanted - goal) / len(features)
    damping = ridge * covariance.diagonal().mean() * torch.eye(len(covariance)).double()
    weight = torch.linalg.solve(covariance + damping, product).T
    return weight.to(features.dtype), (goal - weight @ mean).to(features.dtype)


@dataclass(frozen=True)
class Decoder:
    """The layers of a convolutional decoder in their order; calling it leaves the last convolution out.

    Attributes:
        post_quant_conv, conv_in, mid, norm_out, conv_out: single layers.
        levels: diffusers' decoder blocks, coarse to fine; all but the last double the resolution.
    """

    post_quant_conv: nn.Conv2d
    conv_in: nn.Conv2d
    mid: nn.Module
    levels: Sequence[Any]
    norm_out: nn.GroupNorm
    conv_out: nn.Conv2d

    def __call__(self, latents: LatentTensor) -> Float[Tensor, "batch _ _ _"]:
        """What the last convolution is applied to.

        In the layout of the latents: in channels last, PyTorch's group norm takes as long backwards as all convolutions.
        """
        x = self.mid(self.conv_in(self.post_quant_conv(latents)))
        for level in self.levels:
            x = level(x)
        return F.silu(self.norm_out(x))


@torch.no_grad()
def initialise_decoder(decoder: Decoder, latents: LatentTensor, images: Images, channels: int, scale: float = 1.0) -> None:
    """Start close to the linear map of the first channels of latents, times a scale, to pixels that fits best.

    Channels hand on the latents and their differences between neighbours, which tell the places within a cell apart after the
    first doubling. The convolution after the last one is a regression of the pixels, and so is the one at the end.
    """
    for module in (decoder.mid, *decoder.levels):
        close_branches(module)
    pass_on(decoder.post_quant_conv, channels, (CENTRE,), 0.0)
    decoder.post_quant_conv.weight *= scale
    pass_on(decoder.conv_in, channels, (CENTRE,), DECODER_CONSTANT)
    held = channels
    for number, level in enumerate(decoder.levels):
        if level.resnets[0].conv_shortcut is not None:
            pass_on(level.resnets[0].conv_shortcut, held, (CENTRE,), DECODER_CONSTANT)
        if level.upsamplers:
            convolution = level.upsamplers[0].conv
            pass_on(convolution, held, (CENTRE, ACROSS, ACROSS.T), DECODER_CONSTANT)
            held = min(3 * held, convolution.out_channels - 1)
            if number == len(decoder.levels) - 2:
                pixels_first(convolution, inputs_of(convolution, decoder, latents), images)
    decoder.norm_out.bias.fill_(DECODER_POINT)
    regress(decoder.conv_out, inputs_of(decoder.conv_out, decoder, latents), images)


@torch.no_grad()
def pass_on(convolution: nn.Conv2d, channels: int, kernels: Sequence[Float[Tensor, "3 3"]], constant: float) -> None:
    """Let a convolution apply each kernel to each of its first channels; the outputs left over are constants of both signs."""
    nn.init.zeros_(convolution.weight)
    assert convolution.bias is not None
    outputs, inputs = convolution.weight.shape[:2]
    convolution.bias.copy_(constant * (1 - 2 * (torch.arange(outputs) % 2)))
    middle = 1 - convolution.kernel_size[0] // 2
    for number, kernel in enumerate(kernels):
        for channel in range(min(channels, inputs, outputs - 1 - number * channels)):
            place = number * channels + channel
            convolution.weight[place, channel] = kernel[middle : 3 - middle, middle : 3 - middle]
            convolution.bias[place] = 0


@torch.no_grad()
def place_taps(convolution: nn.Conv2d, channels: int, taps: Sequence[tuple[int, int]]) -> None:
    """Let a convolution hand its first channels on, once for each tap of its kernel, and nothing else."""
    nn.init.zeros_(convolution.weight)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    for number, (row, column) in enumerate(taps):
        for channel in range(channels):
            convolution.weight[number * channels + channel, channel, row, column] = 1.0


def inputs_of(convolution: nn.Conv2d, decoder: Decoder, latents: LatentTensor) -> Float[Tensor, "batch _ _ _"]:
    """Inputs of a convolution of the decoder."""
    found: list[Tensor] = []
    with convolution.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0])):
        for some in latents.split(16):
            decoder.conv_out(decoder(some))
    return torch.cat(found)


@torch.no_grad()
def pixels_first(convolution: nn.Conv2d, inputs: LatentTensor, pixels: Images) -> None:
    """Let the first three outputs of a convolution be pixels, and those behind them what the first were."""
    weight, bias = convolution.weight.clone(), convolution.bias.clone()
    regression = nn.Conv2d(convolution.in_channels, 3, 3, padding=1)
    regress(regression, inputs, pixels)
    moved = len(weight) - 3 - len(weight) // 4
    convolution.weight[3 : 3 + moved], convolution.bias[3 : 3 + moved] = weight[:moved], bias[:moved]
    convolution.weight[3 + moved :] = 0
    convolution.bias[3 + moved :] = DECODER_CONSTANT * (1 - 2 * (torch.arange(len(weight) - 3 - moved) % 2))
    assert regression.bias is not None
    convolution.weight[:3], convolution.bias[:3] = regression.weight, regression.bias


@torch.no_grad()
def regress(convolution: nn.Conv2d, inputs: LatentTensor, outputs: Float[Tensor, "batch outputs rows columns"]) -> None:
    """Let a convolution of 3 x 3 give what comes closest to the outputs, found from a seventh of the places of each item.

    They are others in every item: corners, where padding meets from two sides, need their share.
    """
    places = inputs.shape[2] * inputs.shape[3]
    chosen = [torch.arange(item % 7, places, 7) for item in range(len(inputs))]
    patches = torch.cat([F.unfold(some[None], 3, padding=1)[0][:, own].mT for some, own in zip(inputs, chosen, strict=True)])
    wanted = torch.cat([some.flatten(1)[:, own].mT for some, own in zip(outputs, chosen, strict=True)])
    weight, bias = least_squares(patches, wanted)
    convolution.weight.copy_(weight.view_as(convolution.weight))
    convolution.bias.copy_(bias)


@torch.no_grad()
def close_branches(network: nn.Module) -> None:
    """Let residual blocks and attentions add nothing at first."""
    for name, module in network.named_modules():
        if name.endswith(("conv2", "to_out.0")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

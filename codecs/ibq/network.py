"""Images to maps of vectors and back: VQGAN's network around a codebook, and Open-MAGVIT2's around bits."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.codecs.ibq.config import GROUPS, IBQConfig
from zoo.nn.conv2d import Conv2d, coarse_tiles, convolved, watched
from zoo.nn.norm import GroupNorm, activated
from zoo.nn.vqgan import ConvDecoder, ConvEncoder
from zoo.precision import Float32Module, compute_dtype

Images = Float[Tensor, "batch 3 height width"]
Maps = Float[Tensor, "batch _channels _rows _columns"]

_EPS = 1e-6


# --------------------------------------------------------------------------------------------------------- IBQ and Emu3.5


class Encoder(ConvEncoder, Float32Module):
    """VQGAN's encoder and the projection to codes; stays in float32."""

    def __init__(self, config: IBQConfig) -> None:
        super().__init__(config.stem, config.widths, config.blocks, config.latent_channels, config.attention, config.groups)
        self.quant_conv = Conv2d(config.latent_channels, config.code_dim, 1)

    def forward(self, images: Images) -> Maps:
        """Latents, whose dot products with the codes decide."""
        latents: Tensor = self.quant_conv(super().forward(images))
        return latents.contiguous()


class Decoder(ConvDecoder):
    """The projection from codes and VQGAN's decoder, of one residual block more per level than the encoder has."""

    def __init__(self, config: IBQConfig) -> None:
        coarsest = len(config.widths) - 1
        attention = [coarsest - level for level in config.attention]
        super().__init__(config.latent_channels, config.widths[::-1], config.blocks + 1, attention, config.groups)
        self.post_quant_conv = Conv2d(config.code_dim, config.latent_channels, 1)

    def forward(self, codes: Maps) -> Images:
        """Images as float32, nominally in [-1, 1], not clamped."""
        codes = codes.to(compute_dtype(self.conv_in), memory_format=torch.channels_last)
        return super().forward(self.post_quant_conv(codes))


# ------------------------------------------------------------------------------------------------------------ Open-MAGVIT2


class Residual(nn.Module):
    """Two convolutions without biases, each behind a norm and an activation, added to the input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(GROUPS, inputs, eps=_EPS)
        self.conv1 = Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm2 = GroupNorm(GROUPS, outputs, eps=_EPS)
        self.conv2 = Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Identity() if inputs == outputs else Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Maps) -> Maps:
        changed = convolved(self.conv1, activated(self.norm1, x))
        changed = activated(self.norm2, changed, overwrite=not watched(self.conv1))
        return convolved(self.conv2, changed, added=self.shortcut(x))


class EncoderLevel(nn.Module):
    """Residual blocks, and a convolution of stride 2 behind all levels but the coarsest."""

    def __init__(self, inputs: int, outputs: int, blocks: int, downsample: bool) -> None:
        super().__init__()
        self.resnets = nn.Sequential(*(Residual(outputs if block else inputs, outputs) for block in range(blocks)))
        self.downsample = Conv2d(outputs, outputs, 3, stride=2, padding=1) if downsample else nn.Identity()

    def forward(self, x: Maps) -> Maps:
        found: Tensor = self.downsample(self.resnets(x))
        return found


class BitEncoder(Float32Module):
    """Open-MAGVIT2's encoder up to its last convolution, which is the quantizer's; stays in float32."""

    def __init__(self, config: IBQConfig) -> None:
        super().__init__()
        widths = (config.stem, *config.widths)
        last = len(config.widths) - 1
        self.conv_in = Conv2d(3, config.stem, 3, padding=1, bias=False)
        self.levels = nn.Sequential(
            *(EncoderLevel(*pair, config.blocks, level < last) for level, pair in enumerate(pairwise(widths)))
        )
        self.mid = nn.Sequential(*(Residual(widths[-1], widths[-1]) for _ in range(config.blocks)))
        self.norm_out = GroupNorm(GROUPS, widths[-1], eps=_EPS)

    def forward(self, images: Images) -> Maps:
        x = self.conv_in(images.to(memory_format=torch.channels_last))
        return activated(self.norm_out, self.mid(self.levels(x)))


class AdaptiveNorm(nn.Module):
    """A group norm whose scale and shift come from the standard deviation and the mean of the whole code map."""

    def __init__(self, bits: int, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Linear(bits, channels)
        self.beta = nn.Linear(bits, channels)

    def forward(self, x: Maps, codes: Float[Tensor, "batch bits cells"]) -> Maps:
        scale = self.gamma((codes.var(dim=2) + _EPS).sqrt())
        shift = self.beta(codes.mean(dim=2))
        # The usual layout: PyTorch's norm of the other one adds up numbers less exactly.
        normal = F.group_norm(x.contiguous(), GROUPS, eps=_EPS)
        return (normal * scale[..., None, None] + shift[..., None, None]).to(memory_format=torch.channels_last)


class DecoderLevel(nn.Module):
    """An adaptive norm, residual blocks, and a doubling of rows and columns behind all levels but the finest."""

    def __init__(self, bits: int, inputs: int, outputs: int, blocks: int, upsample: bool) -> None:
        super().__init__()
        self.adaptive = AdaptiveNorm(bits, inputs)
        self.resnets = nn.Sequential(*(Residual(outputs if block else inputs, outputs) for block in range(blocks)))
        self.upsample = Conv2d(outputs, 4 * outputs, 3, padding=1) if upsample else None

    def forward(self, x: Maps, codes: Float[Tensor, "batch bits cells"]) -> Maps:
        x = self.resnets(self.adaptive(x, codes))
        return x if self.upsample is None else _depth_to_space(self.upsample(x))


def _depth_to_space(x: Maps) -> Maps:
    """Four channels to a square of pixels, row and column being the slowest parts of a channel's number.

    `torch.nn.functional.pixel_shuffle` takes them for the fastest.
    """
    x = x.unflatten(1, (2, 2, -1)).permute(0, 3, 4, 1, 5, 2)
    return x.flatten(4, 5).flatten(2, 3).to(memory_format=torch.channels_last)


class BitDecoder(nn.Module):
    """Open-MAGVIT2's decoder, in the precision of its weights; a map has two cells at least."""

    def __init__(self, config: IBQConfig) -> None:
        super().__init__()
        widths = (config.widths[-1], *reversed(config.widths))
        last = len(config.widths) - 1
        self.conv_in = Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = nn.Sequential(*(Residual(widths[0], widths[0]) for _ in range(config.blocks)))
        self.levels = nn.ModuleList(
            DecoderLevel(config.latent_channels, *pair, config.blocks, level < last)
            for level, pair in enumerate(pairwise(widths))
        )
        self.norm_out = GroupNorm(GROUPS, widths[-1], eps=_EPS)
        self.conv_out = Conv2d(widths[-1], 3, 3, padding=1)
        coarse_tiles(self)

    def forward(self, codes: Maps) -> Images:
        """Images as float32, nominally in [-1, 1], not clamped."""
        codes = codes.to(compute_dtype(self.conv_in), memory_format=torch.channels_last)
        cells = codes.flatten(2)
        x = self.mid(self.conv_in(codes))
        for level in self.levels:
            x = level(x, cells)
        images: Tensor = self.conv_out(activated(self.norm_out, x))
        return images.float().contiguous()

"""The convolutional autoencoder of VQGAN (arXiv 2012.09841): images to maps of vectors, and back.

Every norm and attention sees the whole image, so images are never padded to a common size.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.nn.conv2d import Conv2d, coarse_tiles
from zoo.nn.norm import GroupNorm, activated
from zoo.nn.resnet import EPS, Level, Maps, Middle
from zoo.precision import compute_dtype

#: Names of parts of a block in the official files, and in ours: patterns and what they are replaced by, one after the other.
BLOCK_NAMES = (
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)
#: Our names of weights that are matrices here and convolutions of one pixel in the official files.
MATRICES = re.compile(r"attentions\.\d+\.to_\w+(\.0)?\.weight$")


class ConvEncoder(nn.Module):
    """Images to maps; every level but the last halves rows and columns, rounded down.

    Args:
        stem: channels after the first convolution.
        widths: channels at each level, fine to coarse.
        blocks: residual blocks per level.
        latent_channels: channels of the maps.
        attention: levels whose residual blocks are followed by attention, counted from the finest.
        groups: of the group norms.
    """

    def __init__(
        self,
        stem: int,
        widths: Sequence[int],
        blocks: int,
        latent_channels: int,
        attention: Collection[int],
        groups: int = 32,
    ) -> None:
        super().__init__()
        levels = [
            Level(
                widths[level - 1] if level else stem,
                width,
                blocks,
                groups,
                attention=level in attention,
                step="down" if level < len(widths) - 1 else None,
            )
            for level, width in enumerate(widths)
        ]
        self.conv_in = Conv2d(3, stem, 3, padding=1)
        self.levels = nn.Sequential(*levels)
        self.mid = Middle(widths[-1], groups)
        self.norm_out = GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = Conv2d(widths[-1], latent_channels, 3, padding=1)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Maps:
        # Convolutions on a CPU are several times quicker in this layout.
        x = self.conv_in(images.to(memory_format=torch.channels_last))
        x = self.mid(self.levels(x))
        maps: Tensor = self.conv_out(activated(self.norm_out, x))
        return maps


class ConvDecoder(nn.Module):
    """Maps to images, in the precision of its weights; every level but the last doubles rows and columns.

    Args:
        latent_channels: channels of the maps.
        widths: channels at each level, coarse to fine.
        blocks: residual blocks per level.
        attention: levels whose residual blocks are followed by attention, counted from the coarsest.
        groups: of the group norms.
    """

    def __init__(
        self, latent_channels: int, widths: Sequence[int], blocks: int, attention: Collection[int], groups: int = 32
    ) -> None:
        super().__init__()
        levels = [
            Level(
                widths[max(level - 1, 0)],
                width,
                blocks,
                groups,
                attention=level in attention,
                step="up" if level < len(widths) - 1 else None,
            )
            for level, width in enumerate(widths)
        ]
        self.conv_in = Conv2d(latent_channels, widths[0], 3, padding=1)
        self.mid = Middle(widths[0], groups)
        self.levels = nn.Sequential(*levels)
        self.norm_out = GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = Conv2d(widths[-1], 3, 3, padding=1)
        coarse_tiles(self)

    def forward(self, maps: Maps) -> Float[Tensor, "batch 3 height width"]:
        """Images as float32, nominally in [-1, 1], not clamped."""
        x = self.conv_in(maps.to(compute_dtype(self.conv_in), memory_format=torch.channels_last))
        x = self.levels(self.mid(x))
        images: Tensor = self.conv_out(activated(self.norm_out, x))
        return images.float().contiguous()

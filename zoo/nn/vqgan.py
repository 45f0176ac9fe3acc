"""The convolutional autoencoder of VQGAN (arXiv 2012.09841), of diffusers' blocks: images to maps of vectors, and back.

Every norm and attention sees the whole image, so images are never padded to a common size.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.nn.norm import GroupNorm, exact_group_norms, overwriting_activations
from zoo.precision import compute_dtype

Maps = Float[Tensor, "batch _channels _rows _columns"]

_EPS = 1e-6


def _options(width: int, groups: int, attention: bool) -> dict[str, Any]:
    """What all blocks are told; an attention has a single head."""
    options: dict[str, Any] = {"resnet_eps": _EPS, "resnet_groups": groups}
    return options | ({"attention_head_dim": width} if attention else {})


def _middle(width: int, groups: int) -> nn.Module:
    """A residual block, an attention and another residual block at the lowest resolution."""
    from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D

    options = _options(width, groups, attention=True)
    return UNetMidBlock2D(in_channels=width, temb_channels=None, **options)  # type: ignore[arg-type]  # there is no timestep


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
        from diffusers.models.unets.unet_2d_blocks import AttnDownEncoderBlock2D, DownEncoderBlock2D

        super().__init__()
        levels = []
        for level, width in enumerate(widths):
            kind = AttnDownEncoderBlock2D if level in attention else DownEncoderBlock2D
            levels.append(
                kind(
                    in_channels=widths[level - 1] if level else stem,
                    out_channels=width,
                    num_layers=blocks,
                    add_downsample=level < len(widths) - 1,
                    # Means: one row below and one column on the right, nothing on the other sides.
                    downsample_padding=0,
                    **_options(width, groups, attention=level in attention),
                )
            )
        self.conv_in = nn.Conv2d(3, stem, 3, padding=1)
        self.levels = nn.Sequential(*levels)
        self.mid = _middle(widths[-1], groups)
        self.norm_out = GroupNorm(groups, widths[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[-1], latent_channels, 3, padding=1)
        overwriting_activations(exact_group_norms(self))

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Maps:
        # Convolutions on a CPU are several times quicker in this layout.
        x = self.conv_in(images.to(memory_format=torch.channels_last))
        x = self.mid(self.levels(x))
        maps: Tensor = self.conv_out(F.silu(self.norm_out(x)))
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
        from diffusers.models.unets.unet_2d_blocks import AttnUpDecoderBlock2D, UpDecoderBlock2D

        super().__init__()
        levels = []
        for level, width in enumerate(widths):
            kind = AttnUpDecoderBlock2D if level in attention else UpDecoderBlock2D
            levels.append(
                kind(
                    in_channels=widths[max(level - 1, 0)],
                    out_channels=width,
                    num_layers=blocks,
                    add_upsample=level < len(widths) - 1,
                    **_options(width, groups, attention=level in attention),
                )
            )
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0], groups)
        self.levels = nn.Sequential(*levels)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)
        overwriting_activations(self)

    def forward(self, maps: Maps) -> Float[Tensor, "batch 3 height width"]:
        """Images as float32, nominally in [-1, 1], not clamped."""
        x = self.conv_in(maps.to(compute_dtype(self.conv_in), memory_format=torch.channels_last))
        x = self.levels(self.mid(x))
        images: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return images.float().contiguous()

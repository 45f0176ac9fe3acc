"""Residual convolutional networks with attention at low resolutions: the two halves of VQGAN and of latent diffusion's VAE.

Blocks follow the appendix of latent diffusion (arXiv 2112.10752), which took them from VQGAN (arXiv 2012.09841). Their state
dicts have the names that diffusers gives them, and their results are diffusers' but for rounding, bit for bit with gradients.
Importing diffusers for these few layers takes 5 seconds, more than all the rest of a start.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.nn.conv2d import Conv2d, coarse_tiles, convolved, watched
from zoo.nn.norm import GroupNorm, activated

Maps = Float[Tensor, "batch _channels _rows _columns"]

EPS = 1e-6


class ResidualBlock(nn.Module):
    """Norm, activation and a 3x3 convolution, twice, beside a path that is straight or a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, inputs, eps=EPS)
        self.conv1 = Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = GroupNorm(groups, outputs, eps=EPS)
        self.conv2 = Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Maps) -> Maps:
        changed = convolved(self.conv1, activated(self.norm1, x))
        straight = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return convolved(self.conv2, activated(self.norm2, changed, overwrite=not watched(self.conv1)), added=straight)


class Attention(nn.Module):
    """Attention among all places of a map, with one head, and its result added to the map."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, width, eps=EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Maps) -> Maps:
        places = self.group_norm(x.flatten(2)).transpose(1, 2)
        query, key, value = (project(places)[:, None] for project in (self.to_q, self.to_k, self.to_v))
        mixed = self.to_out[0](F.scaled_dot_product_attention(query, key, value)[:, 0])
        return mixed.transpose(1, 2).reshape(x.shape) + x


class Downsample(nn.Module):
    """Half as many rows and columns, rounded down: a convolution over one more row below and one more column on the right."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv2d(width, width, 3, stride=2)

    def forward(self, x: Maps) -> Maps:
        smaller: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return smaller


class Upsample(nn.Module):
    """Every place four times, and a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv2d(width, width, 3, padding=1)

    def forward(self, x: Maps) -> Maps:
        return convolved(self.conv, x, enlarged=True)


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if there is any, and the step to the next resolution.

    Args:
        inputs, width: channels before and after the first block.
        blocks: residual blocks.
        groups: of the group norms.
        attention: whether there is any.
        step: ``"down"``, ``"up"``, or ``None`` for the last level.
    """

    def __init__(
        self, inputs: int, width: int, blocks: int, groups: int, *, attention: bool, step: Literal["down", "up"] | None
    ) -> None:
        super().__init__()
        self.attentions, self.resnets = nn.ModuleList(), nn.ModuleList()
        for block in range(blocks):
            self.resnets.append(ResidualBlock(width if block else inputs, width, groups))
            if attention:
                self.attentions.append(Attention(width, groups))
        self.downsamplers = nn.ModuleList([Downsample(width)] if step == "down" else [])
        self.upsamplers = nn.ModuleList([Upsample(width)] if step == "up" else [])

    def forward(self, x: Maps) -> Maps:
        for residual, attention in zip_longest(self.resnets, self.attentions):
            x = residual(x)
            if attention is not None:
                x = attention(x)
        for step in (*self.downsamplers, *self.upsamplers):
            x = step(x)
        return x


class Middle(nn.Module):
    """Two residual blocks at the lowest resolution, with attention in between if there is any."""

    def __init__(self, width: int, groups: int, *, attention: bool = True) -> None:
        super().__init__()
        first = ResidualBlock(width, width, groups)
        self.attentions = nn.ModuleList([Attention(width, groups)] if attention else [])
        self.resnets = nn.ModuleList([first, ResidualBlock(width, width, groups)])

    def forward(self, x: Maps) -> Maps:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        result: Tensor = self.resnets[1](x)
        return result


class Encoder(nn.Module):
    """Images to maps, under the names of diffusers' ``AutoencoderKL``; every level but the last halves rows and columns.

    Args:
        outputs: channels of the maps.
        widths: channels at each level, fine to coarse.
        blocks: residual blocks per level.
        groups: of the group norms.
    """

    def __init__(self, outputs: int, widths: Sequence[int], blocks: int, groups: int) -> None:
        super().__init__()
        self.conv_in = Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(
                widths[max(level - 1, 0)],
                width,
                blocks,
                groups,
                attention=False,
                step="down" if level < len(widths) - 1 else None,
            )
            for level, width in enumerate(widths)
        )
        self.mid_block = Middle(widths[-1], groups)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = Conv2d(widths[-1], outputs, 3, padding=1)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Maps:
        x = self.conv_in(images)
        for level in self.down_blocks:
            x = level(x)
        maps: Tensor = self.conv_out(activated(self.conv_norm_out, self.mid_block(x)))
        return maps


class Decoder(nn.Module):
    """Maps to images or other maps, under the names of diffusers' ``AutoencoderKL``; all levels but the last double the sides.

    Args:
        inputs, outputs: channels before and after.
        widths: channels at each level, fine to coarse.
        blocks: residual blocks per level of the encoder; there is one more here.
        groups: of the group norms.
        attention: whether there is any at the lowest resolution.
    """

    def __init__(
        self, inputs: int, outputs: int, widths: Sequence[int], blocks: int, groups: int, *, attention: bool = True
    ) -> None:
        super().__init__()
        coarse = widths[::-1]
        self.conv_in = Conv2d(inputs, coarse[0], 3, padding=1)
        middle = Middle(coarse[0], groups, attention=attention)
        self.up_blocks = nn.ModuleList(
            Level(
                coarse[max(level - 1, 0)],
                width,
                blocks + 1,
                groups,
                attention=False,
                step="up" if level < len(widths) - 1 else None,
            )
            for level, width in enumerate(coarse)
        )
        self.mid_block = middle
        self.conv_norm_out = GroupNorm(groups, coarse[-1], eps=EPS)
        self.conv_out = Conv2d(coarse[-1], outputs, 3, padding=1)
        coarse_tiles(self)

    def forward(self, maps: Maps) -> Maps:
        x = self.mid_block(self.conv_in(maps))
        for level in self.up_blocks:
            x = level(x)
        images: Tensor = self.conv_out(activated(self.conv_norm_out, x))
        return images

"""Sizes of a TokenFlow."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, get_args

Teacher = Literal["clip", "siglip"]

#: What a TokenFlow consists of besides the codebooks, which are always there.
PARTS = ("encoder", "decoder", "semantic_decoder")


@dataclass(frozen=True)
class TokenFlowConfig:
    """Sizes of one model; the defaults are TokenFlow-B at 256 pixels with the enhanced decoder.

    Attributes:
        teacher: kind of the semantic encoder: OpenAI's ``clip`` or ``siglip``.
        image_size: height and width of the images that go in and come out.
        patch_size: height and width in pixels of a patch of the semantic encoder.
        scales: rows and columns of the token grid at each scale, coarse to fine; the last is that of the patches.
        semantic_dim, semantic_depth, semantic_heads, semantic_hidden: width, blocks, attention heads and feed-forward width of
            the semantic encoder. SigLIP's last block is not used and not counted.
        codebook_size: number of codes, each a semantic and a pixel vector.
        semantic_code_dim, pixel_code_dim: widths of the two.
        encoder_stem: channels after the first convolution of the pixel encoder.
        encoder_widths: channels at each of its levels, fine to coarse; every level but the last halves the resolution.
        encoder_blocks: residual blocks per level.
        latent_channels: channels between the convolutional networks and the projections to codes.
        decoder_widths: channels at each level of the pixel decoder, coarse to fine.
        decoder_blocks: residual blocks per level.
        norm_groups: groups of every group norm of both networks, which divide all of their channels.
        semantic_decoder_depth, semantic_decoder_heads: blocks and attention heads of the semantic decoder; its width is
            ``semantic_dim`` and its feed-forward layers are four times as wide.
        feature_dim: width of the features that it reconstructs.
        commitment: weight of the commitment loss in training.
        entropy: weight of the entropy loss in training.
        parts: what the model consists of besides the codebooks: ``encoder`` (images to tokens), ``decoder`` (tokens to images)
            and ``semantic_decoder`` (tokens to the features of the teacher).
    """

    teacher: Teacher = "clip"
    image_size: int = 256
    patch_size: int = 16
    scales: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 14, 16)
    semantic_dim: int = 768
    semantic_depth: int = 12
    semantic_heads: int = 12
    semantic_hidden: int = 3072
    codebook_size: int = 32768
    semantic_code_dim: int = 32
    pixel_code_dim: int = 8
    encoder_stem: int = 128
    encoder_widths: tuple[int, ...] = (128, 128, 256, 256, 512)
    encoder_blocks: int = 2
    latent_channels: int = 256
    decoder_widths: tuple[int, ...] = (1024, 512, 512, 256, 256)
    decoder_blocks: int = 5
    norm_groups: int = 32
    semantic_decoder_depth: int = 3
    semantic_decoder_heads: int = 12
    feature_dim: int = 512
    commitment: float = 0.25
    entropy: float = 0.0
    parts: tuple[str, ...] = PARTS

    def __post_init__(self) -> None:
        if self.teacher not in get_args(Teacher):
            raise ValueError(f"teacher must be one of {', '.join(get_args(Teacher))}, not {self.teacher!r}")
        if not self.scales or self.scales[0] < 1 or any(fine <= coarse for coarse, fine in pairwise(self.scales)):
            raise ValueError(f"scales must be positive and increase, not {self.scales}")
        if self.image_size // self.patch_size != self.grid:
            raise ValueError(
                f"{self.image_size} pixels in patches of {self.patch_size} make another grid than the last scale, {self.grid}"
            )
        if len(self.encoder_widths) != len(self.decoder_widths):
            raise ValueError(f"encoder_widths {self.encoder_widths} and decoder_widths {self.decoder_widths} differ in length")
        widths = (self.encoder_stem, *self.encoder_widths, *self.decoder_widths)
        if uneven := [width for width in widths if width < 1 or width % self.norm_groups]:
            raise ValueError(f"the channels of convolutions must be multiples of {self.norm_groups}, not {uneven[0]}")
        for dim, heads in ((self.semantic_dim, self.semantic_heads), (self.semantic_dim, self.semantic_decoder_heads)):
            if heads < 1 or dim % heads:
                raise ValueError(f"{heads} attention heads do not divide a width of {dim}")

        if unknown := [part for part in self.parts if part not in PARTS]:
            raise ValueError(f"parts are {', '.join(PARTS)}, not {unknown[0]!r}")

    @property
    def grid(self) -> int:
        """Rows and columns of patches, of latents and of the finest scale."""
        return self.scales[-1]

    @property
    def code_dim(self) -> int:
        """Width of a code, its semantic and its pixel vector side by side."""
        return self.semantic_code_dim + self.pixel_code_dim

    @property
    def scale_ends(self) -> tuple[int, ...]:
        """Number of tokens up to the end of each scale."""
        return tuple(accumulate(scale * scale for scale in self.scales))

    @property
    def pixel_size(self) -> int:
        """Height and width at which the pixel networks work; images are resized where it is not ``image_size``."""
        size: int = self.grid * 2 ** (len(self.encoder_widths) - 1)
        return size

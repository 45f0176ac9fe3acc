"""Sizes of an IBQ, Emu3.5 or Open-MAGVIT2 tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

#: How a vector becomes an id: the row of a codebook with the largest dot product, or the bits of its signs.
Quantization = Literal["ibq", "lfq"]
#: Which of the two sets of weights that SEED-Voken's files hold.
WeightSet = Literal["ema", "training"]

#: What a tokenizer consists of besides the quantizer, which is always there.
PARTS = ("encoder", "decoder")
#: Groups of the group norms; fixed in the original code.
GROUPS = 32
#: Originals that are no whole number of cells are padded to multiples of this many pixels, or of a cell if that is larger.
_PADDED_TO = 16


@dataclass(frozen=True)
class IBQConfig:
    """Sizes of one model; the defaults are IBQ with 16,384 codes.

    Attributes:
        quantization: ``ibq``, in the network of VQGAN, or ``lfq``, in that of Open-MAGVIT2.
        stem: channels after the first convolution.
        widths: channels at each level, fine to coarse; every level but the last halves the resolution.
        blocks: residual blocks per level of the encoder.
        attention: levels with attention, counted from the finest; none in Open-MAGVIT2.
        latent_channels: channels between the networks and the quantizer.
        code_dim: numbers of a code; bits of an id in LFQ.
        codebook_size: number of codes.
        groups: of the group norms; 32 in all official models.
        weights: which set of SEED-Voken's files was read: the exponential averages, ``ema``, with which the original evaluates,
            or those of ``training``. Files with a single set have no say in it.
        parts: what the model consists of besides the quantizer: ``encoder`` and ``decoder``.
    """

    quantization: Quantization = "ibq"
    stem: int = 128
    widths: tuple[int, ...] = (128, 128, 256, 256, 512)
    blocks: int = 4
    attention: tuple[int, ...] = (4,)
    latent_channels: int = 256
    code_dim: int = 256
    codebook_size: int = 16_384
    groups: int = GROUPS
    weights: WeightSet = "ema"
    parts: tuple[str, ...] = PARTS

    def __post_init__(self) -> None:
        for value, kind in ((self.quantization, Quantization), (self.weights, WeightSet)):
            if value not in get_args(kind):
                raise ValueError(f"one of {', '.join(get_args(kind))} is expected, not {value!r}")
        if min(self.blocks, self.latent_channels, self.code_dim, self.codebook_size, self.groups) < 1:
            raise ValueError("sizes must be at least 1")
        if not self.widths or any(width < 1 or width % self.groups for width in (self.stem, *self.widths)):
            raise ValueError(f"channels must be multiples of {self.groups}, not {(self.stem, *self.widths)}")
        if self.quantization == "lfq":
            if self.attention or self.latent_channels != self.code_dim or self.codebook_size != 2**self.code_dim:
                raise ValueError(
                    f"LFQ has no attention, and its {self.latent_channels} channels are the {self.code_dim} bits of an id, of "
                    f"which there are {self.codebook_size}"
                )
            if self.groups != GROUPS:
                raise ValueError(f"the group norms of LFQ have {GROUPS} groups, not {self.groups}")
        elif any(not 0 <= level < len(self.widths) for level in self.attention):
            raise ValueError(f"levels are counted from 0 to {len(self.widths) - 1}, not {self.attention}")
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise ValueError(f"parts are {', '.join(PARTS)}, not {unknown[0]!r}")

    @property
    def factor(self) -> int:
        """Rows and columns of pixels per id."""
        factor: int = 2 ** (len(self.widths) - 1)
        return factor

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of ids that the network makes of an image: cells begun in Open-MAGVIT2, whole ones in the others."""
        if self.quantization == "lfq":
            return -(-height // self.factor), -(-width // self.factor)
        return height // self.factor, width // self.factor

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to which an image is padded: its own where they are whole cells."""
        if height % self.factor == 0 and width % self.factor == 0:
            return height, width
        unit = max(_PADDED_TO, self.factor)
        return -(-height // unit) * unit, -(-width // unit) * unit

"""Sizes of a Vec-Tok and of its components."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

#: What a model may consist of. Without ``units`` it is a continuous tokenizer of speech vectors, such as kNN-VC.
PARTS = ("vectors", "units", "inverse", "vocoder")
#: Units are written as characters from here on, the private use area.
UNIT_OFFSET = 0xE000
MOST_UNITS = 6400


def _tuples(value: Any) -> Any:
    """Lists as tuples, at every level: JSON and YAML have no tuples."""
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class WavLMSizes:
    """A WavLM encoder up to the layer that is read (arXiv 2110.13900); the defaults are WavLM-Large's.

    Attributes:
        width: of the transformer, and so of a speech vector.
        layer: the block whose output is read, counted from 1, before any final norm.
        blocks: blocks that are built, ``layer`` of them if 0; more serve to look at later ones.
        conv_layers: ``(channels, kernel, stride)`` of the convolutions on the waveform.
        buckets, max_distance: of the relative positions.
        conv_kernel, conv_groups: of the positional convolution.
        normalize_waveform: give each recording zero mean and unit variance first, as WavLM was trained; kNN-VC, whose vocoder
            is the public one, does not.
    """

    width: int = 1024
    layer: int = 6
    blocks: int = 0
    heads: int = 16
    ffn_dim: int = 4096
    conv_layers: tuple[tuple[int, int, int], ...] = ((512, 10, 5), *[(512, 3, 2)] * 4, *[(512, 2, 2)] * 2)
    buckets: int = 320
    max_distance: int = 800
    conv_kernel: int = 128
    conv_groups: int = 16
    normalize_waveform: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", self.blocks or self.layer)
        if not 1 <= self.layer <= self.blocks:
            raise ValueError(f"layer must lie in 1 to {self.blocks}, not {self.layer}")
        if self.width % self.heads or self.width % self.conv_groups:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads and {self.conv_groups} groups")

    @property
    def hop_length(self) -> int:
        """Samples per vector."""
        return math.prod(stride for _, _, stride in self.conv_layers)

    @property
    def reach(self) -> int:
        """Samples that one vector's convolutions see."""
        reach = 1
        for _, kernel, stride in reversed(self.conv_layers):
            reach = (reach - 1) * stride + kernel
        return reach


@dataclass(frozen=True)
class LogMelSizes:
    """Log-mel frames, standardised by stored statistics, in the place of a network's vectors: for small models."""

    bands: int = 80
    n_fft: int = 1024
    hop_length: int = 320

    @property
    def width(self) -> int:
        """Numbers per vector."""
        return self.bands


@dataclass(frozen=True)
class InverseSizes:
    """The Conformer that turns units into vectors (the paper's sizes by default; the kernel is ours)."""

    width: int = 1024
    heads: int = 8
    ffn_dim: int = 4096
    layers: int = 6
    depthwise_kernel: int = 31

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")
        if not self.depthwise_kernel % 2:
            raise ValueError(f"depthwise_kernel must be odd, not {self.depthwise_kernel}")


@dataclass(frozen=True)
class HiFiGANSizes:
    """The HiFi-GAN generator (arXiv 2010.05646) behind a linear layer, as kNN-VC has it; the defaults are its.

    Attributes:
        resblock: ``"1"`` with pairs of convolutions, or ``"2"`` with single ones.
        pre_width: outputs of the linear layer.
        channels: after the first convolution; they halve with every stage.
    """

    resblock: str = "1"
    pre_width: int = 512
    channels: int = 512
    rates: tuple[int, ...] = (10, 8, 2, 2)
    kernels: tuple[int, ...] = (20, 16, 4, 4)
    resblock_kernels: tuple[int, ...] = (3, 7, 11)
    resblock_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))

    def __post_init__(self) -> None:
        if self.resblock not in ("1", "2"):
            raise ValueError(f"resblock must be '1' or '2', not {self.resblock!r}")
        if len(self.rates) != len(self.kernels) or len(self.resblock_kernels) != len(self.resblock_dilations):
            raise ValueError("every rate needs a kernel, and every kernel of a residual block its dilations")
        if any(kernel < rate or (kernel - rate) % 2 for kernel, rate in zip(self.kernels, self.rates, strict=True)):
            raise ValueError(f"kernels {self.kernels} must exceed rates {self.rates} by even numbers")
        if self.channels % 2 ** len(self.rates):
            raise ValueError(f"{self.channels} channels cannot be halved {len(self.rates)} times")

    @property
    def hop_length(self) -> int:
        """Samples per vector."""
        return math.prod(self.rates)


@dataclass(frozen=True)
class ISTFTSizes:
    """ConvNeXt blocks and an inverse STFT of four hops (Vocos, arXiv 2306.00814): the vocoder of small models."""

    width: int = 128
    ffn_dim: int = 384
    blocks: int = 5
    hop_length: int = 320


_KINDS: dict[str, tuple[type, ...]] = {
    "vectors": (WavLMSizes, LogMelSizes),
    "inverse": (InverseSizes,),
    "vocoder": (HiFiGANSizes, ISTFTSizes),
}

if TYPE_CHECKING:
    Vectors = WavLMSizes | LogMelSizes
    Inverse = InverseSizes
    Vocoder = HiFiGANSizes | ISTFTSizes
else:
    # What JSON and YAML make of sizes is taken as well, and turned into them.
    Vectors = WavLMSizes | LogMelSizes | Mapping
    Inverse = InverseSizes | Mapping
    Vocoder = HiFiGANSizes | ISTFTSizes | Mapping


def _sizes(name: str, settings: Mapping[str, Any]) -> Any:
    """Sizes of the first kind that has all these fields."""
    for kind in _KINDS[name]:
        if settings.keys() <= {field.name for field in fields(kind)}:
            return kind(**{key: _tuples(value) for key, value in settings.items()})
    raise ValueError(f"{name} has no fields {', '.join(settings)}")


@dataclass(frozen=True)
class VecTokConfig:
    """Sizes of one model; the defaults are the paper's where it tells them.

    Attributes:
        parts: what the model consists of, of `PARTS`; ``inverse`` brings the units with it.
        vector_dim: numbers per speech vector.
        num_units: clusters of the k-means.
        merges: pairs that byte-pair encoding joins; 0 makes the units themselves the tokens.
        vocab_size: units and what pairs make of them; fewer than both together where two pairs make the same sequence.
        context: vectors side by side that a unit is decided from, an odd number.
        voices: names of the voices in the checkpoint; the first one speaks where no prompt is given.
        voice_frames: vectors of each of them.
        prompt_frames: vectors that an item's own prompt keeps, 3 s by default.
        neighbours: of a vector in kNN-VC.
        sample_rate: of the audio that goes in and comes out.
    """

    parts: tuple[str, ...] = PARTS
    vector_dim: int = 1024
    vectors: Vectors = WavLMSizes()
    num_units: int = 300
    merges: int = 7892
    vocab_size: int = 8192
    context: int = 1
    inverse: Inverse = InverseSizes()
    vocoder: Vocoder = HiFiGANSizes()
    voices: tuple[str, ...] = ()
    voice_frames: int = 150
    prompt_frames: int = 150
    neighbours: int = 4
    sample_rate: int = 16_000

    def __post_init__(self) -> None:
        for name in _KINDS:
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, _sizes(name, value))
        self._check()

    def _check(self) -> None:
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise ValueError(f"parts are {', '.join(PARTS)}, not {unknown[0]!r}")
        if not 0 < self.num_units <= MOST_UNITS:
            raise ValueError(f"num_units must lie in 1 to {MOST_UNITS}, not {self.num_units}")
        if not self.num_units <= self.vocab_size <= self.num_units + self.merges:
            raise ValueError(f"{self.num_units} units and {self.merges} merges do not make a vocabulary of {self.vocab_size}")
        if self.context < 1 or not self.context % 2:
            raise ValueError(f"context must be odd, not {self.context}")
        if "vectors" in self.parts and self.vectors.width != self.vector_dim:
            raise ValueError(f"vectors of {self.vectors.width} numbers do not fit vector_dim {self.vector_dim}")
        if {"vectors", "vocoder"} <= set(self.parts) and self.vectors.hop_length != self.vocoder.hop_length:
            raise ValueError(f"a hop of {self.vectors.hop_length} samples in and {self.vocoder.hop_length} out")

    @property
    def has_units(self) -> bool:
        """Whether there are centroids."""
        return "units" in self.parts or "inverse" in self.parts

    @property
    def hop_length(self) -> int:
        """Samples per speech vector."""
        return self.vectors.hop_length if "vectors" in self.parts else self.vocoder.hop_length

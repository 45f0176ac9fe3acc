"""Sizes of a WavTokenizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Groups of the decoder's group norms; fixed in the original code.
GROUPS = 32


@dataclass(frozen=True)
class WavTokenizerConfig:
    """Sizes of one model; the defaults are the official 75-tokens-per-second checkpoints.

    Attributes:
        ratios: up-sampling ratios in decoder order, as upstream writes them; the encoder's strides are the reverse.
        latent_dim: width of the encoder output, of a codebook vector and of the LSTM.
        n_filters: channels after the first convolution; they double with every stride.
        lstm_layers: layers of the LSTM.
        codebook_size: number of codes.
        dim, intermediate_dim, num_layers: widths and depth of the ConvNeXt stack.
        num_bandwidths: rows of the adaptive layer norms; all were trained alike and row 0 is the one in use.
        sample_rate: samples per second.
    """

    ratios: tuple[int, ...] = (8, 5, 4, 2)
    latent_dim: int = 512
    n_filters: int = 32
    lstm_layers: int = 2
    codebook_size: int = 4096
    dim: int = 768
    intermediate_dim: int = 2304
    num_layers: int = 12
    num_bandwidths: int = 4
    sample_rate: int = 24_000

    def __post_init__(self) -> None:
        if self.dim % GROUPS:
            raise ValueError(f"dim must be a multiple of {GROUPS}, not {self.dim}")
        if len(self.ratios) != 4 or min(self.ratios) < 2:
            raise ValueError(f"ratios must be four integers of at least 2, not {self.ratios}")

    @property
    def strides(self) -> tuple[int, ...]:
        """Encoder strides, first to last."""
        return self.ratios[::-1]

    @property
    def hop_length(self) -> int:
        """Samples per token."""
        return math.prod(self.ratios)

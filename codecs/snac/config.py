"""Sizes of a SNAC, and where the codes of its levels stand within a frame."""

from __future__ import annotations

import math
from dataclasses import dataclass

from zoo.spec import Frame

#: Width of an attention head; fixed in the original code.
HEAD_DIM = 64


@dataclass(frozen=True)
class SNACConfig:
    """Sizes of one model; the defaults are those of the 24 kHz checkpoint.

    Attributes:
        sample_rate: samples per second.
        encoder_dim: channels after the first convolution; they double with every stride.
        encoder_rates: strides of the encoder, first to last.
        decoder_dim: channels after the decoder's first convolution; they halve with every stride.
        decoder_rates: strides of the decoder, first to last.
        attn_window_size: latent frames that attend to each other; ``None`` for no attention.
        codebook_size, codebook_dim: number and width of the codes of each level.
        vq_strides: latent frames of one code of each level, coarse to fine; the first is a multiple of all others.
        noise: whether the decoder adds noise.
        depthwise: whether residual units convolve each channel by itself.

    Raises:
        ValueError: the sizes do not fit each other.

    >>> config = SNACConfig()
    >>> config.hop_length, config.coarse_hop, config.frame.order
    (512, 2048, (0, 1, 2, 2, 1, 2, 2))
    """

    sample_rate: int = 24_000
    encoder_dim: int = 48
    encoder_rates: tuple[int, ...] = (2, 4, 8, 8)
    decoder_dim: int = 1024
    decoder_rates: tuple[int, ...] = (8, 8, 4, 2)
    attn_window_size: int | None = None
    codebook_size: int = 4096
    codebook_dim: int = 8
    vq_strides: tuple[int, ...] = (4, 2, 1)
    noise: bool = True
    depthwise: bool = True

    def __post_init__(self) -> None:
        for name, least in (("encoder_rates", 2), ("decoder_rates", 2), ("vq_strides", 1)):
            values = getattr(self, name)
            if not values or min(values) < least:
                raise ValueError(f"{name} must be integers of at least {least}, not {values}")
        if math.prod(self.encoder_rates) != math.prod(self.decoder_rates):
            raise ValueError(
                f"encoder rates {self.encoder_rates} and decoder rates {self.decoder_rates} have different products"
            )
        if any(self.vq_strides[0] % stride for stride in self.vq_strides):
            raise ValueError(f"the first of vq_strides must be a multiple of the others, not {self.vq_strides}")
        if self.decoder_dim % 2 ** len(self.decoder_rates):
            raise ValueError(f"decoder_dim {self.decoder_dim} cannot be halved {len(self.decoder_rates)} times")
        if self.attn_window_size is not None:
            if self.attn_window_size < 1:
                raise ValueError(f"attn_window_size must be at least 1, not {self.attn_window_size}")
            for width in (self.latent_dim, self.decoder_dim):
                if width % HEAD_DIM:
                    raise ValueError(f"attention has heads of {HEAD_DIM} channels, and {width} is no multiple of that")

    @property
    def latent_dim(self) -> int:
        """Width of the latents."""
        return self.encoder_dim * 2 ** len(self.encoder_rates)

    @property
    def hop_length(self) -> int:
        """Samples of a latent frame."""
        return math.prod(self.encoder_rates)

    @property
    def coarse_hop(self) -> int:
        """Samples of a coarse frame, for which there is one code of the first level."""
        return self.hop_length * self.vq_strides[0]

    @property
    def window(self) -> int:
        """Latent frames that attend to each other; 1 without attention."""
        return self.attn_window_size or 1

    @property
    def unit(self) -> int:
        """Latent frames that an item is a multiple of: whole coarse frames and whole windows of attention."""
        return math.lcm(self.vq_strides[0], self.window)

    @property
    def frame(self) -> Frame:
        """The codes of a coarse frame in order of the time at which they begin, coarse before fine."""
        return Frame((self.codebook_size,) * len(self.vq_strides), order=tuple(level for level, _ in self.places))

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Level of each place of a frame, and which of the level's codes it is."""
        coarse = self.vq_strides[0]
        starts = [
            (index * stride, level, index) for level, stride in enumerate(self.vq_strides) for index in range(coarse // stride)
        ]
        return tuple((level, index) for _, level, index in sorted(starts))

    def places_of(self, level: int, levels: int | None = None) -> list[int]:
        """Places of a level's codes, in time order, within a frame of the first few levels (of all by default)."""
        kept = [own for own, _ in self.places if levels is None or own < levels]
        return [place for place, own in enumerate(kept) if own == level]

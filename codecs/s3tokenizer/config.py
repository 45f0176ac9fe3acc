"""Sizes of an S3Tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

#: What an S3Tokenizer consists of: no decoder was ever part of it.
PARTS = ("encoder",)

#: Samples per second of the audio, and between the frames of its spectrogram.
SAMPLE_RATE = 16_000
FRAME_HOP = 160
#: Of the second convolution; that of the first one makes the rate.
SECOND_STRIDE = 2
#: Width of a head where positions are rotary.
ROTARY_HEAD = 64


@dataclass(frozen=True)
class S3TokenizerConfig:
    """Sizes of one model; the defaults are version 2.

    Attributes:
        dim, depth, heads: width, blocks and attention heads of the encoder.
        memory: taps of the convolution beside each attention, an odd number (FSMN); 0 for version 1, which has none.
        positions: rows of the table of positions that version 1 adds; 0 where positions are rotary.
        stride: of the first convolution: 1 makes 50 ids per second, 2 makes 25.
        codebook_size: number of codes: rows of the codebook of version 1; a power of 3 in later ones.
        bands: mel bands of the spectrogram.
        attention_eps, mlp_eps: of the layer norms before attention and before the feed-forward layers.
        parts: what the model consists of: ``encoder``.
    """

    dim: int = 1280
    depth: int = 6
    heads: int = 20
    memory: int = 31
    positions: int = 0
    stride: int = 2
    codebook_size: int = 6561
    bands: int = 128
    attention_eps: float = 1e-5
    mlp_eps: float = 1e-5
    parts: tuple[str, ...] = PARTS

    def __post_init__(self) -> None:
        if min(self.dim, self.depth, self.heads, self.bands, self.codebook_size) < 1 or self.dim % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {self.dim}, or a size is below 1")
        if self.stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, not {self.stride}")
        if bool(self.memory) == bool(self.positions) or self.positions < 0 or (self.memory and self.memory % 2 != 1):
            raise ValueError("a model has either a memory of an odd number of taps or a table of positions")
        if self.rotary and (self.head_dim != ROTARY_HEAD or 3**self.digits != self.codebook_size):
            raise ValueError(
                f"with rotary positions a head is {ROTARY_HEAD} wide, not {self.head_dim}, and the number of codes is a power "
                f"of 3, not {self.codebook_size}"
            )
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise ValueError(f"parts are {', '.join(PARTS)}, not {unknown[0]!r}")

    @property
    def rotary(self) -> bool:
        """Whether positions are rotary, as in versions 2 and 3."""
        return self.memory > 0

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.dim // self.heads

    @property
    def digits(self) -> int:
        """Components of a ternary code; an id is their number in base 3."""
        digits = 0
        while 3**digits < self.codebook_size:
            digits += 1
        return digits

    @property
    def frames_per_id(self) -> int:
        """Frames of the spectrogram per id."""
        return self.stride * SECOND_STRIDE

    def ids_of(self, frames: int) -> int:
        """Number of ids of a recording, or a window, of ``frames`` frames."""
        return -(-frames // self.frames_per_id)

"""Sizes of a ByteFormer, and the files that it was trained on."""

from __future__ import annotations

from dataclasses import dataclass

#: Values of a byte. The ids above them are for padding and masks and stand for no byte.
BYTE_VALUES = 256

#: File encodings of images and of audio that a checkpoint may have been trained on; see `encodings`.
IMAGE_FILES = ("fHWC", "fCHW", "TIFF", "PNG", "JPEG")
AUDIO_FILES = ("WAV", "MP3")
#: How images are resized.
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
#: Types of the samples in a WAV file.
SAMPLE_TYPES = ("float32", "int32", "int16", "uint8")
#: Orders of bytes (see `transforms.shuffle`): those that can be undone without knowing more than the length, and random ones.
FIXED_SHUFFLES = ("reverse", "cyclic_half_length", "stride")
RANDOM_SHUFFLES = ("window_shuffle", "random_shuffle")
SHUFFLES = FIXED_SHUFFLES + RANDOM_SHUFFLES


@dataclass(frozen=True)
class ByteFormerConfig:
    """Sizes of one model; the defaults are the official ``tiny`` for TIFF files.

    Attributes:
        dim, heads, hidden: width, attention heads and feed-forward width of the transformer.
        kernel: bytes under the strided convolution; its stride is half of that.
        windows: tokens in a window of attention, for every block or one number for all of them.
        shifts: by how many tokens the windows of each block are moved; as many as there are blocks.
        merges: blocks after which pairs of tokens are merged.
        max_tokens: rows of the position table: most tokens behind the convolution.
        vocab_size: rows of the embedding table; the last one is the padding's.
        classes: outputs of the classifier.
        sinusoidal: positions are sines and cosines, not learned.
        layernorm_axis_rule: normalise over tokens instead of channels where there are as many tokens as channels. The original
            code guesses the axis so, and the official weights were trained with it.
        file: file encoding of the training data, one of `IMAGE_FILES` and `AUDIO_FILES`; empty if unknown.
        quality: of JPEG files.
        resized, cropped: shorter side that images are resized to, and side of the square that is cut out of their middle.
        interpolation: of that resizing, one of `INTERPOLATIONS`.
        sample_type: of WAV files, one of `SAMPLE_TYPES`.
        keep: share of the bytes that the privacy camera keeps (section 4.5 of the paper); 1 for all.
        noise: lowest and highest value that obfuscation adds to every byte; empty for none.
        shuffle: order in which the bytes are read, one of `FIXED_SHUFFLES`, undone by decoding, or of `RANDOM_SHUFFLES`;
            empty for the file's own.
        shuffle_stride: distance of the bytes that ``stride`` brings together.
        shuffle_window: bytes in a window of ``window_shuffle``.
        permuted: byte values are exchanged by the original's fixed table. Decoding undoes it.
        labels: names of the classes; empty if they are not known.
    """

    dim: int = 192
    heads: int = 3
    hidden: int = 768
    kernel: int = 32
    windows: tuple[int, ...] = (128,)
    shifts: tuple[int, ...] = (0, 64) * 6
    merges: tuple[int, ...] = (0, 1, 3, 5, 7, 9)
    max_tokens: int = 50_000
    vocab_size: int = 257
    classes: int = 1000
    sinusoidal: bool = False
    layernorm_axis_rule: bool = True
    file: str = ""
    quality: int = 100
    resized: int = 256
    cropped: int = 224
    interpolation: str = "bicubic"
    sample_type: str = "float32"
    keep: float = 1.0
    noise: tuple[int, ...] = ()
    shuffle: str = ""
    shuffle_stride: int = 1024
    shuffle_window: int = 1024
    permuted: bool = False
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks = {
            f"kernel must be at least 2, not {self.kernel}": self.kernel >= 2,
            f"dim {self.dim} is no multiple of {self.heads} heads": self.heads > 0 and self.dim % self.heads == 0,
            f"{len(self.windows)} windows for {self.depth} blocks": len(self.windows) in (1, self.depth),
            "windows must be positive": all(window > 0 for window in self.windows),
            f"merges {self.merges} are not blocks in order": tuple(sorted(set(self.merges))) == self.merges
            and all(0 <= block < self.depth for block in self.merges),
            f"vocab_size {self.vocab_size} leaves no id for padding": self.vocab_size > BYTE_VALUES,
            f"file must be one of {', '.join(IMAGE_FILES + AUDIO_FILES)}": self.file in ("", *IMAGE_FILES, *AUDIO_FILES),
            f"sample_type must be one of {', '.join(SAMPLE_TYPES)}": self.sample_type in SAMPLE_TYPES,
            f"shuffle must be one of {', '.join(SHUFFLES)}": self.shuffle in ("", *SHUFFLES),
            f"resized {self.resized} must be at least cropped {self.cropped}": self.resized >= self.cropped >= 1,
            f"interpolation must be one of {', '.join(INTERPOLATIONS)}": self.interpolation in INTERPOLATIONS,
            "shuffle_stride and shuffle_window must be positive": min(self.shuffle_stride, self.shuffle_window) >= 1,
            "noise must be empty or a lowest and a highest value": len(self.noise) in (0, 2),
            f"{len(self.labels)} labels for {self.classes} classes": len(self.labels) in (0, self.classes),
        }
        if failed := [reason for reason, holds in checks.items() if not holds]:
            raise ValueError("; ".join(failed))

    @property
    def depth(self) -> int:
        """Number of transformer blocks."""
        return len(self.shifts)

    @property
    def stride(self) -> int:
        """Bytes from one token to the next."""
        return self.kernel // 2

    @property
    def longest_file(self) -> int:
        """Bytes of the longest file that the position table allows."""
        return (self.max_tokens - 1) * self.stride + self.kernel + self.stride - 1

    @property
    def shuffle_span(self) -> int:
        """Distance or window of the order in which bytes are read; 1 where it has none."""
        return {"stride": self.shuffle_stride, "window_shuffle": self.shuffle_window}.get(self.shuffle, 1)

    def window(self, block: int) -> int:
        """Tokens in a window of a block."""
        return self.windows[block % len(self.windows)]

    def reduced_length(self, length: int) -> int:
        """Tokens behind the convolution that ``length`` bytes give; 0 where they are fewer than the kernel."""
        return max(0, (length - self.kernel) // self.stride + 1)

    def final_length(self, length: int) -> int:
        """Tokens of the features that ``length`` bytes give."""
        tokens = self.reduced_length(length)
        for _ in self.merges:
            tokens = -(-tokens // 2)
        return tokens

"""What a tokenizer promises: modality, vocabulary, rate, sizes, and which checkpoint its ids belong to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Modality = Literal["image", "audio", "speech", "shape", "bytes"]
MODALITIES: tuple[str, ...] = get_args(Modality)


@dataclass(frozen=True)
class Spec:
    """The promises of one loaded tokenizer.

    Attributes:
        name: name in the registry, or the one the checkpoint was saved under.
        family: codec family, the module ``zoo.codecs.<family>``.
        modality: kind of media that goes in and comes out.
        vocab_size: ids lie in ``[0, vocab_size)``; 0 for a continuous tokenizer, whose ``encode`` returns `zoo.Latents`.
        dim: width of the vectors that ``embed`` returns; channels of the latents of a continuous tokenizer.
        ordered: whether every prefix of a sequence decodes (coarse to fine).
        lossless: whether ``decode(encode(x))`` equals ``x`` exactly.
        fingerprint: 16 hexadecimal digits that identify the checkpoint. Ids mean nothing under another one.
        sample_rate: samples per second of decoded media (audio and speech only).
        hop_length: samples per token (audio and speech only).
        image_size: height and width of the images that go in (images only); ``None`` where any size does.
        decoded_size: height and width of the images that come out; ``None`` where it is that of those that went in.
        max_tokens: ids of an item where every item gets the same number; a prefix is shorter.
    """

    name: str
    family: str
    modality: Modality
    vocab_size: int
    dim: int
    ordered: bool = False
    lossless: bool = False
    fingerprint: str = ""
    sample_rate: int | None = None
    hop_length: int | None = None
    image_size: tuple[int, int] | None = None
    decoded_size: tuple[int, int] | None = None
    max_tokens: int | None = None

    @property
    def continuous(self) -> bool:
        """Whether ``encode`` returns `zoo.Latents`, real numbers, rather than `zoo.Tokens`."""
        return self.vocab_size == 0

    @property
    def token_rate(self) -> float | None:
        """Tokens per second of media, where media has a duration."""
        if self.sample_rate is None or self.hop_length is None:
            return None
        return self.sample_rate / self.hop_length

    @property
    def bits_per_token(self) -> int:
        """Bits that a packed id takes on disk: ``ceil(log2(vocab_size))``; 0 where there are no ids."""
        return 0 if self.continuous else max(1, (self.vocab_size - 1).bit_length())

    @property
    def bit_rate(self) -> float | None:
        """Bits per second of media, where media has a duration and tokens."""
        return None if self.token_rate is None or self.continuous else self.token_rate * self.bits_per_token

    @property
    def bits_per_item(self) -> int | None:
        """Bits that the packed ids of a whole item take, where every item gets the same number of them."""
        return None if self.max_tokens is None or self.continuous else self.max_tokens * self.bits_per_token

    def as_dict(self) -> dict[str, Any]:
        """Fields and derived rates as plain values, for JSON."""
        derived = ("continuous", "token_rate", "bits_per_token", "bit_rate", "bits_per_item")
        return asdict(self) | {name: getattr(self, name) for name in derived}

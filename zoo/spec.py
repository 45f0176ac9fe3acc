"""Promises of a tokenizer: modality, vocabulary, rate, sizes, and the checkpoint that its ids belong to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Literal

from zoo.errors import InputError


@dataclass(frozen=True)
class Frame:
    """One step of a sequence of ids: which codebook each id comes from, in reading order, and how large each codebook is.

    Ids of a frame's places lie side by side in the id space: ``id = offsets[place] + code``. A single codebook has no offset.

    Attributes:
        sizes: entries of each codebook, coarse first.
        order: codebook of each place. Empty stands for one place a codebook, as residual quantizers have it; a codec of several
            rates repeats the finer ones: ``(0, 1, 2, 2, 1, 2, 2)``.
        offsets: added to the codes of each place. Empty stands for places side by side in reading order.

    Raises:
        InputError: a size is below 1, a codebook has no place, or there are not as many offsets as places.

    >>> frame = Frame((1024, 1024))
    >>> frame.order, frame.offsets, frame.vocab_size, frame.bits
    ((0, 1), (0, 1024), 2048, 20)
    """

    sizes: tuple[int, ...]
    order: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise InputError(f"codebooks must have at least one entry each, not {self.sizes}")
        order = self.order or tuple(range(len(self.sizes)))
        if set(order) != set(range(len(self.sizes))):
            raise InputError(f"the order {order} must have places for {len(self.sizes)} codebooks, counted from 0")
        placed = [self.sizes[book] for book in order]
        offsets = self.offsets or tuple(accumulate(placed, initial=0))[:-1]
        if len(offsets) != len(order) or min(offsets) < 0:
            raise InputError(f"there are {len(offsets)} offsets for {len(order)} places, or a negative one")
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "offsets", offsets)

    @property
    def ids_per_frame(self) -> int:
        """Ids of one frame."""
        return len(self.order)

    @property
    def codebooks(self) -> int:
        """Number of codebooks."""
        return len(self.sizes)

    @property
    def placed_sizes(self) -> tuple[int, ...]:
        """Entries of the codebook at each place."""
        return tuple(self.sizes[book] for book in self.order)

    @property
    def vocab_size(self) -> int:
        """Ids lie in ``[0, vocab_size)``."""
        return max(offset + size for offset, size in zip(self.offsets, self.placed_sizes, strict=True))

    @property
    def bits_per_place(self) -> tuple[int, ...]:
        """Bits that the packed code of each place takes: ``ceil(log2(size))``, at least 1."""
        return tuple(max(1, (size - 1).bit_length()) for size in self.placed_sizes)

    @property
    def bits(self) -> int:
        """Bits that the packed codes of one frame take."""
        return sum(self.bits_per_place)

    def keep(self, codebooks: int) -> tuple[Frame, tuple[int, ...]]:
        """The frame of the first few codebooks, and the places of this one that it keeps; ids stay as they are.

        Raises:
            InputError: there are fewer codebooks.
        """
        if not 1 <= codebooks <= self.codebooks:
            raise InputError(f"codebooks must lie in [1, {self.codebooks}], not {codebooks}")
        places = tuple(place for place, book in enumerate(self.order) if book < codebooks)
        kept = Frame(
            self.sizes[:codebooks], tuple(self.order[place] for place in places), tuple(self.offsets[place] for place in places)
        )
        return kept, places


@dataclass(frozen=True)
class Spec:
    """The promises of one loaded tokenizer.

    Attributes:
        name: name in the registry, or the one the checkpoint was saved under.
        family: codec family, the module ``zoo.codecs.<family>``.
        modality: kind of media that goes in and comes out, a name in `zoo.modality`.
        vocab_size: ids lie in ``[0, vocab_size)``; 0 for a continuous tokenizer, whose ``encode`` returns `zoo.Latents`.
        dim: width of the vectors that ``embed`` returns; channels of the latents of a continuous tokenizer.
        ordered: whether every prefix of a sequence decodes (coarse to fine).
        lossless: whether ``decode(encode(x))`` equals ``x`` exactly.
        fingerprint: 16 hexadecimal digits that identify the checkpoint. Ids mean nothing under another one.
        sample_rate: samples per second of decoded media (audio only).
        hop_length: samples per frame of ids (audio only).
        chunk: samples of a chunk that is encoded by itself, and from the start of one to that of the next, where a recording is
            cut into chunks that overlap (audio only); ``None`` where it is a single sequence.
        image_size: height and width of the images that go in (images only); ``None`` if any size is accepted.
        decoded_size: height and width of the images that come out; ``None`` where it is that of those that went in.
        temporal_stride: frames that one latent frame stands for (video only).
        patch_size: height and width in pixels that one id or latent stands for (video only).
        max_tokens: ids of an item where every item gets the same number; a prefix is shorter.
        frame: codebooks of each step of the sequence; ``None`` for a single one of ``vocab_size``.
        residual: whether the first codebooks of every frame decode, coarse to fine (`zoo.Tokens.keep`).
        prompted: whether decoding takes a voice, which the tokens do not hold.
        sampled: whether decoding draws random numbers, and so takes a seed.
        parts: what is loaded to encode and decode with: ``encoder``, ``decoder`` and what else the family has. Without a
            ``decoder`` a tokenizer encodes only.
        streaming: whether ``stream_encoder`` and ``stream_decoder`` give what a single pass gives (``"exact"``), or one of them
            comes close to it only (``"approximate"``); ``None`` where there are none.

    >>> spec = zoo.load("wavtokenizer-tiny").spec
    >>> spec.token_rate, spec.bits_per_token, spec.bit_rate
    (75.0, 10, 750.0)
    """

    name: str
    family: str
    modality: str
    vocab_size: int
    dim: int
    ordered: bool = False
    lossless: bool = False
    fingerprint: str = ""
    sample_rate: int | None = None
    hop_length: int | None = None
    chunk: tuple[int, int] | None = None
    image_size: tuple[int, int] | None = None
    decoded_size: tuple[int, int] | None = None
    temporal_stride: int | None = None
    patch_size: tuple[int, int] | None = None
    max_tokens: int | None = None
    frame: Frame | None = None
    residual: bool = False
    prompted: bool = False
    sampled: bool = False
    parts: tuple[str, ...] = ("encoder", "decoder")
    streaming: Literal["exact", "approximate"] | None = None

    def __post_init__(self) -> None:
        if self.frame is not None and self.frame.vocab_size != self.vocab_size:
            raise InputError(f"the frame has {self.frame.vocab_size} ids, the vocabulary {self.vocab_size}")

    @property
    def continuous(self) -> bool:
        """Whether ``encode`` returns `zoo.Latents`, real numbers, rather than `zoo.Tokens`."""
        return self.vocab_size == 0

    @property
    def _layout(self) -> Frame | None:
        """The frame, that of a single codebook too; ``None`` where there are no ids."""
        return self.frame or (None if self.continuous else Frame((self.vocab_size,)))

    @property
    def ids_per_frame(self) -> int:
        """Ids of one frame; 1 where there is a single codebook, or none."""
        return 1 if self.frame is None else self.frame.ids_per_frame

    @property
    def codebooks(self) -> int:
        """Number of codebooks; 1 where ids come from a single one, or there are none."""
        return 1 if self.frame is None else self.frame.codebooks

    @property
    def frame_rate(self) -> float | None:
        """Frames per second of media, where media has a duration."""
        if self.sample_rate is None or self.hop_length is None:
            return None
        size, stride = self.chunk or (1, 1)
        return self.sample_rate / self.hop_length * size / stride

    @property
    def token_rate(self) -> float | None:
        """Ids per second of media, where media has a duration."""
        return None if self.frame_rate is None else self.frame_rate * self.ids_per_frame

    @property
    def bits_per_token(self) -> float:
        """Bits that a packed id takes on disk: ``ceil(log2(size))``, averaged over a frame; 0 where there are no ids."""
        if self._layout is None:
            return 0
        bits = self._layout.bits / self._layout.ids_per_frame
        return int(bits) if bits == int(bits) else bits

    @property
    def bit_rate(self) -> float | None:
        """Bits per second of media, where media has a duration and tokens."""
        return None if self.frame_rate is None or self._layout is None else self.frame_rate * self._layout.bits

    @property
    def bits_per_item(self) -> int | None:
        """Bits that the packed ids of a whole item take, where every item gets the same number of them."""
        return None if self.max_tokens is None or self.continuous else round(self.max_tokens * self.bits_per_token)

    def as_dict(self) -> dict[str, Any]:
        """Fields and derived rates as plain values, for JSON."""
        derived = ("continuous", "codebooks", "frame_rate", "token_rate", "bits_per_token", "bit_rate", "bits_per_item")
        frame = None if self.frame is None else {name: list(value) for name, value in asdict(self.frame).items()}
        return asdict(self) | {"frame": frame, "parts": list(self.parts)} | {name: getattr(self, name) for name in derived}

"""The tokenizer: recordings of any length to ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo.codecs.s3tokenizer.checkpoint import CHECKPOINT
from zoo.codecs.s3tokenizer.config import FRAME_HOP, SAMPLE_RATE, S3TokenizerConfig
from zoo.codecs.s3tokenizer.encoder import Block, Encoder
from zoo.codecs.s3tokenizer.frontend import SHORTEST, LogMel
from zoo.codecs.s3tokenizer.quantizer import Codebook, Ternary
from zoo.codecs.s3tokenizer.streaming import StreamEncoder
from zoo.codecs.s3tokenizer.windows import Window, official_windows, windows
from zoo.errors import ArgumentError, ItemError, WeightsError
from zoo.progress import progress_bar
from zoo.spec import Spec
from zoo.tokenizer import Budget, Prepared
from zoo.tokenizer.audio import AudioTokenizer, Rate
from zoo.tokens import Tokens

#: What is done with recordings of more than 30 s.
LONG = ("windows", "single")
#: Whose ways are followed where they differ from ours.
COMPAT = (None, "official")


class S3Tokenizer(AudioTokenizer[S3TokenizerConfig, Tokens]):
    """The supervised semantic speech tokenizer of CosyVoice 1, 2 and 3. It encodes only.

    Audio of any sample rate and channel count is averaged to mono and resampled to 16 kHz. A recording of ``n`` samples has
    ``F = n // 160`` frames and gets ``ceil(F / 4)`` ids at 25 Hz, ``ceil(F / 2)`` at 50 Hz, at any length. Encoding always
    runs in float32.
    """

    Config = S3TokenizerConfig
    family = "s3tokenizer"
    checkpoint = CHECKPOINT
    identity = ("quantizer.weight",)
    shortest = SHORTEST

    # Frames of windows that go through the encoder together.
    at_once: ClassVar[Mapping[str, Budget]] = {"encode": Budget(6_000, 192_000)}

    def __init__(self, config: S3TokenizerConfig | None = None, *, name: str = "s3tokenizer") -> None:
        super().__init__(config or S3TokenizerConfig(), name)
        self.frontend = LogMel(self.config.bands)
        self.encoder = Encoder(self.config)
        self.quantizer = Ternary(self.config) if self.config.rotary else Codebook(self.config)

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="audio",
            vocab_size=self.config.codebook_size,
            dim=self.quantizer.dim,
            fingerprint=self.fingerprint,
            sample_rate=SAMPLE_RATE,
            hop_length=FRAME_HOP * self.config.frames_per_id,
            parts=self.config.parts,
        )

    def compute_fingerprint(self) -> str:
        """Identity of the quantizer and of the rate, which no tensor tells."""
        digest = hashlib.sha256(f"{super().compute_fingerprint()} {self.config.stride}".encode())
        return digest.hexdigest()[:16]

    # ---- encode

    def encode(self, items: Any, *, long: str = "windows", compat: str | None = None, progress: bool = False) -> Tokens:
        """Audio to tokens.

        Args:
            items: as for every tokenizer of audio; one second has 25 or 50 ids.
            long: what is done with recordings of more than 30 s: ``"windows"`` encodes overlapping windows and keeps the middle
                of each, the same ids however long the recording goes on; ``"single"`` runs the encoder over the whole, which
                it was not trained for, gives other ids and takes memory and time that grow with the square of the length. It
                needs rotary positions (version 2 and later).
            compat: ``"official"`` gives the ids of the original package (s3tokenizer 0.3.0), which takes the first channel
                instead of the mean and loses up to 2 s of ids before the last window of some recordings of more than 30 s.
            progress: show a progress bar.

        Raises:
            ItemError: an item is shorter than 201 samples at 16 kHz, unreadable, not finite or of the wrong kind; names it.
            ArgumentError: an option has no such value.
        """
        self._require_options(long, compat)
        return self.encode_prepared(self.prepare(items, compat=compat), long=long, compat=compat, progress=progress)

    def prepare(self, items: Any, *, compat: str | None = None) -> list[Prepared]:
        """Audio as the network takes it: ``waveform`` ``[1, samples]`` at 16 kHz; ``amount`` counts samples.

        Arguments and errors as for `encode`.
        """
        self._require_options("windows", compat)
        if compat is None:
            return super().prepare(items)
        return self.read_items(items, lambda waveform: waveform[:1], mono=False)

    def encode_prepared(
        self, items: Sequence[Prepared], *, long: str = "windows", compat: str | None = None, progress: bool = False
    ) -> Tokens:
        self._require_options(long, compat)
        found: list[list[Tensor]] = [[] for _ in items]
        with progress_bar("encode", sum(item.amount // FRAME_HOP for item in items), progress, unit="frame") as advance:
            for batch in self._batches(items, long, compat):
                ids = self.encode_windows([mel for _, _, mel in batch])
                for (index, window, _), own in zip(batch, ids, strict=True):
                    found[index].append(own[window.first : window.last])
                    advance(window.stop - window.start)
        return self.tokens([torch.cat(parts) for parts in found], [item.meta for item in items])

    def _batches(
        self, items: Sequence[Prepared], long: str, compat: str | None
    ) -> Iterator[list[tuple[int, Window, Float[Tensor, "_frames bands"]]]]:
        """Windows of all items with their spectrograms, as many at a time as the budget allows but always one."""
        batch: list[tuple[int, Window, Tensor]] = []
        waiting, budget = 0, self.budget("encode")
        for index, item in enumerate(items):
            if item.amount < SHORTEST:
                raise ItemError(f"{item.amount} samples are too few: the shortest recording has {SHORTEST}", index)
            mel = self.frontend(item.tensors["waveform"][0].to(self.device))
            for window in self._windows(len(mel), long, compat):
                length = window.stop - window.start
                if batch and waiting + length > budget:
                    yield batch
                    batch, waiting = [], 0
                batch.append((index, window, mel[window.start : window.stop]))
                waiting += length
        if batch:
            yield batch

    def _windows(self, frames: int, long: str, compat: str | None) -> Iterator[Window]:
        if long == "single":
            return iter([Window(0, frames, 0, self.config.ids_of(frames))])
        return (windows if compat is None else official_windows)(frames, self.config)

    def encode_windows(self, mels: Sequence[Float[Tensor, "_frames bands"]]) -> list[Int[Tensor, " _"]]:
        """All ids of each window."""
        order = sorted(range(len(mels)), key=lambda i: len(mels[i]))
        lengths = [len(mels[i]) for i in order]
        ids = self.quantizer.ids(self.encoder(torch.cat([mels[i] for i in order]), lengths))
        found = dict(zip(order, ids.split([self.config.ids_of(length) for length in lengths]), strict=True))
        return [found[i] for i in range(len(mels))]

    def loudest(self, item: Any) -> float:
        """Level of the loudest band of a recording, as a power of ten: what a stream of it needs to give the ids of `encode`.

        Args:
            item: one item as `encode` takes it.
        """
        [prepared] = self.prepare([item])
        waveform = prepared.tensors["waveform"][0].to(self.device)
        with torch.no_grad():
            return float(self.frontend.levels(waveform, 0, len(waveform) // FRAME_HOP).max())

    def stream_encoder(self, sample_rate: int | None = None, *, loudest: float | None = None) -> StreamEncoder:
        """Encode audio as it arrives, window by window; see `StreamEncoder`.

        Args:
            sample_rate: of what is pushed; 16 kHz by default.
            loudest: level of the loudest band of the whole recording, from `loudest`, where it is known.
        """
        return StreamEncoder(self, sample_rate or SAMPLE_RATE, loudest)

    def _require_options(self, long: str, compat: str | None) -> None:
        if long not in LONG:
            raise ArgumentError(f"long must be one of {', '.join(LONG)}, not {long!r}")
        if compat not in COMPAT:
            raise ArgumentError(f"compat must be None or 'official', not {compat!r}")
        if long == "single" and not self.config.rotary:
            raise ArgumentError(
                f"{self.name} has positions for {self.config.positions} ids only, so long='single' is impossible: use 'windows'"
            )

    # ---- decode, embed

    def decode(self, tokens: Any, *, trim: bool = True, sample_rate: Rate = None, progress: bool = False) -> NoReturn:
        """There is no decoder, whatever the options say.

        Raises:
            MismatchError, InputError: the tokens could not be decoded anyway.
            WeightsError: always otherwise; names what makes audio of these ids.
        """
        self.check(tokens)
        raise WeightsError(
            f"{self.name} is encode only: S3Tokenizer has no decoder. CosyVoice makes audio of its ids with a flow-matching "
            "model (ids and a voice to a mel spectrogram) and a HiFT vocoder, which come with each CosyVoice and not with the "
            "tokenizer"
        )

    def embed(self, tokens: Tokens | Tensor | Sequence[Tensor]) -> Float[Tensor, "batch length dim"]:
        """Rows of the codebook in version 1, the digits -1, 0 and 1 of later ones; zero where an item has ended."""
        ids = self.check(tokens).ids.to(self.device)
        return self.quantizer.vectors(ids.clamp(min=0)) * (ids >= 0)[..., None]

    # ---- speed

    def compile_modules(self) -> None:
        """Compile the feed-forward layers; the first calls are slow."""
        for block in self.encoder.blocks:
            assert isinstance(block, Block)
            block.mlp.compile(dynamic=True)

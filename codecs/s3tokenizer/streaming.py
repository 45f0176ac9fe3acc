"""Audio that arrives piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo import media
from zoo.codecs.s3tokenizer.config import FRAME_HOP, SAMPLE_RATE, S3TokenizerConfig
from zoo.codecs.s3tokenizer.frontend import RANGE, SHORTEST, LogMel, frames_within
from zoo.codecs.s3tokenizer.windows import STEP, WINDOW, Window, windows
from zoo.errors import InputError
from zoo.precision import exact_float32
from zoo.tokens import Meta, Tokens


@runtime_checkable
class Codec(Protocol):
    """Interface of the tokenizer to streams."""

    @property
    def config(self) -> S3TokenizerConfig: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def frontend(self) -> LogMel: ...

    def tokens(self, ids: Sequence[Tensor], meta: Sequence[Meta] = ()) -> Tokens: ...
    def encode_windows(self, mels: Sequence[Tensor]) -> list[Tensor]: ...


# Frames in front of those that are computed next; their samples reach into the first window of a transform.
_KEPT = 2


class StreamEncoder:
    """Encodes audio as it arrives, window by window, in the memory of one window.

    The windows are those of the whole recording: 30 s long, one every 26 s. Ids come when the window behind them is
    complete, up to 30 s after their sound. What no stream can know is the loudest band of the whole recording, on which the
    floor of the spectrogram depends. With ``loudest``, which `S3Tokenizer.loudest` measures in one cheap pass, the ids are
    those of `encode`. Without it the floor follows the loudest band so far, which is an approximation until that band has
    come; `exact` tells whether it made a difference.

    Use as a context manager, or call `finish` at the end::

        with tokenizer.stream_encoder(loudest=level) as stream:
            for chunk in source:
                ids = stream.push(chunk)
        tokens = stream.tokens
    """

    def __init__(self, codec: Codec, sample_rate: int, loudest: float | None) -> None:
        self.codec, self.sample_rate = codec, sample_rate
        self._known, self._heard = loudest, float("-inf")
        self._resampler = media.Resampler(sample_rate, SAMPLE_RATE)
        self._received, self._samples = 0, 0
        self._pending = torch.zeros(0, dtype=torch.float32, device="cpu")
        self._frames = 0
        # Levels from the first frame of the next window on.
        self._levels = torch.zeros(0, codec.config.bands, dtype=torch.float32, device=codec.device)
        self._start = 0
        self._ids: list[Tensor] = [torch.zeros(0, dtype=torch.int64, device="cpu")]
        # The loudest band that each window's floor came from, and its own lowest one.
        self._floors: list[tuple[float, float]] = []
        self._finished = False

    @property
    def latency(self) -> float:
        """Seconds from a sound to the sample that settles its id, at most."""
        return ((WINDOW + 1) * FRAME_HOP + SHORTEST) / SAMPLE_RATE

    @property
    def exact(self) -> bool:
        """Whether the ids so far are those of `encode` for what has been heard so far: no window had another floor."""
        return all(
            abs(loudest - self._heard) < 1e-4 or lowest >= max(loudest, self._heard) - RANGE for loudest, lowest in self._floors
        )

    @property
    def tokens(self) -> Tokens:
        """All ids so far, as tokens of one item."""
        return self.codec.tokens([torch.cat(self._ids)], [{"samples": self._samples, "sample_rate": self.sample_rate}])

    def push(self, chunk: Any) -> Int[Tensor, " ids"]:
        """Take the next samples, ``[samples]`` or ``[channels, samples]``, and return the ids that they settle.

        Raises:
            InputError: the samples are not finite or not an array, or the stream has been finished.
        """
        self._refuse_if_finished()
        audio = media.read_audio((chunk, self.sample_rate), mono=True)
        self._samples += audio.original_samples
        self._append(self._resampler.push(audio.waveform))
        return self._advance(frames_within(self._received), ended=False)

    def finish(self) -> Int[Tensor, " ids"]:
        """The audio has ended: the remaining ids.

        Raises:
            InputError: the recording was shorter than 201 samples at 16 kHz, or the stream has been finished.
        """
        self._refuse_if_finished()
        self._append(self._resampler.finish())
        self._finished = True
        if self._received < SHORTEST:
            raise InputError(f"{self._received} samples are too few: the shortest recording has {SHORTEST}")
        return self._advance(self._received // FRAME_HOP, ended=True)

    def _append(self, waveform: Float[Tensor, "1 samples"]) -> None:
        self._pending = torch.cat([self._pending, waveform[0]])
        self._received += waveform.shape[1]

    @torch.no_grad()
    def _advance(self, frames: int, *, ended: bool) -> Int[Tensor, " ids"]:
        """Take the levels of the frames that are known, and encode the windows that are complete."""
        with exact_float32(self.codec.device):
            if frames > self._frames:
                self._measure(frames)
            found = self._ids[0][:0].to(self.codec.device)
            # A window is not the last one where another frame follows.
            while self._frames > self._start + WINDOW:
                found = torch.cat([found, self._encode(self._window(self._start + WINDOW + 1))])
                self._levels = self._levels[STEP:].clone()
                self._start += STEP
            if ended:
                found = torch.cat([found, self._encode(self._window(self._frames))])
        return found

    def _measure(self, frames: int) -> None:
        skipped = max(0, self._frames - _KEPT)
        own = self._pending.to(self.codec.device)
        levels = self.codec.frontend.levels(own, self._frames - skipped, frames - skipped)
        self._heard = max(self._heard, float(levels.max()))
        self._levels = torch.cat([self._levels, levels])
        self._frames = frames
        outdated = (max(0, frames - _KEPT) - skipped) * FRAME_HOP
        self._pending = self._pending[outdated:].clone()

    def _window(self, frames: int) -> Window:
        """The next window of a recording of that many frames."""
        return next(window for window in windows(frames, self.codec.config) if window.start == self._start)

    def _encode(self, window: Window) -> Int[Tensor, " ids"]:
        levels = self._levels[: window.stop - window.start]
        loudest = self._heard if self._known is None else self._known
        self._floors.append((loudest, float(levels.min())))
        [ids] = self.codec.encode_windows([self.codec.frontend.floored(levels.clone(), loudest)])
        self._ids.append(ids[window.first : window.last].cpu())
        return ids[window.first : window.last]

    def _refuse_if_finished(self) -> None:
        if self._finished:
            raise InputError("the stream has been finished")

    def __enter__(self) -> StreamEncoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and not self._finished:
            self.finish()

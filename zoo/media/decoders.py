"""Audio decoders: libsndfile for what it knows, FFmpeg (through PyAV, the ``video`` extra) for everything else."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from io import BufferedIOBase

import numpy as np
import soundfile
import torch
from jaxtyping import Float
from torch import Tensor

from zoo.errors import InputError, MissingReaderError
from zoo.media.containers import Track, find_tracks, foreign_kind
from zoo.media.resampling import HIGHEST_RATE, LOWEST_RATE

_BLOCK_SECONDS = 20
_BLOCK_VALUES = 1 << 22
# More samples than this in a byte are a damaged header, or silence.
_SAMPLES_PER_BYTE = 1_000
_EXTRA = 'pip install "tokenizer-zoo[video]"'


class Decoder:
    """A recording that is read once, from its start to its end.

    Attributes:
        sample_rate: samples per second.
        channels: how many.
        samples: per channel; ``None`` where only decoding tells.
        likely: how many there may be where they are not known, and no more than so small a file can plausibly hold.
    """

    sample_rate: int
    channels: int
    samples: int | None
    likely: int

    def blocks(self) -> Iterator[Float[Tensor, "channels samples"]]:
        """All samples.

        Raises:
            InputError: the recording is damaged or truncated.
        """
        raise NotImplementedError


class _Forward(soundfile.SoundFile):  # type: ignore[misc]
    """A file that is read forwards only: the base class seeks after every read, which streams of unknown length refuse."""

    def seekable(self) -> bool:
        return False


class _SoundFileDecoder(Decoder):
    def __init__(self, track: Track, name: str) -> None:
        plausible = _plausible(track.content)
        self._file, self._name, self._order = _Forward(track.content), name, track.order
        self.sample_rate, self.channels = self._file.samplerate, self._file.channels
        own = self._file.frames if track.measured else None
        self._proven = track.samples
        self.samples: int | None = own if track.samples is None else track.samples
        self.likely = min(self._file.frames if self.samples is None else self.samples, plausible)

    def blocks(self) -> Iterator[Float[Tensor, "channels samples"]]:
        most = max(1, min(_BLOCK_SECONDS * self.sample_rate, _BLOCK_VALUES // self.channels))
        order = list(self._order) if self._order is not None and len(self._order) == self.channels else None
        done = 0
        while self._proven is None or done < self._proven:
            try:
                block = self._file.read(most, dtype="float32", always_2d=True)
            except (soundfile.SoundFileError, RuntimeError) as error:
                reason = getattr(error, "error_string", error)
                raise InputError(f"{self._name} is damaged after {done} samples: {reason}") from error
            block = block if self._proven is None else block[: self._proven - done]
            if not len(block):
                break
            done += len(block)
            yield torch.from_numpy(np.ascontiguousarray(block.T if order is None else block.T[order]))
        if self.samples is not None and done < self.samples:
            raise InputError(f"{self._name} is truncated: {done} of {self.samples} samples can be read")


class _AVDecoder(Decoder):
    """The first audio track of whatever FFmpeg reads; priming samples are left out as the file's edit list says."""

    samples = None

    def __init__(self, content: BufferedIOBase, name: str) -> None:
        import av

        self._name = name
        plausible = _plausible(content)
        try:
            self._container = av.open(content, mode="r", metadata_errors="ignore")
        except (av.FFmpegError, ValueError, OSError) as error:
            raise InputError(f"{name} is not an audio file that can be read: {_reason(error)}") from error
        # Streams of a codec that FFmpeg does not know have no decoder.
        streams = [stream for stream in self._container.streams.audio if stream.codec_context is not None]
        if not streams:
            self._container.close()
            raise InputError(f"{name} holds no audio track that can be decoded")
        self._stream = streams[0]
        self.sample_rate, self.channels = int(self._stream.rate or 0), int(self._stream.channels or 0)
        seconds = max(0.0, (self._container.duration or 0) / av.time_base)
        self.likely = min(math.ceil((seconds + 1) * self.sample_rate), plausible)

    def blocks(self) -> Iterator[Float[Tensor, "channels samples"]]:
        # Frames are a few milliseconds long; they are gathered so that none outlives its successor.
        most = max(1, min(_BLOCK_SECONDS * self.sample_rate, _BLOCK_VALUES // max(1, self.channels)))
        block, filled = torch.empty(self.channels, most, dtype=torch.float32), 0
        for samples in self._frames():
            while samples.shape[1]:
                part = samples[:, : most - filled]
                block[:, filled : filled + part.shape[1]] = part
                filled += part.shape[1]
                samples = samples[:, part.shape[1] :]
                if filled == most:
                    yield block
                    block, filled = torch.empty(self.channels, most, dtype=torch.float32), 0
        if filled:
            yield block[:, :filled]

    def _frames(self) -> Iterator[Float[Tensor, "channels samples"]]:
        import av

        done = 0
        # The rate and the channels stay; only the type of the samples is changed.
        converter = av.AudioResampler(format="fltp", layout=self._stream.layout, rate=self.sample_rate)
        with self._container:
            try:
                for frame in itertools.chain(self._container.decode(self._stream), [None]):
                    if frame is not None and (frame.sample_rate, len(frame.layout.channels)) != (
                        self.sample_rate,
                        self.channels,
                    ):
                        raise InputError(f"{self._name} changes its sample rate or its channels after {done} samples")
                    for converted in converter.resample(frame):
                        done += converted.samples
                        yield torch.from_numpy(converted.to_ndarray())
            except (av.FFmpegError, ValueError, OSError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(f"{self._name} is damaged after {done} samples: {_reason(error)}") from error


def _plausible(content: BufferedIOBase) -> int:
    """The most samples that a file of this size may hold."""
    size = content.seek(0, os.SEEK_END)
    content.seek(0)
    return _SAMPLES_PER_BYTE * size


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def open_decoders(handle: BufferedIOBase, name: str) -> list[Decoder]:
    """Decoders of the recordings in a file, which follow each other and agree in rate and channels.

    Raises:
        InputError: the file cannot be read, is truncated, or its parts do not fit together.
        MissingReaderError: reading it needs the ``video`` extra.
    """
    decoders = [_open_track(track, name) for track in find_tracks(handle, name)]
    first = decoders[0]
    for decoder in decoders:
        if not LOWEST_RATE <= decoder.sample_rate <= HIGHEST_RATE:
            raise InputError(
                f"{name} has a sample rate of {decoder.sample_rate} Hz; {LOWEST_RATE} Hz to {HIGHEST_RATE:,} Hz can be read"
            )
        if (decoder.sample_rate, decoder.channels) != (first.sample_rate, first.channels):
            raise InputError(
                f"{name} consists of parts that differ: {first.sample_rate} Hz and {first.channels} channels, then"
                f" {decoder.sample_rate} Hz and {decoder.channels}; split it, or convert it with ffmpeg -i"
            )
    return decoders


def _open_track(track: Track, name: str) -> Decoder:
    reason = ""
    if track.decoder == "soundfile":
        try:
            return _SoundFileDecoder(track, name)
        except soundfile.LibsndfileError as error:
            reason = f": {error.error_string}"
    track.content.seek(0)
    kind = foreign_kind(track.content.read(256))
    track.content.seek(0)
    try:
        import av  # noqa: F401
    except ImportError as error:
        if kind is not None:
            raise MissingReaderError(f"{name} is {kind}, which is read with PyAV: {_EXTRA}") from error
        raise InputError(f"{name} is not an audio file that can be read{reason}; PyAV reads more kinds: {_EXTRA}") from error
    return _AVDecoder(track.content, name)

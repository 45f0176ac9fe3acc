"""Audio: files through soundfile or PyAV, arrays and tensors as they are, resampled block by block."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from zoo.errors import InputError
from zoo.media.files import FILE_TYPES, open_source, replacing
from zoo.media.items import audio_item
from zoo.media.resampling import Resampler, resample, resampled_length
from zoo.modality import modality
from zoo.precision import all_finite

# Read and written.
AUDIO_EXTENSIONS = (
    ".wav",
    ".flac",
    ".ogg",
    ".oga",
    ".opus",
    ".mp3",
    ".aiff",
    ".aif",
    ".aifc",
    ".au",
    ".snd",
    ".caf",
    ".w64",
    ".rf64",
)
# Read only; all but the first with PyAV.
READ_ONLY_AUDIO_EXTENSIONS = (".mp2", *modality("audio").extras)


@dataclass(frozen=True)
class Audio:
    """Samples with their rate, and the rate and length they had before they were resampled.

    Attributes:
        waveform: float32, nominally in [-1, 1].
        sample_rate: samples per second of ``waveform``.
    """

    waveform: Float[Tensor, "channels samples"]
    sample_rate: int
    original_rate: int
    original_samples: int


@dataclass(frozen=True)
class AudioInfo:
    """Facts about an audio file that are known without decoding it.

    Attributes:
        samples: per channel, at ``sample_rate``; ``None`` where only decoding tells.
        sample_rate: samples per second.
        channels: how many.
    """

    samples: int | None
    sample_rate: int
    channels: int


def read_audio(
    source: Any, *, sample_rate: int | None = None, mono: bool = False, default_sample_rate: int | None = None
) -> Audio:
    """Read audio from a file or take it from an array.

    Files are recognised by their content, and read, averaged and resampled block by block, so that memory holds little more
    than the result. A length in a header is a claim: samples are read to the end of the data, and several recordings in one
    file (chained Ogg, files glued together) are read one after the other. What libsndfile does not know (M4A, AAC, WebM, WMA,
    the sound of a video) is read with PyAV, which the ``video`` extra brings.

    Bytes between the frames of an MP3 that are no frame are passed over without a word, as ffmpeg does with a warning: tags
    and the ends of cut files lie there. GSM in WAV has whole blocks of 320 samples, whatever the header counts.

    Channels come in WAV's order whatever the format: front left, front right, front centre, LFE, back left, back right,
    side left, side right.

    Args:
        source: a path, the bytes of an audio file, an open file, ``(array, sample_rate)``, an item of a Hugging Face data set,
            or an array or tensor of ``default_sample_rate``; arrays are ``[samples]`` or ``[channels, samples]``, integers are
            scaled to [-1, 1). `zoo.media.items.audio_item` has the rules.
        sample_rate: rate to resample to by windowed sinc (torchaudio's defaults); the source's own if ``None``. Rates from
            1 Hz to 1 MHz are possible.
        mono: average the channels.
        default_sample_rate: rate of arrays that come without one.

    Raises:
        InputError: the source is of the wrong kind or rank, empty, not finite, unreadable, truncated or of an absurd rate.
        MissingReaderError: reading the file needs the ``video`` extra.

    >>> stereo = torch.tensor([[0, 16384] * 8_000, [0, 0] * 8_000], dtype=torch.int16)
    >>> audio = read_audio((stereo, 16_000), sample_rate=8_000, mono=True)
    >>> list(audio.waveform.shape), audio.original_samples, audio.original_rate
    ([1, 8000], 16000, 16000)
    """
    stream = stream_audio(source, sample_rate=sample_rate, mono=mono, default_sample_rate=default_sample_rate)
    waveform = stream.read()
    assert waveform is not None
    return Audio(waveform, stream.sample_rate, stream.original_rate, stream.original_samples)


class AudioStream:
    """Audio that is decoded, averaged and resampled block by block; iterating over it gives ``[channels, samples]``, once.

    `stream_audio` opens one.

    Attributes:
        name: what the audio is called in errors.
        file: where it is read from, a path or the content of a file; ``None`` of an array.
        sample_rate: of the blocks.
        original_rate: of the audio.
        original_samples: that were read so far.
        samples: that the blocks had so far.
    """

    def __init__(
        self, source: Any, *, sample_rate: int | None = None, mono: bool = False, default_sample_rate: int | None = None
    ) -> None:
        source = audio_item(source, default_sample_rate)
        self.file = source if isinstance(source, FILE_TYPES) else None
        if self.file is not None:
            self.name, self.original_rate, samples, self._source = _open_file(source)
        else:
            array, self.original_rate = source
            self.name, samples, self._source = "the audio", array.shape[1], iter([array])
        self.sample_rate = self.original_rate if sample_rate is None else sample_rate
        self.original_samples = self.samples = 0
        self._mono, self._resampler = mono, Resampler(self.original_rate, self.sample_rate)
        self._expected = resampled_length(samples, self.original_rate, self.sample_rate)
        self._blocks = self._resampled()

    def __iter__(self) -> Iterator[Float[Tensor, "channels _"]]:
        return self._blocks

    def _resampled(self) -> Iterator[Float[Tensor, "channels _"]]:
        for block in self._source:
            if not all_finite(block):
                raise InputError("the audio holds NaN or infinite samples")
            self.original_samples += block.shape[1]
            if self._mono and block.shape[0] > 1:
                block = block.mean(0, keepdim=True)
            for part in block.split(self._resampler.block_samples(block.shape[0]), dim=1):
                yield self._counted(self._resampler.push(part))
        yield self._counted(self._resampler.finish())

    def _counted(self, block: Float[Tensor, "channels _"]) -> Float[Tensor, "channels _"]:
        self.samples += block.shape[1]
        return block

    def read(self, most: int | None = None) -> Float[Tensor, "channels samples"] | None:
        """All blocks as one; ``None`` where that is more than ``most`` samples, which are only counted and checked then.

        Raises:
            InputError: as `read_audio` does.
        """
        whole: _Whole | None = _Whole(self._expected if most is None else min(self._expected, most))
        for block in self:
            if most is not None and self.samples > most:
                whole = None
            if whole is not None:
                whole.append(block)
        return None if whole is None else whole.result()


def stream_audio(
    source: Any, *, sample_rate: int | None = None, mono: bool = False, default_sample_rate: int | None = None
) -> AudioStream:
    """Open audio to be read block by block; the blocks are, put together, what `read_audio` gives, to the last bit.

    Arguments and errors as for `read_audio`; what is wrong with the samples is found on reaching them.

    >>> stream = stream_audio((torch.zeros(1, 50_000), 48_000), sample_rate=24_000)
    >>> sum(block.shape[1] for block in stream), stream.samples, stream.original_samples
    (25000, 25000, 50000)
    """
    return AudioStream(source, sample_rate=sample_rate, mono=mono, default_sample_rate=default_sample_rate)


class _Whole:
    """Blocks put together in memory that is taken once, for as many samples as are expected; more are held apart."""

    def __init__(self, expected: int) -> None:
        self._expected, self._done = expected, 0
        self._whole: Tensor | None = None
        self._more: list[Tensor] = []

    def append(self, block: Float[Tensor, "channels _"]) -> None:
        if self._whole is None:
            self._whole = torch.empty(block.shape[0], self._expected, dtype=torch.float32)
        end = self._done + block.shape[1]
        if self._more or end > self._expected:
            self._more.append(block)
            return
        self._whole[:, self._done : end] = block
        self._done = end

    def result(self) -> Float[Tensor, "channels samples"]:
        assert self._whole is not None
        whole = self._whole[:, : self._done]
        return torch.cat([whole, *self._more], dim=1) if self._more else whole


def audio_info(source: Any) -> AudioInfo:
    """Samples, rate and channels of an audio file, without decoding it; MP3 and Ogg are walked through frame by frame.

    Args:
        source: a path, the bytes of an audio file, or an open file.

    Raises:
        InputError: there is no such file, or it cannot be read, is truncated or of an absurd rate.
        MissingReaderError: reading the file needs the ``video`` extra.
    """
    from zoo.media.decoders import open_decoders

    # An array has a rate of its own or none, neither of which matters here.
    source = audio_item(source, 1)
    if not isinstance(source, FILE_TYPES):
        raise InputError("expected a path, the bytes of an audio file or an open file, not samples")
    handle, name = open_source(source, "audio")
    with handle:
        decoders = open_decoders(handle, name)
        samples = [decoder.samples for decoder in decoders]
        known = None if None in samples else sum(count for count in samples if count is not None)
        return AudioInfo(known, decoders[0].sample_rate, decoders[0].channels)


def _open_file(source: Any) -> tuple[str, int, int, Iterator[Tensor]]:
    """Name, rate, likely number of samples and blocks of an audio file, which stays open until the blocks are read."""
    from zoo.media.decoders import open_decoders

    handle, name = open_source(source, "audio")
    try:
        decoders = open_decoders(handle, name)
    except BaseException:
        handle.close()
        raise

    def blocks() -> Iterator[Tensor]:
        received = 0
        with handle:
            for decoder in decoders:
                for block in decoder.blocks():
                    received += block.shape[1]
                    yield block
        if not received:
            raise InputError(f"{name} holds no samples")

    return name, decoders[0].sample_rate, sum(decoder.likely for decoder in decoders), blocks()


def restore_audio(
    waveform: Float[Tensor, "channels samples"],
    rate: int,
    meta: Mapping[str, Any],
    *,
    trim: bool = True,
    sample_rate: int | str | None = None,
) -> Float[Tensor, "channels _"]:
    """Bring decoded audio to the length of the original recording and to the wanted rate.

    Args:
        waveform: at ``rate``.
        meta: of the item: the ``samples`` and ``sample_rate`` of the recording; nothing where they are not known.
        trim: cut to the recording's length.
        sample_rate: resample to this; ``"original"`` gives the recording's rate, and its number of samples if ``trim``.
    """
    samples, original_rate = meta.get("samples"), meta.get("sample_rate", rate)
    if trim and samples is not None:
        waveform = waveform[:, : resampled_length(samples, original_rate, rate)]
    wanted = original_rate if sample_rate == "original" else sample_rate or rate
    if wanted != rate:
        waveform = resample(waveform, rate, int(wanted))
        if trim and samples is not None and wanted == original_rate:
            waveform = waveform[:, :samples]
    return waveform


# What an extension is written as: the format and the encoding of libsndfile.
_WRITTEN = {
    "WAV": ("WAV", "PCM_16"),
    "AIF": ("AIFF", "PCM_16"),
    "AIFC": ("AIFF", "PCM_16"),
    "SND": ("AU", "PCM_16"),
    "OGA": ("OGG", "VORBIS"),
    "OGG": ("OGG", "VORBIS"),
    "OPUS": ("OGG", "OPUS"),
}
# The sample rates of formats that know but a few, and the most channels of those that know but a few.
_RATES_WRITTEN = {
    "MPEG_LAYER_III": (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000),
    "OPUS": (8_000, 12_000, 16_000, 24_000, 48_000),
}
_CHANNELS_WRITTEN = {"MP3": 2, "FLAC": 8, "OGG": 8}
_BLOCK_WRITTEN = 1 << 18


def write_audio(path: str | os.PathLike[str], waveform: Float[Tensor, "channels samples"], sample_rate: int) -> Path:
    """Write an audio file, its format chosen by the extension; samples are clipped to [-1, 1] and WAV is 16-bit PCM.

    Args:
        path: its extension is one that soundfile writes (``.wav``, ``.flac``, ``.ogg``, ``.opus``, ``.mp3``, ``.aiff``, ...).
        waveform: channels in WAV's order: front left and right, centre, LFE, back left and right, side left and right.
        sample_rate: samples per second.

    Raises:
        InputError: soundfile writes no format of that extension, or not at that rate or number of channels.
    """
    import soundfile

    from zoo.media.containers import vorbis_order

    path = Path(path)
    extension = path.suffix.lstrip(".").upper() or "WAV"
    kind, encoding = _WRITTEN.get(extension, (extension, None))
    if kind not in soundfile.available_formats():
        raise InputError(
            f"cannot write {path.name}: no audio format {path.suffix!r}; .wav, .flac, .ogg, .opus and .mp3 are some"
        )
    encoding = encoding or soundfile.default_subtype(kind)
    rates = _RATES_WRITTEN.get(encoding)
    if rates is not None and sample_rate not in rates:
        raise InputError(
            f"cannot write {path.name} at {sample_rate} Hz: {path.suffix} knows {', '.join(map(str, rates))} Hz; choose one of"
            " these sample rates, or .wav or .flac"
        )
    channels = waveform.shape[0]
    if channels > _CHANNELS_WRITTEN.get(kind, channels):
        raise InputError(
            f"cannot write {path.name} with {channels} channels: {path.suffix} has at most {_CHANNELS_WRITTEN[kind]}"
        )
    samples = waveform.detach().float().clamp(-1, 1).cpu().numpy()
    order = vorbis_order(channels) if kind == "OGG" else None
    if order is not None:
        samples = samples[np.argsort(order)]
    # Through memory: soundfile takes no names that are no text, and our own writing tells a full disk.
    content = io.BytesIO()
    try:
        with soundfile.SoundFile(content, "w", sample_rate, channels, encoding, format=kind) as file:
            # Encoders keep a whole block on their stack.
            for start in range(0, samples.shape[1], _BLOCK_WRITTEN):
                file.write(samples[:, start : start + _BLOCK_WRITTEN].T)
    except (soundfile.SoundFileError, ValueError) as error:
        reason = getattr(error, "error_string", error)
        raise InputError(f"cannot write {path.name} at {sample_rate} Hz with {channels} channels: {reason}") from error
    with replacing(path) as temporary:
        temporary.write_bytes(content.getbuffer())
    return path

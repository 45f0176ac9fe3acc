"""Audio: files through soundfile, arrays and tensors as they are, resampled block by block."""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio
from jaxtyping import Float
from torch import Tensor

from zoo.errors import InputError
from zoo.media.files import FILE_TYPES, open_source, replacing
from zoo.media.items import audio_item
from zoo.nn.precision import exact_float32

AUDIO_EXTENSIONS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64")
_BLOCK_SECONDS = 20


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


def read_audio(
    source: Any, *, sample_rate: int | None = None, mono: bool = False, default_sample_rate: int | None = None
) -> Audio:
    """Read audio from a file or take it from an array.

    Files are read, averaged and resampled block by block, so that memory holds little more than the result.

    Args:
        source: a path, the bytes of an audio file, an open file, ``(array, sample_rate)``, an item of a Hugging Face data set,
            or an array or tensor of ``default_sample_rate``; arrays are ``[samples]`` or ``[channels, samples]``, integers are
            scaled to [-1, 1). `zoo.media.items.audio_item` has the rules.
        sample_rate: rate to resample to by windowed sinc (torchaudio's defaults); the source's own if ``None``.
        mono: average the channels.
        default_sample_rate: rate of arrays that come without one.

    Raises:
        InputError: the source is of the wrong kind or rank, empty, not finite, unreadable or truncated.
    """
    blocks: Iterator[Tensor]
    source = audio_item(source, default_sample_rate)
    if isinstance(source, FILE_TYPES):
        rate, samples, blocks = _open_file(source)
    else:
        array, rate = source
        samples, blocks = array.shape[1], iter([array])
    target = sample_rate or rate
    resampler = Resampler(rate, target)
    parts = []
    for block in blocks:
        if not torch.isfinite(block).all():
            raise InputError("the audio holds NaN or infinite samples")
        parts.append(resampler.push(block.mean(0, keepdim=True) if mono else block))
    parts.append(resampler.finish())
    waveform = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    return Audio(waveform, target, rate, samples)


def _open_file(source: Any) -> tuple[int, int, Iterator[Tensor]]:
    """Rate, frames and blocks of an audio file; the file stays open until the blocks are read."""
    import soundfile

    handle, name = open_source(source, "audio")
    try:
        _check_riff_complete(handle, name)
        file = soundfile.SoundFile(handle)
    except soundfile.LibsndfileError as error:
        handle.close()
        raise InputError(f"{name} is not an audio file that can be read: {error.error_string}") from error
    except InputError:
        handle.close()
        raise
    if file.frames == 0:
        handle.close()
        raise InputError(f"{name} holds no samples")
    return file.samplerate, file.frames, _read_blocks(file, handle, name)


def _read_blocks(file: Any, handle: io.BufferedIOBase, name: str) -> Iterator[Float[Tensor, "channels samples"]]:
    import soundfile

    done = 0
    with handle, file:
        while done < file.frames:
            try:
                block = file.read(_BLOCK_SECONDS * file.samplerate, dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                raise InputError(f"{name} is damaged after {done} samples: {error.error_string}") from error
            if not len(block):
                raise InputError(f"{name} is truncated: {done} of {file.frames} samples can be read")
            done += len(block)
            yield torch.from_numpy(np.ascontiguousarray(block.T))


def _check_riff_complete(handle: io.BufferedIOBase, name: str) -> None:
    """Refuse a WAV file whose data chunk is cut short, which libsndfile would read without a word."""
    size = handle.seek(0, os.SEEK_END)
    handle.seek(0)
    try:
        header = handle.read(12)
        if header[:4] != b"RIFF" or header[8:] != b"WAVE":
            return
        while len(chunk := handle.read(8)) == 8:
            kind, length = struct.unpack("<4sI", chunk)
            # Streaming writers leave 0 or the largest value where they cannot know the length.
            if kind == b"data" and length not in (0, 0xFFFFFFFF, 0x7FFFFFFF) and handle.tell() + length > size:
                raise InputError(f"{name} is truncated: {size - handle.tell()} of {length} bytes of samples are there")
            handle.seek(length + length % 2, os.SEEK_CUR)
    finally:
        handle.seek(0)


def resampled_length(samples: int, rate: int, new_rate: int) -> int:
    """Samples that `resample` gives: ``ceil(samples * new_rate / rate)``."""
    return -(-samples * new_rate // rate)


@lru_cache(maxsize=32)
def _sinc_resampler(rate: int, new_rate: int) -> torchaudio.transforms.Resample:
    # The transform computes its kernel in float64, as the original code does; the functional form would not.
    return torchaudio.transforms.Resample(rate, new_rate)


class Resampler:
    """Windowed-sinc resampling of a stream; the blocks add up to what the whole signal would give."""

    def __init__(self, rate: int, new_rate: int) -> None:
        divisor = math.gcd(rate, new_rate)
        self.rate, self.new_rate = rate, new_rate
        self._orig, self._new = rate // divisor, new_rate // divisor
        # torchaudio's kernel reaches ceil(6 * orig / (0.99 * min(orig, new))) input samples to either side.
        reach = math.ceil(6 * self._orig / (0.99 * min(self._orig, self._new)))
        self._context = -(-reach // self._orig) * self._orig + self._orig
        self._pending: Tensor | None = None
        self._seen_context = 0

    def push(self, block: Float[Tensor, "channels samples"]) -> Float[Tensor, "channels _"]:
        """Take the next samples; return those output samples that no later input can change."""
        if self.rate == self.new_rate:
            return block
        self._pending = block if self._pending is None else torch.cat([self._pending, block], dim=1)
        fixed = (self._pending.shape[1] - self._context) // self._orig * self._orig
        if fixed <= self._seen_context:
            return block[:, :0]
        kept = self._emit(self._seen_context, fixed)
        drop = max(0, fixed - self._context)
        self._pending = self._pending[:, drop:]
        self._seen_context = fixed - drop
        return kept

    def finish(self) -> Float[Tensor, "channels _"]:
        """The rest of the output, which makes ``ceil(received * new_rate / rate)`` samples in all."""
        if self._pending is None:
            return torch.zeros(1, 0)
        rest = self._emit(self._seen_context, None)
        self._pending = None
        return rest

    def _emit(self, start: int, stop: int | None) -> Tensor:
        """Resample the pending samples and keep the outputs that belong to inputs ``start`` to ``stop``."""
        assert self._pending is not None
        with exact_float32(self._pending.device):
            resampled = _sinc_resampler(self._orig, self._new)(self._pending)
        end = None if stop is None else stop // self._orig * self._new
        return resampled[:, start // self._orig * self._new : end]


def resample(waveform: Float[Tensor, "channels samples"], rate: int, new_rate: int) -> Float[Tensor, "channels _"]:
    """Windowed-sinc resampling (torchaudio's defaults: width 6, roll-off 0.99, Hann window) in bounded extra memory."""
    if rate == new_rate:
        return waveform
    resampler = Resampler(rate, new_rate)
    block = _BLOCK_SECONDS * rate
    parts = [resampler.push(part) for part in waveform.cpu().split(block, dim=1)]
    return torch.cat([*parts, resampler.finish()], dim=1).to(waveform.device)


def restore_audio(
    waveform: Float[Tensor, "channels samples"],
    rate: int,
    meta: Mapping[str, Any],
    *,
    trim: bool = True,
    sample_rate: int | str | None = None,
) -> Float[Tensor, "channels _"]:
    """Bring decoded audio to the length of the recording that was encoded, and to the rate that is asked for.

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


def write_audio(path: str | os.PathLike[str], waveform: Float[Tensor, "channels samples"], sample_rate: int) -> Path:
    """Write an audio file, its format chosen by the extension; samples are clipped to [-1, 1] and WAV is 16-bit PCM.

    Raises:
        InputError: soundfile knows no format of that extension.
    """
    import soundfile

    path = Path(path)
    kind = path.suffix.lstrip(".").upper() or "WAV"
    if kind not in soundfile.available_formats():
        raise InputError(f"cannot write {path.name}: no audio format {path.suffix!r}")
    samples = waveform.detach().float().clamp(-1, 1).cpu().numpy().T
    with replacing(path) as temporary:
        soundfile.write(temporary, samples, sample_rate, format=kind)
    return path

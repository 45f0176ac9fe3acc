"""The spectrogram: mel bands of the power, their logarithm, and a floor below the loudest of them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.codecs.s3tokenizer.config import FRAME_HOP, SAMPLE_RATE
from zoo.precision import Float32Module

_WINDOW = 400
_MARGIN = _WINDOW // 2
#: Samples of the shortest recording: its ends are reflected.
SHORTEST = _MARGIN + 1
# Frames whose spectra are in memory at a time.
_FRAMES_AT_ONCE = 4096
_FLOOR = 1e-10
#: Powers of ten below the loudest band of the recording that count.
RANGE = 8.0


class LogMel(Float32Module):
    """Whisper's log-mel spectrogram, of a whole recording and not cut to 30 seconds.

    The floor depends on the loudest band of the recording. So a recording is never cut before, and never batched with others.
    """

    def __init__(self, bands: int) -> None:
        super().__init__()
        self.register_buffer("window", torch.empty(_WINDOW), persistent=False)
        self.register_buffer("filters", torch.empty(_MARGIN + 1, bands), persistent=False)
        self.reset_buffers()

    window: Tensor
    filters: Tensor

    def reset_buffers(self) -> None:
        """Fill in window and filters; needed after the module was built on the meta device."""
        device = torch.device("cpu") if self.window.device.type == "meta" else self.window.device
        self.window = torch.hann_window(_WINDOW, dtype=torch.float32, device=device)
        self.filters = _mel_filters(self.filters.shape[1]).to(device)

    def forward(self, waveform: Float[Tensor, " samples"]) -> Float[Tensor, "frames bands"]:
        """The spectrogram of one recording, time-major: ``samples // 160`` frames, of `SHORTEST` samples at least."""
        levels = self.levels(waveform, 0, len(waveform) // FRAME_HOP)
        return self.floored(levels, float(levels.max()))

    def levels(self, waveform: Float[Tensor, " samples"], first: int, last: int) -> Float[Tensor, "frames bands"]:
        """Logarithms to base 10 of the bands' power in frames ``first`` to ``last``, above the floor of digital silence only.

        Frame ``f`` is centred on sample ``160 * f``. Where it reaches beyond the waveform, this is reflected.
        """
        mel = torch.empty(last - first, self.filters.shape[1], dtype=torch.float32, device=waveform.device)
        for start in range(first, last, _FRAMES_AT_ONCE):
            stop = min(start + _FRAMES_AT_ONCE, last)
            spectrum = torch.stft(
                _reflected(waveform, start * FRAME_HOP - _MARGIN, (stop - 1) * FRAME_HOP + _MARGIN),
                _WINDOW,
                FRAME_HOP,
                window=self.window,
                center=False,
                return_complex=True,
            )
            torch.matmul(spectrum.abs().square().T, self.filters, out=mel[start - first : stop - first])
        return mel.clamp_(min=_FLOOR).log10_()

    @staticmethod
    def floored(levels: Float[Tensor, "frames bands"], loudest: float) -> Float[Tensor, "frames bands"]:
        """Input of the encoder, made in place of levels, with the floor below the loudest band of the recording."""
        return levels.clamp_(min=loudest - RANGE).add_(4).div_(4)


def frames_within(samples: int) -> int:
    """Frames that no later sample can change."""
    return max(0, (samples - SHORTEST) // FRAME_HOP + 1)


def _reflected(waveform: Float[Tensor, " samples"], start: int, stop: int) -> Float[Tensor, " piece"]:
    """A stretch of a recording that may reach beyond its ends, where it is reflected."""
    samples = len(waveform)
    parts = [waveform[max(start, 0) : min(stop, samples)]]
    if start < 0:
        parts.insert(0, waveform[1 : 1 - start].flip(0))
    if stop > samples:
        parts.append(waveform[2 * samples - 1 - stop : samples - 1].flip(0))
    return torch.cat(parts)


def _mel_filters(bands: int) -> Float[Tensor, "bins bands"]:
    """Triangles of equal area, equally spaced on Slaney's mel scale, from 0 to 8000 Hz."""
    with torch.device("cpu"):
        highest = SAMPLE_RATE / 2
        # Linear up to 1000 Hz, 15 mel, and logarithmic beyond: 27 mel are a factor of 6.4.
        log_step = torch.log(torch.tensor(6.4, dtype=torch.float64)) / 27
        top = 15 + torch.log(torch.tensor(highest / 1000, dtype=torch.float64)) / log_step
        mel = torch.linspace(0, 1, bands + 2, dtype=torch.float64) * top
        points = torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * log_step))
        bins = torch.linspace(0, highest, _MARGIN + 1, dtype=torch.float64)[:, None]
        low, middle, high = points[:-2], points[1:-1], points[2:]
        triangles = torch.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clamp(min=0)
        return (triangles * 2 / (high - low)).float()

"""Log-mel spectrograms: HiFi-GAN's, for its loss and as the speech vectors of small models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torchaudio
from jaxtyping import Float
from torch import Tensor, nn

from zoo.codecs.vectok.config import LogMelSizes
from zoo.precision import Float32Module


class LogMel(nn.Module):
    """Natural logarithm of the mel magnitudes, at least ``floor``: Slaney's scale and area norm, Hann window.

    The signal is reflected by ``(n_fft - hop_length) / 2`` samples at either end and frames are not centred, so that
    ``hop_length`` samples make a frame.
    """

    FLOOR = 1e-5

    def __init__(
        self,
        sample_rate: int = 16_000,
        n_fft: int = 1024,
        hop_length: int = 320,
        bands: int = 80,
        low: float = 0.0,
        high: float | None = None,
        win_length: int | None = None,
    ) -> None:
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        self.win_length = win_length or n_fft
        self.scale = (n_fft // 2 + 1, low, high or sample_rate / 2, bands, sample_rate)
        self.register_buffer("window", torch.empty(self.win_length), persistent=False)
        self.register_buffer("filters", torch.empty(n_fft // 2 + 1, bands), persistent=False)
        self.reset_buffers()

    window: Tensor
    filters: Tensor

    def reset_buffers(self) -> None:
        """Fill in window and filters; needed after the module was built on the meta device."""
        device = "cpu" if self.window.device.type == "meta" else self.window.device
        self.window = torch.hann_window(self.win_length, dtype=torch.float32, device=device)
        with torch.device("cpu"):
            filters = torchaudio.functional.melscale_fbanks(*self.scale, norm="slaney", mel_scale="slaney")
        self.filters = filters.to(device)

    def forward(self, waveform: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch bands frames"]:
        """``frames = samples // hop_length``; more samples than ``(n_fft - hop_length) / 2`` are needed."""
        margin = (self.n_fft - self.hop_length) // 2
        padded = F.pad(waveform[:, None], (margin, margin), mode="reflect")[:, 0]
        spectrum = torch.stft(
            padded, self.n_fft, self.hop_length, self.win_length, self.window, center=False, return_complex=True
        )
        mel = spectrum.abs().transpose(1, 2) @ self.filters
        return mel.clamp(min=self.FLOOR).log().transpose(1, 2)


class LogMelVectors(Float32Module):
    """Log-mel frames with zero mean and unit variance, by stored statistics, in the place of a network's vectors."""

    def __init__(self, sizes: LogMelSizes, sample_rate: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.logmel = LogMel(sample_rate, sizes.n_fft, sizes.hop_length, sizes.bands)
        self.register_buffer("mean", torch.zeros(sizes.bands))
        self.register_buffer("std", torch.ones(sizes.bands))

    mean: Tensor
    std: Tensor

    #: Samples that the last vector sees beyond its hop.
    tail = 0

    def normalise(self, waveform: Float[Tensor, " samples"]) -> Float[Tensor, " samples"]:
        """The whole recording as `forward` wants it: as it is."""
        return waveform

    def forward(
        self, waveforms: Float[Tensor, "batch samples"], frames: Sequence[int] | None = None
    ) -> Float[Tensor, "batch frames width"]:
        """Vectors of each item; ``frames`` of it count, and the signal is reflected where those end."""
        hop = self.sizes.hop_length
        counts = frames or [waveforms.shape[1] // hop] * len(waveforms)
        vectors = [self._one(waveform[: count * hop], count) for waveform, count in zip(waveforms, counts, strict=True)]
        return nn.utils.rnn.pad_sequence(vectors, batch_first=True)

    def _one(self, waveform: Float[Tensor, " samples"], frames: int) -> Float[Tensor, "frames width"]:
        # Too short to be reflected: a second hop of silence.
        shortest = (self.sizes.n_fft - self.sizes.hop_length) // 2 + 1
        padded = F.pad(waveform, (0, max(0, shortest - len(waveform))))
        return (self.logmel(padded[None])[0, :, :frames].T - self.mean) / self.std

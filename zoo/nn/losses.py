"""Training losses for waveforms: spectral distances and the adversarial terms of WavTokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torchaudio
from jaxtyping import Float
from torch import Tensor, nn


class LogMel(nn.Module):
    """Logarithm of the mel magnitude spectrogram, clipped below at ``floor``.

    Magnitude (power 1), HTK mel scale without area normalisation, Hann window, centred frames with reflection: with the
    defaults exactly what WavTokenizer is trained and validated with (``n_fft`` 1024, hop 256, 100 bands, 0 to 12 kHz).
    """

    def __init__(
        self, sample_rate: int = 24_000, n_fft: int = 1024, hop_length: int = 256, bands: int = 100, floor: float = 1e-7
    ) -> None:
        super().__init__()
        self.floor = floor
        self.mel = torchaudio.transforms.MelSpectrogram(
            sample_rate, n_fft, hop_length=hop_length, n_mels=bands, power=1.0, center=True, pad_mode="reflect"
        )

    def forward(self, waveform: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch bands frames"]:
        return self.mel(waveform).clamp(min=self.floor).log()


class MelLoss(nn.Module):
    """Mean absolute difference of log-mel spectrograms, averaged over resolutions.

    Args:
        resolutions: ``(n_fft, hop_length, bands)`` of each; the default is upstream's single one.
        floor: magnitude below which nothing counts; upstream's is far below hearing, so that digital silence weighs heavily.
    """

    def __init__(
        self,
        sample_rate: int = 24_000,
        resolutions: Sequence[tuple[int, int, int]] = ((1024, 256, 100),),
        floor: float = 1e-7,
    ) -> None:
        super().__init__()
        self.spectrograms = nn.ModuleList([LogMel(sample_rate, *resolution, floor) for resolution in resolutions])

    def forward(self, target: Float[Tensor, "batch samples"], estimate: Float[Tensor, "batch samples"]) -> Float[Tensor, ""]:
        differences = [F.l1_loss(spectrogram(estimate), spectrogram(target)) for spectrogram in self.spectrograms]
        return torch.stack(differences).mean()


class STFTLoss(nn.Module):
    """Spectral convergence and log-magnitude distance, averaged over resolutions (Parallel WaveGAN, arXiv 1910.11480).

    Magnitudes are smoothed at ``floor``.
    """

    def __init__(
        self, resolutions: Sequence[tuple[int, int]] = ((512, 128), (1024, 256), (2048, 512)), floor: float = 1e-4
    ) -> None:
        super().__init__()
        self.floor = floor
        self.resolutions = tuple(resolutions)
        for n_fft, _ in self.resolutions:
            self.register_buffer(f"window_{n_fft}", torch.hann_window(n_fft), persistent=False)

    def forward(self, target: Float[Tensor, "batch samples"], estimate: Float[Tensor, "batch samples"]) -> Float[Tensor, ""]:
        distances = []
        for n_fft, hop in self.resolutions:
            wanted, got = self._magnitude(target, n_fft, hop), self._magnitude(estimate, n_fft, hop)
            convergence = (wanted - got).norm(dim=(1, 2)) / wanted.norm(dim=(1, 2)).clamp(min=1e-3)
            distances.append(convergence.mean() + F.l1_loss(got.log(), wanted.log()))
        return torch.stack(distances).mean()

    def _magnitude(self, waveform: Float[Tensor, "batch samples"], n_fft: int, hop: int) -> Float[Tensor, "batch bins frames"]:
        spectrum = torch.stft(waveform, n_fft, hop, window=getattr(self, f"window_{n_fft}"), return_complex=True)
        return (spectrum.real.square() + spectrum.imag.square() + self.floor**2).sqrt()


def hinge_discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Float[Tensor, ""]:
    """``mean(relu(1 - real)) + mean(relu(1 + fake))``, summed over sub-discriminators (paper equation 2)."""
    return torch.stack([F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake, strict=True)]).sum()


def hinge_generator_loss(fake: Sequence[Tensor]) -> Float[Tensor, ""]:
    """``mean(relu(1 - fake))``, summed over sub-discriminators."""
    return torch.stack([F.relu(1 - score).mean() for score in fake]).sum()


def feature_matching_loss(real: Sequence[Sequence[Tensor]], fake: Sequence[Sequence[Tensor]]) -> Float[Tensor, ""]:
    """Mean absolute difference of feature maps, summed over maps and sub-discriminators; real maps carry no gradient."""
    pairs = [(r, f) for maps_r, maps_f in zip(real, fake, strict=True) for r, f in zip(maps_r, maps_f, strict=True)]
    return torch.stack([(r.detach() - f).abs().mean() for r, f in pairs]).sum()


def least_squares_discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Float[Tensor, ""]:
    """``mean((1 - real)^2) + mean(fake^2)``, summed over sub-discriminators (LSGAN, arXiv 1611.04076)."""
    return torch.stack([(1 - r).square().mean() + f.square().mean() for r, f in zip(real, fake, strict=True)]).sum()


def least_squares_generator_loss(fake: Sequence[Tensor]) -> Float[Tensor, ""]:
    """``mean((1 - fake)^2)``, summed over sub-discriminators."""
    return torch.stack([(1 - score).square().mean() for score in fake]).sum()

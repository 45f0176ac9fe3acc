"""Discriminators of waveforms, as WavTokenizer is trained with: periods, spectrogram resolutions, and DAC's own set.

All take mono audio ``[batch, samples]`` and return, for each sub-discriminator, its feature maps and its score map; the
losses that go with them are in `zoo.nn.losses`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

PERIODS = (2, 3, 5, 7, 11)
SLOPE = 0.1


@dataclass(frozen=True)
class Judgement:
    """Judgement of a set of discriminators about a batch.

    Attributes:
        scores: one score map per sub-discriminator; the larger, the more real.
        features: per sub-discriminator the maps that feature matching compares.
    """

    scores: list[Tensor]
    features: list[list[Tensor]]


def _conv(inputs: int, outputs: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1)) -> nn.Conv2d:
    return weight_norm(nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel[0] // 2, kernel[1] // 2)))


class ConditionedScore(nn.Module):
    """The last convolution, plus a projection of its input on the vector of a condition (arXiv 1802.05637)."""

    def __init__(self, channels: int, kernel: tuple[int, int], conditions: int) -> None:
        super().__init__()
        self.conv = _conv(channels, 1, kernel)
        self.condition = nn.Embedding(conditions, channels) if conditions else None
        if self.condition is not None:
            nn.init.zeros_(self.condition.weight)

    def forward(
        self, x: Float[Tensor, "batch channels rows columns"], condition: int | None
    ) -> Float[Tensor, "batch 1 rows columns"]:
        score = self.conv(x)
        if self.condition is None:
            return score
        if condition is None:
            raise ValueError("this discriminator is conditioned: pass the bandwidth id")
        return score + torch.einsum("bcij,c->bij", x, self.condition.weight[condition])[:, None]


class PeriodDiscriminator(nn.Module):
    """A waveform folded into rows of ``period`` samples, convolved along the columns (HiFi-GAN, arXiv 2010.05646).

    Args:
        period: samples per row.
        channels: width of each convolution; all but the last have stride 3.
        conditions: rows of the conditional term; 0 for none.
        pad_always: reflect a whole period at the end even where the length is a multiple of it, as DAC does.
    """

    def __init__(
        self,
        period: int,
        channels: Sequence[int] = (32, 128, 512, 1024, 1024),
        conditions: int = 0,
        pad_always: bool = False,
    ) -> None:
        super().__init__()
        self.period, self.pad_always = period, pad_always
        strides = [3] * (len(channels) - 1) + [1]
        self.convs = nn.ModuleList(
            _conv(inputs, outputs, (5, 1), (stride, 1))
            for (inputs, outputs), stride in zip(pairwise((1, *channels)), strides, strict=True)
        )
        self.score = ConditionedScore(channels[-1], (3, 1), conditions)

    def forward(self, waveform: Float[Tensor, "batch samples"], condition: int | None = None) -> list[Tensor]:
        """Every feature map, ``[batch, channels, rows, period]``, the score map last."""
        missing = self.period - waveform.shape[1] % self.period
        if missing < self.period or self.pad_always:
            waveform = F.pad(waveform[:, None], (0, missing), mode="reflect")[:, 0]
        x = waveform.reshape(len(waveform), 1, -1, self.period)
        maps = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), SLOPE)
            maps.append(x)
        return [*maps, self.score(x, condition)]


class ResolutionDiscriminator(nn.Module):
    """Convolutions over a magnitude spectrogram with a rectangular window (UnivNet, arXiv 2106.07889)."""

    LAYERS = (((7, 5), (2, 2)), ((5, 3), (2, 1)), ((5, 3), (2, 2)), ((3, 3), (2, 1)), ((3, 3), (2, 2)))

    def __init__(self, n_fft: int, hop_length: int, channels: int = 64, conditions: int = 0) -> None:
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        self.convs = nn.ModuleList(
            _conv(channels if index else 1, channels, kernel, stride) for index, (kernel, stride) in enumerate(self.LAYERS)
        )
        self.score = ConditionedScore(channels, (3, 3), conditions)

    def forward(self, waveform: Float[Tensor, "batch samples"], condition: int | None = None) -> list[Tensor]:
        """Every feature map, ``[batch, channels, bins, frames]``, the score map last."""
        x = _spectrum(waveform, self.n_fft, self.hop_length).abs()[:, None]
        maps = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), SLOPE)
            maps.append(x)
        return [*maps, self.score(x, condition)]


class BandDiscriminator(nn.Module):
    """A complex spectrogram cut into bands, each with convolutions of its own, joined for the score (DAC, arXiv 2306.06546)."""

    EDGES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
    LAYERS = (((3, 9), (1, 1)), ((3, 9), (1, 2)), ((3, 9), (1, 2)), ((3, 9), (1, 2)), ((3, 3), (1, 1)))

    def __init__(self, n_fft: int, channels: int = 32) -> None:
        super().__init__()
        self.n_fft = n_fft
        edges = [int(edge * (n_fft // 2 + 1)) for edge in self.EDGES]
        self.bands = list(pairwise(edges))
        self.band_convs = nn.ModuleList(
            nn.ModuleList(
                _conv(channels if index else 2, channels, kernel, stride) for index, (kernel, stride) in enumerate(self.LAYERS)
            )
            for _ in self.bands
        )
        self.score = ConditionedScore(channels, (3, 3), conditions=0)

    def forward(self, waveform: Float[Tensor, "batch samples"]) -> list[Tensor]:
        """Every feature map, ``[batch, channels, frames, bins]``, band by band, the score map last."""
        spectrum = torch.view_as_real(_spectrum(waveform, self.n_fft, self.n_fft // 4)).permute(0, 3, 2, 1)
        maps, ends = [], []
        for (low, high), convs in zip(self.bands, self.band_convs, strict=True):
            x = spectrum[..., low:high]
            for conv in convs.children():
                x = F.leaky_relu(conv(x), SLOPE)
                maps.append(x)
            ends.append(x)
        return [*maps, self.score(torch.cat(ends, dim=3), None)]


class MultiPeriodDiscriminator(nn.Module):
    """One `PeriodDiscriminator` per period, conditioned on the bandwidth id; feature matching leaves out the first map."""

    def __init__(
        self, channels: Sequence[int] = (32, 128, 512, 1024, 1024), periods: Sequence[int] = PERIODS, conditions: int = 4
    ) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(PeriodDiscriminator(period, channels, conditions) for period in periods)

    def forward(self, waveform: Float[Tensor, "batch samples"], bandwidth_id: int | None = 0) -> Judgement:
        maps = [discriminator(waveform, bandwidth_id) for discriminator in self.discriminators]
        return Judgement([m[-1].flatten(1) for m in maps], [m[1:] for m in maps])


class MultiResolutionDiscriminator(nn.Module):
    """One `ResolutionDiscriminator` per ``(n_fft, hop)``, conditioned on the bandwidth id."""

    def __init__(
        self,
        channels: int = 64,
        resolutions: Sequence[tuple[int, int]] = ((1024, 256), (2048, 512), (512, 128)),
        conditions: int = 4,
    ) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(
            ResolutionDiscriminator(n_fft, hop, channels, conditions) for n_fft, hop in resolutions
        )

    def forward(self, waveform: Float[Tensor, "batch samples"], bandwidth_id: int | None = 0) -> Judgement:
        maps = [discriminator(waveform, bandwidth_id) for discriminator in self.discriminators]
        return Judgement([m[-1].flatten(1) for m in maps], maps)


class DACDiscriminator(nn.Module):
    """DAC's set: five periods and three multi-band spectrograms, after removing the mean and scaling the peak to 0.8.

    Trained with the least-squares losses. Feature matching leaves out the score maps. (Upstream's instance was never
    trained, as the specification's section 5 shows; a trained one is what its paper describes.)
    """

    def __init__(
        self,
        period_channels: Sequence[int] = (32, 128, 512, 1024, 1024),
        band_channels: int = 32,
        periods: Sequence[int] = PERIODS,
        n_ffts: Sequence[int] = (2048, 1024, 512),
    ) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(
            [PeriodDiscriminator(period, period_channels, pad_always=True) for period in periods]
            + [BandDiscriminator(n_fft, band_channels) for n_fft in n_ffts]
        )

    def forward(self, waveform: Float[Tensor, "batch samples"]) -> Judgement:
        centred = waveform - waveform.mean(dim=1, keepdim=True)
        scaled = 0.8 * centred / (centred.abs().amax(dim=1, keepdim=True) + 1e-9)
        maps = [discriminator(scaled) for discriminator in self.discriminators]
        return Judgement([m[-1] for m in maps], [m[:-1] for m in maps])


def _spectrum(waveform: Float[Tensor, "batch samples"], n_fft: int, hop_length: int) -> Tensor:
    """Complex spectrogram ``[batch, bins, frames]``, rectangular window, centred frames with reflection."""
    window = torch.ones(n_fft, device=waveform.device, dtype=waveform.dtype)
    return torch.stft(waveform, n_fft, hop_length, window=window, return_complex=True)

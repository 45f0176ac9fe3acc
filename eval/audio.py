"""Audio metrics: how far a reconstruction is from its original, and a baseline to hold against it.

Every metric takes ``reference`` and ``estimate`` as float32 ``[samples]`` of equal length and their sample rate, and returns
one number. Which packages a metric needs is declared; where one is missing the metric is skipped and the report says so.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
import torchaudio
from jaxtyping import Bool, Float
from torch import Tensor

from zoo.media import AUDIO_EXTENSIONS, read_audio, resample
from zoo.nn.losses import LogMel, STFTLoss

EXTENSIONS = AUDIO_EXTENSIONS
MetricFunction = Callable[[Tensor, Tensor, int], float | None]


@dataclass(frozen=True)
class Metric:
    """One figure per item.

    Attributes:
        title, unit: for tables and plots.
        higher_is_better: which way is up.
        function: the measurement; ``None`` where it is not defined for the item.
        packages: what has to be importable.
        extra: the extra of this package that installs them.
        about: definition and source in one sentence.
    """

    title: str
    unit: str
    higher_is_better: bool
    function: MetricFunction
    about: str
    packages: tuple[str, ...] = ()
    extra: str = "eval"

    def why_skipped(self) -> str | None:
        """What is missing, and how to get it; ``None`` if the metric can run."""
        missing = [package for package in self.packages if find_spec(package) is None]
        return f'{", ".join(missing)} is not installed: pip install "tokenizer-zoo[{self.extra}]"' if missing else None


def si_sdr(reference: Float[Tensor, " samples"], estimate: Float[Tensor, " samples"], rate: int) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (arXiv 1811.02508), capped at 100."""
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

    return min(100.0, scale_invariant_signal_distortion_ratio(estimate, reference, zero_mean=True).item())


@lru_cache(maxsize=4)
def _log_mel(rate: int) -> LogMel:
    return LogMel(rate)


def log_mel_l1(reference: Float[Tensor, " samples"], estimate: Float[Tensor, " samples"], rate: int) -> float:
    """Mean absolute difference of log-mel magnitudes in nepers: 100 HTK bands, 1024-point Hann frames every 256 samples.

    WavTokenizer's validation metric; magnitudes are clipped at 1e-5 here, so that digital silence does not decide it.
    """
    reference, estimate = _at_least(reference, 1024), _at_least(estimate, 1024)
    floor = math.log(1e-5)
    spectrograms = [_log_mel(rate)(audio[None]).clamp(min=floor) for audio in (reference, estimate)]
    return (spectrograms[0] - spectrograms[1]).abs().mean().item()


@lru_cache(maxsize=1)
def _stft_loss() -> STFTLoss:
    return STFTLoss()


def stft_distance(reference: Float[Tensor, " samples"], estimate: Float[Tensor, " samples"], rate: int) -> float:
    """Spectral convergence plus log-magnitude distance, mean over 512, 1024 and 2048 points (arXiv 1910.11480)."""
    return _stft_loss()(_at_least(reference, 2048)[None], _at_least(estimate, 2048)[None]).item()


def _at_least(audio: Float[Tensor, " samples"], length: int) -> Float[Tensor, " padded"]:
    """Zeros after audio that is shorter than one analysis frame."""
    return torch.nn.functional.pad(audio, (0, max(0, length - len(audio))))


def stoi(reference: Float[Tensor, " samples"], estimate: Float[Tensor, " samples"], rate: int) -> float | None:
    """Short-time objective intelligibility, 0 to 1 (Taal et al. 2011); undefined without 0.4 s of speech."""
    import pystoi

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = float(pystoi.stoi(reference.numpy(), estimate.numpy(), rate))
    too_short = any("Not enough STFT frames" in str(warning.message) for warning in caught)
    return None if too_short else value


def pesq(reference: Float[Tensor, " samples"], estimate: Float[Tensor, " samples"], rate: int) -> float | None:
    """Perceptual evaluation of speech quality, wide band, at 16 kHz, 1 to 4.64 (ITU-T P.862.2); undefined without speech."""
    from pesq import NoUtterancesError, PesqError
    from pesq import pesq as measure

    wide = [resample(audio[None], rate, 16_000)[0].numpy() for audio in (reference, estimate)]
    try:
        return float(measure(16_000, *wide, "wb"))
    except (NoUtterancesError, PesqError):
        return None


def pitch(audio: Float[Tensor, " samples"], rate: int) -> tuple[Float[Tensor, " frames"], Bool[Tensor, " frames"]]:
    """Fundamental frequency in Hz and voicing every 10 ms, by YIN (de Cheveigne and Kawahara 2002, steps 1 to 5).

    Frames of 40 ms at 16 kHz, 50 to 550 Hz. The period is the first dip of the cumulative-mean-normalised difference below
    0.15, or its lowest point; a frame is voiced if that point is below 0.25 and the frame within 50 dB of the loudest one.
    """
    wide = _at_least(resample(audio[None], rate, 16_000)[0], 2_048)
    window, hop, shortest, longest = 640, 160, 16_000 // 550, 16_000 // 50
    frames = wide.unfold(0, window + longest, hop).double()
    head = frames[:, :window]
    size = 2 * (window + longest)
    product = torch.fft.irfft(torch.fft.rfft(head, size).conj() * torch.fft.rfft(frames, size), size)[:, : longest + 1]
    energy = frames.square().cumsum(1)
    shifted = torch.cat([energy[:, window - 1 : window], energy[:, window:] - energy[:, :longest]], dim=1)
    difference = (shifted[:, :1] + shifted - 2 * product).clamp(min=0)
    mean = difference[:, 1:].cumsum(1) / torch.arange(1, longest + 1)
    normalised = torch.cat([torch.ones(len(frames), 1), difference[:, 1:] / mean.clamp(min=1e-12)], dim=1)

    inner = normalised[:, shortest : longest - 1]
    is_dip = (
        (inner <= normalised[:, shortest - 1 : longest - 2]) & (inner < normalised[:, shortest + 1 : longest]) & (inner < 0.15)
    )
    first_dip = is_dip.int().argmax(1)
    lag = torch.where(is_dip.any(1), first_dip, inner.argmin(1)) + shortest
    before, at, after = (normalised.gather(1, (lag + offset)[:, None])[:, 0] for offset in (-1, 0, 1))
    curvature = (before - 2 * at + after).clamp(min=1e-9)
    period = lag + ((before - after) / (2 * curvature)).clamp(-0.5, 0.5)
    loudness = head.square().mean(1)
    voiced = (at < 0.25) & (loudness > loudness.max() * 1e-5) & (loudness > 1e-10)
    return (16_000 / period).float(), voiced


def f0_rmse(reference: Float[Tensor, " samples"], estimate: Float[Tensor, " samples"], rate: int) -> float | None:
    """Root-mean-square pitch error in cents over frames voiced in both; undefined where there are none."""
    frequency, voiced = pitch(reference, rate)
    other_frequency, other_voiced = pitch(estimate, rate)
    both = voiced & other_voiced
    if not both.any():
        return None
    return (1200 * torch.log2(other_frequency[both] / frequency[both])).square().mean().sqrt().item()


def voicing_f1(reference: Float[Tensor, " samples"], estimate: Float[Tensor, " samples"], rate: int) -> float | None:
    """F1 score of the voiced frames; undefined where the original has none."""
    voiced, other_voiced = pitch(reference, rate)[1], pitch(estimate, rate)[1]
    if not voiced.any():
        return None
    return 2 * float((voiced & other_voiced).sum()) / float(voiced.sum() + other_voiced.sum())


METRICS: Mapping[str, Metric] = {
    "stoi": Metric("STOI", "", True, stoi, "intelligibility, 0 to 1 (Taal et al. 2011)", ("pystoi",)),
    "log_mel_l1": Metric("log-mel L1", "Np", False, log_mel_l1, "100 HTK mel bands, n_fft 1024, hop 256, magnitudes from 1e-5"),
    "stft_distance": Metric(
        "STFT distance", "", False, stft_distance, "spectral convergence + log magnitude at 512, 1024, 2048 (arXiv 1910.11480)"
    ),
    "si_sdr": Metric("SI-SDR", "dB", True, si_sdr, "scale-invariant SDR (arXiv 1811.02508); phase counts", ("torchmetrics",)),
    "pesq": Metric("PESQ (wide band)", "", True, pesq, "ITU-T P.862.2 at 16 kHz", ("pesq",), "pesq"),
    "f0_rmse": Metric("F0 RMSE", "cents", False, f0_rmse, "YIN, 50 to 550 Hz, frames voiced in both"),
    "voicing_f1": Metric("voicing F1", "", True, voicing_f1, "YIN, voiced frames every 10 ms"),
}

#: Metrics by networks whose weights are elsewhere: they are measured where the user brings the network, and never imitated.
NEEDS_NETWORK: Mapping[str, str] = {
    "utmos": "needs the network of UTMOS (arXiv 2204.02152): pass utmos= a function, or --utmos a TorchScript file",
}


def utmos_from_torchscript(path: str) -> Callable[[Tensor, int], float]:
    """A TorchScript file that maps ``[1, samples]`` at 16 kHz to a score, as a function of audio at any rate."""
    network = torch.jit.load(path, map_location="cpu").eval()

    def score(audio: Tensor, rate: int) -> float:
        with torch.inference_mode():
            return float(network(resample(audio[None], rate, 16_000)).mean())

    return score


def mu_law_baseline(reference: Float[Tensor, " samples"], rate: int, bit_rate: float) -> Float[Tensor, " samples"]:
    """8-bit mu-law at the sample rate that makes the given bit rate, brought back to ``rate``: what the same bits buy without
    a codec."""
    low_rate = max(1, round(bit_rate / 8))
    peak = reference.abs().max().clamp(min=1e-4)
    low = resample(reference[None] / peak, rate, low_rate).clamp(-1, 1)
    coded = torchaudio.functional.mu_law_decoding(torchaudio.functional.mu_law_encoding(low, 256), 256)
    back = resample(coded, low_rate, rate)[0] * peak
    return _at_least(back, len(reference))[: len(reference)]


def read(path: str, sample_rate: int) -> Float[Tensor, "1 samples"]:
    """An item of the data set, as the tokenizer hears it."""
    return read_audio(path, sample_rate=sample_rate, mono=True).waveform


def encoded_clip(audio: Float[Tensor, "1 samples"], rate: int) -> str:
    """A data URI of the audio as FLAC."""
    import base64

    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, audio[0].clamp(-1, 1).numpy(), rate, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(buffer.getvalue()).decode()

"""Audio metrics: how far a reconstruction is from its original, and a baseline to hold against it.

Every metric takes ``reference`` and ``estimate`` as float32 ``[samples]`` of equal length and their sample rate, and returns
one number. Which packages a metric needs is declared; where one is missing the metric is skipped and the report says so.
"""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torchaudio
from jaxtyping import Bool, Float
from torch import Tensor

from zoo.eval.modality.base import Metric, MetricFunction, Row, Variant
from zoo.eval.modality.networks import SPEAKER, UTMOS
from zoo.eval.report import plots
from zoo.media import read_audio, resample
from zoo.media.kinds import audio as kind
from zoo.nn.losses import LogMel, STFTLoss
from zoo.spec import Spec

EXTENSIONS = kind.EXTENSIONS
BASELINE = "8-bit µ-law of the same bit rate"
NOTES = (
    "Compared at the tokenizer's sample rate, in mono. The baseline is 8-bit µ-law at the sample rate that the tokenizer's bit "
    "rate allows. Speech whose tokens hold no voice is decoded with the first seconds of the original as a prompt, for which "
    "no bits are counted."
)
TEMPLATE = "audio.html.j2"
# Half of the metrics are functions of arrays.
ON_DEVICE = False

CLIP_SECONDS = 8.0


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
    "utmos": Metric("UTMOS", "", True, None, "naturalness, 1 to 5, without a reference (arXiv 2204.02152)", network=UTMOS),
    "speaker": Metric(
        "speaker similarity", "", True, None, "cosine of speaker embeddings (WavLM, x-vectors), -1 to 1", network=SPEAKER
    ),
}


def mu_law_baseline(reference: Float[Tensor, " samples"], rate: int, bit_rate: float) -> Float[Tensor, " samples"]:
    """8-bit mu-law at the sample rate that makes the given bit rate, brought back to ``rate``: what the same bits buy without
    a codec."""
    low_rate = max(1, round(bit_rate / 8))
    peak = reference.abs().max().clamp(min=1e-4)
    low = resample(reference[None] / peak, rate, low_rate).clamp(-1, 1)
    coded = torchaudio.functional.mu_law_decoding(torchaudio.functional.mu_law_encoding(low, 256), 256)
    back = resample(coded, low_rate, rate)[0] * peak
    return _at_least(back, len(reference))[: len(reference)]


# ---- what the run asks: see `zoo.eval.modality.base`


def read(path: str, spec: Spec, options: Mapping[str, Any]) -> Float[Tensor, "1 samples"]:
    """An item of the data set, as the tokenizer hears it."""
    return read_audio(path, sample_rate=spec.sample_rate, mono=True).waveform


def comparable(decoded: Float[Tensor, "1 _"], reference: Float[Tensor, "1 samples"]) -> Float[Tensor, "1 samples"]:
    """The decoded samples, as many as there are in the original."""
    return decoded[:, : reference.shape[1]]


def properties(reference: Float[Tensor, "1 samples"], spec: Spec) -> dict[str, Any]:
    """The duration."""
    return {"seconds": reference.shape[1] / _rate(spec)}


def baseline(reference: Float[Tensor, "1 samples"], spec: Spec, bits: int) -> Float[Tensor, "1 samples"]:
    """8-bit mu-law in the same number of bits."""
    seconds = reference.shape[1] / _rate(spec)
    return mu_law_baseline(reference[0], _rate(spec), bits / seconds)[None]


def measure(function: MetricFunction, spec: Spec, *signals: Float[Tensor, "1 samples"]) -> Any:
    """The function of an original and its reconstruction, ``[samples]`` each, and their rate."""
    return function(*(signal[0] for signal in signals), _rate(spec))


def tokens_per(rows: Sequence[Row], spec: Spec) -> dict[str, float]:
    """Tokens per second, counted where the tokenizer has no rate of its own."""
    if spec.token_rate is not None:
        return {"second": spec.token_rate}
    # Pairs of units are joined to one token, as many as the speech allows.
    seconds = sum(row["seconds"] for row in rows)
    return {"second": sum(row["tokens"] for row in rows) / seconds} if seconds else {}


def totals(rows: Sequence[Row]) -> dict[str, Any]:
    """Seconds of audio, and seconds of work per second of audio."""
    seconds = sum(row["seconds"] for row in rows)
    factors = {
        f"{direction}_real_time_factor": sum(row[f"{direction}_seconds"] for row in rows) / seconds if seconds else None
        for direction in ("encode", "decode")
    }
    return {"seconds": seconds, "speed": factors}


def heading(summary: Mapping[str, Any]) -> str:
    """Seconds and bit rate."""
    return f"{summary['seconds']:.1f} seconds of audio, {summary['tokens'].get('bits_per_second', 0):.0f} bit/s"


def tiles(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rates and speed."""
    spec, tokens, speed = summary["tokenizer"], summary["tokens"], summary["speed"]
    rate = tokens.get("bits_per_second", 0) / spec["bits_per_token"]
    found = [
        (f"{rate:.4g}", "tokens per second"),
        (f"{rate * spec['bits_per_token']:.0f}", f"bit/s, {spec['bits_per_token']} bits per token"),
    ]
    for direction, name in (("encode", "encoding"), ("decode", "decoding")):
        if factor := speed[f"{direction}_real_time_factor"]:
            found.append((f"{1 / factor:.0f}×", f"real time, {name}"))
    return found


def shown(reference: Float[Tensor, "1 samples"], variants: Sequence[Variant], spec: Spec) -> dict[str, Any]:
    """The first seconds of an item to hear and see."""
    rate = _rate(spec)
    clip = int(CLIP_SECONDS * rate)
    original, decoded = reference[:, :clip], variants[-1].decoded[:, :clip]
    return {
        "caption": f"{reference.shape[1] / rate:.1f} s, {variants[-1].tokens} tokens"
        + (f"; the first {CLIP_SECONDS:.0f} s are shown" if reference.shape[1] > clip else ""),
        "figures": variants[-1].figures,
        "original": _as_flac(original, rate),
        "decoded": _as_flac(decoded, rate),
        "picture": _spectrograms(original, decoded, rate),
    }


def _rate(spec: Spec) -> int:
    assert spec.sample_rate is not None
    return spec.sample_rate


def _as_flac(audio: Float[Tensor, "1 samples"], rate: int) -> str:
    """A data URI of the audio."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, audio[0].clamp(-1, 1).numpy(), rate, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(buffer.getvalue()).decode()


def _spectrograms(original: Float[Tensor, "1 samples"], decoded: Float[Tensor, "1 samples"], rate: int) -> str:
    """Log-mel spectrograms one above the other on one colour scale, 70 dB deep."""
    mel = LogMel(rate, hop_length=max(64, original.shape[1] // 900))
    padded = [torch.nn.functional.pad(audio, (0, max(0, 1024 - audio.shape[1]))) for audio in (original, decoded)]
    pictures = [mel(audio)[0].numpy() * (20 / math.log(10)) for audio in padded]
    top = float(pictures[0].max())
    seconds = original.shape[1] / rate
    figure, axes = plots.canvas(7.2, 3.4, rows=2, sharex=True, sharey=True)
    for axis, picture, title in zip(axes, pictures, ("original", "reconstruction"), strict=True):
        axis.imshow(
            picture, origin="lower", aspect="auto", cmap="magma", vmin=top - 70, vmax=top, extent=(0, seconds, 0, len(picture))
        )
        axis.set_ylabel(f"{title}\nmel band")
    axes[1].set_xlabel("seconds")
    return plots.as_uri(figure, "png")

"""Video metrics: how far a reconstruction is from its original, frame by frame and from frame to frame.

Metrics take ``reference`` and ``estimate`` as float32 ``[3, frames, height, width]`` in [0, 1] and return one number, or
``None`` where it is not defined. Clips are compared at the size and the rate at which the tokenizer saw them.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.errors import WeightsError
from zoo.eval.modality import image
from zoo.eval.modality.base import Metric, MetricFunction, Network, Row, Variant
from zoo.eval.modality.networks import LPIPS, frechet_distance
from zoo.eval.modality.thumbnail import coded, thumbnail
from zoo.media import VIDEO_EXTENSIONS, pixels_of, prepare_video, write_video
from zoo.precision import exact_float32
from zoo.spec import Spec

EXTENSIONS = VIDEO_EXTENSIONS
BASELINE = "thumbnails of the same bits"
NOTES = (
    "Compared at the size and the frame rate that the tokenizer saw; reconstructions are clipped to the range of an image. The "
    "baseline shows thumbnails whose samples take at most as many bits in all, blown up by bicubic interpolation: one for each "
    "frame, or for every second or fourth one that then stands still, whichever comes closest. FVD of few clips means nothing."
)
TEMPLATE = "video.html.j2"
ON_DEVICE = False
#: Ids alone do not say how many frames and rows they are of.
NEEDS_META = True

Clip = Float[Tensor, "3 frames height width"]

# Frames of the strip, and the most bytes that a film in the report may take.
_STRIP_FRAMES = 8
_FILM_BYTES = 2_000_000
_HOLDS = (1, 2, 4)


def psnr(reference: Clip, estimate: Clip) -> float:
    """Peak signal-to-noise ratio in dB of the clip's mean squared error, capped at 100."""
    return _decibels(reference, estimate)


def frame_psnr(reference: Clip, estimate: Clip) -> float:
    """Mean of the frames' ratios in dB, each capped at 100: a few good frames weigh more than in `psnr`."""
    ratios = [_decibels(*frames) for frames in zip(reference.unbind(1), estimate.unbind(1), strict=True)]
    return sum(ratios) / len(ratios)


def ssim(reference: Clip, estimate: Clip) -> float | None:
    """Structural similarity, mean over frames and RGB (Wang et al. 2004)."""
    return _mean_of_frames(image.ssim, reference, estimate)


def temporal_psnr(reference: Clip, estimate: Clip) -> float | None:
    """Peak signal-to-noise ratio in dB of the differences between neighbouring frames; undefined for a single frame."""
    return None if reference.shape[1] < 2 else _decibels(reference.diff(dim=1), estimate.diff(dim=1))


def _decibels(reference: Tensor, estimate: Tensor) -> float:
    error = float((reference - estimate).double().square().mean())
    return 100.0 if error <= 1e-10 else float(-10 * torch.log10(torch.tensor(error, dtype=torch.float64)))


def _mean_of_frames(function: MetricFunction, *clips: Clip) -> float | None:
    found = [function(*frames) for frames in zip(*(clip.unbind(1) for clip in clips), strict=True)]
    return None if None in found else float(sum(map(float, found)) / len(found))


def _no_network(path: Path | None, device: torch.device, fetch: bool) -> MetricFunction:
    if path is not None:
        raise WeightsError("FVD takes its network as a function of clips, from Python: networks={'fvd': features}")
    raise OSError("there are no weights of I3D here")


METRICS: Mapping[str, Metric] = {
    "psnr": Metric("PSNR", "dB", True, psnr, "of each clip's mean squared error, mean of the clips"),
    "frame_psnr": Metric("frame PSNR", "dB", True, frame_psnr, "mean of the frames' ratios, mean of the clips"),
    "ssim": Metric("SSIM", "", True, ssim, "mean of the frames; window of 11 pixels (Wang et al. 2004)", ("torchmetrics",)),
    "temporal_psnr": Metric("temporal PSNR", "dB", True, temporal_psnr, "of the differences between neighbouring frames"),
    "lpips": Metric(
        *("LPIPS", "", False, None, "mean of the frames, v0.1 (arXiv 1801.03924)", ("lpips",), "networks"), network=LPIPS
    ),
    "fvd": Metric(
        *("FVD", "", False, None, "Fréchet distance of features of clips to the originals (arXiv 1812.01717)"),
        network=Network(_no_network, "a function of clips, from Python"),
        distance=frechet_distance,
    ),
}
_OF_CLIPS = (psnr, frame_psnr, ssim, temporal_psnr)


# ---- what the run asks: see `zoo.eval.modality.base`. A reference is a clip in [-1, 1] with its frames per second.


def read(path: str, spec: Spec, options: Mapping[str, Any]) -> tuple[Clip, Fraction]:
    """A clip of the data set, as the tokenizer sees it."""
    known = ("fit", "size", "fps", "interpolation", "max_frames", "max_pixels")
    clip = prepare_video(path, **{name: options[name] for name in known if name in options})
    return pixels_of(clip.frames).transpose(0, 1).contiguous(), Fraction(clip.meta["fps_num"], clip.meta["fps_den"])


def comparable(decoded: Clip, reference: tuple[Clip, Fraction]) -> Clip:
    """The decoded clip, clipped to [-1, 1]; it has the frames and the size of the original."""
    frames, height, width = reference[0].shape[1:]
    return decoded[:, :frames, :height, :width].clamp(-1, 1)


def properties(reference: tuple[Clip, Fraction], spec: Spec) -> dict[str, Any]:
    """Number of frames, size in pixels and duration in seconds."""
    frames, height, width = reference[0].shape[1:]
    return {"frames": frames, "height": height, "width": width, "seconds": float(frames / reference[1])}


def baseline(reference: tuple[Clip, Fraction], spec: Spec, bits: int) -> Clip:
    """Thumbnails of that many bits in all, in [-1, 1]: of all frames, or of every second or fourth one."""
    clip = (reference[0] + 1) / 2
    candidates = [_held(clip, bits, hold) for hold in _HOLDS if hold == 1 or hold < 2 * clip.shape[1]]
    return min(candidates, key=lambda shown: float((shown - clip).square().mean())) * 2 - 1


def _held(clip: Clip, bits: int, hold: int) -> Clip:
    """Thumbnails of the layout that suits the first frame best, each shown for ``hold`` frames."""
    kept = clip[:, ::hold].unbind(1)
    first = thumbnail(kept[0], bits // len(kept))
    shown = [
        torch.full_like(frame, 0.5) if first.layout is None else coded(frame, first.layout, first.height, first.width)
        for frame in kept
    ]
    return torch.stack(shown, dim=1).repeat_interleave(hold, dim=1)[:, : clip.shape[1]]


def measure(function: MetricFunction, spec: Spec, *signals: Any) -> Any:
    """The function of clips in [0, 1]; a network of images measures frame by frame."""
    clips = [(_pixels(signal) + 1) / 2 for signal in signals]
    with exact_float32(clips[0].device):
        return function(*clips) if function in _OF_CLIPS or len(clips) == 1 else _mean_of_frames(function, *clips)


def _pixels(signal: Any) -> Clip:
    clip: Clip = signal[0] if isinstance(signal, tuple) else signal
    return clip


def tokens_per(rows: Sequence[Row], spec: Spec) -> dict[str, float]:
    """Tokens per second and per pixel."""
    tokens, seconds = sum(row["tokens"] for row in rows), sum(row["seconds"] for row in rows)
    pixels = sum(row["frames"] * row["height"] * row["width"] for row in rows)
    return {"second": tokens / seconds, "pixel": tokens / pixels} if pixels else {}


def totals(rows: Sequence[Row]) -> dict[str, Any]:
    """Frames and seconds of video, and seconds of work per frame."""
    frames = sum(row["frames"] for row in rows)
    speed = {
        f"{direction}_seconds_per_frame": sum(row[f"{direction}_seconds"] for row in rows) / frames if frames else None
        for direction in ("encode", "decode")
    }
    return {"frames": frames, "seconds": sum(row["seconds"] for row in rows), "speed": speed}


def heading(summary: Mapping[str, Any]) -> str:
    """Amount of video and its rate."""
    rate = summary["tokens"].get("bits_per_second")
    text = f"{summary['frames']} frames, {summary['seconds']:.1f} s"
    return f"{text}, {rate / 1000:.3g} kbit/s" if rate else text


def tiles(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rates and speed."""
    tokens = summary["tokens"]
    found = []
    if "bits_per_second" in tokens:
        found.append((f"{tokens['bits_per_second'] / 1000:.3g}", "kbit per second"))
    if "bits_per_pixel" in tokens:
        found.append((f"{tokens['bits_per_pixel']:.3g}", "bits per pixel and frame"))
    for direction in ("encode", "decode"):
        if seconds := summary["speed"][f"{direction}_seconds_per_frame"]:
            found.append((f"{1000 * seconds:.3g} ms", f"to {direction} a frame"))
    return found


def shown(reference: tuple[Clip, Fraction], variants: Sequence[Variant], spec: Spec) -> dict[str, Any]:
    """Original, reconstruction and thumbnails of the same bits, as a strip of frames and as a film side by side."""
    clip, fps = reference
    last = variants[-1]
    rows = [clip, last.decoded, baseline(reference, spec, last.bits)]
    frames, height, width = clip.shape[1:]
    places = torch.linspace(0, frames - 1, min(frames, _STRIP_FRAMES)).round().long()
    strip = torch.cat([torch.cat(row[:, places].unbind(1), dim=2) for row in rows], dim=1)
    return {
        "caption": f"{frames} frames of {width} × {height} pixels, {float(fps):.4g} a second, {last.tokens} tokens",
        "strip": image.as_webp((strip + 1) / 2),
        "film": _film(torch.cat(rows, dim=3), fps),
        "figures": last.figures,
        "baseline_figures": last.baseline_figures,
        "hard_pixels": min(height, width) < 192,
    }


def _film(clip: Clip, fps: Fraction) -> str:
    """A data URI of an MP4 of at most `_FILM_BYTES`, cut at its end where it would take more."""
    with tempfile.TemporaryDirectory() as scratch:
        while True:
            content = write_video(Path(scratch) / "film.mp4", clip, fps).read_bytes()
            if len(content) <= _FILM_BYTES or clip.shape[1] < 2:
                break
            clip = clip[:, : clip.shape[1] // 2]
    return "data:video/mp4;base64," + base64.b64encode(content).decode()

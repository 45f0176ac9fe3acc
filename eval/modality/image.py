"""Image metrics: how far a reconstruction is from its original.

Metrics take ``reference`` and ``estimate`` as float32 ``[3, height, width]`` in [0, 1] and return one number, or ``None`` where
it is not defined for the size. Images are compared at the tokenizer's own size: the reference is what the tokenizer was given,
after it was cropped, padded or stretched, and the reconstruction is clipped to the range of an image first.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from zoo.eval.modality.base import Metric, MetricFunction, Row, Variant
from zoo.eval.modality.networks import CLIP, DINO, INCEPTION, LPIPS, frechet_distance
from zoo.eval.modality.thumbnail import LAYOUTS, thumbnail
from zoo.media import IMAGE_EXTENSIONS, prepare_image
from zoo.precision import exact_float32
from zoo.spec import Spec

EXTENSIONS = IMAGE_EXTENSIONS
BASELINE = "thumbnail of the same bits"
NOTES = (
    "Compared at the tokenizer's own size: the original is the image after it was cropped, padded or stretched to that size, "
    "and reconstructions are clipped to the range of an image. The baseline is a thumbnail whose samples take at most as many "
    f"bits, blown up by bicubic interpolation; of {len(LAYOUTS)} layouts (RGB of 2 to 6 bits, luma with coarser chroma) each "
    "image gets the one of the highest PSNR, and no bits are counted for saying which."
)
TEMPLATE = "image.html.j2"
ON_DEVICE = True

# The window of SSIM, and what still holds it after the four halvings of MS-SSIM.
_SSIM_WINDOW = 11
_MS_SSIM_SMALLEST = _SSIM_WINDOW * 2**4
# Smaller pictures are shown with hard pixels, because the browser's smoothing would flatter them.
_SMOOTH_FROM = 192


def psnr(reference: Float[Tensor, "3 height width"], estimate: Float[Tensor, "3 height width"]) -> float:
    """Peak signal-to-noise ratio in dB over all channels, capped at 100."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return min(100.0, float(peak_signal_noise_ratio(estimate, reference, data_range=1.0)))


def ssim(reference: Float[Tensor, "3 height width"], estimate: Float[Tensor, "3 height width"]) -> float | None:
    """Structural similarity, mean over RGB; Gaussian window of 11 pixels, sigma 1.5 (Wang et al. 2004)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(reference.shape[1:]) < _SSIM_WINDOW:
        return None
    return float(cast(Tensor, structural_similarity_index_measure(estimate[None], reference[None], data_range=1.0)))


def ms_ssim(reference: Float[Tensor, "3 height width"], estimate: Float[Tensor, "3 height width"]) -> float | None:
    """Structural similarity at five scales (Wang et al. 2003); undefined below 176 pixels."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    if min(reference.shape[1:]) < _MS_SSIM_SMALLEST:
        return None
    return float(multiscale_structural_similarity_index_measure(estimate[None], reference[None], data_range=1.0))


METRICS: Mapping[str, Metric] = {
    "psnr": Metric("PSNR", "dB", True, psnr, "peak signal-to-noise ratio over RGB, mean of the images", ("torchmetrics",)),
    "ssim": Metric("SSIM", "", True, ssim, "Gaussian window of 11 pixels, sigma 1.5 (Wang et al. 2004)", ("torchmetrics",)),
    "ms_ssim": Metric("MS-SSIM", "", True, ms_ssim, "five scales, images of 176 pixels or more", ("torchmetrics",)),
    "lpips": Metric(
        "LPIPS", "", False, None, "distance of deep features, v0.1 (arXiv 1801.03924)", ("lpips",), "networks", network=LPIPS
    ),
    "dino": Metric(
        "DINO similarity", "", True, None, "cosine of DINOv2 class tokens", ("transformers",), "networks", network=DINO
    ),
    "clip": Metric(
        "CLIP similarity", "", True, None, "cosine of CLIP image embeddings", ("transformers",), "networks", network=CLIP
    ),
    "rfid": Metric(
        "rFID",
        "",
        False,
        None,
        "Fréchet distance of 2048 Inception features to the originals (arXiv 1706.08500); too high for few images",
        ("torch_fidelity", "torchmetrics"),
        "networks",
        network=INCEPTION,
        distance=frechet_distance,
    ),
}


# ---- what the run asks: see `zoo.eval.modality.base`


def read(path: str, spec: Spec, options: Mapping[str, Any]) -> Float[Tensor, "3 height width"]:
    """An image of the data set in [-1, 1], as the tokenizer sees it."""
    fit = options.get("fit", "crop" if spec.image_size else "none")
    interpolation = options.get("interpolation", "bilinear")
    return prepare_image(path, spec.image_size or (0, 0), fit, interpolation=interpolation).pixels


def comparable(
    decoded: Float[Tensor, "3 height width"], reference: Float[Tensor, "3 height width"]
) -> Float[Tensor, "3 height width"]:
    """The decoded image, clipped to [-1, 1], and brought to the original's size where it comes out in another one."""
    if decoded.shape != reference.shape:
        decoded = F.resize(decoded, list(reference.shape[1:]), InterpolationMode.BICUBIC, antialias=True)
    return decoded.clamp(-1, 1)


def properties(reference: Float[Tensor, "3 height width"], spec: Spec) -> dict[str, Any]:
    """The size in pixels."""
    return {"height": reference.shape[1], "width": reference.shape[2]}


def baseline(reference: Float[Tensor, "3 height width"], spec: Spec, bits: int) -> Float[Tensor, "3 height width"]:
    """The thumbnail of that many bits, in [-1, 1]."""
    return thumbnail(_unit(reference), bits).image * 2 - 1


def measure(function: MetricFunction, spec: Spec, *signals: Float[Tensor, "3 height width"]) -> Any:
    """The function of images in [0, 1]."""
    with exact_float32(signals[0].device):
        return function(*map(_unit, signals))


def tokens_per(rows: Sequence[Row], spec: Spec) -> dict[str, float]:
    """Tokens per pixel."""
    pixels = sum(row["height"] * row["width"] for row in rows)
    return {"pixel": sum(row["tokens"] for row in rows) / pixels} if pixels else {}


def totals(rows: Sequence[Row]) -> dict[str, Any]:
    """Sizes of the images and tokens of each where all have the same, and seconds of work per image."""
    speed = {
        f"{direction}_seconds_per_image": sum(row[f"{direction}_seconds"] for row in rows) / len(rows) if rows else None
        for direction in ("encode", "decode")
    }
    return {
        "height": _shared(row["height"] for row in rows),
        "width": _shared(row["width"] for row in rows),
        "tokens_per_image": _shared(row["tokens"] for row in rows),
        "speed": speed,
    }


def heading(summary: Mapping[str, Any]) -> str:
    """Size and bits of an image."""
    parts = []
    if summary["height"] and summary["width"]:
        parts.append(f"{summary['width']} × {summary['height']} pixels")
    if summary["tokens_per_image"]:
        count = summary["tokens_per_image"]
        parts.append(f"{count} tokens or {count * summary['tokenizer']['bits_per_token']} bits per image")
    return ", ".join(parts) or "images of several sizes"


def tiles(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rates and speed."""
    spec, tokens = summary["tokenizer"], summary["tokens"]
    found = []
    if count := summary["tokens_per_image"]:
        found.append((f"{count}", f"tokens per image, {spec['bits_per_token']} bits each"))
    if "bits_per_pixel" in tokens:
        found.append((f"{tokens['bits_per_pixel']:.3g}", "bits per pixel"))
    for direction, name in (("encode", "to encode"), ("decode", "to decode")):
        if seconds := summary["speed"][f"{direction}_seconds_per_image"]:
            found.append((_duration(seconds), f"{name} an image"))
    return found


def shown(reference: Float[Tensor, "3 height width"], variants: Sequence[Variant], spec: Spec) -> dict[str, Any]:
    """The original, and the reconstruction beside the thumbnail of the same bits for every prefix."""
    frames = []
    for variant in variants:
        rival = thumbnail(_unit(reference), variant.bits)
        frames.append(
            {
                "tokens": variant.tokens,
                "decoded": as_webp(_unit(variant.decoded)),
                "baseline": as_webp(rival.image),
                "layout": f"{rival.width} × {rival.height}, {rival.layout}" if rival.layout else "an even grey",
                "figures": variant.figures,
                "baseline_figures": variant.baseline_figures,
            }
        )
    height, width = reference.shape[1:]
    return {
        "caption": f"{width} × {height} pixels, {variants[-1].tokens} tokens",
        "original": as_webp(_unit(reference)),
        "frames": frames,
        "hard_pixels": min(height, width) < _SMOOTH_FROM,
    }


def _unit(image: Float[Tensor, "3 height width"]) -> Float[Tensor, "3 height width"]:
    """[-1, 1] to [0, 1]."""
    return (image + 1) / 2


def _shared(values: Any) -> int | None:
    """The value that all have in common."""
    found = set(values)
    return found.pop() if len(found) == 1 else None


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def as_webp(image: Float[Tensor, "3 height width"]) -> str:
    """A data URI of an image in [0, 1], at a quality that hides nothing one could blame on the tokenizer."""
    buffer = io.BytesIO()
    levels = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    F.to_pil_image(levels.cpu()).save(buffer, "WEBP", quality=92, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()

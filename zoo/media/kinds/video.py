"""Answers of video to what every room asks: see `zoo.modality`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.errors import InputError
from zoo.media.video import FRAME_RATE, VIDEO_EXTENSIONS, video_info, write_video
from zoo.spec import Spec

EXTENSIONS = VIDEO_EXTENSIONS if find_spec("av") is not None else ()
#: What data sets are measured in.
EXTENT = "hours"
LIMITS = ("max_seconds",)


def write(path: str | os.PathLike[str], decoded: Float[Tensor, "3 frames height width"], fps: Fraction | None) -> Path:
    """Write what a tokenizer of video decoded."""
    return write_video(path, decoded, FRAME_RATE if fps is None else fps)


def trial() -> Float[Tensor, "3 frames height width"]:
    """A little clip, to try a format with."""
    return torch.zeros(3, 2, 16, 16, dtype=torch.float32)


def rate(meta: Mapping[str, Any]) -> Fraction | None:
    """Frames per second of an encoded clip, which `write` is handed; ``None`` where that is not known."""
    return Fraction(meta["fps_num"], meta["fps_den"]) if meta.get("fps_num") and meta.get("fps_den") else None


def seconds(meta: Mapping[str, Any]) -> float:
    """Duration of an encoded clip; 0 where that is not known."""
    fps = rate(meta)
    return 0.0 if fps is None else float(meta["frames"] / fps)


def figures(spec: Spec, meta: Mapping[str, Any], bits: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Frames, size and duration of an encoded clip, and its bits per second and per pixel."""
    if not seconds(meta):
        return {}, {"bits": bits}
    size = {"frames": meta["frames"], "width": meta["width"], "height": meta["height"], "seconds": round(seconds(meta), 3)}
    if spec.continuous:
        return size, {}
    pixels = meta["frames"] * meta["width"] * meta["height"]
    return size, {"bits_per_second": round(bits / seconds(meta), 1), "bits_per_pixel": round(bits / pixels, 5)}


def extent(meta: Mapping[str, Any]) -> float:
    """Hours of an encoded clip; 0 where its duration is not known."""
    return seconds(meta) / 3600


def require_within(item: Any, meta: Mapping[str, Any] | None, *, max_seconds: float) -> None:
    """Refuse a clip that is too long: by its header, where it says how many frames it has, or by what was decoded.

    Raises:
        InputError: it is too long, or cannot be read.
    """
    if meta is None:
        count, fps = video_info(item)
        lasts = 0.0 if count is None else float(count / fps)
    else:
        lasts = seconds(meta)
    if lasts > max_seconds:
        raise InputError(f"it lasts {lasts:.6g} s, more than the {max_seconds:g} s that are allowed")

"""Answers of audio to what every room asks: see `zoo.modality`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.errors import InputError
from zoo.media.audio import AUDIO_EXTENSIONS, READ_ONLY_AUDIO_EXTENSIONS, audio_info, write_audio
from zoo.modality import modality
from zoo.spec import Spec

EXTENSIONS = AUDIO_EXTENSIONS + tuple(
    extension
    for extension in READ_ONLY_AUDIO_EXTENSIONS
    if extension not in modality("audio").extras or find_spec("av") is not None
)
#: What data sets are measured in.
EXTENT = "hours"
LIMITS = ("max_seconds",)


def write(path: str | os.PathLike[str], decoded: Float[Tensor, "channels samples"], sample_rate: int | None) -> Path:
    """Write what a tokenizer of audio decoded."""
    assert sample_rate is not None
    return write_audio(path, decoded, sample_rate)


def trial() -> Float[Tensor, "1 samples"]:
    """A little audio, to try a format with."""
    return torch.zeros(1, 4096, dtype=torch.float32)


def figures(spec: Spec, meta: Mapping[str, Any], bits: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The duration of an encoded item, and its bits per second; nothing where the duration is not known."""
    if "samples" not in meta:
        return {}, {"bits": bits}
    seconds = meta["samples"] / meta["sample_rate"]
    return {"seconds": round(seconds, 3)}, {"bits_per_second": round(bits / seconds, 1)}


def extent(meta: Mapping[str, Any]) -> float:
    """Hours of an encoded item; 0 where its duration is not known."""
    return meta["samples"] / meta["sample_rate"] / 3600 if meta.get("sample_rate") else 0.0


def require_within(item: Any, meta: Mapping[str, Any] | None, *, max_seconds: float) -> None:
    """Refuse a recording that is too long: by its header, where it says how long it is, or by what was decoded.

    Raises:
        InputError: it is too long, or cannot be read.
    """
    if meta is None:
        info = audio_info(item)
        seconds = None if info.samples is None else info.samples / info.sample_rate
    else:
        seconds = 3600 * extent(meta)
    if seconds is not None and seconds > max_seconds:
        raise InputError(f"it lasts {seconds:.6g} s, more than the {max_seconds:g} s that are allowed")

"""What every room asks of audio: see `zoo.modality`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.media.audio import AUDIO_EXTENSIONS, write_audio
from zoo.spec import Spec

EXTENSIONS = AUDIO_EXTENSIONS


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

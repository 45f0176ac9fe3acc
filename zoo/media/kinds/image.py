"""Answers of images to what every room asks: see `zoo.modality`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.media.image import IMAGE_EXTENSIONS, write_image
from zoo.spec import Spec

EXTENSIONS = IMAGE_EXTENSIONS
#: What data sets are measured in.
EXTENT = "megapixels"


def write(path: str | os.PathLike[str], decoded: Float[Tensor, "3 height width"], sample_rate: int | None) -> Path:
    """Write what a tokenizer of images decoded."""
    return write_image(path, decoded)


def trial() -> Float[Tensor, "3 height width"]:
    """A little image, to try a format with."""
    return torch.zeros(3, 16, 16, dtype=torch.float32)


def figures(spec: Spec, meta: Mapping[str, Any], bits: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The size of an encoded image, and its bits per pixel that the model sees: what a crop cuts away has no bits."""
    height, width = spec.image_size or (meta["height"], meta["width"])
    rate = {} if spec.continuous else {"bits_per_pixel": round(bits / (width * height), 4)}
    return {"width": meta["width"], "height": meta["height"]}, rate


def extent(meta: Mapping[str, Any]) -> float:
    """Megapixels of an encoded item; 0 where its size is not known."""
    return meta["width"] * meta["height"] / 1e6 if meta.get("width") else 0.0

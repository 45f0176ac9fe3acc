"""Fuzz targets of the readers of media: bytes are read in full, or an error of the zoo says why not."""

from __future__ import annotations

import numpy as np
import torch

from zoo import media
from zoo.errors import ZooError


def audio(data: bytes) -> None:
    """A recording, at its own rate and at a model's."""
    for rate in (None, 24_000):
        try:
            read = media.read_audio(data, sample_rate=rate, mono=rate is not None)
        except ZooError:
            continue
        assert read.waveform.ndim == 2 and read.waveform.numel()
        assert torch.isfinite(read.waveform).all()


def image(data: bytes) -> None:
    """An image, at its own size and at a model's."""
    for fit, size in (("none", (0, 0)), ("crop", (32, 48))):
        try:
            prepared = media.prepare_image(data, size, fit, max_pixels=1_000_000)
        except ZooError:
            continue
        assert torch.isfinite(prepared.pixels).all()
        assert fit == "none" or prepared.pixels.shape == (3, 32, 48)
        assert prepared.meta["width"] * prepared.meta["height"] <= 1_000_000


def shape(data: bytes) -> None:
    """A mesh or a cloud of points, and points on it."""
    try:
        prepared = media.prepare_shape(data, 64)
    except ZooError:
        return
    assert prepared.points.shape == (64, 3)
    assert np.isfinite(prepared.points.numpy()).all()

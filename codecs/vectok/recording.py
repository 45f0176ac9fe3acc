"""A recording as speech vectors: in windows, so that hours of it fit into memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.codecs.vectok.logmel import LogMelVectors
from zoo.codecs.vectok.wavlm import WavLM

Vectors = Float[Tensor, "frames dim"]


@dataclass(frozen=True)
class Window:
    """Vectors of a part of a recording, and which of them are no margin."""

    vectors: Vectors
    kept: slice


@dataclass(frozen=True)
class Recording:
    """The vectors of a recording, window by window, as often as they are asked for."""

    frames: int
    windows: Callable[[], Iterator[Window]]

    @classmethod
    def whole(cls, vectors: Vectors) -> Recording:
        """A recording that is short enough for a single window."""
        return cls(len(vectors), lambda: iter([Window(vectors, slice(None))]))

    def vectors(self) -> Vectors:
        """All of them."""
        return torch.cat([window.vectors[window.kept] for window in self.windows()])

    def mean(self) -> Float[Tensor, " dim"]:
        """Their mean."""
        sums = [window.vectors[window.kept].sum(0, dtype=torch.float64) for window in self.windows()]
        return (torch.stack(sums).sum(0) / self.frames).float()


class Span(NamedTuple):
    """A window on vectors ``start`` to ``stop``; those in ``kept``, counted from its start, are no margin."""

    start: int
    stop: int
    kept: slice


def overlapping_windows(frames: int, size: int, overlap: int) -> list[Span]:
    """Windows of at most ``size`` vectors that keep every vector once, with margins; a single one where that is enough."""
    if frames <= size:
        return [Span(0, frames, slice(0, frames))]
    spans = []
    for first in range(0, frames, size - 2 * overlap):
        last = min(first + size - 2 * overlap, frames)
        start = max(0, first - overlap)
        spans.append(Span(start, min(frames, last + overlap), slice(first - start, last - start)))
    return spans


def vectors_fingerprint(analysis: WavLM | LogMelVectors) -> str:
    """Identity of what makes speech vectors: a hash over what it reads and over tensors that no two of them share."""
    if isinstance(analysis, WavLM):
        last: Any = analysis.blocks[analysis.sizes.layer - 1]
        tensors: list[Tensor] = [analysis.proj.weight, last.attention.gate.weight, last.fc2.bias]
        settings = f"wavlm {analysis.sizes.layer} {analysis.sizes.normalize_waveform}"
    else:
        tensors = [analysis.mean, analysis.std]
        settings = f"logmel {analysis.sizes}"
    digest = hashlib.sha256(settings.encode())
    for tensor in tensors:
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

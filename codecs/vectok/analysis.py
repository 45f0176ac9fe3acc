"""Recordings to speech vectors: in batches of similar length, and in windows so that hours of sound fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from zoo.codecs.vectok.logmel import LogMelVectors
from zoo.codecs.vectok.recording import Recording, Window, overlapping_windows
from zoo.codecs.vectok.wavlm import WavLM
from zoo.errors import ItemError
from zoo.precision import exact_float32
from zoo.progress import progress_bar
from zoo.tokenizer import groups_of_similar_length


@dataclass(frozen=True)
class Analyser:
    """A network that makes speech vectors, and how much it is given at a time.

    Attributes:
        network: makes vectors of waveforms.
        device: where it is.
        hop_length: samples per vector.
        window, overlap: vectors of the windows of long recordings, and of the margin on either side.
        together: vectors in flight.
        kept: of longer recordings, vectors are computed as often as they are asked for.
    """

    network: WavLM | LogMelVectors
    device: torch.device
    hop_length: int
    window: int
    overlap: int
    together: int
    kept: int

    def recordings(
        self, waveforms: Sequence[Float[Tensor, " _"]], *, pad: bool = True, progress: bool = False
    ) -> Iterator[tuple[int, Recording]]:
        """Index and vectors of each waveform, in the order in which they are ready.

        Raises:
            InputError: without padding, a waveform is too short for a vector.
        """
        hop, reach = self.hop_length, self.hop_length + self.network.tail
        counts = []
        for index, waveform in enumerate(waveforms):
            samples = len(waveform)
            counts.append(-(-samples // hop) if pad else (samples - reach) // hop + 1)
            if counts[-1] < 1:
                raise ItemError(f"{samples} samples are too short for a vector, which sees {reach}", index)
        short = [index for index, count in enumerate(counts) if count <= self.window]
        with progress_bar("encode", sum(counts), progress, unit="vector") as advance:
            for group in groups_of_similar_length([counts[i] for i in short], self.together):
                chosen = [short[i] for i in group]
                pieces = [waveforms[i] for i in chosen]
                for index, vectors in zip(chosen, self._vectors(pieces, [counts[i] for i in chosen]), strict=True):
                    yield index, Recording.whole(vectors)
                    advance(counts[index])
            for index in sorted(set(range(len(counts))) - set(short)):
                yield index, self._long_recording(waveforms[index], counts[index])
                advance(counts[index])

    def _long_recording(self, waveform: Float[Tensor, " samples"], frames: int) -> Recording:
        def windows() -> Iterator[Window]:
            batch = max(1, self.together // self.window)
            spans = overlapping_windows(frames, self.window, self.overlap)
            hop = self.hop_length
            for start in range(0, len(spans), batch):
                chosen = spans[start : start + batch]
                pieces = [waveform[span.start * hop : span.stop * hop + self.network.tail] for span in chosen]
                vectors = self._vectors(pieces, [span.stop - span.start for span in chosen])
                for span, own in zip(chosen, vectors, strict=True):
                    yield Window(own, span.kept)

        if frames > self.kept:
            return Recording(frames, windows)
        kept = list(windows())
        return Recording(frames, lambda: iter(kept))

    @torch.no_grad()
    def _vectors(self, pieces: Sequence[Float[Tensor, " _"]], frames: Sequence[int]) -> list[Float[Tensor, "_frames dim"]]:
        """Vectors of pieces of waveforms, ``frames`` of each, with silence behind what is too short for them."""
        samples = max(frames) * self.hop_length + self.network.tail
        batch = torch.stack([F.pad(piece[:samples], (0, max(0, samples - len(piece)))) for piece in pieces])
        with exact_float32(self.device):
            vectors = self.network(batch.to(self.device), list(frames))
        return [row[:count] for row, count in zip(vectors, frames, strict=True)]

"""Units to speech vectors and these to sound, each in batches of similar length, and any length in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.codecs.vectok.inverse import InverseKMeans
from zoo.codecs.vectok.recording import Vectors, overlapping_windows
from zoo.codecs.vectok.vocoder import HiFiGAN, ISTFTVocoder
from zoo.precision import exact_float32
from zoo.progress import progress_bar
from zoo.tokenizer import groups_of_similar_length

Waveform = Float[Tensor, " samples"]


@dataclass(frozen=True)
class Restorer:
    """An inverse k-means model, and how much it is given at a time.

    Attributes:
        inverse: makes vectors of the vectors that stand for units, and of a prompt.
        unit_vectors: those that stand for units.
        window, overlap: units of the windows of long sequences, and of the margin on either side.
    """

    inverse: InverseKMeans
    unit_vectors: Float[Tensor, "units dim"]
    window: int
    overlap: int

    def whole(
        self, units: Sequence[Int[Tensor, " _"]], prompts: Sequence[Float[Tensor, "_prompt dim"]]
    ) -> list[Float[Tensor, "_frames dim"]]:
        """Speech vectors of several sequences at once, each in one piece."""
        return self.inverse(prompts, [F.embedding(item, self.unit_vectors) for item in units])

    def windows(self, units: Int[Tensor, " frames"], prompt: Float[Tensor, "prompt dim"]) -> Iterator[Vectors]:
        """Speech vectors of a sequence of any length, window by window."""
        for span in overlapping_windows(len(units), self.window, self.overlap):
            [vectors] = self.whole([units[span.start : span.stop]], [prompt])
            yield vectors[span.kept]


@dataclass(frozen=True)
class Synthesiser:
    """A vocoder, and how much it is given at a time.

    Attributes:
        vocoder: makes sound of speech vectors.
        device: where it is.
        window: vectors of the blocks of long sequences.
        together: vectors in flight.
    """

    vocoder: HiFiGAN | ISTFTVocoder
    device: torch.device
    window: int
    together: int

    @torch.no_grad()
    def from_units(
        self,
        restorer: Restorer,
        units: Sequence[Int[Tensor, " _"]],
        prompts: Sequence[Float[Tensor, "_prompt dim"]],
        *,
        progress: bool = False,
    ) -> list[Float[Tensor, " _samples"]]:
        """Sound of sequences of units, each in the voice of its prompt."""
        lengths = [len(item) for item in units]
        short = [i for i, length in enumerate(lengths) if length <= self.window]
        waves: dict[int, Tensor] = {}
        with exact_float32(self.device), progress_bar("decode", sum(lengths), progress, unit="vector") as advance:
            for group in groups_of_similar_length([lengths[i] + len(prompts[i]) for i in short], self.together):
                chosen = [short[i] for i in group]
                vectors = restorer.whole([units[i] for i in chosen], [prompts[i] for i in chosen])
                for index, wave in zip(chosen, self._batch(vectors), strict=True):
                    waves[index] = wave
                    advance(lengths[index])
            for index in sorted(set(range(len(units))) - set(short)):
                restored = _counted(restorer.windows(units[index], prompts[index]), advance)
                waves[index] = torch.cat(list(self._blocks(restored)))
        return [waves[index] for index in range(len(units))]

    @torch.no_grad()
    def from_vectors(
        self, vectors: Sequence[Float[Tensor, "_frames dim"]], *, progress: bool = False
    ) -> list[Float[Tensor, " _samples"]]:
        """Sound of sequences of speech vectors."""
        lengths = [len(item) for item in vectors]
        waves: dict[int, Tensor] = {}
        with exact_float32(self.device), progress_bar("vocode", sum(lengths), progress, unit="vector") as advance:
            for group in groups_of_similar_length(lengths, self.together):
                chosen = [vectors[i].to(self.device) for i in group]
                if max(map(len, chosen)) > self.window:
                    found = [torch.cat(list(self._blocks(iter(item.split(self.window))))) for item in chosen]
                else:
                    found = self._batch(chosen)
                for index, wave in zip(group, found, strict=True):
                    waves[index] = wave
                    advance(lengths[index])
        return [waves[index] for index in range(len(vectors))]

    def _batch(self, vectors: Sequence[Float[Tensor, "_frames dim"]]) -> list[Float[Tensor, " _samples"]]:
        """Sound of a few items at once."""
        frames = [len(item) for item in vectors]
        padded = nn.utils.rnn.pad_sequence(list(vectors), batch_first=True)
        inside = None
        if min(frames) < max(frames):
            counts = torch.tensor(frames, dtype=torch.int64, device=padded.device)
            inside = torch.arange(max(frames), dtype=torch.int64, device=padded.device) < counts[:, None]
        batch = self.vocoder(padded, inside)
        return [wave[: count * self.vocoder.hop_length].clone() for wave, count in zip(batch, frames, strict=True)]

    def _blocks(self, blocks: Iterator[Vectors]) -> Iterator[Waveform]:
        """Sound of consecutive vectors, with the numbers of a single pass: each piece has its neighbours beside it."""
        hop, halo = self.vocoder.hop_length, self.vocoder.halo
        pending = next(blocks)
        done = 0
        while True:
            following = next(blocks, None)
            settled = len(pending) if following is None else len(pending) - halo
            if settled > done:
                yield self.vocoder(pending[None])[0, done * hop : settled * hop].clone()
                kept = max(0, settled - halo)
                pending, done = pending[kept:], settled - kept
            if following is None:
                return
            pending = torch.cat([pending, following])


def _counted(blocks: Iterator[Vectors], advance: Callable[[int], object]) -> Iterator[Vectors]:
    """The same blocks; each is counted when the next one is asked for."""
    for block in blocks:
        yield block
        advance(len(block))

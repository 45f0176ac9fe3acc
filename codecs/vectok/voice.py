"""Voices: speech vectors of a speaker, as a prompt or as what kNN-VC matches (arXiv 2305.18975)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchaudio
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zoo.codecs.vectok.config import VecTokConfig
from zoo.errors import FormatError
from zoo.media import replacing
from zoo.media.files import open_source
from zoo.precision import Float32Module

_KIND = "zoo.vectok.Voice"
_VERSION = "1"
#: A longer prompt is cut to its loudest vectors, and less than a second says little about a voice.
MOST_PROMPT_FRAMES = 500
FEWEST_PROMPT_FRAMES = 50
# Vectors that are compared with all others at a time.
_QUERIES = 1024


@dataclass(frozen=True, eq=False)
class Voice:
    """Speech vectors of one speaker, with all that makes the voice, and with what was said.

    Attributes:
        vectors: one per 20 ms, in order.
        energy: mean square of the samples that each belongs to, where known.
        fingerprint: identity of what made the vectors; empty when unknown. Voices serve every model that reads the same layer.
    """

    vectors: Float[Tensor, "frames width"]
    energy: Float[Tensor, " frames"] | None = None
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.vectors)

    def __repr__(self) -> str:
        return f"Voice(frames={len(self)}, width={self.vectors.shape[1]})"

    @property
    def nbytes(self) -> int:
        """Size of its vectors as `save` writes them; it counts beside the bits of the tokens, never among them."""
        return 2 * self.vectors.numel()

    def prompt(self, frames: int = MOST_PROMPT_FRAMES) -> Float[Tensor, "kept width"]:
        """At most ``frames`` vectors, in order: the loudest ones, or the first ones where loudness is unknown."""
        if len(self) <= frames:
            return self.vectors
        if self.energy is None:
            return self.vectors[:frames]
        loudest = self.energy.argsort(descending=True, stable=True)[:frames]
        return self.vectors[loudest.sort().values]

    def to(self, device: torch.device | str) -> Voice:
        """The same voice on a device."""
        energy = None if self.energy is None else self.energy.to(device)
        return Voice(self.vectors.to(device), energy, self.fingerprint)

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.float16) -> Path:
        """Write a safetensors file; half precision moves vectors by about 0.05 %."""
        tensors = {"vectors": self.vectors.to("cpu", dtype).contiguous()}
        if self.energy is not None:
            tensors["energy"] = self.energy.to("cpu", torch.float32).contiguous()
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"kind": _KIND, "version": _VERSION, "fingerprint": self.fingerprint})
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Voice:
        """Read what `save` wrote, in float32.

        Raises:
            InputError: there is no such file, or it is empty or a folder; names it.
            FormatError: it is no sound file of a voice.
        """
        name = os.fspath(path)
        open_source(name, "voice")[0].close()
        try:
            with safe_open(name, framework="pt") as file:
                attributes = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{name} is not a file of a voice, or truncated: {error}") from error
        if attributes.get("kind") != _KIND or attributes.get("version") != _VERSION:
            raise FormatError(f"{name} does not hold a voice that this release knows")
        vectors, energy = tensors.get("vectors"), tensors.get("energy")
        sound = vectors is not None and vectors.ndim == 2 and vectors.numel() and vectors.isfinite().all()
        if vectors is None or not sound or (energy is not None and energy.shape != vectors.shape[:1]):
            raise FormatError(f"{name} holds no vectors [frames, width], or not as many energies")
        return cls(vectors.float(), None if energy is None else energy.float(), attributes.get("fingerprint", ""))


class Voices(Float32Module):
    """The voices that come with a checkpoint."""

    vectors: Tensor

    def __init__(self, config: VecTokConfig) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(len(config.voices), config.voice_frames, config.vector_dim))


def mixture(voices: Sequence[Voice], seed: int) -> Voice:
    """A voice that belongs to nobody: the vectors of one of several, moved to a random mean among those of all."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.randint(len(voices), (1,), generator=generator, dtype=torch.int64, device="cpu")
    chosen = voices[int(place)]
    shares = -torch.rand(len(voices), generator=generator, dtype=torch.float32, device="cpu").clamp(min=1e-12).log()
    means = torch.stack([voice.vectors.mean(0) for voice in voices])
    mean = (shares / shares.sum()).to(means) @ means
    return Voice(chosen.vectors - chosen.vectors.mean(0) + mean, chosen.energy, chosen.fingerprint)


# ------------------------------------------------------------------------------------------------------------------ kNN-VC


def cosine_distance(
    queries: Float[Tensor, "queries width"], vectors: Float[Tensor, "vectors width"]
) -> Float[Tensor, "queries vectors"]:
    """One less the cosine of every pair."""
    return 1 - F.normalize(queries, dim=1) @ F.normalize(vectors, dim=1).T


def nearest_vectors(
    queries: Float[Tensor, "queries width"], vectors: Float[Tensor, "vectors width"], k: int
) -> Iterator[tuple[Float[Tensor, "block k"], Int[Tensor, "block k"]]]:
    """Cosine distances of the ``k`` nearest vectors to each query, ascending, and their indices, block by block."""
    directions = F.normalize(vectors, dim=1).T.contiguous()
    for block in F.normalize(queries, dim=1).split(_QUERIES):
        similarity, indices = (block @ directions).topk(k, dim=1)
        yield 1 - similarity, indices


def match(
    queries: Float[Tensor, "queries width"], vectors: Float[Tensor, "vectors width"], k: int = 4
) -> Float[Tensor, "queries width"]:
    """Mean of the ``k`` vectors nearest to each query by cosine distance."""
    k = min(k, len(vectors))
    return torch.cat([vectors[indices].mean(1) for _, indices in nearest_vectors(queries, vectors, k)])


def stretch(vectors: Float[Tensor, "frames width"], frames: float) -> Float[Tensor, "stretched width"]:
    """Linear interpolation to a number of frames, rounded down; the scale is that of the exact number."""
    return F.interpolate(vectors.T[None], scale_factor=frames / len(vectors), mode="linear")[0].T


def to_loudness(waveform: Float[Tensor, " samples"], sample_rate: int, loudness: float) -> Float[Tensor, " samples"]:
    """The same sound at a loudness in LUFS (ITU-R BS.1770-4); what is shorter than a gating block or silent stays as it is."""
    if len(waveform) < 0.4 * sample_rate:
        return waveform
    found = torchaudio.functional.loudness(waveform[None].cpu(), sample_rate)
    if not torch.isfinite(found):
        return waveform
    return waveform * 10 ** ((loudness - found.item()) / 20)


def trim_silence(waveform: Float[Tensor, " samples"], sample_rate: int, trigger_level: float) -> Float[Tensor, " _"]:
    """Cut what comes before and after speech; kNN-VC does so with a trigger level of 7. All of it if there is no speech."""
    trimmed = waveform
    for _ in range(2):
        trimmed = torchaudio.functional.vad(trimmed, sample_rate, trigger_level=trigger_level).flip(-1)
        if not trimmed.numel():
            return waveform
    return trimmed

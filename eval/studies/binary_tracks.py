"""The models of the binary track: what of them becomes binary, how that is trained, and how good the result is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from jaxtyping import Float
from torch import Tensor, nn

import zoo
from zoo.media import read_audio
from zoo.moved import names_of

SAMPLES = Path(str(files("zoo.eval"))) / "samples"


class Track(ABC):
    """A model, data to train its binary form with, and data to score it on."""

    #: What `score` measures; higher is better.
    metric: ClassVar[str]
    #: Names of what can be done to the inputs.
    corruptions: ClassVar[tuple[str, ...]]
    #: The module to binarize, by name, and layers of it to leave alone.
    part: ClassVar[str]
    skip: ClassVar[tuple[str, ...]] = ()

    def __init__(self, name: str, seed: int) -> None:
        self.seed = seed
        self.teacher: Any = zoo.load(name)

    @abstractmethod
    def loss(self, student: Any, generator: torch.Generator) -> Float[Tensor, ""]:
        """Distance of the student from the teacher on a random batch; differentiable."""

    @abstractmethod
    def score(self, model: Any, corruption: str | None = None) -> float:
        """Quality on held-out data, whose inputs were corrupted if asked."""

    @abstractmethod
    def work(self, model: Any) -> Callable[[], Any]:
        """The inference to time and to count operations of."""

    @abstractmethod
    def running(self, model: Any) -> Sequence[nn.Module]:
        """The modules that `work` runs."""


class SpeechTrack(Track):
    """WavTokenizer: the linear layers of its decoder's ConvNeXt blocks, taught to give the frames of the float32 decoder.

    Ids are those of the unchanged encoder. Scores are the intelligibility (STOI) of the four speech samples of this package
    against their originals.
    """

    metric = "STOI"
    corruptions = ("noise at 20 dB", "noise at 10 dB", "clipping", "low-pass at 2 kHz", "dropouts")
    part = "backbone.convnext"
    # The depth-wise convolutions have 7 weights per output, and are not called as layers.
    skip = ("*.dwconv",)

    FRAMES, BATCH = 96, 6

    @cached_property
    def _training(self) -> list[tuple[Tensor, tuple[Tensor, Tensor]]]:
        """Decoder frames of synthetic speech and music where the ConvNeXt blocks begin."""
        from zoo.weights.data import audio as audio_data

        composer = np.random.default_rng(self.seed)
        recordings = list(audio_data.speech_corpus(60.0, self.seed)) + [audio_data.music(composer) for _ in range(4)]
        tokens = self.teacher.encode([recording[None] for recording in recordings])
        with torch.no_grad():
            mixed = [self.teacher.backbone.mix(self.teacher.codebook(ids[None]), None) for ids in tokens.unpadded()]
        return [(x, coefficients) for x, coefficients in mixed if x.shape[1] >= self.FRAMES]

    def loss(self, student: Any, generator: torch.Generator) -> Float[Tensor, ""]:
        picked = torch.randint(len(self._training), (self.BATCH,), generator=generator).tolist()
        crops, scales, shifts = [], [], []
        for index in picked:
            x, (scale, shift) = self._training[index]
            start = int(torch.randint(x.shape[1] - self.FRAMES + 1, (), generator=generator))
            crops.append(x[:, start : start + self.FRAMES])
            scales.append(scale)
            shifts.append(shift)
        inputs = torch.cat(crops), (torch.cat(scales), torch.cat(shifts)), None, 0
        with torch.no_grad():
            wanted = self.teacher.backbone.refine(*inputs)
        return F.mse_loss(student.backbone.refine(*inputs), wanted)

    @cached_property
    def _speech(self) -> list[Float[Tensor, "1 samples"]]:
        rate = self.teacher.spec.sample_rate
        return [read_audio(path, sample_rate=rate, mono=True).waveform for path in sorted(SAMPLES.glob("speech-*.flac"))]

    @cached_property
    def _heard(self) -> dict[str | None, zoo.Tokens]:
        """Tokens of the speech after every corruption; they do not depend on the decoder."""
        return {}

    def score(self, model: Any, corruption: str | None = None) -> float:
        from zoo.eval.modality.audio import stoi

        rate = self.teacher.spec.sample_rate
        if corruption not in self._heard:
            self._heard[corruption] = self.teacher.encode([self._corrupt(audio, corruption) for audio in self._speech])
        decoded = model.decode(self._heard[corruption])
        values = [stoi(clean[0], audio[0], rate) for clean, audio in zip(self._speech, decoded, strict=True)]
        found = [value for value in values if value is not None]
        return sum(found) / len(found)

    def _corrupt(self, audio: Float[Tensor, "1 samples"], corruption: str | None) -> Float[Tensor, "1 samples"]:
        generator = torch.Generator().manual_seed(self.seed)
        if corruption is None:
            return audio
        if corruption.startswith("noise"):
            decibels = float(corruption.split()[2])
            noise = torch.randn(audio.shape, generator=generator)
            return audio + noise * audio.square().mean().sqrt() * 10 ** (-decibels / 20)
        if corruption == "clipping":
            level = 0.2 * float(audio.abs().max())
            return audio.clamp(-level, level)
        if corruption == "low-pass at 2 kHz":
            return torchaudio.functional.lowpass_biquad(audio, self.teacher.spec.sample_rate, 2_000)
        # Every tenth part of 20 ms is silent.
        span = self.teacher.spec.sample_rate // 50
        lost = torch.rand(1, -(-audio.shape[1] // span), generator=generator) < 0.1
        return audio * ~lost.repeat_interleave(span, dim=1)[:, : audio.shape[1]]

    def work(self, model: Any) -> Callable[[], Any]:
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(self.teacher.spec.vocab_size, (1, 750), generator=generator)
        tokens = self.teacher.tokens(list(ids))
        return lambda: model.decode(tokens)

    def running(self, model: Any) -> Sequence[nn.Module]:
        return model.backbone, model.head


class FileTrack(Track):
    """ByteFormer: every linear layer of its transformer, taught to give the logits of the float32 one.

    Scores are the accuracy on held-out files: procedural pictures as TIFF and PNG, spoken commands as WAV.
    """

    metric = "accuracy"
    corruptions = ("1 % of the bytes at random", "5 % of the bytes at random", "noise of 8 levels", "5 % of the bytes lost")
    part = "transformer"

    RECORDINGS, PICTURES, COMMANDS = 150, 6, 10
    #: One in so many of the held-out files is scored.
    SHARE = 3

    @cached_property
    def _corpus(self) -> Any:
        from zoo.weights.recipes import byteformer

        return byteformer.make_corpus(self._recipe)

    @cached_property
    def _recipe(self) -> Any:
        from zoo.weights.recipes import byteformer

        return byteformer.Recipe(recordings=self.RECORDINGS, pictures=self.PICTURES, commands=self.COMMANDS, seed=self.seed)

    def loss(self, student: Any, generator: torch.Generator) -> Float[Tensor, ""]:
        step = int(torch.randint(1 << 30, (), generator=generator))
        batch = self._corpus.batch(self._recipe, step)
        sequences = list(self.teacher.encode(batch.files).unpadded())
        with torch.no_grad():
            wanted = self.teacher(sequences).softmax(-1)
        logits = student(sequences)
        return F.cross_entropy(logits, wanted) + F.cross_entropy(logits, batch.labels)

    @cached_property
    def _held_out(self) -> list[tuple[int, bytes]]:
        from zoo.weights.data import files as file_data

        files = list(file_data.held_out())[:: self.SHARE]
        return [(file_data.LABELS.index(label), content) for label, _, content in files]

    def score(self, model: Any, corruption: str | None = None) -> float:
        right = 0
        files = [self._corrupt(content, number, corruption) for number, (_, content) in enumerate(self._held_out)]
        for start in range(0, len(files), 32):
            found = model.classify(self.teacher.encode(files[start : start + 32])).argmax(1).tolist()
            right += sum(a == b for a, (b, _) in zip(found, self._held_out[start : start + 32], strict=True))
        return right / len(files)

    def _corrupt(self, content: bytes, number: int, corruption: str | None) -> bytes:
        """Change a file, headers and all, as a damaged disk would; nobody has to be able to open it."""
        if corruption is None:
            return content
        rng = np.random.default_rng((self.seed, number))
        octets = np.frombuffer(content, dtype=np.uint8)
        if corruption.startswith("noise"):
            return (octets + np.rint(rng.normal(0, 8, len(octets))).clip(-128, 127).astype(np.int8).view(np.uint8)).tobytes()
        hit = rng.random(len(octets)) < float(corruption.split()[0]) / 100
        if corruption.endswith("lost"):
            return octets[~hit].tobytes()
        return np.where(hit, rng.integers(0, 256, len(octets), dtype=np.uint8), octets).tobytes()

    def work(self, model: Any) -> Callable[[], Any]:
        tokens = self.teacher.encode([content for _, content in self._held_out[::20]])
        return lambda: model.classify(tokens)

    def running(self, model: Any) -> Sequence[nn.Module]:
        return model.embedding, model.transformer, model.classifier


#: By family, since a subject names the layers of its network.
TRACKS: dict[str, type[Track]] = {"wavtokenizer": SpeechTrack, "byteformer": FileTrack}


#: Former names, for one release.
__getattr__ = names_of(
    __name__,
    {
        "Files": "zoo.eval.studies.binary_tracks:FileTrack",
        "SUBJECTS": "zoo.eval.studies.binary_tracks:TRACKS",
        "Speech": "zoo.eval.studies.binary_tracks:SpeechTrack",
        "Subject": "zoo.eval.studies.binary_tracks:Track",
    },
)

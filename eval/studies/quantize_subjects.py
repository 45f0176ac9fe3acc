"""What quantized models are measured on: what they make of the ids of held-out files, beside float32 and the originals."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from zoo import media
from zoo.eval.modality import bytes as files_of_bytes
from zoo.eval.modality import image as images
from zoo.eval.modality.audio import log_mel_l1
from zoo.tokens import Tokens

#: Files that go through a model together while it is calibrated.
TOGETHER = 8


class Subject(ABC):
    """A tokenizer in float32 and held-out files: their ids, and what the model makes of them.

    Ids are made once: quantization leaves encoders alone.

    Attributes:
        amount: how much there is to measure on, in ``unit``.
    """

    #: Of the files that are taken from folders; ``None`` for all of them.
    extensions: ClassVar[Collection[str] | None]
    #: What ``amount`` counts.
    unit: ClassVar[str]
    #: Headings and decimals of what `compare` returns, in the order of a table's columns.
    columns: ClassVar[Mapping[str, tuple[str, int]]]

    amount: float

    def __init__(self, tokenizer: Any, files: Sequence[Path]) -> None:
        self.tokenizer = tokenizer
        self.tokens: Tokens = tokenizer.encode(self.read(files))
        self.wanted = self.output(tokenizer, self.tokens)

    @abstractmethod
    def read(self, files: Sequence[Path]) -> list[Any]:
        """The held-out files, as `encode` takes them; keeps what `compare` needs of them."""

    @abstractmethod
    def output(self, model: Any, tokens: Tokens) -> list[Float[Tensor, "*shape"]]:
        """What a model makes of tokens, one tensor for each item; the same noise every time where there is any."""

    @abstractmethod
    def compare(self, found: Sequence[Float[Tensor, "*shape"]]) -> dict[str, float | None]:
        """Figures of an output beside that of float32 and the originals."""

    def calibration(self, files: Sequence[Path]) -> list[Tokens]:
        """Batches of other files' ids, which `output` runs a model on."""
        return [self.tokenizer.encode(list(files[start : start + TOGETHER])) for start in range(0, len(files), TOGETHER)]

    def measure(self, model: Any) -> dict[str, float | None]:
        """Signal-to-noise ratio in dB against float32, the figures of `compare`, and CPU seconds."""
        started = time.process_time()
        found = self.output(model, self.tokens)
        seconds = time.process_time() - started
        return {"snr": signal_to_noise(self.wanted, found), **self.compare(found), "decode_cpu_seconds": seconds}


class Recordings(Subject):
    """Audio: distance of log-mel magnitudes, in nepers."""

    extensions = media.AUDIO_EXTENSIONS
    unit = "s of audio"
    columns: ClassVar = {"mel_from_float32": ("mel", 3), "mel_from_recording": ("mel from recording", 3)}

    def read(self, files: Sequence[Path]) -> list[Float[Tensor, " samples"]]:
        rate = self.tokenizer.spec.sample_rate
        self.originals = [media.read_audio(file, sample_rate=rate, mono=True).waveform[0] for file in files]
        self.amount = sum(map(len, self.originals)) / rate
        return self.originals

    def output(self, model: Any, tokens: Tokens) -> list[Float[Tensor, "*shape"]]:
        return [audio[0] for audio in model.decode(tokens)]

    def compare(self, found: Sequence[Float[Tensor, "*shape"]]) -> dict[str, float | None]:
        return {
            "mel_from_float32": self._distance(self.wanted, found),
            "mel_from_recording": self._distance(self.originals, found),
        }

    def _distance(self, references: Sequence[Tensor], found: Sequence[Tensor]) -> float:
        rate = self.tokenizer.spec.sample_rate
        return fmean(log_mel_l1(reference, audio, rate) for reference, audio in zip(references, found, strict=True))


class Pictures(Subject):
    """Images: PSNR of pictures clipped to their range, mean of all, at most 100 dB."""

    extensions = media.IMAGE_EXTENSIONS
    unit = "images"
    columns: ClassVar = {"psnr_from_float32": ("PSNR", 1), "psnr_from_original": ("PSNR from original", 2)}

    def read(self, files: Sequence[Path]) -> list[Float[Tensor, "3 height width"]]:
        self.originals = [images.read(str(file), self.tokenizer.spec, {}) for file in files]
        self.amount = len(files)
        return self.originals

    def output(self, model: Any, tokens: Tokens) -> list[Float[Tensor, "*shape"]]:
        decoded: list[Tensor] = model.decode(tokens)
        return decoded

    def compare(self, found: Sequence[Float[Tensor, "*shape"]]) -> dict[str, float | None]:
        return {"psnr_from_float32": self._psnr(self.wanted, found), "psnr_from_original": self._psnr(self.originals, found)}

    def _psnr(self, references: Sequence[Tensor], found: Sequence[Tensor]) -> float:
        spec = self.tokenizer.spec
        pairs = zip(references, found, strict=True)
        return fmean(
            images.measure(images.psnr, spec, reference.clamp(-1, 1), images.comparable(image, reference))
            for reference, image in pairs
        )


class Files(Subject):
    """Files of bytes, whose folders are their classes: what the network makes of them are logits.

    Accuracy is over the files whose folder is a class of the model, agreement the share of files that get the class that
    float32 gives them, and divergence that of Kullback and Leibler from float32's probabilities, in nats.
    """

    extensions = None
    unit = "files"
    columns: ClassVar = {"accuracy": ("accuracy", 3), "agreement": ("agreement", 3), "divergence": ("divergence", 4)}

    def read(self, files: Sequence[Path]) -> list[bytes]:
        contents = [files_of_bytes.read(str(file), self.tokenizer.spec, {}) for file in files]
        self.labels = [self._label(content) for content in contents]
        self.amount = len(files)
        return list(contents)

    def _label(self, file: files_of_bytes.File) -> int | None:
        names, folder = files_of_bytes.class_names(self.tokenizer, file), file.path.absolute().parent.name
        return names.index(folder) if folder in names else None

    def output(self, model: Any, tokens: Tokens) -> list[Float[Tensor, "*shape"]]:
        return list(model.classify(tokens))

    def compare(self, found: Sequence[Float[Tensor, "*shape"]]) -> dict[str, float | None]:
        logits, wanted = torch.stack(list(found)), torch.stack(self.wanted)
        classes = logits.argmax(1).tolist()
        labelled = [float(label == own) for label, own in zip(self.labels, classes, strict=True) if label is not None]
        return {
            "accuracy": sum(labelled) / len(labelled) if labelled else None,
            "agreement": float((logits.argmax(1) == wanted.argmax(1)).float().mean()),
            "divergence": float(F.kl_div(logits.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)),
        }


#: The subject of each modality; another modality is another line here.
SUBJECTS: dict[str, type[Subject]] = {"audio": Recordings, "image": Pictures, "bytes": Files}


def signal_to_noise(wanted: Iterable[Tensor], found: Iterable[Tensor]) -> float:
    """Power of what is wanted over that of the difference, of all items together, in dB; infinite without a difference."""
    pairs = list(zip(wanted, found, strict=True))
    signal = sum(float(reference.square().sum()) for reference, _ in pairs)
    noise = sum(float((item - reference).square().sum()) for reference, item in pairs)
    return 10 * float(torch.tensor(signal / noise).log10()) if noise else float("inf")

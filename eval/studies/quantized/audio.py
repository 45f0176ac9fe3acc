"""Decoded recordings of quantized models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from zoo import media
from zoo.eval.modality.audio import log_mel_l1
from zoo.eval.studies.quantized.base import Subject
from zoo.tokens import Tokens


class Recordings(Subject):
    """Audio: distance of log-mel magnitudes, in nepers."""

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


SUBJECT = Recordings

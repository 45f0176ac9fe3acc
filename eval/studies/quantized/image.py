"""Decoded pictures of quantized models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from zoo.eval.modality import image as images
from zoo.eval.studies.quantized.base import Subject
from zoo.tokens import Tokens


class Pictures(Subject):
    """Images: PSNR of pictures clipped to their range, mean of all, at most 100 dB."""

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


SUBJECT = Pictures

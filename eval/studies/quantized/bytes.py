"""Files that quantized models classify."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from zoo.eval.modality import bytes as files_of_bytes
from zoo.eval.studies.quantized.base import Subject
from zoo.tokens import Tokens


class Files(Subject):
    """Files of bytes, whose folders are their classes: what the network makes of them are logits.

    Accuracy is over the files whose folder is a class of the model, agreement the share of files that get the class that
    float32 gives them, and divergence that of Kullback and Leibler from float32's probabilities, in nats.
    """

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


SUBJECT = Files

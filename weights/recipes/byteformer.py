"""The recipe of ``byteformer-tiny``: train a small ByteFormer on files made by this package, on a CPU, in minutes.

    python -m zoo.weights.recipes.byteformer --out weights/byteformer-tiny.safetensors --minutes 10

Seeded and resumable: run the same command again and it goes on from the last checkpoint beside ``--out``. One model learns
pictures from the bytes of TIFF and PNG files and spoken commands from those of WAV files (`file_data`), all of it drawn anew
at every step. The loss is cross-entropy with smoothed labels, as the paper's; what is shipped are running averages.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from zoo.codecs.byteformer import ByteFormer, ByteFormerConfig
from zoo.codecs.byteformer.encodings import image_file
from zoo.weights.data import files as file_data
from zoo.weights.data.files import Clip
from zoo.weights.recipes import trainer

# A stride of 24 bytes is 8 pixels and a quarter of a row, so that the same colour begins every token of a TIFF file.
TINY = ByteFormerConfig(
    dim=96,
    heads=3,
    hidden=288,
    kernel=48,
    windows=(32, 32, 32, 48, 48, 48),
    shifts=(0, 16, 0, 0, 0, 0),
    merges=(0, 1, 2),
    max_tokens=512,
    classes=len(file_data.LABELS),
    layernorm_axis_rule=False,
    labels=file_data.LABELS,
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result besides the code.

    Attributes:
        steps: length of the schedule in optimiser steps.
        minutes: time after which the schedule has to be at its end, however many steps were done; ``None`` for no limit.
        pictures, commands: files per step; every picture comes as TIFF and as PNG.
        recordings: spoken commands; each is drawn many times with other paces, places and noises.
        warmup: steps of rising learning rate.
        smoothing: of the labels.
        decay: weight decay of matrices.
        average: of the running averages of the weights.
    """

    steps: int = 6_000
    minutes: float | None = None
    pictures: int = 12
    commands: int = 20
    recordings: int = 4_000
    learning_rate: float = 2e-3
    warmup: int = 150
    smoothing: float = 0.1
    decay: float = 0.05
    average: float = 0.995
    seed: int = 3407


class Batch(NamedTuple):
    """Files and their classes."""

    files: list[bytes]
    labels: Int[Tensor, " batch"]


class Corpus:
    """Spoken commands in memory, from which files are made anew for every step; pictures are drawn for it."""

    def __init__(self, recordings: Sequence[tuple[str, Clip]]) -> None:
        self.clips: dict[str, list[Clip]] = defaultdict(list)
        for word, clip in recordings:
            self.clips[word].append(clip)

    def batch(self, recipe: Recipe, step: int) -> Batch:
        """The files of a step, the same ones whenever that step is taken."""
        rng = np.random.default_rng((recipe.seed, step))
        files: list[bytes] = []
        labels: list[str] = []
        for thing in rng.choice(file_data.THINGS, recipe.pictures).tolist():
            pixels = file_data.picture(rng, thing)
            files += [image_file(pixels, encoding) for encoding in ("TIFF", "PNG")]
            labels += [thing, thing]
        for word in rng.choice(sorted(self.clips), recipe.commands).tolist():
            clip = self.clips[word][rng.integers(len(self.clips[word]))]
            files.append(file_data.wav_file(file_data.staged(clip, rng)))
            labels.append(word)
        return Batch(files, torch.tensor([file_data.LABELS.index(label) for label in labels]))


def make_corpus(recipe: Recipe) -> Corpus:
    """The spoken commands of a recipe."""
    spoken = file_data.spoken_commands(recipe.recordings, recipe.seed)
    return Corpus(list(tqdm(spoken, total=recipe.recordings, desc="espeak-ng", unit="word", mininterval=10)))


@torch.no_grad()
def initialise(model: ByteFormer) -> None:
    """Start from what is known of files: bytes are levels, and samples and pixels come in waves.

    Near values get near vectors: the value itself, the value with quiet ones spread out as in the mu-law, and Fourier
    features. To the first two the convolution applies windowed waves of every frequency, two phases each; the others keep
    small random filters. The first feed-forward layer begins with the magnitudes of these waves, merges begin with means,
    and positions with sines and cosines of many wavelengths.
    """
    config = model.config
    values = torch.arange(256) / 256 - 0.5
    spread = values.sign() * torch.log1p(100 * values.abs()) / 2
    levels = torch.arange(config.dim - 2) // 2 % 8 + 1
    waves = torch.cos(2 * math.pi * (values[:, None] * levels + torch.rand(config.dim - 2))) / levels
    model.embedding.bytes[:256] = torch.cat([3.5 * values[:, None], spread[:, None], waves], dim=1)

    taps = torch.arange(config.kernel) - (config.kernel - 1) / 2
    window = torch.cos(math.pi * taps / config.kernel)
    frequencies = torch.linspace(0.01, 0.49, config.dim // 4).repeat_interleave(2)
    quadrature = torch.arange(len(frequencies)) % 2 * math.pi / 2
    filters = window * torch.cos(2 * math.pi * frequencies[:, None] * taps + quadrature[:, None] - math.pi / 4)
    model.embedding.reduction.mul_(0.5)
    for part in range(2):
        chosen = slice(part * len(filters), (part + 1) * len(filters))
        model.embedding.reduction[chosen, part] += filters * (8 / config.kernel) ** 0.5

    magnitudes = model.transformer.blocks[0].mlp
    channels = torch.arange(2 * len(filters))
    for sign in (0, 1):
        magnitudes.fc1.weight[2 * channels + sign] = (3 - 6 * sign) * torch.eye(config.dim)[channels]
        # Both phases and signs of a wave go the same way: what adds up is its magnitude.
        magnitudes.fc2.weight[:, 2 * channels + sign] = magnitudes.fc2.weight[:, channels // 2 * 4]
    for merge in model.transformer.merges.values():
        merge.reduction.weight.mul_(0.5).add_(torch.eye(config.dim).repeat(1, 2) * 0.7)

    wavelengths = 2.0 ** torch.linspace(1, 10, config.dim // 2)
    angles = 2 * math.pi * torch.arange(config.max_tokens)[:, None] / wavelengths
    model.embedding.positions.copy_(0.1 * torch.cat([angles.sin(), angles.cos()], dim=1))


class Stage(trainer.Stage):
    """The only stage: all of the model.

    Args:
        recipe: of the training.
        model: what is trained.
        corpus: what its files are made of.
    """

    def __init__(self, recipe: Recipe, model: ByteFormer, corpus: Corpus) -> None:
        self.recipe, self.model, self.corpus = recipe, model, corpus
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.average))
        matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": recipe.decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=recipe.learning_rate,
            fused=True,
        )
        parts = {"model": model, "average": self.average}
        rng = torch.Generator().manual_seed(recipe.seed)
        super().__init__("byteformer-tiny", recipe.steps, recipe.minutes, [optimizer], parts, rng)

    def update(self) -> dict[str, float]:
        self.set_rates(self.recipe.warmup, min_lr_ratio=0.01)
        files, labels = self.corpus.batch(self.recipe, self.step)
        # Of attention within windows, the fused kernel's backward pass is the slowest part by far.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            logits = self.model([torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files])
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.smoothing)
        self.optimizer_step(loss, self.model.parameters())
        self.average.update_parameters(self.model)
        return {"loss": loss.item()} | self._right((logits.argmax(1) == labels).float())

    def _right(self, right: Float[Tensor, " batch"]) -> dict[str, float]:
        """Accuracy by kind of file."""
        pictures = 2 * self.recipe.pictures
        parts = {"tiff": right[:pictures:2], "png": right[1:pictures:2], "wav": right[pictures:]}
        return {kind: part.mean().item() for kind, part in parts.items() if len(part)}


class Training(trainer.Training[ByteFormer]):
    """The schedule of a recipe.

    Args:
        recipe: of the training.
        corpus: what it trains on.
        config: of the model.
    """

    stage: Stage

    def __init__(self, recipe: Recipe, corpus: Corpus, config: ByteFormerConfig = TINY) -> None:
        torch.manual_seed(recipe.seed)
        self.corpus = corpus
        model = ByteFormer(config, name="byteformer-tiny")
        initialise(model)
        super().__init__(recipe, model)

    def make_stage(self, index: int) -> Stage:
        return Stage(self.recipe, self.model, self.corpus)

    def snapshot(self) -> ByteFormer:
        return trainer.shipped(self.model, self.stage.average.module.state_dict())


def train(recipe: Recipe, out: Path, config: ByteFormerConfig = TINY, checkpoint_seconds: float = 90.0) -> ByteFormer:
    """Train, or go on training, until the schedule ends; ``out`` and a checkpoint are written every ``checkpoint_seconds``."""
    return trainer.run(recipe, out, lambda: Training(recipe, make_corpus(recipe), config), checkpoint_seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the recipe."""
    parser = trainer.recipe_parser(__doc__, Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    options = parser.parse_args(arguments)
    train(Recipe(steps=options.steps, minutes=options.minutes, seed=options.seed), options.out)


if __name__ == "__main__":
    main()

"""The recipe of ``byteformer-tiny``: train a small ByteFormer on files made by this package, on a CPU, in minutes.

    python -m zoo.weights.recipes.byteformer --out weights/byteformer-tiny.safetensors --minutes 10

Seeded and resumable: run the same command again and it goes on from the last checkpoint beside ``--out``. One model learns
pictures from the bytes of TIFF and PNG files and spoken commands from those of WAV files (`file_data`), all of it drawn anew
at every step. The loss is cross-entropy with smoothed labels, as the paper's; what is shipped are running averages.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from zoo.codecs.byteformer import ByteFormer, ByteFormerConfig
from zoo.codecs.byteformer.encodings import image_file
from zoo.hub import write_saved_file
from zoo.media import replacing
from zoo.weights.recipes import file_data
from zoo.weights.recipes.file_data import Clip

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
        recordings: spoken commands, each of which is drawn many times with other paces, places and noises.
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


class Trainer:
    """The model with what training needs around it, in a state that can be saved at any step."""

    def __init__(self, recipe: Recipe, config: ByteFormerConfig = TINY) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.model = ByteFormer(config, name="byteformer-tiny")
        initialise(self.model)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(recipe.average))
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in self.model.parameters() if parameter.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": recipe.decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=recipe.learning_rate,
            fused=True,
        )
        self.step = 0
        self.elapsed = 0.0

    @property
    def progress(self) -> float:
        """Share of the schedule that is done, by steps or by time, whichever is further."""
        by_time = 0.0 if self.recipe.minutes is None else self.elapsed / (60 * self.recipe.minutes)
        return min(1.0, max(self.step / self.recipe.steps, by_time))

    def train_step(self, corpus: Corpus) -> dict[str, float]:
        """One optimiser step; returns the loss, and the accuracy by kind of file."""
        started = time.monotonic()
        rate = self.recipe.learning_rate * min(1.0, (self.step + 1) / self.recipe.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.progress)))
        files, labels = corpus.batch(self.recipe, self.step)
        # Of attention within windows, the fused kernel's backward pass is the slowest part by far.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            logits = self.model([torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files])
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.average.update_parameters(self.model)
        self.step += 1
        self.elapsed += time.monotonic() - started
        right = (logits.argmax(1) == labels).float()
        pictures = 2 * self.recipe.pictures
        parts = {"tiff": right[:pictures:2], "png": right[1:pictures:2], "wav": right[pictures:]}
        return {"loss": loss.item()} | {kind: part.mean().item() for kind, part in parts.items() if len(part)}

    def export(self) -> ByteFormer:
        """The model as it will be shipped: running averages, rounded to half precision, and the fingerprint of these."""
        shipped = ByteFormer(self.model.config, name=self.model.name)
        shipped.load_state_dict({key: tensor.half().float() for key, tensor in self.average.module.state_dict().items()})
        shipped.eval().requires_grad_(False)
        shipped.fingerprint = shipped.compute_fingerprint()
        return shipped

    def save(self, path: Path) -> None:
        """Write a checkpoint to resume from."""
        state = {
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed": self.elapsed,
        }
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint of the same recipe.

        Raises:
            ValueError: it was made by another recipe.
        """
        state = torch.load(path, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise ValueError(f"{path} belongs to another recipe: {state['recipe']}; delete it or use the same settings")
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed = state["step"], state["elapsed"]


def write(model: ByteFormer, path: Path) -> None:
    """Write the file that is shipped."""
    write_saved_file(model, path, dtype=torch.float16)


def train(recipe: Recipe, out: Path, config: ByteFormerConfig = TINY, every: float = 90.0) -> ByteFormer:
    """Train, or go on training, until the schedule ends; every so many seconds ``out`` and a checkpoint are written."""
    trainer = Trainer(recipe, config)
    checkpoint = out.with_suffix(".checkpoint.pt")
    if checkpoint.exists():
        trainer.restore(checkpoint)
    corpus = make_corpus(recipe)
    saved = time.monotonic()
    averages: dict[str, float] = {}
    with tqdm(total=recipe.steps, initial=trainer.step, unit="step", mininterval=10) as bar:
        while trainer.progress < 1:
            for name, value in trainer.train_step(corpus).items():
                averages[name] = 0.98 * averages.get(name, value) + 0.02 * value
            bar.update()
            bar.set_postfix({name: f"{value:.3f}" for name, value in averages.items()}, refresh=False)
            if time.monotonic() - saved > every:
                trainer.save(checkpoint)
                write(trainer.export(), out)
                saved = time.monotonic()
    model = trainer.export()
    write(model, out)
    checkpoint.unlink(missing_ok=True)
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--minutes", type=float, help="end after about so many minutes of training; by steps otherwise")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    options = parser.parse_args(arguments)
    train(Recipe(steps=options.steps, minutes=options.minutes, seed=options.seed), options.out)


if __name__ == "__main__":
    main()

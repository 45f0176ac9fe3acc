"""The recipe of ``wavtokenizer-tiny``: train a small WavTokenizer on audio made by this package, on a CPU, in about an hour.

    python -m zoo.weights.recipes.wavtokenizer --out weights/wavtokenizer-tiny.safetensors --minutes 75

Seeded and resumable: run the same command again and it goes on from the last checkpoint beside ``--out``. The corpus is
espeak-ng speech and synthesised music (`audio_data`), or your own recordings as well with ``--data``. The losses are log-mel
and STFT distances at three resolutions and the codebook commitment; the first steps run without the codebook, which is
then initialised by k-means and learns by moving averages.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from zoo.codecs.wavtokenizer import WavTokenizer, WavTokenizerConfig
from zoo.codecs.wavtokenizer.encoder import Encoder
from zoo.media import AUDIO_EXTENSIONS, expand_paths, read_audio, replacing
from zoo.nn.conv import ReflectConv1d
from zoo.nn.ema_codebook import EMACodebook
from zoo.nn.losses import MelLoss, STFTLoss
from zoo.weights.recipes import audio_data

TINY = WavTokenizerConfig(
    ratios=(8, 5, 4, 2),
    latent_dim=96,
    n_filters=10,
    lstm_layers=2,
    codebook_size=1024,
    dim=192,
    intermediate_dim=512,
    num_layers=8,
    num_bandwidths=1,
)


# Spectral magnitude below which nothing is learned, about 70 dB under full scale: espeak-ng's pauses are digital silence.
AUDIBLE = 1e-2


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result besides the code.

    Attributes:
        steps: length of the schedule in optimiser steps.
        minutes: time after which the schedule has to be at its end, however many steps were done; ``None`` for no limit.
        batch, crop_seconds: crops per step and their length.
        speech_hours, music_minutes: size of the corpus.
        warmup: steps of rising learning rate.
        continuous: steps without quantisation, before the k-means initialisation.
    """

    steps: int = 9_000
    minutes: float | None = None
    batch: int = 12
    crop_seconds: float = 1.0
    speech_hours: float = 1.75
    music_minutes: float = 12.0
    learning_rate: float = 1e-3
    warmup: int = 100
    continuous: int = 300
    commitment: float = 0.5
    seed: int = 3407


class Corpus:
    """Recordings end to end in 16 bits, from which augmented crops are drawn."""

    def __init__(self, recordings: Sequence[Float[Tensor, " _"]]) -> None:
        quiet = torch.zeros(audio_data.SAMPLE_RATE // 10)
        parts = [part for recording in recordings for part in (recording / recording.abs().max().clamp(min=1e-4), quiet)]
        self.samples = torch.cat([(part * 32_000).to(torch.int16) for part in parts])

    def batch(self, count: int, length: int, rng: torch.Generator) -> Float[Tensor, "count length"]:
        """Random crops, each in a room and at a level of its own."""
        starts = torch.randint(len(self.samples) - length, (count,), generator=rng).tolist()
        return torch.stack([audio_data.augment(self.samples[s : s + length].float() / 32_768, rng) for s in starts])


def make_corpus(recipe: Recipe, folders: Sequence[Path]) -> Corpus:
    """Speech, music, and the user's own recordings."""
    hours = recipe.speech_hours
    recordings: list[Tensor] = []
    with tqdm(total=round(hours * 3600), desc="espeak-ng", unit="s") as bar:
        for speech in audio_data.speech_corpus(hours * 3600, recipe.seed):
            recordings.append(speech)
            bar.update(round(len(speech) / audio_data.SAMPLE_RATE))
    composer = np.random.default_rng(recipe.seed)
    recordings += [audio_data.music(composer) for _ in range(round(recipe.music_minutes * 10))]
    for path in expand_paths(folders, AUDIO_EXTENSIONS):
        recordings.append(read_audio(path, sample_rate=audio_data.SAMPLE_RATE, mono=True).waveform[0])
    return Corpus(recordings)


class Trainer:
    """The model with what training needs around it, in a state that can be saved at any step."""

    def __init__(self, recipe: Recipe, config: WavTokenizerConfig = TINY) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.model = WavTokenizer(config, name="wavtokenizer-tiny")
        # A batch has fewer frames than there are codes: the mean running count is 0.9, so upstream's threshold of 2
        # would replace most of the codebook at every step.
        self.codebook = EMACodebook(config.codebook_size, config.latent_dim, dead_below=0.1)
        self.losses = nn.ModuleList(
            [
                MelLoss(resolutions=((512, 128, 60), (1024, 256, 100), (2048, 512, 128)), floor=AUDIBLE),
                STFTLoss(floor=AUDIBLE),
            ]
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=recipe.learning_rate, betas=(0.8, 0.99), fused=True)
        self.rng = torch.Generator().manual_seed(recipe.seed)
        self.step = 0
        self.elapsed = 0.0
        self.recent: list[Tensor] = []

    @property
    def progress(self) -> float:
        """Share of the schedule that is done, by steps or by time, whichever is further."""
        by_time = 0.0 if self.recipe.minutes is None else self.elapsed / (60 * self.recipe.minutes)
        return min(1.0, max(self.step / self.recipe.steps, by_time))

    def train_step(self, waveform: Float[Tensor, "batch samples"]) -> dict[str, float]:
        """One optimiser step; returns the terms of the loss."""
        started = time.monotonic()
        # Dropout draws from the global generator, which no checkpoint holds.
        torch.manual_seed(self.recipe.seed + self.step)
        rate = self.recipe.learning_rate * min(1.0, (self.step + 1) / self.recipe.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * self.progress))

        if self.step == 0:
            scale_encoder(self.model.encoder, waveform)
        latents = self.model.encoder(waveform)
        commitment = latents.new_zeros(())
        if self.step < self.recipe.continuous:
            self.recent = [*self.recent[-39:], latents.detach().flatten(0, 1)]
        else:
            if not bool(self.codebook.inited):
                self.codebook.initialise(torch.cat(self.recent), 25, self.rng)
                self.recent = []
            quantized = self.codebook(latents, self.rng)
            spread = self.codebook.embed.var(dim=0).sum().clamp(min=1e-4) / self.codebook.embed.shape[1]
            commitment = quantized.commitment / spread
            latents = quantized.vectors
        with torch.autocast("cpu", torch.bfloat16):
            estimate = self.model.decode_latents(latents)
        mel, stft = (loss(waveform, estimate) for loss in self.losses)
        total = mel + stft + self.recipe.commitment * commitment
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimizer.step()
        self.step += 1
        self.elapsed += time.monotonic() - started
        return {"mel": mel.item(), "stft": stft.item(), "commit": commitment.item()}

    def export(self) -> WavTokenizer:
        """The model as it will be shipped: weights rounded to half precision, the learned codebook in place."""
        model = WavTokenizer(self.model.config, name=self.model.name)
        model.load_state_dict(self.model.state_dict() | {"codebook.embed": self.codebook.embed})
        for tensor in model.state_dict().values():
            tensor.copy_(tensor.half())
        model.eval().requires_grad_(False)
        model.fingerprint = model.compute_fingerprint()
        return model

    def save(self, path: Path) -> None:
        """Write a checkpoint to resume from."""
        state = {
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "codebook": self.codebook.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": self.rng.get_state(),
            "step": self.step,
            "elapsed": self.elapsed,
            "recent": self.recent,
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
        self.codebook.load_state_dict(state["codebook"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.set_state(state["rng"])
        self.step, self.elapsed, self.recent = state["step"], state["elapsed"], state["recent"]


@torch.no_grad()
def scale_encoder(encoder: Encoder, waveform: Float[Tensor, "batch samples"]) -> None:
    """Scale the initial weights so that every convolution puts out unit variance (LSUV, arXiv 1511.06422).

    PyTorch's defaults shrink the signal at each of the eighteen layers; it arrives at the codebook as a constant with 1.5 %
    of variation, and the first thousand steps would go into mending that.
    """

    def normalise(module: nn.Module, _: object, output: Tensor) -> Tensor:
        assert isinstance(module, ReflectConv1d)
        gain = 1 / output.std()
        module.weight.mul_(gain)
        module.bias.zero_()
        return (output - output.mean(dim=(0, 1))) * gain

    layers = [module for module in encoder.modules() if isinstance(module, ReflectConv1d)]
    for layer in layers:
        hook = layer.register_forward_hook(normalise)
        encoder(waveform)
        hook.remove()


def write_embedded(model: WavTokenizer, path: Path) -> None:
    """Write the file that is shipped: half precision, with the configuration in its metadata."""
    config = {
        "zoo": 1,
        "family": model.family,
        "name": model.name,
        "fingerprint": model.fingerprint,
        "config": asdict(model.config),
    }
    tensors = {key: tensor.half().contiguous() for key, tensor in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"zoo": json.dumps(config)})


def train(recipe: Recipe, out: Path, folders: Sequence[Path] = (), config: WavTokenizerConfig = TINY) -> WavTokenizer:
    """Train, or go on training, until the schedule ends; writes ``out`` and a checkpoint beside it every few minutes."""
    trainer = Trainer(recipe, config)
    checkpoint = out.with_suffix(".checkpoint.pt")
    if checkpoint.exists():
        trainer.restore(checkpoint)
    corpus = make_corpus(recipe, folders)
    length = round(recipe.crop_seconds * config.sample_rate)
    saved = time.monotonic()
    averages: dict[str, float] = {}

    with tqdm(total=recipe.steps, initial=trainer.step, unit="step", mininterval=10) as bar:
        while trainer.progress < 1:
            waveform = corpus.batch(recipe.batch, length, trainer.rng)
            for name, value in trainer.train_step(waveform).items():
                averages[name] = 0.98 * averages.get(name, value) + 0.02 * value
            bar.update()
            bar.set_postfix({name: f"{value:.3f}" for name, value in averages.items()}, refresh=False)
            if time.monotonic() - saved > 180:
                trainer.save(checkpoint)
                write_embedded(trainer.export(), out)
                saved = time.monotonic()
    model = trainer.export()
    write_embedded(model, out)
    checkpoint.unlink(missing_ok=True)
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--data", type=Path, action="append", default=[], help="folder of your own recordings")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    options = parser.parse_args(arguments)
    recipe = Recipe(steps=options.steps, minutes=options.minutes, seed=options.seed)
    train(recipe, options.out, options.data)


if __name__ == "__main__":
    main()

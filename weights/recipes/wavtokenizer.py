"""The recipe of ``wavtokenizer-tiny``: train a small WavTokenizer on audio made by this package, on a CPU, in about an hour.

    python -m zoo.weights.recipes.wavtokenizer --out weights/wavtokenizer-tiny.safetensors --minutes 75

Seeded and resumable: run the same command again and it goes on from the last checkpoint beside ``--out``. The corpus is
espeak-ng speech and synthesised music (`audio_data`), or your own recordings as well with ``--data``. The losses are log-mel
and STFT distances at three resolutions and the codebook commitment; the first steps run without the codebook, which is
then initialised by k-means and learns by moving averages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from zoo.codecs.wavtokenizer import WavTokenizer, WavTokenizerConfig
from zoo.codecs.wavtokenizer.encoder import Encoder
from zoo.media import AUDIO_EXTENSIONS, expand_paths, read_audio
from zoo.nn.conv import ReflectConv1d
from zoo.nn.ema_codebook import EMACodebook
from zoo.nn.losses import MelLoss, STFTLoss
from zoo.weights.data import audio as audio_data
from zoo.weights.recipes import trainer

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


class Stage(trainer.Stage):
    """The only stage: encoder, codebook and decoder together.

    Args:
        recipe: of the training.
        model: what is trained.
        corpus: what on.
    """

    def __init__(self, recipe: Recipe, model: WavTokenizer, corpus: Corpus) -> None:
        self.recipe, self.model, self.corpus = recipe, model, corpus
        self.crop = round(recipe.crop_seconds * model.config.sample_rate)
        # A batch has fewer frames than there are codes: the mean running count is 0.9, so upstream's threshold of 2
        # would replace most of the codebook at every step.
        self.codebook = EMACodebook(model.config.codebook_size, model.config.latent_dim, dead_below=0.1)
        self.losses = nn.ModuleList(
            [
                MelLoss(resolutions=((512, 128, 60), (1024, 256, 100), (2048, 512, 128)), floor=AUDIBLE),
                STFTLoss(floor=AUDIBLE),
            ]
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.8, 0.99), fused=True)
        parts = {"model": model, "codebook": self.codebook}
        rng = torch.Generator().manual_seed(recipe.seed)
        super().__init__("wavtokenizer-tiny", recipe.steps, recipe.minutes, [optimizer], parts, rng)
        self.recent: list[Tensor] = []

    def update(self) -> dict[str, float]:
        waveform = self.corpus.batch(self.recipe.batch, self.crop, self.rng)
        # Dropout draws from the global generator: a step draws the same whenever it is taken.
        torch.manual_seed(self.recipe.seed + self.step)
        self.set_rates(self.recipe.warmup)
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
        self.optimizer_step(mel + stft + self.recipe.commitment * commitment, self.model.parameters(), max_norm=5.0)
        return {"mel": mel.item(), "stft": stft.item(), "commit": commitment.item()}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"recent": self.recent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.recent = state["recent"]


class Training(trainer.Training[WavTokenizer]):
    """The schedule of a recipe.

    Args:
        recipe: of the training.
        corpus: what it trains on.
        config: of the model.
    """

    stage: Stage

    def __init__(self, recipe: Recipe, corpus: Corpus, config: WavTokenizerConfig = TINY) -> None:
        torch.manual_seed(recipe.seed)
        self.corpus = corpus
        super().__init__(recipe, WavTokenizer(config, name="wavtokenizer-tiny"))

    def make_stage(self, index: int) -> Stage:
        return Stage(self.recipe, self.model, self.corpus)

    def snapshot(self) -> WavTokenizer:
        return trainer.shipped(self.model, self.model.state_dict() | {"codebook.embed": self.stage.codebook.embed})


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


def train(
    recipe: Recipe,
    out: Path,
    folders: Sequence[Path] = (),
    config: WavTokenizerConfig = TINY,
    checkpoint_seconds: float = 180.0,
) -> WavTokenizer:
    """Train, or go on training, until the schedule ends; ``out`` and a checkpoint are written every ``checkpoint_seconds``."""
    return trainer.run(recipe, out, lambda: Training(recipe, make_corpus(recipe, folders), config), checkpoint_seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the recipe."""
    parser = trainer.recipe_parser(__doc__, Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--data", type=Path, action="append", default=[], help="folder of your own recordings")
    options = parser.parse_args(arguments)
    train(Recipe(steps=options.steps, minutes=options.minutes, seed=options.seed), options.out, options.data)


if __name__ == "__main__":
    main()

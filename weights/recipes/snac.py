"""The recipe of ``snac-tiny``: train a small SNAC on audio made by this package, on a CPU, in about an hour.

    python -m zoo.weights.recipes.snac --out weights/snac-tiny.safetensors --minutes 60

Seeded and resumable: run the same command again and it goes on from the last checkpoint beside ``--out``. The corpus is
espeak-ng speech and synthesised music (`audio_data`), or your own recordings as well with ``--data``. The losses are log-mel
and STFT distances at three resolutions and the commitment of each level. The first steps run without codebooks, which
are then initialised by k-means and learn by moving averages. There are no discriminators.

Codes have unit length here, so that the smallest angle, by which SNAC chooses, is the smallest distance as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.codecs.snac import SNAC, SNACConfig
from zoo.codecs.snac.decoder import Decoder, DecoderStage, Upsample
from zoo.codecs.snac.encoder import Encoder, EncoderStage
from zoo.codecs.snac.layers import Conv, Pointwise, ResidualUnit, Snake
from zoo.nn.ema_codebook import EMACodebook
from zoo.nn.losses import MelLoss, STFTLoss
from zoo.weights.recipes import trainer
from zoo.weights.recipes.wavtokenizer import AUDIBLE, Corpus, make_corpus
from zoo.weights.recipes.wavtokenizer import Recipe as AudioRecipe

TINY = SNACConfig(
    encoder_dim=16,
    encoder_rates=(4, 4, 4, 8),
    decoder_dim=256,
    decoder_rates=(8, 4, 4, 4),
    codebook_size=512,
)

Signal = Float[Tensor, "batch _channels _time"]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result besides the code and your own recordings.

    Attributes:
        steps: length of the schedule in optimiser steps.
        minutes: time after which the schedule has to be at its end, however many steps were done; ``None`` for no limit.
        batch: crops per step.
        crop_frames: coarse frames of a crop.
        speech_hours, music_minutes: size of the corpus.
        warmup: steps of rising learning rate.
        continuous: steps without quantisation, before the k-means initialisation.
        commitment: weight of the commitment of all levels together.
    """

    steps: int = 5_000
    minutes: float | None = None
    batch: int = 4
    crop_frames: int = 9
    speech_hours: float = 0.75
    music_minutes: float = 6.0
    learning_rate: float = 1.5e-3
    warmup: int = 100
    continuous: int = 250
    commitment: float = 0.5
    seed: int = 3407


# ------------------------------------------------------------------------------------------------------------------ layers

# Training goes past the forward methods to the weights, with channels in front of time: a dilated depthwise convolution takes a
# tenth of the time backwards as one over an image of rows that are ``dilation`` samples long.


class _Snake(torch.autograd.Function):
    """`Snake` with one sine backwards, of twice the angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: Tensor) -> Tensor:
        squared = (x * rate).sin_().square_()
        ctx.save_for_backward(x, rate, squared)
        return torch.addcmul(x, squared, 1 / (rate + 1e-9))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, rate, squared = ctx.saved_tensors
        [gradient] = gradients
        # The derivative of sin(a x)^2 / a is sin(2 a x) by x, and x sin(2 a x) / a - sin(a x)^2 / a^2 by the rate a.
        inverse = 1 / (rate + 1e-9)
        by_signal = (x * (2 * rate)).sin_().mul_(gradient)
        by_rate = (x * by_signal).sum((0, 2), keepdim=True)[0] - inverse * (squared * gradient).sum((0, 2), keepdim=True)[0]
        return by_signal.add_(gradient), by_rate * inverse


def snake(module: Snake, x: Signal) -> Signal:
    """``x + sin(a x)^2 / a``."""
    found: Tensor = _Snake.apply(x, module.alpha[:, None])
    return found


def convolution(module: Conv, x: Signal) -> Signal:
    """A convolution of any stride and dilation."""
    [dilation], [padding], [stride] = module.dilation, cast(tuple[int, ...], module.padding), module.stride
    if dilation == 1:
        return F.conv1d(x, module.weight, module.bias, stride, padding, groups=module.groups)
    rows = x.unflatten(2, (-1, dilation))
    halo = padding // dilation
    return F.conv2d(rows, module.weight[..., None], module.bias, padding=(halo, 0), groups=module.groups).flatten(2)


def pointwise(module: Pointwise | nn.Linear, x: Signal) -> Signal:
    """A matrix product at each step."""
    return F.conv1d(x, module.weight[..., None], module.bias)


def unit(module: ResidualUnit, x: Signal) -> Signal:
    """A residual unit."""
    return x + pointwise(module.out, snake(module.snake2, convolution(module.mix, snake(module.snake1, x))))


def upsample(module: Upsample, x: Signal) -> Signal:
    """The transposed convolution."""
    outputs = len(module.bias)
    weight = module.spread.weight.unflatten(0, (2 * module.stride, outputs)).permute(2, 1, 0)
    found = F.conv_transpose1d(x, weight, module.bias, module.stride)
    return found[:, :, module.padding : module.padding + x.shape[2] * module.stride]


def encode(encoder: Encoder, waveform: Float[Tensor, "batch samples"]) -> Signal:
    """Latents of whole waveforms, for lengths that every dilation divides at every rate."""
    x = convolution(encoder.stem, waveform[:, None])
    for module in encoder.stages:
        stage = cast(EncoderStage, module)
        for own in stage.units:
            x = unit(cast(ResidualUnit, own), x)
        x = convolution(stage.down, snake(stage.snake, x))
    return convolution(encoder.out, x)


def decode(decoder: Decoder, latents: Signal, rng: torch.Generator) -> Float[Tensor, "batch samples"]:
    """Waveforms of latents, with noise from a generator."""
    x = convolution(decoder.stem, latents)
    x = x if decoder.widen is None else pointwise(decoder.widen, x)
    for module in decoder.stages:
        stage = cast(DecoderStage, module)
        x = upsample(stage.up, snake(stage.snake, x))
        if stage.noise is not None:
            x = x + torch.randn(len(x), 1, x.shape[2], generator=rng) * pointwise(stage.noise, x)
        for own in stage.units:
            x = unit(cast(ResidualUnit, own), x)
    return torch.tanh(convolution(decoder.out, snake(decoder.snake, x))[:, 0])


@torch.no_grad()
def scale(model: SNAC, waveform: Float[Tensor, "batch samples"]) -> None:
    """Scale the initial weights so that every convolution puts out unit variance (LSUV, arXiv 1511.06422).

    Residual units start at a fifth of that, and noise at none.
    """
    for module in model.modules():
        if isinstance(module, (Conv, Pointwise, Upsample)) and module.bias is not None:
            module.bias.zero_()
    stem = model.encoder.stem
    x = _scaled(stem.weight, convolution(stem, waveform[:, None]))
    for module in model.encoder.stages:
        stage = cast(EncoderStage, module)
        x = _scaled_units(stage.units, x)
        x = _scaled(stage.down.weight, convolution(stage.down, snake(stage.snake, x)))
    x = _scaled(model.encoder.out.weight, convolution(model.encoder.out, x))
    decoder = model.decoder
    x = _scaled(decoder.stem.weight, convolution(decoder.stem, x))
    if decoder.widen is not None:
        x = _scaled(decoder.widen.weight, pointwise(decoder.widen, x))
    for module in decoder.stages:
        own = cast(DecoderStage, module)
        x = _scaled(own.up.spread.weight, upsample(own.up, snake(own.snake, x)))
        if own.noise is not None:
            own.noise.weight.zero_()
        x = _scaled_units(own.units, x)
    _scaled(decoder.out.weight, convolution(decoder.out, snake(decoder.snake, x)), 0.1)


def _scaled_units(units: nn.ModuleList, x: Signal) -> Signal:
    for module in units:
        own = cast(ResidualUnit, module)
        y = _scaled(own.mix.weight, convolution(own.mix, snake(own.snake1, x)))
        x = x + _scaled(own.out.weight, pointwise(own.out, snake(own.snake2, y)), 0.2)
    return x


def _scaled(weight: Tensor, output: Signal, wanted: float = 1.0) -> Signal:
    """Scale a weight, and what it gave, to a deviation."""
    gain = wanted / output.std()
    weight.mul_(gain)
    return output * gain


# ---------------------------------------------------------------------------------------------------------------- training


class Stage(trainer.Stage):
    """The only stage: encoder, codebooks and decoder together.

    Args:
        recipe: of the training.
        model: what is trained.
        corpus: what on.
    """

    def __init__(self, recipe: Recipe, model: SNAC, corpus: Corpus) -> None:
        self.recipe, self.model, self.corpus = recipe, model, corpus
        self.crop = recipe.crop_frames * model.config.coarse_hop
        config = model.config
        # A batch has fewer coarse frames than there are codes.
        self.codebooks = nn.ModuleList(
            [EMACodebook(config.codebook_size, config.codebook_dim, dead_below=0.02) for _ in config.vq_strides]
        )
        self.losses = nn.ModuleList(
            [
                MelLoss(resolutions=((512, 128, 60), (1024, 256, 100), (2048, 512, 128)), floor=AUDIBLE),
                STFTLoss(floor=AUDIBLE),
            ]
        )
        moving = [parameter for name, parameter in model.named_parameters() if not name.endswith(".codebook")]
        self.moving = moving
        optimizer = torch.optim.AdamW(moving, lr=recipe.learning_rate, betas=(0.8, 0.99), weight_decay=0.0, fused=True)
        parts = {"model": model, "codebooks": self.codebooks}
        super().__init__(
            "snac-tiny", recipe.steps, recipe.minutes, [optimizer], parts, torch.Generator().manual_seed(recipe.seed)
        )
        self.recent: list[list[Tensor]] = [[] for _ in config.vq_strides]

    def update(self) -> dict[str, float]:
        waveform = self.corpus.batch(self.recipe.batch, self.crop, self.rng)
        self.set_rates(self.recipe.warmup)
        if self.step == 0:
            scale(self.model, waveform)
        if self.step == self.recipe.continuous:
            self._begin_codebooks()
        latents, commitment = self.quantize(encode(self.model.encoder, waveform))
        estimate = decode(self.model.decoder, latents, self.rng)
        mel, stft = (loss(waveform, estimate) for loss in self.losses)
        self.optimizer_step(mel + stft + self.recipe.commitment * commitment, self.moving, max_norm=5.0)
        return {"mel": mel.item(), "stft": stft.item(), "commit": commitment.item()}

    def _begin_codebooks(self) -> None:
        for codebook, recent in zip(self.codebooks, self.recent, strict=True):
            cast(EMACodebook, codebook).initialise(torch.cat(recent), 25, self.rng)
        self.recent = [[] for _ in self.recent]

    def quantize(self, latents: Signal) -> tuple[Signal, Float[Tensor, ""]]:
        """Vectors of the codes of all levels, with a straight-through gradient, and the commitment.

        Before there are codebooks, the projections of each level go on as they are, but for their length.
        """
        total, commitment = torch.zeros_like(latents), latents.new_zeros(())
        for index, stride in enumerate(self.model.config.vq_strides):
            level = self.model.quantizer.level(index)
            pooled = F.avg_pool1d(latents - total, stride)
            vectors = F.normalize(pointwise(level.in_proj, pooled), dim=1).transpose(1, 2)
            if self.step < self.recipe.continuous:
                self.recent[index] = [*self.recent[index][-99:], vectors.detach().flatten(0, 1)]
            else:
                codebook = cast(EMACodebook, self.codebooks[index])
                quantized = codebook(vectors, self.rng)
                # A mean of vectors of unit length is shorter.
                codebook.embed.copy_(F.normalize(codebook.embed, dim=1))
                commitment = commitment + quantized.commitment * vectors.shape[2]
                vectors = quantized.vectors
            total = total + pointwise(level.out_proj, vectors.transpose(1, 2)).repeat_interleave(stride, dim=2)
        return total, commitment / len(self.codebooks)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"recent": self.recent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.recent = state["recent"]


class Training(trainer.Training[SNAC]):
    """The schedule of a recipe.

    Args:
        recipe: of the training.
        corpus: what it trains on.
        config: of the model.
    """

    stage: Stage

    def __init__(self, recipe: Recipe, corpus: Corpus, config: SNACConfig = TINY) -> None:
        torch.manual_seed(recipe.seed)
        self.corpus = corpus
        super().__init__(recipe, SNAC(config, name="snac-tiny"))

    def make_stage(self, index: int) -> Stage:
        return Stage(self.recipe, self.model, self.corpus)

    def snapshot(self) -> SNAC:
        books = {
            f"quantizer.levels.{index}.codebook": cast(EMACodebook, codebook).embed
            for index, codebook in enumerate(self.stage.codebooks)
        }
        return trainer.shipped(self.model, self.model.state_dict() | books)


def train(
    recipe: Recipe,
    out: Path,
    folders: Sequence[Path] = (),
    config: SNACConfig = TINY,
    checkpoint_seconds: float = 180.0,
) -> SNAC:
    """Train, or go on training, until the schedule ends; ``out`` and a checkpoint are written every ``checkpoint_seconds``."""
    sounds = AudioRecipe(speech_hours=recipe.speech_hours, music_minutes=recipe.music_minutes, seed=recipe.seed)
    return trainer.run(recipe, out, lambda: Training(recipe, make_corpus(sounds, folders), config), checkpoint_seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the recipe."""
    parser = trainer.recipe_parser(__doc__, Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--data", type=Path, action="append", default=[], help="folder of your own recordings")
    options = parser.parse_args(arguments)
    train(Recipe(steps=options.steps, minutes=options.minutes, seed=options.seed), options.out, options.data)


if __name__ == "__main__":
    main()

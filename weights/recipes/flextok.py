"""The recipe of ``flextok-tiny``: train a small FlexTok on pictures made by this package.

    python -m zoo.weights.recipes.flextok --out weights/flextok-tiny.safetensors --minutes 75
    python -m zoo.weights.recipes.flextok --out weights/flextok-tiny.safetensors --minutes 8 --device cuda

Seeded and resumable: run the same command again and it goes on from the last checkpoint beside ``--out``. The pictures are
those of `image_data`; no photograph is used. It starts from the closed forms of `flextok_start`. Then three stages:

1. Encoder, quantizer and flow, jointly on cached latents, by the flow's loss alone with nested dropout. Most of the noise
   levels are t = 1: there the velocity is the noise minus the mean of the latents, which a single step of sampling gives.
   Latents are nearly linear in pixels, so pictures are mirrored, lit and coloured differently as latents.
2. The same at lower rates, where errors at t = 1 count by their logarithm: pictures of low contrast and small errors get
   the weight that PSNR gives them.
3. The autoencoder's decoder, on what the flow makes of 1 to 64 tokens in one step, and on clean latents.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from zoo.codecs.flextok import FlexTok, FlexTokConfig
from zoo.codecs.flextok.flow import noise_levels, prefix_ladder
from zoo.nn.vae import VAE
from zoo.weights.data.image import Images, Pictures, as_images, make_pictures, random_rows
from zoo.weights.recipes import trainer
from zoo.weights.recipes.closed_form import least_squares
from zoo.weights.recipes.flextok_start import initialise, initialise_autoencoder, prefix_condition

TINY = FlexTokConfig(
    vae_widths=(16, 32, 48, 64),
    vae_layers_per_block=1,
    vae_groups=1,
    scaling_factor=1.0,
    grid=(8, 8),
    registers=64,
    encoder_dim=160,
    encoder_depth=3,
    encoder_head_dim=32,
    decoder_dim=160,
    decoder_depth=3,
    decoder_head_dim=32,
    max_timestep=100.0,
    steps=1,
    guidance=1.0,
)

LatentTensor = Float[Tensor, "batch channels rows columns"]
#: Computes the loss of a part of a batch, and its terms for the log.
Shard = Callable[[], tuple[Float[Tensor, ""], dict[str, float]]]

# How many pictures the closed forms are taken from.
START_PICTURES = 512
# Pictures that one thread takes at a time, in the stage of the autoencoder.
SHARD = 8


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result besides the code.

    Attributes:
        pictures: size of the training set.
        flow_steps, balance_steps, tune_steps: lengths of the three schedules in optimiser steps.
        flow_minutes, balance_minutes, tune_minutes: times after which they have to be at their ends, however many steps were
            done.
        flow_batch, flow_lengths: pictures per step of the flow and prefix length; prefix lengths per step, 1, 2, 4, … in turn.
        tune_batch, crop: crops per step of the autoencoder, and their side in pixels.
        flow_rate, flow_other_rate, tune_rate: highest learning rates; of the flow for matrices of blocks and for the rest.
        balance_share: highest learning rates of the second stage, as a share of the first one's.
        warmup: steps of rising learning rate.
        ema_decay: share of the running average of the weights that remains after a step, in each stage.
        null: share of the items below t = 1 that are trained without condition.
        pure_noise: share of items at t = 1.
        threads: that train on a CPU, each on its part of a batch.
    """

    pictures: int = 16_000
    flow_steps: int = 6_000
    balance_steps: int = 2_000
    tune_steps: int = 1_000
    flow_minutes: float | None = None
    balance_minutes: float | None = None
    tune_minutes: float | None = None
    flow_batch: int = 24
    flow_lengths: int = 2
    tune_batch: int = 16
    crop: int = 64
    flow_rate: float = 2e-3
    flow_other_rate: float = 5e-4
    balance_share: float = 0.35
    tune_rate: float = 1e-4
    warmup: int = 50
    ema_decay: tuple[float, float, float] = (0.995, 0.995, 0.99)
    null: float = 0.3
    pure_noise: float = 0.85
    threads: int = 2
    seed: int = 3407


#: For a GPU, which takes more pictures at a time, through all prefix lengths in every step.
ON_GPU = Recipe(
    flow_batch=128, flow_lengths=7, tune_batch=128, flow_steps=20_000, balance_steps=4_000, tune_steps=4_000, threads=1
)


# ---------------------------------------------------------------------------------------------------------------- stages


class Stage(trainer.Stage):
    """One schedule of training, each step of it by several threads.

    Args:
        recipe: of the whole training.
        module: what is trained; its running average is what later stages and the file get.
        steps, minutes: length of the schedule, whichever is over first.
        ema_decay: share of the running average that remains after a step.
        optimizers: of the module's parameters, at their highest learning rates.
    """

    name: str
    dtype = torch.bfloat16

    def __init__(
        self,
        recipe: Recipe,
        module: nn.Module,
        steps: int,
        minutes: float | None,
        ema_decay: float,
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> None:
        self.recipe, self.module = recipe, module
        self.device = next(module.parameters()).device
        self.average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.pool = ThreadPoolExecutor(recipe.threads)
        parts = {"module": module, "average": self.average}
        rng = torch.Generator().manual_seed(recipe.seed)
        super().__init__(self.name, steps, minutes, optimizers, parts, rng)

    @abstractmethod
    def shards(self) -> list[Shard]:
        """The next batch in parts: what is random is drawn here, what costs time waits for the call."""

    def finish(self) -> None:
        """Put the running average in the place of the module's weights."""
        self.module.load_state_dict(self.average.module.state_dict())

    def update(self) -> dict[str, float]:
        self.set_rates(self.recipe.warmup)
        shards = self.shards()
        # Each thread computes whole shards. Layers this small gain nothing from being split between threads themselves.
        results = list(self.pool.map(self._gradients, shards))
        for parameter, *gradients in zip(self.parameters, *(gradients for gradients, _ in results), strict=True):
            parameter.grad = torch.stack(gradients).mean(dim=0)
        terms = {name: value for _, terms in results for name, value in terms.items()}
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.average.update_parameters(self.module)
        return terms

    def _gradients(self, shard: Shard) -> tuple[tuple[Tensor, ...], dict[str, float]]:
        # On a CPU, the fused attention takes longer backwards than its two products.
        backends = [SDPBackend.MATH] if self.device.type == "cpu" else list(SDPBackend.__members__.values())[1:]
        with sdpa_kernel(backends):
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss, terms = shard()
            return torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True), terms


# Orthonormal axes of colour: grey, red to blue, green to magenta.
OPPONENTS = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-0.5, 1.0, -0.5]])
OPPONENTS = OPPONENTS / OPPONENTS.norm(dim=1, keepdim=True)


def picture_loss(estimate: Images, target: Images) -> Float[Tensor, ""]:
    """Mean absolute error at five scales, and of the differences between neighbours at the finest three.

    Errors of colour weigh twice as much as those of grey: most colours are dull, and without the weight a short training
    learns black and white pictures only.
    """
    axes = (OPPONENTS * torch.tensor([[1.0], [2.0], [2.0]])).to(target.device)
    difference = torch.einsum("oc,bchw->bohw", axes, estimate - target)
    loss = difference.abs().mean()
    for scale in range(4):
        if scale < 3:
            loss = loss + 0.5 * (difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean())
        difference = F.avg_pool2d(difference, 2)
        loss = loss + difference.abs().mean()
    return loss


# Both halves of the autoencoder run channels last, which is quicker, except that the backward pass of PyTorch's group norm
# takes as long as all convolutions in that layout. Training goes past them to the layers, in the other layout.


def pixels(vae: VAE, latents: LatentTensor) -> Images:
    """Pictures of unscaled latents."""
    images: Tensor = vae.decoder.network(vae.decoder.post_quant_conv(latents)).float()
    return images


def encode_all(vae: VAE, pictures: Pictures, threads: int = 2) -> Float[Tensor, "count channels rows columns"]:
    """Means of the latents of many pictures, in half precision."""

    @torch.inference_mode()
    def encode(first: int) -> LatentTensor:
        mean: Tensor = vae.encoder(as_images(pictures[first : first + 32].copy()))[0]
        return mean.half()

    with ThreadPoolExecutor(threads) as pool:
        return torch.cat(list(pool.map(encode, range(0, len(pictures), 32)))).clone()


class LatentAugmentation:
    """Mirrors pictures and changes their light, contrast and colours, all on their latents.

    Latents are a linear map of cells of pixels, and so is what changes here.

    Args:
        vae: gives the latents.
        pictures: a sample that the map is found from.
    """

    def __init__(self, vae: VAE, pictures: Pictures) -> None:
        latents = encode_all(vae, pictures).float()
        self.cell = pictures.shape[2] // latents.shape[2]
        cells = as_images(np.ascontiguousarray(pictures)).unfold(2, self.cell, self.cell).unfold(3, self.cell, self.cell)
        weight, self.mean = least_squares(
            latents.permute(0, 2, 3, 1).flatten(0, 2), cells.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
        )
        self.to_pixels = weight.view(3, -1, latents.shape[1])
        self.to_latents = torch.linalg.pinv(weight).view(latents.shape[1], 3, -1)
        mirrored = weight.view(3, self.cell, self.cell, -1).flip(2).flatten(0, 2)
        self.mirror = torch.linalg.pinv(weight) @ mirrored

    def __call__(self, latents: LatentTensor, generator: torch.Generator) -> LatentTensor:
        """Each item changed in its own way."""
        count = len(latents)

        def normal(spread: float, columns: int) -> Float[Tensor, "count columns"]:
            return spread * torch.randn(count, columns, generator=generator)

        contrast, saturation = normal(0.35, 1).exp(), normal(0.5, 1).exp()
        strengths = contrast * torch.cat([torch.ones_like(saturation), saturation, saturation], dim=1)
        colour = torch.einsum("oi,no,oj->nij", OPPONENTS, strengths, OPPONENTS)
        shift = normal(0.15, 1) + normal(0.06, 3)
        mean = self.mean.view(3, -1)
        matrix = torch.einsum("aip,nij,jpb->nab", self.to_latents, colour, self.to_pixels)
        moved = torch.einsum("nij,jp->nip", colour, mean) + shift[:, :, None] - mean
        bias = torch.einsum("aip,nip->na", self.to_latents, moved)
        flipped = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
        latents = torch.where(flipped, torch.einsum("ab,nbrc->narc", self.mirror, latents.flip(3)), latents)
        return torch.einsum("nab,nbrc->narc", matrix, latents) + bias[:, :, None, None]


class FlowStage(Stage):
    """Encoder, quantizer and flow together, on the latents of all pictures."""

    name = "flow"

    def __init__(self, recipe: Recipe, model: FlexTok, pictures: Pictures, latents: LatentTensor) -> None:
        trained = nn.ModuleDict({"encoder": model.encoder, "decoder": model.decoder})
        steps, minutes, ema_decay, share = self.schedule(recipe)
        chosen = optimizers(trained, share * recipe.flow_rate, share * recipe.flow_other_rate)
        super().__init__(recipe, trained, steps, minutes, ema_decay, chosen)
        self.model, self.latents = model, latents
        self.augment = LatentAugmentation(model.vae, pictures[:START_PICTURES])

    @staticmethod
    def schedule(recipe: Recipe) -> tuple[int, float | None, float, float]:
        """Steps, minutes, running average, and share of the flow's learning rates."""
        return recipe.flow_steps, recipe.flow_minutes, recipe.ema_decay[0], 1.0

    def shards(self) -> list[Shard]:
        lengths = [0, *prefix_ladder(self.model.config.registers)]
        shards: list[Shard] = []
        for turn in range(self.step * self.recipe.flow_lengths, (self.step + 1) * self.recipe.flow_lengths):
            place = turn % (len(lengths) - 1)
            shorter, length = lengths[place : place + 2]
            # Lengths between the powers of two get a quarter of the steps.
            count = length if random_rows(1, 4, self.rng)[0] else shorter + 1 + random_rows(1, length - shorter, self.rng)[0]
            shards.append(partial(self.losses, f"k{length}", count, *self.draws()))
        return shards

    def draws(self) -> tuple[LatentTensor, LatentTensor, Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """Latents, noise, noise levels and which items get no condition."""
        batch = self.recipe.flow_batch
        latents = self.augment(self.latents[random_rows(batch, len(self.latents), self.rng)].float(), self.rng)
        pure, uniform = round(batch * self.recipe.pure_noise), torch.rand(batch, generator=self.rng)
        t = noise_levels(uniform, self.model.config)
        t[:pure] = 1.0
        null = (torch.rand(batch, generator=self.rng) < self.recipe.null) & (t < 1)
        noise = torch.randn(latents.shape, generator=self.rng)
        return latents.to(self.device), noise.to(self.device), t.to(self.device), null.to(self.device)

    def losses(
        self,
        name: str,
        count: int,
        latents: LatentTensor,
        noise: LatentTensor,
        t: Float[Tensor, " batch"],
        null: Bool[Tensor, " batch"],
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """The flow's loss with prefixes of one length."""
        model, level = self.model, t[:, None, None, None]
        codes = model.fsq(model.encoder(latents, count))
        condition = prefix_condition(model.decoder, codes, null)
        velocity = model.decoder(level * noise + (1 - level) * latents, model.decoder.timestep(t), condition)
        errors = (velocity.float() - (noise - latents)).square().mean(dim=(1, 2, 3))
        return self.weighed(errors, t).mean(), {name: errors[t == 1].mean().item(), "flow": errors[t < 1].mean().item()}

    def weighed(self, errors: Float[Tensor, " batch"], t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Share of each item's mean square error that is minimised."""
        return errors


class BalanceStage(FlowStage):
    """The same, with the logarithms of errors at t = 1."""

    name = "balance"

    #: About what the autoencoder loses itself, on the scale of the latents.
    FLOOR = 0.02

    @staticmethod
    def schedule(recipe: Recipe) -> tuple[int, float | None, float, float]:
        return recipe.balance_steps, recipe.balance_minutes, recipe.ema_decay[1], recipe.balance_share

    def weighed(self, errors: Float[Tensor, " batch"], t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        return torch.where(t == 1, (errors + self.FLOOR).log(), errors)


def optimizers(module: nn.Module, rate: float, other_rate: float) -> list[torch.optim.Optimizer]:
    """Muon (orthogonalised momentum) for the matrices of the blocks, AdamW for everything else."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    matrices = [parameter for name, parameter in named if ".blocks." in name and parameter.ndim == 2]
    others = [parameter for name, parameter in named if not (".blocks." in name and parameter.ndim == 2)]
    return trainer.muon_and_adamw(matrices, others, rate, other_rate)


class TuneStage(Stage):
    """The autoencoder's decoder on crops of latents: half of them clean, half as one step of the flow gives them.

    Every other shard is decoded in bfloat16: the layers that it starts from subtract constants that are large beside what is
    left, and would not bear reduced precision otherwise.
    """

    name = "decoder"
    dtype = torch.float32

    def __init__(self, recipe: Recipe, model: FlexTok, pictures: Pictures, latents: LatentTensor) -> None:
        decoder = model.vae.decoder
        optimizer = torch.optim.AdamW(decoder.parameters(), recipe.tune_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        super().__init__(recipe, decoder, recipe.tune_steps, recipe.tune_minutes, recipe.ema_decay[2], [optimizer])
        self.model, self.pictures, self.latents = model, pictures, latents

    def shards(self) -> list[Shard]:
        lengths = list(prefix_ladder(self.model.config.registers))
        shards: list[Shard] = []
        for number in range(self.recipe.tune_batch // SHARD):
            rows, count = random_rows(SHARD, len(self.latents), self.rng), lengths[random_rows(1, len(lengths), self.rng)[0]]
            latents = self.latents[rows].float()
            noise = torch.randn(SHARD // 2, *latents.shape[1:], generator=self.rng)
            room = latents.shape[2] - self.recipe.crop // self.model.config.vae.factor + 1
            corner = random_rows(2, room, self.rng)
            images = as_images(self.pictures[rows]).to(self.device)
            draws = images, latents.to(self.device), count, noise.to(self.device), corner
            shards.append(partial(self.losses, *draws, reduced=number % 2 == 1))
        return shards

    def losses(
        self,
        images: Images,
        latents: LatentTensor,
        count: int,
        noise: Float[Tensor, "estimates channels rows columns"],
        corner: list[int],
        reduced: bool,
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Clean latents have to give sharp pictures, estimates those with the least squared error."""
        factor, clean = self.model.config.vae.factor, len(latents) - len(noise)
        latents = torch.cat([latents[:clean], self.estimates(latents[clean:], count, noise)])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=reduced):
            estimate = pixels(self.model.vae, window(latents, corner, self.recipe.crop // factor))
        targets = window(images, [factor * first for first in corner], self.recipe.crop)
        clear = picture_loss(estimate[:clean], targets[:clean])
        coarse = F.mse_loss(estimate[clean:], targets[clean:])
        return clear + 8 * coarse, {"clear": clear.item(), "coarse": coarse.item()}

    @torch.no_grad()
    def estimates(self, latents: LatentTensor, count: int, noise: LatentTensor) -> LatentTensor:
        """Latents of one step from noise, given a prefix of the tokens."""
        model = self.model
        codes = model.fsq(model.encoder(latents, count))
        condition = prefix_condition(model.decoder, codes, None)
        velocity = model.decoder(noise, model.decoder.timestep(noise.new_ones(len(codes))), condition)
        return noise - velocity.float()


def window(values: LatentTensor, corner: Sequence[int], side: int) -> Float[Tensor, "batch channels side side"]:
    """A square of all items."""
    top, left = corner
    return values[:, :, top : top + side, left : left + side]


# -------------------------------------------------------------------------------------------------------------- training

STAGES: tuple[Callable[[Recipe, FlexTok, Pictures, LatentTensor], Stage], ...] = (FlowStage, BalanceStage, TuneStage)
#: What each of them gets of the minutes; the rest is for making and encoding the pictures.
SHARES = (0.6, 0.17, 0.08)


class Training(trainer.Training[FlexTok]):
    """The three stages in a row.

    Args:
        recipe: of the whole training.
        pictures: what it is trained on.
        config: of the model.
        device: where to train.
    """

    stages = len(STAGES)
    stage: Stage

    def __init__(
        self, recipe: Recipe, pictures: Pictures, config: FlexTokConfig = TINY, device: torch.device | str = "cpu"
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.pictures = pictures
        model = FlexTok(config, name="flextok-tiny")
        start = np.ascontiguousarray(pictures[:START_PICTURES])
        initialise_autoencoder(model.vae, as_images(start))
        self.latents = encode_all(model.vae, pictures)
        initialise(model, self.latents[: len(start)].float(), torch.Generator().manual_seed(recipe.seed))
        super().__init__(recipe, model.to(device))

    def make_stage(self, index: int) -> Stage:
        return STAGES[index](self.recipe, self.model, self.pictures, self.latents)

    def snapshot(self) -> FlexTok:
        """With the running averages in place."""
        state = self.model.state_dict()
        averages = dict(zip(map(id, self.stage.module.parameters()), self.stage.average.module.parameters(), strict=True))
        for key, parameter in self.model.named_parameters():
            state[key] = averages.get(id(parameter), parameter).detach()
        return trainer.shipped(self.model, state)


def train(
    recipe: Recipe,
    out: Path,
    config: FlexTokConfig = TINY,
    checkpoint_seconds: float = 90.0,
    device: torch.device | str = "cpu",
) -> FlexTok:
    """Train to the end of the last schedule; ``out`` and a checkpoint are written every ``checkpoint_seconds``."""
    path = out.with_suffix(f".pictures-{recipe.seed}-{recipe.pictures}.npy")

    def begin() -> Training:
        return Training(recipe, make_pictures(path, recipe.pictures, recipe.seed), config, device)

    return trainer.run(recipe, out, begin, checkpoint_seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the recipe."""
    parser = trainer.recipe_parser(__doc__, Recipe.seed)
    parser.add_argument("--device", default="cpu", help="where to train")
    options = parser.parse_args(arguments)
    recipe = replace(Recipe() if options.device == "cpu" else ON_GPU, seed=options.seed)
    if options.minutes is not None:
        flow, balance, tune = (share * options.minutes for share in SHARES)
        recipe = replace(recipe, flow_minutes=flow, balance_minutes=balance, tune_minutes=tune)
    torch.set_num_threads(1)  # the recipe's own threads do better
    train(recipe, options.out, device=options.device)


if __name__ == "__main__":
    main()

"""The recipe of ``flextok-tiny``: train a small FlexTok on pictures made by this package.

    python -m zoo.weights.recipes.flextok --out weights/flextok-tiny.safetensors --minutes 75
    python -m zoo.weights.recipes.flextok --out weights/flextok-tiny.safetensors --minutes 8 --device cuda

Seeded and resumable: run the same command again and it goes on from the last checkpoint beside ``--out``. The pictures are
those of `image_data`; no photograph is used. It starts from the closed forms of `flextok_start`. Then two stages:

1. Encoder, quantizer and flow, jointly on cached latents, by the flow's loss alone with nested dropout. Most of the noise
   levels are t = 1: there the velocity is the noise minus the mean of the latents, which a single step of sampling gives.
   Latents are nearly linear in pixels, so pictures are mirrored, lit and coloured differently as latents.
2. The autoencoder's decoder, on what the flow makes of 1 to 64 tokens in one step, and on clean latents.
"""

from __future__ import annotations

import argparse
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from zoo.codecs.flextok import FlexTok, FlexTokConfig
from zoo.codecs.flextok.flow import noise_levels, prefix_ladder
from zoo.hub import write_saved_file
from zoo.media import replacing
from zoo.nn.vae import VAE
from zoo.weights.recipes.closed_form import least_squares
from zoo.weights.recipes.flextok_start import initialise, initialise_autoencoder, prefix_condition
from zoo.weights.recipes.trainer import Images, Pictures, as_images, make_pictures

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

Latents = Float[Tensor, "batch channels rows columns"]
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
        flow_steps, tune_steps: lengths of the two schedules in optimiser steps.
        flow_minutes, tune_minutes: times after which they have to be at their ends, however many steps were done.
        flow_batch, flow_lengths: pictures per step of the flow for each of so many prefix lengths, of 1, 2, 4, … in turn.
        tune_batch, crop: crops per step of the autoencoder, and their side in pixels.
        flow_rate, flow_other_rate, tune_rate: highest learning rates; of the flow for matrices of blocks and for the rest.
        warmup: steps of rising learning rate.
        averaging: share of the running average of the weights that remains after a step, in each stage.
        null: share of the items below t = 1 that are trained without condition.
        pure_noise: share of items at t = 1.
        threads: that train on a CPU, each on its part of a batch.
    """

    pictures: int = 16_000
    flow_steps: int = 6_000
    tune_steps: int = 2_000
    flow_minutes: float | None = None
    tune_minutes: float | None = None
    flow_batch: int = 24
    flow_lengths: int = 2
    tune_batch: int = 16
    crop: int = 64
    flow_rate: float = 2e-3
    flow_other_rate: float = 5e-4
    tune_rate: float = 5e-4
    warmup: int = 50
    averaging: tuple[float, float] = (0.995, 0.97)
    null: float = 0.3
    pure_noise: float = 0.85
    threads: int = 2
    seed: int = 3407


#: For a GPU, which takes more pictures at a time, through all prefix lengths in every step.
ON_GPU = Recipe(flow_batch=128, flow_lengths=7, tune_batch=128, flow_steps=20_000, tune_steps=5_000, threads=1)


# ---------------------------------------------------------------------------------------------------------------- stages


class Stage(ABC):
    """One schedule of training, in a state that can be saved at any step.

    Args:
        recipe: of the whole training.
        module: what is trained; its running average is what later stages and the file get.
        steps, minutes: length of the schedule, whichever is over first.
        averaging: share of the running average that remains after a step.
        optimizers: of the module's parameters, at their highest learning rates.
    """

    name: str

    def __init__(
        self,
        recipe: Recipe,
        module: nn.Module,
        steps: int,
        minutes: float | None,
        averaging: float,
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> None:
        self.recipe, self.module, self.steps, self.minutes = recipe, module, steps, minutes
        self.device = next(module.parameters()).device
        self.average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(averaging))
        self.optimizers = list(optimizers)
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.rng = torch.Generator().manual_seed(recipe.seed)
        self.pool = ThreadPoolExecutor(recipe.threads)
        self.step = 0
        self.elapsed = 0.0

    @abstractmethod
    def shards(self) -> list[Shard]:
        """The next batch in parts: what is random is drawn here, what costs time waits for the call."""

    def finish(self) -> None:
        """Put the running average in the place of the module's weights."""
        self.module.load_state_dict(self.average.module.state_dict())

    @property
    def progress(self) -> float:
        """Share of the schedule that is done, by steps or by time, whichever is further."""
        by_time = 0.0 if self.minutes is None else self.elapsed / (60 * self.minutes)
        return min(1.0, max(self.step / self.steps, by_time))

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns the terms of the loss."""
        started = time.monotonic()
        share = min(1.0, (self.step + 1) / self.recipe.warmup) * 0.5 * (1 + math.cos(math.pi * self.progress))
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share
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
        self.step += 1
        self.elapsed += time.monotonic() - started
        return terms

    def _gradients(self, shard: Shard) -> tuple[tuple[Tensor, ...], dict[str, float]]:
        # On a CPU, the fused attention takes longer backwards than its two products.
        backends = [SDPBackend.MATH] if self.device.type == "cpu" else list(SDPBackend.__members__.values())[1:]
        with sdpa_kernel(backends):
            with torch.autocast(self.device.type, torch.bfloat16):
                loss, terms = shard()
            return torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True), terms

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on."""
        return {
            "module": self.module.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": self.rng.get_state(),
            "step": self.step,
            "elapsed": self.elapsed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another stage of the same recipe was."""
        self.module.load_state_dict(state["module"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.rng.set_state(state["rng"])
        self.step, self.elapsed = state["step"], state["elapsed"]

    def rows(self, count: int, total: int) -> list[int]:
        """Random indices."""
        drawn: list[int] = torch.randint(total, (count,), generator=self.rng).tolist()
        return drawn


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


def pixels(vae: VAE, latents: Latents) -> Images:
    """Pictures of unscaled latents."""
    images: Tensor = vae.decoder.network(vae.decoder.post_quant_conv(latents)).float()
    return images


def encode_all(vae: VAE, pictures: Pictures, threads: int = 2) -> Float[Tensor, "count channels rows columns"]:
    """Means of the latents of many pictures, in half precision."""

    @torch.inference_mode()
    def encode(first: int) -> Latents:
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

    def __call__(self, latents: Latents, generator: torch.Generator) -> Latents:
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

    def __init__(self, recipe: Recipe, model: FlexTok, pictures: Pictures, latents: Latents) -> None:
        trained = nn.ModuleDict({"encoder": model.encoder, "decoder": model.decoder})
        chosen = optimizers(trained, recipe.flow_rate, recipe.flow_other_rate)
        super().__init__(recipe, trained, recipe.flow_steps, recipe.flow_minutes, recipe.averaging[0], chosen)
        self.model, self.latents = model, latents
        self.augment = LatentAugmentation(model.vae, pictures[:START_PICTURES])

    def shards(self) -> list[Shard]:
        lengths = [0, *prefix_ladder(self.model.config.registers)]
        shards: list[Shard] = []
        for turn in range(self.step * self.recipe.flow_lengths, (self.step + 1) * self.recipe.flow_lengths):
            place = turn % (len(lengths) - 1)
            shorter, length = lengths[place : place + 2]
            # Lengths between the powers of two get a quarter of the steps.
            count = length if self.rows(1, 4)[0] else shorter + 1 + self.rows(1, length - shorter)[0]
            shards.append(partial(self.losses, f"k{length}", count, *self.draws()))
        return shards

    def draws(self) -> tuple[Latents, Latents, Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """Latents, noise, noise levels and which items get no condition."""
        batch = self.recipe.flow_batch
        latents = self.augment(self.latents[self.rows(batch, len(self.latents))].float(), self.rng)
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
        latents: Latents,
        noise: Latents,
        t: Float[Tensor, " batch"],
        null: Bool[Tensor, " batch"],
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """The flow's loss with prefixes of one length."""
        model, level = self.model, t[:, None, None, None]
        codes = model.fsq(model.encoder(latents, count))
        condition = prefix_condition(model.decoder, codes, null)
        velocity = model.decoder(level * noise + (1 - level) * latents, model.decoder.timestep(t), condition)
        loss = (velocity.float() - (noise - latents)).square().mean(dim=(1, 2, 3))
        return loss.mean(), {name: loss[t == 1].mean().item(), "flow": loss[t < 1].mean().item()}


def optimizers(module: nn.Module, rate: float, other_rate: float) -> list[torch.optim.Optimizer]:
    """Muon (orthogonalised momentum) for the matrices of the blocks, AdamW for everything else."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    matrices = [parameter for name, parameter in named if ".blocks." in name and parameter.ndim == 2]
    others = [parameter for name, parameter in named if not (".blocks." in name and parameter.ndim == 2)]
    return [
        torch.optim.Muon(matrices, rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, other_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


class TuneStage(Stage):
    """The autoencoder's decoder on crops of latents: half of them clean, half as one step of the flow gives them."""

    name = "decoder"

    def __init__(self, recipe: Recipe, model: FlexTok, pictures: Pictures, latents: Latents) -> None:
        decoder = model.vae.decoder
        optimizer = torch.optim.AdamW(decoder.parameters(), recipe.tune_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        super().__init__(recipe, decoder, recipe.tune_steps, recipe.tune_minutes, recipe.averaging[1], [optimizer])
        self.model, self.pictures, self.latents = model, pictures, latents

    def shards(self) -> list[Shard]:
        lengths = list(prefix_ladder(self.model.config.registers))
        shards: list[Shard] = []
        for _ in range(self.recipe.tune_batch // SHARD):
            rows, count = self.rows(SHARD, len(self.latents)), lengths[self.rows(1, len(lengths))[0]]
            latents = self.latents[rows].float()
            noise = torch.randn(SHARD // 2, *latents.shape[1:], generator=self.rng)
            room = latents.shape[2] - self.recipe.crop // self.model.config.vae.factor + 1
            corner = self.rows(2, room)
            images = as_images(self.pictures[rows]).to(self.device)
            shards.append(partial(self.losses, images, latents.to(self.device), count, noise.to(self.device), corner))
        return shards

    def losses(
        self,
        images: Images,
        latents: Latents,
        count: int,
        noise: Float[Tensor, "estimates channels rows columns"],
        corner: list[int],
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Clean latents have to give sharp pictures, estimates those with the least squared error."""
        factor, clean = self.model.config.vae.factor, len(latents) - len(noise)
        latents = torch.cat([latents[:clean], self.estimates(latents[clean:], count, noise)])
        estimate = pixels(self.model.vae, window(latents, corner, self.recipe.crop // factor))
        targets = window(images, [factor * first for first in corner], self.recipe.crop)
        clear = picture_loss(estimate[:clean], targets[:clean])
        coarse = F.mse_loss(estimate[clean:], targets[clean:])
        return clear + 8 * coarse, {"clear": clear.item(), "coarse": coarse.item()}

    @torch.no_grad()
    def estimates(self, latents: Latents, count: int, noise: Latents) -> Latents:
        """Latents of one step from noise, given a prefix of the tokens."""
        model = self.model
        codes = model.fsq(model.encoder(latents, count))
        condition = prefix_condition(model.decoder, codes, None)
        velocity = model.decoder(noise, model.decoder.timestep(noise.new_ones(len(codes))), condition)
        return noise - velocity.float()


def window(values: Latents, corner: Sequence[int], side: int) -> Float[Tensor, "batch channels side side"]:
    """A square of all items."""
    top, left = corner
    return values[:, :, top : top + side, left : left + side]


# -------------------------------------------------------------------------------------------------------------- training

STAGES: tuple[Callable[[Recipe, FlexTok, Pictures, Latents], Stage], ...] = (FlowStage, TuneStage)
#: What each of them gets of the minutes; the rest is for making and encoding the pictures.
SHARES = (0.65, 0.15)


def export(model: FlexTok) -> FlexTok:
    """The model as it will be shipped: weights rounded to half precision, and the fingerprint of these."""
    shipped = FlexTok(model.config, name=model.name)
    shipped.load_state_dict({key: tensor.half().float() for key, tensor in model.state_dict().items()})
    shipped.eval().requires_grad_(False)
    shipped.fingerprint = shipped.compute_fingerprint()
    return shipped


class Training:
    """The three stages in a row, in a state that can be saved at any step.

    Args:
        recipe: of the whole training.
        pictures: what it is trained on.
        config: of the model.
    """

    def __init__(
        self, recipe: Recipe, pictures: Pictures, config: FlexTokConfig = TINY, device: torch.device | str = "cpu"
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.pictures = recipe, pictures
        self.model = FlexTok(config, name="flextok-tiny")
        start = np.ascontiguousarray(pictures[:START_PICTURES])
        initialise_autoencoder(self.model.vae, as_images(start))
        self.latents = encode_all(self.model.vae, pictures)
        initialise(self.model, self.latents[: len(start)].float(), torch.Generator().manual_seed(recipe.seed))
        self.model.to(device)
        self._enter(0)

    def _enter(self, index: int) -> None:
        self.index = index
        # What a stage starts from: its checkpoints hold it beside the stage's own state.
        self.start = {key: tensor.clone() for key, tensor in self.model.state_dict().items()}
        self.stage = STAGES[index](self.recipe, self.model, self.pictures, self.latents)

    def advance(self) -> bool:
        """Close a stage whose schedule is over and enter the next; false behind the last."""
        self.stage.finish()
        if self.index + 1 == len(STAGES):
            return False
        self._enter(self.index + 1)
        return True

    def snapshot(self) -> FlexTok:
        """The model as it would be shipped now, with the running averages in place."""
        copied = FlexTok(self.model.config, name=self.model.name)
        state = self.model.state_dict()
        averages = dict(zip(map(id, self.stage.module.parameters()), self.stage.average.module.parameters(), strict=True))
        for key, parameter in self.model.named_parameters():
            state[key] = averages.get(id(parameter), parameter).detach()
        copied.load_state_dict(state)
        return export(copied)

    def save(self, path: Path) -> None:
        """Write a checkpoint to resume from."""
        state = {
            "recipe": asdict(self.recipe),
            "index": self.index,
            "start": self.start,
            "stage": self.stage.state_dict(),
        }
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint of the same recipe.

        Raises:
            ValueError: it was made by another recipe.
        """
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise ValueError(f"{path} belongs to another recipe: {state['recipe']}; delete it or use the same settings")
        self.model.load_state_dict(state["start"])
        self._enter(state["index"])
        self.stage.load_state_dict(state["stage"])


def write(model: FlexTok, path: Path) -> None:
    """Write the file that is shipped."""
    write_saved_file(model, path, dtype=torch.float16)


def train(
    recipe: Recipe, out: Path, config: FlexTokConfig = TINY, every: float = 90.0, device: torch.device | str = "cpu"
) -> FlexTok:
    """Train, or go on training, until the last schedule ends; every so many seconds ``out`` and a checkpoint are written."""
    path = out.with_suffix(f".pictures-{recipe.seed}-{recipe.pictures}.npy")
    pictures = make_pictures(path, recipe.pictures, recipe.seed)
    training = Training(recipe, pictures, config, device)
    checkpoint = out.with_suffix(".checkpoint.pt")
    if checkpoint.exists():
        training.restore(checkpoint)
    while True:
        run_stage(training, out, checkpoint, every)
        if not training.advance():
            break
        training.save(checkpoint)
    model = export(training.model)
    write(model, out)
    checkpoint.unlink(missing_ok=True)
    return model


def run_stage(training: Training, out: Path, checkpoint: Path, every: float) -> None:
    """Train to the end of a stage's schedule."""
    stage = training.stage
    averages: dict[str, float] = {}
    saved = time.monotonic()
    with tqdm(total=stage.steps, initial=stage.step, unit="step", desc=stage.name, mininterval=10) as bar:
        while stage.progress < 1:
            for name, value in stage.train_step().items():
                averages[name] = 0.98 * averages.get(name, value) + 0.02 * value
            bar.update()
            bar.set_postfix({name: f"{value:.3f}" for name, value in averages.items()}, refresh=False)
            if time.monotonic() - saved > every:
                training.save(checkpoint)
                write(training.snapshot(), out)
                saved = time.monotonic()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, help="end after about so many minutes of training; by steps otherwise")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--device", default="cpu", help="where to train")
    options = parser.parse_args(arguments)
    recipe = replace(Recipe() if options.device == "cpu" else ON_GPU, seed=options.seed)
    if options.minutes is not None:
        flow, tune = (share * options.minutes for share in SHARES)
        recipe = replace(recipe, flow_minutes=flow, tune_minutes=tune)
    torch.set_num_threads(1)  # the recipe's own threads do better
    train(recipe, options.out, device=options.device)


if __name__ == "__main__":
    main()

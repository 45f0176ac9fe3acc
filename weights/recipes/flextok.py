"""The recipe of ``flextok-tiny``: train a small FlexTok on pictures made by this package, on a CPU, in about an hour.

    python -m zoo.weights.recipes.flextok --out weights/flextok-tiny.safetensors --minutes 75

Seeded and resumable: run the same command again and it goes on from the last checkpoint beside ``--out``. The pictures are
those of `image_data`; no photograph is used. Three stages:

1. The autoencoder, on crops. Half of every batch is decoded from latents that were smoothed or mixed with those of another
   picture and has to give the picture smoothed or mixed in the same way (compare arXiv 2502.09509 and 2502.14831). That keeps
   the decoder near linear: the mean of all latents that fit a prefix of tokens decodes to about the mean of their pictures.
2. Encoder, quantizer and flow, jointly on cached latents, by the flow's loss alone with nested dropout. Half of the noise
   levels are t = 1: there the velocity is the noise minus the mean of the latents, which a single step of sampling gives.
3. The autoencoder's decoder once more, on what the flow makes of 1 to 64 tokens in one step, and on clean latents.
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
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from zoo.codecs.flextok import FlexTok, FlexTokConfig
from zoo.codecs.flextok.decoder import GATE_ATTENTION, GATE_MLP, Condition, Decoder
from zoo.codecs.flextok.flow import noise_levels, prefix_ladder
from zoo.hub import write_saved_file
from zoo.media import replacing
from zoo.nn.vae import VAE
from zoo.weights.recipes import image_data

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

Images = Float[Tensor, "batch 3 height width"]
Latents = Float[Tensor, "batch channels rows columns"]
Pictures = UInt8[np.ndarray, "count 3 height width"]
#: Computes the loss of a part of a batch, and its terms for the log.
Shard = Callable[[], tuple[Float[Tensor, ""], dict[str, float]]]

# How many pictures the statistics of the latents are taken from.
METRIC_PICTURES = 512
# Of the latents before they are scaled.
LOG_VARIANCE = -6.0
# Spread of the constants that the channels of the autoencoder start with; pictures have values in [-1, 1].
CONSTANTS = 3.0
# Pictures that one thread takes at a time, in the stages of the autoencoder.
SHARD = 8


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result besides the code.

    Attributes:
        pictures: size of the training set.
        flow_pictures: how many of them the second and third stage see.
        vae_steps, flow_steps, tune_steps: lengths of the three schedules in optimiser steps.
        vae_minutes, flow_minutes, tune_minutes: times after which they have to be at their ends, however many steps were done.
        vae_batch, crop: crops per step of the autoencoder, and their side in pixels.
        flow_batch, flow_lengths: pictures per step of the flow for each of so many prefix lengths, of 1, 2, 4, … in turn.
        tune_batch: crops per step of the last stage.
        vae_rate, flow_rate, tune_rate: highest learning rates.
        warmup: steps of rising learning rate.
        averaging: share of the running average of the weights that remains after a step, in each stage.
        null: share of items trained without condition.
        pure_noise: share of items at t = 1.
        threads: that train, each on its part of a batch.
    """

    pictures: int = 16_000
    flow_pictures: int = 8_000
    vae_steps: int = 4_500
    flow_steps: int = 6_000
    tune_steps: int = 2_000
    vae_minutes: float | None = None
    flow_minutes: float | None = None
    tune_minutes: float | None = None
    vae_batch: int = 16
    crop: int = 64
    flow_batch: int = 20
    flow_lengths: int = 2
    tune_batch: int = 16
    vae_rate: float = 3e-4
    flow_rate: float = 2e-3
    tune_rate: float = 5e-4
    warmup: int = 100
    averaging: tuple[float, float, float] = (0.97, 0.97, 0.97)
    null: float = 0.1
    pure_noise: float = 0.5
    threads: int = 2
    seed: int = 3407


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
        with torch.autocast("cpu", torch.bfloat16):
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


def as_images(pixels: UInt8[np.ndarray, "batch 3 height width"]) -> Images:
    """8-bit pixels to the range of the model."""
    return torch.from_numpy(pixels).float() / 127.5 - 1


def smoothed(values: Latents, cell: int) -> Latents:
    """Means of cells, bilinearly enlarged again."""
    return F.interpolate(F.avg_pool2d(values, cell), size=values.shape[2:], mode="bilinear", align_corners=False)


# Orthonormal axes of colour: grey, red to blue, green to magenta.
OPPONENTS = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-0.5, 1.0, -0.5]])
OPPONENTS = OPPONENTS / OPPONENTS.norm(dim=1, keepdim=True)


def picture_loss(estimate: Images, target: Images) -> Float[Tensor, ""]:
    """Mean absolute error at five scales, and of the differences between neighbours at the finest three.

    Errors of colour weigh twice as much as those of grey: most colours are dull, and without the weight a short training
    learns black and white pictures only.
    """
    axes = OPPONENTS * torch.tensor([[1.0], [2.0], [2.0]])
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


def means(vae: VAE, images: Images) -> Latents:
    """Means of the latents' distributions."""
    latents: Tensor = vae.encoder.quant_conv(vae.encoder.network(images)).float().chunk(2, dim=1)[0]
    return latents


def pixels(vae: VAE, latents: Latents) -> Images:
    """Pictures of unscaled latents."""
    images: Tensor = vae.decoder.network(vae.decoder.post_quant_conv(latents)).float()
    return images


class AutoencoderStage(Stage):
    """The autoencoder on random crops, half of them from smoothed or mixed latents."""

    name = "autoencoder"

    def __init__(self, recipe: Recipe, model: FlexTok, pictures: Pictures, latents: Latents) -> None:
        vae = model.vae
        optimizer = torch.optim.AdamW(vae.parameters(), recipe.vae_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        super().__init__(recipe, vae, recipe.vae_steps, recipe.vae_minutes, recipe.averaging[0], [optimizer])
        self.vae, self.pictures = vae, pictures
        self.factor = model.config.vae.factor

    def finish(self) -> None:
        """Beside the average: latents of mean 0 and variance 1, by weights of the layers next to them."""
        super().finish()
        standardise(self.vae, self.pictures[:METRIC_PICTURES])

    def shards(self) -> list[Shard]:
        count = self.recipe.vae_batch // SHARD
        return [partial(self.losses, self.crops(), *self.draws()) for _ in range(count)]

    def crops(self) -> Images:
        """Random crops of random pictures, mirrored and differently exposed at random."""
        side = self.recipe.crop
        room = self.pictures.shape[2] - side + 1
        rows, tops, lefts, flips = (self.rows(SHARD, limit) for limit in (len(self.pictures), room, room, 2))
        cuts = [
            self.pictures[row, :, top : top + side, left : left + side][:, :, :: 1 - 2 * flip]
            for row, top, left, flip in zip(rows, tops, lefts, flips, strict=True)
        ]
        gain = torch.exp(0.25 * torch.randn(SHARD, 1, 1, 1, generator=self.rng))
        # Most colours of the pictures are dull, and what is faint is learned last.
        saturation = torch.exp(0.7 * torch.randn(SHARD, 1, 1, 1, generator=self.rng))
        shift = 0.2 * torch.randn(SHARD, 1, 1, 1, generator=self.rng) + 0.25 * torch.randn(SHARD, 3, 1, 1, generator=self.rng)
        images = as_images(np.stack(cuts))
        grey = images.mean(dim=1, keepdim=True)
        return (gain * (grey + saturation * (images - grey)) + shift).clamp(-1, 1)

    def draws(self) -> tuple[Float[Tensor, "batch 1 1 1"], int]:
        """How far each item is altered, and the cell in latents to smooth over."""
        return torch.rand(SHARD, 1, 1, 1, generator=self.rng), 2 ** (1 + self.rows(1, 3)[0])

    def losses(
        self, images: Images, share: Float[Tensor, "batch 1 1 1"], cell: int
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Half of the items as they are, a quarter smoothed, a quarter mixed with the first ones."""
        latents = altered(means(self.vae, images), share, cell)
        targets = altered(images, share, cell * self.factor)
        estimate = pixels(self.vae, latents)
        plain = SHARD // 2
        clear = picture_loss(estimate[:plain], targets[:plain])
        coarse = picture_loss(estimate[plain:], targets[plain:])
        error = (estimate[:plain].detach() - targets[:plain]).square().mean()
        terms = {"clear": clear.item(), "altered": coarse.item(), "psnr": 10 * math.log10(4 / error.item())}
        return clear + coarse, terms


def altered(values: Latents, share: Float[Tensor, "batch 1 1 1"], cell: int) -> Latents:
    """The second half of a batch changed by the given shares: its first half smoothed, its second half mixed with others."""
    plain, split = len(values) // 2, len(values) * 3 // 4
    smooth, mixed = values[plain:split], values[split:]
    smooth = torch.lerp(smooth, smoothed(smooth, cell), share[plain:split])
    mixed = torch.lerp(mixed, values[: len(mixed)], share[split:])
    return torch.cat([values[:plain], smooth, mixed])


def encode_all(vae: VAE, pictures: Pictures, threads: int = 2) -> Float[Tensor, "count channels rows columns"]:
    """Means of the latents of many pictures, in half precision."""

    @torch.inference_mode()
    def encode(first: int) -> Latents:
        mean: Tensor = vae.encoder(as_images(pictures[first : first + 32].copy()))[0]
        return mean.half()

    with ThreadPoolExecutor(threads) as pool:
        return torch.cat(list(pool.map(encode, range(0, len(pictures), 32)))).clone()


@torch.no_grad()
def standardise(vae: VAE, pictures: Pictures) -> None:
    """Shift and scale the latents so that each channel has mean 0 and all together variance 1, leaving the pictures alone."""
    latents = encode_all(vae, pictures).float()
    mean, scale = latents.mean(dim=(0, 2, 3)), latents.sub(latents.mean(dim=(0, 2, 3), keepdim=True)).std()
    into, out = vae.encoder.quant_conv, vae.decoder.post_quant_conv
    channels = len(mean)
    into.bias[:channels] -= mean
    into.weight[:channels] /= scale
    into.bias[:channels] /= scale
    into.bias[channels:] -= 2 * scale.log()  # the log-variance
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= scale


def pixel_metric(
    latents: Float[Tensor, "count channels rows columns"], pictures: Pictures
) -> Float[Tensor, "channels channels"]:
    """How errors of latents weigh: half by the error of pixels that they cause, half alike; the mean weight is 1.

    By itself the loss of latents spends tokens on faint detail as readily as on what everybody sees. The pixels' share comes
    from the linear map that predicts a cell of pixels from its latent best.
    """
    count, channels, rows, columns = latents.shape
    cell = pictures.shape[2] // rows
    cells = (
        as_images(pictures.copy()).view(count, 3, rows, cell, columns, cell).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)
    )
    features = latents.float().permute(0, 2, 3, 1).flatten(0, 2)
    effect = torch.linalg.lstsq(features, cells - cells.mean(dim=0)).solution
    pixels = effect @ effect.T
    return 0.5 * torch.eye(channels) + 0.5 * pixels * channels / pixels.trace()


class FlowStage(Stage):
    """Encoder, quantizer and flow together, on the latents of all pictures."""

    name = "flow"

    def __init__(self, recipe: Recipe, model: FlexTok, pictures: Pictures, latents: Latents) -> None:
        trained = nn.ModuleDict({"encoder": model.encoder, "decoder": model.decoder})
        chosen = optimizers(trained, recipe.flow_rate)
        super().__init__(recipe, trained, recipe.flow_steps, recipe.flow_minutes, recipe.averaging[1], chosen)
        self.model, self.latents = model, latents
        known = min(METRIC_PICTURES, len(latents))
        self.metric = pixel_metric(latents[:known], pictures[:known])

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
        latents = self.latents[self.rows(batch, len(self.latents))].float()
        pure, uniform = round(batch * self.recipe.pure_noise), torch.rand(batch, generator=self.rng)
        t = noise_levels(uniform, self.model.config)
        t[:pure] = 1.0
        null = (torch.rand(batch, generator=self.rng) < self.recipe.null) & (t < 1)
        return latents, torch.randn(latents.shape, generator=self.rng), t, null

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
        error = velocity.float() - (noise - latents)
        with torch.autocast("cpu", enabled=False):
            loss = (error * torch.einsum("ij,bjrc->birc", self.metric, error)).mean(dim=(1, 2, 3))
        return loss.mean(), {name: loss[t == 1].mean().item(), "flow": loss[t < 1].mean().item()}


def prefix_condition(
    decoder: Decoder, codes: Float[Tensor, "batch count components"], null: Bool[Tensor, " batch"]
) -> Condition:
    """The collapsed condition of prefixes of one length; null items have as many rows as the others."""
    dropped = decoder.config.registers - codes.shape[1]
    rows, log_count = decoder.registers(codes), codes.new_zeros(codes.shape[:2])
    if dropped:
        rows = torch.cat([rows, decoder.mask_token.expand(len(rows), 1, -1)], dim=1)
        log_count = F.pad(log_count, (0, 1), value=math.log(dropped))
    return Condition(torch.where(null[:, None, None], decoder.null_token, rows), log_count)


def optimizers(module: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon (orthogonalised momentum) for the matrices of the blocks, AdamW for everything else."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    matrices = [parameter for name, parameter in named if ".blocks." in name and parameter.ndim == 2]
    others = [parameter for name, parameter in named if not (".blocks." in name and parameter.ndim == 2)]
    return [
        torch.optim.Muon(matrices, rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


class TuneStage(Stage):
    """The autoencoder's decoder on crops of latents: half of them clean, half as one step of the flow gives them."""

    name = "decoder"

    def __init__(self, recipe: Recipe, model: FlexTok, pictures: Pictures, latents: Latents) -> None:
        decoder = model.vae.decoder
        optimizer = torch.optim.AdamW(decoder.parameters(), recipe.tune_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        super().__init__(recipe, decoder, recipe.tune_steps, recipe.tune_minutes, recipe.averaging[2], [optimizer])
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
            shards.append(partial(self.losses, as_images(self.pictures[rows]), latents, count, noise, corner))
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
        condition = prefix_condition(model.decoder, codes, torch.zeros(len(codes), dtype=torch.bool))
        velocity = model.decoder(noise, model.decoder.timestep(torch.ones(len(codes))), condition)
        return noise - velocity.float()


def window(values: Latents, corner: Sequence[int], side: int) -> Float[Tensor, "batch channels side side"]:
    """A square of all items."""
    top, left = corner
    return values[:, :, top : top + side, left : left + side]


# -------------------------------------------------------------------------------------------------------------- training

STAGES: tuple[Callable[[Recipe, FlexTok, Pictures, Latents], Stage], ...] = (
    AutoencoderStage,
    FlowStage,
    TuneStage,
)
#: What each of them gets of the minutes; the rest is for making and encoding the pictures.
SHARES = (0.28, 0.4, 0.12)


@torch.no_grad()
def initialise_autoencoder(vae: VAE) -> None:
    """Start close to a linear map, which finds the strongest components of the pictures at once.

    Residual branches are closed at first, and the convolutions between them keep the variance; the first one sees colour twice
    as strongly as it is. Every channel of the trunk starts with a large constant of its own, which the convolutions hand on:
    it makes up most of what a normalisation measures, so that brightness and contrast of a picture pass through it. A short
    training would not find out how to send them otherwise, and the pictures would come back with other means.
    """
    for network in (vae.encoder.network, vae.decoder.network):
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv2d) and not name.endswith("conv1"):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
        for name, module in network.named_modules():
            if name.endswith(("conv2", "to_out.0")):
                nn.init.zeros_(module.weight)
        nn.init.normal_(network.conv_in.bias, std=CONSTANTS)
    # The log-variance of the latents is not trained: with noise in them the faint components never come up.
    vae.encoder.quant_conv.weight.chunk(2)[1].zero_()
    vae.encoder.quant_conv.bias.view(2, -1)[1] = LOG_VARIANCE
    colour = 2 * torch.eye(3) - torch.outer(OPPONENTS[0], OPPONENTS[0])
    first = vae.encoder.network.conv_in
    first.weight.copy_(torch.einsum("oirc,ij->ojrc", first.weight, colour))


def initialise(model: FlexTok) -> None:
    """Xavier for projections, zero for the head and the modulation except the gates.

    FlexTok starts with closed gates as well. Half open ones save a short training the time that it takes to open them.
    """
    for module in (model.encoder, model.decoder):
        for name, parameter in module.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
    # Registers as faint as FlexTok's look alike behind the first block, and it takes long until they carry different things.
    nn.init.normal_(model.encoder.registers)
    nn.init.normal_(model.decoder.register_positions)
    # The middle of the quantizer's range, where its tanh has a slope.
    nn.init.normal_(model.encoder.to_codes.weight, std=0.7 / math.sqrt(model.config.encoder_dim))
    for layer in [model.decoder.head.proj, *(block.modulation for block in model.decoder.blocks)]:
        nn.init.zeros_(layer.weight)
    nn.init.zeros_(model.decoder.head.modulation.weight)
    initialise_autoencoder(model.vae)
    for block in model.decoder.blocks:
        gates = block.modulation.bias.data.view(2, 6, -1)[:, [GATE_ATTENTION, GATE_MLP]]
        block.modulation.bias.data.view(2, 6, -1)[:, [GATE_ATTENTION, GATE_MLP]] = torch.full_like(gates, 0.5)


def export(model: FlexTok) -> FlexTok:
    """The model as it will be shipped: weights rounded to half precision, and the fingerprint of these."""
    shipped = FlexTok(model.config, name=model.name)
    shipped.load_state_dict({key: tensor.half().float() for key, tensor in model.state_dict().items()})
    shipped.eval().requires_grad_(False)
    shipped.fingerprint = shipped.compute_fingerprint()
    return shipped


def make_pictures(recipe: Recipe, path: Path, processes: int = 2) -> Pictures:
    """The training set, mapped from a file that is written on the first call."""
    if not path.exists():
        with replacing(path) as temporary:
            size = image_data.SIZE
            array = np.lib.format.open_memmap(temporary, "w+", np.uint8, (recipe.pictures, 3, size, size))
            drawn = image_data.pictures(recipe.pictures, recipe.seed, processes)
            for index, picture in enumerate(tqdm(drawn, total=recipe.pictures, desc="pictures", mininterval=10)):
                array[index] = picture
            array.flush()
    pictures: Pictures = np.load(path, mmap_mode="r")
    return pictures


class Training:
    """The three stages in a row, in a state that can be saved at any step.

    Args:
        recipe: of the whole training.
        pictures: what it is trained on.
        config: of the model.
    """

    def __init__(self, recipe: Recipe, pictures: Pictures, config: FlexTokConfig = TINY) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.pictures = recipe, pictures
        self.model = FlexTok(config, name="flextok-tiny")
        initialise(self.model)
        self.latents = torch.empty(0, config.latent_channels, 1, 1)  # until the autoencoder is there
        self._enter(0)

    def _enter(self, index: int) -> None:
        self.index = index
        # What a stage starts from: its checkpoints hold it beside the stage's own state.
        self.start = {key: tensor.clone() for key, tensor in self.model.state_dict().items()}
        if STAGES[index] is FlowStage and not len(self.latents):
            self.latents = encode_all(self.model.vae, self.pictures[: self.recipe.flow_pictures])
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
            "latents": self.latents,
            "stage": self.stage.state_dict(),
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
        self.model.load_state_dict(state["start"])
        self.latents = state["latents"]
        self._enter(state["index"])
        self.stage.load_state_dict(state["stage"])


def write(model: FlexTok, path: Path) -> None:
    """Write the file that is shipped."""
    write_saved_file(model, path, dtype=torch.float16)


def train(recipe: Recipe, out: Path, config: FlexTokConfig = TINY, every: float = 90.0) -> FlexTok:
    """Train, or go on training, until the last schedule ends; every so many seconds ``out`` and a checkpoint are written."""
    pictures = make_pictures(recipe, out.with_suffix(f".pictures-{recipe.seed}-{recipe.pictures}.npy"))
    training = Training(recipe, pictures, config)
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
    options = parser.parse_args(arguments)
    recipe = Recipe(seed=options.seed)
    if options.minutes is not None:
        vae, flow, tune = (share * options.minutes for share in SHARES)
        recipe = replace(recipe, vae_minutes=vae, flow_minutes=flow, tune_minutes=tune)
    torch.set_num_threads(1)  # the recipe's own threads do better
    train(recipe, options.out)


if __name__ == "__main__":
    main()

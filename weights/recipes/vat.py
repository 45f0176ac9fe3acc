"""The recipe of ``vat-tiny``: train a small VAT on solids made by this package, on one thread of a CPU, in about 20 minutes.

    python -m zoo.weights.recipes.vat --out weights/vat-tiny.safetensors --minutes 20

Seeded and resumable: run the same command again and it goes on from the last checkpoint beside ``--out``. The solids are
those of `shape_data`, in all 48 positions of a cube; no mesh is used. Latents stay continuous at first; then k-means over their
residuals starts the codebook, and everything is tuned with quantization. What makes so short a training possible:

- Attention starts local. Queries have places in space: point queries and latents those of cells that hold equal shares of all
  surfaces, plane tokens their columns. Their first channels hold sines and cosines of the place, which queries and keys read at
  the start, so that every head weighs by distance, some heads farther and some nearer. Latents are in the order of a tree of
  halved cells, so that the runs that tokens stand for are regions of space.
- A second, throw-away decoder reads the nearest latent alone. It teaches the encoder from the first step on, while the planes
  still have nothing to say.
- Labels are as soft as the distance to the surface is short, so that they say how far it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from zoo.codecs.vat import VAT, VATConfig
from zoo.codecs.vat.decoder import PLANE_AXES
from zoo.codecs.vat.training import Batch, losses, redraw_unused, start_codebook
from zoo.codecs.vat.transformer import Block
from zoo.media import replacing
from zoo.weights.data import shape as shape_data
from zoo.weights.data.shape import Samples
from zoo.weights.recipes import trainer

TINY = VATConfig(
    width=96,
    heads=3,
    num_points=2048,
    num_point_queries=128,
    num_latents=64,
    encoder_layers=2,
    decoder_layers=2,
    latent_dim=16,
    codebook_size=64,
    token_scales=(1, 4, 9, 16, 25, 49, *[64] * 9),
    plane_size=8,
    upsampler_channels=(16, 32, 48),
    upsampler_layers=0,
    norm_groups=8,
    mid_attention=False,
    triplane_channels=16,
    query_hidden=64,
    query_layers=4,
    resolution=64,
)

Places = Float[Tensor, "places 3"]
LatentTensor = Float[Tensor, "batch latents dim"]

# Start of the latents' log-variance: with much noise, the first steps would see nothing else.
LOG_VARIANCE = -4.0
# Spread of the constants that the channels of the upsampler start with; what its norms measure is mostly them, so that the
# size of what is on top of them passes through.
CONSTANTS = 2.0
# Score of a query at its own place, over the square root of the head's width.
PEAK = 4.0
# Surface points that cells are drawn from, and solids that the codebook starts from.
PLACES_POINTS, CODEBOOK_SOLIDS = 65_536, 640
# Steps between looks for unused codes, and solids to look at.
REDRAW_EVERY, REDRAW_SOLIDS = 200, 64


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result besides the code.

    Attributes:
        solids: size of the training set.
        points, volume, near: how many of each are drawn for a solid.
        steps: length of the schedule in optimiser steps.
        minutes: time after which it has to be at its end, however many steps were done.
        quantized: share of the schedule that trains with quantization.
        guided: share of the schedule in which the second decoder's weight falls from 1 to 0.
        batch: solids per step.
        seen_points, seen_volume, seen_near: how many of each solid's points a step looks at.
        softness: distance from the surface at which a label is as good as certain, over 4.
        rate, other_rate: highest learning rates, of the matrices of the transformers and of everything else.
        warmup: steps of rising learning rate.
        ema_decay: share of the running average of the weights that remains after a step.
    """

    solids: int = 6_400
    points: int = 1536
    volume: int = 1024
    near: int = 2048
    steps: int = 6_000
    minutes: float | None = None
    quantized: float = 0.45
    guided: float = 0.7
    batch: int = 8
    seen_points: int = 768
    seen_volume: int = 384
    seen_near: int = 768
    softness: float = 0.03
    rate: float = 5e-3
    other_rate: float = 3e-3
    warmup: int = 50
    ema_decay: float = 0.99
    seed: int = 3407


# ------------------------------------------------------------------------------------------------------------------- start


def cells(points: Places, depth: int) -> Float[Tensor, "cells 3"]:
    """Middles of 2^depth cells with equally many points each: halved along the longest side, in the order of the halving."""
    parts = [points]
    for _ in range(depth):
        halves: list[Tensor] = []
        for part in parts:
            spread = part.quantile(0.95, dim=0) - part.quantile(0.05, dim=0)
            order = part[:, int(spread.argmax())].argsort()
            halves += [part[half] for half in order.tensor_split(2)]
        parts = halves
    return torch.stack([part.mean(dim=0) for part in parts])


def places(place: Places, frequencies: int, axes: Sequence[int] = (0, 1, 2)) -> Float[Tensor, "places channels"]:
    """Sine and cosine of each coordinate times pi 2^i, coordinate by coordinate; zeros for axes that are not asked for."""
    angles = math.pi * place[..., None] * 2.0 ** torch.arange(frequencies)
    waves = torch.stack([angles.sin(), angles.cos()], dim=-1)
    asked = torch.tensor([float(axis in axes) for axis in range(3)])
    return (waves * asked[:, None, None]).flatten(1)


class Start:
    """The weights that a model starts from.

    Args:
        config: of the model.
        latent_places, query_places: in space.
    """

    def __init__(
        self, config: VATConfig, latent_places: Float[Tensor, "latents 3"], query_places: Float[Tensor, "queries 3"]
    ) -> None:
        self.config = config
        self.latent_places, self.query_places = latent_places, query_places
        self.head_width = config.width // config.heads
        self.frequencies = min(4, self.head_width // 6, config.num_frequencies)
        #: Channels of the place; the three after them say which plane a token belongs to.
        self.channels = 6 * self.frequencies

    @torch.no_grad()
    def apply(self, model: VAT) -> None:
        """Set all weights but those of the codebook."""
        encoder, decoder, config = model.encoder, model.decoder, self.config
        nn.init.normal_(encoder.point_proj.weight, std=0.1)
        nn.init.zeros_(encoder.point_proj.bias)
        self._pass_places(encoder.point_proj.weight)
        if encoder.point_queries is not None:
            self._placed(encoder.point_queries, places(self.query_places, self.frequencies))
        self._placed(encoder.latent_queries, places(self.latent_places, self.frequencies))
        nn.init.normal_(encoder.moments.weight, std=config.width**-0.5)
        mean, log_variance = encoder.moments.bias.chunk(2)
        mean.zero_()
        log_variance.fill_(LOG_VARIANCE)
        encoder.moments.weight[config.latent_dim :] = 0
        for block in (encoder.point_attention, *encoder.blocks):
            self._local(block)

        nn.init.normal_(decoder.latent_proj.weight, std=config.latent_dim**-0.5)
        nn.init.zeros_(decoder.latent_proj.bias)
        decoder.latent_proj.weight[: self.channels + 3] = 0
        self._placed(decoder.latent_position, places(self.latent_places, self.frequencies))
        decoder.latent_position[:, self.channels : self.channels + 3] = 0
        self._place_planes(decoder.plane_queries)
        for block in decoder.blocks:
            self._local(block)
            self._spread_heads(block)
        self._upsampler(decoder.upsampler)

        layers = list(model.query.layers)
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear" if layer is layers[-1] else "relu")
            nn.init.zeros_(layer.bias)
        # Most of space is outside.
        nn.init.constant_(layers[-1].bias, -1.0)

    def _pass_places(self, weight: Float[Tensor, "width features"]) -> None:
        """Let the first channels of a point be its place."""
        count = self.config.num_frequencies
        weight[: self.channels] = 0
        for axis in range(3):
            for i in range(self.frequencies):
                row, sine = 2 * (axis * self.frequencies + i), 3 + axis * count + i
                weight[row, sine] = weight[row + 1, sine + 3 * count] = 1

    def _placed(self, tokens: Float[Tensor, "tokens width"], place: Float[Tensor, "tokens channels"]) -> None:
        nn.init.normal_(tokens, std=0.3)
        tokens[:, : self.channels] = place

    def _place_planes(self, tokens: Float[Tensor, "tokens width"]) -> None:
        """Plane tokens know their place in the plane, and which plane that is."""
        size = self.config.plane_size
        centres = (torch.arange(size) + 0.5) / size * 2 - 1
        for plane, (across, down) in enumerate(PLANE_AXES):
            place = torch.zeros(size, size, 3)
            place[..., across], place[..., down] = centres, centres[:, None]
            own = tokens[plane * size**2 : (plane + 1) * size**2]
            self._placed(own, places(place.flatten(0, 1), self.frequencies, (across, down)))
            own[:, self.channels : self.channels + 3] = F.one_hot(torch.tensor(plane), 3).float()

    def _reach(self) -> Float[Tensor, "heads channels"]:
        """How strongly each head looks at each channel of the place: from mostly slow waves to fast ones as well."""
        decline = torch.linspace(1.6, 0.3, self.config.heads)[:, None] * torch.arange(self.frequencies)
        return (-decline / 2).exp().repeat_interleave(2, dim=1).repeat(1, 3)

    def _local(self, block: Block) -> None:
        """Attention by distance, values that are turned at random, and branches that leave the channels of the place alone."""
        width, head = self.config.width, self.head_width
        attention, network = block.attn, block.mlp
        values = attention.kv.weight[width:]
        for scores in (attention.q.weight, attention.kv.weight[:width]):
            nn.init.normal_(scores, std=0.02)
            for number, reach in enumerate(self._reach()):
                scores[number * head : number * head + self.channels, : self.channels] += reach.diag()
        for norm in (attention.q_norm, attention.k_norm):
            nn.init.constant_(norm.weight, PEAK**0.5)
        nn.init.orthogonal_(values)
        nn.init.orthogonal_(attention.o.weight)
        nn.init.kaiming_normal_(network.fc1.weight, nonlinearity="linear")
        nn.init.normal_(network.fc2.weight, std=0.25 * width**-0.5)
        for layer in (attention.o, network.fc1, network.fc2):
            nn.init.zeros_(layer.bias)
        for layer in (attention.o, network.fc2):
            layer.weight[: self.channels + 3] = 0

    def _spread_heads(self, block: Block) -> None:
        """Plane tokens stand for columns: each head looks at another height of them."""
        head, heads = self.head_width, self.config.heads
        for number, reach in enumerate(self._reach()):
            height = torch.full((1, 3), 1.2 * ((number + 0.5) / heads - 0.5) * 2)
            for plane, axes in enumerate(PLANE_AXES):
                (third,) = {0, 1, 2} - set(axes)
                rows = slice(number * head, number * head + self.channels)
                block.attn.q.weight[rows, self.channels + plane] += reach * places(height, self.frequencies, (third,))[0]

    @staticmethod
    def _upsampler(network: nn.Module) -> None:
        """Convolutions that keep the variance, and residual branches that are closed."""
        for name, module in network.named_modules():
            if not isinstance(module, nn.Conv2d) or module.bias is None:
                continue
            if not name.endswith("conv1"):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
            if name.endswith("conv2"):
                nn.init.zeros_(module.weight)
            if name == "conv_in":
                nn.init.normal_(module.bias, std=CONSTANTS)


class NearestLatent(nn.Module):
    """The throw-away decoder: occupancy of a point from the latent whose place is nearest, and the way there."""

    places: Tensor

    def __init__(self, latent_places: Places, latent_dim: int, hidden: int = 64) -> None:
        super().__init__()
        self.register_buffer("places", latent_places)
        # Offsets, their sines and cosines at three frequencies, and their products.
        layers = [nn.Linear(latent_dim + 27, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1)]
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        self.network = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def forward(self, latents: LatentTensor, points: Float[Tensor, "batch points 3"]) -> Float[Tensor, "batch points"]:
        """Logits of points."""
        nearest = torch.cdist(points, self.places.expand(len(points), -1, -1)).argmin(dim=-1)
        own = latents.gather(1, nearest[..., None].expand(-1, -1, latents.shape[-1]))
        offset = 2 * (points - self.places[nearest])
        angles = (offset[..., None] * torch.tensor([1.5, 3.0, 6.0])).flatten(2)
        products = torch.cat([offset * offset, offset * offset.roll(1, dims=-1)], dim=-1)
        logits: Tensor = self.network(torch.cat([own, offset, angles.sin(), angles.cos(), products], dim=-1))
        return logits[..., 0]


# ------------------------------------------------------------------------------------------------------------------ solids


def make_samples(recipe: Recipe, path: Path) -> Samples:
    """The training set in half precision, mapped from a file that is written on the first call."""
    if not path.exists():
        made: list[Samples] = []
        drawn = shape_data.samples(recipe.solids, recipe.seed, points=recipe.points, volume=recipe.volume, near=recipe.near)
        with tqdm(total=recipe.solids, desc="solids", mininterval=10) as bar:
            for part in drawn:
                made.append(Samples(**{field.name: getattr(part, field.name).half() for field in fields(Samples)}))
                bar.update(len(part.points))
        joined = {field.name: torch.cat([getattr(part, field.name) for part in made]) for field in fields(Samples)}
        with replacing(path) as temporary:
            torch.save(joined, temporary)
    return Samples(**torch.load(path, mmap=True, weights_only=True))


def turns(count: int, generator: torch.Generator) -> Float[Tensor, "count 3 3"]:
    """Matrices of random symmetries of the cube, reflections too."""
    order = torch.rand(count, 3, generator=generator).argsort(dim=1)
    sign = torch.randint(2, (count, 3, 1), generator=generator) * 2 - 1
    return F.one_hot(order, 3).float() * sign


def draw_batch(samples: Samples, recipe: Recipe, generator: torch.Generator) -> Batch:
    """Random solids in random positions, with some of their points."""

    def some(total: int, count: int) -> Int[Tensor, " count"]:
        return torch.randperm(total, generator=generator)[:count]

    rows = torch.randint(len(samples.points), (recipe.batch,), generator=generator)
    turn = turns(recipe.batch, generator)
    surface = some(samples.points.shape[1], recipe.seen_points)
    volume, near = some(samples.volume.shape[1], recipe.seen_volume), some(samples.near.shape[1], recipe.seen_near)
    return Batch(
        points=samples.points[rows][:, surface].float() @ turn,
        normals=samples.normals[rows][:, surface].float() @ turn,
        volume_points=samples.volume[rows][:, volume].float() @ turn,
        volume_labels=(-samples.volume_distance[rows][:, volume].float() / recipe.softness).sigmoid(),
        near_points=samples.near[rows][:, near].float() @ turn,
        near_labels=(-samples.near_distance[rows][:, near].float() / recipe.softness).sigmoid(),
    )


# ---------------------------------------------------------------------------------------------------------------- training


class Stage(trainer.Stage):
    """The only stage: all of the model, at first without quantization.

    Args:
        recipe: of the training.
        model: what is trained; its weights are set to their start.
        samples: what on.
    """

    def __init__(self, recipe: Recipe, model: VAT, samples: Samples) -> None:
        self.recipe, self.model, self.samples, config = recipe, model, samples, model.config
        rng = torch.Generator().manual_seed(recipe.seed)
        surface = surface_points(samples.points, rng)
        latent_places, query_places = (
            cells(surface, round(math.log2(count))) for count in (config.num_latents, config.num_point_queries)
        )
        Start(config, latent_places, query_places).apply(model)
        self.guide = NearestLatent(latent_places, config.latent_dim)
        self.average = self._new_average()
        self.quantizing = False
        parts = {"model": model, "guide": self.guide, "average": self.average}
        chosen = optimizers(model, self.guide, recipe)
        super().__init__("vat-tiny", recipe.steps, recipe.minutes, chosen, parts, rng)

    def _new_average(self) -> AveragedModel:
        return AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(self.recipe.ema_decay))

    def update(self) -> dict[str, float]:
        if not self.quantizing and self.progress >= 1 - self.recipe.quantized:
            start_codebook(self.model.quantizer, self._latents(CODEBOOK_SOLIDS), generator=self.rng)
            self.quantizing = True
            # What was before the codebook has no part in the average.
            self.average = self.parts["average"] = self._new_average()
        self.set_rates(self.recipe.warmup, min_lr_ratio=0.01)
        batch = draw_batch(self.samples, self.recipe, self.rng)
        with torch.autocast("cpu", torch.bfloat16):
            loss, terms = self._losses(batch)
        self.optimizer_step(loss, [*self.model.parameters(), *self.guide.parameters()])
        self.average.update_parameters(self.model)
        if self.quantizing and (self.step + 1) % REDRAW_EVERY == 0:
            self._redraw()
        return terms

    def _losses(self, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """The model's own losses and the guide's, which reads the latents that the decoder is fed."""
        fed: list[Tensor] = []
        hook = self.model.decoder.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0]))
        found = losses(self.model, batch, quantize=self.quantizing, generator=self.rng)
        hook.remove()
        weight = max(0.0, 1 - self.progress / self.recipe.guided)
        guided = self._guide_loss(fed[0], batch) if weight else found.total.new_zeros(())
        terms = {name: found[name] for name in ("volume", "near", "quantizer")} | {"guide": guided}
        return found.total + weight * guided, {name: value.item() for name, value in terms.items()}

    def _guide_loss(self, latents: LatentTensor, batch: Batch) -> Float[Tensor, ""]:
        logits = self.guide(latents, torch.cat([batch.volume_points, batch.near_points], dim=1))
        volume, near = logits.split([batch.volume_points.shape[1], batch.near_points.shape[1]], dim=1)
        loss = F.binary_cross_entropy_with_logits
        return loss(volume, batch.volume_labels) + 0.5 * loss(near, batch.near_labels)

    @torch.no_grad()
    def _latents(self, count: int) -> LatentTensor:
        """Means of the latents of random solids."""
        drawn: Iterator[Batch] = (
            draw_batch(self.samples, self.recipe, self.rng) for _ in range(-(-count // self.recipe.batch))
        )
        return torch.cat([self.model.encoder(batch.points, batch.normals)[0] for batch in drawn])

    def _redraw(self) -> None:
        """Give codes that nothing is near to anymore another place."""
        latents, quantizer = self._latents(REDRAW_SOLIDS), self.model.quantizer
        usage = quantizer.ids(latents).flatten().bincount(minlength=len(quantizer.codebook))
        redraw_unused(quantizer, usage, latents, generator=self.rng)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"quantizing": self.quantizing}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.quantizing = state["quantizing"]


def surface_points(points: Float[Tensor, "solids points 3"], generator: torch.Generator) -> Float[Tensor, "places 3"]:
    """Points of all surfaces, in all positions."""
    rows, columns = (torch.randint(size, (PLACES_POINTS,), generator=generator) for size in points.shape[:2])
    return (points[rows, columns].float()[:, None] @ turns(PLACES_POINTS, generator))[:, 0]


def optimizers(model: VAT, guide: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (orthogonalised momentum) for the matrices of the blocks, AdamW for everything else."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    matrices = [parameter for block in blocks for parameter in block.parameters() if parameter.ndim == 2]
    chosen = set(map(id, matrices))
    others = [parameter for parameter in [*model.parameters(), *guide.parameters()] if id(parameter) not in chosen]
    return trainer.muon_and_adamw(matrices, others, recipe.rate, recipe.other_rate)


class Training(trainer.Training[VAT]):
    """The schedule of a recipe.

    Args:
        recipe: of the training.
        samples: what it is trained on.
        config: of the model.
    """

    stage: Stage

    def __init__(self, recipe: Recipe, samples: Samples, config: VATConfig = TINY) -> None:
        torch.manual_seed(recipe.seed)
        self.samples = samples
        super().__init__(recipe, VAT(config, name="vat-tiny"))

    def make_stage(self, index: int) -> Stage:
        return Stage(self.recipe, self.model, self.samples)

    def snapshot(self) -> VAT:
        return trainer.shipped(self.model, self.stage.average.module.state_dict())


def train(recipe: Recipe, out: Path, config: VATConfig = TINY, checkpoint_seconds: float = 90.0) -> VAT:
    """Train, or go on training, until the schedule ends; ``out`` and a checkpoint are written every ``checkpoint_seconds``."""
    path = out.with_suffix(f".solids-{recipe.seed}-{recipe.solids}.pt")
    return trainer.run(recipe, out, lambda: Training(recipe, make_samples(recipe, path), config), checkpoint_seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the recipe."""
    options = trainer.recipe_parser(__doc__, Recipe.seed).parse_args(arguments)
    torch.set_num_threads(1)  # layers this small gain nothing from more
    train(replace(Recipe(seed=options.seed), minutes=options.minutes), options.out)


if __name__ == "__main__":
    main()

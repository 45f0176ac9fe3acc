"""The recipe of ``tokenflow-tiny``: a small TokenFlow from pictures made by this package, on a CPU, in about 10 minutes.

    python -m zoo.weights.recipes.tokenflow --out weights/tokenflow-tiny.safetensors --minutes 8.5

Seeded and resumable: run the same command again and it goes on from the last checkpoint beside ``--out``. The pictures are
those of `image_data`; no photograph and no other network is used. There is no CLIP to learn from: a teacher is made first.

1. A vision transformer learns what kind of scene a picture shows, of the kinds in `TAUGHT` only, and the strengths of its
   edges and colours, which no linear map of pixels gives. Its features of the patches are what the semantic tokens carry.
2. Everything up to the tokens is computed in closed form. Both codes are principal components: of the teacher's features, and
   of the pixels under a patch, which the convolutional encoder can hand on exactly. One more component, the same for all, makes
   up most of their length: codes of length 1 behave like vectors of a plane then. The codebooks come from k-means over what the
   scales leave over.
3. Both decoders are trained on these tokens. The pixel decoder starts at the linear map that fits best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from zoo.codecs.tokenflow import TokenFlow, TokenFlowConfig
from zoo.codecs.tokenflow.decoder import PixelDecoder
from zoo.codecs.tokenflow.encoder import PixelEncoder, SemanticEncoder, resize
from zoo.codecs.tokenflow.training import semantic_loss
from zoo.weights.data import image as image_data
from zoo.weights.data.image import Images, Pictures, as_images, make_pictures, random_rows
from zoo.weights.recipes import trainer
from zoo.weights.recipes.closed_form import (
    Decoder,
    LatentTensor,
    Rows,
    as_cells,
    close_branches,
    initialise_decoder,
    least_squares,
    place_taps,
    principal,
)
from zoo.weights.recipes.trainer import Schedule, Trainer

TINY = TokenFlowConfig(
    image_size=128,
    patch_size=8,
    scales=(1, 2, 4, 8, 16),
    semantic_dim=64,
    semantic_depth=3,
    semantic_heads=4,
    semantic_hidden=256,
    codebook_size=4096,
    semantic_code_dim=16,
    pixel_code_dim=16,
    encoder_stem=16,
    encoder_widths=(16, 64, 64),
    encoder_blocks=1,
    latent_channels=16,
    decoder_widths=(64, 48, 32),
    decoder_blocks=1,
    norm_groups=1,
    semantic_decoder_depth=2,
    semantic_decoder_heads=4,
    feature_dim=64,
)

#: Kinds of scenes whose names the teacher is told. It never learns what the others are called.
TAUGHT = ("leaves", "landscape", "portrait", "still_life")
SCENES = tuple(scene.__name__ for scene in image_data.SCENES)

# Spread of the components beside that which all codes share, whose own share grows by about 1 with every scale.
PIXEL_SPREAD, SEMANTIC_SPREAD = 0.4, 0.1
# The constants in the channels of the convolutional encoder that hold no pixels. They make up most of what a norm measures, so
# that it does not take brightness and contrast away; and the point around which SiLU is almost linear.
CONSTANT, LINEAR_POINT = 8.0, 6.0
# Pictures that closed forms are computed from, and passes of k-means over their vectors.
KNOWN, PASSES = 1200, 8
# What the two stages get of the minutes; the rest is for pictures and closed forms.
SHARES = (0.2, 0.7)
# How much of the tanh between the layers of a projection is used: little, where it is linear.
TANH_SHARE = 0.1


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result besides the code.

    Attributes:
        pictures: size of the training set.
        teacher, decoders: the two schedules.
        teacher_batch, kept: pictures per step of the teacher, and how many of their patches it sees (arXiv 2212.00794).
        batch: pictures per step of the decoders.
        semantics: weight of the semantic loss.
    """

    pictures: int = 16_000
    teacher: Schedule = field(default_factory=lambda: Schedule(3_000, 2e-3, ema_decay=0.99))
    decoders: Schedule = field(default_factory=lambda: Schedule(4_000, 3e-4))
    teacher_batch: int = 32
    kept: int = 64
    batch: int = 8
    semantics: float = 0.05
    seed: int = 3407


# --------------------------------------------------------------------------------------------------------------- teacher


def statistics(images: Images) -> Float[Tensor, "batch statistics"]:
    """Brightness, colour, contrast and roughness of pictures, and its direction, at three scales; logarithms mostly."""
    grey = images.mean(dim=1, keepdim=True)
    colour = torch.stack([images[:, 0] - images[:, 2], images[:, 1] - images[:, 0]], dim=1)
    found = [grey.mean(dim=(1, 2, 3)), *colour.mean(dim=(2, 3)).unbind(1)]
    found += [(0.01 + colour.std(dim=(2, 3))).log()[:, i] for i in range(2)]
    for scale in range(3):
        for difference in (grey.diff(dim=2), grey.diff(dim=3)):
            strength = difference.abs()
            found.append((0.002 + strength.mean(dim=(1, 2, 3))).log())
            # Edges here and nothing there, or as much everywhere.
            found.append((0.002 + F.avg_pool2d(strength, 32 >> scale).std(dim=(1, 2, 3))).log())
        grey = F.avg_pool2d(grey, 2)
    return torch.stack(found, dim=1)


class Teacher(nn.Module):
    """The semantic encoder with what it is trained by: names of scenes, and statistics."""

    def __init__(self, encoder: SemanticEncoder, outputs: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.names = nn.Linear(encoder.positions.shape[1], len(SCENES))
        self.statistics = nn.Linear(encoder.positions.shape[1], outputs)

    def forward(self, images: Images, kept: Int[Tensor, " kept"]) -> tuple[Tensor, Tensor]:
        """Scores of the scenes and statistics from some of the patches."""
        encoder = self.encoder
        patches = encoder.patches(images).flatten(2).transpose(1, 2) + encoder.positions[1:]
        assert encoder.class_token is not None
        first = (encoder.class_token + encoder.positions[:1]).expand(len(images), 1, -1)
        x = torch.cat([first, patches[:, kept]], dim=1)
        pooled = encoder.norm(encoder.blocks(encoder.norm_pre(x)))[:, 1:].mean(dim=1)
        return self.names(pooled), self.statistics(pooled)


def teacher_trainer(recipe: Recipe, model: TokenFlow, pictures: Pictures) -> Trainer:
    """The first stage."""
    encoder = model.encoder.semantic
    known = statistics(as_images(pictures[:KNOWN].copy()))
    mean, std = known.mean(dim=0), known.std(dim=0)
    labels = torch.tensor([image_data.scene_number(i, recipe.seed) for i in range(len(pictures))])
    taught = torch.tensor([SCENES.index(name) for name in TAUGHT])
    torch.manual_seed(recipe.seed)
    initialise_semantic_encoder(encoder, pictures)
    teacher = Teacher(encoder, len(mean))

    def step(rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        chosen = random_rows(recipe.teacher_batch, len(pictures), rng)
        images = as_images(pictures[chosen])
        if random_rows(1, 2, rng)[0]:
            images = images.flip(3)
        kept = torch.randperm(model.config.grid**2, generator=rng)[: recipe.kept]
        with torch.autocast("cpu", torch.bfloat16):
            scores, estimates = teacher(images, kept)
        known = torch.isin(labels[chosen], taught)
        names = F.cross_entropy(scores[known].float(), labels[chosen][known])
        error = F.mse_loss(estimates.float(), (statistics(images) - mean) / std)
        right = (scores[known].argmax(dim=1) == labels[chosen][known]).float().mean()
        return names + error, {"names": names.item(), "right": right.item(), "statistics": error.item()}

    return Trainer("teacher", [(list(teacher.parameters()), 1.0)], step, recipe.teacher, recipe.seed)


@torch.no_grad()
def initialise_semantic_encoder(encoder: SemanticEncoder, pictures: Pictures) -> None:
    """Patches start as their principal components, whitened, positions as waves."""
    side = encoder.patches.kernel_size[0]
    cells = as_cells(as_images(pictures[:KNOWN].copy()), int(side)).flatten(0, 2)
    mean, axes, spread = principal(cells, encoder.patches.out_channels)
    encoder.patches.weight.copy_((axes / spread[:, None]).view_as(encoder.patches.weight))
    dim, grid = encoder.positions.shape[1], round((len(encoder.positions) - 1) ** 0.5)
    place = (torch.arange(grid) + 0.5) / grid * torch.pi
    waves = torch.stack([torch.cos(place * order) for order in range(dim // 2)], dim=1)
    waves = waves * 0.5 / (1 + torch.arange(dim // 2)).sqrt()
    table = torch.cat([waves[:, None].expand(-1, grid, -1), waves[None].expand(grid, -1, -1)], dim=2)
    # Means of the patches are not taken off, so that brightness stays visible; positions make up for their offset.
    encoder.positions[1:] = table.flatten(0, 1) - (axes / spread[:, None]) @ mean


# ----------------------------------------------------------------------------------------------------------- closed forms


# The convolutional networks run channels last, where the backward pass of PyTorch's group norm on a CPU takes as long as all
# convolutions. Training goes past them to the layers, in the other layout.


def encoder_features(encoder: PixelEncoder, images: Images) -> LatentTensor:
    """Inputs of the last convolutions of the pixel encoder."""
    return F.silu(encoder.norm_out(encoder.mid(encoder.levels(encoder.conv_in(images)))))


def layers(decoder: PixelDecoder) -> Decoder:
    """The layers of the pixel decoder."""
    own = decoder
    return Decoder(own.post_quant_conv, own.conv_in, own.mid, list(own.levels), own.norm_out, own.conv_out)


def decoded(decoder: PixelDecoder, latents: LatentTensor) -> Images:
    """Images of latents."""
    return resize(decoder.conv_out(layers(decoder)(latents)).float(), decoder.image_size)


@torch.no_grad()
def initialise_pixel_encoder(encoder: PixelEncoder, images: Images, scales: int) -> None:
    """Let the encoder compute the principal components of the cells under its latents.

    Blocks of 2 x 2 pixels move into channels at each halving, residual branches are closed, and the last convolution is a
    linear regression.
    """
    close_branches(encoder)
    place_taps(encoder.conv_in, 3, [(1, 1)])
    held = 3
    for level in encoder.levels:
        shortcut = level.resnets[0].conv_shortcut
        if shortcut is not None:
            place_taps(shortcut, held, [(0, 0)])
        if level.downsamplers:
            place_taps(level.downsamplers[0].conv, held, [(0, 0), (0, 1), (1, 0), (1, 1)])
            held *= 4
            # What is over holds constants from here on, as many of one sign as of the other.
            bias = level.downsamplers[0].conv.bias
            bias[held:] = CONSTANT * (1 - 2 * (torch.arange(len(bias) - held) % 2))
    encoder.norm_out.bias.fill_(LINEAR_POINT)
    cells = as_cells(images, 2 ** (len(encoder.levels) - 1))
    mean, axes, spread = principal(cells.flatten(0, 2), encoder.quant_conv.out_channels - 1)
    targets = (cells.flatten(0, 2) - mean) @ axes.T * (PIXEL_SPREAD / spread.square().sum().sqrt())
    targets = torch.cat([targets, torch.full((len(targets), 1), float(scales))], dim=1)
    features = torch.cat([encoder_features(encoder, some) for some in images.split(16)])
    weight, bias = least_squares(features.permute(0, 2, 3, 1).flatten(0, 2), targets)
    for convolution in (encoder.conv_out, encoder.quant_conv):
        nn.init.zeros_(convolution.weight)
        nn.init.zeros_(convolution.bias)
    encoder.conv_out.weight[: len(weight), :, 1, 1] = weight
    encoder.conv_out.bias[: len(bias)] = bias
    encoder.quant_conv.weight[:, : len(weight), 0, 0] = torch.eye(len(weight))


@torch.no_grad()
def initialise_semantic_codes(model: TokenFlow, images: Images) -> None:
    """Let the projection to semantic codes compute the principal components of the teacher's features."""
    features = torch.cat([model.encoder.semantic(some) for some in images.split(16)]).flatten(0, 1)
    first, _, second = model.encoder.to_codes
    mean, axes, spread = principal(features, second.out_features - 1)
    share = TANH_SHARE / features.std()
    first.weight.copy_(share * torch.eye(len(mean)))
    first.bias.copy_(-share * mean)
    nn.init.zeros_(second.weight)
    second.weight[:-1] = axes / share * (SEMANTIC_SPREAD / spread.square().sum().sqrt())
    nn.init.zeros_(second.bias)
    second.bias[-1] = len(model.config.scales)


@torch.no_grad()
def initialise_codebooks(model: TokenFlow, latents: LatentTensor, passes: int, seed: int) -> None:
    """K-means of what is searched for at all scales, with the codes as they are so far; unused ones start anew."""
    quantizer, widths = model.quantizer, model.quantizer.widths
    rng = torch.Generator().manual_seed(seed)
    books = (quantizer.semantic, quantizer.pixels)

    def put(codes: Rows) -> None:
        for book, part in zip(books, codes.split(widths, dim=1), strict=True):
            book.copy_(F.normalize(part, dim=1))

    # Directions of the latents themselves, at all scales, are codes to begin with.
    pool = torch.cat([F.adaptive_avg_pool2d(latents, scale).flatten(2).mT.flatten(0, 1) for scale in quantizer.scales])
    put(pool[torch.randperm(len(pool), generator=rng)[: len(quantizer.semantic)]])
    for _ in tqdm(range(passes), desc="codebooks"):
        found = [pair for some in latents.split(32) for pair in quantizer.searches(some)]
        queries = torch.cat([query.flatten(0, 1) for query, _ in found])
        ids = torch.cat([nearest.flatten() for _, nearest in found])
        counts = torch.bincount(ids, minlength=len(quantizer.semantic))
        codes = torch.zeros(len(counts), sum(widths)).index_add_(0, ids, queries)
        unused = counts == 0
        codes[unused] = queries[torch.randint(len(queries), (int(unused.sum()),), generator=rng)]
        put(codes)


def initialise_tokens(model: TokenFlow, pictures: Pictures, passes: int, seed: int) -> None:
    """Everything but the teacher in closed form."""
    torch.manual_seed(seed)
    images = as_images(pictures[:KNOWN].copy())
    small = resize(images, model.config.pixel_size)
    initialise_pixel_encoder(model.encoder.pixels, small, len(model.config.scales))
    initialise_semantic_codes(model, images)
    with torch.no_grad():
        latents = torch.cat([latents_of(model, some)[0] for some in images.split(16)])
        initialise_codebooks(model, latents, passes, seed)
        quantized = torch.cat([model.quantizer(some).latents for some in latents[: KNOWN // 4].split(16)])
    pixels = quantized[:, model.config.semantic_code_dim :]
    # The last code channel is much the same everywhere and has nothing to say.
    known = pixels.shape[1] - 1
    initialise_decoder(layers(model.decoder), pixels, small[: len(pixels)], known, 1 / PIXEL_SPREAD)


@torch.no_grad()
def latents_of(model: TokenFlow, images: Images) -> tuple[LatentTensor, Float[Tensor, "batch patches features"]]:
    """Latents, and the features of the teacher."""
    encoder, config = model.encoder, model.config
    features = encoder.semantic(images)
    semantic = encoder.to_codes(features).mT.unflatten(2, (config.grid, config.grid))
    own = encoder.pixels
    pixels = own.quant_conv(own.conv_out(encoder_features(own, resize(images, config.pixel_size))))
    return torch.cat([semantic, pixels], dim=1), features


# -------------------------------------------------------------------------------------------------------------- decoders


def decoders_trainer(recipe: Recipe, model: TokenFlow, pictures: Pictures) -> Trainer:
    """The second stage."""
    width = model.config.semantic_code_dim

    def step(rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        images = as_images(pictures[random_rows(recipe.batch, len(pictures), rng)])
        if random_rows(1, 2, rng)[0]:
            images = images.flip(3)
        latents, features = latents_of(model, images)
        quantized = model.quantizer.latents(model.quantizer.ids(latents))
        with torch.autocast("cpu", torch.bfloat16):
            estimate = decoded(model.decoder, quantized[:, width:])
            meaning = model.semantic_decoder(quantized[:, :width])
        error = F.mse_loss(estimate, images)
        distance = semantic_loss(meaning, features)
        psnr = -10 * torch.log10(error.detach() / 4).item()
        return error + recipe.semantics * distance, {"psnr": psnr, "semantic": distance.item()}

    trained = [*model.decoder.parameters(), *model.semantic_decoder.parameters()]
    return Trainer("decoders", [(trained, 1.0)], step, recipe.decoders, recipe.seed)


# -------------------------------------------------------------------------------------------------------------- training


class Training(trainer.Training[TokenFlow]):
    """The teacher, everything up to the tokens in closed form, and the decoders.

    Args:
        recipe: of the whole training.
        pictures: what it is trained on.
        config: of the model.
        passes: of k-means.
    """

    stages = 2
    writes_early = False

    def __init__(self, recipe: Recipe, pictures: Pictures, config: TokenFlowConfig = TINY, passes: int = PASSES) -> None:
        self.pictures, self.passes = pictures, passes
        torch.manual_seed(recipe.seed)
        super().__init__(recipe, TokenFlow(config, name="tokenflow-tiny"))

    def prepare(self, index: int) -> None:
        if index == 1:
            initialise_tokens(self.model, self.pictures, self.passes, self.recipe.seed)

    def make_stage(self, index: int) -> Trainer:
        return (teacher_trainer, decoders_trainer)[index](self.recipe, self.model, self.pictures)

    def snapshot(self) -> TokenFlow:
        return trainer.shipped(self.model)


def train(
    recipe: Recipe, out: Path, config: TokenFlowConfig = TINY, checkpoint_seconds: float = 90.0, passes: int = PASSES
) -> TokenFlow:
    """Train, or go on training, until both schedules end; a checkpoint is written every ``checkpoint_seconds``.

    Raises:
        ValueError: the checkpoint beside ``out`` was made by another recipe.
    """
    path = out.with_suffix(f".pictures-{recipe.seed}-{recipe.pictures}.npy")

    def begin() -> Training:
        return Training(recipe, make_pictures(path, recipe.pictures, recipe.seed), config, passes)

    return trainer.run(recipe, out, begin, checkpoint_seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the recipe."""
    options = trainer.recipe_parser(__doc__, Recipe.seed).parse_args(arguments)
    recipe = Recipe(seed=options.seed)
    if options.minutes is not None:
        teacher = replace(recipe.teacher, minutes=SHARES[0] * options.minutes)
        recipe = replace(recipe, teacher=teacher, decoders=replace(recipe.decoders, minutes=SHARES[1] * options.minutes))
    train(recipe, options.out)


if __name__ == "__main__":
    main()

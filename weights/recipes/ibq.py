"""The recipe of ``ibq-tiny``: a small IBQ tokenizer from pictures made by this package, on a CPU, in about half an hour.

    python -m zoo.weights.recipes.ibq --out weights/ibq-tiny.safetensors --minutes 30

Seeded and resumable: run the same command again and it goes on from the last checkpoint beside ``--out``. The pictures are
those of `image_data`; ``--data`` adds folders of your own.

1. Everything up to the ids is a closed form. Latents are principal components of the pixels of a cell, which the convolutional
   encoder hands on exactly, and one more number that is 1 everywhere. A code is a centre ``c`` of k-means, and
   ``-|c|^2 / 2`` behind it: the largest dot product with ``(z, 1)`` is then the nearest centre.
2. The decoder starts at the linear map that fits best, and is trained on the codes. There are neither discriminators nor a
   perceptual loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from zoo.codecs.ibq import IBQ, IBQConfig
from zoo.codecs.ibq.network import Decoder, Encoder
from zoo.media import IMAGE_EXTENSIONS, expand_paths, prepare_image
from zoo.nn.ema_codebook import kmeans
from zoo.weights.data.image import SIZE, Images, Pictures, as_images, make_pictures, random_rows
from zoo.weights.recipes import closed_form, trainer
from zoo.weights.recipes.closed_form import (
    LatentTensor,
    as_cells,
    close_branches,
    initialise_decoder,
    least_squares,
    place_taps,
    principal,
)
from zoo.weights.recipes.trainer import Schedule, Trainer

TINY = IBQConfig(
    stem=24,
    widths=(24, 48, 64, 96),
    blocks=1,
    attention=(),
    latent_channels=24,
    code_dim=24,
    codebook_size=8192,
    groups=1,
)

# The constants in the channels of the encoder that hold no pixels. They make up most of what a norm measures, so that it does
# not take brightness and contrast away; and the point around which SiLU is almost linear.
CONSTANT, LINEAR_POINT = 8.0, 6.0
# Pictures that closed forms are computed from, and passes of k-means over their cells.
KNOWN, PASSES = 1500, 10


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result besides the code and your own pictures.

    Attributes:
        pictures: how many are drawn.
        schedule: of the decoder.
        batch: crops per step.
        side: rows and columns of a crop.
    """

    pictures: int = 3_000
    schedule: Schedule = field(default_factory=lambda: Schedule(5_000, 6e-4, ema_decay=0.99))
    batch: int = 6
    side: int = 64
    seed: int = 3407


# ------------------------------------------------------------------------------------------------------------------ layers

# The convolutional networks run channels last, where the backward pass of PyTorch's group norm on a CPU takes as long as all
# convolutions. Training goes past them to the layers, in the other layout.


def encoder_features(encoder: Encoder, images: Images) -> LatentTensor:
    """Inputs of the encoder's last two convolutions."""
    return F.silu(encoder.norm_out(encoder.mid(encoder.levels(encoder.conv_in(images)))))


def latents_of(encoder: Encoder, images: Images) -> LatentTensor:
    """Latents of images."""
    latents: Tensor = encoder.quant_conv(encoder.conv_out(encoder_features(encoder, images)))
    return latents


@torch.no_grad()
def codes_of(model: IBQ, images: Images) -> LatentTensor:
    """Codes of images, the input of the decoder."""
    latents = torch.cat([latents_of(model.encoder, some) for some in images.split(16)])
    return model.quantizer.vectors(model.quantizer.ids(latents)).permute(0, 3, 1, 2).contiguous()


def layers(decoder: Decoder) -> closed_form.Decoder:
    """The layers of the decoder."""
    return closed_form.Decoder(
        decoder.post_quant_conv, decoder.conv_in, decoder.mid, list(decoder.levels), decoder.norm_out, decoder.conv_out
    )


# ------------------------------------------------------------------------------------------------------------ closed forms


@torch.no_grad()
def initialise_encoder(encoder: Encoder, images: Images) -> None:
    """Let the encoder compute the principal components of the cells under its latents, and 1 in the last channel.

    Each halving moves blocks of 2 x 2 pixels into channels. Where there are too few channels for all four, their principal
    components are kept. Residual branches are closed, and the last convolution is a linear regression.
    """
    close_branches(encoder)
    place_taps(encoder.conv_in, 3, [(1, 1)])
    held = 3
    for level in encoder.levels:
        shortcut = level.resnets[0].conv_shortcut
        if shortcut is not None:
            place_taps(shortcut, held, [(0, 0)])
            _fill(shortcut, held)
        if level.downsamplers:
            held = _halve(encoder, level.downsamplers[0].conv, held, images)
    encoder.norm_out.bias.fill_(LINEAR_POINT)
    cells = as_cells(images, 2 ** (len(encoder.levels) - 1)).flatten(0, 2)
    mean, axes, _ = principal(cells, encoder.quant_conv.out_channels - 1)
    targets = F.pad((cells - mean) @ axes.T, (0, 1), value=1.0)
    features = torch.cat([encoder_features(encoder, some) for some in images.split(16)])
    weight, bias = least_squares(features.permute(0, 2, 3, 1).flatten(0, 2), targets)
    for convolution in (encoder.conv_out, encoder.quant_conv):
        nn.init.zeros_(convolution.weight)
        assert convolution.bias is not None
        nn.init.zeros_(convolution.bias)
    encoder.conv_out.weight[: len(weight), :, 1, 1] = weight
    encoder.conv_out.bias[: len(bias)] = bias
    encoder.quant_conv.weight[:, : len(weight), 0, 0] = torch.eye(len(weight))


def _fill(convolution: nn.Conv2d, held: int) -> None:
    """Constants in the channels that hold nothing, as many of one sign as of the other."""
    assert convolution.bias is not None
    over = len(convolution.bias) - held
    convolution.bias[held:] = CONSTANT * (1 - 2 * (torch.arange(over) % 2))


def _halve(encoder: Encoder, convolution: nn.Conv2d, held: int, images: Images) -> int:
    """Let a convolution hand on blocks of 2 x 2 of what the first channels hold; returns how many channels hold something."""
    taps = [(0, 0), (0, 1), (1, 0), (1, 1)]
    room = convolution.out_channels - max(2, convolution.out_channels // 8)
    if 4 * held <= room:
        place_taps(convolution, held, taps)
        kept = 4 * held
    else:
        found: list[Tensor] = []
        with convolution.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0][:, :held])):
            for some in images.split(16):
                encoder_features(encoder, some)
        inputs = torch.cat(found)
        rows, columns = inputs.shape[2] - 1, inputs.shape[3] - 1
        blocks = torch.cat([inputs[:, :, row:rows:2, column:columns:2] for row, column in taps], dim=1)
        _, axes, _ = principal(blocks.permute(0, 2, 3, 1).flatten(0, 2), room)
        place_taps(convolution, 0, [])
        for number, (row, column) in enumerate(taps):
            convolution.weight[:room, :held, row, column] = axes[:, number * held : (number + 1) * held]
        kept = room
    _fill(convolution, kept)
    return kept


@torch.no_grad()
def initialise(model: IBQ, images: Images, passes: int, seed: int) -> None:
    """Everything in closed form."""
    rng = torch.Generator().manual_seed(seed)
    initialise_encoder(model.encoder, images)
    latents = torch.cat([latents_of(model.encoder, some) for some in images.split(16)])
    components = latents[:, :-1]
    vectors = components.permute(0, 2, 3, 1).flatten(0, 2)
    drawn = vectors[torch.randperm(len(vectors), generator=rng)[: model.config.codebook_size]]
    centres, _ = kmeans(vectors, drawn, passes)
    scale = 1 / centres.std()
    centres = scale * centres
    model.encoder.quant_conv.weight[:-1] *= scale
    model.quantizer.weight.copy_(torch.cat([centres, -centres.square().sum(1, keepdim=True) / 2], dim=1))
    images = images[: len(images) // 4]
    codes = codes_of(model, images)
    # The last number of a code says nothing that the others do not.
    known = codes.shape[1] - 1
    initialise_decoder(layers(model.decoder), codes, images, known)


# ---------------------------------------------------------------------------------------------------------------- training


def crops(pictures: Pictures, count: int, side: int, rng: torch.Generator) -> Float[Tensor, "crops 3 side side"]:
    """Random squares of pictures, or of pictures at half their size, mirrored half of the time."""
    images = as_images(pictures[sorted(random_rows(count, len(pictures), rng))])
    found = []
    for image, number in zip(images, random_rows(count, 4, rng), strict=True):
        if number & 1:
            image = F.avg_pool2d(image, 2)
        if number & 2:
            image = image.flip(2)
        top, left = (random_rows(1, size - side + 1, rng)[0] for size in image.shape[1:])
        found.append(image[:, top : top + side, left : left + side])
    return torch.stack(found)


def make_trainer(recipe: Recipe, model: IBQ, pictures: Pictures) -> Trainer:
    """The only stage."""
    decoder = layers(model.decoder)

    def step(rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        images = crops(pictures, recipe.batch, recipe.side, rng)
        estimate = decoder.conv_out(decoder(codes_of(model, images)))
        error = F.mse_loss(estimate, images)
        psnr = -10 * torch.log10(error.detach() / 4).item()
        return error + 0.25 * F.l1_loss(estimate, images), {"psnr": psnr}

    return Trainer("ibq-tiny", [(list(model.decoder.parameters()), 1.0)], step, recipe.schedule, recipe.seed)


class Training(trainer.Training[IBQ]):
    """The closed forms, and the training of the decoder.

    Args:
        recipe: of the whole training.
        pictures: what it is trained on.
        config: of the model.
        known: pictures that the closed forms are computed from.
        passes: of k-means.
    """

    def __init__(
        self, recipe: Recipe, pictures: Pictures, config: IBQConfig = TINY, known: int = KNOWN, passes: int = PASSES
    ) -> None:
        self.pictures, self.known, self.passes = pictures, known, passes
        torch.manual_seed(recipe.seed)
        super().__init__(recipe, IBQ(config, name="ibq-tiny"))

    def prepare(self, index: int) -> None:
        rng = torch.Generator().manual_seed(self.recipe.seed)
        images = torch.cat([crops(self.pictures, 1, self.recipe.side, rng) for _ in range(self.known)])
        initialise(self.model, images, self.passes, self.recipe.seed)

    def make_stage(self, index: int) -> Trainer:
        return make_trainer(self.recipe, self.model, self.pictures)

    def snapshot(self) -> IBQ:
        return trainer.shipped(self.model)


def own_pictures(folders: Sequence[Path], seed: int, each: int = 60) -> Pictures:
    """Random squares of the images in folders, at random scales, ``each`` of every image."""
    rng = torch.Generator().manual_seed(seed)
    found = [np.zeros((0, 3, SIZE, SIZE), np.uint8)]
    for path in tqdm(list(expand_paths(folders, IMAGE_EXTENSIONS)), desc="own pictures"):
        image = prepare_image(path, (SIZE, SIZE), fit="none").pixels[None]
        whole = SIZE / min(image.shape[2:])
        if whole > 1:
            continue
        for _ in range(each):
            scale = whole ** float(torch.rand((), generator=rng))
            some = F.interpolate(image, scale_factor=scale, mode="bilinear", antialias=True) if scale < 1 else image
            top, left = (random_rows(1, size - SIZE + 1, rng)[0] for size in some.shape[2:])
            square = some[0, :, top : top + SIZE, left : left + SIZE]
            found.append(((square + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)[None].numpy())
    return np.concatenate(found)


def train(
    recipe: Recipe,
    out: Path,
    folders: Sequence[Path] = (),
    config: IBQConfig = TINY,
    checkpoint_seconds: float = 120.0,
    known: int = KNOWN,
    passes: int = PASSES,
) -> IBQ:
    """Train, or go on training, until the schedule ends; ``out`` and a checkpoint are written every ``checkpoint_seconds``.

    Raises:
        ValueError: the checkpoint beside ``out`` was made by another recipe.
    """
    path = out.with_suffix(f".pictures-{recipe.seed}-{recipe.pictures}.npy")

    def begin() -> Training:
        pictures = make_pictures(path, recipe.pictures, recipe.seed)
        if folders:
            pictures = np.concatenate([pictures, own_pictures(folders, recipe.seed)])
        return Training(recipe, pictures, config, known, passes)

    return trainer.run(recipe, out, begin, checkpoint_seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the recipe."""
    parser = trainer.recipe_parser(__doc__, Recipe.seed)
    parser.add_argument("--data", type=Path, action="append", default=[], help="folder of your own pictures")
    options = parser.parse_args(arguments)
    recipe = Recipe(seed=options.seed)
    if options.minutes is not None:
        recipe = replace(recipe, schedule=replace(recipe.schedule, minutes=options.minutes))
    train(recipe, options.out, options.data)


if __name__ == "__main__":
    main()

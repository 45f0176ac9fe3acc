"""The recipe of ``seed-tiny``: a small SEED from pictures made by this package, on a CPU, in about 25 minutes.

    python -m zoo.weights.recipes.seed --out weights/seed-tiny.safetensors --minutes 21

Seeded and resumable: run the same command again and it goes on from the last checkpoint beside ``--out``. The pictures are
those of `image_data`; no photograph and no other network is used. There is no CLIP whose image embeddings could be the target,
so they are made in closed form: the name of the scene, known to the pictures' maker, and the layout of colours, the
principal components of a thumbnail. Four stages:

1. Vision transformer, causal Q-Former and head learn the embedding without a codebook.
2. With a codebook, from k-means over what the Q-Former gives; and the reconstruction of the Q-Former's output.
3. The image decoder, from latents that are principal components of 4 x 4 pixels to pixels.
4. The diffusion model, on such latents, told the embeddings that the tokens give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from zoo.codecs.seed import Seed, SeedConfig
from zoo.codecs.seed.embedding import States
from zoo.weights.data import image as image_data
from zoo.weights.data.image import Images, Pictures, as_images, make_pictures, random_rows
from zoo.weights.recipes import trainer
from zoo.weights.recipes.closed_form import Decoder, LatentTensor, as_cells, initialise_decoder, principal
from zoo.weights.recipes.trainer import Schedule, Trainer

LATENT_CHANNELS, EMBEDDING, PROMPT = 6, 48, (1, 32)

#: A diffusion model of 16 x 16 latents for images of 64 x 64 pixels.
DIFFUSION: Mapping[str, Any] = {
    "unet": {
        "sample_size": 16,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "block_out_channels": [48, 96],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 16,
        "attention_head_dim": 4,
        "cross_attention_dim": PROMPT[1],
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 2 * EMBEDDING,
    },
    "vae": {
        "block_out_channels": [24, 32, 64],
        "layers_per_block": 1,
        "latent_channels": LATENT_CHANNELS,
        "norm_num_groups": 1,
        "scaling_factor": 1.0,
    },
    "text_encoder": {"max_position_embeddings": PROMPT[0], "hidden_size": PROMPT[1]},
    "image_normalizer": {"embedding_dim": EMBEDDING},
    "scheduler": {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
    "image_noising_scheduler": {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"},
}

TINY = SeedConfig(
    image_size=64,
    patch_size=8,
    vision_dim=96,
    vision_depth=3,
    vision_heads=4,
    vision_mlp_dim=384,
    qformer_dim=96,
    qformer_depth=2,
    qformer_heads=4,
    qformer_mlp_dim=192,
    cross_attention_every=1,
    codes=1024,
    code_dim=16,
    decoder_depth=1,
    decoder_heads=4,
    decoder_mlp_ratio=2.0,
    head_widths=(32, 16),
    embedding_dim=EMBEDDING,
    diffusion=DIFFUSION,
    guidance=2.0,
)

SCENES = tuple(scene.__name__ for scene in image_data.SCENES)
# Pictures that closed forms are computed from, and passes of k-means.
KNOWN, PASSES = 2000, 10
# Side of the thumbnails whose principal components are in the embedding, and the size of a scene's name there.
THUMBNAIL, NAME_SIZE = 8, 2.0
# What the stages get of the minutes; the rest is for pictures, closed forms and the embeddings of all pictures.
SHARES = (0.08, 0.08, 0.04, 0.7)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result besides the code.

    Attributes:
        pictures: size of the training set.
        embedding, codes, images, diffusion: the four schedules.
        batch, image_batch, diffusion_batch: pictures per step of the first two, of the third and of the last stage.
        code_share: by how much of the rate the codebook moves.
        unconditional: share of items that the diffusion model is told nothing about.
        noise_levels: number of levels that the noise of embeddings is drawn from.
    """

    pictures: int = 16_000
    embedding: Schedule = field(default_factory=lambda: Schedule(4_000, 1e-3))
    codes: Schedule = field(default_factory=lambda: Schedule(4_000, 7e-4))
    images: Schedule = field(default_factory=lambda: Schedule(1_500, 3e-4))
    diffusion: Schedule = field(default_factory=lambda: Schedule(6_000, 1e-3, ema_decay=0.995))
    batch: int = 48
    image_batch: int = 16
    diffusion_batch: int = 48
    code_share: float = 0.3
    unconditional: float = 0.1
    noise_levels: int = 100
    seed: int = 3407


# ------------------------------------------------------------------------------------------------------------ embeddings


@dataclass(frozen=True)
class Targets:
    """Image embeddings in closed form, and the latents that images are drawn as.

    Attributes:
        names: number of the scene of every picture.
        mean, axes: of thumbnails; axes are scaled so that strong and faint components come closer together.
        cell_mean, cell_axes: of cells of pixels; components have variance 1.
    """

    names: Int[Tensor, " pictures"]
    mean: Float[Tensor, " pixels"]
    axes: Float[Tensor, "components pixels"]
    cell_mean: Float[Tensor, " cell"]
    cell_axes: Float[Tensor, "channels cell"]

    @classmethod
    def of(cls, pictures: Pictures, config: SeedConfig, seed: int) -> Targets:
        """From the first pictures of a seed."""
        names = torch.tensor([image_data.scene_number(i, seed) for i in range(len(pictures))])
        images = shrunk(as_images(pictures[:KNOWN].copy()), config.image_size)
        mean, axes, spread = principal(shrunk(images, THUMBNAIL).flatten(1), config.embedding_dim - len(SCENES))
        factor = 2 ** (len(config.diffusion["vae"]["block_out_channels"]) - 1)
        cells = as_cells(images, factor).flatten(0, 2)
        cell_mean, cell_axes, cell_spread = principal(cells, config.diffusion["vae"]["latent_channels"])
        scaled = axes / (spread * spread[0]).sqrt()[:, None]
        return cls(names, mean, scaled, cell_mean, cell_axes / cell_spread[:, None])

    def embeddings(self, images: Images, numbers: Sequence[int]) -> Float[Tensor, "batch embedding"]:
        """Names and colour layouts of images of the model's size."""
        layout = (shrunk(images, THUMBNAIL).flatten(1) - self.mean) @ self.axes.T
        return torch.cat([NAME_SIZE * F.one_hot(self.names[numbers], len(SCENES)).float(), layout], dim=1)

    def latents(self, images: Images) -> LatentTensor:
        """Whitened principal components of cells."""
        side = round((len(self.cell_mean) / 3) ** 0.5)
        return ((as_cells(images, side) - self.cell_mean) @ self.cell_axes.T).permute(0, 3, 1, 2).contiguous()


def shrunk(images: Float[Tensor, "batch 3 _ _"], size: int) -> Float[Tensor, "batch 3 _ _"]:
    """Means of the pixels under each pixel of a smaller image."""
    return F.adaptive_avg_pool2d(images, size)


def drawn(pictures: Pictures, size: int, count: int, rng: torch.Generator) -> tuple[list[int], Float[Tensor, "batch 3 _ _"]]:
    """Numbers and images of a random batch."""
    chosen = random_rows(count, len(pictures), rng)
    return chosen, shrunk(as_images(pictures[chosen]), size)


# ---------------------------------------------------------------------------------------------------------------- stages


def embedding_trainer(recipe: Recipe, model: Seed, pictures: Pictures, targets: Targets) -> Trainer:
    """The first stage."""
    trained = [*model.encoder.parameters(), *model.embedding.parameters()]

    def step(rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        chosen, images = drawn(pictures, model.config.image_size, recipe.batch, rng)
        wide = model.embedding.from_codes(model.encoder.summary.to_codes(model.encoder(images)))
        found = model.embedding.head(model.embedding.mixer(wide))
        return errors(found, targets.embeddings(images, chosen), targets.names[chosen])

    return Trainer("embedding", [(trained, 1.0)], step, recipe.embedding, recipe.seed)


def errors(
    found: Float[Tensor, "batch embedding"], target: Float[Tensor, "batch embedding"], names: Int[Tensor, " batch"]
) -> tuple[Tensor, dict[str, float]]:
    """Squared error of embeddings, and for the log how often the name is right."""
    error = F.mse_loss(found, target)
    right = (found[:, : len(SCENES)].argmax(dim=1) == names).float().mean()
    layout = F.mse_loss(found[:, len(SCENES) :], target[:, len(SCENES) :]) / target[:, len(SCENES) :].square().mean()
    return error, {"error": error.item(), "right": right.item(), "layout": layout.item()}


def codes_trainer(recipe: Recipe, model: Seed, pictures: Pictures, targets: Targets) -> Trainer:
    """The second stage: the losses of the paper's second one, but the encoder learns, too."""
    trained = [*model.encoder.parameters(), *model.embedding.parameters(), *model.features_decoder.parameters()]

    def step(rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        chosen, images = drawn(pictures, model.config.image_size, recipe.batch, rng)
        states: States = model.encoder(images)
        z = model.encoder.summary.to_codes(states)
        codes = model.codebook(model.codebook.nearest(z.detach()))
        wide = model.embedding.from_codes(z + (codes - z).detach())
        found = model.embedding.head(model.embedding.mixer(wide))
        error, terms = errors(found, targets.embeddings(images, chosen), targets.names[chosen])
        quantizer = F.mse_loss(codes, z.detach()) + 0.25 * F.mse_loss(z, codes.detach())
        rebuilt = 1 - F.cosine_similarity(model.features_decoder(wide.detach()), states.detach(), dim=-1).mean()
        return error + quantizer + 0.1 * rebuilt, terms | {"codes": quantizer.item(), "features": rebuilt.item()}

    groups = [(trained, 1.0), (list(model.codebook.parameters()), recipe.code_share)]
    return Trainer("codes", groups, step, recipe.codes, recipe.seed)


def images_trainer(recipe: Recipe, model: Seed, pictures: Pictures, targets: Targets) -> Trainer:
    """The third stage."""
    decoder = layers(model)

    def step(rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        _, images = drawn(pictures, model.config.image_size, recipe.image_batch, rng)
        with torch.autocast("cpu", torch.bfloat16):
            found = decoder.conv_out(decoder(targets.latents(images))).float()
        error = F.mse_loss(found, images)
        return error, {"psnr": -10 * torch.log10(error.detach() / 4).item()}

    return Trainer("images", [(list(model.decoder.vae.parameters()), 1.0)], step, recipe.images, recipe.seed)


def diffusion_trainer(recipe: Recipe, model: Seed, pictures: Pictures, targets: Targets) -> Trainer:
    """The fourth stage."""
    from diffusers import DDIMScheduler

    decoder, size = model.decoder, model.config.image_size
    told = embeddings_of_all(model, pictures)
    with torch.no_grad():
        decoder.mean.copy_(told.mean(dim=0))
        decoder.std.copy_(told.std(dim=0).clamp(min=1e-3))
    kept = DDIMScheduler.from_config(dict(decoder.scheduler)).alphas_cumprod
    prompt = decoder.prompt_states.detach().expand(recipe.diffusion_batch, -1, -1)

    def step(rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        chosen, images = drawn(pictures, size, recipe.diffusion_batch, rng)
        latents = targets.latents(images)
        noise = torch.randn(latents.shape, generator=rng)
        t = torch.randint(len(kept), (len(latents),), generator=rng)
        signal, amount = (share.sqrt().view(-1, 1, 1, 1) for share in (kept[t], 1 - kept[t]))
        level = random_rows(1, recipe.noise_levels, rng)[0]
        with torch.no_grad():
            condition = decoder.noised(told[chosen], torch.randn(told[chosen].shape, generator=rng), level)
        condition = condition * (torch.rand(len(condition), 1, generator=rng) >= recipe.unconditional)
        with torch.autocast("cpu", torch.bfloat16):
            noisy = signal * latents + amount * noise
            velocity = decoder.unet(noisy, t, encoder_hidden_states=prompt, class_labels=condition, return_dict=False)[0]
        error = F.mse_loss(velocity.float(), signal * noise - amount * latents)
        return error, {"velocity": error.item()}

    trained = list(decoder.unet.parameters())
    return Trainer("diffusion", [(trained, 1.0)], step, recipe.diffusion, recipe.seed)


def embeddings_of_all(model: Seed, pictures: Pictures) -> Float[Tensor, "pictures embedding"]:
    """Embeddings of the tokens of all pictures."""
    found = []
    with torch.inference_mode():
        for start in tqdm(range(0, len(pictures), 64), desc="tokens", mininterval=10):
            images = shrunk(as_images(pictures[start : start + 64].copy()), model.config.image_size)
            z = model.encoder.summary.to_codes(model.encoder(images))
            found.append(model.embedding(model.codebook(model.codebook.nearest(z))))
    return torch.cat(found).clone()


# ---------------------------------------------------------------------------------------------------------- closed forms


def layers(model: Seed) -> Decoder:
    """The layers of the image decoder."""
    own: Any = model.decoder.vae
    network = own.network
    return Decoder(
        own.post_quant_conv,
        network.conv_in,
        network.mid_block,
        list(network.up_blocks),
        network.conv_norm_out,
        network.conv_out,
    )


@torch.no_grad()
def initialise_vision(model: Seed, pictures: Pictures, targets: Targets) -> None:
    """Patches start as their whitened principal components."""
    network = model.encoder.vision.network
    images = shrunk(as_images(pictures[:KNOWN].copy()), model.config.image_size)
    projection = network.patch_embed.proj
    _, axes, spread = principal(as_cells(images, model.config.patch_size).flatten(0, 2), projection.out_channels)
    # The encoder divides pixels by about a quarter of their range.
    projection.weight.copy_((axes / (3 * spread[:, None] + spread[0] / 3)).view_as(projection.weight))
    nn.init.normal_(network.pos_embed, std=0.3)
    nn.init.normal_(model.encoder.summary.qformer.queries, std=1.0)


@torch.no_grad()
def initialise_codebook(model: Seed, pictures: Pictures, targets: Targets) -> None:
    """K-means of what the codebook is asked for; codes that nobody uses start anew."""
    rng = torch.Generator().manual_seed(0)
    found = []
    for start in range(0, min(KNOWN, len(pictures)), 64):
        images = shrunk(as_images(pictures[start : start + 64].copy()), model.config.image_size)
        found.append(model.encoder.summary.to_codes(model.encoder(images)).flatten(0, 1))
    queries, codes = torch.cat(found), model.codebook.codes
    codes.copy_(queries[torch.randint(len(queries), (len(codes),), generator=rng)])
    for _ in tqdm(range(PASSES), desc="codebook"):
        ids = model.codebook.nearest(queries)
        counts = torch.bincount(ids, minlength=len(codes))
        means = torch.zeros_like(codes).index_add_(0, ids, queries) / counts.clamp(min=1)[:, None]
        unused = counts == 0
        means[unused] = queries[torch.randint(len(queries), (int(unused.sum()),), generator=rng)]
        codes.copy_(means)


def initialise_images(model: Seed, pictures: Pictures, targets: Targets) -> None:
    """The image decoder starts at the best linear map, the UNet as diffusers makes it, and the prompt says nothing."""
    images = shrunk(as_images(pictures[: KNOWN // 8].copy()), model.config.image_size)
    latents = targets.latents(images)
    initialise_decoder(layers(model), latents, images, latents.shape[1])


def nothing(model: Seed, pictures: Pictures, targets: Targets) -> None:
    """The last stage starts from what the others left."""


Initialise = Callable[[Seed, Pictures, Targets], None]
MakeTrainer = Callable[[Recipe, Seed, Pictures, Targets], Trainer]
STAGES: tuple[tuple[Initialise, MakeTrainer], ...] = (
    (initialise_vision, embedding_trainer),
    (initialise_codebook, codes_trainer),
    (initialise_images, images_trainer),
    (nothing, diffusion_trainer),
)


# -------------------------------------------------------------------------------------------------------------- training


class Training(trainer.Training[Seed]):
    """The four stages in a row.

    Args:
        recipe: of the whole training.
        pictures: what it is trained on.
        config: of the model.
    """

    stages = len(STAGES)
    writes_early = False

    def __init__(self, recipe: Recipe, pictures: Pictures, config: SeedConfig = TINY) -> None:
        self.pictures, self.targets = pictures, Targets.of(pictures, config, recipe.seed)
        torch.manual_seed(recipe.seed)
        model = Seed(config, name="seed-tiny")
        model.reset_buffers()
        super().__init__(recipe, model)

    def prepare(self, index: int) -> None:
        initialise, _ = STAGES[index]
        initialise(self.model, self.pictures, self.targets)

    def make_stage(self, index: int) -> Trainer:
        _, make_trainer = STAGES[index]
        return make_trainer(self.recipe, self.model, self.pictures, self.targets)

    def snapshot(self) -> Seed:
        return trainer.shipped(self.model)


def train(recipe: Recipe, out: Path, config: SeedConfig = TINY, checkpoint_seconds: float = 90.0) -> Seed:
    """Train, or go on training, until all schedules end; a checkpoint is written every ``checkpoint_seconds``.

    Raises:
        ValueError: the checkpoint beside ``out`` was made by another recipe.
    """
    path = out.with_suffix(f".pictures-{recipe.seed}-{recipe.pictures}.npy")

    def begin() -> Training:
        return Training(recipe, make_pictures(path, recipe.pictures, recipe.seed), config)

    return trainer.run(recipe, out, begin, checkpoint_seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the recipe."""
    options = trainer.recipe_parser(__doc__, Recipe.seed).parse_args(arguments)
    recipe = Recipe(seed=options.seed)
    if options.minutes is not None:
        names = ("embedding", "codes", "images", "diffusion")
        limited = {
            name: replace(getattr(recipe, name), minutes=share * options.minutes)
            for name, share in zip(names, SHARES, strict=True)
        }
        recipe = replace(recipe, **limited)
    train(recipe, options.out)


if __name__ == "__main__":
    main()

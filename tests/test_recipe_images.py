"""The recipes of the embedded TokenFlow and SEED: closed forms, stages, resuming, and the files they write."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from small_models import SMALL_SEED, SMALL_TOKENFLOW
from zoo.codecs.tokenflow import TokenFlow
from zoo.weights.data import image as image_data
from zoo.weights.data.image import as_images
from zoo.weights.recipes import closed_form, seed, tokenflow
from zoo.weights.recipes.trainer import Schedule, Trainer

COUNT = 12
CONFIG = replace(SMALL_TOKENFLOW, encoder_widths=(16, 64, 64), norm_groups=1, feature_dim=32)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.stack([image_data.picture(index, seed=5) for index in range(COUNT)])


def small(pictures: np.ndarray, size: int) -> Tensor:
    return seed.shrunk(as_images(pictures), size)


# ---- pictures and closed forms


def test_scenes_are_named_as_they_were_drawn(pictures: np.ndarray) -> None:
    for index in range(COUNT):
        rng = np.random.default_rng((5, index))
        canvas = image_data.Canvas(rng, image_data.Palette.draw(rng))
        scene = list(image_data.SCENES)[image_data.scene_number(index, seed=5)]
        rng.choice(len(image_data.SCENES), p=list(image_data.SCENES.values()))
        scene(canvas)
        assert (image_data.photograph(canvas) == pictures[index]).all()


def test_principal_components() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(5000, 3, generator=generator) * torch.tensor([0.5, 3.0, 1.0]) + torch.tensor([1.0, 2.0, 3.0])
    mean, axes, spread = closed_form.principal(vectors, 2)
    assert torch.allclose(mean, torch.tensor([1.0, 2.0, 3.0]), atol=0.2)
    assert torch.allclose(spread, torch.tensor([3.0, 1.0]), atol=0.1)
    assert axes[0, 1].abs() > 0.99 and axes[1, 2].abs() > 0.99


def test_regression_finds_the_map() -> None:
    features = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    weight, bias = torch.arange(8.0).view(2, 4), torch.tensor([1.0, -2.0])
    found, offset = closed_form.least_squares(features, features @ weight.T + bias)
    assert torch.allclose(found, weight, atol=1e-3) and torch.allclose(offset, bias, atol=1e-3)


def test_the_pixel_encoder_gives_principal_components(pictures: np.ndarray) -> None:
    model = TokenFlow(CONFIG)
    images = small(pictures, CONFIG.pixel_size)
    with torch.no_grad():
        tokenflow.initialise_pixel_encoder(model.encoder.pixels, images, scales=3)
        latents = model.encoder.pixels(images)
    cells = closed_form.as_cells(images, 4)
    mean, axes, _ = closed_form.principal(cells.flatten(0, 2), 3)
    expected = ((cells - mean) @ axes.T).permute(0, 3, 1, 2)
    for channel in range(3):
        correlation = torch.corrcoef(torch.stack([latents[:, channel].flatten(), expected[:, channel].flatten()]))[0, 1]
        assert correlation.abs() > 0.995
    assert torch.allclose(latents[:, 3], torch.full_like(latents[:, 3], 3.0), atol=0.05)
    assert float(latents[:, :3].square().sum(dim=1).mean().sqrt()) == pytest.approx(tokenflow.PIXEL_SPREAD, rel=0.05)


def test_the_decoder_starts_at_a_good_linear_map(pictures: np.ndarray) -> None:
    model = TokenFlow(replace(CONFIG, pixel_code_dim=16, latent_channels=16, decoder_widths=(64, 48, 32)))
    images = small(pictures, 64)
    with torch.no_grad():
        cells = closed_form.as_cells(images, 4)
        mean, axes, _ = closed_form.principal(cells.flatten(0, 2), 15)
        latents = ((cells - mean) @ axes.T).permute(0, 3, 1, 2)
        latents = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1)
        layers = tokenflow.layers(model.decoder)
        closed_form.initialise_decoder(layers, latents, images, 15)
        error = (layers.conv_out(layers(latents)) - images).square().mean()
    coarse = torch.nn.functional.interpolate(small(pictures, 16), size=64, mode="bilinear")
    assert error < 0.75 * (coarse - images).square().mean()


def test_codebooks_cover_what_is_searched_for(pictures: np.ndarray) -> None:
    torch.manual_seed(0)
    model = TokenFlow(CONFIG)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(40, CONFIG.code_dim, 4, 4, generator=generator)

    def distance() -> float:
        codes, found = model.quantizer.codes().detach(), 0.0
        for queries, ids in model.quantizer.searches(latents):
            found += float((queries - codes[ids]).square().sum(dim=-1).mean())
        return found

    tokenflow.initialise_codebooks(model, latents, 1, 0)
    first = distance()
    tokenflow.initialise_codebooks(model, latents, 6, 0)
    assert distance() < first
    used = torch.unique(model.quantizer.ids(latents))
    assert len(used) > 0.9 * CONFIG.codebook_size


# ---- the trainer


def trainer(steps: int) -> tuple[nn.Linear, Trainer]:
    torch.manual_seed(0)
    layer = nn.Linear(3, 1)

    def step(rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        inputs = torch.randn(8, 3, generator=rng)
        loss = (layer(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()
        return loss, {"loss": loss.item()}

    return layer, Trainer("test", [(list(layer.parameters()), 1.0)], step, Schedule(steps, 0.1, warmup=2, ema_decay=0.9), 0)


def to_the_end(stage: Trainer) -> None:
    while stage.progress < 1:
        stage.train_step()
    stage.finish()


def test_training_goes_on_where_it_stopped() -> None:
    whole, straight = trainer(40)
    to_the_end(straight)
    first, begun = trainer(40)
    for _ in range(15):
        begun.train_step()
    state = json.loads(json.dumps(begun.step)), begun.state_dict()
    second, resumed = trainer(40)
    resumed.load_state_dict(state[1])
    assert resumed.step == state[0] == 15
    to_the_end(resumed)
    assert torch.allclose(second.weight, whole.weight, atol=1e-6)
    assert (whole.weight - 1).abs().max() < 0.3 and first.weight is not second.weight


# ---- whole recipes


def write_pictures(folder: Path, name: str, pictures: np.ndarray) -> Path:
    np.save(folder / f"{name}.pictures-5-{len(pictures)}.npy", pictures)
    return folder / f"{name}.safetensors"


def test_tokenflow_from_pictures_to_a_file(tmp_path: Path, pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pictures are 128 pixels on a side, and so must be the model's.
    config = replace(CONFIG, image_size=128, patch_size=32)
    short = Schedule(2, 1e-3)
    recipe = tokenflow.Recipe(pictures=COUNT, teacher=short, decoders=short, teacher_batch=6, kept=5, batch=3, seed=5)
    out = write_pictures(tmp_path, "tokenflow-tiny", pictures)
    model = tokenflow.train(recipe, out, config, passes=1)
    with safe_open(out, "pt") as file:
        saved = json.loads(file.metadata()["zoo"])
        assert all(file.get_tensor(key).dtype == torch.float16 for key in file.keys())  # noqa: SIM118
    assert saved["fingerprint"] == model.fingerprint and saved["name"] == "tokenflow-tiny"
    assert not list(tmp_path.glob("*.checkpoint.pt"))
    assert model.decode(model.encode(pictures[0].transpose(1, 2, 0)))[0].shape == (3, 128, 128)


def test_seed_from_pictures_to_a_file(tmp_path: Path, pictures: np.ndarray) -> None:
    short = Schedule(2, 1e-3)
    schedules = {name: short for name in ("embedding", "codes", "images", "diffusion")}
    recipe = seed.Recipe(pictures=COUNT, batch=4, image_batch=2, diffusion_batch=3, seed=5, **schedules)
    diffusion = {**SMALL_SEED.diffusion, "vae": {**SMALL_SEED.diffusion["vae"], "block_out_channels": [8, 8, 8]}}
    config = replace(SMALL_SEED, diffusion=diffusion)
    out = write_pictures(tmp_path, "seed-tiny", pictures)
    model = seed.train(recipe, out, config)
    assert out.exists() and not list(tmp_path.glob("*.checkpoint.pt"))
    tokens = model.encode(pictures[0].transpose(1, 2, 0))
    assert tokens.lengths.tolist() == [config.queries]
    assert model.decode(tokens)[0].shape == (3, 32, 32)
    # The normaliser is that of the embeddings that tokens give.
    told = seed.embeddings_of_all(model, pictures)
    assert torch.allclose(model.decoder.mean, told.mean(dim=0), atol=0.05)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path, pictures: np.ndarray) -> None:
    out = write_pictures(tmp_path, "seed-tiny", pictures)
    torch.save({"recipe": {}, "stage": 0}, out.with_suffix(".checkpoint.pt"))
    with pytest.raises(ValueError, match="belongs to another recipe"):
        seed.train(seed.Recipe(pictures=COUNT, seed=5), out, SMALL_SEED)
    out = write_pictures(tmp_path, "tokenflow-tiny", pictures)
    torch.save({"recipe": {}, "stage": 0}, out.with_suffix(".checkpoint.pt"))
    with pytest.raises(ValueError, match="belongs to another recipe"):
        tokenflow.train(tokenflow.Recipe(pictures=COUNT, seed=5), out, CONFIG)


def test_targets_say_scene_and_colours(pictures: np.ndarray) -> None:
    targets = seed.Targets.of(pictures, seed.TINY, 5)
    images = small(pictures, 64)
    embeddings = targets.embeddings(images, list(range(COUNT)))
    assert embeddings.shape == (COUNT, seed.EMBEDDING)
    assert embeddings[:, : len(seed.SCENES)].argmax(dim=1).tolist() == [image_data.scene_number(i, 5) for i in range(COUNT)]
    latents = targets.latents(images)
    assert latents.shape == (COUNT, seed.LATENT_CHANNELS, 16, 16)
    assert torch.allclose(latents.std(dim=(0, 2, 3)), torch.ones(seed.LATENT_CHANNELS), atol=0.1)

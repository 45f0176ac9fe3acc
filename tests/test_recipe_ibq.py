"""The recipe of ``ibq-tiny``: closed forms that agree with what they stand for, resuming, and the file it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

import zoo
from zoo.codecs.ibq import IBQConfig
from zoo.weights.data import image as image_data
from zoo.weights.recipes import closed_form, ibq
from zoo.weights.recipes.trainer import Schedule

COUNT, SEED, KNOWN = 10, 5, 20
SMALL = IBQConfig(
    stem=16, widths=(16, 56, 56), blocks=1, attention=(), latent_channels=9, code_dim=9, codebook_size=64, groups=1
)
BRIEF = ibq.Recipe(pictures=COUNT, schedule=Schedule(6, 1e-3, warmup=2), batch=2, side=32, seed=SEED)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.stack([image_data.picture(index, seed=SEED) for index in range(COUNT)])


def known_crops(pictures: np.ndarray) -> Tensor:
    """What the closed forms are computed from."""
    rng = torch.Generator().manual_seed(SEED)
    return torch.cat([ibq.crops(pictures, 1, BRIEF.side, rng) for _ in range(KNOWN)])


def training(pictures: np.ndarray, recipe: ibq.Recipe = BRIEF) -> ibq.Training:
    return ibq.Training(recipe, pictures, SMALL, known=KNOWN, passes=2)


def test_latents_are_principal_components_and_ids_the_nearest_centres(pictures: np.ndarray) -> None:
    model = training(pictures).model
    images = known_crops(pictures)
    with torch.no_grad():
        latents = model.encoder(images)
        assert torch.allclose(latents, ibq.latents_of(model.encoder, images), atol=1e-4)
        assert torch.allclose(latents[:, -1], torch.ones(KNOWN, 8, 8), atol=0.02)
        distances = torch.cdist(latents[:, :-1].permute(0, 2, 3, 1).flatten(0, 2), model.quantizer.weight[:, :-1])
    nearest = distances.argmin(dim=1)
    ids = model.encode(list(images)).ids.flatten()
    assert (ids == nearest).float().mean() > 0.97
    # What 8 components of a cell of 4 x 4 pixels keep, up to a rotation and a scale.
    cells = closed_form.as_cells(images, 4).flatten(0, 2)
    components = latents[:, :-1].permute(0, 2, 3, 1).flatten(0, 2)
    weight, bias = closed_form.least_squares(components, cells)
    left = (components @ weight.T + bias - cells).square().mean()
    mean, axes, _ = closed_form.principal(cells, 8)
    best = ((cells - mean) @ axes.T @ axes + mean - cells).square().mean()
    assert left < 1.1 * best + 1e-4


def test_the_decoder_starts_at_a_picture(pictures: np.ndarray) -> None:
    model = training(pictures).model
    images = known_crops(pictures)
    with torch.no_grad():
        codes = ibq.codes_of(model, images)
        error = (model.decoder(codes) - images).square().mean()
    assert error < 0.7 * images.var()


def test_resuming_gives_the_model_of_an_uninterrupted_run(pictures: np.ndarray, tmp_path: Path) -> None:
    whole = training(pictures)
    for _ in range(6):
        whole.stage.train_step()
    interrupted = training(pictures)
    for _ in range(3):
        interrupted.stage.train_step()
    interrupted.save(tmp_path / "checkpoint.pt")
    torch.rand(100)
    resumed = training(pictures)
    resumed.restore(tmp_path / "checkpoint.pt")
    assert resumed.stage.step == 3
    for _ in range(3):
        resumed.stage.train_step()
    for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right)
    with pytest.raises(ValueError, match="another recipe"):
        training(pictures, replace(BRIEF, batch=3)).restore(tmp_path / "checkpoint.pt")


def test_from_pictures_to_a_file(pictures: np.ndarray, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    Image.fromarray(pictures[0].transpose(1, 2, 0)).resize((300, 200)).save(own / "a.png")
    Image.fromarray(pictures[0].transpose(1, 2, 0)).resize((90, 200)).save(own / "small.png")
    found = ibq.own_pictures([own], SEED, each=3)
    assert found.shape == (3, 3, 128, 128) and found.std() > 5
    out = tmp_path / "ibq-tiny.safetensors"
    np.save(out.with_suffix(f".pictures-{SEED}-{COUNT}.npy"), pictures)
    model = ibq.train(BRIEF, out, [own], SMALL, known=KNOWN, passes=1)
    assert not list(tmp_path.glob("*.checkpoint*"))
    with safe_open(out, "pt") as file:
        saved = json.loads(file.metadata()["zoo"])
    assert saved["name"] == "ibq-tiny" and saved["config"]["groups"] == 1
    loaded = zoo.load(f"local-dir:{out}")
    picture = pictures[1].transpose(1, 2, 0)
    assert loaded.encode(picture).equal(model.encode(picture))

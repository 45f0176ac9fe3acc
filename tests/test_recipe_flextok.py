"""The recipe of the embedded image model: its pictures, its stages, resuming, and the file it writes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from zoo.codecs.flextok import FlexTok, FlexTokConfig
from zoo.weights.recipes import flextok as recipe_module
from zoo.weights.recipes import image_data
from zoo.weights.recipes.flextok import (
    AutoencoderStage,
    FlowStage,
    Pictures,
    Recipe,
    Training,
    TuneStage,
    altered,
    as_images,
    encode_all,
    make_pictures,
    pixel_metric,
    prefix_condition,
    standardise,
    train,
)

SMALL = FlexTokConfig(
    vae_widths=(8, 8, 8, 8),
    vae_layers_per_block=1,
    vae_groups=4,
    latent_channels=4,
    scaling_factor=1.0,
    grid=(8, 8),
    registers=4,
    levels=(5, 4, 3),
    encoder_dim=16,
    encoder_depth=1,
    encoder_head_dim=8,
    decoder_dim=16,
    decoder_depth=2,
    decoder_head_dim=8,
    max_timestep=100.0,
    steps=1,
    guidance=1.0,
)
BRIEF = Recipe(
    pictures=12,
    flow_pictures=10,
    vae_steps=3,
    flow_steps=4,
    tune_steps=2,
    flow_batch=4,
    tune_batch=8,
    warmup=2,
    averaging=(0.5, 0.5, 0.5),
    threads=1,
    seed=7,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models are too small to share between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return np.stack([image_data.picture(index, seed=1) for index in range(BRIEF.pictures)])


def advance(training: Training) -> None:
    """One step, and on to the next stage behind the last one of a schedule."""
    training.stage.train_step()
    if training.stage.progress >= 1 and training.index < 2:
        training.advance()


def weights(training: Training) -> Tensor:
    """All weights of the model and of the running average as one vector."""
    parts = [*training.model.parameters(), *training.stage.average.parameters()]
    return torch.cat([part.detach().flatten() for part in parts])


# -------------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("scene", image_data.SCENES, ids=lambda scene: scene.__name__)
def test_every_scene_is_seeded_finite_and_varied(scene: image_data.Scene) -> None:
    def render(seed: int) -> image_data.Picture:
        rng = np.random.default_rng(seed)
        canvas = image_data.Canvas(rng, image_data.Palette.draw(rng))
        scene(canvas)
        return canvas.pixels

    one, same, other = render(1), render(1), render(2)
    assert one.shape == (3, 128, 128) and np.isfinite(one).all()
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert np.mean([render(seed).std() for seed in range(4)]) > 0.02


def test_a_picture_depends_on_its_seed_and_index_alone() -> None:
    one = image_data.picture(5, seed=3)
    assert one.dtype == np.uint8 and one.shape == (3, 128, 128)
    image_data.picture(6, seed=3)
    assert np.array_equal(one, image_data.picture(5, seed=3))
    assert not np.array_equal(one, image_data.picture(6, seed=3))
    assert not np.array_equal(one, image_data.picture(5, seed=4))


def test_pictures_have_the_statistics_of_photographs() -> None:
    """Power falls about like 1/f², light varies more than colour, and some pictures are black and white."""
    sample = np.stack([image_data.picture(index, seed=11) for index in range(60)]) / 255
    grey = sample.mean(axis=1)
    window = np.hanning(128)[:, None] * np.hanning(128)
    centred = (grey - grey.mean(axis=(1, 2), keepdims=True)) * window
    power = (np.abs(np.fft.fft2(centred)) ** 2).mean(axis=0)
    radius = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.fftfreq(128)[None]) * 128
    frequencies = np.arange(3, 40)
    bands = [power[(radius >= f - 0.5) & (radius < f + 0.5)].mean() for f in frequencies]
    slope = np.polyfit(np.log(frequencies), np.log(bands), 1)[0]
    assert -3 < slope < -1.8
    chroma = np.sqrt(((sample - grey[:, None]) ** 2).mean(axis=(1, 2, 3)))
    assert 0.02 < np.median(chroma) < 0.6 * grey.std()
    assert 0.05 < (chroma < 0.02).mean() < 0.6
    assert 0.3 < sample.mean() < 0.6


def test_a_circle_has_its_area_whatever_lies_under_it() -> None:
    rng = np.random.default_rng(0)
    canvas = image_data.Canvas(rng, image_data.Palette.draw(rng))
    canvas.pixels[:] = 0
    white = np.ones(3, np.float32)
    canvas.paint(60.3, 70.8, 20, image_data.ellipse(20, 20), white, shading="flat", texture=0, cast=False)
    assert canvas.pixels.min() == 0 and canvas.pixels.max() == 1
    assert canvas.pixels[0].sum() == pytest.approx(math.pi * 400, rel=0.01)


def test_a_polygon_holds_the_points_between_its_corners() -> None:
    corners = np.array([(-4, -3), (6, -2), (1, 5)], np.float32)
    outline = image_data.polygon(corners)
    weights = np.random.default_rng(0).dirichlet((1, 1, 1), 100).astype(np.float32)
    inside = weights @ corners
    assert (outline(inside[:, :1], inside[:, 1:]) <= 1e-5).all()
    beyond = corners + 0.1 * (corners - corners.mean(axis=0))
    assert (outline(beyond[:, :1], beyond[:, 1:]) > 0).all()


def test_the_training_set_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        image_data, "pictures", lambda count, seed, processes: (image_data.picture(i, seed) for i in range(count))
    )
    small = replace(BRIEF, pictures=2)
    made = make_pictures(small, tmp_path / "p.npy")
    assert np.array_equal(made[1], image_data.picture(1, small.seed))
    monkeypatch.setattr(image_data, "pictures", None)
    assert np.array_equal(make_pictures(small, tmp_path / "p.npy"), made)


# ----------------------------------------------------------------------------------------------------------- the stages


def test_altered_items_are_smoothed_and_mixed_by_their_shares() -> None:
    values = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    share = torch.linspace(0, 1, 8).view(8, 1, 1, 1)
    out = altered(values, share, 8)
    assert torch.equal(out[:4], values[:4])
    for item in (4, 5):  # a cell of the whole picture: its mean
        flat = values[item].mean(dim=(1, 2), keepdim=True)
        torch.testing.assert_close(out[item], values[item] + share[item] * (flat - values[item]))
    for item in (6, 7):
        torch.testing.assert_close(out[item], (1 - share[item]) * values[item] + share[item] * values[item - 6])


def test_standardised_latents_decode_to_the_same_pictures(pictures: Pictures) -> None:
    model = FlexTok(SMALL)
    vae = model.vae.eval().requires_grad_(False)
    images = as_images(pictures)
    mean, log_variance = vae.encoder(images)
    before = vae.decoder(mean)
    spread = (mean - mean.mean(dim=(0, 2, 3), keepdim=True)).std()
    standardise(vae, pictures)
    new_mean, new_log_variance = vae.encoder(images)
    torch.testing.assert_close(new_mean.mean(dim=(0, 2, 3)), torch.zeros(4), atol=2e-3, rtol=0)
    assert float(new_mean.std()) == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(vae.decoder(new_mean), before, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(new_log_variance, log_variance - 2 * spread.log(), atol=5e-3, rtol=0)


def test_the_metric_weighs_latents_by_the_pixels_they_move() -> None:
    """Latents made of the cells' own red and (fainter) green mean: errors of either count by what they do to pixels."""
    rng = np.random.default_rng(0)
    pictures = np.broadcast_to(rng.integers(0, 256, (40, 3, 4, 1, 4, 1), np.uint8), (40, 3, 4, 8, 4, 8)).reshape(40, 3, 32, 32)
    means = torch.from_numpy(pictures[:, :, ::8, ::8].copy()).float() / 127.5 - 1
    latents = torch.stack([means[:, 0], 4 * means[:, 1]], dim=1)
    metric = pixel_metric(latents, pictures)
    # A unit of the second channel moves a pixel by a quarter: a sixteenth of the squared error.
    expected = 0.5 * torch.eye(2) + torch.diag(torch.tensor([16 / 17, 1 / 17]))
    torch.testing.assert_close(metric, expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_the_collapsed_condition_equals_the_dense_one(count: int) -> None:
    torch.manual_seed(0)
    model = FlexTok(SMALL)
    for parameter in model.decoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    codes = model.fsq.codes(torch.randint(model.fsq.vocab_size, (3, 4)))
    x, t = torch.randn(3, 4, 16, 16), model.decoder.timestep(torch.tensor([1.0, 0.5, 0.2]))
    null = torch.tensor([False, True, False])
    with torch.no_grad():
        dense = model.decoder(x, t, model.decoder.dense_condition(codes, torch.full((3,), count), null))
        collapsed = model.decoder(x, t, prefix_condition(model.decoder, codes[:, :count], null))
    torch.testing.assert_close(collapsed, dense, atol=1e-4, rtol=1e-4)


def test_the_flow_goes_through_all_prefix_lengths_in_turn(pictures: Pictures) -> None:
    stage = FlowStage(BRIEF, FlexTok(SMALL), pictures, torch.randn(10, 4, 16, 16))
    logged: list[str] = []
    for _ in range(3):
        logged += [name for name in stage.train_step() if name != "flow"]
    assert logged == ["k1", "k2", "k4", "k1", "k2", "k4"]


@pytest.mark.parametrize("stage", [AutoencoderStage, FlowStage, TuneStage])
def test_every_stage_lowers_its_loss(pictures: Pictures, stage: type, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(replace(BRIEF, vae_steps=90, flow_steps=90, tune_steps=90), pictures, SMALL)
    latents = encode_all(training.model.vae, pictures)
    trained = stage(training.recipe, training.model, pictures, latents / latents.float().std())
    terms: dict[str, list[float]] = {}
    for _ in range(16):
        for name, value in trained.train_step().items():
            terms.setdefault(name, []).append(value)
    for name in ("clear", "k1") if stage is not FlowStage else ("k1", "k4", "flow"):
        if name in terms:
            values = terms[name]
            assert np.mean(values[-3:]) < np.mean(values[:2]), name


def test_the_schedule_ends_with_the_steps_or_the_minutes(pictures: Pictures) -> None:
    stage = Training(replace(BRIEF, vae_steps=100, vae_minutes=10.0), pictures, SMALL).stage
    assert stage.progress == 0
    stage.step = 25
    assert stage.progress == 0.25
    stage.elapsed = 300.0
    assert stage.progress == 0.5
    stage.elapsed = 6000.0
    assert stage.progress == 1


# ------------------------------------------------------------------------------------------------------- the whole recipe


@pytest.mark.parametrize("stop", [2, 5, 8], ids=["autoencoder", "flow", "decoder"])
def test_resuming_goes_on_as_an_uninterrupted_run_does(pictures: Pictures, tmp_path: Path, stop: int) -> None:
    """Up to rounding: the CPU kernels round by where in memory a tensor lies, in two runs of one process as well."""
    whole, other, interrupted, resumed = (Training(BRIEF, pictures, SMALL) for _ in range(4))
    other.stage.rng.manual_seed(BRIEF.seed + 1)
    for _ in range(9):
        advance(whole)
        advance(other)
    for _ in range(stop):
        advance(interrupted)
    interrupted.save(tmp_path / "checkpoint.pt")
    torch.rand(1000)  # another process would not have this process's global random state
    resumed.restore(tmp_path / "checkpoint.pt")
    for _ in range(9 - stop):
        advance(resumed)

    assert whole.index == resumed.index == 2 and whole.stage.step == resumed.stage.step
    assert torch.equal(whole.stage.rng.get_state(), resumed.stage.rng.get_state())
    distance, chance = (float((weights(whole) - weights(run)).norm()) for run in (resumed, other))
    assert distance < 0.05 * chance


def test_a_checkpoint_of_another_recipe_is_refused(pictures: Pictures, tmp_path: Path) -> None:
    Training(BRIEF, pictures, SMALL).save(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="another recipe"):
        Training(replace(BRIEF, vae_steps=9), pictures, SMALL).restore(tmp_path / "checkpoint.pt")


def test_the_written_file_holds_the_exported_model(pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids from the file equal those of the model that was exported: rounding to half precision comes first."""
    monkeypatch.setattr(recipe_module, "make_pictures", lambda recipe, path: pictures)
    out = tmp_path / "tiny.safetensors"
    exported = train(BRIEF, out, SMALL, every=0.0)
    assert [path.name for path in tmp_path.iterdir()] == [out.name], "no checkpoint or temporary file is left"

    with safe_open(out, "pt") as file:
        saved = json.loads(file.metadata()["zoo"])
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in saved["config"].items()}
    loaded = FlexTok(FlexTokConfig(**config))
    state = load_file(out)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    loaded.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    loaded.eval().requires_grad_(False)
    assert saved["family"] == "flextok" and saved["fingerprint"] == loaded.compute_fingerprint()
    image = as_images(pictures[:1])[0]
    assert torch.equal(loaded.encode(image).ids, exported.encode(image).ids)
    restored = loaded.decode(loaded.encode(image).truncate(2))[0]
    assert restored.shape == (3, 128, 128) and restored.isfinite().all()

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
from zoo.weights.data import image as image_data
from zoo.weights.data.image import Pictures, as_images, make_pictures
from zoo.weights.recipes import flextok as recipe_module
from zoo.weights.recipes.closed_form import regress
from zoo.weights.recipes.flextok import (
    BalanceStage,
    FlowStage,
    LatentAugmentation,
    Recipe,
    Training,
    TuneStage,
    encode_all,
    train,
)
from zoo.weights.recipes.flextok_start import (
    Axes,
    Region,
    fit_codes,
    harmonic_positions,
    initialise,
    initialise_autoencoder,
    prefix_condition,
    regions,
)

SMALL = FlexTokConfig(
    vae_widths=(8, 12, 12, 16, 16),
    vae_layers_per_block=1,
    vae_groups=1,
    latent_channels=4,
    scaling_factor=1.0,
    grid=(4, 4),
    registers=4,
    levels=(5, 4, 3),
    encoder_dim=64,
    encoder_depth=1,
    encoder_head_dim=16,
    decoder_dim=64,
    decoder_depth=2,
    decoder_head_dim=16,
    max_timestep=100.0,
    steps=1,
    guidance=1.0,
)
BRIEF = Recipe(
    pictures=12,
    flow_steps=4,
    balance_steps=2,
    tune_steps=3,
    flow_batch=8,
    tune_batch=8,
    warmup=2,
    ema_decay=(0.5, 0.5, 0.5),
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
    if training.stage.progress >= 1 and training.index < training.stages - 1:
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
    made = make_pictures(tmp_path / "p.npy", 2, 7)
    assert np.array_equal(made[1], image_data.picture(1, 7))
    monkeypatch.setattr(image_data, "pictures", None)
    assert np.array_equal(make_pictures(tmp_path / "p.npy", 2, 7), made)


# ------------------------------------------------------------------------------------------------------------- the start


def test_registers_are_a_tree_of_regions() -> None:
    tree = regions((8, 8), 64)
    assert tree[:3] == [(0, Region(0, 8, 0, 8)), (1, Region(0, 4, 0, 8)), (1, Region(4, 8, 0, 8))]
    assert [level for level, _ in tree].count(5) == 32 and tree[63] == tree[0]
    for level in range(6):
        covered = torch.zeros(8, 8)
        for number, region in tree[:63]:
            if number == level:
                covered[region.top : region.bottom, region.left : region.right] += 1
        assert (covered == 1).all()
    assert Region(0, 4, 2, 3).halves == (Region(0, 2, 2, 3), Region(2, 4, 2, 3), Region(0, 4, 2, 3), Region(0, 4, 2, 3))
    assert [len(regions((4, 4), count)) for count in (1, 5, 100)] == [1, 5, 100]
    assert regions((4, 4), 5)[3:] == regions((4, 4), 100)[31:33] == [(0, Region(0, 4, 0, 4))] * 2


def test_axes_read_rows_and_columns_and_are_orthogonal() -> None:
    table = harmonic_positions((8, 8), 160)
    axes = Axes.of(table, 64, torch.Generator().manual_seed(0))
    positions = table[0].flatten(1).T
    read = (positions - positions.mean(dim=1, keepdim=True)) @ axes.read.T
    expected = torch.stack([Region(row, row + 1, column, column + 1).place((8, 8)) for row in range(8) for column in range(8)])
    torch.testing.assert_close(read, expected, atol=0.01, rtol=0)
    free = torch.cat([axes.halves.flatten(0, 1), axes.content])
    torch.testing.assert_close(free @ free.T, torch.eye(len(free)), atol=1e-5, rtol=0)
    assert (positions @ free.T).abs().max() < 1e-4 and (axes.read @ free.T).abs().max() < 1e-4
    with pytest.raises(ValueError, match="does not hold patches"):
        Axes.of(harmonic_positions((8, 8), 96), 64, torch.Generator())


def test_latents_are_standardised_components_of_cells(pictures: Pictures) -> None:
    model = FlexTok(SMALL)
    vae = model.vae.eval().requires_grad_(False)
    images = as_images(pictures)
    initialise_autoencoder(vae, images)
    latents, log_variance = vae.encoder(images)
    assert float(latents.std()) == pytest.approx(1, abs=0.1) and (log_variance == -6).all()
    # Nearly linear: what is added to a picture is added to its latents.
    change = 0.2 * torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    together, alone = vae.encoder(images[:2] * 0.5 + change)[0], vae.encoder(images[:2] * 0.5)[0]
    torch.testing.assert_close((together - alone)[0], (together - alone)[1], atol=0.1, rtol=0)
    error = (vae.decoder(latents) - images).square().mean()
    smooth = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(images, 32), scale_factor=32.0)
    assert error < (smooth - images).square().mean()


def test_a_regression_holds_at_corners() -> None:
    """Inputs that are about constant are zero beyond the border, so that corners are like nothing else in an image."""
    signal = torch.randn(21, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    # What a kernel gives that hides the constant everywhere but at corners, where another channel has to take it away.
    kernel = torch.tensor([[[[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]]])
    outputs = torch.nn.functional.conv2d(signal, kernel, padding=1)
    inputs = 4 + 0.1 * torch.cat([signal, torch.zeros_like(signal)], dim=1)
    convolution = nn.Conv2d(2, 1, 3, padding=1)
    regress(convolution, inputs, outputs)
    errors = (convolution(inputs) - outputs).square().mean(dim=(0, 1))
    assert errors[::15, ::15].max() < 0.05


def test_the_start_says_more_with_every_token(pictures: Pictures) -> None:
    torch.manual_seed(0)
    model = FlexTok(SMALL).eval().requires_grad_(False)
    initialise_autoencoder(model.vae, as_images(pictures))
    latents = encode_all(model.vae, pictures).float()
    initialise(model, latents, torch.Generator().manual_seed(0))
    codes = model.fsq(model.encoder(latents))
    # The first component of the first token follows the picture's mean.
    brightness = latents[:, 0].mean(dim=(1, 2))
    assert torch.corrcoef(torch.stack([codes[:, 0, 0], brightness]))[0, 1] > 0.8
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    timestep = model.decoder.timestep(torch.ones(len(latents)))
    errors = []
    for count in (1, 2, 4):
        velocity = model.decoder(noise, timestep, prefix_condition(model.decoder, codes[:, :count], None))
        errors.append(float((noise - velocity - latents).square().mean()))
    assert errors[2] < errors[0] < float(latents.var())


def test_codes_fill_their_range_at_every_level(pictures: Pictures) -> None:
    model = FlexTok(SMALL).eval().requires_grad_(False)
    initialise_autoencoder(model.vae, as_images(pictures))
    latents = encode_all(model.vae, pictures).float()
    initialise(model, latents, torch.Generator().manual_seed(0))
    fit_codes(model, regions(SMALL.grid, SMALL.registers), latents)
    spread = (model.encoder(latents) + model.fsq.shift(latents)).std(dim=0)
    assert (spread[:, 0] > 0.3).all() and (spread[:, 0] < 1.2).all()


def test_latents_change_as_those_of_changed_pictures(pictures: Pictures) -> None:
    model = FlexTok(SMALL).eval().requires_grad_(False)
    initialise_autoencoder(model.vae, as_images(pictures))
    augment = LatentAugmentation(model.vae, pictures)
    latents = model.vae.encoder(as_images(pictures))[0]
    mirrored = model.vae.encoder(as_images(pictures[..., ::-1].copy()))[0]
    found = torch.einsum("ab,nbrc->narc", augment.mirror, latents.flip(3))
    assert (found - mirrored).square().mean() < 0.1 * mirrored.var()
    changed = augment(latents, torch.Generator().manual_seed(0))
    assert changed.shape == latents.shape and 0.05 < float((changed - latents).square().mean()) < 5
    assert torch.equal(changed, augment(latents, torch.Generator().manual_seed(0)))


# ------------------------------------------------------------------------------------------------------------ the stages


@pytest.mark.parametrize("count", [1, 3, 4])
def test_the_collapsed_condition_equals_the_dense_one(count: int) -> None:
    torch.manual_seed(0)
    model = FlexTok(SMALL)
    for parameter in model.decoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    codes = model.fsq.codes(torch.randint(model.fsq.vocab_size, (3, 4)))
    x, t = torch.randn(3, 4, 8, 8), model.decoder.timestep(torch.tensor([1.0, 0.5, 0.2]))
    null = torch.tensor([False, True, False])
    with torch.no_grad():
        dense = model.decoder(x, t, model.decoder.dense_condition(codes, torch.full((3,), count), null))
        collapsed = model.decoder(x, t, prefix_condition(model.decoder, codes[:, :count], null))
    torch.testing.assert_close(collapsed, dense, atol=1e-4, rtol=1e-4)


def test_the_flow_goes_through_all_prefix_lengths_in_turn(pictures: Pictures) -> None:
    stage = FlowStage(BRIEF, FlexTok(SMALL), pictures, torch.randn(10, 4, 8, 8))
    logged: list[str] = []
    for _ in range(3):
        logged += [name for name in stage.train_step() if name != "flow"]
    assert logged == ["k1", "k2", "k4", "k1", "k2", "k4"]


@pytest.mark.parametrize("stage", [FlowStage, BalanceStage, TuneStage])
def test_every_stage_lowers_its_loss(pictures: Pictures, stage: type) -> None:
    recipe = replace(BRIEF, flow_steps=90, balance_steps=90, tune_steps=90, tune_rate=2e-5, warmup=10)
    training = Training(recipe, pictures, SMALL)
    trained = stage(training.recipe, training.model, pictures, training.latents)

    def loss() -> float:
        trained.rng.manual_seed(99)
        with torch.no_grad():
            return sum(float(shard()[0]) for _ in range(4) for shard in trained.shards())

    before = loss()
    for _ in range(30):  # as many as a whole number of turns through the prefix lengths
        trained.train_step()
    assert loss() < before


def test_balanced_items_pull_by_how_much_they_lose_of_their_error(pictures: Pictures) -> None:
    stage = BalanceStage(BRIEF, FlexTok(SMALL), pictures, torch.randn(10, 4, 8, 8))
    errors = torch.tensor([0.1, 1.0, 1.0], requires_grad=True)
    stage.weighed(errors, torch.tensor([1.0, 1.0, 0.5])).sum().backward()
    assert errors.grad is not None
    torch.testing.assert_close(errors.grad, torch.tensor([1 / 0.12, 1 / 1.02, 1.0]))


def test_the_schedule_is_that_of_the_recipe(pictures: Pictures) -> None:
    stage = Training(replace(BRIEF, flow_steps=100, flow_minutes=10.0), pictures, SMALL).stage
    assert (stage.steps, stage.minutes) == (100, 10.0)


# ------------------------------------------------------------------------------------------------------- the whole recipe


@pytest.mark.parametrize("stop", [2, 5, 7], ids=["flow", "balance", "decoder"])
def test_resuming_goes_on_as_an_uninterrupted_run_does(pictures: Pictures, tmp_path: Path, stop: int) -> None:
    """Up to rounding: the CPU kernels round by where in memory a tensor lies, in two runs of one process as well."""
    whole, other, interrupted, resumed = (Training(BRIEF, pictures, SMALL) for _ in range(4))
    other.stage.rng.manual_seed(BRIEF.seed + 1)
    for _ in range(8):
        advance(whole)
        advance(other)
    for _ in range(stop):
        advance(interrupted)
    interrupted.save(tmp_path / "checkpoint.pt")
    torch.rand(1000)  # another process would not have this process's global random state
    resumed.restore(tmp_path / "checkpoint.pt")
    for _ in range(8 - stop):
        advance(resumed)

    assert whole.index == resumed.index == 2 and whole.stage.step == resumed.stage.step
    assert torch.equal(whole.stage.rng.get_state(), resumed.stage.rng.get_state())
    distance, chance = (float((weights(whole) - weights(run)).norm()) for run in (resumed, other))
    assert distance < 0.05 * chance


def test_a_checkpoint_of_another_recipe_is_refused(pictures: Pictures, tmp_path: Path) -> None:
    Training(BRIEF, pictures, SMALL).save(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="another recipe"):
        Training(replace(BRIEF, flow_steps=9), pictures, SMALL).restore(tmp_path / "checkpoint.pt")


def test_the_written_file_holds_the_exported_model(pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids from the file equal those of the model that was exported: rounding to half precision comes first."""
    monkeypatch.setattr(recipe_module, "make_pictures", lambda path, count, seed: pictures)
    out = tmp_path / "tiny.safetensors"
    exported = train(BRIEF, out, SMALL, checkpoint_seconds=0.0)
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

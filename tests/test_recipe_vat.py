"""The recipe of ``vat-tiny``: solids with true distances, a start that is local, and training that resumes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from zoo.codecs.vat import VAT, VATConfig
from zoo.codecs.vat.decoder import PLANE_AXES
from zoo.weights.data import shape as shape_data
from zoo.weights.data.shape import PRIMITIVES, Part, Samples, Solid, Solids
from zoo.weights.recipes.vat import NearestLatent, Recipe, Start, Training, cells, draw_batch, make_samples, train, turns

SMALL = VATConfig(
    width=32,
    heads=2,
    num_points=128,
    num_point_queries=16,
    num_latents=8,
    encoder_layers=1,
    decoder_layers=1,
    latent_dim=4,
    codebook_size=8,
    token_scales=(1, 3, 8),
    plane_size=4,
    upsampler_channels=(8, 8),
    upsampler_layers=0,
    norm_groups=4,
    mid_attention=False,
    triplane_channels=6,
    query_hidden=16,
    query_layers=3,
    resolution=16,
)
BRIEF = Recipe(
    solids=12, points=128, volume=64, near=64, steps=8, quantized=0.5, batch=3, seen_points=96, seen_volume=48, seen_near=48,
    warmup=2, ema_decay=0.5, seed=7,
)  # fmt: skip
UPRIGHT = np.eye(3)
#: Sizes that make each primitive about as large as a ball of radius 0.5.
SIZES = {
    shape_data.box: (0.5, 0.4, 0.3, 0.1),
    shape_data.ellipsoid: (0.5, 0.4, 0.3),
    shape_data.cylinder: (0.4, 0.5, 0.1),
    shape_data.torus: (0.4, 0.15),
    shape_data.capsule: (0.25, 0.3),
    shape_data.cone: (0.5, 0.2, 0.4),
    shape_data.prism: (0.4, 0.4, 5.0),
    shape_data.tube: (0.4, 0.1, 0.4),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models are too small to share between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return make_samples(BRIEF, tmp_path_factory.mktemp("solids") / "solids.pt")


def single(primitive: shape_data.Primitive, **place: object) -> Solid:
    return Solid((Part(primitive, SIZES[primitive], np.zeros(3), UPRIGHT),), **place)  # type: ignore[arg-type]


def weights(training: Training) -> Tensor:
    """All weights of the model and of the running average as one vector."""
    parts = [*training.model.parameters(), *training.stage.average.parameters()]
    return torch.cat([part.detach().flatten() for part in parts])


# ---------------------------------------------------------------------------------------------------------------- solids


@pytest.mark.parametrize("primitive", PRIMITIVES, ids=lambda primitive: primitive.__name__)
def test_a_distance_is_negative_inside_and_grows_by_one_per_unit(primitive: shape_data.Primitive) -> None:
    solids = Solids([single(primitive)])
    points = torch.rand(1, 4000, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    distance, slope = solids.gradient(points)
    near = distance.abs() < 0.03
    assert near.sum() > 20
    # Along edges, and of the ellipsoid, it is a bound.
    assert (slope[near].norm(dim=-1) - 1).abs().median() < 0.05
    assert (slope[near].norm(dim=-1) < 1.4).all()
    share = (distance < 0).float().mean()
    assert 0.01 < share < 0.2
    assert (distance[points.norm(dim=-1) > 1.1] > 0).all()


def test_primitives_have_their_volume() -> None:
    points = torch.rand(1, 200_000, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for primitive, size, expected in (
        (shape_data.box, (0.5, 0.4, 0.3), 8 * 0.06),
        (shape_data.ellipsoid, (0.5, 0.4, 0.3), 4 / 3 * math.pi * 0.06),
        (shape_data.cylinder, (0.4, 0.5), math.pi * 0.16),
        (shape_data.torus, (0.5, 0.2), 2 * math.pi**2 * 0.5 * 0.04),
        (shape_data.capsule, (0.3, 0.4), math.pi * 0.09 * 0.8 + 4 / 3 * math.pi * 0.027),
        (shape_data.cone, (0.5, 0.2, 0.4), math.pi * 0.8 / 3 * (0.25 + 0.1 + 0.04)),
        (shape_data.prism, (0.4, 0.5, 4.0), 0.64),
        (shape_data.tube, (0.5, 0.1, 0.4), math.pi * (0.36 - 0.16) * 0.8),
    ):
        solids = Solids([Solid((Part(primitive, size, np.zeros(3), UPRIGHT),))])
        volume = 8 * float((solids.distance(points) < 0).float().mean())
        assert volume == pytest.approx(expected, rel=0.03), primitive.__name__


def test_parts_are_joined_cut_mirrored_and_turned() -> None:
    def at(x: float, y: float = 0.0, cut: bool = False) -> Part:
        return Part(shape_data.ellipsoid, (0.3, 0.3, 0.3), np.array([x, y, 0]), UPRIGHT, cut=cut)

    places = torch.tensor([[[0.5, 0, 0], [-0.5, 0, 0], [0, 0.5, 0], [0.25, 0, 0]]])
    for solid, inside in (
        (Solid((at(0.5),)), [True, False, False, True]),
        (Solid((at(0.5), at(-0.5))), [True, True, False, True]),
        (Solid((at(0.5), at(0.1, cut=True))), [True, False, False, False]),
        (Solid((at(0.5),), mirrors=(True, False, False)), [True, True, False, True]),
        (Solid((at(0.5),), turns=4), [True, True, True, True]),
        (Solid((at(0.5),), rotation=shape_data._ALONG[0]), [False, False, True, False]),
    ):
        assert (Solids([solid]).distance(places)[0] < 0).tolist() == inside


def test_a_solid_depends_on_its_seed_and_index_alone() -> None:
    places = torch.rand(1, 300, 3) * 2 - 1

    def field(index: int, seed: int) -> Tensor:
        return Solids([shape_data.solid(index, seed)]).distance(places)

    first = field(3, 1)
    assert torch.equal(first, field(3, 1))
    assert not torch.equal(first, field(4, 1)) and not torch.equal(first, field(3, 2))
    together = Solids([shape_data.solid(index, 1) for index in range(6)]).distance(places.expand(6, -1, -1))
    assert torch.allclose(together[3], first[0], atol=1e-6)


def test_samples_lie_on_surfaces_with_normals_that_look_out() -> None:
    solids = [single(shape_data.ellipsoid), single(shape_data.torus)]
    found, kept = shape_data.sample(solids, 512, 256, 256, torch.Generator().manual_seed(0))
    assert kept == [0, 1]
    assert torch.allclose(found.points.amax(1) + found.points.amin(1), torch.zeros(2, 3), atol=1e-5)
    assert torch.allclose((found.points.amax(1) - found.points.amin(1)).amax(-1), torch.full((2,), 1.9), atol=1e-5)
    # The torus: its ring has radius 0.4 and its tube 0.15, both scaled so that 1.1 becomes 1.9.
    x, y, z = found.points[1].unbind(-1)
    ring = torch.stack([x, y, torch.zeros(512)], -1)
    ring = ring / ring.norm(dim=-1, keepdim=True) * 0.4 * 1.9 / 1.1
    away = found.points[1] - ring
    assert (away.norm(dim=-1) - 0.15 * 1.9 / 1.1).abs().max() < 0.02
    assert torch.nn.functional.cosine_similarity(away, found.normals[1], dim=-1).min() > 0.95
    x, y, z = found.volume[1].unbind(-1)
    expected = ((x.hypot(y) - 0.4 * 1.9 / 1.1).hypot(z)) - 0.15 * 1.9 / 1.1
    assert torch.allclose(found.volume_distance[1], expected, atol=0.02)


def test_the_training_set_is_made_once(samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(BRIEF, solids=4)
    made = make_samples(small, tmp_path / "p.pt")
    assert len(made.points) >= 4 and made.points.dtype == torch.float16
    monkeypatch.setattr(shape_data, "samples", None)
    again = make_samples(small, tmp_path / "p.pt")
    assert all(torch.equal(getattr(again, field.name), getattr(made, field.name)) for field in fields(Samples))


# ------------------------------------------------------------------------------------------------------------------- start


def test_cells_hold_equal_shares_and_neighbours_in_the_order_are_close() -> None:
    points = torch.rand(4096, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    middles = cells(points, 6)
    nearest = torch.cdist(points, middles).argmin(1).bincount(minlength=64)
    assert nearest.min() > 32 and nearest.max() < 110
    steps = (middles[1:] - middles[:-1]).norm(dim=-1)
    assert steps.median() < 0.6 * torch.cdist(middles, middles).median()


def test_symmetries_are_those_of_the_cube() -> None:
    made = turns(2000, torch.Generator().manual_seed(0))
    assert torch.equal(made @ made.mT, torch.eye(3).expand(2000, -1, -1))
    assert len(made.flatten(1).unique(dim=0)) == 48


@torch.no_grad()
def test_attention_starts_local() -> None:
    """A latent attends most to the points around its place, a plane token to the latents of its column."""
    torch.manual_seed(0)
    model, middles = VAT(SMALL), cells(torch.rand(4096, 3) * 1.8 - 0.9, 3)
    Start(SMALL, middles, cells(torch.rand(4096, 3) * 1.8 - 0.9, 4)).apply(model)
    points = torch.rand(1, 3000, 3) * 1.8 - 0.9
    encoder, block = model.encoder, model.encoder.point_attention
    embedded = encoder.embed(points, torch.nn.functional.normalize(points, dim=-1))

    def scores(block: torch.nn.Module, queries: Tensor, keys: Tensor) -> Tensor:
        attention = block.attn
        q = attention.q_norm(attention._per_head(attention.q(queries)))
        k = attention.k_norm(attention._per_head(attention.kv(keys).chunk(2, dim=-1)[0]))
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1)[0]

    share = scores(block, block.norm1(encoder.point_queries[None]), block.norm_context(embedded))
    places = cells(torch.rand(4096, 3) * 1.8 - 0.9, 4)
    assert share.shape == (16, 3000)
    centres = share @ points[0]
    assert torch.cdist(centres, places).min(1).values.median() < 0.35

    decoder, first = model.decoder, model.decoder.blocks[0]
    share = scores(first, first.norm1(decoder.plane_queries[None]), first.norm1(decoder.latent_position[None]))
    size, centre = SMALL.plane_size, (torch.arange(SMALL.plane_size) + 0.5) / SMALL.plane_size * 2 - 1
    found = (share @ middles).unflatten(0, (3, size, size))
    for plane, (across, down) in enumerate(PLANE_AXES):
        assert torch.corrcoef(torch.stack([found[plane, ..., across].mean(0), centre]))[0, 1] > 0.8
        assert torch.corrcoef(torch.stack([found[plane, ..., down].mean(1), centre]))[0, 1] > 0.8


# ---------------------------------------------------------------------------------------------------------------- training


def test_a_batch_is_turned_as_a_whole(samples: Samples) -> None:
    batch = draw_batch(samples, BRIEF, torch.Generator().manual_seed(0))
    assert batch.points.shape == batch.normals.shape == (3, 96, 3)
    assert batch.points.abs().max() < 0.96
    assert ((batch.near_labels > 0) & (batch.near_labels < 1)).any()
    # Points a little outside along the normal get lower labels than points a little inside.
    outward = torch.cdist(batch.near_points, batch.points).argmin(-1)
    base, normal = (part.gather(1, outward[..., None].expand(-1, -1, 3)) for part in (batch.points, batch.normals))
    height = ((batch.near_points - base) * normal).sum(-1)
    assert batch.near_labels[height > 0.03].mean() < batch.near_labels[height < -0.03].mean() - 0.3


def test_the_guide_reads_the_nearest_latent_alone() -> None:
    torch.manual_seed(0)
    middles = torch.tensor([[-0.5, 0, 0], [0.5, 0.0, 0]])
    guide, points = NearestLatent(middles, 4), torch.tensor([[[-0.6, 0.1, 0.2], [0.3, 0.4, 0]]])
    latents = torch.randn(1, 2, 4)
    other = latents.clone()
    other[:, 1] += 1
    before, after = guide(latents, points)[0], guide(other, points)[0]
    assert before[0] == after[0] and before[1] != after[1]


def test_training_lowers_the_loss(samples: Samples) -> None:
    stage = Training(replace(BRIEF, steps=60), samples, SMALL).stage
    terms = [stage.train_step() for _ in range(20)]
    for name in ("volume", "guide"):
        assert np.mean([step[name] for step in terms[-4:]]) < np.mean([step[name] for step in terms[:2]])
    assert all(step["quantizer"] == 0 for step in terms)


def test_quantization_starts_in_time(samples: Samples) -> None:
    stage = Training(BRIEF, samples, SMALL).stage
    for _ in range(4):
        stage.train_step()
    assert not stage.quantizing
    assert stage.train_step()["quantizer"] > 0
    assert stage.quantizing
    assert (stage.model.quantizer.gain > 0).all() and not torch.equal(stage.model.quantizer.gain, torch.ones(3))


@pytest.mark.parametrize("stop", [2, 6])
def test_resuming_goes_on_as_an_uninterrupted_run_does(samples: Samples, tmp_path: Path, stop: int) -> None:
    """Up to rounding, which depends on where in memory a tensor lies."""
    whole, other, interrupted, resumed = (Training(BRIEF, samples, SMALL) for _ in range(4))
    other.stage.rng.manual_seed(BRIEF.seed + 1)
    for _ in range(8):
        whole.stage.train_step()
        other.stage.train_step()
    for _ in range(stop):
        interrupted.stage.train_step()
    interrupted.save(tmp_path / "checkpoint.pt")
    torch.rand(1000)  # another process would not have this process's global random state
    resumed.restore(tmp_path / "checkpoint.pt")
    for _ in range(8 - stop):
        resumed.stage.train_step()
    assert whole.stage.quantizing and resumed.stage.quantizing and whole.stage.step == resumed.stage.step
    assert torch.equal(whole.stage.rng.get_state(), resumed.stage.rng.get_state())
    distance, chance = (float((weights(whole) - weights(run)).norm()) for run in (resumed, other))
    assert distance < 0.1 * chance


def test_a_checkpoint_of_another_recipe_is_refused(samples: Samples, tmp_path: Path) -> None:
    Training(BRIEF, samples, SMALL).save(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="another recipe"):
        Training(replace(BRIEF, steps=9), samples, SMALL).restore(tmp_path / "checkpoint.pt")


def test_the_written_file_holds_the_exported_model(tmp_path: Path) -> None:
    """Ids from the file equal those of the model that was exported: rounding to half precision comes first."""
    out = tmp_path / "tiny.safetensors"
    exported = train(replace(BRIEF, steps=3), out, SMALL, checkpoint_seconds=0.0)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".pt", ".safetensors"], "no checkpoint is left"
    with safe_open(out, "pt") as file:
        saved = json.loads(file.metadata()["zoo"])
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in saved["config"].items()}
    loaded, state = VAT(VATConfig(**config)), load_file(out)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    loaded.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    loaded.eval().requires_grad_(False)
    assert saved["family"] == "vat" and saved["fingerprint"] == loaded.compute_fingerprint()
    cloud = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.encode(cloud).ids, exported.encode(cloud).ids)

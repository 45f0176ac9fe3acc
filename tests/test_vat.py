"""VAT against its reference design, against public implementations of its parts, and against its own promises."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from safetensors.torch import load_file
from torch import Tensor

import zoo
from small_models_vat import SMALL_VAT, small_vat
from zoo import media, registry
from zoo.checkpoint import as_ours
from zoo.codecs.vat import VAT, VATConfig, training
from zoo.codecs.vat.checkpoint import our_key
from zoo.codecs.vat.decoder import Field, Query, sample_planes, upsampler
from zoo.codecs.vat.encoder import draw, farthest_points, fourier, kl_divergence
from zoo.codecs.vat.quantizer import ScaleQuantizer
from zoo.codecs.vat.surface import coarsest_stride, evaluate, extract
from zoo.tokenizer import Budget

GOLDEN = Path(__file__).parent / "golden" / "vat"
MANIFESTS = Path(__file__).parent / "golden" / "manifests"
CASE, PARTS = GOLDEN / "reference-l64", GOLDEN / "components-a"
ENTRIES = ("vat-512b", "vat-4kb")


@pytest.fixture(scope="module")
def tok() -> VAT:
    return zoo.load_upstream("vat", CASE / "config.json", CASE / "weights.safetensors")


@pytest.fixture(scope="module")
def small() -> VAT:
    return small_vat()


@cache
def recorded(case: Path = CASE) -> dict[str, Tensor]:
    return load_file(case / "io.safetensors")


@cache
def settings(case: Path) -> dict[str, object]:
    return json.loads((case / "config.json").read_text())


def difference(left: Tensor, right: Tensor) -> float:
    assert left.shape == right.shape
    return (left - right).abs().max().item()


def shapes() -> list[trimesh.Trimesh]:
    """Closed meshes of different sizes at different places."""
    torus = trimesh.creation.torus(2.0, 0.7)
    box = trimesh.creation.box((0.1, 0.3, 0.2))
    box.apply_translation([5, 6, -7])
    return [torus, box, trimesh.creation.icosphere(3)]


# ------------------------------------------------------------------------------------------------------ the reference design


def test_encoder(tok: VAT) -> None:
    r, encoder = recorded(), tok.encoder
    assert difference(fourier(r["points"], 8), r["fourier"]) < 1e-5
    embedded = encoder.embed(r["points"], r["normals"])
    assert difference(embedded, r["point_embedding"]) < 1e-4
    features = encoder.gather(r["points"], embedded)
    assert difference(features, r["point_features"]) < 1e-4
    together = torch.cat([encoder.latent_queries.expand(2, -1, -1), features], dim=1)
    assert difference(encoder.blocks[0](together), r["encoder_block0"]) < 1e-4
    assert difference(encoder.latent_tokens(features), r["latent_tokens"]) < 1e-4
    mean, log_variance = encoder(r["points"], r["normals"])
    assert difference(mean, r["mean"]) < 1e-4
    assert difference(log_variance, r["logvar"]) < 1e-4


def test_gaussian() -> None:
    r = recorded()
    assert difference(kl_divergence(r["mean"], r["logvar"]), r["kl_per_item"]) < 1e-4
    assert difference(draw(r["mean"], r["logvar"], r["noise"]), r["sample"]) < 1e-5
    zero = torch.zeros_like(r["mean"])
    assert (kl_divergence(zero, zero) == 0).all()
    assert (kl_divergence(r["mean"], r["logvar"]) > 0).all()
    twice = draw(r["mean"], r["logvar"], 2 * r["noise"]) - r["mean"]
    assert difference(twice, 2 * (draw(r["mean"], r["logvar"], r["noise"]) - r["mean"])) < 1e-5


def test_quantizer(tok: VAT) -> None:
    r, quantizer = recorded(), tok.quantizer
    ids = quantizer.ids(r["mean"])
    assert torch.equal(ids, r["ids"].long())
    assert difference(quantizer.latents(ids), r["quantized"]) < 1e-5
    sums = quantizer.partial_sums(ids)
    for scale, total in enumerate(sums):
        assert difference(total, r[f"partial_{scale}"]) < 1e-5
    energy = torch.stack([(r["mean"].double() - total).square().sum((1, 2)) for total in (0, *sums)])
    assert difference(energy.float(), r["residual_energy"]) < 1e-4 * r["residual_energy"].max()


def test_decoder(tok: VAT) -> None:
    r = recorded()
    assert difference(tok.decoder.plane_tokens(r["quantized"]), r["plane_tokens"]) < 1e-4
    planes = tok.decoder(r["quantized"])
    assert difference(planes, r["triplane"]) < 1e-4
    assert difference(sample_planes(planes, r["queries"]).flatten(2), r["triplane_features"]) < 1e-4
    assert difference(tok.query(sample_planes(planes, r["queries"])), r["logits"]) < 1e-4


def test_ids_and_logits_of_the_public_calls(tok: VAT) -> None:
    r = recorded()
    tokens = tok.encode(list(torch.cat([r["points"], r["normals"]], dim=-1)), normalise=False)
    assert torch.equal(tokens.ids, r["ids"].long())
    assert difference(tok.occupancy(tokens, r["queries"]), r["logits"]) < 1e-4
    assert difference(tok.occupancy(r["ids"].long(), r["queries"]), r["logits"]) < 1e-4
    scales = settings(CASE)["prefix_scales"]
    assert difference(tok.occupancy(tokens, r["queries"], scales=scales), r["logits_prefix_scales"]) < 1e-4
    prefix = tokens.truncate(tokens.segments[scales - 1])
    assert difference(tok.occupancy(prefix, r["queries"]), r["logits_prefix_scales"]) < 1e-4


# ----------------------------------------------------------------------------------- parts that public implementations have


def test_fourier_features_without_pi() -> None:
    r, config = recorded(PARTS), settings(PARTS)
    found = fourier(r["points"], config["num_frequencies"], include_pi=config["include_pi"])
    assert difference(found, r["fourier"]) < 1e-5


def test_planes_are_sampled_as_by_direct3d() -> None:
    r, config = recorded(PARTS), settings(PARTS)
    features = sample_planes(r["planes"], r["triplane_points"])
    # They have the planes before the points.
    assert difference(features.transpose(1, 2), r["triplane_features"]) < 1e-5
    query = Query(config["triplane_channels"], config["occ_hidden"], config["occ_layers"])
    weights = load_file(PARTS / "weights.safetensors")
    stem = "occ_decoder.net."
    query.load_state_dict(
        {f"layers.{int(key.split('.')[2]) // 2}.{key.split('.')[3]}": weights[key] for key in weights if key.startswith(stem)}
    )
    assert difference(query(features), r["occ_logits"]) < 1e-4


def test_upsampler_is_direct3ds() -> None:
    r, raw = recorded(PARTS), settings(PARTS)
    config = replace(
        SMALL_VAT,
        width=r["rollout_latent"].shape[1],
        triplane_channels=raw["triplane_channels"],
        upsampler_channels=tuple(raw["upsampler_channels"]),
        upsampler_layers=raw["upsampler_layers"],
        norm_groups=raw["norm_groups"],
        mid_attention=True,
    )
    network, stem = upsampler(config), "triplane_decoder."
    weights = load_file(PARTS / "weights.safetensors")
    network.load_state_dict({key.removeprefix(stem): weights[key] for key in weights if key.startswith(stem)})
    assert difference(network(r["rollout_latent"])[0], r["rollout_triplane"]) < 1e-4


def test_divergence_is_vecsets() -> None:
    r = recorded(PARTS)
    assert difference(kl_divergence(r["kl_mean"], r["kl_logvar"]), r["kl_per_item"]) < 1e-5


# --------------------------------------------------------------------------------------------------------- fields to meshes


class Counted:
    """A field given as a function of points, at the nodes of a grid; counts how many it was asked for."""

    def __init__(self, function: Callable[[Tensor], Tensor], resolution: int) -> None:
        self.function, self.resolution, self.count = function, resolution, 0

    def __call__(self, nodes: Tensor) -> Tensor:
        self.count += len(nodes)
        return self.function(-1 + 2 * nodes.float() / self.resolution)


def torus(points: Tensor, major: float = 0.6, minor: float = 0.22) -> Tensor:
    return minor - torch.stack([points[:, :2].norm(dim=1) - major, points[:, 2]]).norm(dim=0)


def box(points: Tensor) -> Tensor:
    return (torch.tensor([0.55, 0.45, 0.3]) - points.abs()).amin(1)


def two_balls(points: Tensor) -> Tensor:
    centres = torch.tensor([[-0.5, 0.1, 0.0], [0.45, -0.3, 0.4]])
    return (torch.tensor([0.3, 0.15]) - (points[:, None] - centres).norm(dim=2)).amax(1)


def lattice(points: Tensor) -> Tensor:
    """Bars along all axes that meet in nodes: one connected surface with many handles."""
    near = (points * 2 - (points * 2).round()).abs()
    bars = 0.12 - torch.stack([near[:, [0, 1]], near[:, [1, 2]], near[:, [0, 2]]]).norm(dim=2).amin(0)
    return torch.minimum(bars, 0.9 - points.abs().amax(1))


def saturated(points: Tensor) -> Tensor:
    """Logits of a certain network: flat but for a thin layer about the surface."""
    return 12 * torch.tanh(40 * torus(points))


def test_marching_cubes_of_the_recorded_torus() -> None:
    r, config = recorded(PARTS), settings(PARTS)
    resolution = config["marching_cubes_resolution"]
    grid = -r["torus_grid_sdf"]
    vertices, faces = extract(lambda nodes: grid[tuple(nodes.T)], resolution, dense=True)
    order = np.lexsort(vertices.T[::-1])
    assert np.abs(vertices[order] - r["torus_vertices_sorted"].numpy()).max() < 1e-5
    expected = config["mesh"]
    assert (len(vertices), len(faces)) == (expected["num_vertices"], expected["num_faces"])
    mesh = trimesh.Trimesh(vertices, faces)
    assert mesh.is_watertight and mesh.euler_number == expected["torus_euler"]
    # Recorded with faces that look inwards.
    assert mesh.volume == pytest.approx(-expected["torus_signed_volume"], abs=1e-5)
    assert mesh.volume == pytest.approx(expected["torus_analytic"], rel=0.02)


def test_surface_is_where_the_field_is_zero() -> None:
    resolution = 64
    vertices, faces = extract(Counted(torus, resolution), resolution)
    assert torus(torch.from_numpy(vertices)).abs().max() < 0.5 * 2 / resolution
    assert np.abs(trimesh.Trimesh(vertices, faces).centroid).max() < 1e-3
    # No shrinking by resolution / (resolution + 1), which would move the rim by half a cell.
    assert vertices[:, 0].max() == pytest.approx(0.82, abs=2e-3)
    assert vertices[:, 0].min() == pytest.approx(-0.82, abs=2e-3)


@pytest.mark.parametrize("function", [torus, box, two_balls, lattice, saturated])
@pytest.mark.parametrize("resolution", [64, 96])
def test_coarse_to_fine_gives_the_dense_mesh(function: Callable[[Tensor], Tensor], resolution: int) -> None:
    sparse, dense = Counted(function, resolution), Counted(function, resolution)
    vertices, faces = extract(sparse, resolution)
    expected_vertices, expected_faces = extract(dense, resolution, dense=True)
    assert np.array_equal(faces, expected_faces)
    assert np.abs(vertices - expected_vertices).max() < 1e-6
    assert dense.count == (resolution + 1) ** 3
    assert sparse.count < dense.count / (2 if function is lattice else 5)


def test_coarse_to_fine_saves_more_at_high_resolution() -> None:
    sparse = Counted(torus, 128)
    values = evaluate(sparse, 128)
    assert values.shape == (129, 129, 129)
    assert sparse.count < 129**3 / 10


def test_surface_is_followed_to_where_the_coarse_grid_does_not_see_it() -> None:
    """A needle much thinner than a coarse cell, on a ball."""

    def function(points: Tensor) -> Tensor:
        ball = 0.3 - points.norm(dim=1)
        needle = 0.05 - (points[:, 1:] - torch.tensor([0.03, 0.03])).norm(dim=1)
        return torch.maximum(ball, torch.where((points[:, 0] > 0) & (points[:, 0] < 0.8), needle, -0.5)).clamp(-0.1, 0.1)

    resolution = 64
    vertices, faces = extract(Counted(function, resolution), resolution)
    dense_vertices, dense_faces = extract(Counted(function, resolution), resolution, dense=True)
    assert dense_vertices[:, 0].max() > 0.78
    assert np.array_equal(faces, dense_faces) and np.array_equal(vertices, dense_vertices)


def test_surfaces_are_closed_at_the_border() -> None:
    for dense in (False, True):
        vertices, faces = extract(lambda nodes: torch.ones(len(nodes)), 16, dense=dense)
        mesh = trimesh.Trimesh(vertices, faces)
        assert mesh.is_watertight and mesh.volume == pytest.approx((2 - 2 / 16) ** 3, rel=0.02)
        assert np.abs(vertices).max() < 1


def test_nothing_inside_makes_no_surface() -> None:
    vertices, faces = extract(lambda nodes: -torch.ones(len(nodes)), 8)
    assert vertices.shape == (0, 3) and faces.shape == (0, 3)


def test_strides_divide_the_resolution() -> None:
    assert [coarsest_stride(r) for r in (16, 64, 256, 512, 1024)] == [4, 4, 4, 8, 16]
    assert [coarsest_stride(r) for r in (30, 33, 100)] == [2, 1, 4]
    vertices, faces = extract(Counted(torus, 33), 33)
    assert trimesh.Trimesh(vertices, faces).is_watertight


def test_fields_on_a_grid_are_the_fields(tok: VAT) -> None:
    (field,) = tok.field(recorded()["ids"][:1].long())
    resolution = 12
    nodes = torch.cartesian_prod(*[torch.arange(resolution + 1)] * 3)
    plain = field(-1 + 2 * nodes / resolution)
    assert difference(field.on_grid(resolution)(nodes), plain) < 1e-5 * plain.abs().max()


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_folding_the_first_layer_changes_nothing(layers: int) -> None:
    torch.manual_seed(layers)
    query, planes = Query(6, 10, layers), torch.randn(3, 6, 7, 7)
    field = Field(planes, query)
    nodes = torch.randint(0, 9, (50, 3))
    assert difference(field.on_grid(8)(nodes), query(sample_planes(planes[None], (-1 + nodes / 4)[None]))[0]) < 1e-5


def test_fields_hold_a_bounded_number_of_points(small: VAT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Field, "CHUNK", {"cpu": 64, "cuda": 64})
    most = []
    forward, at_nodes = Query.forward, Query.at_nodes
    monkeypatch.setattr(Query, "forward", lambda self, x: most.append(x.shape[1]) or forward(self, x))
    monkeypatch.setattr(Query, "at_nodes", lambda self, maps, nodes: most.append(len(nodes)) or at_nodes(self, maps, nodes))
    (field,) = small.field(torch.tensor([1, 2, 3]))
    whole = torch.rand(500, 3)
    assert field(whole).shape == (500,)
    small.decode(torch.tensor([1, 2, 3]))
    assert max(most) == 64 and len(most) > 8


# ------------------------------------------------------------------------------------------------------------ quantization


def random_quantizer(seed: int) -> tuple[ScaleQuantizer, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(5, 40, (), generator=generator))
    scales = tuple(sorted(int(n) for n in torch.randint(1, count + 1, (5,), generator=generator)))
    config = replace(SMALL_VAT, num_latents=count, latent_dim=4, codebook_size=9, token_scales=scales)
    quantizer = ScaleQuantizer(config).double()
    with torch.no_grad():
        quantizer.codebook.copy_(torch.randn(9, 4, generator=generator, dtype=torch.float64))
        quantizer.gain.copy_(torch.rand(5, generator=generator, dtype=torch.float64) * 3 + 0.01)
    return quantizer, torch.randn(3, count, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(12))
def test_no_token_raises_the_energy_of_the_residual(seed: int) -> None:
    quantizer, latents = random_quantizer(seed)
    ids = quantizer.ids(latents)
    energy = latents.square().sum((1, 2))
    for length in range(1, ids.shape[1] + 1):
        left = (latents - quantizer.latents(ids[:, :length])).square().sum((1, 2))
        assert (left <= energy + 1e-9).all()
        energy = left


@pytest.mark.parametrize("seed", range(4))
def test_tokens_are_the_nearest_codes_of_run_means(seed: int) -> None:
    """Run by run, with runs and distances written out."""
    quantizer, latents = random_quantizer(seed)
    codes, count = quantizer.codebook.detach().clone(), quantizer.num_latents
    codes[0] = 0
    for item, found in zip(latents, quantizer.ids(latents), strict=True):
        residual, expected = item.clone(), []
        for tokens, gain in zip(quantizer.scales, quantizer.gain, strict=True):
            total = torch.zeros_like(residual)
            for j in range(tokens):
                run = slice(j * count // tokens, (j + 1) * count // tokens)
                distances = (residual[run].mean(0) - gain * codes).square().sum(1)
                expected.append(int(distances.argmin()))
                total[run] = gain * codes[expected[-1]]
            residual = residual - total
        assert found.tolist() == expected


def test_first_code_is_zero_whatever_is_stored(small: VAT) -> None:
    assert small.quantizer.codebook[0].abs().max() > 0
    assert (small.embed(torch.zeros(1, 25, dtype=torch.int64)) == 0).all()


def test_codes_change_with_the_codebook() -> None:
    quantizer, latents = random_quantizer(0)
    before = quantizer.ids(latents)
    with torch.no_grad():
        quantizer.codebook[1:] = quantizer.codebook[1:].flip(0)
    after = quantizer.ids(latents)
    assert torch.equal(torch.where(after > 0, 9 - after, 0), before)


def test_inputs_of_a_model_that_predicts_the_next_scale(small: VAT) -> None:
    tokens = small.encode(shapes())
    inputs = small.ar_inputs(tokens)
    assert inputs.shape == (3, 24, 3)
    sums = small.quantizer.partial_sums(tokens.ids)
    # Runs of 16 latents cut into 3 and 5.
    for number, (total, bounds) in enumerate(zip(sums, ([0, 5, 10, 16], [0, 3, 6, 9, 12, 16]), strict=False)):
        runs = [total[:, start:end].mean(1) for start, end in pairwise(bounds)]
        first = (0, 3)[number]
        assert difference(inputs[:, first : first + len(runs)], torch.stack(runs, dim=1)) < 1e-6
    assert difference(small.ar_inputs(tokens.truncate(4)), inputs[:, :8]) == 0
    with pytest.raises(zoo.InputError, match="same scale"):
        small.ar_inputs(tokens.truncate(5))


def test_every_prefix_decodes(small: VAT) -> None:
    tokens = small.encode(shapes()[0])
    points = torch.rand(40, 3) * 4 - 2
    for length in range(1, 26):
        prefix = tokens.truncate(length)
        filled = torch.cat([prefix.ids, torch.zeros(1, 25 - length, dtype=torch.int64)], dim=1)
        whole = small.tokens(list(filled), tokens.meta)
        assert difference(small.occupancy(prefix, points), small.occupancy(whole, points)) < 1e-5
    meshes = [small.decode(tokens, scales=scales)[0] for scales in (1, 2, 3, 4)]
    assert all(isinstance(mesh, trimesh.Trimesh) for mesh in meshes)
    assert not np.array_equal(meshes[0].vertices, meshes[-1].vertices)
    for scale, end in enumerate(tokens.segments, start=1):
        assert np.array_equal(small.decode(tokens.truncate(end))[0].vertices, meshes[scale - 1].vertices)


# -------------------------------------------------------------------------------------------------------------- the promises


def test_order_of_points_does_not_matter(tok: VAT) -> None:
    r = recorded()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    mean, _ = tok.encoder(r["points"][:, order], r["normals"][:, order])
    assert difference(mean, r["mean"]) < 1e-5 * max(1, r["mean"].abs().max())
    assert torch.equal(tok.quantizer.ids(mean), r["ids"].long())


def test_ragged_batches_change_nothing(small: VAT, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    clouds = [random.normal(size=(count, 6)) for count in (64, 200, 64, 256, 999)]
    items = [*shapes(), *clouds]
    alone = [small.encode(item) for item in items]
    for limit in (1, 4):
        monkeypatch.setitem(VAT.at_once, "encode", Budget(limit, limit))
        together = small.encode(items)
        assert all(left.equal(right) for left, right in zip(together, alone, strict=True))
    for left, right in zip(small.decode(together), (small.decode(tokens)[0] for tokens in alone), strict=True):
        assert np.array_equal(left.faces, right.faces) and np.abs(left.vertices - right.vertices).max() < 1e-4


def test_shapes_keep_their_place_and_size(small: VAT) -> None:
    base = shapes()[0]
    moved = base.copy()
    moved.apply_scale(30)
    moved.apply_translation([100, -200, 50])
    tokens = small.encode([base, moved])
    assert tokens.tolist()[0] == tokens.tolist()[1]
    first, second = small.decode(tokens)
    assert np.allclose(second.vertices, first.vertices * 30 + [100, -200, 50], atol=1e-3)
    (field,) = small.field(tokens[1])
    on_surface = field(torch.from_numpy(second.vertices.copy()))
    inside = field(torch.from_numpy(second.vertices - 0.5 * second.vertex_normals))
    assert on_surface.abs().mean() < 0.2 * inside.abs().mean() + 0.1
    bare = small.decode(tokens.ids)[0]
    assert np.abs(bare.vertices).max() <= 1


def test_far_from_the_origin(small: VAT) -> None:
    base = shapes()[2]
    far = base.copy()
    far.apply_translation([1 << 20, 0, 0])
    tokens = small.encode([base, far])
    assert tokens.tolist()[0] == tokens.tolist()[1]
    (near_field, far_field) = small.field(tokens)
    points = torch.rand(30, 3, dtype=torch.float64) - 0.5
    shifted = points + torch.tensor([1 << 20, 0, 0])
    assert difference(far_field(shifted), near_field(points)) < 1e-4


def test_meshes_are_closed_and_look_outwards(small: VAT) -> None:
    for dense in (False, True):
        for mesh in small.decode(small.encode(shapes()), dense=dense, resolution=24):
            assert media.is_closed(mesh) and mesh.volume > 0


@pytest.mark.parametrize(("name", "payload"), [("vat-512b", 510), ("vat-4kb", 3990)])
def test_sizes_on_disk(name: str, payload: int, tmp_path: Path) -> None:
    with torch.device("meta"):
        tok = VAT(registry.check_config(registry.get(name)), name=name)
    tok.fingerprint = "0123456789abcdef"
    ids = torch.randint(tok.spec.vocab_size, (tok.spec.max_tokens,), generator=torch.Generator().manual_seed(0))
    tokens = tok.tokens([ids], [{"x": 0.1, "y": -2.0, "z": 3.5, "scale": 7.25}])
    assert tokens.segments == (1, 5, 14, 30, 55, 91, 155, 255, 424, 680, 1256, 2280)[: len(tok.config.token_scales)]
    meta = {key: float(np.float32(value)) for key, value in tokens.meta[0].items()}
    path = replace(tokens, meta=(meta,)).save(tmp_path / "shape.zt")
    assert tok.spec.bits_per_item == payload * 8
    assert payload < path.stat().st_size <= payload + 64
    loaded = zoo.Tokens.load(path)
    assert loaded.tolist() == [ids.tolist()] and loaded.meta == (meta,)


def test_sizes_of_the_entries() -> None:
    for name, payload in (("vat-512b", 510), ("vat-4kb", 3990)):
        with torch.device("meta"):
            tok = VAT(registry.check_config(registry.get(name)), name=name)
        assert tok.spec.bits_per_item == 8 * payload
        assert tok.spec.ordered and tok.spec.modality == "shape" and not tok.spec.lossless


def test_deterministic_whatever_the_threads(small: VAT) -> None:
    items, threads = shapes(), torch.get_num_threads()
    tokens = small.encode(items)
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert small.encode(items).equal(tokens)
    finally:
        torch.set_num_threads(threads)
    assert not small.encode(items, seed=1).equal(tokens)


def test_precision(small: VAT) -> None:
    items = shapes()
    tokens = small.encode(items)
    rough = pickle.loads(pickle.dumps(small))
    rough.set_precision("bf16")
    assert rough.encode(items).equal(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert small.encode(items).equal(tokens)
    points = torch.rand(200, 3) * 4 - 2
    exact, found = small.occupancy(tokens, points), rough.occupancy(tokens, points)
    assert exact.dtype == found.dtype == torch.float32
    assert 0 < (found - exact).square().mean() < 0.01 * exact.square().mean()
    assert small.encode(items, encoder_precision="bf16").ids.shape == tokens.ids.shape
    with pytest.raises(zoo.InputError, match="precision"):
        small.encode(items, encoder_precision="fp8")


def test_save_and_load(small: VAT, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path)
    again = zoo.load(f"local-dir:{tmp_path}")
    tokens = small.encode(shapes())
    assert again.spec == small.spec and again.config == small.config
    assert again.encode(shapes()).equal(tokens)
    assert torch.equal(again.embed(tokens), small.embed(tokens))


def test_token_files(small: VAT, tmp_path: Path) -> None:
    tokens = small.encode(shapes())
    loaded = zoo.Tokens.load(tokens.save(tmp_path / "shapes.zt"))
    assert loaded.equal(tokens)
    for left, right in zip(small.decode(loaded), small.decode(tokens), strict=True):
        assert np.array_equal(left.vertices, right.vertices)


def test_embeddings(small: VAT) -> None:
    tokens = small.encode(shapes())
    vectors = small.embed(tokens)
    assert vectors.shape == (3, 25, small.spec.dim)
    parts = vectors.split(SMALL_VAT.token_scales, dim=1)
    assert difference(sum(small.quantizer.spread(part) for part in parts), small.latents(tokens)) < 1e-6
    mixed = small.embed([tokens.ids[0], tokens.ids[1, :4]])
    assert torch.equal(mixed[0], vectors[0]) and torch.equal(mixed[1, :4], vectors[1, :4]) and (mixed[1, 4:] == 0).all()


def test_queries_of_farthest_points() -> None:
    points = torch.rand(2, 50, 3, generator=torch.Generator().manual_seed(0))
    found = farthest_points(points, 10)
    for cloud, indices in zip(points.numpy(), found.tolist(), strict=True):
        chosen = [int(np.linalg.norm(cloud - cloud.mean(0), axis=1).argmax())]
        while len(chosen) < 10:
            gaps = np.linalg.norm(cloud[:, None] - cloud[chosen], axis=2).min(1)
            chosen.append(int(gaps.argmax()))
        assert indices == chosen
    tokenizer = small_vat(config=replace(SMALL_VAT, point_query="fps"))
    assert "encoder.point_queries" not in tokenizer.state_dict()
    assert tokenizer.encode(shapes()).ids.shape == (3, 25)


def test_bad_items_are_named(small: VAT) -> None:
    good = shapes()[0]
    with pytest.raises(zoo.InputError, match="no faces") as caught:
        small.encode([good, trimesh.Trimesh()])
    assert caught.value.index == 1
    with pytest.raises(zoo.InputError, match="nothing to encode"):
        small.encode([])
    with pytest.raises(zoo.InputError, match="max_faces"):
        small.encode(good, max_faces=10)
    with pytest.raises(zoo.InputError, match="normalised"):
        small.encode(good, normalise=False)


def test_bad_tokens_are_named(small: VAT) -> None:
    tokens = small.encode(shapes())
    with pytest.raises(zoo.InputError, match="26 tokens are more than the model's 25") as caught:
        small.decode([torch.zeros(3, dtype=torch.int64), torch.zeros(26, dtype=torch.int64)])
    assert caught.value.index == 1
    for options in ({"scales": 0}, {"scales": 5}, {"resolution": 1}, {"resolution": 4096}):
        with pytest.raises(zoo.InputError, match=next(iter(options))):
            small.decode(tokens, **options)
    for meta in ({"x": 0.0}, {"x": 0.0, "y": 0.0, "z": 0.0, "scale": 0.0}, {"x": np.nan, "y": 0.0, "z": 0.0, "scale": 1.0}):
        with pytest.raises(zoo.InputError, match="put back") as caught:
            small.decode(replace(tokens, meta=(tokens.meta[0], meta, tokens.meta[2])))
        assert caught.value.index == 1
    with pytest.raises(zoo.MismatchError):
        small.decode(replace(tokens, fingerprint="0" * 16))
    with pytest.raises(zoo.InputError, match="points for 2 items"):
        small.occupancy(tokens, torch.zeros(2, 5, 3))


def test_an_empty_field_gives_an_empty_mesh(small: VAT, caplog: pytest.LogCaptureFixture) -> None:
    hollow = pickle.loads(pickle.dumps(small))
    hollow.query.layers[-1].bias -= 1e3
    (mesh,) = hollow.decode(torch.tensor([1, 2, 3]))
    assert isinstance(mesh, trimesh.Trimesh) and mesh.is_empty
    assert "the mesh is empty" in caplog.text


# -------------------------------------------------------------------------------------------------------------- checkpoints


def manifest(name: str) -> dict[str, object]:
    return json.loads((MANIFESTS / f"{name}-reference.json").read_text())


@pytest.mark.parametrize("name", ["vat-512b", "vat-4kb", "vat-tiny"])
def test_manifest_maps_both_ways(name: str) -> None:
    recorded_manifest = manifest(name)
    official = {key: torch.empty(shape, device="meta") for key, shape in recorded_manifest["tensors"].items()}
    expected = VAT.checkpoint.config(recorded_manifest["config"])
    config, named = as_ours(VAT, official, expected)
    assert config == expected
    if name in ENTRIES:
        assert config == registry.check_config(registry.get(name))
    assert len(named) == len(official) == len({our_key(key) for key in official})
    assert sum(tensor.numel() for tensor in named.values()) == recorded_manifest["num_parameters"]
    assert as_ours(VAT, official, None)[0] == replace(expected, num_points=VATConfig().num_points)
    assert VAT.checkpoint.recognises(official)


def test_missing_and_unexpected_tensors_are_named() -> None:
    state, config = load_file(CASE / "weights.safetensors"), settings(CASE)
    with pytest.raises(zoo.KeysError, match=r"missing: encoder\.moments\.bias"):
        zoo.load_upstream("vat", config, {key: tensor for key, tensor in state.items() if key != "moments.bias"})
    with pytest.raises(zoo.KeysError, match="unexpected in a VAT checkpoint: surprise"):
        zoo.load_upstream("vat", config, state | {"surprise": torch.zeros(1)})
    with pytest.raises(zoo.KeysError, match="num_latents is 64 in the tensors and 66 in the configuration"):
        zoo.load_upstream("vat", dict(config) | {"num_latents": 66}, state)
    with pytest.raises(zoo.KeysError, match="7 scales and the configuration 6"):
        zoo.load_upstream("vat", dict(config) | {"token_scales": [1, 4, 9, 16, 25, 64]}, state)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"heads": 5}, "multiple of heads"),
        ({"token_scales": [1, 65]}, "1 to 64 tokens"),
        ({"point_query": "random"}, "point_query"),
        ({"norm_groups": 7}, "norm_groups"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, object], reason: str) -> None:
    with pytest.raises(zoo.WeightsError, match=reason):
        VAT.checkpoint.config(dict(settings(CASE)) | change)


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_say_that_there_are_no_weights(name: str) -> None:
    with pytest.raises(zoo.WeightsError, match=r"no weights of .* were ever published; train it"):
        zoo.load(name)


# ----------------------------------------------------------------------------------------------------------------- training


def batch(count: int = 3, seed: int = 0) -> training.Batch:
    generator = torch.Generator().manual_seed(seed)
    radius = torch.rand(count, 1, 1, generator=generator) * 0.5 + 0.3
    normals = torch.nn.functional.normalize(torch.randn(count, 100, 3, generator=generator), dim=-1)
    volume = torch.rand(count, 80, 3, generator=generator) * 2 - 1
    near = normals[:, :60] * (radius + 0.05 * torch.randn(count, 60, 1, generator=generator))
    labels = [(points.norm(dim=-1) < radius[..., 0]).float() for points in (volume, near)]
    return training.Batch(normals * radius, normals, volume, labels[0], near, labels[1])


def trainable() -> VAT:
    tokenizer = small_vat().requires_grad_(True)
    return tokenizer.train()


def test_losses_at_their_weights() -> None:
    tokenizer, shape = trainable(), batch()
    found = training.losses(tokenizer, shape, quantize=False, generator=torch.Generator().manual_seed(1))
    mean, log_variance = tokenizer.encoder(shape.points, shape.normals)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    latents = mean + noise * (0.5 * log_variance).exp()
    logits = tokenizer.query(sample_planes(tokenizer.decoder(latents), shape.volume_points))
    probability = logits.sigmoid()
    entropy = -(shape.volume_labels * probability.log() + (1 - shape.volume_labels) * (1 - probability).log()).mean()
    assert difference(found["volume"], entropy) < 1e-5
    divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    assert difference(found["divergence"], 2e-4 * divergence) < 1e-7
    assert found["quantizer"] == 0
    assert difference(found.total, found["volume"] + found["near"] + found["divergence"]) < 1e-6


def test_gradients_reach_everything() -> None:
    tokenizer = trainable()
    training.losses(tokenizer, batch(), quantize=True, generator=torch.Generator().manual_seed(0)).total.backward()
    silent = [name for name, parameter in tokenizer.named_parameters() if parameter.grad is None]
    assert not silent
    assert (tokenizer.quantizer.codebook.grad[0] == 0).all()
    assert tokenizer.quantizer.codebook.grad[1:].abs().max() > 0
    assert tokenizer.encoder.moments.weight.grad.abs().max() > 0


def test_quantized_latents_pass_the_gradient_through() -> None:
    quantizer = small_vat().quantizer.eval()
    latents = torch.randn(2, 16, 3, requires_grad=True)
    found, loss = training.quantized(quantizer, latents)
    ids = quantizer.ids(latents)
    assert difference(found, quantizer.latents(ids)) < 1e-6
    found.sum().backward()
    assert (latents.grad == 1).all()
    errors = [(latents - total).square().mean() for total in quantizer.partial_sums(ids)]
    assert difference(loss, 1.25 * torch.stack(errors).mean()) < 1e-6


@pytest.mark.parametrize("seed", range(6))
def test_a_quarter_of_the_steps_stops_after_a_random_scale(seed: int) -> None:
    quantizer = small_vat().quantizer.train()
    latents = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(0))
    found, _ = training.quantized(quantizer, latents, torch.Generator().manual_seed(seed))
    chance, place = torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
    sums = quantizer.partial_sums(quantizer.ids(latents))
    assert difference(found, sums[int(4 * place)] if chance < 0.25 else sums[-1]) < 1e-6


def test_gains_follow_the_residuals() -> None:
    quantizer = small_vat().quantizer
    latents = torch.randn(4, 16, 3) * 5
    before = quantizer.gain.clone()
    training.follow_residuals(quantizer, latents)
    expected = latents.mean(1).square().mean().sqrt()
    assert difference(quantizer.gain[0], 0.98 * before[0] + 0.02 * expected) < 1e-5
    quantizer.train()
    training.quantized(quantizer, latents)
    assert not torch.equal(quantizer.gain, before)
    frozen = quantizer.eval().gain.clone()
    training.quantized(quantizer, latents)
    assert torch.equal(quantizer.gain, frozen)


def test_codebook_starts_from_the_residuals() -> None:
    quantizer = small_vat().quantizer
    latents = torch.randn(40, 16, 3, generator=torch.Generator().manual_seed(0)) * 3 + torch.tensor([4.0, 0, -2])

    def left() -> Tensor:
        return (latents - quantizer.latents(quantizer.ids(latents))).square().mean()

    random_start = left()
    training.start_codebook(quantizer, latents, generator=torch.Generator().manual_seed(0))
    assert left() < 0.5 * random_start
    assert left() < 0.25 * latents.square().mean()
    assert difference(quantizer.gain[0], latents.mean(1).square().mean().sqrt()) < 1e-4


def test_unused_codes_are_drawn_anew() -> None:
    quantizer = small_vat().quantizer
    latents = torch.randn(8, 16, 3)
    before = quantizer.codebook.clone()
    usage = torch.full((11,), 100)
    usage[[0, 3, 7]] = torch.tensor([0, 0, 1])
    assert training.redraw_unused(quantizer, usage, latents, generator=torch.Generator().manual_seed(0)) == 2
    changed = (quantizer.codebook != before).any(1).nonzero()[:, 0].tolist()
    assert changed == [3, 7]


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    tokenizer, shape = trainable(), batch(4)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), 5e-3)
    history = []
    for step in range(14):
        found = training.losses(tokenizer, shape, quantize=step >= 7)
        optimizer.zero_grad()
        found.total.backward()
        optimizer.step()
        history.append((found["volume"] + found["near"]).item())
    assert max(history[-3:]) < 0.9 * history[0]


def test_config_names_every_size() -> None:
    assert VATConfig(**asdict(SMALL_VAT)) == SMALL_VAT
    assert SMALL_VAT.scale_ends == (1, 4, 9, 25)

"""Shape metrics against recorded and analytic values, the baseline, and the pictures."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image
from safetensors.torch import load_file

import zoo
from small_models_vat import small_vat
from zoo import media
from zoo.eval import reconstruct
from zoo.eval.modality import shape as shapes
from zoo.eval.modality.base import Measures, Variant
from zoo.eval.modality.turntable import as_webp, render, turntable

CASE = Path(__file__).parent / "golden" / "vat" / "components-a"


@pytest.fixture(autouse=True)
def few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for the tolerances here."""
    for cached in (shapes._distances, shapes._sampled_reference, shapes._reference_points, shapes._insides):
        cached.cache_clear()
    monkeypatch.setattr(shapes, "COUNT", 20_000)


def ball(radius: float, at: tuple[float, float, float] = (0, 0, 0)) -> trimesh.Trimesh:
    return trimesh.creation.icosphere(4, radius).apply_translation(at)


def upper_half(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """Without the faces below: an open bowl."""
    return trimesh.Trimesh(mesh.vertices, mesh.faces[mesh.triangles_center[:, 2] > 0], process=False)


def figures(reference: trimesh.Trimesh, estimate: trimesh.Trimesh) -> dict[str, float | None]:
    return {name: metric.function(reference, estimate) for name, metric in shapes.METRICS.items()}


# ------------------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("cloud", ["noisy", "box"])
def test_recorded_clouds(cloud: str) -> None:
    recorded, expected = load_file(CASE / "io.safetensors"), json.loads((CASE / "config.json").read_text())["metrics"][cloud]
    truth, estimate = (recorded[f"cloud_{name}"].double().numpy() for name in ("truth", cloud))
    distances = shapes.Distances(
        shapes.cloud_distances(truth, estimate)[0], shapes.cloud_distances(estimate, truth)[0], np.ones(1)
    )
    assert distances.to_estimate.mean() == pytest.approx(expected["truth_to_pred_mean"], abs=1e-6)
    assert shapes.chamfer_of(distances) == pytest.approx(expected["chamfer_sum_l2"], abs=1e-6)
    for threshold, value in expected["f_score"].items():
        assert shapes.f_score_of(distances, float(threshold)) == pytest.approx(value, abs=1e-6)


def test_recorded_occupancy() -> None:
    recorded, expected = load_file(CASE / "io.safetensors"), json.loads((CASE / "config.json").read_text())["metrics"]["iou"]
    assert shapes.iou(recorded["occ_torus"].numpy() > 0, recorded["occ_box"].numpy() > 0) == pytest.approx(expected, abs=1e-6)
    nothing = np.zeros(5, np.bool_)
    assert shapes.iou(nothing, nothing) == 1 and shapes.iou(~nothing, nothing) == 0


def test_a_shape_equals_itself() -> None:
    for name, value in figures(ball(0.9), ball(0.9)).items():
        assert value == pytest.approx(0 if name == "chamfer" else 1, abs=1e-6)


def test_a_smaller_ball() -> None:
    """Concentric spheres are as far from each other everywhere as their radii differ."""
    found = figures(ball(0.8), ball(0.77))
    assert found["chamfer"] == pytest.approx(0.06, abs=0.004)
    assert found["f_score"] < 0.02 and found["f_score_05"] > 0.99
    assert found["normal_consistency"] > 0.99
    assert found["iou"] == pytest.approx((0.77 / 0.8) ** 3, abs=0.02)
    # Of normal deviates from the surface, half lie inside, and those below -1.5 standard deviations inside of both.
    below = 0.5 * (1 + math.erf(-1.5 / math.sqrt(2)))
    assert found["near_iou"] == pytest.approx(below / 0.5, abs=0.02)
    assert found["near_accuracy"] == pytest.approx(0.5 + below, abs=0.02)


def test_scores_are_symmetric_and_grow_with_the_threshold() -> None:
    left, right = ball(0.8), trimesh.creation.box((1.3, 1.3, 1.3))
    scores = [shapes.f_score(left, right, threshold=threshold) for threshold in (0.01, 0.02, 0.05, 0.2)]
    assert scores == sorted(scores) and scores[-1] > scores[0]
    for function in (shapes.f_score, shapes.chamfer, shapes.normal_consistency):
        assert function(left, right) == pytest.approx(function(right, left), abs=1e-9)


def test_boxes_at_right_angles_have_other_normals() -> None:
    turned = ball(0.5, (0, 0, 0.0))
    cube = trimesh.creation.box((0.8, 0.8, 0.8))
    assert shapes.normal_consistency(cube, cube) == pytest.approx(1)
    assert 0.6 < shapes.normal_consistency(cube, turned) < 0.97


def test_undefined_figures() -> None:
    empty, solid = trimesh.Trimesh(), ball(0.9)
    found = figures(solid, empty)
    assert found["chamfer"] is None and found["normal_consistency"] is None
    assert found["f_score"] == found["iou"] == 0
    opened = upper_half(solid)
    found = figures(opened, solid)
    assert found["iou"] is found["near_iou"] is found["near_accuracy"] is None
    assert found["f_score"] > 0.5


# ------------------------------------------------------------------------------------------------------------------ baseline


@pytest.mark.parametrize(("bits", "side"), [(1, 1), (6, 1), (8, 2), (4080, 15), (4096, 16)])
def test_cells_of_a_grid(bits: int, side: int) -> None:
    assert shapes.grid_side(bits) == side


def test_grid_of_a_box_that_fits_it() -> None:
    """A box of whole cells: the smooth surface cuts its edges only."""
    box = trimesh.creation.box((1.6, 0.8, 0.8)).apply_translation([5, 0, 0])
    grid = shapes.coarse_grid(box, 8**3)
    assert media.is_closed(grid) and grid.volume == pytest.approx(box.volume, rel=0.08) and grid.volume < box.volume
    assert np.allclose(grid.bounds, box.bounds, atol=1e-6)


def test_more_bits_make_a_better_grid() -> None:
    torus = trimesh.creation.torus(0.7, 0.25)
    scores = [shapes.f_score(torus, shapes.coarse_grid(torus, bits)) for bits in (27, 1000, 4080)]
    assert scores == sorted(scores) and scores[-1] > 0.3


def test_grids_of_thin_and_open_shapes_are_not_empty() -> None:
    thin = trimesh.creation.box((1.9, 1.9, 0.01))
    assert not shapes.coarse_grid(thin, 1000).is_empty
    opened = upper_half(ball(0.9))
    assert not shapes.coarse_grid(opened, 1000).is_empty
    assert not shapes.coarse_grid(ball(1), 1).is_empty


# ------------------------------------------------------------------------------------------------------------------ pictures


def silhouette(picture: np.ndarray) -> np.ndarray:
    return (picture < 250).any(2)


def test_a_ball_is_a_disc_from_everywhere() -> None:
    for azimuth in (0.0, 1.0, 4.0):
        drawn = silhouette(render(ball(0.9), azimuth, 100))
        rows, columns = np.nonzero(drawn)
        assert rows.mean() == pytest.approx(49.5, abs=0.6) and columns.mean() == pytest.approx(49.5, abs=0.6)
        assert drawn.sum() == pytest.approx(np.pi * (0.9 / 1.45 * 50) ** 2, rel=0.05)


def test_up_is_up_and_near_hides_far() -> None:
    pole = trimesh.creation.box((0.1, 0.9, 0.1)).apply_translation([0, 0.45, 0])
    rows, _ = np.nonzero(silhouette(render(pole, 0.0, 100)))
    assert rows.min() < 25 and rows.max() < 60
    # A small ball in front of a large one or behind it, as the table turns.
    pair = trimesh.util.concatenate([ball(0.4), ball(0.1, (0, 0, 0.8))])
    front, back = render(pair, 0.0, 120), render(pair, np.pi, 120)
    alone = render(ball(0.4), 0.0, 120)
    assert (front != alone).any(2).sum() > 50
    assert (back != alone).any(2).sum() < (front != alone).any(2).sum()


def test_turning() -> None:
    bar = trimesh.creation.box((1.8, 0.2, 0.2))
    widths = [np.ptp(np.nonzero(silhouette(view))[1]) for view in turntable(bar, views=4, size=100)]
    assert widths[0] == widths[2] > 4 * widths[1] and abs(widths[1] - widths[3]) <= 1
    pictures = turntable(bar, views=3, size=40)
    uri = as_webp(pictures)
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert image.n_frames == 3 and image.size == (40, 40)
    assert (render(trimesh.Trimesh(), 0.0, 20) == 255).all()


# ------------------------------------------------------------------------------------------------------------------- the run


def test_the_protocol_is_kept() -> None:
    assert isinstance(shapes, Measures)


def test_items_are_read_in_the_frame(tmp_path: Path) -> None:
    spec = small_vat().spec
    moved = trimesh.creation.box((2, 1, 1)).apply_translation([50, 60, 70])
    mesh = shapes.read(str(media.write_shape(tmp_path / "box.stl", moved)), spec, {})
    assert np.allclose(mesh.bounds, [[-0.95, -0.475, -0.475], [0.95, 0.475, 0.475]], atol=1e-5)
    assert shapes.properties(mesh, spec) == {"faces": 12, "closed": True}
    (tmp_path / "points.ply").write_bytes(trimesh.PointCloud(ball(1).vertices).export(file_type="ply"))
    with pytest.raises(zoo.InputError, match="points only"):
        shapes.read(str(tmp_path / "points.ply"), spec, {})


def test_reconstructions_compare_with_and_without_meta(tmp_path: Path) -> None:
    """The report decodes from ids alone, in the model's frame, and that is where references are."""
    tokenizer = small_vat()
    reference = shapes.read(str(media.write_shape(tmp_path / "ball.ply", ball(7, (1, 2, 3)))), tokenizer.spec, {})
    tokens = tokenizer.encode(reference)
    (decoded,), (bare,) = tokenizer.decode(tokens), tokenizer.decode(tokens.ids)
    assert np.allclose(decoded.vertices, bare.vertices, atol=1e-5)
    assert shapes.comparable(decoded, reference) is decoded


def test_figures_of_a_run() -> None:
    spec = replace(small_vat().spec, vocab_size=64, max_tokens=680)
    rows = [{"tokens": 680, "closed": True, "encode_seconds": 0.5, "decode_seconds": 2.0}] * 2
    summary = shapes.totals(rows) | {"tokenizer": spec.as_dict()}
    assert shapes.heading(summary) == "680 tokens or 510 bytes per shape"
    assert ("510", "bytes per shape") in shapes.tiles(summary) and ("2.0 s", "to decode a shape") in shapes.tiles(summary)
    assert shapes.tokens_per(rows, spec) == {"shape": 680}


def test_what_the_report_shows() -> None:
    spec = replace(small_vat().spec, vocab_size=64, max_tokens=680)
    variants = [Variant(count, 6 * count, ball(0.8), [("F-score", 0.5, "")], []) for count in (1, 680)]
    shown = shapes.shown(ball(0.9), variants, spec)
    assert "510 bytes" in shown["caption"] and shown["original"].startswith("data:image/webp")
    assert [frame["layout"] for frame in shown["frames"]] == ["1³ cells", "15³ cells"]


def test_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "COUNT", 1000)
    folder = tmp_path / "shapes"
    media.write_shape(folder / "ball.glb", ball(7, (1, 2, 3)))
    media.write_shape(folder / "bowl.stl", upper_half(ball(1)))
    (folder / "noise.obj").write_bytes(b"nothing of use" * 9)
    summary = reconstruct.run(small_vat(), folder, tmp_path / "out", prefixes=[9], progress=False)
    assert (summary["items"], summary["failed"], summary["closed"]) == (3, 1, 1)
    assert summary["metrics"]["f_score"]["ours"]["n"] == 2 and summary["metrics"]["iou"]["ours"]["n"] == 1
    assert [point["tokens"] for point in summary["curve"]] == [9, 25]
    report = (tmp_path / "out" / "report.html").read_text()
    assert report.count("original, turning") == 2 and "occupancy grid of the same bits" in report

"""Shapes: read from every format, brought to the frame, and refused where they are no shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh

import zoo
from zoo import media
from zoo.media.shape import estimate_normals
from zoo.media.solid import winding_number


def torus() -> trimesh.Trimesh:
    return trimesh.creation.torus(2.0, 0.7).apply_translation([1, 2, 3])


def distance_to_torus(points: torch.Tensor) -> torch.Tensor:
    """In the torus's own coordinates."""
    about = points.double() - torch.tensor([1.0, 2, 3])
    return torch.stack([about[:, :2].norm(dim=1) - 2.0, about[:, 2]]).norm(dim=0) - 0.7


def ply(columns: list[str], rows: np.ndarray) -> bytes:
    header = "\n".join(f"property float {column}" for column in columns)
    lines = "\n".join(" ".join(map(str, row)) for row in rows.tolist())
    return f"ply\nformat ascii 1.0\nelement vertex {len(rows)}\n{header}\nend_header\n{lines}\n".encode()


# --------------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("extension", [".glb", ".obj", ".ply", ".stl", ".off"])
def test_every_format_both_ways(extension: str, tmp_path: Path) -> None:
    mesh = torus()
    path = media.write_shape(tmp_path / f"torus{extension}", mesh)
    read = media.read_shape(path)
    assert len(read.faces) == len(mesh.faces)
    assert np.allclose(read.triangles, mesh.triangles, atol=1e-5)
    from_bytes = media.prepare_shape(path.read_bytes(), 200)
    assert torch.equal(from_bytes.points, media.prepare_shape(path, 200).points)
    # The content decides, not the name.
    renamed = path.rename(tmp_path / "torus.mesh")
    assert torch.equal(from_bytes.points, media.prepare_shape(renamed, 200).points)


def test_ascii_stl_and_gltf_with_a_file_beside_it(tmp_path: Path) -> None:
    mesh = torus()
    text = tmp_path / "torus.stl"
    text.write_text(trimesh.exchange.stl.export_stl_ascii(mesh))
    assert len(media.read_shape(text).faces) == len(mesh.faces)
    for name, content in trimesh.exchange.gltf.export_gltf(trimesh.Scene(mesh)).items():
        (tmp_path / name).write_bytes(content)
    assert np.allclose(media.read_shape(tmp_path / "model.gltf").triangles, mesh.triangles, atol=1e-5)


def test_scenes_become_one_mesh_with_transforms_applied() -> None:
    scene = trimesh.Scene([torus()])
    mirrored = trimesh.transformations.reflection_matrix([0, 0, 0], [1, 0, 0])
    scene.add_geometry(trimesh.creation.box((1, 1, 1)), transform=mirrored)
    scene.add_geometry(trimesh.creation.icosphere(2), transform=trimesh.transformations.translation_matrix([9, 0, 0]))
    for source in (scene, scene.export(file_type="glb")):
        read = media.read_shape(source)
        assert read.bounds[1][0] == pytest.approx(10, abs=1e-5)
        parts = (torus().volume, 1, trimesh.creation.icosphere(2).volume)
        assert read.volume == pytest.approx(sum(parts), rel=1e-4)


def test_clouds_from_files() -> None:
    sphere = trimesh.creation.icosphere(3)
    rows = np.concatenate([sphere.vertices, 2 * sphere.vertex_normals], axis=1).astype(np.float32)
    with_normals = media.prepare_shape(ply(["x", "y", "z", "nx", "ny", "nz"], rows), 5000)
    assert torch.allclose(with_normals.normals, torch.from_numpy(rows[:, 3:] / 2), atol=1e-5)
    without = media.prepare_shape(ply(["x", "y", "z"], rows[:, :3]), 5000)
    assert torch.equal(without.points, with_normals.points)
    assert ((without.normals * with_normals.normals).sum(1) > 0.9).all()


def test_written_files_are_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(zoo.InputError, match="no shape format"):
        media.write_shape(tmp_path / "a.png", torus())
    with pytest.raises(zoo.InputError, match="empty"):
        media.write_shape(tmp_path / "a.stl", trimesh.Trimesh())
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------- the frame


def test_surface_points_with_normals() -> None:
    prepared = media.prepare_shape(torus(), 3000)
    meta = prepared.meta
    assert (meta["x"], meta["y"], meta["z"]) == pytest.approx((1, 2, 3), abs=1e-6)
    assert meta["scale"] == pytest.approx(5.4 / 1.9, rel=1e-6)
    assert prepared.points.dtype == prepared.normals.dtype == torch.float32
    assert prepared.points.abs().max() <= 0.95 + 1e-6
    placed = prepared.points * meta["scale"] + torch.tensor([1.0, 2, 3])
    assert distance_to_torus(placed).abs().max() < 0.05
    assert (prepared.normals.norm(dim=1) - 1).abs().max() < 1e-5
    # A step along the normals leads away from the inside.
    assert distance_to_torus(placed + 0.3 * prepared.normals).min() > 0.2


def test_points_are_spread_by_area() -> None:
    box = trimesh.creation.box((1, 2, 4))
    normals = media.prepare_shape(box, 20_000).normals.abs()
    share = (normals > 0.9).float().mean(0)
    assert share.tolist() == pytest.approx([16 / 28, 8 / 28, 4 / 28], abs=0.015)


def test_same_seed_same_points() -> None:
    first, again, other = (media.prepare_shape(torus(), 100, seed=seed).points for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_place_and_size_do_not_change_the_points() -> None:
    mesh = torus()
    moved = mesh.copy().apply_scale(250.0).apply_translation([1e4, -2e4, 7.0])
    assert torch.allclose(media.prepare_shape(mesh, 500).points, media.prepare_shape(moved, 500).points, atol=1e-6)


def test_unused_vertices_and_degenerate_faces_do_not_count() -> None:
    mesh = torus()
    vertices = np.concatenate([mesh.vertices, [[1000, 1000, 1000]]])
    faces = np.concatenate([mesh.faces, [[0, 0, 1], [2, 2, 2]]])
    odd = trimesh.Trimesh(vertices, faces, process=False)
    assert torch.equal(media.prepare_shape(odd, 500).points, media.prepare_shape(mesh, 500).points)


def test_open_meshes_are_taken_by_their_surface() -> None:
    sphere = trimesh.creation.icosphere(3)
    half = trimesh.Trimesh(sphere.vertices, sphere.faces[sphere.triangles_center[:, 2] > 0])
    assert not media.is_closed(half)
    prepared = media.prepare_shape(half, 500)
    assert prepared.points.isfinite().all() and prepared.normals.isfinite().all()
    plane = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], [[0, 1, 2], [0, 2, 3]])
    assert (media.prepare_shape(plane, 100).points[:, 2] == 0).all()


def test_clouds_are_thinned_or_used_whole() -> None:
    random = np.random.default_rng(0)
    points, normals = random.normal(size=(300, 3)), random.normal(size=(300, 3)) * 1e-200
    whole = media.prepare_shape((points, normals), 300)
    assert whole.points.shape == (300, 3)
    assert (whole.normals.norm(dim=1) - 1).abs().max() < 1e-5
    thinned = media.prepare_shape((points, normals), 100)
    rows = {tuple(row) for row in whole.points.tolist()}
    assert len({tuple(row) for row in thinned.points.tolist()} & rows) == 100
    for same in (np.concatenate([points, normals], 1), torch.from_numpy(np.concatenate([points, normals], 1))):
        assert torch.equal(media.prepare_shape(same, 300).normals, whole.normals)


def test_estimated_normals(caplog: pytest.LogCaptureFixture) -> None:
    for mesh in (torus(), trimesh.creation.icosphere(4), trimesh.creation.capsule(2, 0.5)):
        known = media.prepare_shape(mesh, 2000)
        found = estimate_normals(known.points.double().numpy())
        cosine = (found * known.normals.numpy()).sum(1)
        assert (cosine > 0.85).mean() > 0.99
    assert "have no normals" in caplog.text


def test_normals_of_parts_that_do_not_touch() -> None:
    two = trimesh.util.concatenate([trimesh.creation.icosphere(3), trimesh.creation.icosphere(3).apply_translation([9, 0, 0])])
    known = media.prepare_shape(two, 1500)
    cosine = (estimate_normals(known.points.double().numpy()) * known.normals.numpy()).sum(1)
    assert (cosine > 0.8).all()


def test_a_million_faces() -> None:
    sphere = trimesh.creation.icosphere(4)
    mesh = trimesh.Trimesh(sphere.vertices, np.tile(sphere.faces, (200, 1)), process=False)
    assert len(mesh.faces) == 1_024_000
    prepared = media.prepare_shape(mesh, 1000)
    assert (prepared.points.norm(dim=1) - 0.95).abs().max() < 0.02
    with pytest.raises(zoo.InputError, match="1024000 faces, more than max_faces = 999999"):
        media.prepare_shape(mesh, 1000, max_faces=999_999)


# ----------------------------------------------------------------------------------------------------------------- bad input


def flat(*vertices: list[float]) -> trimesh.Trimesh:
    return trimesh.Trimesh(list(vertices), [[0, 1, 2]], process=False)


SPHERE = trimesh.creation.icosphere(2)
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no faces": (lambda folder: trimesh.Trimesh(), "no faces"),
    "a line": (lambda folder: flat([0, 0, 0], [1, 1, 1], [2, 2, 2]), "no area"),
    "a point": (lambda folder: flat([1, 1, 1], [1, 1, 1], [1, 1, 1]), "no extent"),
    "NaN": (lambda folder: flat([0, 0, np.nan], [1, 1, 1], [2, 2, 0]), "NaN or infinite"),
    "infinite": (lambda folder: np.full((100, 3), np.inf), "NaN or infinite"),
    "a wrong index": (lambda folder: trimesh.Trimesh([[0, 0, 0], [1, 0, 0]], [[0, 1, 7]], process=False), "names a vertex"),
    "too few points": (lambda folder: np.random.default_rng(0).normal(size=(63, 3)), "63 points are too few"),
    "points at one place": (lambda folder: np.ones((100, 3)), "no extent"),
    "wrong rank": (lambda folder: np.zeros((100, 3, 1)), "of shape"),
    "wrong width": (lambda folder: np.zeros((100, 4)), "of shape"),
    "not numbers": (lambda folder: np.zeros((100, 3), np.bool_), "must be numbers"),
    "three things": (lambda folder: (SPHERE.vertices, SPHERE.vertices, 1), "a tuple must be"),
    "fewer normals": (lambda folder: (SPHERE.vertices, SPHERE.vertices[:9]), "9 normals"),
    "a normal of no length": (lambda folder: (SPHERE.vertices, 0 * SPHERE.vertices), "length of 0"),
    "a normal that is NaN": (lambda folder: (SPHERE.vertices, np.nan * SPHERE.vertices), "normals hold NaN"),
    "too large for float32": (lambda folder: SPHERE.vertices * 1e300, "float32"),
    "too small for float32": (lambda folder: SPHERE.vertices * 1e-60, "float32"),
    "overflow": (lambda folder: SPHERE.vertices * 1.7e308, "infinite extent"),
    "an empty scene": (lambda folder: trimesh.Scene(), "no faces and no points"),
    "noise": (lambda folder: b"not a shape at all" * 20, "is not a shape file"),
    "nothing": (lambda folder: b"", r"0 bytes"),
    "a folder": (lambda folder: folder, "is a folder"),
    "no file": (lambda folder: folder / "nowhere.glb", "does not exist"),
    "another kind": (lambda folder: object(), "not object"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_shape_is_refused(case: str, tmp_path: Path) -> None:
    make, reason = BAD[case]
    with pytest.raises(zoo.InputError, match=reason):
        media.prepare_shape(make(tmp_path), 100)


@pytest.mark.parametrize("kind", ["glb", "obj", "ply", "stl", "off"])
def test_files_that_are_cut_off(kind: str, tmp_path: Path) -> None:
    content = media.write_shape(tmp_path / f"a.{kind}", torus()).read_bytes()
    # A wavefront file has no end of its own: only a cut before the first face shows.
    cut = content[:900] if kind == "obj" else content[: len(content) // 2]
    with pytest.raises(zoo.InputError):
        media.prepare_shape(cut, 100)


def test_options_are_checked() -> None:
    with pytest.raises(zoo.InputError, match=r"reaches beyond \[-1, 1\]"):
        media.prepare_shape(torus(), 100, normalise=False)
    inside = media.prepare_shape(SPHERE.vertices * 0.5, 500, normalise=False)
    assert torch.equal(inside.points, torch.from_numpy(SPHERE.vertices * 0.5).float())
    assert inside.meta == {"x": 0.0, "y": 0.0, "z": 0.0, "scale": 1.0}
    with pytest.raises(zoo.InputError, match="put back"):
        media.frame_of({"width": 3})


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.media.shape.find_spec", lambda package: None if package == "scipy" else object())
    with pytest.raises(zoo.MissingExtraError, match=r"scipy is not installed: pip install \"tokenizer-zoo\[shape\]\""):
        media.prepare_shape(torus(), 100)


# ---------------------------------------------------------------------------------------------------------- inside or outside


def test_points_inside_of_known_shapes() -> None:
    points = np.random.default_rng(0).uniform(-1.2, 1.2, (5000, 3))
    box = trimesh.creation.box((1.0, 1.5, 2.0))
    assert np.array_equal(media.contains(box, points), (np.abs(points) < [0.5, 0.75, 1.0]).all(1))
    sphere = trimesh.creation.icosphere(4)
    radius = np.linalg.norm(points, axis=1)
    clear = np.abs(radius - 1) > 5e-3
    assert np.array_equal(media.contains(sphere, points)[clear], radius[clear] < 1)


def test_points_in_line_with_edges() -> None:
    axis = np.linspace(-1, 1, 21)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    # None of the points lies on the surface, but many on the planes of edges and diagonals.
    box = trimesh.creation.box((1.5, 1.5, 1.5))
    assert np.array_equal(media.contains(box, grid), (np.abs(grid) < 0.75).all(1))


def test_overlapping_and_reversed_parts() -> None:
    points = np.random.default_rng(0).uniform(-1, 2, (3000, 3))
    left, right = trimesh.creation.box((1, 1, 1)), trimesh.creation.box((1, 1, 1)).apply_translation([0.5, 0, 0])
    in_left = (np.abs(points) < 0.5).all(1)
    in_right = (np.abs(points - [0.5, 0, 0]) < 0.5).all(1)
    both = trimesh.util.concatenate([left, right])
    assert np.array_equal(winding_number(both, points), in_left.astype(int) + in_right)
    assert np.array_equal(media.contains(both, points), in_left | in_right)
    left.invert()
    assert np.array_equal(winding_number(left, points), -in_left.astype(int))
    assert not media.contains(trimesh.Trimesh(), points).any()


def test_closed_once_vertices_at_one_place_are_one() -> None:
    box = trimesh.creation.box((1, 1, 1))
    soup = trimesh.Trimesh(box.triangles.reshape(-1, 3), np.arange(36).reshape(-1, 3), process=False)
    assert media.is_closed(soup)
    assert not media.is_closed(trimesh.Trimesh(box.vertices, box.faces[:-1], process=False))

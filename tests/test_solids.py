"""The meshes that shape tokenizers are measured on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trimesh

from zoo.eval import solids
from zoo.media.solid import is_closed


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solids, "_RESOLUTION", 40)


@pytest.mark.parametrize("name", solids.LEVELS)
def test_level_sets_are_closed_and_look_outwards(name: str) -> None:
    mesh = solids.level_set(solids.LEVELS[name](), 40)
    assert is_closed(mesh) and mesh.volume > 0.1
    assert np.abs(mesh.vertices).max() <= 1 + 1e-9


def test_a_level_set_is_where_the_function_is_zero() -> None:
    ball = solids.level_set(lambda x, y, z: x * x + y * y + z * z - 0.49, 64)
    assert np.abs(np.linalg.norm(ball.vertices, axis=1) - 0.7).max() < 0.005
    assert ball.volume == pytest.approx(4 / 3 * np.pi * 0.343, rel=0.01)


def test_every_mesh_is_written_and_closed(tmp_path: Path) -> None:
    assert [path.parent for path in solids.write_solids(tmp_path)] == [tmp_path] * 21
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 21 and {path.suffix for path in paths} == {".ply"}
    assert all(is_closed(trimesh.load_mesh(path, process=False)) for path in paths)

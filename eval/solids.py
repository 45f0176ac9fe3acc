"""Closed meshes to measure shape tokenizers on, as PLY files: shapes for `zoo eval --data` that need no network.

    zoo study solids solids/

Some are what ``trimesh.creation`` makes. The others are level sets and revolved outlines of kinds that the recipe of
``vat-tiny`` has none of: knots, springs, minimal and algebraic surfaces, stars, twisted bars, a chair, a vase.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from zoo.eval.options import Folder
from zoo.media import write_shape
from zoo.media.shape import require_shape_packages

if TYPE_CHECKING:
    import trimesh

Values = NDArray[np.float64]
#: Negative inside.
Level = Callable[[Values, Values, Values], Values]

# Cells along each side of [-1, 1] that level sets are drawn with.
_RESOLUTION = 112
_OFF_SURFACE = 1e-4


def _tube(curve: Values, radius: float) -> Level:
    """Everything close to a curve given by points."""
    from scipy.spatial import cKDTree

    tree = cKDTree(curve)

    def level(x: Values, y: Values, z: Values) -> Values:
        distance: Values = tree.query(np.stack([x, y, z], axis=-1))[0] - radius
        return distance

    return level


def _knot() -> Level:
    t = np.linspace(0, 2 * np.pi, 1500)
    ring = 0.5 + 0.22 * np.cos(3 * t)
    return _tube(np.stack([ring * np.cos(2 * t), ring * np.sin(2 * t), 0.28 * np.sin(3 * t)], axis=-1), 0.12)


def _spring() -> Level:
    t = np.linspace(-3, 3, 2000)
    return _tube(np.stack([0.55 * np.cos(np.pi * t), 0.55 * np.sin(np.pi * t), 0.25 * t], axis=-1), 0.1)


def _gyroid(x: Values, y: Values, z: Values) -> Values:
    a, b, c = 5 * x, 5 * y, 5 * z
    sheet = np.abs(np.sin(a) * np.cos(b) + np.sin(b) * np.cos(c) + np.sin(c) * np.cos(a)) - 0.55
    return np.maximum(sheet, 5 * (np.sqrt(x * x + y * y + z * z) - 0.9))


def _tangle(x: Values, y: Values, z: Values) -> Values:
    total = sum((2.6 * axis) ** 4 - 5 * (2.6 * axis) ** 2 for axis in (x, y, z))
    return np.asarray(total + 11.2)


def _heart(x: Values, y: Values, z: Values) -> Values:
    x, y, z = 1.35 * x, 1.35 * y, 1.35 * z
    return (x * x + 2.25 * y * y + z * z - 1) ** 3 - x * x * z**3 - 0.1125 * y * y * z**3


def _star(x: Values, y: Values, z: Values) -> Values:
    angle = np.abs((np.arctan2(y, x) / (2 * np.pi / 5)) % 1 - 0.5) * 2
    return np.maximum(np.hypot(x, y) - (0.38 + 0.5 * angle**1.5), np.abs(z) - 0.2)


def _gear(x: Values, y: Values, z: Values) -> Values:
    radius = np.hypot(x, y)
    rim = 0.78 + 0.1 * np.clip(3 * np.sin(12 * np.arctan2(y, x)), -1, 1)
    return np.maximum(np.maximum(radius - rim, 0.22 - radius), np.abs(z) - 0.18)


def _bumps(x: Values, y: Values, z: Values) -> Values:
    radius = np.sqrt(x * x + y * y + z * z) + 1e-9
    wave = np.sin(4 * np.arctan2(y, x)) * (1 - (z / radius) ** 2) ** 2 + np.cos(5 * np.arccos(z / radius))
    return radius - 0.6 - 0.12 * wave


def _astroid(x: Values, y: Values, z: Values) -> Values:
    return np.asarray(sum(np.abs(axis) ** 0.8 for axis in (x, y, z))) - 0.92


def _twisted_bar(x: Values, y: Values, z: Values) -> Values:
    cos, sin = np.cos(1.6 * z), np.sin(1.6 * z)
    return np.maximum(np.maximum(np.abs(cos * x - sin * y), np.abs(sin * x + cos * y)) - 0.28, np.abs(z) - 0.9)


def _twisted_ring(x: Values, y: Values, z: Values) -> Values:
    turn, across = 0.5 * np.arctan2(y, x), np.hypot(x, y) - 0.6
    wide, thin = np.cos(turn) * across - np.sin(turn) * z, np.sin(turn) * across + np.cos(turn) * z
    return np.maximum(np.abs(wide) - 0.3, np.abs(thin) - 0.1)


def _chair(x: Values, y: Values, z: Values) -> Values:
    def block(middle: tuple[float, float, float], half: tuple[float, float, float]) -> Values:
        sides = [np.abs(axis - at) - size for axis, at, size in zip((np.abs(x), y, z), middle, half, strict=True)]
        return np.maximum.reduce(sides)

    seat, back = block((0, 0, -0.05), (0.45, 0.45, 0.08)), block((0, 0.38, 0.45), (0.45, 0.07, 0.45))
    legs = [block((0.36, y_leg, -0.5), (0.08, 0.08, 0.4)) for y_leg in (-0.36, 0.36)]
    return np.minimum.reduce([seat, back, *legs])


LEVELS: Mapping[str, Callable[[], Level]] = {
    "knot": _knot,
    "spring": _spring,
    "gyroid": lambda: _gyroid,
    "tangle": lambda: _tangle,
    "heart": lambda: _heart,
    "star": lambda: _star,
    "gear": lambda: _gear,
    "bumps": lambda: _bumps,
    "astroid": lambda: _astroid,
    "twisted-bar": lambda: _twisted_bar,
    "twisted-ring": lambda: _twisted_ring,
    "chair": lambda: _chair,
}


def level_set(level: Level, resolution: int) -> trimesh.Trimesh:
    """The surface within [-1, 1] where a function is zero, closed at the border."""
    import trimesh
    from skimage.measure import marching_cubes

    axis = np.linspace(-1, 1, resolution + 1)
    values = np.pad(level(*np.meshgrid(axis, axis, axis, indexing="ij")), 1, constant_values=1.0)
    # A node on the surface would make triangles without area.
    values[np.abs(values) < _OFF_SURFACE] = _OFF_SURFACE
    vertices, faces, _, _ = marching_cubes(-values, 0.0, gradient_direction="ascent")
    return trimesh.Trimesh((vertices - 1) * 2 / resolution - 1, faces, process=False)


def _vase() -> trimesh.Trimesh:
    import trimesh

    height = np.linspace(-0.9, 0.9, 60)
    radius = 0.35 + 0.16 * np.sin(3.2 * height + 0.4) - 0.08 * height
    outline = np.stack([radius, height], axis=1)
    inner = np.stack([radius - 0.08, height], axis=1)[:4:-1]
    closed = np.concatenate([[[0, height[0]]], outline, inner, [[0, inner[-1, 1]]]])
    return trimesh.creation.revolve(closed, sections=64)


def _creations() -> Mapping[str, trimesh.Trimesh]:
    """What trimesh makes itself."""
    from trimesh import creation
    from trimesh.transformations import rotation_matrix

    tilt = rotation_matrix(0.7, (1, 2, 0.5))
    return {
        "box": creation.box((1.0, 0.6, 1.4), transform=tilt),
        "ball": creation.icosphere(subdivisions=4),
        "icosahedron": creation.icosahedron(),
        "capsule": creation.capsule(height=1.2, radius=0.4),
        "cylinder": creation.cylinder(radius=0.5, height=1.5, transform=tilt),
        "cone": creation.cone(radius=0.7, height=1.5),
        "torus": creation.torus(0.7, 0.25),
        "annulus": creation.annulus(r_min=0.4, r_max=0.8, height=0.6, transform=tilt),
        "vase": _vase(),
    }


def write_solids(folder: str | Path) -> list[Path]:
    """Write the meshes into a folder and return their paths.

    Raises:
        MissingExtraError: trimesh or scikit-image is not installed.
    """
    require_shape_packages()
    meshes = {**_creations(), **{name: level_set(level(), _RESOLUTION) for name, level in LEVELS.items()}}
    return [write_shape(Path(folder) / f"{name}.ply", mesh) for name, mesh in meshes.items()]


def main(folder: Folder) -> None:
    """Write closed meshes to measure shape tokenizers on."""
    for path in write_solids(folder):
        print(path)

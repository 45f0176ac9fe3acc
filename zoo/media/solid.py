"""Whether points lie inside of a mesh."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import trimesh

Vectors = NDArray[np.float64]
Indices = NDArray[np.int64]

# Pairs of things to compare in memory at a time.
_PAIRS = 1 << 21
_LARGEST_GRID = 512
# Columns that points are moved aside by, as a share of the extent, so that none runs along an edge: their ratio is irrational.
_ASIDE = 1e-9 * np.array([1.0, 2**0.5])


def is_closed(mesh: trimesh.Trimesh) -> bool:
    """Whether every edge joins two faces, once vertices at the same place are one."""
    merged = mesh.copy(include_visual=False)
    merged.merge_vertices(merge_tex=True, merge_norm=True)
    return bool(merged.is_watertight)


def contains(mesh: trimesh.Trimesh, points: Vectors) -> NDArray[np.bool_]:
    """Which points ``[points, 3]`` lie inside of a closed mesh.

    Where closed parts overlap, a point of either is inside. A mesh that is not closed has no inside, and gets an answer
    that means nothing.
    """
    return winding_number(mesh, points) != 0


def winding_number(mesh: trimesh.Trimesh, points: Vectors) -> Indices:
    """How often a closed mesh encloses each of the points ``[points, 3]``.

    A ray upwards leaves the mesh as often as it enters it, and once more for each time that it started inside.
    """
    triangles = np.asarray(mesh.triangles, np.float64)
    found = np.zeros(len(points), np.int64)
    if not len(triangles) or not len(points):
        return found
    lower, upper = triangles.min((0, 1)), triangles.max((0, 1))
    columns = points[:, :2] + _ASIDE * (upper - lower).max()
    within = np.flatnonzero(((columns >= lower[:2]) & (columns <= upper[:2])).all(1) & (points[:, 2] <= upper[2]))
    side = int(np.clip(len(triangles) ** 0.5, 1, _LARGEST_GRID))
    cell = (upper - lower)[:2].max() / side
    cells = ((columns[within] - lower[:2]) / cell).astype(np.int64)
    number = cells[:, 0] * (side + 1) + cells[:, 1]
    order = np.argsort(number, kind="stable")
    within, number = within[order], number[order]
    first = ((triangles[:, :, :2].min(1) - lower[:2]) / cell).astype(np.int64)
    last = ((triangles[:, :, :2].max(1) - lower[:2]) / cell).astype(np.int64)
    for triangle, x, y in covered(first, last):
        start, end = (np.searchsorted(number, x * (side + 1) + y, which) for which in ("left", "right"))
        for pair, offset in expanded(end - start):
            point, corners = within[start[pair] + offset], triangles[triangle[pair]]
            weights, area = barycentric(corners[:, :, :2], columns[point])
            height = np.einsum("pc,pc->p", weights, corners[:, :, 2])
            hit = (weights >= 0).all(1) & (height > points[point, 2])
            np.add.at(found, point[hit], np.sign(area[hit]).astype(np.int64))
    return found


def covered(first: Indices, last: Indices) -> Iterator[tuple[Indices, Indices, Indices]]:
    """Every item with every cell of its rectangle, some at a time: item, and the cell's two coordinates.

    Args:
        first, last: corners of the items' rectangles, both within them, ``[items, 2]``.
    """
    rows, columns = (last - first + 1).T
    for item, offset in expanded(rows * columns):
        yield item, first[item, 0] + offset // columns[item], first[item, 1] + offset % columns[item]


def expanded(counts: Indices) -> Iterator[tuple[Indices, Indices]]:
    """Each index as often as its count says, and which time it is, counted from 0; some at a time."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    for start in range(0, total, _PAIRS):
        places = np.arange(start, min(start + _PAIRS, total))
        index = np.searchsorted(ends, places, side="right")
        yield index, places - (ends[index] - counts[index])


def barycentric(corners: Vectors, points: Vectors) -> tuple[Vectors, Vectors]:
    """Weights of the corners of triangles in the plane that give points, and twice the triangles' signed areas.

    Weights are NaN, and so never at least 0, where a triangle has no area.

    Args:
        corners: ``[pairs, 3, 2]``.
        points: ``[pairs, 2]``.
    """
    a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]
    area = _cross(b - a, c - a)
    parts = np.stack([_cross(b - points, c - points), _cross(c - points, a - points), _cross(a - points, b - points)], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(area[:, None] == 0, np.nan, parts / area[:, None]), area


def _cross(left: Vectors, right: Vectors) -> Vectors:
    product: Vectors = left[:, 0] * right[:, 1] - left[:, 1] * right[:, 0]
    return product

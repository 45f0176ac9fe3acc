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
    import trimesh

    faces = np.asarray(mesh.faces, np.int64)
    if not len(faces):
        return False
    return bool(
        trimesh.Trimesh(mesh.vertices, merged(np.asarray(mesh.vertices, np.float64), faces), process=False).is_watertight
    )


def merged(vertices: Vectors, faces: Indices) -> Indices:
    """Faces ``[faces, 3]`` whose corners at the same place, to 1e-8 of the extent, are one vertex."""
    import trimesh

    names, corners = np.unique(faces, return_inverse=True)
    places = vertices[names]
    lower, upper = places.min(0), places.max(0)
    extent = (upper - lower).max()
    scaled = (places - lower) / (extent if extent > 0 else 1.0)
    unique, inverse = trimesh.grouping.unique_rows(scaled, digits=8)
    return np.asarray(unique[inverse][corners.reshape(faces.shape)], np.int64)


def contains(mesh: trimesh.Trimesh, points: Vectors) -> NDArray[np.bool_]:
    """Mask of the points ``[points, 3]`` that lie inside of a closed mesh.

    Where closed parts overlap, a point of either is inside. A mesh that is not closed has no inside, and gets an answer
    that means nothing.
    """
    return winding_number(mesh, points) != 0


def winding_number(mesh: trimesh.Trimesh, points: Vectors) -> Indices:
    """Number of times that a closed mesh encloses each of the points ``[points, 3]``.

    A ray upwards leaves the mesh as often as it enters it, and once more for each time that it started inside.
    """
    found = np.zeros(len(points), np.int64)
    for point, _, sign in crossings(np.asarray(mesh.triangles, np.float64), points):
        np.add.at(found, point, sign)
    return found


def crossings(triangles: Vectors, points: Vectors) -> Iterator[tuple[Indices, Indices, Indices]]:
    """Crossings of rays upwards from points ``[points, 3]`` with triangles ``[triangles, 3, 3]``, some at a time.

    Yields:
        Of each passage: the point, the triangle, and whether that looks up, 1, or down, -1.
    """
    if not len(triangles) or not len(points):
        return
    lower, extent = triangles.min((0, 1)), np.ptp(triangles, axis=(0, 1))
    triangles, points = triangles - lower, points - lower
    columns = points[:, :2] + _ASIDE * extent.max()
    within = np.flatnonzero(((columns >= 0) & (columns <= extent[:2])).all(1) & (points[:, 2] <= extent[2]))
    side = int(np.clip(len(triangles) ** 0.5, 1, _LARGEST_GRID))
    cell = max(float(extent[:2].max()), np.finfo(np.float64).tiny) / side
    cells = (columns[within] / cell).astype(np.int64)
    number = cells[:, 0] * (side + 1) + cells[:, 1]
    order = np.argsort(number, kind="stable")
    within, number = within[order], number[order]
    weights, heights, signs = plane_functions(triangles)
    first, last = ((corner / cell).astype(np.int64) for corner in (triangles[:, :, :2].min(1), triangles[:, :, :2].max(1)))
    for triangle, x, y in covered(first, last):
        start, end = (np.searchsorted(number, x * (side + 1) + y, which) for which in ("left", "right"))
        for pair, offset in expanded(end - start):
            point, above = within[start[pair] + offset], triangle[pair]
            hit = inside_of(weights[above], columns[point])
            point, above = point[hit], above[hit]
            higher = at(heights[above], columns[point]) > points[point, 2]
            yield point[higher], above[higher], signs[above[higher]]


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


def plane_functions(triangles: Vectors) -> tuple[Vectors, Vectors, Indices]:
    """Triangles ``[triangles, 3, 3]`` as seen along z: functions of x and y, each given by its factors of x, y and 1.

    Returns:
        The weight of each corner, ``[triangles, 3, 3]``, NaN where a triangle is seen from its edge; z, ``[triangles, 3]``; and
        whether it looks up, 1, or down, -1.
    """
    b, c = (np.roll(triangles, -shift, axis=1)[:, :, :2] for shift in (1, 2))
    factors = np.stack([b[..., 1] - c[..., 1], c[..., 0] - b[..., 0], b[..., 0] * c[..., 1] - b[..., 1] * c[..., 0]], axis=2)
    area = factors[:, :, 2].sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = np.where(area[:, None, None] == 0, np.nan, factors / area[:, None, None])
    return weights, np.einsum("tcf,tc->tf", weights, triangles[:, :, 2]), np.sign(area).astype(np.int64)


def inside_of(weights: Vectors, places: Vectors) -> NDArray[np.bool_]:
    """Whether places ``[pairs, 2]`` lie within triangles, given by the weights of their corners ``[pairs, 3, 3]``."""
    within: NDArray[np.bool_] = at(weights[:, 0], places) >= 0
    return within & (at(weights[:, 1], places) >= 0) & (at(weights[:, 2], places) >= 0)


def at(factors: Vectors, places: Vectors) -> Vectors:
    """Values of functions ``[pairs, 3]`` at places ``[pairs, 2]``."""
    values: Vectors = factors[:, 0] * places[:, 0] + factors[:, 1] * places[:, 1] + factors[:, 2]
    return values

"""Triangles of polygons: of any size, concave ones too."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from zoo.errors import InputError, MissingReaderError
from zoo.media.shape.geometry import NO_FACES, Indices, Vectors, check_count, check_indices


def triangulate(vertices: Vectors, corners: Indices, sizes: Indices, max_faces: int) -> Indices:
    """Triangles of polygons, in the order of the polygons and wound as they are.

    A polygon of n corners gives n - 2 triangles and keeps every corner, so that a closed surface stays closed. Where triangles
    around the first corner cover the polygon, as in every convex one, these are taken; others are cut by `manifold3d`, seen
    along their normal.

    Args:
        vertices: ``[vertices, 3]``.
        corners: of all polygons, one after the other.
        sizes: corners of each polygon.
        max_faces: most triangles.

    Raises:
        InputError: a polygon has fewer than 3 corners or names a vertex that is not there, or there are too many triangles.
        MissingReaderError: there are polygons to cut, and manifold3d is not installed.
    """
    if not len(sizes):
        return NO_FACES
    if sizes.min() < 3:
        raise InputError(f"face {int(sizes.argmin())} has {int(sizes.min())} corners, where 3 is the fewest")
    check_indices(corners, len(vertices))
    check_count(int(sizes.sum()) - 2 * len(sizes), "faces", max_faces)
    if (sizes == 3).all():
        return corners.reshape(-1, 3)
    starts = np.cumsum(sizes) - sizes
    places = np.cumsum(sizes - 2) - (sizes - 2)
    triangles = np.empty((int((sizes - 2).sum()), 3), np.int64)
    for size in np.unique(sizes).tolist():
        chosen = np.flatnonzero(sizes == size)
        polygons = corners[starts[chosen, None] + np.arange(size)]
        steps = np.arange(size - 2)
        fans = np.stack([np.broadcast_to(polygons[:, :1], (len(chosen), size - 2)), polygons[:, 1:-1], polygons[:, 2:]], axis=2)
        if size > 3:
            # Coordinates that are no numbers are refused later on, with all others.
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                fits, normals = _fan_fits(vertices[polygons])
                for index in np.flatnonzero(~fits):
                    fans[index] = polygons[index][_cut(vertices[polygons[index]], normals[index])]
        triangles[places[chosen, None] + steps] = fans
    return triangles


def without_lines(corners: Indices, sizes: Indices) -> tuple[Indices, Indices]:
    """Corners and sizes of those faces that have three corners or more: with fewer, formats draw points and lines.

    Raises:
        InputError: there are faces, and none of those.
    """
    polygons = sizes > 2
    if len(sizes) and not polygons.any():
        raise InputError("none of its faces has three corners")
    return corners[np.repeat(polygons, sizes)], sizes[polygons]


def _fan_fits(polygons: Vectors) -> tuple[NDArray[np.bool_], Vectors]:
    """Which polygons ``[polygons, corners, 3]`` the triangles around their first corners cover, and the polygons' normals.

    They do where none looks the other way than the polygon as a whole, and turn around that corner by less than a whole turn.
    """
    spokes = polygons[:, 1:] - polygons[:, :1]
    # Of lengths whose squares are numbers that float64 has.
    spokes = spokes / np.maximum(np.abs(spokes).max((1, 2), keepdims=True), np.finfo(np.float64).tiny)
    areas = np.cross(spokes[:, :-1], spokes[:, 1:])
    normals = areas.sum(1)
    facing = np.einsum("pti,pi->pt", areas, normals)
    # Of a straight run of corners nothing but rounding is left.
    slack = 1e-9 * np.einsum("pi,pi->p", normals, normals)
    fits: NDArray[np.bool_] = (facing >= -slack[:, None]).all(1)
    if polygons.shape[1] > 4:
        along = np.einsum("pti,pti->pt", spokes[:, :-1], spokes[:, 1:])
        turned = np.arctan2(np.sqrt(np.einsum("pti,pti->pt", areas, areas)), along).sum(1)
        fits &= turned < 2 * np.pi - 1e-6
    return fits, normals


def _cut(polygon: Vectors, normal: Vectors) -> Indices:
    """Triangles of a concave polygon ``[corners, 3]``, as indices of its corners."""
    try:
        from manifold3d import triangulate as cut
    except ImportError as error:
        raise MissingReaderError(
            'the shape has concave polygons, and manifold3d is not installed: pip install "tokenizer-zoo[shape]"'
        ) from error
    # Two axes across the normal, turned so that the polygon runs counter-clockwise.
    across = np.cross(normal, np.eye(3)[np.abs(normal).argmin()])
    if not across.any():
        return _fan(len(polygon))
    axes = np.stack([across, np.cross(normal, across)], axis=1)
    flat = (polygon - polygon[0]) @ (axes / np.linalg.norm(axes, axis=0))
    extent = np.abs(flat).max()
    if not np.isfinite(extent) or extent == 0:
        return _fan(len(polygon))
    triangles = np.asarray(cut([flat / extent]), np.int64)
    return triangles if len(triangles) == len(polygon) - 2 else _fan(len(polygon))


def _fan(corners: int) -> Indices:
    """Triangles around the first corner: all that can be done for a polygon of no area."""
    steps = np.arange(1, corners - 1)
    return np.stack([np.zeros_like(steps), steps, steps + 1], axis=1)

"""Geometry that readers of files give: vertices, triangles, and normals of points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zoo.errors import InputError

Vectors = NDArray[np.float64]
Indices = NDArray[np.int64]

NO_FACES: Indices = np.zeros((0, 3), np.int64)


@dataclass(frozen=True)
class Geometry:
    """A mesh, or a cloud of points where there are no faces.

    Attributes:
        vertices: ``[vertices, 3]``.
        faces: three vertices each, ``[faces, 3]``.
        normals: of the points of a cloud, like ``vertices``.
    """

    vertices: Vectors
    faces: Indices
    normals: Vectors | None = None


def check_count(count: int, what: str, most: int) -> None:
    """Refuse shapes of too many faces or points.

    Raises:
        InputError: there are more than ``most``.
    """
    if count > most:
        raise InputError(f"the shape has {count} {what}, more than max_faces = {most}: simplify it, or raise that limit")


def check_indices(indices: Indices, vertices: int) -> None:
    """Refuse faces of vertices that are not there.

    Raises:
        InputError: an index is negative or too large.
    """
    if len(indices) and (indices.min() < 0 or indices.max() >= vertices):
        raise InputError(f"a face names a vertex that is not among the {vertices} of the mesh")


def joined(parts: Sequence[Geometry], max_faces: int) -> Geometry:
    """The meshes among the parts as one; without any, the clouds as one, with normals if all have them.

    Raises:
        InputError: there are no faces and no points, or too many.
    """
    meshes = [part for part in parts if len(part.faces)]
    check_count(sum(len(mesh.faces) for mesh in meshes), "faces", max_faces)
    if meshes:
        starts = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes)])
        return Geometry(
            np.concatenate([mesh.vertices for mesh in meshes]),
            np.concatenate([mesh.faces + start for mesh, start in zip(meshes, starts[:-1], strict=True)]),
        )
    clouds = [part for part in parts if len(part.vertices)]
    if not clouds:
        raise InputError("the shape has no faces and no points")
    check_count(sum(len(cloud.vertices) for cloud in clouds), "points", max_faces)
    normals = [cloud.normals for cloud in clouds if cloud.normals is not None]
    return Geometry(
        np.concatenate([cloud.vertices for cloud in clouds]),
        NO_FACES,
        np.concatenate(normals) if len(normals) == len(clouds) else None,
    )


def floats(words: Sequence[bytes]) -> Vectors:
    """Numbers that stand in text, ``[words]``.

    Raises:
        InputError: a word is no number.
    """
    with suppress(ValueError):
        return np.fromiter(map(float, words), np.float64, len(words))
    # One by one, for the error that names the word.
    return np.fromiter((_number(float, word) for word in words), np.float64)


def integers(words: Sequence[bytes]) -> Indices:
    """Whole numbers that stand in text, ``[words]``.

    Raises:
        InputError: a word is no whole number, or one that takes more than 64 bits.
    """
    with suppress(ValueError, OverflowError):
        return np.fromiter(map(int, words), np.int64, len(words))
    return np.fromiter((_number(int, word) for word in words), np.int64)


def _number(kind: Callable[[bytes], float], word: bytes) -> float:
    try:
        number = kind(word)
    except ValueError as error:
        raise InputError(f"{word[:40].decode('latin-1')!r} stands where a number is wanted") from error
    if kind is int and abs(number) >= 1 << 63:
        raise InputError(f"the number {word[:40].decode('latin-1')} is too large")
    return number


def strip(corners: Indices) -> Indices:
    """The triangles of a strip of vertices ``[length]``: every other one is turned, so that all look the same way."""
    count = max(len(corners) - 2, 0)
    first = np.arange(count)
    odd = first % 2
    return corners[np.stack([first, first + 1 + odd, first + 2 - odd], axis=1)] if count else NO_FACES


def without_repeats(faces: Indices) -> Indices:
    """Triangles of three different vertices: strips turn corners by triangles that have only two."""
    a, b, c = faces.T
    return faces[(a != b) & (b != c) & (c != a)]

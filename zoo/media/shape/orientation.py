"""Orientation of closed surfaces: which side is out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.media.shape.geometry import Indices, Vectors
from zoo.media.solid import crossings, merged

# A volume below this share of the area to the power of 3/2 is one of rounding.
_LEAST_VOLUME = 1e-9


def oriented(vertices: Vectors, faces: Indices) -> Indices:
    """The faces of a mesh, with those turned that make closed parts look inwards.

    A part is what edges of exactly two faces join, and is closed if its faces can be wound so that every edge is passed both
    ways. Its faces are wound alike first. Then each part that lies in no other one is made to look outwards, and parts inside
    of it are turned with it: a hollow stays hollow, a solid in a hollow stays solid. Open parts stay as they are.

    Args:
        vertices: ``[vertices, 3]``.
        faces: ``[faces, 3]``.

    Returns:
        Faces in the same order; the same array if there is nothing to turn.
    """
    turned = np.zeros(len(faces), np.bool_)
    part = np.full(len(faces), -1, np.int64)
    # By the file's own vertices first: parts that touch each other are told apart by them, and most meshes have all they need.
    for names in (faces, None):
        open_faces = np.flatnonzero(part < 0)
        if not len(open_faces):
            break
        corners = merged(vertices, faces[open_faces]) if names is None else names[open_faces]
        own, flip = _closed_parts(corners)
        closed = own >= 0
        part[open_faces[closed]] = own[closed] + part.max() + 1
        turned[open_faces] = flip
    closed_faces = np.flatnonzero(part >= 0)
    if not len(closed_faces):
        return faces
    part = part[closed_faces]
    triangles = _scaled(vertices, faces[closed_faces])
    triangles[turned[closed_faces]] = triangles[turned[closed_faces]][:, ::-1]
    turned[closed_faces] ^= _inverted(triangles, part)[part]
    return np.where(turned[:, None], faces[:, ::-1], faces) if turned.any() else faces


def _scaled(vertices: Vectors, faces: Indices) -> Vectors:
    """Triangles ``[faces, 3, 3]``, centred and of extent 1."""
    triangles = vertices[faces]
    lower, upper = triangles.min((0, 1)), triangles.max((0, 1))
    extent = (upper - lower).max()
    found: Vectors = (triangles - (lower + upper) / 2) / (extent if extent > 0 else 1.0)
    return found


def _closed_parts(corners: Indices) -> tuple[Indices, NDArray[np.bool_]]:
    """The part of each face, counted from 0, or -1 if its part is not closed; and whether to turn it.

    Of the two ways to wind a part, the one that turns fewer faces is taken.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(corners)
    proper = (corners != np.roll(corners, 1, axis=1)).all(1)
    start, end = corners.reshape(-1), np.roll(corners, -1, axis=1).reshape(-1)
    face = np.repeat(np.arange(count), 3)
    used = np.repeat(proper, 3)
    start, end, face = start[used], end[used], face[used]
    low, up = np.minimum(start, end), start < end
    key = low * (int(corners.max()) + 1) + np.maximum(start, end)
    order = np.argsort(key, kind="stable")
    key, up, face = key[order], up[order], face[order]
    first = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]])) if len(key) else np.zeros(0, np.int64)
    pairs = first[np.diff(np.append(first, len(key))) == 2]
    left, right, alike = face[pairs], face[pairs + 1], up[pairs] == up[pairs + 1]
    flip = np.zeros(count, np.bool_)
    if alike.any():
        # Every face twice, as it is and turned: each part falls into its two windings, unless it has one side only.
        rows = np.concatenate([left, left + count])
        columns = np.concatenate([right + count * alike, right + count * ~alike])
        windings = connected_components(coo_array((np.ones(len(rows)), (rows, columns)), shape=(2 * count, 2 * count)))[1]
        as_is, other = windings[:count], windings[count:]
        part = np.minimum(as_is, other)
        keeps = np.bincount(part, as_is == part, minlength=2 * count)
        turns = np.bincount(part, as_is != part, minlength=2 * count)
        flip = (as_is != part) ^ (turns > keeps)[part]
        one_sided = as_is == other
        flip[one_sided] = False
    else:
        part = connected_components(coo_array((np.ones(len(left)), (left, right)), shape=(count, count)))[1]
        one_sided = np.zeros(count, np.bool_)
    if not alike.any() and 2 * len(pairs) == len(key):
        # Two faces pass every edge, one each way: as in most files.
        return _counted(part, proper), flip
    # A part is closed if its faces pass every edge as often one way as the other.
    key_of_part = np.stack([part[face], key], axis=1)
    sense = np.where(up ^ flip[face], 1, -1)
    rank = np.lexsort((key_of_part[:, 1], key_of_part[:, 0]))
    sorted_keys = key_of_part[rank]
    new = np.concatenate([[True], (sorted_keys[1:] != sorted_keys[:-1]).any(1)]) if len(rank) else np.zeros(0, np.bool_)
    sums = np.add.reduceat(sense[rank], np.flatnonzero(new)) if len(rank) else np.zeros(0, np.int64)
    is_open = np.zeros(int(part.max()) + 1, np.bool_)
    is_open[sorted_keys[new][sums != 0, 0]] = True
    closed = ~is_open[part] & proper & ~one_sided
    return _counted(part, closed), flip & closed


def _counted(part: NDArray[np.integer[Any]], closed: NDArray[np.bool_]) -> Indices:
    """Numbers of the parts that closed faces belong to, from 0; -1 for other faces."""
    numbers = np.full(len(part), -1, np.int64)
    if closed.any():
        numbers[closed] = np.unique(part[closed], return_inverse=True)[1]
    return numbers


def _inverted(triangles: Vectors, part: Indices) -> NDArray[np.bool_]:
    """Which of the closed parts are to be turned inside out."""
    parts = int(part.max()) + 1
    products = np.cross(triangles[:, 1], triangles[:, 2])
    volume = np.bincount(part, np.einsum("ij,ij->i", triangles[:, 0], products), minlength=parts) / 6
    if (volume >= 0).all():
        return np.zeros(parts, np.bool_)
    normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    area = np.bincount(part, np.linalg.norm(normals, axis=1), minlength=parts) / 2
    negative = volume < -_LEAST_VOLUME * area**1.5
    if not negative.any() or parts == 1:
        return negative
    around = _containers(triangles, part)
    # Of the parts around one, the largest is the one that lies in no other.
    outermost = np.arange(parts)
    for inner, outer in around[np.argsort(np.abs(volume[around[:, 1]]), kind="stable")].tolist():
        outermost[inner] = outer
    found: NDArray[np.bool_] = negative[outermost]
    return found


def _containers(triangles: Vectors, part: Indices) -> Indices:
    """Pairs of a closed part and one that it lies in, ``[pairs, 2]``: all of its six outermost corners do."""
    corners = triangles.reshape(-1, 3)
    label = np.repeat(part, 3)
    parts = int(part.max()) + 1
    outermost = []
    for axis in range(3):
        order = np.lexsort((corners[:, axis], label))
        ends = np.flatnonzero(np.append(np.diff(label[order]), 1))
        starts = np.append(0, ends[:-1] + 1)
        outermost += [order[starts], order[ends]]
    # [6, parts]: the label of the point in row i and column j is j.
    points = corners[np.stack(outermost)].reshape(-1, 3)
    owner = np.tile(np.arange(parts), 6)
    inside: dict[int, int] = {}
    for point, triangle, sign in crossings(triangles, points):
        other = part[triangle] != owner[point]
        keys, index = np.unique(point[other] * parts + part[triangle[other]], return_inverse=True)
        for key, turns in zip(keys.tolist(), np.bincount(index, sign[other]).astype(int).tolist(), strict=True):
            inside[key] = inside.get(key, 0) + turns
    pairs = np.array([(owner[key // parts], key % parts) for key, turns in inside.items() if turns], np.int64).reshape(-1, 2)
    found, count = np.unique(pairs, axis=0, return_counts=True)
    return found[count == 6]

"""Wavefront OBJ: vertices and polygons; groups, materials and everything else is passed over."""

from __future__ import annotations

import re

import numpy as np

from zoo.errors import InputError
from zoo.media.shape.geometry import NO_FACES, Geometry, Indices, check_count, floats, integers
from zoo.media.shape.polygons import triangulate

_VERTEX_LINE = re.compile(rb"(?:\A|[\r\n])[ \t]*v[ \t]")
_CONTINUED = re.compile(rb"\\[ \t]*(?:\r\n|\n|\r)")
# Indices of texture coordinates and normals.
_REST_OF_CORNER = re.compile(rb"/[^\s]*")
_FREE_FORM = (b"curv", b"curv2", b"surf")


def looks_like(content: bytes) -> bool:
    """Whether there is a line of a vertex, in what is text."""
    return b"\0" not in content[:4096] and _VERTEX_LINE.search(content) is not None


def read(content: bytes, max_faces: int) -> Geometry:
    lines = [line.split(b"#", 1)[0].split(None, 1) for line in _CONTINUED.sub(b" ", content).splitlines()]
    vertex_lines = [index for index, words in enumerate(lines) if words and words[0] == b"v"]
    face_lines = [index for index, words in enumerate(lines) if words and words[0] in (b"f", b"fo")]
    words: list[bytes] = []
    for number, index in enumerate(vertex_lines, 1):
        # A weight or a colour may follow.
        coordinates = lines[index][1].split(None, 3)[:3] if len(lines[index]) > 1 else []
        if len(coordinates) < 3:
            raise InputError(f"vertex {number} has {len(coordinates)} coordinates")
        words += coordinates
    vertices = floats(words).reshape(-1, 3)
    if not face_lines:
        if any(words and words[0] in _FREE_FORM for words in lines):
            raise InputError("free-form curves and surfaces of OBJ cannot be read: export polygons")
        return Geometry(vertices, NO_FACES)
    check_count(len(face_lines), "faces", max_faces)
    corners, sizes = _faces([lines[index] for index in face_lines])
    if (sizes < 3).any():
        index = int(np.argmax(sizes < 3))
        raise InputError(f"face {index + 1} has {int(sizes[index])} corners, where 3 is the fewest")
    if not corners.all():
        raise InputError("a face names vertex 0, and the first is 1")
    # A negative index counts back from the vertices read so far.
    before = np.repeat(np.searchsorted(vertex_lines, face_lines), sizes)
    relative = corners < 0
    if (corners[relative] < -before[relative]).any():
        raise InputError("a face counts back beyond the first vertex")
    corners = np.where(relative, before + corners, corners - 1)
    return Geometry(vertices, triangulate(vertices, corners, sizes, max_faces))


def _faces(lines: list[list[bytes]]) -> tuple[Indices, Indices]:
    """Vertices of the corners of all faces, as the file has them, and how many each face has."""
    faces = [_REST_OF_CORNER.sub(b"", words[1]).split() if len(words) > 1 else [] for words in lines]
    sizes = np.array([len(face) for face in faces], np.int64)
    return integers(corner for face in faces for corner in face), sizes

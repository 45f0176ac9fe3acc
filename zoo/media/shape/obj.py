"""Wavefront OBJ: vertices and polygons; groups, materials and everything else is passed over."""

from __future__ import annotations

import re

import numpy as np

from zoo.errors import InputError
from zoo.media.shape.geometry import NO_FACES, Geometry, check_count, floats, integers
from zoo.media.shape.polygons import triangulate

_VERTEX_LINE = re.compile(rb"(?:\A|[\r\n])[ \t]*v[ \t]")
_CONTINUED = re.compile(rb"\\[ \t]*(?:\r\n|\n|\r)")
_COMMENT = re.compile(rb"#[^\r\n]*")
# Indices of texture coordinates and normals.
_REST_OF_CORNER = re.compile(rb"/[^\s]*")
_FACES = (b"f", b"fo")
_FREE_FORM = (b"curv", b"curv2", b"surf")


def looks_like(content: bytes) -> bool:
    """Whether there is a line of a vertex, in what is text."""
    return b"\0" not in content[:4096] and _VERTEX_LINE.search(content) is not None


def read(content: bytes, max_faces: int) -> Geometry:
    if b"\\" in content:
        content = _CONTINUED.sub(b" ", content)
    lines = (_COMMENT.sub(b"", content) if b"#" in content else content).splitlines()
    # Words stand in flat lists: the garbage collector would walk through a list for each line again and again.
    coordinates: list[bytes] = []
    vertex_lines: list[int] = []
    face_corners: list[bytes] = []
    face_sizes: list[int] = []
    face_lines: list[int] = []
    free_form = False
    for index, line in enumerate(lines):
        words = line.split() or [b""]
        kind = words[0]
        if kind == b"v":
            vertex_lines.append(index)
            if len(words) < 4:
                raise InputError(f"vertex {len(vertex_lines)} has {len(words) - 1} coordinates")
            # A weight or a colour may follow.
            coordinates += words[1:4]
        elif kind in _FACES:
            if b"/" in line:
                words = _REST_OF_CORNER.sub(b"", line).split()
            face_lines.append(index)
            face_sizes.append(len(words) - 1)
            face_corners += words[1:]
        elif kind in _FREE_FORM:
            free_form = True
    vertices = floats(coordinates).reshape(-1, 3)
    if not face_lines:
        if free_form:
            raise InputError("free-form curves and surfaces of OBJ cannot be read: export polygons")
        return Geometry(vertices, NO_FACES)
    check_count(len(face_lines), "faces", max_faces)
    corners, sizes = integers(face_corners), np.array(face_sizes)
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

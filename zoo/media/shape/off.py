"""OFF, the object file format of Geomview, as text."""

from __future__ import annotations

import re

import numpy as np

from zoo.errors import InputError
from zoo.media.shape.geometry import Geometry, Indices, Vectors, check_count, floats, integers
from zoo.media.shape.polygons import triangulate, without_lines

# Texture coordinates, colours, normals, a fourth coordinate, any number of coordinates. What data sets glue to the keyword is
# the number of vertices.
_KEYWORD = re.compile(rb"(?:ST)?C?N?(4)?(n)?OFF(?=[\s\d#]|\Z)")
_BLANK = re.compile(rb"(?:\s|#[^\n\r]*)*")


def keyword(content: bytes) -> re.Match[bytes] | None:
    """The word that a file begins with, behind comments."""
    return _KEYWORD.match(content, _begin(content))


def _begin(content: bytes) -> int:
    match = _BLANK.match(content)
    return match.end() if match else 0


def read(content: bytes, max_faces: int) -> Geometry:
    word = keyword(content)
    if word is None:
        raise InputError("it has no OFF keyword")
    if word[1] or word[2]:
        raise InputError(f"{word[0].decode()} files, with coordinates in other than three dimensions, cannot be read")
    rest = content[word.end() :]
    if rest.split(None, 1)[:1] == [b"BINARY"]:
        raise InputError("binary OFF files cannot be read: write it as text, as PLY or as STL")
    lines = [line for line in (line.split(b"#", 1)[0].split() for line in rest.splitlines()) if line]
    if not lines or not 2 <= len(lines[0]) <= 3:
        raise InputError("the numbers of vertices, faces and edges are not there")
    vertices, faces = integers(lines[0][:2]).tolist()
    if min(vertices, faces) < 0:
        raise InputError(f"it claims {vertices} vertices and {faces} faces")
    check_count(faces, "faces", max_faces)
    lines = lines[1:]
    if len(lines) < vertices + faces or any(len(line) < 3 for line in lines[:vertices]):
        # The format is one of words; only what may follow them, colours, ends with the line.
        if word[0] != b"OFF":
            raise InputError(f"it is truncated: {vertices} vertices and {faces} faces are not there")
        places, corners, sizes = _words([word for line in lines for word in line], vertices, faces)
    else:
        places = floats([number for line in lines[:vertices] for number in line[:3]]).reshape(-1, 3)
        corners, sizes = _faces(lines[vertices : vertices + faces])
    return Geometry(places, triangulate(places, *without_lines(corners, sizes), max_faces))


def _faces(lines: list[list[bytes]]) -> tuple[Indices, Indices]:
    """Corners and sizes of faces that have a line each, with or without a colour at its end."""
    sizes = integers([line[0] for line in lines])
    for line, size in zip(lines, sizes.tolist(), strict=True):
        if len(line) <= size or size < 1:
            raise InputError(f"a face of {size} corners has a line of {len(line)} numbers")
    return integers([corner for line, size in zip(lines, sizes.tolist(), strict=True) for corner in line[1 : size + 1]]), sizes


def _words(words: list[bytes], vertices: int, faces: int) -> tuple[Vectors, Indices, Indices]:
    """Vertices, and corners and sizes of faces, wherever lines end."""
    if len(words) < 3 * vertices + 4 * faces:
        raise InputError(f"it is truncated: {vertices} vertices and {faces} faces are not there")
    places = floats(words[: 3 * vertices]).reshape(-1, 3)
    numbers = integers(words[3 * vertices :])
    at, corners, sizes = 0, [np.zeros(0, np.int64)], []
    for face in range(faces):
        size = int(numbers[at]) if at < len(numbers) else 0
        if size < 1 or at + size >= len(numbers):
            raise InputError(f"it is truncated or damaged: face {face} of {faces} is not there")
        corners.append(numbers[at + 1 : at + 1 + size])
        sizes.append(size)
        at += 1 + size
    return places, np.concatenate(corners), np.array(sizes, np.int64)

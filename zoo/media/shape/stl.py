"""STL, in binary and as text."""

from __future__ import annotations

import re

import numpy as np

from zoo.errors import InputError
from zoo.media.shape.geometry import Geometry, Vectors, check_count, floats

HEADER, FACE = 84, 50
_VERTEX = re.compile(rb"\bvertex\s+(\S+)\s+(\S+)\s+(\S+)", re.IGNORECASE)
_END_OF_FACE = re.compile(rb"\bendloop\b", re.IGNORECASE)
_END = re.compile(rb"\bendsolid\b[^\n]*\s*\Z", re.IGNORECASE)


def claimed_faces(content: bytes) -> int:
    """Number of triangles in the header of a binary file."""
    return int.from_bytes(content[80:84], "little")


def read_binary(content: bytes, max_faces: int) -> Geometry:
    count = claimed_faces(content)
    check_count(count, "faces", max_faces)
    if len(content) < HEADER + FACE * count:
        there = (len(content) - HEADER) // FACE
        raise InputError(f"it is a truncated or damaged STL file: {there} of {count} triangles are there")
    triangles = np.frombuffer(
        content, np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("more", "<u2")]), count, HEADER
    )
    return _soup(triangles["corners"].astype(np.float64))


def read_text(content: bytes, max_faces: int) -> Geometry:
    faces = len(_END_OF_FACE.findall(content))
    check_count(faces, "faces", max_faces)
    numbers = [number for corner in _VERTEX.findall(content) for number in corner]
    if len(numbers) != 9 * faces or not _END.search(content):
        raise InputError(
            "it is a truncated or damaged STL file: three corners to a face, and endsolid at the end, are not there"
        )
    return _soup(floats(numbers).reshape(-1, 3, 3))


def _soup(triangles: Vectors) -> Geometry:
    """Triangles with corners of their own."""
    return Geometry(triangles.reshape(-1, 3), np.arange(3 * len(triangles)).reshape(-1, 3))

"""Pictures of a mesh from all sides, drawn by arithmetic alone: neither a display nor a graphics driver is needed."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from zoo.media.solid import at, covered, inside_of, plane_functions

if TYPE_CHECKING:
    import trimesh

Picture = NDArray[np.uint8]
Vectors = NDArray[np.float64]

# How far a picture reaches from its middle: a cube of [-0.95, 0.95] fits at any angle of the table.
_REACH = 1.45
_ELEVATION = np.radians(20)
_LIGHT = np.array([-0.45, 0.6, 0.66])
_AMBIENT = 0.3
_COLOUR, _BACKGROUND = np.array([150.0, 172.0, 205.0]), np.array([255.0, 255.0, 255.0])
# Pixels are drawn this many times as fine in both directions, and averaged.
_FINER = 2
_MILLISECONDS = 170


def turntable(mesh: trimesh.Trimesh, *, views: int = 8, size: int = 144) -> list[Picture]:
    """Views of a mesh of a model's frame that turns about its y axis, seen from a little above: ``[size, size, 3]`` each."""
    return [render(mesh, 2 * np.pi * view / views, size) for view in range(views)]


def render(mesh: trimesh.Trimesh, azimuth: float, size: int) -> Picture:
    """One view in parallel projection with flat shading; the nearest face wins each pixel.

    Args:
        mesh: in a model's frame, [-1, 1].
        azimuth: angle in radians that the mesh is turned by about its y axis.
        size: of the picture in pixels.
    """
    fine = size * _FINER
    image = np.tile(_BACKGROUND, (fine * fine, 1))
    if len(mesh.faces):
        rotation = _rotation(azimuth)
        winner = _visible_faces(mesh.triangles @ rotation.T, fine)
        drawn = np.flatnonzero(winner >= 0)
        corners = mesh.triangles[winner[drawn]] @ rotation.T
        normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        # Both sides of a face are lit, so that one that looks the wrong way is no hole.
        light = np.abs(normals @ _LIGHT) / np.maximum(np.linalg.norm(normals, axis=1), 1e-30)
        image[drawn] = _COLOUR * (_AMBIENT + (1 - _AMBIENT) * light)[:, None]
    blocks = image.reshape(size, _FINER, size, _FINER, 3).mean((1, 3))
    return blocks.round().astype(np.uint8)


def as_webp(pictures: list[Picture]) -> str:
    """A data URI of an animation that never ends."""
    from PIL import Image

    first, *others = map(Image.fromarray, pictures)
    buffer = io.BytesIO()
    first.save(buffer, "WEBP", save_all=True, append_images=others, duration=_MILLISECONDS, loop=0, quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _rotation(azimuth: float) -> Vectors:
    """From the mesh to the viewer: x to the right, y up, z towards the viewer."""
    turn, tilt = (np.cos(azimuth), np.sin(azimuth)), (np.cos(_ELEVATION), np.sin(_ELEVATION))
    about_y = np.array([[turn[0], 0, turn[1]], [0, 1, 0], [-turn[1], 0, turn[0]]])
    about_x = np.array([[1, 0, 0], [0, tilt[0], -tilt[1]], [0, tilt[1], tilt[0]]])
    return about_x @ about_y


def _visible_faces(triangles: Vectors, size: int) -> NDArray[np.int64]:
    """The face nearest to the viewer at each pixel, row by row from the top; -1 where there is none."""
    places = triangles.copy()
    places[:, :, :2] = (triangles[:, :, :2] * [1, -1] / _REACH + 1) * size / 2
    weights, depths, _ = plane_functions(places)
    # Only pixels whose middles lie between the corners can be hit.
    first = np.ceil(places[:, :, :2].min(1) - 0.5).astype(np.int64)
    last = np.floor(places[:, :, :2].max(1) - 0.5).astype(np.int64)
    on_screen = np.flatnonzero(((last >= 0) & (first < size) & (first <= last)).all(1))
    winner, depth = np.full(size * size, -1), np.full(size * size, -np.inf)
    for index, column, row in covered(first[on_screen].clip(0), last[on_screen].clip(max=size - 1)):
        face, middle = on_screen[index], np.stack([column, row], axis=1) + np.float64(0.5)
        hit = inside_of(weights[face], middle)
        pixel, face = row[hit] * size + column[hit], face[hit]
        near = at(depths[face], middle[hit])
        np.maximum.at(depth, pixel, near)
        ahead = near == depth[pixel]
        winner[pixel[ahead]] = face[ahead]
    return winner

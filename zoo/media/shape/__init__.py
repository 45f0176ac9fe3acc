"""Shapes: meshes, scenes and clouds of points from files and trimesh, brought to a model's frame as points with normals.

A model's frame is the cube [-1, 1]. A shape's bounding box is centred in it, and its longest edge is 1.9 long. What was done to
it is a centre and a scale: a point ``p`` of the original is ``(p - centre) / scale`` in the frame.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from zoo.errors import InputError, MissingExtraError
from zoo.media.files import FILE_TYPES, replacing
from zoo.media.items import shape_item
from zoo.media.shape.formats import read_file
from zoo.media.shape.geometry import NO_FACES, Geometry, Indices, Vectors, check_count, check_indices, joined
from zoo.media.shape.normals import estimate_normals
from zoo.media.shape.orientation import oriented

if TYPE_CHECKING:
    import trimesh

_log = logging.getLogger("zoo")

#: Files that are read and written, by their extensions.
SHAPE_EXTENSIONS = (".glb", ".gltf", ".obj", ".ply", ".stl", ".off")
#: Length of the longest edge of a shape's bounding box in a model's frame.
EXTENT = 1.9
#: Fewest points that describe a shape.
FEWEST_POINTS = 64
#: Most faces or points that a shape may have unless the caller says otherwise.
MAX_FACES = 50_000_000

# Below this share of the squared longest edge a surface is taken for a line.
_SMALLEST_AREA = 1e-12
_PACKAGES = ("trimesh", "scipy", "skimage")
# How far from 1 the lengths of normals are after rounding.
_UNIT = 0.02


@dataclass(frozen=True)
class Cloud:
    """Points in space with or without normals.

    Attributes:
        points: ``[points, 3]``.
        normals: of the same shape, of any length but zero; ``None`` where there are none.
    """

    points: Vectors
    normals: Vectors | None


@dataclass(frozen=True)
class PreparedShape:
    """A shape as a model takes it, and what is needed to put its reconstruction back.

    Attributes:
        points: on the surface, in the model's frame.
        normals: of length 1, pointing outwards.
        meta: ``x``, ``y``, ``z`` of the centre and ``scale``, rounded to float32 as files of tokens hold them.
    """

    points: Float[Tensor, "points 3"]
    normals: Float[Tensor, "points 3"]
    meta: dict[str, float]


def prepare_shape(
    source: Any, points: int, *, seed: int = 0, normalise: bool = True, max_faces: int = MAX_FACES
) -> PreparedShape:
    """Read a shape, bring it to the model's frame, and cover its surface with points.

    Of a mesh, points are drawn uniformly by area, with the normals of their faces. Only its surface counts: it need not be
    closed. Closed parts are wound alike and made to look outwards, and hollows in them stay hollow; open parts stay as they
    are, so that normals of faces which are wound the wrong way point inwards. Scenes become one mesh with all transforms.
    A cloud is thinned at random if it has more points than wanted, and otherwise used whole; normals that it lacks are
    estimated, with a warning.

    A shape's place is taken off in double precision: far from the origin it gives the same points, to the digits that its
    coordinates hold. Of glTF, skins, morph targets and animations are passed over, and lines in every format.
    Draco and meshopt take the ``gltf`` and the ``meshopt`` extra.

    Args:
        source: a path, the bytes of a file, a ``trimesh.Trimesh``, ``Scene`` or ``PointCloud``, an array or tensor
            ``[points, 3]`` or ``[points, 6]`` (coordinates, then normals), or a pair ``(points, normals)`` of ``[points, 3]``.
            Columns 4 to 6 that are neither of length 1 nor anywhere negative are colours: they are left out, with a warning.
        points: how many to draw.
        seed: of the draws.
        normalise: without it the shape is taken to lie in the frame already.
        max_faces: larger meshes and clouds are refused, scenes before their parts are put together.

    Raises:
        InputError: the source is unreadable or of the wrong kind, has no surface or fewer than 64 points, is not finite, has no
            extent, lies outside of the frame, or is too large.
        MissingExtraError: the ``shape`` extra is not installed.
    """
    shape = read_shape(source, max_faces=max_faces)
    lower, upper = bounds(shape)
    if normalise:
        centre, scale = (lower + upper) / 2, float((upper - lower).max() / EXTENT)
    else:
        if max(-lower.min(), upper.max()) > 1:
            raise InputError("the shape reaches beyond [-1, 1], the model's frame: let it be normalised")
        centre, scale = np.zeros(3), 1.0
    with np.errstate(over="ignore"):
        rounded = np.array([*centre, scale], np.float32).tolist()
    meta = dict(zip(("x", "y", "z", "scale"), rounded, strict=True))
    if not np.isfinite(list(meta.values())).all() or meta["scale"] == 0:
        raise InputError(f"the shape's size and place, {scale:g} about {centre.tolist()}, are beyond what float32 can hold")
    placed = _placed(shape, centre, scale)
    cloud = _thinned(placed, points, seed) if isinstance(placed, Cloud) else _sampled(placed, points, seed)
    normals = cloud.normals if cloud.normals is not None else estimate_normals(cloud.points)
    return PreparedShape(
        torch.from_numpy(cloud.points.astype(np.float32)), torch.from_numpy(_unit(normals).astype(np.float32)), meta
    )


def frame_of(meta: Mapping[str, Any]) -> tuple[tuple[float, float, float], float]:
    """Centre and scale of an item's meta; the model's own frame if it is empty.

    Raises:
        InputError: they are missing, or not finite and positive.
    """
    if not meta:
        return (0.0, 0.0, 0.0), 1.0
    try:
        x, y, z, scale = (float(meta[key]) for key in ("x", "y", "z", "scale"))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"without its x, y, z and scale a shape cannot be put back; its meta is {dict(meta)}") from error
    if not np.isfinite([x, y, z, scale]).all() or scale <= 0:
        raise InputError(f"a shape of scale {scale} about {x}, {y}, {z} cannot be put back")
    return (x, y, z), scale


def read_shape(source: Any, *, max_faces: int = MAX_FACES) -> trimesh.Trimesh | Cloud:
    """A mesh with a surface, or a cloud of points, checked; arguments and errors as for `prepare_shape`."""
    require_shape_packages()
    import trimesh

    source = shape_item(source)
    if isinstance(source, FILE_TYPES):
        return _checked(read_file(source, max_faces), max_faces)
    if isinstance(source, trimesh.Scene):
        return _checked(_of_scene(source, max_faces), max_faces)
    if isinstance(source, trimesh.Trimesh):
        return _checked_mesh(np.asarray(source.vertices, np.float64), np.asarray(source.faces, np.int64), max_faces)
    if isinstance(source, trimesh.PointCloud):
        return _checked_cloud(source.vertices, _normals_of(source), max_faces)
    if isinstance(source, tuple):
        if len(source) != 2:
            raise InputError(f"a tuple must be (points, normals), not {len(source)} things")
        return _checked_cloud(_rows(source[0], (3,)), _rows(source[1], (3,)), max_faces)
    if isinstance(source, Tensor | np.ndarray):
        rows = _rows(source, (3, 6))
        return _checked_cloud(rows[:, :3], _normals_in(rows[:, 3:]), max_faces)
    raise InputError(f"expected a path, bytes, a mesh, scene or cloud of trimesh, or points, not {type(source).__name__}")


def require_shape_packages() -> None:
    """Check that what reads and makes meshes is installed.

    Raises:
        MissingExtraError: something is missing.
    """
    if missing := [package for package in _PACKAGES if find_spec(package) is None]:
        raise MissingExtraError(f'{", ".join(missing)} is not installed: pip install "tokenizer-zoo[shape]"')


def write_shape(path: str | os.PathLike[str], mesh: trimesh.Trimesh) -> Path:
    """Write a mesh, in the format of the extension.

    Raises:
        InputError: no format has that extension, or the mesh is empty.
    """
    path = Path(path)
    if path.suffix.lower() not in SHAPE_EXTENSIONS or path.suffix.lower() == ".gltf":
        raise InputError(f"cannot write {path.name}: no shape format {path.suffix!r} that is a single file")
    if mesh.is_empty:
        raise InputError(f"cannot write {path.name}: the mesh is empty")
    content = mesh.export(file_type=path.suffix.lower()[1:])
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else bytes(content))
    return path


def bounds(shape: trimesh.Trimesh | Cloud) -> tuple[Vectors, Vectors]:
    """Lowest and highest coordinates; of a mesh, those of its faces' corners."""
    vertices = shape.points if isinstance(shape, Cloud) else shape.vertices[_used(shape)]
    return vertices.min(0), vertices.max(0)


# ------------------------------------------------------------------------------------------------------------------ reading


def _of_scene(scene: trimesh.Scene, max_faces: int) -> Geometry:
    """A scene of trimesh with all transforms applied."""
    import trimesh

    geometry = [scene.geometry[scene.graph[node][1]] for node in scene.graph.nodes_geometry]
    check_count(sum(len(part.faces) for part in geometry if isinstance(part, trimesh.Trimesh)), "faces", max_faces)
    parts = []
    for part in scene.dump():
        if isinstance(part, trimesh.Trimesh):
            parts.append(Geometry(np.asarray(part.vertices, np.float64), np.asarray(part.faces, np.int64)))
        elif isinstance(part, trimesh.PointCloud):
            parts.append(Geometry(np.asarray(part.vertices, np.float64), NO_FACES))
    if not any(len(part.faces) for part in parts) and len(geometry) == 1:
        # A cloud of its own keeps the normals that a PLY file gave it.
        return Geometry(parts[0].vertices, NO_FACES, _normals_of(geometry[0])) if parts else joined(parts, max_faces)
    return joined([part for part in parts if len(part.faces)] or parts, max_faces)


def _normals_of(cloud: trimesh.PointCloud) -> Vectors | None:
    """Normals that a PLY file holds for its points; trimesh reads but does not offer them."""
    try:
        columns = cloud.metadata["_ply_raw"]["vertex"]["data"]
        return np.stack([np.asarray(columns[axis], np.float64).reshape(-1) for axis in ("nx", "ny", "nz")], axis=1)
    except (KeyError, ValueError):
        return None


def _rows(points: Any, widths: tuple[int, ...]) -> Vectors:
    """Points as float64 rows."""
    array = points.detach().cpu().numpy() if isinstance(points, Tensor) else np.asarray(points)
    if array.ndim != 2 or array.shape[1] not in widths:
        wanted = " or ".join(f"[points, {width}]" for width in widths)
        raise InputError(f"points must be {wanted}, not of shape {array.shape}")
    if array.dtype.kind not in "fiu":
        raise InputError(f"points must be numbers, not {array.dtype}")
    return array.astype(np.float64)


def _normals_in(columns: Vectors) -> Vectors | None:
    """Columns behind coordinates, if there are any and they are normals.

    Colours are never negative. Vectors of length 1 are normals whatever their signs; others without a negative number are taken
    for colours.
    """
    if not columns.shape[1]:
        return None
    lengths = np.linalg.norm(columns, axis=1)
    if len(columns) and columns.min() >= 0 and (np.abs(lengths - 1) > _UNIT).any():
        _log.warning("columns 4 to 6 of the points are taken for colours and left out; normals of any length go into a pair")
        return None
    return columns


def _checked(geometry: Geometry, max_faces: int) -> trimesh.Trimesh | Cloud:
    if len(geometry.faces):
        return _checked_mesh(geometry.vertices, geometry.faces, max_faces)
    return _checked_cloud(geometry.vertices, geometry.normals, max_faces)


def _checked_mesh(vertices: Vectors, faces: Indices, max_faces: int) -> trimesh.Trimesh:
    import trimesh

    if not len(faces):
        raise InputError("the mesh has no faces")
    check_count(len(faces), "faces", max_faces)
    check_indices(faces, len(vertices))
    used = np.zeros(len(vertices), np.bool_)
    used[faces] = True
    lower, upper = _checked_box(vertices[used], "mesh")
    # About the centre, in proportion to the longest edge: a place far away costs no digits, and a large size no overflow.
    triangles = ((vertices - (lower / 2 + upper / 2)) / (upper - lower).max())[faces]
    normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    if np.linalg.norm(normals, axis=1).sum() / 2 < _SMALLEST_AREA:
        raise InputError("all faces of the mesh are degenerate: its surface has no area")
    return trimesh.Trimesh(vertices, oriented(vertices, faces), process=False)


def _checked_cloud(points: Any, normals: Any, max_faces: int) -> Cloud:
    points = np.asarray(points, np.float64)
    if len(points) < FEWEST_POINTS:
        raise InputError(f"{len(points)} points are too few to tell a shape: give {FEWEST_POINTS} or more")
    check_count(len(points), "points", max_faces)
    _checked_box(points, "cloud of points")
    if normals is None:
        return Cloud(points, None)
    if normals.shape != points.shape:
        raise InputError(f"{len(points)} points cannot have {len(normals)} normals")
    if not np.isfinite(normals).all():
        raise InputError("the normals hold NaN or infinite values")
    if not np.abs(normals).max(1).all():
        raise InputError("a normal has a length of 0")
    return Cloud(points, normals)


def _checked_box(vertices: Vectors, what: str) -> tuple[Vectors, Vectors]:
    """Lowest and highest coordinates."""
    if not np.isfinite(vertices).all():
        raise InputError(f"the {what} holds NaN or infinite coordinates")
    lower, upper = vertices.min(0), vertices.max(0)
    # An infinite difference of two finite coordinates is as useless as none.
    with np.errstate(over="ignore"):
        extent = (upper - lower).max()
    if extent == 0 or not np.isfinite(extent):
        raise InputError(f"the {what} has {'no' if extent == 0 else 'an infinite'} extent")
    return lower, upper


def _used(mesh: trimesh.Trimesh) -> NDArray[np.bool_]:
    """Which vertices are corners of faces."""
    used = np.zeros(len(mesh.vertices), np.bool_)
    used[mesh.faces] = True
    return used


# ----------------------------------------------------------------------------------------------------------------- sampling


def _placed(shape: trimesh.Trimesh | Cloud, centre: Vectors, scale: float) -> trimesh.Trimesh | Cloud:
    """The shape in the model's frame."""
    import trimesh

    if isinstance(shape, Cloud):
        return Cloud((shape.points - centre) / scale, shape.normals)
    return trimesh.Trimesh((shape.vertices - centre) / scale, shape.faces, process=False)


def _thinned(cloud: Cloud, count: int, seed: int) -> Cloud:
    if len(cloud.points) <= count:
        return cloud
    chosen = np.random.default_rng(seed).permutation(len(cloud.points))[:count]
    return Cloud(cloud.points[chosen], None if cloud.normals is None else cloud.normals[chosen])


def _sampled(mesh: trimesh.Trimesh, count: int, seed: int) -> Cloud:
    from trimesh.sample import sample_surface

    points, faces = sample_surface(mesh, count, seed=seed)
    corners = mesh.vertices[mesh.faces[faces]]
    return Cloud(np.asarray(points), np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]))


def _unit(vectors: Vectors) -> Vectors:
    # Scaled by the largest component first, whose square might not be a number that float64 has.
    vectors = vectors / np.abs(vectors).max(1, keepdims=True)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

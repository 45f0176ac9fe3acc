"""glTF 2.0 and its binary form: every accessor, primitive and transform that makes a surface or points.

The default scene is read (or the first one, or without scenes every node that no other one holds), as it stands before
anything moves: skins, morph targets and animations are passed over. A mesh with a skin lies where its
vertices say, for its node's transform has no effect. Lines have no surface and are passed over too.
"""

from __future__ import annotations

import base64
import binascii
import json
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.errors import InputError
from zoo.media.shape import compression
from zoo.media.shape.geometry import NO_FACES, Geometry, Indices, Vectors, check_count, check_indices, joined, strip

_COMPONENTS = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}
_POINTS, _TRIANGLES, _STRIP, _FAN = 0, 4, 5, 6
_LINES = (1, 2, 3)
_MODES = (_POINTS, *_LINES, _TRIANGLES, _STRIP, _FAN)
_DRACO = "KHR_draco_mesh_compression"
_MESHOPT = ("EXT_meshopt_compression", "KHR_meshopt_compression")
_INSTANCING = "EXT_mesh_gpu_instancing"
_QUANTIZATION = "KHR_mesh_quantization"
_VISIBILITY = "KHR_node_visibility"
# Extensions that a file may require without any effect on its shape.
_OF_LOOKS = (
    *("KHR_materials_", "EXT_materials_", "KHR_texture_", "EXT_texture_", "MSFT_texture_", "KHR_lights_", "EXT_lights_"),
    *("KHR_xmp", "KHR_animation_", "KHR_node_selectability", "KHR_node_hoverability", "KHR_audio", "KHR_interactivity"),
    *("EXT_mesh_features", "EXT_structural_metadata", "EXT_instance_features", "MSFT_packing_", "ADOBE_materials_"),
)
_READ = (_DRACO, *_MESHOPT, _INSTANCING, _QUANTIZATION, _VISIBILITY)
# Rows of an accessor that holds zeros and no data: more than this many of them must be matched by data elsewhere in the file.
_FREE_ROWS = 1 << 16
_GLB_HEADER, _CHUNK_HEADER = 12, 8


def read(content: bytes, folder: Path | None, max_faces: int) -> Geometry:
    """The shape in a file.

    Args:
        content: of the file, GLB or JSON.
        folder: where the files beside it are; ``None`` if nobody knows.
        max_faces: most faces or points.
    """
    text, binary = _chunks(content) if content[:4] == b"glTF" else (content, None)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"its JSON is truncated or damaged: {error}") from error
    if not isinstance(document, dict):
        raise InputError("its JSON is no glTF document")
    return _Document(document, binary, folder, len(content)).geometry(max_faces)


def _chunks(content: bytes) -> tuple[bytes, bytes | None]:
    """The JSON and the binary part of a GLB file."""
    if len(content) < _GLB_HEADER + _CHUNK_HEADER:
        raise InputError(f"it is a truncated GLB file of {len(content)} bytes")
    version, length = (int.from_bytes(content[at : at + 4], "little") for at in (4, 8))
    if version != 2:
        raise InputError(f"glTF of version {version} cannot be read: convert it to 2.0")
    if length > len(content):
        raise InputError(f"it is truncated: {len(content)} of {length} bytes are there")
    at = _GLB_HEADER
    chunks: dict[bytes, bytes] = {}
    while at + _CHUNK_HEADER <= length:
        size, kind = int.from_bytes(content[at : at + 4], "little"), content[at + 4 : at + 8]
        at += _CHUNK_HEADER
        if at + size > length:
            raise InputError(f"it is truncated or damaged: a chunk of {size} bytes does not fit in the {length} of the file")
        chunks.setdefault(kind, content[at : at + size])
        at += size
    if b"JSON" not in chunks:
        raise InputError("it is a GLB file without JSON")
    return chunks[b"JSON"], chunks.get(b"BIN\0")


class _Document:
    """A glTF document and the buffers that it names, read when they are wanted."""

    def __init__(self, document: dict[str, Any], binary: bytes | None, folder: Path | None, size: int) -> None:
        self.document, self.binary, self.folder = document, binary, folder
        self.size = size
        self.buffers: dict[int, bytes] = {}
        self.views: dict[int, bytes] = {}
        version = str(_object(document.get("asset", {}), "asset").get("version", ""))
        if version.split(".")[0] != "2":
            raise InputError(f"glTF of version {version or 'none'} cannot be read: convert it to 2.0")
        self.required = [str(name) for name in _list(document.get("extensionsRequired", []), "extensionsRequired")]
        unknown = [name for name in self.required if name not in _READ and not name.startswith(_OF_LOOKS)]
        if unknown:
            raise InputError(f"it requires the extension {unknown[0]}, which cannot be read: export it without that")

    def item(self, kind: str, index: Any) -> dict[str, Any]:
        """One of the document's meshes, nodes, accessors, ..."""
        items = _list(self.document.get(kind, []), kind)
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(items):
            raise InputError(f"it names {kind}[{index!r}], and has {len(items)} of them")
        return _object(items[index], f"{kind}[{index}]")

    # ---- scenes

    def geometry(self, max_faces: int) -> Geometry:
        parts: list[Geometry] = []
        kept: dict[int, list[Geometry]] = {}
        passed_over: set[int] = set()
        faces = points = 0
        for node, matrix in self._nodes():
            if "mesh" not in node:
                continue
            index = node["mesh"]
            if index not in kept:
                kept[index] = list(self._primitives(self.item("meshes", index), max_faces, passed_over))
            if "skin" in node:
                matrix = np.eye(4)
            placements = [matrix @ own for own in self._instances(node, max_faces)]
            faces += len(placements) * sum(len(part.faces) for part in kept[index])
            points += len(placements) * sum(len(part.vertices) for part in kept[index])
            check_count(faces, "faces", max_faces)
            # A mesh has about half as many vertices as faces; with corners of their own they are three times as many.
            check_count(points, "points", 3 * max_faces)
            parts += [_placed(part, placement) for placement in placements for part in kept[index]]
        if not parts and passed_over:
            raise InputError("it holds lines only, which have no surface")
        return joined(parts, max_faces)

    def _nodes(self) -> Iterator[tuple[dict[str, Any], Vectors]]:
        """The nodes of the scene, parents first, with their transforms to the world."""
        nodes = _list(self.document.get("nodes", []), "nodes")
        if scenes := _list(self.document.get("scenes", []), "scenes"):
            scene = self.item("scenes", self.document.get("scene", 0) if len(scenes) else 0)
            roots = _list(scene.get("nodes", []), "the nodes of a scene")
        else:
            inner = {child for node in nodes for child in _list(_object(node, "a node").get("children", []), "children")}
            roots = [index for index in range(len(nodes)) if index not in inner]
        # The last one is next.
        waiting: list[tuple[Any, Vectors]] = [(root, np.eye(4)) for root in reversed(roots)]
        seen: set[int] = set()
        while waiting:
            index, parent = waiting.pop()
            node = self.item("nodes", index)
            if index in seen:
                raise InputError(f"node {index} is reached by two ways, where a tree has one")
            seen.add(index)
            if _extension(node, _VISIBILITY).get("visible", True) is False:
                continue
            with np.errstate(over="ignore", invalid="ignore"):
                matrix = parent @ _transform(node)
            if not np.isfinite(matrix).all():
                raise InputError(f"the transform of node {index} holds NaN or infinite values")
            yield node, matrix
            waiting += [(child, matrix) for child in reversed(_list(node.get("children", []), "the children of a node"))]

    def _instances(self, node: Mapping[str, Any], most: int) -> list[Vectors]:
        """Where a node has its mesh, in its own frame."""
        if _INSTANCING not in _object(node.get("extensions", {}), "extensions"):
            return [np.eye(4)]
        attributes = _object(_extension(node, _INSTANCING).get("attributes", {}), "attributes of instances")
        read = {}
        for name, width in (("TRANSLATION", 3), ("ROTATION", 4), ("SCALE", 3)):
            if name in attributes:
                read[name] = self.accessor(attributes[name], width).astype(np.float64)
        counts = {len(values) for values in read.values()}
        if len(counts) != 1:
            raise InputError(f"the attributes of {_INSTANCING} are for {sorted(counts)} instances")
        (count,) = counts
        check_count(count, "instances", most)
        moved, turned, scaled = (read.get(name) for name in ("TRANSLATION", "ROTATION", "SCALE"))
        return [
            _composed(
                np.zeros(3) if moved is None else moved[index],
                np.array([0.0, 0, 0, 1]) if turned is None else turned[index],
                np.ones(3) if scaled is None else scaled[index],
            )
            for index in range(count)
        ]

    # ---- meshes

    def _primitives(self, mesh: Mapping[str, Any], max_faces: int, passed_over: set[int]) -> Iterator[Geometry]:
        for item in _list(mesh.get("primitives", []), "primitives"):
            primitive = _object(item, "a primitive")
            mode = primitive.get("mode", _TRIANGLES)
            if mode not in _MODES:
                raise InputError(f"a primitive has mode {mode!r}, which glTF has not")
            if mode in _LINES:
                passed_over.add(mode)
                continue
            attributes = _object(primitive.get("attributes", {}), "attributes")
            if "POSITION" not in attributes:
                # The specification has nothing drawn for these.
                continue
            draco = _extension(primitive, _DRACO)
            if draco and (self._must(_DRACO) or compression.has_draco()):
                yield self._draco(primitive, draco)
                continue
            vertices = self.accessor(attributes["POSITION"], 3).astype(np.float64)
            indices: Indices | None = None
            if "indices" in primitive:
                stored = self.accessor(primitive["indices"], 1)
                if stored.dtype.kind != "u":
                    raise InputError(f"indices are of type {stored.dtype}, not unsigned")
                indices = stored[:, 0].astype(np.int64)
                check_indices(indices, len(vertices))
            if mode == _POINTS:
                normals = self.accessor(attributes["NORMAL"], 3).astype(np.float64) if "NORMAL" in attributes else None
                if normals is not None and (len(normals) != len(vertices) or not normals.any()):
                    normals = None
                chosen = slice(None) if indices is None else indices
                yield Geometry(vertices[chosen], NO_FACES, None if normals is None else normals[chosen])
                continue
            corners = np.arange(len(vertices)) if indices is None else indices
            check_count(len(corners) // 3 if mode == _TRIANGLES else len(corners), "faces", max_faces)
            yield Geometry(vertices, _triangles(corners, mode))

    def _draco(self, primitive: Mapping[str, Any], extension: Mapping[str, Any]) -> Geometry:
        number = _object(extension.get("attributes", {}), "attributes").get("POSITION")
        if not isinstance(number, int):
            raise InputError(f"{_DRACO} has no positions")
        described = self.item("accessors", _object(primitive.get("attributes", {}), "attributes")["POSITION"])
        positions, faces = compression.draco(self.view(extension.get("bufferView")), number)
        if len(positions) != _whole(described, "count") or positions.shape[1:] != (3,):
            raise InputError(f"{_DRACO} holds {len(positions)} vertices, and {described.get('count')} were to be there")
        check_indices(faces, len(positions))
        component = _component(described, "the accessor of positions")
        if component.kind != "f":
            # The decoder may give whole numbers as floats; what they stand for goes by the type that they have in the document.
            positions = np.rint(positions).astype(component)
        return Geometry(_normalised(positions, described).astype(np.float64), faces)

    def _must(self, extension: str) -> bool:
        return extension in self.required

    # ---- data

    def accessor(self, index: Any, width: int) -> NDArray[Any]:
        """Rows of an accessor, ``[count, width]``, as float64 if it holds normalised integers."""
        accessor = self.item("accessors", index)
        name = f"accessors[{index}]"
        kind = accessor.get("type")
        if kind not in _WIDTHS or _WIDTHS[kind] != width:
            raise InputError(f"{name} is of type {kind!r}, where numbers of {width} components are wanted")
        dtype = _component(accessor, name)
        count = _whole(accessor, "count")
        if "bufferView" in accessor:
            view = self.view(accessor["bufferView"])
            stride = self.item("bufferViews", accessor["bufferView"]).get("byteStride", 0)
            rows = _strided(view, dtype, count, width, _whole(accessor, "byteOffset", 0), stride, name)
        else:
            if count > max(_FREE_ROWS, self.size):
                raise InputError(f"{name} claims {count} rows and has no data")
            rows = np.zeros((count, width), dtype)
        if "sparse" in accessor:
            rows = self._sparse(_object(accessor["sparse"], "sparse"), rows, name)
        return _normalised(rows, accessor)

    def _sparse(self, sparse: Mapping[str, Any], rows: NDArray[Any], name: str) -> NDArray[Any]:
        """The rows with some of them replaced."""
        count = _whole(sparse, "count")
        where, values = (_object(sparse.get(part, {}), part) for part in ("indices", "values"))
        kind = _component(where, f"{name}.sparse.indices")
        if kind.kind != "u":
            raise InputError(f"{name}.sparse.indices are of type {kind}, not unsigned")
        indices = _strided(self.view(where.get("bufferView")), kind, count, 1, _whole(where, "byteOffset", 0), 0, name)[:, 0]
        if count and int(indices.max()) >= len(rows):
            raise InputError(f"{name} replaces row {int(indices.max())} of {len(rows)}")
        view, offset = self.view(values.get("bufferView")), _whole(values, "byteOffset", 0)
        replaced = rows.copy()
        replaced[indices] = _strided(view, rows.dtype, count, rows.shape[1], offset, 0, name)
        return replaced

    def view(self, index: Any) -> bytes:
        """The bytes of a buffer view, decompressed."""
        if index not in self.views:
            view = self.item("bufferViews", index)
            found = None
            for name in _MESHOPT:
                packed = _extension(view, name)
                if packed and (self._must(name) or compression.has_meshopt() or self._is_placeholder(view)):
                    found = compression.meshopt(self._slice(packed), packed, name)
                    break
            self.views[index] = self._slice(view) if found is None else found
        return self.views[index]

    def _is_placeholder(self, view: Mapping[str, Any]) -> bool:
        """Whether a view's buffer has nothing in it, as everything is where an extension says."""
        buffer = self.item("buffers", view.get("buffer"))
        return any(_extension(buffer, name).get("fallback") is True for name in _MESHOPT) and "uri" not in buffer

    def _slice(self, view: Mapping[str, Any]) -> bytes:
        buffer = self.buffer(view.get("buffer"))
        start, length = _whole(view, "byteOffset", 0), _whole(view, "byteLength")
        if start + length > len(buffer):
            raise InputError(f"it is truncated or damaged: bytes {start} to {start + length} of a buffer of {len(buffer)}")
        return buffer[start : start + length]

    def buffer(self, index: Any) -> bytes:
        if index not in self.buffers:
            buffer = self.item("buffers", index)
            length, uri = _whole(buffer, "byteLength"), buffer.get("uri")
            if uri is None:
                if index != 0 or self.binary is None:
                    raise InputError(f"buffers[{index}] has no data")
                found = self.binary
            elif not isinstance(uri, str):
                raise InputError(f"buffers[{index}] has an address that is no text")
            elif uri[:5].lower() == "data:":
                found = _embedded(uri, index)
            else:
                found = self._beside(uri, length)
            if len(found) < length:
                raise InputError(f"it is truncated: buffers[{index}] has {len(found)} of {length} bytes")
            self.buffers[index] = found[:length]
        return self.buffers[index]

    def _beside(self, uri: str, length: int) -> bytes:
        """The file of a relative address. Nothing is fetched from elsewhere."""
        place = urllib.parse.unquote(uri)
        if urllib.parse.urlsplit(uri).scheme or place.startswith(("/", "\\")) or "\0" in place:
            raise InputError(f"its data lie at {uri[:80]!r}, and only files beside it are read: make a GLB of it")
        if self.folder is None:
            raise InputError(f"its data lie in {place!r}, beside a file: give the path of that file, or a GLB")
        path = self.folder / place
        try:
            if not path.is_file():
                raise InputError(f"its data lie in {place!r}, and there is no such file beside it")
            with path.open("rb") as handle:
                return handle.read(length)
        except OSError as error:
            raise InputError(f"its data lie in {place!r}, which cannot be opened: {error.strerror}") from error


def _triangles(corners: Indices, mode: int) -> Indices:
    """Triangles of the corners of a list, strip or fan; corners that make no whole triangle are passed over."""
    if mode == _TRIANGLES:
        return corners[: len(corners) // 3 * 3].reshape(-1, 3)
    if mode == _STRIP:
        return strip(corners)
    if len(corners) < 3:
        return NO_FACES
    return np.stack([corners[1:-1], corners[2:], np.broadcast_to(corners[:1], len(corners) - 2)], axis=1)


def _strided(view: bytes, dtype: np.dtype[Any], count: int, width: int, offset: int, stride: Any, name: str) -> NDArray[Any]:
    """Rows in the bytes of a view, ``[count, width]``."""
    packed = dtype.itemsize * width
    if not isinstance(stride, int) or stride < 0 or 0 < stride < packed:
        raise InputError(f"{name} has rows of {packed} bytes, {stride!r} bytes apart")
    stride = stride or packed
    if count and offset + stride * (count - 1) + packed > len(view):
        raise InputError(f"{name} claims {count} rows, and its {len(view)} bytes end before")
    if not count:
        return np.zeros((0, width), dtype)
    return np.ndarray((count, width), dtype, view, offset, (stride, dtype.itemsize))


def _normalised(rows: NDArray[Any], accessor: Mapping[str, Any]) -> NDArray[Any]:
    """Integers that stand for [0, 1] or [-1, 1], as these; other numbers as they are."""
    if accessor.get("normalized") is not True or rows.dtype.kind == "f":
        return rows
    return np.maximum(rows.astype(np.float64) / np.iinfo(rows.dtype).max, -1.0)


def _transform(node: Mapping[str, Any]) -> Vectors:
    """What a node does to points, from the right."""
    if "matrix" in node:
        return _numbers(node["matrix"], 16, "matrix").reshape(4, 4).T
    moved = _numbers(node.get("translation", [0, 0, 0]), 3, "translation")
    turned = _numbers(node.get("rotation", [0, 0, 0, 1]), 4, "rotation")
    return _composed(moved, turned, _numbers(node.get("scale", [1, 1, 1]), 3, "scale"))


def _composed(translation: Vectors, rotation: Vectors, scale: Vectors) -> Vectors:
    """The matrix of a translation, a rotation (a quaternion x, y, z, w) and a scale."""
    length = np.linalg.norm(rotation)
    if not np.isfinite(length) or length == 0:
        raise InputError(f"a rotation of {rotation.tolist()} is none")
    x, y, z, w = rotation / length
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    matrix[:3, :3] *= scale
    matrix[:3, 3] = translation
    return matrix


def _placed(part: Geometry, matrix: Vectors) -> Geometry:
    """A part moved; where it is mirrored, faces are turned, so that they look the same way still."""
    linear = matrix[:3, :3]
    with np.errstate(over="ignore", invalid="ignore"):
        vertices = part.vertices @ linear.T + matrix[:3, 3]
        mirrored = np.linalg.det(linear) < 0
        # Cofactors are the inverse transposed but for a factor, and are there for flat scales as well.
        cofactors = np.stack([np.cross(linear[1], linear[2]), np.cross(linear[2], linear[0]), np.cross(linear[0], linear[1])])
        normals = None if part.normals is None else part.normals @ cofactors.T * (-1 if mirrored else 1)
    return Geometry(vertices, part.faces[:, ::-1] if mirrored else part.faces, normals)


def _embedded(uri: str, index: int) -> bytes:
    """The bytes of an address that holds them."""
    head, comma, body = uri[5:].partition(",")
    try:
        if not comma:
            raise ValueError("no comma")
        raw = urllib.parse.unquote_to_bytes(body)
        return base64.b64decode(raw + b"=" * (-len(raw) % 4)) if head.lower().endswith(";base64") else raw
    except (ValueError, binascii.Error) as error:
        raise InputError(f"the data URI of buffers[{index}] is damaged: {error}") from error


# ---- what JSON may hold


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{name} is no object of glTF")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{name} is no list")
    return value


def _extension(holder: Mapping[str, Any], name: str) -> dict[str, Any]:
    return _object(_object(holder.get("extensions", {}), "extensions").get(name, {}), name)


def _whole(holder: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = holder.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(f"{name} is {value!r}, where a number of bytes or rows is wanted")
    return value


def _component(holder: Mapping[str, Any], name: str) -> np.dtype[Any]:
    number = holder.get("componentType")
    if not isinstance(number, int) or number not in _COMPONENTS:
        raise InputError(f"{name} has components of type {number!r}, which glTF has not")
    return np.dtype(_COMPONENTS[number])


def _numbers(values: Any, count: int, name: str) -> Vectors:
    if (
        not isinstance(values, list)
        or len(values) != count
        or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    ):
        raise InputError(f"the {name} of a node is not of {count} numbers")
    return np.array([float(value) for value in values])

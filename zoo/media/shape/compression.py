"""Compressed parts of glTF: Draco through DracoPy, meshopt through the bindings of meshoptimizer."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.errors import InputError, MissingReaderError
from zoo.media.shape.geometry import Indices

# Most bytes that one byte of each kind can stand for: a byte of a control stream for four bytes of 256 vertices; a byte for a
# triangle; a byte for an index. Counts beyond are refused before anything is allocated.
_BYTES_PER_BYTE = 1024
_LARGEST_VERTEX = 256
# The bindings' name of each filter, and the sizes of rows that it is for.
_FILTERS = {
    "NONE": (None, range(4, _LARGEST_VERTEX + 1, 4)),
    "OCTAHEDRAL": ("decode_filter_oct", (4, 8)),
    "QUATERNION": ("decode_filter_quat", (8,)),
    "EXPONENTIAL": ("decode_filter_exp", range(4, _LARGEST_VERTEX + 1, 4)),
}


def has_draco() -> bool:
    return find_spec("DracoPy") is not None


def has_meshopt() -> bool:
    return find_spec("meshoptimizer") is not None


def draco(content: bytes, attribute: int) -> tuple[NDArray[Any], Indices]:
    """Positions ``[vertices, 3]`` and faces of a Draco bit stream.

    Args:
        content: the stream.
        attribute: the number of the positions in it.

    Raises:
        InputError: it is damaged or no mesh.
        MissingReaderError: DracoPy is not installed.
    """
    if not has_draco():
        raise MissingReaderError(
            'it uses the extension KHR_draco_mesh_compression: pip install "tokenizer-zoo[gltf]", '
            "or unpack it with `gltf-transform copy`"
        )
    import DracoPy

    try:
        mesh = DracoPy.decode(content)
        found = mesh.get_attribute_by_unique_id(attribute)
        return np.asarray(found["data"]), np.asarray(mesh.faces, np.int64).reshape(-1, 3)
    except Exception as error:
        raise InputError(f"what KHR_draco_mesh_compression holds is truncated or damaged: {error}") from error


def meshopt(content: bytes, packed: Mapping[str, Any], extension: str) -> bytes:
    """The bytes of a buffer view that was compressed.

    Args:
        content: what it was compressed to.
        packed: the properties of the extension.
        extension: its name.

    Raises:
        InputError: it is damaged or of a kind that glTF has not.
        MissingReaderError: meshoptimizer is not installed.
    """
    if not has_meshopt():
        raise MissingReaderError(
            f'it uses the extension {extension}: pip install "tokenizer-zoo[meshopt]", or unpack it with `gltf-transform copy`'
        )
    mode, kind = packed.get("mode"), packed.get("filter", "NONE")
    count, stride = packed.get("count"), packed.get("byteStride")
    if not all(isinstance(number, int) and number > 0 for number in (count, stride)):
        raise InputError(f"{extension} has {count!r} rows of {stride!r} bytes")
    assert isinstance(count, int) and isinstance(stride, int)
    if not isinstance(kind, str) or kind not in _FILTERS:
        raise InputError(f"{extension} has the filter {kind!r}, which cannot be read")
    try:
        if mode == "ATTRIBUTES":
            return _vertices(content, count, stride, kind)
        if mode in ("TRIANGLES", "INDICES"):
            return _indices(content, count, stride, mode)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"what {extension} holds is truncated or damaged: {error}") from error
    raise InputError(f"{extension} has the mode {mode!r}, which glTF has not")


def _vertices(content: bytes, count: int, stride: int, kind: str) -> bytes:
    import meshoptimizer

    name, strides = _FILTERS[kind]
    if stride not in strides or count * stride > _BYTES_PER_BYTE * (len(content) + _LARGEST_VERTEX):
        raise ValueError(f"{len(content)} bytes cannot hold {count} rows of {stride} for the filter {kind}")
    rows = np.ascontiguousarray(meshoptimizer.decode_vertex_buffer(count, stride, content)).view(np.uint8)
    if name is not None:
        rows = getattr(meshoptimizer, name)(rows, count, stride)
    return rows.tobytes()


def _indices(content: bytes, count: int, stride: int, mode: str) -> bytes:
    import meshoptimizer

    triangles = mode == "TRIANGLES"
    if stride not in (2, 4) or (triangles and count % 3) or count > (3 if triangles else 1) * len(content):
        raise ValueError(f"{len(content)} bytes cannot hold {count} indices of {stride}")
    decode = meshoptimizer.decode_index_buffer if triangles else meshoptimizer.decode_index_sequence
    # Always as four bytes each: told two, the bindings return an array of twice the size, filled by half.
    indices = decode(count, 4, content)
    if stride == 2 and len(indices) and indices.max() > np.iinfo(np.uint16).max:
        raise ValueError("an index does not fit in two bytes")
    return indices.astype("<u4" if stride == 4 else "<u2").tobytes()

"""Files of shapes: told apart by what they hold, not by their names."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

from zoo.errors import InputError, MissingExtraError, MissingReaderError
from zoo.media.files import open_source
from zoo.media.shape import gltf, obj, off, ply, stl
from zoo.media.shape.geometry import Geometry

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_TEXT = 4096
_POINT_LINE = re.compile(rb"\s*(?:\d+\s+)?[-+.\dEe]+[ ,;\t]+[-+.\dEe]+[ ,;\t]+[-+.\dEe]+")
# What else shapes come in, by how it begins, and what to do about it.
_OTHERS = {
    b"Kaydara FBX": "FBX: convert it to GLB with Blender or FBX2glTF",
    b"BLENDER": "Blender: export GLB",
    b"DRACO": "Draco without glTF: decode it with DracoPy, and give points or a trimesh.Trimesh",
    b"PK\x03\x04": "a ZIP archive, as 3MF and USDZ are: convert it to GLB, or unpack it",
    b"PXR-USDC": "USD: convert it to GLB",
    b"#usda": "USD: convert it to GLB",
    b"ISO-10303-21": "STEP: mesh it first, with FreeCAD or gmsh",
    b"# vtk": "VTK: write it as PLY, with meshio or pyvista",
    b"$MeshFormat": "Gmsh: write it as PLY or STL, with meshio",
    b"# .PCD": "PCD: write it as PLY, or give its points as an array",
    b"<?xml": "XML, as COLLADA, X3D and VTK use: convert it to GLB",
    b"\x1f\x8b": "compressed by gzip: unpack it",
}


def read_file(source: Any, max_faces: int) -> Geometry:
    """The shape in a file or in the bytes of one.

    Args:
        source: one of `FILE_TYPES`.
        max_faces: most faces, or points of a cloud.

    Raises:
        InputError: there is no such file, or it is no shape, damaged, too large, or uses what cannot be read.
    """
    handle, name = open_source(source, "shape")
    with handle:
        try:
            content = handle.read()
        except OSError as error:
            raise InputError(f"{name} cannot be read: {error.strerror}") from error
    folder = None if isinstance(handle, io.BytesIO) else Path(name).parent
    try:
        return _read(content, folder, os.fspath(name), max_faces)
    except MissingReaderError as error:
        raise MissingReaderError(f"{name}: {error.reason}") from error
    except InputError as error:
        raise InputError(f"{name}: {error.reason}") from error
    except (MissingExtraError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"{name} is truncated or damaged: {error}") from error


def _read(content: bytes, folder: Path | None, name: str, max_faces: int) -> Geometry:
    if content.startswith(_BYTE_ORDER_MARK):
        content = content[len(_BYTE_ORDER_MARK) :]
    start = content[:_TEXT].lstrip()
    if content[:4] == b"glTF" or (start[:1] == b"{" and b'"asset"' in content):
        return gltf.read(content, folder, max_faces)
    if content[:3] == b"ply":
        return ply.read(content, max_faces)
    if off.keyword(content):
        return off.read(content, max_faces)
    if len(content) >= stl.HEADER and len(content) == stl.HEADER + stl.FACE * stl.claimed_faces(content):
        return stl.read_binary(content, max_faces)
    if start[:5].lower() == b"solid":
        # Exporters write the word into headers of binary files as well.
        return (stl.read_binary if b"\0" in content[:_TEXT] else stl.read_text)(content, max_faces)
    if obj.looks_like(content):
        return obj.read(content, max_faces)
    if Path(name).suffix.lower() == ".stl" and len(content) >= stl.HEADER:
        return stl.read_binary(content, max_faces)
    for magic, what in _OTHERS.items():
        if start.startswith(magic):
            raise InputError(f"it is not a shape file that can be read, but {what}")
    hint = "; read points in text with numpy.loadtxt, and give the array" if _POINT_LINE.match(start) else ""
    raise InputError(f"it is not a shape file that can be read; formats are GLB, glTF, OBJ, PLY, STL, OFF{hint}")

"""Files of shapes, as exporters write them: every form of glTF, OBJ, PLY, OFF and STL that holds a surface or points."""

from __future__ import annotations

import base64
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh

import zoo
from zoo import media
from zoo.errors import MissingReaderError
from zoo.media.shape import compression, polygons

CASES = Path(__file__).parent / "media" / "shape"
BOX = trimesh.creation.box((1, 1, 1))
PRISM_AREA, PRISM_VOLUME = 3 * 3**0.5 + 6, 1.5 * 3**0.5
HEXAGON = [[np.cos(a), np.sin(a)] for a in np.arange(6) * np.pi / 3]


def read(source: Any) -> trimesh.Trimesh:
    mesh = media.read_shape(source)
    assert isinstance(mesh, trimesh.Trimesh)
    return mesh


def same_surface(found: trimesh.Trimesh, right: trimesh.Trimesh, tolerance: float = 1e-5) -> bool:
    """Whether two meshes have the same triangles, in any order and from any corner."""

    def rows(mesh: trimesh.Trimesh) -> np.ndarray:
        triangles = np.round(np.asarray(mesh.triangles) / tolerance).astype(np.int64)
        keyed = [min(tuple(map(tuple, np.roll(t, -s, axis=0))) for s in range(3)) for t in triangles]
        return np.array(sorted(keyed))

    return len(found.faces) == len(right.faces) and np.array_equal(rows(found), rows(right))


# ------------------------------------------------------------------------------------------------- small files from the world


@pytest.mark.parametrize("name", ["coff.off", "comment-first.off"])
def test_off_of_a_box(name: str) -> None:
    mesh = read(CASES / name)
    assert len(mesh.faces) == 12 and mesh.volume == pytest.approx(1) and mesh.area == pytest.approx(6)


@pytest.mark.parametrize("name", ["mixed-polygons-binary.ply", "hexagons.off"])
def test_prism_of_hexagons_and_quads(name: str) -> None:
    mesh = read(CASES / name)
    assert len(mesh.faces) == 20 and media.is_closed(mesh)
    assert mesh.volume == pytest.approx(PRISM_VOLUME, rel=1e-5) and mesh.area == pytest.approx(PRISM_AREA, rel=1e-5)


def test_obj_with_vertices_and_faces_in_turns() -> None:
    mesh = read(CASES / "relative-indices-two-boxes.obj")
    assert mesh.bounds[:, 0].tolist() == [-0.5, 3.5] and mesh.volume == pytest.approx(2)


def test_quantized_positions() -> None:
    prepared = media.prepare_shape(CASES / "box-quantized.glb", 100)
    assert prepared.meta["scale"] == pytest.approx(2 / 1.9, rel=1e-6) and prepared.meta["x"] == pytest.approx(10)


def test_sparse_accessor() -> None:
    assert read(CASES / "sparse-accessor.glb").bounds[:, 0].tolist() == [-0.5, 5]


def test_instances() -> None:
    mesh = read(CASES / "gpu-instancing.glb")
    assert len(mesh.faces) == 36 and mesh.bounds[:, 0].tolist() == [-0.5, 10.5]


@pytest.mark.parametrize(
    "name, package, extension",
    [("draco.glb", "DracoPy", "KHR_draco_mesh_compression"), ("meshopt.glb", "meshoptimizer", "EXT_meshopt_compression")],
)
def test_compressed_meshes(name: str, package: str, extension: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec(package) is not None:
        mesh = read(CASES / name)
        assert np.allclose(mesh.bounds, [[9, -0.5, -0.5], [11, 0.5, 0.5]], atol=1e-4)
        assert len(mesh.faces) == 192 and media.is_closed(mesh) and mesh.volume == pytest.approx(2, rel=1e-3)
    monkeypatch.setattr(compression, "find_spec", lambda name: None)
    with pytest.raises(zoo.InputError, match=rf"{extension}.*pip install.*gltf-transform copy"):
        media.read_shape(CASES / name)


# ----------------------------------------------------------------------------------------------------------------------- glTF


class Document:
    """A glTF document under construction, with one buffer."""

    def __init__(self) -> None:
        self.binary = b""
        self.json: dict[str, Any] = {"asset": {"version": "2.0"}, "accessors": [], "bufferViews": [], "meshes": [], "nodes": []}

    def view(self, content: bytes, **more: Any) -> int:
        self.binary += b"\0" * (-len(self.binary) % 4)
        view = {"buffer": 0, "byteOffset": len(self.binary), "byteLength": len(content), **more}
        self.json["bufferViews"].append(view)
        self.binary += content
        return len(self.json["bufferViews"]) - 1

    def accessor(self, rows: np.ndarray, kind: str, component: int, **more: Any) -> int:
        rows = np.asarray(rows)
        view = self.view(rows.tobytes())
        return self.plain(bufferView=view, componentType=component, count=len(rows), type=kind, **more)

    def plain(self, **accessor: Any) -> int:
        self.json["accessors"].append(accessor)
        return len(self.json["accessors"]) - 1

    def positions(self, points: Any) -> int:
        return self.accessor(np.asarray(points, "<f4"), "VEC3", 5126)

    def indices(self, corners: Any) -> int:
        return self.accessor(np.asarray(corners, "<u2").reshape(-1), "SCALAR", 5123)

    def mesh(self, *primitives: dict[str, Any]) -> int:
        self.json["meshes"].append({"primitives": list(primitives)})
        return len(self.json["meshes"]) - 1

    def node(self, **node: Any) -> int:
        self.json["nodes"].append(node)
        return len(self.json["nodes"]) - 1

    def box(self) -> int:
        primitive = {"attributes": {"POSITION": self.positions(BOX.vertices)}, "indices": self.indices(BOX.faces)}
        return self.mesh(primitive)

    def glb(self) -> bytes:
        if self.binary:
            self.json["buffers"] = [{"byteLength": len(self.binary)}]
        text = json.dumps(self.json).encode()
        text += b" " * (-len(text) % 4)
        binary = self.binary + b"\0" * (-len(self.binary) % 4)
        body = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(binary), b"BIN\0") + binary
        return struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body

    def alone(self, *primitives: dict[str, Any]) -> bytes:
        self.node(mesh=self.mesh(*primitives))
        return self.glb()


@pytest.mark.parametrize("component, kind", [(5120, "i1"), (5121, "u1"), (5122, "<i2"), (5123, "<u2")])
@pytest.mark.parametrize("normalized", [False, True])
def test_positions_of_every_integer(component: int, kind: str, normalized: bool) -> None:
    largest = np.iinfo(kind).max
    least = 0 if kind[-2] == "u" else -largest
    stored = np.where(BOX.vertices > 0, largest, least).astype(kind)
    document = Document()
    # Rows are padded to four bytes, as the extension asks for.
    width = -(-stored.itemsize * 3 // 4) * 4
    rows = np.zeros((8, width), np.uint8)
    rows[:, : stored.itemsize * 3] = stored.view(np.uint8).reshape(8, -1)
    view = document.view(rows.tobytes(), byteStride=width)
    accessor = document.plain(bufferView=view, componentType=component, count=8, type="VEC3", normalized=normalized)
    document.json["extensionsRequired"] = ["KHR_mesh_quantization"]
    mesh = read(document.alone({"attributes": {"POSITION": accessor}, "indices": document.indices(BOX.faces)}))
    unit = largest if normalized else 1
    assert np.allclose(mesh.bounds, np.array([[least] * 3, [largest] * 3]) / unit, atol=1e-12)


def test_most_negative_normalised_integer_is_minus_one() -> None:
    document = Document()
    accessor = document.accessor(np.array([[-128, 0, 0], [127, 0, 0], [0, 127, 0]], "i1"), "VEC3", 5120, normalized=True)
    assert read(document.alone({"attributes": {"POSITION": accessor}})).bounds[0].tolist() == [-1, 0, 0]


@pytest.mark.parametrize("component, kind", [(5121, "u1"), (5123, "<u2"), (5125, "<u4")])
def test_indices_of_every_type(component: int, kind: str) -> None:
    document = Document()
    indices = document.accessor(BOX.faces.reshape(-1).astype(kind), "SCALAR", component)
    assert same_surface(
        read(document.alone({"attributes": {"POSITION": document.positions(BOX.vertices)}, "indices": indices})), BOX
    )


def test_interleaved_rows_with_offsets() -> None:
    document = Document()
    rows = np.zeros((8, 8), "<f4")
    rows[:, 3:6], rows[:, :3] = BOX.vertices, 99
    view = document.view(b"\xff" * 8 + rows.tobytes(), byteStride=32)
    accessor = document.plain(bufferView=view, byteOffset=8 + 12, componentType=5126, count=8, type="VEC3")
    assert same_surface(
        read(document.alone({"attributes": {"POSITION": accessor}, "indices": document.indices(BOX.faces)})), BOX
    )


def test_sparse_without_a_base_and_sparse_indices() -> None:
    document = Document()
    where = document.view(np.arange(8, dtype=np.uint8).tobytes())
    values = document.view(BOX.vertices.astype("<f4").tobytes())
    sparse = {"count": 8, "indices": {"bufferView": where, "componentType": 5121}, "values": {"bufferView": values}}
    positions = document.plain(componentType=5126, count=8, type="VEC3", sparse=sparse)
    faces = BOX.faces.reshape(-1).astype("<u2").copy()
    where = document.view(np.array([3, 7], "<u4").tobytes())
    values = document.view(faces[[3, 7]].tobytes())
    faces[[3, 7]] = 0
    indices = document.indices(faces)
    document.json["accessors"][indices]["sparse"] = {
        "count": 2,
        "indices": {"bufferView": where, "componentType": 5125},
        "values": {"bufferView": values},
    }
    assert same_surface(read(document.alone({"attributes": {"POSITION": positions}, "indices": indices})), BOX)


def test_strips_fans_and_lists_with_and_without_indices() -> None:
    strip = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 2, 0]])
    fan = np.array([[5, 0, 0], [6, 0, 0], [6, 1, 0], [5, 1, 0]])
    for indexed in (False, True):
        document = Document()
        primitives: list[dict[str, Any]] = []
        for mode, points in ((5, strip), (6, fan), (4, strip[:3] + np.array([0, 0, 7]))):
            primitives.append(
                {"mode": mode, "attributes": {"POSITION": document.positions(points[::-1] if indexed else points)}}
            )
            if indexed:
                primitives[-1]["indices"] = document.indices(np.arange(len(points))[::-1])
        mesh = read(document.alone(*primitives))
        assert len(mesh.faces) == 3 + 2 + 1
        assert mesh.area == pytest.approx(1.5 + 1 + 0.5)
        # All of them are wound alike.
        assert (mesh.face_normals[:, 2] > 0.99).all()


def test_points_and_lines() -> None:
    sphere = trimesh.creation.icosphere(2)
    document = Document()
    attributes = {"POSITION": document.positions(sphere.vertices), "NORMAL": document.positions(sphere.vertex_normals)}
    document.node(mesh=document.mesh({"mode": 0, "attributes": attributes}), scale=[2, 1, 1], translation=[7, 0, 0])
    prepared = media.prepare_shape(document.glb(), 1000)
    assert prepared.points.shape == (162, 3) and prepared.meta["x"] == pytest.approx(7, abs=1e-6)
    slopes = sphere.vertices / [2, 1, 1]
    assert np.allclose(prepared.normals, slopes / np.linalg.norm(slopes, axis=1, keepdims=True), atol=0.06)
    document = Document()
    lines = {"mode": 3, "attributes": {"POSITION": document.positions(BOX.vertices)}}
    with pytest.raises(zoo.InputError, match="lines only"):
        media.read_shape(document.alone(lines))
    document = Document()
    document.node(mesh=document.mesh({"mode": 1, "attributes": {"POSITION": document.positions(BOX.vertices * 9)}}))
    document.node(mesh=document.box())
    assert same_surface(read(document.glb()), BOX)


def test_nodes_carry_their_children() -> None:
    document = Document()
    box = document.box()
    leaf = document.node(mesh=box, translation=[1, 0, 0], scale=[1, 2, 3])
    half = float(np.sqrt(0.5))
    turned = document.node(children=[leaf], rotation=[0, 0, half, half])
    root = document.node(children=[turned], matrix=[2, 0, 0, 0, 0, 2, 0, 0, 0, 0, 2, 0, 10, 20, 30, 1])
    document.json["scenes"] = [{"nodes": [leaf]}, {"nodes": [root]}]
    document.json["scene"] = 1
    mesh = read(document.glb())
    # A box of 1 x 2 x 3 about (1, 0, 0), turned by 90 degrees about z, twice as large, moved.
    assert np.allclose(mesh.bounds, [[8, 21, 27], [12, 23, 33]], atol=1e-6)
    assert mesh.volume == pytest.approx(48, rel=1e-6)


def test_mirrored_nodes_keep_their_outside_outside() -> None:
    document = Document()
    half = trimesh.creation.icosphere(2)
    half = trimesh.Trimesh(half.vertices, half.faces[half.triangles_center[:, 0] > 0])
    positions, indices = document.positions(half.vertices), document.indices(half.faces)
    mesh = document.mesh({"attributes": {"POSITION": positions}, "indices": indices})
    document.node(mesh=mesh, scale=[-1, 1, 1])
    document.node(mesh=mesh, scale=[-1, -1, 1], translation=[9, 0, 0])
    found = read(document.glb())
    outwards = np.einsum(
        "ij,ij->i", found.triangles_center - np.where(found.triangles_center[:, :1] > 4, 9, 0) * [1, 0, 0], found.face_normals
    )
    assert (outwards > 0.5).all() and found.area == pytest.approx(2 * half.area, rel=1e-5)


def test_instances_with_rotation_scale_and_a_parent() -> None:
    document = Document()
    half = float(np.sqrt(0.5))
    attributes = {
        "TRANSLATION": document.positions([[0, 0, 0], [10, 0, 0]]),
        "ROTATION": document.accessor(np.array([[0, 0, 0, 1], [0, 0, half, half]], "<f4"), "VEC4", 5126),
        "SCALE": document.positions([[1, 1, 1], [4, -1, 1]]),
    }
    document.node(
        mesh=document.box(), translation=[0, 5, 0], extensions={"EXT_mesh_gpu_instancing": {"attributes": attributes}}
    )
    document.json["extensionsRequired"] = ["EXT_mesh_gpu_instancing"]
    mesh = read(document.glb())
    assert np.allclose(mesh.bounds, [[-0.5, 3, -0.5], [10.5, 7, 0.5]], atol=1e-5)
    assert mesh.volume == pytest.approx(1 + 4, rel=1e-6)
    rounded = document.accessor(np.array([[0, 0, 0, 127], [0, 0, 90, 90]], "i1"), "VEC4", 5120, normalized=True)
    attributes["ROTATION"] = rounded
    assert read(document.glb()).volume == pytest.approx(5, rel=1e-6)


def test_the_default_scene_or_the_first_or_every_root() -> None:
    document = Document()
    box = document.box()
    near, far = document.node(mesh=box), document.node(mesh=box, translation=[4, 0, 0])
    assert read(document.glb()).bounds[1][0] == 4.5
    document.json["scenes"] = [{"nodes": [near]}, {"nodes": [far]}]
    assert read(document.glb()).bounds[1][0] == 0.5
    document.json["scene"] = 1
    assert read(document.glb()).bounds[0][0] == 3.5


def test_a_mesh_with_a_skin_lies_where_its_vertices_say() -> None:
    document = Document()
    document.node(mesh=document.box(), skin=0, translation=[50, 0, 0])
    document.json["skins"] = [{"joints": [0]}]
    assert same_surface(read(document.glb()), BOX)


def test_buffers_in_the_file_and_beside_it(tmp_path: Path) -> None:
    document = Document()
    document.node(mesh=document.box())
    document.glb()
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "box data.bin").write_bytes(document.binary)
    document.json["buffers"][0]["uri"] = "box%20data.bin"
    path = folder / "box.gltf"
    path.write_text("\ufeff" + json.dumps(document.json, indent=1), encoding="utf-8")
    assert same_surface(read(path), BOX)
    with pytest.raises(zoo.InputError, match=r"'box data\.bin'.*give the path"):
        media.read_shape(path.read_bytes())
    for head in ("data:application/octet-stream;base64,", "data:application/gltf-buffer;base64,"):
        document.json["buffers"][0]["uri"] = head + base64.b64encode(document.binary).decode()
        assert same_surface(read(json.dumps(document.json).encode()), BOX)
    for uri, reason in (
        ("https://example.org/a.bin", "only files beside"),
        ("gone.bin", "no such file"),
        ("/dev/zero", "only files"),
    ):
        document.json["buffers"][0]["uri"] = uri
        path.write_text(json.dumps(document.json))
        with pytest.raises(zoo.InputError, match=reason):
            media.read_shape(path)
    (folder / "short.bin").write_bytes(document.binary[:50])
    document.json["buffers"][0]["uri"] = "short.bin"
    path.write_text(json.dumps(document.json))
    with pytest.raises(zoo.InputError, match="50 of"):
        media.read_shape(path)


def broken(change: Callable[[Document], Any]) -> bytes:
    document = Document()
    document.node(mesh=document.box())
    change(document)
    return document.glb()


GLTF_ERRORS: dict[str, tuple[Callable[[Document], Any], str]] = {
    "unknown extension": (lambda d: d.json.update(extensionsRequired=["XYZ_voxels"]), "XYZ_voxels"),
    "version 1": (lambda d: d.json.update(asset={"version": "1.0"}), "version 1.0"),
    "a cycle": (lambda d: d.json.update(scenes=[{"nodes": [0]}], nodes=[{"children": [0], "mesh": 0}]), "two ways"),
    "a diamond": (lambda d: d.json["nodes"].extend([{"children": [3, 2]}, {"children": [3]}, {"mesh": 0}]), "two ways"),
    "no buffer": (lambda d: d.json["bufferViews"][0].update(buffer=3), r"buffers\[3\]"),
    "a view beyond": (lambda d: d.json["bufferViews"][0].update(byteLength=10**9), "truncated"),
    "too many rows": (lambda d: d.json["accessors"][0].update(count=2**31), "claims 2147483648 rows"),
    "rows of nothing": (
        lambda d: d.json["accessors"].__setitem__(0, {"componentType": 5126, "count": 2**31, "type": "VEC3"}),
        "no data",
    ),
    "a wrong index": (lambda d: d.json["accessors"][0].update(count=7), "not among the 7"),
    "a component": (lambda d: d.json["accessors"][0].update(componentType=5130), "5130"),
    "a mode": (lambda d: d.json["meshes"][0]["primitives"][0].update(mode=9), "mode 9"),
    "a short stride": (lambda d: d.json["bufferViews"][0].update(byteStride=4), "4 bytes apart"),
    "no number": (lambda d: d.json["nodes"][0].update(translation=["a", 0, 0]), "translation"),
    "no rotation": (lambda d: d.json["nodes"][0].update(rotation=[0, 0, 0, 0]), "rotation"),
    "infinite": (lambda d: d.json["nodes"][0].update(scale=[1e400, 1, 1]), "NaN or infinite"),
    "nothing": (lambda d: d.json.update(nodes=[]), "no faces and no points"),
}


@pytest.mark.parametrize("case", GLTF_ERRORS)
def test_what_is_no_gltf_is_named(case: str) -> None:
    change, reason = GLTF_ERRORS[case]
    with pytest.raises(zoo.InputError, match=f"shape bytes: .*{reason}"):
        media.read_shape(broken(change))


def test_extensions_of_looks_may_be_required() -> None:
    content = broken(lambda d: d.json.update(extensionsRequired=["KHR_texture_transform", "KHR_materials_unlit"]))
    assert same_surface(read(content), BOX)


def test_data_that_an_extension_compresses_beside_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "find_spec", lambda name: None)

    def change(document: Document) -> None:
        packed = {"buffer": 0, "byteLength": 4, "byteStride": 12, "count": 8, "mode": "ATTRIBUTES"}
        document.json["bufferViews"][0]["extensions"] = {"EXT_meshopt_compression": packed}
        draco = {"bufferView": 0, "attributes": {"POSITION": 0}}
        document.json["meshes"][0]["primitives"][0]["extensions"] = {"KHR_draco_mesh_compression": draco}

    assert same_surface(read(broken(change)), BOX)


@pytest.mark.skipif(find_spec("meshoptimizer") is None, reason="the bindings of meshoptimizer are not installed")
@pytest.mark.parametrize("extension", ["EXT_meshopt_compression", "KHR_meshopt_compression"])
@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("mode", ["TRIANGLES", "INDICES"])
def test_meshopt_of_every_mode(extension: str, stride: int, mode: str) -> None:
    import meshoptimizer

    torus = trimesh.creation.torus(2, 0.7)
    document = Document()
    points, faces = np.ascontiguousarray(torus.vertices.astype("<f4")), torus.faces.reshape(-1).astype("<u4")
    encode = meshoptimizer.encode_index_buffer if mode == "TRIANGLES" else meshoptimizer.encode_index_sequence
    views = []
    for packed, count, step, kind in (
        (meshoptimizer.encode_vertex_buffer(points), len(points), 12, "ATTRIBUTES"),
        (encode(faces, len(faces), len(points)), len(faces), stride, mode),
    ):
        own = {
            "buffer": 0,
            "byteOffset": len(document.binary),
            "byteLength": len(packed),
            "count": count,
            "byteStride": step,
            "mode": kind,
        }
        views.append({"buffer": 1, "byteLength": count * step, "extensions": {extension: own}})
        document.binary += packed
    document.json["bufferViews"] = views
    document.json["extensionsRequired"] = [extension]
    positions = document.plain(bufferView=0, componentType=5126, count=len(points), type="VEC3")
    indices = document.plain(bufferView=1, componentType={2: 5123, 4: 5125}[stride], count=len(faces), type="SCALAR")
    mesh = read(document.alone({"attributes": {"POSITION": positions}, "indices": indices}))
    assert same_surface(mesh, torus)
    views[0]["extensions"][extension]["count"] = 10**7
    with pytest.raises(zoo.InputError, match=f"{extension}.*cannot hold 10000000"):
        media.read_shape(document.glb())


@pytest.mark.skipif(find_spec("DracoPy") is None, reason="DracoPy is not installed")
def test_draco_of_quantized_positions() -> None:
    # By gltf-transform 4.5.1, from box-quantized.glb.
    mesh = read(CASES / "draco-quantized.glb")
    assert np.allclose(mesh.bounds, [[9, -0.5, -0.5], [11, 0.5, 0.5]], atol=1e-4) and mesh.volume == pytest.approx(2, rel=1e-3)


@pytest.mark.skipif(find_spec("DracoPy") is None, reason="DracoPy is not installed")
def test_draco_in_a_primitive_with_other_attributes() -> None:
    import DracoPy

    torus = trimesh.creation.torus(2, 0.7)
    document = Document()
    normals = np.asarray(torus.vertex_normals, np.float64)
    packed = DracoPy.encode(torus.vertices.astype(np.float32), torus.faces, quantization_bits=16, normals=normals)
    mesh = DracoPy.decode(packed)
    number = next(each["unique_id"] for each in mesh.attributes if each["attribute_type"] == 0)
    extension = {"bufferView": document.view(packed), "attributes": {"POSITION": number, "NORMAL": 1 - number}}
    positions = document.plain(componentType=5126, count=len(mesh.points), type="VEC3")
    indices = document.plain(componentType=5123, count=mesh.faces.size, type="SCALAR")
    primitive = {
        "attributes": {"POSITION": positions},
        "indices": indices,
        "extensions": {"KHR_draco_mesh_compression": extension},
    }
    document.json["extensionsRequired"] = ["KHR_draco_mesh_compression"]
    content = document.alone(primitive)
    found = read(content)
    assert len(found.faces) == len(torus.faces) and found.volume == pytest.approx(torus.volume, rel=1e-3)
    # Positions of whole numbers stand for [-1, 1] if the accessor says so, whatever the decoder gives.
    document.json["accessors"][positions] |= {"componentType": 5120, "normalized": True}
    assert np.abs(read(document.glb()).bounds * 127 - np.rint(found.bounds)).max() < 1e-9
    document.json["bufferViews"][0]["byteLength"] //= 2
    with pytest.raises(zoo.InputError, match="KHR_draco_mesh_compression holds is truncated"):
        media.read_shape(document.glb())


# ------------------------------------------------------------------------------------------------------------------- polygons


def star(points: int, inner: float = 0.3) -> np.ndarray:
    angles = np.arange(2 * points) * np.pi / points
    radii = np.where(np.arange(2 * points) % 2, inner, 1.0)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


L_SHAPE = np.array([[0, 0], [1, 0], [2, 0], [2, 1], [1, 1], [1, 2], [0, 2], [0, 1]], float)
OUTLINES = {
    "triangle": np.array([[0, 0], [1, 0], [0, 1]], float),
    "square": np.array([[0, 0], [1, 0], [1, 1], [0, 1]], float),
    "arrow": np.array([[0, 0], [2, -1], [0.5, 0], [2, 1]], float),
    "L with straight corners": L_SHAPE,
    "hexagon": np.array(HEXAGON),
    "star": star(5),
    "gear": star(40, 0.8),
    "comb": np.array(
        [
            [0, 0],
            [7, 0],
            [7, 3],
            [6, 3],
            [6, 1],
            [5, 1],
            [5, 3],
            [4, 3],
            [4, 1],
            [3, 1],
            [3, 3],
            [2, 3],
            [2, 1],
            [1, 1],
            [1, 3],
            [0, 3],
        ],
        float,
    ),
}


def area_of(outline: np.ndarray) -> float:
    x, y = outline.T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def prism(outline: np.ndarray, turn: int = 0) -> tuple[np.ndarray, list[list[int]]]:
    """Vertices and polygons of an upright prism of height 1, turned in space; the caps begin at any corner."""
    count = len(outline)
    vertices = np.concatenate([np.insert(outline, 2, height, axis=1) for height in (0, 1)])
    rotation = trimesh.transformations.random_rotation_matrix(np.array([0.3, 0.6, 0.2]))[:3, :3]
    ring = [(corner + turn) % count for corner in range(count)]
    sides = [[i, (i + 1) % count, count + (i + 1) % count, count + i] for i in range(count)]
    return vertices @ rotation.T, [ring[::-1], [count + corner for corner in ring], *sides]


def as_obj(vertices: np.ndarray, faces: list[list[int]]) -> bytes:
    lines = [f"v {x!r} {y!r} {z!r}" for x, y, z in vertices.tolist()]
    return "\n".join(lines + ["f " + " ".join(str(c + 1) for c in face) for face in faces]).encode()


def as_off(vertices: np.ndarray, faces: list[list[int]]) -> bytes:
    lines = [f"{x!r} {y!r} {z!r}" for x, y, z in vertices.tolist()]
    lines += [f"{len(face)} " + " ".join(map(str, face)) + " 255 0 0" for face in faces]
    return "\n".join(["OFF", f"{len(vertices)} {len(faces)} 0", *lines]).encode()


def as_ply(
    vertices: np.ndarray, faces: list[list[int]], order: str = "ascii", number: str = "double", index: str = "int"
) -> bytes:
    types = {"double": "f8", "float": "f4", "int": "i4", "uint": "u4", "ushort": "u2", "uchar": "u1", "short": "i2"}
    header = (
        f"ply\nformat {order} 1.0\ncomment of end_header\nobj_info scanned\nelement camera 1\nproperty uchar id\n"
        f"element vertex {len(vertices)}\nproperty {number} x\nproperty uchar red\nproperty {number} y\nproperty {number} z\n"
        f"element face {len(faces)}\nproperty uchar flags\nproperty list uchar {index} vertex_indices\n"
        "property list ushort float texcoord\nend_header\n"
    ).encode()
    if order == "ascii":
        rows = ["7"] + [f"{x!r} 200 {y!r} {z!r}" for x, y, z in vertices.tolist()]
        rows += [f"1 {len(face)} {' '.join(map(str, face))} 2 0.5 0.25" for face in faces]
        return header + "\n".join(rows).encode() + b"\n"
    end = "<" if order == "binary_little_endian" else ">"
    body = b"\x07"
    for x, y, z in vertices:
        red = np.array([200], "u1").tobytes()
        body += np.array([x], end + types[number]).tobytes() + red + np.array([y, z], end + types[number]).tobytes()
    for face in faces:
        body += bytes([1, len(face)]) + np.array(face, end + types[index]).tobytes()
        body += np.array([2], end + "u2").tobytes() + np.array([0.5, 0.25], end + "f4").tobytes()
    return header + body


@pytest.mark.parametrize("outline", OUTLINES)
@pytest.mark.parametrize("write", [as_obj, as_off, as_ply])
def test_polygons_of_any_form(outline: str, write: Callable[[np.ndarray, list[list[int]]], bytes]) -> None:
    around = OUTLINES[outline]
    length = np.linalg.norm(around - np.roll(around, 1, axis=0), axis=1).sum()
    for turn in range(min(len(around), 8)):
        mesh = read(write(*prism(around, turn)))
        assert media.is_closed(mesh)
        # A triangle that covers too much, or twice, shows in the area.
        assert mesh.volume == pytest.approx(area_of(around), rel=1e-9)
        assert mesh.area == pytest.approx(2 * area_of(around) + length, rel=1e-9)
        assert len(mesh.faces) == 2 * (len(around) - 2) + 2 * len(around)


def test_polygons_keep_their_order_and_their_corners() -> None:
    vertices, faces = prism(L_SHAPE)
    corners, sizes = np.concatenate([np.array(face) for face in faces]), np.array([len(face) for face in faces])
    triangles = polygons.triangulate(vertices, corners, sizes, 1000)
    start = 0
    for face in faces:
        own = triangles[start : start + len(face) - 2]
        assert set(own.ravel().tolist()) == set(face)
        start += len(face) - 2


def test_polygons_of_no_area_and_with_repeated_corners_are_kept() -> None:
    corners = np.array([0, 1, 2, 3, 0, 0, 1, 1, 2, 2])
    vertices = np.array([[0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0]], float)
    assert len(polygons.triangulate(vertices, corners, np.array([4, 6]), 100)) == 6


# ------------------------------------------------------------------------------------------------------------------------ OBJ


def test_corners_of_every_form_in_one_obj() -> None:
    points = "\n".join(f"v {x} {y} {z} 1 0 0" for x, y, z in BOX.vertices)
    forms = ["{0}", "{0}/1", "{0}//1", "{0}/1/1"]
    lines = []
    for index, face in enumerate(BOX.faces + 1):
        numbers = face - 9 if index % 3 == 0 else face
        lines.append("f " + " ".join(forms[index % 4].format(number) for number in numbers))
    lines[5] = lines[5].replace(" ", " \\\n  ", 2) + "  # the last of them"
    content = (
        f"# made by hand\r\nmtllib none.mtl\r\n{points}\nvt 0 0\nvn 0 0 1\ng a b\nusemtl c\ns off\nl 1 2\np 1\n"
        + "\n".join(lines)
    )
    assert same_surface(read(content.encode()), BOX)
    assert same_surface(read(content.replace("\n", "\r").encode()), BOX)


def test_obj_far_behind_its_comments() -> None:
    content = b"# a long licence\n" * 20_000 + as_obj(BOX.vertices, BOX.faces.tolist())
    assert same_surface(read(content), BOX)


@pytest.mark.parametrize(
    "line, reason",
    [
        ("f 1 2", "2 corners"),
        ("f 0 1 2", "vertex 0"),
        ("f 1 2 -99", "back beyond"),
        ("f 1 2 99", "not among the 8"),
        ("v 1 2", "2 coordinates"),
        ("v 1 2 x", "'x' stands where"),
        ("f 1 2 x", "'x' stands where"),
    ],
)
def test_obj_that_is_damaged(line: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.obj"
    path.write_bytes(as_obj(BOX.vertices, BOX.faces.tolist()) + b"\n" + line.encode())
    with pytest.raises(zoo.InputError, match=rf"a\.obj.*{reason}"):
        media.read_shape(path)


# ------------------------------------------------------------------------------------------------------------------------ PLY


@pytest.mark.parametrize("order", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize("number", ["double", "float"])
@pytest.mark.parametrize("index", ["int", "uint", "ushort", "uchar", "short"])
def test_ply_of_every_order_and_type(order: str, number: str, index: str) -> None:
    for vertices, faces in (prism(np.array(HEXAGON)), (BOX.vertices, BOX.faces.tolist())):
        mesh = read(as_ply(vertices, faces, order, number, index))
        right = read(as_obj(vertices, faces))
        assert np.allclose(mesh.triangles, right.triangles, atol=1e-6) and media.is_closed(mesh)


def test_ply_may_end_lines_as_it_likes_and_begin_with_pages_of_comments() -> None:
    text = as_ply(BOX.vertices, BOX.faces.tolist())
    for end in (b"\r\n", b"\r"):
        assert same_surface(read(text.replace(b"\n", end)), BOX)
    # The first byte behind the header looks like the end of a line.
    binary = as_ply(BOX.vertices, BOX.faces.tolist(), "binary_little_endian").replace(b"end_header\n\x07", b"end_header\n\n")
    head, body = binary.rsplit(b"end_header\n", 1)
    assert same_surface(read(head.replace(b"\n", b"\r") + b"end_header\r" + body), BOX)
    assert same_surface(read(binary.replace(b"comment", b"comment much\n" * 9000 + b"comment", 1)), BOX)


@pytest.mark.parametrize("order", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_strips_of_triangles_begin_anew(order: str) -> None:
    ring = np.array(HEXAGON)
    vertices = np.concatenate([np.insert(ring, 2, height, axis=1) for height in (0, 1)])
    side = [corner for i in range(7) for corner in (i % 6, 6 + i % 6)]
    caps = [6, 7, 11, 8, 10, 9], [1, 0, 2, 5, 3, 4]
    strips = [*side, -1, *caps[0], -1, *caps[1], -1]
    header = (
        f"ply\nformat {order} 1.0\nelement vertex 12\nproperty float x\nproperty float y\nproperty float z\n"
        "element tristrips 1\nproperty list int int vertex_indices\nend_header\n"
    ).encode()
    if order == "ascii":
        rows = [" ".join(map(str, row)) for row in vertices.tolist()]
        body = "\n".join([*rows, f"{len(strips)} " + " ".join(map(str, strips))]).encode()
    else:
        end = "<" if order == "binary_little_endian" else ">"
        body = vertices.astype(end + "f4").tobytes() + np.array([len(strips), *strips], end + "i4").tobytes()
    mesh = read(header + body)
    assert len(mesh.faces) == 20 and media.is_closed(mesh)
    assert mesh.volume == pytest.approx(PRISM_VOLUME, rel=1e-5) and mesh.area == pytest.approx(PRISM_AREA, rel=1e-5)


def test_normals_that_a_ply_leaves_at_zero_are_none(caplog: pytest.LogCaptureFixture) -> None:
    sphere = trimesh.creation.icosphere(2)
    header = b"ply\nformat binary_little_endian 1.0\nelement vertex 162\n"
    header += b"".join(b"property float " + name + b"\n" for name in (b"x", b"y", b"z", b"nx", b"ny", b"nz")) + b"end_header\n"
    rows = np.concatenate([sphere.vertices, 0 * sphere.vertices], axis=1).astype("<f4")
    assert media.prepare_shape(header + rows.tobytes(), 162).normals.isfinite().all()
    assert "have no normals" in caplog.text


PLY_ERRORS = {
    "more vertices than bytes": (b"element vertex 8", b"element vertex 800000000", "truncated|max_faces"),
    "more faces than bytes": (b"element face 12", b"element face 40000000", "truncated"),
    "no such type": (b"property double x", b"property real x", "makes no sense"),
    "no axis": (b"property double y", b"property double w", "no property y"),
    "no format": (b"format binary_little_endian 1.0", b"comment", "no format"),
    "no list": (b"vertex_indices", b"edge", "no list vertex_indices"),
    "lengths that are no whole numbers": (b"list uchar", b"list float", "lengths"),
    "no end": (b"end_header", b"end", "no end"),
    "two of one name": (b"uchar red", b"uchar x", "one name"),
}


@pytest.mark.parametrize("case", PLY_ERRORS)
def test_ply_that_is_damaged(case: str) -> None:
    old, new, reason = PLY_ERRORS[case]
    content = as_ply(BOX.vertices, BOX.faces.tolist(), "binary_little_endian").replace(b"comment of end_header\n", b"")
    assert same_surface(read(content), BOX)
    with pytest.raises(zoo.InputError, match=f"shape bytes.*({reason})"):
        media.read_shape(content.replace(old, new))


# ------------------------------------------------------------------------------------------------------------------------ OFF


@pytest.mark.parametrize(
    "keyword, more",
    [
        ("OFF", ""),
        ("COFF", " 255 0 0 255"),
        ("NOFF", " 0 0 1"),
        ("CNOFF", " 0 0 1 0.5 0.5 0.5 1"),
        ("STOFF", " 0.1 0.2"),
        ("STCNOFF", " 0 0 1 9 9 9 1 0.1 0.2"),
    ],
)
@pytest.mark.parametrize("colour", ["", " 7", " 255 0 0", " 0.1 0.2 0.3 1.0"])
def test_off_of_every_keyword(keyword: str, more: str, colour: str) -> None:
    points = [f"{x} {y} {z}{more}  # a corner" for x, y, z in BOX.vertices]
    faces = ["3 " + " ".join(map(str, face)) + colour for face in BOX.faces]
    body = "\n".join(["", *points, "# faces", *faces])
    for counts in (
        f"{keyword}\n8 12 18",
        f"{keyword} 8 12 18",
        f"{keyword}\n\n# counts\n8 12",
        f"# made\n\n # here\n{keyword} # kind\n8 12 0",
    ):
        assert same_surface(read((counts + body).encode()), BOX)


def test_off_with_counts_at_the_keyword_and_with_any_lines() -> None:
    words = " ".join([f"{x} {y} {z}" for x, y, z in BOX.vertices] + ["3 " + " ".join(map(str, face)) for face in BOX.faces])
    assert same_surface(read(f"OFF\n8 12 0\n{words}".encode()), BOX)
    lines = as_off(BOX.vertices, BOX.faces.tolist())
    assert same_surface(read(lines.replace(b"OFF\n", b"OFF")), BOX)


@pytest.mark.parametrize(
    "head, reason",
    [
        ("4OFF", "4OFF"),
        ("nOFF", "nOFF"),
        ("OFF BINARY", "binary OFF"),
        ("OFF\n900000000 12 0", "truncated"),
        ("OFF\n8 -1 0", "claims"),
    ],
)
def test_off_that_cannot_be_read_is_named(head: str, reason: str) -> None:
    with pytest.raises(zoo.InputError, match=reason):
        media.read_shape(as_off(BOX.vertices, BOX.faces.tolist()).replace(b"OFF\n8 12 0", f"{head}\n8 12 0".encode()))


# ------------------------------------------------------------------------------------------------------------------------ STL


def test_stl_of_every_kind(tmp_path: Path) -> None:
    binary = trimesh.exchange.stl.export_stl(BOX)
    text = trimesh.exchange.stl.export_stl_ascii(BOX)
    for content in (
        binary,
        b"solid by an exporter".ljust(80) + binary[80:],
        text.encode(),
        text.upper().encode(),
        f"{text}\n{text}".encode(),
    ):
        assert read(content).volume == pytest.approx(2 if content.count(b"endsolid") == 2 else 1)
    trailing = tmp_path / "a.stl"
    trailing.write_bytes(binary + b"\0\0")
    assert same_surface(read(trailing), BOX)
    for cut in (binary[:-60], text.encode()[:-30], text.replace("endloop", "", 1).encode()):
        trailing.write_bytes(cut)
        with pytest.raises(zoo.InputError, match=r"a\.stl.*truncated or damaged STL"):
            media.read_shape(trailing)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"Kaydara FBX Binary  \x00\x1a\x00" + bytes(50), "FBX"),
        (b"PK\x03\x04" + bytes(50), "ZIP"),
        (b"0.1 0.2 0.3\n0.4 0.5 0.6\n", "numpy.loadtxt"),
        (b"3\n0.1 0.2 0.3 9\n0.4 0.5 0.6 9\n", "numpy.loadtxt"),
    ],
)
def test_other_formats_are_named(content: bytes, reason: str) -> None:
    with pytest.raises(zoo.InputError, match=f"not a shape file.*{reason}"):
        media.read_shape(content)


# ----------------------------------------------------------------------------------------------------------------- what is out


def inverted(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    mesh = mesh.copy()
    mesh.invert()
    return mesh


def ball(radius: float, *at: float) -> trimesh.Trimesh:
    return trimesh.creation.icosphere(2, radius).apply_translation(at or (0, 0, 0))


VOLUME = ball(1).volume


def test_inside_out_is_turned() -> None:
    right = media.prepare_shape(ball(1), 300)
    turned = media.prepare_shape(inverted(ball(1)), 300)
    assert torch.equal(turned.points, right.points) and torch.equal(turned.normals, right.normals)
    given = inverted(ball(1))
    faces = given.faces.copy()
    media.read_shape(given)
    assert np.array_equal(given.faces, faces)


def test_faces_are_wound_alike() -> None:
    mesh = ball(1)
    some = np.random.default_rng(0).random(len(mesh.faces)) < 0.4
    mixed = trimesh.Trimesh(mesh.vertices, np.where(some[:, None], mesh.faces[:, ::-1], mesh.faces), process=False)
    soup = trimesh.Trimesh(mixed.triangles.reshape(-1, 3), np.arange(mixed.faces.size).reshape(-1, 3), process=False)
    assert read(mixed).volume == pytest.approx(VOLUME) and read(soup).volume == pytest.approx(VOLUME)


def test_hollows_stay_hollow() -> None:
    right = trimesh.util.concatenate([ball(1), inverted(ball(0.5)), ball(0.2)])
    assert np.array_equal(read(right).faces, right.faces)
    hollow = VOLUME * (1 - 0.5**3 + 0.2**3)
    assert read(inverted(right)).volume == pytest.approx(hollow)
    beside = trimesh.util.concatenate([inverted(right), ball(0.5, 3, 0, 0), inverted(ball(1, 0, 4, 0))])
    assert read(beside).volume == pytest.approx(hollow + VOLUME * (0.5**3 + 1))


def test_parts_that_touch_or_cross() -> None:
    faces = trimesh.util.concatenate([BOX, BOX.copy().apply_translation([1, 0, 0])])
    edges = trimesh.util.concatenate([BOX, BOX.copy().apply_translation([1, 1, 0])])
    soup = trimesh.Trimesh(edges.triangles.reshape(-1, 3), np.arange(edges.faces.size).reshape(-1, 3), process=False)
    for mesh in (faces, edges, soup):
        assert read(inverted(mesh)).volume == pytest.approx(2)
    crossed = trimesh.util.concatenate([ball(1), inverted(ball(1, 0.8, 0, 0))])
    assert read(crossed).volume == pytest.approx(2 * VOLUME)


def test_open_and_one_sided_surfaces_stay_as_they_are() -> None:
    whole = ball(1)
    bowl = trimesh.Trimesh(whole.vertices, whole.faces[whole.triangles_center[:, 2] < 0][:, ::-1], process=False)
    both_sides = trimesh.Trimesh(whole.vertices, np.concatenate([whole.faces, whole.faces[:, ::-1]]), process=False)
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    edges = []
    for across in (-0.3, 0.3):
        radius = 1 + across * np.cos(angle / 2)
        edges.append(np.stack([radius * np.cos(angle), radius * np.sin(angle), across * np.sin(angle / 2)], axis=1))
    faces = []
    for i in range(60):
        a, b, c, d = i, 60 + i, *((i + 1, 61 + i) if i < 59 else (60, 0))
        faces += [[a, c, b], [b, c, d]]
    moebius = trimesh.Trimesh(np.concatenate(edges), faces, process=False)
    for mesh in (bowl, both_sides, moebius):
        assert np.array_equal(read(mesh).faces, mesh.faces)


# ------------------------------------------------------------------------------------------------------ the same shape anywhere


@pytest.mark.parametrize("place", [(5e6, 0, 0), (5e6, -5e6, 5e6), (2.0**40, 0, 0)])
def test_far_from_the_origin(place: tuple[float, float, float]) -> None:
    # Coordinates of few digits, so that they are the same numbers there.
    torus = trimesh.creation.torus(0.7, 0.3)
    torus = trimesh.Trimesh(np.round(torus.vertices * 1024) / 1024, torus.faces, process=False)
    far = trimesh.Trimesh(torus.vertices + place, torus.faces, process=False)
    right = media.prepare_shape(torus, 500)
    for source in (
        far,
        as_obj(far.vertices, far.faces.tolist()),
        as_ply(far.vertices, far.faces.tolist(), "binary_big_endian"),
    ):
        found = media.prepare_shape(source, 500)
        assert torch.equal(found.points, right.points) and torch.equal(found.normals, right.normals)
        assert found.meta["scale"] == right.meta["scale"]
        assert (found.meta["x"], found.meta["y"], found.meta["z"]) == tuple(np.float32(place).tolist())
    document = Document()
    positions, indices = document.positions(torus.vertices), document.indices(torus.faces)
    document.node(mesh=document.mesh({"attributes": {"POSITION": positions}, "indices": indices}), translation=list(place))
    assert torch.equal(media.prepare_shape(document.glb(), 500).points, right.points)
    points = torus.vertices, torus.vertex_normals
    cloud = media.prepare_shape((points[0] + place, points[1]), 500)
    assert torch.equal(cloud.points, media.prepare_shape(points, 500).points)
    assert media.is_closed(far)


def test_ids_are_equal_far_from_the_origin() -> None:
    torus = trimesh.creation.torus(0.7, 0.3)
    tokenizer = zoo.load("vat-tiny")
    tokens = tokenizer.encode([torus, torus.copy().apply_translation([5e6, 0, 0]), torus.copy().apply_scale(1e-6)])
    assert torch.equal(tokens.ids[0], tokens.ids[1]) and torch.equal(tokens.ids[0], tokens.ids[2])


def test_closed_at_any_size() -> None:
    for size in (1e-12, 1e-6, 1e6, 1e12):
        assert media.is_closed(BOX.copy().apply_scale(size).apply_translation([3 * size, 0, 0]))


# --------------------------------------------------------------------------------------------------------------------- colours


@pytest.mark.parametrize("largest", [255, 1.0])
def test_colours_are_no_normals(largest: float, caplog: pytest.LogCaptureFixture) -> None:
    sphere = trimesh.creation.icosphere(3)
    colours = np.random.default_rng(0).random((len(sphere.vertices), 3)) * largest
    colours[0] = 0
    found = media.prepare_shape(np.concatenate([sphere.vertices, np.round(colours, 2)], axis=1), 1000)
    assert "colours" in caplog.text
    bare = media.prepare_shape(sphere.vertices, 1000)
    assert torch.equal(found.points, bare.points) and torch.equal(found.normals, bare.normals)
    normals = np.concatenate([sphere.vertices, sphere.vertex_normals], axis=1)
    assert np.allclose(media.prepare_shape(normals, 1000).normals, sphere.vertex_normals, atol=1e-6)
    octant = normals[(normals[:, 3:] >= 0).all(1)]
    assert np.allclose(media.prepare_shape(np.tile(octant, (2, 1)), 1000).normals[: len(octant)], octant[:, 3:], atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- damaged and huge


def small_files() -> dict[str, bytes]:
    document = Document()
    document.node(mesh=document.box())
    document.glb()
    document.json["buffers"][0]["uri"] = "data:;base64," + base64.b64encode(document.binary).decode()
    made = {
        "embedded.gltf": json.dumps(document.json).encode(),
        "a.obj": as_obj(*prism(L_SHAPE)),
        "a.off": as_off(*prism(L_SHAPE)),
        "text.ply": as_ply(*prism(L_SHAPE)),
        "big.ply": as_ply(*prism(L_SHAPE), "binary_big_endian"),
        "binary.stl": trimesh.exchange.stl.export_stl(BOX),
        "text.stl": trimesh.exchange.stl.export_stl_ascii(BOX).encode(),
    }
    return made | {path.name: path.read_bytes() for path in sorted(CASES.iterdir())}


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    """A file with a few bytes changed, digits made larger, or a piece cut out or doubled."""
    changed = bytearray(content)
    for _ in range(int(random.integers(1, 5))):
        at, what = int(random.integers(len(changed))), int(random.integers(5))
        if what == 0:
            changed[at] = int(random.integers(256))
        elif what == 1:
            changed[at : at + 4] = random.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\x80", b"\0\0\0\0"])
        elif what == 2:
            del changed[at : at + int(random.integers(1, 40))]
        elif what == 3:
            changed[at:at] = changed[at : at + int(random.integers(1, 40))]
        else:
            digits = [place for place, byte in enumerate(changed) if 48 <= byte < 58]
            if digits:
                place = int(random.choice(digits))
                changed[place:place] = random.choice([b"9", b"99999999", b"-", b"1e"])
        if not changed:
            break
    return bytes(changed)


# Packages that extras bring, or the extension of glTF that they unpack, as errors name them.
PACKAGES = {"manifold3d": "manifold3d", "DracoPy": "KHR_draco_mesh_compression", "meshoptimizer": "EXT_meshopt_compression"}


def try_mutations(count: int) -> None:
    """Read mutated files: what cannot be read is an `InputError`. Run in a process of its own, whose memory is measured."""
    random = np.random.default_rng(count)
    for content in small_files().values():
        try:
            media.read_shape(content)
        except MissingReaderError as error:
            assert any(named in str(error) for package, named in PACKAGES.items() if find_spec(package) is None), error
        for _ in range(count):
            with suppress(zoo.InputError):
                media.read_shape(mutated(content, random))


@pytest.mark.parametrize("count", [40, pytest.param(3000, marks=pytest.mark.slow)])
def test_damaged_files_are_refused_within_bounds(count: int) -> None:
    peak = "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss"
    code = (
        f"import resource, test_shape_files as t; t.try_mutations(1); start = {peak}; "
        f"t.try_mutations({count}); print(({peak} - start) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < 100

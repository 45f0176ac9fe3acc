#!/usr/bin/env bash
# trimesh 5.2.0 reads glTF accessors as if neither `normalized` nor `sparse` were there, without an error or a warning.
#
# Both are valid glTF 2.0. Normalised int16 positions come with the extension KHR_mesh_quantization, which the file lists as
# required, so that a reader without it has to refuse the file; sparse accessors belong to the core of the format.
# Seen: positions that stand for [-1, 1] come out as [-32767, 32767], and the four vertices that a sparse accessor moves to x = 5
# stay at 0.5. Expected: 1 and 5 (a reader that lacks the extension: an error for the first file).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "trimesh==5.2.0" "numpy==2.4.6"
"$work/venv/bin/python" - <<'PYTHON'
import json
import struct

import numpy as np
import trimesh

box = trimesh.creation.box((1, 1, 1))


def glb(positions, accessor, more=b"", views=(), required=()):
    faces = box.faces.astype("<u2").tobytes()
    binary = positions + faces + more
    document = {
        "asset": {"version": "2.0"},
        "extensionsUsed": list(required),
        "extensionsRequired": list(required),
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}],
        "accessors": [
            {"bufferView": 0, "count": 8, "type": "VEC3", **accessor},
            {"bufferView": 1, "componentType": 5123, "count": 36, "type": "SCALAR"},
        ],
        "bufferViews": [
            {"buffer": 0, "byteOffset": 0, "byteLength": len(positions), "target": 34962, **({"byteStride": 8} if required else {})},
            {"buffer": 0, "byteOffset": len(positions), "byteLength": len(faces), "target": 34963},
            *views,
        ],
        "buffers": [{"byteLength": len(binary)}],
    }
    if not required:
        del document["extensionsUsed"], document["extensionsRequired"]
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    binary += b"\0" * (-len(binary) % 4)
    body = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(binary), b"BIN\0") + binary
    return struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body


def highest(content):
    scene = trimesh.load_scene(trimesh.util.wrap_as_stream(content), file_type="glb")
    return float(scene.bounds[1][0])


rows = np.zeros((8, 4), "<i2")
rows[:, :3] = np.sign(box.vertices) * 32767
ends = {"min": [-32767] * 3, "max": [32767] * 3}
accessor = {"componentType": 5122, "normalized": True, **ends}
normalised = highest(glb(rows.tobytes(), accessor, required=["KHR_mesh_quantization"]))

base = box.vertices.astype("<f4").tobytes()
moved = np.flatnonzero(box.vertices[:, 0] > 0).astype("<u2")
values = box.vertices[moved].astype("<f4")
values[:, 0] = 5
start = len(base) + box.faces.size * 2
sparse = {"count": 4, "indices": {"bufferView": 2, "componentType": 5123}, "values": {"bufferView": 3}}
views = [
    {"buffer": 0, "byteOffset": start, "byteLength": 8},
    {"buffer": 0, "byteOffset": start + 8, "byteLength": 48},
]
accessor = {"componentType": 5126, "sparse": sparse, "min": [-0.5] * 3, "max": [5, 0.5, 0.5]}
replaced = highest(glb(base, accessor, moved.tobytes() + values.tobytes(), views))

print(f"trimesh {trimesh.__version__}")
print(f"normalised int16, highest x: {normalised:g} (right: 1)")
print(f"sparse, highest x: {replaced:g} (right: 5)")
assert (normalised, replaced) == (32767, 0.5), "the behaviour has changed"
PYTHON

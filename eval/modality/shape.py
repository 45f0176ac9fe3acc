"""Shape metrics: how far a decoded mesh is from its original.

Meshes are compared in a frame in which the original's bounding box is centred and its longest edge is 1.9 long, so that
thresholds mean the same for all. Distances are those of 100,000 points drawn uniformly by area on each surface, with a fixed
seed. What concerns the inside is undefined for an original that is not closed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zoo.errors import InputError
from zoo.eval.modality.base import Metric, MetricFunction, Row, Variant
from zoo.eval.modality.turntable import as_webp, turntable
from zoo.media import SHAPE_EXTENSIONS, contains, is_closed, read_shape
from zoo.media.shape import EXTENT, Cloud, bounds
from zoo.spec import Spec

if TYPE_CHECKING:
    import trimesh

Vectors = NDArray[np.float64]
Inside = NDArray[np.bool_]

#: Points on each surface, and in space.
COUNT = 100_000
#: Spread of the points about a surface.
NEAR = 0.02
#: Distances within which a point of one surface counts as found on the other; the first one is the headline's.
THRESHOLDS = (0.02, 0.01, 0.05)

EXTENSIONS = SHAPE_EXTENSIONS
BASELINE = "occupancy grid of the same bits"
NOTES = (
    "Compared in a frame in which the original's longest edge is 1.9: distances of 100,000 points on each surface, occupancy "
    "at 100,000 points in the frame or about the surface. The baseline spends its bits on a grid over the cube of that edge, "
    "one on each cell: cells that are more than half inside are set, and the surface is drawn smoothly about them. Like the "
    "tokens, it gets the cube's place and size for nothing. What concerns the inside is undefined for an open original."
)
TEMPLATE = "shape.html.j2"
ON_DEVICE = False

_SEED = 0
# Points along each side of a cell of the baseline that say how much of it is inside.
_SUBDIVISION = 4


# ----------------------------------------------------------------------------------------------------------------- metrics


@dataclass(frozen=True)
class Distances:
    """Distances of the points of two surfaces from each other; empty where a surface has none.

    Attributes:
        to_estimate: distance of each of the reference's points to the nearest one of the estimate.
        to_reference: the other way round.
        alignment: absolute cosines of the normals of both kinds of pairs.
    """

    to_estimate: Vectors
    to_reference: Vectors
    alignment: Vectors


def cloud_distances(reference: Vectors, estimate: Vectors) -> tuple[Vectors, NDArray[np.int64]]:
    """Distance of each point ``[points, 3]`` of the reference to the nearest of the estimate, and which one that is."""
    from scipy.spatial import cKDTree

    distance, index = cKDTree(estimate).query(reference, workers=-1)
    return distance, index


def f_score_of(distances: Distances, threshold: float) -> float:
    """Harmonic mean of the shares of points of either surface that lie within a threshold of the other."""
    if not len(distances.to_reference):
        return 0.0
    recall, precision = ((part < threshold).mean() for part in (distances.to_estimate, distances.to_reference))
    return float(2 * recall * precision / (recall + precision)) if recall + precision else 0.0


def chamfer_of(distances: Distances) -> float | None:
    """Mean distance of either surface's points to the other, added up and not squared."""
    if not len(distances.to_reference):
        return None
    return float(distances.to_estimate.mean() + distances.to_reference.mean())


def f_score(reference: trimesh.Trimesh, estimate: trimesh.Trimesh, *, threshold: float = THRESHOLDS[0]) -> float:
    """`f_score_of` the two surfaces; 0 for an empty estimate."""
    return f_score_of(_distances(reference, estimate), threshold)


def chamfer(reference: trimesh.Trimesh, estimate: trimesh.Trimesh) -> float | None:
    """`chamfer_of` the two surfaces; undefined for an empty estimate."""
    return chamfer_of(_distances(reference, estimate))


def normal_consistency(reference: trimesh.Trimesh, estimate: trimesh.Trimesh) -> float | None:
    """Mean absolute cosine of the normals of nearest points; undefined for an empty estimate."""
    alignment = _distances(reference, estimate).alignment
    return float(alignment.mean()) if len(alignment) else None


def volume_iou(reference: trimesh.Trimesh, estimate: trimesh.Trimesh) -> float | None:
    """Intersection over union of the insides, by points of [-1, 1]."""
    return iou(*inside) if (inside := _insides(reference, estimate, near=False)) else None


def near_iou(reference: trimesh.Trimesh, estimate: trimesh.Trimesh) -> float | None:
    """Intersection over union of the insides, by points about the reference's surface."""
    return iou(*inside) if (inside := _insides(reference, estimate, near=True)) else None


def near_accuracy(reference: trimesh.Trimesh, estimate: trimesh.Trimesh) -> float | None:
    """Share of points about the reference's surface that lie on the right side of the estimate's."""
    inside = _insides(reference, estimate, near=True)
    return float((inside[0] == inside[1]).mean()) if inside else None


def iou(reference: Inside, estimate: Inside) -> float:
    """Intersection over union of two sets of points; 1 for two empty ones."""
    union = int((reference | estimate).sum())
    return int((reference & estimate).sum()) / union if union else 1.0


def sample(mesh: trimesh.Trimesh, count: int) -> tuple[Vectors, Vectors]:
    """Points ``[count, 3]`` drawn uniformly by area, and the unit normals of their faces."""
    from trimesh.sample import sample_surface

    points, faces = sample_surface(mesh, count, seed=_SEED)
    corners = mesh.triangles[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    return np.asarray(points), normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-300)


# The metrics of a reconstruction and of its baseline are asked for in turn, and most of them start from the same.
@lru_cache(maxsize=2)
def _distances(reference: trimesh.Trimesh, estimate: trimesh.Trimesh) -> Distances:
    if not len(estimate.faces):
        return Distances(*[np.zeros(0)] * 3)
    (points, normals), (other_points, other_normals) = _sampled_reference(reference), sample(estimate, COUNT)
    to_estimate, found = cloud_distances(points, other_points)
    to_reference, found_back = cloud_distances(other_points, points)
    pairs = ((normals, other_normals[found]), (other_normals, normals[found_back]))
    alignment = np.concatenate([np.abs((left * right).sum(1)) for left, right in pairs])
    return Distances(to_estimate, to_reference, alignment)


@lru_cache(maxsize=1)
def _sampled_reference(reference: trimesh.Trimesh) -> tuple[Vectors, Vectors]:
    return sample(reference, COUNT)


@lru_cache(maxsize=2)
def _reference_points(reference: trimesh.Trimesh, near: bool) -> tuple[Vectors, Inside] | None:
    """Points in the frame or about the surface, and which of them are inside; ``None`` if nothing is."""
    if not is_closed(reference):
        return None
    random = np.random.default_rng(_SEED)
    if near:
        surface, _ = _sampled_reference(reference)
        points = surface + NEAR * random.standard_normal(surface.shape)
    else:
        points = random.uniform(-1, 1, (COUNT, 3))
    return points, contains(reference, points)


@lru_cache(maxsize=2)
def _insides(reference: trimesh.Trimesh, estimate: trimesh.Trimesh, *, near: bool) -> tuple[Inside, Inside] | None:
    """Which of the reference's points are inside of each."""
    found = _reference_points(reference, near)
    return None if found is None else (found[1], contains(estimate, found[0]))


METRICS: Mapping[str, Metric] = {
    "f_score": Metric("F-score", "", True, f_score, "points within 0.02 of the other surface, harmonic mean of both shares"),
    "f_score_01": Metric("F-score at 0.01", "", True, partial(f_score, threshold=THRESHOLDS[1]), "the same within 0.01"),
    "f_score_05": Metric("F-score at 0.05", "", True, partial(f_score, threshold=THRESHOLDS[2]), "the same within 0.05"),
    "chamfer": Metric(
        "Chamfer", "", False, chamfer, "mean distance to the nearest point of the other surface, both ways, added"
    ),
    "normal_consistency": Metric(
        "normal consistency", "", True, normal_consistency, "mean absolute cosine of the normals of nearest points"
    ),
    "iou": Metric("volume IoU", "", True, volume_iou, "intersection over union of the insides"),
    "near_iou": Metric("near IoU", "", True, near_iou, "the same among points about the surface, sigma 0.02"),
    "near_accuracy": Metric("near accuracy", "", True, near_accuracy, "share of those points on the right side"),
}


# ---------------------------------------------------------------------------------------------------------------- baseline


def coarse_grid(mesh: trimesh.Trimesh, bits: int) -> trimesh.Trimesh:
    """The mesh of a grid of at most ``bits`` cells over the cube of the longest edge, each of them inside or outside.

    A cell of a closed mesh is inside if more than half of it is; for a thin shape, if it holds at least half of what the
    fullest cell does. Where the mesh has no inside or none that is found, cells that the surface passes count.
    """
    import trimesh as tm
    from skimage.measure import marching_cubes

    lower, upper = bounds(mesh)
    side, edge = grid_side(bits), (upper - lower).max()
    corner, cell = (lower + upper - edge) / 2, edge / side
    share = _shares(mesh, corner, cell, side)
    volume = np.pad(share > min(0.5, share.max() / 2), 1).astype(np.float32)
    if not volume.any():
        return tm.Trimesh()
    vertices, faces, _, _ = marching_cubes(volume, 0.5, gradient_direction="ascent")
    # Values stand at the middles of cells, the first of which is padding.
    return tm.Trimesh(corner + (vertices - 0.5) * cell, faces, process=False)


def grid_side(bits: int) -> int:
    """Cells along each side of the largest cube of at most ``bits`` cells."""
    return max(side for side in range(1, bits + 1) if side**3 <= bits)


def _shares(mesh: trimesh.Trimesh, corner: Vectors, cell: float, side: int) -> Vectors:
    """How much of each cell is inside, from 0 to 1; whether the surface passes it where nothing is."""
    if is_closed(mesh):
        axis = (np.arange(side * _SUBDIVISION) + 0.5) * cell / _SUBDIVISION
        points = corner + np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
        inside = contains(mesh, points)
        if inside.any():
            share: Vectors = inside.reshape((side, _SUBDIVISION) * 3).mean((1, 3, 5))
            return share
    passed = np.zeros((side, side, side))
    indices = ((_sampled_reference(mesh)[0] - corner) / cell).astype(np.int64).clip(0, side - 1)
    passed[tuple(indices.T)] = 1
    return passed


# ---- what the run asks: see `zoo.eval.modality.base`


def read(path: str, spec: Spec, options: Mapping[str, Any]) -> trimesh.Trimesh:
    """A mesh of the data set in the frame of comparison; tokens of it describe it there.

    Raises:
        InputError: it cannot be read, or has points only.
    """
    import trimesh as tm

    mesh = read_shape(path)
    if isinstance(mesh, Cloud):
        raise InputError(f"{path} holds points only, and there is no surface to compare with")
    lower, upper = bounds(mesh)
    vertices = (mesh.vertices - (lower + upper) / 2) * (EXTENT / (upper - lower).max())
    return tm.Trimesh(vertices, mesh.faces, process=False)


def comparable(decoded: trimesh.Trimesh, reference: trimesh.Trimesh) -> trimesh.Trimesh:
    """The decoded mesh as it is: it lies where the reference does."""
    return decoded


def properties(reference: trimesh.Trimesh, spec: Spec) -> dict[str, Any]:
    """Faces, and whether there is an inside."""
    return {"faces": len(reference.faces), "closed": is_closed(reference)}


def baseline(reference: trimesh.Trimesh, spec: Spec, bits: int) -> trimesh.Trimesh:
    """The occupancy grid of that many bits."""
    return coarse_grid(reference, bits)


def measure(function: MetricFunction, spec: Spec, *signals: trimesh.Trimesh) -> Any:
    """The function of meshes."""
    return function(*signals)


def tokens_per(rows: Sequence[Row], spec: Spec) -> dict[str, float]:
    """Tokens per shape."""
    return {"shape": sum(row["tokens"] for row in rows) / len(rows)} if rows else {}


def totals(rows: Sequence[Row]) -> dict[str, Any]:
    """Number of closed shapes, tokens of each where all have the same, and seconds of work per shape."""
    speed = {
        f"{direction}_seconds_per_shape": sum(row[f"{direction}_seconds"] for row in rows) / len(rows) if rows else None
        for direction in ("encode", "decode")
    }
    tokens = {row["tokens"] for row in rows}
    return {
        "closed": sum(row["closed"] for row in rows),
        "tokens_per_shape": tokens.pop() if len(tokens) == 1 else None,
        "speed": speed,
    }


def heading(summary: Mapping[str, Any]) -> str:
    """Tokens and bytes of a shape."""
    count = summary["tokens_per_shape"]
    if not count:
        return "shapes of several token counts"
    return f"{count} tokens or {_bytes(count, summary)} bytes per shape"


def tiles(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rates and speed."""
    found = []
    if count := summary["tokens_per_shape"]:
        bits = summary["tokenizer"]["bits_per_token"]
        found += [(f"{_bytes(count, summary)}", "bytes per shape"), (f"{count}", f"tokens per shape, {bits} bits each")]
    for direction, name in (("encode", "to encode"), ("decode", "to decode")):
        if seconds := summary["speed"][f"{direction}_seconds_per_shape"]:
            found.append((f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms", f"{name} a shape"))
    return found


def shown(reference: trimesh.Trimesh, variants: Sequence[Variant], spec: Spec) -> dict[str, Any]:
    """The original, and the reconstruction beside the grid of the same bits for every prefix, all of them turning."""
    frames = []
    for variant in variants:
        frames.append(
            {
                "tokens": variant.tokens,
                "decoded": as_webp(turntable(variant.decoded)),
                "baseline": as_webp(turntable(coarse_grid(reference, variant.bits))),
                "layout": f"{grid_side(variant.bits)}³ cells",
                "figures": variant.figures,
                "baseline_figures": variant.baseline_figures,
            }
        )
    size = -(-variants[-1].bits // 8)
    return {
        "caption": f"{len(reference.faces)} faces, {variants[-1].tokens} tokens, {size} bytes",
        "original": as_webp(turntable(reference)),
        "frames": frames,
    }


def _bytes(tokens: int, summary: Mapping[str, Any]) -> int:
    return -(-tokens * int(summary["tokenizer"]["bits_per_token"]) // 8)

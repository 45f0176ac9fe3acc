"""A field to a closed mesh: evaluated where the surface may be, then marching cubes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

#: Values of a field at the nodes of a grid; positive inside.
GridFunction = Callable[[Int[Tensor, "nodes 3"]], Float[Tensor, " nodes"]]
Volume = Float[Tensor, "_x _y _z"]
Mask = Bool[Tensor, "_x _y _z"]

# Cells that the coarsest grid keeps along each side at high resolutions, and how much coarser it is at low ones.
_COARSE_CELLS = 64
_COARSEST_STRIDE = 4
# A cell is refined, too, if its values come this close to zero, as a share of their spread: the surface may dip into it.
_MARGIN = 0.25
_SLAB = 32


def extract(field: GridFunction, resolution: int, *, dense: bool = False) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """The surface where a field is zero: vertices ``[vertices, 3]`` in [-1, 1] and faces ``[faces, 3]`` that look outwards.

    The outermost nodes count as outside, so the surface is closed. Both arrays are empty where nothing is inside.

    Args:
        field: values at nodes of a grid over [-1, 1], where -1 + 2 i / resolution is node i.
        resolution: cells along each side; 5 bytes of memory are held per node.
        dense: evaluate every node. Without it, cells of a coarse grid are refined where the surface passes or comes close, and
            wherever it leads from there. Only a part within one coarse cell, with no sign of it at the corners, is lost.
    """
    from skimage.measure import marching_cubes

    values = evaluate(field, resolution, dense=dense)
    if not bool((values > 0).any()):
        return np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32)
    # Values are positive inside, which scikit-image calls ascent; the other way round faces would look inwards.
    vertices, faces, _, _ = marching_cubes(values.numpy(), 0.0, gradient_direction="ascent")
    return (-1 + 2 * vertices / resolution).astype(np.float32), faces


def evaluate(field: GridFunction, resolution: int, *, dense: bool = False) -> Volume:
    """Values at all nodes of a grid; without ``dense`` those far from the surface are interpolated, but of the right sign."""
    field = _closed(field, resolution)
    stride = 1 if dense else coarsest_stride(resolution)
    values = torch.empty((resolution // stride + 1,) * 3, dtype=torch.float32, device="cpu")
    _fill(values, torch.ones(1, 1, 1, dtype=torch.bool, device="cpu").expand(values.shape), field, stride)
    known = torch.ones(values.shape, dtype=torch.bool, device="cpu")
    while stride > 1:
        stride //= 2
        values, known = _refined(values, known, field, stride)
        while _follow_surface(values, known, field, stride):
            pass
    return values


def coarsest_stride(resolution: int) -> int:
    """Nodes of the grid from one node of the coarsest grid to the next."""
    stride = 1
    while resolution % (2 * stride) == 0 and 2 * stride <= max(_COARSEST_STRIDE, resolution // _COARSE_CELLS):
        stride *= 2
    return stride


def _closed(field: GridFunction, resolution: int) -> GridFunction:
    """The field with its outermost nodes outside, and as far outside as they were inside."""

    def closed(nodes: Int[Tensor, "nodes 3"]) -> Float[Tensor, " nodes"]:
        values = field(nodes).float().cpu()
        outermost = ((nodes == 0) | (nodes == resolution)).any(1).cpu()
        return torch.where(outermost, -values.abs(), values)

    return closed


def _fill(values: Volume, wanted: Mask, field: GridFunction, stride: int, first: int = 0) -> None:
    """Evaluate the wanted nodes, a bounded number at a time; ``first`` is the x that the values start from."""
    for x in range(values.shape[0]):
        nodes = wanted[x].nonzero()
        if len(nodes):
            place = torch.full_like(nodes[:, :1], first + x)
            values[x][wanted[x]] = field(torch.cat([place, nodes], dim=1) * stride)


def _refined(values: Volume, known: Mask, field: GridFunction, stride: int) -> tuple[Volume, Mask]:
    """The next finer grid, evaluated within cells that look promising and interpolated elsewhere, and what is known of it."""
    wanted = _corners(_halved(_promising(values)))
    size = [2 * side - 1 for side in values.shape]
    finer = F.interpolate(values[None, None], size, mode="trilinear", align_corners=True)[0, 0]
    finer[::2, ::2, ::2] = values
    finer_known = torch.zeros(finer.shape, dtype=torch.bool, device="cpu")
    finer_known[::2, ::2, ::2] = known
    _fill(finer, wanted & ~finer_known, field, stride)
    return finer, finer_known.logical_or_(wanted)


def _promising(values: Volume) -> Mask:
    """Cells that the surface passes, or whose values come close to zero for how much they vary."""
    largest = F.max_pool3d(values[None, None], 2, stride=1)[0, 0]
    smallest = -F.max_pool3d(-values[None, None], 2, stride=1)[0, 0]
    nearest = torch.minimum(largest.abs(), smallest.abs())
    return ((smallest <= 0) & (largest > 0)) | (nearest <= _MARGIN * (largest - smallest))


def _follow_surface(values: Volume, known: Mask, field: GridFunction, stride: int) -> bool:
    """Evaluate the corners of cells that the surface passes; returns whether it led to any that were unknown."""
    led_on = False
    # Slabs keep what is in memory besides the grid small.
    for first in range(0, values.shape[0] - 1, _SLAB):
        slab = slice(first, first + _SLAB + 1)
        inside = values[slab] > 0
        wanted = _corners(_any_corner(inside) & _any_corner(~inside)) & ~known[slab]
        if bool(wanted.any()):
            _fill(values[slab], wanted, field, stride, first)
            known[slab] |= wanted
            led_on = True
    return led_on


def _any_corner(nodes: Mask) -> Mask:
    """Cells with a corner among the nodes."""
    for axis in range(3):
        count = nodes.shape[axis] - 1
        nodes = nodes.narrow(axis, 0, count) | nodes.narrow(axis, 1, count)
    return nodes


def _corners(cells: Mask) -> Mask:
    """Corners of cells."""
    for axis in range(3):
        edge = torch.zeros_like(cells.narrow(axis, 0, 1))
        cells = torch.cat([cells, edge], dim=axis) | torch.cat([edge, cells], dim=axis)
    return cells


def _halved(cells: Mask) -> Mask:
    """The eight cells of the next finer grid that make up each cell."""
    for axis in range(3):
        cells = cells.repeat_interleave(2, dim=axis)
    return cells

"""Normals of points that come without."""

from __future__ import annotations

import logging

import numpy as np

from zoo.media.shape.geometry import Vectors

_log = logging.getLogger("zoo")

# Points that a normal is estimated from.
_NEIGHBOURS = 16


def estimate_normals(points: Vectors) -> Vectors:
    """Estimate outward normals for a point cloud; orientation is a best guess.

    A normal is the direction in which the 16 nearest neighbours spread least. The normal at the point
    farthest from the centroid looks away from it. From there orientation is passed on along the tree of neighbours whose
    normals differ least (Hoppe et al. 1992).
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import breadth_first_order, connected_components, minimum_spanning_tree
    from scipy.spatial import cKDTree

    _log.warning("the points have no normals, so these are estimated; where surfaces are close, some may look inwards")
    neighbours = cKDTree(points).query(points, min(_NEIGHBOURS, len(points)))[1]
    around = points[neighbours]
    around = around - around.mean(1, keepdims=True)
    normals = np.linalg.eigh(np.einsum("nki,nkj->nij", around, around))[1][..., 0]
    rows, columns = np.repeat(np.arange(len(points)), neighbours.shape[1] - 1), neighbours[:, 1:].ravel()
    # An edge of weight zero would be none.
    bends = 1 + 1e-6 - np.abs((normals[rows] * normals[columns]).sum(1))
    tree = minimum_spanning_tree(csr_array((bends, (rows, columns)), shape=(len(points),) * 2))
    away = points - points.mean(0)
    distance = (away**2).sum(1)
    components, label = connected_components(tree, directed=False)
    for component in range(components):
        members = np.flatnonzero(label == component)
        root = members[distance[members].argmax()]
        if away[root] @ normals[root] < 0:
            normals[root] *= -1
        order, parents = breadth_first_order(tree, root, directed=False)
        for point in order[1:]:
            if normals[point] @ normals[parents[point]] < 0:
                normals[point] *= -1
    return normals

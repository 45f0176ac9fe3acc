"""The search of `zoo.kernels.codebook` for short vectors, in C: scores, their maximum and exact distances in one pass."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo.kernels import native
from zoo.kernels.screening import PreparedCodebook

# Queries that the kernel takes at a time; as in nearest.c.
_QUERIES = 128
# Widths up to which one pass is quicker than products of the library and their maxima.
_QUICK = {"float32": 40, "bfloat16x3": 64}


@functools.cache
def _longest() -> int:
    """Most numbers of a query in the form of the product; 0 where there is no kernel."""
    library = native.library("nearest.c")
    return 0 if library is None else int(library.zoo_nearest_longest())


@functools.cache
def has_matrix_units() -> bool:
    """Whether there is a kernel for matrix units, and this process may use them."""
    library = native.library("nearest.c")
    return library is not None and bool(library.zoo_nearest_matrix_units())


def quick(dim: int) -> bool:
    """Whether the kernel is the quickest way for codes of that many numbers."""
    return _longest() > 0 and dim <= _QUICK["bfloat16x3" if has_matrix_units() else "float32"]


def chosen(codebook: PreparedCodebook) -> Callable[..., Int[Tensor, " queries"]] | None:
    """`nearest` for this codebook; ``None`` where it has no kernel or another way is quicker."""
    if codebook.codes.device.type != "cpu" or codebook.operand.shape[1] > _longest():
        return None
    if codebook.screening == "bfloat16x3":
        return nearest if has_matrix_units() else None
    return nearest if codebook.screening == "float32" and codebook.codes.shape[1] <= _QUICK["float32"] else None


def nearest(
    x: Float[Tensor, "queries dim"],
    factors: Float[Tensor, "queries columns"],
    error: Float[Tensor, " queries"],
    codebook: PreparedCodebook,
) -> Int[Tensor, " queries"]:
    """Positions among the distinct codes of those nearest to finite queries; -1 where too many may be the nearest.

    Args:
        x: the queries.
        factors: their side of the screening product.
        error: bound on the error of any score of a query.
        codebook: what to search.
    """
    library: Any = native.library("nearest.c")
    function = library.zoo_nearest_float32 if codebook.screening == "float32" else library.zoo_nearest_bfloat16
    queries, dim = x.shape
    rows, columns = codebook.operand.shape
    # A score and the best one may both be wrong, and the window itself is rounded.
    window = (2.001 * error).contiguous()
    tensors = [tensor.contiguous() for tensor in (factors, codebook.operand, window, x, codebook.codes)]
    found = torch.empty(queries, dtype=torch.int64, device="cpu")
    if not queries:
        return found

    def of_blocks(first: int, last: int) -> None:
        function(
            *map(ctypes.c_int64, (first, last)),
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (*tensors, found)),
            *map(ctypes.c_int64, (queries, rows, columns, len(codebook.codes), dim, codebook.metric == "dot")),
        )

    native.over_rows(of_blocks, -(-queries // _QUERIES), queries * rows * columns)
    return found

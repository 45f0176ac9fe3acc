"""Choose items of a batch, as sequences and arrays are indexed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from zoo.errors import IndexingError


def positions(index: Any, count: int) -> list[int]:
    """The chosen positions, each in ``[0, count)``.

    Args:
        index: an integer of any library, a slice, several integers, or a mask of ``count`` booleans; the latter two as a list,
            an array or a tensor. Negative integers count from the end.
        count: items of the batch.

    Raises:
        IndexingError: it is something else, out of range, or a mask of another length.
    """
    if isinstance(index, slice):
        return list(range(count))[index]
    array = _as_array(index)
    if array.ndim == 1 and not len(array) and not isinstance(index, np.ndarray | Tensor):
        return []
    if array.dtype == np.bool_ and array.ndim == 1:
        if len(array) != count:
            raise IndexingError(f"a mask of {len(array)} does not suit a batch of {count}")
        return np.flatnonzero(array).tolist()
    if array.dtype.kind not in "iu" or array.ndim > 1:
        raise IndexingError(
            f"a batch is indexed by integers, a slice or a mask, not by {type(index).__name__} of {array.dtype} and shape "
            f"{array.shape}"
        )
    chosen = array.reshape(-1).tolist()
    for position in chosen:
        if not -count <= position < count:
            raise IndexingError(f"index {position} is out of range for a batch of {count}")
    return [position % count for position in chosen]


def _as_array(index: Any) -> NDArray[Any]:
    if isinstance(index, Tensor):
        return index.detach().cpu().numpy()
    if isinstance(index, str | bytes) or not (isinstance(index, Sequence | np.ndarray) or hasattr(index, "__index__")):
        raise IndexingError(f"a batch is indexed by integers, a slice or a mask, not by {type(index).__name__}")
    try:
        return np.asarray(index)
    except (TypeError, ValueError, OverflowError) as error:
        raise IndexingError(f"a batch cannot be indexed by this {type(index).__name__}: {error}") from error

"""Values that are computed from weights, and kept until the weights change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Derived(Generic[T]):
    """Keeps what was computed from tensors, and computes it again when one of them was written to or replaced.

    Writing through ``tensor.data`` is not noticed, as autograd does not notice it either. The value is neither pickled nor
    copied with the module that it belongs to.
    """

    def __init__(self) -> None:
        self._kept: tuple[list[tuple[Any, ...]], list[Tensor], T] | None = None

    def of(self, sources: Sequence[Tensor], compute: Callable[[], T]) -> T:
        """The value of ``compute``, which reads ``sources``."""
        state = [_state(source) for source in sources]
        kept = self._kept
        if kept is None or kept[0] != state or any(_rewritten(*pair) for pair in zip(kept[1], sources, strict=True)):
            # The tensors themselves are kept so that no later one can get their addresses; those whose writes are not counted
            # are copied.
            held = [source.clone() if source.is_inference() else source.detach() for source in sources]
            # The value may serve training later on, whatever the mode is now.
            with torch.inference_mode(False), torch.no_grad():
                kept = self._kept = (state, held, compute())
        return kept[2]

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": None}


def _state(source: Tensor) -> tuple[Any, ...]:
    version = None if source.is_inference() else source._version
    return source.data_ptr(), source.shape, source.stride(), source.dtype, source.device, version


def _rewritten(before: Tensor, source: Tensor) -> bool:
    """Whether a tensor whose writes are not counted holds other numbers than before."""
    return source.is_inference() and not torch.equal(before, source)

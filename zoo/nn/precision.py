"""Numbers that do not depend on the caller's precision settings."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_lock = threading.Lock()
_depth: dict[str, int] = {}
_saved: dict[str, list[tuple[Any, str]]] = {}


def _switches(device_type: str) -> list[Any]:
    """The objects whose ``fp32_precision`` decides how float32 products are computed on a device."""
    if device_type == "cuda":
        cudnn: Any = torch.backends.cudnn
        return [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]
    mkldnn: Any = torch.backends.mkldnn
    return [mkldnn.matmul, mkldnn.conv, mkldnn.rnn]


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Compute float32 products in float32: autocast, TF32 and bf16 shortcuts are off inside, and restored afterwards.

    The switches are global to the process, so nested and concurrent uses are counted: the first one in turns the shortcuts
    off and the last one out restores them.
    """
    kind = device.type
    with _lock:
        if _depth.get(kind, 0) == 0:
            changed = [(switch, switch.fp32_precision) for switch in _switches(kind)]
            _saved[kind] = [(switch, value) for switch, value in changed if value not in ("none", "ieee")]
            for switch, _ in _saved[kind]:
                switch.fp32_precision = "ieee"
        _depth[kind] = _depth.get(kind, 0) + 1
    try:
        with torch.autocast(kind, enabled=False):
            yield
    finally:
        with _lock:
            _depth[kind] -= 1
            if _depth[kind] == 0:
                for switch, value in _saved.pop(kind):
                    switch.fp32_precision = value


def compute_dtype(layer: nn.Module) -> torch.dtype:
    """The type that a layer computes in; of one with packed weights without decoding them."""
    own = layer.compute_dtype if hasattr(layer, "compute_dtype") else layer.weight.dtype
    assert isinstance(own, torch.dtype)
    return own


class Float32Module(nn.Module):
    """A module whose parameters never go below float32: ``.to(torch.bfloat16)`` moves it but leaves its precision alone.

    Encoders are kept this way because ids flip when their weights are rounded.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Module:
        def at_least_float32(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return fn(tensor)
            probe = fn(tensor.new_empty(0))
            return fn(tensor) if probe.dtype.itemsize >= 4 else tensor.to(probe.device)

        return super()._apply(at_least_float32, recurse)

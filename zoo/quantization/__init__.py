"""Low-bit models: ``zoo.quantize(model, "fp4-e2m1")``, in place, with packed weights and kernels that read them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.quantization.conversion import quantize
    from zoo.quantization.learned import LearningConfig
    from zoo.quantization.methods import names
    from zoo.quantization.packed import load, save, set_resident
    from zoo.quantization.policy import Policy, plan
    from zoo.quantization.report import LayerReport

_HOMES = {
    "LayerReport": "zoo.quantization.report",
    "LearningConfig": "zoo.quantization.learned",
    "Policy": "zoo.quantization.policy",
    "load": "zoo.quantization.packed",
    "names": "zoo.quantization.methods",
    "plan": "zoo.quantization.policy",
    "quantize": "zoo.quantization.conversion",
    "save": "zoo.quantization.packed",
    "set_resident": "zoo.quantization.packed",
}

__all__ = ["LayerReport", "LearningConfig", "Policy", "load", "names", "plan", "quantize", "save", "set_resident"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zoo.quantization' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

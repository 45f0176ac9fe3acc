"""Low-bit models: ``zoo.quantize(model, "fp4-e2m1")``, in place, with packed weights and kernels that read them.

The package is the function: ``zoo.quantize(...)`` is `zoo.quantize.conversion.quantize`, and the modules are where they are,
``from zoo.quantize.fp import round_to``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.quantize.conversion import quantize
    from zoo.quantize.learned import LearningConfig
    from zoo.quantize.methods import names
    from zoo.quantize.packed import load, save
    from zoo.quantize.policy import Policy, plan
    from zoo.quantize.report import LayerReport

_HOMES = {
    "LayerReport": "zoo.quantize.report",
    "LearningConfig": "zoo.quantize.learned",
    "Policy": "zoo.quantize.policy",
    "load": "zoo.quantize.packed",
    "names": "zoo.quantize.methods",
    "plan": "zoo.quantize.policy",
    "quantize": "zoo.quantize.conversion",
    "save": "zoo.quantize.packed",
}

__all__ = ["LayerReport", "LearningConfig", "Policy", "load", "names", "plan", "quantize", "save"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zoo.quantize' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


class _CallablePackage(ModuleType):
    """A package that can be called like the function it is named after."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return import_module("zoo.quantize.conversion").quantize(*args, **settings)


sys.modules[__name__].__class__ = _CallablePackage

"""Former names of modules, functions and classes. They work until the next release, with a `DeprecationWarning`.

`MODULES` maps a former module to its present name, and `names_of` gives a module the names that moved out of it. Whatever is
listed here is deleted with the release after the one that moved it.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

#: Present names by former ones. A package stands for its modules too, unless they have a line of their own.
MODULES = {
    "zoo.quantize": "zoo.quantization",
    "zoo.quantize.formats": "zoo.kernels.formats",
    "zoo.pieces": "zoo.hub.pieces",
    "zoo.nn.precision": "zoo.precision",
    "zoo.nn.derived": "zoo.derived",
    "zoo.eval.audio": "zoo.eval.modality.audio",
    "zoo.eval.bytes": "zoo.eval.modality.bytes",
    "zoo.eval.images": "zoo.eval.modality.image",
    "zoo.eval.networks": "zoo.eval.modality.networks",
    "zoo.eval.shapes": "zoo.eval.modality.shape",
    "zoo.eval.thumbnail": "zoo.eval.modality.thumbnail",
    "zoo.eval.turntable": "zoo.eval.modality.turntable",
    "zoo.eval.plots": "zoo.eval.report.plots",
    "zoo.eval.binary": "zoo.eval.studies.binary",
    "zoo.eval.binary_subjects": "zoo.eval.studies.binary_tracks",
    "zoo.eval.compress": "zoo.eval.studies.compress",
    "zoo.eval.consistency": "zoo.eval.studies.consistency",
    "zoo.eval.precision": "zoo.eval.studies.precision",
    "zoo.eval.prefixes": "zoo.eval.studies.prefixes",
    "zoo.eval.probe": "zoo.eval.studies.probe",
    "zoo.eval.quantize": "zoo.eval.studies.quantize",
    "zoo.eval.shape_prefixes": "zoo.eval.studies.shape_prefixes",
    "zoo.eval.voices": "zoo.eval.studies.voices",
    "zoo.eval.quantize_subjects": "zoo.eval.studies.quantized",
    "zoo.weights.recipes.audio_data": "zoo.weights.data.audio",
    "zoo.weights.recipes.file_data": "zoo.weights.data.files",
    "zoo.weights.recipes.image_data": "zoo.weights.data.image",
    "zoo.weights.recipes.shape_data": "zoo.weights.data.shape",
    "zoo.weights.recipes.vlm_data": "zoo.weights.data.scenes",
}

#: Functions that took over the name of a package: importing the package gives the function.
FUNCTIONS = {"zoo.quantize": "zoo.quantization.conversion:quantize"}


def present_name(former: str) -> str | None:
    """Present name of a module; ``None`` if it has not moved."""
    package, within = former, ""
    while package:
        if package in MODULES:
            return MODULES[package] + within
        package, dot, last = package.rpartition(".")
        within = f"{dot}{last}{within}"
    return None


def warn(former: str, present: str, stacklevel: int = 3) -> None:
    """Say that something has another name now. The caller of the function that calls this one is told."""
    warnings.warn(f"{former} is {present} now", DeprecationWarning, stacklevel=stacklevel)


def names_of(module: str, moved: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's ``__getattr__`` that finds what has moved, as ``{"former": "package.module:present"}``."""

    def find(name: str) -> Any:
        if name not in moved:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, present = moved[name].partition(":")
        warn(f"{module}.{name}", f"{home}.{present or name}")
        return getattr(import_module(home), present or name)

    return find


def as_package(former: str, names: Mapping[str, str]) -> Callable[[F], F]:
    """Let one of the `FUNCTIONS` answer to the public names of the former package and to the modules imported from it.

    Functions among the names warn when called. Classes do not, unless they are imported from the former package.
    """

    def decorate(function: F) -> F:
        for name, home in names.items():
            setattr(function, name, _warning(getattr(import_module(home), name), f"{former}.{name}", home))
        # What Python's import asks of a package; a function's own name is the qualified one.
        vars(function).update(__path__=[], __spec__=None)
        function.__name__ = former
        setattr(function, former.rpartition(".")[2], function)
        return function

    return decorate


def _warning(value: Any, former: str, home: str) -> Any:
    if not isinstance(value, FunctionType):
        return value

    @functools.wraps(value)
    def call(*args: Any, **settings: Any) -> Any:
        warn(former, f"{home}.{value.__name__}")
        return value(*args, **settings)

    return call


class _Importer:
    """Finds former modules when they are imported, and gives the present ones."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        present = present_name(name)
        if present is None:
            return None
        from importlib.util import find_spec

        return ModuleSpec(name, _Importer(present)) if find_spec(present) else None  # type: ignore[arg-type]

    def __init__(self, present: str) -> None:
        self.present = present

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Python's own kind of module, which `exec_module` replaces."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        former = module.__name__
        warn(former, self.present)
        home, _, function = FUNCTIONS.get(former, self.present).partition(":")
        present = import_module(home)
        sys.modules[former] = getattr(present, function) if function else present


#: Gives the spec of a former module, and ``None`` for all others.
find_spec = _Importer.find_spec

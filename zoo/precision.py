"""Numbers that do not depend on what a program sets for its own computations."""

from __future__ import annotations

import functools
import inspect
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.dlpack import from_dlpack

_CPU = torch.device("cpu")
_lock = threading.Lock()
_depth: dict[str, int] = {}
_saved: dict[str, list[tuple[_Switch, str]]] = {}


class _Thread(threading.local):
    """What is in force in this thread.

    Attributes:
        entered: types of devices that `exact_float32` is in force for.
        inside: whether foreign defaults are out of force.
    """

    def __init__(self) -> None:
        self.entered: set[str] = set()
        self.inside = False


_thread = _Thread()

# Functions that make a tensor of the default dtype unless they are told or shown another one.
_FACTORIES = frozenset(
    getattr(torch, name)
    for name in (
        *("empty", "zeros", "ones", "full", "rand", "randn", "eye", "linspace", "logspace", "arange", "tensor", "as_tensor"),
        *("asarray", "scalar_tensor", "empty_strided", "empty_permuted", "normal"),
        *("bartlett_window", "blackman_window", "hamming_window", "hann_window", "kaiser_window"),
    )
)
#: Where the numbers that a factory is given decide whether it makes integers.
_BY_VALUE = frozenset({torch.full, torch.arange, torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor})

MethodT = TypeVar("MethodT", bound=Callable[..., Any])


@dataclass
class _Switch:
    """What decides how float32 products of a kind are computed: ``ieee``, ``tf32``, ``bf16``, or ``none`` to inherit.

    These are the switches behind ``torch.backends``, whose ``mkldnn.fp32_precision`` sets another one than it reads.
    """

    backend: str
    operation: str

    @property
    def value(self) -> str:
        """What is in force, inherited or not."""
        found: str = _get_switch(self.backend, self.operation)
        return found

    @value.setter
    def value(self, value: str) -> None:
        _set_switch(self.backend, self.operation, value)


# Kinds of autocast that change the work of a device.
_AUTOCASTS: Mapping[str, tuple[str, ...]] = {"cpu": ("cpu",), "meta": ("cpu",)}

_get_switch: Any = torch._C._get_fp32_precision_getter
_set_switch: Any = torch._C._set_fp32_precision_setter


@functools.cache
def _switches(device_type: str) -> list[list[_Switch]]:
    """The switches of a device's products, each behind those that it inherits from."""
    backend = "cuda" if device_type == "cuda" else "mkldnn"
    every = [_Switch("generic", "all"), _Switch(backend, "all")]
    return [[*every, _Switch(backend, operation)] for operation in ("matmul", "conv", "rnn")]


def _own_value(switches: Sequence[_Switch]) -> str:
    """What the last switch was set to itself: where it was not, reading it gives what it inherits from those before."""
    *above, switch = switches
    value = switch.value
    if not above or value in ("none", "ieee"):
        return value
    before = _own_value(above)
    above[-1].value = "ieee"
    inherited = switch.value == "ieee"
    above[-1].value = before
    return "none" if inherited else value


class _Float32Defaults(TorchFunctionMode):
    """What PyTorch would give in the default dtype is float32, in this thread alone: the default dtype itself is the process's.

    Our own code names its types. This is for the libraries that it calls.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        default = torch.get_default_dtype()
        if kwargs.get("dtype") is not None or default == torch.float32:
            return func(*args, **kwargs)
        if func in _FACTORIES and func not in _BY_VALUE and not any(isinstance(value, Tensor) for value in args):
            return func(*args, **kwargs | {"dtype": torch.float32})
        found = func(*args, **kwargs)
        if not isinstance(found, Tensor) or found.dtype != default:
            return found
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor | np.ndarray | np.generic)]
        if func in _BY_VALUE and not given:
            return func(*args, **kwargs | {"dtype": torch.float32})
        if not given or any(not isinstance(value, Tensor) or value.is_floating_point() for value in given):
            return found
        # Integers and plain numbers, of which PyTorch makes floats.
        return func(*(_as_float32(value, func is torch.where) for value in args), **kwargs).to(torch.float32)


def _as_float32(value: Any, numbers: bool) -> Any:
    """Integers as floats, and plain numbers as well where nothing but them decides the type."""
    if isinstance(value, Tensor):
        return value if value.dtype == torch.bool else value.float()
    return torch.tensor(value, dtype=torch.float32) if numbers and isinstance(value, float) else value


def _foreign_defaults() -> list[AbstractContextManager[Any]]:
    """Contexts that give this thread a default dtype of float32 and a default device of CPU, where the program has others."""
    found: list[AbstractContextManager[Any]] = []
    if torch.get_default_dtype() != torch.float32:
        found.append(_Float32Defaults())
    # A default device is one of the modes on this stack, and asking for it takes longer.
    if torch._C._len_torch_function_stack() and torch.get_default_device().type != "cpu":
        found.append(torch.device("cpu"))
    return found


class exact_float32:
    """Compute in float32 what is float32, whatever the program has set.

    Autocast, TF32 and bf16 shortcuts, default dtype and default device are out of force inside, and restored afterwards. The
    shortcuts are global to the process, so nested and concurrent uses are counted: the first one in turns them off and the
    last one out restores them. The others are changed for this thread alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._kind = device.type
        # What is undone on the way out; nothing where it was in force already.
        self._stack: ExitStack | None = None
        self._counted = self._outermost = self._defaults = False

    def __enter__(self) -> None:
        kind = self._kind
        # What is in force already is not entered again: small items would wait longer for it than for their tokens.
        if _in_force(kind):
            return
        with _lock:
            depth = _depth.get(kind, 0)
            if depth == 0 and (reduced := [path for path in _switches(kind) if path[-1].value not in ("none", "ieee")]):
                _saved[kind] = [(path[-1], _own_value(path)) for path in reduced]
                for switch, _ in _saved[kind]:
                    switch.value = "ieee"
            _depth[kind] = depth + 1
        entered = _thread.entered
        self._counted, self._outermost = True, kind not in entered
        entered.add(kind)
        contexts: list[AbstractContextManager[Any]] = [torch.autocast(name, enabled=False) for name in _enabled_autocasts(kind)]
        if not _thread.inside:
            _thread.inside = self._defaults = True
            contexts += _foreign_defaults()
        if contexts:
            self._stack = ExitStack()
            for context in contexts:
                self._stack.enter_context(context)

    def __exit__(self, *error: Any) -> None:
        if not self._counted:
            return
        self._counted = False
        try:
            if self._stack is not None:
                self._stack.__exit__(*error)
        finally:
            kind, self._stack = self._kind, None
            if self._defaults:
                _thread.inside = self._defaults = False
            if self._outermost:
                _thread.entered.discard(kind)
            with _lock:
                _depth[kind] -= 1
                if _depth[kind] == 0:
                    for switch, value in _saved.pop(kind, ()):
                        switch.value = value


def _enabled_autocasts(kind: str) -> list[str]:
    return [name for name in _AUTOCASTS.get(kind, ("cpu", kind)) if torch.is_autocast_enabled(name)]


def _in_force(kind: str) -> bool:
    return kind in _thread.entered and not _enabled_autocasts(kind)


def whole_numbers(method: MethodT) -> MethodT:
    """A tokenizer's method that computes with whole numbers alone, on devices that it names: it needs no shield."""
    method.whole_numbers = True  # type: ignore[attr-defined]  # as functools marks functions
    return method


def is_whole_numbers(method: object) -> bool:
    """Whether a method was marked by `whole_numbers`."""
    return getattr(method, "whole_numbers", False)


def undisturbed_reading(method: MethodT) -> MethodT:
    """A tokenizer's method that works on the CPU, wherever the parameters are: see `undisturbed`. Gradients are left alone."""

    @functools.wraps(method)
    def shielded(*args: Any, **kwargs: Any) -> Any:
        if _in_force("cpu"):
            return method(*args, **kwargs)
        with exact_float32(_CPU):
            return method(*args, **kwargs)

    return shielded  # type: ignore[return-value]  # the signature is the method's


def undisturbed(method: MethodT) -> MethodT:
    """A tokenizer's method whose result does not depend on what the program has set: see `exact_float32`.

    No gradients are recorded, and what comes out may take part in training all the same.
    """
    if inspect.isgeneratorfunction(method):
        raise TypeError(f"{method.__name__} is a generator: a context may not stay open between its values")

    @functools.wraps(method)
    def shielded(self: Any, *args: Any, **kwargs: Any) -> Any:
        device = self.device
        inference = torch.is_inference_mode_enabled()
        if inference and _in_force(device.type):
            return method(self, *args, **kwargs)
        with torch.inference_mode(), exact_float32(device):
            found = method(self, *args, **kwargs)
        return found if inference else _ordinary(found)

    return shielded  # type: ignore[return-value]  # the signature is the method's


def _ordinary(found: Any) -> Any:
    """What a method gives, with tensors that may take part in training in place of those of `torch.inference_mode`.

    They share their memory where they can. Looked through are lists, tuples, dictionaries and data classes.
    """
    if isinstance(found, Tensor):
        if not found.is_inference():
            return found
        plain = type(found) is Tensor and found.device.type in ("cpu", "cuda") and found.layout == torch.strided
        return from_dlpack(found) if plain and not (found.is_conj() or found.is_neg()) else found.clone()
    if isinstance(found, list | tuple):
        values = [_ordinary(value) for value in found]
        return type(found)(*values) if hasattr(found, "_fields") else type(found)(values)
    if isinstance(found, dict):
        return {key: _ordinary(value) for key, value in found.items()}
    if is_dataclass(found):
        for name, value in vars(found).items():
            if not isinstance(value, str | int):
                object.__setattr__(found, name, _ordinary(value))
    return found


def all_finite(values: Tensor) -> bool:
    """Whether floating-point numbers hold neither NaN nor infinity: in one pass, where ``isfinite`` takes several."""
    if not values.numel():
        return True
    low, high = values.aminmax()
    return math.isfinite(float(low)) and math.isfinite(float(high))


def compute_dtype(layer: nn.Module) -> torch.dtype:
    """The type that a layer computes in; of one with packed weights without decoding them."""
    own = layer.compute_dtype if hasattr(layer, "compute_dtype") else layer.weight.dtype
    assert isinstance(own, torch.dtype)
    return own


class Float32Module(nn.Module):
    """A module whose parameters never go below float32: ``.to(torch.bfloat16)`` moves it but leaves its precision alone.

    Encoders are kept this way because ids flip when their weights are rounded. Inside a tokenizer they never go above it.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Module:
        def at_least_float32(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return fn(tensor)
            probe = fn(tensor.new_empty(0))
            if probe.dtype.itemsize >= 4:
                return fn(tensor)
            return tensor.to(probe.device, torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype)

        return super()._apply(at_least_float32, recurse)

"""State that every layer with packed weights keeps, and saving and loading of models made of them."""

from __future__ import annotations

import importlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from zoo.derived import Derived
from zoo.errors import CorruptWeightsError, InputError, KeysError
from zoo.media import replacing
from zoo.quantization.methods import KINDS, Scheme
from zoo.state_dict import opening_safetensors, read_state

ModuleT = TypeVar("ModuleT", bound=nn.Module)

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What a layer knows about itself besides its tensors.
_SIZES = (
    *("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
    *("transposed", "output_padding", "groups", "padding_mode", "_reversed_padding_repeated_twice"),
)


class QuantizedLayer(nn.Module, ABC):
    """A linear or convolutional layer whose weight is stored in packed form.

    The packed tensors are buffers; they and the bias are all there is in the state dict. ``layer.weight`` is the dequantized
    weight, so that code which multiplies with it, instead of calling the layer, gives the same numbers. Concrete classes also
    derive from ``nn.Linear`` or ``nn.Conv1d`` to ``nn.Conv3d``, because code asks for them.

    Attributes:
        compute_dtype: type of ``weight`` and of the results; follows ``.to(dtype)``.
        bias: as in the original layer.
        resident: whether the dequantized weight is kept once it was made; see `zoo.quantization.set_resident`.
    """

    #: Key of the class in `zoo.quantization.methods.KINDS`.
    kind: ClassVar[str]
    #: Floating-point buffers that ``.to(dtype)`` leaves alone, because they are part of the packed form.
    exact: ClassVar[tuple[str, ...]] = ("scale",)

    #: Whether the layer is its product with ``weight``; binary layers multiply bits.
    multiplies_weight: ClassVar[bool] = True

    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module, method: str) -> None:
        # Packed classes derive from those of the layers as well, whose own initialisation would make a weight.
        nn.Module.__init__(self)
        self.method = method
        for name in _SIZES:
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        weight = layer.weight
        assert isinstance(weight, Tensor)
        self.weight_shape = tuple(weight.shape)
        self.compute_dtype = weight.dtype
        bias = getattr(layer, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.convolution = convolution_settings(layer) if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else None
        self.resident = False
        self._kept: Derived[Tensor] = Derived()

    @classmethod
    def handles(cls, layer: nn.Module) -> bool:
        """Whether a layer can be packed into this class."""
        return isinstance(layer, LAYERS)

    @classmethod
    @abstractmethod
    def from_float(cls, layer: nn.Module, method: Scheme) -> QuantizedLayer:
        """Pack a layer.

        Raises:
            InputError: its weight cannot be represented.
        """

    @classmethod
    @abstractmethod
    def from_description(cls, layer: nn.Module, description: Mapping[str, Any]) -> QuantizedLayer:
        """A layer of the same shapes, with tensors to load over, on the device of ``layer``."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """Arguments of `from_description`, for JSON; at least ``kind`` and ``method``."""

    @abstractmethod
    def dequantized(self) -> Float[Tensor, "outputs inputs *kernel"]:
        """The weight in float32, in the original shape."""

    @property
    def weight(self) -> Float[Tensor, "outputs inputs *kernel"]:
        """The dequantized weight in the precision of the layer."""
        if not self.resident:
            return self.dequantized().to(self.compute_dtype)
        packed = [buffer for buffer in self._buffers.values() if buffer is not None]
        return self._kept.of(packed, lambda: self.dequantized().to(self.compute_dtype))

    @property
    def dequantized_bytes(self) -> int:
        """Memory of ``weight``."""
        return math.prod(self.weight_shape) * self.compute_dtype.itemsize

    def with_weight(
        self, x: Float[Tensor, "*shape"], weight: Float[Tensor, "outputs inputs *kernel"]
    ) -> Float[Tensor, "*result"]:
        """Compute the original layer with a given weight."""
        if self.convolution is None:
            return nn.functional.linear(x, weight, self.bias)
        return convolve(x, weight, self.bias, self.convolution)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLayer:
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        self._kept = Derived()
        kept = {name: self._buffers[name] for name in self.exact if self._buffers.get(name) is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            moved = self._buffers[name]
            assert moved is not None and before is not None
            if moved.dtype != before.dtype:
                self._buffers[name] = before.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.method}, {' x '.join(map(str, self.weight_shape))}"


def convolution_settings(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> dict[str, Any]:
    """Settings of a convolution besides its weights; ``padded`` is its padding in the order of ``F.pad``."""
    padding = layer.padding if isinstance(layer.padding, str) else list(layer.padding)
    return {
        "stride": list(layer.stride),
        "padding": padding,
        "dilation": list(layer.dilation),
        "groups": layer.groups,
        "padding_mode": layer.padding_mode,
        "padded": list(layer._reversed_padding_repeated_twice),
    }


def convolve(
    x: Float[Tensor, "*shape"],
    weight: Float[Tensor, "outputs inputs *kernel"],
    bias: Float[Tensor, " outputs"] | None,
    settings: Mapping[str, Any],
) -> Float[Tensor, "*result"]:
    """The convolution of as many dimensions as the kernel has, with the settings of an ``nn.Conv`` layer."""
    padding = settings["padding"]
    if settings["padding_mode"] != "zeros":
        x = nn.functional.pad(x, settings["padded"], mode=settings["padding_mode"])
        padding = 0
    function: Any = {3: nn.functional.conv1d, 4: nn.functional.conv2d, 5: nn.functional.conv3d}[weight.ndim]
    return function(x, weight, bias, settings["stride"], padding, settings["dilation"], settings["groups"])


# ------------------------------------------------------------------------------------------------------------ time or memory

# ``"auto"`` takes no more than the free memory over this.
_SHARE = 4


def set_resident(model: ModuleT, resident: str | bool = "auto") -> ModuleT:
    """Decide whether packed layers keep their dequantized weights once they have made them, in place.

    A layer that keeps it computes as the original layer does and is as quick, in the memory of both. In bfloat16 the kept
    weight is rounded to it, as that of the original layer is. Files stay packed, and what was loaded starts without.

    Args:
        model: a quantized model, in the precision that it is going to be used in.
        resident: ``True`` or ``False``, or ``"auto"``: all layers where the weights take no more than a quarter of the memory
            that is free, none otherwise.

    Raises:
        InputError: another value.
    """
    require_resident(resident)
    layers = [layer for layer in quantized_layers(model).values() if layer.multiplies_weight]
    if resident == "auto" and layers:
        needed = sum(layer.dequantized_bytes for layer in layers)
        resident = _SHARE * needed <= _free_memory(next(layers[0].buffers()).device)
    for layer in layers:
        layer.resident = bool(resident)
        layer._kept = Derived()
        if layer.resident:
            _count_writes(layer)
    return model


def _count_writes(layer: nn.Module) -> None:
    """Replace tensors made in inference mode, whose writes PyTorch does not count: they would be compared in every call."""
    with torch.inference_mode(False):
        for name, buffer in layer.named_buffers(recurse=False):
            if buffer.is_inference():
                layer.register_buffer(name, buffer.clone())


def require_resident(resident: object) -> None:
    """Refuse what `set_resident` does not take.

    Raises:
        InputError: it is neither ``"auto"`` nor ``True`` nor ``False``.
    """
    if resident not in ("auto", True, False):
        raise InputError(f"resident must be 'auto', True or False, not {resident!r}")


def _free_memory(device: torch.device) -> int:
    """Bytes that can be allocated; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    information = Path("/proc/meminfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    free = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 0)
    # What a container may have besides.
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.exists() and used.exists() and (text := limit.read_text(encoding="utf-8").strip()) != "max":
        free = min(free, int(text) - int(used.read_text(encoding="utf-8")))
    return max(free, 0)


# ---------------------------------------------------------------------------------------------------------- save and load


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The packed layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def descriptions(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Descriptions of the packed layers of a model, as `restore` takes them."""
    return {name: layer.description() for name, layer in quantized_layers(model).items()}


def exact_keys(model: nn.Module) -> set[str]:
    """Entries of the state dict that are part of a packed form and must not be cast."""
    return {f"{name}.{buffer}" for name, layer in quantized_layers(model).items() for buffer in layer.exact}


def format_metadata(described: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Metadata entries of a safetensors file that name the number format of every packed layer."""
    return {f"{name}.format": str(layer.get("format", layer["method"])) for name, layer in described.items()}


def restore(model: ModuleT, described: Mapping[str, Mapping[str, Any]]) -> ModuleT:
    """Put empty packed layers into a float model, in place, ready for `load_state_dict`.

    Raises:
        CorruptWeightsError: a description does not fit the model.
    """
    for name, description in described.items():
        try:
            module, _, cls = KINDS[description["kind"]].partition(":")
            layer = model.get_submodule(name)
            packed = getattr(importlib.import_module(module), cls).from_description(layer, description)
        except Exception as error:
            # What is wrong about sizes and formats fails where layers are made of them, in as many ways.
            raise CorruptWeightsError(f"{name}: the saved quantization does not fit the model: {error!r}") from error
        replace_layer(model, name, packed)
    return model


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a module in the place of another one, wherever the model has that one."""
    replaced = model.get_submodule(name)
    layer.train(replaced.training)
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is replaced:
                setattr(parent, child, layer)


def save(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a quantized model as one safetensors file; `load` reads it into the same architecture.

    A tokenizer is saved by its own ``save_pretrained`` instead.
    """
    described = descriptions(model)
    state = model.state_dict()
    stored, tied = _untied(state)
    storages = Counter(state[name].untyped_storage().data_ptr() for name in stored)
    # safetensors takes no views of the same memory
    tensors = {
        name: state[name].detach().cpu().clone(memory_format=torch.contiguous_format)
        if storages[state[name].untyped_storage().data_ptr()] > 1
        else state[name].detach().cpu().contiguous()
        for name in stored
    }
    metadata = {"quantization": json.dumps(described), "tied": json.dumps(tied), **format_metadata(described)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return Path(path)


def _untied(state: Mapping[str, Tensor]) -> tuple[list[str], dict[str, str]]:
    """The entries of a state dict that are stored, and by name of each other one the entry that is the same tensor."""
    stored: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        first = stored.setdefault((*place, name) if not tensor.numel() else place, name)
        if first != name:
            tied[name] = first
    return list(stored.values()), tied


_DESCRIPTIONS = TypeAdapter(dict[str, dict[str, Any]])
_TIED = TypeAdapter(dict[str, str])


def load(model: ModuleT, path: str | os.PathLike[str]) -> ModuleT:
    """Read what `save` wrote into a float model of the same architecture, in place; bit for bit what was saved.

    Raises:
        CorruptWeightsError: the file is damaged, or was not written by `save`.
        KeysError: it is of another architecture.
    """
    path = Path(path)
    with opening_safetensors(path) as file:
        metadata = file.metadata() or {}
    if "quantization" not in metadata:
        raise CorruptWeightsError(f"{path} holds no quantized model")
    try:
        described, tied = _DESCRIPTIONS.validate_json(metadata["quantization"]), _TIED.validate_json(metadata.get("tied", "{}"))
        state = read_state(path)
        state |= {name: state[first] for name, first in tied.items()}
    except (ValueError, KeyError) as error:
        reason = f"{error.errors()[0]['msg']}" if isinstance(error, ValidationError) else repr(error)
        raise CorruptWeightsError(f"{path}: what it says about its layers is damaged: {reason}") from error
    try:
        restore(model, described)
    except CorruptWeightsError as error:
        raise CorruptWeightsError(f"{path}: {error}") from error
    shared = _shared_parameters(model)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise KeysError(f"{path} does not fit the model: {error}") from error
    for first, others in shared.items():
        for name in others:
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(owner), own, model.get_parameter(first))
    return model


def _shared_parameters(model: nn.Module) -> dict[str, list[str]]:
    """The names of parameters that stand in several places, by the first of them; assigning a state dict would part them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {first: others for first, *others in names.values() if others}

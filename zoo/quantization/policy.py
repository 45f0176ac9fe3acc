"""Plan of quantizing the layers of a model: a list to read before anything happens.

By default

- linear layers and convolutions are quantized, embeddings, norms, LSTMs and biases are not;
- nothing inside a `zoo.precision.Float32Module` or a tokenizer's `exact_parts` is, because ids flip when encoders and
  codebooks are rounded, nor is what identifies a checkpoint;
- nothing whose weight is tied to another part of the model, such as a language model's head to its embeddings: the other part
  needs the weight as it is, and packed, the model would grow;
- layers whose class has a ``forward`` of its own stay, unless the class says ``plain_product = True``: that the weight is
  used as PyTorch's layer uses it;
- layers with fewer than 32 weights per output stay as they are: a depth-wise convolution's scales would cost as much as its
  weights;
- of a model in 4 bits or fewer, the first and the last convolution and the layers of time embeddings get 8 bits, as is common
  for diffusion models (the paper is not known to say so).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from zoo.errors import InputError
from zoo.precision import Float32Module
from zoo.quantization.methods import Scheme, method_named
from zoo.quantization.packed import LAYERS, QuantizedLayer

_TIME_EMBEDDING = re.compile(r"(^|[._])(time|timestep|t)(_|\.)?(emb|embed|embedder|embedding|proj|mlp)")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@runtime_checkable
class IdMaker(Protocol):
    """A model that makes ids, as tokenizers do, and knows which of its parts they depend on."""

    #: Entries of the state dict that tell its checkpoints apart.
    identity: tuple[str, ...]

    def exact_parts(self) -> tuple[str, ...]:
        """Names of the modules that stay as they are."""

    def encode(self, items: Any) -> Any:
        """The ids of some media."""

    def reconstruct(self, items: Any) -> Any:
        """The media that come back from their ids."""


@dataclass(frozen=True)
class Policy:
    """Settings that differ from one model to the next.

    Attributes:
        skip: names of layers to leave as they are; ``*`` stands for anything, as in ``encoder.*``.
        fewest_weights: layers with fewer weights per output stay as they are.
        protect_ends: give the first and last convolution and time embeddings 8 bits where the others get 4 or fewer.
        keep_exact: leave out what is inside a ``Float32Module`` or a tokenizer's encoder.
    """

    skip: tuple[str, ...] = ()
    fewest_weights: int = 32
    protect_ends: bool = True
    keep_exact: bool = True


@dataclass(frozen=True)
class Choice:
    """Decision about a layer.

    Attributes:
        name: of the layer in the model.
        layer: the layer.
        method: how it is quantized; ``None`` if it stays.
        reason: why it stays or differs from the others; empty otherwise.
    """

    name: str
    layer: nn.Module
    method: Scheme | None
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.method.name if self.method else 'kept'}" + (f" ({self.reason})" if self.reason else "")


def plan(model: nn.Module, method: str, policy: Policy | None = None) -> list[Choice]:
    """Decisions of `zoo.quantize` about every layer that it could quantize, in the order of the model.

    Raises:
        InputError: there is no such method, the model is quantized already, a pattern of ``skip`` fits no layer, or no layer
            is left.

    >>> choices = zoo.quantization.plan(zoo.load("wavtokenizer-tiny"), "fp4-e2m1")
    >>> print(choices[-1])
    head.out: fp4-e2m1
    """
    policy = policy or Policy()
    wanted = method_named(method)
    layers = list(_candidates(model, wanted))
    if unused := [pattern for pattern in policy.skip if not any(fnmatchcase(name, pattern) for name, _, _ in layers)]:
        raise InputError(f"skip: no layer is called {unused[0]!r}")
    kept = {name: reason for name, layer, exact in layers if (reason := _why_kept(name, layer, exact, policy))}
    if isinstance(model, IdMaker):
        kept |= {name: "identifies the checkpoint" for name, _, _ in layers if f"{name}.weight" in model.identity}
    for name, reason in tied_weights(model, {name: layer for name, layer, _ in layers}).items():
        kept.setdefault(name, reason)
    special = _ends(layers, kept) if policy.protect_ends and wanted.bits <= 4 else {}
    choices = []
    for name, layer, _ in layers:
        if name in kept:
            choices.append(Choice(name, layer, None, kept[name]))
        elif name in special:
            choices.append(Choice(name, layer, _in_eight_bits(wanted), special[name]))
        else:
            choices.append(Choice(name, layer, wanted))
    if not any(choice.method for choice in choices):
        raise InputError("there is no layer to quantize" + (f": {choices[0]}" if choices else ""))
    return choices


def packed_class(method: Scheme) -> type[QuantizedLayer]:
    """The class of the layers that a method packs into."""
    module, _, name = method.layer.partition(":")
    return getattr(importlib.import_module(module), name)


def _candidates(model: nn.Module, method: Scheme) -> Iterator[tuple[str, nn.Module, bool]]:
    """Layers with their names, and whether they are inside a module that has to stay exact."""
    cls = packed_class(method)
    exact = list(model.exact_parts()) if isinstance(model, IdMaker) else []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            raise InputError(f"the model is already quantized: {name or 'it'} is {module.method}")
        if isinstance(module, Float32Module):
            exact.append(name)
        if cls.handles(module):
            yield name, module, any(name.startswith(f"{outer}.") for outer in exact)


def _why_kept(name: str, layer: nn.Module, exact: bool, policy: Policy) -> str:
    """Why a layer stays as it is; empty if it does not."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if any(fnmatchcase(name, pattern) for pattern in policy.skip):
        return "skipped"
    if exact and policy.keep_exact:
        return "ids would change"
    if not weight.numel():
        return "it has no weights"
    if weight[0].numel() < policy.fewest_weights:
        return f"{weight[0].numel()} weights per output are too few"
    return "" if _keeps_the_product(layer) else "computes something of its own"


def tied_weights(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """The layers whose weight lies in the memory of another tensor of the model, and why they stay as they are.

    The other one needs the numbers as they are, so a packed copy would come on top of them, and ``tie_weights()`` of a
    transformers model would put them back. A module that stands in several places is no such case: it is one layer.
    """
    by_storage: dict[int, list[tuple[str, nn.Module, torch.Tensor]]] = {}
    for prefix, module in model.named_modules():
        for name, tensor in (*module.named_parameters(prefix, False), *module.named_buffers(prefix, False)):
            by_storage.setdefault(_storage(tensor), []).append((name, module, tensor))
    tied: dict[str, str] = {}
    for name, layer in layers.items():
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        for other, module, tensor in by_storage.get(_storage(weight), ()):
            if module is not layer and _overlap(weight, tensor):
                tied.setdefault(name, f"its weight is tied to {other}, so that packing it would save nothing")
    return tied


def _storage(tensor: torch.Tensor) -> int:
    """What tensors that share memory have in common."""
    return id(tensor) if tensor.device.type == "meta" else tensor.untyped_storage().data_ptr()


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of the same storage have an element in common, gaps between their elements counted as theirs."""

    def span(tensor: torch.Tensor) -> tuple[int, int]:
        steps = sum((int(size) - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        first = int(tensor.storage_offset()) * tensor.element_size()
        return first, first + (steps + 1) * tensor.element_size()

    if not one.numel() or not other.numel():
        return False
    (start, end), (other_start, other_end) = span(one), span(other)
    return start < other_end and other_start < end


def _keeps_the_product(layer: nn.Module) -> bool:
    """Whether ``forward`` is that of PyTorch's layer, or of a class that says ``plain_product``."""
    for cls in type(layer).__mro__:
        if "forward" in vars(cls):
            return cls in LAYERS or bool(vars(cls).get("plain_product"))
    return False


def _ends(layers: Sequence[tuple[str, nn.Module, bool]], kept: dict[str, str]) -> dict[str, str]:
    """The layers that are worth 8 bits, and why."""
    convolutions = [name for name, layer, _ in layers if isinstance(layer, _CONVOLUTIONS) and name not in kept]
    special = {name: "time embedding" for name, _, _ in layers if _TIME_EMBEDDING.search(name)}
    if convolutions:
        special |= {convolutions[-1]: "last convolution", convolutions[0]: "first convolution"}
    return special


def _in_eight_bits(method: Scheme) -> Scheme:
    """The method of the same kind with 8 bits."""
    if method.name.startswith("int"):
        return method_named("int8")
    if method.block is not None:
        return method_named("mxfp8")
    return method_named("fp8" if len(method.formats) > 1 else "fp8-e4m3")

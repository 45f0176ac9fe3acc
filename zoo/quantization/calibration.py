"""Activation statistics from calibration data: value samples and Gram matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, Signature
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from zoo.errors import InputError
from zoo.progress import progress_bar
from zoo.quantization.policy import IdMaker

Run = Callable[[nn.Module, Any], object]

#: Values of a layer's inputs that are kept from each batch, evenly spaced; their format is searched on the sample.
SAMPLE = 1 << 14
#: Rows of a layer's inputs of each batch that go into the mean of products.
ROWS = 2048
#: Numbers that means of products may take at a time, 1 GB; more than that makes several passes over the inputs.
_MOST_PRODUCTS = 1 << 28


@dataclass
class Observed:
    """Statistics of what a layer has met.

    Attributes:
        samples: values of the inputs, a few of each batch.
        largest: magnitude of the largest of all values.
        products: sum of ``x x^T`` over the rows of the inputs; a convolution's rows are its windows.
        rows: how many there were.
        called: whether the layer was called, rather than code that multiplies with its weight.
    """

    samples: list[Float[Tensor, " values"]] = field(default_factory=list)
    largest: float = 0.0
    products: Float[Tensor, "columns columns"] | None = None
    rows: int = 0
    called: bool = False

    @property
    def sample(self) -> Float[Tensor, " values"]:
        """The sample, ending in the largest magnitude."""
        return torch.cat([*self.samples, self.samples[-1].new_tensor([self.largest])])

    @property
    def gram(self) -> Float[Tensor, "columns columns"]:
        """Mean of ``x x^T``."""
        assert self.products is not None
        return self.products / max(1, self.rows)


def default_run(model: nn.Module, batch: Any) -> object:
    """Run a model on a batch: a tokenizer reconstructs it, any other module is called with it, its items or its keywords.

    A tokenizer that classifies does so: its network takes no part in reconstruction.
    """
    if isinstance(model, IdMaker):
        classify = getattr(model, "classify", None)
        return model.reconstruct(batch) if classify is None else classify(model.encode(batch))
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def observe(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    *,
    run: Run = default_run,
    products: bool = False,
    progress: bool = False,
) -> dict[str, Observed]:
    """Run a model and look at the inputs of some of its layers.

    Layers whose weights are not multiplied with anything are not in the result.

    Args:
        model: the model.
        layers: the layers by name.
        batches: inputs for ``run``; gone through several times where ``products`` do not fit into memory at once.
        run: what to do with a batch.
        products: collect means of products as well, which learning to round needs.
        progress: show a progress bar over the batches.

    Raises:
        InputError: there are no batches, no layer was used, or a layer met a number that is not finite.
    """
    listed = batches if isinstance(batches, Sequence) else list(batches)
    if not len(listed):
        raise InputError("calibrate is empty")
    observed: dict[str, Observed] = {}
    groups = list(_groups(layers, products))
    with progress_bar("calibrate", len(groups) * len(listed), progress, unit="batch") as advance:
        for first, group in enumerate(groups):
            with torch.no_grad(), _Watch(layers if first == 0 else {}, group, observed):
                for batch in listed:
                    run(model, batch)
                    advance(1)
    if not observed:
        raise InputError("no layer that is quantized was used while calibrating: run= says what to do with a batch")
    return observed


def _groups(layers: Mapping[str, nn.Module], products: bool) -> Iterator[dict[str, nn.Module]]:
    """Layers whose products are collected together; one empty group if none are."""
    group: dict[str, nn.Module] = {}
    size = 0
    for name, layer in layers.items() if products else ():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        numbers = weight[0].numel() ** 2
        if group and size + numbers > _MOST_PRODUCTS:
            yield group
            group, size = {}, 0
        group[name] = layer
        size += numbers
    yield group


class _Watch(TorchFunctionMode):
    """Sees what weights are multiplied with, whether by their layers or by code that takes ``layer.weight``.

    Weights are followed through the functions that keep their rows as they are.
    """

    def __init__(
        self, sampled: Mapping[str, nn.Module], multiplied: Mapping[str, nn.Module], observed: dict[str, Observed]
    ) -> None:
        super().__init__()
        self.sampled, self.multiplied, self.observed = sampled, multiplied, observed
        self.names: MutableMapping[Tensor, str] = WeakTensorKeyDictionary()
        self.handles = []
        for name, layer in {**sampled, **multiplied}.items():
            assert isinstance(layer.weight, Tensor)
            self.names[layer.weight] = name
            self.handles.append(layer.register_forward_pre_hook(self._note_call(name)))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def _note_call(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(layer: nn.Module, inputs: Any) -> None:
            self.observed.setdefault(name, Observed()).called = True

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            call = _PRODUCTS[func].bind(*args, **(kwargs or {}))
            call.apply_defaults()
            name = self.names.get(call.arguments["weight"])
            if name is not None and call.arguments["input"].numel():
                self._look(name, **call.arguments)
        elif func in _KEEP_ROWS and args[0] in self.names:
            whole = args[0]
            for part in result if isinstance(result, tuple | list) else (result,):
                if part[:1].numel() == whole[:1].numel():
                    self.names[part] = self.names[whole]
        return result

    def _look(self, name: str, input: Tensor, weight: Tensor, **settings: Any) -> None:
        seen = self.observed.setdefault(name, Observed())
        x = input.detach().float()
        if name in self.sampled:
            largest = float(x.abs().max())
            if not math.isfinite(largest):
                raise InputError(f"{name} met a number that is not finite while calibrating")
            flat = x.flatten()
            seen.samples.append(flat[:: -(-len(flat) // SAMPLE)].clone())
            seen.largest = max(seen.largest, largest)
        if name in self.multiplied and settings.get("groups", 1) == 1 and weight.ndim < 5:
            rows = windows(x, weight, **settings) if weight.ndim > 2 else x.reshape(-1, x.shape[-1])
            rows = rows[:: -(-len(rows) // ROWS)]
            added = rows.T @ rows
            seen.products = added if seen.products is None else seen.products.add_(added)
            seen.rows += len(rows)


def windows(
    x: Float[Tensor, "*shape"],
    weight: Float[Tensor, "outputs inputs *kernel"],
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Float[Tensor, "rows columns"]:
    """The windows of its input that a convolution of one or two dimensions multiplies with each row of its weight."""
    kernel = weight.shape[2:]
    x = x if x.ndim == weight.ndim else x[None]
    steps, spread = _each(stride, len(kernel)), _each(dilation, len(kernel))
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(spread, kernel, strict=True)]
        sides = [(size // 2, size - size // 2) for size in total]
    else:
        sides = [(size, size) for size in _each(padding, len(kernel))]
    x = F.pad(x, [size for pair in reversed(sides) for size in pair])
    if len(kernel) == 1:
        return F.unfold(x.unsqueeze(2), (1, kernel[0]), (1, spread[0]), 0, (1, steps[0])).transpose(1, 2).flatten(0, 1)
    return F.unfold(x, tuple(kernel), tuple(spread), 0, tuple(steps)).transpose(1, 2).flatten(0, 1)


def _each(value: int | Sequence[int], dimensions: int) -> list[int]:
    """One number for each dimension."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * dimensions if len(numbers) == 1 else numbers


def _signature(*names: str) -> Signature:
    empty = Parameter.empty
    defaults = {"input": empty, "weight": empty, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=defaults[name]) for name in names])


_CONVOLUTION = _signature("input", "weight", "bias", "stride", "padding", "dilation", "groups")
# The functions that multiply with weights, and how they are called.
_PRODUCTS: dict[Any, Signature] = {
    F.linear: _signature("input", "weight", "bias"),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d), _CONVOLUTION),
}
_KEEP_ROWS = {
    torch.unsqueeze,
    Tensor.unsqueeze,
    Tensor.contiguous,
    Tensor.to,
    Tensor.float,
    Tensor.bfloat16,
    Tensor.detach,
    Tensor.split,
    torch.split,
    Tensor.chunk,
    torch.chunk,
}

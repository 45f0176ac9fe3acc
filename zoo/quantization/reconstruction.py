"""Learning to round the weights of residual and attention blocks as wholes, one after the other.

All weights of a block are learned together for the block's output. Its inputs are those that the network quantized so far gives
it, and what it is to give is what it gives in the original network, so that a block makes up for the errors before it. Layers
outside of blocks are learned alone in the same way (Li et al. 2021, "BRECQ", arXiv 2102.05426, as q-diffusion arranges it).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from zoo.errors import InputError
from zoo.quantization.calibration import Run
from zoo.quantization.layers import Grid, matrix_of
from zoo.quantization.learned import (
    Learned,
    LearningConfig,
    Neighbours,
    beta_at,
    hard_weight,
    inverse_rectified_sigmoid,
    neighbours,
    rectified_sigmoid,
    regularizer,
)
from zoo.quantization.rounding import fake_quantize


@dataclass(frozen=True)
class Unit:
    """A module whose output counts, and the layers inside of it to learn for that; a layer can be its own.

    Attributes:
        name: of the module.
        layers: names of the layers.
    """

    name: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        arguments, keywords: what it was given.
        result: the floating-point tensors that it gave.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    result: list[Tensor]


class Reconstruction:
    """The units of a model in the order in which they work, and the state of the network between them.

    Attributes:
        units: those that calibration calls.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        learned: Collection[str],
        batches: Sequence[Any],
        run: Run,
        config: LearningConfig,
    ) -> None:
        """Find the units.

        Args:
            model: the model, whose weights are the original ones whenever nothing is running.
            layers: all that are quantized, by name.
            learned: names of those that are learned.
            batches, run: what to call the model with, and how.
            config: which blocks there are, and how to learn.

        Raises:
            InputError: a name in ``config.blocks`` fits no block.
        """
        self.model, self.layers, self.batches, self.run, self.config = model, layers, batches, run, config
        self._originals = {name: _parameter(layer).data for name, layer in layers.items()}
        self._quantized: dict[str, Tensor] = {}
        blocks = blocks_of(model, learned, config.blocks)
        watch = _Watch(model, blocks, learned)
        with watch:
            self._run()
        self._calls = watch.calls
        together = [Unit(name, layers) for name, layers in watch.used.items() if len(layers) > 1]
        in_blocks = {layer for unit in together for layer in unit.layers}
        alone = [Unit(name, (name,)) for name in learned if name not in in_blocks and name in self._calls]
        order = list(self._calls)
        self.units = sorted([*together, *alone], key=lambda unit: order.index(unit.name))

    def put(self, name: str, weight: Float[Tensor, "outputs inputs *kernel"]) -> None:
        """Give a layer its quantized weight in the network that later units get their inputs from."""
        self._quantized[name] = weight.to(self._originals[name].dtype)

    def learn(self, unit: Unit, grids: Mapping[str, Grid]) -> dict[str, Learned]:
        """Round the weights of a unit, each on its grid, for the least error of the unit's output.

        Errors are squares, summed over channels and averaged over the rest; every layer is told that of the unit.
        """
        module = self.model.get_submodule(unit.name)
        picked = _evenly(self._calls[unit.name], self.config.calls)
        wanted = self._record(module, picked, results=True)
        with self._so_far():
            met = self._record(module, picked, results=False)
            calls = [replace(call, result=target.result) for call, target in zip(met, wanted, strict=True)]
            prefix = f"{unit.name}." if unit.name else ""
            inner = {name: "weight" if name == unit.name else f"{name.removeprefix(prefix)}.weight" for name in unit.layers}
            return _learn(
                module, {name: (self.layers[name], grids[name], inner[name]) for name in unit.layers}, calls, self.config
            )

    def _record(self, module: nn.Module, picked: Collection[int], results: bool) -> list[Call]:
        """Run the model and keep some of the calls of a module: what they gave, or what they were given."""
        calls: list[Call] = []
        number = 0

        def before(module: nn.Module, arguments: Any, keywords: Any) -> None:
            if number in picked and not results:
                calls.append(Call(_own(arguments), _own(keywords), []))

        def after(module: nn.Module, arguments: Any, keywords: Any, result: Any) -> None:
            nonlocal number
            if number in picked and results:
                calls.append(Call((), {}, [_own(tensor) for tensor in _tensors(result)]))
            number += 1

        handles = [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            self._run()
        finally:
            for handle in handles:
                handle.remove()
        return calls

    def _run(self) -> None:
        with torch.no_grad():
            for batch in self.batches:
                self.run(self.model, batch)

    @contextmanager
    def _so_far(self) -> Iterator[None]:
        """The network with the quantized weights that there are."""
        for name, weight in self._quantized.items():
            _parameter(self.layers[name]).data = weight
        try:
            yield
        finally:
            for name in self._quantized:
                _parameter(self.layers[name]).data = self._originals[name]


class _Watch(TorchFunctionMode):
    """Sees which blocks and layers are called, and which weights a block makes use of while it is.

    Attributes:
        calls: how often a module was called, in the order of the first calls.
        used: names of the layers of each block whose weights it used.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, Sequence[str]], layers: Collection[str]) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self._blocks = blocks
        self._model = model
        self._names = {id(_parameter(model.get_submodule(name))): name for name in layers}
        self._active: list[str] = []
        self._seen: dict[str, set[str]] = {}
        self._handles: list[Any] = []

    @property
    def used(self) -> dict[str, tuple[str, ...]]:
        return {block: tuple(name for name in self._blocks[block] if name in seen) for block, seen in self._seen.items()}

    def __enter__(self) -> _Watch:
        for name in dict.fromkeys([*self._blocks, *self._names.values()]):
            module = self._model.get_submodule(name)
            self._handles.append(module.register_forward_pre_hook(functools.partial(self._begin, name)))
            self._handles.append(module.register_forward_hook(self._end))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _begin(self, name: str, module: nn.Module, arguments: Any) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        self._active.append(name)

    def _end(self, module: nn.Module, arguments: Any, result: Any) -> None:
        self._active.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            if isinstance(value, Tensor) and (name := self._names.get(id(value))) is not None:
                for block in self._active:
                    if name in self._blocks.get(block, ()):
                        self._seen.setdefault(block, set()).add(name)
        return func(*args, **(kwargs or {}))


def blocks_of(model: nn.Module, layers: Collection[str], wanted: bool | tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Blocks by name with the names of the given layers inside, two of them or more.

    Args:
        model: where they are.
        layers: names of layers.
        wanted: ``True`` for the innermost members of module lists and sequences; or names of modules, ``*`` standing for
            anything; of nested ones the outermost counts.

    Raises:
        InputError: a name fits no module with two layers.
    """
    inside = {
        name: tuple(layer for layer in layers if layer.startswith(f"{name}.")) for name, _ in model.named_modules() if name
    }
    inside = {name: found for name, found in inside.items() if len(found) > 1}
    if isinstance(wanted, bool):
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
        members = [name for name in inside if wanted and name.rpartition(".")[0] in lists]
        chosen = [name for name in members if not any(other.startswith(f"{name}.") for other in members)]
    else:
        for pattern in wanted:
            if not any(fnmatchcase(name, pattern) for name in inside):
                raise InputError(f"blocks: no module with several layers to learn is called {pattern!r}")
        members = [name for name in inside if any(fnmatchcase(name, pattern) for pattern in wanted)]
        chosen = [name for name in members if not any(name.startswith(f"{other}.") for other in members)]
    return {name: inside[name] for name in chosen}


def _learn(
    module: nn.Module, layers: Mapping[str, tuple[nn.Module, Grid, str]], calls: Sequence[Call], config: LearningConfig
) -> dict[str, Learned]:
    """Adam on the state of every weight, with one call at a time."""
    cells: dict[str, Neighbours] = {}
    nearest: dict[str, Tensor] = {}
    for name, (layer, grid, _) in layers.items():
        weight = matrix_of(layer)
        maxval = grid.spread(weight.shape[1])
        cells[name] = neighbours(weight, grid.format, maxval)
        nearest[name] = fake_quantize(weight, grid.format, maxval)
    alphas = {name: inverse_rectified_sigmoid(cell.rest).requires_grad_() for name, cell in cells.items()}

    def error(call: Call, weights: Mapping[str, Float[Tensor, "_ _"]]) -> Float[Tensor, ""]:
        replaced = {}
        for name, (layer, _, inner) in layers.items():
            weight = _parameter(layer)
            replaced[inner] = weights[name].view(weight.shape).to(weight.dtype)
        # Modules may work on their arguments in place.
        return _squares(_tensors(functional_call(module, replaced, _own(call.arguments), _own(call.keywords))), call.result)

    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(alphas.values(), lr=config.lr)
    for step in range(config.iterations):
        call = calls[int(torch.randint(len(calls), (), generator=order))]
        with torch.enable_grad():
            loss = error(call, {name: cell.at(rectified_sigmoid(alphas[name])) for name, cell in cells.items()})
            if (beta := beta_at(step, config)) is not None:
                loss = loss + config.regularization * sum(regularizer(alpha, beta) for alpha in alphas.values())
            # Not backward(), which would leave gradients in the model.
            gradients = torch.autograd.grad(loss, list(alphas.values()), allow_unused=True)
        for alpha, gradient in zip(alphas.values(), gradients, strict=True):
            alpha.grad = gradient
        optimizer.step()
    with torch.no_grad():
        learned = {name: hard_weight(alphas[name].detach(), cell) for name, cell in cells.items()}
        errors = [sum(float(error(call, weights)) for call in calls) / len(calls) for weights in (nearest, learned)]
    better = learned if errors[1] <= errors[0] else nearest
    return {name: Learned(better[name], errors[0], min(errors)) for name in layers}


def _squares(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Squared error, summed over channels and averaged over the rest."""
    total = torch.zeros((), device=wanted[0].device)
    for result, target in zip(found, wanted, strict=True):
        channels = target.shape[1 if target.ndim == 4 else -1] if target.ndim else 1
        total = total + (result.float() - target.float()).square().sum() * channels / max(1, target.numel())
    return total


def _tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors of a result."""
    found = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not found:
        raise InputError("a block that is learned gives no tensor")
    return found


def _own(value: Any) -> Any:
    """A copy of tensors and of what holds them, which a gradient may pass wherever the model was run."""
    if isinstance(value, Tensor):
        with torch.inference_mode(False):
            return value.detach().clone()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_own, value))
    if isinstance(value, list | tuple):
        return type(value)(map(_own, value))
    if isinstance(value, dict):
        return {key: _own(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _own(getattr(value, field.name)) for field in fields(value) if field.init})
    return value


def _parameter(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _evenly(count: int, most: int) -> set[int]:
    """At most ``most`` numbers below ``count``, evenly spaced."""
    return {index * count // min(count, most) for index in range(min(count, most))}

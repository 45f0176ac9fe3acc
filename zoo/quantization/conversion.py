"""From a model to its quantized form, in place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.errors import InputError
from zoo.kernels.formats import format_named
from zoo.moved import as_package
from zoo.precision import exact_float32
from zoo.progress import progress_bar
from zoo.quantization.calibration import Observed, Run, default_run, observe
from zoo.quantization.journal import LayerJournal, inputs_digest, weights_digest
from zoo.quantization.layers import Granularity, Grid, LowBitLayer, choose_grid, matrix_of
from zoo.quantization.learned import Learned, LearningConfig, learn
from zoo.quantization.methods import Scheme
from zoo.quantization.packed import QuantizedLayer, replace_layer, require_resident, set_resident
from zoo.quantization.policy import Choice, Policy, packed_class, plan
from zoo.quantization.reconstruction import Reconstruction, Unit
from zoo.quantization.report import LayerReport
from zoo.quantization.search import search

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_FORMER_PACKAGE = {
    "LayerReport": "zoo.quantization.report",
    "LearningConfig": "zoo.quantization.learned",
    "Policy": "zoo.quantization.policy",
    "load": "zoo.quantization.packed",
    "names": "zoo.quantization.methods",
    "plan": "zoo.quantization.policy",
    "save": "zoo.quantization.packed",
}


@as_package("zoo.quantize", _FORMER_PACKAGE)
def quantize(
    model: ModuleT,
    method: str,
    *,
    calibrate: Iterable[Any] | None = None,
    skip: Sequence[str] = (),
    policy: Policy | None = None,
    granularity: Granularity | None = None,
    activations: str | None = None,
    rounding: str | None = None,
    learning: LearningConfig | None = None,
    resident: str | bool = False,
    run: Run = default_run,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
    on_layer: Callable[[LayerReport], object] = lambda report: None,
) -> ModuleT:
    """Quantize a tokenizer or any module, in place: its linear layers and convolutions hold packed weights afterwards.

    Args:
        model: the model; on its own device and in its own precision.
        method: a name, such as ``"fp8-e4m3"``, ``"fp4-e2m1"``, ``"int8"`` or ``"binary-xnor"``; all are in
            `zoo.quantization.names`.
        calibrate: batches of inputs, as ``run`` takes them: of a tokenizer, what `encode` takes. With them, the inputs of
            layers get 8 bits and rounding to 4 bits is learned, unless said otherwise.
        skip: names of layers to leave as they are, ``*`` standing for anything.
        policy: which other layers are kept; see `zoo.quantization.policy`.
        granularity: what shares a scale: the weights of an output by default.
        activations: ``"static"``: inputs of layers in 8 bits, with a scale from ``calibrate``; ``"dynamic"``: with a scale for
            each row; ``"none"``. By default ``"static"`` where there are inputs to calibrate with.
        rounding: ``"nearest"``, or ``"learned"`` from ``calibrate``. By default learned for 4 bits where there are inputs.
        learning: how long to learn, and whether the layers of a block are learned together.
        resident: whether layers keep their dequantized weights for speed, in the memory of both: see
            `zoo.quantization.set_resident`.
        run: what to do with a batch; by default a tokenizer reconstructs it, or classifies it if it can, and a module is called
            with it.
        resume: a folder that finished layers are kept in; the same call with the same folder goes on from there and gives the
            same result, bit for bit.
        progress: show a progress bar.
        on_layer: called with what became of each layer.

    Returns:
        The model; the packed layer itself if the model is a single layer.

    Raises:
        InputError: there is no such method, no layer to quantize, or nothing to calibrate with; the model is quantized already;
            a weight or an input of a layer is not finite; ``resume`` belongs to something else. The model is as it was then.
        CorruptWeightsError: a file in ``resume`` is damaged.

    >>> layer = zoo.quantize(torch.nn.Sequential(torch.nn.Linear(512, 256)), "int8")[0]
    >>> type(layer).__name__, sum(tensor.nbytes for tensor in layer.state_dict().values())
    ('LowBitLinear', 133120)
    """
    require_resident(resident)
    policy = policy or Policy()
    if skip:
        policy = replace(policy, skip=(*policy.skip, *([skip] if isinstance(skip, str) else skip)))
    choices = plan(model, method, policy)
    settings = _Settings.of(calibrate is not None, granularity, activations, rounding, learning)
    chosen = {choice.name: choice.layer for choice in choices if choice.method is not None}
    with (
        exact_float32(next(parameter.device for layer in chosen.values() for parameter in layer.parameters())),
        torch.no_grad(),
    ):
        observed: Mapping[str, Observed] = {}
        reconstruction = None
        if calibrate is not None:
            batches = calibrate if isinstance(calibrate, Sequence) else list(calibrate)
            learned = [choice.name for choice in choices if choice.method is not None and settings.learns(choice.method)]
            if settings.learning.blocks and learned and batches:
                reconstruction = Reconstruction(model, chosen, learned, batches, run, settings.learning)
            observed = _observe(model, chosen, learned, reconstruction, batches, run, progress)
        journal = None
        if resume is not None:
            described = {"method": method, "policy": asdict(policy), **asdict(settings)}
            identity = {"model": weights_digest(model), "method or other settings": described}
            journal = LayerJournal(resume, identity | {"set of calibration inputs": inputs_digest(observed)})
        packed: dict[str, QuantizedLayer] = {}
        with progress_bar(method, len(chosen), progress, unit="layer") as advance:
            for step in _steps(choices, reconstruction):
                for choice, layer, report in _finish(step, settings, observed, reconstruction, journal):
                    if layer is not None:
                        packed[choice.name] = layer
                        advance(1)
                    on_layer(report)
    if "" in packed:
        return set_resident(packed[""], resident)  # type: ignore[return-value]
    for name, layer in packed.items():
        replace_layer(model, name, layer)
    return set_resident(model, resident)


def _observe(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    learned: Sequence[str],
    reconstruction: Reconstruction | None,
    batches: Sequence[Any],
    run: Run,
    progress: bool,
) -> dict[str, Observed]:
    """What the layers meet, with products for those that are learned from them."""
    if reconstruction is None:
        return observe(model, layers, batches, run=run, products=bool(learned), progress=progress)
    observed = observe(model, layers, batches, run=run, progress=progress)
    in_units = {name for unit in reconstruction.units for name in unit.layers}
    # Layers that code multiplies with the weights of, instead of calling them.
    if others := {name: layers[name] for name in learned if name not in in_units and name in observed}:
        observed |= observe(model, others, batches, run=run, products=True, progress=progress)
    return observed


@dataclass(frozen=True)
class _Settings:
    """How layers are packed: see `quantize`."""

    granularity: Granularity
    activations: str
    rounding: str | None
    learning: LearningConfig

    @classmethod
    def of(
        cls,
        calibrated: bool,
        granularity: Granularity | None,
        activations: str | None,
        rounding: str | None,
        learning: LearningConfig | None,
    ) -> _Settings:
        activations = activations or ("static" if calibrated else "none")
        if activations not in ("static", "dynamic", "none"):
            raise InputError(f"activations must be 'static', 'dynamic' or 'none', not {activations!r}")
        if rounding not in ("nearest", "learned", None):
            raise InputError(f"rounding must be 'nearest' or 'learned', not {rounding!r}")
        if not calibrated and (activations == "static" or rounding == "learned"):
            needs = "activations='static'" if activations == "static" else "rounding='learned'"
            raise InputError(f"{needs} needs inputs to calibrate with: calibrate=")
        if not calibrated:
            rounding = "nearest"
        return cls(granularity or Granularity(), activations, rounding, learning or LearningConfig())

    def learns(self, method: Scheme) -> bool:
        """Whether the rounding of this method's weights is learned."""
        if not method.formats or method.block is not None:
            return False
        return self.rounding == "learned" or (self.rounding is None and method.bits <= 4)


@dataclass(frozen=True)
class _Step:
    """Layers that are packed at a time: one, or those of a unit that is learned together."""

    choices: tuple[Choice, ...]
    unit: Unit | None = None


def _steps(choices: Sequence[Choice], reconstruction: Reconstruction | None) -> Iterator[_Step]:
    """All layers in the order of the model; then what is learned unit by unit, in the order in which that works."""
    units = [] if reconstruction is None else reconstruction.units
    in_units = {name for unit in units for name in unit.layers}
    named = {choice.name: choice for choice in choices}
    yield from (_Step((choice,)) for choice in choices if choice.name not in in_units)
    yield from (_Step(tuple(named[name] for name in unit.layers), unit) for unit in units)


def _finish(
    step: _Step,
    settings: _Settings,
    observed: Mapping[str, Observed],
    reconstruction: Reconstruction | None,
    journal: LayerJournal | None,
) -> list[tuple[Choice, QuantizedLayer | None, LayerReport]]:
    """The layers of a step: as they were finished before, or packed now."""
    [first, *_] = step.choices
    if first.method is None:
        return [(first, None, LayerReport(first.name, None, first.reason))]
    stored = [] if journal is None else [journal.finished(choice.name, choice.layer) for choice in step.choices]
    done = [finished for finished in stored if finished is not None]
    if len(done) < len(step.choices):
        done = _pack_together(step, settings, observed, reconstruction)
        for choice, finished in zip(step.choices, done, strict=True):
            if journal is not None:
                journal.store(choice.name, *finished)
    for choice, (packed, _) in zip(step.choices, done, strict=True):
        if reconstruction is not None:
            reconstruction.put(choice.name, packed.dequantized())
    return [(choice, *finished) for choice, finished in zip(step.choices, done, strict=True)]


def _pack_together(
    step: _Step, settings: _Settings, observed: Mapping[str, Observed], reconstruction: Reconstruction | None
) -> list[tuple[QuantizedLayer, LayerReport]]:
    if step.unit is None:
        [choice] = step.choices
        with _naming(choice):
            return [_pack(choice, settings, observed.get(choice.name))]
    assert reconstruction is not None
    grids: dict[str, Grid] = {}
    for choice in step.choices:
        assert choice.method is not None
        with _naming(choice):
            grids[choice.name] = choose_grid(_weight(choice), choice.method, settings.granularity)
    learned = reconstruction.learn(step.unit, grids)
    block = step.unit.name if len(step.choices) > 1 else ""
    return [
        _pack_on_grid(choice, settings, observed.get(choice.name), grids[choice.name], learned[choice.name], block)
        for choice in step.choices
    ]


@contextmanager
def _naming(choice: Choice) -> Iterator[None]:
    """Put a layer's name into an `InputError` raised inside."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{choice.name or 'the layer'}: {error.reason}") from error


def _weight(choice: Choice) -> Float[Tensor, "rows columns"]:
    weight = matrix_of(choice.layer)
    if not bool(weight.isfinite().all()):
        raise InputError("a weight is not finite")
    return weight


def _pack(choice: Choice, settings: _Settings, observed: Observed | None) -> tuple[QuantizedLayer, LayerReport]:
    """Pack a layer by itself."""
    method, layer = choice.method, choice.layer
    assert method is not None
    cls = packed_class(method)
    weight = _weight(choice)
    if not issubclass(cls, LowBitLayer):
        packed = cls.from_float(layer, method)
        return packed, LayerReport(choice.name, method.name, choice.reason, format=method.name)
    if method.block is not None:
        floating = cls.packed(layer, method, settings.granularity)
        _quantize_inputs(floating, method, settings.activations, observed)
        return floating, _report(choice, floating)
    grid = choose_grid(weight, method, settings.granularity)
    learned = None
    if settings.learns(method) and observed is not None and observed.products is not None:
        learned = learn(weight, observed.gram, grid.format, grid.spread(weight.shape[1]), settings.learning)
    return _pack_on_grid(choice, settings, observed, grid, learned)


def _pack_on_grid(
    choice: Choice,
    settings: _Settings,
    observed: Observed | None,
    grid: Grid,
    learned: Learned | None,
    block: str = "",
) -> tuple[QuantizedLayer, LayerReport]:
    """Pack a layer's learned weight, or the nearest one."""
    assert choice.method is not None
    weight = matrix_of(choice.layer)
    floating = LowBitLayer.on_grid(choice.layer, choice.method, grid, weight if learned is None else learned.weight)
    _quantize_inputs(floating, choice.method, settings.activations, observed)
    largest = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
    return floating, replace(
        _report(choice, floating),
        clip=float((grid.maxval.amax(1) / largest).median()),
        output_error=None if learned is None else (learned.nearest_error, learned.error),
        block=block,
    )


def _report(choice: Choice, floating: LowBitLayer) -> LayerReport:
    assert choice.method is not None
    weight, rounded = matrix_of(choice.layer), floating.dequantized().flatten(1)
    return LayerReport(
        name=choice.name,
        method=choice.method.name,
        reason=choice.reason,
        format=floating.format.name,
        weight_sqnr=_decibel(weight, rounded - weight),
        zeros=float((rounded == 0).float().mean()),
        activations="" if floating.activations is None else floating.activations.name,
    )


def _quantize_inputs(layer: LowBitLayer, method: Scheme, how: str, observed: Observed | None) -> None:
    """Have a layer round its inputs, where it is called as a layer at all."""
    if how == "dynamic":
        # Without inputs to search on, the format that hardware multiplies.
        layer.quantize_inputs(format_named("e4m3fn" if len(method.activations) > 1 else method.activations[0]), None)
    if how == "static" and observed is not None and observed.called and observed.largest > 0:
        found = search(observed.sample, [format_named(name) for name in method.activations])
        layer.quantize_inputs(found.format, (found.maxval[0] / found.format.max).to(layer.codes.device))


def _decibel(signal: Float[Tensor, "rows columns"], noise: Float[Tensor, "rows columns"]) -> float:
    power = float(noise.square().sum())
    return float("inf") if power == 0 else 10 * float(torch.log10(signal.square().sum() / power))

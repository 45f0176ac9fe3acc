"""From a model to its quantized form, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.errors import InputError
from zoo.quantize.calibration import Observed, Run, default_run, observe
from zoo.quantize.formats import format_named
from zoo.quantize.layers import FloatLayer, Granularity, choose_grid, matrix_of
from zoo.quantize.learned import LearningConfig, learn
from zoo.quantize.methods import Method
from zoo.quantize.packed import QuantizedLayer, replace_layer
from zoo.quantize.policy import Choice, Policy, packed_class, plan
from zoo.quantize.search import search
from zoo.tokenizer import progress_bar

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class LayerReport:
    """What became of a layer.

    Attributes:
        name: of the layer.
        method: how it is quantized; ``None`` if it stayed.
        reason: why it stayed, or differs from the others.
        format: of its weights; empty if it stayed.
        clip: median of the clipping values over the largest magnitudes; ``None`` in block formats.
        weight_sqnr: signal over squared rounding error of the weights, in dB.
        zeros: share of weights that are exactly zero.
        activations: format of its inputs; empty if they stay.
        output_error: mean squared error of the outputs on the calibration inputs with nearest and with learned rounding.
    """

    name: str
    method: str | None
    reason: str = ""
    format: str = ""
    clip: float | None = None
    weight_sqnr: float | None = None
    zeros: float | None = None
    activations: str = ""
    output_error: tuple[float, float] | None = None


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
    run: Run = default_run,
    progress: bool = False,
    on_layer: Callable[[LayerReport], object] = lambda report: None,
) -> ModuleT:
    """Quantize a tokenizer or any module, in place: its linear layers and convolutions hold packed weights afterwards.

    Args:
        model: the model; on its own device and in its own precision.
        method: a name, such as ``"fp8-e4m3"``, ``"fp4-e2m1"``, ``"int8"`` or ``"binary-xnor"``; `zoo.quantize.names` has all.
        calibrate: batches of inputs, as ``run`` takes them: of a tokenizer, what `encode` takes. With them, the inputs of
            layers get 8 bits and rounding to 4 bits is learned, unless said otherwise.
        skip: names of layers to leave as they are, ``*`` standing for anything.
        policy: which other layers are kept; see `zoo.quantize.policy`.
        granularity: what shares a scale: the weights of an output by default.
        activations: ``"static"``: inputs of layers in 8 bits, with a scale from ``calibrate``; ``"dynamic"``: with a scale for
            each row; ``"none"``. By default ``"static"`` where there are inputs to calibrate with.
        rounding: ``"nearest"``, or ``"learned"`` from ``calibrate``. By default learned for 4 bits where there are inputs.
        learning: how long to learn.
        run: what to do with a batch; by default a tokenizer reconstructs it and a module is called with it.
        progress: show a progress bar.
        on_layer: called with what became of each layer.

    Returns:
        The model; the packed layer itself if the model is a single layer.

    Raises:
        InputError: there is no such method, no layer to quantize, or nothing to calibrate with; the model is quantized already;
            a weight or an input of a layer is not finite. The model is as it was then.
    """
    policy = policy or Policy()
    if skip:
        policy = replace(policy, skip=(*policy.skip, *([skip] if isinstance(skip, str) else skip)))
    choices = plan(model, method, policy)
    settings = _Settings.of(calibrate is not None, granularity, activations, rounding, learning)
    chosen = {choice.name: choice.layer for choice in choices if choice.method is not None}
    observed: dict[str, Observed] = {}
    if calibrate is not None:
        products = any(choice.method is not None and settings.learns(choice.method) for choice in choices)
        observed = observe(model, chosen, calibrate, run=run, products=products, progress=progress)
    packed: dict[str, QuantizedLayer] = {}
    with progress_bar(method, len(chosen), progress, unit="layer") as advance, torch.no_grad():
        for choice in choices:
            if choice.method is None:
                on_layer(LayerReport(choice.name, None, choice.reason))
                continue
            try:
                packed[choice.name], report = _pack(choice, settings, observed.get(choice.name))
            except InputError as error:
                raise InputError(f"{choice.name or 'the layer'}: {error.reason}") from error
            on_layer(report)
            advance(1)
    if "" in packed:
        return packed[""]  # type: ignore[return-value]
    for name, layer in packed.items():
        replace_layer(model, name, layer)
    return model


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

    def learns(self, method: Method) -> bool:
        """Whether the rounding of this method's weights is learned."""
        if not method.formats or method.block is not None:
            return False
        return self.rounding == "learned" or (self.rounding is None and method.bits <= 4)


def _pack(choice: Choice, settings: _Settings, observed: Observed | None) -> tuple[QuantizedLayer, LayerReport]:
    method, layer = choice.method, choice.layer
    assert method is not None
    cls = packed_class(method)
    weight = matrix_of(layer)
    if not bool(weight.isfinite().all()):
        raise InputError("a weight is not finite")
    if not issubclass(cls, FloatLayer):
        packed = cls.from_float(layer, method)
        return packed, LayerReport(choice.name, method.name, choice.reason, format=method.name)
    clip = errors = None
    if method.block is not None:
        floating = cls.packed(layer, method, settings.granularity)
    else:
        grid = choose_grid(weight, method, settings.granularity)
        largest = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
        clip = float((grid.maxval.amax(1) / largest).median())
        rounded = weight
        if settings.learns(method) and observed is not None and observed.products is not None:
            learned = learn(weight, observed.gram, grid.format, grid.spread(weight.shape[1]), settings.learning)
            rounded, errors = learned.weight, (learned.nearest_error, learned.error)
        floating = cls.on_grid(layer, method, grid, rounded)
    _quantize_inputs(floating, method, settings.activations, observed)
    difference = floating.dequantized().flatten(1) - weight
    return floating, LayerReport(
        name=choice.name,
        method=method.name,
        reason=choice.reason,
        format=floating.format.name,
        clip=clip,
        weight_sqnr=_decibel(weight, difference),
        zeros=float((floating.dequantized() == 0).float().mean()),
        activations="" if floating.activations is None else floating.activations.name,
        output_error=errors,
    )


def _quantize_inputs(layer: FloatLayer, method: Method, how: str, observed: Observed | None) -> None:
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

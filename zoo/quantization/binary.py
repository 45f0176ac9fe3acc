"""Binary layers: trained with latent real weights whose signs the forward pass uses, run with one bit per weight.

`binarize` puts them in the place of a model's layers, `update` drives their schedules during training, and
``zoo.quantize(model, "binary-xnor")`` or `PackedBinary.from_float` packs them. Layers follow the corrected formulas of the
methods by default: bias, dilation, groups and padding modes of the layer they replace count, and ReActNet's linear threshold
reaches the output. With ``official=True`` they repeat BiBench's code, so that its checkpoints give its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from zoo.errors import InputError
from zoo.kernels.binary import Geometry, binary_conv, binary_matmul, pack_signs, unpack_signs
from zoo.kernels.packing import row_bytes
from zoo.quantization.binary_operators import OPERATORS, BinaryLayer, Operator, gains_along, mean_input
from zoo.quantization.methods import Scheme, method_named
from zoo.quantization.packed import QuantizedLayer, replace_layer
from zoo.quantization.policy import tied_weights

#: How BiBench's own configurations spell a method.
_OFFICIAL_SPELLING = {"xnorplusplus": "xnor++"}
# Gains of positions in a packed layer, along rows and columns, or along time.
_GAINS = ("gains_0", "gains_1")
# BiBench's convolutions start here; they are meant to be overwritten by trained weights.
_OFFICIAL_WEIGHTS_BELOW = 1e-3


def operator_named(method: str) -> Operator:
    """The method of a name, with or without ``binary-`` before it.

    Raises:
        InputError: there is none; the message lists those that there are.
    """
    name = method.removeprefix("binary-")
    name = _OFFICIAL_SPELLING.get(name, name)
    if name not in OPERATORS:
        raise InputError(f"unknown binary method {method!r}; known: {', '.join(OPERATORS)}")
    return OPERATORS[name]


class _Trained(BinaryLayer):
    """What the three layers share: the order of the steps, schedules and checkpoints."""

    method: str
    operator: Operator

    def _adopt(self, method: str, official: bool) -> None:
        """Become a layer of this method; called once weight and bias exist."""
        self.operator = operator_named(method)
        self.method = next(name for name, operator in OPERATORS.items() if operator is self.operator)
        self.official = official
        self.operator.add_parameters(self)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*result"]:
        """Binarize the inputs and the weights, multiply, scale.

        Args:
            x: what the layer of full precision would take.

        Raises:
            InputError: it has too few axes.
        """
        if x.ndim < 1 + self.spatial:
            raise InputError(f"{type(self).__name__} takes {1 + self.spatial} axes or more, not {list(x.shape)}")
        if self.spatial and x.ndim == 1 + self.spatial:
            return self.forward(x[None])[0]
        signs = self.operator.binarize_input(self, x.to(self.weight.dtype))
        return self.operator.finish(self, self._product(signs, self.operator.binarize_weight(self)))

    def _product(self, x: Float[Tensor, "*shape"], weight: Float[Tensor, " outputs *kernel"]) -> Float[Tensor, "*result"]:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, method={self.method}"

    def update(self, epoch: int, max_epochs: int) -> None:
        """Set what the method schedules, before epoch ``epoch`` of 0 ... ``max_epochs - 1``.

        Raises:
            InputError: there is no such epoch.
        """
        if not 0 <= epoch < max_epochs:
            raise InputError(f"epoch {epoch} is not one of 0 ... {max_epochs - 1}")
        self.operator.update(self, epoch, max_epochs)

    @classmethod
    def from_float(cls, layer: nn.Module, method: str, official: bool = False) -> _Trained:
        """A binary layer that starts from the weights of one of full precision, with suitable learned scales.

        Raises:
            InputError: the layer cannot be binarized: its weights are not finite or there are none, or BiBench's layer of this
                method would ignore that it is grouped or dilated.
        """
        weight, bias = _numbers_of(layer)
        made = cls(**cls._sizes_of(layer), bias=bias is not None, method=method, official=official)
        made = made.to(device=weight.device, dtype=weight.dtype).train(layer.training)
        if made.weight.shape != weight.shape or cls._sizes_of(made) != cls._sizes_of(layer):
            raise InputError(f"BiBench's layer of {method} has neither groups nor dilation nor padding modes")
        with torch.no_grad():
            made.weight.copy_(weight)
            if bias is not None and made.bias is not None:
                made.bias.copy_(bias)
            made.operator.start_from_weights(made)
        return made

    @staticmethod
    def _sizes_of(layer: Any) -> dict[str, Any]:
        """The arguments that make a layer of the same shape, the bias aside."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        tau = state_dict.get(f"{prefix}tau")
        if tau is not None and self.method == "recu":
            # BiBench's buffer has no axis before its first update and one from then on.
            self.tau = self.tau.reshape(tau.shape)
        if self.method == "fda":
            # BiBench creates these at the first forward pass, so that checkpoints from before lack them.
            own = self.state_dict(prefix=prefix)
            state_dict |= {name: own[name] for name in own.keys() - state_dict.keys() if ".act_noise." in f".{name}"}
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class BinaryLinear(_Trained, nn.Linear):
    """A linear layer of signs.

    Args:
        in_features: numbers per row.
        out_features: results per row.
        bias: whether to add one. BiBench's BNN always has one, and its Bi-Real and ReActNet never add it.
        method: one of `OPERATORS`.
        official: repeat BiBench's quirks.
    """

    spatial: ClassVar[int] = 0

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, method: str, official: bool = False) -> None:
        needs_bias = official and operator_named(method).official_linear_needs_bias
        nn.Linear.__init__(self, in_features, out_features, bias or needs_bias)
        self._adopt(method, official)

    @property
    def inputs(self) -> int:
        return self.in_features

    @staticmethod
    def _sizes_of(layer: Any) -> dict[str, Any]:
        return {name: getattr(layer, name) for name in ("in_features", "out_features")}

    def _product(self, x: Float[Tensor, "*shape"], weight: Float[Tensor, "outputs inputs"]) -> Float[Tensor, "*result"]:
        return F.linear(x, weight)


class _Convolution(_Trained):
    """What the two convolutions share; PyTorch's own class comes behind this one."""

    in_channels: int
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        method: str,
        official: bool = False,
    ) -> None:
        bare = official and operator_named(method).official_conv_is_bare
        if bare:
            dilation, groups, bias, padding_mode = 1, 1, False, "zeros"
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        if bare:
            nn.init.uniform_(self.weight, 0, _OFFICIAL_WEIGHTS_BELOW)
        self._adopt(method, official)

    @property
    def inputs(self) -> int:
        return self.in_channels

    @staticmethod
    def _sizes_of(layer: Any) -> dict[str, Any]:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        return {name: getattr(layer, name) for name in names}

    def _product(self, x: Float[Tensor, "*shape"], weight: Float[Tensor, " outputs *kernel"]) -> Float[Tensor, "*result"]:
        return self._conv_forward(x, weight, None)


class BinaryConv1d(_Convolution, nn.Conv1d):
    """A convolution of signs over ``[batch, channels, time]``; the arguments are those of ``nn.Conv1d``.

    BiBench's layers ignore bias, dilation and groups but for ReCU and FDA, and so do these with ``official=True``.
    """

    spatial: ClassVar[int] = 1


class BinaryConv2d(_Convolution, nn.Conv2d):
    """A convolution of signs over ``[batch, channels, rows, columns]``; as `BinaryConv1d`, with ``nn.Conv2d``'s arguments."""

    spatial: ClassVar[int] = 2


_BINARY: dict[type[nn.Module], type[BinaryLinear | BinaryConv1d | BinaryConv2d]] = {
    nn.Linear: BinaryLinear,
    nn.Conv1d: BinaryConv1d,
    nn.Conv2d: BinaryConv2d,
}


def binarize(
    model: nn.Module, method: str, *, skip: Sequence[str] = ("first", "last", "downsample"), official: bool = False
) -> nn.Module:
    """Replace layers of a model by binary ones that start from its weights; the model is changed and returned.

    Linear layers and convolutions of one and two dimensions are replaced, and subclasses that change nothing but the forward
    pass. A layer whose weight is tied to another part of the model stays, as the head of a language model to its embeddings.
    A layer whose weights other code reads is not served by this: name it in ``skip``.

    Args:
        model: any module; pass the part that is to be binary, and keep encoders whose ids must not change out of it.
        method: one of `OPERATORS`.
        skip: layers that stay as they are: ``"first"`` and ``"last"`` in the order in which the model registers them,
            ``"downsample"`` for 1 x 1 convolutions with a stride, or names with the wildcards of ``fnmatch``.
        official: repeat BiBench's quirks.

    Raises:
        InputError: the method is unknown, a layer cannot be binarized, a pattern matches no layer, or no layer is left.
    """
    operator_named(method)
    layers = dict(_replaceable(model))
    names = list(layers)
    kept = set()
    for pattern in skip:
        found = _matching(pattern, layers)
        if not found and pattern != "downsample":
            raise InputError(f"no layer is called {pattern!r}; there are {', '.join(names[:8]) or 'none'}")
        kept |= set(found)
    kept |= tied_weights(model, layers).keys()
    chosen = [name for name in names if name not in kept]
    if not chosen:
        raise InputError(f"nothing is left to binarize: {len(names)} layers, all of them skipped or tied to others")
    for name in chosen:
        try:
            binary = _binary_class(layers[name]).from_float(layers[name], method, official)
        except InputError as error:
            raise InputError(f"{name}: {error.reason}") from error
        if not name:
            return binary
        replace_layer(model, name, binary)
    return model


def update(model: nn.Module, epoch: int, max_epochs: int) -> None:
    """Set what binary layers schedule, in all of a model, before epoch ``epoch`` of 0 ... ``max_epochs - 1``.

    Raises:
        InputError: there is no such epoch.
    """
    for module in model.modules():
        if isinstance(module, _Trained):
            module.update(epoch, max_epochs)


def pack(model: nn.Module) -> nn.Module:
    """Replace the binary layers of a trained model by packed ones; the model is changed and returned.

    Raises:
        InputError: a layer's schedule is not at its end, or its weights are not finite; names the layer.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, _Trained):
            try:
                packed = PackedBinary.from_float(layer, method_named(f"binary-{layer.method}"))
            except InputError as error:
                raise InputError(f"{name}: {error.reason}") from error
            if not name:
                return packed
            replace_layer(model, name, packed)
    return model


def _binary_class(layer: nn.Module) -> type[BinaryLinear | BinaryConv1d | BinaryConv2d]:
    return next(binary for base, binary in _BINARY.items() if isinstance(layer, base))


def _replaceable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and layers that a binary layer can stand in for.

    A subclass with a constructor of its own, as that of PyTorch's attention, is one whose weights other code reads.
    """
    for name, layer in model.named_modules():
        base = next((base for base in _BINARY if isinstance(layer, base)), None)
        if base is not None and type(layer).__init__ is base.__init__:
            yield name, layer


def _matching(pattern: str, layers: dict[str, nn.Module]) -> list[str]:
    names = list(layers)
    if pattern in ("first", "last"):
        return names[:1] if pattern == "first" else names[-1:]
    if pattern == "downsample":
        return [name for name, layer in layers.items() if _downsamples(layer)]
    return [name for name in names if fnmatchcase(name, pattern)]


def _downsamples(layer: nn.Module) -> bool:
    """Whether this is a 1 x 1 convolution with a stride."""
    return isinstance(layer, nn.Conv1d | nn.Conv2d) and set(layer.kernel_size) == {1} and set(layer.stride) != {1}


def _numbers_of(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, which a binary layer can start from.

    Raises:
        InputError: there are no weights, or some are not finite.
    """
    weight, bias = layer.weight.detach(), layer.bias
    if not weight.numel():
        raise InputError("the layer has no weights")
    if not bool(weight.isfinite().all()) or (bias is not None and not bool(bias.isfinite().all())):
        raise InputError("a weight is not finite")
    return weight, None if bias is None else bias.detach()


class PackedBinary(QuantizedLayer):
    """A binary layer at inference: one bit per weight, and integers until the scale.

    ``packed`` holds the signs of the weights in the format of `zoo.kernels.binary`, one row per output; the order within a row
    of a convolution is row, column, channel. A weight or an input of zero counts as positive here and as zero in training.
    """

    kind: ClassVar[str] = "binary"
    multiplies_weight: ClassVar[bool] = False
    exact: ClassVar[tuple[str, ...]] = ("scale", "threshold", *_GAINS)
    packed: UInt8[Tensor, "outputs bytes"]
    scale: Float[Tensor, " outputs"]
    threshold: Float[Tensor, " inputs"] | None

    def __init__(self, layer: nn.Module, description: Mapping[str, Any]) -> None:
        """A layer of the shape of ``layer``, with values that are not defined yet."""
        super().__init__(layer, str(description["method"]))
        self.input_gain = bool(description["input_gain"])
        self._geometry, self._padding = _geometry_of(layer)
        outputs, inputs = self.weight_shape[0], self.weight_shape[1] * self._geometry.groups
        weight = layer.weight
        assert isinstance(weight, Tensor)
        device = weight.device
        row = row_bytes(math.prod(self.weight_shape[1:]))
        self.register_buffer("packed", torch.empty(outputs, row, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.empty(outputs, device=device))
        self.register_buffer("threshold", torch.empty(inputs, device=device) if description["threshold"] else None)
        for name, positions in zip(_GAINS, description["positions"], strict=False):
            self.register_buffer(name, torch.empty(positions, device=device))
        bias = torch.empty(outputs, dtype=weight.dtype, device=device)
        self.bias = nn.Parameter(bias, requires_grad=False) if description["bias"] else None

    @classmethod
    def handles(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)

    @classmethod
    def from_float(cls, layer: nn.Module, method: Scheme) -> PackedBinary:
        """Pack a trained binary layer, or one of full precision as the method would start to train it.

        Raises:
            InputError: the layer was trained by another method, its training is not over, or its weights are not finite.
        """
        trained = layer if isinstance(layer, _Trained) else _untrained(layer, method.name)
        if trained.operator is not operator_named(method.name):
            raise InputError(f"the layer was trained by {trained.method}, so it cannot become {method.name}")
        _numbers_of(trained)
        with torch.no_grad():
            form = trained.operator.packed_form(trained)
            description = {
                "method": method.name,
                "bias": form.bias is not None,
                "threshold": form.threshold is not None,
                "input_gain": form.input_gain,
                "positions": [len(gains) for gains in form.position_gains],
            }
            made = cls(trained, description)
            made.packed.copy_(pack_signs(_flat_rows(form.latent.float())))
            made.scale.copy_(form.scale)
            for name, gains in zip(_GAINS, form.position_gains, strict=False):
                getattr(made, name).copy_(gains)
            for target, values in ((made.threshold, form.threshold), (made.bias, form.bias)):
                if target is not None and values is not None:
                    target.copy_(values)
        return made.train(layer.training)

    @classmethod
    def from_description(cls, layer: nn.Module, description: Mapping[str, Any]) -> PackedBinary:
        return cls(layer, description)

    def description(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "method": self.method,
            "bias": self.bias is not None,
            "threshold": self.threshold is not None,
            "input_gain": self.input_gain,
            "positions": [len(gains) for gains in self._position_gains()],
        }

    def dequantized(self) -> Float[Tensor, " outputs *kernel"]:
        """Signs times scales, in float32 and in the shape of the layer's weight."""
        signs = unpack_signs(self.packed, math.prod(self.weight_shape[1:])).float()
        outputs, channels, *kernel = self.weight_shape
        weight = signs.view(outputs, *kernel, channels).movedim(-1, 1).contiguous()
        return weight * self.scale.view(-1, *[1] * (weight.ndim - 1))

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*result"]:
        """The trained layer's result: signs multiplied exactly, and scaled in float32.

        Raises:
            InputError: the input has another width, or is smaller than the kernel.
        """
        spatial = len(self.weight_shape) - 2
        channels = x.shape[-1 - spatial] if x.ndim > spatial else 0
        if channels != self.weight_shape[1] * self._geometry.groups:
            raise InputError(f"inputs of {channels} channels where {self.weight_shape[1] * self._geometry.groups} are needed")
        y = self._linear(x) if spatial == 0 else self._convolve(x.reshape(-1, *x.shape[-1 - spatial :]), spatial)
        if self.bias is not None:
            y = y.add_(self.bias.float().view(-1, *[1] * spatial))
        return y.reshape(*x.shape[: -1 - spatial], *y.shape[1:]).to(self.compute_dtype) if spatial else y.to(self.compute_dtype)

    def _linear(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        signs = pack_signs(x if self.threshold is None else x.float() + self.threshold)
        product = binary_matmul(signs.flatten(0, -2) if signs.ndim > 1 else signs[None], self.packed, x.shape[-1])
        y = (product * self.scale).view(*x.shape[:-1], len(self.scale))
        return y * mean_input(x.float(), 0) if self.input_gain else y

    def _convolve(self, x: Float[Tensor, "batch channels *positions"], spatial: int) -> Float[Tensor, "batch outputs *places"]:
        scale = self.scale.view(-1, *[1] * spatial)
        gain = mean_input(x.float(), spatial) if self.input_gain else None
        if self.threshold is not None:
            x = x.float() + self.threshold.view(-1, *[1] * spatial)
        if self._padding is not None:
            x = F.pad(x, self._padding.margins[: 2 * spatial], mode=self._padding.mode)
        image = x.unsqueeze(2) if spatial == 1 else x
        product = binary_conv(image, self.packed, self._geometry)
        product = product.squeeze(2) if spatial == 1 else product
        # Products come with the batch inside; the layer replaced gave contiguous results, and views may rely on it.
        y = torch.mul(product, scale, out=scale.new_empty(product.shape))
        if gain is not None:
            y = y * gain
        for axis, gains in enumerate(self._position_gains()):
            y = y * gains_along(gains, axis, y)
        return y

    def _position_gains(self) -> list[Float[Tensor, " positions"]]:
        return [getattr(self, name) for name in _GAINS if hasattr(self, name)]


class _Padding(NamedTuple):
    """Padding of the inputs by some of their own numbers, as ``torch.nn.functional.pad`` takes it."""

    margins: tuple[int, ...]
    mode: str


def _untrained(layer: nn.Module, method: str) -> _Trained:
    """A layer of full precision as the method starts to train it, at the end of its schedule."""
    trained = _binary_class(layer).from_float(layer, method)
    trained.update(epoch=0, max_epochs=1)
    return trained


def _flat_rows(weight: Float[Tensor, " outputs *kernel"]) -> Float[Tensor, "outputs length"]:
    """Weights in the order of packed rows, channels last."""
    return weight.movedim(1, -1).flatten(1)


def _geometry_of(layer: Any) -> tuple[Geometry, _Padding | None]:
    """How the layer's kernel slides, and how its inputs are padded where not by zeros."""
    if isinstance(layer, nn.Linear):
        return Geometry((1, 1)), None

    def rows_and_columns(sizes: Sequence[int]) -> tuple[int, int]:
        rows, columns = (1, *sizes)[-2:]
        return rows, columns

    margins = tuple(layer._reversed_padding_repeated_twice)
    zeros = layer.padding_mode == "zeros"
    geometry = Geometry(
        rows_and_columns(layer.kernel_size),
        rows_and_columns(layer.stride),
        rows_and_columns(layer.dilation),
        (*margins, *[0] * (4 - len(margins))) if zeros else (0, 0, 0, 0),
        layer.groups,
    )
    return geometry, None if zeros else _Padding(margins, layer.padding_mode)

"""Linear and convolutional layers with weights of 4 to 8 bits, and inputs of 8 bits where they were calibrated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from zoo.errors import InputError
from zoo.kernels import lowbit
from zoo.kernels.formats import FloatFormat, format_named
from zoo.kernels.packing import block_size, pack, packed_bytes
from zoo.moved import names_of
from zoo.quantization.blocks import block_scales, quantize_mx, quantize_nvfp4
from zoo.quantization.methods import SCHEMES, Scheme, method_named
from zoo.quantization.packed import QuantizedLayer, convolve
from zoo.quantization.rounding import encode, fake_quantize
from zoo.quantization.search import search

#: Inputs from which integer products pay for turning the weight into integers.
_MANY_ROWS = 64
#: Shapes that FP8 products of a GPU take are multiples of this.
_TENSOR_CORE_MULTIPLE = 16
#: Compute capability of the first GPUs that multiply FP8.
_FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Granularity:
    """Groups of weights that share a scale, and how it is chosen.

    Attributes:
        per_channel: one scale for each output; one for the whole weight otherwise.
        group: columns of an output's weights that share a scale, a power of two; all of them by default.
        clip: ``"search"`` for the clipping value with the least squared error, ``"absmax"`` to clip nothing.
    """

    per_channel: bool = True
    group: int | None = None
    clip: str = "search"

    def __post_init__(self) -> None:
        if self.group is not None and (self.group < 1 or self.group & (self.group - 1) or not self.per_channel):
            raise InputError(f"group must be a power of two, of weights with scales per channel, not {self.group}")
        if self.clip not in ("search", "absmax"):
            raise InputError(f"clip must be 'search' or 'absmax', not {self.clip!r}")


@dataclass(frozen=True)
class Grid:
    """Values that the weights of a layer may take.

    Attributes:
        format: of the codes.
        maxval: clipping values, one row for each output or one in all, one column for each group.
    """

    format: FloatFormat
    maxval: Float[Tensor, "rows groups"]

    @property
    def scale(self) -> Float[Tensor, "rows groups"]:
        """Factor that the values of the codes are multiplied with."""
        return self.maxval / self.format.max

    def spread(self, columns: int) -> Float[Tensor, "rows columns"] | Float[Tensor, "rows 1"]:
        """The clipping value of each weight, or of each row if it has one."""
        groups = self.maxval.shape[1]
        if groups == 1:
            return self.maxval
        return self.maxval.repeat_interleave(block_size(columns, groups), 1)[:, :columns]


def choose_grid(weight: Float[Tensor, "rows columns"], method: Scheme, granularity: Granularity) -> Grid:
    """The format, of those the method leaves to choose from, and the clipping values of a weight.

    Raises:
        InputError: a weight is not finite.
    """
    formats = [format_named(name) for name in method.formats]
    rows, columns = weight.shape
    numbers = weight
    if granularity.group and granularity.group < columns:
        numbers = F.pad(weight, (0, -columns % granularity.group)).view(-1, granularity.group)
    if granularity.clip == "search":
        found = search(numbers, formats, per_channel=granularity.per_channel)
        return Grid(found.format, found.maxval.view(rows if granularity.per_channel else 1, -1))
    if not bool(weight.isfinite().all()):
        raise InputError("a number is not finite")
    largest = numbers.abs().amax(1, keepdim=True) if granularity.per_channel else numbers.abs().amax().view(1, 1)
    return Grid(formats[0], largest.float().view(rows if granularity.per_channel else 1, -1))


class LowBitLayer(QuantizedLayer):
    """A layer whose weights are codes of a small format, times a scale per output, group or block.

    Buffers: ``codes`` (packed rows), ``scale`` (float32, or one byte per block in MX and NVFP4), ``tensor_scale`` (NVFP4),
    ``input_scale`` (where inputs are quantized with a fixed scale).

    Attributes:
        format: of the codes.
        activations: format of the inputs; ``None`` leaves them as they are.
        dynamic: whether each row of the inputs gets its own scale, from its largest magnitude.
    """

    kind = "float"
    exact = ("scale", "tensor_scale", "input_scale")
    codes: UInt8[Tensor, "rows bytes"]
    scale: Tensor
    tensor_scale: Tensor | None
    input_scale: Tensor | None

    def __init__(self, layer: nn.Module, method: str, format: FloatFormat) -> None:
        super().__init__(layer, method)
        self.format = format
        self.block_scale = SCHEMES[method].block_scale if method in SCHEMES else None
        self.activations: FloatFormat | None = None
        self.dynamic = False
        for name in ("codes", "scale", "tensor_scale", "input_scale"):
            self.register_buffer(name, None)

    # ---- making one

    @classmethod
    def from_float(cls, layer: nn.Module, method: Scheme) -> LowBitLayer:
        return cls.packed(layer, method, Granularity())

    @classmethod
    def packed(cls, layer: nn.Module, method: Scheme, granularity: Granularity) -> LowBitLayer:
        """Pack a layer by rounding each weight to the nearest value.

        Raises:
            InputError: a weight is not finite.
        """
        weight = matrix_of(layer)
        if method.block is None:
            return cls.on_grid(layer, method, choose_grid(weight, method, granularity), weight)
        format = format_named(method.formats[0])
        quantize = quantize_mx(weight, format, method.block) if method.block_scale == "e8m0" else quantize_nvfp4(weight)
        made = _class_for(layer)(layer, method.name, format)
        made.codes = pack(quantize.codes[:, : weight.shape[1]].contiguous(), format.stored_bits)
        made.scale = quantize.scale
        if method.block_scale == "e4m3":
            made.tensor_scale = quantize.tensor_scale
        return made

    @classmethod
    def on_grid(cls, layer: nn.Module, method: Scheme, grid: Grid, weight: Float[Tensor, "rows columns"]) -> LowBitLayer:
        """Pack given weights, rounded to the nearest value of a grid."""
        made = _class_for(layer)(layer, method.name, grid.format)
        scale = grid.spread(weight.shape[1]) / grid.format.max
        # A scale of zero belongs to weights that are all zero.
        made.codes = pack(encode(torch.where(scale > 0, weight / scale, 0.0), grid.format), grid.format.stored_bits)
        made.scale = grid.scale.contiguous()
        return made

    @classmethod
    def from_description(cls, layer: nn.Module, description: Mapping[str, Any]) -> LowBitLayer:
        method = method_named(description["method"])
        made = _class_for(layer)(layer, method.name, format_named(description["format"]))
        rows, columns = matrix_of(layer).shape
        device = matrix_of(layer).device
        made.codes = torch.empty(rows, packed_bytes(columns, made.format.stored_bits), dtype=torch.uint8, device=device)
        byte_scales = made.block_scale is not None
        shape = tuple(description["scales"])
        made.scale = torch.empty(shape, dtype=torch.uint8 if byte_scales else torch.float32, device=device)
        if made.block_scale == "e4m3":
            made.tensor_scale = torch.empty((), device=device)
        if description["activations"] is not None:
            dynamic = bool(description["dynamic"])
            scale = None if dynamic else torch.empty((), device=device)
            made.quantize_inputs(format_named(description["activations"]), scale)
        return made

    def quantize_inputs(self, format: FloatFormat, scale: Float[Tensor, ""] | None) -> None:
        """Round the inputs to a format from now on, with a fixed scale, or with one for each row if it is ``None``."""
        self.activations = format
        self.dynamic = scale is None
        self.input_scale = scale

    def description(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "method": self.method,
            "format": self.format.name,
            "scales": list(self.scale.shape),
            "activations": None if self.activations is None else self.activations.name,
            "dynamic": self.dynamic,
        }

    # ---- what it holds

    @property
    def columns(self) -> int:
        """Weights of one output."""
        columns = 1
        for size in self.weight_shape[1:]:
            columns *= size
        return columns

    def scales(self) -> Float[Tensor, "rows groups"]:
        """Factors that the values of the codes are multiplied with, one row for each output."""
        if self.block_scale is None:
            return self.scale.expand(len(self.codes), -1)
        scales = block_scales(self.scale, self.block_scale)
        return scales if self.tensor_scale is None else scales * self.tensor_scale

    def dequantized(self) -> Float[Tensor, "outputs inputs *kernel"]:
        weight = lowbit.dequantize(self.codes, self.scales(), self.format, self.columns)
        return weight.view(self.weight_shape)

    # ---- what it does

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*result"]:
        """Compute the original layer with quantized weights, and inputs if they were calibrated.

        Every way of computing it gives the result of `reference` but for the order of sums.

        Raises:
            InputError: the inputs of a linear layer have another width.
        """
        if self.convolution is None and x.shape[-1:] != self.weight_shape[1:]:
            raise InputError(f"inputs of {list(x.shape)} where the last axis must have {self.weight_shape[1]}")
        x = x.to(self.compute_dtype)
        if self.resident and x.device.type == "cpu":
            return self.with_weight(self.rounded_inputs(x), self.weight)
        if self.convolution is None and not (torch.is_grad_enabled() and x.requires_grad):
            y = self._product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], len(self.codes))
            return y if self.bias is None else y + self.bias
        return self.with_weight(self.rounded_inputs(x), self.weight)

    def reference(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*result"]:
        """The same by plain arithmetic on dequantized weights and rounded inputs, in float32."""
        y = self.rounded_inputs(x.float())
        bias = None if self.bias is None else self.bias.float()
        if self.convolution is None:
            return F.linear(y, self.dequantized(), bias)
        return convolve(y, self.dequantized(), bias, self.convolution)

    def rounded_inputs(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Inputs as the weights meet them."""
        if self.activations is None:
            return x
        maxval = self._input_scale(x) * self.activations.max
        return fake_quantize(x, self.activations, maxval).to(x.dtype)

    def _input_scale(self, x: Float[Tensor, "*shape"]) -> Tensor:
        """Fixed, or per row: a linear layer's last axis, a convolution's whole item."""
        assert self.activations is not None
        if self.input_scale is not None:
            return self.input_scale
        # a convolution's item comes with or without a batch in front
        axes = (-1,) if self.convolution is None else tuple(range(1 - len(self.weight_shape), 0))
        return x.detach().float().abs().amax(axes, keepdim=True) / self.activations.max

    def _product(self, x: Float[Tensor, "batch columns"]) -> Float[Tensor, "batch rows"]:
        if self.activations is not None and self.scale.shape[-1] == 1 and self.block_scale is None:
            if self._multiplies_fp8(x):
                return self._product_fp8(x)
            if self._multiplies_integers(x):
                return self._product_of_integers(x)
        return lowbit.product(self.rounded_inputs(x), self.codes, self.scales(), self.format)

    def _multiplies_integers(self, x: Float[Tensor, "batch columns"]) -> bool:
        assert self.activations is not None
        uniform = self.activations.exponent_bits == 0 and lowbit.integer_factor(self.format) is not None
        return uniform and x.device.type == "cpu" and len(x) >= _MANY_ROWS and self.activations.bits <= 8

    def _product_of_integers(self, x: Float[Tensor, "batch columns"]) -> Float[Tensor, "batch rows"]:
        """Exact sums of products of integers, scaled in the end."""
        assert self.activations is not None
        scale = self._input_scale(x)
        limit = self.activations.max
        integers = torch.where(scale > 0, x.float() / scale, 0.0).clamp(-limit, limit).round().to(torch.int8)
        factor = lowbit.integer_factor(self.format)
        assert factor is not None
        y = lowbit.product_of_integers(integers, self.codes, self.format)
        return (y * (self.scales()[:, 0] / factor) * scale).to(x.dtype)

    def _multiplies_fp8(self, x: Float[Tensor, "batch columns"]) -> bool:
        """Whether this GPU multiplies the inputs' format with one that holds the weights exactly."""
        assert self.activations is not None
        if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) < _FP8_CAPABILITY:
            return False
        fits = len(self.codes) % _TENSOR_CORE_MULTIPLE == 0 and self.columns % _TENSOR_CORE_MULTIPLE == 0
        return fits and self.activations.name in ("e4m3fn", "e5m2") and _fits_e4m3(self.format)

    def _product_fp8(self, x: Float[Tensor, "batch columns"]) -> Float[Tensor, "batch rows"]:
        """Products of FP8 tensor cores, scaled in float32."""
        assert self.activations is not None
        scale = self._input_scale(x)
        dtype = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[self.activations.name]
        limit = self.activations.max
        inputs = torch.where(scale > 0, x.float() / scale, 0.0).clamp(-limit, limit).to(dtype)
        if self.format.name == "e4m3fn":
            values = self.codes.view(torch.float8_e4m3fn)
        else:
            values = lowbit.decoded(self.codes, self.format, self.columns).to(torch.float8_e4m3fn)
        one = torch.ones((), device=x.device)
        y = torch._scaled_mm(inputs, values.T, scale_a=one, scale_b=one, out_dtype=torch.float32)
        return (y * self.scales()[:, 0] * scale).to(x.dtype)


# Their weight is made on demand, where that of their bases is a parameter.
class LowBitLinear(LowBitLayer, nn.Linear):  # type: ignore[misc,override]
    """A `LowBitLayer` in place of an ``nn.Linear``."""


class LowBitConv1d(LowBitLayer, nn.Conv1d):  # type: ignore[misc,override]
    """A `LowBitLayer` in place of an ``nn.Conv1d``."""


class LowBitConv2d(LowBitLayer, nn.Conv2d):  # type: ignore[misc,override]
    """A `LowBitLayer` in place of an ``nn.Conv2d``."""


class LowBitConv3d(LowBitLayer, nn.Conv3d):  # type: ignore[misc,override]
    """A `LowBitLayer` in place of an ``nn.Conv3d``."""


def _class_for(layer: nn.Module) -> type[LowBitLayer]:
    classes = {nn.Linear: LowBitLinear, nn.Conv1d: LowBitConv1d, nn.Conv2d: LowBitConv2d, nn.Conv3d: LowBitConv3d}
    for plain, packed in classes.items():
        if isinstance(layer, plain):
            return packed
    raise InputError(f"a {type(layer).__name__} has no packed form")


def _fits_e4m3(format: FloatFormat) -> bool:
    """Whether E4M3 represents every value of a format."""
    e4m3 = format_named("e4m3fn")
    narrow = format.mantissa_bits <= e4m3.mantissa_bits and format.exponent_bits > 0
    return format == e4m3 or (narrow and format.max <= e4m3.max and format.smallest_step >= e4m3.smallest_step)


def matrix_of(layer: nn.Module) -> Float[Tensor, "rows columns"]:
    """The weight of a layer in float32, one row for each output."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().float().flatten(1)


#: Former names, for one release.
__getattr__ = names_of(
    __name__,
    {f"Float{kind}": f"zoo.quantization.layers:LowBit{kind}" for kind in ("Layer", "Linear", "Conv1d", "Conv2d", "Conv3d")},
)

"""Eight ways to binarize a layer: what each does to the weights, to the inputs and to the result.

The formulas are those of BiBench (Qin et al., ICML 2023, arXiv 2301.11233). An operator holds no numbers: its parameters live
on the layer, under the names that BiBench's checkpoints use. In training sign(0) is 0, and the padding of a convolution is
added after binarization, so that it adds nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.errors import InputError

#: What stands in for the derivative of sign: 1 up to |v| = 1, with or without the boundary; 2 - 2|v| up to 1; or 1.
Surrogate = Literal["clip", "open clip", "quadratic", "identity"]

_EPS = 1e-5
# XNOR++ has one gain for each row and column of the result, as many as this.
_POSITIONS = 2000
# FDA: the base frequency of its series, the weight of the sine beside the network, and how much narrower the network is.
_OMEGA = 0.1
_SINE = 0.1
_NARROWER = 64
# ReCU's quantile at the first and at the last epoch.
_TAU_FIRST, _TAU_LAST = 0.85, 0.99


class _Sign(torch.autograd.Function):
    """``scale * sign(v)``; the gradient is the surrogate's and is not multiplied by the scale."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, scale: Tensor | None, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(v)
        ctx.surrogate = surrogate
        signs = v.sign()
        return signs if scale is None else signs.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (v,) = ctx.saved_tensors
        (gradient,) = gradients
        surrogate: Surrogate = ctx.surrogate
        if surrogate == "clip":
            gradient = torch.where(v.abs() <= 1, gradient, 0)
        elif surrogate == "open clip":
            gradient = torch.where(v.abs() < 1, gradient, 0)
        elif surrogate == "quadratic":
            gradient = gradient * v.abs().mul_(-2).add_(2).clamp_(min=0)
        return gradient, None, None


class _FourierSign(torch.autograd.Function):
    """``sign(v) + amplitude sin(v)``; the gradient of sign is that of a Fourier series of ``n + 1`` terms, up to |v| = 1.

    Memory is written in place where it can be: these passes over every number are what the method costs in training.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, n: Tensor, amplitude: Tensor) -> Tensor:
        ctx.save_for_backward(v, n, amplitude)
        return v.sin().mul_(amplitude).add_(v.sign())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        v, n, amplitude = ctx.saved_tensors
        slope = fourier_slope(v, n).mul_(v.abs() <= 1)
        return slope.add_(v.cos().mul_(amplitude)).mul_(gradients[0]).to(v.dtype), None, None


def sign(
    v: Float[Tensor, "*shape"], surrogate: Surrogate, scale: Float[Tensor, "*broadcast"] | None = None
) -> Float[Tensor, "*shape"]:
    """Signs, -1, 0 or 1, times a scale that the gradient does not see."""
    return cast(Tensor, _Sign.apply(v, scale, surrogate))


def fourier_slope(v: Float[Tensor, "*shape"], n: Tensor | int) -> Float[Tensor, "*shape"]:
    """The derivative of FDA's series, ``4w/pi`` times the sum of ``cos((2i + 1) w v)`` for i = 0 ... n, in closed form."""
    # The series is even; the smallest of additions keeps the quotient defined at 0, where it is n + 1.
    angle = v.to(torch.promote_types(v.dtype, torch.float32)).mul(_OMEGA).abs_().add_(1e-20)
    series = (angle * (2 * (n + 1))).sin_().div_(angle.sin_())
    return series.mul_(2 * _OMEGA / math.pi)


class BinaryLayer(nn.Module):
    """Interface of a layer to the operators: `zoo.quantization.binary` has the linear layer and the two convolutions."""

    weight: Tensor
    # PyTorch's own layers disagree on its type: a parameter or ``None``.
    bias: Any
    #: Dimensions that a convolution slides over; 0 for a linear layer.
    spatial: ClassVar[int]
    #: Whether the layer repeats BiBench's quirks.
    official: bool

    # The parameters and buffers of single methods.
    o_scale: nn.Parameter
    l_scale: nn.Parameter
    h_scale: nn.Parameter
    w_scale: nn.Parameter
    channel_threshold: nn.Parameter
    alpha: Tensor
    tau: Tensor
    n: Tensor
    weight_noise: Noise
    act_noise: Noise

    @property
    def inputs(self) -> int:
        """Channels or features that come in."""
        raise NotImplementedError

    def across_channels(self, values: Float[Tensor, "*channels"]) -> Float[Tensor, "*broadcast"]:
        """Values per channel or feature in the shape that broadcasts with inputs and results."""
        return values.flatten().reshape(-1, *[1] * self.spatial)


@dataclass(frozen=True)
class PackedForm:
    """All that inference needs of a trained layer: ``input gain * scale * (signs . signs) * position gains + bias``.

    Attributes:
        latent: [outputs, ...]; the signs of these numbers are the binary weights.
        scale: one gain per output.
        bias: one number per output, or ``None``.
        threshold: added to every input channel before its sign is taken, or ``None``.
        input_gain: whether the result is multiplied by the mean of the sample's (of a row's, if linear) absolute inputs.
        position_gains: for every spatial axis one gain per position of the result, or none; positions beyond them have 1.
    """

    latent: Float[Tensor, " outputs *kernel"]
    scale: Float[Tensor, " outputs"]
    bias: Float[Tensor, " outputs"] | None
    threshold: Float[Tensor, " inputs"] | None = None
    input_gain: bool = False
    position_gains: tuple[Float[Tensor, " positions"], ...] = ()


class Operator:
    """A method in its plainest form, BNN: signs of weights and inputs, and a bias."""

    #: BiBench's convolutions take and ignore bias, dilation and groups; ReCU's and FDA's do not.
    official_conv_is_bare: ClassVar[bool] = True
    #: BiBench's linear layers of some methods own a bias that they never add, or own one whatever the caller says.
    official_linear_ignores_bias: ClassVar[bool] = False
    official_linear_needs_bias: ClassVar[bool] = False

    def add_parameters(self, layer: BinaryLayer) -> None:
        """Create what the method learns or schedules besides weight and bias."""

    def start_from_weights(self, layer: BinaryLayer) -> None:
        """Set the learned scales to what the weights suggest, after they were copied from a full-precision layer."""

    def update(self, layer: BinaryLayer, epoch: int, max_epochs: int) -> None:
        """Set what the method schedules, before an epoch."""

    def binarize_weight(self, layer: BinaryLayer) -> Float[Tensor, " outputs *kernel"]:
        return sign(layer.weight, "clip")

    def binarize_input(self, layer: BinaryLayer, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return sign(x, "clip")

    def finish(self, layer: BinaryLayer, product: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        bias = self.used_bias(layer)
        return product if bias is None else product + layer.across_channels(bias)

    def packed_form(self, layer: BinaryLayer) -> PackedForm:
        """The layer as it infers once training is over.

        Raises:
            InputError: the schedule has not come to an end at which the layer is binary.
        """
        return PackedForm(layer.weight, self.packed_scale(layer).flatten(), self.used_bias(layer))

    def packed_scale(self, layer: BinaryLayer) -> Float[Tensor, " outputs *ones"]:
        return torch.ones_like(mean_magnitude(layer.weight))

    def used_bias(self, layer: BinaryLayer) -> Float[Tensor, " outputs"] | None:
        """The bias, unless this is a layer of BiBench's that ignores it."""
        ignored = layer.official and layer.spatial == 0 and self.official_linear_ignores_bias
        return None if ignored else layer.bias


class BNN(Operator):
    """Hubara et al., "Binarized Neural Networks" (arXiv 1602.02830)."""

    official_linear_needs_bias = True


class XNOR(Operator):
    """Rastegari et al., "XNOR-Net" (arXiv 1603.05279), with one input scale per sample, or per row if linear."""

    def binarize_weight(self, layer: BinaryLayer) -> Float[Tensor, " outputs *kernel"]:
        if layer.spatial:
            return sign(layer.weight, "clip", mean_magnitude(layer.weight))
        centred = _centred(layer.weight)
        return sign(centred, "clip") * mean_magnitude(centred)

    def binarize_input(self, layer: BinaryLayer, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        scale = mean_input(x, layer.spatial)
        return sign(x, "clip", scale) if layer.spatial else sign(x, "clip") * scale

    def packed_form(self, layer: BinaryLayer) -> PackedForm:
        latent = layer.weight if layer.spatial else _centred(layer.weight)
        return PackedForm(latent, mean_magnitude(latent).flatten(), layer.bias, input_gain=True)


class XNORPlusPlus(Operator):
    """Bulat and Tzimiropoulos, "XNOR-Net++" (arXiv 1909.13863): learned gains of channels, rows and columns of the result."""

    _NAMES: ClassVar[dict[int, tuple[str, ...]]] = {0: (), 1: ("l_scale",), 2: ("h_scale", "w_scale")}

    def add_parameters(self, layer: BinaryLayer) -> None:
        outputs = len(layer.weight)
        shape = (1, outputs, *[1] * layer.spatial) if layer.spatial else (1, 1, outputs)
        layer.o_scale = nn.Parameter(torch.ones(shape))
        for axis, name in enumerate(self._NAMES[layer.spatial]):
            sizes = [1] * (2 + layer.spatial)
            sizes[2 + axis] = _POSITIONS
            layer.register_parameter(name, nn.Parameter(torch.ones(sizes)))

    def start_from_weights(self, layer: BinaryLayer) -> None:
        layer.o_scale.data = mean_magnitude(layer.weight.detach()).reshape(layer.o_scale.shape)

    def binarize_weight(self, layer: BinaryLayer) -> Float[Tensor, " outputs *kernel"]:
        return sign(layer.weight, self._surrogate(layer))

    def binarize_input(self, layer: BinaryLayer, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return sign(x, self._surrogate(layer))

    def finish(self, layer: BinaryLayer, product: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        product = product * layer.across_channels(layer.o_scale)
        for axis, gains in enumerate(self._position_gains(layer)):
            product = product * gains_along(gains, axis, product, fixed=layer.official)
        return super().finish(layer, product)

    def packed_form(self, layer: BinaryLayer) -> PackedForm:
        gains = tuple(_without_trailing_ones(gain.detach()) for gain in self._position_gains(layer))
        return PackedForm(layer.weight, layer.o_scale.flatten(), layer.bias, position_gains=gains)

    def _position_gains(self, layer: BinaryLayer) -> list[Float[Tensor, " positions"]]:
        return [getattr(layer, name).flatten() for name in self._NAMES[layer.spatial]]

    @staticmethod
    def _surrogate(layer: BinaryLayer) -> Surrogate:
        return "clip" if layer.spatial else "open clip"


class DoReFa(Operator):
    """Zhou et al., "DoReFa-Net" (arXiv 1606.06160), at one bit, with a weight scale per output."""

    def binarize_weight(self, layer: BinaryLayer) -> Float[Tensor, " outputs *kernel"]:
        scale = mean_magnitude(layer.weight)
        if layer.spatial:
            return sign(layer.weight, "clip", scale)
        return sign(layer.weight, "open clip") * scale

    def binarize_input(self, layer: BinaryLayer, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return sign(x, "clip" if layer.spatial else "open clip")

    def packed_scale(self, layer: BinaryLayer) -> Float[Tensor, " outputs *ones"]:
        return mean_magnitude(layer.weight)


class BiReal(Operator):
    """Liu et al., "Bi-Real Net" (arXiv 1808.00278): a piecewise quadratic stands in for the sign of the inputs."""

    official_linear_ignores_bias = True

    def binarize_weight(self, layer: BinaryLayer) -> Float[Tensor, " outputs *kernel"]:
        return sign(layer.weight, "clip", mean_magnitude(layer.weight))

    def binarize_input(self, layer: BinaryLayer, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return sign(x, "quadratic")

    def packed_scale(self, layer: BinaryLayer) -> Float[Tensor, " outputs *ones"]:
        return mean_magnitude(layer.weight)


class ReAct(BiReal):
    """Liu et al., "ReActNet" (arXiv 2003.03488): Bi-Real with a learned threshold per input channel.

    BiBench's linear layer takes the sign of the input itself, and the threshold reaches the gradient only.
    """

    def add_parameters(self, layer: BinaryLayer) -> None:
        layer.channel_threshold = nn.Parameter(torch.zeros(1, layer.inputs, *[1] * layer.spatial))

    def binarize_input(self, layer: BinaryLayer, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        signs = sign(x + layer.across_channels(layer.channel_threshold), "quadratic")
        return signs if self._threshold_counts(layer) else signs + (x.detach().sign() - signs.detach())

    def packed_form(self, layer: BinaryLayer) -> PackedForm:
        threshold = layer.channel_threshold.flatten() if self._threshold_counts(layer) else None
        scale = self.packed_scale(layer).flatten()
        return PackedForm(layer.weight, scale, self.used_bias(layer), threshold=threshold)

    @staticmethod
    def _threshold_counts(layer: BinaryLayer) -> bool:
        return layer.spatial > 0 or not layer.official


class ReCU(Operator):
    """Xu et al., "ReCU" (arXiv 2103.12369): standardised weights, whose tails are clipped since they never change sign."""

    official_conv_is_bare = False

    def add_parameters(self, layer: BinaryLayer) -> None:
        outputs = len(layer.weight)
        shape = (outputs, *[1] * layer.spatial) if layer.spatial else (1, 1, outputs)
        layer.alpha = nn.Parameter(torch.rand(shape))
        layer.register_buffer("tau", torch.tensor(1.0))

    def start_from_weights(self, layer: BinaryLayer) -> None:
        layer.alpha.data = mean_magnitude(_centred(layer.weight.detach())).reshape(layer.alpha.shape)

    def update(self, layer: BinaryLayer, epoch: int, max_epochs: int) -> None:
        growth = (_TAU_LAST - _TAU_FIRST) / (math.e - 1)
        tau = growth * math.exp(epoch / max_epochs) + _TAU_FIRST - growth
        # BiBench's buffer has one axis from the first update on.
        layer.tau = torch.full((1,), tau, device=layer.tau.device, dtype=layer.tau.dtype)

    def binarize_weight(self, layer: BinaryLayer) -> Float[Tensor, " outputs *kernel"]:
        centred = _centred(layer.weight)
        others = tuple(range(1, centred.ndim))
        standard = centred * (2 * math.sqrt(2) / (centred.var(others, keepdim=True) + _EPS).sqrt())
        reach = -standard.detach().abs().mean() * (2 - 2 * layer.tau).log()
        return sign(standard.clamp(-reach, reach), "identity")

    def binarize_input(self, layer: BinaryLayer, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if layer.training:
            own = tuple(range(-1 - layer.spatial, 0))
            x = x / (x.var(own, keepdim=True) + _EPS).sqrt()
        return sign(x, "quadratic")

    def finish(self, layer: BinaryLayer, product: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        alpha = layer.across_channels(layer.alpha)
        # A convolution's bias is added before the gain, a linear layer's after it.
        return super().finish(layer, product) * alpha if layer.spatial else super().finish(layer, product * alpha)

    def packed_form(self, layer: BinaryLayer) -> PackedForm:
        alpha = layer.alpha.flatten()
        bias = layer.bias * alpha if layer.spatial and layer.bias is not None else layer.bias
        return PackedForm(_centred(layer.weight), alpha, bias)


class FDA(Operator):
    """Xu et al., "Learning Frequency Domain Approximation for Binary Neural Networks" (NeurIPS 2021, arXiv 2103.00841).

    The gradient of sign is that of a truncated Fourier series, and small networks add what it misses, with a weight ``alpha``
    that the schedule takes to zero in the last epoch.
    """

    official_conv_is_bare = False

    def add_parameters(self, layer: BinaryLayer) -> None:
        layer.weight_noise = Noise(layer.weight[0].numel(), layer.official)
        layer.act_noise = Noise(layer.inputs, layer.official)
        layer.register_buffer("n", torch.tensor(9))
        layer.register_buffer("alpha", torch.tensor(0.1))

    def update(self, layer: BinaryLayer, epoch: int, max_epochs: int) -> None:
        layer.alpha.fill_(0.05 * (1 + math.cos(math.pi * (epoch + 1) / max_epochs)))
        layer.n.fill_(9 + int(9 * epoch / max_epochs))

    def binarize_weight(self, layer: BinaryLayer) -> Float[Tensor, " outputs *kernel"]:
        weight = layer.weight
        noisy = layer.weight_noise(weight.flatten(1), layer.n, layer.alpha).reshape(weight.shape)
        return mean_magnitude(weight) * noisy

    def binarize_input(self, layer: BinaryLayer, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        channels = -1 - layer.spatial
        return layer.act_noise(x.movedim(channels, -1), layer.n, layer.alpha).movedim(-1, channels)

    def packed_form(self, layer: BinaryLayer) -> PackedForm:
        if layer.alpha.item() != 0:
            raise InputError(
                f"FDA adds a share of {layer.alpha.item():.3g} of real numbers to its signs until the last epoch: "
                "call update(max_epochs - 1, max_epochs) before packing"
            )
        return super().packed_form(layer)

    def packed_scale(self, layer: BinaryLayer) -> Float[Tensor, " outputs *ones"]:
        return mean_magnitude(layer.weight)


class Noise(nn.Module):
    """FDA's estimate of what its series misses: a narrow two-layer network plus a tenth of the sine.

    BiBench's network has no width at all for fewer than 64 numbers; elsewhere it is a quarter as wide then.
    """

    def __init__(self, width: int, official: bool) -> None:
        super().__init__()
        hidden = width // _NARROWER or (0 if official else max(1, width // 4))
        self.fc1 = _linear(width, hidden)
        self.fc2 = _linear(hidden, width)

    def forward(self, v: Float[Tensor, "*shape width"], n: Tensor, alpha: Tensor) -> Float[Tensor, "*shape width"]:
        """Signs plus a share ``alpha`` of the estimate; ``n + 1`` terms of the series are the gradient of the signs."""
        signs = cast(Tensor, _FourierSign.apply(v, n, _SINE * alpha))
        hidden = F.relu(self.fc1(v)) * alpha
        rows = math.prod(v.shape[:-1])
        flat = torch.addmm(signs.reshape(rows, v.shape[-1]), hidden.reshape(rows, hidden.shape[-1]), self.fc2.weight.T)
        return flat.view(v.shape)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer without bias, which may have no width: PyTorch warns when it initialises one without numbers."""
    layer = nn.Linear(max(1, inputs), max(1, outputs), bias=False)
    layer.weight = nn.Parameter(layer.weight.detach()[:outputs, :inputs].clone())
    layer.in_features, layer.out_features = inputs, outputs
    return layer


def mean_magnitude(weight: Float[Tensor, " outputs *kernel"]) -> Float[Tensor, " outputs *ones"]:
    """Mean absolute weight of every output, without gradient."""
    return weight.detach().abs().mean(tuple(range(1, weight.ndim)), keepdim=True)


def mean_input(x: Float[Tensor, "*shape"], spatial: int) -> Float[Tensor, "*ones"]:
    """Mean absolute input of every sample of a convolution, or of every row, without gradient."""
    return x.detach().abs().mean(tuple(range(-1 - spatial, 0)), keepdim=True)


def gains_along(gains: Float[Tensor, " positions"], axis: int, like: Tensor, fixed: bool = False) -> Float[Tensor, "*ones"]:
    """Gains of the positions of one spatial axis, to be multiplied with a result; those beyond the table are 1, as untrained.

    Raises:
        InputError: the table must not be extended and is too short.
    """
    length = like.shape[2 + axis]
    if fixed and length > len(gains):
        raise InputError(f"the result has {length} positions on an axis, and BiBench's XNOR++ has gains for {len(gains)}")
    gains = F.pad(gains[:length], (0, max(0, length - len(gains))), value=1)
    return gains.reshape(-1, *[1] * (like.ndim - 3 - axis))


def _centred(weight: Float[Tensor, " outputs *kernel"]) -> Float[Tensor, " outputs *kernel"]:
    return weight - weight.mean(tuple(range(1, weight.ndim)), keepdim=True)


def _without_trailing_ones(gains: Float[Tensor, " positions"]) -> Float[Tensor, " used"]:
    learned = (gains != 1).nonzero()
    return gains[: int(learned[-1]) + 1 if len(learned) else 0]


OPERATORS: dict[str, Operator] = {
    "bnn": BNN(),
    "xnor": XNOR(),
    "xnor++": XNORPlusPlus(),
    "dorefa": DoReFa(),
    "bireal": BiReal(),
    "react": ReAct(),
    "recu": ReCU(),
    "fda": FDA(),
}

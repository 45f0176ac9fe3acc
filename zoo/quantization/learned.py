"""Learning which way to round: the output error of a layer decides, not the distance of each weight.

Up or down is a rectified sigmoid between the two neighbours on the grid, which a regularizer drives to 0 or 1 (Nagel et al.
2020, "Up or Down?", as used with floating-point grids by arXiv 2408.06995).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.errors import InputError
from zoo.kernels.formats import FloatFormat
from zoo.quantization.rounding import fake_quantize, round_to

ZETA, GAMMA = 1.1, -0.1


@dataclass(frozen=True)
class LearningConfig:
    """Settings of learning: how long and how hard.

    Attributes:
        iterations: steps of Adam.
        lr: their size.
        regularization: weight of the regularizer.
        beta: its exponent, from the first to the last step that it acts in.
        warmup: share of the steps before it acts.
        blocks: ``True`` learns the layers of a block together, see `zoo.quantization.reconstruction`; names of blocks, such as
            ``"decoder.blocks.*"``, do so for these. By default each layer is learned alone, on inputs of the original model.
        calls: calls of a block that it is learned on, evenly spaced over the calibration.

    Raises:
        InputError: ``iterations`` is negative or ``calls`` is not positive.
    """

    iterations: int = 1000
    lr: float = 0.01
    regularization: float = 0.01
    beta: tuple[float, float] = (20.0, 2.0)
    warmup: float = 0.2
    blocks: bool | tuple[str, ...] = False
    calls: int = 16

    def __post_init__(self) -> None:
        if self.iterations < 0 or self.calls < 1:
            raise InputError(f"learning takes 0 or more iterations on 1 or more calls, not {self.iterations} on {self.calls}")


def beta_at(step: int, config: LearningConfig) -> float | None:
    """Exponent of the regularizer at a step; ``None`` while it does not act."""
    warmup = int(config.warmup * config.iterations)
    if step < warmup:
        return None
    first, last = config.beta
    return first + (last - first) * (step - warmup) / max(1, config.iterations - warmup)


@dataclass(frozen=True)
class Neighbours:
    """The two values of a grid around each weight: ``step * floor`` and ``step * (floor + 1)``, clipped.

    Attributes:
        step: size of the grid's cell.
        floor: number of cells below, towards minus infinity.
        rest: position inside the cell, in [0, 1).
        maxval: clipping value.
    """

    step: Float[Tensor, "rows columns"]
    floor: Float[Tensor, "rows columns"]
    rest: Float[Tensor, "rows columns"]
    maxval: Float[Tensor, "#rows #columns"]

    def at(self, height: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """The weight at a height between the neighbours, 0 for the lower one and 1 for the upper one."""
        weight = self.step * (self.floor + height)
        return torch.maximum(torch.minimum(weight, self.maxval), -self.maxval)


def neighbours(
    weight: Float[Tensor, "rows columns"], format: FloatFormat, maxval: Float[Tensor, "#rows #columns"]
) -> Neighbours:
    """The cell of each weight on a scaled grid.

    Computed in float64 by the formula of the reference, with a real-valued bias: for clipped weights its last bit decides
    which of two cells is meant.
    """
    limit = torch.where(maxval > 0, maxval, 1.0).double()
    clipped = torch.maximum(torch.minimum(weight.double(), limit), -limit)
    if format.exponent_bits:
        top = format.max_code >> format.mantissa_bits
        bias = top + 1 - limit.log2() + math.log2(format.max / 2.0 ** (top - format.bias)) - 1
        exponent = (clipped.abs().log2() + bias).floor().clamp(min=1)
        step = torch.exp2(exponent - format.mantissa_bits - bias)
    else:
        step = (limit / format.max_code).expand_as(clipped)
    floor = (clipped / step).floor()
    return Neighbours(step.float(), floor.float(), (clipped / step - floor).float(), maxval)


def rectified_sigmoid(alpha: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """A sigmoid stretched beyond 0 and 1, and clipped to them."""
    return (alpha.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def inverse_rectified_sigmoid(height: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Argument at which the rectified sigmoid has a height in [0, 1]."""
    return -((ZETA - GAMMA) / (height - GAMMA) - 1).log()


def regularizer(alpha: Float[Tensor, "*shape"], beta: float) -> Float[Tensor, ""]:
    """Sum of ``1 - |2 h - 1| ** beta``, zero where every height is 0 or 1."""
    return (1 - (2 * rectified_sigmoid(alpha) - 1).abs().pow(beta)).sum()


def hard_weight(alpha: Float[Tensor, "rows columns"], cell: Neighbours) -> Float[Tensor, "rows columns"]:
    """The weight that a state of the learning stands for."""
    return cell.at((alpha >= 0).float())


def output_error(difference: Float[Tensor, "rows columns"], gram: Float[Tensor, "columns columns"]) -> Float[Tensor, ""]:
    """Mean over the inputs of the squared error of the outputs, from the mean of ``x x^T``."""
    return ((difference @ gram) * difference).sum()


@dataclass(frozen=True)
class Learned:
    """Weights on the grid, and what they cost.

    Attributes:
        weight: the better of learned and nearest.
        nearest_error, error: mean squared output error of nearest and of learned rounding.
    """

    weight: Float[Tensor, "rows columns"]
    nearest_error: float
    error: float


def learn(
    weight: Float[Tensor, "rows columns"],
    gram: Float[Tensor, "columns columns"],
    format: FloatFormat,
    maxval: Float[Tensor, "#rows #columns"],
    config: LearningConfig | None = None,
    on_step: Callable[[int], object] = lambda steps: None,
) -> Learned:
    """Choose the upper or the lower neighbour of every weight for the least error of the outputs.

    The error depends on the inputs only through the mean of their products, so a step costs the same for any number of inputs.

    Args:
        weight: to be rounded.
        gram: mean of ``x x^T`` over the inputs.
        format, maxval: the grid.
        config: settings of the optimisation.
        on_step: called with the number of steps just done.
    """
    config = config or LearningConfig()
    cell = neighbours(weight, format, maxval)
    nearest = fake_quantize(weight, format, maxval)
    alpha = inverse_rectified_sigmoid(cell.rest).requires_grad_()
    optimizer = torch.optim.Adam([alpha], lr=config.lr)
    with torch.enable_grad():
        for step in range(config.iterations):
            loss = output_error(cell.at(rectified_sigmoid(alpha)) - weight, gram)
            if (beta := beta_at(step, config)) is not None:
                loss = loss + config.regularization * regularizer(alpha, beta)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            on_step(1)
    learned = hard_weight(alpha.detach(), cell)
    errors = [float(output_error(candidate - weight, gram)) for candidate in (nearest, learned)]
    better = learned if errors[1] <= errors[0] else nearest
    return Learned(better, errors[0], min(errors))


def on_grid(weight: Float[Tensor, "rows columns"], format: FloatFormat, maxval: Float[Tensor, "#rows #columns"]) -> bool:
    """Whether every weight is a value of the scaled grid, within float32's rounding of the scale."""
    scale = torch.where(maxval > 0, maxval / format.max, 1.0)
    values = weight / scale
    return bool(torch.allclose(round_to(values, format), values, rtol=1e-5, atol=0))

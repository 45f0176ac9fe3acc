"""One-dimensional convolution over activations stored time-major, ``[batch, time, channels]``.

On a CPU, oneDNN's channels-last kernels run these shapes at up to twice the rate of the channels-first ones, pointwise
convolutions become plain matrix products, and padding is a copy of whole rows. A GPU is served as well by this layout.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.kernels import frames


def conv1d(
    x: Float[Tensor, "batch time channels_in"],
    weight: Float[Tensor, "channels_out channels_per_group kernel"],
    bias: Float[Tensor, " channels_out"] | None = None,
    stride: int = 1,
    groups: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> Float[Tensor, "batch time_out channels_out"]:
    """Convolve along time, with ``padding`` zeros on either side.

    ``time_out = (time + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1``.
    """
    if weight.shape[2] == 1 and stride == 1 and groups == 1 and not padding:
        return F.linear(x, weight[:, :, 0], bias)
    if weight.shape[1] == 1 and groups == 1 and dilation == 1:
        # A single input channel: both layouts are the same bytes, so the convolution could not tell which one is meant.
        return F.linear(F.pad(x[:, :, 0], (padding, padding)).unfold(1, weight.shape[2], stride), weight[:, 0], bias)
    if dilation > 1 and padding:
        # oneDNN's own padding of dilated depthwise kernels takes up to fifty times as long.
        x, padding = F.pad(x, (0, 0, padding, padding)), 0
    image = x.transpose(1, 2).unsqueeze(2)
    kernel = weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
    found = F.conv2d(image, kernel, bias, (1, stride), (0, padding), (1, dilation), groups)
    return found.squeeze(2).transpose(1, 2).contiguous()


def beside(weight: Float[Tensor, "channels_in channels_out kernel"], stride: int) -> Float[Tensor, "columns rows"]:
    """The matrix of `conv_transpose1d`: weights of a transposed convolution with a kernel of whole strides."""
    taps = weight.shape[2] // stride
    return weight.unflatten(2, (taps, stride)).permute(3, 1, 2, 0).flatten(2).flatten(0, 1).contiguous()


def conv_transpose1d(
    x: Float[Tensor, "batch time channels_in"],
    matrix: Float[Tensor, "columns rows"],
    bias: Float[Tensor, " channels_out"],
    stride: int,
) -> Float[Tensor, "batch time_out channels_out"]:
    """Transposed convolution along time, with a kernel of whole strides: ``time_out = (time - 1) * stride + kernel``.

    A step of the input and those before it, side by side, give ``stride`` steps of the output in one product.

    Args:
        x: the input.
        matrix: see `beside`.
        bias: added to every step.
        stride: of the convolution.
    """
    batch, time, channels = x.shape
    taps = matrix.shape[1] // channels
    padded, steps = F.pad(x, (0, 0, taps - 1, taps - 1)), time + taps - 1
    side_by_side = torch.cat([padded[:, taps - 1 - tap : taps - 1 - tap + steps] for tap in range(taps)], dim=2)
    return F.linear(side_by_side, matrix, bias.repeat(stride)).view(batch, steps * stride, len(bias))


def elu(
    x: Float[Tensor, "batch time channels"], out: Float[Tensor, "batch time channels"] | None = None
) -> Float[Tensor, "batch time channels"]:
    """Exponential linear unit; where no gradient is needed, by plain exponentials, and into ``out`` if it is given.

    PyTorch's own kernel evaluates ``expm1`` at a fifth of the speed. This one differs by at most two units of float32 at 1.
    """
    if torch.is_grad_enabled():
        return F.elu(x)
    if (compiled := frames.elu(x, out)) is not None:
        return compiled
    out = torch.clamp(x, max=0, out=out).mul_(math.log2(math.e)).exp2_().sub_(1)
    return torch.maximum(x, out, out=out)


def reflect_pad(
    x: Float[Tensor, "batch time channels"],
    left: int,
    right: int,
    stride: int = 1,
    lengths: Int[Tensor, " batch"] | None = None,
    activate: bool = False,
) -> Float[Tensor, "batch padded channels"]:
    """Reflect each item at its own two ends, as SEANet's convolutions do.

    The right side gets ``right`` samples and as many more as complete the last stride. An item too short to be reflected
    (length at most the larger side) is first extended by zeros on the right, and the same number of samples is cut from the
    right end afterwards. What follows an item's own padding in a ragged batch is unspecified.

    Args:
        x: activations; item ``i`` is valid in its first ``lengths[i]`` rows (all rows when ``lengths`` is ``None``).
        left, right: samples to add on either side.
        stride: stride of the convolution that follows.
        lengths: valid rows per item, each at least 1, on the device of ``x``.
        activate: apply `elu` on the way.
    """
    batch, time, channels = x.shape
    total_right = right + (-time % stride if lengths is None else stride - 1)
    if torch.is_grad_enabled() or not activate:
        inner = elu(x) if activate else x
        padded = F.pad(inner, (0, 0, left, total_right))
    else:
        # The activation is written to where it is needed, between the margins.
        padded = x.new_empty(batch, left + time + total_right, channels)
        inner = elu(x, out=padded[:, left : left + time])

    if lengths is None and time > max(left, total_right):
        padded[:, :left] = inner[:, 1 : left + 1].flip(1)
        padded[:, left + time :] = inner[:, time - 1 - total_right : time - 1].flip(1)
        return padded
    if lengths is None:
        lengths = torch.full((batch,), time, dtype=torch.int64, device=x.device)
    reach = (right + -lengths % stride).clamp(min=left)
    extended = torch.where(lengths > reach, lengths, reach + 1)
    target = lengths[:, None] + torch.arange(total_right, dtype=torch.int64, device=x.device)
    source = torch.where(target < extended[:, None], target, 2 * (extended[:, None] - 1) - target)
    tail = _rows_or_zero(inner, source, lengths)
    first = torch.arange(left, 0, -1, dtype=torch.int64, device=x.device)
    padded[:, :left] = _rows_or_zero(inner, first.expand(batch, left), lengths)
    return padded.scatter_(1, (left + target)[..., None].expand(-1, -1, channels), tail)


def _rows_or_zero(
    x: Float[Tensor, "batch time channels"], rows: Int[Tensor, "batch picked"], lengths: Int[Tensor, " batch"]
) -> Float[Tensor, "batch picked channels"]:
    """Pick rows per item; a row outside the item is zero."""
    inside = (rows >= 0) & (rows < lengths[:, None])
    index = rows.clamp(0, x.shape[1] - 1)[..., None].expand(-1, -1, x.shape[2])
    # Not a product: rows behind an item's end may hold anything, a NaN as well.
    return x.gather(1, index).masked_fill(~inside[..., None], 0)


class ReflectConv1d(nn.Module):
    """Convolution over ``[batch, time, channels]`` with SEANet's asymmetric reflection padding.

    The padding totals ``kernel - stride``, the larger half on the left; item lengths become ``ceil(length / stride)``.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.right = (kernel - stride) // 2
        self.left = kernel - stride - self.right
        initial = nn.Conv1d(channels_in, channels_out, kernel)
        assert initial.bias is not None
        self.weight = initial.weight
        self.bias = initial.bias

    def forward(
        self,
        x: Float[Tensor, "batch time channels_in"],
        lengths: Int[Tensor, " batch"] | None = None,
        activate: bool = False,
    ) -> Float[Tensor, "batch time_out channels_out"]:
        """Pad every item at its own ends, after an ELU if asked to, and convolve; for kernels of more than one sample."""
        # Not -(-size // stride): of a negative size, the graphs of an export divide towards zero.
        count = (x.shape[1] + self.stride - 1) // self.stride
        x = reflect_pad(x, self.left, self.right, self.stride, lengths, activate)
        return conv1d(x, self.weight, self.bias, self.stride)[:, :count]

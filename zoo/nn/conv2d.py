"""Convolutions of images in the layout and by the algorithm that are quickest on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.kernels import native, winograd
from zoo.nn.autocast import CastOnce, autocast_to

Maps = Float[Tensor, "batch _channels _rows _columns"]
NetworkT = TypeVar("NetworkT", bound=nn.Module)

# Numbers that PyTorch's upsampling in the layout of quick convolutions can count.
_COUNTABLE = 1 << 31


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` with weights in the layout of the maps, and convolutions of 3x3 by tiles (see `zoo.kernels.winograd`).

    Weights of less than float32 are laid out once, when they are cast; PyTorch would do it at each call. Under autocast, which
    would cast weights at each call, they are cast once and kept beside the others.

    Attributes:
        side: of the tiles of a float32 convolution: 4 is more exact than PyTorch's, and 6 is quicker and less exact.
    """

    #: Its result is that of ``nn.Conv2d``, so `zoo.quantize` may pack it.
    plain_product: ClassVar[bool] = True

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0, *, bias: bool = True, side: int = 4
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding, bias=bias)
        self.side = side
        self._cast = CastOnce(_laid_out)

    def forward(self, x: Maps) -> Maps:
        return self.fused(x)

    def fused(self, x: Maps, added: Maps | None = None, enlarged: bool = False) -> Maps:
        """The convolution of maps, or of maps of twice their rows and columns, with others added to the result."""
        if autocast_to(x) is None and (side := self._tiles(x, added, enlarged)):
            # Detached for those who watch which weights are used.
            tiled = winograd.convolve(x, self.weight.detach(), self.bias, side, added=added, enlarged=enlarged)
            if tiled is not None:
                return tiled
        weight = self._cast.of(self.weight, x)
        found = self._conv_forward(enlarge(x) if enlarged else x, weight, self.bias)
        if added is None:
            return found
        return found.add_(added) if native.unwatched(found, added) and found.dtype == added.dtype else added + found

    def _tiles(self, x: Maps, added: Maps | None, enlarged: bool) -> int:
        """Side of the tiles that this is computed by; 0 for none."""
        given = (x, self.weight) if added is None else (x, self.weight, added)
        if (
            self.kernel_size != (3, 3)
            or self.stride != (1, 1)
            or self.padding != (1, 1)
            or any(tensor.dtype != torch.float32 for tensor in given)
            or not native.unwatched(*given)
            or watched(self)
        ):
            return 0
        rows, columns = x.shape[2] << enlarged, x.shape[3] << enlarged
        sides = range(self.side, 3, -2)
        return next((side for side in sides if winograd.pays(x.shape[1], len(self.weight), rows, columns, side)), 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Conv2d:
        super()._apply(fn, recurse)
        if self.weight.dtype.itemsize < 4 and self.weight.device.type == "cpu":
            self.weight.data = _laid_out(self.weight.data)
        return self


def convolved(layer: nn.Module, x: Maps, added: Maps | None = None, enlarged: bool = False) -> Maps:
    """`Conv2d.fused` of a layer that may be another one: packed, or watched by hooks."""
    if type(layer) is Conv2d and not watched(layer):
        return layer.fused(x, added, enlarged)
    found: Tensor = layer(enlarge(x) if enlarged else x)
    return found if added is None else added + found


def watched(layer: nn.Module) -> bool:
    """Whether hooks see what goes into a layer and what comes out, and may keep it."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def enlarge(x: Maps) -> Maps:
    """Every pixel four times."""
    return F.interpolate(x.contiguous() if 4 * x.numel() >= _COUNTABLE else x, scale_factor=2.0, mode="nearest")


def coarse_tiles(network: NetworkT) -> NetworkT:
    """Let a decoder's convolutions, in place, use the larger tiles: no ids depend on them."""
    for module in network.modules():
        if isinstance(module, Conv2d):
            module.side = 6
    return network


def _laid_out(weight: Float[Tensor, "outputs inputs rows columns"]) -> Float[Tensor, "outputs inputs rows columns"]:
    return weight.contiguous(memory_format=torch.channels_last)

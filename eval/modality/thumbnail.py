"""The baseline for images: a thumbnail coded in the same number of bits, and blown up again.

A thumbnail is a grid of samples quantised evenly: RGB at a few bits per channel, or luma with chroma at half or a quarter of
its resolution. Only the samples count. No header tells the layout or the size of the grid, in the baseline's favour.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

# ITU-R BT.601, full range, as in JPEG: luma and the blue and red differences, these in [-0.5, 0.5].
_TO_YCC = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
_TO_RGB = torch.linalg.inv(_TO_YCC)


@dataclass(frozen=True)
class Layout:
    """Division of bits among the samples of a thumbnail.

    Attributes:
        depths: bits per sample of red, green and blue, or of luma and the two chroma channels.
        subsampling: 1 is RGB; otherwise a chroma sample stands for a square of that many luma samples on each side.
    """

    depths: tuple[int, int, int]
    subsampling: int = 1

    def bits(self, height: int, width: int) -> int:
        """Bits of a thumbnail of ``height`` x ``width`` pixels."""
        if self.subsampling == 1:
            return height * width * sum(self.depths)
        chroma_height, chroma_width = self.chroma_size(height, width)
        return height * width * self.depths[0] + chroma_height * chroma_width * sum(self.depths[1:])

    def chroma_size(self, height: int, width: int) -> tuple[int, int]:
        """Samples of a chroma channel."""
        return -(-height // self.subsampling), -(-width // self.subsampling)

    def __str__(self) -> str:
        depths = "-".join(map(str, self.depths))
        return f"RGB {depths}" if self.subsampling == 1 else f"YCbCr {depths}, chroma 1/{self.subsampling}"


LAYOUTS: tuple[Layout, ...] = (
    *(Layout((depth, depth, depth)) for depth in range(2, 7)),
    Layout((5, 6, 5)),
    *(Layout((depth, depth, depth), subsampling) for subsampling in (2, 4) for depth in range(3, 7)),
)


@dataclass(frozen=True)
class Thumbnail:
    """A thumbnail, blown up to the size of its original.

    Attributes:
        image: in [0, 1].
        layout: the best of `LAYOUTS`; ``None`` where the bits do not buy a single pixel and the image is an even grey.
        height, width: of the thumbnail.
        bits: that its samples take.
    """

    image: Float[Tensor, "3 height width"]
    layout: Layout | None
    height: int
    width: int
    bits: int


def thumbnail(image: Float[Tensor, "3 height width"], bits: int) -> Thumbnail:
    """The thumbnail, within a number of bits, that is closest to an image in [0, 1] by PSNR.

    Of each layout the largest grid of the image's aspect is tried. Shrinking and blowing up are bicubic, shrinking antialiased.
    """
    best = Thumbnail(torch.full_like(image, 0.5), None, 0, 0, 0)
    least = (best.image - image).square().mean()
    for layout in LAYOUTS:
        size = largest_size(layout, image.shape[1], image.shape[2], bits)
        if size is None:
            continue
        restored = coded(image, layout, *size)
        error = (restored - image).square().mean()
        if error < least:
            best, least = Thumbnail(restored, layout, *size, layout.bits(*size)), error
    return best


def largest_size(layout: Layout, height: int, width: int, bits: int) -> tuple[int, int] | None:
    """The largest grid of the aspect ``height : width``, no larger than that, whose samples take at most ``bits``."""
    by_height = ((rows, min(width, max(1, round(rows * width / height)))) for rows in range(1, height + 1))
    by_width = ((min(height, max(1, round(columns * height / width))), columns) for columns in range(1, width + 1))
    fitting = [size for size in (*by_height, *by_width) if layout.bits(*size) <= bits]
    return max(fitting, key=lambda size: size[0] * size[1], default=None)


def coded(image: Float[Tensor, "3 height width"], layout: Layout, rows: int, columns: int) -> Float[Tensor, "3 height width"]:
    """An image in [0, 1] as a thumbnail of ``rows`` x ``columns`` shows it."""
    size = image.shape[1:]
    if layout.subsampling == 1:
        small = _resize(image, (rows, columns)).clamp(0, 1)
        steps = image.new_tensor([2**depth - 1.0 for depth in layout.depths])[:, None, None]
        return _resize((small * steps).round() / steps, size).clamp(0, 1)
    components = torch.einsum("oc,chw->ohw", _TO_YCC.to(image.device), image)
    luma_steps = 2 ** layout.depths[0] - 1
    luma = _resize((_resize(components[:1], (rows, columns)).clamp(0, 1) * luma_steps).round() / luma_steps, size)
    # An odd number of levels, so that there is a neutral one and grey stays grey.
    chroma_steps = image.new_tensor([2**depth - 2.0 for depth in layout.depths[1:]])[:, None, None]
    chroma = _resize(components[1:], layout.chroma_size(rows, columns)).clamp(-0.5, 0.5)
    chroma = _resize((chroma * chroma_steps).round() / chroma_steps, size)
    return torch.einsum("oc,chw->ohw", _TO_RGB.to(image.device), torch.cat([luma, chroma])).clamp(0, 1)


def _resize(image: Float[Tensor, "channels _ _"], size: tuple[int, int] | torch.Size) -> Float[Tensor, "channels _ _"]:
    return F.resize(image, list(size), InterpolationMode.BICUBIC, antialias=True)

"""Search for the format and the clipping value with the least squared error, from one sort of the numbers.

The method tries 111 clipping values for every split into exponent and mantissa (Kuzmin et al. 2022, "FP8 Quantization: The
Power of the Exponent", which arXiv 2408.06995 searches with). A grid's cells are intervals of the sorted numbers, so prefix
sums of the numbers and their squares give the error of a candidate without touching the numbers again. Where a grid has nearly
as many cells as there are numbers, they are rounded to each candidate instead, which then is quicker.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.errors import InputError
from zoo.kernels.formats import FloatFormat, finite, levels
from zoo.quantization.rounding import round_to

CANDIDATES = 111
LOWEST, HIGHEST = 0.1, 1.2
# Borders looked up, or numbers rounded, at a time: what the second-level cache holds.
_MOST_AT_ONCE = 1 << 18
# Looking up a border takes as long as rounding so many numbers.
_ROUNDED_PER_BORDER = 12


@dataclass(frozen=True)
class Found:
    """Result of a search.

    Attributes:
        format: the winner, of a tensor as a whole.
        maxval: clipping value of each channel, one number if per tensor.
        grid: the candidates.
        error: sums over the batches of the mean squared error.
    """

    format: FloatFormat
    maxval: Float[Tensor, " channels"]
    grid: Float[Tensor, "candidates channels"]
    error: Float[Tensor, "formats candidates channels"]


def search(
    batches: Tensor | Iterable[Tensor],
    formats: Sequence[FloatFormat],
    *,
    per_channel: bool = False,
    candidates: int = CANDIDATES,
) -> Found:
    """The format and clipping values with the least squared error.

    The candidates are evenly spaced from 0.1 to 1.2 of the largest magnitude in the first batch. The format is the one that
    most channels prefer, the first one on a tie, and so is the smallest of equally good clipping values.

    Args:
        batches: a tensor, or several whose errors add up; the first axis is the channel if ``per_channel``.
        formats: what to choose from.
        per_channel: one clipping value for each index of the first axis.
        candidates: clipping values to try.

    Raises:
        InputError: there are no numbers, or one is not finite.
    """
    grid = error = None
    for batch in [batches] if isinstance(batches, Tensor) else batches:
        rows = batch.detach().float().flatten(1) if per_channel and batch.ndim else batch.detach().float().reshape(1, -1)
        if not rows.numel():
            raise InputError("there are no numbers to search a format for")
        if not bool(rows.isfinite().all()):
            raise InputError("a number is not finite")
        if grid is None:
            largest = rows.abs().amax(1)
            fractions = torch.linspace(LOWEST, HIGHEST, candidates, device=rows.device)
            grid = (fractions[:, None] * largest).clamp(max=torch.finfo(torch.float32).max)
            error = torch.zeros(len(formats), *grid.shape, dtype=torch.float64, device=rows.device)
        assert error is not None
        ordered: dict[bool, _Sorted] = {}
        for index, format in enumerate(formats):
            if rows.shape[1] <= _ROUNDED_PER_BORDER * (format.max_code + 1):
                error[index] += _errors_by_rounding(rows, format, grid)
                continue
            if format.signed not in ordered:
                ordered[format.signed] = _Sorted.of(rows, format.signed)
            error[index] += _errors_by_cells(ordered[format.signed], format, grid)
    if grid is None or error is None:
        raise InputError("there are no numbers to search a format for")
    preferred = error.amin(1).argmin(0)
    best = int(torch.bincount(preferred, minlength=len(formats)).argmax())
    maxval = grid.gather(0, error[best].argmin(0)[None])[0]
    return Found(formats[best], maxval, grid, error.float())


def mantissa_splits(bits: int, signed: bool = True, profile: str = "paper") -> list[FloatFormat]:
    """Formats of a width to choose from.

    Args:
        bits: 4, 6 or 8.
        signed: whether there is a sign bit; a mantissa bit more otherwise.
        profile: ``"paper"`` the splits of arXiv 2408.06995, ``"qualcomm"`` all mantissas from 1 to ``bits - 2``.
    """
    widths = {
        "paper": {8: (2, 3, 4, 5), 6: (2, 3), 4: (1, 2, 0)},
        "qualcomm": {bits: tuple(range(1, bits - 1))},
    }[profile][bits]
    return [finite(bits - int(signed) - mantissa, mantissa, signed) for mantissa in widths]


@dataclass(frozen=True)
class _Sorted:
    """Magnitudes of each channel in order, with sums over all that come before.

    A grid without sign takes negative numbers to zero, so they are left as they are, come first, and count as squares only.
    """

    magnitude: Float[Tensor, "channels numbers"]
    sums: Float[Tensor, "channels numbers+1"]
    squares: Float[Tensor, "channels numbers+1"]

    @classmethod
    def of(cls, rows: Float[Tensor, "channels numbers"], signed: bool) -> _Sorted:
        ordered = (rows.abs() if signed else rows).sort(1).values
        wide = ordered.double()
        sums = torch.nn.functional.pad(wide.clamp(min=0).cumsum(1), (1, 0))
        squares = torch.nn.functional.pad(wide.square().cumsum(1), (1, 0))
        return cls(ordered, sums, squares)

    def split(self, channels: int) -> Iterator[_Sorted]:
        """Parts of at most ``channels`` channels."""
        parts = (tensor.split(channels) for tensor in (self.magnitude, self.sums, self.squares))
        return (_Sorted(*tensors) for tensors in zip(*parts, strict=True))


def _errors_by_rounding(
    rows: Float[Tensor, "channels numbers"], format: FloatFormat, grid: Float[Tensor, "candidates channels"]
) -> Float[Tensor, "candidates channels"]:
    """Mean squared errors of the candidates, by rounding to each of them."""
    tile = max(1, _MOST_AT_ONCE // rows.shape[1])
    parts = zip(rows.split(tile), (grid / format.max).split(tile, 1), strict=True)
    return torch.cat([_squares(part, format, scales) for part, scales in parts], 1) / rows.shape[1]


def _squares(
    rows: Float[Tensor, "channels numbers"], format: FloatFormat, scales: Float[Tensor, "candidates channels"]
) -> Float[Tensor, "candidates channels"]:
    """Sums of squared errors."""
    sums = []
    for scale in scales[..., None]:
        rounded = round_to(torch.where(scale > 0, rows / scale, 0.0), format) * scale
        # Squares of float32 have no room in it.
        sums.append(torch.linalg.vector_norm(rounded - rows, dim=1, dtype=torch.float64).square())
    return torch.stack(sums)


def _errors_by_cells(
    numbers: _Sorted, format: FloatFormat, grid: Float[Tensor, "candidates channels"]
) -> Float[Tensor, "candidates channels"]:
    """Mean squared errors of the candidates, from the sums over the cells of each."""
    values = torch.tensor(levels(format), dtype=torch.float64, device=grid.device)
    tile = max(1, _MOST_AT_ONCE // (len(grid) * len(values)))
    parts = zip(numbers.split(tile), (grid.double() / format.max).split(tile, 1), strict=True)
    return torch.cat([_cells(part, values, scales) for part, scales in parts], 1) / numbers.magnitude.shape[1]


def _cells(
    numbers: _Sorted, values: Float[Tensor, " levels"], scale: Float[Tensor, "candidates channels"]
) -> Float[Tensor, "candidates channels"]:
    """Sums of squared errors: in a cell of value v they are ``sum(x**2) - 2 * v * sum(x) + v**2 * count``."""
    level = scale.T[..., None] * values
    borders = ((level[..., 1:] + level[..., :-1]) / 2).float()
    cut = torch.searchsorted(numbers.magnitude, borders.flatten(1), right=True).view(borders.shape)
    edges = torch.nn.functional.pad(cut, (1, 1))
    edges[..., -1] = numbers.magnitude.shape[1]
    flat = edges.flatten(1)
    sums, squares = numbers.sums.gather(1, flat).view(edges.shape).diff(), numbers.squares[:, -1, None]
    error = squares + (level * (level * edges.diff() - 2 * sums)).sum(2)
    return error.clamp(min=0).T

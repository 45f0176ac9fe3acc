"""Exact nearest-codeword search without a queries x codes matrix in memory.

"Nearest" means the smallest index among the codes at the smallest Euclidean distance, evaluated exactly. A float32 product
finds the candidates; a bound on its rounding error proves that no other code can win, and where more than one candidate
remains they are compared by float64 differences. The answer therefore does not depend on tiling, device or batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zoo.nn.precision import exact_float32

_TILE_BYTES = 4 << 20
_GPU_TILE_BYTES = 64 << 20
_EXACT_PAIRS = 8_192


@dataclass(frozen=True)
class PreparedCodebook:
    """A codebook and what every search needs of it.

    Attributes:
        codes: the codebook itself.
        augmented: codes less their mean, with minus half the squared norm as one more column: ``[x, 1] . row`` is the score.
        mean: mean code; it is subtracted from both sides, because a common offset would cost float32 its digits.
        largest_norm: largest norm of a centred code, for the error bound.
    """

    codes: Float[Tensor, "codes dim"]
    augmented: Float[Tensor, "codes dim_plus_1"]
    mean: Float[Tensor, " dim"]
    largest_norm: float


def prepare(codebook: Float[Tensor, "codes dim"]) -> PreparedCodebook:
    """Compute once per codebook what `nearest` uses in every call."""
    codes = codebook.detach().float()
    mean = codes.double().mean(0)
    centred = codes.double() - mean
    half_squared = centred.square().sum(1, keepdim=True) / 2
    augmented = torch.cat([centred, -half_squared], dim=1).float()
    return PreparedCodebook(codes, augmented, mean.float(), float(centred.norm(dim=1).max()))


def nearest(x: Float[Tensor, "*shape dim"], codebook: PreparedCodebook) -> Int[Tensor, "*shape"]:
    """Index of the code nearest to each query; the smallest index among equals.

    Queries are taken in float32. A query with a NaN or an infinity gets index 0.
    """
    queries = x.detach().float().reshape(-1, x.shape[-1])
    budget = _TILE_BYTES if queries.device.type == "cpu" else _GPU_TILE_BYTES
    rows = max(64, budget // (4 * codebook.codes.shape[0]))
    with exact_float32(queries.device):
        found = [_nearest_rows(tile, codebook) for tile in queries.split(rows)]
    return torch.cat(found).reshape(x.shape[:-1]) if found else queries.new_zeros(x.shape[:-1], dtype=torch.int64)


def _nearest_rows(x: Float[Tensor, "rows dim"], codebook: PreparedCodebook) -> Int[Tensor, " rows"]:
    centred = x - codebook.mean
    scores = torch.cat([centred, centred.new_ones(len(x), 1)], dim=1) @ codebook.augmented.T
    best, index = scores.max(dim=1)
    # Rounding of the product (dim + 1 terms), of the centring and of the stored norms, each at most one unit 2^-24.
    reach = codebook.largest_norm
    unit = (x.shape[1] + 4) * 2.0**-24
    bound = unit * (centred.norm(dim=1) * reach + reach * reach / 2) + 2.0**-22 * x.norm(dim=1) * reach
    candidates = scores >= (best - 2 * bound)[:, None]
    doubtful = (candidates.sum(1) != 1).nonzero()[:, 0]
    if len(doubtful):
        index[doubtful] = _compare_exactly(x[doubtful], candidates[doubtful], codebook.codes)
    return index


def _compare_exactly(
    x: Float[Tensor, "rows dim"], candidates: Bool[Tensor, "rows codes"], codes: Float[Tensor, "codes dim"]
) -> Int[Tensor, " rows"]:
    """The nearest candidate of each row by float64 differences, the smallest index among equals; 0 where there is none."""
    rows, rivals = candidates.nonzero(as_tuple=True)
    distances = torch.cat(
        [
            (codes[k].double() - x[r].double()).square().sum(1)
            for r, k in zip(rows.split(_EXACT_PAIRS), rivals.split(_EXACT_PAIRS), strict=True)
        ]
    )
    shortest = distances.new_full((len(x),), torch.inf).scatter_reduce(0, rows, distances, "amin")
    tied = distances == shortest[rows]
    none = codes.shape[0]
    smallest = rivals.new_full((len(x),), none).scatter_reduce(0, rows[tied], rivals[tied], "amin")
    return torch.where(smallest == none, 0, smallest)

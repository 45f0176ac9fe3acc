"""A first look at the codes of a codebook in low precision, with a bound on its error: the numbers that go into it.

`zoo.kernels.codebook` tells how a search uses them, on a CPU and on a GPU alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zoo.errors import InputError
from zoo.precision import all_finite

Screening = Literal["float32", "bfloat16", "bfloat16x3", "float16x3"]
#: What a search minimises or maximises: the Euclidean ``distance``, or the ``dot`` product of query and code.
Metric = Literal["distance", "dot"]


class Form(NamedTuple):
    """Form in which screening presents vectors to the matrix product.

    Attributes:
        dtype: of the factors.
        parts: numbers per coordinate: it rounded, and the rest rounded. The product of two rests is left out.
        bias_parts: numbers that half the squared norm is given in, enough for the 24 bits of float32.
        unit: error of one addition, relative to the sum of the terms' magnitudes.
        rounding: error of the result's own rounding.
        multiple: columns are padded to a multiple of this.
        positive: scores are shifted so that the best one is positive; costs precision where a few codes are far longer.
    """

    dtype: torch.dtype
    parts: int
    bias_parts: int
    unit: float
    rounding: float
    multiple: int
    positive: bool


FORMS: dict[Screening, Form] = {
    "float32": Form(torch.float32, 1, 1, 2.0**-24, 0.0, 1, False),
    "bfloat16": Form(torch.bfloat16, 1, 2, 2.0**-24, 2.0**-8, 1, True),
    # Matrix units add products of pairs to their sums, in float32 throughout.
    "bfloat16x3": Form(torch.bfloat16, 2, 3, 2.0**-24, 0.0, 32, False),
    # A tensor core aligns the terms of a step of 16 to the largest and truncates them: one unit of the last place for each
    # term and one for their sum.
    "float16x3": Form(torch.float16, 2, 2, 1.25 * 2.0**-23, 0.0, 32, False),
}


@dataclass(frozen=True)
class PreparedCodebook:
    """A codebook and what every search needs of it. It is a copy: later changes of the codebook do not reach it.

    Attributes:
        codes: the codes in float32, normalised if asked, without those that equal an earlier one and so can never win.
        ids: their indices in the codebook, ascending.
        mean: mean code; it is subtracted from both sides, because a common offset would cost the scores their digits. Of a dot
            product it is subtracted from the codes alone, which leaves the order of the scores as it is.
        scale: power of two that both sides are multiplied by, so that the longest centred code has a norm of 0.5 to 1.
        operand: factors of the screening product, one row per code; rows of padding follow and never win.
        error: four factors of a bound on the error of the scores of each group of codes: their norm, the norm of what their
            factors miss together with the rounding of sums, the norm of their rests, and what does not depend on the query.
        unit_widths: widths of the parts of a vector that are normalised to length 1, each by itself; none if empty.
        screening: precision of the operand.
        metric: what is searched for.
    """

    codes: Float[Tensor, "codes dim"]
    ids: Int[Tensor, " codes"]
    mean: Float[Tensor, " dim"]
    scale: Float[Tensor, ""]
    operand: Float[Tensor, "padded columns"]
    error: Float[Tensor, "groups 4"]
    unit_widths: tuple[int, ...]
    screening: Screening
    metric: Metric = "distance"


def unit(x: Float[Tensor, "*shape dim"], widths: Sequence[int]) -> Float[Tensor, "*shape dim"]:
    """The vectors in float32 with each part of the given widths at length 1; as they are if there are no widths.

    Lengths are summed in float64, so that the rounded result does not depend on the order of the sum. They count as at least
    1e-12: a part that is zero stays zero.

    Raises:
        InputError: the widths do not add up to the vectors' width.
    """
    if not widths:
        return x.float()
    if sum(widths) != x.shape[-1]:
        raise InputError(f"parts of widths {tuple(widths)} do not make vectors of {x.shape[-1]} numbers")
    return torch.cat([F.normalize(part, dim=-1, eps=1e-12) for part in x.double().split(list(widths), dim=-1)], dim=-1).float()


def split(values: Float[Tensor, "*shape"], dtype: torch.dtype, parts: int) -> tuple[list[Tensor], Float[Tensor, "*shape"]]:
    """Numbers of lower precision that add up to the values, largest first, and what they miss."""
    found: list[Tensor] = []
    for _ in range(parts):
        found.append(values.to(dtype))
        values = values - found[-1].to(values.dtype)
    return found, values


def usable_queries(
    x: Float[Tensor, "queries dim"], codebook: PreparedCodebook
) -> tuple[Float[Tensor, "queries dim"], Bool[Tensor, " queries"]]:
    """Queries as they are compared, and which of them are finite; the others become zero."""
    x = x.float()
    if x.device.type == "cpu" and all_finite(x):
        return unit(x, codebook.unit_widths), torch.ones(len(x), dtype=torch.bool)
    finite = x.isfinite().all(1)
    return unit(torch.where(finite[:, None], x, 0), codebook.unit_widths), finite


def query_factors(
    x: Float[Tensor, "rows dim"], codebook: PreparedCodebook
) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, "rows 4"]]:
    """The other side of the screening product and of its error bound."""
    form = FORMS[codebook.screening]
    centred = _of_length_one(x) if codebook.metric == "dot" else (x - codebook.mean) * codebook.scale
    parts, missed = split(centred, form.dtype, form.parts)
    ones = torch.ones(len(x), form.bias_parts, dtype=form.dtype, device=x.device)
    factors = torch.cat([*parts[1:], *parts[:1] * form.parts, ones], dim=1)
    # The addend stands for squares that vanish; it is far below what matters beside codes of norm 1.
    norm, *norms = [values.float().norm(dim=1) + 2.0**-50 for values in (centred, missed, *parts[1:])]
    # Sums beyond this might overflow in between; an infinite bound leaves all codes to the exact comparison.
    norm = torch.where(norm < 2.0**100, norm, torch.inf)
    rests = norms[1] if len(parts) == 2 else torch.zeros_like(norm)
    error = torch.stack([norms[0] + 2.0**-24 * norm, norm, rests, torch.ones_like(norm)], dim=1)
    # The slack covers second-order terms and the rounding of the bound itself.
    return F.pad(factors, (0, codebook.operand.shape[1] - factors.shape[1])), 1.02 * error


def _of_length_one(x: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
    """Queries times powers of two that bring their lengths to 0.5 to 1: the code of the largest dot product is the same."""
    exact = x.double()
    return (exact * torch.exp2(-exact.norm(dim=1, keepdim=True).clamp(min=2.0**-160).log2().ceil())).float()

"""Exact search of the nearest codeword without a queries x codes matrix in memory.

"Nearest" means the smallest index among the codes at the smallest Euclidean distance, or with the largest dot product if that
is the metric, evaluated exactly. A product in low precision screens the codes; a bound on its error, measured on the
numbers at hand, rules codes out. Where more than one remains they are compared in float64. The answer
therefore does not depend on tiling, threads, device, batch or precision settings: those decide the time alone.

With queries ``x`` and codes ``c``, both less the mean code, the screening score is ``x . c - |c|^2 / 2``: it grows as the
distance falls, and ``|x|^2`` is never needed. For dot products it is ``x . c`` of the code less the mean code and the query as
it is. Its maximum is found in two levels, because a maximum with its index over whole rows costs more than the product when
vectors are short: first over groups of codes, then within the groups that can win.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zoo.derived import Derived
from zoo.errors import InputError
from zoo.kernels import nearest_native
from zoo.kernels.screening import (
    FORMS,
    Form,
    Metric,
    PreparedCodebook,
    Screening,
    query_factors,
    split,
    unit,
    usable_queries,
)
from zoo.precision import exact_float32

# Queries of a tile: enough for the matrix product to run at its full rate.
_ROWS = 512
# Scores in memory at a time, in bytes per thread and in all: a tile should stay in the cache.
_TILE_BYTES = 4 << 20
_MOST_TILE_BYTES = 32 << 20
# Codes of a group, the first level of the maximum.
_GROUP = 64
# Groups per query and tile beyond which screening gives up on the query.
_CROWD = 32
# Numbers in memory at a time: queries being brought to the form of the product, and candidates being compared in float64.
_CHUNK_NUMBERS = 1 << 20
_EXACT_NUMBERS = 1 << 18
# Smaller codebooks do not win back what bfloat16's additional candidates cost.
_BFLOAT16_DIM, _BFLOAT16_CODES = 8, 2048
# Covers results that the processor flushes to zero; scores are of the order of 1.
_TINY = 2.0**-110


def choose_screening(codes: int, dim: int, device: torch.device) -> Screening:
    """The precision of the first look at the codes. It is decided here and nowhere else, and never changes an answer.

    On processors that multiply bfloat16 by themselves (AVX-512 BF16, AMX) the product is 2 to 6 times faster than in float32
    and its maximum twice. Measured on an AMD EPYC with AVX-512 BF16, one core, the whole search gains 1.1 to 2 times from
    2048 codes of 8 numbers on; with fewer, or shorter ones, comparing the candidates that bfloat16 leaves costs more. Short
    vectors have a compiled kernel where there is a C compiler: matrix units (AMX) take three bfloat16 products there, vector
    registers (AVX-512) float32. GPUs take
    three float16 products, nearly as precise as float32 at a third of the half-precision rate, in one kernel with the maximum.
    Without Triton they take float32.
    """
    if device.type == "cuda":
        return "float16x3" if find_spec("triton") else "float32"
    if device.type == "cpu" and nearest_native.quick(dim):
        return "bfloat16x3" if nearest_native.has_matrix_units() else "float32"
    fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bfloat16" if fast and dim >= _BFLOAT16_DIM and codes >= _BFLOAT16_CODES else "float32"


def prepare(
    codebook: Float[Tensor, "codes dim"],
    *,
    unit_widths: Sequence[int] = (),
    screening: Screening | None = None,
    metric: Metric = "distance",
) -> PreparedCodebook:
    """Compute once per codebook what `nearest` uses in every call.

    Args:
        codebook: any floating-point type; the search works on its float32 values.
        unit_widths: parts of the vectors, codes and queries alike, that are normalised to length 1 before they are compared:
            ``()`` for plain Euclidean distance, ``(dim,)`` for a cosine codebook, ``(32, 8)`` for TokenFlow's two codebooks
            side by side, where the squared distance is the sum of those of the parts.
        screening: precision of the first look, `choose_screening`'s if ``None``. It decides the time, not the answer.
            ``"float16x3"`` needs Triton.
        metric: ``"distance"`` for the nearest code, ``"dot"`` for the one with the largest dot product.

    Raises:
        InputError: the codebook is empty or holds a NaN or an infinity, or the widths do not add up to its own.
    """
    if not codebook.numel():
        raise InputError("the codebook is empty")
    codes = unit(codebook.detach(), unit_widths)
    if not bool(codes.isfinite().all()):
        raise InputError("the codebook holds a NaN or an infinity")
    ids = _distinct(codes)
    codes = codes[ids]
    mean = codes.mean(0, dtype=torch.float64).float()
    centred = codes.double() - mean
    scale = torch.exp2(-centred.norm(dim=1).max().clamp(2.0**-100, 2.0**100).log2().ceil())
    screening = screening or choose_screening(len(codes), codes.shape[1], codes.device)
    operand, error = _code_factors(centred * scale, FORMS[screening], metric)
    return PreparedCodebook(codes, ids, mean, scale.float(), operand, error, tuple(unit_widths), screening, metric)


def nearest(x: Float[Tensor, "*shape dim"], codebook: PreparedCodebook) -> Int[Tensor, "*shape"]:
    """Index of the code nearest to each query, as the metric has it; the smallest index among equals.

    Queries are taken in float32. A query with a NaN or an infinity gets index 0. Less than 64 MB are allocated besides the
    result, whatever the number of queries and codes. It is one operator to ``torch.compile``.

    Raises:
        InputError: queries and codes are not of one width.
    """
    if x.shape[-1] != codebook.codes.shape[1]:
        raise InputError(f"queries of {x.shape[-1]} numbers cannot be compared with codes of {codebook.codes.shape[1]}")
    found = torch.ops.zoo.nearest_code(
        x.detach().reshape(-1, x.shape[-1]),
        codebook.codes,
        codebook.ids,
        codebook.mean,
        codebook.scale,
        codebook.operand,
        codebook.error,
        codebook.unit_widths,
        codebook.screening,
        codebook.metric,
    )
    return found.reshape(x.shape[:-1])


class CodebookSearch:
    """`nearest` in a tensor that training or loading may change: it is prepared again as `zoo.derived` says.

    Args:
        unit_widths, metric: as for `prepare`.
    """

    def __init__(self, unit_widths: Sequence[int] = (), metric: Metric = "distance") -> None:
        self.unit_widths = tuple(unit_widths)
        self.metric = metric
        self._prepared: Derived[PreparedCodebook] = Derived()

    def __call__(self, x: Float[Tensor, "*shape dim"], codebook: Float[Tensor, "codes dim"]) -> Int[Tensor, "*shape"]:
        """Index of the code nearest to each query."""
        if torch.compiler.is_exporting():
            return self._plain(x, codebook)
        return nearest(x, self.prepared(codebook))

    def _plain(self, x: Float[Tensor, "*shape dim"], codebook: Float[Tensor, "codes dim"]) -> Int[Tensor, "*shape"]:
        """The same by one product in float64, for programs that have none of our kernels."""
        codes = unit(codebook, self.unit_widths).double()
        scores = unit(x, self.unit_widths).double() @ codes.T
        return (scores if self.metric == "dot" else scores - codes.square().sum(1) / 2).argmax(-1)

    def prepared(self, codebook: Float[Tensor, "codes dim"]) -> PreparedCodebook:
        """The codebook as `prepare` makes it."""
        return self._prepared.of([codebook], lambda: prepare(codebook, unit_widths=self.unit_widths, metric=self.metric))


# -------------------------------------------------------------------------------------------------------------- factors


def _distinct(codes: Float[Tensor, "codes dim"]) -> Int[Tensor, " distinct"]:
    """Positions of the codes that equal no earlier one, ascending.

    Equal codes are looked for among those with equal random projections. One that is missed costs time and nothing else.
    """
    projection = torch.rand(codes.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = (codes * projection.to(codes.device)).sum(1).argsort(stable=True)
    ordered = codes[order]
    repeated = (ordered[1:] == ordered[:-1]).all(1)
    first = torch.ones(len(codes), dtype=torch.bool, device=codes.device)
    first[order[1:][repeated]] = False
    return first.nonzero()[:, 0]


def _code_factors(
    centred: Float[Tensor, "codes dim"], form: Form, metric: Metric
) -> tuple[Float[Tensor, "padded columns"], Float[Tensor, "groups 4"]]:
    """``operand`` and ``error`` of `PreparedCodebook` from centred and scaled codes in float64."""
    norm = centred.norm(dim=1)
    # The centred codes add up to zero, so no query's best dot product is negative.
    bias = torch.zeros_like(norm) if metric == "dot" else -norm.square() / 2
    if form.positive and metric == "distance":
        # The centred codes add up to zero, so the best score is at least the mean bias.
        bias += 1 / 16 - bias.mean()
    parts, missed = split(centred, form.dtype, form.parts)
    bias_parts, bias_missed = split(bias, form.dtype, form.bias_parts)
    factors = torch.cat([*parts, *parts[: len(parts) - 1], torch.stack(bias_parts, dim=1)], dim=1)
    # With a query's [rest, rounded, rounded] the small products are summed first and hardly add to the rounding of sums, where
    # they are summed in order.
    several = factors.shape[1] if form.dtype == torch.bfloat16 else factors.shape[1] / 512
    terms = centred.shape[1] + 8 + (len(parts) - 1) * several
    relative = terms * form.unit + 1.02 * form.rounding
    error = [
        norm,
        missed.norm(dim=1) + relative * norm + _TINY,
        torch.zeros_like(norm) if len(parts) == 1 else parts[1].double().norm(dim=1),
        bias_missed.abs() + relative * bias.abs() + _TINY,
    ]
    count, columns = factors.shape
    rows = -count % _GROUP
    operand = F.pad(factors, (0, -columns % form.multiple, 0, rows))
    operand[count:, columns - form.bias_parts] = torch.finfo(form.dtype).min
    groups = F.pad(torch.stack(error, dim=1), (0, 0, 0, rows)).unflatten(0, (-1, _GROUP)).amax(1)
    return operand, groups.float()


# --------------------------------------------------------------------------------------------------------------- search


# `torch.library.custom_op` would import the compiler on the first call, which takes a second.
_LIBRARY = torch.library.Library("zoo", "FRAGMENT")
_LIBRARY.define(
    "nearest_code(Tensor x, Tensor codes, Tensor ids, Tensor mean, Tensor scale, Tensor operand, Tensor error, "
    "int[] unit_widths, str screening, str metric) -> Tensor"
)


@torch.library.impl(_LIBRARY, "nearest_code", "CompositeExplicitAutograd")
def _nearest(
    x: Tensor,
    codes: Tensor,
    ids: Tensor,
    mean: Tensor,
    scale: Tensor,
    operand: Tensor,
    error: Tensor,
    unit_widths: Sequence[int],
    screening: Screening,
    metric: Metric,
) -> Tensor:
    codebook = PreparedCodebook(codes, ids, mean, scale, operand, error, tuple(unit_widths), screening, metric)
    with exact_float32(x.device):
        if screening != "float16x3":
            return _search(x, codebook)
        from zoo.kernels import codebook_triton

        return codebook_triton.search(x, codebook)


def _unfilled(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(len(x), dtype=torch.int64)


torch.library.register_fake("zoo::nearest_code", _unfilled, lib=_LIBRARY)


def _search(x: Float[Tensor, "queries dim"], codebook: PreparedCodebook) -> Int[Tensor, " queries"]:
    found = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    chunk = max(1, _CHUNK_NUMBERS // (x.shape[1] * _ROWS)) * _ROWS
    for queries, ids in zip(x.split(chunk), found.split(chunk), strict=True):
        usable, finite = usable_queries(queries, codebook)
        ids.copy_(torch.where(finite, codebook.ids[_positions(usable, codebook)], 0))
    return found


def _positions(x: Float[Tensor, "queries dim"], codebook: PreparedCodebook) -> Int[Tensor, " queries"]:
    """Positions among the distinct codes of those nearest to finite queries."""
    compiled = nearest_native.chosen(codebook)
    if compiled is None:
        # Three products are the kernel's: the codebook may come from a machine that has one.
        return _by_tiles(x, _in_float32(codebook) if codebook.screening == "bfloat16x3" else codebook)
    factors, error = query_factors(x, codebook)
    position = compiled(x, factors, error @ codebook.error.amax(0), codebook)
    doubtful = (position < 0).nonzero()[:, 0]
    if len(doubtful):
        position[doubtful] = _by_tiles(x[doubtful], _in_float32(codebook))
    return position


def _by_tiles(x: Float[Tensor, "queries dim"], codebook: PreparedCodebook) -> Int[Tensor, " queries"]:
    """The same by products of the library and their maxima, tile by tile."""
    factors, error = query_factors(x, codebook)
    memory = factors.new_empty(_tile_bytes(x.device) // factors.element_size())
    position = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    settled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        row, code, settled[rows] = _screen(factors[rows], error[rows], codebook, memory)
        position[rows] = _choose(x[rows], row, code, codebook)
    doubtful = (~settled).nonzero()[:, 0]
    if len(doubtful):
        position[doubtful] = _look_again(x[doubtful], codebook)
    return position


def _tile_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return min(_TILE_BYTES * torch.get_num_threads(), _MOST_TILE_BYTES)
    return _MOST_TILE_BYTES


def _screen(
    factors: Float[Tensor, "rows columns"],
    query_error: Float[Tensor, "rows 4"],
    codebook: PreparedCodebook,
    memory: Float[Tensor, " scores"],
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"], Bool[Tensor, " rows"]]:
    """Pairs of a query and a code that may be its nearest, and for which queries the nearest is certain to be among them.

    The maximum of bfloat16 is that of the bits read as integers, which is six times faster. It is right where any score of the
    group is positive, and negative where none is. So a query is settled if it needs no code with a negative score.
    """
    rows = len(factors)
    codes_at_a_time = max(1, len(memory) // (rows * _GROUP)) * _GROUP
    as_integers = FORMS[codebook.screening].positive
    # A code whose score cannot reach the floor is not the nearest.
    least = query_error @ codebook.error.amax(0) if as_integers else query_error.new_full((rows,), -torch.inf)
    floor = least
    crowded = torch.zeros_like(floor, dtype=torch.bool)
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    tiles = zip(codebook.operand.split(codes_at_a_time), codebook.error.split(codes_at_a_time // _GROUP), strict=True)
    for number, (operand, code_error) in enumerate(tiles):
        scores = torch.mm(operand, factors.T, out=memory[: len(operand) * rows].view(-1, rows)).unflatten(0, (-1, _GROUP))
        highest = (scores.view(torch.int16).amax(1).view(scores.dtype) if as_integers else scores.amax(1)).float()
        error = code_error @ query_error.T
        floor = torch.maximum(floor, (highest - error).amax(0))
        possible = highest + error >= floor
        group, row = possible.nonzero(as_tuple=True)
        if len(row) > _CROWD * rows:
            crowded |= possible.sum(0) > _CROWD
            group, row = (possible & ~crowded).nonzero(as_tuple=True)
        found.append((row, group + number * (codes_at_a_time // _GROUP), scores[group, :, row], error[group, row]))
    row, group, group_scores, error = map(torch.cat, zip(*found, strict=True))
    pair, member = (group_scores + error[:, None] >= floor[row, None]).nonzero(as_tuple=True)
    row, code = row[pair], group[pair] * _GROUP + member
    real = code < len(codebook.codes)
    return row[real], code[real], (floor > least) & ~crowded


def _look_again(x: Float[Tensor, "queries dim"], codebook: PreparedCodebook) -> Int[Tensor, " queries"]:
    """Positions of the nearest codes of queries that screening left with too many candidates."""
    if codebook.screening == "float32":
        return torch.stack([_first_shortest(query, codebook) for query in x])
    return _by_tiles(x, _in_float32(codebook))


def _in_float32(codebook: PreparedCodebook) -> PreparedCodebook:
    """The codebook with factors in float32."""
    if codebook.screening == "float32":
        return codebook
    centred = (codebook.codes.double() - codebook.mean) * codebook.scale
    operand, error = _code_factors(centred, FORMS["float32"], codebook.metric)
    return replace(codebook, operand=operand, error=error, screening="float32")


def _first_shortest(x: Float[Tensor, " dim"], codebook: PreparedCodebook) -> Int[Tensor, ""]:
    """Position of the code nearest to one query, without screening."""
    parts = codebook.codes.split(max(1, _EXACT_NUMBERS // len(x)))
    distance = torch.cat([exact_distance(x[None], part, codebook.metric) for part in parts])
    return (distance == distance.min()).nonzero()[0, 0]


def _choose(
    x: Float[Tensor, "rows dim"], row: Int[Tensor, " pairs"], code: Int[Tensor, " pairs"], codebook: PreparedCodebook
) -> Int[Tensor, " rows"]:
    """Each row's nearest candidate, the smallest index among equals."""
    chosen = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    contested = (torch.bincount(row, minlength=len(x)) > 1)[row]
    chosen[row[~contested]] = code[~contested]
    row, code = row[contested], code[contested]
    if not len(row):
        return chosen
    pairs = max(1, _EXACT_NUMBERS // x.shape[1])
    split_pairs = zip(row.split(pairs), code.split(pairs), strict=True)
    distance = torch.cat([exact_distance(x[r], codebook.codes[c], codebook.metric) for r, c in split_pairs])
    shortest = distance.new_full((len(x),), torch.inf).scatter_reduce(0, row, distance, "amin")
    tied = distance == shortest[row]
    return chosen.scatter_reduce(0, row[tied], code[tied], "amin", include_self=False)


def exact_distance(x: Float[Tensor, "#pairs dim"], y: Float[Tensor, "pairs dim"], metric: Metric) -> Float[Tensor, " pairs"]:
    """Squared Euclidean distance, or the negative dot product, in float64.

    The terms are summed by halves: the same order, and so the same bits, everywhere.
    """
    terms = -(x.double() * y.double()) if metric == "dot" else (x.double() - y.double()).square()
    while (width := terms.shape[1]) > 1:
        half = 1 << (width - 1).bit_length() - 1
        terms[:, : width - half] += terms[:, half:]
        terms = terms[:, :half]
    return terms[:, 0]

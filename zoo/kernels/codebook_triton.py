"""Codebook search on a GPU: fused kernels that never write a score to memory.

`_screen` multiplies queries with codes in float16 parts and keeps the two best scores of each query. `_merge` joins what was
searched side by side, and lists the queries whose two best scores are closer than the error bound. `_pick` and
`_compare_exactly` finish in float64: the first among the few codes that shared the best score's place, the second among all
codes for the listed queries. No shape depends on values, so the search can be captured in a CUDA graph.
Terms are summed in the order of `zoo.kernels.codebook.exact_distance`, so the answer is that of a CPU bit for bit.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from zoo.kernels.screening import PreparedCodebook, query_factors, usable_queries

_BLOCK_ROWS = 128
_BLOCK_CODES = 64
_MERGE_ROWS = 128
# Programs that fill a GPU of up to 132 processors twice.
_PROGRAMS = 264
# Up to this many columns the product costs less than its maximum, and tiles share a place in it.
_NARROW = 128
_MOST_SHARED = 8
# Numbers of a program that compares exactly; they have to fit the registers in float64.
_EXACT_NUMBERS = 4096
# Factors of the queries in memory at a time.
_CHUNK_NUMBERS = 1 << 22


def search(x: Float[Tensor, "queries dim"], codebook: PreparedCodebook) -> Int[Tensor, " queries"]:
    """Ids of the codes nearest to queries, as `zoo.kernels.codebook.nearest` defines them."""
    found = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    chunk = max(1, _CHUNK_NUMBERS // (codebook.operand.shape[1] * _BLOCK_ROWS)) * _BLOCK_ROWS
    for start in range(0, len(x), chunk):
        usable, finite = usable_queries(x[start : start + chunk], codebook)
        factors, error = query_factors(usable, codebook)
        position = _positions(usable, factors, error @ codebook.error.amax(0), codebook)
        found[start : start + chunk] = torch.where(finite, codebook.ids[position], 0)
    return found


def _positions(
    x: Float[Tensor, "queries dim"],
    factors: Float[Tensor, "queries columns"],
    bound: Float[Tensor, " queries"],
    codebook: PreparedCodebook,
) -> Int[Tensor, " queries"]:
    """Positions among the distinct codes of those nearest to finite queries."""
    queries, columns = factors.shape
    splits, shared = _division(queries, columns, len(codebook.operand) // _BLOCK_CODES)
    best, second = (torch.empty(splits, queries, dtype=torch.float32, device=x.device) for _ in range(2))
    place = torch.empty(splits, queries, dtype=torch.int32, device=x.device)
    _screen[(triton.cdiv(queries, _BLOCK_ROWS), splits)](
        factors,
        codebook.operand,
        best,
        place,
        second,
        queries,
        TILES=len(codebook.operand) // _BLOCK_CODES // splits,
        SHARED=shared,
        COLUMNS=columns,
        BLOCK_COLUMNS=64 if columns % 64 == 0 else 32,
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_CODES=_BLOCK_CODES,
        num_warps=8,
    )
    position = torch.zeros(queries, dtype=torch.int64, device=x.device)
    doubtful = torch.empty(queries, dtype=torch.int32, device=x.device)
    count = torch.zeros(1, dtype=torch.int32, device=x.device)
    _merge[(triton.cdiv(queries, _MERGE_ROWS),)](
        best, place, second, bound, position, doubtful, count, queries, SPLITS=splits, BLOCK_ROWS=_MERGE_ROWS
    )
    dim = x.shape[1]
    block_dim = triton.next_power_of_2(dim)
    # A fused multiply-add would round the squares differently from the CPU.
    vectors = {
        "CODES": len(codebook.codes),
        "DIM": dim,
        "BLOCK_DIM": block_dim,
        "LEVELS": block_dim.bit_length() - 1,
        "DOT": codebook.metric == "dot",
        "enable_fp_fusion": False,
    }
    rows = triton.cdiv(_EXACT_NUMBERS, block_dim * shared)
    _pick[(triton.cdiv(queries, rows),)](
        x, codebook.codes, position, queries, **vectors, SHARED=shared, TILE=_BLOCK_CODES, BLOCK_ROWS=rows
    )
    block_codes = triton.cdiv(_EXACT_NUMBERS, block_dim)
    _compare_exactly[(_PROGRAMS,)](x, codebook.codes, doubtful, count, position, **vectors, BLOCK_CODES=block_codes)
    return position


def _division(queries: int, columns: int, tiles: int) -> tuple[int, int]:
    """Equal parts of the codebook that are searched side by side, and tiles of a part that share their places.

    Few queries leave processors idle, so the codebook is divided; narrow vectors spend their time on the maximum, so it is
    taken over several tiles at once.
    """
    blocks = triton.cdiv(queries, _BLOCK_ROWS)
    splits = max(parts for parts in range(1, tiles + 1) if tiles % parts == 0 and (parts == 1 or parts * blocks <= _PROGRAMS))
    power_of_two = tiles // splits & -(tiles // splits)
    return splits, min(_MOST_SHARED, power_of_two) if columns <= _NARROW else 1


@triton.jit
@no_type_check
def _screen(
    queries,
    codes,
    best_out,
    place_out,
    second_out,
    n_queries,
    TILES: tl.constexpr,
    SHARED: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
):
    """Best score, its place, and the best score of all other places, for each query and one part of the codebook.

    A place is a column of a tile, or of several successive tiles; their maximum is one operation per score. Places are
    compared with five operations, each column by itself; only the end exchanges values between threads.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    member = tl.arange(0, BLOCK_CODES)
    part = tl.program_id(1)
    query_rows = queries + row[:, None].to(tl.int64) * COLUMNS
    best = tl.full([BLOCK_ROWS, BLOCK_CODES], float("-inf"), tl.float32)
    second = tl.full([BLOCK_ROWS, BLOCK_CODES], float("-inf"), tl.float32)
    index = tl.zeros([BLOCK_ROWS, BLOCK_CODES], tl.int32)
    for group in range(TILES // SHARED):
        run = part * (TILES // SHARED) + group
        highest = tl.full([BLOCK_ROWS, BLOCK_CODES], float("-inf"), tl.float32)
        for step in range(SHARED):
            code_rows = codes + ((run * SHARED + step) * BLOCK_CODES + member)[:, None].to(tl.int64) * COLUMNS
            score = tl.zeros([BLOCK_ROWS, BLOCK_CODES], tl.float32)
            for start in range(0, COLUMNS, BLOCK_COLUMNS):
                query = tl.load(query_rows + start + column[None, :], mask=row[:, None] < n_queries, other=0)
                code = tl.load(code_rows + start + column[None, :])
                score = tl.dot(query, tl.trans(code), score)
            highest = tl.maximum(highest, score)
        second = tl.maximum(second, tl.minimum(highest, best))
        index = tl.where(highest > best, run, index)
        best = tl.maximum(best, highest)
    place = index * BLOCK_CODES + member[None, :]
    row_best = tl.max(best, 1)
    row_place = tl.min(tl.where(best == row_best[:, None], place, 2147483647), 1)
    others = tl.where(place == row_place[:, None], float("-inf"), best)
    row_second = tl.maximum(tl.max(second, 1), tl.max(others, 1))
    out = part * n_queries + row
    tl.store(best_out + out, row_best, mask=row < n_queries)
    tl.store(place_out + out, row_place, mask=row < n_queries)
    tl.store(second_out + out, row_second, mask=row < n_queries)


@triton.jit
@no_type_check
def _merge(
    best_in,
    place_in,
    second_in,
    bound_in,
    place_out,
    doubtful_out,
    count,
    n_queries,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """The best place of all parts where it is certain; the other queries are listed, in no particular order."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = row < n_queries
    best = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    second = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    place = tl.zeros([BLOCK_ROWS], tl.int32)
    for part in range(SPLITS):
        here = part * n_queries + row
        score = tl.load(best_in + here, mask=valid, other=float("-inf"))
        rival = tl.load(second_in + here, mask=valid, other=float("-inf"))
        second = tl.maximum(tl.maximum(second, rival), tl.minimum(score, best))
        place = tl.where(score > best, tl.load(place_in + here, mask=valid, other=0), place)
        best = tl.maximum(best, score)
    bound = tl.load(bound_in + row, mask=valid, other=0)
    # A bound that is infinite or not a number proves nothing.
    certain = best - second > 2 * bound
    tl.store(place_out + row, place.to(tl.int64), mask=valid & certain)
    doubtful = valid & (certain == 0)
    slot = tl.atomic_add(count + tl.zeros([BLOCK_ROWS], tl.int32), 1, mask=doubtful)
    tl.store(doubtful_out + slot, row, mask=doubtful)


@triton.jit
@no_type_check
def _exact_distance(x, y, ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr, LEVELS: tl.constexpr, DOT: tl.constexpr):
    """Squared distances of rows, or negative dot products, in float64, their terms summed by halves."""
    if DOT:
        terms = -(x.to(tl.float64) * y.to(tl.float64))
    else:
        difference = x.to(tl.float64) - y.to(tl.float64)
        terms = difference * difference
    for level in tl.static_range(LEVELS):
        terms = tl.sum(tl.reshape(terms, [ROWS, 2, BLOCK_DIM >> (level + 1)]), 1)
    return tl.reshape(terms, [ROWS])


@triton.jit
@no_type_check
def _pick(
    queries,
    codes,
    position,
    n_queries,
    CODES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    LEVELS: tl.constexpr,
    DOT: tl.constexpr,
    SHARED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """From the place of the nearest code to its position: the nearest of the codes that share the place."""
    candidate = tl.arange(0, BLOCK_ROWS * SHARED)
    row = tl.program_id(0) * BLOCK_ROWS + candidate // SHARED
    place = tl.load(position + row, mask=row < n_queries, other=0)
    code = (place // TILE * SHARED + candidate % SHARED) * TILE + place % TILE
    column = tl.arange(0, BLOCK_DIM)[None, :]
    inside = column < DIM
    x = tl.load(queries + row[:, None].to(tl.int64) * DIM + column, mask=inside & (row[:, None] < n_queries), other=0)
    y = tl.load(codes + code[:, None] * DIM + column, mask=inside & (code[:, None] < CODES), other=0)
    distance = tl.where(code < CODES, _exact_distance(x, y, BLOCK_ROWS * SHARED, BLOCK_DIM, LEVELS, DOT), float("inf"))
    distance = tl.reshape(distance, [BLOCK_ROWS, SHARED])
    code = tl.reshape(code, [BLOCK_ROWS, SHARED])
    nearest = tl.min(tl.where(distance == tl.min(distance, 1)[:, None], code, CODES), 1)
    out = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tl.store(position + out, nearest, mask=out < n_queries)


@triton.jit
@no_type_check
def _compare_exactly(
    queries,
    codes,
    doubtful,
    count,
    position,
    CODES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    LEVELS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
):
    """The nearest of all codes for each listed query, in float64 where float32 does not rule a block of codes out."""
    column = tl.arange(0, BLOCK_DIM)[None, :]
    inside = column < DIM
    slot = tl.program_id(0)
    listed = tl.load(count)
    while slot < listed:
        row = tl.load(doubtful + slot)
        x = tl.load(queries + row.to(tl.int64) * DIM + column, mask=inside, other=0)
        shortest = tl.full([], float("inf"), tl.float64)
        nearest = tl.zeros([], tl.int32)
        for start in range(0, CODES, BLOCK_CODES):
            code = start + tl.arange(0, BLOCK_CODES)
            y = tl.load(codes + code[:, None].to(tl.int64) * DIM + column, mask=inside & (code[:, None] < CODES), other=0)
            if DOT:
                # Of dot products the error of float32 has no bound in terms of the result.
                reach = tl.full([], float("inf"), tl.float64)
            else:
                rough = tl.where(code < CODES, tl.sum((y - x) * (y - x), 1), float("inf"))
                # The error of a sum is at most one unit of the last place per term, of a difference one before squaring.
                reach = tl.min(rough).to(tl.float64) * (1 - (DIM + 8) * 2.0**-23)
            if (reach <= shortest) | (reach == float("inf")):
                distance = _exact_distance(x, y, BLOCK_CODES, BLOCK_DIM, LEVELS, DOT)
                distance = tl.where(code < CODES, distance, float("inf"))
                block_shortest = tl.min(distance)
                if block_shortest < shortest:
                    shortest = block_shortest
                    nearest = tl.min(tl.where(distance == block_shortest, code, CODES))
        tl.store(position + row, nearest.to(tl.int64))
        slot += tl.num_programs(0)

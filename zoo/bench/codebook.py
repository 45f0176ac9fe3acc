"""Codebook search against what others offer for it, at the sizes of the catalogue's codebooks and of training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from zoo.bench.measure import Job, matmul_rate, measure
from zoo.kernels.codebook import nearest, prepare
from zoo.machine import described
from zoo.media import write_json

NAME = "zoo.kernels.codebook"
UNIT = "query"

# Numbers that a contender may hold at a time, 2 GB; a search that builds more is left out.
_MOST_SCORES = 1 << 29


class Size(NamedTuple):
    """Width of the vectors, codes, and queries; widths of the parts that have to be normalised first, if any."""

    dim: int
    codes: int
    queries: int
    unit_widths: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"D={self.dim} K={self.codes} N={self.queries}"


# SEED is D = 32, TokenFlow 32 + 8 with 680 queries per image, WavTokenizer D = 512; many queries are training.
SIZES = (
    Size(8, 8192, 16384),
    Size(8, 32768, 65536),
    Size(32, 8192, 32),
    Size(32, 8192, 16384),
    Size(32, 8192, 65536),
    Size(40, 32768, 680, (32, 8)),
    Size(40, 32768, 2720, (32, 8)),
    Size(256, 4096, 16384),
    Size(512, 4096, 75),
    Size(512, 4096, 16384),
    Size(512, 32768, 4096),
)


def run(
    *,
    sizes: Sequence[Size] = SIZES,
    threads: int | None = None,
    device: str = "cpu",
    repetitions: int = 3,
    peers: bool = True,
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """Measure the search and its peers: torch.cdist, vector-quantize-pytorch, faiss, and TokenFlow's own two matrices.

    Half of the queries are codes with noise of 0.3 of their spread, as a trained encoder gives them, half are independent.
    Peers that are not installed are left out. The floor is 2 NKD operations at the rate of the fastest matrix product.

    Args:
        sizes: what to search.
        threads: threads of PyTorch and faiss; PyTorch's own choice if ``None``.
        device: where to run.
        repetitions: measurements per figure, after one warm-up; the median counts.
        peers: measure others as well.
        json_path: write the result there.

    Returns:
        The measurements with the machine they were taken on, in the form that `zoo.bench.print_table` shows.
    """
    if threads:
        torch.set_num_threads(threads)
    rates = {dtype: matmul_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    results = []
    with torch.inference_mode():
        for size in sizes:
            floor = 2 * size.queries * size.codes * size.dim / max(rates.values())
            for job in jobs(size, device, peers):
                result = measure(job, rates, repetitions, device)
                results.append(replace(result, floor_share=floor / result.wall))
    content = {
        "name": NAME,
        "unit": UNIT,
        "machine": described(device)
        | {"matmul_gflops": {str(dtype).removeprefix("torch."): rate / 1e9 for dtype, rate in rates.items()}},
        "measurements": [vars(result) for result in results],
    }
    if json_path is not None:
        write_json(json_path, content)
    return content


def jobs(size: Size, device: str, peers: bool) -> Iterator[Job]:
    """The contenders at one size, ours first."""
    codes, x = vectors(size, device)
    case = str(size)
    prepared = prepare(codes, unit_widths=size.unit_widths)
    yield Job(NAME, "search", case, size.queries, lambda: nearest(x, prepared))
    if not peers:
        return
    scores = size.queries * size.codes
    if size.unit_widths:
        if 4 * scores <= _MOST_SCORES:
            yield Job("two matrices", "search", case, size.queries, lambda: two_matrices(x, codes, size.unit_widths))
        return
    if scores <= _MOST_SCORES:
        yield Job("torch.cdist", "search", case, size.queries, lambda: torch.cdist(x, codes).argmin(1))
    if find_spec("vector_quantize_pytorch") and 4 * scores <= _MOST_SCORES:
        from vector_quantize_pytorch import VectorQuantize

        quantizer = VectorQuantize(dim=size.dim, codebook_size=size.codes).eval().to(device)
        quantizer._codebook.embed.copy_(codes)
        yield Job("vector-quantize-pytorch", "search", case, size.queries, lambda: quantizer(x[None]))
    if find_spec("faiss") and device == "cpu":
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatL2(size.dim)
        index.add(codes.numpy())
        yield Job("faiss IndexFlatL2", "search", case, size.queries, lambda: index.search(x.numpy(), 1))


def vectors(size: Size, device: str) -> tuple[Float[Tensor, "codes dim"], Float[Tensor, "queries dim"]]:
    """Random codes, and queries; half of the queries are near a code."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(size.codes, size.dim, generator=generator)
    x = torch.randn(size.queries, size.dim, generator=generator)
    half = size.queries // 2
    x[:half] = codes[torch.randint(size.codes, (half,), generator=generator)] + 0.3 * x[:half]
    return codes.to(device), x.to(device)


def two_matrices(x: Float[Tensor, "queries dim"], codes: Float[Tensor, "codes dim"], widths: Sequence[int]) -> Tensor:
    """The search in two codebooks with one index as TokenFlow computes it: a distance matrix for each, and their sum."""
    total: Tensor | float = 0.0
    for queries, rows in zip(x.split(list(widths), dim=1), codes.split(list(widths), dim=1), strict=True):
        queries, rows = F.normalize(queries, dim=1), F.normalize(rows, dim=1)
        total = total + (queries.square().sum(1, keepdim=True) + rows.square().sum(1) - 2 * queries @ rows.T)
    assert isinstance(total, Tensor)
    return total.argmin(1)

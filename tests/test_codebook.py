"""Nearest-codeword search is exact: whatever the tiling, the ties and the caller's precision settings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.kernels import codebook
from zoo.kernels.codebook import nearest, prepare


def brute_force(x: Tensor, codes: Tensor) -> Tensor:
    """Float64 differences, first minimum."""
    distances = (x.double()[:, None] - codes.double()).square().sum(2)
    return (distances == distances.min(1, keepdim=True).values).int().argmax(1)


@pytest.mark.parametrize(("dim", "codes"), [(1, 1), (1, 7), (8, 513), (32, 1000), (512, 300)])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_equals_brute_force(dim: int, codes: int, offset: float) -> None:
    generator = torch.Generator().manual_seed(dim + codes)
    book = torch.randn(codes, dim, generator=generator) + offset
    near = book[torch.randint(codes, (400,), generator=generator)] + 0.3 * torch.randn(400, dim, generator=generator)
    x = torch.cat([near, torch.randn(100, dim, generator=generator) + offset])
    assert torch.equal(nearest(x, prepare(book)), brute_force(x, book))


def test_ties_go_to_the_smallest_index() -> None:
    book = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).repeat(3, 1)
    assert torch.equal(nearest(book, prepare(book)), torch.arange(64).repeat(3))
    line = torch.tensor([[3.0], [1.0], [2.0]])
    assert nearest(torch.tensor([[2.5], [1.5]]), prepare(line)).tolist() == [0, 1]
    assert nearest(torch.ones(5, 4), prepare(torch.zeros(100, 4))).tolist() == [0] * 5


def test_any_tiling_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    book, x = torch.randn(500, 16, generator=generator), torch.randn(3, 211, 16, generator=generator)
    whole = nearest(x, prepare(book))
    assert whole.shape == (3, 211)
    monkeypatch.setattr(codebook, "_TILE_BYTES", 1)
    monkeypatch.setattr(codebook, "_EXACT_PAIRS", 3)
    assert torch.equal(nearest(x, prepare(book)), whole)
    assert torch.equal(nearest(x.double(), prepare(book)), whole)
    strided = torch.randn(3, 211, 32, generator=generator)[..., ::2].copy_(x)
    assert torch.equal(nearest(strided, prepare(book)), whole)


def test_precision_settings_of_the_caller_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(2)
    book, x = torch.randn(2000, 64, generator=generator), torch.randn(500, 64, generator=generator)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = nearest(x, prepare(book))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found, brute_force(x, book))


def test_not_a_number_gets_index_zero() -> None:
    x = torch.tensor([[float("nan"), 0.0], [1.0, 1.0]])
    assert nearest(x, prepare(torch.eye(2) + 1)).tolist()[0] == 0


def test_no_queries() -> None:
    assert nearest(torch.zeros(0, 4), prepare(torch.eye(4))).shape == (0,)

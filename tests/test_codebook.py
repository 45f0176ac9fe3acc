"""Nearest-codeword search is exact: whatever the screening, the tiling, the ties, the batch and the caller's settings."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from zoo import InputError
from zoo.bench import codebook as benchmark
from zoo.kernels import codebook, nearest_native
from zoo.kernels.codebook import CodebookSearch, nearest, prepare
from zoo.kernels.screening import Metric, Screening, unit

SCREENINGS: list[Screening] = ["float32", "bfloat16", "bfloat16x3"]
NN_CASES = ["seed_like", "wavtok_like", "low_dim", "dual_like", "dup", "ties", "offset", "far_offset"]
with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def brute_force(x: Tensor, codes: Tensor) -> Tensor:
    """Float64 differences, first minimum."""
    distances = torch.stack([(query.double() - codes.double()).square().sum(1) for query in x])
    return (distances == distances.min(1, keepdim=True).values).int().argmax(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near_and_far(book: Tensor, near: int, far: int) -> Tensor:
    """Queries close to codes, as from a trained encoder, and queries that have nothing to do with them."""
    chosen = book[torch.randint(len(book), (near,), generator=torch.Generator().manual_seed(1))]
    return torch.cat([chosen + 0.3 * normal(near, book.shape[1], seed=2), book.mean(0) + normal(far, book.shape[1], seed=3)])


# --------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("screening", SCREENINGS)
@pytest.mark.parametrize("case", NN_CASES)
def test_reference_cases(golden: Path, case: str, screening: Screening) -> None:
    tensors = load_file(golden / "quantize/codebook-nn-a/io.safetensors")
    found = nearest(tensors[f"{case}/x"], prepare(tensors[f"{case}/codebook"], screening=screening))
    assert torch.equal(found, tensors[f"{case}/indices"])


# Many codes on a line or in a plane are so close to each other that screening decides little; it must never decide wrongly.
@pytest.mark.parametrize("screening", SCREENINGS)
@pytest.mark.parametrize(("dim", "codes"), [(1, 1), (1, 500), (2, 4096), (3, 2000), (8, 513), (32, 1000), (512, 300)])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_equals_brute_force(dim: int, codes: int, offset: float, screening: Screening) -> None:
    book = normal(codes, dim, seed=dim) + offset
    x = near_and_far(book, 200, 100)
    assert torch.equal(nearest(x, prepare(book, screening=screening)), brute_force(x, book))


@pytest.mark.parametrize("screening", [*SCREENINGS, "float16x3"])
@pytest.mark.parametrize(("dim", "offset", "length"), [(2, 0.0, 1.0), (2, 0.0, 0.01), (8, 100.0, 1.0), (64, 0.0, 100.0)])
def test_errors_of_screening_are_within_their_bound(dim: int, offset: float, length: float, screening: Screening) -> None:
    book, x = normal(1024, dim) + offset, length * normal(256, dim, seed=1) + offset
    prepared = prepare(book, screening=screening)
    factors, query_error = codebook.query_factors(x, prepared)
    # A processor without such products adds them up in float32, as a GPU and matrix units do.
    product_type = torch.float32 if screening.endswith("x3") else factors.dtype
    scores = (prepared.operand.to(product_type) @ factors.to(product_type).T)[: len(prepared.codes)].double()
    bound = (prepared.error @ query_error.T).repeat_interleave(64, dim=0)[: len(prepared.codes)]
    centred = (prepared.codes.double() - prepared.mean) * prepared.scale
    exact = centred @ ((x.double() - prepared.mean) * prepared.scale).T - centred.square().sum(1, keepdim=True) / 2
    if screening == "bfloat16":  # shifts all scores by the same amount
        exact += centred.square().sum(1).mean() / 2 + 1 / 16
    assert ((scores - exact).abs() <= bound).all()


@pytest.mark.parametrize("screening", SCREENINGS)
def test_ties_go_to_the_smallest_index(screening: Screening) -> None:
    book = normal(64, 8).repeat(3, 1)
    assert torch.equal(nearest(book, prepare(book, screening=screening)), torch.arange(64).repeat(3))
    line = torch.tensor([[3.0], [1.0], [2.0]])
    assert nearest(torch.tensor([[2.5], [1.5]]), prepare(line, screening=screening)).tolist() == [0, 1]
    assert nearest(torch.ones(5, 4), prepare(torch.zeros(100, 4), screening=screening)).tolist() == [0] * 5
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 10).flip(0)
    assert nearest(torch.zeros(3, 10), prepare(corners, screening=screening)).tolist() == [0] * 3


def brute_force_dot(x: Tensor, codes: Tensor) -> Tensor:
    """Dot products in float64, first maximum."""
    products = x.double() @ codes.double().T
    return (products == products.max(1, keepdim=True).values).int().argmax(1)


@pytest.mark.parametrize("screening", SCREENINGS)
@pytest.mark.parametrize(("dim", "codes"), [(1, 50), (2, 4096), (16, 700), (256, 3000)])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_largest_dot_products(dim: int, codes: int, offset: float, screening: Screening) -> None:
    """Of raw rows: neither the nearest code nor the largest cosine, and whatever all codes have in common."""
    book = normal(codes, dim, seed=dim) * (1 + normal(codes, 1).abs()) + offset
    book = torch.cat([book, book[: codes // 4], (1 - 2.0**-23) * book[: codes // 2]])
    x = near_and_far(book, 100, 100)
    found = nearest(x, prepare(book, screening=screening, metric="dot"))
    assert torch.equal(found, brute_force_dot(x, book))
    assert dim < 16 or not torch.equal(found, nearest(x, prepare(book)))


@pytest.mark.parametrize("screening", SCREENINGS)
def test_dot_products_of_any_magnitude(screening: Screening) -> None:
    book = normal(500, 6).clamp(-1, 1)
    x = normal(20, 6, seed=1).clamp(-1, 1)
    expected = brute_force_dot(x, book)
    for queries, codes in ((1e30, 1e30), (1e30, 1e-30), (1e-30, 1e30), (1e-30, 1e-30), (3e38, 1.0)):
        assert torch.equal(nearest(x * queries, prepare(book * codes, screening=screening, metric="dot")), expected)
    prepared = prepare(book, screening=screening, metric="dot")
    assert nearest(torch.stack([torch.zeros(6), torch.full((6,), torch.nan)]), prepared).tolist() == [0, 0]


@pytest.mark.parametrize("screening", SCREENINGS)
def test_codes_that_screening_cannot_tell_apart(screening: Screening) -> None:
    sphere = F.normalize(normal(3000, 16), dim=1)
    centre = torch.cat([torch.zeros(1, 16), 1e-6 * normal(20, 16, seed=1)])
    assert torch.equal(nearest(centre, prepare(sphere, screening=screening)), brute_force(centre, sphere))

    twins = torch.cat([sphere, sphere.nextafter(torch.tensor(torch.inf))])
    x = near_and_far(twins, 50, 50)
    assert torch.equal(nearest(x, prepare(twins, screening=screening)), brute_force(x, twins))

    flat = torch.cat([normal(300, 4), torch.zeros(300, 4)], dim=1)
    away = torch.cat([torch.zeros(20, 4), 1e4 * normal(20, 4, seed=1)], dim=1)
    assert torch.equal(nearest(away, prepare(flat, screening=screening)), brute_force(away, flat))


@pytest.mark.parametrize("screening", SCREENINGS)
@pytest.mark.parametrize(("queries", "codes"), [(1e30, 1e30), (1e30, 1e-30), (1e-30, 1e30), (1e-30, 1e-30), (3e38, 1.0)])
def test_any_magnitude(queries: float, codes: float, screening: Screening) -> None:
    book, x = normal(100, 6).clamp(-1, 1) * codes, normal(20, 6, seed=1).clamp(-1, 1) * queries
    assert torch.equal(nearest(x, prepare(book, screening=screening)), brute_force(x, book))


@pytest.mark.parametrize("screening", SCREENINGS)
@pytest.mark.parametrize("times", [1e2, 1e4])
def test_one_long_code_does_not_slow_the_others_down(
    times: float, screening: Screening, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = normal(4096, 16)
    book[7] *= times
    x = near_and_far(book[8:], 50, 50)
    monkeypatch.setattr(codebook, "_first_shortest", None)
    assert torch.equal(nearest(x, prepare(book, screening=screening)), brute_force(x, book))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_query_that_is_not_finite_gets_index_zero(bad: float) -> None:
    x = torch.tensor([[bad, 0.0], [2.0, 3.0], [1e300, 0.0]], dtype=torch.float64)
    assert nearest(x, prepare(torch.tensor([[5.0, 5.0], [2.0, 2.0]]))).tolist() == [0, 1, 0]


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        prepare(torch.zeros(0, 4))
    with pytest.raises(InputError, match="NaN or an infinity"):
        prepare(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(InputError, match=r"\(3, 2\)"):
        prepare(torch.eye(4), unit_widths=(3, 2))
    with pytest.raises(InputError, match="1 numbers"):
        nearest(torch.zeros(5, 1), prepare(torch.eye(4)))


# ---------------------------------------------------------------------------------------------- what must make no difference


@pytest.mark.parametrize("screening", SCREENINGS)
def test_any_tiling_gives_the_same(screening: Screening, monkeypatch: pytest.MonkeyPatch) -> None:
    book, x = normal(300, 16), normal(3, 11, 16, seed=1)
    prepared = prepare(book, screening=screening)
    whole = nearest(x, prepared)
    assert whole.shape == (3, 11)
    assert torch.equal(whole.flatten(), brute_force(x.flatten(0, 1), book))
    for part in (1, 7, 20):
        assert torch.equal(torch.cat([nearest(some, prepared) for some in x.flatten(0, 1).split(part)]), whole.flatten())
    for name, value in (
        ("_TILE_BYTES", 1 << 17),
        ("_EXACT_NUMBERS", 48),
        ("_ROWS", 15),
        ("_CHUNK_NUMBERS", 240),
        ("_CROWD", 0),
    ):
        monkeypatch.setattr(codebook, name, value)
        assert torch.equal(nearest(x, prepared), whole)


@pytest.mark.parametrize("screening", SCREENINGS)
def test_layout_type_and_threads_do_not_matter(screening: Screening) -> None:
    book, x = normal(3000, 16), normal(300, 16, seed=1)
    prepared = prepare(book, screening=screening)
    expected = nearest(x, prepared)
    strided = torch.empty(300, 32)[:, ::2].copy_(x)
    transposed = x.T.contiguous().T
    for same in (x.double(), strided, transposed, x.clone().requires_grad_()):
        assert torch.equal(nearest(same, prepared), expected)
    half = x.bfloat16()
    assert torch.equal(nearest(half, prepared), nearest(half.float(), prepared))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(nearest(x, prepared), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("screening", SCREENINGS)
def test_precision_settings_of_the_caller_do_not_matter(screening: Screening) -> None:
    book, x = normal(2000, 64), normal(500, 64, seed=1)
    expected = brute_force(x, book)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = nearest(x, prepare(book, screening=screening))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found, expected)


def test_is_one_operator_to_the_compiler() -> None:
    prepared = prepare(normal(300, 16), unit_widths=(10, 6))
    arguments = [getattr(prepared, field.name) for field in dataclasses.fields(prepared)]
    torch.library.opcheck(torch.ops.zoo.nearest_code.default, (normal(50, 16, seed=1), *arguments))


def test_no_queries() -> None:
    assert nearest(torch.zeros(0, 4), prepare(torch.eye(4))).shape == (0,)
    assert nearest(torch.zeros(2, 0, 4), prepare(torch.eye(4))).shape == (2, 0)


MEMORY = """
import resource, torch
from zoo.kernels import codebook, nearest_native
from zoo.kernels.codebook import nearest, prepare
torch.set_num_threads(1)
codebook._TILE_BYTES = codebook._MOST_TILE_BYTES  # as with many threads
generator = torch.Generator().manual_seed(0)
x = torch.randn(65536, 8, generator=generator)
prepared = prepare(torch.randn(32768, 8, generator=generator))
nearest(x[:10], prepared)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nearest(x, prepared)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is in kilobytes on Linux only")
def test_extra_memory_is_bounded() -> None:
    """All scores would be 8.6 GB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 64 * 1024


@pytest.mark.parametrize("screening", ["float32", "bfloat16x3"])
@pytest.mark.parametrize("metric", ["distance", "dot"])
def test_the_compiled_search_and_tiles_find_the_same(
    screening: Screening, metric: Metric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more codes near a query than the kernel notes as well, and of numbers of queries around its blocks."""
    crowd = normal(1, 24) + 1e-7 * normal(3000, 24, seed=1)
    for dim, codes in ((3, 40), (24, 5000), (24, 0)):
        book = normal(codes, dim) if codes else crowd
        x = near_and_far(book, 150, 107)
        prepared = prepare(book, screening=screening, metric=metric)
        found = [nearest(x[:count], prepared) for count in (1, 31, 128, 129, 257)]
        with monkeypatch.context() as without:
            without.setattr(nearest_native, "chosen", lambda codebook: None)
            expected = nearest(x, prepared)
        assert torch.equal(expected, brute_force_dot(x, book) if metric == "dot" else brute_force(x, book))
        assert all(torch.equal(some, expected[: len(some)]) for some in found)


@pytest.mark.skipif(not nearest_native.quick(8), reason="no compiler, or no vector registers that the kernel uses")
def test_short_vectors_are_compared_in_the_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebook, "_by_tiles", None)
    book, x = normal(3000, 8), normal(200, 8, seed=1)
    prepared = prepare(book)
    assert prepared.screening == ("bfloat16x3" if nearest_native.has_matrix_units() else "float32")
    assert torch.equal(nearest(x, prepared), brute_force(x, book))


# ---------------------------------------------------------------------------------------------------- normalised codebooks


def test_two_codebooks_with_one_index_take_one_search() -> None:
    semantic, pixel = normal(600, 32), 5 * normal(600, 8, seed=1)
    x_semantic, x_pixel = 3 * normal(200, 32, seed=2), normal(200, 8, seed=3)
    distances = sum(
        (F.normalize(x.double(), dim=1)[:, None] - F.normalize(codes.double(), dim=1)).square().sum(2)
        for x, codes in ((x_semantic, semantic), (x_pixel, pixel))
    )
    prepared = prepare(torch.cat([semantic, pixel], dim=1), unit_widths=(32, 8))
    assert torch.equal(nearest(torch.cat([x_semantic, x_pixel], dim=1), prepared), distances.argmin(1))
    # The length of either part tells nothing.
    scaled = prepare(torch.cat([7 * semantic, pixel], dim=1), unit_widths=(32, 8))
    assert torch.equal(nearest(torch.cat([x_semantic, x_pixel / 9], dim=1), scaled), distances.argmin(1))


def test_unit_vectors() -> None:
    x = torch.tensor([[3.0, 4.0, 0.0, 0.0, 2.0], [0.0, 0.0, 1e-30, 0.0, -1.0]])
    expected = torch.tensor([[0.6, 0.8, 0.0, 0.0, 1.0], [0.0, 0.0, 1e-18, 0.0, -1.0]])
    torch.testing.assert_close(unit(x, (2, 2, 1)), expected, rtol=1e-6, atol=0)
    assert unit(x, ()) is x
    z = normal(400, 40)
    assert torch.equal(torch.cat([unit(row, (32, 8)) for row in z.split(1)]), unit(z, (32, 8)))


def test_public_quantizers_give_the_same_indices(golden: Path) -> None:
    io = load_file(golden / "quantize/codebook-lib-a/io.safetensors")
    weights = load_file(golden / "quantize/codebook-lib-a/weights.safetensors")

    projected = F.linear(io["vq_cosine/z"], weights["vq_cosine/project_in.weight"], weights["vq_cosine/project_in.bias"])
    cosine = prepare(weights["vq_cosine/_codebook.embed"][0], unit_widths=(8,))
    assert torch.equal(nearest(projected, cosine), io["vq_cosine/indices"])

    transformed = weights["simvq/frozen_codebook"] @ weights["simvq/code_transform.weight"].T
    assert torch.equal(nearest(io["simvq/z"], prepare(transformed)), io["simvq/indices"])

    residual, indices = io["rvq/z"], []
    for layer in range(4):
        codes = weights[f"rvq/layers.{layer}._codebook.embed"][0]
        indices.append(nearest(residual, prepare(codes)))
        residual = residual - codes[indices[-1]]
    assert torch.equal(torch.stack(indices, dim=-1), io["rvq/indices"])

    assert torch.equal(nearest(io["ema_codebook/x"], prepare(weights["ema_codebook/before/embed"])), io["ema_codebook/indices"])


# ---------------------------------------------------------------------------------------------------- codebooks that change


def test_a_codebook_is_prepared_once_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []
    monkeypatch.setattr(codebook, "prepare", lambda codes, **options: prepared.append(1) or prepare(codes, **options))
    search, x = CodebookSearch(), normal(100, 8, seed=1)
    book = nn.Parameter(normal(50, 8))

    def check(times: int) -> None:
        for _ in range(2):
            assert torch.equal(search(x, book), brute_force(x, book.detach()))
        assert len(prepared) == times

    check(1)
    optimiser = torch.optim.SGD([book], lr=1.0)
    book.grad = normal(50, 8, seed=2)
    optimiser.step()
    check(2)
    with torch.no_grad():
        book.lerp_(normal(50, 8, seed=3), 0.5)
    check(3)
    book = nn.Parameter(normal(50, 8, seed=4))
    check(4)


def test_a_codebook_whose_writes_are_not_counted() -> None:
    search, x = CodebookSearch((4, 4)), normal(100, 8, seed=1)
    with torch.inference_mode():
        book = normal(50, 8) + 0
        for _ in range(3):
            expected = brute_force(unit(x, (4, 4)), unit(book, (4, 4)))
            assert torch.equal(search(x, book), expected)
            book.add_(1)


def test_a_search_can_be_copied_and_pickled() -> None:
    search, book, x = CodebookSearch((3, 5)), normal(50, 8), normal(10, 8, seed=1)
    expected = search(x, book)
    for same in (copy.deepcopy(search), pickle.loads(pickle.dumps(search))):
        assert same.unit_widths == (3, 5)
        assert torch.equal(same(x, book), expected)


def test_a_prepared_codebook_is_a_copy() -> None:
    book, x = normal(50, 8), normal(100, 8, seed=1)
    prepared = prepare(book)
    expected = nearest(x, prepared)
    book.neg_()
    assert torch.equal(nearest(x, prepared), expected)


# ------------------------------------------------------------------------------------------------------------- benchmark


def test_contenders_of_the_benchmark_find_the_same(tmp_path: Path) -> None:
    sizes = [benchmark.Size(8, 200, 60), benchmark.Size(5, 200, 60, (3, 2))]
    for size in sizes:
        codes, x = benchmark.vectors(size, "cpu")
        expected = brute_force(unit(x, size.unit_widths), unit(codes, size.unit_widths))
        for job in benchmark.jobs(size, "cpu", peers=True):
            answer = job.work()
            found = answer[1] if isinstance(answer, tuple) else answer
            assert torch.equal(torch.as_tensor(found).flatten(), expected), job.contender
    content = benchmark.run(sizes=sizes, repetitions=1, json_path=tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text()) == content
    ours = [measurement for measurement in content["measurements"] if measurement["contender"] == content["name"]]
    assert [measurement["case"] for measurement in ours] == ["D=8 K=200 N=60", "D=5 K=200 N=60"]


# ------------------------------------------------------------------------------------------------------------------- GPU

INTERPRETED = """
import torch
from zoo.kernels import codebook_triton
from zoo.kernels.codebook import nearest, prepare

def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def check(x, book, **options):
    found = nearest(x, prepare(book, screening="float16x3", **options))
    assert torch.equal(found, nearest(x, prepare(book, screening="float32", **options))), (found, x.shape, book.shape)

codes = normal(520, 8)
above = codes.nextafter(torch.tensor(torch.inf))
check(normal(130, 8, seed=1), normal(1000, 8))                                      # more parts than blocks of queries
check(normal(20, 40, seed=1) * 9, normal(200, 40), unit_widths=(32, 8))
check(normal(10, 300, seed=1) + 10, normal(70, 300) + 10)                           # wide, with an offset
check(normal(4, 1, seed=1), normal(1, 1))
check(normal(6, 2, seed=1), normal(300, 2))                                         # close codes
line = torch.tensor([[3.0], [2.0], [1.0], [0.0]])
check(torch.tensor([[0.5], [2.5], [1e30], [-1e-30], [float("nan")], [3e38]]), line)
check(codes[:5], torch.cat([above, codes]))                                         # rivals in different parts
check(torch.zeros(0, 8), codes)
codebook_triton._PROGRAMS = 1                                                       # as with many queries: one part
check(normal(130, 8, seed=1), normal(513, 8))                                       # padding
check(normal(130, 8, seed=1), normal(1024, 8))                                      # tiles that share places
check(codes[:5], torch.cat([above[:32], codes[:32]]))                               # rivals in one tile
check(codes[:5], torch.cat([above[:64], codes[:64], codes[64:128]]))                # in one column of different tiles
check(torch.zeros(1, 8), torch.cat([codes, -codes]))                                # equal ones
check(torch.zeros(1, 8), torch.cat([(1 + 1e-6) * codes, codes]))                    # nearly equal ones
check(normal(130, 8, seed=1), torch.cat([codes, (1 - 1e-7) * codes]) + 3, metric="dot")
check(torch.cat([torch.zeros(1, 40), normal(9, 40, seed=1) * 1e9]), normal(200, 40), metric="dot")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_gpu_kernels_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@with_gpu
@pytest.mark.parametrize(("dim", "codes"), [(1, 300), (2, 4096), (8, 32768), (32, 8192), (40, 32768), (512, 4096), (300, 70)])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_a_gpu_gives_the_same(dim: int, codes: int, offset: float) -> None:
    book = normal(codes, dim) + offset
    x = near_and_far(book, 500, 500)
    expected = nearest(x, prepare(book))
    for screening in (None, "float32"):
        on_gpu = prepare(book.cuda(), screening=screening)
        assert torch.equal(nearest(x.cuda(), on_gpu).cpu(), expected)
        assert torch.equal(nearest(x[:3].cuda(), on_gpu).cpu(), expected[:3])
        dot = prepare(book.cuda(), screening=screening, metric="dot")
        assert torch.equal(nearest(x.cuda(), dot).cpu(), nearest(x, prepare(book, metric="dot")))


@with_gpu
def test_capture_in_a_cuda_graph() -> None:
    book, x = normal(4096, 32), normal(200, 32, seed=1).cuda()
    prepared = prepare(book.cuda())
    nearest(x, prepared)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = nearest(x, prepared)
    x.copy_(normal(200, 32, seed=2))
    graph.replay()
    assert torch.equal(found.cpu(), brute_force(x.cpu(), book))


@with_gpu
def test_extra_memory_is_bounded_on_a_gpu() -> None:
    x, prepared = normal(65536, 512).cuda(), prepare(normal(32768, 512, seed=1).cuda())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nearest(x, prepared)
    assert torch.cuda.max_memory_allocated() - before <= 64 << 20

"""Products of packed signs are exact integers, whatever computes them."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import InputError
from zoo.kernels import binary, native
from zoo.kernels.binary import Execution, Geometry, binary_conv, binary_matmul, pack_signs, unpack_signs
from zoo.kernels.packing import row_bytes

EXECUTIONS: list[Execution] = ["native", "numpy", "int8", "float32"]
with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def signs(x: Tensor) -> Tensor:
    return 1.0 - 2.0 * (x < 0)


def needs(execution: Execution) -> None:
    if execution == "native" and native.library("binary.c") is None:
        pytest.skip("no C compiler")
    if execution == "numpy" and not hasattr(np, "bitwise_count"):
        pytest.skip("NumPy 1 counts no bits")


# ---------------------------------------------------------------------------------------------------------------- format


def test_the_format_on_a_page() -> None:
    x = torch.tensor([[-1.0, 0.0, -0.0, 2.0, -3.0, float("nan"), -float("inf"), 1.0, -1e-30], [1.0] * 9])
    packed = pack_signs(x)
    assert packed.tolist() == [[0b01010001, 0b1, 0, 0, 0, 0, 0, 0], [0] * 8]
    assert torch.equal(unpack_signs(packed, 9).float(), signs(x))
    assert [row_bytes(length) for length in (0, 1, 64, 65)] == [0, 8, 8, 16]


@pytest.mark.parametrize("length", [1, 8, 63, 64, 65, 300])
def test_packing_is_numpys(length: int) -> None:
    x = normal(3, 5, length)
    expected = np.packbits((x < 0).numpy(), axis=-1, bitorder="little")
    packed = pack_signs(x)
    assert packed.shape == (3, 5, row_bytes(length))
    assert np.array_equal(packed.numpy()[..., : expected.shape[-1]], expected)
    assert not packed[..., expected.shape[-1] :].any()
    assert torch.equal(pack_signs(x.transpose(0, 1)), packed.transpose(0, 1))
    assert torch.equal(pack_signs(x.half()), packed)


# -------------------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("length", [1, 7, 64, 65, 576, 8200])
@pytest.mark.parametrize(("rows", "outputs"), [(1, 1), (3, 5), (15, 34), (16, 33), (20, 300)])
def test_products(execution: Execution, length: int, rows: int, outputs: int) -> None:
    needs(execution)
    a, b = normal(rows, length), normal(outputs, length, seed=1)
    expected = (signs(a).double() @ signs(b).double().T).int()
    assert torch.equal(binary.multiply(pack_signs(a), pack_signs(b), length, execution), expected)
    assert torch.equal(binary_matmul(pack_signs(a), pack_signs(b), length), expected)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_threads_tiles_and_no_rows_at_all(execution: Execution, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(execution)
    a, b = pack_signs(normal(50, 1000)), pack_signs(normal(1001, 1000, seed=1))
    expected = binary.multiply(a, b, 1000, "float32")
    monkeypatch.setattr(binary, "_UNPACKED_BYTES", 7000)
    monkeypatch.setattr(binary, "_SIGNS_PER_OPERATION", 1)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(binary.multiply(a, b, 1000, execution), expected)
    finally:
        torch.set_num_threads(threads)
    assert binary.multiply(a[:0], b, 1000, execution).shape == (0, 1001)
    assert binary.multiply(a, b[:0], 1000, execution).shape == (50, 0)
    assert binary.multiply(a[:, :0], b[:, :0], 0, execution).abs().sum() == 0


def test_what_is_chosen_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda source: None)
    cpu = torch.device("cpu")
    assert binary.choose_execution(1, cpu) == ("numpy" if hasattr(np, "bitwise_count") else "int8")
    assert binary.choose_execution(4096, cpu) == "int8"
    a, b = normal(1, 70), normal(9, 70, seed=1)
    assert torch.equal(binary_matmul(pack_signs(a), pack_signs(b), 70).float(), signs(a) @ signs(b).T)


def test_rows_of_another_length_are_refused() -> None:
    packed = pack_signs(normal(2, 64))
    with pytest.raises(InputError, match="16 bytes, not 8"):
        binary_matmul(packed, packed, 65)


def test_operators_are_known_to_the_compiler() -> None:
    x, packed = normal(3, 70), pack_signs(normal(5, 70))
    torch.library.opcheck(torch.ops.zoo.pack_signs.default, (x,))
    torch.library.opcheck(torch.ops.zoo.binary_matmul.default, (packed, packed, 70))


# ----------------------------------------------------------------------------------------------------------- convolution


@pytest.mark.parametrize("channels", [64, 24, 10])
@pytest.mark.parametrize(
    "geometry",
    [
        Geometry((3, 3), margins=(1, 1, 1, 1)),
        Geometry((3, 2), stride=(2, 1), dilation=(1, 2), margins=(2, 1, 0, 1), groups=2),
        Geometry((1, 7), stride=(1, 3), margins=(3, 3, 0, 0)),
        Geometry((5, 5), margins=(9, 9, 9, 9)),  # some results see nothing but margin
        Geometry((2, 2), groups=2),
    ],
)
def test_margins_count_as_zero(channels: int, geometry: Geometry) -> None:
    x, weight = normal(2, channels, 8, 9), normal(6, channels // geometry.groups, *geometry.kernel, seed=1)
    settings = {"stride": geometry.stride, "dilation": geometry.dilation, "groups": geometry.groups}
    expected = F.conv2d(F.pad(signs(x), geometry.margins), signs(weight), **settings)
    packed = pack_signs(weight.movedim(1, -1).flatten(1))
    assert torch.equal(binary_conv(x, packed, geometry).float(), expected)


def test_an_input_smaller_than_the_kernel_is_refused() -> None:
    with pytest.raises(InputError, match="kernel spans"):
        binary_conv(normal(1, 8, 2, 9), pack_signs(normal(4, 72)), Geometry((3, 3)))


# ------------------------------------------------------------------------------------------------------------------- GPU

INTERPRETED = """
import torch
from zoo.kernels import binary, binary_triton

def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

for length, rows, outputs in ((1, 1, 1), (300, 17, 33), (8200, 2, 3), (70, 3, 5)):
    x, weight = normal(rows, length), normal(outputs, length, seed=1)
    a, b = binary.pack_signs(x), binary.pack_signs(weight)
    assert torch.equal(binary_triton.pack_signs(x), a)
    expected = binary.multiply(a, b, length, "float32")
    for count_bits in (True, False):
        assert torch.equal(binary_triton.multiply(a, b, length, count_bits), expected), (length, rows, outputs, count_bits)
strided = normal(70, 12).T
assert torch.equal(binary_triton.pack_signs(strided), binary.pack_signs(strided))
special = torch.tensor([[float("nan"), -0.0, 0.0, -1e-40]])
assert torch.equal(binary_triton.pack_signs(special), binary.pack_signs(special))
assert binary_triton.multiply(a[:0], b, length, True).shape == (0, 5)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_gpu_kernels_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@with_gpu
@pytest.mark.parametrize("length", [1, 70, 576, 4096])
@pytest.mark.parametrize(("rows", "outputs"), [(1, 300), (5, 33), (16, 128), (17, 130), (300, 200)])
def test_a_gpu_gives_the_same(length: int, rows: int, outputs: int) -> None:
    x, weight = normal(rows, length), normal(outputs, length, seed=1)
    a, b = pack_signs(x), pack_signs(weight)
    assert torch.equal(pack_signs(x.cuda()).cpu(), a)
    expected = binary.multiply(a, b, length, "float32")
    assert torch.equal(binary_matmul(a.cuda(), b.cuda(), length).cpu(), expected)
    for execution in ("float32", "triton popcount", "triton int8"):
        assert torch.equal(binary.multiply(a.cuda(), b.cuda(), length, execution).cpu(), expected)

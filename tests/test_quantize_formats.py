"""Small number formats: every table of the references bit by bit, on every device and under the compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from zoo import InputError
from zoo.quantization.fp import (
    FloatFormat,
    decode,
    dequantize,
    encode,
    fake_quantize,
    finite,
    format_named,
    integer,
    pack,
    quantize_mx,
    quantize_nvfp4,
    round_to,
    unpack,
    values,
)

OCP = ["e2m1", "e3m0", "e2m3", "e3m2", "e4m3fn", "e5m2"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.fixture(scope="module")
def tables() -> dict[str, Tensor]:
    return load_file(Path(__file__).parent / "golden/quantize/fp-rounding-ocp/io.safetensors")


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


# ---------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("name", OCP)
def test_values_and_limits(golden: Path, tables: dict[str, Tensor], name: str) -> None:
    expected = json.loads((golden / "quantize/fp-rounding-ocp/config.json").read_text())["formats"][name]
    format = format_named(name)
    assert same(values(format), tables[f"{name}/values"])
    assert (format.max, format.min_normal) == (expected["max"], expected["min_normal"])
    assert (format.exponent_bits, format.mantissa_bits, format.bias) == tuple(
        expected[key] for key in ("exponent_bits", "mantissa_bits", "bias")
    )
    assert format.name == name


def check_table(tables: dict[str, Tensor], name: str, device: str, rounding: Callable[..., Tensor], coding: Any) -> None:
    format = format_named(name)
    x, expected, codes = (tables[f"{name}/{key}"].to(device) for key in ("in", "out", "code"))
    rounded = rounding(x, format)
    assert same(rounded, expected)
    number = ~x.isnan()
    assert torch.equal(rounded.signbit()[number], x.signbit()[number])
    assert torch.equal(coding(x[number], format), codes[number])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OCP)
def test_rounding_table(tables: dict[str, Tensor], name: str, device: str) -> None:
    check_table(tables, name, device, round_to, encode)
    bfloat16 = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(device)
    number = ~bfloat16.isnan()
    expected = tables[f"{name}/bf16_code"].to(device)
    assert torch.equal(encode(bfloat16[number].float(), format_named(name)), expected[number])


COMPILED = """
import sys, torch
from safetensors.torch import load_file
from test_quantize_formats import OCP, check_table
from zoo.quantization.fp import encode, round_to

tables = load_file(sys.argv[1])
for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
    for name in OCP:
        check_table(tables, name, device, torch.compile(round_to), torch.compile(encode))
"""


@pytest.mark.slow
def test_rounding_tables_under_the_compiler(golden: Path) -> None:
    """In a process of its own: the compiler cannot see through the test suite's type checks."""
    table = str(golden / "quantize/fp-rounding-ocp/io.safetensors")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", COMPILED, table], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2"])
def test_clipping_makes_pytorchs_cast_the_same(tables: dict[str, Tensor], name: str) -> None:
    format = format_named(name)
    dtype = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name]
    x = tables[f"{name}/in"]
    cast = x.clamp(-format.max, format.max).to(dtype).float()
    assert same(round_to(x, format), cast)


@pytest.mark.parametrize(
    "format", [finite(e, m) for e in range(7) for m in range(8) if 2 <= 1 + e + m <= 8], ids=lambda f: f.name
)
def test_every_format_keeps_its_values_and_rounds_between_them(format: FloatFormat) -> None:
    table = values(format)
    assert len(table.unique()) == 2 * format.max_code + 1  # plus and minus zero are one value
    assert torch.equal(round_to(table, format), table)
    codes = encode(table, format)
    assert torch.equal(codes, torch.arange(len(table), dtype=torch.uint8))
    assert torch.equal(decode(codes, format), table)
    assert torch.equal(decode(codes, format, torch.bfloat16).float(), table)
    # The nearest by brute force, ties to the even code.
    x = torch.cat([torch.randn(400, generator=torch.Generator().manual_seed(0)) * format.max / 2, (table[1:] + table[:-1]) / 2])
    distance = (x.double()[:, None] - table.double()).abs()
    tied = distance == distance.amin(1, keepdim=True)
    preferred = torch.where(tied, codes.to(torch.int64) % 2, 2).argmin(1)
    assert torch.equal(round_to(x, format), table[preferred])


def test_unsigned_formats_have_one_bit_more() -> None:
    format = finite(4, 4, signed=False)
    assert format.bits == 8
    assert format_named(format.name) == format
    x = torch.tensor([-3.0, -0.0, 0.3, 1e9, float("nan")])
    assert round_to(x, format)[:2].tolist() == [0, 0]
    assert round_to(x, format)[3] == format.max
    assert round_to(x, format)[4].isnan()
    table = values(format)
    assert torch.equal(encode(table, format), torch.arange(256, dtype=torch.uint8))


def test_integers_are_uniform() -> None:
    assert values(integer(4))[:8].tolist() == list(range(8))
    assert round_to(torch.tensor([0.5, 1.5, -2.5, 99.0]), integer(4)).tolist() == [0, 2, -2, 7]


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(0),
        torch.tensor(1.0),
        torch.zeros(3),
        torch.full((4,), 1e-38),
        torch.tensor([1e-45, -1e-45]),
        torch.tensor([float("inf"), float("-inf"), 3e38]),
    ],
    ids=["empty", "scalar", "zeros", "tiny", "subnormal", "huge"],
)
@pytest.mark.parametrize("name", [*OCP, "int4", "e5m2f"])
def test_edges_are_defined(x: Tensor, name: str) -> None:
    format = format_named(name)
    rounded = round_to(x, format)
    assert rounded.shape == x.shape and bool(rounded.isfinite().all())
    assert bool((rounded.abs() <= format.max).all())
    assert encode(x, format).shape == x.shape
    finite_x = x.nan_to_num(0, 0, 0)
    largest = float(finite_x.abs().amax()) if x.numel() else 0.0
    assert bool(fake_quantize(finite_x, format, largest).isfinite().all())


def test_a_format_without_nan_cannot_store_it() -> None:
    with pytest.raises(InputError, match="NaN cannot be stored as e2m1"):
        encode(torch.tensor([1.0, float("nan")]), format_named("e2m1"))
    assert encode(torch.tensor([float("nan")]), format_named("e4m3fn")).item() & 0x7F == 0x7F


@pytest.mark.parametrize("name", ["e9m9", "fp4", "e4m4f", "e0m0f"])
def test_unknown_format(name: str) -> None:
    with pytest.raises(InputError, match="format"):
        format_named(name)


# --------------------------------------------------------------------------------------------------------------- packing


def test_packed_bytes(tables: dict[str, Tensor]) -> None:
    for bits in (4, 6):
        codes, stored = tables[f"pack/fp{bits}_codes"], tables[f"pack/fp{bits}_bytes"]
        assert torch.equal(pack(codes, bits), stored)
        assert torch.equal(unpack(stored, bits, len(codes)), codes)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 31])
def test_odd_rows_are_filled_up(bits: int, columns: int) -> None:
    codes = torch.randint(1 << bits, (3, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    stored = pack(codes, bits)
    assert stored.shape[1] == {4: -(-columns // 2), 6: 3 * -(-columns // 4), 8: columns}[bits]
    assert torch.equal(unpack(stored, bits, columns), codes)
    with pytest.raises(InputError, match="are not"):
        unpack(stored, bits, columns + 4)


# ---------------------------------------------------------------------------------------------------------------- blocks


@pytest.fixture(scope="module")
def blocks() -> dict[str, Tensor]:
    return load_file(Path(__file__).parent / "golden/quantize/fp-block-a/io.safetensors")


@pytest.mark.parametrize("name", ["fp4_e2m1", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize(("rounding", "prefix"), [("floor", ""), ("ceil", "rceil_")])
def test_microscaling(blocks: dict[str, Tensor], name: str, rounding: Any, prefix: str) -> None:
    format = format_named({"e4m3": "e4m3fn"}.get(name[4:], name[4:]))
    made = quantize_mx(blocks["x"], format, rounding=rounding)
    checked = 0
    if (key := f"mx_{name}/{prefix}dequant") in blocks:
        assert torch.equal(dequantize(made, format, "e8m0", blocks["x"].shape[1]), blocks[key])
        checked += 1
    stored = f"mx_{name}/{prefix or 'floor_'}"
    if f"{stored}data" in blocks:
        assert torch.equal(pack(made.codes, format.stored_bits), blocks[f"{stored}data"])
        assert torch.equal(made.scale, blocks[f"{stored}scale_e8m0"])
        checked += 1
    assert checked or rounding == "ceil"  # six bits are recorded with the floor only


@pytest.mark.parametrize(("prefix", "tensor_scale"), [("", 1.0), ("pts_", None)])
def test_nvfp4(blocks: dict[str, Tensor], prefix: str, tensor_scale: float | None) -> None:
    made = quantize_nvfp4(blocks["x"], tensor_scale)
    assert torch.equal(dequantize(made, format_named("e2m1"), "e4m3", blocks["x"].shape[1]), blocks[f"nvfp4/{prefix}dequant"])
    assert torch.equal(pack(made.codes, 4), blocks[f"nvfp4/{prefix}data"])
    assert torch.equal(made.scale, blocks[f"nvfp4/{prefix}scale_e4m3"])
    if tensor_scale is None:
        assert made.tensor_scale == blocks["nvfp4/pts_scale"]


def test_blocks_of_extreme_numbers() -> None:
    x = torch.tensor([[0.0] * 32 + [1e-45] * 32 + [3e38] * 32 + [1.0] * 5])
    made = quantize_mx(x, format_named("e2m1"))
    back = dequantize(made, format_named("e2m1"), "e8m0", x.shape[1])
    assert made.scale[0, 0] == 0 and bool(back.isfinite().all())
    assert torch.equal(back[0, :32], torch.zeros(32))
    assert torch.allclose(back[0, 64:], x[0, 64:], rtol=0.3)
    with pytest.raises(InputError, match="finite"):
        quantize_mx(torch.full((1, 32), float("nan")), format_named("e2m1"))

"""Quantized models: what is quantized, what it computes, how large it is, and that it comes back bit for bit."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import zoo
from zoo import InputError
from zoo.errors import CorruptWeightsError, KeysError, WeightsError
from zoo.kernels import lowbit, native
from zoo.kernels.packing import block_size
from zoo.precision import Float32Module
from zoo.quantization import packed
from zoo.quantization.calibration import observe
from zoo.quantization.fp import Granularity, LearningConfig, LowBitLayer, decode, format_named, pack
from zoo.quantization.packed import quantized_layers, set_resident
from zoo.quantization.policy import Policy
from zoo.quantization.report import LayerReport

METHODS = [name for name in zoo.quantization.names() if not name.startswith("binary")]
UNSEARCHED = Granularity(clip="absmax")
with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    """Odd sizes, strides, groups and padding."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 90),
        nn.ReLU(),
        nn.Unflatten(1, (6, 15)),
        nn.Conv1d(6, 10, 7, stride=2, padding=3, dilation=2, padding_mode="reflect"),
        nn.Conv1d(10, 8, 9, padding="same", groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(40, 37),
    )


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm()) <= tolerance * float(b.norm())


# --------------------------------------------------------------------------------------------------------------- kernels


def packed_weight(name: str, rows: int, columns: int, scales: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes and scales, and the weight that they stand for."""
    format = format_named(name)
    generator = torch.Generator().manual_seed(rows * columns)
    codes = torch.randint(format.max_code + 1, (rows, columns), generator=generator, dtype=torch.uint8)
    codes |= torch.randint(2, (rows, columns), generator=generator, dtype=torch.uint8) << (format.bits - 1)
    scale = torch.rand(rows, scales, generator=generator) + 0.5
    block = block_size(columns, scales)
    weight = decode(codes, format) * (scale if scales == 1 else scale.repeat_interleave(block, 1)[:, :columns])
    return pack(codes, format.stored_bits), scale, weight


KERNEL_FORMATS = ["e2m1", "e3m0", "int4", "e2m3", "e3m2", "int6", "e4m3fn", "e5m2", "e5m2f", "e2m5f", "e6m1f", "int8", "e2m2f"]
SHAPES = [(33, 64, 1), (7, 100, 1), (5, 1, 1), (3, 37, 1), (16, 100, 4), (6, 128, 8), (4, 48, 3)]


@pytest.mark.parametrize("name", KERNEL_FORMATS)
def test_products_with_packed_weights(name: str) -> None:
    format = format_named(name)
    for rows, columns, scales in SHAPES:
        codes, scale, weight = packed_weight(name, rows, columns, scales)
        assert torch.equal(lowbit.dequantize(codes, scale, format, columns), weight)
        for batch in (0, 1, 11, 70):
            x = normal(batch, columns)
            expected = x.double() @ weight.double().T
            assert close(lowbit.in_tiles(x, codes, scale, format), expected)
            assert close(lowbit.product(x, codes, scale, format), expected)
            if lowbit.compiled(format, columns, scales):
                assert close(lowbit.in_registers(x, codes, scale, format), expected)
        batched = lowbit.product(normal(2, 3, columns), codes, scale, format)
        assert batched.shape == (2, 3, rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["e2m1", "e4m3fn", "e5m2f", "e6m1f"])
def test_products_in_half_precision(name: str, dtype: torch.dtype) -> None:
    codes, scale, weight = packed_weight(name, 20, 96, 1)
    scale = scale / format_named(name).max
    weight = weight / format_named(name).max
    for batch in (3, 70):
        x = normal(batch, 96).to(dtype)
        y = lowbit.product(x, codes, scale, format_named(name))
        assert y.dtype == dtype and close(y, x.double() @ weight.double().T, 1e-2)


def test_tiles_and_threads_do_not_change_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scale, _ = packed_weight("e2m1", 300, 64, 1)
    x, format = normal(5, 64), format_named("e2m1")
    whole = lowbit.in_tiles(x, codes, scale, format)
    monkeypatch.setattr(lowbit, "_TILE_NUMBERS", 64 * 32)
    assert close(lowbit.in_tiles(x, codes, scale, format), whole, 1e-6)
    if lowbit.compiled(format, 64, 1):
        rows = []
        native.over_rows(lambda first, last: rows.append((first, last)), 300, 1 << 30)
        assert sorted(rows)[0][0] == 0 and sorted(rows)[-1][1] == 300
        assert sum(last - first for first, last in rows) == 300


def test_everything_works_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda source: None)
    format = format_named("e2m1")
    assert not lowbit.compiled(format, 64, 1)
    codes, scale, weight = packed_weight("e2m1", 9, 64, 1)
    x = normal(2, 64)
    assert close(lowbit.product(x, codes, scale, format), x.double() @ weight.double().T)


def test_integer_products_are_exact() -> None:
    for name in ("e2m1", "e3m0", "e2m3", "int4", "int8"):
        format = format_named(name)
        factor = lowbit.integer_factor(format)
        assert factor is not None
        codes, _, _ = packed_weight(name, 20, 96, 1)
        x = torch.randint(-127, 128, (70, 96), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
        values = lowbit.decoded(codes, format, 96) * factor
        assert torch.equal(lowbit.product_of_integers(x, codes, format), (x.long() @ values.long().T).float())
    assert lowbit.integer_factor(format_named("e4m3fn")) is None


INTERPRETED = """
import torch
from test_quantize_models import KERNEL_FORMATS, close, normal, packed_weight
from zoo.kernels import lowbit_triton
from zoo.quantization.fp import format_named

for name in KERNEL_FORMATS:
    for rows, columns, scales, batch in [(33, 70, 1, 3), (5, 1, 1, 1), (6, 128, 8, 18), (16, 100, 4, 2)]:
        codes, scale, weight = packed_weight(name, rows, columns, scales)
        x = normal(batch, columns)
        y = lowbit_triton.product(x, codes, scale, format_named(name))
        assert close(y, x.double() @ weight.double().T), (name, rows, columns, scales)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_gpu_kernel_in_the_interpreter() -> None:
    here = str(Path(__file__).parent)
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": here}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@with_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KERNEL_FORMATS)
def test_a_gpu_gives_the_same(name: str, dtype: torch.dtype) -> None:
    for rows, columns, scales in SHAPES:
        codes, scale, weight = packed_weight(name, rows, columns, scales)
        for batch in (1, 17, 100):
            x = normal(batch, columns).to(dtype)
            y = lowbit.product(x.cuda(), codes.cuda(), scale.cuda(), format_named(name)).cpu()
            assert close(y, x.double() @ weight.double().T, 1e-5 if dtype == torch.float32 else 1e-2)


@with_gpu
@pytest.mark.parametrize("method", ["fp8-e4m3", "fp4-e2m1", "fp6-e3m2"])
def test_fp8_tensor_cores_give_the_reference(method: str) -> None:
    layer = zoo.quantize(nn.Linear(256, 128), method, activations="dynamic").cuda()
    x = normal(64, 256).cuda()
    assert close(layer(x), layer.reference(x))


# ---------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("activations", ["none", "dynamic", "static"])
@pytest.mark.parametrize("method", METHODS)
def test_every_layer_computes_its_reference(method: str, activations: str) -> None:
    settings: dict[str, Any] = {"activations": activations, "rounding": "nearest", "granularity": UNSEARCHED}
    model = zoo.quantize(network(), method, calibrate=[normal(5, 64)] if activations == "static" else None, **settings)
    layers = quantized_layers(model)
    assert set(layers) == {"0", "3", "4", "6"}
    for name, layer in layers.items():
        assert isinstance(layer, LowBitLayer) and isinstance(layer, type(network().get_submodule(name)))
        for batch in (2, 70):
            x = normal(batch, 64) if layer.columns == 64 else normal(batch, 40)
            if layer.convolution is not None:
                x = normal(batch, {42: 6, 45: 10}[layer.columns], 15)
            assert close(layer(x), layer.reference(x))
            assert layer(x).shape == layer.reference(x).shape


def test_more_bits_are_closer() -> None:
    x, expected = normal(20, 64), network()(normal(20, 64)).detach()
    errors = {
        method: float((zoo.quantize(network(), method)(x).detach() - expected).norm() / expected.norm())
        for method in ("fp8-e4m3", "fp6", "fp4", "fp4-e3m0", "int8", "int6", "int4", "mxfp8", "mxfp6", "mxfp4", "nvfp4")
    }
    assert max(errors["fp8-e4m3"], errors["fp6"]) < errors["fp4"] < 0.3
    assert errors["int8"] < errors["int6"] < errors["int4"]
    assert errors["nvfp4"] < errors["mxfp4"] and errors["mxfp8"] < errors["mxfp6"] * 2
    assert errors["fp4"] <= errors["fp4-e3m0"]


def test_weights_are_the_rounded_weights() -> None:
    layer = network()[0]
    packed = zoo.quantize(copy.deepcopy(layer), "fp4-e2m1")
    scale = packed.scale
    assert scale.shape == (90, 1)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    on_grid = (packed.weight.abs() / scale)[..., None] - table
    assert float(on_grid.abs().amin(-1).max()) < 1e-5
    assert close(packed.weight, layer.weight, 0.2)
    assert torch.equal(packed.bias, layer.bias)
    # Code that multiplies with the weight itself gets what the layer gives.
    x = normal(3, 64)
    assert close(nn.functional.linear(x, packed.weight, packed.bias), packed(x))
    x.requires_grad_()
    packed(x).sum().backward()
    assert torch.allclose(x.grad, packed.weight.sum(0).expand(3, -1), atol=1e-5)


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [(Granularity(per_channel=False), (1, 1)), (Granularity(), (90, 1)), (Granularity(group=16), (90, 4))],
    ids=["tensor", "channel", "group"],
)
@pytest.mark.parametrize("clip", ["search", "absmax"])
def test_what_shares_a_scale(granularity: Granularity, shape: tuple[int, int], clip: str) -> None:
    granularity = Granularity(granularity.per_channel, granularity.group, clip)
    layer = zoo.quantize(network()[0], "fp4-e2m1", granularity=granularity)
    assert layer.scale.shape == shape
    assert close(layer(normal(3, 64)), layer.reference(normal(3, 64)))
    assert close(layer.weight, network()[0].weight, 0.25)


def test_searching_the_range_beats_the_largest_weight() -> None:
    weight = network()[0].weight
    layers = [zoo.quantize(network()[0], "int4", granularity=Granularity(clip=clip)) for clip in ("search", "absmax")]
    searched, unsearched = (float((layer.weight - weight).norm()) for layer in layers)
    assert searched < unsearched


def test_precision_follows_the_model_and_scales_do_not() -> None:
    model = zoo.quantize(network(), "fp4-e2m1")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(torch.bfloat16)
    assert model(normal(2, 64).bfloat16()).dtype == torch.bfloat16
    assert model[0].weight.dtype == model[0].bias.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        if not name.endswith("bias"):
            assert torch.equal(tensor, before[name])
    assert close(model(normal(2, 64).bfloat16()), model.float()(normal(2, 64)), 0.05)


def test_copies_and_pickles() -> None:
    model = zoo.quantize(network(), "mxfp4")
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(normal(2, 64)), model(normal(2, 64)))


# ---------------------------------------------------------------------------------------------------------------- policy


class Own(nn.Linear):
    plain_product = True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Other(Own):
    """What its base promised of its own ``forward`` is not said of this one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Inherits(Own):
    """Computes what its base does."""


class Exact(Float32Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)


def mixed() -> nn.Module:
    return nn.ModuleDict(
        {
            "encoder": Exact(),
            "stem": nn.Conv2d(8, 8, 3),
            "time_embed": nn.Sequential(nn.Linear(64, 64)),
            "own": Own(64, 64),
            "other": Other(64, 64),
            "inherits": Inherits(64, 64),
            "depthwise": nn.Conv1d(8, 8, 3, groups=8),
            "middle": nn.Conv2d(8, 8, 3),
            "table": nn.Embedding(5, 64),
            "last": nn.Conv2d(8, 3, 3),
        }
    )


def test_the_plan_says_what_happens_and_why() -> None:
    plan = {choice.name: choice for choice in zoo.quantization.plan(mixed(), "fp4-e2m1")}
    methods = {name: choice.method.name if choice.method else None for name, choice in plan.items()}
    assert methods == {
        "encoder.inner": None,
        "stem": "fp8-e4m3",
        "time_embed.0": "fp8-e4m3",
        "own": "fp4-e2m1",
        "other": None,
        "inherits": "fp4-e2m1",
        "depthwise": None,
        "middle": "fp4-e2m1",
        "last": "fp8-e4m3",
    }
    assert all(choice.reason for choice in plan.values() if choice.method is None or choice.method.name != "fp4-e2m1")
    assert str(plan["stem"]) == "stem: fp8-e4m3 (first convolution)"
    eight = {choice.name: choice.method.name for choice in zoo.quantization.plan(mixed(), "fp8-e4m3") if choice.method}
    assert set(eight.values()) == {"fp8-e4m3"}
    ends = zoo.quantization.plan(mixed(), "int4", Policy(skip=("own", "time*"), protect_ends=False, keep_exact=False))
    assert {choice.name for choice in ends if choice.method} == {"encoder.inner", "stem", "inherits", "middle", "last"}
    assert {choice.method.name for choice in ends if choice.method} == {"int4"}


def test_what_is_kept_is_not_touched() -> None:
    model = mixed()
    kept = {name: model.get_submodule(name) for name in ("encoder.inner", "other", "depthwise", "table")}
    zoo.quantize(model, "int8")
    assert all(model.get_submodule(name) is module for name, module in kept.items())
    assert isinstance(model.own, LowBitLayer)


def test_bad_calls() -> None:
    with pytest.raises(InputError, match=r"no quantization method 'fp5'.*fp8-e4m3.*binary-xnor"):
        zoo.quantize(network(), "fp5")
    with pytest.raises(InputError, match="already quantized: 0 is int8"):
        zoo.quantize(zoo.quantize(network(), "int8"), "int4")
    with pytest.raises(InputError, match="no layer is called 'nope"):
        zoo.quantize(network(), "int8", skip=["nope*"])
    with pytest.raises(InputError, match="no layer to quantize"):
        zoo.quantize(nn.Sequential(nn.ReLU()), "int8")
    with pytest.raises(InputError, match="no layer to quantize"):
        zoo.quantize(network(), "int8", skip="*")
    for options in ({"activations": "static"}, {"rounding": "learned"}):
        with pytest.raises(InputError, match="needs inputs to calibrate with"):
            zoo.quantize(network(), "fp4", **options)
    with pytest.raises(InputError, match="activations must be"):
        zoo.quantize(network(), "fp4", activations="8")
    with pytest.raises(InputError, match="rounding must be"):
        zoo.quantize(network(), "fp4", rounding="up")
    with pytest.raises(InputError, match="power of two"):
        Granularity(group=24)


@pytest.mark.parametrize("empty", [[], iter(())], ids=["list", "iterator"])
def test_empty_calibration(empty: Any) -> None:
    with pytest.raises(InputError, match="calibrate is empty"):
        zoo.quantize(network(), "fp4", calibrate=empty)


@pytest.mark.parametrize("method", ["fp4-e2m1", "mxfp4", "nvfp4", "int8"])
def test_bad_weights_change_nothing(method: str) -> None:
    model = network()
    with torch.no_grad():
        model[6].weight[3, 5] = float("inf")
    with pytest.raises(InputError, match=r"6: .*finite"):
        zoo.quantize(model, method)
    assert not quantized_layers(model)


def test_bad_calibration_inputs_change_nothing() -> None:
    model = network()
    with pytest.raises(InputError, match="0 met a number that is not finite"):
        zoo.quantize(model, "int8", calibrate=[torch.full((1, 64), float("nan"))])
    assert not quantized_layers(model)
    assert not model[0]._forward_pre_hooks


def test_any_split_of_up_to_eight_bits() -> None:
    layer = zoo.quantize(network()[0], "fp5-e2m2")
    assert layer.format.name == "e2m2f" and layer.codes.shape[1] == 48
    assert close(layer(normal(2, 64)), layer.reference(normal(2, 64)))


# ----------------------------------------------------------------------------------------------------------- calibration


class Functional(nn.Module):
    """Multiplies with weights itself, as some codecs do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 96)
        self.conv = nn.Conv1d(64, 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, rest = self.qkv.weight.split([32, 64])
        y = torch.cat([nn.functional.linear(x, query), nn.functional.linear(x, rest)], -1)
        kernel = self.conv.weight.unsqueeze(2).contiguous()
        return y.sum() + nn.functional.conv2d(x.T[None, :, None], kernel, padding=(0, 1)).sum()


def test_weights_are_followed_to_where_they_are_used() -> None:
    model, x = Functional(), normal(10, 64)
    seen = observe(model, dict(model.named_children()), [x], products=True)
    assert not seen["qkv"].called and not seen["conv"].called
    assert torch.allclose(seen["qkv"].gram, x.T @ x / 10, atol=1e-5)
    windows = nn.functional.pad(x.T, (1, 1)).unfold(1, 3, 1).permute(1, 0, 2).flatten(1)
    assert torch.allclose(seen["conv"].gram, windows.T @ windows / 10, atol=1e-5)
    assert seen["conv"].largest == float(x.abs().max())


@pytest.mark.parametrize(
    "settings", [{"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2}, {"padding_mode": "circular", "padding": 2}]
)
@pytest.mark.parametrize("dimensions", [1, 2])
def test_products_of_windows_predict_outputs(dimensions: int, settings: dict[str, Any]) -> None:
    layer = [nn.Conv1d, nn.Conv2d][dimensions - 1](3, 4, (3, 5)[:dimensions], bias=False, **settings)
    x = normal(2, 3, *(9, 11)[:dimensions])
    seen = observe(nn.Sequential(layer), {"0": layer}, [x], products=True)["0"]
    weight = layer.weight.detach().flatten(1)
    expected = layer(x).detach().square().sum(1).mean()
    assert seen.called
    assert torch.allclose(((weight @ seen.gram) * weight).sum(), expected, rtol=1e-4)


@pytest.mark.parametrize("method", ["fp4-e2m1", "int4"])
def test_learned_rounding_lowers_the_error_of_the_output(method: str) -> None:
    mixing = normal(24, 64, seed=3)
    batches = [normal(300, 24, seed=seed) @ mixing for seed in range(3)]
    held_out = normal(300, 24, seed=9) @ mixing
    expected = network()[:1](held_out)
    errors = []
    reports: list[LayerReport] = []
    for rounding in ("nearest", "learned"):
        model = network()[:1]
        settings = {"rounding": rounding, "activations": "none", "learning": LearningConfig(iterations=150)}
        zoo.quantize(model, method, calibrate=batches, on_layer=reports.append, **settings)
        errors.append(float((model(held_out) - expected).norm()))
    assert errors[1] < 0.8 * errors[0]
    assert reports[0].output_error is None
    assert reports[1].output_error is not None and reports[1].output_error[1] < reports[1].output_error[0]


def test_calibrated_inputs() -> None:
    reports: list[LayerReport] = []

    def batches() -> Iterator[Tensor]:
        yield from (normal(50, 64, seed=seed) for seed in range(2))

    learning = LearningConfig(iterations=2)
    model = zoo.quantize(network(), "fp4", calibrate=batches(), on_layer=reports.append, learning=learning)
    assert all(layer.activations is not None and layer.input_scale is not None for layer in quantized_layers(model).values())
    assert [report.name for report in reports] == ["0", "3", "4", "6"]
    assert [10 < (report.weight_sqnr or 0) < 60 for report in reports] == [True] * 4, reports
    assert [0 <= (1 if report.zeros is None else report.zeros) < 0.5 for report in reports] == [True] * 4, reports
    again = zoo.quantize(network(), "fp4", calibrate=batches(), learning=learning)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_the_callers_precision_changes_nothing() -> None:
    """Products in bfloat16, which some processors would then use for float32, would round other weights up."""
    before = torch.get_float32_matmul_precision()
    settings = {"calibrate": [normal(200, 64)], "learning": LearningConfig(iterations=5)}
    expected = zoo.quantize(network(), "fp4", **settings).state_dict()
    try:
        torch.set_float32_matmul_precision("medium")
        found = zoo.quantize(network(), "fp4", **settings).state_dict()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3e-38, 1e-45, 3e38], ids=str)
def test_weights_of_one_value(method: str, value: float) -> None:
    layer = nn.Linear(64, 3, bias=False)
    nn.init.constant_(layer.weight, value)
    packed = zoo.quantize(layer, method)
    assert bool(packed.weight.isfinite().all())
    if abs(value) in (0.0, 1.0):
        assert torch.allclose(packed.weight, torch.full((3, 64), value), rtol=0.05)


# --------------------------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("method", [*METHODS, "fp5-e2m2"])
@pytest.mark.parametrize("activations", ["none", "static"])
def test_saved_models_come_back_bit_for_bit(tmp_path: Path, method: str, activations: str) -> None:
    calibrate = [normal(5, 64)] if activations == "static" else None
    model = zoo.quantize(network(), method, calibrate=calibrate, rounding="nearest", granularity=UNSEARCHED)
    zoo.quantization.save(model, tmp_path / "model.safetensors")
    again = zoo.quantization.load(network(), tmp_path / "model.safetensors")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(again(normal(3, 64)), model(normal(3, 64)))


@pytest.mark.parametrize(("method", "bits"), [("fp8-e4m3", 8), ("fp6-e3m2", 6), ("fp4-e2m1", 4), ("int4", 4)])
def test_size_of_the_file(tmp_path: Path, method: str, bits: int) -> None:
    model = nn.Sequential(nn.Linear(512, 384), nn.Linear(384, 512))
    plain = 4 * sum(parameter.numel() for parameter in model.parameters())
    zoo.quantization.save(zoo.quantize(model, method, granularity=UNSEARCHED), tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size <= (bits / 32 + 0.035) * plain
    weights = 2 * 512 * 384
    packed = sum(layer.codes.numel() + 4 * layer.scale.numel() for layer in model)
    assert packed <= weights * (bits / 8 + 0.0105)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    zoo.quantization.save(zoo.quantize(network(), "int4"), path)
    with pytest.raises(CorruptWeightsError, match="0: the saved quantization does not fit"):
        zoo.quantization.load(nn.Sequential(nn.ReLU()), path)
    with pytest.raises(KeysError, match="does not fit"):
        zoo.quantization.load(nn.Sequential(*network()[:6], nn.Linear(40, 38)), path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(WeightsError):
        zoo.quantization.load(network(), path)


@pytest.fixture(scope="module")
def quantized_tokenizer() -> Any:
    return zoo.load("wavtokenizer-tiny", quantize="fp4-e2m1")


def test_a_tokenizer_keeps_its_ids_and_its_identity(quantized_tokenizer: Any) -> None:
    original = zoo.load("wavtokenizer-tiny")
    audio = 0.1 * normal(12_000)
    tokens = quantized_tokenizer.encode(audio)
    assert tokens.equal(original.encode(audio))
    assert quantized_tokenizer.fingerprint == original.fingerprint
    assert close(quantized_tokenizer.decode(tokens)[0], original.decode(tokens)[0], 0.3)


def test_a_saved_tokenizer_comes_back_bit_for_bit(quantized_tokenizer: Any, tmp_path: Path) -> None:
    quantized_tokenizer.save_pretrained(tmp_path)
    again = zoo.load(f"local-dir:{tmp_path}")
    saved, loaded = quantized_tokenizer.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    ids = torch.arange(30)[None]
    assert torch.equal(again.decode(ids)[0], quantized_tokenizer.decode(ids)[0])
    in_bf16 = zoo.load(f"local-dir:{tmp_path}", precision="bf16")
    assert in_bf16.backbone.convnext[0].pwconv1.scale.dtype == torch.float32
    assert close(in_bf16.decode(ids)[0], again.decode(ids)[0], 0.05)
    with pytest.raises(InputError, match="already quantized"):
        zoo.load(f"local-dir:{tmp_path}", quantize="int8")


COMPILED = """
import torch, zoo
from test_quantize_models import close, network, normal

model = zoo.quantize(network(), "fp4-e2m1", activations="dynamic")
compiled = torch.compile(model)
with torch.inference_mode():
    assert close(compiled(normal(3, 64)), model(normal(3, 64)))
"""


@pytest.mark.slow
def test_compiled_models_give_the_same() -> None:
    """In a process of its own: the compiler cannot see through the test suite's type checks."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_is_one_operator_to_the_compiler() -> None:
    codes, scale, _ = packed_weight("e2m1", 9, 64, 1)
    torch.library.opcheck(torch.ops.zoo.lowbit_product.default, (normal(2, 3, 64), codes, scale, "e2m1"))


@pytest.mark.parametrize(
    "statement", ["import zoo; zoo.quantization", "import zoo.quantization; list(zoo.quantization.names())"]
)
def test_torch_is_imported_when_it_is_needed(statement: str) -> None:
    code = f"import sys; {statement}; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("key", ["quantization", "tied"])
@pytest.mark.parametrize(
    "damaged",
    ["", "{", "[]", "null", "3", '{"0": null}', '{"0": 3}', '{"0": {}}', '{"0": {"kind": []}}', '{"9": {"kind": "block"}}'],
)
def test_damage_of_what_a_file_says_about_its_layers_is_named(key: str, damaged: str, tmp_path: Path) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 32))

    path = packed.save(zoo.quantize(model(), "fp4"), tmp_path / "model.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata=metadata | {key: damaged})
    with pytest.raises(CorruptWeightsError, match=r"model\.safetensors: "):
        packed.load(model(), path)


@pytest.mark.parametrize("method", ["int8", "fp8-e4m3", "fp4-e2m1", "mxfp4"])
def test_resident_weights_change_the_order_of_sums_alone(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [nn.Linear(48, 32), nn.Unflatten(1, (4, 8)), nn.Conv1d(4, 6, 3, padding=1), nn.Flatten()]
    model = zoo.quantize(nn.Sequential(*layers).requires_grad_(False), method, activations="dynamic", resident=True)
    x = torch.randn(50, 48, generator=generator)
    resident = model(x)
    assert all(layer.weight is layer.weight for layer in quantized_layers(model).values())
    packed = set_resident(model, False)(x)
    assert not any(layer.weight is layer.weight for layer in quantized_layers(model).values())
    torch.testing.assert_close(resident, packed, rtol=0, atol=1e-5 * float(packed.abs().max()))
    set_resident(model, True)
    assert copy.deepcopy(model)(x).equal(resident)
    # Neither new codes nor another precision get an old weight.
    first = next(iter(quantized_layers(model).values()))
    first.codes.zero_()
    assert not model(x).equal(resident)
    assert first.weight.dtype == torch.float32 and model.to(torch.bfloat16)[0].weight.dtype == torch.bfloat16


def test_resident_weights_are_kept_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = zoo.quantize(nn.Linear(64, 32), "int8")
    for free, kept in ((4 * 64 * 32 * 4, True), (4 * 64 * 32 * 4 - 1, False)):
        monkeypatch.setattr("zoo.quantization.packed._free_memory", lambda device, free=free: free)
        assert set_resident(layer).resident is kept
    assert set_resident(layer.to(torch.bfloat16)).resident
    assert not zoo.quantize(nn.Linear(64, 8), "int8").resident
    with torch.inference_mode():
        made = zoo.quantize(nn.Linear(64, 8), "int8", resident=True)
    assert not any(buffer.is_inference() for buffer in made.buffers())
    with pytest.raises(InputError, match="resident must be 'auto', True or False, not 'always'"):
        zoo.quantize(nn.Linear(64, 8), "int8", resident="always")

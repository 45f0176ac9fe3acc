"""Packed binary layers give the trained layer's results, in a thirty-second of the space."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo import InputError
from zoo.kernels.packing import row_bytes
from zoo.quantization import binary, packed
from zoo.quantization.binary import OPERATORS, BinaryConv1d, BinaryConv2d, BinaryLinear, PackedBinary, binarize
from zoo.quantization.methods import method_named


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(layer: nn.Module) -> nn.Module:
    """The layer with parameters as training may leave them, at the end of its schedule."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    binary.update(layer, 9, 10)
    return layer.eval()


def pack(layer: nn.Module) -> PackedBinary:
    return PackedBinary.from_float(layer, method_named(f"binary-{layer.method}"))


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("method", OPERATORS)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_equals_the_trained_layer(kind: str, method: str, official: bool) -> None:
    sizes = {"stride": 2, "padding": 1}
    groups = {} if official else {"groups": 2, "dilation": 2}
    layer, x = {
        "linear": lambda: (BinaryLinear(100, 24, method=method, official=official), normal(2, 5, 100)),
        "conv1d": lambda: (BinaryConv1d(20, 6, 3, **sizes, **groups, method=method, official=official), normal(2, 20, 17)),
        "conv2d": lambda: (BinaryConv2d(16, 6, 3, **sizes, **groups, method=method, official=official), normal(2, 16, 9, 8)),
    }[kind]()
    trained(layer)
    if kind == "linear" and official and method == "xnor":
        x = x[0]
    with torch.no_grad():
        expected = layer(x)
    found = pack(layer)(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous()


@pytest.mark.parametrize("settings", [{"padding": "same"}, {"padding": 2, "padding_mode": "reflect"}, {"bias": False}])
def test_paddings(settings: dict[str, object]) -> None:
    layer = trained(BinaryConv2d(8, 4, 4, **settings, method="react"))
    x = normal(2, 8, 7, 6)
    torch.testing.assert_close(pack(layer)(x), layer(x).detach())
    torch.testing.assert_close(pack(layer)(x[0]), layer(x[0]).detach())


def test_integers_before_the_scale() -> None:
    layer = trained(BinaryLinear(1000, 16, bias=False, method="bnn"))
    x = normal(64, 1000)
    assert torch.equal(pack(layer)(x), layer(x).detach())


def test_a_layer_of_full_precision_packs_as_training_would_start() -> None:
    for method in OPERATORS:
        layer = nn.Conv2d(16, 8, 3, padding=1)
        start = binarize(copy.deepcopy(layer), method, skip=())
        binary.update(start, 0, 1)
        x = normal(2, 16, 6, 6)
        found = PackedBinary.from_float(layer, method_named(f"binary-{method}"))(x)
        torch.testing.assert_close(found, start.eval()(x).detach())


def test_weights_of_a_packed_layer() -> None:
    layer = trained(BinaryConv2d(6, 4, (3, 2), method="xnor"))
    found = pack(layer).dequantized()
    torch.testing.assert_close(found, layer.weight.sign() * layer.weight.abs().mean((1, 2, 3), keepdim=True))


def test_size() -> None:
    layer = pack(BinaryLinear(1000, 512, bias=False, method="xnor"))
    stored = sum(tensor.numel() * tensor.element_size() for tensor in layer.state_dict().values())
    assert stored <= 512 * (row_bytes(1000) + 8)


def test_file_and_reload(tmp_path: Path) -> None:
    """A one-bit checkpoint is at most 0.04 of the float32 file, scales included."""

    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(1024, 1024), nn.Hardtanh(), nn.Linear(1024, 1024), nn.Conv1d(8, 8, 5))

    for method in OPERATORS:
        model = network()
        for index in (0, 2):
            model[index] = PackedBinary.from_float(model[index], method_named(f"binary-{method}"))
        path = packed.save(model, tmp_path / "one-bit.safetensors")
        float_bytes = sum(4 * parameter.numel() for parameter in network().parameters())
        assert path.stat().st_size <= 0.04 * float_bytes
        loaded = packed.load(network(), path)
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)
        x = normal(3, 1024)
        assert torch.equal(loaded[:3](x), model[:3](x))


def test_one_call_packs_a_model_and_a_file_brings_it_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(256, 256), nn.Hardtanh(), nn.Linear(256, 256))
    model = zoo.quantize(copy.deepcopy(network), "binary-react")
    assert [type(layer) for layer in model] == [PackedBinary, nn.Hardtanh, PackedBinary]
    loaded = zoo.quantization.load(network, zoo.quantization.save(model, tmp_path / "model.safetensors"))
    x = normal(3, 256)
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(InputError, match="already quantized"):
        zoo.quantize(model, "binary-react")


def test_a_trained_model_packs_as_a_whole() -> None:
    model = binarize(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 4)), "fda")
    with pytest.raises(InputError, match="1: FDA"):
        binary.pack(model)
    binary.update(model, 4, 5)
    x = normal(3, 64)
    with torch.no_grad():
        expected = model(x)
    assert binary.pack(model) is model and isinstance(model[1], PackedBinary) and type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), expected)


def test_gains_of_positions_survive(tmp_path: Path) -> None:
    layer = trained(BinaryConv1d(4, 4, 3, method="xnor++"))
    packed.save(nn.Sequential(pack(layer)), tmp_path / "gains.safetensors")
    loaded = packed.load(nn.Sequential(nn.Conv1d(4, 4, 3)), tmp_path / "gains.safetensors")
    x = normal(1, 4, 2100)
    torch.testing.assert_close(loaded(x), layer(x).detach())


def test_dtype_copies_and_pickles() -> None:
    layer = pack(trained(BinaryLinear(64, 8, method="react")))
    x = normal(5, 64)
    expected = layer(x)
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same(x), expected)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.scale.dtype == torch.float32 and half(x).dtype == torch.bfloat16
    torch.testing.assert_close(half(x).float(), expected, rtol=2e-2, atol=2e-2)


def test_bad_layers_are_refused() -> None:
    with pytest.raises(InputError, match="until the last epoch"):
        pack(BinaryLinear(64, 8, method="fda"))
    with pytest.raises(InputError, match="trained by xnor"):
        PackedBinary.from_float(BinaryLinear(64, 8, method="xnor"), method_named("binary-bnn"))
    broken = BinaryLinear(64, 8, method="xnor")
    with torch.no_grad():
        broken.weight[0, 0] = float("inf")
    with pytest.raises(InputError, match="not finite"):
        pack(broken)
    layer = pack(BinaryLinear(64, 8, method="xnor"))
    with pytest.raises(InputError, match="63 channels"):
        layer(normal(2, 63))

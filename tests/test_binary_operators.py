"""Binary layers: BiBench's numbers in official mode, the layer's own settings honoured otherwise, and training that works."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from zoo import InputError
from zoo.quantization import binary
from zoo.quantization.binary import OPERATORS, BinaryConv1d, BinaryConv2d, BinaryLinear, binarize
from zoo.quantization.binary_operators import fourier_slope

CASES = json.loads((Path(__file__).parent / "golden/quantize/binary-a/config.json").read_text())["cases"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def official_layer(name: str, case: dict[str, Any]) -> nn.Module:
    method, kind = name.split("/")
    if kind.startswith("Linear"):
        return BinaryLinear(case["x"][-1], case["out"], case["bias"], method=method, official=True)
    cls = {"Conv1d": BinaryConv1d, "Conv2d": BinaryConv2d}[kind]
    sizes = (case["x"][1], case["out"], case["k"], case["stride"], case["pad"])
    return cls(*sizes, bias=case["bias"], method=method, official=True)


def part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}


# --------------------------------------------------------------------------------------------------------------- BiBench


@pytest.mark.parametrize("name", CASES)
def test_official_numbers_and_gradients(golden: Path, name: str) -> None:
    case = CASES[name]
    io = part(load_file(golden / "quantize/binary-a/io.safetensors"), name)
    layer = official_layer(name, case).train(case["training"])
    layer.load_state_dict(part(load_file(golden / "quantize/binary-a/weights.safetensors"), name))
    x = io["x"].requires_grad_()
    gradient = io["grad_out"].clone()
    y = layer(x)
    y.backward(gradient, retain_graph=True)
    torch.testing.assert_close(y, io["y"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad, io["grad_x"], rtol=1e-5, atol=1e-4)
    without = set()
    for parameter, value in layer.named_parameters():
        if value.grad is None:
            without.add(parameter)
            continue
        expected = io[f"grad/{parameter}"]
        # Of the long tables of gains only the used part was recorded; the rest has no influence.
        used = value.grad[tuple(slice(size) for size in expected.shape)]
        torch.testing.assert_close(used, expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(value.grad.sum(), used.sum())
    assert without == set(case["params_without_grad"])

    assert torch.equal(gradient, io["grad_out"])
    first = x.grad.clone()
    x.grad = None
    y.backward(gradient)
    assert torch.equal(x.grad, first)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["buffers"]])
def test_schedules_reach_the_recorded_buffers(golden: Path, name: str) -> None:
    case = CASES[name]
    layer = official_layer(name, case)
    max_epochs, epoch = case["epoch"]
    layer.update(epoch, max_epochs)
    for buffer, expected in case["buffers"].items():
        assert float(layer.get_buffer(buffer)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("epochs", [10, 100, 400])
def test_schedules(epochs: int) -> None:
    recu, fda = BinaryLinear(4, 4, method="recu"), BinaryLinear(4, 4, method="fda")
    model = nn.Sequential(recu, fda)
    for epoch in range(epochs):
        binary.update(model, epoch, epochs)
        growth = math.expm1(epoch / epochs) / math.expm1(1)
        assert float(recu.tau) == pytest.approx(0.85 + 0.14 * growth, abs=1e-6)
        assert float(fda.alpha) == pytest.approx(0.1 * math.cos(math.pi * (epoch + 1) / (2 * epochs)) ** 2, abs=1e-6)
        assert int(fda.n) == 9 + 9 * epoch // epochs
    assert float(fda.alpha) == 0
    for epoch in (-1, epochs):
        with pytest.raises(InputError, match=f"epoch {epoch}"):
            binary.update(model, epoch, epochs)


@pytest.mark.parametrize("n", [0, 9, 17])
def test_the_fourier_series_in_closed_form(n: int) -> None:
    v = torch.cat([torch.linspace(-1, 1, 101), torch.tensor([0.0, 1e-8, -1e-5])])
    terms = [torch.cos((2 * i + 1) * 0.1 * v.double()) for i in range(n + 1)]
    torch.testing.assert_close(fourier_slope(v, n).double(), 0.4 / math.pi * sum(terms), rtol=1e-6, atol=1e-6)


def test_checkpoints_from_before_the_first_forward_pass_load() -> None:
    layer = BinaryConv2d(64, 8, 3, method="fda", official=True)
    late = layer.state_dict()
    early = {key: tensor for key, tensor in late.items() if not key.startswith("act_noise")}
    layer.load_state_dict(early)
    nn.Sequential(layer).load_state_dict({f"0.{key}": tensor for key, tensor in early.items()})
    with pytest.raises(RuntimeError, match="weight_noise"):
        layer.load_state_dict({key: tensor for key, tensor in early.items() if not key.startswith("weight_noise")})

    fresh = BinaryLinear(8, 4, method="recu", official=True)
    updated = copy.deepcopy(fresh)
    updated.update(3, 10)
    assert fresh.tau.shape == () and updated.tau.shape == (1,)
    fresh.load_state_dict(updated.state_dict())
    assert torch.equal(fresh.tau, updated.tau)


def test_official_layers_ignore_what_bibench_ignores() -> None:
    conv = BinaryConv2d(8, 4, 3, groups=2, dilation=0, bias=True, method="react", official=True)
    assert conv.bias is None and conv.weight.shape == (4, 8, 3, 3) and conv(normal(1, 8, 5, 5)).shape == (1, 4, 3, 3)
    assert conv.weight.min() >= 0 and conv.weight.max() < 1e-3
    assert BinaryLinear(4, 2, bias=False, method="bnn", official=True).bias is not None
    grouped = BinaryConv2d(8, 4, 3, groups=2, method="recu", official=True)
    assert grouped.bias is not None and grouped.weight.shape == (4, 4, 3, 3)
    with pytest.raises(InputError, match="2001 positions"):
        BinaryConv1d(1, 1, 1, method="xnor++", official=True)(torch.ones(1, 1, 2001))
    small = BinaryLinear(63, 4, method="fda", official=True)
    assert small.act_noise.fc1.weight.shape == (0, 63)
    noisy = small.act_noise(torch.ones(2, 63), small.n, small.alpha)
    torch.testing.assert_close(noisy, torch.full((2, 63), 1 + 0.1 * 0.1 * math.sin(1)))


# --------------------------------------------------------------------------------------------------------- corrected mode


@pytest.mark.parametrize("method", OPERATORS)
def test_a_convolution_honours_its_settings(method: str) -> None:
    torch.manual_seed(0)
    settings = {"stride": 2, "padding": (2, 1), "dilation": (2, 1), "groups": 2}
    layer = BinaryConv2d(8, 6, 3, **settings, method=method)
    binary.update(layer, 0, 1)  # without FDA's noise
    layer.eval()
    x = normal(2, 8, 9, 10)
    signs = x.sign()
    centred = layer.weight - layer.weight.mean((1, 2, 3), keepdim=True)
    weight = (centred if method == "recu" else layer.weight).sign()
    scale = {"bnn": 1.0, "xnor++": 1.0, "recu": layer.alpha if method == "recu" else 1.0}.get(
        method, layer.weight.abs().mean((1, 2, 3))[:, None, None]
    )
    expected = F.conv2d(signs, weight, None, **settings) * scale
    if method == "xnor":
        expected = expected * x.abs().mean((1, 2, 3), keepdim=True)
    bias = layer.bias[:, None, None]
    expected = expected + (bias * layer.alpha if method == "recu" else bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x[0]), expected[0])


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_padding_modes(mode: str) -> None:
    layer = BinaryConv1d(4, 3, 5, padding=2, padding_mode=mode, method="bnn")
    x = normal(2, 4, 9)
    expected = F.conv1d(F.pad(x, (2, 2), mode=mode).sign(), layer.weight.sign(), layer.bias)
    torch.testing.assert_close(layer(x), expected)


def test_the_threshold_of_a_linear_layer_counts() -> None:
    layer = BinaryLinear(6, 3, method="react")
    x = normal(5, 6)
    nn.init.constant_(layer.channel_threshold, 0.7)
    expected = (x + 0.7).sign() @ layer.weight.sign().T * layer.weight.abs().mean(1) + layer.bias
    torch.testing.assert_close(layer(x), expected)
    official = BinaryLinear(6, 3, method="react", official=True)
    official.load_state_dict(layer.state_dict())
    torch.testing.assert_close(official(x), x.sign() @ layer.weight.sign().T * layer.weight.abs().mean(1))


def test_xnor_scales_every_row_by_itself() -> None:
    layer = BinaryLinear(6, 3, method="xnor")
    x = normal(4, 5, 6)
    for batch in range(4):
        torch.testing.assert_close(layer(x)[batch], layer(x[batch]))
    torch.testing.assert_close(layer(3 * x) - layer.bias, 3 * (layer(x) - layer.bias))


@pytest.mark.parametrize("method", OPERATORS)
def test_a_single_row_gets_what_it_gets_in_a_batch(method: str) -> None:
    layer = BinaryLinear(70, 3, method=method)
    x = normal(2, 4, 70)
    torch.testing.assert_close(layer(x)[1, 2], layer(x[1, 2]))


def test_gains_beyond_their_table_are_one() -> None:
    layer = BinaryConv1d(2, 3, 1, method="xnor++")
    nn.init.constant_(layer.l_scale, 2.0)
    x = normal(1, 2, 2003)
    plain = F.conv1d(x.sign(), layer.weight.sign())
    expected = torch.cat([2 * plain[..., :2000], plain[..., 2000:]], dim=-1) + layer.bias[:, None]
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("method", OPERATORS)
def test_training_learns_what_signs_can_do(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.Hardtanh(), nn.Linear(32, 2))
    binarize(model, method)
    assert [type(layer).__name__ for layer in model].count("BinaryLinear") == 1
    x = normal(256, 8)
    labels = (x[:, 0] * x[:, 1] > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    epochs = 100
    for epoch in range(epochs):
        binary.update(model, epoch, epochs)
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # A linear classifier finds nothing in a product of signs.
    assert float((model(x).argmax(1) == labels).float().mean()) > 0.85


# --------------------------------------------------------------------------------------------------------------- binarize


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Conv2d(8, 16, 1, stride=2),
        nn.Flatten(),
        nn.Linear(64, 4),
    )


def test_binarize_keeps_what_it_is_told_to() -> None:
    def binaries(model: nn.Module) -> list[str]:
        return [name for name, layer in model.named_modules() if isinstance(layer, binary.BinaryLayer)]

    assert binaries(binarize(network(), "xnor")) == ["1"]
    assert binaries(binarize(network(), "xnor", skip=())) == ["0", "1", "2", "4"]
    assert binaries(binarize(network(), "xnor", skip=["[02]"])) == ["1", "4"]
    attention = nn.TransformerEncoderLayer(16, 2, batch_first=True)
    binarize(attention, "bireal", skip=())
    assert binaries(attention) == ["linear1", "linear2"]  # attention reads the weights of its projection
    attention(normal(2, 5, 16))
    assert isinstance(binarize(nn.Linear(4, 4), "bnn", skip=()), BinaryLinear)


def test_binarize_copies_weights_device_dtype_and_mode() -> None:
    model = network().double().eval()
    before = copy.deepcopy(model[1])
    binarize(model, "recu")
    layer = model[1]
    assert isinstance(layer, BinaryConv2d) and not layer.training and layer.groups == 2
    assert torch.equal(layer.weight, before.weight) and torch.equal(layer.bias, before.bias)
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {torch.float64}
    centred = before.weight - before.weight.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(layer.alpha.flatten(), centred.abs().mean((1, 2, 3)))


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="known: bnn, xnor"):
        binarize(network(), "ternary")
    with pytest.raises(InputError, match="no layer is called 'head'"):
        binarize(network(), "xnor", skip=["head"])
    with pytest.raises(InputError, match="nothing is left"):
        binarize(network(), "xnor", skip=["*"])
    broken = network()
    with torch.no_grad():
        broken[1].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="1: a weight is not finite"):
        binarize(broken, "xnor")
    with pytest.raises(InputError, match="neither groups"):
        binarize(network(), "xnor", official=True)
    with pytest.raises(InputError, match="axes"):
        BinaryConv2d(3, 3, 3, method="bnn")(torch.zeros(3, 3))

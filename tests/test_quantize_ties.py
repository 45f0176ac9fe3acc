"""Quantized models whose layers share weights or stand in several places, and packed layers in every use."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo import InputError
from zoo.quantization.binary import BinaryLinear, binarize
from zoo.quantization.packed import QuantizedLayer, load, quantized_layers, save
from zoo.quantization.policy import plan
from zoo.quantization.report import LayerReport

METHODS = list(zoo.quantization.names())
FLOAT = [name for name in METHODS if not name.startswith("binary")]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def language_model(tied: bool = True) -> Any:
    """A small model whose head and embeddings are one tensor, most of what it holds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def held(model: nn.Module) -> int:
    """Bytes of all tensors, each counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


# ------------------------------------------------------------------------------------------------------------- tied weights


@pytest.mark.parametrize("method", ["int8", "fp4-e2m1", "nvfp4", "binary-xnor"])
def test_a_tied_head_stays_and_says_why(method: str) -> None:
    model, ids = language_model(), torch.arange(12)[None]
    before, reports = held(model), list[LayerReport]()
    zoo.quantize(model, method, on_layer=reports.append)
    assert held(model) < before
    [head] = [report for report in reports if report.name == "lm_head"]
    assert head.method is None and "tied to model.embed_tokens.weight" in head.reason
    assert len(quantized_layers(model)) == 14
    expected = model(ids).logits
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight and held(model) < before
    assert torch.equal(model(ids).logits, expected)


def test_a_head_of_its_own_is_quantized_and_not_undone() -> None:
    model, ids = language_model(tied=False), torch.arange(12)[None]
    zoo.quantize(model, "fp4-e2m1")
    assert isinstance(model.lm_head, QuantizedLayer)
    expected = model(ids).logits
    model.tie_weights()
    assert torch.equal(model(ids).logits, expected)


class Tied(nn.Module):
    """Layers that share what they hold in one of the ways there are."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.other = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        if how == "parameter":
            self.second.weight = self.first.weight
        elif how == "storage":
            self.second.weight = nn.Parameter(self.first.weight.data)
        elif how == "transposed":
            self.second.weight = nn.Parameter(self.first.weight.data.T)
        elif how == "part":
            self.table = nn.Parameter(normal(128, 64))
            self.first.weight = nn.Parameter(self.table.data[:64])
            self.second.weight = nn.Parameter(self.table.data[64:])
        elif how == "buffer":
            self.register_buffer("copy", self.first.weight.data)
            self.register_buffer("again", self.second.weight.data)
        elif how == "side by side":
            both = normal(128, 64)
            self.first.weight, self.second.weight = nn.Parameter(both[:64]), nn.Parameter(both[64:])

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.second(self.first(x)))


@pytest.mark.parametrize("how", ["parameter", "storage", "transposed", "part", "buffer"])
def test_weights_tied_in_any_way_stay(how: str) -> None:
    model = Tied(how)
    reasons = {choice.name: choice.reason for choice in plan(model, "int8")}
    assert "is tied to" in reasons["first"] and "is tied to" in reasons["second"] and not reasons["other"]
    zoo.quantize(model, "int8")
    assert list(quantized_layers(model)) == ["other"]


def test_weights_that_lie_side_by_side_are_not_tied() -> None:
    model = zoo.quantize(Tied("side by side"), "int8")
    assert list(quantized_layers(model)) == ["first", "second", "other"]


def test_a_model_of_tied_layers_alone_is_refused() -> None:
    one = nn.Linear(64, 64)
    other = nn.Linear(64, 64)
    other.weight = one.weight
    with pytest.raises(InputError, match=r"no layer to quantize.*tied to 1\.weight"):
        zoo.quantize(nn.Sequential(one, other), "int8")


def in_two_places() -> nn.Sequential:
    torch.manual_seed(0)
    shared = nn.Linear(64, 64)
    return nn.Sequential(shared, nn.Sequential(nn.ReLU(), shared), nn.Linear(64, 64))


@pytest.mark.parametrize("method", ["int8", "fp4-e2m1", "binary-xnor"])
def test_a_layer_in_two_places_is_packed_once(method: str, tmp_path: Path) -> None:
    model, x = in_two_places(), normal(3, 64)
    size = held(model)
    zoo.quantize(model, method)
    assert model[0] is model[1][1] and isinstance(model[0], QuantizedLayer)
    assert held(model) < size / 2
    restored = load(in_two_places(), save(model, tmp_path / "model.safetensors"))
    assert restored[0] is restored[1][1] and torch.equal(restored(x), model(x))


def test_binarizing_keeps_ties_and_reaches_every_place() -> None:
    model = binarize(in_two_places(), "xnor", skip=())
    assert isinstance(model, nn.Sequential) and isinstance(model[1], nn.Sequential)
    assert isinstance(model[0], BinaryLinear) and model[1][1] is model[0]
    tied = Tied("parameter")
    binarize(tied, "xnor", skip=())
    assert type(tied.first) is nn.Linear and tied.first.weight is tied.second.weight and isinstance(tied.other, BinaryLinear)


@pytest.mark.parametrize("how", ["parameter", "storage", "part", "side by side"])
def test_tied_models_come_back_tied(how: str, tmp_path: Path) -> None:
    model, x = zoo.quantize(Tied(how), "int8"), normal(2, 64)
    restored = load(Tied(how), save(model, tmp_path / "model.safetensors"))
    assert torch.equal(restored(x), model(x))
    assert (restored.first.weight is restored.second.weight) == (how == "parameter")


def test_a_saved_language_model_comes_back_tied(tmp_path: Path) -> None:
    model, ids = zoo.quantize(language_model(), "fp4-e2m1"), torch.arange(12)[None]
    path = save(model, tmp_path / "model.safetensors")
    restored = load(language_model(), path)
    assert path.stat().st_size < 1.05 * held(model) + 20_000
    assert restored.lm_head.weight is restored.model.embed_tokens.weight
    assert torch.equal(restored(ids).logits, model(ids).logits) and held(restored) == held(model)


# ------------------------------------------------------------------------------------------------ every use of a packed layer


@pytest.mark.parametrize("activations", ["none", "dynamic"])
@pytest.mark.parametrize("method", METHODS)
def test_inputs_of_every_shape(method: str, activations: str) -> None:
    """Of no rows, one row without a batch, and rows that don't lie one after another."""
    torch.manual_seed(0)
    how = {} if method.startswith("binary") else {"activations": activations}
    layer = zoo.quantize(nn.Linear(64, 37), method, **how)
    rows = layer(normal(6, 64))
    assert rows.shape == (6, 37)
    torch.testing.assert_close(layer(normal(6, 64)[0]), rows[0])
    torch.testing.assert_close(layer(normal(6, 64).view(2, 3, 64)), rows.view(2, 3, 37))
    torch.testing.assert_close(layer(normal(6, 64).T.contiguous().T), rows)
    torch.testing.assert_close(layer(normal(6, 64).repeat_interleave(2, 0)[::2]), rows)
    torch.testing.assert_close(layer(normal(6, 64)[:1].expand(4, 64)), rows[:1].expand(4, 37))
    for shape in ((0,), (0, 3), (3, 0), (2, 0, 5)):
        empty = layer(torch.empty(*shape, 64))
        assert empty.shape == (*shape, 37) and empty.dtype == rows.dtype
        if not method.startswith("binary"):
            assert layer(torch.empty(*shape, 64, requires_grad=True)).shape == (*shape, 37)
            assert layer.reference(torch.empty(*shape, 64)).shape == (*shape, 37)
    for wrong in (normal(2, 63), normal(2, 65), normal(2, 1), normal(64, 2)):
        with pytest.raises(InputError, match="inputs of"):
            layer(wrong)


@pytest.mark.parametrize("activations", ["none", "dynamic"])
@pytest.mark.parametrize("method", METHODS)
def test_convolutions_of_no_items_and_without_a_batch(method: str, activations: str) -> None:
    torch.manual_seed(0)
    how = {} if method.startswith("binary") else {"activations": activations}
    for layer, x in ((nn.Conv1d(8, 5, 5, padding=2), normal(3, 8, 12)), (nn.Conv2d(8, 5, 3), normal(3, 8, 6, 7))):
        packed = zoo.quantize(layer, method, policy=zoo.quantization.Policy(protect_ends=False), **how)
        y = packed(x)
        torch.testing.assert_close(packed(x[1]), y[1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(packed(x.transpose(0, 1).contiguous().transpose(0, 1)), y, atol=1e-5, rtol=1e-5)
        assert packed(x[:0]).shape == (0, *y.shape[1:])


@pytest.mark.parametrize("method", METHODS)
def test_copies_and_precisions_of_packed_layers(method: str) -> None:
    model, x = zoo.quantize(nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 40)), method), normal(4, 64)
    expected = model(x)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)]
    fresh = zoo.quantize(nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 40)), method)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if {name: tensor.shape for name, tensor in fresh.state_dict().items()} == shapes:
        fresh.load_state_dict(model.state_dict())
    for other in copies:
        assert torch.equal(other(x), expected)
        for tensor in other.state_dict().values():
            tensor.zero_()
    assert torch.equal(model(x), expected), "copies hold tensors of their own"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        other = copy.deepcopy(model).to(dtype)
        y = other(x.to(dtype))
        assert y.dtype == dtype and bool(y.isfinite().all())
        if not method.startswith("binary"):
            assert float((y.double() - expected.double()).norm()) < 0.02 * float(expected.double().norm())
        back = other.float()
        for name, tensor in back.state_dict().items():
            assert tensor.dtype == before[name].dtype
            assert "bias" in name or torch.equal(tensor, before[name]), name
    assert torch.equal(model.train()(x), expected) and torch.equal(model.eval()(x), expected)


@pytest.mark.parametrize("method", FLOAT)
def test_gradients_reach_the_inputs(method: str) -> None:
    layer = zoo.quantize(nn.Linear(64, 32), method)
    x = normal(3, 64).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 64))


@pytest.mark.parametrize("method", ["int8", "binary-xnor"])
@pytest.mark.parametrize("again", ["int8", "fp4-e2m1", "binary-xnor"])
def test_a_model_is_quantized_once(method: str, again: str) -> None:
    model = zoo.quantize(nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 40)), method)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for whole in (model, model[0]):
        with pytest.raises(InputError, match="already quantized"):
            zoo.quantize(whole, again)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_layers_without_outputs_stay() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 0))
    assert [choice.reason for choice in plan(model, "int8")] == ["", "it has no weights"]
    assert zoo.quantize(model, "int8")(normal(2, 64)).shape == (2, 0)

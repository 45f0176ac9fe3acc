"""Blocks of plain vision transformers against their formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zoo.nn.vit import Activation, ViTSizes, fuse_qkv_bias, vit_blocks


def norm(x: Tensor, state: dict[str, Tensor], name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
}


def randomised(sizes: ViTSizes) -> torch.nn.Sequential:
    torch.manual_seed(0)
    blocks = vit_blocks(sizes).double().requires_grad_(False)
    for parameter in blocks.parameters():
        parameter.normal_(std=0.5)
    return blocks


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])
def test_blocks_compute_the_formula(activation: Activation) -> None:
    sizes = ViTSizes(12, 2, 3, 31, activation=activation, eps=1e-2)
    blocks = randomised(sizes)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    expected = x
    for number in range(2):
        state = {key.removeprefix(f"{number}."): value for key, value in blocks.state_dict().items()}
        y = norm(expected, state, "norm1", 1e-2)
        queries, keys, values = (part.unflatten(-1, (3, 4)) for part in linear(y, state, "attn.qkv").chunk(3, dim=-1))
        scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) / 2
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)
        expected = expected + linear(mixed.flatten(2), state, "attn.proj")
        y = ACTIVATIONS[activation](linear(norm(expected, state, "norm2", 1e-2), state, "mlp.fc1"))
        expected = expected + linear(y, state, "mlp.fc2")
    assert (blocks(x) - expected).abs().max() < 1e-9


@pytest.mark.parametrize(("dim", "hidden"), [(1152, 4304), (1408, 6144), (48, 100), (7, 1)])
def test_feed_forward_layers_have_the_wanted_width(dim: int, hidden: int) -> None:
    with torch.device("meta"):
        state = vit_blocks(ViTSizes(dim, 1, 1, hidden)).state_dict()
    assert state["0.mlp.fc1.weight"].shape == (hidden, dim)


def test_keys_without_a_bias() -> None:
    """Any bias of the keys gives the same output, so a checkpoint that has none may be given zeros."""
    blocks = randomised(ViTSizes(12, 1, 3, 24))
    x = torch.randn(1, 6, 12, dtype=torch.float64)
    expected = blocks(x)
    q_bias, _, v_bias = blocks[0].attn.qkv.bias.chunk(3)
    blocks[0].attn.qkv.bias.copy_(fuse_qkv_bias(q_bias, v_bias))
    assert blocks[0].attn.qkv.bias[12:24].abs().max() == 0
    assert (blocks(x) - expected).abs().max() < 1e-9


def test_blocks_without_biases() -> None:
    assert "0.attn.qkv.bias" not in vit_blocks(ViTSizes(8, 1, 2, 16, qkv_bias=False)).state_dict()


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="5 heads do not divide a width of 12"):
        vit_blocks(ViTSizes(12, 1, 5, 24))

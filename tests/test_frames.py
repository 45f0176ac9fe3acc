"""Steps of decoders of sound in one pass, and products whose weights are laid out once, beside PyTorch's operators."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels import frames, native
from zoo.nn import prepared
from zoo.nn.conv import conv1d

compiled = pytest.mark.skipif(native.library("frames.c") is None, reason="no C compiler")
DTYPES = [torch.float32, torch.bfloat16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ragged(batch: int, count: int) -> Tensor:
    lengths = torch.tensor([count, *range(1, batch)])
    return (torch.arange(count) < lengths[:, None])[..., None]


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "count", "channels", "kernel"), [(3, 40, 48, 7), (1, 1, 5, 3), (2, 3, 37, 9)])
@torch.no_grad()
def test_depthwise_norm(batch: int, count: int, channels: int, kernel: int, dtype: torch.dtype) -> None:
    x, weight = normal(batch, count, channels), normal(channels, 1, kernel, seed=1)
    bias, scale, shift = normal(3, channels, seed=2)
    inside = ragged(batch, count)
    for mask in (None, inside):
        found = frames.depthwise_norm(x, mask, weight, bias, scale, shift, 1e-6, dtype)
        assert found is not None and found.dtype == dtype
        padded = F.pad(x if mask is None else x * mask, (0, 0, kernel // 2, kernel // 2))
        expected = F.layer_norm(conv1d(padded, weight, bias, groups=channels), (channels,), scale, shift, 1e-6)
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=5e-6 if dtype == torch.float32 else 0.04)
    # An item gets what it gets alone, whatever lies behind its end.
    spoiled = torch.where(inside, x, torch.nan)
    together = frames.depthwise_norm(spoiled, inside, weight, bias, scale, shift, 1e-6, dtype)
    for item, count_inside in enumerate(inside.sum(1)[:, 0].tolist()):
        alone = frames.depthwise_norm(x[item : item + 1, :count_inside], None, weight, bias, scale, shift, 1e-6, dtype)
        assert together is not None and alone is not None and torch.equal(together[item, :count_inside], alone[0])


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_scaled_silu_between_margins(dtype: torch.dtype) -> None:
    wide = 30 * normal(3, 24, 20)
    x, inside = wide[:, 2:22], ragged(3, 20)
    scale, shift = normal(2, 3, 1, 20, seed=1)
    found = frames.scaled_silu(x, inside, scale, shift, 1, 2, dtype)
    spoiled = frames.scaled_silu(torch.where(inside, x, torch.nan), inside, scale, shift, 1, 2, dtype)
    expected = F.pad(F.silu(x * scale + shift) * inside, (0, 0, 1, 2)).to(dtype)
    assert found is not None and spoiled is not None and torch.equal(found, spoiled)
    torch.testing.assert_close(found, expected, rtol=5e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
    extreme = torch.tensor([[[0.0, -0.0, 80.0, -80.0, 1e4, -1e4, 3e38, -3e38]]])
    one, zero = torch.ones(1, 1, 8), torch.zeros(1, 1, 8)
    silu = frames.scaled_silu(extreme, None, one, zero, 0, 0, torch.float32)
    assert silu is not None
    torch.testing.assert_close(silu, F.silu(extreme), rtol=1e-6, atol=1e-33)


@compiled
@torch.no_grad()
def test_elu() -> None:
    x = torch.cat([4 * normal(2, 9, 33), torch.full((2, 1, 33), -1e30), torch.zeros(2, 1, 33)], dim=1)
    x[0, 0, :4] = torch.tensor([torch.inf, -torch.inf, -0.0, 3e38])
    found = frames.elu(x, None)
    assert found is not None
    torch.testing.assert_close(found, F.elu(x), rtol=0, atol=2.4e-7)
    padded = torch.zeros(2, 20, 33)
    assert frames.elu(x[:, 2:8], padded[:, 3:9]) is not None
    assert torch.equal(padded[:, 3:9], found[:, 2:8]) and not padded[:, :3].any() and not padded[:, 9:].any()
    assert frames.elu(x.transpose(1, 2), None) is None


@compiled
@torch.no_grad()
def test_add_scaled() -> None:
    x, y, scale = normal(2, 9, 33), normal(2, 9, 33, seed=1).bfloat16(), normal(33, seed=2)
    found = frames.add_scaled(x, y, scale)
    assert found is not None
    torch.testing.assert_close(found, x + scale * y.float(), rtol=1e-6, atol=1e-6)
    assert frames.add_scaled(x, y.float(), scale) is None


@compiled
def test_where_a_gradient_is_asked_for_nothing_is_computed() -> None:
    assert frames.add_scaled(normal(1, 2, 3), normal(1, 2, 3).bfloat16(), normal(3)) is None


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_products_with_laid_out_weights(dtype: torch.dtype) -> None:
    tolerance = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0.05}
    layer, conv = nn.Linear(40, 30).to(dtype), nn.Conv1d(12, 20, 3).to(dtype)
    x, sound = normal(3, 50, 40).to(dtype), normal(2, 30, 12).to(dtype)
    found = prepared.linear(layer, x, gelu=True)
    torch.testing.assert_close(found, F.gelu(layer(x)), **tolerance)
    torch.testing.assert_close(prepared.some_outputs(layer, x, 10, 25), layer(x)[..., 10:25], **tolerance)
    convolved = prepared.convolve(conv, sound)
    torch.testing.assert_close(convolved, conv1d(sound, conv.weight, conv.bias), **tolerance)
    # Rows and items by themselves.
    assert all(torch.equal(prepared.linear(layer, x[:1, :rows], gelu=True)[0], found[0, :rows]) for rows in (1, 7, 49))
    assert torch.equal(prepared.convolve(conv, sound[1:, 3:11]), convolved[1:, 3:9])
    # Weights that change, are replaced, copied or cast.
    layer.weight.mul_(2)
    torch.testing.assert_close(prepared.linear(layer, x), layer(x), rtol=0, atol=2 * tolerance["atol"])
    twin = copy.deepcopy(layer)
    layer.weight = nn.Parameter(normal(30, 40, seed=3).to(dtype))
    torch.testing.assert_close(prepared.linear(layer, x), layer(x), rtol=0, atol=8 * tolerance["atol"])
    assert not torch.equal(prepared.linear(twin, x), prepared.linear(layer, x))
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    assert prepared.linear(layer.to(other), x.to(other)).dtype == other


def test_gradients_pass() -> None:
    layer, x = nn.Linear(4, 3), normal(2, 4).requires_grad_()
    prepared.linear(layer, x, gelu=True).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None

"""Group normalisation in the layout of convolutions, against float64."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import zoo
from zoo.kernels import native
from zoo.nn.norm import GroupNorm, exact_group_norms
from zoo.nn.vae import VAE, VAESizes


@pytest.fixture(params=["compiled", "plain"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernel in C, and what does its work where there is no compiler."""
    if request.param == "plain":
        monkeypatch.setattr(native, "library", lambda source: None)
    elif native.library("norm.c") is None:
        pytest.skip("no C compiler")
    return str(request.param)


def norm(channels: int, groups: int) -> GroupNorm:
    layer = GroupNorm(groups, channels, eps=1e-6)
    with torch.no_grad():
        layer.weight.normal_(generator=torch.Generator().manual_seed(1))
        layer.bias.normal_(generator=torch.Generator().manual_seed(2))
    return layer.requires_grad_(False)


def exact(layer: GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x.double(), layer.num_groups, layer.weight.double(), layer.bias.double(), layer.eps)


@pytest.mark.parametrize(
    ("shape", "groups", "mean"),
    [
        ((1, 128, 256, 256), 32, 0.7),
        ((2, 64, 96, 80), 16, -3.0),
        ((1, 32, 67, 71), 8, 2.0),
        ((1, 8, 64, 64), 4, 0.7),
        ((3, 8, 1, 5), 2, 0.0),
        ((1, 6, 7, 1), 3, 1.0),
        ((1, 4, 1, 1), 2, 0.0),
        ((2, 264, 23, 45), 8, 5.0),
    ],
)
@pytest.mark.usefixtures("form")
def test_it_is_as_exact_as_float32_allows(shape: tuple[int, ...], groups: int, mean: float) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1.5 + mean
    layer, kept = norm(shape[1], groups), x.clone()
    for same in (x, x.to(memory_format=torch.channels_last)):
        found = layer(same)
        assert found.stride() == same.stride() or min(shape[2:]) == 1
        assert (found - exact(layer, x)).abs().max() < 5e-6
        assert torch.equal(same, kept)


def test_the_number_of_threads_changes_nothing(form: str) -> None:
    if form == "plain":
        pytest.skip("PyTorch's sums are not ours to order")
    x = (torch.randn(2, 200, 90, 77) + 3).to(memory_format=torch.channels_last)
    layer, threads = norm(200, 8), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(layer(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.usefixtures("form")
def test_items_do_not_touch_each_other() -> None:
    x = torch.randn(3, 16, 80, 75).to(memory_format=torch.channels_last)
    layer = norm(16, 4)
    whole = layer(x)
    for index in range(3):
        alone = x[index : index + 1].clone(memory_format=torch.channels_last)
        assert torch.equal(layer(alone)[0], whole[index])


def test_gradients_are_those_of_pytorch() -> None:
    x = torch.randn(1, 8, 20, 20).to(memory_format=torch.channels_last).requires_grad_()
    layer = norm(8, 2).requires_grad_()
    layer(x).square().sum().backward()
    same = x.detach().clone().double().requires_grad_()
    exact(layer, same).square().sum().backward()
    assert x.grad is not None and same.grad is not None and layer.weight.grad is not None
    assert (x.grad - same.grad).abs().max() < 1e-3


def test_other_types_are_left_to_pytorch() -> None:
    x = torch.randn(1, 8, 20, 20).to(memory_format=torch.channels_last)
    for dtype in (torch.float16, torch.float64):
        layer = norm(8, 2).to(dtype)
        assert torch.equal(layer(x.to(dtype)), F.group_norm(x.to(dtype), 2, layer.weight, layer.bias, 1e-6))


def test_networks_keep_their_state() -> None:
    network = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8, eps=1e-3), nn.Sequential(nn.GroupNorm(4, 8)))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    x = torch.randn(1, 4, 9, 9)
    expected = network(x)
    exact_group_norms(network)
    assert isinstance(network[1], GroupNorm) and isinstance(network[2][0], GroupNorm)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert (network(x) - expected).abs().max() < 1e-6
    with torch.no_grad():
        assert (network(x) - expected).abs().max() < 1e-6


def distance_from_double(vae: VAE, images: Tensor) -> float:
    """How far the posterior's mean is from that of the same network in float64."""
    exactly = copy.deepcopy(vae.encoder).double()
    with torch.no_grad():
        moments = exactly.quant_conv(exactly.network(images.double()))
        return (vae.encoder(images)[0] - moments.chunk(2, dim=1)[0]).abs().max().item()


def test_posterior_of_the_golden_case(golden: Path) -> None:
    case = golden / "flextok" / "tiny64"
    tokenizer = zoo.load_upstream("flextok", case / "config.json", case / "weights.safetensors")
    images = load_file(case / "io.safetensors")["images"]
    assert distance_from_double(tokenizer.vae, images) < 1.5e-5


def test_posterior_at_full_resolution() -> None:
    """Few channels, but the number of pixels that the official autoencoder normalises over."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = VAE(VAESizes(widths=(32, 32), layers_per_block=1, groups=8, latent_channels=4)).eval().requires_grad_(False)
        images = F.interpolate(torch.randn(1, 3, 32, 32), 256, mode="bicubic").clamp(-1, 1)
    assert distance_from_double(vae, images) < 3e-5

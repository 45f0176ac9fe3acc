"""Convolutions by tiles: against float64, against the same sums in PyTorch, and where they are used."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels import native, winograd
from zoo.nn.conv2d import Conv2d, coarse_tiles, convolved
from zoo.nn.linear import Linear, own_linear_layers
from zoo.nn.norm import GroupNorm, activated
from zoo.nn.resnet import Decoder, Encoder

pytestmark = pytest.mark.skipif(native.library("winograd.c") is None, reason="no C compiler")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def maps(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, seed=seed).to(memory_format=torch.channels_last)


def both_ways(way: Callable[..., list[Tensor]], x: Tensor) -> Tensor:
    by_row = torch.stack(way(*x.unbind(0)))
    return torch.stack(way(*by_row.unbind(1)), dim=1)


def into(side: int, a: Tensor, b: Tensor, c: Tensor, d: Tensor, *rest: Tensor) -> list[Tensor]:
    if side == 4:
        return [a - c, b + c, c - b, b - d]
    e, f = rest
    even, odd, near, far = e - c * 4, d - b * 4, e - c, (d - b) * 2
    return [a * 4 - c * 5 + e, even + odd, even - odd, near + far, near - far, b * 4 - d * 5 + f]


def out_of(side: int, a: Tensor, b: Tensor, c: Tensor, d: Tensor, *rest: Tensor) -> list[Tensor]:
    if side == 4:
        return [a + b + c, b - c - d]
    e, f = rest
    sums, apart, wide, far = b + c, b - c, d + e, d - e
    return [a + sums + wide, apart + far * 2, sums + wide * 4, apart + far * 8 + f]


def kernel_of(side: int, a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
    sixth, twelfth, least = (torch.tensor(1 / part, dtype=torch.float32) for part in (6, 12, 24))
    if side == 4:
        ends, middle = (a + c) * 0.5, b * 0.5
        return [a, ends + middle, ends - middle, c]
    ends, middle = (a + c) * -sixth, b * sixth
    far, wide = a * least + c * sixth, b * twelfth
    return [a * 0.25, ends - middle, ends + middle, far + wide, far - wide, c]


def in_pytorch(x: Tensor, weight: Tensor, bias: Tensor, side: int, added: Tensor, enlarged: bool) -> Tensor:
    """One item, with all sums in the order that the kernels in C promise."""
    if enlarged:
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    step, (rows, columns) = side - 2, x.shape[2:]
    high, wide = -(-rows // step), -(-columns // step)
    padded = F.pad(x, (1, 1 + wide * step - columns, 1, 1 + high * step - rows))
    tiles = padded[0].unfold(1, side, step).unfold(2, side, step).flatten(1, 2).permute(2, 3, 1, 0)
    places = both_ways(lambda *parts: into(side, *parts), tiles).flatten(0, 1)
    kernel = both_ways(lambda *parts: kernel_of(side, *parts), weight.permute(2, 3, 1, 0)).flatten(0, 1).contiguous()
    slabs = [F.pad(slab, (0, 0, 0, winograd.SLAB - slab.shape[1])) for slab in places.split(winograd.SLAB, dim=1)]
    products = torch.cat([slab.contiguous() @ kernel for slab in slabs], dim=1)[:, : high * wide].unflatten(0, (side, side))
    pixels = both_ways(lambda *parts: out_of(side, *parts), products) + bias
    found = pixels.unflatten(2, (high, wide)).permute(4, 2, 0, 3, 1).flatten(3, 4).flatten(1, 2)
    return added + found[None, :, :rows, :columns]


@pytest.mark.parametrize("side", [4, 6])
@pytest.mark.parametrize(
    ("inputs", "outputs", "rows", "columns", "enlarged"),
    [(64, 80, 37, 41, False), (80, 64, 19, 23, True), (16, 32, 1, 1, False), (32, 16, 3, 130, False), (16, 16, 2, 3, True)],
)
def test_it_is_the_convolution(inputs: int, outputs: int, rows: int, columns: int, enlarged: bool, side: int) -> None:
    x, weight, bias = maps(2, inputs, rows, columns), randn(outputs, inputs, 3, 3, seed=1), randn(outputs, seed=2)
    added = maps(2, outputs, rows << enlarged, columns << enlarged, seed=3)
    found = winograd.convolve(x, weight, bias, side, added=added, enlarged=enlarged)
    assert found is not None and found.is_contiguous(memory_format=torch.channels_last)
    wide = F.interpolate(x.double(), scale_factor=2.0) if enlarged else x.double()
    exact = F.conv2d(wide, weight.double(), bias.double(), padding=1) + added
    assert (found - exact).abs().max() < (1e-5 if side == 4 else 1e-4) * exact.std()
    for index in range(2):
        item, extra = x[index : index + 1], added[index : index + 1]
        # Items do not depend on their batch, nor on how the weights lie, and the sums are those that are written down.
        laid_out = weight.contiguous(memory_format=torch.channels_last)
        alone = winograd.convolve(item, laid_out, bias, side, added=extra, enlarged=enlarged)
        assert alone is not None and torch.equal(alone[0], found[index])
        assert torch.equal(in_pytorch(item, weight, bias, side, extra, enlarged)[0], found[index])


def test_small_tiles_are_more_exact_than_the_direct_convolution() -> None:
    x, weight = maps(1, 256, 32, 32), randn(256, 256, 3, 3, seed=1)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    found = winograd.convolve(x, weight, None, 4)
    assert found is not None
    assert (found - exact).square().mean() < (F.conv2d(x, weight, padding=1) - exact).square().mean()


def test_the_number_of_threads_changes_nothing() -> None:
    x, weight, threads = maps(1, 64, 96, 90), randn(64, 64, 3, 3, seed=1), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(winograd.convolve(x, weight, None, 6))
    finally:
        torch.set_num_threads(threads)
    assert found[0] is not None and found[1] is not None and found[2] is not None
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_scratch_serves_inside_and_outside_inference() -> None:
    weight = randn(64, 64, 3, 3)
    with torch.inference_mode():
        first = winograd.convolve(maps(1, 64, 40, 40), weight, None, 4)
    with torch.no_grad():
        second = winograd.convolve(maps(1, 64, 40, 40), weight, None, 4)
    assert first is not None and second is not None and torch.equal(first, second)


# ---- the layer


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sides of the tiles of all convolutions by tiles."""
    sides: list[int] = []
    original = winograd.convolve

    def counted(*arguments: object, **options: object) -> object:
        sides.append(arguments[3])  # type: ignore[arg-type]  # the side
        return original(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(winograd, "convolve", counted)
    return sides


def layer(inputs: int = 64, outputs: int = 64, **options: int) -> Conv2d:
    return Conv2d(inputs, outputs, 3, padding=1, **options).requires_grad_(False)


def test_a_layer_uses_tiles_where_nothing_but_numbers_is_wanted(calls: list[int]) -> None:
    own, x = layer(), maps(1, 64, 40, 40)
    plain = F.conv2d(x, own.weight, own.bias, padding=1)
    assert (own(x) - plain).abs().max() < 1e-5 and calls == [4]
    assert (coarse_tiles(nn.Sequential(own))(x) - plain).abs().max() < 1e-4 and calls == [4, 6]
    # Fewer than a slab of large tiles: small ones. Fewer than a slab of those, and other kernels: PyTorch's.
    own(maps(1, 64, 20, 20))
    own(maps(1, 64, 8, 8))
    own.double()(x.double())
    strided = Conv2d(64, 64, 3, stride=2, padding=1).requires_grad_(False)
    assert torch.equal(strided(x), F.conv2d(x, strided.weight, strided.bias, 2, 1))
    assert calls == [4, 6, 4]


def test_gradients_are_pytorchs(calls: list[int]) -> None:
    own, x = layer().requires_grad_(), maps(1, 64, 40, 40)
    assert torch.equal(own(x), F.conv2d(x, own.weight, own.bias, padding=1)) and own(x).requires_grad and not calls


def test_hooks_see_all_of_a_layer(calls: list[int]) -> None:
    own, x, added = layer(), maps(1, 64, 20, 20), maps(1, 64, 40, 40, seed=1)
    fused = convolved(own, x, added=added, enlarged=True)
    seen: list[Tensor] = []
    own.register_forward_hook(lambda _, inputs, output: seen.extend([*inputs, output]))
    watched = convolved(own, x, added=added, enlarged=True)
    assert (fused - watched).abs().max() < 1e-5
    assert seen[0].shape == added.shape and torch.equal(added + seen[1], watched)
    # Whoever looks on may want the product by PyTorch's operator, as calibration does.
    assert calls == [4]


def test_low_precision_is_laid_out_once() -> None:
    own, x = layer(), maps(1, 64, 20, 20).bfloat16()
    plain = F.conv2d(x, own.weight.bfloat16(), own.bias.bfloat16(), padding=1)  # type: ignore[union-attr]
    own.to(torch.bfloat16)
    assert own.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(own(x), plain)
    assert torch.equal(copy.deepcopy(own)(x), plain)


def test_autocast_casts_weights_once() -> None:
    own, x = layer(), maps(1, 64, 20, 20)
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.conv2d(x, own.weight, own.bias, padding=1)
        assert torch.equal(own(x), plain)
        kept = own._cast.of(own.weight, x)
        assert torch.equal(own(x), plain) and own._cast.of(own.weight, x) is kept and kept.dtype == torch.bfloat16
        with torch.no_grad():
            own.weight.add_(1)
        assert not torch.equal(own(x), plain)
        own.requires_grad_()
        assert own(x).requires_grad


def test_linear_layers_under_autocast() -> None:
    plain, x = nn.Sequential(nn.Linear(8, 6), nn.Sequential(nn.Linear(6, 5, bias=False))), randn(3, 8)
    network = own_linear_layers(copy.deepcopy(plain)).requires_grad_(False)
    first = network[0]
    assert isinstance(first, Linear) and torch.equal(network(x), plain(x))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(network(x), plain(x))
            assert first._cast.of(first.weight, x) is first._cast.of(first.weight, x)
    network.bfloat16()
    assert torch.equal(network(x), plain.bfloat16()(x.bfloat16()))


def test_networks_agree_with_plain_convolutions(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(8, (64, 64, 128), 1, 16).requires_grad_(False)
    decoder = Decoder(8, 3, (64, 64, 128), 1, 16).requires_grad_(False)
    images = maps(2, 3, 64, 64)
    found = encoder(images)
    assert set(calls) == {4}
    calls.clear()
    pictures = decoder(found)
    assert set(calls) == {6, 4}
    for network, given, result in ((encoder, images, found), (decoder, found, pictures)):
        alone = torch.cat(
            [network(given[index : index + 1].contiguous(memory_format=torch.channels_last)) for index in range(2)]
        )
        assert torch.equal(alone, result)
    monkeypatch.setattr(native, "library", lambda source: None)
    assert (encoder(images) - found).abs().max() < 1e-5
    assert (decoder(found) - pictures).abs().max() < 1e-4
    assert (Encoder.forward(encoder.double(), images.double()) - found).abs().max() < 1e-5


# ---- norm and activation in one pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("shape", [(2, 64, 40, 37), (1, 200, 9, 7), (3, 8, 2, 2)])
def test_a_norm_and_its_activation(
    shape: tuple[int, ...], compiled: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(native, "library", lambda source: None)
    norm = GroupNorm(4, shape[1], eps=1e-6).requires_grad_(False)
    norm.weight.copy_(randn(shape[1], seed=1))
    norm.bias.copy_(randn(shape[1], seed=2))
    norm.to(dtype)
    x = (maps(*shape) * 30 + 3).to(dtype)
    exact = F.silu(F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), 1e-6))
    kept, found = x.clone(), activated(norm, x)
    assert torch.equal(x, kept) and found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    relative, absolute = (2.0**-8, 2.0**-14) if dtype == torch.bfloat16 else (2.0**-20, 2.0**-19)
    assert ((found - exact).abs() <= relative * exact.abs() + absolute).all()
    assert torch.equal(norm.activated(x, overwrite=True), found) and torch.equal(x, found)
    for index in range(shape[0]):
        alone = activated(norm, kept[index : index + 1].clone(memory_format=torch.channels_last))
        assert torch.equal(alone[0], found[index])


def test_activations_of_extremes() -> None:
    norm = GroupNorm(1, 16, eps=1e-6).requires_grad_(False)
    norm.bias.copy_(torch.tensor([-1e4, -200.0, -90, -88, -87, -20, -1, -1e-3, 0, 1e-3, 1, 20, 87, 90, 200, 1e4]))
    norm.weight.zero_()
    found = activated(norm, maps(1, 16, 5, 5))[0, :, 0, 0]
    exact = F.silu(norm.bias.double())
    assert ((found - exact).abs() <= 1e-6 * exact.abs() + 1e-34).all()


def test_hooks_of_a_norm_see_its_result() -> None:
    norm, x = GroupNorm(4, 16).requires_grad_(False), maps(1, 16, 8, 8)
    fused, seen = activated(norm, x), list[Tensor]()
    norm.register_forward_hook(lambda _, inputs, output: seen.append(output.clone()))
    assert (activated(norm, x) - fused).abs().max() < 1e-6 and torch.equal(F.silu(seen[0]), activated(norm, x))

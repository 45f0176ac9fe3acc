"""The search gives the answer of trying everything, and learned rounding that of the reference, with smaller errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from zoo import InputError
from zoo.quantization.fp import (
    LearningConfig,
    fake_quantize,
    finite,
    hard_weight,
    inverse_rectified_sigmoid,
    learn,
    mantissa_splits,
    neighbours,
    output_error,
    rectified_sigmoid,
    regularizer,
    round_to,
    search,
)

GOLDEN = Path(__file__).parent / "golden/quantize"
CASES: dict[str, Any] = json.loads((GOLDEN / "fp-search-a/config.json").read_text())["cases"]


@pytest.fixture(scope="module")
def searched() -> dict[str, Tensor]:
    return load_file(GOLDEN / "fp-search-a/io.safetensors")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", CASES)
def test_search_of_the_reference(searched: dict[str, Tensor], case: str) -> None:
    settings = CASES[case]
    batches = [searched[f"{case}/x{index}"] for index in range(settings["batches"])]
    formats = mantissa_splits(settings["n_bits"], profile="qualcomm")
    found = search(batches, formats, per_channel=settings["per_channel"])
    expected = searched[f"{case}/mse_sum"]
    assert torch.allclose(found.grid, searched[f"{case}/search_grid"], rtol=1e-6)
    assert torch.allclose(found.error, expected, rtol=1e-3)
    assert found.format.mantissa_bits == settings["best_mantissa_bits"]
    assert torch.allclose(found.maxval, searched[f"{case}/best_maxval"], rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_quantizer_and_gradients_of_the_reference(searched: dict[str, Tensor], case: str) -> None:
    settings = CASES[case]
    mantissa = int(settings["best_mantissa_bits"])
    format = finite(settings["n_bits"] - settings["sign_bits"] - mantissa, mantissa, bool(settings["sign_bits"]))
    x = searched[f"{case}/x{settings['batches'] - 1}"].clone().requires_grad_()
    maxval = searched[f"{case}/best_maxval"].view(-1, *[1] * (x.ndim - 1)).clone().requires_grad_()
    quantized = fake_quantize(x, format, maxval)
    clear = ~searched[f"{case}/near_tie"]
    assert torch.allclose(quantized[clear], searched[f"{case}/quantized"][clear], rtol=2e-6, atol=0)
    quantized.backward(searched[f"{case}/grad_out"])
    assert x.grad is not None and maxval.grad is not None
    assert torch.allclose(x.grad, searched[f"{case}/grad_x"], atol=1e-5)
    assert torch.allclose(maxval.grad.flatten(), searched[f"{case}/grad_maxval"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("bits", "numbers"), [(4, 30), (4, 500), (6, 200), (6, 900), (8, 400), (8, 4000)])
def test_search_equals_trying_everything(bits: int, numbers: int, per_channel: bool, signed: bool) -> None:
    """With few numbers for each of a grid's cells, and with many."""
    batches = [normal(3, numbers) ** 3, normal(3, numbers, seed=1)]
    if not signed:
        batches = [batch.abs() for batch in batches]
        batches[1][0, :5] *= -1  # what an unsigned grid cannot represent costs its square
    formats = mantissa_splits(bits, signed)
    found = search(batches, formats, per_channel=per_channel, candidates=23)
    rows = [batch if per_channel else batch.reshape(1, -1) for batch in batches]
    grid = torch.linspace(0.1, 1.2, 23)[:, None] * rows[0].abs().amax(1)
    errors = torch.stack(
        [
            torch.stack(
                [
                    sum(((fake_quantize(x, format, c[:, None]) - x).double() ** 2).mean(1) for x in rows)  # type: ignore[misc]
                    for c in grid
                ]
            )
            for format in formats
        ]
    )
    assert torch.allclose(found.error.double(), errors, rtol=1e-4, atol=1e-12)
    votes = torch.bincount(errors.amin(1).argmin(0), minlength=len(formats))
    best = int(votes.argmax())
    assert found.format == formats[best]
    chosen = errors[best].gather(0, (found.maxval[None] - grid).abs().argmin(0)[None])[0]
    assert torch.allclose(chosen, errors[best].amin(0), rtol=1e-4)


def test_search_of_nothing_and_of_zeros() -> None:
    formats = mantissa_splits(4)
    for nothing in (torch.zeros(0), []):
        with pytest.raises(InputError, match="no numbers"):
            search(nothing, formats)
    with pytest.raises(InputError, match="not finite"):
        search(torch.tensor([1.0, float("nan")]), formats)
    found = search(torch.zeros(2, 5), formats, per_channel=True)
    assert found.maxval.tolist() == [0, 0]
    single = search(torch.tensor(3.0), formats)
    assert torch.allclose(fake_quantize(torch.tensor(3.0), single.format, single.maxval[0]), torch.tensor(3.0), rtol=0.02)


# ------------------------------------------------------------------------------------------------------- learned rounding


@pytest.fixture(scope="module")
def learned() -> tuple[dict[str, Any], dict[str, Tensor]]:
    case = GOLDEN / "fp-rounding-learning-a"
    return json.loads((case / "config.json").read_text()), load_file(case / "io.safetensors")


def test_states_of_the_reference(learned: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    config, tensors = learned
    format = finite(config["exponent_bits"], config["mantissa_bits"])
    cell = neighbours(tensors["weight"], format, tensors["maxval"])
    assert torch.allclose(cell.step, tensors["step"], rtol=1e-6)
    assert torch.equal(cell.floor, tensors["floor_index"])
    assert torch.allclose(cell.rest, tensors["rest"], atol=1e-6)
    assert torch.allclose(inverse_rectified_sigmoid(cell.rest), tensors["alpha0"], atol=1e-5)
    assert torch.allclose(cell.at(rectified_sigmoid(tensors["alpha0"])), tensors["soft_weight_alpha0"], atol=1e-6)
    alpha = tensors["alpha1"].clone().requires_grad_()
    assert torch.allclose(rectified_sigmoid(alpha), tensors["h_alpha1"], atol=1e-6)
    assert torch.equal(hard_weight(alpha.detach(), cell), tensors["hard_weight_alpha1"])
    soft = cell.at(rectified_sigmoid(alpha))
    assert torch.allclose(soft, tensors["soft_weight_alpha1"], atol=1e-6)
    gram = tensors["x"].T @ tensors["x"] / len(tensors["x"])
    loss = output_error(soft - tensors["weight"], gram)
    assert torch.allclose(loss, tensors["rec_loss_alpha1"][0], rtol=1e-4)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.allclose(alpha.grad, tensors["rec_grad_alpha1"], atol=1e-6)
    for beta in (2, 8, 20):
        alpha = tensors["alpha1"].clone().requires_grad_()
        loss = config["reg_weight"] * regularizer(alpha, beta)
        assert torch.allclose(loss, tensors[f"reg_loss_beta{beta}"][0], rtol=1e-4)
        loss.backward()  # type: ignore[no-untyped-call]
        assert torch.allclose(alpha.grad, tensors[f"reg_grad_beta{beta}"], atol=1e-6)


def test_learning_reaches_the_reference(learned: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    config, tensors = learned
    format = finite(config["exponent_bits"], config["mantissa_bits"])
    gram = tensors["x"].T @ tensors["x"] / len(tensors["x"])
    settings = LearningConfig(config["iterations"], config["lr"], config["reg_weight"])
    steps = []
    found = learn(tensors["weight"], gram, format, tensors["maxval"], settings, steps.append)
    nearest, theirs = tensors["rec_losses"].tolist()
    assert abs(found.nearest_error - nearest) < 1e-3 * nearest
    assert found.error <= 1.1 * theirs
    assert sum(steps) == config["iterations"]
    scale = tensors["maxval"] / format.max
    assert torch.allclose(round_to(found.weight / scale, format) * scale, found.weight, rtol=1e-5, atol=0)
    cell = neighbours(tensors["weight"], format, tensors["maxval"])
    either = torch.stack([cell.at(torch.zeros_like(cell.rest)), cell.at(torch.ones_like(cell.rest))])
    assert bool((either == found.weight).any(0).all())


@pytest.mark.parametrize("format", [finite(3, 0), finite(1, 2), finite(0, 3), finite(2, 3)], ids=lambda f: f.name)
def test_neighbours_enclose_the_weight(format: Any) -> None:
    weight = normal(4, 50)
    maxval = weight.abs().amax(1, keepdim=True) * 0.8
    cell = neighbours(weight, format, maxval)
    clipped = weight.clamp(-maxval, maxval)
    low, high = cell.at(torch.zeros_like(weight)), cell.at(torch.ones_like(weight))
    tolerance = 1e-5 * maxval
    assert bool((low <= clipped + tolerance).all()) and bool((clipped <= high + tolerance).all())
    for bound in (low, high):
        assert torch.allclose(fake_quantize(bound, format, maxval), bound, rtol=1e-5)


def test_learning_never_makes_it_worse_and_keeps_zeros() -> None:
    weight = torch.cat([normal(2, 8), torch.zeros(1, 8)])
    maxval = weight.abs().amax(1, keepdim=True)
    found = learn(weight, torch.eye(8), finite(2, 1), maxval, LearningConfig(iterations=3))
    assert found.error <= found.nearest_error
    assert torch.equal(found.weight[2], torch.zeros(8))

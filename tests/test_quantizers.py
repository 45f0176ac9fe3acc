"""Quantizers with one signature, against a public library's outputs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import zoo
from zoo.errors import ArgumentError, InputError
from zoo.quantizers import BSQ, FSQ, LFQ, VQ, ResidualVQ, SimVQ

CASE = Path(__file__).parent / "golden" / "quantize" / "codebook-lib-a"
INV_TEMPERATURE = 10.0


@cache
def recorded(name: str, file: str = "io") -> dict[str, Tensor]:
    tensors = load_file(CASE / f"{file}.safetensors")
    return {key.removeprefix(f"{name}/"): tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}


def loaded(name: str, quantizer: nn.Module) -> nn.Module:
    """With the library's own state dict, nothing missing and nothing left over."""
    quantizer.load_state_dict(recorded(name, "weights"))
    return quantizer.eval()


CODEBOOKS = {
    "rvq": lambda: ResidualVQ((64,) * 4, 16),
    "vq_cosine": lambda: VQ(128, 24, 8, cosine=True),
    "simvq": lambda: SimVQ(256, 16),
}


@pytest.mark.parametrize("name", CODEBOOKS)
def test_golden_codebooks(name: str) -> None:
    quantizer, io = loaded(name, CODEBOOKS[name]()), recorded(name)
    ids = quantizer.ids(io["z"])
    assert torch.equal(ids, io["indices"])
    for found in (quantizer.vectors(ids), quantizer(io["z"])):
        torch.testing.assert_close(found.detach(), io["quantized"], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("name", "kind"), [("lfq", LFQ), ("bsq", BSQ)])
def test_golden_signs(name: str, kind: type[LFQ]) -> None:
    quantizer, io = kind(12), recorded(name)
    assert quantizer.sizes == (4096,)
    ids = quantizer.ids(io["z"])
    assert torch.equal(ids, io["indices"])
    for found in (quantizer.vectors(ids), quantizer(io["z"])):
        torch.testing.assert_close(found, io["quantized"], rtol=0, atol=1e-6)
    loss = quantizer.entropy(io["z"], inv_temperature=INV_TEMPERATURE, clamped=True)
    for found, expected in ((loss.per_sample, "per_sample_entropy"), (loss.batch, "batch_entropy")):
        torch.testing.assert_close(found, io[expected][0], rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(loss.total, io["entropy_aux_loss"][0], rtol=2e-6, atol=1e-6)
    exact = quantizer.entropy(io["z"], inv_temperature=INV_TEMPERATURE)
    torch.testing.assert_close(exact.per_sample, loss.per_sample, rtol=0, atol={"lfq": 2e-5, "bsq": 3e-3}[name])


@pytest.mark.parametrize(
    ("name", "levels"), [("fsq_flextok", (8, 8, 8, 5, 5, 5)), ("fsq_odd", (7, 5, 5, 3)), ("fsq_8555", (8, 5, 5, 5))]
)
def test_golden_scalars(name: str, levels: tuple[int, ...]) -> None:
    quantizer, io = FSQ(levels), recorded(name)
    certain = io["tie_margin"] > 1e-5
    z = io["z"].clone().requires_grad_()
    codes = quantizer(z)
    assert (codes - io["codes"])[certain].abs().max() < 1e-6
    sure = certain.all(-1)
    assert torch.equal(quantizer.ids(io["z"])[sure], io["indices"][sure])
    torch.testing.assert_close(quantizer.vectors(io["some_indices"]), io["some_codes"], rtol=0, atol=1e-6)
    codes.backward(io["grad_out"])
    torch.testing.assert_close(z.grad, io["grad_z"], rtol=1e-5, atol=1e-6)
    every = torch.arange(quantizer.sizes[0])
    assert torch.equal(quantizer.ids(_unbounded(quantizer, every)), every)


def test_golden_symmetric_scalars() -> None:
    quantizer, io = FSQ((8, 5, 5), symmetric=True), recorded("fsq_sym")
    assert torch.equal(quantizer.ids(io["z"]), io["indices"])
    torch.testing.assert_close(quantizer(io["z"]), io["codes"], rtol=0, atol=1e-6)
    torch.testing.assert_close(quantizer.vectors(io["indices"]), io["codes"], rtol=0, atol=1e-6)
    every = torch.arange(quantizer.sizes[0])
    codes = quantizer.vectors(every)
    assert (codes.amin(0) == -1).all() and (codes.amax(0) == 1).all()
    assert torch.equal(quantizer.ids(torch.atanh(codes * (1 - 1e-5))), every)


def _unbounded(quantizer: FSQ, ids: Tensor) -> Tensor:
    """What `FSQ.bound` brings to the codes of ids."""
    half, offset = quantizer._range(ids)
    codes = quantizer.vectors(ids) * torch.tensor([level // 2 for level in quantizer.levels])
    return torch.atanh((codes + offset) / half) - quantizer.shift(ids)


@pytest.mark.parametrize("quantizer", [LFQ(4, 6), BSQ(5), VQ(32, 6, 4), SimVQ(32, 6), ResidualVQ((8, 4), 6), FSQ((4, 3))])
def test_one_signature(quantizer: nn.Module) -> None:
    z = torch.randn(3, 7, {"BSQ": 5, "FSQ": 2}.get(type(quantizer).__name__, 6), generator=torch.Generator().manual_seed(0))
    ids = quantizer.ids(z)
    assert ids.dtype == torch.int64 and ids.shape[:2] == (3, 7)
    assert ids.shape[2:] == (() if len(quantizer.sizes) == 1 else (len(quantizer.sizes),))
    assert (ids >= 0).all() and (ids < torch.tensor(quantizer.sizes)).all()
    vectors = quantizer.vectors(ids)
    torch.testing.assert_close(quantizer(z), vectors, rtol=0, atol=1e-6)
    assert vectors.shape == z.shape and vectors.dtype == torch.float32
    # Half precision of the model changes no id.
    assert torch.equal(quantizer.bfloat16().ids(z), ids)
    z.requires_grad_()
    quantizer(z).sum().backward()
    assert z.grad is not None and z.grad.abs().sum() > 0


def test_entropies_of_listed_codes() -> None:
    """The factorised entropies are those of a softmax over all codes."""
    quantizer, z = LFQ(5), torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    codes = quantizer.vectors(torch.arange(32))
    probabilities = (2 * 0.7 * z @ codes.T).softmax(-1)
    loss = quantizer.entropy(z, inv_temperature=0.7, gamma=0.5, weight=2.0)
    per_sample = -(probabilities * probabilities.log()).sum(-1).mean()
    mean = probabilities.mean(0)
    batch = -(mean * mean.log()).sum()
    torch.testing.assert_close(loss.per_sample, per_sample, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.batch, batch, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.total, 2 * (per_sample - 0.5 * batch), rtol=1e-5, atol=1e-5)


def test_first_codebooks_alone_and_codes_that_change() -> None:
    quantizer = ResidualVQ((8, 4), 6)
    ids = torch.tensor([[3, 1], [7, 0]])
    assert torch.equal(quantizer.vectors(ids[:, :1]), quantizer.layers[0].vectors(ids[:, 0]))
    with pytest.raises(zoo.InputError, match="3 ids do not fit 2 codebooks"):
        quantizer.vectors(torch.zeros(1, 3, dtype=torch.int64))
    moved = SimVQ(16, 4)
    z = torch.randn(50, 4, generator=torch.Generator().manual_seed(2))
    before = moved.ids(z)
    with torch.no_grad():
        moved.code_transform.weight.mul_(-1)
    assert torch.equal(moved.ids(z), torch.cdist(z, moved.codebook.detach()).argmin(1)) and not torch.equal(
        before, moved.ids(z)
    )
    for wrong in (0, 63):
        with pytest.raises(zoo.InputError, match="1 to 62 bits"):
            LFQ(wrong)


@pytest.mark.parametrize("quantizer", [FSQ([3, 5]), FSQ([4, 4], symmetric=True), LFQ(4), BSQ(4)])
@pytest.mark.parametrize("number", [-1, 16])
def test_ids_of_no_code(quantizer: Any, number: int) -> None:
    with pytest.raises(InputError, match=r"outside of the 1\d codes"):
        quantizer.vectors(torch.tensor([0, number]))
    assert quantizer.vectors(torch.empty(0, dtype=torch.int64)).shape[0] == 0


@pytest.mark.parametrize("levels", [[], [0], [3, 1], [-2]])
def test_levels_of_no_grid(levels: list[int]) -> None:
    with pytest.raises(ArgumentError, match="at least two levels"):
        FSQ(levels)

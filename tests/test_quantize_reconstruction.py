"""Blocks are learned as wholes on what the blocks before them give, and an interrupted quantization goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from zoo import InputError
from zoo.errors import CorruptWeightsError
from zoo.quantization.fp import LearningConfig, LowBitLayer
from zoo.quantization.packed import quantized_layers
from zoo.quantization.policy import Policy
from zoo.quantization.reconstruction import blocks_of
from zoo.quantization.report import LayerReport

METHOD = "fp4-e2m1"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Modulation:
    """Arguments of a block come in all sorts of things."""

    gate: Tensor


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.modulation = nn.Linear(32, dim)

    def modulate(self, x: Tensor) -> Modulation:
        """In the block, but no part of what it does when it is called."""
        return Modulation(1 + self.modulation(x).mean((0, 1)))

    def forward(self, x: Tensor, *, modulation: Modulation) -> Tensor:
        # In place, on its arguments.
        x.add_(0.1 * modulation.gate.mul_(1.01))
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + modulation.gate * self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Runs in inference mode, like the decoders of the zoo."""

    def __init__(self, depth: int = 2, dim: int = 48) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(32, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.head = nn.Linear(dim, 33)

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        modulations = [block.modulate(x) for block in self.blocks]
        x = self.stem(x)
        for block, modulation in zip(self.blocks, modulations, strict=True):
            x = block(x, modulation=modulation)
        return self.head(x)


MIXING = normal(6, 32, seed=99)
BATCHES = [normal(4, 12, 6, seed=seed) @ MIXING for seed in range(3)]
HELD_OUT = normal(16, 12, 6, seed=50) @ MIXING


def quantized(
    rounding: str, learning: LearningConfig | None = None, reports: list[LayerReport] | None = None, **settings: Any
) -> Transformer:
    on_layer: Callable[[LayerReport], object] = [].append if reports is None else reports.append
    settings = {"calibrate": BATCHES, "activations": "none", "rounding": rounding, "learning": learning} | settings
    return zoo.quantize(Transformer(), METHOD, on_layer=on_layer, **settings)


def outputs(model: Transformer, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """What the parts of a model put out."""
    found: dict[str, list[Tensor]] = {}
    names = ["blocks.0.modulation", "blocks.1.modulation", "stem", "blocks.0", "blocks.1", "head"]
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, result, name=name: found.setdefault(name, []).append(result.clone())
        )
        for name in names
    ]
    for batch in batches:
        model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(tensors) for name, tensors in found.items()}


def errors(model: Transformer, batches: Sequence[Tensor]) -> dict[str, float]:
    """Squared error of every part in its place, summed over channels, averaged over the rest."""
    wanted = outputs(Transformer(), batches)
    return {name: float((found - wanted[name]).square().sum(-1).mean()) for name, found in outputs(model, batches).items()}


def test_blocks_are_found() -> None:
    model = nn.ModuleDict({"inner": Transformer(), "convolutions": nn.Sequential(nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3))})
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv1d)]
    inside = tuple(f"inner.blocks.1.{name}" for name in ("qkv", "proj", "up", "down", "modulation"))
    found = blocks_of(model, layers, True)
    assert list(found) == ["inner.blocks.0", "inner.blocks.1"] and found["inner.blocks.1"] == inside
    assert blocks_of(model, [*inside[:1], "inner.head"], True) == {}
    assert blocks_of(model, layers, False) == {}
    assert list(blocks_of(model, layers, ("inner.blocks.*",))) == ["inner.blocks.0", "inner.blocks.1"]
    assert list(blocks_of(model, layers, ("convolutions", "inner"))) == ["inner", "convolutions"]
    nested = nn.Sequential(nn.Sequential(*[nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2)]), nn.Linear(2, 2))
    names = [name for name, module in nested.named_modules() if isinstance(module, nn.Linear)]
    assert list(blocks_of(nested, names, True)) == ["0.0", "0.1"]
    with pytest.raises(InputError, match=r"blocks: no module .* 'inner.head'"):
        blocks_of(model, layers, ("inner.head",))


def test_learning_blocks_lowers_the_error_of_their_outputs() -> None:
    nearest = errors(quantized("nearest"), [HELD_OUT])
    reports: list[LayerReport] = []
    model = quantized("learned", LearningConfig(iterations=120, blocks=True), reports)
    learned = errors(model, [HELD_OUT])
    for name in ("blocks.0", "blocks.1", "head"):
        assert learned[name] < 0.8 * nearest[name], name
    blocks = {report.name: report.block for report in reports}
    assert blocks["blocks.1.qkv"] == "blocks.1" and blocks["blocks.1.modulation"] == blocks["head"] == blocks["stem"] == ""
    assert len({report.output_error for report in reports if report.block == "blocks.0"}) == 1
    for report in reports:
        assert report.output_error is not None and report.output_error[1] < report.output_error[0]


def test_what_is_learned_stays_on_the_grid_of_the_nearest() -> None:
    nearest, learned = quantized("nearest"), quantized("learned", LearningConfig(iterations=40, blocks=True))
    original = Transformer()
    changed = 0
    for name, layer in quantized_layers(learned).items():
        other = nearest.get_submodule(name)
        assert isinstance(layer, LowBitLayer) and isinstance(other, LowBitLayer)
        assert torch.equal(layer.scale, other.scale)
        changed += int((layer.codes != other.codes).sum())
        # One of the two values around each weight: no farther than a step, which is a third of the value or less.
        weight = original.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        clipped = weight.flatten(1).clamp(-layer.scale * 6, layer.scale * 6)
        distance = (layer.weight.flatten(1) - clipped).abs()
        assert bool((distance <= torch.maximum(0.5 * layer.scale, clipped.abs() / 2) * 1.0001).all())
    assert changed > 100


def test_inputs_are_those_of_the_network_quantized_so_far() -> None:
    """Without any step of learning, the errors told are those of the nearest weights in their places."""
    reports: list[LayerReport] = []
    quantized("learned", LearningConfig(iterations=0, blocks=True), reports)
    expected = errors(quantized("nearest"), BATCHES)
    told = {report.block or report.name: report.output_error for report in reports}
    assert list(told) == ["blocks.0.modulation", "blocks.1.modulation", "stem", "blocks.0", "blocks.1", "head"]
    for name, found in told.items():
        assert found is not None
        assert found[0] == pytest.approx(expected[name], rel=1e-4)


def test_layers_that_are_not_called_are_learned_from_products() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.mixed = nn.Linear(32, 48)
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48))])

        def forward(self, x: Tensor) -> Tensor:
            x = F.linear(x, self.mixed.weight, self.mixed.bias)
            for block in self.blocks:
                x = block(x)
            return x

    reports: list[LayerReport] = []
    learning = LearningConfig(iterations=30, blocks=True)
    zoo.quantize(Functional(), METHOD, calibrate=BATCHES, learning=learning, on_layer=reports.append)
    assert [(report.name, report.block, report.activations) for report in reports] == [
        ("mixed", "", ""),
        ("blocks.0.0", "blocks.0", "e4m3fn"),
        ("blocks.0.2", "blocks.0", "e4m3fn"),
    ]
    assert all(report.output_error is not None and report.output_error[1] < report.output_error[0] for report in reports)


def test_nothing_is_left_behind() -> None:
    model, original = Transformer(), Transformer().state_dict()

    def stop(report: LayerReport) -> None:
        if report.name == "blocks.1.qkv":
            raise KeyboardInterrupt

    learning = LearningConfig(iterations=3, blocks=True)
    with pytest.raises(KeyboardInterrupt):
        zoo.quantize(model, METHOD, calibrate=BATCHES, learning=learning, on_layer=stop)
    assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and not parameter.is_inference() for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not quantized_layers(model)


def test_bad_settings() -> None:
    with pytest.raises(InputError, match="0 or more iterations on 1 or more calls"):
        LearningConfig(calls=0)
    with pytest.raises(InputError, match="0 or more iterations"):
        LearningConfig(iterations=-1)
    with pytest.raises(InputError, match="no module with several layers"):
        quantized("learned", LearningConfig(blocks=("nothing.*",)))
    with pytest.raises(InputError, match="calibrate is empty"):
        quantized("learned", LearningConfig(blocks=True), calibrate=[])


def test_calibration_that_reaches_no_layer_is_refused() -> None:
    with pytest.raises(InputError, match="no layer that is quantized was used while calibrating"):
        quantized("learned", run=lambda model, batch: None)


# ---------------------------------------------------------------------------------------------------------------- resuming


class Interrupted(Exception):
    pass


def interrupted_after(count: int) -> Callable[[LayerReport], None]:
    seen: list[str] = []

    def on_layer(report: LayerReport) -> None:
        seen.append(report.name)
        if len(seen) == count:
            raise Interrupted

    return on_layer


def same(a: nn.Module, b: nn.Module) -> bool:
    states = a.state_dict(), b.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(("count", "blocks"), [(3, False), (1, True), (7, True)], ids=["layers", "blocks", "within a block"])
def test_a_resumed_quantization_gives_the_same_bits(tmp_path: Path, count: int, blocks: bool) -> None:
    settings: dict[str, Any] = {"calibrate": BATCHES, "learning": LearningConfig(iterations=12, blocks=blocks)}
    expected: list[LayerReport] = []
    whole = zoo.quantize(Transformer(), "fp4", on_layer=expected.append, **settings)
    with pytest.raises(Interrupted):
        zoo.quantize(Transformer(), "fp4", resume=tmp_path / "run", on_layer=interrupted_after(count), **settings)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*.safetensors")}
    assert len(kept) >= count
    reports: list[LayerReport] = []
    resumed = zoo.quantize(Transformer(), "fp4", resume=tmp_path / "run", on_layer=reports.append, **settings)
    assert same(resumed, whole)
    assert torch.equal(resumed(HELD_OUT), whole(HELD_OUT))
    assert reports == expected
    # Finished layers were not made again.
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


@pytest.mark.parametrize("method", ["fp6-e3m2", "nvfp4", "binary-xnor"])
def test_every_kind_of_layer_comes_back(tmp_path: Path, method: str) -> None:
    first = zoo.quantize(Transformer(), method, resume=tmp_path, policy=Policy(skip=("head",)))
    again = zoo.quantize(Transformer(), method, resume=tmp_path, policy=Policy(skip=("head",)))
    assert same(first, again) and quantized_layers(again).keys() == quantized_layers(first).keys()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    learning = LearningConfig(iterations=2)

    def resume(model: nn.Module, method: str = "fp4", calibrate: Any = BATCHES, **settings: Any) -> None:
        zoo.quantize(model, method, resume=tmp_path, calibrate=calibrate, **({"learning": learning} | settings))

    resume(Transformer())
    other = Transformer()
    with torch.no_grad():
        other.head.bias[0] += 1
    with pytest.raises(InputError, match=r"resume: .* another model"):
        resume(other)
    assert not quantized_layers(other)
    for settings in ({"method": "int4"}, {"learning": LearningConfig(iterations=3)}, {"skip": "head"}):
        with pytest.raises(InputError, match="another method or other settings"):
            resume(Transformer(), **settings)
    with pytest.raises(InputError, match="another set of calibration inputs"):
        resume(Transformer(), calibrate=BATCHES[:2])
    [path, *_] = sorted(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorruptWeightsError):
        resume(Transformer())
    (tmp_path / "quantization.json").write_text("{")
    with pytest.raises(CorruptWeightsError, match="damaged"):
        resume(Transformer())

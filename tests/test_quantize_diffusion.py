"""What the paper claims, on a small flow model trained here: FP8 beats INT8, learned FP4 beats nearest FP4 and INT4."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from zoo.quantization.fp import Granularity, LearningConfig

LENGTH, DIM, DEPTH, STEPS = 32, 96, 3, 16

Trajectory = list[tuple[Tensor, Tensor]]


def normal(count: int, seed: int) -> Tensor:
    return torch.randn(count, LENGTH, generator=torch.Generator().manual_seed(seed))


def waves(count: int, seed: int) -> Tensor:
    """Sines of random frequency, phase and amplitude."""
    generator = torch.Generator().manual_seed(seed)
    frequency, phase, amplitude = (torch.rand(count, 1, generator=generator) for _ in range(3))
    t = torch.linspace(0, 1, LENGTH)
    return (0.5 + amplitude / 2) * torch.sin(2 * math.pi * ((1 + 3 * frequency) * t + phase))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.up, self.down, self.time = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x) + self.time(embedded))))


class Flow(nn.Module):
    """Velocity ``noise - wave`` at a time in (0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(LENGTH, DIM), nn.Linear(DIM, LENGTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        phases = t[:, None] * torch.logspace(0, 3, DIM // 2)
        embedded = torch.cat([phases.sin(), phases.cos()], 1)
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, embedded)
        velocity: Tensor = self.head(F.silu(x))
        return velocity


@torch.no_grad()
def sample(model: nn.Module, noise: Tensor, trajectory: Trajectory | None = None) -> Tensor:
    x = noise
    for step in range(STEPS, 0, -1):
        t = torch.full((len(x),), step / STEPS)
        if trajectory is not None:
            trajectory.append((x, t))
        x = x - model(x, t) / STEPS
    return x


@pytest.fixture(scope="module")
def flow() -> Flow:
    model, steps = Flow(), 300
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for step in range(steps):
        x, noise = waves(256, step), normal(256, step)
        t = torch.rand(256, generator=torch.Generator().manual_seed(step))
        loss = (model(torch.lerp(x, noise, t[:, None]), t) - (noise - x)).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    # Better than the velocity's own variance, 1.3, by far.
    assert float(loss.detach()) < 0.6
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def calibration(flow: Flow) -> Trajectory:
    """Inputs of the float model over all steps of sampling, as the paper records them."""
    trajectory: Trajectory = []
    sample(flow, normal(64, 1), trajectory)
    return trajectory


def quantized(flow: Flow, method: str, calibration: Trajectory, **settings: Any) -> Flow:
    return zoo.quantize(copy.deepcopy(flow), method, calibrate=calibration, **settings)


@pytest.mark.parametrize("per_channel", [True, False], ids=["channels", "tensors"])
def test_searched_fp8_beats_int8_and_plain_e4m3(flow: Flow, calibration: Trajectory, per_channel: bool) -> None:
    noise = normal(200, 2)
    wanted = sample(flow, noise)

    def psnr(method: str, clip: str) -> float:
        model = quantized(flow, method, calibration, granularity=Granularity(per_channel, clip=clip))
        return float(-10 * ((sample(model, noise) - wanted) / 2).square().mean().log10())

    searched = psnr("fp8", "search")
    assert searched > psnr("int8", "absmax")
    assert searched > psnr("fp8-e4m3", "absmax") + 6
    assert searched > 45


def test_learned_fp4_beats_nearest_on_every_block(flow: Flow, calibration: Trajectory) -> None:
    trajectory: Trajectory = []
    sample(flow, normal(100, 3), trajectory)

    def outputs(model: Flow) -> list[Tensor]:
        found: list[list[Tensor]] = [[] for _ in range(DEPTH)]
        for block, kept in zip(model.blocks, found, strict=True):
            block.register_forward_hook(lambda module, inputs, result, kept=kept: kept.append(result))
        for x, t in trajectory:
            model(x, t)
        return [torch.cat(kept) for kept in found]

    wanted = outputs(copy.deepcopy(flow))

    def ratios(method: str, **settings: Any) -> list[float]:
        found = outputs(quantized(flow, method, calibration, **settings))
        pairs = zip(found, wanted, strict=True)
        return [float(10 * (target.square().sum() / (other - target).square().sum()).log10()) for other, target in pairs]

    learned = ratios("fp4-e2m1", learning=LearningConfig(iterations=200, blocks=True))
    for nearest in (ratios("fp4-e2m1", rounding="nearest"), ratios("int4", rounding="nearest")):
        assert all(ours > theirs + 1 for ours, theirs in zip(learned, nearest, strict=True))

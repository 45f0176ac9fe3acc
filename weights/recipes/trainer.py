"""What recipes share: a schedule of optimiser steps with a progress bar, in a state that can be saved at any step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from zoo.media import replacing
from zoo.weights.recipes import image_data

Pictures = UInt8[np.ndarray, "count 3 height width"]
Images = Float[Tensor, "batch 3 height width"]
#: Draws a batch and returns its loss, and the terms of it for the log.
Step = Callable[[torch.Generator], tuple[Float[Tensor, ""], dict[str, float]]]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast something is trained.

    Attributes:
        steps: length in optimiser steps.
        rate: highest learning rate; it rises for ``warmup`` steps and falls along a cosine.
        minutes: time after which the schedule is at its end, however many steps were done.
        averaging: share of the running average of the weights that remains after a step.
    """

    steps: int
    rate: float
    minutes: float | None = None
    warmup: int = 50
    averaging: float = 0.98


class Trainer:
    """AdamW along a schedule, with a running average of the weights.

    Args:
        name: for the progress bar.
        groups: parameters to train, and by how much of the schedule's rate each group moves.
        step: gives the loss of a batch.
        schedule: its length and rate.
        seed: of the generator that batches are drawn with.
    """

    def __init__(
        self, name: str, groups: Sequence[tuple[Sequence[nn.Parameter], float]], step: Step, schedule: Schedule, seed: int
    ) -> None:
        self.name, self.loss, self.schedule = name, step, schedule
        self.shares = [share for _, share in groups]
        self.parameters = [parameter for parameters, _ in groups for parameter in parameters]
        self.optimizer = torch.optim.AdamW(
            [{"params": list(parameters)} for parameters, _ in groups], schedule.rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        self.rng = torch.Generator().manual_seed(seed)
        self.step, self.elapsed = 0, 0.0

    @property
    def progress(self) -> float:
        """Share of the schedule that is done, by steps or by time, whichever is further."""
        by_time = 0.0 if self.schedule.minutes is None else self.elapsed / (60 * self.schedule.minutes)
        return min(1.0, max(self.step / self.schedule.steps, by_time))

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns the terms of the loss."""
        started = time.monotonic()
        rising = min(1.0, (self.step + 1) / self.schedule.warmup)
        rate = self.schedule.rate * rising * 0.5 * (1 + math.cos(math.pi * self.progress))
        for group, share in zip(self.optimizer.param_groups, self.shares, strict=True):
            group["lr"] = rate * share
        loss, terms = self.loss(self.rng)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        # The average forgets the first weights sooner than its share says.
        remains = min(self.schedule.averaging, self.step / (self.step + 10))
        torch._foreach_lerp_(self.averages, [parameter.detach() for parameter in self.parameters], 1 - remains)
        self.elapsed += time.monotonic() - started
        return terms

    def run(self, save: Callable[[], None], every: float) -> None:
        """Train to the end of the schedule, calling ``save`` every so many seconds; the weights are their averages then."""
        terms: dict[str, float] = {}
        saved = time.monotonic()
        with tqdm(total=self.schedule.steps, initial=self.step, unit="step", desc=self.name, mininterval=10) as bar:
            while self.progress < 1:
                for name, value in self.train_step().items():
                    terms[name] = 0.98 * terms.get(name, value) + 0.02 * value
                bar.update()
                bar.set_postfix({name: f"{value:.4f}" for name, value in terms.items()}, refresh=False)
                if time.monotonic() - saved > every:
                    save()
                    saved = time.monotonic()
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.averages, strict=True):
                parameter.copy_(average)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on."""
        return {
            "parameters": [parameter.detach() for parameter in self.parameters],
            "averages": self.averages,
            "optimizer": self.optimizer.state_dict(),
            "rng": self.rng.get_state(),
            "step": self.step,
            "elapsed": self.elapsed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another trainer of the same schedule was."""
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        self.averages = state["averages"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.set_state(state["rng"])
        self.step, self.elapsed = state["step"], state["elapsed"]


def as_images(pixels: UInt8[np.ndarray, "batch 3 height width"]) -> Images:
    """8-bit pixels to the range of the models."""
    return torch.from_numpy(pixels).float() / 127.5 - 1


def rows(count: int, total: int, rng: torch.Generator) -> list[int]:
    """Random indices."""
    drawn: list[int] = torch.randint(total, (count,), generator=rng).tolist()
    return drawn


def make_pictures(path: Path, count: int, seed: int, processes: int = 2) -> Pictures:
    """The first pictures of a seed, mapped from a file that is written on the first call."""
    if not path.exists():
        with replacing(path) as temporary:
            size = image_data.SIZE
            array = np.lib.format.open_memmap(temporary, "w+", np.uint8, (count, 3, size, size))
            drawn = image_data.pictures(count, seed, processes)
            for index, picture in enumerate(tqdm(drawn, total=count, desc="pictures", mininterval=10)):
                array[index] = picture
            array.flush()
    pictures: Pictures = np.load(path, mmap_mode="r")
    return pictures

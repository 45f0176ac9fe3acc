"""Machinery of recipes: stages of optimiser steps, and training that shows its progress, writes checkpoints and resumes."""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from zoo.hub import write_saved_file
from zoo.media import replacing
from zoo.moved import names_of
from zoo.tokenizer import Tokenizer

ModelT = TypeVar("ModelT", bound=nn.Module)
TokenizerT = TypeVar("TokenizerT", bound=Tokenizer[Any, Any, Any])

# ----------------------------------------------------------------------------------------------------------------- stages


class Stage(ABC):
    """One schedule of optimiser steps, in a state that can be saved after any of them.

    Args:
        name: for the progress bar.
        steps, minutes: length of the schedule, whichever is over first; ``None`` for no limit of time.
        optimizers: with their highest learning rates.
        parts: modules that change, which a checkpoint holds under these names.
        rng: what batches are drawn with.
    """

    def __init__(
        self,
        name: str,
        steps: int,
        minutes: float | None,
        optimizers: Sequence[torch.optim.Optimizer],
        parts: Mapping[str, nn.Module],
        rng: torch.Generator,
    ) -> None:
        self.name, self.steps, self.minutes = name, steps, minutes
        self.optimizers, self.parts = list(optimizers), dict(parts)
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.rng = rng
        self.step, self.elapsed = 0, 0.0

    @abstractmethod
    def update(self) -> dict[str, float]:
        """One optimiser step; returns what the progress bar shows, such as the terms of the loss."""

    def finish(self) -> None:  # noqa: B027  (not every stage has something to do)
        """Do what is left when the schedule is over."""

    @property
    def progress(self) -> float:
        """Share of the schedule that is done, by steps or by time, whichever is further."""
        by_time = 0.0 if self.minutes is None else self.elapsed / (60 * self.minutes)
        return min(1.0, max(self.step / self.steps, by_time))

    def train_step(self) -> dict[str, float]:
        """`update`, with its step and its time counted."""
        started = time.monotonic()
        terms = self.update()
        self.step += 1
        self.elapsed += time.monotonic() - started
        return terms

    def set_rates(self, warmup: int, min_lr_ratio: float = 0.0) -> None:
        """Learning rates that rise for ``warmup`` steps and fall along a cosine to a share ``min_lr_ratio`` of the highest."""
        falling = min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * self.progress))
        share = min(1.0, (self.step + 1) / warmup) * falling
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share

    def optimizer_step(self, loss: Float[Tensor, ""], parameters: Iterable[nn.Parameter], max_norm: float = 1.0) -> None:
        """Backpropagate, clip the gradient norm of ``parameters`` to ``max_norm``, and step the optimisers."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, max_norm)
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """State that `load_state_dict` needs to go on."""
        return {name: part.state_dict() for name, part in self.parts.items()} | {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": self.rng.get_state(),
            "step": self.step,
            "elapsed": self.elapsed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another stage of the same recipe was."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.rng.set_state(state["rng"])
        self.step, self.elapsed = state["step"], state["elapsed"]


def muon_and_adamw(
    matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter], rate: float, other_rate: float
) -> list[torch.optim.Optimizer]:
    """Muon (orthogonalised momentum) for matrices of transformers, AdamW for everything else."""
    return [
        torch.optim.Muon(matrices, rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, other_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


@dataclass(frozen=True)
class Schedule:
    """Length and rate of training something.

    Attributes:
        steps: length in optimiser steps.
        rate: highest learning rate; it rises for ``warmup`` steps and falls along a cosine.
        minutes: time after which the schedule is at its end, however many steps were done.
        ema_decay: share of the running average of the weights that remains after a step.
    """

    steps: int
    rate: float
    minutes: float | None = None
    warmup: int = 50
    ema_decay: float = 0.98


#: Draws a batch and returns its loss, and the terms of it for the log.
Objective = Callable[[torch.Generator], tuple[Float[Tensor, ""], dict[str, float]]]


class Trainer(Stage):
    """AdamW along a schedule, with a running average of the weights, which they become at its end.

    Args:
        name: for the progress bar.
        groups: parameters to train, and by how much of the schedule's rate each group moves.
        step: gives the loss of a batch.
        schedule: its length and rate.
        seed: of the generator that batches are drawn with.
    """

    def __init__(
        self, name: str, groups: Sequence[tuple[Sequence[nn.Parameter], float]], step: Objective, schedule: Schedule, seed: int
    ) -> None:
        self.loss, self.schedule = step, schedule
        self.parameters = [parameter for parameters, _ in groups for parameter in parameters]
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        moving = [{"params": list(parameters), "lr": schedule.rate * share} for parameters, share in groups]
        optimizer = torch.optim.AdamW(moving, betas=(0.9, 0.98), weight_decay=0.0)
        rng = torch.Generator().manual_seed(seed)
        super().__init__(name, schedule.steps, schedule.minutes, [optimizer], {}, rng)

    def update(self) -> dict[str, float]:
        self.set_rates(self.schedule.warmup)
        loss, terms = self.loss(self.rng)
        self.optimizer_step(loss, self.parameters)
        # The average forgets the first weights sooner than its share says.
        remains = min(self.schedule.ema_decay, (self.step + 1) / (self.step + 11))
        torch._foreach_lerp_(self.averages, [parameter.detach() for parameter in self.parameters], 1 - remains)
        return terms

    @torch.no_grad()
    def finish(self) -> None:
        """Put the running averages in the place of the weights."""
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            parameter.copy_(average)

    def state_dict(self) -> dict[str, Any]:
        parameters = [parameter.detach() for parameter in self.parameters]
        return super().state_dict() | {"parameters": parameters, "averages": self.averages}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
            parameter.copy_(saved)
        self.averages = state["averages"]


# --------------------------------------------------------------------------------------------------------------- training


class Training(ABC, Generic[ModelT]):
    """Run a recipe's stages in order; resumable after any step.

    Attributes:
        recipe: its dataclass; checkpoints of another one are refused.
        model: what is trained.
        index: of the stage that is going on.
        stage: that stage.
    """

    stages: ClassVar[int] = 1
    #: Whether the model is of use, and written, before the last stage is over.
    writes_early: ClassVar[bool] = True

    def __init__(self, recipe: Any, model: ModelT) -> None:
        self.recipe, self.model = recipe, model
        self._enter(0)

    def prepare(self, index: int) -> None:
        """Change the model before a stage begins, by closed forms say; a checkpoint of that stage holds the result."""

    @abstractmethod
    def make_stage(self, index: int) -> Stage:
        """A stage from its beginning, from the model as it is."""

    @abstractmethod
    def snapshot(self) -> ModelT:
        """The model as it would be shipped now."""

    def write(self, model: Any, out: Path) -> None:
        """Write the file that is shipped: in half precision, with the configuration in its metadata."""
        write_saved_file(model, out, dtype=torch.float16)

    def _enter(self, index: int) -> None:
        self.prepare(index)
        self._begin(index)

    def _begin(self, index: int) -> None:
        self.index = index
        # The model that a stage starts from lies in a file without a name until a checkpoint is written, beside which it is
        # copied: a stage is made from it again when a run is resumed.
        self._start = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the stage goes on)
        torch.save(self.model.state_dict(), self._start)
        self._started: Path | None = None
        self.start_random = torch.get_rng_state()
        self.stage = self.make_stage(index)

    def advance(self) -> bool:
        """Finish a stage whose schedule is over and enter the next; false behind the last."""
        self.stage.finish()
        if self.index + 1 == self.stages:
            return False
        self._enter(self.index + 1)
        return True

    def save(self, path: Path) -> None:
        """Write a checkpoint to resume from, and once for each stage the model that it starts from, beside it."""
        start = start_file(path, self.index)
        if self._started != start:
            self._start.seek(0)
            with replacing(start) as temporary, temporary.open("wb") as file:
                shutil.copyfileobj(self._start, file)
            self._started = start
        state = {
            "recipe": asdict(self.recipe),
            "index": self.index,
            "stage": self.stage.state_dict(),
            "random": [self.start_random, torch.get_rng_state()],
        }
        with replacing(path) as temporary:
            torch.save(state, temporary)
        # Only now is that of the stage before of no use.
        for index in range(self.index):
            start_file(path, index).unlink(missing_ok=True)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint of the same recipe.

        Raises:
            ValueError: it was made by another recipe.
        """
        self.resume(read_checkpoint(path, self.recipe))

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue from the content of a checkpoint."""
        # Starts of weights and dropout draw from the global generator.
        start_random, random = state["random"]
        self.model.load_state_dict(state["start"])
        torch.set_rng_state(start_random)
        self._begin(state["index"])
        self.stage.load_state_dict(state["stage"])
        torch.set_rng_state(random)


def start_file(checkpoint: Path, index: int) -> Path:
    """The file of the model that a stage started from, beside a checkpoint of that stage."""
    return checkpoint.with_suffix(f".start{index}.pt")


def read_checkpoint(path: Path, recipe: Any) -> dict[str, Any]:
    """Read what `Training.save` wrote; ``start`` is the model that the stage began with, mapped from its file.

    Raises:
        ValueError: it was made by another recipe.
    """
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if state["recipe"] != asdict(recipe):
        raise ValueError(f"{path} belongs to another recipe: {state['recipe']}; delete it or use the same settings")
    if "start" not in state:  # checkpoints of the release before hold it themselves
        state["start"] = torch.load(start_file(path, state["index"]), map_location="cpu", weights_only=True, mmap=True)
    return state


def run(recipe: Any, out: Path, begin: Callable[[], Training[ModelT]], checkpoint_seconds: float) -> ModelT:
    """Train, or go on training, until the last schedule ends.

    Args:
        recipe: its dataclass.
        out: the file that is shipped; a checkpoint lies beside it until the end.
        begin: makes the training, and what it needs.
        checkpoint_seconds: seconds after which ``out`` and the checkpoint are written again.

    Raises:
        ValueError: the checkpoint was made by another recipe.
    """
    checkpoint = out.with_suffix(".checkpoint.pt")
    # Before anything that takes minutes.
    resumed = read_checkpoint(checkpoint, recipe) if checkpoint.exists() else None
    training = begin()
    if resumed is not None:
        training.resume(resumed)
    while True:
        _run_stage(training, out, checkpoint, checkpoint_seconds)
        if not training.advance():
            break
        training.save(checkpoint)
    model = training.snapshot()
    training.write(model, out)
    checkpoint.unlink(missing_ok=True)
    for index in range(training.stages):
        start_file(checkpoint, index).unlink(missing_ok=True)
    return model


def _run_stage(training: Training[Any], out: Path, checkpoint: Path, checkpoint_seconds: float) -> None:
    """Train to the end of a stage's schedule."""
    stage = training.stage
    averages: dict[str, float] = {}
    saved = time.monotonic()
    with tqdm(total=stage.steps, initial=stage.step, unit="step", desc=stage.name, mininterval=10) as bar:
        while stage.progress < 1:
            for name, value in stage.train_step().items():
                averages[name] = 0.98 * averages.get(name, value) + 0.02 * value
            bar.update()
            bar.set_postfix({name: f"{value:.4f}" for name, value in averages.items()}, refresh=False)
            if time.monotonic() - saved > checkpoint_seconds:
                training.save(checkpoint)
                if training.writes_early:
                    # When a file is due depends on the clock, and what training draws must not.
                    with torch.random.fork_rng(devices=[]):
                        training.write(training.snapshot(), out)
                saved = time.monotonic()


@torch.no_grad()
def shipped(model: TokenizerT, state: Mapping[str, Tensor] | None = None) -> TokenizerT:
    """A copy of a tokenizer with weights rounded to half precision, and the fingerprint of these.

    Args:
        model: what to copy.
        state: its weights, where they are not the model's own.
    """
    copied = type(model)(model.config, name=model.name)
    weights = model.state_dict() if state is None else state
    copied.load_state_dict({key: as_stored(tensor) for key, tensor in weights.items()})
    copied.reset_buffers()
    copied.eval().requires_grad_(False)
    copied.fingerprint = copied.compute_fingerprint()
    return copied


def as_stored(tensor: Tensor) -> Tensor:
    """Real numbers as they come back from a file in half precision; others as they are."""
    return tensor.half().float() if tensor.is_floating_point() else tensor


def recipe_parser(description: str | None, seed: int, timed: bool = True) -> argparse.ArgumentParser:
    """The options that recipes have in common: ``--out``, ``--seed`` and, unless not ``timed``, ``--minutes``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    if timed:
        parser.add_argument("--minutes", type=float, help="minutes of training after which to end; by steps otherwise")
    parser.add_argument("--seed", type=int, default=seed)
    return parser


#: Former names, for one release.
__getattr__ = names_of(
    __name__,
    {
        **dict.fromkeys(("Images", "Pictures", "as_images", "make_pictures"), "zoo.weights.data.image"),
        "Step": "zoo.weights.recipes.trainer:Objective",
        "rows": "zoo.weights.data.image:random_rows",
    },
)

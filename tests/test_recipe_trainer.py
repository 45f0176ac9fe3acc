"""What all recipes share: stages in a row that can be stopped after any step, and the files that they write."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from small_models import SMALL_SEED, SMALL_TOKENFLOW
from zoo.weights.data import image as image_data
from zoo.weights.recipes import seed, tokenflow, trainer
from zoo.weights.recipes.trainer import Schedule, Training


@dataclass(frozen=True)
class Recipe:
    """Of the toy below."""

    steps: int = 4
    minutes: float | None = None
    seed: int = 3


class ToyStage(trainer.Stage):
    """A linear map of noise, by two optimisers."""

    #: Draws from the global generator, as dropout does.
    careless = False

    def __init__(self, recipe: Recipe, model: nn.Linear, name: str) -> None:
        self.model = model
        optimizers = [torch.optim.SGD([model.weight], 0.1), torch.optim.SGD([model.bias], 0.2)]
        rng = torch.Generator().manual_seed(recipe.seed)
        super().__init__(name, recipe.steps, recipe.minutes, optimizers, {"model": model}, rng)

    def update(self) -> dict[str, float]:
        self.set_rates(warmup=2)
        noise = torch.randn(5, 4, generator=None if self.careless else self.rng)
        loss = (self.model(noise[:, :3]) - noise[:, 3:]).square().mean()
        self.optimizer_step(loss, self.model.parameters())
        return {"loss": loss.item()}

    def finish(self) -> None:
        with torch.no_grad():
            self.model.weight.mul_(2)


class Toy(Training[nn.Linear]):
    """Two stages, before the second of which the weights are turned round."""

    stages = 2

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(recipe.seed)
        super().__init__(recipe, nn.Linear(3, 1))

    def prepare(self, index: int) -> None:
        if index == 1:
            with torch.no_grad():
                self.model.weight.copy_(self.model.weight.flip(1))

    def make_stage(self, index: int) -> ToyStage:
        return ToyStage(self.recipe, self.model, ("first", "second")[index])

    def snapshot(self) -> nn.Linear:
        torch.rand(17)
        return self.model

    def write(self, model: nn.Linear, out: Path) -> None:
        torch.save(model.state_dict(), out)


def stopped_after(updates: int, training: Training) -> Training:
    """The training, which somebody ends after so many steps."""
    enter, done = training._begin, 0

    def watched(update: Callable[[], dict[str, float]]) -> Callable[[], dict[str, float]]:
        def counted() -> dict[str, float]:
            nonlocal done
            if done == updates:
                raise KeyboardInterrupt
            done += 1
            return update()

        return counted

    def begin(index: int) -> None:
        enter(index)
        training.stage.update = watched(training.stage.update)

    training._begin = begin
    training.stage.update = watched(training.stage.update)
    return training


def weights(model: nn.Module) -> Tensor:
    return torch.cat([tensor.detach().float().flatten() for tensor in model.state_dict().values()])


def test_rates_rise_and_fall() -> None:
    stage = ToyStage(Recipe(steps=10), nn.Linear(3, 1), "stage")
    found = []
    for stage.step in range(10):
        stage.set_rates(warmup=4, min_lr_ratio=0.1)
        found.append([optimizer.param_groups[0]["lr"] for optimizer in stage.optimizers])
    expected = [min(1, (i + 1) / 4) * (0.1 + 0.45 * (1 + math.cos(math.pi * i / 10))) for i in range(10)]
    assert np.allclose(np.array(found), np.outer(expected, [0.1, 0.2]))


def test_the_schedule_ends_with_the_steps_or_the_minutes() -> None:
    stage = ToyStage(Recipe(steps=100, minutes=10.0), nn.Linear(3, 1), "stage")
    assert stage.progress == 0
    stage.step = 25
    assert stage.progress == 0.25
    stage.elapsed = 300.0
    assert stage.progress == 0.5
    stage.elapsed = 6000.0
    assert stage.progress == 1


@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1e9])
def test_what_is_written_on_the_way_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint_seconds: float
) -> None:
    """Snapshots draw random numbers, and when they are due depends on the clock."""
    monkeypatch.setattr(ToyStage, "careless", True)
    made = trainer.run(Recipe(), tmp_path / "toy.pt", lambda: Toy(Recipe()), checkpoint_seconds)
    by_hand = Toy(Recipe())
    for _ in range(4):
        by_hand.stage.train_step()
    assert by_hand.advance()
    for _ in range(4):
        by_hand.stage.train_step()
    assert not by_hand.advance()
    assert torch.equal(weights(made), weights(by_hand.model))
    assert [path.name for path in tmp_path.iterdir()] == ["toy.pt"], "no checkpoint is left"
    assert torch.equal(torch.load(tmp_path / "toy.pt")["weight"], made.weight)


def test_the_start_of_a_stage_is_a_file_beside_the_checkpoint(tmp_path: Path) -> None:
    """And not a second model in memory, nor in every checkpoint."""
    training, checkpoint = Toy(Recipe()), tmp_path / "toy.checkpoint.pt"
    begun = weights(training.model)
    training.stage.train_step()
    training.save(checkpoint)
    assert not [name for name, value in vars(training).items() if isinstance(value, dict)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.checkpoint.pt", "toy.checkpoint.start0.pt"]
    assert "start" not in torch.load(checkpoint)
    found = trainer.read_checkpoint(checkpoint, Recipe())
    assert torch.equal(torch.cat([tensor.flatten() for tensor in found["start"].values()]), begun)
    written = trainer.start_file(checkpoint, 0).stat().st_mtime_ns
    training.stage.train_step()
    training.save(checkpoint)
    assert trainer.start_file(checkpoint, 0).stat().st_mtime_ns == written, "written once"
    training.advance()
    training.save(checkpoint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.checkpoint.pt", "toy.checkpoint.start1.pt"]


def test_a_checkpoint_of_the_release_before_holds_its_start(tmp_path: Path) -> None:
    training, checkpoint = Toy(Recipe()), tmp_path / "toy.checkpoint.pt"
    begun = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    training.stage.train_step()
    training.save(checkpoint)
    torch.save(torch.load(checkpoint) | {"start": begun}, checkpoint)
    trainer.start_file(checkpoint, 0).unlink()
    resumed = Toy(Recipe())
    resumed.restore(checkpoint)
    for each in (training, resumed):
        each.stage.train_step()
    assert torch.equal(weights(resumed.model), weights(training.model))


def test_a_model_of_no_use_is_not_written_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for early in (True, False):
        monkeypatch.setattr(Toy, "writes_early", early)
        out = tmp_path / f"{early}.pt"
        with pytest.raises(KeyboardInterrupt):
            trainer.run(Recipe(), out, lambda: stopped_after(2, Toy(Recipe())), 0.0)
        assert out.exists() is early and out.with_suffix(".checkpoint.pt").exists()


def test_a_checkpoint_of_another_recipe_is_refused_before_any_work(tmp_path: Path) -> None:
    Toy(Recipe()).save(tmp_path / "toy.checkpoint.pt")

    def begin() -> Toy:
        raise AssertionError("something was made")

    with pytest.raises(ValueError, match="another recipe"):
        trainer.run(Recipe(steps=5), tmp_path / "toy.pt", begin, 0.0)


# ---- recipes of several stages, stopped in each of them


def seed_training(pictures: np.ndarray) -> Training:
    schedules = {name: Schedule(2, 1e-3) for name in ("embedding", "codes", "images", "diffusion")}
    recipe = seed.Recipe(pictures=len(pictures), batch=4, image_batch=2, diffusion_batch=3, seed=5, **schedules)
    diffusion = {**SMALL_SEED.diffusion, "vae": {**SMALL_SEED.diffusion["vae"], "block_out_channels": [8, 8, 8]}}
    return seed.Training(recipe, pictures, replace(SMALL_SEED, diffusion=diffusion))


def tokenflow_training(pictures: np.ndarray) -> Training:
    sizes = {"encoder_widths": (16, 64, 64), "norm_groups": 1, "feature_dim": 32, "image_size": 128, "patch_size": 32}
    short = Schedule(2, 1e-3)
    recipe = tokenflow.Recipe(pictures=len(pictures), teacher=short, decoders=short, teacher_batch=6, kept=5, batch=3, seed=5)
    return tokenflow.Training(recipe, pictures, replace(SMALL_TOKENFLOW, **sizes), passes=1)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.stack([image_data.picture(index, seed=5) for index in range(12)])


@pytest.mark.parametrize(
    ("make", "stops"),
    [
        pytest.param(lambda _: Toy(Recipe(steps=2)), (1, 2, 3), id="toy"),
        pytest.param(seed_training, (3, 6), id="seed"),
        pytest.param(tokenflow_training, (1, 3), id="tokenflow", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_goes_on_as_an_uninterrupted_one(
    make: Callable[[np.ndarray], Training],
    stops: tuple[int, ...],
    pictures: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where dropout or a start of weights draws from the global generator; every stage has two steps here."""
    monkeypatch.setattr(ToyStage, "careless", True)
    recipe = make(pictures).recipe
    whole = trainer.run(recipe, tmp_path / "whole.safetensors", lambda: make(pictures), 1e9)
    for stop in stops:
        out = tmp_path / f"{stop}.safetensors"
        with pytest.raises(KeyboardInterrupt):
            trainer.run(recipe, out, lambda stop=stop: stopped_after(stop, make(pictures)), 0.0)
        saved = trainer.read_checkpoint(out.with_suffix(".checkpoint.pt"), recipe)
        assert (saved["index"], saved["stage"]["step"]) == divmod(stop, 2)
        torch.rand(1000)  # another process would not have this process's global random state
        resumed = trainer.run(recipe, out, lambda: make(pictures), 1e9)
        assert (weights(resumed) - weights(whole)).abs().max() < 1e-4

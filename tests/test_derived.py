"""Values that are kept until the weights change that they were computed from."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import nn

from zoo.derived import Derived


class Summed(nn.Module):
    """The sum of two weights, and how often it was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (nn.Parameter(torch.full((2,), value)) for value in (1.0, 2.0))
        self.derived: Derived[torch.Tensor] = Derived()
        self.times = 0

    def compute(self) -> torch.Tensor:
        self.times += 1
        return (self.one + self.other).detach()

    def total(self) -> float:
        return float(self.derived.of([self.one, self.other], self.compute).sum())


def test_it_is_computed_once_until_a_source_changes() -> None:
    module = Summed()
    assert (module.total(), module.total(), module.times) == (6, 6, 1)
    with torch.no_grad():
        module.other.add_(1)
    assert (module.total(), module.total(), module.times) == (8, 8, 2)
    module.load_state_dict({"one": torch.zeros(2), "other": torch.ones(2)})
    assert (module.total(), module.times) == (2, 3)
    module.one = nn.Parameter(torch.full((2,), 4.0))
    assert (module.total(), module.times) == (10, 4)
    assert module.double().total() == 10 and module.times == 5


def test_writes_that_pytorch_does_not_count_are_noticed() -> None:
    with torch.inference_mode():
        module = Summed()
        assert (module.total(), module.total(), module.times) == (6, 6, 1)
        module.one.add_(1)
        assert (module.total(), module.total(), module.times) == (8, 8, 2)


def test_values_may_take_part_in_training_whatever_the_mode() -> None:
    kept: Derived[torch.Tensor] = Derived()
    weight = nn.Parameter(torch.ones(3))
    with torch.inference_mode():
        value = kept.of([weight], lambda: weight * 2)
    assert not value.is_inference() and not value.requires_grad


def test_copies_compute_their_own() -> None:
    module = Summed()
    module.total()
    for same in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with torch.no_grad():
            same.one.fill_(3)
        assert (same.total(), same.times, module.total(), module.times) == (10, 2, 6, 1)

"""Checkpoints whose state dict lies inside something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.state_dict import read_state

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(2)}
OTHER = {"weight": torch.ones(2, 3)}


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3},
        {"generator": STATE},
        {"model": STATE, "optimizer": {"step": 1}},
        {"ema": STATE, "model": OTHER},
        {"ema": {"state_dict": STATE}, "generator": OTHER},
        {"state_dict": {"generator": STATE}},
    ],
    ids=["bare", "state_dict", "generator", "model", "ema before model", "ema, then state_dict", "state_dict, then generator"],
)
def test_state_dicts_are_unwrapped(content: dict[str, Any], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    found = read_state(tmp_path / "checkpoint.pt")
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in STATE.items())


def test_a_tensor_named_like_a_level_is_an_entry(tmp_path: Path) -> None:
    torch.save({"ema": torch.ones(3), "model": torch.zeros(2)}, tmp_path / "checkpoint.pt")
    assert read_state(tmp_path / "checkpoint.pt").keys() == {"ema", "model"}


def test_only_wanted_entries_are_read_and_others_than_tensors_are_left_out(tmp_path: Path) -> None:
    torch.save({"generator": STATE | {"steps": 7}}, tmp_path / "checkpoint.pt")
    assert read_state(tmp_path / "checkpoint.pt", lambda key: key != "bias").keys() == {"weight"}


def test_something_else_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(3)], tmp_path / "checkpoint.pt")
    with pytest.raises(zoo.WeightsError, match="no state dict but a list"):
        read_state(tmp_path / "checkpoint.pt")

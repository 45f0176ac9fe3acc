"""Official checkpoints to ours: names, the sizes that shapes tell, and what these have to agree with."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import zoo
from zoo.checkpoint import layer_numbers, renamed, require_agreement, shape_of

STATE = {f"net.{i}.weight": torch.zeros(i + 1, 2) for i in (0, 2, 10)} | {"net.2.norm.weight": torch.ones(3)}


@dataclass(frozen=True)
class Config:
    """Of the state above."""

    width: int = 2
    depth: int = 3


def test_every_wanted_entry_gets_our_name() -> None:
    def our_key(key: str) -> str | None:
        return key.replace("net", "ours") if key.endswith("0.weight") else None

    named = renamed(STATE, our_key, "Toy", wanted=lambda key: ".2." not in key)
    assert {name: len(tensor) for name, tensor in named.items()} == {"ours.0.weight": 1, "ours.10.weight": 11}
    with pytest.raises(zoo.KeysError, match=r"unexpected in a Toy checkpoint: net\.2\.norm\.weight, net\.2\.weight$"):
        renamed(STATE, our_key, "Toy")


def test_shapes_and_layers_are_read() -> None:
    assert shape_of(STATE, "net.10.weight", rank=2) == (11, 2)
    with pytest.raises(zoo.KeysError, match=r"missing: net\.1\.weight"):
        shape_of(STATE, "net.1.weight")
    with pytest.raises(zoo.KeysError, match=r"net\.2\.norm\.weight is \[3\]"):
        shape_of(STATE, "net.2.norm.weight", rank=2)
    assert layer_numbers(STATE, "net") == [0, 2, 10]
    assert layer_numbers(STATE, "net", "norm.") == [2]
    assert layer_numbers(STATE, "et") == []


def test_disagreement_names_the_fields() -> None:
    require_agreement(Config(), None)
    require_agreement(Config(), Config())
    require_agreement(Config(width=5), Config(), besides=["width"])
    with pytest.raises(zoo.KeysError, match=r"its configuration: width is 5 in the tensors and 2 in the configuration$"):
        require_agreement(Config(width=5), Config())

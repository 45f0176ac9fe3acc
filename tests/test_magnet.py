"""MAGNET gives the original's states, boundaries and losses, and nothing of it looks ahead."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import zoo
from zoo.codecs.word_pool.magnet import Magnet, MagnetConfig, boundary_loss, pool, sampled


def case(golden: Path) -> tuple[dict[str, Any], dict[str, Tensor], Magnet]:
    folder = golden / "word_pool" / "magnet_3scripts"
    config = json.loads((folder / "config.json").read_text())
    layers = [int(count) for count in re.findall(r"\d+", config["model_config"])]
    model = Magnet(
        MagnetConfig(
            config["n_token"],
            config["d_model"],
            config["n_head"],
            config["d_head"],
            config["d_inner"],
            (layers[0], layers[1], layers[2]),
            tuple(config["scripts"]),
            tuple(script["prior"] for script in config["scripts"].values()),
            config["temp"],
        )
    )
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    return config, load_file(folder / "io.safetensors"), model.eval().requires_grad_(False)


def test_the_originals_states(golden: Path) -> None:
    config, io, model = case(golden)
    ids = io["input_ids"].long()
    logits = model(ids)
    for script, facts in config["scripts"].items():
        rows = ids[:, 0] == facts["id"]
        found = model.run(ids[rows, 1:], script)
        names = ("pre", "boundary_logits", "pooled", "middle", "upsampled")
        parts = (found.before, found.boundary_logits, found.pooled, found.words, found.spread)
        for name, part in zip(names, parts, strict=True):
            torch.testing.assert_close(part, io[f"{script}.{name}"], atol=2e-5, rtol=2e-5)
        assert torch.equal(found.boundaries, io[f"{script}.boundaries"].float())
        torch.testing.assert_close(found.logits, io[f"{script}.logits"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits[rows], found.logits, atol=1e-5, rtol=1e-5)
        hard, soft = sampled(found.boundary_logits, io[f"{script}.noise"], config["temp"])
        torch.testing.assert_close(soft, io[f"{script}.soft_sampled"], atol=2e-5, rtol=2e-5)
        assert torch.equal(hard.round(), io[f"{script}.hard_sampled"].float())
        loss = boundary_loss(hard, facts["prior"])
        torch.testing.assert_close(loss, io[f"{script}.boundary_loss"][0], atol=2e-5, rtol=2e-5)
    edge = pool(io["edge.hidden"], io["edge.boundaries"].float(), io["edge.null"].view(1, 1, -1))
    torch.testing.assert_close(edge, io["edge.pooled"], atol=2e-5, rtol=2e-5)


def test_nothing_looks_ahead(golden: Path) -> None:
    """So padding behind a row changes nothing, and a row is the same alone and among others."""
    _, io, model = case(golden)
    ids = io["input_ids"].long()
    whole = model(ids)
    for row in range(len(ids)):
        torch.testing.assert_close(model(ids[row : row + 1, :20])[0], whole[row, :19], atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_predictor(golden: Path) -> None:
    config, io, model = case(golden)
    model.requires_grad_(True)
    script, facts = next(iter(config["scripts"].items()))
    ids = io["input_ids"].long()
    found = model.run(ids[ids[:, 0] == facts["id"], 1:], script, io[f"{script}.noise"])
    (found.logits.square().mean() + boundary_loss(found.boundaries, facts["prior"])).backward()
    weight = model.script_to_bp_layers[script].boundary_predictor[0].weight
    assert weight.grad is not None and float(weight.grad.abs().max()) > 0


def test_what_does_not_fit(golden: Path) -> None:
    with pytest.raises(zoo.InputError, match="2 scripts do not go with 1 priors"):
        Magnet(MagnetConfig(scripts=("a", "b"), priors=(0.1,)))
    _, io, model = case(golden)
    ids = io["input_ids"].long().clone()
    ids[2, 0] = 5
    with pytest.raises(zoo.InputError, match="row 2 does not begin with the id of a script"):
        model(ids)

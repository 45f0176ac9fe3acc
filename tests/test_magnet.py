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
from zoo.codecs.magnet import Magnet, MagnetConfig, MagnetTokenizer, boundary_loss, pool, sampled


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


# ------------------------------------------------------------------------------------------------------------ as a tokenizer

TEXTS = ["The quick fox.", "नमस्ते दुनिया", "Привет, мир", b"\xff\x00", "", "123"]


@pytest.fixture(scope="module")
def tok(golden: Path) -> MagnetTokenizer:
    folder = golden / "word_pool" / "magnet_3scripts"
    found = zoo.load_upstream("magnet", folder / "config.json", folder / "weights.safetensors")
    assert isinstance(found, MagnetTokenizer)
    return found


def test_the_originals_words_and_vectors(golden: Path, tok: MagnetTokenizer) -> None:
    config, io, model = case(golden)
    ids = io["input_ids"].long()
    texts = tok.decode([row.tolist() for row in ids])
    for row, text in zip(ids, texts, strict=True):
        script = tok.config.scripts[int(row[0]) - 259]
        tokens = tok.encode(text, script=script)
        assert tokens.tolist() == [row.tolist()]
        # The case pads words to those of the row of a script that has most.
        rows = ids[ids[:, 0] == row[0], 1:]
        place = rows.eq(row[1:]).all(1).nonzero()[0, 0]
        ends = (io[f"{script}.boundaries"][place] > 0).nonzero()[:, 0] + 1
        assert tok.words(tokens)[0].tolist() == ends.tolist()
        expected = model.down_ln(io[f"{script}.pooled"][place, 1 : len(ends) + 1])
        torch.testing.assert_close(tok.embed(tokens)[0], expected, atol=2e-5, rtol=2e-5)
    assert set(config["scripts"]) == set(tok.config.scripts)


def test_scripts_route_and_texts_come_back(tok: MagnetTokenizer, tmp_path: Path) -> None:
    tokens = tok.encode(TEXTS)
    assert [row[0] for row in tokens.tolist()] == [259, 260, 261, 259, 259, 259]
    for options in ({}, {"specials": "none"}, {"script": "cyrl"}):
        assert tok.decode(tok.encode(TEXTS, **options)) == TEXTS
    assert tok.encode("a", script="cyrl").tolist() == [[261, 100]]
    bare = tok.encode(TEXTS, specials="none")
    assert bare.tolist() == [row[1:] for row in tokens.tolist()]
    assert all(torch.equal(one, other) for one, other in zip(tok.words(bare), tok.words(tokens), strict=True))
    assert tok.spans(tokens)[0][:2].tolist() == [[0, 0], [0, 1]]
    vectors = tok.embed(tokens)
    for index, (alone, ends) in enumerate(zip(tokens, tok.words(tokens), strict=True)):
        torch.testing.assert_close(tok.embed(alone)[0], vectors[index, : len(ends)], atol=1e-5, rtol=1e-5)
        assert not vectors[index, len(ends) :].any()
    tok.save_pretrained(tmp_path)
    again = zoo.load(f"local-dir:{tmp_path}")
    assert again.encode(TEXTS).equal(tokens)
    torch.testing.assert_close(again.embed(tokens), vectors)


def test_what_the_tokenizer_refuses(tok: MagnetTokenizer, golden: Path) -> None:
    with pytest.raises(zoo.ArgumentError, match="script is one of latin, deva, cyrl, not 'greek'"):
        tok.encode("a", script="greek")
    with pytest.raises(zoo.ItemError, match="item 0: id 263 stands for no script"):
        tok.words([[263, 100]])
    with pytest.raises(zoo.ItemError, match="item 1: 9000 bytes are more than the 8192"):
        tok.embed(tok.encode(["a", "a" * 9000]))
    with pytest.raises(zoo.InputError, match="'klingon' is none of Unicode's scripts"):
        MagnetTokenizer(MagnetConfig(dim=8, heads=1, head_dim=8, hidden=8, scripts=("klingon",)))
    weights = load_file(golden / "word_pool" / "magnet_3scripts" / "weights.safetensors")
    with pytest.raises(zoo.KeysError, match="order and the priors of its scripts"):
        MagnetTokenizer.checkpoint.convert(weights, None)

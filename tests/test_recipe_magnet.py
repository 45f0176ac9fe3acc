"""The recipe of ``magnet-tiny``: what it learns, resuming, and the file it writes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import zoo
from zoo.codecs.magnet import MagnetConfig, MagnetTokenizer
from zoo.weights.recipes import magnet

SMALL = MagnetConfig(dim=16, heads=2, head_dim=8, hidden=32, layers=(1, 1, 1), priors=(0.3,))
BRIEF = magnet.Recipe(steps=60, rate=2e-2, rows=8, length=48)


def test_pages_are_trained_on_or_kept_out() -> None:
    known, kept_out = ([line for text in magnet.texts(part) for line in text.splitlines()] for part in (False, True))
    assert len(known) > 5 * len(kept_out) > 1000 and not set(known) & set(kept_out)


def test_guesses_get_better_and_words_longer() -> None:
    training = magnet.Training(BRIEF, SMALL)
    text = magnet.texts(kept_out=True)[:1]
    before = magnet.measure(training.model, text, longest=256)
    ends = [training.stage.train_step()["ends"] for _ in range(BRIEF.steps)]
    after = magnet.measure(training.model, text, longest=256)
    # A byte of English is worth 4 to 5 bits by its frequency; of no idea 8.
    assert after["bits_per_byte"] < 5.5 < before["bits_per_byte"]
    # By the prior, of 0.3 of the bytes.
    assert abs(sum(ends[-20:]) / 20 - 0.3) < abs(sum(ends[:5]) / 5 - 0.3) + 0.02 and 0.15 < sum(ends[-20:]) / 20 < 0.45


def test_resuming_gives_the_model_of_an_uninterrupted_run(tmp_path: Path) -> None:
    whole, interrupted = magnet.Training(BRIEF, SMALL), magnet.Training(BRIEF, SMALL)
    for _ in range(6):
        whole.stage.train_step()
    for _ in range(3):
        interrupted.stage.train_step()
    interrupted.save(tmp_path / "a.pt")
    resumed = magnet.Training(BRIEF, SMALL)
    resumed.restore(tmp_path / "a.pt")
    for _ in range(3):
        resumed.stage.train_step()
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    with pytest.raises(ValueError, match="another recipe"):
        magnet.Training(replace(BRIEF, seed=1), SMALL).restore(tmp_path / "a.pt")


def test_the_command_writes_a_model_and_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(recipe: magnet.Recipe, out: Path) -> MagnetTokenizer:
        return magnet_train(replace(recipe, rows=2, length=16), out, SMALL)

    magnet_train = magnet.train
    monkeypatch.setattr(magnet, "train", small)
    monkeypatch.setattr(magnet, "texts", lambda kept_out: [b"one two three " * 40])
    out, figures = tmp_path / "small.safetensors", tmp_path / "figures.json"
    magnet.main(["--out", str(out), "--steps", "2", "--figures", str(figures)])
    found = json.loads(figures.read_text())
    assert math.isfinite(found["bits_per_byte"]) and found["bytes_per_word"] >= 1 and 0 <= found["ends_at_edges"] <= 1
    loaded = zoo.load(f"local-dir:{out}")
    assert isinstance(loaded, MagnetTokenizer) and loaded.config == SMALL and loaded.name == "magnet-tiny"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json", "small.safetensors"]

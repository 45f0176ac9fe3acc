"""The recipe of byteformer-tiny: its files, its start, its schedule, resuming, and the file it writes."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import zoo
from zoo.codecs.byteformer import ByteFormerConfig
from zoo.weights.data import files as file_data
from zoo.weights.recipes import byteformer as recipe_module
from zoo.weights.recipes.byteformer import TINY, Corpus, Recipe, Training, train

SMALL = replace(TINY, dim=32, heads=2, hidden=72, windows=(16,), shifts=(0, 8), merges=(0,))
BRIEF = Recipe(steps=6, pictures=2, commands=2, warmup=2, recordings=10, seed=7)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Words are tones here."""
    time = np.arange(3_000) / file_data.SAMPLE_RATE
    return Corpus(
        [(word, np.sin(2 * np.pi * 200 * (i + 1) * time).astype(np.float32)) for i, word in enumerate(file_data.COMMANDS)]
    )


# ----------------------------------------------------------------------------------------------------------------- files


def test_pictures_are_seeded_and_of_two_colours() -> None:
    for thing in file_data.THINGS:
        one, same, other = (file_data.picture(np.random.default_rng(seed), thing) for seed in (1, 1, 2))
        assert one.shape == (32, 32, 3) and one.dtype == np.uint8
        assert (one == same).all() and (one != other).any()
        assert one.std() > 5


@pytest.mark.parametrize("thing", file_data.THINGS[:5])
def test_things_lie_within_their_pictures(thing: str) -> None:
    """Something of the thing and something of the ground is to be seen in each."""
    rng = np.random.default_rng(3)
    for _ in range(30):
        cover = file_data._cover(rng, thing)
        assert 0.01 < cover.mean() < 0.8 and cover.min() == 0 and cover.max() > 0.9


def test_a_step_has_the_same_files_whenever_it_is_taken(corpus: Corpus) -> None:
    files, labels = corpus.batch(BRIEF, 3)
    again, _ = corpus.batch(BRIEF, 3)
    other, _ = corpus.batch(BRIEF, 4)
    assert files == again and files != other
    tiff, png = (np.asarray(Image.open(io.BytesIO(file))) for file in files[:2])
    assert (tiff == png).all() and labels[0] == labels[1]
    samples, rate = soundfile.read(io.BytesIO(files[-1]))
    assert (len(samples), rate) == (8_000, 8_000) and soundfile.info(io.BytesIO(files[-1])).subtype == "PCM_U8"
    assert [file_data.LABELS[label] in file_data.COMMANDS for label in labels.tolist()] == [False] * 4 + [True] * 2


def test_every_file_fits_the_model(corpus: Corpus) -> None:
    config = ByteFormerConfig(**vars(TINY))
    for file in corpus.batch(BRIEF, 0).files:
        assert config.kernel <= len(file) <= config.longest_file


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_held_out_voices_never_train_and_files_lie_in_their_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not set(file_data.HELD_OUT_LANGUAGES) & set(file_data._LANGUAGES)
    assert not set(file_data.HELD_OUT_VARIANTS) & set(file_data._VARIANTS)
    monkeypatch.setattr(file_data, "HELD_OUT_LANGUAGES", file_data.HELD_OUT_LANGUAGES[:1])
    monkeypatch.setattr(file_data, "HELD_OUT_VARIANTS", file_data.HELD_OUT_VARIANTS[:1])
    assert all(path.exists() for path in file_data.write_held_out(tmp_path))
    assert sorted(folder.name for folder in tmp_path.iterdir()) == sorted(file_data.LABELS)
    assert {path.suffix for path in (tmp_path / "disc").iterdir()} == {".tiff", ".png"}
    clip = file_data.say("yes", "en-us+m1", 160, 50)
    assert 500 < len(clip) <= 8_000 and np.abs(clip[:80]).max() > 0.01 * np.abs(clip).max()


# -------------------------------------------------------------------------------------------------------------- training


def test_near_bytes_start_with_near_vectors(corpus: Corpus) -> None:
    vectors = Training(BRIEF, corpus, SMALL).model.embedding.bytes.detach()[:256]
    near = (vectors[1:] - vectors[:-1]).norm(dim=1).mean()
    far = (vectors - vectors.flip(0)).norm(dim=1).mean()
    assert near < 0.3 * far


def test_resuming_gives_the_model_of_an_uninterrupted_run(corpus: Corpus, tmp_path: Path) -> None:
    whole, interrupted, resumed = (Training(BRIEF, corpus, SMALL) for _ in range(3))
    for _ in range(4):
        whole.stage.train_step()
    for _ in range(2):
        interrupted.stage.train_step()
    interrupted.save(tmp_path / "checkpoint.pt")
    resumed.restore(tmp_path / "checkpoint.pt")
    for _ in range(2):
        resumed.stage.train_step()
    for one, other in zip(whole.stage.average.parameters(), resumed.stage.average.parameters(), strict=True):
        assert (one - other).abs().max() < 1e-3  # products in bfloat16 are not bitwise repeatable
    with pytest.raises(ValueError, match="another recipe"):
        Training(replace(BRIEF, steps=9), corpus, SMALL).restore(tmp_path / "checkpoint.pt")


def test_the_schedule_is_that_of_the_recipe(corpus: Corpus) -> None:
    stage = Training(replace(BRIEF, steps=100, minutes=10.0), corpus, SMALL).stage
    assert (stage.steps, stage.minutes) == (100, 10.0)


def test_training_lowers_the_loss(corpus: Corpus) -> None:
    """Tones of ten pitches are told apart after a few steps; their files differ in every byte."""
    stage = Training(replace(BRIEF, steps=1000, pictures=0, commands=16), corpus, SMALL).stage
    losses = [stage.train_step()["loss"] for _ in range(40)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_the_written_file_loads_and_names_its_classes(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_module, "make_corpus", lambda recipe: corpus)
    out = tmp_path / "tiny.safetensors"
    exported = train(BRIEF, out, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [out.name], "no checkpoint or temporary file is left"
    saved = exported.save_pretrained(tmp_path / "saved")
    loaded = zoo.load(f"local-dir:{saved}")
    assert loaded.config == SMALL and loaded.config.labels == file_data.LABELS
    files = corpus.batch(BRIEF, 9).files
    torch.testing.assert_close(loaded.classify(loaded.encode(files)), exported.classify(exported.encode(files)))

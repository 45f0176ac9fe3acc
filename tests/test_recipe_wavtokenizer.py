"""The recipe of the embedded model: its audio, its schedule, resuming, and the file it writes."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from zoo.codecs.wavtokenizer import WavTokenizer, WavTokenizerConfig
from zoo.weights.data import audio as audio_data
from zoo.weights.recipes import wavtokenizer as recipe_module
from zoo.weights.recipes.wavtokenizer import Corpus, Recipe, Training, make_corpus, train

SMALL = WavTokenizerConfig(
    latent_dim=16, n_filters=4, codebook_size=32, dim=32, intermediate_dim=48, num_layers=2, num_bandwidths=1
)
BRIEF = Recipe(steps=8, batch=2, crop_seconds=0.2, warmup=2, continuous=3, seed=7)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models are too small to share between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    composer = np.random.default_rng(0)
    return Corpus([audio_data.music(composer, 2.0) for _ in range(4)])


class SameAgain(Corpus):
    """Gives the same batch every time."""

    def __init__(self, waveform: Tensor) -> None:
        self.waveform = waveform

    def batch(self, count: int, length: int, rng: torch.Generator) -> Tensor:
        return self.waveform


def advance(training: Training, steps: int) -> None:
    for _ in range(steps):
        training.stage.train_step()


def assert_equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


# ----------------------------------------------------------------------------------------------------------------- audio


def test_held_out_voices_and_texts_never_train() -> None:
    held_out = [voice.split("+") for voice in audio_data.HELD_OUT_VOICES]
    assert not {language for language, _ in held_out} & set(audio_data.LANGUAGES)
    assert not {variant for _, variant in held_out} & set(audio_data.VARIANTS)
    rng = random.Random(0)
    spoken = " ".join(audio_data.utterance(rng).text for _ in range(2000))
    assert not any(text in spoken for text in audio_data.HELD_OUT_TEXTS)


def test_music_is_seeded_and_finite() -> None:
    one, other, third = (audio_data.music(np.random.default_rng(seed), 1.0) for seed in (1, 1, 2))
    assert torch.equal(one, other) and not torch.equal(one, third)
    assert one.isfinite().all() and one.abs().max() > 0


def test_augmented_crops_have_the_stated_level_and_length() -> None:
    rng = torch.Generator().manual_seed(0)
    crop = audio_data.music(np.random.default_rng(0), 1.0)
    for _ in range(10):
        augmented = audio_data.augment(crop, rng)
        assert augmented.shape == crop.shape
        assert 10 ** (-12 / 20) * 0.99 <= float(augmented.abs().max()) <= 10 ** (-1 / 20) * 1.01


def test_a_silent_crop_stays_finite() -> None:
    assert audio_data.augment(torch.zeros(4800), torch.Generator().manual_seed(3)).isfinite().all()


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_speech_is_seeded_and_in_every_voice() -> None:
    first, second = (torch.cat(list(audio_data.speech_corpus(5.0, seed=1))) for _ in range(2))
    assert torch.equal(first, second) and len(first) >= 5 * audio_data.SAMPLE_RATE
    for voice in audio_data.HELD_OUT_VOICES:
        assert audio_data.speak(audio_data.Utterance("Hello there.", voice, 160, 50)).abs().max() > 0.01


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_own_recordings_join_the_corpus(tmp_path: Path) -> None:
    small = Recipe(speech_hours=0.001, music_minutes=0.1, seed=1)
    without = len(make_corpus(small, []).samples)
    soundfile.write(tmp_path / "own.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 48_000), 48_000)
    assert len(make_corpus(small, [tmp_path]).samples) == without + 24_000 + audio_data.SAMPLE_RATE // 10


# -------------------------------------------------------------------------------------------------------------- training


def test_the_same_seed_gives_the_same_model(corpus: Corpus) -> None:
    states = []
    for _ in range(2):
        training = Training(BRIEF, corpus, SMALL)
        advance(training, 5)
        states.append(training.model.state_dict())
    assert_equal_states(*states)


@pytest.mark.parametrize("stop", [2, 5], ids=["before the codebook", "with the codebook"])
def test_resuming_gives_the_model_of_an_uninterrupted_run(corpus: Corpus, tmp_path: Path, stop: int) -> None:
    whole = Training(BRIEF, corpus, SMALL)
    advance(whole, 8)

    interrupted = Training(BRIEF, corpus, SMALL)
    advance(interrupted, stop)
    interrupted.save(tmp_path / "checkpoint.pt")
    torch.rand(1000)  # another process would not have this process's global random state
    resumed = Training(BRIEF, corpus, SMALL)
    resumed.restore(tmp_path / "checkpoint.pt")
    assert resumed.stage.step == stop
    advance(resumed, 8 - stop)

    assert_equal_states(whole.model.state_dict(), resumed.model.state_dict())
    assert_equal_states(whole.stage.codebook.state_dict(), resumed.stage.codebook.state_dict())


def test_a_checkpoint_of_another_recipe_is_refused_before_any_work(corpus: Corpus, tmp_path: Path) -> None:
    Training(BRIEF, corpus, SMALL).save(tmp_path / "tiny.checkpoint.pt")
    with pytest.raises(ValueError, match="another recipe"):
        Training(replace(BRIEF, steps=9), corpus, SMALL).restore(tmp_path / "tiny.checkpoint.pt")
    with pytest.MonkeyPatch.context() as patched, pytest.raises(ValueError, match="another recipe"):
        patched.setattr(recipe_module, "make_corpus", None)
        train(replace(BRIEF, steps=9), tmp_path / "tiny.safetensors", config=SMALL)


def test_the_schedule_is_that_of_the_recipe(corpus: Corpus) -> None:
    stage = Training(Recipe(steps=100, minutes=10.0), corpus, SMALL).stage
    assert (stage.steps, stage.minutes) == (100, 10.0)


def test_training_lowers_the_loss(corpus: Corpus) -> None:
    waveform = corpus.batch(2, 4800, torch.Generator().manual_seed(7))
    recipe = Recipe(steps=100, batch=2, crop_seconds=0.2, warmup=2, continuous=20, seed=7)
    stage = Training(recipe, SameAgain(waveform), SMALL).stage
    losses = [stage.train_step() for _ in range(40)]
    assert all(math.isfinite(value) for terms in losses for value in terms.values())
    assert losses[-1]["mel"] < 0.8 * losses[0]["mel"]
    assert losses[10]["commit"] == 0 < losses[-1]["commit"]
    assert bool(stage.codebook.inited)


def test_the_written_file_holds_the_exported_model(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids from the file equal those of the model that was exported: rounding to half precision comes first."""
    monkeypatch.setattr(recipe_module, "make_corpus", lambda recipe, folders: corpus)
    out = tmp_path / "tiny.safetensors"
    exported = train(BRIEF, out, config=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [out.name], "no checkpoint or temporary file is left"

    with safe_open(out, "pt") as file:
        saved = json.loads(file.metadata()["zoo"])
    loaded = WavTokenizer(WavTokenizerConfig(**{**saved["config"], "ratios": tuple(saved["config"]["ratios"])}))
    state = load_file(out)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    loaded.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    loaded.eval()
    assert saved["family"] == "wavtokenizer" and saved["fingerprint"] == loaded.compute_fingerprint()
    waveform = corpus.samples[:24_000].float() / 32_768
    assert torch.equal(loaded.encode(waveform).ids, exported.encode(waveform).ids)

"""The ``zoo`` command on speech whose tokens hold no voice: ``--prompt`` says who speaks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import zoo
from small_models_vectok import noise, small_vectok
from zoo import cli

Run = Callable[..., int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"local-dir:{small_vectok().save_pretrained(tmp_path_factory.mktemp('vectok'))}"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def command(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["zoo", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    return command


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    for name, samples, seed in (("a.wav", 20_000, 1), ("b.wav", 30_000, 2)):
        soundfile.write(tmp_path / name, noise(samples, seed).numpy(), 16_000, subtype="FLOAT")
    return tmp_path


def written(path: Path) -> np.ndarray:
    samples, rate = soundfile.read(path)
    assert rate == 16_000
    return samples


def test_decode_in_a_voice(model: str, speech: Path, run: Run) -> None:
    assert run("encode", model, speech / "a.wav", "-o", speech / "a.zt") == 0
    tokenizer: Any = zoo.load(model)
    tokens = zoo.Tokens.load(speech / "a.zt")
    tokenizer.voices["high"].save(speech / "high.safetensors")
    prompts: dict[str, Any] = {"high": "high", "recording": speech / "b.wav", "file": speech / "high.safetensors"}
    found = {}
    for name, prompt in prompts.items():
        assert run("decode", speech / "a.zt", "--tokenizer", model, "--prompt", prompt, "-o", speech / f"{name}.wav") == 0
        found[name] = written(speech / f"{name}.wav")
        expected = tokenizer.decode(tokens, prompt=prompt)[0][0].clamp(-1, 1).numpy()
        assert np.abs(found[name] - expected).max() < 1e-4
    assert run("decode", speech / "a.zt", "--tokenizer", model, "-o", speech / "default.wav") == 0
    assert np.abs(found["high"] - written(speech / "default.wav")).max() > 5e-4, "the default is the first voice, low"


def test_reconstruct_in_its_own_voice_or_another(model: str, speech: Path, run: Run) -> None:
    assert run("reconstruct", model, speech / "a.wav", "-o", speech / "own") == 0
    assert run("reconstruct", model, speech / "a.wav", "--prompt", "high", "-o", speech / "other") == 0
    own, other = written(speech / "own" / "a.wav"), written(speech / "other" / "a.wav")
    tokenizer = zoo.load(model)
    expected = tokenizer.reconstruct([speech / "a.wav"])[0][0].clamp(-1, 1).numpy()
    assert own.shape == other.shape == (20_000,)
    assert np.abs(own - expected).max() < 1e-4 < 5e-4 < np.abs(own - other).max()


def test_a_tokenizer_without_voices_takes_no_prompt(speech: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("reconstruct", "wavtokenizer-tiny", speech / "a.wav", "--prompt", "high", "-o", speech / "out") == 1
    assert "takes no --prompt" in capsys.readouterr().err

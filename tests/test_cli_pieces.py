"""Models in pieces on the command line: parts to load, places of files, and what the catalogue says about their licence."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import zoo
from small_models import small_tokenflow
from zoo import cli
from zoo.media import write_image

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["zoo", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return command


@pytest.fixture
def model(tmp_path: Path) -> str:
    return f"local-dir:{small_tokenflow().save_pretrained(tmp_path / 'model')}"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return write_image(tmp_path / "picture.png", torch.linspace(-1, 1, 3 * 40 * 50).view(3, 40, 50))


def test_parts(run: Command, model: str, picture: Path, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.zt", tmp_path / "part.zt"
    assert run("encode", model, picture, "-o", whole)[0] == 0
    assert run("encode", model, picture, "-o", part, "--parts", "encoder")[0] == 0
    assert zoo.Tokens.load(part).equal(zoo.Tokens.load(whole))
    image = tmp_path / "image.png"
    assert run("decode", part, "-o", image, "--tokenizer", model, "--parts", "decoder")[0] == 0
    assert image.exists()
    code, _, error = run("decode", part, "-o", image, "--tokenizer", model, "--parts", "encoder,semantic_decoder")
    assert code == 5 and "needs the decoder" in error
    code, _, error = run("decode", part, "-o", image, "--tokenizer", model, "--parts", "none")
    assert code == 5 and "needs the decoder" in error
    code, _, error = run("encode", model, picture, "-o", part, "--parts", "eyes")
    assert code == 1 and "'eyes' is none of them" in error


def test_places(run: Command, picture: Path, tmp_path: Path) -> None:
    for place, reason in (("vision", "NAME=PLACE"), ("=x", "NAME=PLACE"), ("wings=x", "wings")):
        code, _, error = run("encode", "seed-2", picture, "-o", tmp_path / "x.zt", "--parts", "encoder", "--file", place)
        assert code == 1 and reason in error


def test_interpolation(run: Command, model: str, picture: Path, tmp_path: Path) -> None:
    assert run("encode", model, picture, "-o", tmp_path / "x.zt", "--interpolation", "bicubic")[0] == 0
    assert zoo.Tokens.load(tmp_path / "x.zt").equal(zoo.load(model).encode(picture, interpolation="bicubic"))
    code, _, error = run("encode", model, picture, "-o", tmp_path / "y.zt", "--interpolation", "nearest")
    assert code in (1, 2) and "interpolation" in error and not (tmp_path / "y.zt").exists()


def test_notes_on_licences(run: Command) -> None:
    assert "limits it to research" in " ".join(run("info", "seed-2")[1].split())
    assert json.loads(run("info", "seed-2", "--json")[1])["licence"]["note"]

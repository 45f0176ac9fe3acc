"""``zoo study``: what is listed, what every study takes, and that a tiny run leaves what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import zoo
from small_models import small_flextok
from zoo.cli import app, study
from zoo.media import write_image


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["study", *map(str, arguments)])


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_list_has_a_line_for_each_study_and_imports_no_torch(arguments: list[str]) -> None:
    program = "import sys; from zoo import cli; sys.argv[0] = 'zoo'\ntry: cli.app()\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program, "study", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = done.stdout.replace("│", " ").split()
    for name in study.STUDIES:
        assert name in words, name
    if not arguments:
        assert [line.split()[0] for line in done.stdout.splitlines()] == list(study.STUDIES)
        assert all(len(line.split()) > 2 for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", study.STUDIES)
def test_every_study_shows_its_own_help_and_refuses_what_it_does_not_know(name: str) -> None:
    command = study.command_of(name)
    shown = run(name, "--help")
    assert shown.exit_code == 0
    for parameter in command.params:
        assert parameter.name in shown.output or max(parameter.opts, key=len) in shown.output
        assert parameter.help or parameter.name == "help", f"{name} does not say what {parameter.name} is"
    assert command.help.splitlines()[0].endswith(".") and command.help.splitlines()[0] in shown.output
    assert run(name, "--nonsense").exit_code == 2
    required = [parameter.name for parameter in command.params if parameter.required]
    if required:
        assert run(name).exit_code == 2
    hints = get_type_hints(import_module(study.STUDIES[name][0]).main)
    for parameter in command.params:
        hint = hints.get(parameter.name)
        if {int, float} & {hint, *get_args(hint)}:
            found = run(name, f"{parameter.opts[-1]}=many")
            assert found.exit_code == 2 and parameter.opts[-1] in found.output, parameter.name


def test_an_unknown_study_is_refused() -> None:
    found = run("prefix")
    assert found.exit_code == 2 and "prefix" in found.output


def test_only_the_study_that_is_asked_for_is_imported() -> None:
    program = "import sys; from zoo import cli\ntry: cli.app()\nfinally: print(sorted(m for m in sys.modules if 'stud' in m))"
    done = subprocess.run([sys.executable, "-c", program, "study", "precision", "--help"], capture_output=True, text=True)
    loaded = done.stdout.splitlines()[-1]
    assert "zoo.eval.studies.precision" in loaded
    assert not any(f"zoo.eval.studies.{other}'" in loaded for other in ("binary", "compress", "probe", "voices", "quantize"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    import torch

    return write_image(tmp_path / "picture.png", torch.rand(3, 40, 60) * 2 - 1)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return f"local-dir:{small_flextok().save_pretrained(tmp_path / 'model')}"


def test_figures_are_printed_and_written_with_the_command(
    model: str, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "precision.json"
    arguments = ["precision", model, picture, "--out", out]
    monkeypatch.setattr(sys, "argv", ["zoo", "study", *map(str, arguments)])
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    written = json.loads(out.read_text())
    assert json.loads(done.output) == written
    assert written["command"].startswith("zoo study precision local-dir:") and str(out) in written["command"]
    assert (written["images"], written["ids"]) == (1, len(zoo.load(model).encode(picture).ids[0]))


def test_a_picture_of_prefixes(model: str, picture: Path, tmp_path: Path) -> None:
    from PIL import Image

    out = tmp_path / "prefixes.png"
    done = run("prefixes", model, picture, "--out", out, "--tokens", "1,4", "--steps", 1)
    assert done.exit_code == 0 and done.output.strip() == str(out), done.output
    assert np.asarray(Image.open(out)).std() > 10


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["prefixes", "wavtokenizer-tiny", "<picture>", "--out", "x.png"], "no image tokenizer whose prefixes decode"),
        (["prefixes", "flextok-tiny", "<picture>", "--out", "x.png", "--tokens", "²"], "token counts such as"),
        (["precision", "wavtokenizer-tiny", "<picture>", "--out", "x.json"], "no image tokenizer"),
        (["shape-prefixes", "wavtokenizer-tiny", "x.ply", "--out", "x.png"], "no shape tokenizer whose prefixes decode"),
        (["voices", "wavtokenizer-tiny", "--data", ".", "--out", "x.json"], "takes no voice"),
        (["probe", "wavtokenizer-tiny", "--out", "x.json"], "no TokenFlow"),
        (["consistency", "wavtokenizer-tiny", "--out", "x.json"], "no image tokenizer"),
        (["quantize", "vat-tiny", "--data", "x.ply", "--calibrate", "x.ply"], "no measure of quantization for shape"),
        (["binary", "flextok-tiny"], "no binary track"),
        (["compress", "--method", "best", "--questions", "1", "--out", "x.json"], "no method 'best'"),
        (["compress", "--device", "nonsense", "--questions", "1", "--out", "x.json"], "nonsense"),
        (["binary-speed", "--device", "nonsense"], "nonsense"),
    ],
)
def test_what_cannot_be_studied(
    arguments: list[str], reason: str, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = run(*(str(picture) if argument == "<picture>" else argument for argument in arguments))
    assert isinstance(found.exception, zoo.InputError) and reason in str(found.exception), found.exception
    assert not list(tmp_path.glob("x.*"))

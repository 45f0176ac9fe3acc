"""Films on the command line: to tokens, back to films, and as data sets."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from small_models_adapters_video import small_vidtok
from zoo import cli, media
from zoo.modality import modality


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"local-dir:{small_vidtok().save_pretrained(tmp_path_factory.mktemp('vidtok'))}"


@pytest.fixture
def films(tmp_path: Path) -> Path:
    folder = tmp_path / "films"
    folder.mkdir()
    waves = torch.sin(torch.arange(3 * 6 * 10 * 18) / 50).reshape(3, 6, 10, 18)
    media.write_video(folder / "a.mp4", waves, 12)
    media.write_video(folder / "b.mkv", waves[:, :3], Fraction(30000, 1001))
    (folder / "notes.txt").write_text("no film")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["zoo", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return command


def test_films_there_and_back(run: Any, model: str, films: Path, tmp_path: Path) -> None:
    code, out, err = run("encode", model, films, "-o", tmp_path / "films.zt", "--json")
    assert code == 0 and [item["tokens"] for item in json.loads(out)["items"]] == [30, 15] and "1 .txt" in err
    tokens = zoo.Tokens.load(tmp_path / "films.zt")
    assert tokens.tolist() == zoo.load(model).encode([films / "a.mp4", films / "b.mkv"]).tolist()
    assert [meta["frames"] for meta in tokens.meta] == [6, 3]
    options = ("--tokenizer", model, "--size", "original")
    code, _, err = run("decode", tmp_path / "films.zt", "-o", tmp_path / "out", *options)
    assert code == 0, err
    written = [media.read_video(tmp_path / "out" / f"films-000{number}.mp4") for number in (0, 1)]
    assert [(video.fps, video.height, video.width, len(list(video.frames))) for video in written] == [
        (12, 10, 18, 6),
        (Fraction(30000, 1001), 10, 18, 3),
    ]
    tokens[0].save(tmp_path / "one.zt")
    for extension in ("mkv", "webm"):
        assert run("decode", tmp_path / "one.zt", "-o", tmp_path / f"one.{extension}", *options)[0] == 0
        assert len(list(media.read_video(tmp_path / f"one.{extension}").frames)) == 6
    code, _, err = run("decode", tmp_path / "one.zt", "-o", tmp_path / "one.png", *options)
    assert code and "cannot be decoded to .png" in err
    # Whatever a film is called, it is no place for tokens.
    code, _, err = run("encode", model, films, "-o", tmp_path / "films.mp4")
    assert code == 1 and ".zt" in err


def test_reconstruct(run: Any, model: str, films: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    code, shown, err = run("reconstruct", model, films / "a.mp4", "-o", out, "--fps", "6", "--json")
    assert code == 0, err
    [item] = json.loads(shown)["items"]
    assert (item["frames"], item["seconds"], item["tokens"]) == (3, 0.5, 15)
    assert item["bits_per_second"] == 15 * 12 / 0.5
    assert len(list(media.read_video(out / "a.mp4").frames)) == 3
    code, shown, _ = run("reconstruct", model, films / "a.mp4", "-o", out, "--fit", "pad", "--model-size", "8x16", "--json")
    assert code == 0 and json.loads(shown)["items"][0]["tokens"] == 2 * 4 * 2
    for wrong in (("--fps", "nonsense"), ("--model-size", "8"), ("--fit", "pad"), ("--max-frames", "5")):
        assert run("reconstruct", model, films / "a.mp4", "-o", out, *wrong)[0] in (1, 2)


def test_data_sets_of_films(run: Any, model: str, films: Path, tmp_path: Path) -> None:
    (films / "broken.mp4").write_bytes((films / "a.mp4").read_bytes()[:200])
    code, _, err = run("tokenize", model, films, "-o", tmp_path / "parts", "--workers", "0", "--max-frames", "6", "--json")
    assert code == 1, err
    found = {Path(item.key).name: item for item in zoo.engine.TokenDataset(tmp_path / "parts", failures=True)}
    assert "not a video file" in str(found["broken.mp4"].error) or "truncated" in str(found["broken.mp4"].error)
    assert found["a.mp4"].tokens is not None and found["b.mkv"].tokens is not None
    assert len(found["a.mp4"].tokens.tolist()[0]) == 30 and found["b.mkv"].tokens.meta[0]["fps_den"] == 1001
    assert zoo.load(model).decode(found["a.mp4"].tokens)[0].shape == (3, 6, 10, 18)
    seconds = sum(modality("video").extent(found[name].tokens.meta[0]) for name in ("a.mp4", "b.mkv")) * 3600
    assert abs(seconds - (6 / 12 + 3 * 1001 / 30000)) < 1e-3
    code, _, _ = run("tokenize", model, films / "a.mp4", "-o", tmp_path / "short", "--workers", "0", "--max-seconds", "0.1")
    assert code == 1

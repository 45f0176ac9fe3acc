"""The ``zoo`` command as a user types it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import zoo
from small_models import small_wavtokenizer
from zoo import cli


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"local-dir:{small_wavtokenizer().save_pretrained(tmp_path_factory.mktemp('model'))}"


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    folder = tmp_path / "sounds"
    for name, samples, rate in (("a.wav", 9_000, 24_000), ("sub/b.flac", 20_001, 44_100)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, 0.3 * np.sin(np.arange(samples) / 20), rate)
    return folder


class Result:
    """What a command printed and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def command(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["zoo", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return Result(int(stopped.value.code or 0), captured.out, captured.err)

    return command


def test_list_and_info(run) -> None:  # type: ignore[no-untyped-def]
    names = [entry["name"] for entry in json.loads(run("list", "--json").out)]
    assert names == zoo.list()
    assert [e["name"] for e in json.loads(run("list", "wav*", "--embedded", "--json").out)] == zoo.list("wav*", embedded=True)
    shown = run("info", "wavtokenizer-small-75").out
    assert "MIT" in shown
    assert "reported" in shown
    assert "arXiv 2408.16532" in shown
    assert json.loads(run("info", "wavtokenizer-tiny", "--json").out)["weights"]["source"] == "embedded"
    assert "wavtokenizer-tiny" in run("list").out


def test_cards(run) -> None:  # type: ignore[no-untyped-def]
    assert "wavtokenizer" in run("cards").out
    assert "WavTokenizer" in run("cards", "wavtokenizer").out
    assert run("cards", "nosuch").code == 3


def test_pull_and_convert_of_an_embedded_model(run) -> None:  # type: ignore[no-untyped-def]
    assert run("pull", "wavtokenizer-tiny").out == run("convert", "wavtokenizer-tiny").out
    assert Path(run("pull", "wavtokenizer-tiny").out.strip()).exists()


def test_encode_and_decode_a_folder(run, model: str, sounds: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    result = run("encode", model, sounds, "-o", tmp_path / "out.zt", "--json")
    assert [Path(item["file"]).name for item in json.loads(result.out)["items"]] == ["a.wav", "b.flac"]
    decoded = run(
        "decode", tmp_path / "out.zt", "-o", tmp_path / "back", "--tokenizer", model, "--sample-rate", "original", "--json"
    )
    assert [soundfile.info(p).frames for p in json.loads(decoded.out)["items"]] == [9_000, 20_001]
    assert [soundfile.info(p).samplerate for p in json.loads(decoded.out)["items"]] == [24_000, 44_100]


def test_decode_by_the_name_in_the_file(run, sounds: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert run("encode", "wavtokenizer-tiny", sounds / "a.wav", "-o", tmp_path / "a.zt").code == 0
    assert run("decode", tmp_path / "a.zt", "-o", tmp_path / "again.flac").code == 0
    assert soundfile.info(tmp_path / "again.flac").frames == 9_000


def test_per_file_output_mirrors_the_folder_and_resumes(run, model: str, sounds: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "tokens"
    assert run("encode", model, sounds, "-o", out, "--per-file").code == 0
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*.zt")) == ["a.zt", "sub/b.zt"]
    (out / "a.zt").unlink()
    again = json.loads(run("encode", model, sounds, "-o", out, "--per-file", "--json").out)
    assert [Path(item["file"]).name for item in again["items"]] == ["a.wav"]


def test_standard_input_and_output(model: str, sounds: Path, tmp_path: Path) -> None:
    zoo_command = [sys.executable, "-m", "zoo"]
    audio = (sounds / "a.wav").read_bytes()
    subprocess.run([*zoo_command, "encode", model, "-", "-o", str(tmp_path / "a.zt")], input=audio, check=True)
    back = subprocess.run(
        [*zoo_command, "decode", "-", "-o", "-", "--tokenizer", model],
        input=(tmp_path / "a.zt").read_bytes(),
        capture_output=True,
        check=True,
    )
    assert soundfile.info(io.BytesIO(back.stdout)).frames == 9_000


def test_reconstruct(run, model: str, sounds: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    rows = json.loads(run("reconstruct", model, sounds, "-o", tmp_path / "out", "--json").out)["items"]
    assert [row["tokens"] for row in rows] == [282, 341]
    assert soundfile.info(rows[1]["out"]).samplerate == 44_100


def test_eval(run, model: str, sounds: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    result = run("eval", model, "--data", sounds, "--out", tmp_path / "r", "--metrics", "si_sdr,log_mel_l1", "--json")
    assert result.code == 0
    assert json.loads(result.out)["items"] == 2
    assert (tmp_path / "r" / "report.html").exists()


def test_bench(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    arguments = ["bench", "wavtokenizer-tiny", "--seconds", 0.5, "--batch", 2, "--no-peers"]
    content = json.loads(run(*arguments, "-o", tmp_path / "b.json", "--json").out)
    assert json.loads((tmp_path / "b.json").read_text()) == content
    assert [(m["direction"], m["contender"]) for m in content["measurements"]] == [
        ("encode", "wavtokenizer-tiny"),
        ("decode", "wavtokenizer-tiny"),
        ("decode", "wavtokenizer-tiny, bf16"),
    ]
    assert all(m["cpu"] > 0 and m["flops"] > 10**7 for m in content["measurements"])
    assert "/ ours" in run(*arguments).out


def test_a_bad_file_stops_everything_unless_told_otherwise(run, model: str, sounds: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (sounds / "bad.wav").write_bytes(b"nothing")
    result = run("encode", model, sounds, "-o", tmp_path / "out.zt")
    assert result.code == 1
    assert "bad.wav" in result.err
    assert not (tmp_path / "out.zt").exists()
    result = run("encode", model, sounds, "-o", tmp_path / "out.zt", "--skip-errors")
    assert result.code == 1
    assert "failed" in result.err
    assert len(zoo.Tokens.load(tmp_path / "out.zt")) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["info", "wavtokeniser"], 3, "did you mean"),
        (["encode", "local-dir:nowhere", "x.wav", "-o", "out.zt"], 5, "not a folder"),
        (["encode", "wavtokenizer-tiny", "nowhere.wav", "-o", "out.zt"], 1, "no such file"),
        (["decode", "pyproject.toml", "-o", "out"], 1, "not a .zt file"),
        (["encode", "wavtokenizer-tiny"], 2, ""),
        (["list", "--debug"], 2, ""),
    ],
)
def test_exit_codes(run, arguments: list[str], code: int, message: str) -> None:  # type: ignore[no-untyped-def]
    result = run(*arguments)
    assert result.code == code
    assert message in result.err
    assert "Traceback" not in result.err


def test_tokens_of_another_checkpoint(run, model: str, sounds: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run("encode", model, sounds / "a.wav", "-o", tmp_path / "a.zt")
    result = run("decode", tmp_path / "a.zt", "-o", tmp_path / "x", "--tokenizer", "wavtokenizer-tiny")
    assert result.code == 1
    assert "mean nothing to another" in result.err


def test_version(run) -> None:  # type: ignore[no-untyped-def]
    assert run("--version").out.strip() == zoo.__version__

"""The ``zoo`` command as a user types it."""

from __future__ import annotations

import functools
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import zoo
from small_models import small_flextok, small_wavtokenizer
from zoo import cli, media
from zoo.cli.console import print_lines
from zoo.codecs.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"local-dir:{small_wavtokenizer().save_pretrained(tmp_path_factory.mktemp('model'))}"


@pytest.fixture(scope="module")
def flextok(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images of 32 x 48 pixels as 8 ordered tokens of 6 bits."""
    return f"local-dir:{small_flextok().save_pretrained(tmp_path_factory.mktemp('flextok'))}"


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = AutoencoderKLConfig(widths=(8, 8), layers_per_block=1, groups=4, latent_channels=4)
    tokenizer = AutoencoderKL(config, name="autoencoder").eval().requires_grad_(False)
    tokenizer.fingerprint = tokenizer.compute_fingerprint()
    return f"local-dir:{tokenizer.save_pretrained(tmp_path_factory.mktemp('autoencoder'))}"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for name, height, width in (("a.png", 40, 70), ("sub/b.jpg", 90, 30)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("not a picture")
    return folder


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
    def listed(*options: str) -> list[str]:
        return [entry["name"] for entry in json.loads(run("list", *options, "--json").out)]

    assert listed("--all") == zoo.list()
    assert listed() == zoo.list(published=True) != zoo.list()
    assert f"{len(zoo.list(published=False))} configurations" in run("list").err
    assert [e["name"] for e in json.loads(run("list", "wav*", "--embedded", "--json").out)] == zoo.list("wav*", embedded=True)
    shown = run("info", "wavtokenizer-small-75").out
    assert "MIT" in shown
    assert "reported" in shown
    assert "arXiv 2408.16532" in shown
    assert json.loads(run("info", "wavtokenizer-tiny", "--json").out)["weights"]["source"] == "embedded"
    # Whole lines in a pipe.
    [line] = run("list", "flextok-tiny").out.splitlines()[1:]
    assert line.split(maxsplit=2)[:2] == ["flextok-tiny", "image"]
    assert line.endswith(f"in the package  {zoo.info('flextok-tiny').description}")


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


def test_images_there_and_back(run, flextok: str, pictures: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    result = run("encode", flextok, pictures, "-o", tmp_path / "out.zt", "--json")
    items = json.loads(result.out)["items"]
    assert [(Path(item["file"]).name, item["tokens"]) for item in items] == [("a.png", 8), ("b.jpg", 8)]
    for options, sizes in (((), [(48, 32), (48, 32)]), (("--size", "original"), [(70, 40), (30, 90)])):
        arguments = ["decode", tmp_path / "out.zt", "-o", tmp_path / "back", "--tokenizer", flextok, *options]
        decoded = json.loads(run(*arguments, "--json").out)["items"]
        assert [Path(p).name for p in decoded] == ["out-0000.png", "out-0001.png"]
        assert [Image.open(p).size for p in decoded] == sizes
    assert run(*arguments, "--format", "webp").code == 0
    assert Image.open(tmp_path / "back" / "out-0001.webp").format == "WEBP"


def test_options_reach_the_tokenizer(run, flextok: str, pictures: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    def encoded(*options: object) -> zoo.Tokens:
        assert run("encode", flextok, pictures / "a.png", "-o", tmp_path / "x.zt", *options).code == 0
        return zoo.Tokens.load(tmp_path / "x.zt")

    tokenizer = zoo.load(flextok)
    whole, padded = encoded(), encoded("--fit", "pad")
    assert padded.equal(tokenizer.encode(pictures / "a.png", fit="pad")) and not padded.equal(whole)
    assert encoded("--tokens", 3).equal(whole.truncate(3))
    whole.save(tmp_path / "whole.zt")

    def decoded(*options: object) -> torch.Tensor:
        arguments = ["decode", tmp_path / "whole.zt", "-o", tmp_path / "x.png", "--tokenizer", flextok]
        assert run(*arguments, *options).code == 0
        return zoo.media.prepare_image(tmp_path / "x.png", size=(32, 48)).pixels

    for options, settings, prefix in (
        ((), {}, 8),
        (("--tokens", 2), {}, 2),
        (("--steps", 5), {"steps": 5}, 8),
        (("--guidance", 1), {"guidance": 1.0}, 8),
        (("--seed", 7), {"seed": 7}, 8),
    ):
        expected = tokenizer.decode(whole.truncate(prefix), **settings)[0]
        assert (decoded(*options) - expected.clamp(-1, 1)).abs().max() < 1.01 / 255
        assert not options or not torch.equal(expected, tokenizer.decode(whole)[0])


def test_reconstruct_images(run, flextok: str, pictures: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    arguments = ["reconstruct", flextok, pictures, "-o", tmp_path / "out", "--tokens", 4, "--steps", 1]
    rows = json.loads(run(*arguments, "--json").out)["items"]
    assert [(row["width"], row["height"], row["tokens"]) for row in rows] == [(70, 40, 4), (30, 90, 4)]
    assert rows[0]["bits_per_pixel"] == round(4 * 6 / (32 * 48), 4)
    assert [Image.open(row["out"]).size for row in rows] == [(70, 40), (30, 90)]
    assert "bits per pixel" in run(*arguments, "--size", "model").out
    assert Image.open(rows[0]["out"]).size == (48, 32)


def test_latents_there_and_back(run, autoencoder: str, pictures: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "out.safetensors"
    items = json.loads(run("encode", autoencoder, pictures, "-o", path, "--json").out)["items"]
    assert [item["values"] for item in items] == [4 * 20 * 35, 4 * 45 * 15]
    assert zoo.Latents.load(path).equal(zoo.load(autoencoder).encode([pictures / "a.png", pictures / "sub" / "b.jpg"]))
    decoded = json.loads(run("decode", path, "-o", tmp_path / "back", "--tokenizer", autoencoder, "--json").out)["items"]
    assert [Image.open(p).size for p in decoded] == [(70, 40), (30, 90)]
    assert run("encode", autoencoder, pictures, "-o", tmp_path / "each", "--per-file").code == 0
    assert len(zoo.Latents.load(tmp_path / "each" / "sub" / "b.safetensors")) == 1
    rows = json.loads(run("reconstruct", autoencoder, pictures, "-o", tmp_path / "again", "--json").out)["items"]
    assert [list(row) for row in rows] == [["file", "width", "height", "values", "out"]] * 2
    refused = run("encode", autoencoder, pictures, "-o", tmp_path / "out.zt")
    assert (refused.code, (tmp_path / "out.zt").exists()) == (1, False)
    assert ".safetensors" in refused.err


def test_options_that_a_tokenizer_does_not_take(
    run, model: str, flextok: str, pictures: Path, sounds: Path, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    sound, picture = sounds / "a.wav", pictures / "a.png"
    run("encode", model, sound, "-o", tmp_path / "sound.zt")
    run("encode", flextok, picture, "-o", tmp_path / "picture.zt")
    out = ["-o", tmp_path / "out"]
    for arguments, reason in (
        (["encode", model, sound, *out, "--fit", "pad"], "no --fit to encode"),
        (["encode", model, sound, *out, "--tokens", 3], "no --tokens to encode"),
        (["encode", model, sound, *out, "--max-pixels", 3], "no --max-pixels to encode"),
        (["encode", flextok, picture, *out, "--fit", "squeeze"], "crop, stretch, pad, none"),
        (["encode", flextok, picture, *out, "--tokens", 9], "tokens must lie in"),
        (["encode", flextok, picture, *out, "--max-pixels", 2799], "a.png: .* more than max_pixels = 2799"),
        (["encode", flextok, picture, "-o", tmp_path / "out.safetensors"], "writes .zt files"),
        (["decode", tmp_path / "sound.zt", *out, "--tokenizer", model, "--steps", 3], "no --steps to decode"),
        (["decode", tmp_path / "sound.zt", *out, "--tokenizer", model, "--size", "original"], "no --size to decode"),
        (["decode", tmp_path / "sound.zt", *out, "--tokenizer", model, "--tokens", 3], "not ordered"),
        (["decode", tmp_path / "sound.zt", *out, "--tokenizer", model, "--sample-rate", "fast"], "must be a number"),
        (["decode", tmp_path / "picture.zt", *out, "--tokenizer", flextok, "--sample-rate", 8000], "no --sample-rate"),
        (["decode", tmp_path / "picture.zt", *out, "--tokenizer", flextok, "--tokens", 9], "item 0: .* 8 tokens"),
        (["decode", tmp_path / "picture.zt", *out, "--tokenizer", flextok, "--size", "huge"], "huge"),
        (["reconstruct", model, sound, *out, "--guidance", 3], "no --guidance to decode"),
        (["decode", tmp_path / "nowhere.zt", *out], "nowhere.zt does not exist"),
    ):
        result = run(*arguments)
        assert result.code == 1, arguments
        assert re.search(reason, result.err), result.err
        assert not (tmp_path / "out").exists()


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
        (["encode", "local-dir:nowhere", "x.wav", "-o", "out.zt"], 5, "there is no nowhere"),
        (["encode", "wavtokenizer-tiny", "nowhere.wav", "-o", "out.zt"], 1, "no such file"),
        (["decode", "pyproject.toml", "-o", "out"], 1, "not a .zt file"),
        (["decode", "nowhere.zt", "-o", "out"], 1, "nowhere.zt does not exist"),
        (["decode", "tests", "-o", "out"], 1, "tests is a folder"),
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


# ------------------------------------------------------------------------------------------------------------ reliability


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_outputs_are_refused_before_any_work(
    run, model: str, flextok: str, pictures: Path, sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    sound, picture = sounds / "a.wav", pictures / "a.png"
    for name, source, target in ((model, sounds, "two.zt"), (model, sound, "one.zt"), (flextok, picture, "picture.zt")):
        assert run("encode", name, source, "-o", tmp_path / target).code == 0
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    before = contents(tmp_path)

    for kind in (type(zoo.load(model)), type(zoo.load(flextok))):
        for method in (kind.encode, kind.decode):

            @functools.wraps(method)
            def work(*_: object, **__: object) -> None:
                raise AssertionError("work was done")

            monkeypatch.setattr(kind, method.__name__, work)
    one, two, drawn = (
        [tmp_path / name, "--tokenizer", tokenizer]
        for name, tokenizer in (("one.zt", model), ("two.zt", model), ("picture.zt", flextok))
    )
    for arguments, out, reason in (
        (["encode", model, sound], tmp_path / "folder", "is a folder"),
        (["encode", model, sound], tmp_path / "file" / "a.zt", "not a folder|Not a directory"),
        (["encode", model, sound], "", "is a folder"),
        (["encode", model, sound], tmp_path / "a.wav", r"writes \.zt files, not \.wav"),
        (["encode", model, sound], sound, "writes .zt files"),
        (["encode", model, sound, "--per-file"], tmp_path / "file", "must be a folder"),
        (["encode", "byteformer-tiny", tmp_path / "one.zt"], tmp_path / "one.zt", "is an input"),
        (["encode", "byteformer-tiny", tmp_path / "one.zt", "--per-file", "--overwrite"], tmp_path, "is an input"),
        (["decode", *one], tmp_path / "file", "must be a folder"),
        (["decode", *two], tmp_path / "file", "must be a folder"),
        (["decode", *one], tmp_path / "back.xyz", r"\.xyz"),
        (["decode", *one, "--format", "png"], tmp_path / "back", "png"),
        (["decode", *one, "--format", "../x"], tmp_path / "back", "--format"),
        (["decode", *one, "--sample-rate", "1000003"], tmp_path / "back.mp3", "mp3"),
        (["decode", *one], tmp_path / "one.zt", r"\.zt|zt"),
        (["decode", *drawn], tmp_path / "back.wav", r"\.wav"),
        (["decode", *one, tmp_path / "folder" / ".." / "one.zt"], tmp_path / "back", "two items would be written"),
        (["reconstruct", model, sound], tmp_path / "file", "must be a folder"),
        (["reconstruct", model, sound], sounds, "is an input"),
        (["eval", model, "--data", sounds], tmp_path / "file", "must be a folder"),
    ):  # fmt: skip
        result = run(*arguments, "--out", out)
        assert result.code == 1, (arguments, out, result.err)
        assert re.search(reason, result.err.splitlines()[-1]), (arguments, out, result.err)
        assert "Traceback" not in result.err and "unexpected" not in result.err
        assert contents(tmp_path) == before


def test_folders_with_other_files(run, model: str, sounds: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for name in ("x.doc", "y.doc", "z.heic", "._a.wav", ".DS_Store"):
        (sounds / name).write_bytes(b"whatever")
    line = "skipped 2 .doc, 1 ._* of macOS, 1 .heic, 1 hidden"
    for command in (["encode", model, sounds, "-o", tmp_path / "a.zt"], ["reconstruct", model, sounds, "-o", tmp_path / "b"],
                    ["eval", model, "--data", sounds, "--out", tmp_path / "c", "--metrics", "si_sdr"]):  # fmt: skip
        result = run(*command, "--json")
        assert result.code == 0 and result.err.splitlines().count(line) == 1, result.err
        json.loads(result.out)


def test_good_files_of_a_batch_with_bad_ones(run, model: str, sounds: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (sounds / "aa-bad.wav").write_bytes(b"nothing")
    (sounds / "z-bad.wav").write_bytes(b"RIFF")
    out = tmp_path / "tokens"
    result = run("encode", model, sounds, "-o", out, "--per-file")
    assert result.code == 1 and "aa-bad.wav: " in result.err
    assert sorted(contents(out)) == ["a.zt", "sub/b.zt"]
    assert zoo.Tokens.load(out / "sub" / "b.zt").equal(zoo.load(model).encode(sounds / "sub" / "b.flac"))
    result = run("encode", model, sounds, "-o", out, "--per-file", "--skip-errors", "--json")
    assert result.code == 1 and [Path(name).name for name in json.loads(result.out)["failed"]] == ["aa-bad.wav", "z-bad.wav"]
    result = run("reconstruct", model, sounds, "-o", tmp_path / "again")
    assert result.code == 1 and sorted(contents(tmp_path / "again")) == ["a.wav", "sub/b.wav"]


def test_a_bad_file_costs_no_second_reading(
    run, model: str, sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    from zoo.media import audio

    (sounds / "c-bad.wav").write_bytes(b"nothing")
    opened: list[str] = []
    opening = audio.open_source

    def open_source(source: object, kind: str):  # type: ignore[no-untyped-def]
        opened.append(Path(str(source)).name)
        return opening(source, kind)

    monkeypatch.setattr(audio, "open_source", open_source)
    assert run("encode", model, sounds, "-o", tmp_path / "out.zt", "--skip-errors").code == 1
    assert sorted(opened) == ["a.wav", "b.flac", "c-bad.wav"]


@pytest.mark.parametrize("step", ["prepare", "encode_prepared"])
def test_errors_of_libraries_name_the_file(
    step: str, run, model: str, sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    kind = type(zoo.load(model))
    method = getattr(kind, step)
    samples = media.audio_info(sounds / "sub" / "b.flac").samples
    calls = []

    def failing(self, items, **options):  # type: ignore[no-untyped-def]
        calls.append(items)
        if any("b.flac" in str(item) or getattr(item, "meta", {}).get("samples") == samples for item in items):
            raise RuntimeError("the library\ngave up")
        return method(self, items, **options)

    monkeypatch.setattr(kind, step, failing)
    result = run("encode", model, sounds, "-o", tmp_path / "out.zt")
    assert result.code == 1 and "b.flac: RuntimeError: the library gave up" in result.err
    result = run("encode", model, sounds, "-o", tmp_path / "out.zt", "--skip-errors")
    assert result.code == 1 and len(zoo.Tokens.load(tmp_path / "out.zt")) == 1
    # Files are read once, whatever fails: two commands of two files. Of a batch that fails, each item is tried alone.
    assert len(calls) == (4 if step == "prepare" else 6)
    monkeypatch.undo()

    def refusing(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(kind, "decode", refusing)
    result = run("decode", tmp_path / "out.zt", "-o", tmp_path / "back", "--tokenizer", model)
    assert result.code == 1 and "out.zt: OSError: [Errno 5] Input/output error" in result.err


def test_an_interrupted_run_says_how_to_go_on(
    run, model: str, sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    kind = type(zoo.load(model))
    prepare = kind.prepare

    def interrupted(self, items, **options):  # type: ignore[no-untyped-def]
        if "b.flac" in str(items):
            raise KeyboardInterrupt
        return prepare(self, items, **options)

    monkeypatch.setattr(kind, "prepare", interrupted)
    result = run("encode", model, sounds, "-o", tmp_path / "out", "--per-file", "--batch-size", 1)
    assert result.code == 130 and list(contents(tmp_path / "out")) == ["a.zt"]
    assert "1 of 2 files are in" in result.err and "the same command goes on from there" in result.err
    result = run("encode", model, sounds, "-o", tmp_path / "out.zt")
    assert result.code == 130 and "nothing was written" in result.err and not (tmp_path / "out.zt").exists()
    monkeypatch.undo()
    assert run("encode", model, sounds, "-o", tmp_path / "out", "--per-file").code == 0
    result = run("encode", model, sounds, "-o", tmp_path / "out", "--per-file")
    assert result.code == 0 and "nothing to do: 2 files" in result.err


def test_targets_of_many_files() -> None:
    from zoo.cli.files import per_file_targets

    sources = [f"/data/{i % 100}/{i}.wav" for i in range(20_000)] + ["/data/0/0.flac", "/data/0/0.flac.ogg", "-"]
    comparisons = 0

    class Counting(type(Path())):  # type: ignore[misc]
        def __eq__(self, other: object) -> bool:
            nonlocal comparisons
            comparisons += 1
            return super().__eq__(other)

        __hash__ = type(Path()).__hash__

    targets = per_file_targets(sources, Counting("out"), ".zt")
    assert len(set(targets.values())) == len(sources) and comparisons < 10 * len(sources)
    assert [targets[name].as_posix() for name in ("/data/0/0.wav", "/data/0/0.flac", "-")] == [
        "out/0/0.zt",
        "out/0/0.flac.zt",
        "out/stdin.zt",
    ]


def zoo_process(*arguments: object, stdout: object = subprocess.PIPE, shell: str = "", **environment: str):  # type: ignore[no-untyped-def]
    command = [sys.executable, "-m", "zoo", *map(str, arguments)]
    if shell:
        command = ["bash", "-c", f"{shlex.join(command)} {shell}"]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=os.environ | environment)  # type: ignore[call-overload]


def test_streams_that_are_closed_or_full(model: str, sounds: Path, tmp_path: Path) -> None:
    assert run_quietly("list", "--all", shell="| head -1").stdout.startswith(b"name")
    assert run_quietly("list", shell=">&-").returncode == 0
    encoded = run_quietly("encode", model, "-", "-o", tmp_path / "a.zt", shell="<&-")
    assert encoded.returncode == 1 and b"empty" in encoded.stderr and not (tmp_path / "a.zt").exists()
    assert run_quietly("encode", model, sounds / "a.wav", "-o", tmp_path / "a.zt", shell=">&- 2>&- <&-").returncode == 0
    if Path("/dev/full").exists():
        for arguments in (
            ["list"],
            ["list", "--json"],
            ["cards"],
            ["decode", tmp_path / "a.zt", "-o", "-", "--tokenizer", model],
        ):
            full = run_quietly(*arguments, shell=">/dev/full")
            assert full.returncode in (1, 6) and b"No space left" in full.stderr, full.stderr


def test_lines_end_at_the_edge_of_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "12")
    print_lines([("a", "bc"), ("long", "twelve letters"), ("long", "sixsix")])
    assert capsys.readouterr().out.splitlines() == ["a     bc", "long  twelv…", "long  sixsix"]


def run_quietly(*arguments: object, **options: str):  # type: ignore[no-untyped-def]
    result = zoo_process(*arguments, **options)
    assert b"Traceback" not in result.stderr and b"Exception ignored" not in result.stderr, result.stderr.decode()
    assert b"unexpected" not in result.stderr, result.stderr.decode()
    return result


ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}


@pytest.fixture
def strange_names(sounds: Path) -> Path:
    (sounds / "a.wav").rename(sounds / os.fsdecode(b"caf\xe9.wav"))
    (sounds / "sub" / "b.flac").rename(sounds / "sub" / "größe 漢字.flac")
    return sounds


def test_names_of_undecodable_bytes_in_an_ascii_locale(model: str, strange_names: Path, tmp_path: Path) -> None:
    encoded = run_quietly("encode", model, strange_names, "-o", tmp_path / "t", "--per-file", "--json", **ASCII)
    assert encoded.returncode == 0
    assert [os.fsencode(Path(item["file"]).name) for item in json.loads(encoded.stdout)["items"]] == [
        b"caf\xe9.wav",
        "größe 漢字.flac".encode(),
    ]
    assert run_quietly("list", **ASCII).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("environment", [ASCII, {"LC_ALL": "C.UTF-8"}], ids=["ascii", "utf-8"])
def test_reports_on_names_of_undecodable_bytes(
    model: str, strange_names: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    rows = run_quietly("reconstruct", model, strange_names, "-o", tmp_path / "r", **environment)
    assert rows.returncode == 0 and sorted(map(os.fsencode, os.listdir(tmp_path / "r"))) == [b"caf\xe9.wav", b"sub"]
    measured = run_quietly(
        "eval", model, "--data", strange_names, "--out", tmp_path / "e", "--metrics", "si_sdr", **environment
    )
    assert measured.returncode == 0 and (tmp_path / "e" / "report.html").exists()


# -------------------------------------------------------------------------------------------------------- wrong arguments

NONSENSE = ("nonsense", "-1", "0", "nan", "1e99", "", "<folder>", "<missing>", "fp16", "\udcff")
# What the fast tests try: every command with all of it takes minutes.
# Commands that take long to try: their options are largely those of encode and decode.
LONG = ("bench", "reconstruct", "eval")
SOME_NONSENSE = ("nonsense", "-1", "<missing>")


class Reached(zoo.ZooError):
    """All arguments were taken, and the long work would begin."""


def reached(*_: object, **__: object) -> None:
    raise Reached("reached")


@pytest.fixture
def no_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        ("zoo.bench.codebook", "matmul_rate"),
        ("zoo.bench.quantize", "matmul_rate"),
        ("zoo.bench.run", "matmul_rate"),
        ("zoo.bench.compress", "_Bench"),
        ("zoo.eval.reconstruct", "RunJournal"),
        ("zoo.onnx_export", "export"),
    ):
        monkeypatch.setattr(importlib.import_module(module), name, reached)


def commands() -> dict[str, list[Any]]:
    """Every command with its options and arguments."""
    import typer

    return {name: command.params for name, command in typer.main.get_command(cli.app).commands.items()}  # type: ignore[attr-defined]


# What makes each command work: arguments, and the options that it must have.
WORKING: dict[str, list[list[str]]] = {
    "list": [[]],
    "info": [["wavtokenizer-tiny"]],
    "cards": [["wavtokenizer"]],
    "pull": [["wavtokenizer-tiny"]],
    "convert": [["wavtokenizer-tiny"]],
    "export": [["<sound-model>", "-o", "<out>"]],
    "encode": [["<sound-model>", "<sound>", "-o", "<out>.zt"], ["<image-model>", "<image>", "-o", "<out>.zt"]],
    "decode": [
        ["<sound-tokens>", "-o", "<out>.wav", "--tokenizer", "<sound-model>"],
        ["<image-tokens>", "-o", "<out>.png", "--tokenizer", "<image-model>"],
    ],
    "reconstruct": [["<sound-model>", "<sound>", "-o", "<out>"], ["<image-model>", "<image>", "-o", "<out>"]],
    "tokenize": [["<sound-model>", "<sound>", "-o", "<out>", "--workers", "0"]],
    "tokens": [["<parts>", "--recompute", "1"]],
    "pack": [["<parts>", "-o", "<out>", "--vocabulary", "<vocabulary>", "--length", "4096"]],
    "eval": [
        ["<sound-model>", "--data", "<sound>", "--out", "<out>"],
        ["<image-model>", "--data", "<image>", "--out", "<out>"],
    ],
    "bench": [["wavtokenizer-tiny"], ["flextok-tiny"], ["codebook"], ["quantize"], ["compress"]],
    "study": [[]],  # a group of commands, which tests/test_study.py runs
}
# Options that take any name, of a file to be made say.
FREE = {
    ("tokenize", "out"),
    ("tokenize", "column"),
    ("tokenize", "keep"),
    ("pack", "out"),
    ("list", "pattern"),
    ("encode", "out"),
    ("reconstruct", "out"),
    ("eval", "out"),
    ("bench", "out"),
    ("decode", "out"),
    ("export", "out"),
}


def test_every_command_has_a_working_call() -> None:
    assert commands().keys() == WORKING.keys()


@pytest.mark.usefixtures("no_long_work")
@pytest.mark.parametrize(
    ("command", "nonsense"),
    [
        pytest.param(command, values, id=f"{name}-{command}", marks=[pytest.mark.slow] if slow else [])
        for command in WORKING
        for name, values, slow in (("some", SOME_NONSENSE, command in LONG), ("all", NONSENSE, True))
    ],
)
def test_nonsense_for_every_option(
    run,
    nonsense: tuple[str, ...],
    command: str,
    model: str,
    flextok: str,
    pictures: Path,
    sounds: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    places = {
        "<sound-model>": model, "<image-model>": flextok, "<sound>": str(sounds / "a.wav"), "<image>": str(pictures / "a.png"),
        "<sound-tokens>": str(tmp_path / "sound.zt"), "<image-tokens>": str(tmp_path / "image.zt"),
        "<folder>": str(tmp_path / "folder"), "<parts>": str(tmp_path / "parts"), "<vocabulary>": str(tmp_path / "vocabulary"),
        "<missing>": str(tmp_path / "folder" / "missing" / "file"),
    }  # fmt: skip
    (tmp_path / "folder").mkdir()
    zoo.load(model).encode(sounds / "a.wav").save(tmp_path / "sound.zt")
    zoo.load(flextok).encode(pictures / "a.png").save(tmp_path / "image.zt")
    if command in ("tokens", "pack"):
        zoo.engine.tokenize(model, sounds / "a.wav", tmp_path / "parts", workers=0)
        zoo.Vocabulary.build(10, {"audio": zoo.load(model)}).save(tmp_path / "vocabulary")
    if command == "tokenize":
        monkeypatch.setattr(importlib.import_module("zoo.engine.run"), "_Tally", reached)
    seen = 0
    for number, working in enumerate(WORKING[command]):

        def placed(text: str, out: Path = tmp_path / f"out{number}") -> str:
            return places.get(text, text.replace("<out>", str(out)))

        for parameter in commands()[command]:
            for value in nonsense:
                given = [placed(text) for text in working]
                if parameter.param_type_name == "argument":
                    if not given:
                        given = [placed(value)]
                    else:
                        given[-1 if command == "cards" else 0] = placed(value)
                    given = [given[0], *given[1:]] if not given[0].startswith("-") else [*given[1:], "--", given[0]]
                else:
                    option = max(parameter.opts, key=len)
                    given += [f"{option}={placed(value)}"]
                result = run(command, *given)
                seen += 1
                label = f"{given}: exit code {result.code}\n{result.err}"
                assert "Traceback" not in result.err and "unexpected" not in result.err, label
                assert result.code in range(7), label
                if result.code not in (0, 2):
                    assert len([line for line in result.err.splitlines() if line.startswith(("error: ", "failed: "))]) == 1, (
                        label
                    )
                if value in ("nonsense", "<missing>") and (command, parameter.name) not in FREE:
                    assert result.code and "error: reached" not in result.err, label
    assert seen >= len(nonsense) * len(commands()[command])

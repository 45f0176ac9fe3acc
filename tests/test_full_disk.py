"""Commands that run out of room on a disk of one mebibyte: one line that names the file, and what was there stays."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

import zoo
from zoo import cli, media

MODEL = "wavtokenizer-tiny"


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("disk")
    mount = shutil.which("mount")
    if not sys.platform.startswith("linux") or mount is None:
        pytest.skip("a small disk is mounted on Linux")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


OLD = ("old.zt", "old.wav", "out/a.txt")


@pytest.fixture
def disk(mounted: Path) -> Iterator[Path]:
    """A disk with a few old files on it; `fill` takes the rest."""
    (mounted / "out").mkdir()
    for name in OLD:
        (mounted / name).write_text("old")
    yield mounted
    for path in mounted.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def fill(disk: Path, free: int) -> None:
    room = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(b"x" * (room - free))
    assert shutil.disk_usage(disk).free <= free


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    for name, samples in (("a.wav", 9_000), ("b.wav", 12_000)):
        soundfile.write(folder / name, 0.3 * np.sin(np.arange(samples) / 20), 24_000)
    return folder


@pytest.fixture(scope="module")
def tokens(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "one.zt"
    zoo.load(MODEL).encode(sounds / "a.wav").save(path)
    return path


@pytest.mark.parametrize(
    ("command", "free", "named"),
    [
        (["encode", MODEL, "SOUNDS", "-o", "DISK/new.zt"], 0, "new.zt"),
        (["encode", MODEL, "SOUNDS", "-o", "DISK/old.zt"], 0, "old.zt"),
        (["encode", MODEL, "SOUNDS", "-o", "DISK/out", "--per-file"], 0, "out/a.zt"),
        (["decode", "TOKENS", "-o", "DISK/back"], 8192, "back/one.wav"),
        (["decode", "TOKENS", "-o", "DISK/old.wav"], 8192, "old.wav"),
        (["reconstruct", MODEL, "SOUNDS", "-o", "DISK/out"], 8192, "out/a.wav"),
        (["eval", MODEL, "--data", "SOUNDS", "--out", "DISK/report"], 0, "report/items.part.jsonl"),
        (["eval", MODEL, "--data", "SOUNDS", "--out", "DISK/report"], 32768, "report/"),
        (["study", "photographs", "DISK/photographs"], 8192, "photographs/"),
    ],
)
def test_commands_say_what_has_no_room(
    command: list[str],
    free: int,
    named: str,
    disk: Path,
    sounds: Path,
    tokens: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill(disk, free)
    places = {"DISK": str(disk), "SOUNDS": str(sounds), "TOKENS": str(tokens)}
    for place, path in places.items():
        command = [word.replace(place, path) for word in command]
    monkeypatch.setattr(sys, "argv", ["zoo", *command])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 6
    assert lines[-1].startswith(f"error: no room for {disk / named}".rstrip("/"))
    left = {path.relative_to(disk).as_posix() for path in disk.rglob("*") if path.is_file()}
    assert {name for name in left if Path(name).name.startswith(".") or (disk / name).stat().st_size == 0} == set()
    assert all((disk / name).read_text() == "old" for name in OLD)


def test_models_say_what_has_no_room(disk: Path) -> None:
    fill(disk, 16384)
    with pytest.raises(zoo.DiskFullError, match=r"no room for .*saved/model\.safetensors"):
        zoo.load(MODEL).save_pretrained(disk / "saved")
    assert [path for path in disk.rglob("*") if "saved" in path.parts and path.is_file()] == []


def test_a_run_goes_on_when_there_is_room(disk: Path, sounds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(disk, 4096)
    monkeypatch.setattr(sys, "argv", ["zoo", "encode", MODEL, str(sounds), "-o", str(disk / "out"), "--per-file"])
    for code in (6, 0):
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert (stopped.value.code or 0) == code
        (disk / "filler").unlink(missing_ok=True)
    assert len(zoo.Tokens.load(disk / "out" / "b.zt")) == 1


@pytest.mark.parametrize("form", ["parquet", "megatron"])
def test_packing_goes_on_when_there_is_room(
    form: str, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with the name of the file, leaves nothing half, and gives the bytes of an undisturbed call."""
    pytest.importorskip("pyarrow")
    from test_packing import IMAGE, TEXT, VOCABULARY, files, lines, made, write_items

    write_items(tmp_path / "items", IMAGE, {str(number): ids for number, ids in enumerate(made(300, 300))})
    lines(tmp_path / "text.jsonl", [{"text": "word " * (number % 20)} for number in range(300)])
    VOCABULARY.save(tmp_path / "vocabulary.json")
    TEXT.save(str(tmp_path / "tokenizer.json"))
    command = ["zoo", "pack", str(tmp_path / "items"), str(tmp_path / "text.jsonl"), "--length", "64", "--unit-rows", "8"]
    command += ["--vocabulary", str(tmp_path / "vocabulary.json"), "--text", str(tmp_path / "tokenizer.json"), "--format", form]

    def run(out: Path) -> int:
        monkeypatch.setattr(sys, "argv", [*command, "-o", str(out)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    assert run(tmp_path / "whole") == 1
    whole = files(tmp_path / "whole")
    capsys.readouterr()
    out = disk / "packed"
    for free in (0, 40_960, 40_960):
        fill(disk, free)
        assert run(out) == 6
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith(f"error: no room for {out}/") and "the same command goes on from there" in last
        (disk / "filler").unlink()
        there = files(out) if out.exists() else {}
        assert not [name for name in there if name.endswith(".part")]
        assert there.items() <= whole.items()
    assert len(there) > 3
    assert run(out) == 1
    assert files(out) == whole


def test_what_is_appended_is_there_whole_or_not_at_all(disk: Path) -> None:
    assert media.append_bytes(disk / "journal", b"one") == 0
    fill(disk, 4096)
    with pytest.raises(zoo.DiskFullError, match=r"no room for .*journal"):
        media.append_bytes(disk / "journal", b"x" * 20_000)
    assert (disk / "journal").read_bytes() == b"one"
    assert media.append_bytes(disk / "journal", b"two") == 3

"""Files: replaced whole or not at all, found in folders, and refused before work is done for them."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import zoo
from zoo import media


def names(folder: Path) -> list[str]:
    """What is in a folder, but for the locks of writers that are at work."""
    found = sorted(path.name for path in folder.iterdir())
    return [name for name in found if not (name.endswith(".part") and f"{name}.new" in found)]


WRITER = """
import sys, time
from zoo import media
with media.replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print(temporary.name, flush=True)
    time.sleep(600)
"""


def _writing(path: Path) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_what_killed_writers_leave_is_swept_and_live_ones_are_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "out.zt"
    started = [_writing(target) for _ in range(3)]
    try:
        temporaries = [name for _, name in started]
        assert len(set(temporaries)) == 3 and names(tmp_path) == sorted(temporaries)
        for process, _ in (started[0], started[2]):
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert names(tmp_path) == sorted(temporaries)
        media.write_bytes(target, b"whole")
        assert names(tmp_path) == sorted([temporaries[1], "out.zt"])
        assert (tmp_path / temporaries[1]).read_text() == "half" and target.read_bytes() == b"whole"
        other = tmp_path / "other.zt"
        media.write_bytes(other, b"x")
        assert (tmp_path / temporaries[1]).exists()
    finally:
        for process, _ in started:
            process.kill()
            process.wait()
    media.write_bytes(target, b"again")
    media.write_bytes(target, b"again")
    assert names(tmp_path) == ["other.zt", "out.zt"]


def test_many_writers_of_one_file(tmp_path: Path) -> None:
    target = tmp_path / "out"
    contents = [bytes([65 + i]) * 50_000 for i in range(8)]
    wrong: list[bytes] = []

    def write(content: bytes) -> None:
        for _ in range(30):
            media.write_bytes(target, content)
            if (found := target.read_bytes()) not in contents:
                wrong.append(found)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and names(tmp_path) == ["out"]


def test_files_and_links_of_others_are_not_written_to(tmp_path: Path) -> None:
    with media.replacing(tmp_path / "out") as temporary:
        first = temporary.name.removesuffix(".new")
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / first).symlink_to(precious)
    media.write_bytes(tmp_path / "out", b"new")
    assert precious.read_text() == "mine" and (tmp_path / "out").read_bytes() == b"new"
    (tmp_path / first).unlink()
    os.link(precious, tmp_path / first)
    media.write_bytes(tmp_path / "out", b"newer")
    assert precious.read_text() == "mine" and (tmp_path / "out").read_bytes() == b"newer"


def test_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.media import files

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    media.write_bytes(tmp_path / "out", b"x")
    assert names(tmp_path) == ["out"]
    monkeypatch.setattr(files, "fcntl", None)
    media.write_bytes(tmp_path / "out", b"y")
    assert names(tmp_path) == ["out"] and (tmp_path / "out").read_bytes() == b"y"


@pytest.mark.parametrize("name", ["x" * 250, "漢" * 80, os.fsdecode(b"caf\xe9.zt")])
def test_names_of_all_kinds(tmp_path: Path, name: str) -> None:
    media.write_bytes(tmp_path / name, b"x")
    assert names(tmp_path) == [name]
    media.write_json(tmp_path / "report.json", {"file": name})
    assert zoo_json(tmp_path / "report.json") == {"file": name}


def zoo_json(path: Path) -> object:
    import json

    return json.loads(path.read_text(encoding="utf-8"))


def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "keep").write_text("old")
    with pytest.raises(zoo.OutputError, match=r"no room for .*keep"), media.replacing(tmp_path / "keep"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(tmp_path) == ["keep"] and (tmp_path / "keep").read_text() == "old"
    if os.path.exists("/dev/full"):
        with pytest.raises(zoo.OutputError, match="no room for /dev/full"):
            media.write_bytes("/dev/full", b"x" * 100_000)
        assert not Path("/dev/full").is_file()
    media.write_bytes(os.devnull, b"x")
    assert Path(os.devnull).is_char_device()


def test_outputs_are_checked_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, folder, reason in (
        ("", False, "empty"),
        (tmp_path, False, "is a folder"),
        (f"{tmp_path}/new/", False, "names a folder"),
        (tmp_path / "file", True, "must be a folder"),
        (tmp_path / "file" / "a.zt", False, "not a folder|Not a directory"),
        (tmp_path / "file" / "a", True, "not a folder|Not a directory"),
        (tmp_path / ("x" * 300), False, "too long"),
        ("/proc/nothing/a.zt", False, "cannot be written"),
    ):
        with pytest.raises(zoo.ArgumentError, match=reason):
            media.require_writable(path, folder=folder)
    for path, folder in (
        (tmp_path / "new" / "a.zt", False),
        (tmp_path / "new", True),
        (tmp_path, True),
        (tmp_path / "file", False),
    ):
        media.require_writable(path, folder=folder)
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_outputs(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(zoo.ArgumentError, match="Permission"):
        media.require_writable(tmp_path / "locked" / "a.zt")


def test_what_folders_hold_besides(tmp_path: Path) -> None:
    for name in ("a.wav", "sub/b.WAV", "c.m4a", "d.heic", "e.m4a", "._a.wav", ".DS_Store", ".git/x.wav", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "gone.wav").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.wav")
    skipped = media.Skipped()
    found = media.expand_paths([tmp_path], (".wav",), skipped)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.wav", "sub/b.WAV"]
    assert skipped.kinds == {
        ".m4a": 2, ".heic": 1, "._* of macOS": 1, "hidden": 2, "without an extension": 1, "broken links": 1,
        "that are no regular files": 1,
    }  # fmt: skip
    assert re.match(r"skipped 2 \.m4a, 2 hidden, ", str(skipped)) and "\n" not in str(skipped)
    assert str(media.Skipped()) == ""
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "x.m4a").touch()
    with pytest.raises(zoo.InputError, match=r"no file with a known extension.*1 \.m4a"):
        media.expand_paths([tmp_path / "only"], (".wav",))
    assert [path.name for path in media.expand_paths([tmp_path / "._a.wav"], (".wav",))] == ["._a.wav"]
    with pytest.raises(zoo.InputError, match="a path is empty"):
        media.expand_paths([""], (".wav",))


def test_links_to_folders(tmp_path: Path) -> None:
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "sub" / "a.wav").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.wav").touch()
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data" / "sub")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "itself").symlink_to(tmp_path / "data" / "itself")
    found = media.expand_paths([tmp_path / "data"], (".wav",))
    assert [path.relative_to(tmp_path / "data").as_posix() for path in found] == ["link/b.wav", "sub/a.wav"]


def test_folders_that_cannot_be_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.wav", "secret/b.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    scandir = os.scandir

    def scan(folder: Path):  # type: ignore[no-untyped-def]
        if Path(folder).name == "secret":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", scan)
    skipped = media.Skipped()
    assert [path.name for path in media.expand_paths([tmp_path], (".wav",), skipped)] == ["a.wav"]
    assert skipped.unreadable == {str(tmp_path / "secret"): "Permission denied"}
    assert "secret (Permission denied)" in str(skipped)
    with pytest.raises(zoo.InputError, match="secret cannot be read"):
        media.expand_paths([tmp_path / "secret"], (".wav",))


def test_what_an_extra_reads_is_taken_where_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    from zoo.media.kinds import audio
    from zoo.modality import modality

    names_ = ("a.wav", "b.m4a", "c.mp4", "d.webm", "e.mka", "f.aac", "g.mp2")
    for name in names_:
        (tmp_path / name).touch()

    def taken(there: bool) -> tuple[list[str], str]:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if there else None)
        skipped = media.Skipped(extras=modality("audio").extras)
        found = media.expand_paths([tmp_path], importlib.reload(audio).EXTENSIONS, skipped)
        return [path.name for path in found], str(skipped)

    try:
        assert taken(True) == (list(names_), "")
        files, skipped = taken(False)
        assert files == ["a.wav", "g.mp2"]
        assert '1 .m4a (read with pip install "tokenizer-zoo[video]")' in skipped and ".mp4" in skipped
    finally:
        monkeypatch.undo()
        importlib.reload(audio)


@pytest.mark.parametrize("kind", ["Tokens", "Latents", "Vocabulary", "Voice"])
def test_what_cannot_be_read_is_named(kind: str, tmp_path: Path) -> None:
    from zoo.codecs.vectok.voice import Voice

    load = Voice.load if kind == "Voice" else getattr(zoo, kind).load
    for path, reason in ((tmp_path / "none.zt", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(zoo.InputError, match=f"^{path} {reason}"):
            load(path)

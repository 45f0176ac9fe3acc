"""Sources and outputs that are away, closed, read-only or packed."""

from __future__ import annotations

import gzip
import os
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from test_engine import CONTENTS, fill, rows, run
from zoo.errors import InputError, OutputError

pytest.importorskip("pyarrow")

from zoo.engine import contents, packed


def brought_back(place: Path, seconds: float) -> threading.Thread:
    """A folder that goes away now, and is there again after some time."""
    away = place.with_name("away")
    place.rename(away)

    def wait() -> None:
        time.sleep(seconds)
        away.rename(place)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def require_waiting(tmp_path: Path, seconds: float, patience: float) -> None:
    """A run goes on where its sources are away for less than its patience, with the bytes of an undisturbed one."""
    folder = fill(tmp_path / "in", CONTENTS)
    run(folder, tmp_path / "out")
    whole = {part.name: part.read_bytes() for part in (tmp_path / "out").glob("part-*")}
    for name in whole:
        (tmp_path / "out" / name).unlink()
    begun = time.monotonic()
    thread = brought_back(folder, seconds)
    run(folder, tmp_path / "out", patience=patience)
    thread.join()
    assert time.monotonic() - begun >= seconds
    assert {part.name: part.read_bytes() for part in (tmp_path / "out").glob("part-*")} == whole


def test_a_file_system_that_comes_back(tmp_path: Path) -> None:
    require_waiting(tmp_path, 0.5, 10)
    for part in (tmp_path / "out").glob("part-*"):
        part.unlink()
    (tmp_path / "in").rename(tmp_path / "gone")
    with pytest.raises(InputError, match=r"3 of 3 units are not done.*00\.bin has vanished"):
        run(tmp_path / "in", tmp_path / "out", patience=0.5)
    assert not list((tmp_path / "out").glob("part-*"))


@pytest.mark.slow
def test_a_file_system_that_is_away_for_a_minute(tmp_path: Path) -> None:
    require_waiting(tmp_path, 60, 120)


def test_a_network_that_fails_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of the libraries behind fsspec are waited out; a missing object is none of them."""
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for index, content in enumerate(CONTENTS):
        memory.pipe_file(f"/network/in/{index}.bin", content)
    real, left = memory.cat_file, 3

    def cat_file(path: str, *args: Any, **kwargs: Any) -> bytes:
        nonlocal left
        if "/in/" in path and left:
            left -= 1
            raise RuntimeError("the connection was reset")
        content: bytes = real(path, *args, **kwargs)
        return content

    monkeypatch.setattr(type(memory), "cat_file", lambda self, path, *args, **kwargs: cat_file(path, *args, **kwargs))
    assert run("memory://network/in", tmp_path / "out", patience=20).failures == 0
    assert left == 0
    assert [row["ids"] for row in rows(tmp_path / "out")] == [list(content) for content in CONTENTS]
    (tmp_path / "out" / "part-000001.parquet").unlink()
    left = 99
    with pytest.raises(InputError, match=r"1 of 3 units are not done.*RuntimeError: the connection was reset"):
        run("memory://network/in", tmp_path / "out", patience=0.5)
    left = 0
    memory.rm_file("/network/in/2.bin")
    with pytest.raises(InputError, match=r"2\.bin has vanished"):
        run("memory://network/in", tmp_path / "out", patience=20)


# ---- permissions


@pytest.fixture
def common() -> Iterator[Path]:
    """A folder that everybody may look into."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def as_somebody(action: Callable[[], object]) -> str:
    """What an action gives, or its error, of a process that is not root's."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            said = repr(action())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        said = file.read().decode()
    os.waitpid(child, 0)
    return said


def test_sources_and_outputs_without_permission(common: Path) -> None:
    """A file that may not be read is a row, a folder is named, and so is an output that may not be written."""
    folder = fill(common / "in", [b"one", b"two", b"three"])
    fill(folder / "closed", [b"four"]).chmod(0)
    (folder / "01.bin").chmod(0)
    out = common / "out"
    out.mkdir()
    out.chmod(0o777)
    said = as_somebody(lambda: run(folder, out))
    assert "failures=1" in said and "closed (Permission denied)" in said
    found = rows(out)
    assert [row["key"] for row in found] == ["00.bin", "01.bin", "02.bin"]
    assert [row["error"] for row in found] == [None, "it cannot be read: Permission denied", None]
    (common / "mine").mkdir(mode=0o755)
    if os.geteuid() == 0:
        said = as_somebody(lambda: run(folder, common / "mine"))
        assert said.startswith("NotWritableError") and "Permission denied" in said and str(common / "mine") in said
        said = as_somebody(lambda: run(folder / "closed", out / "other"))
        assert said.startswith("ArgumentError") and "closed cannot be listed: Permission denied" in said
    assert not list((common / "mine").iterdir())
    (folder / "closed").chmod(0o755)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_disk_that_becomes_read_only(tmp_path: Path) -> None:
    """As one does that has errors; the same command goes on when it may be written again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    folder = fill(tmp_path / "in", CONTENTS)

    def close(event: dict[str, Any]) -> None:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    try:
        with pytest.raises(OutputError, match="Read-only file system"):
            run(folder, disk / "out", unit_items=1, on_event=close)
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert 0 < len(list((disk / "out").glob("part-*"))) < 5
        run(folder, disk / "out", unit_items=1)
        run(folder, tmp_path / "whole", unit_items=1)
        for part in (tmp_path / "whole").glob("part-*"):
            assert part.read_bytes() == (disk / "out" / part.name).read_bytes()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# ---- packed files


def test_packed_files_are_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the units of one process; another file, or the same one when it has changed, is another matter."""

    folder = fill(tmp_path / "in", [bytes([i]) * 50_000 for i in range(30)])
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    opened: list[str] = []

    def counted(place: str, where: Any) -> Any:
        opened.append(place)
        return packed.opened(place, where)

    rewinds: list[int] = []
    real = gzip.GzipFile.seek

    def seek(self: Any, offset: int, whence: int = 0) -> int:
        if whence == 0 and offset < self.tell():
            rewinds.append(offset)
        return real(self, offset, whence)

    monkeypatch.setattr(contents, "opened", counted)
    run(tmp_path / "a.tar.gz", tmp_path / "out", unit_items=4)
    monkeypatch.setattr(gzip.GzipFile, "seek", seek)
    for part in (tmp_path / "out").glob("part-*"):
        part.unlink()
    opened.clear()
    run(tmp_path / "a.tar.gz", tmp_path / "out", unit_items=4)
    # The first unit begins in front of where the run before it has left off.
    assert opened == [] and len(rewinds) == 1
    assert [row["ids"] for row in rows(tmp_path / "out")] == [[i] * 50_000 for i in range(30)]

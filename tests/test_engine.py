"""The engine: whole data sets to token files, exactly once."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from toys.hazard import Hazard, HazardConfig
from toys.two_rates import TwoRates
from zoo.errors import ArgumentError, InputError, OutputError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from zoo import engine  # noqa: E402  (it needs pyarrow)
from zoo.engine import parts, plan, report  # noqa: E402  (likewise)
from zoo.engine.lock import Lock  # noqa: E402  (likewise)
from zoo.engine.nursery import Nursery  # noqa: E402  (likewise)
from zoo.engine.sources import Choice, Listing  # noqa: E402  (likewise)
from zoo.engine.store import Store  # noqa: E402  (likewise)
from zoo.engine.work import Loading  # noqa: E402  (likewise)


def fill(folder: Path, contents: Sequence[bytes], suffix: str = ".bin") -> Path:
    """A folder of files ``00.bin``, ``01.bin``, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, content in enumerate(contents):
        (folder / f"{index:02d}{suffix}").write_bytes(content)
    return folder


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for part in sorted(out.glob("part-*.parquet")) for row in pq.ParquetFile(part).read().to_pylist()]


def files(out: Path) -> dict[str, bytes]:
    """Everything in a folder but the lock."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def run(sources: Any, out: Path, **options: Any) -> engine.Summary:
    """Of bytes, in this process, two items a unit."""
    return engine.tokenize(Hazard(), sources, out, **({"workers": 0, "unit_items": 2, "patience": 0.0} | options))


CONTENTS = [b"", b"one", b"two", b"three", b"\xff" * 9]


# ---- ids, and where they come from


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of other lengths, rates and numbers of channels, one of which is broken."""
    soundfile = pytest.importorskip("soundfile")
    folder = tmp_path_factory.mktemp("clips")
    noise = torch.Generator().manual_seed(0)
    for index, (samples, rate) in enumerate([(2400, 24000), (999, 8000), (4000, 16000), (2400, 24000), (1, 24000)]):
        sound = torch.rand(samples, 1 + index % 2, generator=noise).numpy() - 0.5
        soundfile.write(folder / f"{index}.wav", sound, rate)
    (folder / "5.wav").write_bytes((folder / "0.wav").read_bytes()[:100])
    (folder / "notes.txt").write_text("no sound")
    return folder


def as_tar(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.glob("*.wav")):
            tar.add(file, file.name)
            text = f"text {file.stem}".encode()
            member = tarfile.TarInfo(f"{file.stem}.txt")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return path


def as_table(folder: Path) -> Any:
    found = sorted(folder.glob("*.wav"))
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    media = [
        {"bytes": path.read_bytes(), "path": None} if i % 2 else {"bytes": None, "path": str(path)}
        for i, path in enumerate(found)
    ]
    return pa.table(
        {"audio": pa.array(media, struct), "text": [f"text {path.stem}" for path in found], "width": list(range(len(found)))}
    )


def test_every_source_gives_the_ids_of_each_item_alone(clips: Path, tmp_path: Path) -> None:
    tok = zoo.load("wavtokenizer-tiny")
    as_tar(clips, tmp_path / "clips.tar")
    subprocess.run(["gzip", "-k", tmp_path / "clips.tar"], check=True)
    table = as_table(clips)
    pq.write_table(table, tmp_path / "clips.parquet", row_group_size=4)
    with pa.OSFile(str(tmp_path / "clips.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    lines = [{"path": os.path.relpath(path, tmp_path), "text": f"text {path.stem}"} for path in sorted(clips.glob("*.wav"))]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    sources = {"folder": (clips, "{}.wav", None)}
    sources |= {kind: (tmp_path / f"clips.{kind}", f"clips.{kind}#{{}}.wav", "txt") for kind in ("tar", "tar.gz")}
    sources |= {kind: (tmp_path / f"clips.{kind}", f"clips.{kind}#{{}}", "text") for kind in ("parquet", "arrow", "jsonl")}
    (tmp_path / "many" / "deep").mkdir(parents=True)
    (tmp_path / "many" / "deep" / "a.tar").symlink_to(tmp_path / "clips.tar")
    sources["shards"] = (tmp_path / "many", "deep/a.tar#{}.wav", None)
    alone = [tok.encode(clips / f"{index}.wav") for index in range(5)]
    for kind, (source, key, text) in sources.items():
        keep = {"parquet": ["text", "width"], "arrow": ["*"], "tar": ["txt"], "tar.gz": ["txt"]}.get(kind)
        summary = engine.tokenize(tok, source, tmp_path / kind, workers=0, unit_items=4, keep=keep)
        found = rows(tmp_path / kind)
        assert (summary.items, summary.failures, summary.units) == (6, 1, 2), kind
        assert [row["key"] for row in found] == [key.format(index) for index in range(6)]
        for row, tokens in zip(found, alone, strict=False):
            assert (row["ids"], row["length"], row["error"]) == (tokens.tolist()[0], int(tokens.lengths[0]), None)
            assert {name: row[name] for name in ("samples", "sample_rate")} == tokens.meta[0]
        assert found[5]["ids"] is found[5]["length"] is found[5]["samples"] is None
        assert "truncated" in found[5]["error"]
        if text:
            assert [row[text] for row in found] == [f"text {index}" for index in range(6)]
        if kind in ("parquet", "arrow"):
            assert [row["width"] for row in found] == list(range(6))
        assert pq.read_table(tmp_path / kind / "failures.parquet")["key"].to_pylist() == [key.format(5)]
    assert summary.extent == pytest.approx(sum(row["samples"] / row["sample_rate"] for row in found[:5]) / 3600)
    assert list(report.problems(Store(tmp_path / "tar"), report.plan_in(Store(tmp_path / "tar")))) == []
    again = list(report.recomputed(Store(tmp_path / "tar"), report.plan_in(Store(tmp_path / "tar")), 3, tok))
    assert [reason for _, reason in again] == [None] * 3
    header, _, _ = parts.read_header(tmp_path / "tar" / "part-000001.parquet")
    assert (header.tokenizer, header.fingerprint, header.vocab_size, header.unit) == (tok.name, tok.fingerprint, 1024, 1)


def test_scales_codebooks_and_long_recordings(clips: Path, tmp_path: Path) -> None:
    """The ends of scales are a column, the frame of several codebooks is in the header; what is too long is refused unread."""
    engine.tokenize(Hazard(HazardConfig(segments=(1, 4, 9))), fill(tmp_path / "in", CONTENTS[2:]), tmp_path / "out", workers=0)
    assert [row["segments"] for row in rows(tmp_path / "out")] == [[1, 3], [1, 4, 5], [1, 4, 9]]
    codec = TwoRates()
    summary = engine.tokenize(codec, clips, tmp_path / "codes", workers=0, max_seconds=0.11)
    header, _, _ = parts.read_header(tmp_path / "codes" / "part-000000.parquet")
    assert header.frame == codec.spec.frame
    found = rows(tmp_path / "codes")
    assert found[0]["ids"] == codec.encode(clips / "0.wav").tolist()[0]
    assert [row["error"] for row in found[1:3]] == [
        "it lasts 0.124875 s, more than the 0.11 s that are allowed",
        "it lasts 0.25 s, more than the 0.11 s that are allowed",
    ]
    assert (summary.failures, summary.skipped) == (3, "skipped 1 .txt")


# ---- exactly once


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """However many parts are there; what a killed writer left is removed, and nothing else changes."""
    folder = fill(tmp_path / "in", CONTENTS)
    summary = run(folder, tmp_path / "out")
    assert (summary.items, summary.units, summary.encoded, summary.failures) == (5, 3, 5, 0)
    whole = files(tmp_path / "out")
    assert sorted(whole) == ["_plan/listing.parquet", "_plan/plan.json", *(f"part-00000{i}.parquet" for i in range(3))]
    assert [row["ids"] for row in rows(tmp_path / "out")] == [list(content) for content in CONTENTS]
    (tmp_path / "out" / "part-000001.parquet").unlink()
    (tmp_path / "out" / ".part-000001.parquet-0123.part").write_bytes(b"half")
    seen: list[dict[str, Any]] = []
    summary = run(folder, tmp_path / "out", on_event=seen.append)
    assert (summary.items, summary.encoded, [event["unit"] for event in seen]) == (5, 2, [1])
    assert seen[0]["items_done"] >= seen[0]["items"] == 2
    assert files(tmp_path / "out") == whole
    assert run(folder, tmp_path / "out").encoded == 0
    # In a folder of its sources, of which its own files are none.
    for _ in range(2):
        assert run(folder, folder / "out", extend=True).items == 5


#: What a killed process has done last; each is a call that changes what is on the disk.
STEPS = ("fsync", "replace", "link", "unlink", "rmdir", "makedirs")


def killed_at(step: int, action: Callable[[], object]) -> bool:
    """Whether a child process that is killed before the given step of `STEPS` came so far."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == signal.SIGKILL
    left = step

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    try:
        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        action()
    finally:
        os._exit(0)


def test_whatever_step_it_is_killed_at(tmp_path: Path) -> None:
    """A kill before any step that changes the disk, then the same command: the bytes are those of an undisturbed run."""
    folder = fill(tmp_path / "in", [b"one", b"bad", b"two"])
    run(folder, tmp_path / "whole")
    whole = files(tmp_path / "whole")
    steps = 0
    while killed_at(steps, partial(run, folder, tmp_path / f"{steps}")):
        run(folder, tmp_path / f"{steps}")
        assert files(tmp_path / f"{steps}") == whole, f"killed before step {steps}"
        steps += 1
    assert steps > 12
    assert files(tmp_path / f"{steps}") == whole


def test_ctrl_c_finishes_the_unit_in_flight(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in", CONTENTS)

    def interrupt(event: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out", on_event=interrupt, unit_items=1, encode={"delay": 0.05})
    assert signal.getsignal(signal.SIGINT) is before
    done = sorted(path.name for path in (tmp_path / "out").glob("part-*"))
    assert 1 <= len(done) < 5
    assert not (tmp_path / "out" / "_plan" / "lock").exists()
    summary = run(folder, tmp_path / "out", unit_items=1, encode={"delay": 0.05})
    assert summary.encoded == 5 - len(done)
    assert [row["ids"] for row in rows(tmp_path / "out")] == [list(content) for content in CONTENTS]


@pytest.mark.parametrize(
    ("tokenizer", "options", "message"),
    [
        (Hazard(HazardConfig(1)), {}, "fingerprint was"),
        (Hazard(), {"encode": {"max_bytes": 7}}, "options was {} and is now {'max_bytes': 7}"),
        (Hazard(), {"unit_items": 3}, "unit_items was 2 and is now 3"),
        (Hazard(), {"keep": ["text"]}, "keep was None"),
        (Hazard(), {"new": True}, "holds a run already"),
        (Hazard(), {"encode": {"depth": 7}}, "takes no option 'depth'"),
        (Hazard(), {"max_seconds": 1.0}, "takes no --max-seconds"),
        (Hazard(), {"unit_items": 0}, "unit_items must be a number above 0"),
        (Hazard(), {"unit_mb": float("inf")}, "unit_mb must be a number above 0, not inf"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, tokenizer: Hazard, options: dict[str, Any], message: str) -> None:
    folder = fill(tmp_path / "in", CONTENTS[:2])
    run(folder, tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(ArgumentError, match=message):
        engine.tokenize(tokenizer, folder, tmp_path / "out", workers=0, **options)
    assert files(tmp_path / "out") == before


def test_other_sources_are_refused_or_added(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in", CONTENTS[:3])
    run(folder, tmp_path / "out")
    before = files(tmp_path / "out")
    fill(tmp_path / "more", [b"new"], suffix=".other")
    with pytest.raises(ArgumentError, match=r"sources was .*--extend"):
        run([folder, tmp_path / "more"], tmp_path / "out")
    (folder / "00.bin").unlink()
    summary = run([folder, tmp_path / "more"], tmp_path / "out", extend=True)
    assert (summary.items, summary.encoded, summary.vanished) == (4, 1, ("00.bin",))
    assert [row["key"] for row in rows(tmp_path / "out")] == ["00.bin", "01.bin", "02.bin", "00.other"]
    assert {name: files(tmp_path / "out")[name] for name in before if name.startswith("part")} == {
        name: content for name, content in before.items() if name.startswith("part")
    }
    assert run([folder, tmp_path / "more"], tmp_path / "out", extend=True).encoded == 0
    (folder / "01.bin").write_bytes(b"other content")
    with pytest.raises(ArgumentError, match=r"1 items have changed .*01\.bin"):
        run([folder, tmp_path / "more"], tmp_path / "out", extend=True)
    store = Store(tmp_path / "out")
    assert list(report.problems(store, report.plan_in(store))) == []


def test_keys_are_unique(tmp_path: Path) -> None:
    one, other = fill(tmp_path / "one", [b"a"]), fill(tmp_path / "other", [b"b"])
    with pytest.raises(ArgumentError, match=r"two items have the key '00\.bin', .*one/00\.bin and .*other/00\.bin"):
        run([one, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ArgumentError, match="named twice"):
        run([one, one / "*.bin"], tmp_path / "out")
    assert run(tmp_path / "o*" / "*.bin", tmp_path / "out").items == 2
    assert [row["key"] for row in rows(tmp_path / "out")] == ["one/00.bin", "other/00.bin"]


# ---- what goes wrong


def test_bad_items_are_rows(tmp_path: Path) -> None:
    """Each with its reason, in its place; what shares a batch with them gets its own ids."""
    contents = [b"one", b"bad", b"odd", b"memory", b"encode bad", b"encode odd", b"two", b"x" * 100]
    summary = run(fill(tmp_path / "in", contents), tmp_path / "out", unit_items=100, encode={"max_bytes": 50})
    found = rows(tmp_path / "out")
    assert [row["ids"] for row in found] == [list(content) if content in (b"one", b"two") else None for content in contents]
    reasons = [row["error"] for row in found]
    assert reasons[1] == reasons[4] == "it is bad"
    assert reasons[2] == reasons[5] == "RuntimeError: a library failed at <object at 0x…>"
    assert reasons[3] == "there is not enough memory for it"
    assert "50" in reasons[7]
    assert summary.failures == 6
    failures = pq.read_table(tmp_path / "out" / "failures.parquet").to_pylist()
    assert failures == [{"key": row["key"], "unit": 0, "error": row["error"]} for row in found if row["error"]]


def test_sources_that_vanish_or_change(tmp_path: Path) -> None:
    """Their units are not done, all others are; nothing is mixed."""
    folder = fill(tmp_path / "in", CONTENTS)
    run(folder, tmp_path / "out", unit_items=1)
    whole = files(tmp_path / "out")
    for unit in range(3):
        (tmp_path / "out" / f"part-00000{unit}.parquet").unlink()
    status = (folder / "01.bin").stat()
    (folder / "01.bin").unlink()
    (folder / "02.bin").write_bytes(b"another")
    with pytest.raises(InputError, match=r"2 of 5 units are not done.*01\.bin has vanished.*02\.bin has changed"):
        run(folder, tmp_path / "out", unit_items=1)
    assert "part-000000.parquet" in files(tmp_path / "out")
    with pytest.raises(InputError, match=r"1 of 5 units are not done.*02\.bin has changed"):
        run(folder, tmp_path / "out", unit_items=1, accept_missing=True)
    assert [row["error"] for row in rows(tmp_path / "out")] == [None, "it vanished after it was listed", None, None]
    (tmp_path / "out" / "part-000001.parquet").unlink()
    (folder / "01.bin").write_bytes(CONTENTS[1])
    os.utime(folder / "01.bin", ns=(status.st_atime_ns, status.st_mtime_ns))
    (folder / "02.bin").write_bytes(CONTENTS[2])
    with pytest.raises(InputError, match=r"1 of 5 units are not done.*02\.bin has changed"):
        run(folder, tmp_path / "out", unit_items=1)
    assert {name: content for name, content in whole.items() if name != "part-000002.parquet"} == {
        name: content for name, content in files(tmp_path / "out").items() if name != "failures.parquet"
    }


def test_broken_tars(tmp_path: Path) -> None:
    """A damaged header in the middle, which Python's reader takes for the end, and a tar that was cut off."""
    fill(tmp_path / "in", [b"a" * 600, b"b" * 600, b"c" * 600])
    with tarfile.open(tmp_path / "whole.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted((tmp_path / "in").iterdir()):
            tar.add(path, path.name)
    content = bytearray((tmp_path / "whole.tar").read_bytes())
    (tmp_path / "cut.tar").write_bytes(content[: 3 * 1536 - 700])
    content[1536:1600] = b"\xff" * 64
    (tmp_path / "damaged.tar").write_bytes(content)
    (tmp_path / "two.tar").write_bytes(2 * (tmp_path / "whole.tar").read_bytes())
    (tmp_path / "none.tar").write_bytes(b"no tar at all" * 99)
    for name, sound in (("damaged", 1), ("cut", 2), ("two", 3), ("none", 0), ("whole", 3)):
        summary = run(tmp_path / f"{name}.tar", tmp_path / name)
        found = rows(tmp_path / name)
        assert [row["error"] is None for row in found] == [True] * sound + [False] * (name != "whole"), name
        assert all(row["ids"] == [ord("abc"[i])] * 600 for i, row in enumerate(found[:sound]))
        assert summary.failures == (name != "whole")
        if name != "whole":
            assert "the tar" in found[-1]["error"]


def test_broken_tables_and_lines(tmp_path: Path) -> None:
    table = pa.table({"bytes": [b"one", None, b"two"], "other": [b"x", b"y", b"z"], "ids": [1, 2, 3]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ArgumentError, match="no column 'media'; there are bytes, other, ids"):
        run(tmp_path / "a.parquet", tmp_path / "out", column="media")
    with pytest.raises(ArgumentError, match="the column 'ids' is int64"):
        run(tmp_path / "a.parquet", tmp_path / "out", column="ids")
    with pytest.raises(ArgumentError, match="--keep text: no source has that column; there are"):
        run(tmp_path / "a.parquet", tmp_path / "out", keep=["ids", "text"])
    run(tmp_path / "a.parquet", tmp_path / "out", keep=["ids"], unit_items=1)
    assert [row["error"] for row in rows(tmp_path / "out")] == [None, "the column holds nothing for it", None]
    assert [row["source_ids"] for row in rows(tmp_path / "out")] == [1, 2, 3]
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(ArgumentError, match=r"b\.parquet cannot be read as a table"):
        run(tmp_path / "b.parquet", tmp_path / "other")
    pq.write_table(table.rename_columns(["one", "other", "ids"]), tmp_path / "c.parquet")
    with pytest.raises(ArgumentError, match="which column holds the media"):
        run(tmp_path / "c.parquet", tmp_path / "other")
    (tmp_path / "x.bin").write_bytes(b"x")
    lines = [{"path": "x.bin", "n": 1}, {"path": "x.bin", "n": 2.5, "t": None}, {"path": "gone.bin", "n": None, "t": [1]}]
    text = "\n".join([*map(json.dumps, lines), "{", '{"path": 3, "t": "é"}'])
    (tmp_path / "d.jsonl").write_text(text)
    run(tmp_path / "d.jsonl", tmp_path / "lines")
    found = rows(tmp_path / "lines")
    assert [row["ids"] for row in found] == [[120], [120], None, None, None]
    assert [row["n"] for row in found] == [1.0, 2.5, None, None, None]
    assert [row["t"] for row in found] == [None, None, "[1]", None, "é"]
    assert [row["error"] and row["error"].partition(":")[0] for row in found[2:]] == [
        "gone.bin does not exist",
        "the line is no JSON object",
        "its 'path' is no path",
    ]


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in", CONTENTS[:2])
    with pytest.raises(ArgumentError, match=r"holds other things \(00\.bin, 01\.bin\)"):
        run(folder, folder)
    with pytest.raises(ArgumentError, match="is a file"):
        run(folder, folder / "00.bin")
    with pytest.raises(ArgumentError, match="a path is empty"):
        engine.tokenize(Hazard(), "", tmp_path / "out", workers=0)
    with pytest.raises(ArgumentError, match="no such file, or nothing for bytes in it"):
        run(tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(OutputError, match="cannot be written"):
            run(folder, tmp_path / "closed" / "out")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a disk that runs full nothing half is left, and the same command goes on."""
    folder = fill(tmp_path / "in", CONTENTS)
    run(folder, tmp_path / "whole")
    real, left = os.fsync, 5

    def fsync(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OutputError, match="no room for"):
            run(folder, tmp_path / "out")
    assert not [name for name in files(tmp_path / "out") if name.endswith(".part")]
    run(folder, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_two_runs_at_once(tmp_path: Path) -> None:
    """The second one stops; of one that is dead, or silent on another machine, the lock is taken over."""
    folder, store = fill(tmp_path / "in", CONTENTS[:2]), Store(tmp_path / "out")
    with Lock(store):
        with pytest.raises(ArgumentError, match=f"another run is writing to .* process {os.getpid()} on "):
            run(folder, tmp_path / "out")
        held = json.loads(store.read("_plan/lock"))
    # One that this very process could not remove counts for nothing.
    store.write("_plan/lock", json.dumps(held).encode())
    run(folder, tmp_path / "out")
    others = [held | {"machine": "another"}, held | {"machine": "another", "time": 0}, held | {"started": "1"}, {}]
    for other, refused in zip(others, (True, False, False, False), strict=True):
        store.write("_plan/lock", json.dumps(other).encode())
        if refused:
            with pytest.raises(ArgumentError, match="gave a sign of life 0 s ago"):
                run(folder, tmp_path / "out")
        else:
            run(folder, tmp_path / "out")
            assert not (tmp_path / "out" / "_plan" / "lock").exists()
    with Lock(store) as lock:
        store.write("_plan/lock", json.dumps(held).encode())
        lock._beat_once()
        with pytest.raises(ArgumentError, match=r"took .* over"):
            lock.require()
    assert store.read("_plan/lock") == json.dumps(held).encode()


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    folder, store = fill(tmp_path / "in", [*CONTENTS, b"bad"]), Store(tmp_path / "out")
    run(folder, tmp_path / "out")
    plan = report.plan_in(store)
    assert list(report.problems(store, plan)) == []
    part = tmp_path / "out" / "part-000000.parquet"
    sound = part.read_bytes()
    schema = pq.read_schema(part)
    columns = {name: pq.ParquetFile(part).read()[name].to_pylist() for name in schema.names}
    changes: list[tuple[dict[str, Any], str]] = [
        ({"key": ["01.bin", "00.bin"]}, "its rows are not those of the listing"),
        ({"length": [0, 7]}, "lengths are not those"),
        ({"ids": [None, [1, 2, 3]], "length": [None, 3]}, "00.bin has both ids and an error, or neither"),
        ({"ids": [[], [1, 2, 600]]}, "outside the vocabulary"),
    ]
    for change, message in changes:
        part.write_bytes(parts.part_bytes(schema, columns | change))
        assert [message in line for line in report.problems(store, plan)] == [True], message
    part.write_bytes((tmp_path / "out" / "part-000001.parquet").read_bytes())
    assert ["it says" in line for line in report.problems(store, plan)] == [True]
    part.write_bytes(sound[:-50])
    assert len(list(report.problems(store, plan))) == 1
    part.unlink()
    assert [line for line in report.problems(store, plan) if "unit 0 is not done: 2 items, from 00.bin on" in line]
    part.write_bytes(parts.part_bytes(schema, columns | {"ids": [[], [1, 2, 3]]}))
    again = dict(report.recomputed(store, plan, 9, Hazard()))
    assert again.pop("01.bin") == "3 ids instead of 3, the first other one at 0"
    assert again == dict.fromkeys(("00.bin", "02.bin", "03.bin", "04.bin"))
    with pytest.raises(ArgumentError, match="not of hazard"):
        list(report.recomputed(store, plan, 1, Hazard(HazardConfig(1))))


# ---- worker processes


def test_a_crash_is_the_item_s_fault(tmp_path: Path) -> None:
    """Of the process of a worker, which is replaced; parts are those of a single process."""
    contents = [b"one", b"crash", b"two", b"bad", b"three"]
    folder = fill(tmp_path / "in", contents)
    summary = run(folder, tmp_path / "out", workers=1, unit_items=100)
    assert [row["error"] for row in rows(tmp_path / "out")] == [None, "its process crashed (SIGSEGV)", None, "it is bad", None]
    assert summary.failures == 2
    (folder / "01.bin").write_bytes(b"bad")
    run(folder, tmp_path / "other", unit_items=100)
    assert [row["ids"] for row in rows(tmp_path / "other")] == [row["ids"] for row in rows(tmp_path / "out")]


@pytest.mark.slow
def test_hangs_kills_and_crashes_of_batches(tmp_path: Path) -> None:
    contents = [b"one", b"hang", b"killed", b"exit", b"encode crash", b"two", b"encode killed", b"three", b"encode hang", b"4"]
    folder = fill(tmp_path / "in", contents)
    summary = run(folder, tmp_path / "out", workers=2, unit_items=4, item_seconds=2.0)
    reasons = [row["error"] for row in rows(tmp_path / "out")]
    assert reasons == [
        None,
        "it took longer than 2 s to read",
        "its process was killed, as the system does when memory runs out",
        "its process ended with exit code 3",
        "its process crashed (SIGSEGV)",
        None,
        "its process was killed, as the system does when memory runs out",
        None,
        "it took longer than 2 s to encode",
        None,
    ]
    assert summary.failures == 6


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every worker loads the tokenizer")
@pytest.mark.parametrize("unnoticed", [False, True])
def test_workers_are_forks_that_end_with_the_process_they_come_from(unnoticed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another such process takes its place; also if the system, for a while after its end, says that it is alive."""
    if unnoticed:
        monkeypatch.setattr("zoo.engine.nursery._Started.alive", True)
    nursery = Nursery(Loading.of(Hazard()), {})
    try:
        assert nursery.hello().header.tokenizer == "hazard"
        one, two = nursery.worker(), nursery.worker()
        one.kill()
        assert one.messages.get(timeout=60) is None and one.ended() == -signal.SIGKILL
        assert nursery._first is not None and nursery._first.forks
        nursery._first.worker.kill()
        assert two.messages.get(timeout=60) is None and two.ended() == -signal.SIGKILL
        three = nursery.worker()
        three.kill()
        assert three.messages.get(timeout=60) is None and three.ended() == -signal.SIGKILL
    finally:
        nursery.close()


def test_units_grow_if_no_size_is_asked_for(tmp_path: Path) -> None:
    """So that the first results come soon and the last ones at about the same time, whatever the number of workers."""
    lines = "".join(json.dumps({"path": "a.bin"}) + "\n" for _ in range(2000))
    (tmp_path / "a.bin").write_bytes(b"a")
    (tmp_path / "a.jsonl").write_text(lines)
    store = Store(tmp_path / "out")
    listing = Listing([str(tmp_path / "a.jsonl")], Choice("bytes", None), store.place)
    header = parts.Header("hazard", "0" * 16, 512, "bytes")
    with Lock(store):
        made = plan.create(store, plan.Plan(header, {}, (), (), 512, 1 << 27, growing=True), listing)
    assert plan.Plan.read(store) == made
    sizes = [len(found) for _, found in made.rows(store, lambda unit: True)]
    assert sum(sizes) == 2000 and sizes[:64] == [16] * 64 and max(sizes) == max(sizes[-3:]) <= 2000 // 64
    assert sizes[:-1] == sorted(sizes[:-1])


@pytest.mark.slow
def test_a_cluster_that_loses_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines, one of which is taken away in mid-run; the bytes are those of a run in this process."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    folder = fill(tmp_path / "in", [*CONTENTS, b"bad", b"crash"] * 4)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    lost = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()

    def lose(event: dict[str, Any]) -> None:
        nonlocal lost
        if lost is not None and event["items_done"] >= 6:
            cluster.remove_node(lost, allow_graceful=False)
            lost = None

    try:
        options = {"encode": {"delay": 0.2}, "unit_items": 2}
        summary = run(folder, tmp_path / "out", workers=2, cluster=cluster.address, on_event=lose, **options)
    finally:
        cluster.shutdown()
    assert lost is None
    assert (summary.items, summary.failures) == (28, 8)
    store = Store(tmp_path / "out")
    assert list(report.problems(store, report.plan_in(store))) == []
    for path in folder.iterdir():
        if path.read_bytes() == b"crash":
            path.write_bytes(b"bad")
    run(folder, tmp_path / "whole", **options)
    assert [row["ids"] for row in rows(tmp_path / "out")] == [row["ids"] for row in rows(tmp_path / "whole")]

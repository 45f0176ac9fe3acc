"""Data sets in which some items are broken, for every kind of media: rows with a reason, and all others as they are alone."""

from __future__ import annotations

import json
import random
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zoo
from test_engine import rows
from zoo import media
from zoo.errors import ItemError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from zoo import engine  # noqa: E402  (it needs pyarrow)
from zoo.engine import report  # noqa: E402  (likewise)
from zoo.engine.store import Store  # noqa: E402  (likewise)

Noise = np.random.Generator


def picture(noise: Noise, number: int, folder: Path) -> Path:
    """A picture of a size of its own, in one of three formats."""
    from PIL import Image

    path = folder / f"{number:04d}.{('png', 'jpg', 'webp')[number % 3]}"
    height, width = noise.integers(9, 40, 2)
    Image.fromarray(noise.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(path)
    return path


def recording(noise: Noise, number: int, folder: Path) -> Path:
    """A recording of a length and a rate of its own, in one of two formats."""
    samples = torch.from_numpy(noise.normal(0, 0.1, (1 + number % 2, noise.integers(500, 5000))).astype("float32"))
    return media.write_audio(folder / f"{number:04d}.{('wav', 'flac')[number % 2]}", samples, (16000, 24000)[number // 2 % 2])


def film(noise: Noise, number: int, folder: Path) -> Path:
    """A film of a few frames: more than the three that may be missing."""
    levels = noise.uniform(-1, 1, (3, noise.integers(8, 12), 16, 16)).astype("float32")
    return media.write_video(folder / f"{number:04d}.{('mp4', 'mkv')[number % 2]}", torch.from_numpy(levels), Fraction(12))


def solid(noise: Noise, number: int, folder: Path) -> Path:
    """A box, in one of two formats."""
    trimesh = pytest.importorskip("trimesh")
    path = folder / f"{number:04d}.{('glb', 'ply')[number % 2]}"
    trimesh.creation.box(noise.uniform(0.5, 2, 3)).export(path)
    return path


def octets(noise: Noise, number: int, folder: Path) -> Path:
    path = folder / f"{number:04d}.bin"
    path.write_bytes(noise.bytes(noise.integers(0, 300)))
    return path


def sequence(noise: Noise, number: int, folder: Path) -> Path:
    path = folder / f"{number:04d}.txt"
    path.write_bytes(bytes(noise.choice([*b"ACGTacgtN"], noise.integers(0, 300)).astype(np.uint8)))
    return path


def video_tokenizer() -> Any:
    from small_models_adapters_video import small_emu3_video

    tokenizer = small_emu3_video()
    tokenizer.fingerprint = tokenizer.compute_fingerprint()
    return tokenizer


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def emptied(content: bytes) -> bytes:
    return b""


def foreign(content: bytes) -> bytes:
    return b"<html>no such file</html>\n" * 20


@dataclass(frozen=True)
class Case:
    """A kind of media.

    Attributes:
        tokenizer: makes one.
        item: writes an item to a folder.
        damages: what may be wrong with it.
        encode: options.
        count: items of the fast test.
    """

    tokenizer: Callable[[], Any]
    item: Callable[[Noise, int, Path], Path]
    damages: tuple[Callable[[bytes], bytes], ...] = (truncated, emptied, foreign)
    encode: Mapping[str, Any] = field(default_factory=dict)
    count: int = 30


CASES = {
    "image": Case(lambda: zoo.load("ibq-tiny"), picture),
    "audio": Case(lambda: zoo.load("wavtokenizer-tiny"), recording),
    "speech": Case(lambda: zoo.load("vectok-tiny"), recording),
    "video": Case(video_tokenizer, film, count=8),
    "shape": Case(lambda: zoo.load("vat-tiny"), solid, count=12),
    # Any bytes are a file: it can only be too large.
    "bytes": Case(lambda: zoo.load("byteformer-tiny"), octets, (lambda content: content + bytes(300),), {"max_bytes": 299}),
    "text": Case(lambda: zoo.load("genome-tiny"), sequence, (foreign, lambda content: b"ACGT\xff", lambda content: b"AC GT")),
}


def filled(case: Case, folder: Path, count: int, broken: int) -> list[Path]:
    """Items, some of which are broken; gives these."""
    noise, chance = np.random.default_rng(count), random.Random(count)
    folder.mkdir()
    paths = [case.item(noise, number, folder) for number in range(count)]
    chosen = sorted(chance.sample(paths, broken))
    for number, path in enumerate(chosen):
        path.write_bytes(case.damages[number % len(case.damages)](path.read_bytes()))
    return chosen


def alone(tok: Any, path: Path, options: Mapping[str, Any]) -> tuple[list[int] | None, dict[str, Any], str | None]:
    """Ids of an item by itself and what they remember, or why it has none."""
    try:
        tokens = tok.encode(path.read_bytes(), **options)
    except ItemError as error:
        return None, {}, error.reason
    return tokens.tolist()[0], dict(*tokens.meta), None


def require_as_alone(tok: Any, case: Case, folder: Path, out: Path, broken: list[Path]) -> None:
    """Every row is what its item gives alone; failures are those that were broken."""
    found = rows(out)
    paths = sorted(folder.iterdir())
    assert len(found) == len(paths)
    for row, path in zip(found, paths, strict=True):
        ids, meta, reason = alone(tok, path, case.encode)
        assert (row["ids"], row["error"]) == (ids, reason), path
        assert {name: row[name] for name in meta} == meta
        assert (path in broken) == (reason is not None), path
        assert reason is None or len(reason) > 10
    failures = pq.read_table(out / "failures.parquet").to_pylist()
    assert [(row["key"], row["error"]) for row in failures] == [(row["key"], row["error"]) for row in found if row["error"]]
    assert len(failures) == len(broken)
    store = Store(out)
    assert list(report.problems(store, plan := report.plan_in(store))) == []
    assert [reason for _, reason in report.recomputed(store, plan, 2, tok)] == [None] * 2


@pytest.mark.parametrize("name", CASES)
def test_some_items_are_broken(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    tok = case.tokenizer()
    broken = filled(case, tmp_path / "in", case.count, len(case.damages))
    summary = engine.tokenize(tok, tmp_path / "in", tmp_path / "out", workers=0, unit_items=5, encode=case.encode)
    assert (summary.items, summary.failures, summary.units) == (case.count, len(broken), -(-case.count // 5))
    require_as_alone(tok, case, tmp_path / "in", tmp_path / "out", broken)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_one_in_a_hundred_is_broken(name: str, tmp_path: Path) -> None:
    """From a folder by two worker processes, and from a tar and a table in this one: the same rows."""
    case = CASES[name]
    tok = case.tokenizer()
    broken = filled(case, tmp_path / "in", 300, 3)
    summary = engine.tokenize(tok, tmp_path / "in", tmp_path / "out", workers=2, unit_items=64, encode=case.encode)
    assert (summary.items, summary.failures) == (300, 3)
    require_as_alone(tok, case, tmp_path / "in", tmp_path / "out", broken)
    paths = sorted((tmp_path / "in").iterdir())
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for path in paths:
            tar.add(path, path.name)
    pq.write_table(pa.table({"bytes": [path.read_bytes() for path in paths]}), tmp_path / "all.parquet", row_group_size=50)
    for kind in ("tar", "parquet"):
        engine.tokenize(tok, tmp_path / f"all.{kind}", tmp_path / kind, workers=0, encode=case.encode)
        for row, other in zip(rows(tmp_path / "out"), rows(tmp_path / kind), strict=True):
            assert row | {"key": ""} == other | {"key": ""}


def test_the_commands_on_broken_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit codes, lines of JSON, and a proof of what is there."""
    from zoo import cli

    broken = filled(CASES["image"], tmp_path / "in", 30, 3)

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["zoo", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    command = ["tokenize", "ibq-tiny", tmp_path / "in", "-o", tmp_path / "out", "--workers", 0, "--unit-items", 16]
    code, text, _ = run(*command, "--json")
    first, second, last = map(json.loads, text.splitlines())
    assert code == 1
    assert [event["event"] for event in (first, second, last)] == ["unit", "unit", "summary"]
    assert [event["items"] for event in (first, second, last)] == [16, 14, 30]
    assert (second["items_done"], second["items_total"], second["failures_total"], second["seconds_left"]) == (30, 30, 3, 0)
    assert first["items_per_second"] > 0 and first["cpu_seconds"] > 0
    assert (last["failures"], last["units"], last["encoded"], last["tokenizer"]) == (3, 2, 30, "ibq-tiny")
    code, _, said = run(*command)
    assert code == 1 and "3 of 30 items failed" in said and "nothing was left to do" in said
    assert run(*command, "--allow-failures", 0.09)[0] == 1
    assert run(*command, "--allow-failures", 0.1)[0] == 0
    code, text, _ = run("tokens", tmp_path / "out", "--verify", "--recompute", 5, "--json")
    shown = json.loads(text)
    assert code == 0
    assert (shown["items"], shown["failures"], shown["recomputed"], shown["problems"]) == (30, 3, 5, [])
    part = tmp_path / "out" / "part-000001.parquet"
    part.write_bytes(part.read_bytes()[:-40])
    code, _, said = run("tokens", tmp_path / "out", "--verify")
    assert code == 1 and "part-000001.parquet" in said
    part.unlink()
    code, text, said = run("tokens", tmp_path / "out", "--verify")
    assert code == 1 and "unit 1 is not done: 14 items" in said and "verified" not in text
    assert run(*command)[0] == 1 and len(rows(tmp_path / "out")) == 30
    assert {row["key"] for row in rows(tmp_path / "out") if row["error"]} == {path.name for path in broken}

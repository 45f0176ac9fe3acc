"""Every input of the fuzzing corpus loads or raises an error of the zoo; the fuzzer itself finds what is planted."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_PATH = Path(__file__).parent / "fuzz" / "run.py"
_SPEC = importlib.util.spec_from_file_location("fuzz_run", _PATH)
assert _SPEC is not None and _SPEC.loader is not None
fuzzing = importlib.util.module_from_spec(_SPEC)
sys.modules["fuzz_run"] = fuzzing  # dataclasses look their module up
_SPEC.loader.exec_module(fuzzing)

NAMES = list(fuzzing.targets())


@pytest.fixture(scope="module")
def child() -> Iterator[object]:
    with fuzzing.Child(seconds=120) as running:
        yield running


@pytest.mark.parametrize("name", NAMES)
def test_corpus(name: str, child) -> None:  # type: ignore[no-untyped-def]
    inputs = fuzzing.corpus(name)
    assert inputs, f"tests/fuzz/corpus/{name} is empty"
    failures = {file: failure for file, data in inputs.items() if (failure := child.run(name, data)) is not None}
    assert not failures, "\n".join(f"{file}: {failure.kind}\n{failure.detail}" for file, failure in failures.items())


def test_corpus_is_small_and_belongs_to_targets() -> None:
    files = [path for path in (_PATH.parent / "corpus").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_000_000
    assert {path.parent.name for path in files} == set(NAMES)


PLANTED = """
import os, time

def raising(data: bytes) -> None:
    if b"{" in data and b"}" in data:
        raise KeyError("brace")

def hanging(data: bytes) -> None:
    while data.startswith(b"h"):
        time.sleep(0.1)

def large(data: bytes) -> None:
    bytearray((1 << 31) if data.startswith(b"m") else 1)

def crashing(data: bytes) -> None:
    if data.startswith(b"c"):
        os.abort()

def sound(data: bytes) -> None:
    pass
"""


def test_the_fuzzer_finds_planted_faults(tmp_path: Path) -> None:
    (tmp_path / "targets_planted.py").write_text(PLANTED)
    for name, data in (("raising", b"a long text {with} braces"), ("sound", b"x")):
        (tmp_path / "corpus" / name).mkdir(parents=True)
        (tmp_path / "corpus" / name / "one").write_bytes(data)
    assert list(fuzzing.targets(tmp_path)) == ["raising", "hanging", "large", "crashing", "sound"]
    with fuzzing.Child(tmp_path, seconds=1.5) as running:
        assert running.run("hanging", b"h").kind == "timeout"
        assert running.run("hanging", b"x") is None
        assert running.run("large", b"m").kind.startswith("MemoryError")
        assert running.run("crashing", b"c").kind == "crash"
        assert running.run("crashing", b"x") is None
        found = list(fuzzing.fuzz("raising", 1.0, 0, folder=tmp_path, child=running))
        assert [failure.kind.split()[0] for _, failure in found] == ["KeyError"]
        assert sorted(found[0][0]) == sorted(b"{}")
        assert list(fuzzing.fuzz("sound", 0.2, 0, folder=tmp_path, child=running)) == []


def test_mutations_follow_their_seed() -> None:
    import random

    def inputs(seed: int) -> list[bytes]:
        return [
            fuzzing.mutate(b"some input", [b"another"], generator) for generator in [random.Random(seed)] for _ in range(50)
        ]

    assert inputs(1) == inputs(1) != inputs(2)
    assert len(set(inputs(1))) > 25

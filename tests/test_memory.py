"""Memory that was freed: kept or returned, and refused where that cannot be told."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import zoo
from zoo.memory import KEEPING, _glibc

needs_glibc = pytest.mark.skipif(_glibc() is None, reason="the C library is not glibc")

# What lies free in the process after two arrays of 80 MB, in MB.
SCRIPT = """
import ctypes, sys
from pathlib import Path
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
before = resident()
if sys.argv[1:]:
    import zoo
    for way in sys.argv[1:]:
        if way == "array":
            for _ in range(2):
                held = bytearray(b"x") * 80_000_000
                del held
        else:
            zoo.set_allocator(way)
print(round(resident() - before))
"""


def left_over(*steps: str, **environment: str) -> int:
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, *steps], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return int(found.stdout)


@needs_glibc
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the system does not tell how much memory is in use")
def test_freed_memory_is_kept_or_returned() -> None:
    assert left_over("array") < 60
    assert left_over("keep", "array") > 75
    assert left_over("keep", "array", "return") < 60
    assert left_over("return", "array") < 60
    assert left_over("array", **KEEPING) > 75


@pytest.mark.parametrize("told", [None, "musl 1.2", "error"])
def test_other_libraries_are_named(told: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def confstr(name: str) -> str | None:
        if told == "error":
            raise ValueError(name)
        return told

    monkeypatch.setattr(os, "confstr", confstr, raising=False)
    with pytest.raises(zoo.ArgumentError, match="'keep' needs glibc's malloc"):
        zoo.set_allocator("keep")


def test_there_are_two_ways() -> None:
    with pytest.raises(zoo.ArgumentError, match="one of keep, return, not 'hold'"):
        zoo.set_allocator("hold")


@needs_glibc
def test_the_command_line_keeps_memory() -> None:
    command = [sys.executable, "-m", "zoo", "--keep-memory", "list"]
    assert "flextok" in subprocess.run(command, capture_output=True, text=True, check=True).stdout

"""Fuzzing: mutated files must load or raise an error of the zoo, in bounded time and memory.

    python tests/fuzz/run.py [TARGET ...] --seconds 60 --seed 1

A target is a function of ``data: bytes`` in a ``targets_*.py`` beside this file; what it raises is a fault. One called
``target`` goes by the name of its file. Its corpus is ``corpus/<name>/``, which a test replays. Inputs run in a child process
with a limit on memory, and are given up after some seconds. Failing inputs are shortened and written to ``found/<name>/``; when
the fault is mended, they belong into the corpus.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import inspect
import json
import os
import random
import resource
import select
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
#: Bounds of one input: seconds, and bytes of memory beyond what the libraries take.
TIME, MEMORY = 20.0, 1 << 30
#: Longest mutated input, in bytes.
LONGEST = 1 << 20

Target = Callable[[bytes], None]


def targets(folder: Path = HERE) -> dict[str, Target]:
    """Every target below a folder by its name."""
    found: dict[str, Target] = {}
    for path in sorted(folder.glob("targets_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        for name, function in vars(module).items():
            own = inspect.isfunction(function) and function.__module__ == path.stem and not name.startswith("_")
            if own and list(inspect.signature(function).parameters) == ["data"]:
                name = path.stem.removeprefix("targets_") if name == "target" else name
                if name in found:
                    raise ValueError(f"two targets are called {name}")
                found[name] = function
    return found


def corpus(name: str, folder: Path = HERE) -> dict[str, bytes]:
    """Inputs to replay and to mutate, by the names of their files."""
    return {path.name: path.read_bytes() for path in sorted((folder / "corpus" / name).glob("*")) if path.is_file()}


@dataclass(frozen=True)
class Failure:
    """What an input did wrong; ``kind`` tells faults apart, ``detail`` is for people."""

    kind: str
    detail: str


class Child:
    """A process that runs inputs within bounds, replaced by a fresh one where one ends it."""

    def __init__(self, folder: Path = HERE, *, seconds: float = TIME, memory: int = MEMORY) -> None:
        self._folder, self._seconds, self._memory = folder, seconds, memory
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        process.kill()
        process.communicate()
        return process.returncode

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            command = [sys.executable, __file__, "--child", str(self._memory), "--folder", str(self._folder)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
            if self._answer(self._process, 600) is None:
                raise RuntimeError("the child process does not start")
        return self._process

    @staticmethod
    def _answer(process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """A line from the child; empty if it ended, ``None`` if nothing came in time."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        return process.stdout.readline() if ready else None

    def run(self, name: str, data: bytes) -> Failure | None:
        """What a target does wrong with an input."""
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(struct.pack("<II", len(name), len(data)) + name.encode() + data)
            process.stdin.flush()
            line = self._answer(process, self._seconds)
        except BrokenPipeError:
            line = b""
        if line is None:
            self._stop()
            return Failure("timeout", f"not done after {self._seconds} s")
        if not line.endswith(b"\n"):
            process.wait()
            code = process.returncode
            self._stop()
            return Failure("crash", f"the process ended with {code}")
        failure = json.loads(line)
        return Failure(**failure) if failure else None


def serve(folder: Path, memory: int) -> None:
    """What the child does: run inputs from standard input and answer each with a line."""
    known = targets(folder)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print
    for name, target in known.items():
        # Imports belong to the libraries, not to the first input.
        for data in list(corpus(name, folder).values())[:1]:
            _outcome(target, data)
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers.write(b"ready\n")
    answers.flush()
    while header := sys.stdin.buffer.read(8):
        length, size = struct.unpack("<II", header)
        name = sys.stdin.buffer.read(length).decode()
        failure = _outcome(known[name], sys.stdin.buffer.read(size))
        answers.write(json.dumps(vars(failure) if failure else None).encode() + b"\n")
        answers.flush()


def _outcome(target: Target, data: bytes) -> Failure | None:
    try:
        target(data)
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        return Failure(f"{type(error).__name__} at {place}", "".join(traceback.format_exception(error))[-4000:])
    return None


# ------------------------------------------------------------------------------------------------------------- mutation

_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
_WORDS = (b"nan", b"inf", b"-1", b"0", b"1e308", b"99999999999999999999", b"null", b"{}", b"[]", b'""', b"-0.0", b"\n", b"\x00")


def mutate(data: bytes, others: Sequence[bytes], random_: random.Random) -> bytes:
    """An input with a few things wrong."""
    content = bytearray(data)
    for _ in range(random_.choice((1, 1, 1, 2, 2, 3, 4, 8))):
        start = random_.randrange(len(content) + 1)
        length = min(len(content) - start, 2 ** random_.randrange(9))
        match random_.randrange(9):
            case 0 if content:
                content[start % len(content)] ^= 1 << random_.randrange(8)
            case 1 if content:
                content[start % len(content)] = random_.choice(_NUMBERS) & 0xFF
            case 2:
                width = random_.choice((2, 4, 8))
                value = random_.choice(_NUMBERS) % 2 ** (8 * width)
                content[start : start + width] = value.to_bytes(width, random_.choice(("little", "big")))
            case 3:
                del content[start : start + length]
            case 4:
                content[start:start] = random_.randbytes(length)
            case 5:
                content[start:start] = content[start : start + length]
            case 6 if others:
                other = random_.choice(others)
                cut = random_.randrange(len(other) + 1)
                content[start : start + length] = other[cut : cut + length]
            case 7:
                content[start : start + random_.randrange(4)] = random_.choice(_WORDS)
            case 8 if random_.random() < 0.3:
                del content[start:]
            case _:
                content[start : start + length] = random_.randbytes(length)
    return bytes(content[:LONGEST])


def shorten(child: Child, name: str, data: bytes, failure: Failure, tries: int = 200) -> bytes:
    """A shorter input that fails in the same way."""
    step = max(1, len(data) // 2)
    while step and tries:
        start = 0
        while start < len(data) and tries:
            tries -= 1
            shorter = data[:start] + data[start + step :]
            again = child.run(name, shorter)
            if again is not None and again.kind == failure.kind:
                data = shorter
            else:
                start += step
        step //= 2
    return data


def fuzz(
    name: str, seconds: float, seed: int, *, folder: Path = HERE, child: Child | None = None
) -> Iterator[tuple[bytes, Failure]]:
    """Failing inputs of a target and what they do, each kind of failure once."""
    seeds = list(corpus(name, folder).values()) or [b""]
    random_ = random.Random(f"{seed} {name}")
    kinds: set[str] = set()
    with child or Child(folder) as running:
        deadline = time.monotonic() + seconds
        count = 0
        while time.monotonic() < deadline:
            data = mutate(random_.choice(seeds), seeds, random_)
            count += 1
            failure = running.run(name, data)
            if failure is not None and failure.kind not in kinds:
                kinds.add(failure.kind)
                tries = 10 if failure.kind == "timeout" else 200
                yield shorten(running, name, data, failure, tries), failure
    print(f"{name}: {count} inputs, {len(kinds)} kinds of failure")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 1 if anything failed."""
    parser = argparse.ArgumentParser(description="Feed mutated files to the readers.")
    parser.add_argument("targets", nargs="*", help="all of them by default")
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=HERE)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        serve(options.folder, options.child)
        return 0
    known: Mapping[str, Target] = targets(options.folder)
    if unknown := [name for name in options.targets if name not in known]:
        parser.error(f"no target {unknown[0]}; there are {', '.join(known)}")
    failed = False
    for name in options.targets or known:
        for data, failure in fuzz(name, options.seconds, options.seed, folder=options.folder):
            failed = True
            path = options.folder / "found" / name / hashlib.sha256(data).hexdigest()[:12]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            print(f"{path}: {failure.kind}\n{failure.detail}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Compare the speed of this release with that of another one, installed in an environment of its own.

Each side is a few processes that stay. The two do the same work in turns, each as often first as last, so that whatever else
the machine is doing falls on both. The figures are medians of CPU time, and of the ratios within the pairs.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from zoo import hub, registry
from zoo.errors import ArgumentError
from zoo.machine import described
from zoo.media import write_json
from zoo.modality import modality

Measure = Callable[[], float]

#: Numbers of items that are encoded and decoded at once.
BATCHES = (1, 8)
#: Pairs of measurements of each work.
PAIRS = 15
#: Processes of each side, which take turns: how memory happens to lie makes one a few per cent quicker than another.
PROCESSES = 3
#: CPU seconds that one measurement takes at least; short work is repeated.
SECONDS = 0.3
# What starting costs, as arguments of the interpreter.
_STARTS = {"import zoo": ("-c", "import zoo"), "zoo list": ("-m", "zoo", "list")}


@dataclass(frozen=True)
class Comparison:
    """One work of both sides.

    Attributes:
        name: of the tokenizer, or ``start``.
        work: ``encode`` and ``decode``, or the command.
        batch: items at once; 0 for a command.
        cpu: CPU seconds of this release for doing it once, the median.
        other_cpu: those of the other release.
        ratio: median of ours over theirs within each pair.
        spread: quartiles of these ratios.
    """

    name: str
    work: str
    batch: int
    cpu: float
    other_cpu: float
    ratio: float
    spread: tuple[float, float]


def run(
    pattern: str,
    other: str | Path,
    *,
    batches: Sequence[int] | None = None,
    threads: int | None = None,
    pairs: int = PAIRS,
    seconds: float = SECONDS,
    progress: bool = False,
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """Measure encoding, decoding and starting in this environment and in another one.

    Args:
        pattern: a name in the catalogue, or a pattern that matches embedded tokenizers, such as ``*-tiny``.
        other: the interpreter of the other environment, or a checkout that has one in ``.venv``.
        batches: items at once; `BATCHES` by default.
        threads: threads of PyTorch; 1 by default.
        pairs: measurements of each side.
        seconds: CPU seconds of one measurement at least.
        progress: show a progress bar.
        json_path: write the result there.

    Returns:
        The comparisons with the machine they were made on, and the names that the other release does not know.

    Raises:
        ArgumentError: there is no such interpreter, or zoo cannot be imported in it.
        RegistryError: no such name.
    """
    interpreters = (Path(sys.executable), _interpreter(Path(other)))
    names = registry.names(pattern, embedded=True) or [registry.get(pattern).name]
    threads = threads or 1
    found = []
    unknown: list[str] = []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides = [
            _Turns([stack.enter_context(_Side(interpreter, scratch)) for _ in range(PROCESSES)]) for interpreter in interpreters
        ]
        works = _works(names, sides, batches or BATCHES, threads, seconds, scratch, unknown)
        total = 2 * len(names) * len(batches or BATCHES) + len(_STARTS)
        for name, work, batch, measures in tqdm(works, total=total, unit="work", disable=not progress):
            found.append(Comparison(name, work, batch, **compare(measures, pairs)))
    content: dict[str, Any] = {
        "against": Path(other).name,
        "machine": described() | {"threads": threads},
        "pairs": pairs,
        "processes": PROCESSES,
        "unknown": unknown,
        "comparisons": [asdict(comparison) for comparison in found],
    }
    if json_path is not None:
        write_json(json_path, content)
    return content


def print_table(content: Mapping[str, Any]) -> None:
    """The comparisons; above 1, this release is the slower one."""
    machine = content["machine"]
    console = Console()
    console.print(
        f"{machine['device']}, {machine['vectors']}, {'with' if machine['amx'] else 'no'} AMX, {machine['threads']} threads, "
        f"torch {machine['torch']}; medians of {content['pairs']} pairs"
    )
    table = Table()
    for column in ("model", "work", "batch", "CPU s", content["against"], "ratio", "quartiles"):
        table.add_column(column, justify="left" if column in ("model", "work") else "right")
    for found in content["comparisons"]:
        low, high = found["spread"]
        table.add_row(
            *(found["name"], found["work"], str(found["batch"] or "")),
            *(f"{found['cpu']:.4f}", f"{found['other_cpu']:.4f}", f"{found['ratio']:.3f}", f"{low:.2f}…{high:.2f}"),
        )
    console.print(table)
    if content["unknown"]:
        console.print(f"not in {content['against']}: {', '.join(content['unknown'])}")


def _interpreter(place: Path) -> Path:
    """The interpreter of an environment in which zoo is installed."""
    inside = ("bin/python", "Scripts/python.exe", ".venv/bin/python", ".venv/Scripts/python.exe")
    candidates = [place / name for name in inside] if place.is_dir() else [place]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise ArgumentError(f"{place} is no Python interpreter and no folder with one in .venv")
    # Not resolved: the path of a virtual environment's interpreter is what tells it where it is.
    found = Path(os.path.abspath(found))
    try:
        with tempfile.TemporaryDirectory() as elsewhere:
            subprocess.run([found, "-c", "import zoo"], cwd=elsewhere, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise ArgumentError(
            f"{place} cannot import zoo: {(error.stderr.strip() or 'no reason given').splitlines()[-1]}"
        ) from error
    except OSError as error:
        raise ArgumentError(f"{place} cannot be run: {error}") from error
    return found


class _Side:
    """A process of one environment, in a folder that holds nothing to import."""

    def __init__(self, interpreter: Path, folder: Path) -> None:
        self.interpreter, self.folder = interpreter, folder

    def __enter__(self) -> _Side:
        source = resources.files("zoo.bench").joinpath("side.py").read_text(encoding="utf-8")
        command = [str(self.interpreter), "-c", source]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=self.folder, stdin=pipe, stdout=pipe, text=True, encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            raise ArgumentError(f"{self.interpreter} ended with status {self.process.wait()}; what it wrote stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def measure(self, work: str, times: int) -> float:
        """CPU seconds of doing a work once, measured over several times."""
        return float(self.ask(work=work, times=times)["cpu"]) / times

    def start(self, arguments: Sequence[str]) -> float:
        """CPU seconds of a fresh process."""
        import resource

        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([self.interpreter, *arguments], cwd=self.folder, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class _Turns:
    """Processes of one environment that are measured in turns."""

    def __init__(self, processes: Sequence[_Side]) -> None:
        self._processes = processes
        self._measured = 0

    def ask(self, **request: Any) -> dict[str, Any]:
        """Request something of all of them; the answer of the first."""
        answers = [process.ask(**request) for process in self._processes]
        return answers[0]

    def measure(self, work: str, times: int) -> float:
        """CPU seconds of doing a work once in the process whose turn it is."""
        process = self._processes[self._measured % len(self._processes)]
        self._measured += 1
        return process.measure(work, times)

    def start(self, arguments: Sequence[str]) -> float:
        """CPU seconds of a fresh process."""
        return self._processes[0].start(arguments)


def _works(
    names: Sequence[str],
    sides: Sequence[_Turns],
    batches: Sequence[int],
    threads: int,
    seconds: float,
    scratch: Path,
    unknown: list[str],
) -> Iterator[tuple[str, str, int, list[Measure]]]:
    """Name, work and batch with the measures of both sides, which hold until the next ones are asked for.

    Names that one side has not go to ``unknown``.
    """
    for name in names:
        benchmark = modality(registry.get(name).modality).home("bench")
        tokenizer = hub.load(name)
        for batch in batches:
            path = scratch / "items.pickle"
            path.write_bytes(pickle.dumps(benchmark.items(tokenizer, batch)))
            answers = [side.ask(load=name, items=str(path), threads=threads) for side in sides]
            if any("unknown" in answer for answer in answers):
                unknown.append(name)
                break
            for work in ("encode", "decode"):
                once = sides[0].ask(work=work, times=1)["cpu"]
                times = max(1, math.ceil(seconds / max(once, 1e-6)))
                yield name, work, batch, [partial(side.measure, work, times) for side in sides]
    if sys.platform != "win32":
        for work, arguments in _STARTS.items():
            yield "start", work, 0, [partial(side.start, arguments) for side in sides]


def compare(measures: Sequence[Measure], pairs: int) -> dict[str, Any]:
    """The figures of a `Comparison`."""
    ours, theirs = measures
    found = np.empty((pairs, 2))
    for pair in range(pairs):
        if pair % 2:
            found[pair] = ours(), theirs()
        else:
            found[pair, ::-1] = theirs(), ours()
    cpu, other_cpu = np.median(found, axis=0).tolist()
    low, ratio, high = np.quantile(found[:, 0] / found[:, 1], (0.25, 0.5, 0.75)).tolist()
    return {"cpu": cpu, "other_cpu": other_cpu, "ratio": ratio, "spread": (low, high)}

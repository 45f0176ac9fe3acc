"""`zoo bench engine`: whole data sets by ``zoo tokenize``, beside what people write by hand.

All contenders encode the same files with the same tokenizer on the same cores, in turn: ours; a loop in one process; a loop fed
by a ``DataLoader`` that reads and prepares in processes of its own; Ray Data, the way its documentation shows; and audio in
padded batches, as in s3tokenizer's command (`zoo.bench.contenders`). Each is a program of its own, timed from start to end.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from zoo.engine import TokenDataset, pack, tokenize
from zoo.engine.lock import Lock
from zoo.engine.parts import part_bytes, part_name, schema_of
from zoo.engine.plan import Plan, create
from zoo.engine.run import UNIT_ITEMS, UNIT_MB, run_identity
from zoo.engine.sources import Choice, Listing
from zoo.engine.store import Store
from zoo.engine.unit import hello_of
from zoo.errors import ArgumentError, FormatError
from zoo.hub import load
from zoo.machine import described
from zoo.media import write_audio, write_image, write_json
from zoo.modality import modality
from zoo.tokenizer import Tokenizer
from zoo.tokens import Tokens
from zoo.vocabulary import Vocabulary

#: Tokenizers that are in the package, one of sound and one of pictures.
NAMES = ("wavtokenizer-tiny", "flextok-tiny")
ITEMS = 2000
#: What the engine is called.
OURS = "zoo tokenize"
#: Items of the made data set that is gone on with, read and packed; ids of each; items that are written as files of their own.
DATA_ITEMS, DATA_IDS, DATA_FILES = 1_000_000, 64, 20_000
#: Tokenizer of that data set.
_SMALLEST = "byteformer-tiny"
#: Ids of a packed row.
ROW = 2048


@dataclass(frozen=True)
class Measured:
    """One contender.

    Attributes:
        tokenizer: what it ran.
        contender: what was measured.
        items: that were encoded.
        wall, cpu: seconds; of the CPU those of all processes, ``None`` where they are not known.
        same: share of the items with the ids that they get alone.
    """

    tokenizer: str
    contender: str
    items: int
    wall: float
    cpu: float | None
    same: float


def run(
    *,
    names: Sequence[str] = NAMES,
    items: int = ITEMS,
    workers: int | None = None,
    peers: bool = True,
    device: str = "cpu",
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """Measure the engine and its peers; those that are not installed are left out.

    Args:
        names: tokenizers of sound or of images.
        items: files of each data set.
        workers: processes of ours, of Ray and of the ``DataLoader``; one for each core by default.
        peers: measure others beside the plain loop.
        device: must be the CPU.
        json_path: write the result there.

    Raises:
        ArgumentError: another device, or a tokenizer of other media.
    """
    if torch.device(device).type != "cpu":
        raise ArgumentError("the engine is measured on a CPU")
    workers = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    measured: list[Measured] = []
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            measured += _measured(name, Path(scratch), items, workers, peers)
    content = {
        # Each process has one thread.
        "machine": described() | {"threads": 1, "workers": workers},
        "measurements": [vars(one) for one in measured],
        "data": data_sets(DATA_ITEMS if items >= ITEMS else items),
    }
    if json_path is not None:
        write_json(json_path, content)
    return content


def _measured(name: str, scratch: Path, items: int, workers: int, peers: bool) -> Iterator[Measured]:
    tokenizer = load(name)
    write_items(tokenizer, scratch / "items", items)
    contenders = ["loop", OURS]
    if peers:
        contenders += ["DataLoader", *(["Ray Data"] if _has_ray() else [])]
        contenders += ["padded batches"] if tokenizer.spec.modality == "audio" else []
    alone: list[list[int]] = []
    for contender in contenders:
        arguments = [str(scratch / "items"), str(scratch / "out"), str(workers)]
        command = ["-m", "zoo.bench.contenders", name, contender, *arguments]
        if contender == OURS:
            command = ["-m", "zoo", "tokenize", name, arguments[0], "-o", arguments[1], "--workers", arguments[2]]
        wall, cpu = time.perf_counter(), _cpu()
        ran = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        wall, cpu = time.perf_counter() - wall, _cpu() - cpu
        if ran.returncode:
            raise FormatError(f"{contender} ended with status {ran.returncode}: {ran.stderr.strip()[-500:]}")
        found = _ids_of(scratch / "out")
        alone = alone or found
        same = sum(a == b for a, b in zip(found, alone, strict=True)) / items
        # The actors of Ray are children of its own processes.
        yield Measured(name, contender, items, wall, None if contender == "Ray Data" else cpu, same)


def _ids_of(out: Path) -> list[list[int]]:
    """The ids that a contender left in a file, or the engine in a folder; they are taken away."""
    if out.is_file():
        found: list[list[int]] = json.loads(out.read_text(encoding="utf-8"))
        out.unlink()
        return found
    found = TokenDataset(out).table(["ids"])["ids"].to_pylist()
    shutil.rmtree(out)
    return found


def _has_ray() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("ray", "pandas"))


# ---- data sets that are there


def data_sets(items: int) -> dict[str, float]:
    """CPU seconds of what is done with tokens that are there: made ones, `DATA_IDS` ids an item.

    Returns:
        ``items`` and ``ids``, how many; seconds of ``resume``, the command on a finished run, of ``read``, the ids of all items
        from parts, and of ``pack``, all items into rows of `ROW` ids. ``read_zt`` is what one ``.zt`` file for each item would
        take; at most `DATA_FILES` of them are read.
    """
    seconds = {"items": float(items), "ids": float(items * DATA_IDS)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer = load(_SMALLEST)
        _write_run(folder, tokenizer, items)
        with _timed(seconds, "resume"):
            again = tokenize(_SMALLEST, folder / "items.jsonl", folder / "tokens", workers=1)
        with _timed(seconds, "read"):
            ids = TokenDataset(folder / "tokens").table(["ids"])["ids"]
            read = sum(len(chunk.flatten()) for chunk in ids.chunks)
        if (again.encoded, read) != (0, items * DATA_IDS):
            raise FormatError(f"of {items} finished items {again.encoded} were encoded again, and {read} ids were read")
        count = min(items, DATA_FILES)
        files = [
            Tokens.from_sequences(
                [ids[item].as_py()],
                tokenizer=tokenizer.name,
                fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.spec.vocab_size,
            ).save(folder / f"{item}.zt")
            for item in range(count)
        ]
        with _timed(seconds, "read_zt"):
            for file in files:
                Tokens.load(file)
        seconds["read_zt"] *= items / count
        vocabulary = Vocabulary.build(256, {"items": tokenizer.spec})
        with _timed(seconds, "pack"):
            pack(folder / "tokens", folder / "packed", vocabulary=vocabulary, length=ROW)
    return seconds


def _write_run(folder: Path, tokenizer: Tokenizer[Any], items: int) -> None:
    """A finished run: its listing, of lines that name one file, its plan, and parts of random ids."""
    (folder / "item.bin").write_bytes(b"0")
    (folder / "items.jsonl").write_text('{"path": "item.bin"}\n' * items)
    whole = str(folder / "items.jsonl")
    store = Store(str(folder / "tokens"))
    hello = hello_of(tokenizer, {})
    choice = Choice("bytes", hello.extensions)
    identity = run_identity(hello, {}, {}, choice)
    with Lock(store):
        empty = Plan(hello.header, identity, (whole,), (), UNIT_ITEMS, UNIT_MB * 10**6, tokenizer.name, growing=True)
        plan = create(store, empty, Listing((whole,), choice, store.place))
        noise = np.random.default_rng(0)
        for unit, rows in plan.rows(store, lambda unit: True):
            values = noise.integers(0, tokenizer.spec.vocab_size, len(rows) * DATA_IDS)
            lists = [None] * len(rows)
            columns = {
                "key": [row.key for row in rows],
                "ids": list(values.reshape(len(rows), DATA_IDS)),
                "length": [DATA_IDS] * len(rows),
                "segments": lists,
                "error": lists,
            }
            schema = schema_of(replace(hello.header, unit=unit), plan.carried_schema)
            store.write(
                part_name(unit), part_bytes(schema, columns | {name: lists for name in schema.names if name not in columns})
            )


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    before = _cpu()
    yield
    seconds[name] = _cpu() - before


def _cpu() -> float:
    """CPU seconds of this process and of its children that are done."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def write_items(tokenizer: Tokenizer[Any], folder: Path, items: int) -> list[Path]:
    """Files that a tokenizer reads: noise of 1 to 4 seconds, or pictures of blocks of 256 to 504 pixels a side.

    Raises:
        ArgumentError: it reads others.
    """
    folder.mkdir()
    noise = np.random.default_rng(0)
    files = []
    for index in range(items):
        if tokenizer.spec.modality == "audio":
            sound = noise.normal(0, 0.1, (1, int(noise.integers(16_000, 64_000))))
            files.append(write_audio(folder / f"{index:05d}.wav", torch.from_numpy(sound).float(), 16_000))
        elif tokenizer.spec.modality == "image":
            blocks = noise.uniform(-1, 1, (3, *noise.integers(32, 64, 2)))
            picture = torch.from_numpy(blocks).float().repeat_interleave(8, 1).repeat_interleave(8, 2)
            files.append(write_image(folder / f"{index:05d}.png", picture))
        else:
            raise ArgumentError(f"the engine is measured on sound and images, not on {tokenizer.spec.modality}")
    return files


def print_tables(content: dict[str, Any]) -> None:
    """The measurements as tables; the last column is the time of a contender over that of ours."""
    console = Console()
    machine = content["machine"]
    console.print(f"{machine['device']}, {machine['workers']} workers, torch {machine['torch']}")
    for name in dict.fromkeys(one["tokenizer"] for one in content["measurements"]):
        chosen = [one for one in content["measurements"] if one["tokenizer"] == name]
        ours = next(one["wall"] for one in chosen if one["contender"] == OURS)
        table = Table(title=f"{name}, {chosen[0]['items']} items")
        for column in ("contender", "seconds", f"{modality_unit(name)}s/s", "CPU s", "same ids", "/ ours"):
            table.add_column(column, justify="left" if column == "contender" else "right")
        for one in chosen:
            cpu = "" if one["cpu"] is None else f"{one['cpu']:.1f}"
            figures = (f"{one['wall']:.1f}", f"{one['items'] / one['wall']:.1f}", cpu, f"{one['same']:.1%}")
            table.add_row(one["contender"], *figures, f"{one['wall'] / ours:.2f}")
        console.print(table)
    data = content["data"]
    table = Table(title=f"made tokens, {data['items']:,.0f} items of {DATA_IDS} ids")
    for column in ("what", "CPU s", "million ids/s"):
        table.add_column(column, justify="left" if column == "what" else "right")
    words = {
        "resume": "zoo tokenize, nothing left to do",
        "read": "ids from parts",
        "read_zt": "ids from .zt files",
        "pack": "zoo pack",
    }
    for name, what in words.items():
        table.add_row(what, f"{data[name]:.2f}", f"{data['ids'] / max(data[name], 1e-9) / 1e6:.1f}")
    console.print(table)


def modality_unit(name: str) -> str:
    """Word for the items of a tokenizer."""
    from zoo import registry

    kind = modality(registry.get(name).modality)
    return "file" if kind.name == "audio" else kind.unit

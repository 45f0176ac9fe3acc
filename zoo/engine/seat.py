"""Seats: where units are worked on, one at a time. A crash or a hang of a worker process becomes a failed item."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty
from typing import Any, Protocol, runtime_checkable

from zoo.engine.nursery import Nursery, Worker, cause_of
from zoo.engine.work import Done, Hello, Job, Loading, Phase, Work, WorkerError

#: Crashes at one item after which it has failed: a process may also be killed for no fault of the item's.
STRIKES = 2
#: The same for SIGKILL, which somebody sends from outside, as the system does when memory runs out.
KILLS = 3


class StoppedError(Exception):
    """The seat was told to stop."""


@dataclass(frozen=True)
class _Crash:
    """The end of a process that was working on a unit.

    Attributes:
        cause: how it ended.
        allowed: how often that may happen.
        phase, indices: what it did, to which items.
    """

    cause: str
    allowed: int
    phase: Phase | None
    indices: tuple[int, ...]


@runtime_checkable
class Seat(Protocol):
    """Seat where units are worked on, one at a time."""

    #: Items of the present unit that were begun.
    begun: int

    def hello(self) -> Hello:
        """Load the tokenizer, and give what it says about itself."""

    def run(self, work: Work, job: Job) -> Done:
        """Work on a unit to its end."""

    def stop(self) -> None:
        """Stop at once; `run` raises `StoppedError`."""


class InlineSeat:
    """This very process: without a limit of time, and nothing shields it from crashes."""

    def __init__(self, tokenizer: Any, options: Mapping[str, Any]) -> None:
        self._given, self._options = tokenizer, options
        self._tokenizer: Any = None
        self._stopped = False
        self.begun = 0

    def hello(self) -> Hello:
        from zoo.engine.unit import hello_of

        self._tokenizer = self._given.load() if isinstance(self._given, Loading) else self._given
        return hello_of(self._tokenizer, self._options)

    def run(self, work: Work, job: Job) -> Done:
        import torch

        from zoo.engine.unit import run_unit

        self.begun = 0
        threads, before = torch.get_num_threads(), time.process_time()
        # As in worker processes: sums that other numbers of threads take in another order are not the same bit for bit.
        torch.set_num_threads(1)
        try:
            done = run_unit(self._tokenizer, work, job, self._watch)
        finally:
            torch.set_num_threads(threads)
        return replace(done, seconds=time.process_time() - before)

    def _watch(self, phase: Phase, indices: Sequence[int]) -> None:
        if self._stopped:
            raise StoppedError
        self.begun = indices[0] + 1 if phase == "prepare" else self.begun

    def stop(self) -> None:
        self._stopped = True


class ProcessSeat:
    """A worker process, replaced when it crashes or hangs.

    Args:
        nursery: where processes come from.
    """

    def __init__(self, nursery: Nursery) -> None:
        self._nursery = nursery
        self._worker: Worker | None = None
        self._stopped = False
        self._lock = threading.Lock()
        self.begun = 0

    def hello(self) -> Hello:
        return self._nursery.hello()

    def run(self, work: Work, job: Job) -> Done:
        strikes: Counter[tuple[int, ...]] = Counter()
        while True:
            crash = self._attempt(self._ready(), work, job)
            if isinstance(crash, Done):
                return crash
            guilty = crash.indices if crash.phase in ("prepare", "encode") else ()
            strikes[guilty] += 1
            if strikes[guilty] < crash.allowed:
                continue
            if not guilty:
                raise WorkerError(
                    f"unit {job.unit}: {crash.cause}, {crash.allowed} times and at no item: nothing can be done about it"
                )
            single = len(guilty) == 1
            job = job.without(guilty[0], crash.cause) if single else replace(job, alone=job.alone | set(guilty))

    def _ready(self) -> Worker:
        """The process, or another one in its place."""
        if self._worker is None:
            try:
                found = self._nursery.worker()
            except WorkerError:
                if self._stopped:
                    raise StoppedError from None
                raise
            with self._lock:
                self._worker = found
                if self._stopped:
                    found.kill()
        assert self._worker is not None
        return self._worker

    def _attempt(self, worker: Worker, work: Work, job: Job) -> Done | _Crash:
        """Work on a unit: what came of it, or how the process ended."""
        phase: Phase | None = None
        indices: tuple[int, ...] = ()
        self.begun = 0
        worker.tell(("unit", work, job))
        while True:
            try:
                message = worker.messages.get(timeout=work.item_seconds if phase in ("prepare", "encode") else None)
            except Empty:
                worker.kill()
                self._forget(worker)
                what = "read" if phase == "prepare" else "encode"
                # Of several that are encoded at once each may be within its time.
                allowed = STRIKES if len(indices) == 1 else 1
                return _Crash(f"it took longer than {work.item_seconds:g} s to {what}", allowed, phase, indices)
            if message is None:
                code = self._forget(worker)
                if self._stopped:
                    raise StoppedError
                return _Crash(cause_of(code), KILLS if code == -signal.SIGKILL else STRIKES, phase, indices)
            kind, *content = message
            if kind == "at":
                phase, indices = content[0], content[1]
                self.begun = indices[0] + 1 if phase == "prepare" else self.begun
            elif kind == "done":
                done: Done = content[0]
                return done
            else:
                raise content[0]

    def _forget(self, worker: Worker) -> int:
        """Wait for the end of a process, which was killed or has nothing more to say; gives its exit code."""
        code = worker.ended()
        with suppress(OSError):
            worker.outgoing.close()
        with self._lock:
            self._worker = None
        return code

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            if self._worker is not None:
                self._worker.kill()

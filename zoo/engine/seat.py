"""Seats: where units are worked on, one at a time. A crash or a hang of a worker process becomes a failed item."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any, Protocol, runtime_checkable

from zoo.engine.work import Done, Hello, Job, Loading, Phase, Work, WorkerError
from zoo.engine.worker import receive, send

#: Crashes at one item after which it has failed: a process may also be killed for no fault of the item's.
STRIKES = 2
#: The same for SIGKILL, which somebody sends from outside, as the system does when memory runs out.
KILLS = 3


class StoppedError(Exception):
    """The seat was told to stop."""


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
    """A worker process, replaced when it crashes or hangs."""

    def __init__(self, loading: Loading, options: Mapping[str, Any]) -> None:
        self._loading, self._options = loading, options
        self._process: subprocess.Popen[bytes] | None = None
        self._messages: SimpleQueue[Any] = SimpleQueue()
        self._stopped = False
        self._lock = threading.Lock()
        self.begun = 0

    def hello(self) -> Hello:
        hello: Hello = self._start()
        return hello

    def run(self, work: Work, job: Job) -> Done:
        strikes: Counter[tuple[int, ...]] = Counter()
        while True:
            if self._process is None:
                self._start()
            crash = self._attempt(work, job)
            if isinstance(crash, Done):
                return crash
            cause, allowed, phase, indices = crash
            guilty = indices if phase in ("prepare", "encode") else ()
            strikes[guilty] += 1
            if strikes[guilty] < allowed:
                continue
            if not guilty:
                raise WorkerError(f"unit {job.unit}: {cause}, {allowed} times and at no item: nothing can be done about it")
            job = job.without(guilty[0], cause) if len(guilty) == 1 else replace(job, alone=job.alone | set(guilty))

    def _attempt(self, work: Work, job: Job) -> Done | tuple[str, int, Phase | None, tuple[int, ...]]:
        """Work on a unit: what came of it, or how the process ended, how often that may happen, and at which items."""
        assert self._process is not None
        assert self._process.stdin is not None
        phase: Phase | None = None
        indices: tuple[int, ...] = ()
        self.begun = 0
        with suppress(OSError):
            # Of a process that is dead already, the end of its messages tells.
            send(self._process.stdin, (work, job))
        while True:
            try:
                message = self._messages.get(timeout=work.item_seconds if phase == "prepare" else None)
            except Empty:
                self._kill()
                return f"it took longer than {work.item_seconds:g} s to read", STRIKES, phase, indices
            if message is None:
                if self._stopped:
                    raise StoppedError
                cause, allowed = self._cause()
                return cause, allowed, phase, indices
            kind, *content = message
            if kind == "at":
                phase, indices = content[0], content[1]
                self.begun = indices[0] + 1 if phase == "prepare" else self.begun
            elif kind == "done":
                done: Done = content[0]
                return done
            else:
                raise content[0]

    def _start(self) -> Any:
        """Start a process and wait until it has loaded the tokenizer."""
        with self._lock:
            if self._stopped:
                raise StoppedError
            changed = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
            changed["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", "from zoo.engine.worker import main; main()", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | changed,
                # Keys that interrupt a terminal's programs are for the run, which lets its workers finish.
                start_new_session=True,
            )
        self._messages = SimpleQueue()
        threading.Thread(target=_listen, args=(self._process, self._messages), daemon=True).start()
        assert self._process.stdin is not None
        with suppress(OSError):
            send(self._process.stdin, (self._loading, self._options))
        message = self._messages.get()
        if message is None:
            if self._stopped:
                raise StoppedError
            raise WorkerError(f"the worker process ended before it had loaded the tokenizer: {self._cause()[0]}")
        kind, content = message
        if kind == "error":
            self._kill()
            raise content
        return content

    def _cause(self) -> tuple[str, int]:
        """How the process ended, and how often that may happen at one item."""
        assert self._process is not None
        code = self._process.wait()
        self._forget()
        if code == -signal.SIGKILL:
            return "its process was killed, as the system does when memory runs out", KILLS
        if code < 0:
            return f"its process crashed ({signal.Signals(-code).name})", STRIKES
        return f"its process ended with exit code {code}", STRIKES

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._forget()

    def _forget(self) -> None:
        assert self._process is not None
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                assert stream is not None
                stream.close()
        self._process = None

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            process = self._process
        if process is not None:
            process.kill()
            process.wait()


def _listen(process: subprocess.Popen[bytes], messages: SimpleQueue[Any]) -> None:
    """Put what a process says in a queue, and ``None`` when it is gone."""
    assert process.stdout is not None
    with suppress(EOFError, OSError, ValueError):
        while True:
            messages.put(receive(process.stdout))
    messages.put(None)

"""Worker processes: where they can, they are forks of one process that has loaded the tokenizer, and start at once.

Forks share the memory of its weights. A process forks as long as it has one thread, which is so on a CPU under Linux; otherwise
every worker loads the tokenizer by itself.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import IO, Any

from zoo.engine.work import Hello, Loading, WorkerError
from zoo.engine.worker import receive, send

#: Bytes that glibc keeps for the next item, and how large one may be; having the system clear pages for each takes 5 % longer.
_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(256 << 20), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
#: How often a process is started that others are forked from, if it is killed.
_ATTEMPTS = 3
#: Seconds that a process has to end by itself.
_GRACE = 2.0


@dataclass(frozen=True)
class Worker:
    """A process that works on units.

    Attributes:
        outgoing: what it is told.
        messages: what it says, and ``None`` when it is gone.
        kill: kills it.
        ended: waits for its end; gives the exit code, or the signal as a negative number.
    """

    outgoing: IO[bytes]
    messages: SimpleQueue[Any]
    kill: Callable[[], None]
    ended: Callable[[], int]

    def tell(self, message: Any) -> None:
        """Send a message; of a process that is dead already, the end of its messages tells."""
        with suppress(OSError, ValueError):
            send(self.outgoing, message)


class Nursery:
    """Source of the worker processes of one tokenizer; several threads use it.

    Args:
        loading: how a process gets its tokenizer.
        options: of encoding.
    """

    def __init__(self, loading: Loading, options: Mapping[str, Any]) -> None:
        self._loading, self._options = loading, options
        self._lock = threading.Lock()
        self._first: _Started | None = None
        self._given = False
        self._begun: list[_Started] = []
        self._closed = False

    def hello(self) -> Hello:
        """Start the first process, and give the facts about the tokenizer.

        Raises:
            WorkerError: the process ended before it had loaded the tokenizer; what loading raises is raised as well.
        """
        with self._lock:
            return self._loaded().hello

    def worker(self) -> Worker:
        """A process that has loaded the tokenizer; errors as for `hello`."""
        with self._lock:
            for attempt in range(_ATTEMPTS):
                first = self._loaded()
                if not first.forks:
                    break
                try:
                    return first.fork()
                except WorkerError:
                    # For a moment a process that is killed goes on being there, though it does not answer any more.
                    first.kill()
                    self._first = None
                    if attempt == _ATTEMPTS - 1 or self._closed:
                        raise
            if not self._given:
                self._given = True
                return first.worker
        return self._start().worker

    def close(self) -> None:
        """End all processes."""
        self._closed = True
        for process in list(self._begun):
            process.close()

    def _loaded(self) -> _Started:
        """The first process; another one if that is gone."""
        if self._first is None or not self._first.alive:
            self._first, self._given = self._start(), False
        return self._first

    def _start(self) -> _Started:
        started = _Started()
        self._begun.append(started)
        if self._closed:
            started.close()
        started.load(self._loading, self._options)
        return started


class _Started:
    """A process that was started anew, and loads the tokenizer."""

    hello: Hello
    forks = False

    def __init__(self) -> None:
        changed = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        changed["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._hatch, other = socket.socketpair()
        with other:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-c",
                    "from zoo.engine.worker import main; main()",
                    str(os.getpid()),
                    str(other.fileno()),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[other.fileno()],
                env=_MEMORY | os.environ | changed,
                # Keys that interrupt a terminal's programs are for the run, which lets its workers finish.
                start_new_session=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._lock = threading.Lock()
        self.worker = Worker(self._process.stdin, _listened(self._process.stdout), self._process.kill, self._process.wait)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def load(self, loading: Loading, options: Mapping[str, Any]) -> None:
        self.worker.tell((loading, options))
        message = self.worker.messages.get()
        if message is None:
            raise WorkerError(f"the worker process ended before it had loaded the tokenizer: {cause_of(self.worker.ended())}")
        kind, *content = message
        if kind == "error":
            self.close()
            raise content[0]
        self.hello, self.forks = content

    def fork(self) -> Worker:
        """A fork of this process.

        Raises:
            WorkerError: it is gone.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._hatch, [b"f"], [theirs.fileno()])
            except OSError as error:
                ours.close()
                raise WorkerError("the process that workers are forked from is gone") from error
            number = self._asked(("fork",))
        if number is None:
            ours.close()
            raise WorkerError("the process that workers are forked from is gone")

        def kill() -> None:
            # Nobody else has its number before it has been waited for.
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)

        def ended() -> int:
            status = self._asked(("wait", number))
            # With the process that it was forked from, it is killed.
            return -signal.SIGKILL if status is None else os.waitstatus_to_exitcode(status)

        with ours:
            return Worker(ours.makefile("wb"), _listened(ours.makefile("rb")), kill, ended)

    def _asked(self, question: tuple[Any, ...]) -> int | None:
        """What the process answers; ``None`` if it is gone."""
        with self._lock:
            self.worker.tell(question)
            answer = self.worker.messages.get()
            if answer is None:
                # For whoever asks next.
                self.worker.messages.put(None)
                return None
            found: int = answer[1]
            return found

    def close(self) -> None:
        """End it, and what was forked from it."""
        if self.forks:
            # It waits for its forks, so that their time is counted.
            with suppress(OSError, ValueError):
                self.worker.outgoing.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE)
        self.kill()

    def kill(self) -> None:
        """Kill it, and with it what was forked from it."""
        self._process.kill()
        self._process.wait()
        self._hatch.close()


def cause_of(code: int) -> str:
    """Words for the end of a process."""
    if code == -signal.SIGKILL:
        return "its process was killed, as the system does when memory runs out"
    if code < 0:
        return f"its process crashed ({signal.Signals(-code).name})"
    return f"its process ended with exit code {code}"


def _listened(stream: IO[bytes]) -> SimpleQueue[Any]:
    """A queue of what a process says, with ``None`` at its end."""
    messages: SimpleQueue[Any] = SimpleQueue()

    def listen() -> None:
        with suppress(EOFError, OSError, ValueError), stream:
            while True:
                messages.put(receive(stream))
        messages.put(None)

    threading.Thread(target=listen, daemon=True).start()
    return messages

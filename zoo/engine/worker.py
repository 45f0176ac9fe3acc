"""The worker process: loads the tokenizer once, and encodes the units that it is handed, or has its forks do so."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

_LENGTH = struct.Struct("<Q")
_PR_SET_PDEATHSIG = 1
#: A thread of pyarrow's memory allocator, which looks after itself in forks.
_SAFE_THREAD = "jemalloc_bg_thd"


def send(stream: IO[bytes], message: Any) -> None:
    """Write a message; the other side gets it whole or not at all."""
    content = pickle.dumps(message)
    stream.write(_LENGTH.pack(len(content)) + content)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """The next message.

    Raises:
        EOFError: the other side is gone.
    """
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    content = stream.read(_LENGTH.unpack(head)[0])
    if len(content) < _LENGTH.unpack(head)[0]:
        raise EOFError
    return pickle.loads(content)


def main() -> None:
    """Serve the process that started this one, and end with it.

    Messages on standard input: the tokenizer and options first, then ``("unit", work, job)``. A process that forks also takes
    ``("fork",)`` and ``("wait", process)``; the fork's socket comes through the one that the second argument numbers.
    """
    incoming, outgoing = _streams()
    hatch = socket.socket(fileno=int(sys.argv[2]))
    _end_with(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    loading, options = receive(incoming)
    try:
        tokenizer, hello = _loaded(loading, options)
    except Exception as error:
        send(outgoing, ("error", portable(error)))
        return
    send(outgoing, ("hello", hello, _may_fork(hello.device)))
    children: set[int] = set()
    with suppress(EOFError):
        while True:
            kind, *content = receive(incoming)
            if kind == "unit":
                work, job = content
                _work(tokenizer, work, job, outgoing)
            elif kind == "fork":
                children.add(child := _forked(tokenizer, hatch, (incoming, outgoing)))
                send(outgoing, ("forked", child))
            else:
                [child] = content
                children.discard(child)
                send(outgoing, ("ended", _waited(child)))
    for child in children:
        _waited(child, 0.0)


def _work(tokenizer: Any, work: Any, job: Any, outgoing: IO[bytes]) -> None:
    """Encode a unit, and say how far it is."""
    from zoo.engine.unit import run_unit

    def watch(phase: str, indices: Sequence[int]) -> None:
        send(outgoing, ("at", phase, tuple(indices)))

    before = time.process_time()
    try:
        done = run_unit(tokenizer, work, job, watch)
    except Exception as error:
        send(outgoing, ("error", portable(error)))
    else:
        send(outgoing, ("done", replace(done, seconds=time.process_time() - before)))


def _loaded(loading: Any, options: Any) -> tuple[Any, Any]:
    import torch

    from zoo.engine.unit import hello_of

    torch.set_num_threads(1)
    tokenizer = loading.load()
    return tokenizer, hello_of(tokenizer, options)


# ---- processes


def _end_with(parent: int) -> None:
    """Be killed when the parent process is gone, also while a decoder hangs."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _may_fork(device: str) -> bool:
    """Whether a fork of this process works: it has no other thread, whose locks would stay locked, and no state on a GPU."""
    if sys.platform != "linux" or device != "cpu":
        return False
    names = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    return len(names) - names.count(_SAFE_THREAD) == 1


def _forked(tokenizer: Any, hatch: socket.socket, streams: Sequence[IO[bytes]]) -> int:
    """A fork that works on units; gives its number."""
    _, [descriptor], *_ = socket.recv_fds(hatch, 1, 1)
    parent = os.getpid()
    # Collections of garbage would write to all objects, and so copy the memory that forks share.
    gc.freeze()
    number = os.fork()
    if number:
        os.close(descriptor)
        return number
    try:
        _end_with(parent)
        hatch.close()
        for stream in streams:
            stream.close()
        with socket.socket(fileno=descriptor) as own:
            incoming, outgoing = own.makefile("rb"), own.makefile("wb")
            with suppress(EOFError):
                while True:
                    _, work, job = receive(incoming)
                    _work(tokenizer, work, job, outgoing)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _waited(number: int, patience: float = 5.0) -> int:
    """How a fork ended, which has nothing more to say; it is killed if it does not end."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        found, status = os.waitpid(number, os.WNOHANG)
        if found:
            return status
        time.sleep(0.002)
    os.kill(number, signal.SIGKILL)
    return os.waitpid(number, 0)[1]


def _streams() -> tuple[IO[bytes], IO[bytes]]:
    """Standard input and output for messages alone: what libraries print goes to standard error."""
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return incoming, outgoing


def portable(error: Exception) -> Exception:
    """An error that another process can read."""
    from zoo.engine.work import WorkerError

    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:
        pass
    return WorkerError(f"{type(error).__name__}: {error}")

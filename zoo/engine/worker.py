"""The worker process: loads the tokenizer once and encodes the units that it is handed on standard input."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import IO, Any

_LENGTH = struct.Struct("<Q")
_PR_SET_PDEATHSIG = 1


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
    """Serve the process that started this one, and end with it."""
    parent = int(sys.argv[1])
    with suppress(OSError, AttributeError):
        # Also while a decoder hangs.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    incoming, outgoing = _streams()
    loading, options = receive(incoming)
    try:
        tokenizer, hello = _loaded(loading, options)
    except Exception as error:
        send(outgoing, ("error", portable(error)))
        return
    send(outgoing, ("hello", hello))
    from zoo.engine.unit import run_unit

    def watch(phase: str, indices: Sequence[int]) -> None:
        send(outgoing, ("at", phase, tuple(indices)))

    while True:
        try:
            work, job = receive(incoming)
        except EOFError:
            return
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

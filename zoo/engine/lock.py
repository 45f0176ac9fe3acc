"""The lock of a run's folder: who writes there, with a sign of life."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.engine.store import Store
from zoo.errors import ArgumentError

NAME = "_plan/lock"
#: Seconds between signs of life.
BEAT = 5.0
#: Seconds without one, after which a lock of another machine counts for nothing.
STALE = 60.0
#: Locks that this very process holds; one that it could not remove, as from a disk that was read-only, is none of them.
_OWN: set[str] = set()


class Lock:
    """A run's claim on its folder, held within a ``with`` block.

    Units are written whole and are the same whoever writes them, so the lock saves work; the result would be right without it.

    Raises:
        ArgumentError: somebody else has the folder.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._owner = {"id": secrets.token_hex(8), **_process(os.getpid())}
        self._done = threading.Event()
        self._lost = False

    def __enter__(self) -> Lock:
        self._made = self._store.local and not os.path.isdir(self._store.place)
        for _ in range(3):
            if self._create():
                break
            held = self._held()
            if held is not None and (why := _alive(held)):
                raise ArgumentError(
                    f"another run is writing to {self._store.place}: process {held.get('pid')} on {held.get('host')}, {why}. "
                    f"Wait for it or stop it; without a sign of life for {STALE:.0f} s this command takes over"
                )
            self._discard(held)
        else:
            raise ArgumentError(f"another run has just begun to write to {self._store.place}")
        _OWN.add(self._owner["id"])
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        _OWN.discard(self._owner["id"])
        held = self._held()
        if held is not None and held.get("id") == self._owner["id"]:
            with contextlib.suppress(OSError):
                self._store.remove(NAME)
        # Of a run that came to nothing, nothing stays.
        for folder in (self._store.path("_plan"), self._store.path())[: 1 + self._made] if self._store.local else ():
            with contextlib.suppress(OSError):
                os.rmdir(folder)

    def require(self) -> None:
        """Make sure that nobody took the lock over, while this process was suspended say.

        Raises:
            ArgumentError: somebody did.
        """
        if self._lost:
            raise ArgumentError(f"another run took {self._store.place} over while this one stood still: it goes on there")

    def _content(self) -> bytes:
        return json.dumps(self._owner | {"time": time.time()}).encode()

    def _create(self) -> bool:
        """Write the lock if there is none."""
        if not self._store.local:
            if self._held() is not None:
                return False
            self._store.write(NAME, self._content())
            return True
        mine = _aside(self._owner["id"])
        self._store.write(mine, self._content())
        try:
            os.link(self._store.path(mine), self._store.path(NAME))
        except FileExistsError:
            return False
        except OSError:
            # A file system without links.
            try:
                with open(self._store.path(NAME), "xb") as file:
                    file.write(self._content())
            except FileExistsError:
                return False
        finally:
            self._store.remove(mine)
        return True

    def _held(self) -> Mapping[str, Any] | None:
        try:
            content = json.loads(self._store.read(NAME))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _discard(self, stale: Mapping[str, Any] | None) -> None:
        """Remove a lock that counts for nothing, unless another process did so first and has its own there now."""
        if stale is None:
            return
        if not self._store.local:
            self._store.remove(NAME)
            return
        aside = Path(self._store.path(_aside(f"stale-{self._owner['id']}")))
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._store.path(NAME), aside)
            try:
                found = json.loads(aside.read_bytes() or b"{}")
            except ValueError:
                found = {}
            if found.get("id") != stale.get("id"):
                with contextlib.suppress(OSError):
                    os.link(aside, self._store.path(NAME))
            aside.unlink()

    def _beat(self) -> None:
        while not self._done.wait(BEAT) and not self._lost:
            self._beat_once()

    def _beat_once(self) -> None:
        held = self._held()
        if held and held.get("id") != self._owner["id"]:
            self._lost = True
        elif not self._done.is_set():
            # What cannot be written now can be later.
            with contextlib.suppress(OSError):
                self._store.write(NAME, self._content())


def _aside(name: str) -> str:
    """A name beside the lock, which is swept up after a kill."""
    return f"_plan/.lock-{name}.part"


def _process(pid: int) -> dict[str, Any]:
    """A process, told apart from others of the same number before and after it."""
    return {"host": platform.node(), "machine": _machine(), "pid": pid, "started": _started(pid)}


def _machine() -> str:
    """The running system, and the space of its process numbers."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _started(pid: int) -> str:
    """When a process began, in ticks since the system did; empty if there is none, or the system does not say."""
    with contextlib.suppress(OSError, IndexError):
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if status[0] in "ZX" else status[19]
    return ""


def _alive(held: Mapping[str, Any]) -> str:
    """Why a lock counts; empty if it does not."""
    silent = time.time() - float(held.get("time") or 0)
    if held.get("machine") and held.get("machine") == _machine():
        if held.get("pid") == os.getpid() and held.get("id") not in _OWN:
            return ""
        same = _started(int(held.get("pid") or 0)) == held.get("started")
        return "which is running" if same and held.get("started") else ""
    return f"which gave a sign of life {silent:.0f} s ago" if silent < STALE else ""

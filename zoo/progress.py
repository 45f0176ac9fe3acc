"""Progress bars of long calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_listener: ContextVar[Callable[[], object] | None] = ContextVar("listener", default=None)


@contextmanager
def heard_by(listener: Callable[[], object]) -> Iterator[None]:
    """Have a function called, within the block, whenever a long call has done a part of its work."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def progress_bar(label: str, total: int, shown: bool, unit: str = "token") -> Iterator[Callable[[int], object]]:
    """A function that counts work done, behind a progress bar where one is wanted."""
    heard = _listener.get()
    if not shown:
        yield (lambda done: None) if heard is None else (lambda done: heard())
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=label, unit=unit) as bar:
        yield bar.update

"""Progress bars of long calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_listener: ContextVar[Callable[[], object] | None] = ContextVar("listener", default=None)


@contextmanager
def heard_by(listener: Callable[[], object]) -> Iterator[None]:
    """Have a function called, within the block, whenever a long call has done a part of its work."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class progress_bar:
    """A function that counts work done, behind a progress bar where one is wanted.

    >>> with progress_bar("encode", 2, shown=False) as advance:
    ...     advance(1)
    """

    # Not a generator: every call of a tokenizer enters one, and small items notice.
    __slots__ = ("bar", "settings")

    def __init__(self, label: str, total: int, shown: bool, unit: str = "token") -> None:
        self.settings: dict[str, Any] | None = {"desc": label, "total": total, "unit": unit} if shown else None
        self.bar: Any = None

    def __enter__(self) -> Callable[[int], object]:
        if self.settings is not None:
            from tqdm.auto import tqdm

            self.bar = tqdm(**self.settings)
            count: Callable[[int], object] = self.bar.update
            return count
        heard = _listener.get()
        return _uncounted if heard is None else lambda done: heard()

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()


def _uncounted(done: int) -> None:
    """Count nothing."""

"""Progress bars of long calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(label: str, total: int, shown: bool, unit: str = "token") -> Iterator[Callable[[int], object]]:
    """A function that counts work done, behind a progress bar where one is wanted."""
    if not shown:
        yield lambda done: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=label, unit=unit) as bar:
        yield bar.update

"""What commands print: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import typer


def note(text: str) -> None:
    """A line for people on standard error."""
    print(text, file=sys.stderr)


def print_json(content: Any) -> None:
    """A result for programs."""
    print(json.dumps(content, indent=2))


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """A table, the columns of which are the keys of the first row; nothing without rows."""
    from rich.console import Console
    from rich.table import Table

    if not rows:
        return
    table = Table(box=None, pad_edge=False)
    for column in rows[0]:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function that counts items done, behind a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        yield partial(progress.advance, progress.add_task(label, total=total))


def finish(failed: dict[str, str]) -> None:
    """Say which items failed and why; exit code 1 if there are any."""
    for name, reason in failed.items():
        note(f"failed: {name}: {reason}")
    if failed:
        raise typer.Exit(1)

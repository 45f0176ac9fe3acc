"""Output of commands: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from zoo.moved import names_of


def note(text: str) -> None:
    """A line for people on standard error."""
    print(text, file=sys.stderr)


def described(error: Exception) -> str:
    """An error of another library in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def print_json(content: Any) -> None:
    """A result for programs."""
    print(json.dumps(content, indent=2))


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """A table with the keys of the first row as columns; nothing without rows."""
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


def print_lines(rows: Sequence[Sequence[str]]) -> None:
    """Rows in columns, a line each: cut at the edge of a terminal, whole in a file or a pipe."""
    # A table of rich takes as long for the catalogue as reading it does.
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    edge = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        print(line if edge is None or len(line) <= edge else f"{line[: edge - 1]}…")


@contextmanager
def going_on(advice: Callable[[], str]) -> Iterator[None]:
    """Say what is finished and how to go on if the block is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        note(f"interrupted: {advice()}")
        raise


def finish(failed: dict[str, str]) -> None:
    """Say which items failed and why; exit code 1 if there are any."""
    for name, reason in failed.items():
        note(f"failed: {name}: {reason}")
    if failed:
        raise typer.Exit(1)


#: What lies in `zoo.progress`, for one release.
__getattr__ = names_of(__name__, {"progress_bar": "zoo.progress"})

"""Command-line options that studies share, and the values behind their texts. Does not import torch."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.errors import InputError

if TYPE_CHECKING:
    from zoo.eval.plan import NetworkSource

Name = Annotated[str, typer.Argument(help="a name in the catalogue, hf-hub:org/repo or local-dir:path")]
Folder = Annotated[Path, typer.Argument(help="where to write the files")]
Data = Annotated[list[str], typer.Option(help="folder, file or glob pattern; may be given several times")]
Out = Annotated[Path, typer.Option("-o", "--out", help="write the figures as JSON")]
MaybeOut = Annotated[Path | None, typer.Option("-o", "--out", "--json", help="write the figures as JSON")]
Picture = Annotated[Path, typer.Option("-o", "--out", help="the picture, a PNG file")]
Prefixes = Annotated[str, typer.Option("--tokens", help="comma-separated counts; all are added")]
Threads = Annotated[int | None, typer.Option(min=1, help="threads of PyTorch")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...")]
Fit = Annotated[str | None, typer.Option(help="crop, pad or stretch: how an image is brought to the tokenizer's size")]
Posterior = Annotated[str | None, typer.Option(help="mode or sample: what an encoder takes of its latents' distribution")]
Steps = Annotated[int | None, typer.Option(min=1, help="steps of a sampling decoder")]
Guidance = Annotated[float | None, typer.Option(help="guidance scale of a sampling decoder")]
Seed = Annotated[int | None, typer.Option(help="seed of a sampling decoder")]


def given(**options: Any) -> dict[str, Any]:
    """The options that were given at all."""
    return {name: value for name, value in options.items() if value is not None}


def network_sources(arguments: Sequence[str]) -> dict[str, NetworkSource]:
    """``NAME=PATH`` or ``NAME`` of each ``--network``, as ``networks`` of `reconstruct.run`."""
    parts = [argument.partition("=") for argument in arguments]
    return {name: path or None for name, _, path in parts}


def token_counts(argument: str | None) -> list[int] | None:
    """Comma-separated token counts, as ``prefixes`` of `reconstruct.run`; ``all`` stands for whole sequences.

    Raises:
        InputError: they are something else.
    """
    if argument is None:
        return None
    counts = [part.strip() for part in argument.split(",") if part.strip() != "all"]
    if not all(part.isdecimal() and int(part) for part in counts):
        raise InputError(f"expected token counts such as 1,4,16,all, not {argument!r}")
    return [int(part) for part in counts]


def command_line() -> str:
    """The command as it was typed, for the record."""
    return shlex.join(["zoo", *sys.argv[1:]])

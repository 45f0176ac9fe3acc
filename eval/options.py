"""Command-line options that the evaluation's commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from zoo.errors import InputError
from zoo.eval.plan import NetworkSource


def add_options(parser: argparse.ArgumentParser) -> None:
    """How to encode and decode, and where."""
    parser.add_argument("--fit", help="crop, pad or stretch: how an image is brought to the tokenizer's size")
    parser.add_argument("--posterior", help="mode or sample: what an encoder takes of its latents' distribution")
    parser.add_argument("--steps", type=int, help="steps of a sampling decoder")
    parser.add_argument("--guidance", type=float, help="guidance scale of a sampling decoder")
    parser.add_argument("--seed", type=int, help="seed of a sampling decoder")
    parser.add_argument("--device")


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
    if not all(part.isdigit() and int(part) for part in counts):
        raise InputError(f"expected token counts such as 1,4,16,all, not {argument!r}")
    return [int(part) for part in counts]

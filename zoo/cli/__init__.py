"""The ``zoo`` command. Modules that import torch are imported by the commands that need them, so that ``zoo list`` is quick."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from zoo import __version__
from zoo.cli import catalogue, measure, media
from zoo.cli.console import note
from zoo.errors import HubError, RegistryError, WeightsError, ZooError

app = typer.Typer(
    name="zoo",
    help="Tokenizers for images, audio, speech, shapes and bytes.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 bad input, 2 wrong usage, 3 catalogue, 4 Hub, 5 weights, 6 something else, 130 interrupted.",
)

_EXIT_CODES: tuple[tuple[type[ZooError], int], ...] = ((RegistryError, 3), (HubError, 4), (WeightsError, 5))
_debug = False


def main() -> None:
    """Entry point: our own errors become one line and an exit code."""
    try:
        app()
    except ZooError as error:
        if _debug:
            raise
        note(f"error: {error}")
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        note("interrupted")
        sys.exit(130)


def exit_code(error: ZooError) -> int:
    """The exit code of an error."""
    if isinstance(error, ValueError) and not isinstance(error, RegistryError):
        return 1
    return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), 6)


def _version(shown: bool | None) -> None:
    if shown:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="show the traceback of an error")] = False,
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = None,
) -> None:
    global _debug
    _debug = debug


# In the order of ``zoo --help``.
_COMMANDS: dict[str, Callable[..., None]] = {
    "list": catalogue.list_models,
    "info": catalogue.info,
    "cards": catalogue.cards,
    "pull": catalogue.pull,
    "convert": catalogue.convert,
    "encode": media.encode,
    "decode": media.decode,
    "reconstruct": media.reconstruct,
    "eval": measure.evaluate,
    "bench": measure.bench,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)

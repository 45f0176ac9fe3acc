"""The ``zoo`` command. Commands import the modules with torch themselves, and ``zoo list`` is quick."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from zoo import __version__
from zoo.cli import catalogue, dataset, measure, media, packing, study
from zoo.cli.console import described, note
from zoo.errors import HubError, OutputError, RegistryError, WeightsError, ZooError
from zoo.memory import KEEPING, set_allocator

app = typer.Typer(
    name="zoo",
    help="Tokenizers for images, audio, speech, video, shapes, text, genomes and bytes.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 bad input or some items failed, 2 wrong usage, 3 catalogue, 4 Hub, 5 weights, 6 output that "
    "cannot be written or something else, 130 interrupted (finished files stay).",
)

_EXIT_CODES: tuple[tuple[type[ZooError], int], ...] = ((RegistryError, 3), (OutputError, 6), (HubError, 4), (WeightsError, 5))
_debug = False


def main() -> None:
    """Entry point: errors become one line and an exit code."""
    _prepare_streams()
    try:
        try:
            app()
        finally:
            # What cannot be written must not go unnoticed until the interpreter ends.
            sys.stdout.flush()
    except ZooError as error:
        if _debug:
            raise
        _fail(str(error), exit_code(error))
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        _discard_output()
        sys.exit(1)
    except OSError as error:
        if _debug:
            raise
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        _discard_output()
        _fail(f"{where}{error.strerror or error}", 6)
    except MemoryError:
        _fail("there is not enough memory", 6)
    except Exception as error:
        if _debug:
            raise
        _fail(f"unexpected {described(error)} (zoo --debug ... shows where)", 6)


def _fail(reason: str, code: int) -> NoReturn:
    note(reason if code == 130 else f"error: {reason}")
    sys.exit(code)


def _prepare_streams() -> None:
    """Standard streams that take any text, and that are there: a closed one would lend its number to the next file opened."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (it stays open)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Let nothing more be written to standard output, which the interpreter would try as it ends."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (it stays open)


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
    keep_memory: Annotated[
        bool, typer.Option("--keep-memory", help="keep memory that was freed: quicker image networks, more memory in use")
    ] = False,
) -> None:
    global _debug
    _debug = debug
    if keep_memory:
        set_allocator("keep")
        # For the processes that a command starts.
        os.environ.update(KEEPING)


# In the order of ``zoo --help``.
_COMMANDS: dict[str, Callable[..., None]] = {
    "list": catalogue.list_models,
    "info": catalogue.info,
    "cards": catalogue.cards,
    "pull": catalogue.pull,
    "convert": catalogue.convert,
    "export": catalogue.export,
    "encode": media.encode,
    "decode": media.decode,
    "reconstruct": media.reconstruct,
    "tokenize": dataset.tokenize,
    "tokens": dataset.tokens,
    "pack": packing.pack,
    "eval": measure.evaluate,
    "bench": measure.bench,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)
app.add_typer(study.app, name="study")

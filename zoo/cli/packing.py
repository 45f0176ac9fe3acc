"""The command that packs token data sets and texts into rows for a language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.cli.console import note
from zoo.errors import ArgumentError, OutputError


def pack(
    sources: Annotated[list[str], typer.Argument(help="folders that zoo tokenize wrote, and files of JSON lines")],
    out: Annotated[str, typer.Option("-o", "--out", help="folder of the rows; the same command goes on where it stopped")],
    vocabulary: Annotated[Path, typer.Option(help="ids of text and of the tokens, a file of zoo.Vocabulary.save")],
    length: Annotated[int, typer.Option(min=1, help="ids of a row")],
    template: Annotated[
        str | None,
        typer.Option(help="text and items of a document, '{caption}{image}'; each item and each text alone by default"),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="text tokenizer: a tokenizer.json, a folder, or a name on the Hugging Face Hub")
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(help="comma-separated names of the template to learn, 'literals' for text between; all by default"),
    ] = None,
    cut: Annotated[bool, typer.Option("--cut", help="cut documents that are longer than a row; otherwise they fail")] = False,
    pad: Annotated[int, typer.Option(min=0, help="id that fills rows up")] = 0,
    form: Annotated[str, typer.Option("--format", help="parquet, or megatron for .bin and .idx")] = "parquet",
    unit_rows: Annotated[
        int | None, typer.Option(min=1, help="rows of a unit, about; 1024 by default, fewer of very long ones")
    ] = None,
    new: Annotated[bool, typer.Option("--new", help="begin a folder; an error if there is something in it")] = False,
    allow_failures: Annotated[
        float, typer.Option(min=0, max=1, help="share of documents that may fail; exit code 1 beyond")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print a line of JSON for each unit, and one at the end")] = False,
) -> None:
    """Pack tokens and text into rows of one length, the longest documents first, each where it fits best.

    Documents that fail are listed in failures.parquet. Exit codes: 0 done, 1 some documents failed, 2 wrong usage, 6 output
    that cannot be written, 130 interrupted; finished units stay.
    """
    from zoo import engine

    try:
        summary = engine.pack(
            sources,
            out,
            vocabulary=vocabulary,
            length=length,
            template=template,
            text=text,
            loss=None if loss is None else [name.strip() for name in loss.split(",") if name.strip()],
            cut=cut,
            pad=pad,
            form=form,
            unit_rows=unit_rows,
            new=new,
            on_event=_print_line if as_json else None,
        )
    except ArgumentError as error:
        note(f"error: {error}")
        raise typer.Exit(2) from error
    except OutputError as error:
        note(f"error: {error}. Finished units are in {out}; the same command goes on from there")
        raise typer.Exit(6) from error
    except KeyboardInterrupt:
        note(f"finished units are in {out}; the same command goes on from there")
        raise
    if as_json:
        _print_line({"event": "summary"} | summary.as_dict())
    else:
        _show(summary, length)
    if summary.failures > allow_failures * (summary.documents + summary.failures):
        raise typer.Exit(1)


def _print_line(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def _show(summary: Any, length: int) -> None:
    done = f"{summary.packed} documents in {summary.seconds:.1f} s" if summary.packed else "nothing was left to do"
    note(
        f"{summary.documents} documents, {summary.tokens} tokens in {summary.rows} rows of {length}, "
        f"{summary.padding:.2%} padding: {summary.out} ({done})"
    )
    if summary.failures:
        total = summary.documents + summary.failures
        note(f"{summary.failures} of {total} documents failed: {summary.out}/failures.parquet says why")

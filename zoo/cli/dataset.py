"""The commands that turn whole data sets into token files, and look at them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from zoo.cli.console import note, print_json
from zoo.cli.options import (
    Device,
    Fit,
    FrameRate,
    Interpolation,
    MaxFrames,
    MaxPixels,
    ModelSize,
    Name,
    Options,
    Parts,
    Places,
    Prefix,
    ValueRange,
    frame_size_of,
    options_of,
    parts_of,
    places_of,
    range_of,
)
from zoo.errors import ArgumentError, InputError, OutputError


def tokenize(
    name: Name,
    sources: Annotated[
        list[str],
        typer.Argument(help="folders, files, glob patterns or URLs; .tar, .parquet, .arrow and .jsonl hold many items"),
    ],
    out: Annotated[str, typer.Option("-o", "--out", help="folder of the parts; the same command goes on where it stopped")],
    column: Annotated[
        str | None, typer.Option(help="where media are: column of tables, field of JSON lines, extension in tars")
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="comma-separated columns to carry over, * for all; all of JSON lines by default")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="processes; one a core by default, or two a GPU; 0 for this very process")
    ] = None,
    unit_items: Annotated[
        int | None, typer.Option(min=1, help="items of a unit, that is of a part; by default 16 that become up to 512")
    ] = None,
    unit_mb: Annotated[float | None, typer.Option(min=0.001, help="megabytes of input of a unit; 128 by default")] = None,
    extend: Annotated[bool, typer.Option("--extend", help="list the sources again and add what is new")] = False,
    new: Annotated[bool, typer.Option("--new", help="begin a data set; an error if there is one")] = False,
    prefix: Prefix = None,
    fit: Fit = None,
    interpolation: Interpolation = None,
    value_range: ValueRange = None,
    max_pixels: MaxPixels = None,
    fps: FrameRate = None,
    model_size: ModelSize = None,
    max_frames: MaxFrames = None,
    others: Options = None,
    max_seconds: Annotated[float | None, typer.Option(min=0.001, help="sound, video: longer recordings fail")] = None,
    item_seconds: Annotated[float, typer.Option(min=0.001, help="that reading one item may take; then it fails")] = 300,
    memory_mb: Annotated[int, typer.Option(min=64, help="memory of a worker beside its model")] = 2048,
    allow_failures: Annotated[float, typer.Option(min=0, max=1, help="share of items that may fail; exit code 1 beyond")] = 0,
    accept_missing: Annotated[
        bool,
        typer.Option("--accept-missing", help="items that vanished since they were listed fail; otherwise they stop a unit"),
    ] = False,
    cluster: Annotated[
        str | None, typer.Option(help="address of a Ray cluster, 'auto' for the running one, 'local' to start one here")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs to use; all of them with --device cuda")] = None,
    parts: Parts = None,
    places: Places = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="print a line of JSON for each unit, and one at the end")] = False,
) -> None:
    """Turn a data set into token files, exactly once, whatever is interrupted in between.

    Items that fail are rows with the reason, counted and listed in failures.parquet. Exit codes: 0 done, 1 some items failed
    or sources vanished, 2 wrong usage, 6 output that cannot be written, 130 interrupted; Ctrl-C finishes the units in flight, a
    second one stops at once.
    """
    from zoo import engine

    given = {"tokens": prefix, "fit": fit, "interpolation": interpolation, "range": range_of(value_range)}
    given |= {"max_pixels": max_pixels, "fps": fps, "size": frame_size_of(model_size), "max_frames": max_frames}
    try:
        summary = engine.tokenize(
            name,
            sources,
            out,
            encode=options_of(others, given),
            column=column,
            keep=None if keep is None else [text.strip() for text in keep.split(",") if text.strip()],
            workers=workers,
            unit_items=unit_items,
            unit_mb=unit_mb,
            extend=extend,
            new=new,
            max_seconds=max_seconds,
            item_seconds=item_seconds,
            memory_mb=memory_mb,
            accept_missing=accept_missing,
            cluster=cluster,
            gpus=gpus,
            device=device,
            files=places_of(places),
            parts=parts_of(parts),
            progress=sys.stderr.isatty() and not as_json,
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
        _show(summary)
    if summary.failures > allow_failures * summary.items:
        raise typer.Exit(1)


def _print_line(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def _show(summary: Any) -> None:
    """The summary for people."""
    if summary.skipped:
        note(summary.skipped)
    if summary.vanished:
        note(f"no longer in the sources, but in the data set: {', '.join(summary.vanished)}")
    amount = f", {summary.extent:.4g} {summary.extent_unit}" if summary.extent_unit else ""
    rate = f", {summary.encoded / summary.seconds:.1f} items/s" if summary.encoded else ""
    new = f"{summary.encoded} items{amount}, {summary.ids} ids in {summary.seconds:.1f} s{rate}" if summary.encoded else ""
    note(f"{summary.items} items in {summary.units} parts: {summary.out} ({new or 'nothing was left to do'})")
    if summary.failures:
        note(f"{summary.failures} of {summary.items} items failed: {summary.out}/failures.parquet says why")


def tokens(
    folder: Annotated[str, typer.Argument(help="a folder, or its URL, that zoo tokenize wrote")],
    verify: Annotated[
        bool, typer.Option("--verify", help="prove that every item that was listed is there once, and sound")
    ] = False,
    recompute: Annotated[int | None, typer.Option(min=1, help="encode N items again, and compare their ids")] = None,
    places: Places = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show what is in a token data set: items, hours or megapixels, failures, bytes, fingerprint."""
    from zoo.engine import report
    from zoo.engine.places import whole_place
    from zoo.engine.store import Store

    store = Store(whole_place(folder))
    content = report.described(store)
    wrong: list[str] = []
    if verify:
        wrong += report.problems(store, report.plan_in(store))
    if recompute is not None:
        checked, other = _recompute(store, recompute, device, places)
        content["recomputed"] = checked
        wrong += other
    if verify or recompute is not None:
        content["problems"] = wrong
    if as_json:
        print_json(content)
    else:
        for label, value in content.items():
            if label != "problems":
                print(f"{label.replace('_', ' ')}: {_text(value)}")
        if verify and not wrong:
            print("verified: every item that was listed is there once")
    if wrong:
        for line in wrong[:20]:
            note(line)
        raise InputError(f"{folder}: {len(wrong)} problems")


def _recompute(store: Any, count: int, device: str | None, places: Sequence[str] | None) -> tuple[int, list[str]]:
    """How many items were encoded again, and what is wrong with them."""
    from zoo import hub
    from zoo.engine import report

    plan = report.plan_in(store)
    tokenizer = hub.load(plan.loaded or plan.header.tokenizer, device=device, files=places_of(places))
    found = list(report.recomputed(store, plan, count, tokenizer))
    return len(found), [f"{key}: {reason}" for key, reason in found if reason is not None]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)

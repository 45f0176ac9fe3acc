"""The commands that measure: quality on a data set, and speed."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.cli.console import finish, going_on, note, print_json
from zoo.cli.files import require_writable
from zoo.cli.options import Device, Fit, Guidance, Json, Name, Seed, Steps
from zoo.errors import ArgumentError


def evaluate(
    name: Name,
    data: Annotated[list[str], typer.Option(help="folder, file or glob pattern; may be given several times")],
    out: Annotated[Path, typer.Option(help="folder of the report")],
    limit: Annotated[int | None, typer.Option(min=1, help="stop after that many items")] = None,
    metrics: Annotated[str | None, typer.Option(help="comma-separated; all that can run by default")] = None,
    network: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH of a metric's weights, NAME to fetch them; may be given several times")
    ] = None,
    prefixes: Annotated[
        str | None, typer.Option(help="ordered tokenizers: comma-separated token counts, or all; 1,2,4,… by default")
    ] = None,
    fit: Fit = None,
    posterior: Annotated[str | None, typer.Option(help="mode or sample of an encoder's latents")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = None,
    device: Device = None,
    resume: Annotated[bool, typer.Option(help="go on from an interrupted run")] = True,
    as_json: Json = False,
) -> None:
    """Reconstruct a data set, measure, and write report.html."""
    from zoo import media
    from zoo.eval import reconstruct as evaluation
    from zoo.eval.options import given, network_sources, token_counts
    from zoo.eval.report import html as report

    media.require_writable(out, folder=True)
    skipped = media.Skipped()
    with going_on(lambda: f"finished items are in {out}; the same command goes on from there"):
        summary = evaluation.run(
            name,
            data,
            out,
            skipped=skipped,
            limit=limit,
            metrics=metrics.split(",") if metrics else None,
            networks=network_sources(network or ()),
            encode=given(fit=fit, posterior=posterior),
            decode=given(steps=steps, guidance=guidance, seed=seed),
            prefixes=token_counts(prefixes),
            device=device,
            resume=resume,
            progress=sys.stderr.isatty(),
            command=shlex.join(["zoo", *sys.argv[1:]]),
        )
    if line := str(skipped):
        note(line)
    if as_json:
        print_json(summary)
    else:
        report.print_summary(summary, out)
    finish(skipped.unreadable | summary["errors"])


# What the benchmarks that are no models take.
_OPTIONS = {
    "codebook": set[str](),
    "engine": {"items"},
    "originals": {"method"},
    "padding": set[str](),
    "against": {"batch"},
    "quantize": {"batch"},
    "compress": {"batch", "steps", "method", "keep", "size", "plot"},
}


def _require_meaning(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options that a benchmark would not look at."""
    taken = _OPTIONS.get(name, options.keys() - {"method", "keep", "size", "plot", "items"})
    if ignored := [option for option, value in options.items() if value is not None and option not in taken]:
        raise ArgumentError(f"the benchmark {name} takes no --{ignored[0]}")


def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="a name in the catalogue, nothing is downloaded; or codebook, compress, engine, originals, padding, quantize; "
            "with --against, a pattern"
        ),
    ],
    seconds: Annotated[list[float] | None, typer.Option(help="durations of audio; 1, 10 and 60 by default")] = None,
    ragged: Annotated[
        tuple[float, float] | None, typer.Option(help="audio: batches of clips between these durations in seconds as well")
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(help="image prefixes, 16 and 256 by default; bytes of a file; frames of a clip")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="steps of a sampling decoder; 20 by default")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="batch sizes; 1 and 8 for audio, 1 for images by default")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="threads of PyTorch")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    peers: Annotated[bool, typer.Option(help="measure others as well: transformers' codecs, the original's way")] = True,
    quantize: Annotated[list[str] | None, typer.Option(help="methods of zoo.quantize to measure the packed model of")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="compress: methods and cache policies; originals: parts; all by default")
    ] = None,
    keep: Annotated[
        list[float] | None, typer.Option(help="compress: shares of tokens; 0.5, 0.22, 0.11, 0.05 by default")
    ] = None,
    size: Annotated[str | None, typer.Option(help="compress: of the model; small by default, 1b or 7b")] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="another release's Python, or its checkout with a .venv: encode, decode and start in turns"),
    ] = None,
    items: Annotated[int | None, typer.Option(min=1, help="engine: files of each data set; 2000 by default")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="write the figures as JSON")] = None,
    plot: Annotated[Path | None, typer.Option(help="compress: write a plot, .png or .svg")] = None,
    as_json: Json = False,
) -> None:
    """Measure speed and memory against peers and against the arithmetic."""
    from zoo.bench import print_table as show
    from zoo.machine import usable_device

    for place, suffixes in ((out, ()), (plot, (".png", ".svg"))):
        if place is not None:
            require_writable(place, folder=False)
            if suffixes and place.suffix not in suffixes:
                raise ArgumentError(f"a plot is a {' or '.join(suffixes)} file, not {place.name}")
    torch_device = usable_device(device)
    _require_meaning(
        name if against is None else "against",
        {"seconds": seconds, "ragged": ragged, "tokens": tokens, "steps": steps, "batch": batch, "quantize": quantize}
        | {"method": method, "keep": keep, "size": size, "plot": plot, "items": items},
    )
    for option, values in (
        ("--seconds", seconds),
        ("--ragged", list(ragged) if ragged else None),
        ("--tokens", tokens),
        ("--batch", batch),
    ):
        if bad := [value for value in values or () if not 0 < value < math.inf]:
            raise ArgumentError(f"{option} must be more than 0 and finite, not {bad[0]}")
    common: dict[str, Any] = {"threads": threads, "device": device, "json_path": out}
    if against is not None:
        from zoo.bench import against as releases

        if torch_device.type != "cpu":
            raise ArgumentError("--against measures CPU seconds: it takes no --device")
        content = releases.run(
            name, against, batches=batch or None, threads=threads, progress=sys.stderr.isatty(), json_path=out
        )
        show = releases.print_table
    elif name == "codebook":
        from zoo.bench import codebook

        content = codebook.run(peers=peers, **common)
    elif name == "quantize":
        from zoo.bench import quantize as products

        settings: dict[str, Any] = {"batches": batch} if batch else {}
        content = products.run(peers=peers, **settings, **common)
    elif name == "padding":
        from zoo.bench import padding

        content = padding.run(json_path=out)
        show = padding.print_table
    elif name == "originals":
        from zoo.bench import originals

        if torch_device.type != "cpu":
            raise ArgumentError("the benchmark originals measures CPU seconds: it takes no --device")
        content = originals.run(method or None, threads=threads, json_path=out)
        show = originals.print_table
    elif name == "engine":
        from zoo.bench import engine

        if threads is not None:
            raise ArgumentError("the engine is measured with one thread in each process: it takes no --threads")
        content = engine.run(items=items or engine.ITEMS, peers=peers, device=device, json_path=out)
        show = engine.print_tables
    elif name == "compress":
        from zoo.bench import compress

        content = compress.run(
            size=size or "small",
            methods=method or None,
            keeps=keep or compress.KEEPS,
            batch=batch[0] if batch else 1,
            steps=steps or compress.STEPS,
            plot_path=plot,
            **common,
        )
        show = compress.print_tables
    else:
        from zoo import bench as benchmark

        cases: dict[str, Any] = {"seconds": seconds or None, "lengths": tokens or None, "steps": steps}
        cases |= {"ragged": ragged, "quantize": quantize or None}
        content = benchmark.run(name, batches=batch or None, peers=peers, **cases, **common)
    if as_json:
        print_json(content)
    else:
        show(content)

"""The ``zoo`` command. Modules that import torch are imported by the commands that need them, so that ``zoo list`` is quick."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo import __version__, registry
from zoo.errors import HubError, InputError, RegistryError, WeightsError, ZooError

if TYPE_CHECKING:
    from zoo.tokenizer import Tokenizer
    from zoo.tokens import Tokens

app = typer.Typer(
    name="zoo",
    help="Tokenizers for images, audio, speech, shapes and bytes.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 bad input, 2 wrong usage, 3 catalogue, 4 Hub, 5 weights, 6 something else, 130 interrupted.",
)

Name = Annotated[str, typer.Argument(help="a name in the catalogue, hf-hub:org/repo or local-dir:path")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...")]
Precision = Annotated[str | None, typer.Option(help="fp32 or bf16, for decoding")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
BatchSize = Annotated[int, typer.Option(min=1, help="items per batch")]
SkipErrors = Annotated[bool, typer.Option(help="go on past items that cannot be read; exit code 1 at the end")]

_EXIT_CODES: tuple[tuple[type[ZooError], int], ...] = ((RegistryError, 3), (HubError, 4), (WeightsError, 5))
_debug = False


def main() -> None:
    """Entry point: our own errors become one line and an exit code."""
    try:
        app()
    except ZooError as error:
        if _debug:
            raise
        _note(f"error: {error}")
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        _note("interrupted")
        sys.exit(130)


def exit_code(error: ZooError) -> int:
    """The exit code of an error."""
    if isinstance(error, ValueError) and not isinstance(error, RegistryError):
        return 1
    return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), 6)


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2))


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


# ------------------------------------------------------------------------------------------------------------- catalogue


@app.command("list")
def list_models(
    pattern: Annotated[str, typer.Argument(help="shell pattern")] = "*",
    modality: Annotated[str | None, typer.Option(help="audio, image, ...")] = None,
    family: Annotated[str | None, typer.Option(help="codec family")] = None,
    embedded: Annotated[bool | None, typer.Option(help="only models that come with the package, or only the others")] = None,
    as_json: Json = False,
) -> None:
    """List the models of the catalogue."""
    chosen = [registry.get(n) for n in registry.names(pattern, modality=modality, family=family, embedded=embedded)]
    if as_json:
        _print_json([entry.model_dump() for entry in chosen])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("name", no_wrap=True, min_width=max((len(entry.name) for entry in chosen), default=4))
    for column in ("modality", "weights", "description"):
        table.add_column(column, no_wrap=True)
    for entry in chosen:
        place = {"embedded": "in the package", "none": "not published"}.get(entry.weights.source, entry.weights.repo or "")
        table.add_row(entry.name, entry.modality, place, entry.description)
    Console().print(table)


@app.command()
def info(name: Annotated[str, typer.Argument(help="a name in the catalogue")], as_json: Json = False) -> None:
    """Show one model: sizes, weights, licences, published figures."""
    entry = registry.get(name)
    if as_json:
        _print_json(entry.model_dump())
        return
    from rich.console import Console
    from rich.table import Table

    weights = entry.weights
    where = {"embedded": f"in the package: {weights.file}", "none": "never published"}.get(
        weights.source, f"{weights.repo} / {weights.file} @ {weights.revision}"
    )
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("name", entry.name)
    table.add_row("", entry.description)
    table.add_row("family", f"{entry.family} ({entry.modality})")
    table.add_row("config", ", ".join(f"{key} {value}" for key, value in entry.config.items()))
    table.add_row("weights", where)
    for mirror in weights.mirrors:
        table.add_row("", f"also hf-hub:{mirror.repo} ({mirror.note})" if mirror.note else f"also hf-hub:{mirror.repo}")
    table.add_row("licence", f"code {entry.licence.code}, weights {entry.licence.weights}")
    if entry.licence.non_commercial:
        table.add_row("", "[yellow]the weights must not be used commercially[/yellow]")
    if entry.paper:
        table.add_row("paper", f"{entry.paper.title}, {entry.paper.url}")
    for figure in entry.reported:
        table.add_row("reported", f"{figure.metric} {figure.value:g} on {figure.data} ({figure.source})")
    table.add_row("card", f"zoo cards {entry.family}")
    Console().print(table)


@app.command()
def cards(family: Annotated[str | None, typer.Argument(help="codec family; all of them if left out")] = None) -> None:
    """Show model cards."""
    from importlib import resources

    from rich.console import Console
    from rich.markdown import Markdown

    found = {Path(card.name).stem: card for card in resources.files("zoo.cards").iterdir() if card.name.endswith(".md")}
    if family is None:
        for known in sorted(found):
            print(known)
        return
    if family not in found:
        raise RegistryError(f"there is no card called {family!r}; there are {', '.join(sorted(found))}")
    Console().print(Markdown(found[family].read_text(encoding="utf-8")))


@app.command()
def pull(
    names: Annotated[list[str], typer.Argument(help="names in the catalogue")],
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit")] = None,
) -> None:
    """Download weights, for use without a network."""
    from zoo import hub

    for name in names:
        print(hub.pull(name, revision=revision))


@app.command()
def convert(
    names: Annotated[list[str], typer.Argument(help="names in the catalogue")],
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit")] = None,
) -> None:
    """Write cleaned safetensors beside the cache, which later loads use: smaller, quicker, no pickle."""
    from zoo import hub

    for name in names:
        print(hub.convert(name, revision=revision))


# ------------------------------------------------------------------------------------------------------------------ media


@app.command()
def encode(
    name: Name,
    files: Annotated[list[str], typer.Argument(help="files, folders, glob patterns, or - for one file on standard input")],
    out: Annotated[Path, typer.Option("-o", "--out", help="a .zt file, or with --per-file a folder")],
    per_file: Annotated[bool, typer.Option(help="one .zt file per input; those that exist already are kept")] = False,
    overwrite: Annotated[bool, typer.Option(help="with --per-file: encode again what exists already")] = False,
    batch_size: BatchSize = 8,
    skip_errors: SkipErrors = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Media files to tokens."""
    from zoo.tokens import Tokens

    tokenizer = _load(name, device)
    sources = _sources(tokenizer, files)
    targets = _per_file_targets(sources, out) if per_file else {}
    if per_file and not overwrite:
        sources = [source for source in sources if not targets[source].exists()]
    done: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    batches: list[Tokens] = []
    for names, tokens in _encoded(tokenizer, sources, batch_size, failed if skip_errors else None):
        for position, source in enumerate(names):
            if per_file:
                tokens[position].save(targets[source])
            done.append({"file": source, "tokens": int(tokens.lengths[position])})
        batches += [] if per_file else [tokens]
    if batches:
        Tokens.cat(batches).save(out)
    if as_json:
        _print_json({"out": str(out), "items": done, "failed": failed})
    elif done:
        _note(f"{len(done)} items, {sum(item['tokens'] for item in done)} tokens: {out}")
    _finish(failed)


@app.command()
def decode(
    files: Annotated[list[str], typer.Argument(help=".zt files, or - for standard input")],
    out: Annotated[str, typer.Option("-o", "--out", help="a folder, a media file for a single item, or - for standard output")],
    tokenizer: Annotated[str | None, typer.Option(help="load this instead of the tokenizer that the file names")] = None,
    format: Annotated[str, typer.Option(help="extension of the files in a folder")] = "wav",
    sample_rate: Annotated[str | None, typer.Option(help="resample to this rate; 'original' for each item's own")] = None,
    device: Device = None,
    precision: Precision = None,
    as_json: Json = False,
) -> None:
    """Tokens back to media files."""
    from zoo.tokens import Tokens

    batches = {file: Tokens.from_bytes(sys.stdin.buffer.read()) if file == "-" else Tokens.load(file) for file in files}
    loaded: dict[str, Tokenizer[Any]] = {}
    total = sum(map(len, batches.values()))
    written = []
    for file, tokens in batches.items():
        name = tokenizer or tokens.tokenizer
        loaded.setdefault(name, _load(name, device, precision))
        stem = "decoded" if file == "-" else Path(file).stem
        for index in range(len(tokens)):
            item_name = stem if len(tokens) == 1 else f"{stem}-{index:04d}"
            target = out if out == "-" or (total == 1 and Path(out).suffix) else str(Path(out) / f"{item_name}.{format}")
            _write_media(loaded[name], tokens[index], target, sample_rate, format)
            written.append(target)
    if as_json:
        _print_json({"items": written})
    elif out != "-":
        _note(f"{len(written)} files: {out}")


@app.command()
def reconstruct(
    name: Name,
    files: Annotated[list[str], typer.Argument(help="files, folders or glob patterns")],
    out: Annotated[Path, typer.Option("-o", "--out", help="folder of the results")],
    batch_size: BatchSize = 8,
    skip_errors: SkipErrors = False,
    device: Device = None,
    precision: Precision = None,
    as_json: Json = False,
) -> None:
    """Encode and decode again, to hear what is kept."""
    tokenizer = _load(name, device, precision)
    sources = _sources(tokenizer, files)
    targets = _per_file_targets(sources, out, ".wav")
    failed: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    for names, tokens in _encoded(tokenizer, sources, batch_size, failed if skip_errors else None):
        for position, source in enumerate(names):
            item = tokens[position]
            _write_media(tokenizer, item, str(targets[source]), "original", "wav")
            meta, count = item.meta[0], int(item.lengths[0])
            seconds = meta["samples"] / meta["sample_rate"]
            rows.append(
                {
                    "file": source,
                    "seconds": round(seconds, 3),
                    "tokens": count,
                    "bits_per_second": round(count * tokenizer.spec.bits_per_token / seconds, 1),
                    "out": str(targets[source]),
                }
            )
    if as_json:
        _print_json({"items": rows, "failed": failed})
    else:
        _print_rows(rows)
    _finish(failed)


@app.command("eval")
def evaluate(
    name: Name,
    data: Annotated[list[str], typer.Option(help="folder, file or glob pattern; may be given several times")],
    out: Annotated[Path, typer.Option(help="folder of the report")],
    limit: Annotated[int | None, typer.Option(help="stop after that many items")] = None,
    metrics: Annotated[str | None, typer.Option(help="comma-separated; all that can run by default")] = None,
    utmos: Annotated[str | None, typer.Option(help="TorchScript file of a UTMOS network")] = None,
    device: Device = None,
    resume: Annotated[bool, typer.Option(help="go on from an interrupted run")] = True,
    as_json: Json = False,
) -> None:
    """Reconstruct a data set, measure, and write report.html."""
    from zoo.eval import reconstruct as evaluation
    from zoo.eval import report

    scorer = None
    if utmos is not None:
        from zoo.eval.audio import utmos_from_torchscript

        scorer = utmos_from_torchscript(utmos)
    summary = evaluation.run(
        name,
        data,
        out,
        limit=limit,
        metrics=metrics.split(",") if metrics else None,
        utmos=scorer,
        device=device,
        resume=resume,
        progress=sys.stderr.isatty(),
        command=shlex.join(["zoo", *sys.argv[1:]]),
    )
    if as_json:
        _print_json(summary)
    else:
        report.print_summary(summary, out)
    _finish(summary["errors"])


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="a name in the catalogue; nothing is downloaded")],
    seconds: Annotated[list[float] | None, typer.Option(help="durations; 1, 10 and 60 by default")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="batch sizes; 1 and 8 by default")] = None,
    threads: Annotated[int | None, typer.Option(help="threads of PyTorch")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    peers: Annotated[bool, typer.Option(help="measure transformers' EnCodec, DAC and Mimi as well")] = True,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="write the figures as JSON")] = None,
    as_json: Json = False,
) -> None:
    """Measure speed and memory against peers and against the arithmetic."""
    from zoo import bench as benchmark

    content = benchmark.run(
        name,
        seconds=seconds or (1, 10, 60),
        batches=batch or (1, 8),
        threads=threads,
        device=device,
        peers=peers,
        json_path=out,
    )
    if as_json:
        _print_json(content)
    else:
        benchmark.print_table(content)


# ---------------------------------------------------------------------------------------------------------------- helpers


def _load(name: str, device: str | None, precision: str | None = None) -> Tokenizer[Any]:
    from zoo import hub

    return hub.load(name, device=device, precision=precision)


def _sources(tokenizer: Tokenizer[Any], arguments: Sequence[str]) -> list[str]:
    """The files that the arguments name; ``-`` stays."""
    from zoo import media

    extensions = {"audio": media.AUDIO_EXTENSIONS, "speech": media.AUDIO_EXTENSIONS}.get(tokenizer.spec.modality, ())
    files = media.expand_paths([argument for argument in arguments if argument != "-"], extensions)
    return ["-"] * ("-" in arguments) + [os.fspath(file) for file in files]


def _per_file_targets(sources: Sequence[str], folder: Path, suffix: str = ".zt") -> dict[str, Path]:
    """Where the result of each input goes: its path below the folder that all inputs share."""
    parents = [os.path.dirname(os.path.abspath(source)) for source in sources if source != "-"]
    shared = os.path.commonpath(parents) if parents else ""
    targets: dict[str, Path] = {}
    for source in sources:
        below = Path("stdin") if source == "-" else Path(os.path.relpath(os.path.abspath(source), shared))
        target = folder / below.with_suffix(suffix)
        if target in targets.values():
            # Two files that differ in their extension only.
            target = folder / below.with_name(below.name + suffix)
        targets[source] = target
    return targets


def _encoded(
    tokenizer: Tokenizer[Any], sources: Sequence[str], batch_size: int, failed: dict[str, str] | None
) -> Iterator[tuple[list[str], Tokens]]:
    """Tokens batch by batch, behind a progress bar on a terminal.

    Where ``failed`` is given, items that cannot be used are put there with the reason instead of ending everything.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("encode", total=len(sources))
        for start in range(0, len(sources), batch_size):
            names = list(sources[start : start + batch_size])
            while names:
                items = [sys.stdin.buffer.read() if name == "-" else Path(name) for name in names]
                try:
                    yield names, tokenizer.encode(items)
                    break
                except InputError as error:
                    if failed is None or error.index is None:
                        raise InputError(f"{names[error.index or 0]}: {error.reason}") from error
                    failed[names.pop(error.index)] = error.reason
            progress.advance(task, min(batch_size, len(sources) - start))


def _write_media(tokenizer: Tokenizer[Any], item: Tokens, target: str, sample_rate: str | None, format: str) -> None:
    from zoo import media

    own_rate = tokenizer.spec.sample_rate
    assert own_rate is not None
    if sample_rate not in (None, "original") and not str(sample_rate).isdigit():
        raise InputError(f"--sample-rate must be a number or 'original', not {sample_rate!r}")
    wanted = sample_rate if sample_rate in (None, "original") else int(str(sample_rate))
    audio = tokenizer.decode(item, sample_rate=wanted)[0]  # type: ignore[call-arg]
    original = item.meta[0]["sample_rate"] if item.meta else own_rate
    rate = original if wanted == "original" else int(wanted or own_rate)
    if target != "-":
        media.write_audio(target, audio, rate)
        return
    with tempfile.TemporaryDirectory() as scratch:
        sys.stdout.buffer.write(media.write_audio(Path(scratch) / f"item.{format}", audio, rate).read_bytes())


def _print_rows(rows: Sequence[dict[str, Any]]) -> None:
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


def _finish(failed: dict[str, str]) -> None:
    for name, reason in failed.items():
        _note(f"failed: {name}: {reason}")
    if failed:
        raise typer.Exit(1)

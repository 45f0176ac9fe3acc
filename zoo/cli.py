"""The ``zoo`` command. Modules that import torch are imported by the commands that need them, so that ``zoo list`` is quick."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo import __version__, registry
from zoo.errors import FormatError, HubError, InputError, RegistryError, WeightsError, ZooError

if TYPE_CHECKING:
    from zoo.latents import Latents
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
Fit = Annotated[str | None, typer.Option(help="images: crop, stretch, pad or none")]
Interpolation = Annotated[str | None, typer.Option(help="images: how they are resized; bilinear or bicubic")]
Parts = Annotated[
    list[str] | None, typer.Option("--parts", help="load only these parts of a model: names between commas, or none")
]
Places = Annotated[
    list[str] | None,
    typer.Option("--file", metavar="NAME=PLACE", help="where a piece of a model is: a file, a folder or hf-hub:org/repo"),
]
MaxPixels = Annotated[int | None, typer.Option(min=1, help="images: refuse larger ones, read or restored")]
Prefix = Annotated[int | None, typer.Option("--tokens", min=1, help="ordered tokenizers: only the first so many of each item")]
Size = Annotated[str, typer.Option(help="images: 'original' for each image's own size, 'model' for the model's")]
Steps = Annotated[int | None, typer.Option(min=1, help="steps of a decoder that samples")]
Guidance = Annotated[float | None, typer.Option(help="guidance scale of a decoder that samples")]
Seed = Annotated[int | None, typer.Option(help="noise of a decoder that samples")]
Prompt = Annotated[
    str | None, typer.Option(help="speech: whose voice; a voice's name in the checkpoint, a saved voice or a recording")
]

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
    everything: Annotated[bool, typer.Option("--all", help="also configurations whose weights were never published")] = False,
    as_json: Json = False,
) -> None:
    """List the models of the catalogue."""
    matching = partial(registry.names, pattern, modality=modality, family=family, embedded=embedded)
    chosen = [registry.get(name) for name in matching(published=None if everything else True)]
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
        elsewhere = {"embedded": "in the package", "none": "not published", "local": "fetched by hand"}
        place = elsewhere.get(entry.weights.source, entry.weights.repo or "")
        table.add_row(entry.name, entry.modality, place, entry.description)
    Console().print(table)
    if hidden := 0 if everything else len(matching(published=False)):
        _note(f"and {hidden} configurations whose weights were never published: zoo list --all")


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
    where = {
        "embedded": f"in the package: {weights.file}",
        "hub": f"{weights.repo} / {weights.file} @ {weights.revision}",
        "local": f"{weights.file}: {weights.note}",
        "none": f"never published{f': {weights.note}' if weights.note else ''}",
    }[weights.source]
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
    for piece, described in weights.pieces.items():
        place = f"{described.repo} / {described.file or ', '.join(described.components)}" if described.repo else described.file
        table.add_row("", f"and {piece}: {place}{f' ({described.note})' if described.note else ''}")
    table.add_row("licence", f"code {entry.licence.code}, weights {entry.licence.weights}")
    if entry.licence.note:
        table.add_row("", entry.licence.note)
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
    parts: Parts = None,
) -> None:
    """Download weights, for use without a network."""
    from zoo import hub

    for name in names:
        print(hub.pull(name, parts=_parts(parts), revision=revision))


@app.command()
def convert(
    names: Annotated[list[str], typer.Argument(help="names in the catalogue")],
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit")] = None,
    parts: Parts = None,
    places: Places = None,
) -> None:
    """Write cleaned safetensors beside the cache, which later loads use: smaller, quicker, no pickle."""
    from zoo import hub

    for name in names:
        print(hub.convert(name, parts=_parts(parts), files=_places(places), revision=revision))


# ------------------------------------------------------------------------------------------------------------------ media


@app.command()
def encode(
    name: Name,
    files: Annotated[list[str], typer.Argument(help="files, folders, glob patterns, or - for one file on standard input")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="a file (.zt; .safetensors of latents), or with --per-file a folder")
    ],
    per_file: Annotated[bool, typer.Option(help="one file per input; those that exist already are kept")] = False,
    overwrite: Annotated[bool, typer.Option(help="with --per-file: encode again what exists already")] = False,
    prefix: Prefix = None,
    fit: Fit = None,
    interpolation: Interpolation = None,
    max_pixels: MaxPixels = None,
    batch_size: BatchSize = 8,
    skip_errors: SkipErrors = False,
    parts: Parts = None,
    places: Places = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Media files to tokens, or to the latents of a continuous tokenizer."""
    tokenizer = _load(name, device, parts=parts, places=places)
    options = _accepted(tokenizer.encode, tokens=prefix, fit=fit, interpolation=interpolation, max_pixels=max_pixels)
    sources = _sources(tokenizer, files)
    suffix = ".safetensors" if tokenizer.spec.continuous else ".zt"
    if not per_file and out.suffix != suffix and out.suffix in (".zt", ".safetensors"):
        raise InputError(f"{tokenizer.name} writes {suffix} files, not {out.suffix}")
    targets = _per_file_targets(sources, out, suffix) if per_file else {}
    if per_file and not overwrite:
        sources = [source for source in sources if not targets[source].exists()]
    done: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    batches: list[Any] = []
    for names, encoded in _encoded(tokenizer, sources, batch_size, failed if skip_errors else None, options):
        for source, item in zip(names, encoded, strict=True):
            if per_file:
                item.save(targets[source])
            done.append({"file": source} | _amount(item))
        batches += [] if per_file else [encoded]
    if batches:
        type(batches[0]).cat(batches).save(out)
    if as_json:
        _print_json({"out": str(out), "items": done, "failed": failed})
    elif done:
        unit = list(done[0])[-1]
        _note(f"{len(done)} items, {sum(item[unit] for item in done)} {unit}: {out}")
    _finish(failed)


@app.command()
def decode(
    files: Annotated[list[str], typer.Argument(help=".zt files, .safetensors files of latents, or - for standard input")],
    out: Annotated[str, typer.Option("-o", "--out", help="a folder, a media file for a single item, or - for standard output")],
    tokenizer: Annotated[str | None, typer.Option(help="load this instead of the tokenizer that the file names")] = None,
    format: Annotated[str | None, typer.Option(help="extension of the files; wav for sound, png for images")] = None,
    sample_rate: Annotated[
        str | None, typer.Option(help="sound: resample to this rate; 'original' for each item's own")
    ] = None,
    size: Size = "model",
    prefix: Prefix = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = None,
    prompt: Prompt = None,
    max_pixels: MaxPixels = None,
    parts: Parts = None,
    places: Places = None,
    device: Device = None,
    precision: Precision = None,
    as_json: Json = False,
) -> None:
    """Tokens or latents back to media files."""
    batches = {file: _read_batch(file) for file in files}
    loaded: dict[str, Tokenizer[Any]] = {}
    total = sum(map(len, batches.values()))
    sizes = {"sample_rate": _sample_rate(sample_rate), "size": None if size == "model" else size}
    written = []
    with _progress("decode", total) as advance:
        for file, batch in batches.items():
            name = tokenizer or batch.tokenizer
            if name not in loaded:
                loaded[name] = _load(name, device, precision, parts, places)
            decoder = loaded[name]
            sampling = {"steps": steps, "guidance": guidance, "seed": seed}
            options = _accepted(decoder.decode, prompt=prompt, max_pixels=max_pixels, **sampling, **sizes)
            extension = format or _default_format(decoder)
            stem = "decoded" if file == "-" else Path(file).stem
            for index, item in enumerate(batch if prefix is None else _prefix(decoder, batch, prefix)):
                item_name = stem if len(batch) == 1 else f"{stem}-{index:04d}"
                names_file = out == "-" or (total == 1 and Path(out).suffix)
                target = out if names_file else str(Path(out) / f"{item_name}.{extension}")
                _write_media(decoder, item, target, extension, options)
                written.append(target)
                advance(1)
    if as_json:
        _print_json({"items": written})
    elif out != "-":
        _note(f"{len(written)} files: {out}")


@app.command()
def reconstruct(
    name: Name,
    files: Annotated[list[str], typer.Argument(help="files, folders or glob patterns")],
    out: Annotated[Path, typer.Option("-o", "--out", help="folder of the results")],
    size: Size = "original",
    prefix: Prefix = None,
    fit: Fit = None,
    interpolation: Interpolation = None,
    max_pixels: MaxPixels = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = None,
    prompt: Prompt = None,
    batch_size: BatchSize = 8,
    skip_errors: SkipErrors = False,
    places: Places = None,
    device: Device = None,
    precision: Precision = None,
    as_json: Json = False,
) -> None:
    """Encode and decode again, to hear or see what is kept, at the size that the media had; speech in its own voice."""
    tokenizer = _load(name, device, precision, places=places)
    encoding = _accepted(tokenizer.encode, tokens=prefix, fit=fit, interpolation=interpolation, max_pixels=max_pixels)
    sizes = {"sample_rate": "original"} if tokenizer.spec.sample_rate else {"size": None if size == "model" else size}
    decoding = _accepted(tokenizer.decode, steps=steps, guidance=guidance, seed=seed, prompt=prompt, **sizes)
    if max_pixels is not None and "max_pixels" in inspect.signature(tokenizer.decode).parameters:
        decoding["max_pixels"] = max_pixels
    sources = _sources(tokenizer, files)
    extension = _default_format(tokenizer)
    targets = _per_file_targets(sources, out, f".{extension}")
    failed: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    for names, encoded in _encoded(tokenizer, sources, batch_size, failed if skip_errors else None, encoding):
        for source, item in zip(names, encoded, strict=True):
            target = str(targets[source])
            _write_media(tokenizer, item, target, extension, _own_voice(tokenizer, source) | decoding)
            rows.append({"file": source} | _figures(tokenizer, item) | {"out": target})
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
    from zoo.eval import reconstruct as evaluation
    from zoo.eval import report
    from zoo.eval.options import given, network_sources, token_counts

    summary = evaluation.run(
        name,
        data,
        out,
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
    if as_json:
        _print_json(summary)
    else:
        report.print_summary(summary, out)
    _finish(summary["errors"])


@app.command()
def bench(
    name: Annotated[
        str, typer.Argument(help="a name in the catalogue, nothing is downloaded; or codebook, compress, quantize")
    ],
    seconds: Annotated[list[float] | None, typer.Option(help="durations of audio; 1, 10 and 60 by default")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="image prefixes, 16 and 256 by default; bytes of a file")] = None,
    steps: Annotated[int | None, typer.Option(help="steps of a sampling decoder; 20 by default")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="batch sizes; 1 and 8 for audio, 1 for images by default")] = None,
    threads: Annotated[int | None, typer.Option(help="threads of PyTorch")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    peers: Annotated[bool, typer.Option(help="measure others as well: transformers' codecs, the original's way")] = True,
    method: Annotated[list[str] | None, typer.Option(help="compress: methods and cache policies; all by default")] = None,
    keep: Annotated[
        list[float] | None, typer.Option(help="compress: shares of tokens; 0.5, 0.22, 0.11, 0.05 by default")
    ] = None,
    size: Annotated[str, typer.Option(help="compress: of the model; small, 1b or 7b")] = "small",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="write the figures as JSON")] = None,
    plot: Annotated[Path | None, typer.Option(help="compress: write a plot, .png or .svg")] = None,
    as_json: Json = False,
) -> None:
    """Measure speed and memory against peers and against the arithmetic."""
    if name == "codebook":
        from zoo.bench import codebook, print_table

        content = codebook.run(threads=threads, device=device, peers=peers, json_path=out)
        if as_json:
            _print_json(content)
        else:
            print_table(content)
        return
    if name == "quantize":
        from zoo.bench import print_table, quantize

        settings: dict[str, Any] = {"batches": batch} if batch else {}
        content = quantize.run(threads=threads, device=device, peers=peers, json_path=out, **settings)
        if as_json:
            _print_json(content)
        else:
            print_table(content)
        return
    if name == "compress":
        from zoo.bench import compress

        content = compress.run(
            size=size,
            methods=method or None,
            keeps=keep or compress.KEEPS,
            batch=batch[0] if batch else 1,
            steps=steps or compress.STEPS,
            threads=threads,
            device=device,
            json_path=out,
            plot_path=plot,
        )
        if as_json:
            _print_json(content)
        else:
            compress.print_tables(content)
        return
    from zoo import bench as benchmark

    content = benchmark.run(
        name,
        batches=batch or None,
        seconds=seconds or None,
        lengths=tokens or None,
        steps=steps,
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


def _load(
    name: str,
    device: str | None,
    precision: str | None = None,
    parts: Sequence[str] | None = None,
    places: Sequence[str] | None = None,
) -> Tokenizer[Any]:
    from zoo import hub

    return hub.load(name, device=device, precision=precision, parts=_parts(parts), files=_places(places))


def _parts(given: Sequence[str] | None) -> list[str] | None:
    """Names of parts, which may also stand between commas; ``none`` for what is always there only."""
    if not given:
        return None
    names = [name for text in given for name in text.split(",")]
    return [] if names == ["none"] else names


def _places(given: Sequence[str] | None) -> dict[str, str]:
    """Where pieces of a model are, by their names."""
    places = dict(text.partition("=")[::2] for text in given or ())
    if incomplete := [name for name, place in places.items() if not name or not place]:
        raise InputError(f"--file must be NAME=PLACE, not {incomplete[0]!r}")
    return places


def _sources(tokenizer: Tokenizer[Any], arguments: Sequence[str]) -> list[str]:
    """The files that the arguments name; ``-`` stays."""
    from zoo import media

    extensions = {
        "audio": media.AUDIO_EXTENSIONS,
        "bytes": None,
        "image": media.IMAGE_EXTENSIONS,
        "shape": media.SHAPE_EXTENSIONS,
        "speech": media.AUDIO_EXTENSIONS,
    }[tokenizer.spec.modality]
    files = media.expand_paths([argument for argument in arguments if argument != "-"], extensions)
    return ["-"] * ("-" in arguments) + [os.fspath(file) for file in files]


def _default_format(tokenizer: Tokenizer[Any]) -> str:
    return {"bytes": "bin", "image": "png", "shape": "glb"}.get(tokenizer.spec.modality, "wav")


def _sample_rate(text: str | None) -> int | str | None:
    """Samples per second, or ``"original"``."""
    if text is None or text == "original":
        return text
    if not text.isdecimal() or not int(text):
        raise InputError(f"--sample-rate must be a number or 'original', not {text!r}")
    return int(text)


def _accepted(method: Callable[..., Any], **given: Any) -> dict[str, Any]:
    """The options that were given, all of which a tokenizer's method must take."""
    chosen = {name: value for name, value in given.items() if value is not None}
    for name in chosen:
        if name not in inspect.signature(method).parameters:
            raise InputError(f"this tokenizer takes no --{name.replace('_', '-')} to {method.__name__}")
    return chosen


def _own_voice(tokenizer: Any, source: str) -> dict[str, Any]:
    """The voice of a recording where its tokens do not hold one, as an option of decoding."""
    if source == "-" or tokenizer.spec.modality != "speech" or tokenizer.spec.continuous:
        return {}
    return {"prompt": tokenizer.encode_with_voices(Path(source))[1][0]}


def _per_file_targets(sources: Sequence[str], folder: Path, suffix: str) -> dict[str, Path]:
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


@contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function that counts items done, behind a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        yield partial(progress.advance, progress.add_task(label, total=total))


def _encoded(
    tokenizer: Tokenizer[Any],
    sources: Sequence[str],
    batch_size: int,
    failed: dict[str, str] | None,
    options: Mapping[str, Any],
) -> Iterator[tuple[list[str], Any]]:
    """Tokens or latents batch by batch.

    Where ``failed`` is given, items that cannot be used are put there with the reason instead of ending everything.
    """
    with _progress("encode", len(sources)) as advance:
        for start in range(0, len(sources), batch_size):
            names = list(sources[start : start + batch_size])
            while names:
                items = [sys.stdin.buffer.read() if name == "-" else Path(name) for name in names]
                try:
                    yield names, tokenizer.encode(items, **options)
                    break
                except InputError as error:
                    if error.index is None:
                        raise
                    if failed is None:
                        raise InputError(f"{names[error.index]}: {error.reason}") from error
                    failed[names.pop(error.index)] = error.reason
            advance(min(batch_size, len(sources) - start))


def _read_batch(file: str) -> Any:
    """The tokens or the latents in a file, or on standard input for ``-``."""
    from zoo.latents import Latents
    from zoo.tokens import Tokens

    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    # A safetensors file begins with the length of its header, which is JSON.
    kind: Any = Latents if content[8:9] == b"{" else Tokens
    try:
        return kind.from_bytes(content)
    except FormatError as error:
        raise FormatError(f"{file}: {error}") from error


def _prefix(tokenizer: Tokenizer[Any], batch: Any, length: int) -> Tokens:
    """The first tokens of every item."""
    if not tokenizer.spec.ordered:
        raise InputError(
            f"the tokens of {tokenizer.name} are not ordered from coarse to fine: --tokens has no meaning for them"
        )
    for index, available in enumerate(batch.lengths.tolist()):
        if length > available:
            raise InputError(f"--tokens {length} is more than the {available} tokens that there are", index)
    return batch.truncate(length)


def _write_media(tokenizer: Tokenizer[Any], item: Any, target: str, format: str, options: Mapping[str, Any]) -> None:
    """Decode one item to a file, or to standard output for ``-``."""
    from zoo import media

    decoded: Any = tokenizer.decode(item, **options)[0]
    write: Callable[[str | Path], Path]
    if tokenizer.spec.modality == "image":
        write = partial(media.write_image, pixels=decoded)
    elif tokenizer.spec.modality == "shape":
        write = partial(media.write_shape, mesh=decoded)
    elif tokenizer.spec.modality == "bytes":
        write = partial(media.write_bytes, content=decoded)
    else:
        own_rate = tokenizer.spec.sample_rate
        assert own_rate is not None
        rate = options.get("sample_rate") or own_rate
        if rate == "original":
            rate = item.meta[0]["sample_rate"] if item.meta else own_rate
        write = partial(media.write_audio, waveform=decoded, sample_rate=rate)
    if target != "-":
        write(target)
        return
    with tempfile.TemporaryDirectory() as scratch:
        sys.stdout.buffer.write(write(Path(scratch) / f"item.{format}").read_bytes())


def _amount(item: Tokens | Latents) -> dict[str, int]:
    """How much one encoded item is: tokens, or numbers in its latents."""
    from zoo.tokens import Tokens

    return {"tokens": int(item.lengths[0])} if isinstance(item, Tokens) else {"values": item.values[0].numel()}


def _figures(tokenizer: Tokenizer[Any], item: Tokens | Latents) -> dict[str, Any]:
    """Size of the media, amount and rate of one encoded item."""
    spec, meta, amount = tokenizer.spec, item.meta[0] if item.meta else {}, _amount(item)
    bits = amount.get("tokens", 0) * spec.bits_per_token
    if spec.modality == "image":
        # Tokens describe the picture that the model sees: what a crop cuts away has no bits.
        height, width = spec.image_size or (meta["height"], meta["width"])
        rate = {"bits_per_pixel": round(bits / (width * height), 4)}
        return {"width": meta["width"], "height": meta["height"]} | amount | ({} if spec.continuous else rate)
    if "samples" not in meta:
        return amount | {"bits": bits}
    seconds = meta["samples"] / meta["sample_rate"]
    return {"seconds": round(seconds, 3)} | amount | {"bits_per_second": round(bits / seconds, 1)}


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

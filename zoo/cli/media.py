"""The commands that turn media into tokens or latents and back."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli.console import finish, going_on, note, print_json, print_rows
from zoo.cli.files import (
    default_format,
    encoded_batches,
    naming_file,
    per_file_targets,
    read_batch,
    require_apart,
    require_extension,
    require_format,
    require_writable,
    sources_of,
    write_media,
)
from zoo.cli.options import (
    BatchSize,
    Device,
    Fit,
    FrameRate,
    Guidance,
    Interpolation,
    Json,
    MaxFrames,
    MaxPixels,
    ModelSize,
    Name,
    Options,
    Parts,
    Places,
    Precision,
    Prefix,
    Prompt,
    Seed,
    Size,
    SkipErrors,
    Steps,
    ValueRange,
    accepted,
    frame_size_of,
    parts_of,
    places_of,
    range_of,
    sample_rate_of,
    size_of,
)
from zoo.errors import ArgumentError, InputError, ItemError, MismatchError
from zoo.modality import modality
from zoo.progress import progress_bar

if TYPE_CHECKING:
    from zoo.latents import Latents
    from zoo.tokenizer import Tokenizer
    from zoo.tokens import Tokens


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
    value_range: ValueRange = None,
    max_pixels: MaxPixels = None,
    fps: FrameRate = None,
    model_size: ModelSize = None,
    max_frames: MaxFrames = None,
    others: Options = None,
    batch_size: BatchSize = 8,
    skip_errors: SkipErrors = False,
    parts: Parts = None,
    places: Places = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Media files to tokens, or to the latents of a continuous tokenizer."""
    require_writable(out, folder=per_file)
    tokenizer = _load(name, device, parts=parts, places=places)
    given = {"fit": fit, "interpolation": interpolation, "range": range_of(value_range), "max_pixels": max_pixels}
    given |= {"fps": fps, "size": frame_size_of(model_size), "max_frames": max_frames}
    options = accepted(tokenizer.encode, others, tokens=prefix, **given)
    suffix = ".safetensors" if tokenizer.spec.continuous else ".zt"
    if not per_file:
        require_extension(tokenizer.name, suffix, out)
    sources, unreadable = sources_of(tokenizer, files)
    targets = per_file_targets(sources, out, suffix) if per_file else {}
    require_apart(sources, targets.values() if per_file else [out])
    number = len(sources)
    if per_file and not overwrite:
        sources = [source for source in sources if not targets[source].exists()]
    done: list[dict[str, Any]] = []
    failed = unreadable
    batches: list[Any] = []

    def so_far() -> str:
        if not per_file:
            return f"nothing was written to {out}"
        return f"{number - len(sources) + len(done)} of {number} files are in {out}; the same command goes on from there"

    with going_on(so_far):
        for names, encoded in encoded_batches(
            tokenizer, sources, batch_size, failed, options, keep_going=skip_errors, salvage=per_file
        ):
            for source, item in zip(names, encoded, strict=True):
                if per_file:
                    item.save(targets[source])
                done.append({"file": source} | _amount(item))
            batches += [] if per_file else [encoded]
        if batches:
            type(batches[0]).cat(batches).save(out)
    if as_json:
        print_json({"out": str(out), "items": done, "failed": failed})
    elif done:
        unit = list(done[0])[-1]
        note(f"{len(done)} items, {sum(item[unit] for item in done)} {unit}: {out}")
    elif not sources:
        note(f"nothing to do: {number} files are in {out} already; --overwrite encodes them again")
    finish(failed)


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
    if format is not None and not format.removeprefix(".").isalnum():
        raise ArgumentError(f"--format must be an extension such as wav or png, not {format!r}")
    sizes = {"sample_rate": sample_rate_of(sample_rate), "size": size_of(size)}
    batches = {file: read_batch(file) for file in files}
    total = sum(map(len, batches.values()))
    names_file = out == "-" or (total == 1 and bool(Path(out).suffix) and not Path(out).is_dir())
    if out != "-":
        require_writable(out, folder=not names_file)
        if names_file and format is not None and f".{format.lstrip('.')}" != Path(out).suffix:
            raise ArgumentError(f"--format {format} contradicts the name {out}")
    decoders: dict[str, Tokenizer[Any]] = {}
    tried: set[tuple[str, str]] = set()
    plan: list[tuple[str, Tokenizer[Any], Any, str, str, dict[str, Any]]] = []
    for file, batch in batches.items():
        name = batch.tokenizer if tokenizer is None else tokenizer
        if name not in decoders:
            decoders[name] = _load(name, device, precision, parts, places)
        decoder = decoders[name]
        sampling = {"steps": steps, "guidance": guidance, "seed": seed}
        options = accepted(decoder.decode, prompt=prompt, max_pixels=max_pixels, **sampling, **sizes)
        extension = Path(out).suffix[1:] if names_file and out != "-" else (format or default_format(decoder)).lstrip(".")
        if (name, extension) not in tried:
            require_format(decoder, extension, sizes["sample_rate"])
            tried.add((name, extension))
        stem = "decoded" if file == "-" else Path(file).stem
        for index, item in enumerate(batch if prefix is None else _prefix(decoder, batch, prefix)):
            item_name = stem if len(batch) == 1 else f"{stem}-{index:04d}"
            target = out if names_file else str(Path(out) / f"{item_name}.{extension}")
            label = file if len(batch) == 1 else f"{file}: item {index}"
            plan.append((label, decoder, item, target, extension, options))
    written: list[str] = []
    targets = [target for _, _, _, target, _, _ in plan]
    doubled = next((target for target, number in Counter(targets).items() if number > 1), None)
    if out != "-" and doubled is not None:
        raise ArgumentError(f"two items would be written to {doubled}: decode them in two calls, to two folders")
    require_apart(files, targets if out != "-" else [])
    with (
        going_on(lambda: f"{len(written)} of {total} files are in {out}"),
        progress_bar("decode", total, sys.stderr.isatty(), unit="item") as advance,
    ):
        for label, decoder, item, target, extension, options in plan:
            with naming_file(label):
                write_media(decoder, item, target, extension, options)
            written.append(target)
            advance(1)
    if as_json:
        print_json({"items": written})
    elif out != "-":
        note(f"{len(written)} files: {out}")


def reconstruct(
    name: Name,
    files: Annotated[list[str], typer.Argument(help="files, folders or glob patterns")],
    out: Annotated[Path, typer.Option("-o", "--out", help="folder of the results")],
    size: Size = "original",
    prefix: Prefix = None,
    fit: Fit = None,
    interpolation: Interpolation = None,
    value_range: ValueRange = None,
    max_pixels: MaxPixels = None,
    fps: FrameRate = None,
    model_size: ModelSize = None,
    max_frames: MaxFrames = None,
    others: Options = None,
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
    require_writable(out, folder=True)
    wanted_size = size_of(size)
    tokenizer = _load(name, device, precision, places=places)
    given = {"fit": fit, "interpolation": interpolation, "range": range_of(value_range), "max_pixels": max_pixels}
    given |= {"fps": fps, "size": frame_size_of(model_size), "max_frames": max_frames}
    encoding = accepted(tokenizer.encode, others, tokens=prefix, **given)
    # Files and texts have no size to choose.
    sized = "size" in type(tokenizer).options("decode") or size != "original"
    sizes = {"sample_rate": "original"} if tokenizer.spec.sample_rate else {"size": wanted_size} if sized else {}
    decoding = accepted(tokenizer.decode, steps=steps, guidance=guidance, seed=seed, prompt=prompt, **sizes)
    if max_pixels is not None and "max_pixels" in inspect.signature(tokenizer.decode).parameters:
        decoding["max_pixels"] = max_pixels
    sources, failed = sources_of(tokenizer, files)
    extension = default_format(tokenizer)
    targets = per_file_targets(sources, out, f".{extension}")
    require_apart(sources, targets.values())
    rows: list[dict[str, Any]] = []
    batches = encoded_batches(tokenizer, sources, batch_size, failed, encoding, keep_going=skip_errors, salvage=True)
    with going_on(lambda: f"{len(rows)} of {len(sources)} files are in {out}"):
        for names, encoded in batches:
            for source, item in zip(names, encoded, strict=True):
                target = str(targets[source])
                try:
                    with naming_file(source):
                        write_media(tokenizer, item, target, extension, _own_voice(tokenizer, source) | decoding)
                except InputError as error:
                    if not skip_errors or isinstance(error, ArgumentError | MismatchError):
                        raise
                    failed[source] = error.reason.removeprefix(f"{source}: ")
                    continue
                rows.append({"file": source} | _figures(tokenizer, item) | {"out": target})
    if as_json:
        print_json({"items": rows, "failed": failed})
    else:
        print_rows(rows)
    finish(failed)


def _load(
    name: str,
    device: str | None,
    precision: str | None = None,
    parts: Sequence[str] | None = None,
    places: Sequence[str] | None = None,
) -> Tokenizer[Any]:
    from zoo import hub

    return hub.load(name, device=device, precision=precision, parts=parts_of(parts), files=places_of(places))


def _prefix(tokenizer: Tokenizer[Any], batch: Any, length: int) -> Tokens:
    """The first tokens of every item."""
    if not tokenizer.spec.ordered:
        raise InputError(
            f"the tokens of {tokenizer.name} are not ordered from coarse to fine: --tokens has no meaning for them"
        )
    for index, available in enumerate(batch.lengths.tolist()):
        if length > available:
            raise ItemError(f"--tokens {length} is more than the {available} tokens that there are", index)
    return batch.truncate(length)


def _own_voice(tokenizer: Any, source: str) -> dict[str, Any]:
    """The voice of a recording where its tokens do not hold one, as an option of decoding."""
    if source == "-" or not tokenizer.spec.prompted:
        return {}
    return {"prompt": tokenizer.encode_with_voices(Path(source))[1][0]}


def _amount(item: Tokens | Latents) -> dict[str, int]:
    """How much one encoded item is: tokens, or numbers in its latents."""
    from zoo.tokens import Tokens

    return {"tokens": int(item.lengths[0])} if isinstance(item, Tokens) else {"values": item.values[0].numel()}


def _figures(tokenizer: Tokenizer[Any], item: Tokens | Latents) -> dict[str, Any]:
    """Size of the media, amount and rate of one encoded item."""
    spec, meta, amount = tokenizer.spec, item.meta[0] if item.meta else {}, _amount(item)
    bits = amount.get("tokens", 0) * spec.bits_per_token
    size, rate = modality(spec.modality).home("media").figures(spec, meta, bits)
    return size | amount | rate

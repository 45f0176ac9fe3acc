"""Files and standard streams: which media a command reads, and how its results are written."""

from __future__ import annotations

import inspect
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.console import described, note
from zoo.errors import ArgumentError, FormatError, InputError, ItemError, MismatchError, ZooError
from zoo.modality import modality
from zoo.progress import progress_bar

if TYPE_CHECKING:
    from zoo.tokenizer import Tokenizer


def sources_of(tokenizer: Tokenizer[Any], arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The files that the arguments name (``-`` stays), and unreadable folders with the reason.

    What folders hold besides is told on standard error.
    """
    from zoo import media

    kind = modality(tokenizer.spec.modality)
    skipped = media.Skipped(extras=kind.extras)
    files = media.expand_paths([argument for argument in arguments if argument != "-"], kind.extensions, skipped)
    if line := str(skipped):
        note(line)
    return ["-"] * ("-" in arguments) + [os.fspath(file) for file in files], dict(skipped.unreadable)


def default_format(tokenizer: Tokenizer[Any]) -> str:
    """The extension of what a tokenizer decodes."""
    return modality(tokenizer.spec.modality).suffix


def per_file_targets(sources: Sequence[str], folder: Path, suffix: str) -> dict[str, Path]:
    """Paths of the results: each input's path below the folder that all inputs share."""
    parents = [os.path.dirname(os.path.abspath(source)) for source in sources if source != "-"]
    shared = os.path.commonpath(parents) if parents else ""
    targets: dict[str, Path] = {}
    taken: set[Path] = set()
    for source in sources:
        below = Path("stdin") if source == "-" else Path(os.path.relpath(os.path.abspath(source), shared))
        target = folder / below.with_suffix(suffix)
        while target in taken:
            # Files that differ in their extension only.
            target = folder / below.with_name(below.name + suffix)
            below = below.with_name(below.name + "_")
        taken.add(target)
        targets[source] = target
    return targets


def require_writable(out: str | Path, *, folder: bool) -> None:
    """`media.require_writable`, imported when it is needed."""
    from zoo import media

    media.require_writable(out, folder=folder)


def require_apart(sources: Iterable[str], targets: Iterable[str | Path]) -> None:
    """Refuse to write over what is read.

    Raises:
        ArgumentError: an output is an input.
    """
    places = {_identity(source) for source in sources if source != "-" and os.path.exists(source)}
    for target in targets:
        if os.path.exists(target) and _identity(target) in places:
            raise ArgumentError(f"{target} is an input, and would be replaced by the output: choose another name or folder")


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def require_extension(name: str, suffix: str, path: Path) -> None:
    """Refuse the extension of another kind of file for tokens or latents.

    Raises:
        ArgumentError: it is one.
    """
    from zoo import media

    media_extensions = {*media.AUDIO_EXTENSIONS, *media.READ_ONLY_AUDIO_EXTENSIONS, *media.IMAGE_EXTENSIONS}
    media_extensions |= {*media.VIDEO_EXTENSIONS}
    known = media_extensions | {*media.SHAPE_EXTENSIONS, ".zt", ".safetensors"}
    if path.suffix.lower() in known and path.suffix != suffix:
        raise ArgumentError(f"{name} writes {suffix} files, not {path.suffix}")


def encoded_batches(
    tokenizer: Tokenizer[Any],
    sources: Sequence[str],
    batch_size: int,
    failed: dict[str, str],
    options: Mapping[str, Any],
    *,
    keep_going: bool,
    salvage: bool,
) -> Iterator[tuple[list[str], Any]]:
    """Tokens or latents batch by batch; files that cannot be used are put into ``failed`` with the reason.

    Args:
        keep_going: go on past such files. Without it the first one ends everything, as an error that names it.
        salvage: before that, give the other files of its batch.
    """
    from zoo.tokenizer import Tokenizer

    in_one_step = type(tokenizer).prepare is Tokenizer.prepare
    known = frozenset() if in_one_step else inspect.signature(tokenizer.prepare).parameters.keys()
    reading = {name: value for name, value in options.items() if name in known}
    prepare: Callable[[list[Any]], list[Any]] = partial(tokenizer.prepare, **reading)
    run = partial(
        tokenizer.encode if in_one_step else tokenizer.encode_prepared,
        **{name: value for name, value in options.items() if name not in known},
    )
    give_up = not (keep_going or salvage)
    with progress_bar("encode", len(sources), sys.stderr.isatty(), unit="item") as advance:
        for start in range(0, len(sources), batch_size):
            names = sources[start : start + batch_size]
            bad: dict[str, str] = {}
            ready: dict[str, Any] = {}
            for name in names:
                item = _standard_input() if name == "-" else Path(name)
                with _setting_aside(name, bad, give_up=give_up):
                    ready[name] = item if in_one_step else prepare([item])[0]
            yield from _encoded(run, ready, bad, give_up=give_up)
            failed |= {name: bad[name] for name in names if name in bad}
            if bad and not keep_going:
                name, reason = next((name, bad[name]) for name in names if name in bad)
                raise InputError(f"{name}: {reason}")
            advance(len(names))


def _encoded(
    run: Callable[[list[Any]], Any], items: dict[str, Any], bad: dict[str, str], *, give_up: bool
) -> list[tuple[list[str], Any]]:
    """The items that can be encoded, in one batch where no library fails on it; the others go into ``bad``."""
    while items:
        names = list(items)
        try:
            return [(names, run(list(items.values())))]
        except ItemError as error:
            with _setting_aside(names[error.index], bad, give_up=give_up):
                raise
            del items[names[error.index]]
        except ZooError:
            raise
        except Exception:
            if len(names) > 1:
                # A library's own error does not say whose fault it is; one by one does.
                alone = [_encoded(run, {name: items[name]}, bad, give_up=give_up) for name in names]
                return [pair for pairs in alone for pair in pairs]
            with _setting_aside(names[0], bad, give_up=give_up):
                raise
            del items[names[0]]
    return []


@contextmanager
def _setting_aside(name: str, bad: dict[str, str], *, give_up: bool) -> Iterator[None]:
    """Put an item that fails into ``bad`` with the reason, or raise that with its name; errors of the call are raised."""
    cause: Exception
    try:
        yield
        return
    except ItemError as error:
        cause, reason = error, error.reason
    except ZooError:
        raise
    except Exception as error:
        cause, reason = error, described(error)
    if give_up:
        raise InputError(f"{name}: {reason}") from cause
    bad[name] = reason


@contextmanager
def naming_file(name: str) -> Iterator[None]:
    """Put a file's name into errors about its content, those of other libraries among them."""
    try:
        yield
    except InputError as error:
        if isinstance(error, ArgumentError | MismatchError):
            raise
        raise InputError(f"{name}: {error.reason}") from error
    except ZooError:
        raise
    except Exception as error:
        raise InputError(f"{name}: {described(error)}") from error


def _standard_input() -> bytes:
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise InputError(f"standard input cannot be read: {error.strerror or error}") from error


def read_batch(file: str) -> Any:
    """The tokens or the latents in a file, or on standard input for ``-``."""
    from zoo.latents import Latents
    from zoo.media import file_content
    from zoo.tokens import Tokens

    content = _standard_input() if file == "-" else file_content(file)
    # A safetensors file begins with the length of its header, which is JSON.
    kind: Any = Latents if content[8:9] == b"{" else Tokens
    try:
        return kind.from_bytes(content)
    except FormatError as error:
        raise FormatError(f"{file}: {error}") from error


def write_media(tokenizer: Tokenizer[Any], item: Any, target: str, format: str, options: Mapping[str, Any]) -> None:
    """Decode one item to a file, or to standard output for ``-``."""
    decoded: Any = tokenizer.decode(item, **options)[0]
    rate = options.get("sample_rate") or tokenizer.spec.sample_rate
    if rate == "original":
        rate = item.meta[0]["sample_rate"] if item.meta else tokenizer.spec.sample_rate
    home = modality(tokenizer.spec.modality).home("media")
    if hasattr(home, "rate"):
        rate = home.rate(item.meta[0] if item.meta else {})
    if target != "-":
        home.write(target, decoded, rate)
        return
    with tempfile.TemporaryDirectory() as scratch:
        sys.stdout.buffer.write(home.write(Path(scratch) / f"item.{format}", decoded, rate).read_bytes())


def require_format(tokenizer: Tokenizer[Any], format: str, sample_rate: int | str | None) -> None:
    """Refuse a format that the media of a tokenizer cannot be written in, by writing a little of it.

    Raises:
        ArgumentError: it cannot be written.
    """
    if not format.isalnum():
        raise ArgumentError(f"{format!r} is no extension of a file")
    rate = sample_rate if isinstance(sample_rate, int) else tokenizer.spec.sample_rate
    media = modality(tokenizer.spec.modality).home("media")
    with tempfile.TemporaryDirectory() as scratch:
        trial = Path(scratch) / f"trial.{format}"
        try:
            media.write(trial, media.trial(), rate)
        except Exception as error:
            reason = error.reason if isinstance(error, InputError) else described(error)
            at = f" at {rate} Hz" if rate else ""
            what = f"{tokenizer.name} cannot be decoded to .{format}{at}"
            raise ArgumentError(f"{what}: {reason.replace(f'{scratch}/', '')}") from error

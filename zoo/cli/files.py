"""Files and standard streams: which media a command reads, and how its results are written."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.console import progress_bar
from zoo.errors import FormatError, InputError

if TYPE_CHECKING:
    from zoo.tokenizer import Tokenizer


def sources_of(tokenizer: Tokenizer[Any], arguments: Sequence[str]) -> list[str]:
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


def default_format(tokenizer: Tokenizer[Any]) -> str:
    """The extension of what a tokenizer decodes."""
    return {"bytes": "bin", "image": "png", "shape": "glb"}.get(tokenizer.spec.modality, "wav")


def per_file_targets(sources: Sequence[str], folder: Path, suffix: str) -> dict[str, Path]:
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


def encoded_batches(
    tokenizer: Tokenizer[Any],
    sources: Sequence[str],
    batch_size: int,
    failed: dict[str, str] | None,
    options: Mapping[str, Any],
) -> Iterator[tuple[list[str], Any]]:
    """Tokens or latents batch by batch.

    Where ``failed`` is given, items that cannot be used are put there with the reason instead of ending everything.
    """
    with progress_bar("encode", len(sources)) as advance:
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


def read_batch(file: str) -> Any:
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


def write_media(tokenizer: Tokenizer[Any], item: Any, target: str, format: str, options: Mapping[str, Any]) -> None:
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

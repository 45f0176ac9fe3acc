"""Files: opened for reading, found by path, folder and pattern, and replaced whole or not at all."""

from __future__ import annotations

import glob
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zoo.errors import InputError

FILE_TYPES = (str, os.PathLike, bytes, bytearray, memoryview)


def open_source(source: Any, kind: str) -> tuple[io.BufferedIOBase, str]:
    """A handle on a file or on the bytes of one, and what to call it in a message.

    Args:
        source: one of `FILE_TYPES`: a path, or the content itself.
        kind: ``"audio"``, ``"image"``, ...

    Raises:
        InputError: there is no such file, or it is a folder, empty or not to be opened.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        if not len(source):
            raise InputError(f"the {kind} is empty (0 bytes)")
        return io.BytesIO(source), f"{kind} bytes"
    path, name = Path(source), os.fspath(source)
    try:
        if path.is_dir():
            raise InputError(f"{name} is a folder")
        if not path.exists():
            raise InputError(f"{name} does not exist")
        if path.stat().st_size == 0:
            raise InputError(f"{name} is empty (0 bytes)")
        return path.open("rb"), name
    except OSError as error:
        raise InputError(f"{name} cannot be opened: {error.strerror}") from error


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name in the same folder that replaces ``path`` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:80]}-", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes private files
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write a file, under a temporary name first."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return Path(path)


def write_json(path: str | os.PathLike[str], value: Any, *, indent: int = 1) -> Path:
    """Write a value as JSON, under a temporary name first."""
    return write_bytes(path, (json.dumps(value, indent=indent) + "\n").encode())


def expand_paths(arguments: Iterable[str | os.PathLike[str]], extensions: Iterable[str] | None) -> list[Path]:
    """Files named by paths, folders (searched recursively, sorted) and glob patterns, each once and in order.

    Args:
        arguments: what to look for.
        extensions: of the files that are taken from folders; ``None`` for all of them.

    Raises:
        InputError: an argument matches nothing.
    """
    wanted = None if extensions is None else {extension.lower() for extension in extensions}
    found: dict[Path, None] = {}
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            matches = sorted(p for p in path.rglob("*") if p.is_file() and (wanted is None or p.suffix.lower() in wanted))
        elif path.exists():
            matches = [path]
        else:
            matches = sorted(Path(match) for match in glob.glob(os.fspath(argument), recursive=True) if Path(match).is_file())
        if not matches:
            raise InputError(f"{argument}: no such file, or no file with a known extension in it")
        found |= dict.fromkeys(matches)
    return list(found)

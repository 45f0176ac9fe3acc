"""Open, find and atomically replace files."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import platform
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from zoo.errors import ArgumentError, InputError, ZooError, output_error
from zoo.folders import Skipped, files_below

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

FILE_TYPES = (str, os.PathLike, bytes, bytearray, memoryview)


def open_source(source: Any, kind: str) -> tuple[io.BufferedIOBase, str]:
    """A readable handle, and the name to use in error messages.

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


def file_content(path: str | os.PathLike[str]) -> bytes:
    """All bytes of a file.

    Raises:
        InputError: there is no such file, or it is a folder or cannot be read; names it.
    """
    name = os.fspath(path)
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{name} does not exist") from error
    except IsADirectoryError as error:
        raise InputError(f"{name} is a folder, not a file") from error
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{name!r} is no name of a file: {error}") from error


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name in the same folder that replaces ``path`` when the block ends without an error.

    What a killed process left of an earlier attempt at the same file is used up; what a live one is writing is not touched.
    Devices and pipes are written to, not replaced.

    Raises:
        OutputError: the file cannot be written; any other `OSError` of the block becomes one as well.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            with tempfile.TemporaryDirectory() as scratch:
                temporary = Path(scratch) / path.name
                yield temporary
                with temporary.open("rb") as source, path.open("wb") as target:
                    shutil.copyfileobj(source, target)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with _own_temporary(path) as temporary:
            yield temporary
            os.replace(temporary, path)
    except ZooError:
        raise
    except OSError as error:
        raise output_error(path, error) from error


def append_bytes(path: str | os.PathLike[str], content: bytes) -> int:
    """Put bytes behind those of a file, all of them or none; returns where they begin.

    Raises:
        OutputError: there is no room, or the file cannot be written.
    """
    try:
        with open(path, "ab", buffering=0) as file:
            start = file.tell()
            try:
                rest = memoryview(content)
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(start)
                raise
            return start
    except OSError as error:
        raise output_error(path, error) from error


@contextmanager
def _own_temporary(path: Path) -> Iterator[Path]:
    """An empty file beside ``path`` that no other writer has, and that is gone when the block ends.

    A writer holds a lock, which the system lets go when the process ends, however it ends. The names are few and known, so the
    next writer comes upon what a killed one left, without searching the folder. The lock is on a file of its own: a library may
    replace the other one while it writes, as safetensors does.
    """
    descriptor, lock = _claimed(path)
    temporary = _written(lock)
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch(exist_ok=False)
        yield temporary
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        with suppress(OSError):
            lock.unlink(missing_ok=True)
        os.close(descriptor)


def _written(lock: Path) -> Path:
    """The file that the owner of a lock writes."""
    return lock.with_name(f"{lock.name}.new")


def _claimed(path: Path) -> tuple[int, Path]:
    """An open file that a writer of ``path`` alone has as its lock; what killed writers left is removed."""
    try:
        for slot in count():
            if (descriptor := _locked(_slot(path, slot))) >= 0:
                _sweep(path, slot + 1)
                return descriptor, _slot(path, slot)
    except _NoLocksError:
        pass
    descriptor, name = tempfile.mkstemp(prefix=f".{_short(path.name)}-", dir=path.parent)
    return descriptor, Path(name)


class _NoLocksError(Exception):
    """The system or the disk has no locks, so that a killed writer's file looks like a live one's."""


def _slot(path: Path, slot: int) -> Path:
    # Locks need not reach other machines that share a disk, so each has names of its own.
    machine = hashlib.sha256(platform.node().encode(errors="surrogateescape")).hexdigest()[:6]
    return path.with_name(f".{_short(path.name)}-{machine}-{slot}.part")


def _short(name: str, limit: int = 80) -> str:
    """The start of a file's name, at most ``limit`` bytes of it."""
    while len(os.fsencode(name)) > limit:
        name = name[:-1]
    return name


def _locked(temporary: Path) -> int:
    """A descriptor of a file of our own that no other writer has, made where there is none; -1 if that cannot be."""
    if fcntl is None:
        raise _NoLocksError
    while True:
        try:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError:
            if not os.path.lexists(temporary):
                raise
            # Somebody else's file, or a link.
            return -1
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(descriptor)
            same = os.path.samestat(status, os.lstat(temporary))
        except BlockingIOError:
            os.close(descriptor)
            return -1
        except FileNotFoundError:
            # Its last owner finished in between.
            os.close(descriptor)
            continue
        except OSError as error:
            temporary.unlink(missing_ok=True)
            os.close(descriptor)
            raise _NoLocksError from error
        if same and stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_uid == os.geteuid():
            return descriptor
        os.close(descriptor)
        if same:
            return -1


def _sweep(path: Path, first: int) -> None:
    """Remove what killed writers of the same file left under the names from ``first`` on."""
    for slot in count(first):
        temporary = _slot(path, slot)
        if not os.path.lexists(temporary):
            return
        with suppress(OSError):
            descriptor = _locked(temporary)
            if descriptor >= 0:
                _written(temporary).unlink(missing_ok=True)
                temporary.unlink(missing_ok=True)
                os.close(descriptor)


def require_writable(path: str | os.PathLike[str], *, folder: bool = False) -> None:
    """Refuse a place for a result before work is done for it; nothing is made there.

    Args:
        path: where a file will be written, or with ``folder`` files in a folder; what is missing of the path will be made.

    Raises:
        ArgumentError: something of another kind is there, or nothing can be written there.
    """
    name = os.fspath(path)
    if not name:
        raise ArgumentError("the name of the output is empty")
    status = None
    try:
        with suppress(FileNotFoundError):
            status = os.stat(name)
        if folder and status is not None and not stat.S_ISDIR(status.st_mode):
            raise ArgumentError(f"{name} is a file: the output must be a folder")
        if not folder and status is not None and stat.S_ISDIR(status.st_mode):
            raise ArgumentError(f"{name} is a folder: name a file, {Path(name) / 'output'} say")
        if not folder and name.endswith(("/", os.sep)):
            raise ArgumentError(f"{name} names a folder: name a file in it")
        if status is not None and not os.access(name, os.W_OK):
            raise ArgumentError(f"{name} cannot be written: it is read-only")
        if status is not None and not folder and not stat.S_ISREG(status.st_mode):
            return
        above = Path(name) if folder else Path(name).parent
        while not os.path.lexists(above):
            # The system has its say about the names of folders to be made.
            above = above.parent
        if not above.is_dir():
            raise ArgumentError(f"{name} cannot be written: {above} is not a folder")
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise ArgumentError(f"{name} cannot be written: {error.strerror or error}") from error


def write_bytes(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write a file, under a temporary name first."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return Path(path)


def write_json(path: str | os.PathLike[str], value: Any, *, indent: int = 1) -> Path:
    """Write a value as JSON, under a temporary name first."""
    return write_bytes(path, (json.dumps(value, indent=indent) + "\n").encode())


def expand_paths(
    arguments: Iterable[str | os.PathLike[str]], extensions: Iterable[str] | None, skipped: Skipped | None = None
) -> list[Path]:
    """Files named by paths, folders (searched recursively, sorted) and glob patterns, each once and in order.

    Links to folders are followed, each folder is searched once. Hidden files and folders below a folder are left out.

    Args:
        arguments: what to look for.
        extensions: of the files that are taken from folders; ``None`` for all of them.
        skipped: filled with what was left out.

    Raises:
        InputError: an argument matches nothing, or a folder cannot be looked into.
    """
    wanted = None if extensions is None else {extension.lower() for extension in extensions}
    skipped = Skipped() if skipped is None else skipped
    found: dict[Path, None] = {}
    for argument in arguments:
        # A path of no letters would be the working directory.
        if not os.fspath(argument):
            raise InputError("a path is empty")
        path, left_out = Path(argument), Skipped(extras=skipped.extras)
        try:
            if path.is_dir():
                matches = sorted(files_below(path, wanted, left_out))
            elif path.exists():
                matches = [path]
            else:
                matches = sorted(p for match in glob.glob(os.fspath(argument), recursive=True) if (p := Path(match)).is_file())
        except OSError as error:
            raise InputError(f"{os.fspath(argument)} cannot be read: {error.strerror or error}") from error
        if not matches:
            raise InputError(f"{argument}: no such file, or no file with a known extension in it" + _in_brackets(left_out))
        skipped.kinds += left_out.kinds
        skipped.unreadable |= left_out.unreadable
        found |= dict.fromkeys(matches)
    return list(found)


def _in_brackets(skipped: Skipped) -> str:
    return f" ({skipped})" if str(skipped) else ""

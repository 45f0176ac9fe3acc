"""Places of media: the file systems of this machine, and whatever fsspec reaches by a URL."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from zoo.engine.store import is_url
from zoo.errors import ArgumentError, MissingExtraError
from zoo.folders import Skipped, files_below

_Result = TypeVar("_Result")

#: Errors that say something about a file, and not about the way to it.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


@runtime_checkable
class Places(Protocol):
    """Files by their places."""

    def kind(self, place: str) -> str | None:
        """``"file"`` or ``"folder"``; ``None`` if nothing is there."""

    def matches(self, pattern: str) -> Iterator[tuple[str, str]]:
        """Names relative to the last folder without a wildcard, and places, of the files that match a pattern; sorted."""

    def below(self, folder: str, wanted: Collection[str] | None, skipped: Skipped) -> Iterator[tuple[str, str]]:
        """Relative names and places of the files below a folder, in a fixed order."""

    def status(self, place: str) -> tuple[int, str]:
        """Size, and what changes with the content: a time or a tag."""

    def open(self, place: str) -> Any:
        """A file, open for reading at any place in it."""

    def read(self, place: str, offset: int = 0, size: int | None = None) -> bytes:
        """Bytes of a file: all, or a range."""


class LocalPlaces:
    """The file systems of this machine; see `Places`."""

    def kind(self, place: str) -> str | None:
        return "folder" if os.path.isdir(place) else "file" if os.path.exists(place) else None

    def matches(self, pattern: str) -> Iterator[tuple[str, str]]:
        base = fixed_part(pattern)
        for found in sorted(glob.glob(pattern, recursive=True)):
            if os.path.isfile(found):
                yield os.path.relpath(found, base or "."), found

    def below(self, folder: str, wanted: Collection[str] | None, skipped: Skipped) -> Iterator[tuple[str, str]]:
        start = len(os.path.join(folder, ""))
        for path in files_below(Path(folder), wanted, skipped):
            place = os.fspath(path)
            yield place[start:] if place.startswith(folder) else os.path.relpath(place, folder), place

    def status(self, place: str) -> tuple[int, str]:
        status = os.stat(place)
        return status.st_size, str(status.st_mtime_ns)

    def open(self, place: str) -> Any:
        return open(place, "rb")

    def read(self, place: str, offset: int = 0, size: int | None = None) -> bytes:
        with open(place, "rb") as file:
            file.seek(offset)
            return file.read() if size is None else file.read(size)


class UrlPlaces:
    """Places that fsspec reaches; see `Places`."""

    def __init__(self) -> None:
        self._files: dict[str, Any] = {}

    def _of(self, place: str) -> tuple[Any, str]:
        """The file system of a URL, and the path in it."""
        try:
            import fsspec
        except ImportError as error:
            raise MissingExtraError(f"{place} is read with fsspec: pip install 'tokenizer-zoo[engine]'") from error
        protocol = place.partition("://")[0]
        try:
            if protocol not in self._files:
                self._files[protocol] = fsspec.core.url_to_fs(place)[0]
            files = self._files[protocol]
            return files, files._strip_protocol(place)
        except (ImportError, ValueError) as error:
            raise ArgumentError(f"{place} cannot be reached: {error}") from error

    def kind(self, place: str) -> str | None:
        files, path = self._of(place)
        files.invalidate_cache()
        return "folder" if files.isdir(path) else "file" if files.exists(path) else None

    def matches(self, pattern: str) -> Iterator[tuple[str, str]]:
        files, path = self._of(pattern)
        base = fixed_part(path)
        for found, info in sorted(files.glob(path, detail=True).items()):
            if info["type"] == "file":
                yield found[len(base) :].lstrip("/"), files.unstrip_protocol(found)

    def below(self, folder: str, wanted: Collection[str] | None, skipped: Skipped) -> Iterator[tuple[str, str]]:
        files, path = self._of(folder)
        pending = [path.rstrip("/")]
        while pending:
            entries = {str(entry["name"]).rstrip("/"): entry["type"] for entry in files.ls(pending.pop(), detail=True)}
            for found in sorted(entries):
                name = found.rpartition("/")[2]
                extension = os.path.splitext(name)[1].lower()
                if name.startswith("."):
                    skipped.kinds["hidden"] += 1
                elif entries[found] == "directory":
                    pending.append(found)
                elif wanted is not None and extension not in wanted:
                    skipped.kinds[extension or "without an extension"] += 1
                elif found != path.rstrip("/"):
                    yield found[len(path.rstrip("/")) :].lstrip("/"), files.unstrip_protocol(found)

    def status(self, place: str) -> tuple[int, str]:
        files, path = self._of(place)
        with _system_errors(place):
            info = files.info(path)
        names = ("ETag", "etag", "blob_id", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")
        stamp = next((info[name] for name in names if info.get(name) is not None), "")
        return int(info.get("size") or 0), str(stamp)

    def open(self, place: str) -> Any:
        files, path = self._of(place)
        with _system_errors(place):
            return files.open(path, "rb")

    def read(self, place: str, offset: int = 0, size: int | None = None) -> bytes:
        files, path = self._of(place)
        end = None if size is None else offset + size
        with _system_errors(place):
            return bytes(files.cat_file(path, start=offset, end=end) if offset or end else files.cat_file(path))


@contextmanager
def _system_errors(place: str) -> Iterator[None]:
    """Errors of libraries behind fsspec as those of a file system; they are what a network gives."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(None, f"{type(error).__name__}: {error}", place) from error


_LOCAL = LocalPlaces()
_URLS = UrlPlaces()


def places_of(place: str) -> Places:
    """Reader of a place."""
    return _URLS if is_url(place) else _LOCAL


def whole_place(place: str | os.PathLike[str]) -> str:
    """A place under a name that does not depend on the working directory.

    Raises:
        ArgumentError: it has no letters, which would be the working directory.
    """
    if not os.fspath(place):
        raise ArgumentError("a path is empty")
    place = os.fspath(place).removeprefix("file://")
    return place if is_url(place) else os.path.abspath(place)


def beside(place: str, other: str) -> str:
    """A place that a file names, relative to the folder of the file."""
    if is_url(other) or os.path.isabs(other):
        return other
    folder, slash, _ = place.rpartition("/")
    return f"{folder}{slash}{other}" if is_url(place) else os.path.normpath(os.path.join(os.path.dirname(place), other))


def fixed_part(pattern: str) -> str:
    """The folders of a pattern before the first wildcard."""
    parts = pattern.split("/")
    return "/".join(parts[: next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)])


def patiently(action: Callable[[], _Result], seconds: float, root: str) -> _Result:
    """Result of an action on a file, tried again while the way to the file is broken.

    Args:
        action: reads, and raises an `OSError` if it cannot.
        seconds: how long it is tried.
        root: a folder or file that is there as long as the file system is.

    Raises:
        OSError: the last error; of a missing file at once, if the folder that held it is there.
    """
    end = time.monotonic() + seconds
    pause = 0.2
    while True:
        try:
            return action()
        except OSError as error:
            away = isinstance(error, FileNotFoundError) and not is_url(root) and not os.path.exists(root)
            if (isinstance(error, _FINAL) and not away) or time.monotonic() + pause > end:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 10)

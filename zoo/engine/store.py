"""The folder that a run writes to: on a disk, or in an object store through fsspec. A file appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from zoo.errors import output_error


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether a place is in an object store, or anything else that fsspec reaches by a URL."""
    return "://" in os.fspath(place)


class Store:
    """Files by their names below a folder or a URL; names have ``/`` between folders."""

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self.place = os.fspath(place)
        self._files: Any = None
        if is_url(self.place):
            import fsspec

            self._files, self._root = fsspec.core.url_to_fs(self.place)
        else:
            self._root = os.path.abspath(self.place)

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.place if self._files else self._root,)

    @property
    def local(self) -> bool:
        """Whether it is a folder of this machine's file systems."""
        return self._files is None

    def path(self, name: str = "") -> str:
        """The place of a file, for messages and for readers of a local folder."""
        return f"{(self.place if self._files else self._root).rstrip('/')}/{name}" if name else self.place

    def _inner(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def names(self, folder: str = "") -> list[str]:
        """Names of what lies in a folder, sorted; none if there is no such folder."""
        try:
            if self._files is None:
                return sorted(os.listdir(self._inner(folder)))
            self._files.invalidate_cache()
            found = self._files.ls(self._inner(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(name for path in found if (name := str(path).rstrip("/").rpartition("/")[2]))

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            OSError: it cannot be read; a ``FileNotFoundError`` if it is not there.
        """
        if self._files is None:
            return Path(self._inner(name)).read_bytes()
        return bytes(self._files.cat_file(self._inner(name)))

    def size(self, name: str) -> int:
        """Bytes of a file."""
        if self._files is None:
            return os.stat(self._inner(name)).st_size
        return int(self._files.info(self._inner(name))["size"])

    def open(self, name: str) -> Any:
        """A file, open for reading at any place."""
        if self._files is None:
            return Path(self._inner(name)).open("rb")
        return self._files.open(self._inner(name), "rb")

    def write(self, name: str, content: bytes) -> None:
        """Write a file, so that it is there whole after a loss of power, or not at all.

        Raises:
            OutputError: it cannot be written: no room, no permission.
        """
        try:
            if self._files is not None:
                self._files.pipe_file(self._inner(name), content)
                return
            target = self._inner(name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            temporary = os.path.join(os.path.dirname(target), f".{os.path.basename(target)}-{secrets.token_hex(6)}.part")
            try:
                with open(temporary, "xb", buffering=0) as file:
                    view = memoryview(content)
                    while len(view):
                        view = view[file.write(view) :]
                    os.fsync(file.fileno())
                os.replace(temporary, target)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
            sync_folder(os.path.dirname(target))
        except OSError as error:
            raise output_error(self.path(name), error) from error
        except Exception as error:
            if self._files is None:
                raise
            raise output_error(self.path(name), OSError(None, f"{type(error).__name__}: {error}")) from error

    def adopt(self, path: Path, name: str) -> None:
        """Take over a finished file from beside the folder, as `write` would write it.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            if self._files is not None:
                self._files.put_file(os.fspath(path), self._inner(name))
                return
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(path, self._inner(name))
            sync_folder(os.path.dirname(self._inner(name)))
        except OSError as error:
            raise output_error(self.path(name), error) from error

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            if self._files is None:
                os.unlink(self._inner(name))
            else:
                self._files.rm_file(self._inner(name))

    def sweep(self) -> None:
        """Remove what killed writers left under temporary names."""
        for folder in ("", "_plan"):
            for name in self.names(folder) if self.local else ():
                if is_temporary(name):
                    path = Path(self._inner(f"{folder}/{name}" if folder else name))
                    with contextlib.suppress(OSError):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_temporary(name: str) -> bool:
    """Whether a file is one that `Store.write` had not finished."""
    return name.startswith(".") and name.endswith(".part")


def sync_folder(folder: str) -> None:
    """Make the names in a folder last; where the system cannot, they do so when it pleases."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

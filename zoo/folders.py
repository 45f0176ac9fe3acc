"""Folders: which of their files are taken. Does not import torch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from zoo.errors import listing


@dataclass
class Skipped:
    """Files that a search left out of folders.

    Attributes:
        kinds: number of files by what they are: an extension, ``hidden``, ...
        unreadable: folders that could not be looked into, with the reason.
        extras: the extra of this package that files of an extension take; see `zoo.modality.Modality`.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    unreadable: dict[str, str] = field(default_factory=dict)
    extras: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line; empty if nothing was left out."""
        ordered = sorted(self.kinds.items(), key=lambda pair: (-pair[1], pair[0]))
        kinds = [f"{number} {kind}{self._with_extra(kind)}" for kind, number in ordered]
        kinds += [f"the folder {name} ({reason})" for name, reason in self.unreadable.items()]
        return f"skipped {listing(kinds, shown=12)}" if kinds else ""

    def _with_extra(self, kind: str) -> str:
        return f' (read with pip install "tokenizer-zoo[{self.extras[kind]}]")' if kind in self.extras else ""


def files_below(top: Path, wanted: Collection[str] | None, skipped: Skipped) -> Iterator[Path]:
    """Files below a folder, folder by folder and sorted within each; memory holds the names of one folder.

    Links to folders are followed, each folder is searched once. Hidden files and folders are left out.

    Args:
        top: the folder.
        wanted: extensions of the files, in lower case and with the dot; ``None`` for all of them.
        skipped: filled with what was left out.

    Raises:
        OSError: the folder itself cannot be looked into.
    """
    folders, linked, seen = [top], list[Path](), set[tuple[int, int]]()
    while folders or linked:
        # A folder's own place counts before the links to it.
        folder = folders.pop() if folders else linked.pop(0)
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            names, below = list[str](), list[tuple[str, bool]]()
            with os.scandir(folder) as entries:
                for entry in entries:
                    if kind := _left_out(entry, wanted):
                        skipped.kinds[kind] += 1
                    elif entry.is_dir():
                        below.append((entry.name, entry.is_symlink()))
                    else:
                        names.append(entry.name)
        except OSError as error:
            if folder is top:
                raise
            skipped.unreadable[os.fspath(folder)] = error.strerror or str(error)
            continue
        for name, link in sorted(below):
            (linked if link else folders).append(folder / name)
        names.sort()
        for name in names:
            yield folder / name


def _left_out(entry: os.DirEntry[str], wanted: Collection[str] | None) -> str:
    """What an entry of a folder is, if it is not to be taken."""
    if entry.name.startswith("._"):
        return "._* of macOS"
    if entry.name.startswith("."):
        return "hidden"
    try:
        if entry.is_dir():
            return ""
        if not entry.is_file():
            return "broken links" if entry.is_symlink() else "that are no regular files"
    except OSError:
        return "broken links"
    extension = os.path.splitext(entry.name)[1].lower()
    return "" if wanted is None or extension in wanted else extension or "without an extension"

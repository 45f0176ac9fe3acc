"""The finished items of a run on disk, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.media import append_bytes, replacing, write_bytes
from zoo.moved import names_of

Features = Mapping[str, NDArray[np.float32]]

PART_FILE = "items.part.jsonl"


class RunJournal:
    """One line of JSON per finished item, and the features of metrics that compare whole sets beside it.

    Attributes:
        rows: finished items by file; of an item that was measured again, the latest.

    Args:
        folder: where the files are.
        header: settings of the run; the rows of other settings are dropped.
        resume: go on from what is there.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], *, resume: bool) -> None:
        self._folder = folder
        self._path = folder / PART_FILE
        self.rows = self._finished(header) if resume else {}
        if not self.rows:
            self.remove()
            write_bytes(self._path, _line(header))

    def _finished(self, header: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        if not self._path.exists():
            return {}
        # A last line that was cut off is dropped.
        lines = self._path.read_text(encoding="utf-8").split("\n")[:-1]
        if not lines or json.loads(lines[0]) != json.loads(json.dumps(header)):
            return {}
        rows = [json.loads(line) for line in lines[1:]]
        with replacing(self._path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return {row["file"]: row for row in rows}

    def append(self, row: dict[str, Any], features: Features) -> None:
        """Keep an item: ``features`` ``[variants, dim]`` first, then the row with their place, so that no row lacks them.

        Raises:
            OutputError: the disk is full, say; what was kept before stays.
        """
        places = {}
        for name, values in features.items():
            offset = append_bytes(self._features_path(name), np.ascontiguousarray(values, np.float32).tobytes())
            places[name] = {"offset": offset, "shape": list(values.shape)}
        row["features"] = places
        append_bytes(self._path, _line(row))
        self.rows[row["file"]] = row

    def features(self, name: str, row: Mapping[str, Any]) -> NDArray[np.float32]:
        """The features of one item, ``[variants, dim]``."""
        place = row["features"][name]
        count, dim = place["shape"]
        values = np.fromfile(self._features_path(name), np.float32, count * dim, offset=place["offset"])
        return values.reshape(count, dim)

    def remove(self) -> None:
        """Delete the files."""
        self._path.unlink(missing_ok=True)
        for path in self._folder.glob("items.part.*.f32"):
            path.unlink()

    def _features_path(self, name: str) -> Path:
        return self._folder / f"items.part.{name}.f32"


def _line(content: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(content)}\n".encode()


#: A former name, for one release.
__getattr__ = names_of(__name__, {"Journal": "zoo.eval.journal:RunJournal"})

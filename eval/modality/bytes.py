"""Metrics of files: whether every byte comes back, what a byte takes, and whether the network knows what the file shows.

The class of a file is the name of the folder that it lies in.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.errors import InputError
from zoo.eval.modality.base import Metric, MetricFunction, Row, Variant
from zoo.spec import Spec
from zoo.tokens import Tokens

EXTENSIONS = None
BASELINE = "the file"
NOTES = (
    "Files are compared byte for byte; the baseline is the file itself, which takes 8 bits per byte. The class of a file is "
    "the name of its folder. Where a model does not name its classes, they are the names of all folders beside it in "
    "alphabetical order, if there are as many. Accuracy is undefined for files of other classes, and for those that are too "
    "short or too long for the network."
)
TEMPLATE = "bytes.html.j2"
ON_DEVICE = False

_SHOWN = 256
_BYTES_PER_ROW = 32


class File(bytes):
    """The content of a file, and where it was found."""

    path: Path


# ----------------------------------------------------------------------------------------------------------------- metrics


def exactness(reference: bytes, estimate: bytes) -> float:
    """1 if both are equal, 0 if they are not."""
    return float(reference == estimate)


def class_names(tokenizer: Any, file: File) -> tuple[str, ...]:
    """Names of a tokenizer's classes: its own, or those of the folders beside the file's; none if they are not as many."""
    if tokenizer.config.labels:
        return tuple(tokenizer.config.labels)
    folders = sorted(folder.name for folder in file.path.absolute().parent.parent.iterdir() if folder.is_dir())
    return tuple(folders) if len(folders) == tokenizer.config.classes else ()


def accuracy(tokenizer: Any, tokens: Tokens, reference: File) -> float | None:
    """1 if the highest logit is that of the file's folder, 0 if it is not; undefined where there is no such class."""
    names, label = class_names(tokenizer, reference), reference.path.absolute().parent.name
    if label not in names:
        return None
    try:
        logits = tokenizer.classify(tokens.to(tokenizer.device))
    except InputError:
        return None
    return float(names[int(logits.argmax())] == label)


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("accuracy", "", True, accuracy, "share of files whose class is found", of_tokens=True),
    "exactness": Metric("exactness", "", True, exactness, "share of files that come back byte for byte"),
}


# ---- what the run asks: see `zoo.eval.modality.base`


def read(path: str, spec: Spec, options: Mapping[str, Any]) -> File:
    """The content of a file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        file = File(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    file.path = Path(path)
    return file


def comparable(decoded: bytes, reference: bytes) -> bytes:
    """The decoded bytes as they are."""
    return decoded


def properties(reference: File, spec: Spec) -> dict[str, Any]:
    """Kind and size, and the size that DEFLATE makes of it."""
    return {
        "kind": reference.path.suffix.lower().lstrip(".") or "none",
        "file_bytes": len(reference),
        "deflated_bytes": len(zlib.compress(reference, 9)),
    }


def baseline(reference: bytes, spec: Spec, bits: int) -> bytes:
    """The file."""
    return reference


def measure(function: MetricFunction, spec: Spec, *signals: bytes) -> Any:
    """The function of a file and what was decoded."""
    return function(*signals)


def tokens_per(rows: Sequence[Row], spec: Spec) -> dict[str, float]:
    """Tokens per byte."""
    size = sum(row["file_bytes"] for row in rows)
    return {"byte": sum(row["tokens"] for row in rows) / size} if size else {}


def totals(rows: Sequence[Row]) -> dict[str, Any]:
    """Bytes, what DEFLATE makes of one, accuracy by kind of file, and seconds of work per megabyte."""
    size = sum(row["file_bytes"] for row in rows)
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.get("accuracy") is not None:
            found[row["kind"]].append(row["accuracy"])
    speed = {
        f"{direction}_seconds_per_megabyte": sum(row[f"{direction}_seconds"] for row in rows) / size * 1e6 if size else None
        for direction in ("encode", "decode")
    }
    return {
        "file_bytes": size,
        "deflate_bits_per_byte": 8 * sum(row["deflated_bytes"] for row in rows) / size if size else None,
        "accuracy_by_kind": {
            kind: {"n": len(figures), "accuracy": sum(figures) / len(figures)} for kind, figures in sorted(found.items())
        },
        "speed": speed,
    }


def heading(summary: Mapping[str, Any]) -> str:
    """Bytes, and bits for each of them."""
    return f"{summary['file_bytes']} bytes, {summary['tokens'].get('bits_per_byte', 0):g} bits per byte"


def tiles(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Bits per byte, accuracy by kind of file, and speed."""
    found = [(f"{summary['tokens'].get('bits_per_byte', 0):g}", "bits per byte as tokens")]
    if (deflated := summary["deflate_bits_per_byte"]) is not None:
        found.append((f"{deflated:.2f}", "bits per byte by DEFLATE"))
    for kind, figures in summary["accuracy_by_kind"].items():
        found.append((f"{figures['accuracy']:.1%}", f"accuracy, {figures['n']} {kind} files"))
    for direction, name in (("encode", "encoding"), ("decode", "decoding")):
        if seconds := summary["speed"][f"{direction}_seconds_per_megabyte"]:
            found.append((f"{1 / seconds:.0f} MB/s", name))
    return found


def shown(reference: File, variants: Sequence[Variant], spec: Spec) -> dict[str, Any]:
    """The first bytes of a file in hexadecimal."""
    start = reference[:_SHOWN]
    rows = [start[first : first + _BYTES_PER_ROW].hex(" ") for first in range(0, len(start), _BYTES_PER_ROW)]
    return {
        "caption": f"{len(reference)} bytes in {reference.path.parent.name}"
        + (f"; the first {_SHOWN} are shown" if len(reference) > _SHOWN else ""),
        "figures": variants[-1].figures,
        "dump": "\n".join(rows),
    }

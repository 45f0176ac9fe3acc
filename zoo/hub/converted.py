"""Converted copies of official checkpoints in the cache."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from zoo.download import cache_root
from zoo.hub.build import Request
from zoo.registry import Entry


def find_converted(entry: Entry, request: Request, whole: Any, config: Any) -> Path | None:
    """The converted file of an entry, of all its parts or of the wanted ones, unless the user named other sources."""
    if request.sources.places:
        return None
    revision = request.sources.revision or entry.weights.revision
    candidates = (converted_path(entry, revision, whole, chosen) for chosen in (whole, config))
    return next((path for path in candidates if path.exists()), None)


def converted_path(entry: Entry, revision: str, whole: Any, config: Any) -> Path:
    source = f"{entry.weights.repo}/{entry.weights.file}@{revision}"
    parts = "" if config == whole else "-".join(["", *config.parts])
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    return cache_root() / "converted" / f"{entry.name}-{digest}{parts}.safetensors"

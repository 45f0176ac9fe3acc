"""Files of a catalogue entry fetched, and converted ahead of time."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from zoo import registry
from zoo.download import download
from zoo.errors import (
    WeightsError,
)
from zoo.hub.build import Request, log
from zoo.hub.converted import converted_path
from zoo.hub.loading import fetch_entry, load
from zoo.hub.own import embedded_path
from zoo.hub.pieces import (
    Place,
    Sources,
    fetch_piece,
    wanted_pieces,
)
from zoo.saving import write_saved_file


def pull(
    name: str,
    *,
    parts: str | Sequence[str] | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | None = None,
) -> Path:
    """Download the weights of a catalogue entry without loading them; returns where they are.

    Of a model in several pieces, those that the ``parts`` need (all of them by default) and that are on the Hub.

    Raises:
        RegistryError, InputError, HubError, ChecksumError, WeightsError: as `load` does.
    """
    entry = registry.get(name)
    if entry.weights.source == "embedded":
        return embedded_path(entry)
    if entry.weights.source == "none":
        raise WeightsError(f"no weights of {name} were ever published")
    fetch = functools.partial(download, cache_dir=cache_dir, local_files_only=False, token=token)
    request = Request(Sources(fetch, revision=revision), parts)
    path, _ = fetch_entry(entry, request)
    if entry.weights.pieces:
        config = request.choose_parts(registry.check_config(entry), name)
        for key, piece in wanted_pieces(entry, config).items():
            if piece.repo is None:
                log.warning("%s is not on the Hub: %s", piece.file, piece.note)
            else:
                fetch_piece(entry, key, piece, request.sources)
    return path


def convert(
    name: str,
    *,
    parts: str | Sequence[str] | None = None,
    files: Mapping[str, Place] | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | None = None,
) -> Path:
    """Write the cleaned safetensors of a catalogue entry into our cache, where later loads find it; returns its path.

    It holds the tensors that inference needs, in our names, with weight norm folded: 0.3 of WavTokenizer's 1.75 GB. With
    ``parts`` it serves those parts only. What ``files`` placed need not be named again.

    Raises:
        RegistryError, InputError, HubError, WeightsError: as `load` does.
    """
    entry = registry.get(name)
    if entry.weights.source == "embedded":
        return embedded_path(entry)
    whole = registry.check_config(entry)
    request = Request(Sources(download, revision=revision), parts)
    target = converted_path(entry, revision or entry.weights.revision, whole, request.choose_parts(whole, name))
    if files or not target.exists():
        tokenizer = load(name, parts=parts, files=files, revision=revision, cache_dir=cache_dir, token=token)
        write_saved_file(tokenizer, target)
    return target

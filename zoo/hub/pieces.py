"""Pieces of a catalogue entry: on the Hub, or where the user says."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.download import verify
from zoo.errors import InputError, NotOnHubError, WeightsError, listing
from zoo.registry import MAIN, Entry, Piece
from zoo.saving import CONFIG_FILE, WEIGHTS_FILE

DIFFUSERS_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

Place = str | os.PathLike[str]


@dataclass(frozen=True)
class Sources:
    """Places that files come from.

    Attributes:
        download: gets a file of a Hub repository, given repository, file, revision and ``ask``.
        places: the user's own places for pieces, by name: a file, a folder, or ``hf-hub:org/repo[@revision]``.
        revision: of the main piece's repository, instead of the catalogue's.
    """

    download: Callable[..., Path]
    places: Mapping[str, Place] = field(default_factory=dict)
    revision: str | None = None


@dataclass(frozen=True)
class PieceFiles:
    """Paths of one piece or component, and the prefix added to its keys."""

    weights: Path | None
    config: Path | None = None
    prefix: str = ""


def parts_of(config: Any) -> tuple[str, ...]:
    """Names of a model's parts, where it has some."""
    return getattr(config, "parts", ())


def wanted_pieces(entry: Entry, config: Any) -> dict[str, Piece]:
    """The pieces that the parts of a configuration need."""
    parts = parts_of(config)
    pieces = entry.weights.all_pieces()
    return {name: piece for name, piece in pieces.items() if piece.part is None or piece.part in parts}


def require_place(entry: Entry, name: str, piece: Piece, sources: Sources) -> None:
    """Refuse to go on without a piece that only the user can bring, or with pieces unknown to the entry.

    Raises:
        WeightsError: the piece must be supplied by the user; the message says how.
        InputError: ``files=`` names an unknown piece.
    """
    known = entry.weights.all_pieces()
    if unknown := sorted(sources.places.keys() - known.keys()):
        raise InputError(f"{entry.name} has the pieces {', '.join(known)}; {listing(unknown)} in files= is none of them")
    if piece.repo is None and name not in sources.places:
        raise WeightsError(f"{entry.name} needs {_advice(entry, name, piece)}")


def fetch_piece(entry: Entry, name: str, piece: Piece, sources: Sources) -> dict[str, PieceFiles]:
    """A piece of an entry from the user's place for it or from the catalogue's: one file, or several components.

    Raises:
        InputError, WeightsError: as `require_place`.
        HubError: it cannot be downloaded; says what the catalogue knows about it.
    """
    require_place(entry, name, piece, sources)
    place = sources.places.get(name)
    address = os.fspath(place) if place is not None else ""
    if place is not None and not address.startswith("hf-hub:"):
        return _local_piece(name, piece, Path(address))
    repo, _, pinned = address.removeprefix("hf-hub:").partition("@")
    own_revision = sources.revision if name == MAIN and sources.revision else piece.revision
    repo, revision = (repo, pinned or "main") if repo else (str(piece.repo), own_revision)

    def fetch(file: str) -> Path:
        return sources.download(repo, file, revision, ask=f"zoo pull {entry.name}")

    try:
        if piece.file is not None:
            path = fetch(piece.file)
            pinned_here = place is None and revision == piece.revision
            verify(path, piece.sha256 if pinned_here else None, piece.size if pinned_here else None)
            return {name: PieceFiles(path, prefix=piece.prefix)}
        return {component: _fetch_component(component, fetch) for component in piece.components}
    except NotOnHubError as error:
        if not piece.note:
            raise
        raise NotOnHubError(f"{error}. {entry.name} needs {_advice(entry, name, piece)}", missing=error.missing) from error


def _advice(entry: Entry, name: str, piece: Piece) -> str:
    """How to get a piece that cannot be had by itself, and how to do without."""
    what = piece.file or f"a diffusers pipeline with {', '.join(piece.components)}"
    without = f", or leave the {piece.part} out by naming the other parts= only" if piece.part else ""
    return f"{what}: {piece.note}. Then pass files={{{name!r}: <where it lies>}}{without}"


def _local_piece(name: str, piece: Piece, place: Path) -> dict[str, PieceFiles]:
    """A piece in a file or folder of the user's."""
    if piece.file is not None:
        return {name: PieceFiles(place / piece.file if place.is_dir() else place, prefix=piece.prefix)}
    found = {}
    for component in piece.components:
        config, weights = place / component / _component_config(component), _component_weights(component)
        if not config.exists():
            raise WeightsError(f"{place} is no folder of a diffusers pipeline with a {component}: there is no {config}")
        found[component] = PieceFiles(place / component / weights if weights else None, config, f"{component}.")
    return found


def _fetch_component(component: str, fetch: Callable[[str], Path]) -> PieceFiles:
    """The configuration and, where there are any, the weights of a component of a diffusers pipeline."""
    config = fetch(f"{component}/{_component_config(component)}")
    weights = None
    if file := _component_weights(component):
        weights = fetch(f"{component}/{file}")
        verify(weights, None, None)
    return PieceFiles(weights, config, f"{component}.")


def _component_config(component: str) -> str:
    return "scheduler_config.json" if component.endswith("scheduler") else CONFIG_FILE


def _component_weights(component: str) -> str | None:
    """Name of a component's weights in a pipeline: diffusers' for its own models, transformers' for text encoders."""
    if component.endswith("scheduler"):
        return None
    return WEIGHTS_FILE if component.endswith("text_encoder") else DIFFUSERS_WEIGHTS_FILE

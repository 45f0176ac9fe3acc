"""Kinds of media: one record for each, which every room of the house reads. Does not import torch.

A modality is a `Modality` in the table below, plus the modules that its ``homes`` name: the base class of its tokenizers, how
its media are read and written, its metrics, its benchmark. They are imported when somebody asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import Any, Literal

from zoo.errors import InputError

#: What one module of a modality is for.
#:
#: - ``tokenizer``: base class of its tokenizers (`zoo.tokenizer`).
#: - ``media``: ``EXTENSIONS``, ``write(path, decoded, sample_rate)``, ``trial()`` and ``figures(spec, meta, bits)``; where an
#:   item has a rate of its own ``rate(meta)``, which ``write`` gets; where data sets are measured in more than items ``EXTENT``
#:   and ``extent(meta)``; where there are limits beside the options of encoding ``LIMITS`` and
#:   ``require_within(item, meta, **limits)``; where a string in a table is an item itself, and no path, ``STRINGS``; where
#:   there are files of many items ``RECORDS``, their extensions, ``RECORD_COLUMNS``, ``spans(file)`` and ``record(content)``.
#: - ``metrics``: a `zoo.eval.modality.base.Measures`.
#: - ``bench``: the jobs of ``zoo bench``.
#: - ``quantize``: ``SUBJECT``, a `zoo.eval.studies.quantized.base.Subject`.
Facet = Literal["tokenizer", "media", "metrics", "bench", "quantize"]

#: How a field that an item's tokens remember is written in a ``.zt`` file (`zoo.zt`).
MetaKind = Literal["count", "rate", "float", "fit", "octets"]


@dataclass(frozen=True)
class Modality:
    """One kind of media.

    Attributes:
        name: ``"image"``.
        unit: what progress bars and benchmarks count, in the singular.
        suffix: extension of a decoded file, without the dot.
        meta: fields that an item's tokens may remember, in the order of ``.zt`` files.
        homes: modules by what they are for; a facet may be missing.
        synonyms: the field's other words for it.
        domains: words for some of its media, such as ``"speech"``, which entries of the catalogue carry as tags.
        extras: the extra of the package that brings the reader, by extension of the files that take one.
    """

    name: str
    unit: str
    suffix: str
    meta: tuple[tuple[str, MetaKind], ...]
    homes: Mapping[Facet, str]
    synonyms: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    extras: Mapping[str, str] = field(default_factory=dict)

    @property
    def words(self) -> tuple[str, ...]:
        """Everything that it may be called."""
        return (self.name, *self.synonyms, *self.domains)

    def home(self, facet: Facet) -> ModuleType:
        """The module for one purpose, imported now.

        Raises:
            InputError: this kind of media has none; names those that have.
        """
        if facet not in self.homes:
            others = ", ".join(known.name for known in _MODALITIES.values() if facet in known.homes)
            raise InputError(f"there is no {_PURPOSES[facet]} for {self.name} yet, only for {others}")
        return import_module(self.homes[facet])

    @cached_property
    def extensions(self) -> tuple[str, ...] | None:
        """Extensions of the files that are taken from folders, with the dot; ``None`` for all files."""
        found: tuple[str, ...] | None = self.home("media").EXTENSIONS
        return found

    @cached_property
    def extent_unit(self) -> str | None:
        """Unit that data sets of it are measured in, besides items: ``"hours"``; ``None`` if in nothing else."""
        found: str | None = getattr(self.home("media"), "EXTENT", None)
        return found

    @property
    def limits(self) -> tuple[str, ...]:
        """Names of the limits that `require_within` knows."""
        found: tuple[str, ...] = getattr(self.home("media"), "LIMITS", ())
        return found

    @property
    def strings(self) -> bool:
        """Whether a string in a table or a line of JSON is an item itself, and no path."""
        found: bool = getattr(self.home("media"), "STRINGS", False)
        return found

    @property
    def records(self) -> tuple[str, ...]:
        """Extensions of files that hold many items of this kind, with the dot."""
        found: tuple[str, ...] = getattr(self.home("media"), "RECORDS", ())
        return found

    def extent(self, meta: Mapping[str, Any]) -> float:
        """Amount of an encoded item, in `extent_unit`; 0 where that is not known."""
        return self.home("media").extent(meta) if self.extent_unit else 0.0

    def require_within(self, item: Any, meta: Mapping[str, Any] | None, **limits: Any) -> None:
        """Refuse an item that is beyond a limit, by its header alone (``item``), or by what its tokens remember (``meta``).

        Raises:
            InputError: it is.
        """
        self.home("media").require_within(item, meta, **limits)


_PURPOSES: dict[Facet, str] = {
    "tokenizer": "base class of tokenizers",
    "media": "reader",
    "metrics": "evaluation",
    "bench": "benchmark",
    "quantize": "measure of quantization",
}


def _homes(name: str, *missing: Facet) -> Mapping[Facet, str]:
    homes: dict[Facet, str] = {
        "tokenizer": f"zoo.tokenizer.{name}",
        "media": f"zoo.media.kinds.{name}",
        "metrics": f"zoo.eval.modality.{name}",
        "bench": f"zoo.bench.{name}",
        "quantize": f"zoo.eval.studies.quantized.{name}",
    }
    return MappingProxyType({facet: home for facet, home in homes.items() if facet not in missing})


_SOUND: tuple[tuple[str, MetaKind], ...] = (("samples", "count"), ("sample_rate", "rate"), ("scales", "octets"))
_PICTURE: tuple[tuple[str, MetaKind], ...] = (("width", "count"), ("height", "count"), ("fit", "fit"), ("rows", "count"))
_CLIP: tuple[tuple[str, MetaKind], ...] = (
    *(("frames", "count"), ("fps_num", "count"), ("fps_den", "count")),
    *_PICTURE,
)
_PLACE: tuple[tuple[str, MetaKind], ...] = (("x", "float"), ("y", "float"), ("z", "float"), ("scale", "float"))
_TEXT: tuple[tuple[str, MetaKind], ...] = (("text", "count"), ("residue", "octets"), ("kept", "octets"))

#: Files with sound that PyAV reads.
_WITH_PYAV = (".m4a", ".m4b", ".mp4", ".aac", ".webm", ".mka", ".wma", ".wv", ".ape", ".amr", ".ac3")

#: Films, all of which PyAV reads.
_FILMS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif")

_MODALITIES: dict[str, Modality] = {
    known.name: known
    for known in (
        Modality("image", "image", "png", _PICTURE, _homes("image")),
        Modality(
            *("audio", "second", "wav", _SOUND, _homes("audio")),
            domains=("speech", "music"),
            extras=MappingProxyType(dict.fromkeys(_WITH_PYAV, "video")),
        ),
        Modality(
            *("video", "clip", "mp4", _CLIP, _homes("video", "quantize")),
            synonyms=("clip", "clips"),
            extras=MappingProxyType(dict.fromkeys(_FILMS, "video")),
        ),
        Modality("shape", "shape", "glb", _PLACE, _homes("shape", "quantize"), synonyms=("3d", "mesh")),
        Modality("bytes", "file", "bin", (), _homes("bytes"), synonyms=("file", "files")),
        Modality("text", "text", "txt", _TEXT, _homes("text", "quantize")),
    )
}


def modality(name: str) -> Modality:
    """The record of a kind of media, by its name, a synonym, or the name of one of its domains.

    Raises:
        InputError: there is none; names those that there are.

    >>> modality("3d").name, modality("speech").name, modality("audio").unit
    ('shape', 'audio', 'second')
    """
    for known in _MODALITIES.values():
        if name in known.words:
            return known
    raise InputError(f"there is no modality {name!r}; there are {', '.join(_MODALITIES)}")


def modalities() -> Mapping[str, Modality]:
    """All records by name."""
    return MappingProxyType(_MODALITIES)


def register(record: Modality) -> None:
    """Add a kind of media for this process, so that a plug-in's tokenizers can have it.

    Raises:
        InputError: one of its words is taken by another record.
    """
    for known in _MODALITIES.values():
        if known != record and (taken := set(record.words) & set(known.words)):
            raise InputError(f"the modality {min(taken)!r} is there already")
    _MODALITIES[record.name] = record

"""The catalogue: ``registry.yaml``, a user's own files and plug-ins, validated into entries. Does not import torch."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Hashable, Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from zoo.errors import InputError, RegistryError
from zoo.modality import modality as modality_called

if TYPE_CHECKING:
    from zoo.tokenizer import Tokenizer


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Mirror(_Strict):
    """Another place that holds the same weights."""

    repo: str
    file: str
    revision: str = "main"
    note: str = ""


class Piece(_Strict):
    """One file of a checkpoint that is spread over several, or the folders of a diffusers pipeline.

    Attributes:
        part: part of the model that needs it (see ``parts`` of `zoo.load`); every part does if it is left out.
        repo: repository on the Hub; left out where there is none, and the user says with ``files`` of `zoo.load` where it lies.
        file: file in the repository, or its usual name.
        components: instead of ``file``: folders of the pipeline, each with its configuration and, but for schedulers, weights.
        config_field: field of the family's ``Config`` that gets the components' configurations, by component.
        prefix: what the keys of ``file`` get in front in the assembled model; those of a component get its name.
        size, sha256: of ``file``, where known.
        note: where to get it, and what to know about it.
    """

    part: str | None = None
    repo: str | None = None
    file: str | None = None
    components: list[str] = []
    config_field: str | None = None
    prefix: str = ""
    revision: str = "main"
    size: int | None = None
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    note: str = ""

    def model_post_init(self, _: Any) -> None:
        if (self.file is None) == (not self.components):
            raise ValueError("a piece is either a 'file' or 'components'")
        if bool(self.components) != (self.config_field is not None):
            raise ValueError("'components' need a 'config_field', and nothing else has one")
        if self.repo is None and not self.note:
            raise ValueError("a piece without 'repo' needs a 'note' that says where to get it")


#: Name of the first piece, the one that an entry's ``weights`` describe themselves.
MAIN = "main"


class Weights(_Strict):
    """Where the weights are.

    Attributes:
        source: ``hub`` (a file of a Hub repository), ``embedded`` (a file of this package), ``local`` (a file that the user has
            to fetch from elsewhere, see ``note``) or ``none`` (never published).
        config: upstream's own configuration in the same repository, where it says what the tensors cannot; it decides over the
            entry's ``config`` then.
        size, sha256: of the file, where known.
        pieces: what the model needs besides, by name.
        note: where to get the file, and what to know about it.
    """

    source: Literal["hub", "embedded", "local", "none"]
    repo: str | None = None
    file: str | None = None
    config: str | None = None
    revision: str = "main"
    size: int | None = None
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    format: Literal["safetensors", "ckpt", "pt"] = "safetensors"
    mirrors: list[Mirror] = []
    pieces: dict[str, Piece] = {}
    note: str = ""

    def model_post_init(self, _: Any) -> None:
        needed = {"hub": ("repo", "file"), "embedded": ("file",), "local": ("file", "note"), "none": ()}[self.source]
        for name in needed:
            if not getattr(self, name):
                raise ValueError(f"source {self.source!r} needs {name!r}")
        if self.pieces and self.source not in ("hub", "local"):
            raise ValueError(f"source {self.source!r} has no pieces")
        if MAIN in self.pieces:
            raise ValueError(f"{MAIN!r} is the name of the file itself")

    def all_pieces(self) -> dict[str, Piece]:
        """The file itself as the first piece, and the others."""
        main = Piece(
            repo=self.repo if self.source == "hub" else None,
            file=self.file,
            revision=self.revision,
            size=self.size,
            sha256=self.sha256,
            note=self.note,
        )
        return {MAIN: main} | self.pieces


class Licence(_Strict):
    """Licences of the code and of the weights, which often differ."""

    code: str
    weights: str
    non_commercial: bool = False
    note: str = ""


class Paper(_Strict):
    """Where the method is described."""

    title: str
    url: str


class Reported(_Strict):
    """A figure that somebody else published; never one of ours."""

    metric: str
    value: float
    data: str
    source: str


class Entry(_Strict):
    """One loadable model.

    Attributes:
        family: module ``zoo.codecs.<family>``, or the dotted path of a plug-in's module.
        config: fields of the family's ``Config``.
        modality: kind of media, a name in `zoo.modality`.
        tags: words for what it is made for, such as ``speech``, which `names` filters by as well.
        card: file name in ``cards/``.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,39}$")
    family: str
    modality: str
    tags: list[str] = []
    description: str
    config: dict[str, Any]
    weights: Weights
    licence: Licence
    card: str
    paper: Paper | None = None
    reported: list[Reported] = []

    @model_validator(mode="before")
    @classmethod
    def _name_modality(cls, raw: Any) -> Any:
        """Bring other words for a modality to its name; those for some of its media become a tag."""
        word = raw.get("modality") if isinstance(raw, dict) else None
        if not isinstance(word, str):
            return raw
        try:
            record = modality_called(word)
        except InputError as error:
            raise ValueError(error.reason) from error
        if word == record.name:
            return raw
        tags = [word] if word in record.domains else []
        warnings.warn(
            f"entry {raw.get('name')!r}: modality {word!r} is deprecated: write {record.name!r}"
            + (f" and tags: [{word}]" if tags else ""),
            DeprecationWarning,
            stacklevel=2,
        )
        return raw | {"modality": record.name, "tags": [*raw.get("tags", ()), *tags]}

    def made_for(self, word: str) -> bool:
        """Whether a word names its modality, or is one of its tags."""
        return word in self.tags or word in (record := modality_called(self.modality)).synonyms or word == record.name

    @property
    def embedded(self) -> bool:
        """Whether the weights come with the package."""
        return self.weights.source == "embedded"

    @property
    def published(self) -> bool:
        """Whether there are weights at all; otherwise the entry names the sizes of a model to train."""
        return self.weights.source != "none"


class _Loader(yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader):  # type: ignore[misc]
    """Safe YAML that refuses duplicate keys, of which PyYAML would keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_registered: list[Path] = []


def catalogue_path() -> Path:
    """Our own ``registry.yaml``: inside an installed package, or at the top of a source checkout."""
    package = Path(__file__).parent
    inside = package / "catalogue" / "registry.yaml"
    return inside if inside.exists() else package.parent / "registry.yaml"


def entries() -> Mapping[str, Entry]:
    """All entries by name: ours, those of ``ZOO_REGISTRY``, of plug-ins (entry points ``zoo.registry``) and registered ones.

    Raises:
        RegistryError: a catalogue is invalid; names the file, the entry and the field.
    """
    return _read_all(os.environ.get("ZOO_REGISTRY", ""), tuple(_registered))


@lru_cache(maxsize=4)
def _read_all(environment: str, registered: tuple[Path, ...]) -> Mapping[str, Entry]:
    found: dict[str, Entry] = {}
    homes: dict[str, Path] = {}
    paths = [catalogue_path(), *map(Path, filter(None, environment.split(os.pathsep))), *_plugin_paths(), *registered]
    for path in dict.fromkeys(paths):
        for entry in read(path):
            if entry.name in found:
                raise RegistryError(f"{path}: entry {entry.name!r}: the name is already taken in {homes[entry.name]}")
            found[entry.name] = entry
            homes[entry.name] = path
    return found


def _plugin_paths() -> list[Path]:
    paths = []
    for point in importlib.metadata.entry_points(group="zoo.registry"):
        value = point.load()
        paths.append(Path(value() if callable(value) else value))
    return paths


def read(path: str | os.PathLike[str]) -> list[Entry]:
    """The entries of one catalogue file.

    Raises:
        RegistryError: it cannot be read or an entry is invalid; names the file, the entry and the field.
    """
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise RegistryError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RegistryError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, list):
        raise RegistryError(f"{path}: must be a list of entries")
    found: dict[str, Entry] = {}
    for position, item in enumerate(raw):
        name = item.get("name", f"number {position + 1}") if isinstance(item, dict) else f"number {position + 1}"
        where = f"{path}: entry {name!r}"
        try:
            entry = Entry.model_validate(item)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc'])) or 'entry'}: {e['msg']}" for e in error.errors()]
            raise RegistryError(f"{where}: {'; '.join(problems)}") from error
        if entry.name in found:
            raise RegistryError(f"{where}: the name occurs twice in this file")
        if _family_module(entry.family) is None:
            raise RegistryError(f"{where}: family: unknown family {entry.family!r}")
        found[entry.name] = entry
    return list(found.values())


@lru_cache
def _family_module(family: str) -> str | None:
    """The module of a family, located without importing it."""
    module = family if "." in family else f"zoo.codecs.{family}"
    try:
        return module if importlib.util.find_spec(module) else None
    except (ModuleNotFoundError, ValueError):
        return None


def register(path: str | os.PathLike[str]) -> list[str]:
    """Add a catalogue for this process; returns the names it brings.

    Raises:
        RegistryError: it is invalid, or a name is taken; nothing is added then.
    """
    resolved = Path(path).resolve()
    brought = [entry.name for entry in read(resolved)]
    if resolved not in _registered:
        _registered.append(resolved)
        try:
            entries()
        except RegistryError:
            _registered.remove(resolved)
            raise
    return brought


def get(name: str) -> Entry:
    """The entry of a name.

    Raises:
        RegistryError: there is none; suggests the nearest names.
    """
    known = entries()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or [n for n in known if name in n][:3]
    hint = f"; did you mean {', '.join(near)}?" if near else "; `zoo list` shows all names"
    raise RegistryError(f"no model is called {name!r}{hint}")


info = get


def names(
    pattern: str = "*",
    *,
    modality: str | None = None,
    embedded: bool | None = None,
    family: str | None = None,
    published: bool | None = None,
) -> list[str]:
    """Names that match a shell pattern and the given properties, sorted.

    >>> zoo.list("wav*", modality="audio", embedded=True)
    ['wavtokenizer-tiny']
    """
    return sorted(
        name
        for name, entry in entries().items()
        if fnmatch.fnmatchcase(name, pattern)
        and (modality is None or entry.made_for(modality))
        and (embedded is None or entry.embedded == embedded)
        and (family is None or entry.family == family)
        and (published is None or entry.published == published)
    )


def family_class(family: str) -> type[Tokenizer[Any]]:
    """The tokenizer class of a family, imported now.

    Raises:
        RegistryError: there is no such family.
    """
    module = _family_module(family)
    if module is None:
        raise RegistryError(f"unknown family {family!r}")
    cls: type[Tokenizer[Any]] = importlib.import_module(module).TOKENIZER
    return cls


def check_config(entry: Entry) -> Any:
    """The family's ``Config`` of an entry.

    Raises:
        RegistryError: a field is unknown or has an impossible value.
    """
    config_class = family_class(entry.family).Config
    unknown = sorted(entry.config.keys() - {field.name for field in fields(config_class)})
    if unknown:
        raise RegistryError(f"entry {entry.name!r}: config: {entry.family} has no field {', '.join(unknown)}")
    # YAML has lists where the frozen configurations have tuples.
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.config.items()}
    try:
        return config_class(**settings)
    except (TypeError, ValueError) as error:
        raise RegistryError(f"entry {entry.name!r}: config: {error}") from error

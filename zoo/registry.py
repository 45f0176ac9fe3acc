"""The catalogue: ``registry.yaml``, a user's own files and plug-ins, validated into entries. Does not import torch."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from zoo import documents
from zoo.errors import InputError, RegistryError, ZooError
from zoo.modality import modality as modality_called


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
        prefix: added to the keys of ``file`` in the assembled model; a component's keys are prefixed with its name.
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
    """Source of the weights.

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
    format: Literal["safetensors", "ckpt", "pt", "onnx", "json"] = "safetensors"
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
    """Paper that describes the method."""

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
        family: module ``zoo.codecs.<family>``, or the dotted path of a plug-in's module. Who registers a catalogue lets the
            modules that it names be imported; files of models cannot name any others (see `family_class`).
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


_registered: list[Path] = []
# Modules that `register_family` was told.
_plugins: list[str] = []


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
        with _translating(f"entry point {getattr(point, 'name', point)!r} of the group zoo.registry"):
            value = point.load()
            paths.append(Path(value() if callable(value) else value))
    return paths


@contextmanager
def _translating(what: str) -> Iterator[None]:
    """Whatever goes wrong in the code or the data of somebody else, as an error that names them."""
    try:
        yield
    except ZooError:
        raise
    except Exception as error:
        raise RegistryError(f"{what}: {repr(error)[:300]}") from error


def read(path: str | os.PathLike[str]) -> list[Entry]:
    """The entries of one catalogue file.

    Raises:
        RegistryError: it cannot be read or an entry is invalid; names the file, the entry and the field.
    """
    path = Path(path)
    try:
        text = documents.read_text(path)
        raw = documents.parse_yaml(text, documents.Loader, bounded=path != catalogue_path())
    except OSError as error:
        raise RegistryError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RegistryError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, list):
        raise RegistryError(f"{path}: must be a list of entries")
    found: dict[str, Entry] = {}
    for position, item in enumerate(raw):
        name = item.get("name") if isinstance(item, dict) else None
        where = f"{path}: entry {shortened(name) if isinstance(name, str) else repr(f'number {position + 1}')}"
        with _translating(where):
            try:
                entry = Entry.model_validate(item)
            except ValidationError as error:
                problems = [f"{'.'.join(map(str, e['loc']))[:80] or 'entry'}: {e['msg'][:300]}" for e in error.errors()[:20]]
                raise RegistryError(f"{where}: {'; '.join(problems)}") from error
        if entry.name in found:
            raise RegistryError(f"{where}: the name occurs twice in this file")
        if (
            entry.family not in _plugins
            and not _is_built_in(entry.family)
            and not ("." in entry.family and _exists(entry.family))
        ):
            raise RegistryError(f"{where}: family: unknown family {shortened(entry.family)}")
        found[entry.name] = entry
    return list(found.values())


# -------------------------------------------------------------------------------------------------------------- families


_CODECS = "zoo.codecs"


@lru_cache(maxsize=1)
def _built_in() -> frozenset[str]:
    """Names of the modules in ``zoo.codecs``, exactly as they are written."""
    spec = importlib.util.find_spec(_CODECS)
    assert spec is not None and spec.submodule_search_locations is not None
    return frozenset(module.name for module in pkgutil.iter_modules(spec.submodule_search_locations))


def _is_built_in(family: str) -> bool:
    return family in _built_in()


def _is_dotted_path(module: str) -> bool:
    """Whether this is an absolute path of a module that could be written in an import statement."""
    return all(part.isidentifier() for part in module.split("."))


def _exists(module: str) -> bool:
    """Whether a plug-in's module can be imported: found without importing it or the packages that it lies in."""
    if not _is_dotted_path(module):
        return False
    if module in sys.modules:
        return True
    places: list[str] | None = None
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        try:
            specs = (finder.find_spec(name, places) for finder in sys.meta_path if hasattr(finder, "find_spec"))
            spec = next((found for found in specs if found is not None), None)
        except KeyError:
            # A package without __init__.py in another one asks its parent, which is not imported, where it is.
            places = [place for parent in places or () if (Path(place := os.path.join(parent, parts[depth - 1]))).is_dir()]
            if not places:
                return False
            continue
        except (ImportError, ValueError, AttributeError):
            return False
        if spec is None:
            return False
        if depth < len(parts):
            if spec.submodule_search_locations is None:
                return False
            places = list(spec.submodule_search_locations)
    return True


def register_family(module: str) -> None:
    """Let this process import a plug-in's module as a family, so that models saved by it load.

    A catalogue that names the family does the same (`register`, ``ZOO_REGISTRY``, entry points).

    Args:
        module: dotted path of the module whose ``TOKENIZER`` is the tokenizer's class.

    Raises:
        RegistryError: there is no such module, or the name is that of a built-in family.
    """
    if not isinstance(module, str) or not _exists(module):
        raise RegistryError(f"there is no module {shortened(module)}; a family is the dotted path of an installed module")
    if _is_built_in(module):
        raise RegistryError(f"{module!r} is the name of a family of this package")
    if module not in _plugins:
        _plugins.append(module)


def _is_registered(family: str) -> bool:
    """Whether the user's own process named a plug-in: by itself, or in a catalogue."""
    return family in _plugins or any(entry.family == family for entry in entries().values())


def family_name(cls: type[Any]) -> str:
    """The family under which a class is found again: the module, or the package around it, whose ``TOKENIZER`` it is."""
    module = cls.__module__
    while module and module != "__main__":
        if getattr(sys.modules.get(module), "TOKENIZER", None) is cls:
            return module.removeprefix(f"{_CODECS}.")
        module = module.rpartition(".")[0]
    return cls.family


def shortened(value: object) -> str:
    """Shorten what somebody wrote in a file for a message: quoted, and not longer than a line."""
    text = repr(value[:81]) if isinstance(value, str) else repr(type(value))
    return f"{text[:77]}...{text[-1]}" if len(text) > 80 else text


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

    >>> entry = zoo.info("wavtokenizer-tiny")
    >>> entry.family, entry.modality, entry.embedded, entry.licence.weights
    ('wavtokenizer', 'audio', True, 'Apache-2.0')
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


def family_class(family: Any) -> type[Any]:
    """The tokenizer class of a family, imported now.

    The name may come from a file that somebody else wrote. So it is looked up among the modules of ``zoo.codecs`` and the
    families that the user's own process registered before, and nothing else is ever imported or even searched for.

    Raises:
        RegistryError: the family is neither built in nor registered, or its plug-in cannot be imported.
    """
    if not isinstance(family, str):
        raise RegistryError(f"a family is the name of one, not {shortened(family)}")
    if _is_built_in(family):
        module = f"{_CODECS}.{family}"
    elif _is_registered(family):
        module = family
    else:
        raise RegistryError(_unknown_family(family))
    with _translating(f"family {family!r}: its module cannot be imported"):
        cls: type[Any] = importlib.import_module(module).TOKENIZER
    return cls


def _unknown_family(family: str) -> str:
    """Why a family was not imported, and what to do."""
    near = difflib.get_close_matches(family[:80], _built_in(), n=1, cutoff=0.6)
    advice = (
        f"did you mean {near[0]!r}?"
        if near
        else "for a plug-in that you have installed and trust, call zoo.register_family with the dotted path of its module, or "
        "zoo.register with its catalogue, before"
    )
    return f"unknown family {shortened(family)}: it is neither built in nor registered, so nothing was imported; {advice}"


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
    with _translating(f"entry {entry.name!r}: config"):
        try:
            return config_class(**settings)
        except (TypeError, ValueError) as error:
            raise RegistryError(f"entry {entry.name!r}: config: {error}") from error

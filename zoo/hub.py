"""From a name to a loaded tokenizer: entry → files → safe state dict → strict load. And back: save, push, convert."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from zoo import documents, registry
from zoo.checkpoint import as_ours
from zoo.download import cache_root, download, naming_write_errors, translating_hub_errors, verify
from zoo.errors import (
    ArgumentError,
    CorruptWeightsError,
    InputError,
    KeysError,
    NotOnHubError,
    RegistryError,
    WeightsError,
    ZooError,
    listing,
)
from zoo.machine import usable_device
from zoo.media import replacing, write_json
from zoo.nn.precision import exact_float32
from zoo.pieces import (
    CONFIG_FILE,
    DIFFUSERS_WEIGHTS_FILE,
    WEIGHTS_FILE,
    Place,
    Sources,
    fetch_piece,
    parts_of,
    require_place,
    wanted_pieces,
)
from zoo.quantize.packed import descriptions, exact_keys, format_metadata, restore
from zoo.registry import MAIN, Entry
from zoo.state_dict import opening_safetensors, read_state, safetensors_keys
from zoo.tokenizer import PRECISIONS, Tokenizer

_log = logging.getLogger("zoo")

AnyTokenizer = Tokenizer[Any]


@dataclass(frozen=True)
class _Request:
    """How a tokenizer is wanted: see `load`."""

    sources: Sources
    parts: str | Sequence[str] | None = None
    dtype: torch.dtype | None = None
    precision: str | None = None

    def choose_parts(self, config: Any, name: str) -> Any:
        """A configuration with the parts that are wanted; all of its own by default."""
        if self.parts is None:
            return config
        wanted = (self.parts,) if isinstance(self.parts, str) else tuple(self.parts)
        available = parts_of(config)
        if unknown := [part for part in wanted if part not in available]:
            has = f"the parts {', '.join(available)}" if available else "no parts to choose from"
            raise InputError(f"{name} has {has}; {unknown[0]!r} is none of them")
        return replace(config, parts=tuple(part for part in available if part in wanted))

    def cast(self, tokenizer: AnyTokenizer) -> None:
        """Give a tokenizer the precision that is wanted."""
        if self.dtype is not None:
            tokenizer.to(self.dtype)
        if self.precision is not None:
            tokenizer.set_precision(self.precision)


# ------------------------------------------------------------------------------------------------------------------ load


@exact_float32(torch.device("cpu"))
def load(
    name: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    precision: str | None = None,
    compile: bool = False,
    quantize: str | None = None,
    parts: str | Sequence[str] | None = None,
    files: Mapping[str, Place] | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | None = None,
) -> AnyTokenizer:
    """Load a tokenizer, ready to encode and decode.

    Tensors are memory-mapped where their type is the wanted one, and converted piece by piece where it is not.

    Args:
        name: a name in the catalogue, ``hf-hub:org/repo[@revision]`` or ``local-dir:path``, where the path is
            that of a folder by `save_pretrained` or of a single ``.safetensors`` file, as the recipes write.
        device: where to put it; the CPU by default.
        dtype: type of the parameters, but for those that stay in float32 because ids would flip: whole encoders, as a rule. The
            families whose encoders are too large for that say so.
        precision: ``"fp32"`` or ``"bf16"``, the precision of the decoder's products; ids do not change.
        compile: compile the parts that do the work with ``torch.compile``; the first calls are slow.
        quantize: a method of `zoo.quantize`, ``"fp4-e2m1"`` say; what that keeps stays as it is. A tokenizer that was saved
            quantized loads as it was saved without it.
        parts: names of the parts to load where a model has several, such as ``"encoder"``; nothing is downloaded for the
            others, and what needs them raises an error that says so. All of them by default.
        files: where pieces of a model lie that the catalogue does not know or that lie elsewhere, by the names that `zoo.info`
            shows: a file, a folder, or ``hf-hub:org/repo[@revision]``.
        revision: branch, tag or commit of the Hub repository instead of the catalogue's.
        cache_dir: cache of downloads instead of ``HF_HOME``'s.
        local_files_only: do not touch the network.
        token: access token for gated and private repositories; ``HF_TOKEN`` and the login are used otherwise.

    Raises:
        RegistryError: no such name.
        InputError: the model has no such part or piece, or there is no such method of quantization.
        HubError: the files cannot be had; each subclass says what to do next.
        WeightsError: the files cannot be used.

    >>> encoder = zoo.load("seed-tiny", parts="encoder")
    >>> encoder.parts, encoder.spec.max_tokens, encoder.spec.vocab_size
    (('encoder',), 32, 1024)
    """
    if precision is not None and precision not in PRECISIONS:
        raise ArgumentError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    device = None if device is None else usable_device(device)
    fetch = functools.partial(download, cache_dir=cache_dir, local_files_only=local_files_only, token=token)
    request = _Request(Sources(fetch, files or {}, revision), parts, dtype, precision)
    if name.startswith(("hf-hub:", "local-dir:")):
        if files:
            raise InputError("files= places the pieces of a model in the catalogue")
        tokenizer = _from_address(name, request)
    else:
        tokenizer = _from_entry(registry.get(name), request)
    if quantize is not None:
        from zoo.quantize.conversion import quantize as quantize_model

        quantize_model(tokenizer, quantize)
    if device is not None:
        tokenizer.to(device)
    if compile:
        tokenizer.compile_modules()
    return tokenizer


@exact_float32(torch.device("cpu"))
def load_upstream(
    family: str,
    config: Mapping[str, Any] | str | os.PathLike[str] | None,
    weights: Mapping[str, Tensor] | str | os.PathLike[str],
) -> AnyTokenizer:
    """Load a checkpoint that was trained with the original code.

    Args:
        family: name of the codec family; that of a plug-in has to be registered before.
        config: upstream's own configuration, as a mapping or the path of a yaml or json file; ``None`` to go by the weights.
        weights: a ``.safetensors``, ``.ckpt``, ``.pt``, ``.pth`` or ``.bin`` file or the state dict itself, in upstream's keys.

    Raises:
        RegistryError: no such family.
        WeightsError: the file cannot be read safely, or does not fit.
    """
    cls = registry.family_class(family)
    raw = _read_config(config)
    name = f"{family}-upstream"
    request = _Request(Sources(download))
    if not isinstance(weights, Mapping):
        return _from_upstream_file(cls, raw, Path(weights), name, request)
    with _blaming(f"the checkpoint for {family}"):
        upstream = None if raw is None else cls.checkpoint.config(raw)
        state = {key: tensor for key, tensor in weights.items() if cls.checkpoint.wanted(key)}
        found, state = _as_ours(cls, state, upstream)
    return _build(cls, found, state, name=name, request=request)


def _from_upstream_file(
    cls: type[AnyTokenizer],
    raw: Mapping[str, Any] | None,
    path: Path,
    name: str,
    request: _Request,
    expected: Any = None,
) -> AnyTokenizer:
    """An upstream checkpoint with upstream's configuration: the given one, that in the file's metadata, or ``expected``."""
    if raw is None and path.suffix == ".safetensors":
        with opening_safetensors(path) as file, _blaming(path):
            raw = cls.checkpoint.metadata(file.metadata() or {})
    with _blaming(path):
        config = None if raw is None else cls.checkpoint.config(raw)
    if config is not None and expected is not None and config != expected:
        found, known = asdict(config), asdict(expected)
        differing = [f"{key} is {found[key]}, not {known[key]}" for key in found if found[key] != known[key]]
        _log.warning("%s: its own configuration differs from the catalogue and is used: %s", name, "; ".join(differing))
    with _blaming(path):
        found, state = _as_ours(cls, read_state(path, cls.checkpoint.wanted), config or expected)
    return _build(cls, found, state, name=name, request=request, path=path)


def _as_ours(cls: type[AnyTokenizer], state: Mapping[str, Tensor], config: Any) -> tuple[Any, dict[str, Tensor]]:
    """An upstream state dict in our names, whose model is built in outline to compare."""
    with _at_most(len(state)):
        return as_ours(cls, state, config)


@contextmanager
def _blaming(what: Path | str) -> Iterator[None]:
    """Whatever goes wrong with what somebody else wrote, as an error that names it.

    A family reads configurations and tensors as its authors made them. With others it fails as it may: a division by zero, a
    missing attribute, a shape that does not fit. The cause stays in the chain of the error.

    Raises:
        RegistryError, WeightsError: so it is.
    """
    try:
        yield
    except (WeightsError, RegistryError) as error:
        if str(what) in str(error):
            raise
        raise type(error)(f"{what}: {error}") from error
    except ZooError:
        raise
    except OSError as error:
        raise CorruptWeightsError(f"{what} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        raise CorruptWeightsError(f"{what} cannot be used: {repr(error)[:300]}") from error


def _read_config(config: Mapping[str, Any] | str | os.PathLike[str] | None) -> Mapping[str, Any] | None:
    if config is None or isinstance(config, Mapping):
        return config
    path = Path(config)
    # YAML 1.1 takes JSON's 1e-12 for a string.
    parse = documents.parse_json if path.suffix == ".json" else documents.parse_yaml
    try:
        raw = parse(documents.read_text(path))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise WeightsError(f"{path}: not valid YAML or JSON: {error}") from error
    if not isinstance(raw, Mapping):
        raise WeightsError(f"{path}: must hold a mapping")
    return raw


def _from_entry(entry: Entry, request: _Request) -> AnyTokenizer:
    cls = registry.family_class(entry.family)
    whole = registry.check_config(entry)
    config = request.choose_parts(whole, entry.name)
    if entry.licence.non_commercial:
        _warn_non_commercial(entry.name, entry.licence.weights)
    weights = entry.weights
    if weights.source == "none":
        raise WeightsError(
            f"no weights of {entry.name} were ever published; train it with the recipe its card names ({entry.card}) and load "
            "the result with local-dir:<folder>"
        )
    if weights.source == "embedded":
        if request.sources.places:
            raise InputError(f"{entry.name} is in the package: there is nothing to place with files=")
        return _from_saved_file(embedded_path(entry), request, expect=config)
    if converted := _find_converted(entry, request, whole, config):
        # Upstream's configuration, where there was one, decided when the file was written.
        return _from_saved_file(converted, request, expect=None if _configured_upstream(entry) else config)
    if weights.pieces:
        return _from_pieces(cls, entry, config, request)
    path, upstream = _fetch_entry(entry, request)
    return _from_upstream_file(cls, upstream, path, entry.name, request, expected=config)


def _configured_upstream(entry: Entry) -> bool:
    """Whether upstream's own configuration has a say in an entry's."""
    return entry.weights.config is not None or any(piece.config_field for piece in entry.weights.pieces.values())


def _from_pieces(cls: type[AnyTokenizer], entry: Entry, config: Any, request: _Request) -> AnyTokenizer:
    """A model whose checkpoint is spread over several files, as far as its parts are wanted.

    Of tensors that several pieces hold, those of the first one count.
    """
    pieces = wanted_pieces(entry, config)
    for name, piece in pieces.items():
        # Before anything is downloaded in vain.
        require_place(entry, name, piece, request.sources)
    state: dict[str, Tensor] = {}
    for name, piece in pieces.items():
        found = fetch_piece(entry, name, piece, request.sources)
        if piece.config_field:
            configs = {component: _json_config(files.config) for component, files in found.items() if files.config}
            with _blaming(f"{entry.name}: the configurations of {name}"):
                config = replace(config, **{piece.config_field: configs})
        for files in found.values():
            if files.weights:
                state = _read_prefixed(cls, files.weights, files.prefix) | state
    with _blaming(f"{entry.name}: {', '.join(pieces)}"):
        # What is not taken over must not stay in memory while the rest is cast: the name is bound anew.
        found, state = _as_ours(cls, state, config)
    if absent := sorted(set(parts_of(config)) - set(parts_of(found))):
        raise KeysError(f"{entry.name}: the files hold no {listing(absent)}")
    return _build(cls, found, state, name=entry.name, request=request)


def _read_prefixed(cls: type[AnyTokenizer], path: Path, prefix: str) -> dict[str, Tensor]:
    """The wanted tensors of a file, with the names that they have in the assembled model."""
    state = read_state(path, lambda key: cls.checkpoint.wanted(prefix + key))
    return {prefix + key: tensor for key, tensor in state.items()}


def _fetch_entry(entry: Entry, request: _Request) -> tuple[Path, Mapping[str, Any] | None]:
    """The weights file of an entry, and upstream's configuration where the entry names one."""
    weights = entry.weights
    path = fetch_piece(entry, MAIN, weights.all_pieces()[MAIN], request.sources)[MAIN].weights
    assert path is not None
    if weights.config is None or weights.repo is None or MAIN in request.sources.places:
        return path, None
    revision = request.sources.revision or weights.revision
    return path, _read_config(request.sources.download(weights.repo, weights.config, revision, ask=f"zoo pull {entry.name}"))


def _from_address(name: str, request: _Request) -> AnyTokenizer:
    """A tokenizer outside the catalogue: ``hf-hub:org/repo[@revision]``, or a folder or a single file behind ``local-dir:``."""
    if name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:"))
        return _from_folder(path, request) if path.is_dir() else _from_file(path, request)
    repo, _, pinned = name.removeprefix("hf-hub:").partition("@")
    return _from_repo(repo, request.sources.revision or pinned or "main", request)


def _from_repo(repo: str, revision: str, request: _Request) -> AnyTokenizer:
    name = f"hf-hub:{repo}" if revision == "main" else f"hf-hub:{repo}@{revision}"
    try:
        config: Mapping[str, Any] = _json_config(request.sources.download(repo, CONFIG_FILE, revision))
    except NotOnHubError as error:
        if error.missing != "file":
            raise
        config = {}
    # Autoencoders of diffusion models go by another name.
    file = DIFFUSERS_WEIGHTS_FILE if "_diffusers_version" in config else WEIGHTS_FILE
    path = request.sources.download(repo, file, revision)
    verify(path, None, None)
    return _from_saved(config, path, request) if "zoo" in config else _from_foreign(path, name, config, request)


def _from_file(path: Path, request: _Request) -> AnyTokenizer:
    """What a recipe wrote, or a checkpoint in some upstream's layout."""
    if not path.exists():
        raise WeightsError(f"there is no {path}")
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path} is neither a folder nor a .safetensors file; load_upstream opens other kinds")
    with opening_safetensors(path) as file:
        own = "zoo" in (file.metadata() or {})
    return _from_saved_file(path, request, None) if own else _from_foreign(path, f"local-dir:{path}", {}, request)


def _from_folder(folder: Path, request: _Request) -> AnyTokenizer:
    config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if not weights.exists():
        weights = folder / DIFFUSERS_WEIGHTS_FILE
    if not weights.exists():
        raise WeightsError(f"{folder} holds no {WEIGHTS_FILE}; a folder written by save_pretrained does")
    found = _json_config(config) if config.exists() else {}
    if "zoo" in found:
        return _from_saved(found, weights, request)
    return _from_foreign(weights, f"local-dir:{folder}", found, request)


def _from_foreign(path: Path, name: str, config: Mapping[str, Any], request: _Request) -> AnyTokenizer:
    """A checkpoint in some upstream's layout, recognised by its keys, with the ``config.json`` beside it or an empty one."""
    if request.parts is not None:
        raise InputError(f"parts= chooses from a catalogue entry or from a tokenizer that was saved; {name} is neither")
    keys = set(safetensors_keys(path))
    for family in dict.fromkeys(entry.family for entry in registry.entries().values()):
        cls = registry.family_class(family)
        if cls.checkpoint.recognises(keys):
            return _from_upstream_file(cls, config or None, path, name, request)
    raise WeightsError(f"{name}: no family recognises this checkpoint; load_upstream takes one whose family you know")


def _json_config(path: Path) -> Mapping[str, Any]:
    """A ``config.json``, ours or somebody else's; empty if it holds no mapping."""
    try:
        raw = documents.parse_json(documents.read_text(path))
    except OSError as error:
        raise CorruptWeightsError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CorruptWeightsError(f"{path} is not valid JSON: {error}") from error
    return raw if isinstance(raw, Mapping) else {}


def _from_saved_file(path: Path, request: _Request, expect: Any) -> AnyTokenizer:
    """A file in our own layout, with its configuration in the metadata, which must be the expected one if there is one."""
    with opening_safetensors(path) as file:
        text = (file.metadata() or {}).get("zoo")
    if text is None:
        raise CorruptWeightsError(f"{path} has no zoo metadata")
    try:
        saved = documents.parse_json(text)
    except ValueError as error:
        raise CorruptWeightsError(f"{path}: its metadata are not valid JSON: {error}") from error
    tokenizer = _from_saved(saved, path, request)
    if expect is not None and tokenizer.config != expect:
        raise KeysError(f"{path} holds {tokenizer.config}, the catalogue says {expect}")
    return tokenizer


def _from_saved(saved: Any, path: Path, request: _Request) -> AnyTokenizer:
    """A tokenizer in our own layout, with the parts that are wanted."""
    with _blaming(path):
        cls, config, name, fingerprint, quantization = _read_saved(saved)
    chosen = request.choose_parts(config, name)
    state = read_state(path)
    if chosen != config:
        with _blaming(path):
            there = {layer for layer, _ in _outline(cls, chosen, name, tensors=len(state)).named_modules()}
            quantization = {layer: described for layer, described in quantization.items() if layer in there}
            needed = _outline(cls, chosen, name, quantization, tensors=len(state)).state_dict().keys()
        state = {key: tensor for key, tensor in state.items() if key in needed}
    return _build(cls, chosen, state, name=name, request=request, path=path, fingerprint=fingerprint, quantization=quantization)


def _read_saved(saved: Any) -> tuple[type[AnyTokenizer], Any, str, str, dict[str, Mapping[str, Any]]]:
    """What a saved tokenizer says about itself: class, configuration, name, fingerprint and quantization.

    Raises:
        RegistryError: its family is neither built in nor registered.
        CorruptWeightsError: something is missing or of the wrong kind.
    """
    try:
        family, settings, name, fingerprint = (saved[key] for key in ("family", "config", "name", "fingerprint"))
        quantization = saved.get("quantization", {})
    except (KeyError, TypeError) as error:
        raise CorruptWeightsError(f"the saved configuration cannot be used: {error!r}") from error
    sound = isinstance(settings, Mapping) and isinstance(name, str) and isinstance(fingerprint, str)
    if not sound or not isinstance(quantization, Mapping):
        raise CorruptWeightsError("the saved configuration cannot be used: a field is of the wrong kind")
    cls = registry.family_class(family)
    try:
        config = cls.Config(**{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()})
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptWeightsError(f"the saved configuration cannot be used: {repr(error)[:300]}") from error
    return cls, config, name, fingerprint, dict(quantization)


def _outline(
    cls: type[AnyTokenizer],
    config: Any,
    name: str,
    quantization: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    tensors: int,
) -> AnyTokenizer:
    """A tokenizer without memory behind its tensors, its layers packed where they were saved so.

    Args:
        tensors: how many the file has; a configuration of a much larger model is refused while that is built.
    """
    with torch.device("meta"), _at_most(tensors):
        tokenizer = cls(config, name=name)
        return restore(tokenizer, quantization) if quantization else tokenizer


# How many modules may be built: some for each tensor of a model, and those that have none or are built only to be taken apart.
_MODULES_PER_TENSOR, _OTHER_MODULES = 64, 4096


@contextmanager
def _at_most(tensors: int) -> Iterator[None]:
    """Refuse to build a model of many more tensors within the block: a depth of a billion is a short number in a file.

    Raises:
        CorruptWeightsError: there would be more.
    """
    thread, built, modules = threading.get_ident(), 0, _MODULES_PER_TENSOR * tensors + _OTHER_MODULES

    def count(*_: object) -> None:
        nonlocal built
        if threading.get_ident() != thread:
            return
        built += 1
        if built > modules:
            raise CorruptWeightsError("its configuration is of a far larger model than its tensors")

    hook = nn.modules.module.register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _build(
    cls: type[AnyTokenizer],
    config: Any,
    state: dict[str, Tensor],
    *,
    name: str,
    request: _Request,
    path: Path | None = None,
    fingerprint: str | None = None,
    quantization: Mapping[str, Mapping[str, Any]] | None = None,
) -> AnyTokenizer:
    """A tokenizer around a state dict in our own names, whose tensors are put in as they are or, one by one, cast."""
    what = path or f"the checkpoint of {name}"
    with _blaming(what):
        tokenizer = _outline(cls, config, name, quantization, tensors=len(state))
        request.cast(tokenizer)
        expected = tokenizer.state_dict()
        _require_kinds(state, expected)
    # The fingerprint is that of the tensors as they were stored.
    types = {key: tensor.dtype for key, tensor in expected.items()} | dict.fromkeys(cls.identity, torch.float32)
    del expected
    ready: dict[str, Tensor] = {}
    for key in list(state):
        tensor = state.pop(key)
        ready[key] = tensor.to(types.get(key, torch.float32)) if tensor.is_floating_point() else tensor
    with _blaming(what):
        try:
            tokenizer.load_state_dict(ready, strict=True, assign=True)
        except RuntimeError as error:
            raise KeysError(f"the tensors do not fit {cls.family}: {error}") from error
        tokenizer.reset_buffers()
        tokenizer.eval().requires_grad_(False)
        tokenizer.fingerprint = fingerprint or tokenizer.compute_fingerprint()
    request.cast(tokenizer)
    return tokenizer


def _require_kinds(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse whole or complex numbers in place of real ones and the reverse, which PyTorch would take as they are.

    Raises:
        KeysError: there are some.
    """
    wrong = [
        f"{key} is {tensor.dtype}, not {expected[key].dtype}"
        for key, tensor in state.items()
        if key in expected
        and (tensor.is_floating_point(), tensor.is_complex()) != (expected[key].is_floating_point(), expected[key].is_complex())
    ]
    if wrong:
        raise KeysError(f"tensors of the wrong kind: {listing(wrong)}")


@functools.cache
def _warn_non_commercial(name: str, licence: str) -> None:
    """Cached, so that each model is mentioned once."""
    _log.warning("%s: the weights are under %s, which forbids commercial use", name, licence)


# ----------------------------------------------------------------------------------------------------------------- files


def embedded_path(entry: Entry) -> Path:
    """The file of an embedded model inside the package."""
    assert entry.weights.file is not None
    path = Path(str(resources.files("zoo.weights") / entry.weights.file))
    if not path.exists():
        raise WeightsError(f"{entry.name}: {entry.weights.file} is not in this installation")
    return path


# ------------------------------------------------------------------------------------------------------ pull and convert


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
    request = _Request(Sources(fetch, revision=revision), parts)
    path, _ = _fetch_entry(entry, request)
    if entry.weights.pieces:
        config = request.choose_parts(registry.check_config(entry), name)
        for key, piece in wanted_pieces(entry, config).items():
            if piece.repo is None:
                _log.warning("%s is not on the Hub: %s", piece.file, piece.note)
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
    request = _Request(Sources(download, revision=revision), parts)
    target = _converted_path(entry, revision or entry.weights.revision, whole, request.choose_parts(whole, name))
    if files or not target.exists():
        tokenizer = load(name, parts=parts, files=files, revision=revision, cache_dir=cache_dir, token=token)
        write_saved_file(tokenizer, target)
    return target


def _find_converted(entry: Entry, request: _Request, whole: Any, config: Any) -> Path | None:
    """The converted file of an entry, of all its parts or of the wanted ones, unless the user named other sources."""
    if request.sources.places:
        return None
    revision = request.sources.revision or entry.weights.revision
    candidates = (_converted_path(entry, revision, whole, chosen) for chosen in (whole, config))
    return next((path for path in candidates if path.exists()), None)


def _converted_path(entry: Entry, revision: str, whole: Any, config: Any) -> Path:
    source = f"{entry.weights.repo}/{entry.weights.file}@{revision}"
    parts = "" if config == whole else "-".join(["", *config.parts])
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    return cache_root() / "converted" / f"{entry.name}-{digest}{parts}.safetensors"


# --------------------------------------------------------------------------------------------------------- save and push


def saved_config(tokenizer: AnyTokenizer) -> dict[str, Any]:
    """What a saved tokenizer says about itself."""
    quantization = descriptions(tokenizer)
    return {
        "zoo": 1,
        "family": registry.family_name(type(tokenizer)),
        "name": tokenizer.name,
        "fingerprint": tokenizer.fingerprint or tokenizer.compute_fingerprint(),
        "config": asdict(tokenizer.config),
        **({"quantization": quantization} if quantization else {}),
    }


def write_saved_file(tokenizer: AnyTokenizer, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write one safetensors file in our layout, its configuration in the metadata; floats in ``dtype`` if one is given.

    Raises:
        DiskFullError, NotWritableError: there is no room for it, or no permission.
    """
    tensors = {}
    exact = exact_keys(tokenizer)
    for key, tensor in tokenizer.state_dict().items():
        stored = tensor.detach().cpu()
        cast = dtype is not None and stored.is_floating_point() and key not in exact
        tensors[key] = (stored.to(dtype) if cast else stored).contiguous()
    metadata = {"zoo": json.dumps(saved_config(tokenizer)), **format_metadata(descriptions(tokenizer))}
    with naming_write_errors(path), replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def save_pretrained(tokenizer: AnyTokenizer, folder: str | os.PathLike[str]) -> Path:
    """Write ``model.safetensors``, ``config.json`` and a model card into a folder.

    Raises:
        DiskFullError, NotWritableError: there is no room for them, or no permission.
    """
    folder = Path(folder)
    write_saved_file(tokenizer, folder / WEIGHTS_FILE)
    with naming_write_errors(folder / CONFIG_FILE):
        write_json(folder / CONFIG_FILE, saved_config(tokenizer), indent=2)
    with naming_write_errors(folder / "README.md"), replacing(folder / "README.md") as temporary:
        temporary.write_text(_model_card(tokenizer), encoding="utf-8")
    return folder


def push_to_hub(
    tokenizer: AnyTokenizer,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload tokenizer",
) -> str:
    """Create the repository if it is not there and upload what `save_pretrained` writes; returns the commit's URL.

    Raises:
        HubError: as `load` does.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch, translating_hub_errors(repo_id, None, revision, None):
        folder = save_pretrained(tokenizer, scratch)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)
    return str(commit.commit_url)


def _model_card(tokenizer: AnyTokenizer) -> str:
    """The family's card where the model is in the catalogue, behind the Hub's front matter."""
    known = registry.entries().get(tokenizer.name)
    licence = known.licence.weights if known else "other"
    front = {
        "library_name": "tokenizer-zoo",
        "license": licence.lower() if licence in ("MIT", "Apache-2.0") else "other",
        "tags": ["tokenizer", tokenizer.family, tokenizer.modality],
    }
    body = read_card(known.card) if known else f"# {tokenizer.name}\n\nA {tokenizer.family} tokenizer.\n"
    usage = 'Load it with `zoo.load("hf-hub:<this repository>")` from the `tokenizer-zoo` package.\n'
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{usage}\n{body}"


def read_card(file: str) -> str:
    """The text of a model card."""
    return (resources.files("zoo.cards") / file).read_text(encoding="utf-8")

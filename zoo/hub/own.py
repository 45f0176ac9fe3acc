"""Tokenizers in our own layout: saved folders and files, and the embedded ones."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from zoo import documents, registry
from zoo.errors import (
    CorruptWeightsError,
    KeysError,
    WeightsError,
)
from zoo.hub.build import AnyTokenizer, Request, blaming, build, outline
from zoo.registry import Entry
from zoo.state_dict import opening_safetensors, read_state


def from_saved_file(path: Path, request: Request, expect: Any) -> AnyTokenizer:
    """A file in our own layout, with its configuration in the metadata, which must be the expected one if there is one."""
    with opening_safetensors(path) as file:
        text = (file.metadata() or {}).get("zoo")
    if text is None:
        raise CorruptWeightsError(f"{path} has no zoo metadata")
    try:
        saved = documents.parse_json(text)
    except ValueError as error:
        raise CorruptWeightsError(f"{path}: its metadata are not valid JSON: {error}") from error
    tokenizer = from_saved(saved, path, request)
    if expect is not None and tokenizer.config != expect:
        raise KeysError(f"{path} holds {tokenizer.config}, the catalogue says {expect}")
    return tokenizer


def from_saved(saved: Any, path: Path, request: Request) -> AnyTokenizer:
    """A tokenizer in our own layout, with the parts that are wanted."""
    with blaming(path):
        cls, config, name, fingerprint, quantization = _read_saved(saved)
    chosen = request.choose_parts(config, name)
    state = read_state(path)
    if chosen != config:
        with blaming(path):
            there = {layer for layer, _ in outline(cls, chosen, name, tensors=len(state)).named_modules()}
            quantization = {layer: described for layer, described in quantization.items() if layer in there}
            needed = outline(cls, chosen, name, quantization, tensors=len(state)).state_dict().keys()
        state = {key: tensor for key, tensor in state.items() if key in needed}
    return build(cls, chosen, state, name=name, request=request, path=path, fingerprint=fingerprint, quantization=quantization)


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


def embedded_path(entry: Entry) -> Path:
    """The file of an embedded model inside the package."""
    assert entry.weights.file is not None
    path = Path(str(resources.files("zoo.weights") / entry.weights.file))
    if not path.exists():
        raise WeightsError(f"{entry.name}: {entry.weights.file} is not in this installation")
    return path

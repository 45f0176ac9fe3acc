"""Checkpoints of the original code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo import registry
from zoo.download import download
from zoo.hub.build import AnyTokenizer, Request, blaming, build, converted_state, log, read_config, with_companions
from zoo.hub.pieces import (
    Sources,
)
from zoo.precision import exact_float32
from zoo.state_dict import opening_safetensors, read_state


def load_upstream(
    family: str,
    config: Mapping[str, Any] | str | os.PathLike[str] | None,
    weights: Mapping[str, Tensor] | str | os.PathLike[str],
) -> AnyTokenizer:
    """Load a checkpoint that was trained with the original code.

    Args:
        family: name of the codec family; that of a plug-in has to be registered before.
        config: upstream's own configuration, as a mapping or the path of a yaml or json file; ``None`` to go by the weights.
            Further files that a family reads beside it belong into a mapping under their names.
        weights: a ``.safetensors``, ``.ckpt``, ``.pt``, ``.pth``, ``.bin`` or ``.onnx`` file or the state dict itself, in
            upstream's keys.

    Raises:
        RegistryError: no such family.
        WeightsError: the file cannot be read safely, or does not fit.
    """
    with exact_float32(torch.device("cpu")):
        cls = registry.family_class(family)
        raw = read_config(config)
        if raw is not None and not isinstance(config, Mapping):
            path = Path(config)  # type: ignore[arg-type]  # or there would be nothing to read
            raw = with_companions(cls, raw, path.with_name, path)
        name = f"{family}-upstream"
        request = Request(Sources(download))
        if not isinstance(weights, Mapping):
            return from_upstream_file(cls, raw, Path(weights), name, request)
        with blaming(f"the checkpoint for {family}"):
            upstream = None if raw is None else cls.checkpoint.config(raw)
            state = {key: tensor for key, tensor in weights.items() if cls.checkpoint.wanted(key)}
            found, state = converted_state(cls, state, upstream)
        return build(cls, found, state, name=name, request=request)


def from_upstream_file(
    cls: type[AnyTokenizer],
    raw: Mapping[str, Any] | None,
    path: Path,
    name: str,
    request: Request,
    expected: Any = None,
) -> AnyTokenizer:
    """An upstream checkpoint with upstream's configuration: the given one, that in the file's metadata, or ``expected``."""
    if raw is None and path.suffix == ".safetensors":
        with opening_safetensors(path) as file, blaming(path):
            raw = cls.checkpoint.metadata(file.metadata() or {})
    with blaming(path):
        config = None if raw is None else cls.checkpoint.config(raw)
    if config is not None and expected is not None:
        # What is wanted of a checkpoint stands in no file of its authors.
        ours = {*cls.checkpoint.settings, *({"parts"} & {field.name for field in fields(config)})}
        config = replace(config, **{name: getattr(expected, name) for name in ours})
    if config is not None and expected is not None and config != expected and not cls.checkpoint.settings:
        differing = _difference(asdict(config), asdict(expected), "; ")
        log.warning("%s: its own configuration differs from the catalogue and is used: %s", name, differing)
    with blaming(path):
        found, state = converted_state(cls, read_state(path, cls.checkpoint.wanted), config or expected)
    return build(cls, found, state, name=name, request=request, path=path)


def _difference(found: Mapping[str, Any], known: Mapping[str, Any], between: str) -> str:
    """Fields of two configurations that differ, with both values; of a field that is a mapping, those within it."""
    parts = []
    for key in [*found, *(key for key in known if key not in found)]:
        own, other = found.get(key), known.get(key)
        if own != other:
            if isinstance(own, Mapping) and isinstance(other, Mapping):
                parts.append(f"{key}: {_difference(own, other, ', ')}")
            else:
                parts.append(f"{key} is {own}, not {other}")
    return between.join(parts)


def read_prefixed(cls: type[AnyTokenizer], path: Path, prefix: str) -> dict[str, Tensor]:
    """The wanted tensors of a file, with the names that they have in the assembled model."""
    state = read_state(path, lambda key: cls.checkpoint.wanted(prefix + key))
    return {prefix + key: tensor for key, tensor in state.items()}

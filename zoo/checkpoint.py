"""Official checkpoints to ours: names, the sizes that shapes tell, and what these have to agree with.

A family says in one `Checkpoint` how upstream's files are read; the functions below are what such mappings share.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from zoo.errors import KeysError, listing


def every_tensor(key: str) -> bool:
    """Every entry of a checkpoint is read: nothing in it is left out deliberately."""
    return True


def no_companions(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """All settings stand in one file."""
    return ()


def no_configuration(raw: Mapping[str, Any]) -> None:
    """No upstream configuration is known: the sizes follow from the tensors."""


@dataclass(frozen=True)
class Checkpoint:
    """Reader of upstream's checkpoints of a family.

    Attributes:
        recognises: whether a set of keys is that of such a checkpoint.
        convert: upstream's tensors and a configuration (or ``None``) to the configuration that the shapes imply and the tensors
            in our names. Raises `KeysError` where they contradict each other.
        config: upstream's own configuration to the family's ``Config``; ``None`` if it leaves the sizes to the checkpoint.
            Raises `WeightsError` where it cannot be used.
        wanted: whether an upstream tensor is needed; all others are dropped deliberately.
        settings: names of settings of ours that upstream's configuration does not know: the catalogue's are kept.
        metadata: upstream's own configuration where the metadata of a safetensors file holds it; ``None`` if it does not.
        companions: names of the files beside upstream's configuration that it cannot do without, ``preprocessor_config.json``
            say. `config` finds the content of each under its name.
    """

    recognises: Callable[[Collection[str]], bool]
    convert: Callable[[Mapping[str, Tensor], Any], tuple[Any, dict[str, Tensor]]]
    config: Callable[[Mapping[str, Any]], Any] = no_configuration
    wanted: Callable[[str], bool] = every_tensor
    metadata: Callable[[Mapping[str, str]], Mapping[str, Any] | None] = no_configuration
    companions: Callable[[Mapping[str, Any]], Collection[str]] = no_companions
    settings: tuple[str, ...] = ()


def as_ours(cls: type[Any], state: Mapping[str, Tensor], config: Any | None) -> tuple[Any, dict[str, Tensor]]:
    """Upstream's tensors in a family's own names, complete, and the configuration that their shapes imply.

    Raises:
        KeysError: tensors are missing or unexpected, or their shapes contradict each other or ``config``.
    """
    found, named = cls.checkpoint.convert(state, config)
    require_complete(cls, found, named)
    return found, named


def require_complete(cls: type[Any], config: Any, state: Mapping[str, Tensor]) -> None:
    """Check that a state dict in our names is exactly what a model of this configuration needs.

    Raises:
        KeysError: tensors are missing or unexpected, or have other shapes.
    """
    with torch.device("meta"):
        expected = cls(config, name=cls.family).state_dict()
    if missing := sorted(expected.keys() - state.keys()):
        raise KeysError(f"missing: {listing(missing)}")
    if surplus := sorted(state.keys() - expected.keys()):
        raise KeysError(f"unexpected: {listing(surplus)}")
    wrong = [
        f"{name} is {list(state[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if state[name].shape != tensor.shape
    ]
    if wrong:
        raise KeysError(f"wrong shapes: {listing(wrong)}")


def renamed(
    state: Mapping[str, Tensor],
    our_key: Callable[[str], str | None],
    kind: str,
    wanted: Callable[[str], bool] = lambda key: True,
) -> dict[str, Tensor]:
    """The tensors of a checkpoint under our names.

    Args:
        state: under the official ones.
        our_key: ours for one of them; ``None`` where there is none.
        kind: of checkpoint, for the message.
        wanted: whether an entry is used at all.

    Raises:
        KeysError: there is no name for some that are wanted.
    """
    names = {key: our_key(key) for key in state if wanted(key)}
    if unexpected := sorted(key for key, name in names.items() if name is None):
        raise KeysError(f"unexpected in a {kind} checkpoint: {listing(unexpected)}")
    return {name: state[key] for key, name in names.items() if name is not None}


def shape_of(state: Mapping[str, Tensor], name: str, rank: int | None = None) -> tuple[int, ...]:
    """The shape of an entry.

    Raises:
        KeysError: it is not there, or has not ``rank`` axes.
    """
    if name not in state:
        raise KeysError(f"missing: {name}")
    if rank is not None and state[name].ndim != rank:
        raise KeysError(f"{name} is {list(state[name].shape)}")
    return tuple(state[name].shape)


def layer_numbers(state: Mapping[str, Tensor], stem: str, within: str = "") -> list[int]:
    """Indices ``i`` for which a key begins with ``stem.i.within``."""
    pattern = re.compile(rf"{re.escape(stem)}\.(\d+)\.{re.escape(within)}")
    return sorted({int(found[1]) for key in state if (found := pattern.match(key))})


def require_agreement(found: Any, config: Any | None, besides: Collection[str] = ()) -> None:
    """Refuse tensors of other sizes than a configuration says.

    Args:
        found: the configuration, a dataclass, that the tensors imply.
        config: the one that was given, if any.
        besides: fields that may differ.

    Raises:
        KeysError: they differ; names the fields.
    """
    if config is None:
        return
    pairs = [(field.name, getattr(found, field.name), getattr(config, field.name)) for field in fields(found)]
    differing = [
        f"{name} is {ours} in the tensors and {theirs} in the configuration"
        for name, ours, theirs in pairs
        if name not in besides and ours != theirs
    ]
    if differing:
        raise KeysError(f"the checkpoint does not fit its configuration: {'; '.join(differing)}")

"""Official checkpoints to ours: names, the sizes that shapes tell, and what these have to agree with."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from zoo.errors import KeysError
from zoo.tokenizer import listing


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
    """Numbers of the layers called ``stem.0``, ``stem.1``, ..., those only that have something called ``within``."""
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

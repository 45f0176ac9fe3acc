"""Checkpoint files to tensors: memory-mapped, and never with code run."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zoo.errors import CorruptWeightsError, UnsafePickleError

_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
# Bytes of a checkpoint in one memory mapping: what of it was read counts as memory used until all of it is let go.
_MAPPED_AT_ONCE = 256 << 20


def read_state(path: str | os.PathLike[str], wanted: Callable[[str], bool] = lambda key: True) -> dict[str, Tensor]:
    """The tensors of a checkpoint, memory-mapped, those only whose key is wanted.

    A level of ``state_dict`` (Lightning) or ``model`` around them is unwrapped. Pickles are opened with ``weights_only=True``
    and never otherwise.

    Raises:
        UnsafePickleError: the pickle holds more than tensors and plain containers.
        CorruptWeightsError: the file is damaged, of an unknown format or not there.
    """
    path = Path(path)
    if not path.is_file():
        raise CorruptWeightsError(f"{path} does not exist")
    state, mapped = _map_state(path, wanted)
    groups = list(_groups_of_size(state, _MAPPED_AT_ONCE))
    if not mapped or len(groups) < 2:
        return state
    return {key: tensor for keys in groups for key, tensor in _map_state(path, keys.__contains__)[0].items()}


def _groups_of_size(state: Mapping[str, Tensor], limit: int) -> Iterator[set[str]]:
    """Keys of consecutive tensors of about ``limit`` bytes."""
    group: set[str] = set()
    total = 0
    for key, tensor in state.items():
        group.add(key)
        total += tensor.nbytes
        if total >= limit:
            yield group
            group, total = set(), 0
    if group:
        yield group


def _map_state(path: Path, wanted: Callable[[str], bool]) -> tuple[dict[str, Tensor], bool]:
    """The wanted tensors of a checkpoint, and whether they are a memory mapping, one for all of them."""
    if path.suffix == ".safetensors":
        with opening_safetensors(path) as file:
            return {key: file.get_tensor(key) for key in file.keys() if wanted(key)}, True  # noqa: SIM118  (not a mapping)
    if path.suffix not in _PICKLES:
        raise CorruptWeightsError(f"{path}: unknown kind of checkpoint; expected .safetensors, {', '.join(_PICKLES)}")
    content, mapped = _unpickle(path)
    state = content
    for level in ("ema", "state_dict", "model", "generator"):
        if isinstance(state, Mapping) and isinstance(state.get(level), Mapping):
            state = state[level]
    if not isinstance(state, Mapping):
        raise CorruptWeightsError(f"{path} holds no state dict but a {type(content).__name__}")
    return {key: tensor for key, tensor in state.items() if isinstance(tensor, Tensor) and wanted(key)}, mapped


# How PyTorch's restricted unpickler names what it will not build.
_BEYOND_TENSORS = re.compile(
    r"(?:GLOBAL \S+)|(?:Trying to call reduce for unrecognized function[^\n]*)|(?:Unsupported class \S+)|(?:Can only [^\n]*)"
)


def _unpickle(path: Path) -> tuple[Any, bool]:
    """The content of a pickle, and whether its tensors are memory-mapped."""
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True), True
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True), False  # the format before torch 1.6
    except pickle.UnpicklingError as error:
        if found := _BEYOND_TENSORS.search(str(error)):
            raise UnsafePickleError(
                f"{path} holds more than tensors ({found[0]}) and opening it could run code, so it is refused; "
                "save its state dict as safetensors with the program that made it"
            ) from error
        raise CorruptWeightsError(f"{path} is damaged or not a checkpoint: {str(error).splitlines()[0]}") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CorruptWeightsError(f"{path} is damaged or not a checkpoint: {str(error).splitlines()[0]}") from error


@contextmanager
def opening_safetensors(path: Path) -> Iterator[Any]:
    """An open safetensors file.

    Raises:
        CorruptWeightsError: it is damaged or of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CorruptWeightsError(f"{path} is damaged or not a safetensors file: {error}") from error


def safetensors_keys(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file."""
    with opening_safetensors(path) as file:
        return list(file.keys())

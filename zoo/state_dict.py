"""Checkpoint files to tensors: memory-mapped, and never with code run."""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zoo.errors import CorruptWeightsError, HubError, UnsafePickleError, WeightsError
from zoo.onnx_weights import read_onnx

#: Key of the bytes of a tokenizer of the library `tokenizers`.
TOKENIZER_FILE = "tokenizer.json"
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
# Bytes of a checkpoint in one memory mapping: what of it was read counts as memory used until all of it is let go.
_MAPPED_AT_ONCE = 256 << 20


def read_state(path: str | os.PathLike[str], wanted: Callable[[str], bool] = lambda key: True) -> dict[str, Tensor]:
    """Memory-map the tensors whose keys pass ``wanted``.

    A level of ``state_dict`` (Lightning) or ``model`` around them is unwrapped. Of ONNX files the graph is read and not run
    (`zoo.onnx_weights`). Pickles are opened with ``weights_only=True``
    and never otherwise, and only after a look at their instructions: what would take much more memory than the file is refused.

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
    if path.suffix == ".json":
        # A tokenizer of the library `tokenizers`, as it is: one tensor of its bytes.
        return ({TOKENIZER_FILE: _octets(path)} if wanted(TOKENIZER_FILE) else {}), False
    if path.suffix == ".onnx":
        return {key: tensor for key, tensor in read_onnx(path).items() if wanted(key)}, False
    if path.suffix not in _PICKLES:
        known = ", ".join((".safetensors", ".onnx", ".json", *_PICKLES))
        raise CorruptWeightsError(f"{path}: unknown kind of checkpoint; expected {known}")
    content, mapped = _unpickle(path)
    try:
        state = _unwrapped(content, path)
        found = {key: tensor for key, tensor in state.items() if _is_entry(key, tensor) and wanted(key)}
    except (TypeError, AttributeError) as error:
        # A pickle may put attributes of its own into the mappings that it builds.
        raise CorruptWeightsError(f"{path} holds no sound state dict: {error}") from error
    _require_backed(found, path)
    return found, mapped


def _octets(path: Path) -> Tensor:
    try:
        return torch.frombuffer(bytearray(path.read_bytes()) or bytearray(1), dtype=torch.uint8)
    except OSError as error:
        raise CorruptWeightsError(f"{path} cannot be read: {error.strerror}") from error


def _unwrapped(content: Any, path: Path) -> Mapping[Any, Any]:
    state = content
    for level in ("ema", "state_dict", "model", "generator"):
        if isinstance(state, Mapping) and isinstance(state.get(level), Mapping):
            state = state[level]
    if not isinstance(state, Mapping):
        raise CorruptWeightsError(f"{path} holds no state dict but a {type(content).__name__}")
    return state


def _is_entry(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def _require_backed(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that repeat few numbers many times: to cast them would take memory that the file does not account for.

    Raises:
        CorruptWeightsError: they are much larger than the file.
    """
    size = path.stat().st_size
    total = 0
    for key, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
            raise CorruptWeightsError(f"{path}: {key} is no dense tensor")
        total += tensor.nbytes
    if total > _REPEATED * size:
        raise CorruptWeightsError(f"{path}: its tensors would take {total} bytes, and the file has only {size}")


# How often a checkpoint may hold the same numbers under several names, as tied weights and averages are.
_REPEATED = 16
# What a pickle can have built that takes memory of any size, or none; a state dict of dense tensors needs none of it.
_WITHOUT_BOUND = {
    *(("builtins", "bytearray"), ("__builtin__", "bytearray")),
    *(
        ("torch._utils", f"_rebuild_{what}")
        for what in (
            *("qtensor", "sparse_tensor", "nested_tensor", "meta_tensor_no_storage", "wrapper_subclass"),
            *("device_tensor_from_numpy", "device_tensor_from_cpu_tensor"),
        )
    ),
}
# Instructions that make a container; some need hundreds of bytes of memory for one byte of file.
_CONTAINERS = {"MARK", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "REDUCE", "NEWOBJ", "BUILD"}
# How many there may be: some for each tensor, and those of optimizers, schedules and hyperparameters.
_CONTAINERS_PER_TENSOR, _OTHER_CONTAINERS = 256, 200_000
# The format before torch 1.6: magic number, version, system, content, names of the storages.
_LEGACY_PICKLES = 5


def _inspect(path: Path) -> None:
    """Look through a checkpoint before anything of it is built.

    Raises:
        UnsafePickleError: it would build things of any size.
        CorruptWeightsError: it is damaged, or takes more memory than its size accounts for.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            file.seek(0)
            for _ in range(_LEGACY_PICKLES):
                _inspect_pickle(file, path, 0)
            return
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        # PyTorch stores records as they are. Compressed ones could grow a thousandfold, and cannot be memory-mapped.
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise CorruptWeightsError(f"{path}: its records are compressed; unpack it, or save it again with torch.save")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise CorruptWeightsError(f"{path} is damaged: its records are longer than the file")
        for record in records:
            if record.filename.endswith(".pkl"):
                with archive.open(record) as content:
                    _inspect_pickle(content, path, len(records))


def _inspect_pickle(file: Any, path: Path, tensors: int) -> None:
    """Look through one pickle of an open file, which is left behind its end."""
    containers = 0
    for instruction, argument, _ in pickletools.genops(file):
        containers += instruction.name in _CONTAINERS
        if containers > _OTHER_CONTAINERS + _CONTAINERS_PER_TENSOR * tensors:
            raise CorruptWeightsError(f"{path} builds {containers} containers and more, which no checkpoint of its size does")
        if instruction.name == "GLOBAL" and (name := tuple(str(argument).split(" ", 1))) in _WITHOUT_BOUND:
            raise UnsafePickleError(f"{path} holds more than dense tensors ({'.'.join(name)}), so it is refused")


# How PyTorch's restricted unpickler names what it will not build.
_BEYOND_TENSORS = re.compile(
    r"(?:GLOBAL \S+)|(?:Trying to call reduce for unrecognized function[^\n]*)|(?:Unsupported class \S+)|(?:Can only [^\n]*)"
)


def _unpickle(path: Path) -> tuple[Any, bool]:
    """The content of a pickle, and whether its tensors are memory-mapped."""
    try:
        _inspect(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True), True
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True), False  # the format before torch 1.6
    except WeightsError:
        raise
    except OSError as error:
        raise CorruptWeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        # The unpickler meets damage in many ways: as missing keys, wrong types, failed assertions, sizes without bounds.
        if isinstance(error, pickle.UnpicklingError) and (found := _BEYOND_TENSORS.search(str(error))):
            raise UnsafePickleError(
                f"{path} holds more than tensors ({found[0][:120]}) and opening it could run code, so it is refused; "
                "save its state dict as safetensors with the program that made it"
            ) from error
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CorruptWeightsError(f"{path} is damaged or not a checkpoint: {reason[:200]}") from error


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
    except HubError:
        raise
    except OSError as error:
        raise CorruptWeightsError(f"{path} cannot be read: {error.strerror or error}") from error


def safetensors_keys(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file."""
    with opening_safetensors(path) as file:
        return list(file.keys())

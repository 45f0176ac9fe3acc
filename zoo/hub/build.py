"""A tokenizer around a state dict in our own names, and what is read as data on the way."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zoo import documents
from zoo.checkpoint import as_ours
from zoo.errors import (
    CorruptWeightsError,
    InputError,
    KeysError,
    RegistryError,
    WeightsError,
    ZooError,
    listing,
)
from zoo.hub.pieces import (
    Sources,
    parts_of,
)
from zoo.quantization.packed import restore
from zoo.tokenizer import Tokenizer

log = logging.getLogger("zoo")


AnyTokenizer = Tokenizer[Any, Any, Any]


@dataclass(frozen=True)
class Request:
    """Options of one `load` call."""

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


def converted_state(cls: type[AnyTokenizer], state: Mapping[str, Tensor], config: Any) -> tuple[Any, dict[str, Tensor]]:
    """An upstream state dict in our names, whose model is built in outline to compare."""
    with _at_most(len(state)):
        return as_ours(cls, state, config)


@contextmanager
def blaming(what: Path | str) -> Iterator[None]:
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


def read_config(config: Mapping[str, Any] | str | os.PathLike[str] | None) -> Mapping[str, Any] | None:
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


def json_config(path: Path) -> Mapping[str, Any]:
    """A ``config.json``, ours or somebody else's; empty if it holds no mapping."""
    try:
        raw = documents.parse_json(documents.read_text(path))
    except OSError as error:
        raise CorruptWeightsError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CorruptWeightsError(f"{path} is not valid JSON: {error}") from error
    return raw if isinstance(raw, Mapping) else {}


def with_companions(
    cls: type[AnyTokenizer], raw: Mapping[str, Any], beside: Callable[[str], Path], what: Path | str
) -> Mapping[str, Any]:
    """Upstream's configuration and, under their names, the files that the family reads beside it.

    Args:
        beside: path of a file that lies where the configuration does.
        what: the configuration, for messages.

    Raises:
        WeightsError, HubError: one of the files cannot be had.
    """
    with blaming(what):
        needed = [file for file in cls.checkpoint.companions(raw) if file not in raw]
    return {**raw, **{file: json_config(beside(file)) for file in needed}}


def outline(
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
    with torch.device("meta"), _Undrawn(), _at_most(tensors):
        tokenizer = cls(config, name=name)
        return restore(tokenizer, quantization) if quantization else tokenizer


class _Undrawn(TorchFunctionMode):
    """Leaves out that initial values are drawn, since there is no memory for them.

    Some of these functions are PyTorch's own Python on the meta device; calling them imports its compiler, which takes 2 s.
    """

    _FILLING = frozenset({Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, Tensor.clamp_})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in self._FILLING and args[0].is_meta else func(*args, **(kwargs or {}))


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


def build(
    cls: type[AnyTokenizer],
    config: Any,
    state: dict[str, Tensor],
    *,
    name: str,
    request: Request,
    path: Path | None = None,
    fingerprint: str | None = None,
    quantization: Mapping[str, Mapping[str, Any]] | None = None,
) -> AnyTokenizer:
    """A tokenizer around a state dict in our own names, whose tensors are put in as they are or, one by one, cast."""
    what = path or f"the checkpoint of {name}"
    with blaming(what):
        tokenizer = outline(cls, config, name, quantization, tensors=len(state))
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
    with blaming(what):
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

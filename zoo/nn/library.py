"""Networks that transformers and diffusers carry, as parts of our own models.

Such a family builds the library's class in its ``__init__`` (`built`), from the library's own configuration, a mapping in its
``Config`` (`plain_config`). Files go through `present_names`: the library renames what older releases wrote, and its warnings
are errors.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from zoo.errors import KeysError, WeightsError, listing
from zoo.precision import Float32Module

# What a library's configuration says about the program that wrote it, about labels of classifiers, and about code to run.
_NOT_SIZES = frozenset(
    (
        *("_name_or_path", "_diffusers_version", "_commit_hash", "transformers_version", "architectures", "auto_map"),
        *("dtype", "torch_dtype", "id2label", "label2id", "problem_type", "use_cache", "return_dict", "torchscript"),
        *("output_hidden_states", "output_attentions", "chunk_size_feed_forward", "is_encoder_decoder", "tie_word_embeddings"),
    )
)

# Buffers that the library once stored.
_FORMER_BUFFERS = re.compile(r"rotary_emb\.inv_freq|(^|\.)position_ids$")
_NORM = re.compile(r"\.parametrizations\.weight\.original([01])$")


@dataclass(frozen=True)
class LibraryConfig:
    """Sizes and settings of a model around a library's network.

    Attributes:
        library: configuration of the library's class as a mapping; what is left out has that class's defaults.
        parts: what is loaded.

    Raises:
        ValueError: there is no part.
    """

    library: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ("encoder", "decoder")

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("a model has an encoder, a decoder or both")


@dataclass(frozen=True)
class ResidualConfig(LibraryConfig):
    """Sizes and settings of a model of several codebooks around a library's network.

    Attributes:
        codebooks: codes of a frame that encoding gives; all that the checkpoint has by default.
    """

    codebooks: int | None = None


def settings_of(raw: Mapping[str, Any], *kinds: str, field: str = "model_type") -> dict[str, Any]:
    """The settings in a library's ``config.json`` (`plain_config`).

    Args:
        raw: the document.
        kinds: of models that may be described.
        field: that names the kind.

    Raises:
        WeightsError: it is that of another model.
    """
    if raw.get(field) not in kinds:
        raise WeightsError(f"this is the configuration of {raw.get(field)}, not of {' or '.join(kinds)}")
    return plain_config(raw)


def sizes_from(make: Callable[..., Any], library: Mapping[str, Any], model: str, **given: Any) -> Any:
    """The library's configuration, from a mapping.

    Args:
        make: ``from_dict`` of its class.
        library: the mapping.
        model: its name, for messages.
        given: settings that are ours to choose.

    Raises:
        WeightsError: it is not a possible one; the library raises what it likes.
    """
    try:
        return make(dict(library), **given)
    except Exception as error:
        raise WeightsError(f"the configuration of {model} cannot be used: {error}") from error


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a network in a library's configuration, nested ones too, as plain values of JSON.

    Raises:
        WeightsError: a value is none of JSON's.
    """

    def strip(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): strip(inner) for key, inner in value.items() if key not in _NOT_SIZES}
        return [strip(inner) for inner in value] if isinstance(value, list | tuple) else value

    try:
        plain: dict[str, Any] = json.loads(json.dumps(strip(config)))
    except (TypeError, ValueError) as error:
        raise WeightsError(f"the configuration holds more than plain values: {error}") from error
    return plain


def full_settings(network: type[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of a library's network, those that are not given at the library's default, as plain values of JSON.

    Equal settings build equal networks, and go on to when the library's defaults change.

    Args:
        network: class of transformers' configurations (a subclass of ``PreTrainedConfig``) or of diffusers' models.
        settings: by name; in what `plain_config` gives there may be others, which `known_settings` leaves out.

    Raises:
        WeightsError: there is no setting of a name, or a value is impossible.
    """
    names = _setting_names(network)
    if unknown := sorted(settings.keys() - names.keys()):
        raise WeightsError(f"{network.__name__} has no settings {listing(unknown)}")
    if not hasattr(network, "model_type"):
        return plain_config(names | dict(settings))
    try:
        config = network(**settings)
    except Exception as error:
        raise WeightsError(f"{network.__name__} cannot be used: {repr(error)[:300]}") from error
    return plain_config({name: getattr(config, name) for name in names})


def known_settings(network: type[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a library's configuration file that its class takes, without what belongs to programs around it."""
    names = _setting_names(network)
    return {name: value for name, value in plain_config(settings).items() if name in names}


def _setting_names(network: type[Any]) -> dict[str, Any]:
    """Names of the settings of a class, with its defaults where it is one of diffusers."""
    if hasattr(network, "model_type"):
        from transformers import PreTrainedConfig

        common = {field.name for field in fields(PreTrainedConfig)}
        return {field.name: None for field in fields(network) if field.name not in common | {"model_type"}}
    parameters = list(inspect.signature(network.__init__).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in parameters}


def present_names(network: type[Any], config: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file of transformers under the names that its class has now, in float32.

    The library renames what older releases wrote: weight norm as ``weight_g`` and ``weight_v``, say.

    Args:
        network: subclass of ``transformers.PreTrainedModel``.
        config: its configuration, an object of ``network.config_class``.
        state: tensors under the names of any release.

    Raises:
        KeysError: tensors are missing or unexpected, or have other shapes; the library fills in random numbers there.
    """
    given = dict(state)

    with _quiet_loading():
        model, report = network.from_pretrained(
            None, config=config, state_dict=given, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    problems = {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(report["unexpected_keys"]),
        "of another shape": sorted(str(entry[0]) for entry in report["mismatched_keys"]),
    }
    present = model.state_dict()
    if model._keys_to_ignore_on_load_unexpected and not any(problems.values()):
        # Such a class overlooks all that is surplus in its halves: there are as many tensors as it has, by whatever names.
        loaded = [key for key in given if not _FORMER_BUFFERS.search(key)]
        if len(loaded) > len(present):
            problems["unexpected"] = sorted(set(loaded) - present.keys())
    if found := [f"{what}: {listing(keys)}" for what, keys in problems.items() if keys]:
        raise KeysError(f"the tensors do not fit {network.__name__}: {'; '.join(found)}")
    return {key: tensor.detach() for key, tensor in present.items()}


def folded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with weight norm multiplied out, in either of PyTorch's spellings, in float32; others as they are.

    Raises:
        KeysError: one of the two tensors of a weight is missing.
    """
    named = {_NORM.sub(lambda found: f".weight_{'gv'[int(found[1])]}", key): tensor for key, tensor in state.items()}
    for name in [name for name in named if name.endswith((".weight_v", ".weight_g"))]:
        stem = name[:-2]
        if name not in named:
            continue
        if missing := [f"{stem}_{which}" for which in "gv" if f"{stem}_{which}" not in named]:
            raise KeysError(f"missing: {missing[0]}")
        direction, gain = named.pop(f"{stem}_v").float(), named.pop(f"{stem}_g").float()
        if gain.ndim != direction.ndim or any(
            size not in (1, own) for size, own in zip(gain.shape, direction.shape, strict=True)
        ):
            raise KeysError(f"{stem}_g is {list(gain.shape)}, and {stem}_v {list(direction.shape)}")
        # The norm runs over the axes that have one gain in common: all but one.
        shared = [axis for axis, size in enumerate(gain.shape) if size == 1 and direction.shape[axis] > 1]
        norm = torch.linalg.vector_norm(direction, dim=shared, keepdim=True) if shared else direction.abs()
        named[stem] = direction * (gain / norm)
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in named.items()}


def without_weight_norm(module: nn.Module) -> nn.Module:
    """A library's module with plain weights where it has parametrized ones; `folded` makes these of a checkpoint."""
    for own in module.modules():
        if parametrize.is_parametrized(own, "weight"):
            parametrize.remove_parametrizations(own, "weight")
            # It would look for the former names, and cannot be pickled.
            own._load_state_dict_pre_hooks.clear()
        elif "weight_g" in own._parameters:
            nn.utils.remove_weight_norm(own)
    return module


def in_own_dtype(network: nn.Module, x: Tensor) -> Tensor:
    """The output of a network of any floating-point type, in float32."""
    found: Tensor = network(x.to(next(network.parameters()).dtype))
    return found.float()


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """A library's module: all of it, or under ``torch.device("meta")`` with its parameters there and its buffers in memory.

    Buffers that no checkpoint holds (strides, filters, frequencies) are then as the library computes them. Some classes cannot
    be built on the meta device at all, as they read such a buffer.

    Args:
        make: builds the module. Under the meta device its parameters get no numbers, and cost no memory.
    """
    if torch.get_default_device().type != "meta":
        return make()
    with torch.device("cpu"), _WithoutNumbers():
        module = make()
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
    return module


class Exact(Float32Module):
    """A part of a library's network that ids depend on: it stays in float32 whatever the tokenizer is cast to."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)


class Half(nn.Module):
    """A part of a library's network that media depend on, of any floating-point type."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @property
    def dtype(self) -> torch.dtype:
        """The type that it computes in."""
        return next(tensor.dtype for tensor in self.network.parameters() if tensor.is_floating_point())


class Turn:
    """A lock for networks that keep state of a call in their modules. Copies and pickles have locks of their own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()


class _WithoutNumbers(TorchFunctionMode):
    """Leaves tensors that are drawn at random as they are: they are not needed, and untouched memory is not taken.

    Holds for one thread only, unlike the switches of the libraries.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _DRAWING or getattr(func, "__module__", "") in _INITIALISERS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


_INITIALISERS = ("torch.nn.init", "transformers.initialization")
_DRAWING = frozenset((Tensor.uniform_, Tensor.normal_, Tensor.erfinv_))


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without transformers' progress bar and its warnings, which `present_names` turns into errors."""
    from transformers.utils import logging as library_logging

    logger = logging.getLogger("transformers")
    level, bar = logger.level, library_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    library_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bar:
            library_logging.enable_progress_bar()


def without_captures(module: nn.Module) -> nn.Module:
    """A module of transformers as it was before it gave hidden states, of the same tensors; the module itself stays as it is.

    The library leaves hooks in a module that was asked for them. They cannot be pickled, and come back by themselves.
    """
    clone = copy.copy(module)
    clone._modules = {name: None if child is None else without_captures(child) for name, child in module._modules.items()}
    hooks = [(key, hook) for key, hook in module._forward_hooks.items() if "<locals>" not in getattr(hook, "__qualname__", "")]
    clone._forward_hooks = OrderedDict(hooks)
    if "_output_capturing_hooks_installed" in vars(clone):
        vars(clone)["_output_capturing_hooks_installed"] = False
    return clone

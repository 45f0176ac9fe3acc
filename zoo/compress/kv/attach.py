"""Attach a policy to a model, and take it off.

The attention modules of the language model are given another attention function, which calls the model's own wherever a policy
changes nothing. No weight and no module is replaced.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from zoo.compress.eager import eagerly, forget_compiled, refuse_compiled, run_eagerly
from zoo.compress.kv.cache import PolicyLayer, SelectionStats, Step
from zoo.compress.kv.policies import Policy
from zoo.compress.kv.tensors import Keys, Queries, Visible, channel_mass, channel_order
from zoo.compress.method import HANDLE
from zoo.compress.override import ChunkedPrompts, Override, chunked_prompt, prompt_of
from zoo.errors import InputError
from zoo.moved import names_of

_NAME = "zoo_kv_policy"
_IMPLEMENTATIONS = ("eager", "sdpa")
# Attribute under which a model knows its handle.
_HANDLE = "_zoo_kv_policy"


class PolicyHandle:
    """A policy in a model; a context manager that takes it out again.

    Attributes:
        model, policy: as given.
        stats: selections of decoding steps, for `TokenSelect`.
    """

    def __init__(self, model: nn.Module, policy: Policy) -> None:
        self.model, self.policy, self.stats = model, policy, SelectionStats()
        decoder = _decoder(model)
        modules = _attention_modules(decoder)
        refuse_compiled([decoder])
        policy.check(decoder, modules)
        self._configs = [(module, module.config) for module in modules]
        self._hooks: list[Any] = [module.register_forward_pre_hook(_hand_over_cache, with_kwargs=True) for module in modules]
        self._hooks.append(decoder.register_forward_pre_hook(_check_decoder, with_kwargs=True))
        self._hooks.append(decoder.register_forward_hook(_settle_cache))
        self._hooks.append(run_eagerly(decoder))
        if hasattr(model, "generate"):
            self._hooks.append(Override(model, "generate", ChunkedPrompts(model)))
        for module in modules:
            # The copy keeps the change from the model, whose masks depend on the implementation as well.
            config: Any = copy.copy(module.config)
            config._attn_implementation = _NAME
            config.kv_policy = policy
            config.kv_rotary = getattr(decoder, "rotary_emb", None)
            config.kv_stats = self.stats
            config.kv_implementation = module.config._attn_implementation
            module.config = config
        setattr(model, _HANDLE, self)
        forget_compiled()

    @staticmethod
    def prompt(length: int) -> AbstractContextManager[None]:
        """Calls of the model within the context are chunks of one prompt, until ``length`` tokens are in the cache.

        ``generate(prefill_chunk_size=...)`` does this by itself. Chunks that you hand to the model one after the other are
        otherwise prompts of their own, whose entries are dropped as they come.

        Args:
            length: tokens of the whole prompt, those that are in the cache already included.
        """
        return prompt_of(length)

    def remove(self) -> None:
        """Give the model its own attention back; harmless when it has it already."""
        for hook in self._hooks:
            hook.remove()
        for module, config in self._configs:
            module.config = config
        self._hooks, self._configs = [], []
        if getattr(self.model, _HANDLE, None) is self:
            delattr(self.model, _HANDLE)
        forget_compiled()

    def __enter__(self) -> PolicyHandle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.remove()


def apply(model: nn.Module, policy: Policy) -> PolicyHandle:
    """Put a policy into a transformers model that generates text, until ``remove(model)`` or the end of a ``with`` block.

    Works with ``generate`` and ``forward``, batches with left padding, beams, grouped queries, and the attention
    implementations ``"sdpa"`` and ``"eager"``, and with ``prefill_chunk_size``: shares are of the whole prompt, and nothing is
    dropped before its end. Caches have to be `DynamicCache`, as they are by default; one that was filled
    before may be passed on.

    Args:
        model: whose decoder calls its attention through transformers' interface: Llama and LLaVA, Mistral, Qwen, …
        policy: `H2O`, `DoubleSparsity`, `TidalDecode` or `TokenSelect`.

    Raises:
        InputError: the model is of another kind, has positions that the policy cannot follow, has a policy already, or a method
            of `zoo.compress.apply` that cuts the cache.
    """
    dropping = getattr(model, HANDLE, None)
    if dropping is not None and dropping.method.evicts:
        raise InputError(f"{dropping.name} cuts the cache itself: it does not go together with a policy")
    if has_policy(model):
        raise InputError(f"this model has a policy already, {getattr(model, _HANDLE).policy}; remove it first")
    return PolicyHandle(model, policy)


def has_policy(model: nn.Module) -> bool:
    """Whether a policy is in a model."""
    return isinstance(getattr(model, _HANDLE, None), PolicyHandle)


def remove(model: nn.Module) -> None:
    """Take the policy out of a model; harmless where there is none."""
    if has_policy(model):
        getattr(model, _HANDLE).remove()


def calibrate(model: nn.Module, prompts: Iterable[Mapping[str, Any]]) -> tuple[Int[Tensor, "heads head_dim"], ...]:
    """The channels that matter in each layer, for `DoubleSparsity`; the paper takes 256 texts of 512 tokens.

    Args:
        model: as for `apply`, without a policy.
        prompts: inputs of its ``forward``.

    Returns:
        For each layer the channels of each query head, by the mean of ``|q_c k_c|`` over all tokens that are no padding.

    Raises:
        InputError: there are no prompts, or the model cannot have a policy.
    """
    calibration = _Calibration()
    with torch.inference_mode(), apply(model, calibration):
        for prompt in prompts:
            model(**prompt, use_cache=True)
    if not calibration.mass:
        raise InputError("there are no prompts to calibrate with")
    return tuple(channel_order(calibration.mass[index]).clone() for index in sorted(calibration.mass))


class _Calibration(Policy):
    """Changes nothing and adds up the channels' mass."""

    def __init__(self) -> None:
        self.mass: dict[int, Float[Tensor, "heads head_dim"]] = {}

    def attend(self, step: Step) -> Float[Tensor, "batch queries heads head_dim"]:
        new = step.query.shape[2]
        mass = channel_mass(step.query, step.key[:, :, -new:], step.real[:, -new:])
        self.mass[step.layer_index] = self.mass.get(step.layer_index, 0) + mass
        return step.dense()

    def entries_read(self, layer_index: int, prompt: int, length: int) -> float:
        return length


def _decoder(model: Any) -> Any:
    """The part of a model that holds the layers."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if not getattr(decoder, "_supports_attention_backend", False):
        raise InputError(
            f"{type(model).__name__} does not call its attention through transformers' interface; models that do are Llama, "
            "LLaVA, LLaVA-NeXT, Mistral, Qwen2, Qwen3 and most other decoders of transformers 5"
        )
    return decoder


def _attention_modules(decoder: Any) -> list[Any]:
    """The causal attention modules of a decoder, in order."""
    modules = [module for module in decoder.modules() if hasattr(module, "layer_idx") and getattr(module, "is_causal", False)]
    if not modules:
        raise InputError(f"{type(decoder).__name__} has no causal attention with a cache")
    for module in modules:
        if module.config._attn_implementation not in _IMPLEMENTATIONS:
            raise InputError(
                f"attention {module.config._attn_implementation!r} is not supported, only {' and '.join(_IMPLEMENTATIONS)}: "
                'call model.set_attn_implementation("sdpa") first'
            )
    return modules


def _hand_over_cache(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Pass the cache on to the attention function, with a layer in it that a policy can write to."""
    cache = keywords.get("past_key_values")
    if cache is None:
        return arguments, keywords
    if not isinstance(cache, DynamicCache) or cache.offloading:
        raise InputError(f"policies work on a DynamicCache that is not offloaded, not on {type(cache).__name__}")
    index = module.layer_idx
    while len(cache.layers) <= index:
        cache.layers.append(PolicyLayer())
    layer = cache.layers[index]
    if not isinstance(layer, PolicyLayer):
        if type(layer) is not DynamicLayer:
            raise InputError(f"layer {index} of the cache is a {type(layer).__name__}, not a DynamicLayer")
        cache.layers[index] = PolicyLayer.taking_over(layer)
    return arguments, keywords | {"kv_cache": cache}


@eagerly
def _check_decoder(decoder: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Refuse what a policy cannot follow: layers that are compiled alone; looked for where a prompt begins."""
    cache = keywords.get("past_key_values")
    if cache is None or not cache.get_seq_length():
        refuse_compiled([decoder])


@eagerly
def _settle_cache(decoder: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
    """Let go of what every layer decided to drop."""
    cache = getattr(output, "past_key_values", None)
    for layer in cache.layers if isinstance(cache, DynamicCache) else ():
        if isinstance(layer, PolicyLayer):
            layer.settle()


def _attention(
    module: Any,
    query: Queries,
    key: Keys,
    value: Keys,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    kv_cache: DynamicCache | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention in the signature of transformers, as a policy wants it."""
    config = module.config
    base = _own_attention(module, config.kv_implementation)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling

    def own(mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return base(module, query, key, value, mask, scaling=scaling, **keywords)

    if kv_cache is None:
        return own(attention_mask)

    def attend(visible: Visible) -> Tensor:
        mask = visible
        if config.kv_implementation == "eager":
            mask = torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, torch.finfo(query.dtype).min)
        return own(mask)[0]

    step = Step(
        query,
        key,
        value,
        _visible(attention_mask, key.shape[2]),
        scaling,
        module.layer_idx,
        kv_cache,
        attend,
        lambda: own(attention_mask)[0],
        chunked_prompt(),
        keywords.get("position_ids"),
        config.kv_rotary,
        config.kv_stats,
    )
    return config.kv_policy.attend(step), None


# At import, so that a model that comes back from a file finds it.
ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)


def _own_attention(module: nn.Module, implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """What the module would have called; the eager one lives beside each model."""
    if implementation == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[implementation]


def _visible(mask: Tensor | None, length: int) -> Visible | None:
    """What each query may read, from a mask of ``sdpa`` or ``eager``."""
    if mask is None:
        return None
    mask = mask[..., :length]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


#: Former names, for one release.
__getattr__ = names_of(__name__, {"Handle": "zoo.compress.kv.attach:PolicyHandle"})

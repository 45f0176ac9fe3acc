"""Shortening a prompt inside the language model, so that the caller sees the length that went in.

The language model works on fewer tokens than the caller handed over; its output is laid out at the caller's positions again,
0 where a token went. `generate` therefore needs no change: it keeps its prompt ids, masks and positions, and what the caches
really hold is remembered on the cache object itself. A visual token that is to go before the first layer is marked by NaN:
such a mark survives all that `generate` does with image features, beams included.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn

from zoo.compress.anatomy import Anatomy
from zoo.compress.eager import eagerly, refuse_compiled, refuse_recomputation
from zoo.compress.method import HANDLE, Encoding, Method, Prompt, as_hidden
from zoo.compress.mustdrop import eviction_indices
from zoo.compress.override import chunked_prompt
from zoo.compress.scores import attention_of_rows, gather_tokens, left_padded
from zoo.compress.stats import Stats, cpu_long, row_counts
from zoo.errors import InputError

_CHUNKS = (
    "a compressed prompt is read at once, because what stays depends on all of it: leave prefill_chunk_size out, or take the "
    "method out of the model (zoo.compress.remove)"
)


@dataclass
class CacheGroup:
    """Layers whose caches hold the same tokens.

    Attributes:
        first: first of these layers.
        valid: cached entries that are tokens.
        full: all are.
        shift: by how much the caller's position of a new token is ahead of the one that these layers use.
    """

    first: int
    valid: Bool[Tensor, "batch cached"]
    full: bool
    shift: Int[Tensor, " batch"]


@dataclass
class CacheMemory:
    """Memory of a cache: the caller's length, and the groups of layers in ascending order."""

    seen: int
    groups: list[CacheGroup]


@dataclass
class _Prefill:
    """A prompt on its way through the layers.

    Attributes:
        visual: placeholders in the caller's sequence.
        attended: tokens of each row, padding left out.
        last: the caller's position of each row's last one.
        entry_shift: how many of them went before the first layer.
        shortened: tokens are not where the caller has them.
        cache: that is being filled.
        prompts: before the first layer, and after each pruned one.
        orders: what each pruning gathered.
        held: which tokens the caches keep, by first layer of a group.
        sources: of the image's tokens, see `Stats`.
    """

    visual: Bool[Tensor, "batch length"]
    attended: Int[Tensor, " batch"]
    last: Int[Tensor, " batch"]
    entry_shift: Int[Tensor, " batch"]
    shortened: bool
    cache: Any
    prompts: list[Prompt]
    orders: list[Tensor] = field(default_factory=list)
    held: list[tuple[int, Tensor]] = field(default_factory=list)
    sources: list[Tensor] = field(default_factory=list)


@dataclass
class _Inputs:
    """What layers from a certain one on get instead of what the language model hands them."""

    mask: Any
    embeddings: Any

    def put(self, kwargs: dict[str, Any]) -> None:
        kwargs["attention_mask"] = self.mask
        # layers read them for flash attention only, which takes gaps between them for the borders of packed sequences
        kwargs["position_ids"] = None
        kwargs["position_embeddings"] = self.embeddings


class _Call(threading.local):
    """What hooks of one forward pass tell each other, thread by thread."""

    bypass = False
    tower: Encoding
    visual: Tensor | None = None
    input_ids: Tensor | None = None
    encoding: Encoding | None = None
    prefill: _Prefill | None = None
    inputs: dict[int, _Inputs]
    query: Tensor | None = None
    keys: Tensor | None = None
    again = 0

    def __init__(self) -> None:
        self.inputs = {}
        self.tower = Encoding()

    def __reduce__(self) -> tuple[type[_Call], tuple[()]]:
        """A copy begins with nothing: what is under way belongs to the threads of the original."""
        return _Call, ()


class PromptShortener:
    """Hooks of the language model for one method.

    Args:
        anatomy: of the model.
        method: bound to it.
    """

    def __init__(self, anatomy: Anatomy, method: Method) -> None:
        self.anatomy, self.method = anatomy, method
        # with several axes positions say where in the image a token is
        self.keeps_positions = method.positions == "keep" or anatomy.tower is None
        self.call = _Call()
        self._last: _Prefill | None = None

    @property
    def stats(self) -> Stats | None:
        """Of the last prompt with an image; counted when asked for, because counting waits for the device."""
        return None if self._last is None else self._report(self._last)

    def hooks(self) -> Iterator[Any]:
        """Registers the hooks and yields what removes them."""
        anatomy = self.anatomy
        yield anatomy.core.register_forward_pre_hook(self._see_prompt, with_kwargs=True)
        yield anatomy.language.register_forward_pre_hook(self._enter, with_kwargs=True)
        yield anatomy.language.register_forward_hook(self._leave, with_kwargs=True, prepend=True)
        pruned = self.method.pruned
        if pruned:
            self._check_layers()
        first = 0 if self.keeps_positions else min(pruned, default=len(anatomy.layers))
        for index in range(first, len(anatomy.layers)):
            yield anatomy.layers[index].register_forward_pre_hook(partial(self._layer_inputs, index), with_kwargs=True)
        for stage, index in enumerate(pruned):
            attention = anatomy.layers[index].self_attn
            yield attention.q_proj.register_forward_hook(partial(self._record, "query"))
            yield attention.k_proj.register_forward_hook(partial(self._record, "keys"))
            yield anatomy.layers[index].register_forward_hook(
                partial(self._prune, stage, index), with_kwargs=True, prepend=True
            )

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """The language model as it is without the method."""
        self.call.bypass = True
        try:
            yield
        finally:
            self.call.bypass = False

    def _check_layers(self) -> None:
        import transformers
        from transformers.masking_utils import create_causal_mask

        attention = self.anatomy.layers[0].self_attn
        parts = ("q_proj", "k_proj", "head_dim", "scaling")
        missing = [name for name in parts if not hasattr(attention, name)]
        if "layer_idx" not in inspect.signature(create_causal_mask).parameters:
            missing.append("layer_idx of create_causal_mask")
        if not hasattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb"):
            missing.append("apply_rotary_pos_emb")
        if missing:
            name, version = type(attention).__name__, transformers.__version__
            raise InputError(f"{name} of transformers {version} cannot be pruned: no {', '.join(missing)}")

    # ------------------------------------------------------------------------------------------------------ the prompt

    @eagerly
    def _see_prompt(self, core: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes where the visual tokens are."""
        call = self.call
        if call.bypass:
            return
        call.visual = call.input_ids = None
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if encoded is None and kwargs.get("pixel_values") is None:
            return
        # set by the tower when it runs within this very call
        call.encoding = getattr(encoded, HANDLE, None)
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None:
            call.input_ids = ids
            call.visual = ids == self.anatomy.image_token
        else:
            embeds = kwargs["inputs_embeds"]
            token = torch.full((), self.anatomy.image_token, device=embeds.device)
            call.visual = (embeds == self.anatomy.model.get_input_embeddings()(token)).all(-1)

    @eagerly
    def _enter(self, language: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.call
        if call.bypass:
            return None
        visual, call.visual = call.visual, None
        call.prefill, call.inputs, call.again = None, {}, 0
        cache = kwargs.get("past_key_values")
        memory: CacheMemory | None = getattr(cache, HANDLE, None)
        cached = 0 if cache is None else cache.get_seq_length()
        pending = visual is not None and bool(visual.any())
        whole = chunked_prompt()
        if whole is not None and (pending or (memory is not None and memory.seen < whole)):
            # Chunks lose what the tower says of its features, even where there is one chunk only.
            raise InputError(_CHUNKS)
        if memory is not None and cached:
            if pending:
                raise InputError("a new image in a conversation whose cache has been compressed; start it without the cache")
            self._continue(language, kwargs, memory, cached)
        elif visual is not None and pending:
            if cached:
                raise InputError("an image after a prompt that is in the cache already cannot be compressed")
            self._read(language, kwargs, visual)
        return args, kwargs

    def _read(self, language: Any, kwargs: dict[str, Any], visual: Bool[Tensor, "batch length"]) -> None:
        """Takes the tokens that don't enter out of the prompt."""
        call, method = self.call, self.method
        embeds: Tensor = kwargs["inputs_embeds"]
        visual = visual.to(embeds.device)
        if method.completes and call.encoding is not None:
            embeds = method.complete(embeds, visual, call.input_ids, call.encoding)
        absent = embeds.isnan().all(-1) & visual
        prompt = self._prompt(kwargs, visual, absent)
        alive = prompt.valid & ~absent
        if (wanted := method.before(prompt)) is not None:
            alive &= wanted | ~prompt.visual
        prefill = _Prefill(
            visual=visual & prompt.valid,
            attended=prompt.valid.sum(1),
            last=(prompt.valid * prompt.index).amax(1),
            entry_shift=(prompt.valid.sum(1) - alive.sum(1)) * (not self.keeps_positions),
            shortened=not bool(alive.all()),
            cache=self._cache(language, kwargs),
            prompts=[prompt],
        )
        if prefill.shortened:
            order, valid, full = left_padded(alive)
            prompt = prompt.take(order, valid, renumber=not self.keeps_positions)
            embeds = gather_tokens(embeds, order).masked_fill(~valid[..., None], 0)
            prefill.prompts = [prompt]
            kwargs["attention_mask"] = None if full else valid.long()
            kwargs["position_ids"] = prompt.positions
            if self.keeps_positions:
                # the model itself would take gaps between positions for the borders of packed sequences
                kwargs["position_ids"] = (valid.cumsum(1) - 1).clamp(min=0)
                call.inputs[0] = self._inputs(embeds, None if full else valid, prompt.positions)
        refuse_compiled(self.anatomy.hooked)
        if method.pruned or call.inputs:
            refuse_recomputation(language)
        kwargs["inputs_embeds"] = embeds
        call.prefill = prefill

    def _prompt(
        self, kwargs: dict[str, Any], visual: Bool[Tensor, "batch length"], absent: Bool[Tensor, "batch length"]
    ) -> Prompt:
        """The caller's prompt."""
        batch, length = visual.shape
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise InputError("an attention mask that isn't [batch, length] cannot be shortened")
        attended = torch.ones_like(visual) if mask is None else mask.to(visual.device).bool()
        index = torch.arange(length, device=visual.device)
        positions = index[None] if positions is None else positions.to(visual.device)
        visual = visual & attended
        return Prompt(
            index=index.expand(batch, length),
            valid=attended,
            positions=positions.expand(*positions.shape[:-2], batch, length),
            visual=visual & ~absent,
            protected=self._protected(visual),
            placeholders=visual.sum(1),
        )

    def _cache(self, language: Any, kwargs: dict[str, Any]) -> Any:
        """The cache that this pass fills, made here if the language model would make it."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        cache = kwargs.get("past_key_values")
        use_cache = kwargs.get("use_cache")
        if cache is None and (language.config.use_cache if use_cache is None else use_cache):
            cache = kwargs["past_key_values"] = DynamicCache(config=language.config)
        if cache is not None and (
            type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers)
        ):
            raise InputError(f"{type(cache).__name__} cannot hold a compressed prompt; leave the default cache in place")
        return cache

    def _protected(self, visual: Bool[Tensor, "batch length"]) -> Bool[Tensor, "batch length"]:
        """Lays the tower's marks out over the prompt; beams repeat rows, never images within a row."""
        marks = torch.zeros_like(visual)
        encoding = self.call.encoding
        if encoding is None or not encoding.protected:
            return marks
        flat = torch.cat([marks_of.to(visual.device) for marks_of in encoding.protected])
        beams = int(visual.sum()) // len(flat)
        if beams * len(flat) != int(visual.sum()) or len(visual) % beams:
            raise InputError(f"{int(visual.sum())} image placeholders for images of {len(flat)} tokens in all")
        rows = marks[::beams].clone()
        rows[visual[::beams]] = flat
        return rows.repeat_interleave(beams, dim=0)

    # ------------------------------------------------------------------------------------------------ inside the layers

    def _layer_inputs(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = self.call.inputs
        first = max((known for known in inputs if known <= layer), default=None)
        if self.call.bypass or first is None:
            return None
        inputs[first].put(kwargs)
        return args, kwargs

    def _record(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.call.prefill is not None and not self.call.bypass:
            setattr(self.call, name, output)

    def _prune(self, stage: int, layer: int, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        call, method = self.call, self.method
        if call.prefill is None or call.bypass:
            return None
        hidden = as_hidden(output)
        prompt = call.prefill.prompts[-1]
        attention = self._attention(layer, prompt, kwargs["position_embeddings"])
        wanted = method.choose(stage, *attention, prompt)
        order, valid, full = left_padded(prompt.valid & (wanted | ~prompt.visual))
        prompt = prompt.take(order, valid, renumber=method.renumbers)
        call.prefill.prompts.append(prompt)
        call.prefill.orders.append(order)
        call.prefill.shortened = True
        hidden = gather_tokens(hidden, order.to(hidden.device)).masked_fill(~valid[..., None].to(hidden.device), 0)
        call.inputs[layer + 1] = self._inputs(hidden, None if full else valid, prompt.positions)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    @torch.no_grad()
    def _attention(self, layer: int, prompt: Prompt, embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Attention of the method's rows to every token, from the queries and keys that the layer has just made."""
        attention = self.anatomy.layers[layer].self_attn
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        query, keys = self.call.query, self.call.keys
        assert query is not None and keys is not None and self.call.prefill is not None
        self.call.query = self.call.keys = None
        cos, sin = (part.to(keys.device).expand(len(keys), -1, -1) for part in embeddings)

        if self.call.prefill.cache is not None:
            keys = self.call.prefill.cache.layers[layer].keys
        else:
            keys = keys.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            keys = attention.k_norm(keys) if hasattr(attention, "k_norm") else keys
            keys = rotate(keys[:, :0], keys, cos, sin)[1]

        index, valid = (part.to(keys.device) for part in self._rows(prompt))
        query = gather_tokens(query, index).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        query = attention.q_norm(query) if hasattr(attention, "q_norm") else query
        query = rotate(query, query[:, :0], gather_tokens(cos, index), gather_tokens(sin, index))[0]
        scores = attention_of_rows(query, keys, index, valid, prompt.valid.to(keys.device), attention.scaling)
        return scores[0].to(prompt.index.device), scores[1].to(prompt.index.device)

    def _rows(self, prompt: Prompt) -> tuple[Int[Tensor, "batch rows"], Bool[Tensor, "batch rows"]]:
        if self.method.rows == "last":
            last = torch.full_like(prompt.index[:, :1], prompt.index.shape[1] - 1)
            return last, torch.ones_like(last, dtype=torch.bool)
        text = prompt.valid & ~prompt.visual
        # text after the last visual token; all text where an image ends the prompt
        after = text & (prompt.visual.flip(1).cumsum(1).flip(1) == 0)
        return left_padded(torch.where(after.any(1, keepdim=True), after, text))[:2]

    def _inputs(self, hidden: Tensor, valid: Tensor | None, positions: Tensor, **sizes: Any) -> _Inputs:
        """Mask and rotary embedding for layers that work on ``hidden``; ``valid`` marks keys, ``None`` all of them."""
        from transformers.masking_utils import create_causal_mask

        language = self.anatomy.language
        mask = create_causal_mask(
            config=language.config,
            inputs_embeds=hidden,
            attention_mask=None if valid is None else valid.long(),
            past_key_values=sizes.pop("cache", None),
            **sizes,
        )
        positions = positions.to(hidden.device)
        # of four axes the first is for masks
        axes = positions[1:] if positions.ndim == 3 and len(positions) == 4 else positions
        return _Inputs(mask, language.rotary_emb(hidden, axes))

    # --------------------------------------------------------------------------------------------------- after the layers

    @eagerly
    def _leave(self, language: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        call = self.call
        if call.bypass:
            return None
        prefill, call.prefill, call.inputs = call.prefill, None, {}
        call.query = call.keys = None
        encoding, call.encoding, call.tower = call.encoding, None, Encoding()
        if call.again:
            output.last_hidden_state = F.pad(output.last_hidden_state, (0, 0, call.again, 0))
            call.again = 0
        if prefill is None:
            return output
        if prefill.cache is not None:
            memory = self._remember(prefill)
            setattr(prefill.cache, HANDLE, memory)
            prefill.held = [(group.first, group.valid) for group in memory.groups]
            prefill.cache = None
        prefill.sources, self._last = [] if encoding is None else encoding.sources, prefill
        if prefill.shortened:
            output.last_hidden_state = self._spread(prefill, output.last_hidden_state)
        return output

    def _spread(self, prefill: _Prefill, hidden: Tensor) -> Tensor:
        """Lays hidden states out at the caller's positions; a row's last one where the row ends, if that token went."""
        prompt = prefill.prompts[-1]
        index = torch.cat([prompt.index[:, :-1], prefill.last[:, None]], 1).to(hidden.device)
        hidden = hidden.masked_fill(~prompt.valid.to(hidden.device)[..., None], 0)
        full = hidden.new_zeros(len(hidden), prefill.visual.shape[1], hidden.shape[-1])
        # padding adds nothing, wherever it points to
        return full.scatter_add(1, index[..., None].expand_as(hidden), hidden)

    def _remember(self, prefill: _Prefill) -> CacheMemory:
        """Evicts what the method evicts and groups the layers by what their caches hold."""
        firsts, prompts = [0, *(layer + 1 for layer in self.method.pruned)], prefill.prompts
        if self.method.evicts and prefill.orders:
            self._evict(prefill)
            firsts, prompts = [0, self.method.pruned[0]], [prompts[0], prompts[-1]]
            if firsts[1] == 0:
                firsts, prompts = firsts[1:], prompts[1:]
        groups = []
        for first, prompt in zip(firsts, prompts, strict=False):
            count = prompt.valid.sum(1)
            renumbers = self.method.renumbers and prompt.positions.ndim == 2
            shift = prefill.attended - count if renumbers else prefill.entry_shift
            groups.append(CacheGroup(first, prompt.valid, bool(prompt.valid.all()), shift))
        return CacheMemory(prefill.visual.shape[1], groups)

    def _evict(self, prefill: _Prefill) -> None:
        """Leaves the final tokens only in the caches of the layers from the first to the last pruned one."""
        indices = eviction_indices(prefill.orders)
        first = self.method.pruned[0]
        for stage, last in enumerate(self.method.pruned):
            for layer in prefill.cache.layers[first : last + 1]:
                index = indices[stage].to(layer.keys.device)[:, None, :, None]
                layer.keys = layer.keys.gather(2, index.expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3]))
                layer.values = layer.values.gather(2, index.expand(-1, layer.values.shape[1], -1, layer.values.shape[3]))
            first = last + 1

    def _continue(self, language: Any, kwargs: dict[str, Any], memory: CacheMemory, cached: int) -> None:
        """Align masks and positions of new tokens with the compressed cache."""
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            embeds = language.get_input_embeddings()(kwargs.pop("input_ids"))
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None and mask.ndim != 2:
            raise InputError("an attention mask that isn't [batch, length] cannot be shortened")
        self.call.again = _seen_again(memory, embeds.shape[1], mask, positions)
        embeds = kwargs["inputs_embeds"] = embeds[:, self.call.again :]
        batch, count = embeds.shape[:2]
        groups = memory.groups
        if groups[0].valid.shape != (batch, cached):
            raise InputError(
                f"the cache holds {cached} tokens of a batch of {batch}, where the compressed prompt left "
                f"{groups[0].valid.shape[1]} of {groups[0].valid.shape[0]}; caches that are cut or re-batched from outside "
                "(as by assisted decoding) cannot go on"
            )
        if positions is None:
            positions = torch.arange(memory.seen, memory.seen + count, device=embeds.device)[None]
        positions = positions[..., -count:]
        new = groups[0].valid.new_ones(batch, count)
        if mask is not None:
            new &= mask[:, -count:].to(new.device).bool()
        for group in groups:
            group.valid = torch.cat([group.valid, new], 1)
            group.full = group.full and (mask is None or bool(new.all()))
            shifted = positions.to(group.shift.device) - group.shift[:, None]
            if group.first == 0:
                kwargs["attention_mask"] = None if group.full else group.valid.long()
                kwargs["position_ids"] = shifted
            else:
                known = {"cache": kwargs["past_key_values"], "layer_idx": group.first}
                self.call.inputs[group.first] = self._inputs(embeds, None if group.full else group.valid, shifted, **known)
        memory.seen += count

    def _report(self, prefill: _Prefill) -> Stats:
        depth, firsts = len(self.anatomy.layers), [0, *(layer + 1 for layer in self.method.pruned)]
        last = prefill.prompts[-1]
        counts = [row_counts(prompt.visual) for prompt in prefill.prompts]
        held = [(first, row_counts(valid)) for first, valid in prefill.held]
        ranks = prefill.visual.cumsum(1) - 1
        placeholders = prefill.visual.sum(1)
        return Stats(
            visual=placeholders.tolist(),
            text=(prefill.attended - placeholders).tolist(),
            visual_per_layer=[_at(layer, list(zip(firsts, counts, strict=False))) for layer in range(depth)],
            cache_per_layer=[_at(layer, held) for layer in range(depth)] if held else [],
            kept=[cpu_long(row[index[marks]]) for row, index, marks in zip(ranks, last.index, last.visual, strict=True)],
            sources=[cpu_long(source) for source in prefill.sources],
        )


def _seen_again(memory: CacheMemory, count: int, mask: Tensor | None, positions: Tensor | None) -> int:
    """How many of ``count`` tokens the caches have seen already.

    ``generate``, continuing a conversation, tells what is new from the length of a cache, which holds less than was seen.
    """
    if count == 1:
        return 0
    if mask is not None and mask.shape[1] > count:
        first = mask.shape[1] - count
    elif mask is None and positions is not None and (positions.ndim == 2 or len(positions) == 4):
        first = int(positions.flatten(0, -2)[0, 0])
    else:
        return 0
    again = max(0, memory.seen - first)
    if again >= count:
        raise InputError("no new token for a cache that has been compressed")
    return again


def _at(layer: int, groups: list[tuple[int, list[int]]]) -> list[int]:
    """What groups of layers, given by their first ones in ascending order, hold at a layer."""
    return [held for first, held in groups if first <= layer][-1]

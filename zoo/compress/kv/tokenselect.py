"""TokenSelect: all heads vote for the tokens that a chunk of queries reads (arXiv 2411.02886)."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zoo.compress.kv.cache import Step
from zoo.compress.kv.policies import Budget, Policy, budget_tokens, check_budget
from zoo.errors import InputError

# Kinds of rotary positions whose angle is position times frequency.
_ROPE_TYPES = ("default", "linear", "llama3", "dynamic")


@dataclass(frozen=True)
class TokenSelect(Policy):
    """Read the first tokens, the last ones, and those that all heads together vote for (arXiv 2411.02886, EMNLP 2025).

    Prompts are worked through in chunks of queries, and decoding one query at a time. A chunk that finds at most
    ``init + tokens + local`` tokens in the cache reads all of them. Every other chunk selects, per layer and item: the mean of
    its queries votes for each token in the middle, by the sum over heads of a softmax of products with keys that have no
    position. Nothing is dropped. Padding is never selected and has no position.

    Keys lose their positions by the inverse rotation, whose rounding decides between tokens that would tie exactly, such as
    repeated words in the first layer.

    Attributes:
        tokens: selected in the middle, a number or a share of the prompt.
        init: first tokens, always read.
        local: last tokens, always read, at least ``chunk``.
        chunk: queries of a prompt that select together.
        pool: odd width of the window over which votes are replaced by their maximum; 0 for none.
        positions: ``"compact"`` numbers the tokens that are read anew from 0, so no position exceeds their number, which is
            the method's extrapolation to long prompts. ``"true"`` leaves every token its own position and uses the model's own
            attention under a mask; that is a departure from the method.
        reuse: least cosine of the query summary with the last selection's, from which on a decoding step takes over its tokens;
            ``None`` for a new selection in every step.
        scores: ``"bfloat16"`` rounds products, probabilities and votes as the original's kernel does.
        heads: ``"grouped"`` pairs a query head with the keys it reads, ``"modulo"`` as the original's kernel does, which is
            another pair wherever heads share keys.

    Raises:
        InputError: a budget of nothing, ``local`` below ``chunk``, an even ``pool`` or an unknown word.
    """

    tokens: Budget = 2048
    init: int = 128
    local: int = 512
    chunk: int = 512
    pool: int = 0
    positions: Literal["compact", "true"] = "compact"
    reuse: float | None = None
    scores: Literal["float32", "bfloat16"] = "float32"
    heads: Literal["grouped", "modulo"] = "grouped"

    def __post_init__(self) -> None:
        check_budget("tokens", self.tokens, least=1)
        if self.init < 0 or self.chunk < 1:
            raise InputError(f"init is at least 0 and chunk at least 1, not {self.init} and {self.chunk}")
        if self.local < self.chunk:
            raise InputError(
                f"local = {self.local} is below chunk = {self.chunk}: queries of a chunk would read tokens after theirs"
            )
        if self.pool < 0 or (self.pool and self.pool % 2 == 0):
            raise InputError(f"pool is an odd number, or 0 for none, not {self.pool}")
        words_of = {"positions": ("compact", "true"), "scores": ("float32", "bfloat16"), "heads": ("grouped", "modulo")}
        for name, words in words_of.items():
            if getattr(self, name) not in words:
                raise InputError(f"{name} is {' or '.join(words)}, not {getattr(self, name)!r}")

    def check(self, decoder: Any, modules: Sequence[Any]) -> None:
        rotary = getattr(decoder, "rotary_emb", None)
        if rotary is None or not isinstance(getattr(rotary, "inv_freq", None), Tensor):
            raise InputError(
                f"TokenSelect takes the positions out of keys, and {type(decoder).__name__} has no rotary ones in one table"
            )
        kind = getattr(rotary, "rope_type", "default")
        if kind not in _ROPE_TYPES and (self.positions == "compact" or kind == "longrope"):
            raise InputError(f"rotary positions of kind {kind!r} cannot be given anew; known are {', '.join(_ROPE_TYPES)}")
        for module in modules:
            window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
            for name, value in (("a sliding window", window), ("sinks", getattr(module, "sinks", None))):
                if value is not None:
                    raise InputError(f"TokenSelect does not go together with {name}, which layer {module.layer_idx} has")
            if getattr(module, "attn_logit_softcapping", None) is not None:
                raise InputError(f"TokenSelect does not go together with capped products, which layer {module.layer_idx} has")
        _check_rotation(rotary, modules[0])

    def attend(self, step: Step) -> Float[Tensor, "batch queries heads head_dim"]:
        layer = step.layer
        real = step.real
        unrotated = self._unrotate(step, real)
        if layer.budget is None or not step.is_decoding:
            layer.budget = (budget_tokens(self.tokens, step.prompt_length),)
        tokens = layer.budget[0]
        if not step.is_decoding or layer.summary is None or layer.chosen is None or layer.chosen.shape[1] != tokens:
            layer.summary = step.query.new_zeros(*step.query.shape[:2], step.query.shape[3], dtype=torch.float32)
            layer.chosen = torch.full((len(step.query), tokens), -1, device=step.query.device)
        if int(real.sum(1).max()) <= self.init + tokens + self.local:
            return step.dense()
        keys = layer.unrotated
        assert keys is not None
        choices = self._choices(step, real, unrotated, tokens)
        if self.positions == "true":
            return step.attend(_visible(step, real, choices))
        output = step.query.new_zeros(step.query.transpose(1, 2).shape)
        for choice in choices:
            item, rows = choice.item, choice.rows
            if choice.selected is None:
                query, key = step.query[item][:, rows], step.key[item][:, choice.entries]
                value = step.value[item][:, choice.entries]
            else:
                positions = torch.arange(len(choice.selected), device=real.device)
                query = rotated(unrotated[item][:, rows], positions[-len(rows) :], step.rotary.inv_freq)
                key = rotated(keys[item][:, choice.selected], positions, step.rotary.inv_freq)
                value = step.value[item][:, choice.selected]
            output[item, rows] = _causal(query, key, value, step.scaling).transpose(0, 1)
        return output

    def entries_read(self, layer_index: int, prompt: int, length: int, hit_rate: float = 0.0) -> float:
        """Entries that a decoding step reads; a key of the middle that is voted on is half an entry.

        Args:
            layer_index: number of the layer.
            prompt: tokens of the prompt.
            length: tokens so far.
            hit_rate: share of steps that take over a selection, as `PolicyHandle.stats` counts it.
        """
        read = self.init + budget_tokens(self.tokens, prompt) + self.local
        return length if length <= read else (length - self.init - self.local) / 2 * (1 - hit_rate) + read

    def _unrotate(self, step: Step, real: Bool[Tensor, "batch length"]) -> Float[Tensor, "batch heads queries head_dim"]:
        """The new queries without their positions, after the layer has got the new keys without theirs."""
        layer, new = step.layer, step.query.shape[2]
        positions = (real.cumsum(1) - 1).clamp(min=0)
        if step.position_ids is not None:
            positions[:, -new:] = step.position_ids
        kept = 0 if layer.unrotated is None else layer.unrotated.shape[2]
        if kept:
            step.require_before(kept)
        frequencies, scale = step.rotary.inv_freq, getattr(step.rotary, "attention_scaling", 1.0)
        keys = rotated(step.key[:, :, kept:], -positions[:, None, kept:], frequencies) / scale
        keys = keys.to(step.key.dtype)
        layer.unrotated = keys if layer.unrotated is None else torch.cat([layer.unrotated, keys], dim=2)
        return rotated(step.query, -positions[:, None, -new:], frequencies) / scale

    def _choices(
        self, step: Step, real: Bool[Tensor, "batch length"], query: Float[Tensor, "batch heads queries head_dim"], tokens: int
    ) -> list[Choice]:
        """What each chunk of each item reads."""
        layer = step.layer
        assert layer.unrotated is not None and layer.summary is not None and layer.chosen is not None
        choices = []
        for item, entries, rows in _chunks(real, step.query.shape[2], self.chunk):
            selected = None
            if len(entries) > self.init + tokens + self.local:
                middle = entries[self.init : len(entries) - self.local]
                summary = rotated(
                    query[item][:, rows], self.local + torch.arange(len(rows), device=real.device), step.rotary.inv_freq
                ).mean(1)
                chosen = layer.chosen[item]
                if step.is_decoding and int(chosen[0]) >= 0 and self._alike(summary, layer.summary[item]):
                    step.stats.reused += 1
                else:
                    votes = token_votes(summary, layer.unrotated[item][:, middle], self.heads, self.scores, self.pool)
                    chosen = middle[_best(votes, tokens)]
                    if step.is_decoding:
                        step.stats.made += 1
                        layer.summary[item], layer.chosen[item] = summary, chosen
                selected = torch.cat([entries[: self.init], chosen, entries[len(entries) - self.local :]])
            choices.append(Choice(item, rows, entries, selected))
        return choices

    def _alike(self, summary: Float[Tensor, "heads head_dim"], last: Float[Tensor, "heads head_dim"]) -> bool:
        return self.reuse is not None and float(F.cosine_similarity(summary.flatten(), last.flatten(), dim=0)) >= self.reuse


class Choice(NamedTuple):
    """Entries that one chunk of one item reads.

    Attributes:
        item: row of the batch.
        rows: its queries, numbers within the call.
        entries: tokens of the item up to its last query, numbers within the cache.
        selected: those that it reads, in the order of the cache; ``None`` for all.
    """

    item: int
    rows: Int[Tensor, " queries"]
    entries: Int[Tensor, " length"]
    selected: Int[Tensor, " selected"] | None


def rotated(
    x: Float[Tensor, "*batch tokens head_dim"], positions: Int[Tensor, "*#batch tokens"], frequencies: Float[Tensor, " pairs"]
) -> Float[Tensor, "*batch tokens head_dim"]:
    """Queries or keys with rotary positions, in float32: channel c of the first half turns with channel c of the second.

    Negative positions take the positions out again. Channels beyond twice the frequencies are left alone.
    """
    x = x.float()
    angles = positions[..., None].float() * frequencies.to(x.device, torch.float32)
    cos, sin = angles.cos(), angles.sin()
    turning, rest = x[..., : 2 * frequencies.shape[0]], x[..., 2 * frequencies.shape[0] :]
    first, second = turning.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def token_votes(
    summary: Float[Tensor, "heads head_dim"],
    keys: Float[Tensor, "kv_heads tokens head_dim"],
    heads: Literal["grouped", "modulo"] = "grouped",
    scores: Literal["float32", "bfloat16"] = "float32",
    pool: int = 0,
) -> Float[Tensor, " tokens"]:
    """Votes of all heads for each token: the sum of their softmaxes, without the usual scaling.

    Args:
        summary: mean query of each head.
        keys: of the tokens, without positions.
        heads, scores, pool: as for `TokenSelect`.
    """
    group = len(summary) // len(keys)
    if heads == "grouped":
        products = (summary.float().unflatten(0, (-1, group)) @ keys.float().transpose(1, 2)).flatten(0, 1)
    else:
        by_key = summary.float().unflatten(0, (group, -1)).transpose(0, 1)
        products = (by_key @ keys.float().transpose(1, 2)).flatten(0, 1)
    if scores == "bfloat16":
        products = products.bfloat16()
    votes = products.softmax(-1).sum(0).float()
    if pool:
        votes = F.max_pool1d(votes[None], pool, stride=1, padding=(pool - 1) // 2)[0]
    return votes


def _best(votes: Float[Tensor, " tokens"], count: int) -> Int[Tensor, " count"]:
    """The tokens with most votes in their order; of equal ones the earlier."""
    return votes.argsort(descending=True, stable=True)[:count].sort().values


def _chunks(
    real: Bool[Tensor, "batch length"], new: int, chunk: int
) -> Iterator[tuple[int, Int[Tensor, " entries"], Int[Tensor, " queries"]]]:
    """For each chunk of each item: the item, its entries up to the chunk's end, and the chunk's queries."""
    before = real.shape[1] - new
    for item, mask in enumerate(real):
        entries = mask.nonzero()[:, 0]
        old = int(mask[:before].sum())
        for start in range(old, len(entries), chunk):
            stop = min(start + chunk, len(entries))
            yield item, entries[:stop], entries[start:stop] - before


def _visible(step: Step, real: Bool[Tensor, "batch length"], choices: list[Choice]) -> Bool[Tensor, "batch 1 queries length"]:
    """What each query reads at its true position; padding reads what the model says."""
    batch, new, length = len(real), step.query.shape[2], real.shape[1]
    order = torch.arange(length, device=real.device)
    visible = (order[length - new :, None] >= order).expand(batch, new, length).clone()
    if step.mask is not None:
        visible &= step.mask.any(1)
    for choice in choices:
        if choice.selected is not None:
            selected = torch.zeros(length, dtype=torch.bool, device=real.device)
            selected[choice.selected] = True
            visible[choice.item, choice.rows] &= selected
    return visible[:, None]


def _causal(
    query: Float[Tensor, "heads queries head_dim"],
    key: Float[Tensor, "kv_heads tokens head_dim"],
    value: Float[Tensor, "kv_heads tokens head_dim"],
    scaling: float,
) -> Float[Tensor, "heads queries head_dim"]:
    """Attention of the last tokens over all, in causal order of the list."""
    group = query.shape[0] // key.shape[0]
    order = torch.arange(key.shape[1], device=key.device)
    mask = order[key.shape[1] - query.shape[1] :, None] >= order
    keys, values = (x.to(value.dtype).repeat_interleave(group, dim=0) for x in (key, value))
    return F.scaled_dot_product_attention(query.to(value.dtype)[None], keys[None], values[None], attn_mask=mask, scale=scaling)[
        0
    ]


def _check_rotation(rotary: Any, module: Any) -> None:
    """Check on numbers that the model rotates as `rotated` does: halves, by one position.

    Raises:
        InputError: it does not, or cannot be asked.
    """
    frequencies = rotary.inv_freq
    probe = torch.sin(torch.arange(3 * 2 * len(frequencies), dtype=torch.float32)).view(1, 1, 3, -1).to(frequencies.device)
    positions = torch.tensor([[0, 1, 7]], device=frequencies.device)
    try:
        cos, sin = rotary(probe, positions)
        theirs, _ = sys.modules[type(module).__module__].apply_rotary_pos_emb(probe, probe, cos, sin)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise InputError(f"{type(module).__name__} does not rotate its keys as Llama does: {error}") from error
    ours = rotated(probe, positions[:, None], rotary.inv_freq) * getattr(rotary, "attention_scaling", 1.0)
    if theirs.shape != ours.shape or not torch.allclose(theirs.float(), ours, atol=1e-3):
        raise InputError(f"{type(module).__name__} does not rotate its keys as Llama does")

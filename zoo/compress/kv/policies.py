"""H2O, Double Sparsity and TidalDecode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zoo.compress.kv.cache import Step
from zoo.compress.kv.tensors import (
    Visible,
    attention_logits,
    attention_mass,
    causal_rows,
    channel_labels,
    channel_mass,
    channel_order,
    h2o_kept,
    h2o_scores,
    label_scores,
    merged_values,
    selected_attention,
    top_tokens,
)
from zoo.errors import InputError

#: A number of tokens, or a share of the prompt.
Budget = int | float


class Policy(ABC):
    """A way to keep a cache small. Subclasses are frozen dataclasses of settings."""

    @abstractmethod
    def attend(self, step: Step) -> Float[Tensor, "batch queries heads head_dim"]:
        """Attention of one layer in one call, and whatever happens to the cache."""

    def check(self, decoder: Any, modules: Sequence[Any]) -> None:  # noqa: B027  # most policies follow every model
        """Check that the policy can follow a model.

        Args:
            decoder: holds the layers.
            modules: its attention modules.

        Raises:
            InputError: it cannot.
        """

    @abstractmethod
    def entries_read(self, layer_index: int, prompt: int, length: int) -> float:
        """Entries of a layer's cache, key and value, that a decoding step reads; labels count as the part of an entry they are.

        Args:
            layer_index: number of the layer.
            prompt: tokens of the prompt, which shares are of.
            length: tokens so far, the new one among them.
        """


@dataclass(frozen=True)
class H2O(Policy):
    """Heavy-hitter oracle (arXiv 2306.14048): keep what received most attention, and what came last; drop the rest.

    A whole prompt is attended to in full and then reduced, in chunks as well, and so is every further call. Rotations of kept
    keys stay, and new tokens have their true positions. Older entries have had more queries to collect attention from; the
    method leaves it so. Rows are independent of each other; heads that share keys add up their attention.

    Attributes:
        heavy: entries kept for the attention they received, a number or a share of the prompt.
        recent: entries kept because they are the last.
        merge: average evicted values into the most similar kept entries instead of losing them (kvpress' rule).

    Raises:
        InputError: a budget is below 0, a share above 1, or nothing is kept.
    """

    heavy: Budget = 0.1
    recent: Budget = 0.1
    merge: bool = False

    def __post_init__(self) -> None:
        check_budget("heavy", self.heavy, least=0)
        check_budget("recent", self.recent, least=0)
        if self.heavy + self.recent <= 0:
            raise InputError("H2O has to keep something: heavy and recent are both 0")

    def attend(self, step: Step) -> Float[Tensor, "batch queries heads head_dim"]:
        layer, kv_heads, new = step.layer, step.key.shape[1], step.query.shape[2]
        if layer.valid is None or layer.reading:
            visible, output = step.mask, step.dense()
            layer.valid = step.real[:, None].expand(-1, kv_heads, -1)
            layer.budget = (budget_tokens(self.heavy, step.prompt_length), budget_tokens(self.recent, step.prompt_length))
            layer.reading = step.goes_on
        else:
            step.require_before(layer.valid.shape[2])
            layer.valid = F.pad(layer.valid, (0, new), value=True)
            visible = _visible_after_eviction(layer.valid, step.query.shape[1], new)
            output = step.attend(visible)
        # What padding looks at does not count.
        mass = attention_mass(step.query, step.key, step.scaling, visible, asking=layer.valid[:, 0, -new:])
        layer.scores = h2o_scores(mass, kv_heads, layer.scores)
        assert layer.budget is not None
        if step.key.shape[2] > sum(layer.budget) and not step.goes_on:
            # Padding goes first, which otherwise ties with real entries that nobody looked at.
            kept = h2o_kept(layer.scores.masked_fill(~layer.valid, -1.0), *layer.budget)
            merged = merged_values(layer.keys, layer.values, kept, layer.valid) if self.merge else None
            layer.leaving = (kept, merged)
        return output

    def entries_read(self, layer_index: int, prompt: int, length: int) -> float:
        # Eviction follows attention, so the newest token comes on top of the budget.
        return min(length, budget_tokens(self.heavy, prompt) + budget_tokens(self.recent, prompt) + 1)


@dataclass(frozen=True)
class DoubleSparsity(Policy):
    """Read the tokens that matter, found through the channels that matter (arXiv 2408.07092).

    Prompts are read in full, as are the first layers. Selection is per query head; the newest token is read if it wins.

    Attributes:
        tokens: entries read per step, a number or a share of the prompt.
        group: of how many channels one is a label.
        bits: of the labels; no rounding from 16 on.
        dense_layers: first layers that read everything.
        channels: per layer the order of the channels of each query head, as `calibrate` gives it.
            ``None`` takes the order of the prompt itself, which is ours: the paper calibrates once, on texts.

    Raises:
        InputError: a budget of nothing, a share above 1, or no channel or bit left.
    """

    tokens: Budget = 1 / 16
    group: int = 4
    bits: int = 16
    dense_layers: int = 2
    channels: tuple[Int[Tensor, "heads head_dim"], ...] | None = None

    def __post_init__(self) -> None:
        check_budget("tokens", self.tokens, least=1)
        if self.group < 1 or self.bits < 1:
            raise InputError(f"group and bits are at least 1, not {self.group} and {self.bits}")

    def attend(self, step: Step) -> Float[Tensor, "batch queries heads head_dim"]:
        layer = step.layer
        if step.layer_index < self.dense_layers:
            return step.dense()
        if layer.channels is None:
            if self.channels is None:
                new = step.query.shape[2]
                mass = channel_mass(step.query, step.key[:, :, -new:], step.real[:, -new:])
                layer.mass = mass if layer.mass is None else layer.mass + mass
            if step.goes_on:
                return step.dense()
            layer.channels = self._channels(step)
            layer.budget = (budget_tokens(self.tokens, step.prompt_length),)
        if layer.labels is None:
            layer.labels = channel_labels(step.key, layer.channels)
        else:
            step.require_before(layer.labels.shape[2])
            fresh = channel_labels(step.key[:, :, -step.query.shape[2] :], layer.channels)
            layer.labels = torch.cat([layer.labels, fresh], dim=2)
        if not step.is_decoding:
            return step.dense()
        assert layer.budget is not None
        visible = step.last_row
        scores = label_scores(step.query, layer.labels, layer.channels, self.bits)
        selected = top_tokens(scores, layer.budget[0], visible)
        return selected_attention(step.query, step.key, step.value, selected, step.scaling, visible).transpose(1, 2)

    def entries_read(self, layer_index: int, prompt: int, length: int) -> float:
        if layer_index < self.dense_layers:
            return length
        # A label is one of ``group`` channels of a key, which is half an entry.
        return length / (2 * self.group) + min(length, budget_tokens(self.tokens, prompt))

    def _channels(self, step: Step) -> Int[Tensor, "heads channels"]:
        count = step.query.shape[3] // self.group
        if count < 1:
            raise InputError(f"heads of {step.query.shape[3]} channels have none left in groups of {self.group}")
        if self.channels is None:
            assert step.layer.mass is not None
            order = channel_order(step.layer.mass)
        elif step.layer_index < len(self.channels):
            order = self.channels[step.layer_index]
        else:
            raise InputError(f"there are channels for {len(self.channels)} layers, none for layer {step.layer_index}")
        expected = [step.query.shape[1], step.query.shape[3]]
        if list(order.shape) != expected:
            raise InputError(f"the channels of layer {step.layer_index} are {list(order.shape)}, not {expected}")
        return order[:, :count].to(step.query.device)


@dataclass(frozen=True)
class TidalDecode(Policy):
    """Select in two layers what all the others read (arXiv 2410.05076).

    Prompts are read in full. In a step, layers before ``start`` read everything; ``start`` and ``correction`` read everything
    and select, for each query head, the tokens with the largest products; the layers after them read only those.

    Attributes:
        tokens: entries read per step, a number or a share of the prompt.
        start: first layer that selects.
        correction: layer that selects again; 13 of 32 in the paper, 9 in its code.

    Raises:
        InputError: a budget of nothing, a share above 1, or ``correction`` before ``start``.
    """

    tokens: Budget = 1 / 16
    start: int = 2
    correction: int = 9

    def __post_init__(self) -> None:
        check_budget("tokens", self.tokens, least=1)
        if not 0 <= self.start <= self.correction:
            raise InputError(f"layer {self.correction} cannot correct what layer {self.start} selects")

    def attend(self, step: Step) -> Float[Tensor, "batch queries heads head_dim"]:
        layer, length = step.layer, step.key.shape[2]
        if layer.budget is None:
            layer.budget = (budget_tokens(self.tokens, step.prompt_length),)
        if not step.is_decoding or step.layer_index < self.start:
            return step.dense()
        visible = step.last_row
        if step.layer_index in (self.start, self.correction):
            logits = attention_logits(step.query, step.key, step.scaling)[:, :, 0]
            layer.selected = top_tokens(logits, layer.budget[0], visible)
            return step.dense()
        selector = step.cache.layers[self.correction if step.layer_index > self.correction else self.start]
        if selector.keys.shape[2] != length:
            raise InputError(
                f"layer {step.layer_index} holds {length} entries and the layer that selects for it {selector.keys.shape[2]}: "
                "TidalDecode does not go together with dropping tokens inside the language model"
            )
        return selected_attention(step.query, step.key, step.value, selector.selected, step.scaling, visible).transpose(1, 2)

    def entries_read(self, layer_index: int, prompt: int, length: int) -> float:
        if layer_index <= self.start or layer_index == self.correction:
            return length
        return min(length, budget_tokens(self.tokens, prompt))


def check_budget(name: str, budget: Budget, least: int) -> None:
    """Check a number of tokens or a share.

    Raises:
        InputError: it is below ``least`` or a share outside (0, 1].
    """
    good = 0 < budget <= 1 or budget == least == 0 if isinstance(budget, float) else budget >= least
    if not good:
        raise InputError(f"{name} is a share of the prompt, at most 1.0, or a number of tokens from {least} on, not {budget!r}")


def budget_tokens(budget: Budget, length: int) -> int:
    """A budget in tokens; a share is rounded and, unless it is 0, at least one token."""
    return budget if isinstance(budget, int) else max(round(budget * length), int(budget > 0))


def _visible_after_eviction(valid: Bool[Tensor, "batch kv_heads length"], heads: int, queries: int) -> Visible:
    """What each query may read of a cache whose entries differ by head: all that is no padding, new ones in causal order."""
    causal = causal_rows(queries, valid.shape[2], slice(None), valid.device)
    return valid.repeat_interleave(heads // valid.shape[1], dim=1)[:, :, None] & causal

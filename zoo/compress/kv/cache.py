"""A layer of a cache that a policy may write to, and a call of an attention module as a policy sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from zoo.compress.kv.tensors import Kept, Keys, Queries, Scores, Selected, Visible, gather_entries
from zoo.errors import InputError


class PolicyLayer(DynamicLayer):
    """A layer of a `DynamicCache` with what a policy remembers of it.

    Attributes:
        evicted: tokens that are gone; positions go on counting them.
        valid: which entries are no padding; ``None`` while nobody has asked.
        scores: attention received, for H2O.
        leaving: entries to keep and values to give them once the whole model has run, when nothing else reads the others.
        reading: the first prompt goes on, and nothing has been dropped.
        budget: entries that are kept or read, once the prompt is known.
        mass: by which channels are ordered, while a prompt is read in chunks.
        channels: important channels, for Double Sparsity.
        labels: those channels of the keys.
        selected: what was selected in this step, for TidalDecode.
        unrotated: the keys as if all were at position 0, for TokenSelect.
        summary, chosen: query summary and tokens of the last selection, for TokenSelect; -1 where there is none.
    """

    # Of the base class, where they are ``None`` before the first update.
    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        self.evicted = 0
        self.valid: Bool[Tensor, "batch kv_heads length"] | None = None
        self.scores: Scores | None = None
        self.leaving: tuple[Kept, Keys | None] | None = None
        self.reading = False
        self.budget: tuple[int, ...] | None = None
        self.mass: Float[Tensor, "heads head_dim"] | None = None
        self.channels: Int[Tensor, "heads channels"] | None = None
        self.labels: Float[Tensor, "batch heads length channels"] | None = None
        self.selected: Selected | None = None
        self.unrotated: Keys | None = None
        self.summary: Float[Tensor, "batch heads head_dim"] | None = None
        self.chosen: Int[Tensor, "batch tokens"] | None = None

    @classmethod
    def taking_over(cls, layer: DynamicLayer) -> PolicyLayer:
        """A layer with the entries of another one."""
        taken = cls()
        if layer.keys is not None and layer.values is not None and layer.get_seq_length():
            taken.lazy_initialization(layer.keys, layer.values)
            taken.keys, taken.values = layer.keys, layer.values
        return taken

    def get_seq_length(self) -> int:
        """Tokens that have arrived: the position of the next one."""
        return super().get_seq_length() + self.evicted

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Entries that there will be in the next call, and 0."""
        return super().get_seq_length() + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new entries."""
        self.settle()
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def settle(self) -> None:
        """Drop what a policy decided to drop."""
        if self.leaving is None:
            return
        kept, values = self.leaving
        self.leaving = None
        self.evicted += self.keys.shape[2] - kept.shape[2]
        self.keys = gather_entries(self.keys, kept)
        self.values = gather_entries(self.values, kept) if values is None else values
        if self.valid is not None:
            self.valid = self.valid.gather(2, kept)
        if self.scores is not None:
            self.scores = self.scores.gather(2, kept)

    def _of_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in ("keys", "values", "valid", "scores", "labels", "selected", "unrotated", "summary", "chosen"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, change(tensor))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The rows of a beam search in their new order."""
        self._of_batch(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        self._of_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        self._of_batch(lambda tensor: tensor[indices, ...])

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: what was dropped cannot come back."""
        if tokens_to_remove:
            raise InputError("a cache under a policy cannot be cropped: assisted decoding is not supported")

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._forget()


@dataclass
class SelectionStats:
    """Counts of the selections that decoding steps made, over layers and items.

    Attributes:
        made: selections that were computed.
        reused: those that were taken over from an earlier step.
    """

    made: int = 0
    reused: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of selections that were taken over, in [0, 1]."""
        return self.reused / max(1, self.made + self.reused)


class Step(NamedTuple):
    """One call of an attention module.

    Attributes:
        query: the new tokens', rotated.
        key, value: of the whole cache with the new tokens at the end.
        mask: what each query may read, as the model says; ``None`` for causal order.
        scaling: of the products.
        layer_index: number of the layer.
        cache: a `DynamicCache` of `PolicyLayer`s.
        attend: the model's own attention under another mask; ``[batch, queries, heads, head_dim]``.
        dense: the model's own attention as it was called.
        prompt: tokens of a prompt that is read in chunks; ``None`` for a whole one.
        position_ids: of the new tokens, where the model hands them on.
        rotary: the model's module of rotary positions.
        stats: counts of selections.
    """

    query: Queries
    key: Keys
    value: Keys
    mask: Visible | None
    scaling: float
    layer_index: int
    cache: Any
    attend: Callable[[Visible], Tensor]
    dense: Callable[[], Tensor]
    prompt: int | None = None
    position_ids: Int[Tensor, "#batch queries"] | None = None
    rotary: Any = None
    stats: SelectionStats = SelectionStats()

    @property
    def layer(self) -> PolicyLayer:
        """This layer's part of the cache."""
        layer: PolicyLayer = self.cache.layers[self.layer_index]
        return layer

    def require_before(self, entries: int) -> None:
        """Check that nobody else has cut the cache since the last call.

        Raises:
            InputError: there are fewer entries beside the new ones.
        """
        found = self.key.shape[2] - self.query.shape[2]
        if found != entries:
            raise InputError(
                f"layer {self.layer_index} holds {found} entries where the policy left {entries}: something else cuts the cache"
            )

    @property
    def is_prompt(self) -> bool:
        """Whether nothing was cached before."""
        return self.query.shape[2] == self.key.shape[2]

    @property
    def is_decoding(self) -> bool:
        """Whether this is one new token after others, and after the prompt."""
        reading = self.prompt is not None and self.layer.get_seq_length() <= self.prompt
        return self.query.shape[2] == 1 and not self.is_prompt and not reading

    @property
    def goes_on(self) -> bool:
        """Whether the prompt has more chunks after this one."""
        return self.prompt is not None and self.layer.get_seq_length() < self.prompt

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt that ends, or goes on, with this call."""
        return self.layer.get_seq_length() if self.prompt is None else max(self.prompt, self.layer.get_seq_length())

    @property
    def real(self) -> Bool[Tensor, "batch length"]:
        """Mask of the entries that may be read; padding may not."""
        batch, _, length, _ = self.key.shape
        if self.mask is None:
            return torch.ones(batch, length, dtype=torch.bool, device=self.key.device)
        return self.mask.any(dim=2).any(dim=1).expand(batch, -1)

    @property
    def last_row(self) -> Bool[Tensor, "#batch #heads length"] | None:
        """Mask of the entries that the last query may read; ``None`` for all."""
        return None if self.mask is None else self.mask[:, :, -1]

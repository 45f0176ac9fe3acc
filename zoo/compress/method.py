"""Hooks of a method of `zoo.compress.apply`, and when each is called."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zoo.compress.anatomy import Anatomy
from zoo.errors import InputError

Compat = Literal["official"]
Positions = Literal["keep", "renumber"]

# Attribute under which a model knows its `zoo.compress.Handle`, image features their `Encoding` and a cache what it holds.
HANDLE = "_zoo_compress"


@dataclass
class Reduced:
    """Features of views on their way to the projector, fewer than there were.

    Attributes:
        features: of every view; rows with fewer tokens are padded on the right.
        valid: which are tokens, all by default.
        anchor: patch that each stands at, all different within a view; for models that lay views out on a canvas.
        source: patch to report, -1 for none; the anchor by default.
        protected: tokens that later stages keep.
    """

    features: Float[Tensor, "views kept dim"]
    valid: Bool[Tensor, "views kept"] | None
    anchor: Int[Tensor, "views kept"]
    source: Int[Tensor, "views kept"] | None = None
    protected: Bool[Tensor, "views kept"] | None = None


@dataclass
class Encoding:
    """One run of the vision tower, as the method sees it.

    Attributes:
        queries: of [CLS], by watched layer.
        keys: of all tokens, by watched layer.
        hidden: outputs of watched layers, [CLS] first.
        valid: tokens that aren't padding, [CLS] first, once a method has merged some.
        anchor: patch that each token but [CLS] stands at, likewise.
        size: patches that each token stands for, [CLS] first, likewise.
        bias: added to the attention logits of each key from here on.
        single: patches that went to the projector, for methods with a projector of their own.
        reduced: what went to the projector.
        present: places of views that a token took, after the projector.
        sources: for `zoo.compress.Stats`: one tensor per view until views are packed, then one per image.
        protected: tokens that later stages keep: likewise, over the placeholders.
    """

    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    valid: Tensor | None = None
    anchor: Tensor | None = None
    size: Tensor | None = None
    bias: Tensor | None = None
    single: Tensor | None = None
    reduced: Reduced | None = None
    present: Tensor | None = None
    sources: list[Tensor] = field(default_factory=list)
    protected: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts at some depth of the language model, padded on the left.

    Attributes:
        index: position of each token in the caller's sequence; distinct within a row.
        valid: tokens; the rest is padding.
        positions: for the rotary embedding; models with several position axes have them in front.
        visual: tokens of images.
        protected: visual tokens that stages keep.
        placeholders: visual tokens of each row before any went.
    """

    index: Int[Tensor, "batch length"]
    valid: Bool[Tensor, "batch length"]
    positions: Int[Tensor, "*axes batch length"]
    visual: Bool[Tensor, "batch length"]
    protected: Bool[Tensor, "batch length"]
    placeholders: Int[Tensor, " batch"]

    def take(self, order: Int[Tensor, "batch kept"], valid: Bool[Tensor, "batch kept"], *, renumber: bool) -> Prompt:
        """The prompt with the tokens at ``order``.

        ``renumber`` gives them the first positions instead of their own. With several axes, which place a token in its image,
        they always keep their own.
        """
        kept = order
        if renumber and self.positions.ndim == 2:
            first = (~self.valid).to(torch.uint8).argsort(dim=1, stable=True)
            kept = first.gather(1, (valid.cumsum(1) - 1).clamp(min=0))
        return replace(
            self,
            index=self.index.gather(1, order),
            valid=valid,
            positions=self.positions.gather(-1, kept.expand(*self.positions.shape[:-1], -1)),
            visual=self.visual.gather(1, order) & valid,
            protected=self.protected.gather(1, order) & valid,
        )


class Method:
    """A method; a subclass overrides the stages that it has and leaves the others alone.

    Attributes:
        watched: tower layers whose [CLS] query and keys are recorded.
        states: tower layers whose outputs are recorded.
        merged: tower layers after which `merge` is called.
        reduces: `reduce` is called before the projector.
        packs: `pack` lays out the views of a LLaVA-NeXT image.
        completes: `complete` is called with the embedded prompt.
        pruned: language model layers after which `choose` is called.
        rows: whose attention `choose` gets: the last token's or that of the text after the last image.
        renumbers: tokens that stay get the first positions instead of keeping their own.
        evicts: caches of layers up to the last pruned one give up what went later.
        positions: the user's wish for all tokens that stay, instead of the method's own way.
    """

    needs_cls: ClassVar[bool] = False
    needs_tower: ClassVar[bool] = False
    watched: tuple[int, ...] = ()
    states: tuple[int, ...] = ()
    merged: tuple[int, ...] = ()
    reduces: bool = False
    packs: bool = False
    completes: bool = False
    pruned: tuple[int, ...] = ()
    rows: Literal["last", "text"] = "last"
    renumbers: bool = False
    evicts: bool = False
    positions: Positions | None = None

    @property
    def idle(self) -> bool:
        """Whether the model is to be left as it is."""
        return False

    def bind(self, anatomy: Anatomy) -> None:
        """Settles what depends on the model.

        Raises:
            InputError: options or a model that the method cannot work with.
        """
        if anatomy.tower is None and (self.needs_cls or self.needs_tower):
            kind = type(anatomy.model).__name__
            raise InputError(f"{type(self).__name__} acts on the vision tower, which works for LLaVA models, not {kind}")
        if self.needs_cls and not anatomy.has_cls:
            raise InputError(f"{type(self).__name__} needs a vision tower with a [CLS] token, as CLIP has")

    def merge(self, layer: int, hidden: Tensor, encoding: Encoding) -> Tensor:
        """Shortens the output of a tower layer, [CLS] first; keeps ``encoding.valid`` and ``encoding.anchor`` in step."""
        return hidden

    def reduce(self, features: Tensor, encoding: Encoding) -> Reduced:
        """Shortens what goes to the projector, ``[views, tokens, dim]`` without [CLS]."""
        raise NotImplementedError

    def pack(
        self, features: list[Tensor], sizes: list[tuple[int, int]], newline: Tensor | None, encoding: Encoding
    ) -> list[Tensor]:
        """Lays out the projected views ``[views, tokens, dim]`` of each image; fills ``encoding.sources``."""
        raise NotImplementedError

    def complete(self, embeds: Tensor, visual: Tensor, input_ids: Tensor | None, encoding: Encoding) -> Tensor:
        """Fills in visual tokens that need the prompt."""
        return embeds

    def before(self, prompt: Prompt) -> Bool[Tensor, "batch length"] | None:
        """Marks the visual tokens that enter the language model; ``None`` for all."""
        return None

    def choose(
        self,
        stage: int,
        attention_sum: Float[Tensor, "batch length"],
        attention_max: Float[Tensor, "batch length"],
        prompt: Prompt,
    ) -> Bool[Tensor, "batch length"]:
        """Marks the visual tokens that stay after a pruned layer, given the attention of the rows to each token."""
        raise NotImplementedError


def kept_counts(total: Int[Tensor, " batch"], share: float) -> Int[Tensor, " batch"]:
    """A share of numbers of tokens, rounded, at least 1."""
    return (total.double() * share + 0.5).long().clamp(min=1)


def options_error(method: str, error: TypeError) -> InputError:
    """The error for options that a method does not have."""
    return InputError(f"{method}: {str(error).replace('__init__() ', '').split('.')[-1]}")


def as_hidden(output: Any) -> Tensor:
    """Hidden states of a layer's output, which some versions wrap in a tuple."""
    return output[0] if isinstance(output, tuple) else output

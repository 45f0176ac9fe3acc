"""`apply` puts a method into a model as hooks, `remove` takes them out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from importlib import import_module
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from zoo.compress.anatomy import Anatomy, anatomy_of
from zoo.compress.eager import eagerly, forget_compiled, refuse_compiled, refuse_recomputation, run_eagerly
from zoo.compress.kv.attach import has_policy
from zoo.compress.language import PromptShortener
from zoo.compress.method import HANDLE, Encoding, Method, Positions, Reduced, options_error
from zoo.compress.methods import METHODS
from zoo.compress.override import ChunkedPrompts, Override
from zoo.compress.stats import Stats
from zoo.errors import InputError


class Handle:
    """A method in a model; leaving it as a context manager takes the method out.

    Attributes:
        model: the user's model.
        name: of the method.
        method: with its options settled for the model.
    """

    def __init__(self, model: Any, name: str, method: Method) -> None:
        self.model, self.name, self.method = model, name, method
        self._anatomy = anatomy_of(model)
        method.bind(self._anatomy)
        if method.packs and method.positions == "keep":
            raise InputError(f"{name} lays out views anew, so that their tokens cannot keep positions")
        self._shortener = PromptShortener(self._anatomy, method)
        self._tower = _TowerHooks(self._anatomy, method, self._shortener)
        refuse_compiled(self._anatomy.hooked)
        self._hooks: list[Any] = [Override(model, "generate", ChunkedPrompts(model))]
        self._hooks.extend(run_eagerly(part) for part in (self._anatomy.core, *self._anatomy.hooked))
        try:
            self._hooks.extend(self._shortener.hooks())
            self._hooks.extend(self._tower.hooks())
        except InputError:
            self._detach()
            raise
        setattr(model, HANDLE, self)
        forget_compiled()

    @property
    def stats(self) -> Stats:
        """Record of what the method did to the last prompt with an image.

        Raises:
            InputError: no such prompt yet.
        """
        stats = self._shortener.stats
        if stats is None:
            raise InputError("no prompt with an image has been read yet")
        return stats

    def image_features(self, pixel_values: Tensor, **inputs: Any) -> list[Tensor]:
        """The visual tokens of each image that enter the language model, ``[tokens, dim]``.

        Args:
            pixel_values: as for the model.
            inputs: further inputs of the model's ``get_image_features``, such as ``image_sizes``.
        """
        encoded = self._anatomy.core.get_image_features(pixel_values=pixel_values, return_dict=True, **inputs)
        return [features[~features.isnan().all(-1)] for features in encoded.pooler_output]

    def bypassed(self) -> AbstractContextManager[None]:
        """The language model without the method, for as long as the context lasts."""
        return self._shortener.bypassed()

    def remove(self) -> None:
        """Leaves the model as it was before."""
        self._detach()
        if getattr(self.model, HANDLE, None) is self:
            delattr(self.model, HANDLE)

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        forget_compiled()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<{self.name} in {type(self.model).__name__}>"


class _TowerHooks:
    """Hooks of the vision tower, the projector and the packing of views.

    Image features keep the length that placeholders have been made for. Rows without a token are NaN, which
    `PromptShortener` takes out.
    """

    def __init__(self, anatomy: Anatomy, method: Method, shortener: PromptShortener) -> None:
        self.anatomy, self.method, self.shortener = anatomy, method, shortener

    @property
    def _encoding(self) -> Encoding:
        return self.shortener.call.tower

    def hooks(self) -> Iterator[Any]:
        anatomy, method = self.anatomy, self.method
        if not (method.merged or method.reduces or method.packs):
            return
        yield anatomy.tower.register_forward_pre_hook(self._start)
        yield anatomy.tower.register_forward_hook(self._finish)
        for index in method.watched:
            attention = anatomy.tower_layers[index].self_attn
            yield attention.q_proj.register_forward_hook(partial(self._record_query, index))
            yield attention.k_proj.register_forward_hook(partial(self._record_keys, index))
        if method.merged:
            for index in range(method.merged[0] + 1, len(anatomy.tower_layers)):
                yield anatomy.tower_layers[index].register_forward_pre_hook(self._mask, with_kwargs=True)
        for index in sorted({*method.merged, *method.states}):
            yield anatomy.tower_layers[index].register_forward_hook(partial(self._after_layer, index), prepend=True)
        if method.reduces:
            yield anatomy.projector.register_forward_pre_hook(self._reduce)
            yield anatomy.projector.register_forward_hook(self._lay_out)
        if anatomy.views:
            yield Override(anatomy.core, "pack_image_features", self._pack)

    @eagerly
    def _start(self, tower: Any, args: Any) -> None:
        if self.method.merged or self.method.watched or self.method.states:
            refuse_recomputation(tower)
        self.shortener.call.tower = Encoding()

    @eagerly
    def _finish(self, tower: Any, args: Any, output: Any) -> None:
        """Lets the encoding travel with the features, and tells the language model's hooks of it."""
        setattr(output, HANDLE, self._encoding)
        self.shortener.call.encoding = self._encoding

    def _record_query(self, layer: int, module: nn.Module, args: Any, output: Tensor) -> None:
        self._encoding.queries[layer] = output[:, 0]

    def _record_keys(self, layer: int, module: nn.Module, args: Any, output: Tensor) -> None:
        self._encoding.keys[layer] = output

    def _after_layer(self, layer: int, module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if layer in self.method.merged:
            if self._encoding.anchor is None and hidden.shape[1] != 1 + self.anatomy.patches:
                rows, columns = self.anatomy.grid
                raise InputError(f"{hidden.shape[1] - 1} patches, where the model's images have {rows} x {columns}")
            hidden = self.method.merge(layer, hidden, self._encoding)
        if layer in self.method.states:
            self._encoding.hidden[layer] = hidden
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hides padding from the attention of the layers after a merge, and adds the method's bias."""
        from transformers.masking_utils import create_bidirectional_mask

        encoding, config = self._encoding, self.anatomy.tower.config
        hidden = args[0] if args else kwargs["hidden_states"]
        if encoding.bias is not None:
            mask: Any = encoding.bias.to(hidden.dtype)[:, None, None].expand(-1, 1, hidden.shape[1], -1)
        elif encoding.valid is not None:
            mask = create_bidirectional_mask(config=config, inputs_embeds=hidden, attention_mask=encoding.valid.long())
        else:
            return None
        if len(args) > 1:
            return (args[0], mask, *args[2:]), kwargs
        return args, {**kwargs, "attention_mask": mask}

    @eagerly
    def _reduce(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self._encoding.reduced = reduced = self.method.reduce(args[0], self._encoding)
        return (reduced.features, *args[1:])

    @eagerly
    def _lay_out(self, module: nn.Module, args: Any, projected: Tensor) -> Tensor:
        """Brings projected tokens to the length of a view: the first places, or their own where views lie on a canvas."""
        reduced = cast(Reduced, self._encoding.reduced)
        views, kept = projected.shape[:2]
        valid = torch.ones_like(reduced.anchor, dtype=torch.bool) if reduced.valid is None else reduced.valid
        if kept > self.anatomy.patches:
            raise InputError(f"{kept} tokens for a view of {self.anatomy.patches} placeholders")
        place = torch.arange(kept, device=projected.device).expand(views, kept)
        if self.method.positions == "keep" or (self.anatomy.views and not self.method.packs):
            place = _places(reduced.anchor, valid, self.anatomy.patches)
        source = reduced.anchor if reduced.source is None else reduced.source
        offset = torch.arange(views, device=projected.device)[:, None] * self.anatomy.patches
        protected = torch.zeros_like(valid) if reduced.protected is None else reduced.protected
        encoding = self._encoding
        encoding.present = self._spread(valid, place, valid, False)
        encoding.sources = list(self._spread(torch.where(source < 0, -1, source + offset), place, valid, -1))
        encoding.protected = list(self._spread(protected, place, valid, False))
        features = self._spread(projected, place, valid, torch.nan)
        if not self.anatomy.views:
            encoding.sources = [part[mark] for part, mark in zip(encoding.sources, encoding.present, strict=True)]
        return features

    def _spread(self, tokens: Tensor, place: Tensor, valid: Tensor, fill: Any) -> Tensor:
        full = tokens.new_full((len(tokens), self.anatomy.patches, *tokens.shape[2:]), fill)
        shape = (*place.shape, *[1] * (tokens.ndim - 2))
        tokens = tokens.masked_fill(~valid.view(shape), fill)
        return full.scatter(1, place.view(shape).expand_as(tokens), tokens)

    def _pack(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Packs the views of LLaVA-NeXT images."""
        names = ("image_features", "image_sizes", "vision_feature_select_strategy", "image_newline")
        kwargs.update(zip(names, args, strict=False))
        image_features, image_sizes = kwargs.pop("image_features"), kwargs.pop("image_sizes")
        newline = kwargs.pop("image_newline", None)

        def pack(values: Sequence[Tensor], mark: Tensor | None) -> tuple[list[Tensor], Tensor]:
            return cast("tuple[list[Tensor], Tensor]", original(values, image_sizes, image_newline=mark, **kwargs))

        if not self.method.packs:
            return self._pack_as_before(pack, image_features, newline)
        lengths = pack([features[..., :1] for features in image_features], None if newline is None else newline[:1])[1]
        sizes = [(int(height), int(width)) for height, width in torch.as_tensor(image_sizes).tolist()]
        packed = self.method.pack(list(image_features), sizes, newline, self._encoding)
        protected, counts = self._encoding.protected, lengths.tolist()
        self._encoding.protected = [_lengthen(part, count, False) for part, count in zip(protected, counts, strict=False)]
        return [_lengthen(part, count, torch.nan) for part, count in zip(packed, counts, strict=True)], lengths

    def _pack_as_before(
        self, pack: Callable[..., tuple[list[Tensor], Tensor]], image_features: Any, newline: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """The model's own packing, which takes what is known of the tokens along with them."""
        encoding, views = self._encoding, [len(features) for features in image_features]

        def pack_marks(values: list[Tensor], at_newline: float) -> list[Tensor]:
            marks = torch.stack(values)[..., None].float()
            line = None if newline is None else marks.new_full((1,), at_newline)
            return [part[:, 0].long() for part in pack(marks.split(views), line)[0]]

        packed, lengths = pack(image_features, newline)
        encoding.protected = [marks > 0 for marks in pack_marks(encoding.protected, 0)]
        sources = pack_marks(encoding.sources, -1)
        encoding.sources = [part[~features.isnan().all(-1)] for part, features in zip(sources, packed, strict=True)]
        return packed, lengths


def _lengthen(tokens: Tensor, length: int, fill: Any) -> Tensor:
    """Tokens brought to the number of their placeholders."""
    if len(tokens) > length:
        raise InputError(f"{len(tokens)} tokens after compression, but {length} placeholders in the prompt")
    return torch.cat([tokens, tokens.new_full((length - len(tokens), *tokens.shape[1:]), fill)])


def _places(anchor: Tensor, valid: Tensor, patches: int) -> Tensor:
    """Where tokens and padding go within a view, all different: tokens to their anchors, padding to free patches."""
    taken = torch.zeros(len(anchor), patches + 1, dtype=torch.bool, device=anchor.device)
    taken.scatter_(1, torch.where(valid, anchor, patches), True)
    free = taken[:, :patches].to(torch.uint8).argsort(dim=1, stable=True)
    spare = (~valid).cumsum(1) - 1
    return torch.where(valid, anchor, free.gather(1, spare.clamp(0, patches - 1)))


def apply(model: Any, method: str, *, keep: float | None = None, positions: str | None = None, **options: Any) -> Handle:
    """Puts a method into a vision-language model; ``generate`` and ``forward`` of the model are used as before.

    Args:
        model: ``LlavaForConditionalGeneration`` or ``LlavaNextForConditionalGeneration`` of transformers, as it was loaded.
        method: a name from `zoo.compress.METHODS`.
        keep: share of visual tokens to keep, in (0, 1]; the method's own setting by default. 1 leaves everything as it is.
        positions: ``"keep"`` leaves every token that stays at its position in the full prompt, ``"renumber"`` closes the gaps.
            By default what leaves before the language model leaves no gap, as published, and what leaves within it does where
            the method says so. Qwen's tokens always keep theirs.
        options: of the method, see its class.

    Returns:
        A handle with ``stats`` and ``remove()``; as a context manager it takes the method out at the end.

    Raises:
        InputError: an unknown method or option, a share out of range, a class of model that isn't supported, a model that is
            compressed already, options that don't fit the model, or a method that cuts the cache in a model with a policy of
            `zoo.compress.kv`.
    """
    if method not in METHODS:
        raise InputError(f"no method {method!r}; there are {', '.join(METHODS)}")
    if keep is not None and not 0 < keep <= 1:
        raise InputError(f"the share of visual tokens to keep must be in (0, 1], not {keep}")
    if positions not in (None, "keep", "renumber"):
        raise InputError(f"positions can be 'keep' or 'renumber', not {positions!r}")
    if isinstance(getattr(model, HANDLE, None), Handle):
        raise InputError(f"the model is compressed already ({getattr(model, HANDLE).name}); zoo.compress.remove(model) first")
    module, _, name = METHODS[method].home.partition(":")
    kind: type[Method] = getattr(import_module(module), name)
    try:
        settled = kind(keep=keep, **options)  # type: ignore[call-arg]  # every method takes the share it keeps
    except TypeError as error:
        raise options_error(method, error) from error
    if positions is not None:
        settled.positions, settled.renumbers = cast(Positions, positions), positions == "renumber"
    handle = Handle(model, method, Method() if settled.idle else settled)
    if handle.method.evicts and has_policy(model):
        handle.remove()
        raise InputError(f"{method} cuts the cache itself: it does not go together with a policy")
    return handle


def remove(model: Any) -> None:
    """Takes the method of `apply` out of the model, which is then as before, bit for bit.

    Raises:
        InputError: there is none.
    """
    handle = getattr(model, HANDLE, None)
    if not isinstance(handle, Handle):
        raise InputError("the model has not been compressed")
    handle.remove()

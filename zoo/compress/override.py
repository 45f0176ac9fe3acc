"""Methods of an object that run through something else for a while, and what `generate` says of its prompt meanwhile."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

_PROMPT: ContextVar[int | None] = ContextVar("prompt", default=None)


class Override:
    """A method of one object that calls a wrapper instead, until `remove`.

    Overrides of the same method may be removed in any order. They are objects rather than closures, so that a copy of the
    owner, made by ``copy.deepcopy`` or ``pickle``, has overrides of its own.

    Args:
        owner: the object.
        name: of its method.
        wrapper: called with the method as it was before, and with the arguments.
    """

    def __init__(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        self.owner, self.name, self.wrapper = owner, name, wrapper
        self.covered: Callable[..., Any] | None = vars(owner).get(name)
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapper(self._before, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the method: transformers asks which arguments there are."""
        return inspect.signature(self.covered or getattr(type(self.owner), self.name).__get__(self.owner))

    def _before(self, *args: Any, **kwargs: Any) -> Any:
        if self.covered is not None:
            return self.covered(*args, **kwargs)
        return getattr(type(self.owner), self.name)(self.owner, *args, **kwargs)

    def remove(self) -> None:
        """Uncovers the method."""
        top = vars(self.owner).get(self.name)
        if top is self:
            delattr(self.owner, self.name)
            if self.covered is not None:
                setattr(self.owner, self.name, self.covered)
            return
        while isinstance(top, Override):
            if top.covered is self:
                top.covered = self.covered
                return
            top = top.covered


class ChunkedPrompts:
    """Wrapper of a model's ``generate`` that remembers how long the prompt is while it is read in chunks."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(
        self,
        generate: Callable[..., Any],
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        settings = (generation_config, self.model.generation_config)
        sizes = [kwargs.get("prefill_chunk_size"), *(getattr(part, "prefill_chunk_size", None) for part in settings)]
        given = [inputs, *(kwargs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))]
        lengths = [part.shape[1] for part in given if isinstance(part, Tensor) and part.ndim > 1]
        chunked = any(size is not None for size in sizes) and lengths
        with prompt_of(max(lengths) if chunked else None):
            return generate(inputs, generation_config, *args, **kwargs)


@contextmanager
def prompt_of(length: int | None) -> Iterator[None]:
    """Calls of a model within the context are parts of one prompt, until its cache has seen ``length`` tokens."""
    token = _PROMPT.set(length)
    try:
        yield
    finally:
        _PROMPT.reset(token)


def chunked_prompt() -> int | None:
    """Tokens of the prompt that is being read in chunks, those already in the cache included; ``None`` without chunks."""
    return _PROMPT.get()

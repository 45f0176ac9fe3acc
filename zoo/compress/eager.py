"""Hooks beside the ways in which PyTorch runs a model: compiled, or with layers computed again for gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from zoo.compress.override import Override
from zoo.errors import InputError

FunctionT = TypeVar("FunctionT")


def eagerly(function: FunctionT) -> FunctionT:
    """A function that `torch.compile` calls whole, instead of tracing it."""
    return torch.compiler.disable(function)


def run_eagerly(part: Any) -> Override:
    """Has a part of a model run without `torch.compile`, until ``remove``.

    Compiled code of one layer is used for others that look like it, and whether they have hooks is not looked at. Hooks work on
    the state of a call as well, so that a compiled part would be broken into pieces anyway.
    """
    return Override(part, "forward", _call)


@eagerly
def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def forget_compiled() -> None:
    """Has models compiled anew: code made before hooks came or went runs as if nothing had changed."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def refuse_compiled(parts: Iterable[Any]) -> None:
    """Checks that no layer of these parts has been compiled by itself.

    Raises:
        InputError: one has been; names it.
    """
    for part in parts:
        for name, module in part.named_modules():
            if "_orig_mod" in module._modules or (name and module._compiled_call_impl is not None):
                raise InputError(
                    f"{name or type(module).__name__} is compiled by itself, and compiled layers pass over what a method does "
                    "between them: compile the whole model, torch.compile(model), or nothing"
                )


def refuse_recomputation(part: Any) -> None:
    """Checks that the layers of a part run once, because hooks between them cannot follow a second run.

    Raises:
        InputError: gradients are taken with checkpoints.
    """
    if not (part.training and part.is_gradient_checkpointing and torch.is_grad_enabled()):
        return
    if any(parameter.requires_grad for parameter in part.parameters()):
        raise InputError(
            "gradient checkpointing computes layers twice, which a method that works within them cannot follow: call "
            "model.gradient_checkpointing_disable() first"
        )

"""Options of a tokenizer's methods, as somebody gives them who knows their names alone: a command line, a plan."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from zoo.errors import ArgumentError


def names_of(method: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the options that a method takes."""
    parameters = inspect.signature(method).parameters.values()
    return tuple(own.name for own in parameters if own.kind is inspect.Parameter.KEYWORD_ONLY and own.name != "progress")


def require_values(method: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Refuse values of other types than the options of a method have.

    Args:
        method: of a tokenizer.
        given: plain values by the names of options, as JSON has them.

    Raises:
        ArgumentError: there is one; names the option.

    >>> require_values(zoo.load("genome-tiny").encode, {"case": "lower"})
    Traceback (most recent call last):
    zoo.errors.ArgumentError: the option case must not be 'lower': input should be 'upper' or 'keep'
    """
    kinds = get_type_hints(method) if given else {}
    for name, value in given.items():
        kind = TypeAdapter(kinds[name], config=ConfigDict(strict=True, arbitrary_types_allowed=True))
        try:
            kind.validate_json(json.dumps(value))
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ArgumentError(f"the option {name} must not be {value!r}: {reason[:1].lower()}{reason[1:]}") from error

"""Strings as bytes of UTF-8."""

from __future__ import annotations

from zoo.errors import InputError


def utf8(text: str) -> bytes:
    """The bytes of a string.

    Raises:
        InputError: it holds a lone surrogate, which UTF-8 has no bytes for; names its index.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the character at index {error.start} is the lone surrogate U+{ord(text[error.start]):04X}, which has no bytes in "
            "UTF-8"
        ) from error

"""Fuzz target of ``.zt`` files: whatever the bytes are, they load as sound tokens or raise an error of the zoo."""

from __future__ import annotations

from zoo.errors import ZooError
from zoo.tokens import Tokens


def target(data: bytes) -> None:
    """Read bytes as a file; what loads is written, read and written again, and stays the same."""
    try:
        tokens = Tokens.from_bytes(data)
    except ZooError:
        return
    assert all(not len(row) or 0 <= int(row.min()) <= int(row.max()) < tokens.vocab_size for row in tokens.unpadded())
    written = tokens.to_bytes()
    again = Tokens.from_bytes(written)
    assert again.equal(tokens) and again.tokenizer == tokens.tokenizer
    assert again.to_bytes() == written

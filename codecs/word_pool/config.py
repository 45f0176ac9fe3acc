"""Settings of front ends that pool bytes by words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from zoo.errors import InputError

Boundaries = Literal["hat", "tfree", "whitespace"]
Pool = Literal["none", "cross_attention", "cls", "hash_sum"]
Spelling = Literal["none", "prefix_word", "subword"]
Normed = Literal["none", "whole", "head"]

BOUNDARIES: tuple[Boundaries, ...] = ("hat", "tfree", "whitespace")
POOLS: tuple[Pool, ...] = ("none", "cross_attention", "cls", "hash_sum")
SPELLINGS: tuple[Spelling, ...] = ("none", "prefix_word", "subword")


@dataclass(frozen=True)
class WordPoolConfig:
    """Settings of a front end.

    Attributes:
        boundaries: how words are split.
        limit: bytes of the longest word; 0 for no limit.
        pool: what makes vectors of words. ``"cross_attention"``: byte layers, and one query for each word over its own bytes
            (HAT, Byte2Word); ``"cls"``: a transformer over each word behind vectors of its own (Learn Your Tokens);
            ``"hash_sum"``: rows of a table (T-Free).
        decoder: what reads a word's vectors. ``"prefix_word"`` writes its bytes behind them (Learn Your Tokens); ``"subword"``
            gives scores of a vocabulary (Byte2Word).
        dim: width of a word's vector; 0 without a pool.
        byte_layers: settings of ``transformers.MistralConfig`` for the layers below ``"cross_attention"``.
        heads: of attention in the pool, and of ``"prefix_word"``.
        kv_heads: of keys and values in ``"cross_attention"``; ``None`` for as many as ``heads``.
        inner: width of ``"cross_attention"`` between its projections; ``None`` for ``dim``.
        normed: what ``"cross_attention"`` normalises in queries and keys: their whole width, each head, or nothing.
        vectors: of a word, in ``"cls"``.
        layers, hidden: of ``"cls"`` and ``"prefix_word"``.
        vocabulary: rows of the table of ``"hash_sum"``, or scores of ``"subword"``.
        population, lowercase: ids of a trigram, and those that it shares with its lower case, in ``"hash_sum"``.
    """

    boundaries: Boundaries = "hat"
    limit: int = 100
    pool: Pool = "none"
    decoder: Spelling = "none"
    dim: int = 0
    byte_layers: Mapping[str, Any] = field(default_factory=dict)
    heads: int = 4
    kv_heads: int | None = None
    inner: int | None = None
    normed: Normed = "none"
    vectors: int = 1
    layers: int = 2
    hidden: int = 256
    vocabulary: int = 32_000
    population: int = 10
    lowercase: int = 2

    def __post_init__(self) -> None:
        for name, known in (("boundaries", BOUNDARIES), ("pool", POOLS), ("decoder", SPELLINGS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.limit < 0:
            raise InputError(f"limit is a number of bytes, or 0 for none, not {self.limit}")
        if (self.pool == "none") != (self.dim == 0):
            raise InputError(f"a pool has a width, and only a pool: {self.pool!r} does not go with dim={self.dim}")
        if self.decoder != "none" and self.pool == "none":
            raise InputError(f"the decoder {self.decoder!r} needs the vectors of a pool")
        if not self.limit and (self.pool in ("cross_attention", "cls") or self.decoder == "prefix_word"):
            raise InputError("networks over the bytes of a word need a limit of its length")
        if self.vectors != 1 and self.pool != "cls":
            raise InputError(f"a word has one vector in the pool {self.pool!r}, not {self.vectors}")

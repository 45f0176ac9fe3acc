"""Text tokenizers: megabytes of UTF-8 a second, or megabases of a genome, beside the library's own way."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from zoo import hub, registry
from zoo.bench.measure import Job, random_model
from zoo.tokenizer import Tokenizer

UNIT = "MB"
# ``lengths`` in bytes of a text.
CASES: dict[str, Any] = {"batches": (1, 8), "lengths": ()}

_LETTERS = {"genome": "ACGT"}
#: Bytes of a text unless others are asked for.
_LENGTH = {"genome": 1_000_000, "mrt5": 1_024}
#: Share of the bytes that MrT5 keeps beside all of them.
_KEPT = 0.5


def jobs(entry: registry.Entry, device: str, peers: bool, batches: Sequence[int], lengths: Sequence[int]) -> Iterator[Job]:
    """Everything to measure: encoding, decoding and vectors, then the library on whole sequences, or MrT5 with every byte."""
    tokenizer = _model(entry, device)
    for length in lengths or (_LENGTH.get(entry.family, 100_000),):
        for batch in batches:
            texts = random_texts(entry.family, [length] * batch)
            case, amount = f"{batch} x {length} bytes", batch * length / 1e6
            options = {"keep": _KEPT} if entry.family == "mrt5" else {}
            tokens = tokenizer.encode(texts, **options)
            yield Job(entry.name, "encode", case, amount, partial(tokenizer.encode, texts, **options))
            yield Job(entry.name, "decode", case, amount, partial(tokenizer.decode, tokens))
            if tokenizer.spec.dim and tokenizer.parts != ("ids",):
                yield Job(entry.name, "embed", case, amount, partial(tokenizer.embed, tokens))
            if not peers:
                continue
            if entry.family == "genome":
                whole = partial(library_ids, tokenizer, texts)
                yield Job("tokenizers, whole sequences", "encode", case, amount, whole)
            if entry.family == "mrt5":
                everything = tokenizer.encode(texts, keep=1.0)
                yield Job(f"{entry.name}, nothing deleted", "embed", case, amount, partial(tokenizer.embed, everything))


def _model(entry: registry.Entry, device: str) -> Any:
    """The model of an entry: random numbers where these decide nothing, and its own file where that holds merges."""
    if entry.family == "genome":
        return hub.load(entry.name, device=device, parts="ids")
    return hub.load(entry.name, device=device) if entry.embedded else random_model(entry, device)


def library_ids(tokenizer: Any, texts: Sequence[str]) -> list[torch.Tensor]:
    """Ids of whole sequences, each in one call of `tokenizers`."""
    return [torch.tensor(tokenizer.merges.library.encode(text, add_special_tokens=False).ids) for text in texts]


def items(tokenizer: Tokenizer[Any], count: int) -> list[str]:
    """Input of a comparison of two releases."""
    return random_texts(tokenizer.family, [_LENGTH.get(tokenizer.family, 100_000) // 10] * count)


def random_texts(family: str, lengths: Sequence[int]) -> list[str]:
    """Random letters, of a genome or in words."""
    letters = _LETTERS.get(family, "etaoinshrdlu ,.\n")
    generator = random.Random(0)
    return ["".join(generator.choices(letters, k=length)) for length in lengths]

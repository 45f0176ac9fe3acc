"""Sizes of a model of genomes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GenomeConfig:
    """Sizes of a model, which its files decide.

    Attributes:
        vocab_size: ids lie below it.
        dim: width of the checkpoint's vectors; 0 where none are published, or registered.
        file_bytes: length of ``tokenizer.json``, which the model holds as it is.
        parts: ``ids``, and ``vectors`` for `embed`, which are a checkpoint of its own.
    """

    vocab_size: int = 4096
    dim: int = 0
    file_bytes: int = 0
    parts: tuple[str, ...] = ("ids",)

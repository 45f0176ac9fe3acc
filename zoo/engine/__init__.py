"""Whole data sets to token files: ``zoo tokenize``.

A run lists its sources, cuts the list into units and writes one Parquet file for each, which is there whole or not at all. The
engine is a scheduler: what is read, prepared and encoded is the tokenizer's own (`zoo.Tokenizer.prepare` and
``encode_prepared``), so ids are those that each item gets alone.
"""

from __future__ import annotations

from zoo.errors import MissingExtraError

try:
    import pyarrow  # noqa: F401
except ImportError as error:
    raise MissingExtraError("token data sets need pyarrow: pip install 'tokenizer-zoo[engine]'") from error

from zoo.engine.run import Summary, tokenize
from zoo.engine.work import WorkerError

__all__ = ["Summary", "WorkerError", "tokenize"]

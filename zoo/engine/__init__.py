"""Whole data sets to token files, and these to rows for training: ``zoo tokenize`` and ``zoo pack``.

A run lists its sources, cuts the list into units and writes one Parquet file for each, which is there whole or not at all. The
engine is a scheduler: what is read, prepared and encoded is the tokenizer's own (`zoo.Tokenizer.prepare` and
``encode_prepared``), so ids are those that each item gets alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zoo.errors import MissingExtraError

if TYPE_CHECKING:
    from zoo.engine.dataset import TokenDataset
    from zoo.engine.packing import PackSummary, pack
    from zoo.engine.run import Summary, tokenize
    from zoo.engine.work import WorkerError

# Where each public name lives.
_HOMES = {
    "PackSummary": "zoo.engine.packing",
    "Summary": "zoo.engine.run",
    "TokenDataset": "zoo.engine.dataset",
    "WorkerError": "zoo.engine.work",
    "pack": "zoo.engine.packing",
    "tokenize": "zoo.engine.run",
}

__all__ = ["PackSummary", "Summary", "TokenDataset", "WorkerError", "pack", "tokenize"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zoo.engine' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("pyarrow"):
            raise
        raise MissingExtraError("token data sets need pyarrow: pip install 'tokenizer-zoo[engine]'") from error

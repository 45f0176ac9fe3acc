"""Tokenizers: the contract, and a base class for each kind of media that makes the trip for its families."""

from zoo.errors import listing, naming_item
from zoo.moved import names_of
from zoo.progress import progress_bar
from zoo.tokenizer.base import (
    PRECISIONS,
    Budget,
    Prepared,
    Tokenizer,
    as_items,
    groups_of_equals,
    groups_of_similar_length,
    precision_named,
    runs_of_equals,
)

__all__ = [
    "PRECISIONS",
    "Budget",
    "Prepared",
    "Tokenizer",
    "as_items",
    "groups_of_equals",
    "groups_of_similar_length",
    "listing",
    "naming_item",
    "precision_named",
    "progress_bar",
    "runs_of_equals",
]


#: Names of the former module, for one release.
__getattr__ = names_of(__name__, {"ConfigT": "zoo.tokenizer.base", "require_complete": "zoo.checkpoint"})

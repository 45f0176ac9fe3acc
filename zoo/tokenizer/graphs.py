"""Halves of a tokenizer as plain functions of tensors: what `zoo.export` writes for programs that have no PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Port:
    """A tensor that goes into a graph or comes out of one.

    Attributes:
        name: of the tensor.
        axes: its shape; a number is a size, and a name stands for any size.
    """

    name: str
    axes: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """One half of a tokenizer as a function from one tensor to another.

    Attributes:
        module: the function, in float32, of tensors of any size that ``takes`` allows.
        takes, gives: what goes in and comes out.
        trials: inputs of several sizes that are checked after the export; the first one is what the module is traced with.
        answer: what the tokenizer itself gives for an input.
    """

    module: nn.Module
    takes: Port
    gives: Port
    trials: Sequence[Tensor]
    answer: Callable[[Tensor], Tensor]


#: By the name of the half, ``encoder`` or ``decoder``: its graph, or why there is none.
Graphs = Mapping[str, Graph | str]

"""Token data sets as streams for training: every item once over all ranks and workers, resumable at any item."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import distributed
from torch.utils.data import IterableDataset, get_worker_info

from zoo.engine.selection import Item, Selection
from zoo.engine.shelf import Rows
from zoo.errors import ArgumentError, MismatchError

#: Items, and ids, that are shuffled among each other in memory.
WINDOW_ITEMS = 16 << 10
WINDOW_IDS = 32 << 20

_VERSION = 1


class TokenStream(IterableDataset[Item]):
    """The items of a data set, each once over all ranks and all workers of their loaders.

    The whole order is cut into equal stretches, one for each rank, and each of them into one for each worker, so ranks differ
    by one item at most. Shuffling orders blocks of the files at random, then the items of several blocks among each other
    (`WINDOW_ITEMS`, `WINDOW_IDS`); the order depends on the data set, the seed and the epoch alone.

    ``state_dict`` and ``load_state_dict`` follow torchdata's ``StatefulDataLoader``, which keeps the states of the workers:
    what comes after loading is what would have come without the interruption. With a plain ``DataLoader`` they work where it
    has no workers.
    """

    def __init__(self, data: Selection, *, shuffle: int | None, rank: int | None, world: int | None, epoch: int) -> None:
        in_use = distributed.is_available() and distributed.is_initialized()
        for name, value in (("shuffle", shuffle), ("rank", rank), ("world", world), ("epoch", epoch)):
            if value is not None and not _is_whole(value):
                raise ArgumentError(f"{name} must be a whole number, not {value!r}")
        if rank is None and world is not None and world > 1 and not in_use:
            raise ArgumentError(f"which of the {world} ranks is this? torch.distributed is not in use: pass rank=")
        self._data = data
        self._rank = rank if rank is not None else distributed.get_rank() if in_use else 0
        self._world = world if world is not None else distributed.get_world_size() if in_use else 1
        if not 0 <= self._rank < self._world:
            raise ArgumentError(f"there is no rank {self._rank} in a world of {self._world}")
        if (shuffle is not None and shuffle < 0) or epoch < 0:
            raise ArgumentError(f"a seed and an epoch count from 0, not {shuffle} and {epoch}")
        self._seed, self._epoch = shuffle, epoch
        self._order: _Order | None = None
        self._position = 0
        self._identity = _identity(data)
        self._resume: Mapping[str, Any] | None = None

    def __len__(self) -> int:
        """Items of this rank."""
        start, end = self._stretch(0, 1)
        return end - start

    def set_epoch(self, epoch: int) -> None:
        """Have the order of another epoch, from its first item on. Workers that persist keep theirs."""
        if epoch < 0:
            raise ArgumentError(f"epochs count from 0, not {epoch}")
        self._epoch, self._order, self._resume, self._position = epoch, None, None, 0

    def __iter__(self) -> Iterator[Item]:
        # Not a generator itself: a state that is taken before the first item belongs to this iteration already.
        worker, workers = _worker()
        self._position = 0 if self._resume is None else self._resumed(self._resume)
        self._resume = None
        if self._order is None:
            self._order = _order_of(self._data, self._seed, self._epoch)
        start, end = self._stretch(worker, workers)
        return self._items(self._order, start, end, self._position)

    def _items(self, order: _Order, start: int, end: int, behind: int) -> Iterator[Item]:
        for rows in order.rows(start + behind, end):
            for item in self._data.items(rows):
                # Counted when it is handed out, so that a state taken from then on has it behind itself.
                behind += 1
                self._position = behind
                yield item

    def _stretch(self, worker: int, workers: int) -> tuple[int, int]:
        """First and last place in the whole order."""
        items = len(self._data)
        start, end = items * self._rank // self._world, items * (self._rank + 1) // self._world
        return start + (end - start) * worker // workers, start + (end - start) * (worker + 1) // workers

    # ---- states

    def _setting(self) -> dict[str, Any]:
        """What a state belongs to."""
        worker, workers = _worker()
        return {
            "version": _VERSION,
            "data": self._identity,
            "shuffle": self._seed,
            "rank": self._rank,
            "world": self._world,
            "worker": worker,
            "workers": workers,
        }

    def state_dict(self) -> dict[str, Any]:
        """Position of this rank, or of this worker of it; plain values."""
        if self._resume is not None:
            return dict(self._resume)
        return self._setting() | {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken, with the next ``iter``.

        Raises:
            ArgumentError: it is no state of a stream, or its position lies beyond the stream's end.
            MismatchError: it is one of another data set, seed, rank or number of ranks; the number of workers is compared when
                the iteration begins.
        """
        if not isinstance(state, Mapping) or not {*self._setting(), "epoch", "position"} <= set(state):
            raise ArgumentError("this is no state of a token stream: pass what state_dict() gave")
        self._compare(state, ("version", "data", "shuffle", "rank", "world"))
        epoch, position = state["epoch"], state["position"]
        if not (_is_whole(epoch) and epoch >= 0 and _is_whole(position) and 0 <= position <= len(self)):
            raise ArgumentError(f"a stream of {len(self)} items has no position {position!r} in an epoch {epoch!r}")
        self._epoch, self._order, self._resume = state["epoch"], None, dict(state)

    def _resumed(self, state: Mapping[str, Any]) -> int:
        self._compare(state, ("worker", "workers"))
        return int(state["position"])

    def _compare(self, state: Mapping[str, Any], names: tuple[str, ...]) -> None:
        setting = self._setting()
        if other := next((name for name in names if state[name] != setting[name]), None):
            raise MismatchError(f"the state is one of {other} {state[other]!r}, but this stream has {setting[other]!r}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer)


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _identity(data: Selection) -> str:
    digest = hashlib.sha256(data.shelf.identity().encode())
    digest.update(b"all" if data.rows is None else data.rows.tobytes())
    return digest.hexdigest()[:16]


class _Order:
    """A data set's own order."""

    #: Rows that are handed out at once.
    _STEP = 1024

    def __init__(self, data: Selection) -> None:
        self._rows = data.rows

    def rows(self, start: int, end: int) -> Iterator[Rows]:
        """The rows at the places from ``start`` to ``end``, in pieces."""
        for first in range(start, end, self._STEP):
            last = min(first + self._STEP, end)
            yield np.arange(first, last) if self._rows is None else self._rows[first:last]


class _Shuffled(_Order):
    """A random order in which neighbours come from few blocks."""

    def __init__(self, data: Selection, seed: int, epoch: int) -> None:
        super().__init__(data)
        self._seed, self._epoch, self._shelf = seed, epoch, data.shelf
        rows = None if self._rows is None else np.sort(self._rows)
        self._all = rows
        # Stretches of rows that lie in one block.
        counts = [(number, len(inside)) for number, inside in self._shelf.runs(rows)]
        numbers, sizes = np.array(counts, np.int64).reshape(-1, 2).T
        firsts = np.cumsum(sizes) - sizes
        ids = self._shelf.amounts[numbers] * sizes // np.maximum(np.diff(self._shelf.starts)[numbers], 1)
        order = _permutation(len(numbers), seed, epoch, 0)
        self._windows = _windows([(int(firsts[i]), int(sizes[i]), int(ids[i])) for i in order])
        self._starts = np.cumsum([0, *(sum(size for _, size in window) for window in self._windows)])

    def rows(self, start: int, end: int) -> Iterator[Rows]:
        window = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < end:
            places = np.concatenate([np.arange(first, first + size) for first, size in self._windows[window]])
            places = places[_permutation(len(places), self._seed, self._epoch, window + 1)]
            before = int(self._starts[window])
            chosen = places[start - before : end - before]
            yield chosen if self._all is None else self._all[chosen]
            start = int(self._starts[window + 1])
            window += 1


def _order_of(data: Selection, seed: int | None, epoch: int) -> _Order:
    return _Order(data) if seed is None else _Shuffled(data, seed, epoch)


def _windows(stretches: list[tuple[int, int, int]]) -> list[list[tuple[int, int]]]:
    """Stretches (first place, size, ids) in windows of bounded size, without their ids."""
    windows: list[list[tuple[int, int]]] = []
    items = ids = 0
    for first, size, amount in stretches:
        if not windows or items + size > WINDOW_ITEMS or ids + amount > WINDOW_IDS:
            windows.append([])
            items = ids = 0
        windows[-1].append((first, size))
        items, ids = items + size, ids + amount
    return windows


def _permutation(count: int, *seed: int) -> NDArray[np.int64]:
    """The numbers below ``count`` in an order that every version of NumPy gives: bit generators are fixed, shuffles are not."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count), kind="stable")

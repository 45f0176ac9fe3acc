"""Best-fit-decreasing packing: which items share a row."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def best_fit(lengths: NDArray[Any] | Sequence[int], room: int) -> tuple[NDArray[np.int64], int]:
    """Lay items into rows, the longest first, each into the row whose room is left smallest by it; new rows as needed.

    Items of one length are laid at once, and so are rows with the same room, so a step costs the logarithm of the number of
    different rooms, and there are far fewer steps than items. The result depends on the lengths alone; rows are numbered by the
    first item that they hold.

    Args:
        lengths: of the items, each from 1 to ``room``.
        room: of a row.

    Returns:
        The row of each item, and the number of rows.

    >>> rows, count = best_fit([3, 5, 2, 4, 1], 8)
    >>> rows.tolist(), count
    ([0, 0, 1, 1, 1], 2)
    """
    sizes = np.asarray(lengths, np.int64)
    # Stable, so that items of one length stay in their order.
    order = np.argsort(-sizes, kind="stable")
    rows = np.empty(len(sizes), np.int64)
    starts = np.flatnonzero(np.diff(sizes[order], prepend=-1))
    ends = np.append(starts, len(sizes))[1:]
    # Rows by the room that they have, and the rooms that there are, in order.
    open_rows: dict[int, list[NDArray[np.int64]]] = {}
    rooms: list[int] = []
    count = 0
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        size = int(sizes[order[start]])
        while start < end:
            place = bisect_left(rooms, size)
            if place < len(rooms):
                free = rooms.pop(place)
                piles = open_rows.pop(free)
                found = piles[0] if len(piles) == 1 else np.concatenate(piles)
            else:
                free = room
                needed = -((start - end) // (room // size))
                found = np.arange(count, count + needed)
                count += needed
            each = free // size
            used = min(-((start - end) // each), len(found))
            taken = min(used * each, end - start)
            rows[order[start : start + taken]] = np.repeat(found[:used], each)[:taken]
            start += taken
            last = taken - (used - 1) * each
            for pile, left in (
                (found[: used - 1], free - each * size),
                (found[used - 1 : used], free - last * size),
                (found[used:], free),
            ):
                if len(pile) and left:
                    if left not in open_rows:
                        insort(rooms, left)
                    open_rows.setdefault(left, []).append(pile)
    return _by_first_item(rows, count), count


def _by_first_item(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Number rows in the order in which items meet them."""
    firsts = np.full(count, len(rows), np.int64)
    np.minimum.at(firsts, rows, np.arange(len(rows)))
    numbers = np.empty(count, np.int64)
    numbers[np.argsort(firsts, kind="stable")] = np.arange(count)
    return numbers[rows]

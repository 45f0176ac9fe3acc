"""Windows of a sequence with as much context as its networks see, so that each gives the numbers of the whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo.tokenizer import groups_of_similar_length


@dataclass(frozen=True)
class Window:
    """Work for the frames from ``start`` to ``stop``; all positions are latent frames of the sequence.

    Attributes:
        start, stop: the frames that are wanted.
        seen, seen_end: those in front of the last convolutions, whole windows of attention.
        first, last: those that go in.
    """

    start: int
    stop: int
    seen: int
    seen_end: int
    first: int
    last: int

    @property
    def frames(self) -> int:
        """Number of frames that go in."""
        return self.last - self.first

    @property
    def middle(self) -> slice:
        """The frames that attention takes, counted from the first that goes in."""
        return slice(self.seen - self.first, self.seen_end - self.first)

    @property
    def kept(self) -> slice:
        """The wanted frames, counted from the first that attention takes."""
        return slice(self.start - self.seen, self.stop - self.seen)


@dataclass(frozen=True)
class Reach:
    """Sight of a network, in latent frames on either side.

    Attributes:
        inner: in front of attention.
        window: frames that attend to each other; 1 without attention.
        outer: behind attention.
        unit: frames that are wanted come in multiples of this.
    """

    inner: int
    window: int
    outer: int
    unit: int

    def window_for(self, start: int, stop: int, total: int) -> Window:
        """The window of some frames of a sequence of ``total`` frames."""
        seen = max(0, start - self.outer) // self.window * self.window
        seen_end = min(total, -(-(stop + self.outer) // self.window) * self.window)
        return Window(start, stop, seen, seen_end, max(0, seen - self.inner), min(total, seen_end + self.inner))

    def settled(self, frames: int) -> int:
        """Number of frames of a sequence that its first ``frames`` decide, whatever follows.

        Args:
            frames: known in front of attention.
        """
        return max(0, (max(0, frames) // self.window * self.window - self.outer) // self.unit * self.unit)


@dataclass(frozen=True)
class Masks:
    """Masks of the places where the items of a batch end, at every rate.

    Attributes:
        ends: latent frames of each item, on the device of the batch; ``None`` where none ends early.
        frames: of the longest.
    """

    ends: Int[Tensor, " batch"] | None = None
    frames: int = 0

    @classmethod
    def of(cls, totals: Sequence[int], first: int, frames: int, device: torch.device) -> Masks:
        """For a batch of ``frames`` latent frames from ``first`` on, of items of ``totals`` frames."""
        if min(totals) >= first + frames:
            return cls()
        return cls(torch.tensor(totals, dtype=torch.int64, device=device) - first, frames)

    def at(self, rate: int) -> Float[Tensor, "batch time 1"] | None:
        """Ones before each item's end and zeros behind it, at ``rate`` samples per frame."""
        if self.ends is None:
            return None
        positions = torch.arange(self.frames * rate, dtype=torch.int64, device=self.ends.device)
        return (positions < self.ends[:, None] * rate).to(torch.float32)[..., None]

    def from_middle(self, window: Window) -> Masks:
        """The same for what attention takes."""
        if self.ends is None:
            return self
        return Masks(self.ends - (window.seen - window.first), window.seen_end - window.seen)

    def middle(self, window: Window) -> Float[Tensor, "batch time 1"] | None:
        """The mask of what attention takes, at one sample per frame."""
        return self.from_middle(window).at(1)


def lockstep(reach: Reach, totals: Sequence[int], budget: int, together: int = 1) -> Iterator[tuple[Window, list[int]]]:
    """Windows through several sequences at once, in time order, each with the items that share it.

    An item may end before its window does.

    Args:
        reach: of the network.
        totals: frames of each item.
        budget: most frames that go in at once, all items together; an item gets one unit at least.
        together: items that the frames of a window shall be chosen for.
    """
    unit = math.lcm(reach.unit, reach.window)
    chunk = max(1, budget // max(1, min(together, len(totals))) // unit) * unit
    for start in range(0, max(totals), chunk):
        active = [item for item, total in enumerate(totals) if total > start]
        windows = [reach.window_for(start, min(start + chunk, totals[item]), totals[item]) for item in active]
        for group in groups_of_similar_length([window.frames for window in windows], budget):
            yield max((windows[i] for i in group), key=lambda window: window.last), [active[i] for i in group]

"""Windows of recordings of more than 30 seconds, and the ids of each window that count.

Windows of 30 s start every 26 s, and of the 4 s that two of them share, each keeps the 2 s on its own side. The last window is
the first one that reaches the end, so that every window but a short recording's has more than 4 s and no id is lost or doubled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from zoo.codecs.s3tokenizer.config import S3TokenizerConfig

#: Frames of a window, and from the start of one to the start of the next.
WINDOW, STEP = 3000, 2600
# Frames that a window gives up where it meets another.
_MARGIN = (WINDOW - STEP) // 2


@dataclass(frozen=True)
class Window:
    """A stretch of a spectrogram.

    Attributes:
        start, stop: its frames.
        first, last: the ids of its own that count, as in a slice.
    """

    start: int
    stop: int
    first: int
    last: int


def windows(frames: int, config: S3TokenizerConfig) -> Iterator[Window]:
    """The windows of a recording; their ids that count are those of the recording, one for each step in time."""
    yield from _cut(range(0, max(frames - WINDOW + STEP, 1), STEP), frames, config)


def official_windows(frames: int, config: S3TokenizerConfig) -> Iterator[Window]:
    """The windows of the original package, which goes on as long as a window would begin before the end.

    Where the window before the last one reaches the end already, up to 2 s of ids between the two are lost.
    """
    yield from _cut(range(0, frames if frames > WINDOW else 1, STEP), frames, config)


def _cut(starts: range, frames: int, config: S3TokenizerConfig) -> Iterator[Window]:
    margin = _MARGIN // config.frames_per_id
    for start in starts:
        stop = frames if len(starts) == 1 else min(start + WINDOW, frames)
        ids = config.ids_of(stop - start)
        yield Window(start, stop, margin if start else 0, ids - margin if start != starts[-1] else ids)

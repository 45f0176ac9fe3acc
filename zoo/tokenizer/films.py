"""Films that are too long to be held: prepared by measuring them, and read again where they are encoded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo import media
from zoo.errors import InputError, naming_item
from zoo.tokenizer.base import Prepared

#: Numbers that a prepared clip holds; one with more, from a file, stays there.
MOST_HELD = 1 << 26


class ClipInFile(Mapping[str, Tensor]):
    """The ``frames`` ``[frames, 3, height, width]`` of a film, decoded whenever they are asked for.

    Pickled as the frames themselves, so that it may travel to where the file is not.

    Args:
        stream: of the file, read to its end.
        options: of `zoo.media.stream_video` that it was read with.
    """

    def __init__(self, stream: media.VideoStream, options: Mapping[str, Any]) -> None:
        file: Any = stream.file
        self._file = Path(file).absolute() if isinstance(file, str | os.PathLike) else bytes(file)
        self._name, self._options = stream.name, dict(options)
        self.count, self.size = stream.count, stream.size

    def frames(self) -> Iterator[Tensor]:
        """The frames from first to last.

        Raises:
            InputError: the file can no longer be read, or is not what it was.
        """
        done = 0
        for frame in media.stream_video(self._file, **self._options):
            done += 1
            if done > self.count or tuple(frame.shape[1:]) != self.size:
                break
            yield frame
        if done != self.count:
            raise InputError(f"{self._name} has changed since it was prepared")

    def __getitem__(self, name: str) -> Tensor:
        if name != "frames":
            raise KeyError(name)
        return torch.stack(list(self.frames()))

    def __iter__(self) -> Iterator[str]:
        return iter(("frames",))

    def __len__(self) -> int:
        return 1

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class FrameReader:
    """Frames of a prepared clip. Of one in a file no more than a part is held.

    Args:
        item: of `VideoTokenizer.prepare`.
        index: of the item in its batch, for errors.
    """

    def __init__(self, item: Prepared, index: int) -> None:
        self._clip = item.tensors if isinstance(item.tensors, ClipInFile) else None
        self._index, self._start = index, 0
        self._frames: Iterator[Tensor] = iter(())
        self._held = torch.zeros(0, 0, 0, 0, dtype=torch.uint8) if self._clip else item.tensors["frames"]
        self._count = self._clip.count if self._clip else len(self._held)

    def __len__(self) -> int:
        return self._count

    def part(self, start: int, stop: int) -> Tensor:
        """Frames ``start`` to ``stop``; a film is read from its beginning again where ``start`` lies before the last one.

        Raises:
            ItemError: the film can no longer be read; names the item.
        """
        if self._clip is None:
            return self._held[start:stop]
        with naming_item(self._index):
            if start < self._start or not len(self._held):
                self._frames, self._held, self._start = self._clip.frames(), self._held[:0], 0
            held = list(self._held[max(0, start - self._start) :])
            place = self._start + len(self._held)
            while place < stop:
                frame = next(self._frames)
                if place >= start:
                    held.append(frame)
                place += 1
            if stop == self._count:
                # To its end, which tells whether the film is what it was.
                for _ in self._frames:
                    pass
        self._held, self._start = torch.stack(held), start
        return self._held[: stop - start]

"""Recordings that are too long to be held: prepared by measuring them, and read again where they are encoded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from zoo import media
from zoo.errors import InputError, naming_item
from zoo.tokenizer.base import Prepared

#: Samples per channel that a prepared recording holds; a longer one in a file stays there.
MOST_HELD = 1 << 22

Waveform = Float[Tensor, "channels samples"]


class RecordingInFile(Mapping[str, Tensor]):
    """The ``waveform`` ``[channels, samples]`` of a file, decoded and resampled whenever it is asked for.

    Pickled as the samples themselves, so that it may travel to where the file is not.

    Args:
        stream: of the file, read to its end.
        as_channels: makes the channels that are wanted of those that there are, whatever part of the recording it is given.
        mono: the channels were averaged.
    """

    def __init__(self, stream: media.AudioStream, as_channels: Callable[[Waveform], Waveform], *, mono: bool) -> None:
        file: Any = stream.file
        self._file = Path(file).absolute() if isinstance(file, str | os.PathLike) else bytes(file)
        self._sample_rate, self._samples = stream.sample_rate, stream.samples
        self._as_channels, self._mono = as_channels, mono

    def blocks(self) -> Iterator[Waveform]:
        """The waveform from front to back, a few seconds at a time.

        Raises:
            InputError: the file can no longer be read, or is not what it was.
        """
        stream = media.stream_audio(self._file, sample_rate=self._sample_rate, mono=self._mono)
        done = 0
        for block in stream:
            done += block.shape[1]
            if done > self._samples:
                break
            yield self._as_channels(block)
        if done != self._samples:
            raise InputError(f"{stream.name} has changed since it was prepared")

    def __getitem__(self, name: str) -> Tensor:
        if name != "waveform":
            raise KeyError(name)
        whole, done = torch.empty(0, 0, dtype=torch.float32), 0
        for block in self.blocks():
            if not done:
                whole = block.new_empty(block.shape[0], self._samples)
            whole[:, done : done + block.shape[1]] = block
            done += block.shape[1]
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(("waveform",))

    def __len__(self) -> int:
        return 1

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class ForwardReader:
    """A prepared recording whose parts are taken from front to back, so that no more than a part is held of a long one.

    Args:
        item: of `AudioTokenizer.prepare`.
        index: of the item in its batch, for errors.
    """

    def __init__(self, item: Prepared, index: int) -> None:
        self._length, self._index = item.amount, index
        self._start = 0
        self._blocks: Iterator[Tensor] = iter(())
        if isinstance(item.tensors, RecordingInFile):
            self._blocks = item.tensors.blocks()
            self._held = torch.zeros(0, 0, dtype=torch.float32)
        else:
            self._held = item.tensors["waveform"]

    def __len__(self) -> int:
        return self._length

    def part(self, begin: int, end: int | None) -> Waveform:
        """Samples ``begin`` to ``end``, or to the last one; ``begin`` never goes back.

        Raises:
            ItemError: the recording can no longer be read; names the item.
        """
        end = self._length if end is None else min(end, self._length)
        parts = [self._held[:, begin - self._start :]]
        have = self._start + self._held.shape[1]
        with naming_item(self._index):
            while have < end:
                block = next(self._blocks)
                parts.append(block[:, max(0, begin - have) :])
                have += block.shape[1]
            if have >= self._length:
                # To its end, which tells whether the file is what it was.
                for _ in self._blocks:
                    pass
        if len(parts) > 1:
            parts = [torch.cat([part for part in parts if part.shape[1]], dim=1)]
        [self._held], self._start = parts, begin
        return self._held[:, : end - begin]

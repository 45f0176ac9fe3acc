"""Networks that take a sequence piece by piece and give, piece by piece, the numbers of a single pass over all of it.

A network is a chain of stages. One whose outputs depend on a few frames on either side looks at a window again (`Window`), one
that remembers carries its state (`Recurrent`, `Attention`), and one that takes each frame by itself is a function (`Each`). A
stage holds the state of one sequence, or of a batch of equally long ones, and what it holds can be stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

Run = Callable[[Tensor], Tensor]


class Stage(ABC):
    """A part of a network, in the middle of a sequence.

    Attributes:
        delay: frames of its input that have to follow one before its output is known.
    """

    delay: int = 0

    @abstractmethod
    def push(self, x: Tensor | None, last: bool) -> Tensor | None:
        """Take the next frames and give those that they settle; ``None`` stands for no frames.

        Args:
            x: the last axis is time: whole frames, but for the last piece of a sequence.
            last: whether the sequence ends here.
        """

    @classmethod
    def push_all(cls, stages: Sequence[Any], pieces: Sequence[Tensor | None], last: Sequence[bool]) -> list[Tensor | None]:
        """`push` for several sequences, of any lengths, in a stage of one network each; some are quicker together."""
        return [stage.push(x, ends) for stage, x, ends in zip(stages, pieces, last, strict=True)]

    def whole(self, x: Tensor) -> Tensor:
        """All of a sequence in one pass, without state; with gradients it is a plain function, which can be exported."""
        y = self.push(x, True)
        assert y is not None
        return y

    def state(self) -> dict[str, Any]:
        """The state of the sequence, as tensors and plain values, nested in lists and mappings."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        assert not state


class Each(Stage):
    """A function of each frame by itself."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def push(self, x: Tensor | None, last: bool) -> Tensor | None:
        return None if x is None else self._run(x)


class Window(Stage):
    """A network whose outputs depend on a few frames on either side: each piece is computed with these around it.

    Args:
        run: the network; the ends of what it is given are ends of a sequence to it.
        reach: what its outputs depend on.
        least: frames that have to be known before the first outputs are computed, where the beginning of a sequence is
            reflected.
    """

    def __init__(self, run: Run, reach: Reach, *, least: int = 1) -> None:
        self.run, self.reach, self._least = run, reach, least
        self.delay = reach.right
        self._held: Tensor | None = None
        self._start = self._done = 0

    def push(self, x: Tensor | None, last: bool) -> Tensor | None:
        reach = self.reach
        if x is not None:
            self._held = x if self._held is None else torch.cat([self._held, x], dim=-1)
        if self._held is None:
            return None
        length = self._held.shape[-1]
        known = self._start + (-(-length // reach.rows_in) if last else length // reach.rows_in)
        ready = known if last else known - reach.right
        if ready <= self._done or (not last and known < self._least):
            return None
        skipped, end = self._done - self._start, None if last else (ready - self._start) * reach.rows_out
        y = self.run(self._held)[..., skipped * reach.rows_out : end]
        drop = max(0, ready - reach.left - self._start)
        self._held, self._start, self._done = self._held[..., drop * reach.rows_in :].clone(), self._start + drop, ready
        return y

    def whole(self, x: Tensor) -> Tensor:
        return self.run(x)

    def state(self) -> dict[str, Any]:
        return {"held": self._held, "start": self._start, "done": self._done}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._held, self._start, self._done = state["held"], state["start"], state["done"]


class Whole(Stage):
    """A network that sees all of a sequence at once: nothing is settled before the end.

    Args:
        run: the network.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._held: list[Tensor] = []

    def push(self, x: Tensor | None, last: bool) -> Tensor | None:
        if x is not None:
            self._held.append(x)
        if not last or not self._held:
            return None
        held, self._held = torch.cat(self._held, dim=-1), []
        return self._run(held)

    def state(self) -> dict[str, Any]:
        return {"held": list(self._held)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._held = list(state["held"])


class Recurrent(Stage):
    """An LSTM with a skip connection, ``[batch, channels, frames]`` in and out.

    A step reads all weights, for one sequence or for many, so that sequences take their steps together where they can.
    """

    def __init__(self, lstm: nn.LSTM) -> None:
        self._lstm = lstm
        self._memory: tuple[Tensor, Tensor] | None = None

    def push(self, x: Tensor | None, last: bool) -> Tensor | None:
        return self.push_all([self], [x], [last])[0]

    @classmethod
    def push_all(cls, stages: Sequence[Any], pieces: Sequence[Tensor | None], last: Sequence[bool]) -> list[Tensor | None]:
        """See `Stage.push_all`. Of pieces of different lengths, the longer ones go on without those that are through."""
        given = [(stage, x) for stage, x in zip(stages, pieces, strict=True) if x is not None and x.shape[-1]]
        if not given:
            return [None] * len(pieces)
        lstm: nn.LSTM = given[0][0]._lstm
        dtype = next(lstm.parameters()).dtype
        found: dict[int, list[Tensor]] = {}
        start = 0
        for stop in sorted({x.shape[-1] for _, x in given}):
            given = [(stage, x) for stage, x in given if x.shape[-1] > start]
            frames = torch.cat([x[..., start:stop] for _, x in given]).permute(2, 0, 1).to(dtype).contiguous()
            y, memory = lstm(frames, cls._joined([(stage, len(x)) for stage, x in given], lstm))
            sizes = [len(x) for _, x in given]
            for (stage, _), own in zip(given, (y + frames).permute(1, 2, 0).float().split(sizes), strict=True):
                found.setdefault(id(stage), []).append(own)
            for (stage, _), hidden, cell in zip(given, *(own.split(sizes, dim=1) for own in memory), strict=True):
                stage._memory = hidden, cell
            start = stop
        return [torch.cat(found[id(stage)], dim=-1) if id(stage) in found else None for stage in stages]

    @staticmethod
    def _joined(stages: Sequence[tuple[Recurrent, int]], lstm: nn.LSTM) -> tuple[Tensor, Tensor] | None:
        """What several remember, one beside the other, where their batches have these sizes; zeros at the beginning."""
        if all(stage._memory is None for stage, _ in stages):
            return None
        like = next(lstm.parameters())
        memories = [stage._memory or (like.new_zeros(lstm.num_layers, size, lstm.hidden_size),) * 2 for stage, size in stages]
        hidden, cell = (torch.cat(own, dim=1) for own in zip(*memories, strict=True))
        return hidden, cell

    def state(self) -> dict[str, Any]:
        return {"memory": None if self._memory is None else list(self._memory)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._memory = None if state["memory"] is None else tuple(state["memory"])


class Attention(Stage):
    """A causal transformer of the library transformers with a window of attention, ``[batch, channels, frames]`` in and out.

    Args:
        network: takes ``[batch, frames, channels]``, ``past_key_values`` and ``use_cache``.
        config: the library's, which says how many layers there are and how far they look back.
        most: frames that attend at a time.
    """

    def __init__(self, network: nn.Module, config: Any, most: int = 256) -> None:
        self._network, self._config, self._most = network, config, most
        self._cache: Any = None

    def push(self, x: Tensor | None, last: bool) -> Tensor | None:
        from transformers import DynamicCache

        if x is None:
            return None
        if self._cache is None:
            self._cache = DynamicCache(config=self._config)
        frames = x.transpose(1, 2).to(next(self._network.parameters()).dtype)
        parts = [
            self._network(part, past_key_values=self._cache, use_cache=True).last_hidden_state
            for part in frames.split(self._most, dim=1)
        ]
        return torch.cat(parts, dim=1).transpose(1, 2).float()

    def whole(self, x: Tensor) -> Tensor:
        frames = x.transpose(1, 2).to(next(self._network.parameters()).dtype)
        y: Tensor = self._network(frames, use_cache=False).last_hidden_state
        return y.transpose(1, 2).float()

    def state(self) -> dict[str, Any]:
        layers = [] if self._cache is None else self._cache.layers
        return {"layers": [{"keys": own.keys, "values": own.values, "seen": own.get_seq_length()} for own in layers]}

    def restore(self, state: Mapping[str, Any]) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._config) if state["layers"] else None
        for layer, own in zip(self._cache.layers if self._cache else (), state["layers"], strict=True):
            layer.lazy_initialization(own["keys"], own["values"])
            layer.keys, layer.values = own["keys"], own["values"]
            if layer.is_sliding:
                layer.cumulative_length = own["seen"]


class Chain(Stage):
    """Stages one behind the other.

    Args:
        stages: first to last.
        rates: frames that the network has at each stage for one of the first; 1 for all by default.
    """

    def __init__(self, stages: Sequence[Stage], rates: Sequence[float] | None = None) -> None:
        self.stages = list(stages)
        # Delays add up in frames of the first stage.
        delays = [own.delay / rate for own, rate in zip(stages, rates or [1.0] * len(stages), strict=True)]
        self.delay = -int(-sum(delays) // 1)

    def push(self, x: Tensor | None, last: bool) -> Tensor | None:
        for stage in self.stages:
            x = stage.push(x, last)
        return x

    @classmethod
    def push_all(cls, stages: Sequence[Any], pieces: Sequence[Tensor | None], last: Sequence[bool]) -> list[Tensor | None]:
        """See `Stage.push_all`: all of them in one stage, then in the next."""
        found = list(pieces)
        for together in zip(*(chain.stages for chain in stages), strict=True):
            found = type(together[0]).push_all(together, found, last)
        return found

    def whole(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage.whole(x)
        return x

    def state(self) -> dict[str, Any]:
        return {"stages": [stage.state() for stage in self.stages]}

    def restore(self, state: Mapping[str, Any]) -> None:
        for stage, own in zip(self.stages, state["stages"], strict=True):
            stage.restore(own)


# --------------------------------------------------------------------------------------------- what an output depends on


@dataclass(frozen=True)
class Step:
    """A convolution, or a transposed one.

    Attributes:
        kernel, stride, dilation: its sizes.
        left: samples that are added in front of its input, or cut from the front of its output where it is transposed.
        transposed: whether it is.
    """

    kernel: int
    stride: int = 1
    dilation: int = 1
    left: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class Reach:
    """Frames before and after one that its output depends on.

    Attributes:
        left, right: such frames.
        rows_in, rows_out: steps of a frame in what goes in and in what comes out.
        reflected: frames of ``left`` that only the end of a sequence needs, which is reflected.
    """

    left: int
    right: int
    rows_in: int = 1
    rows_out: int = 1
    reflected: int = 0

    @classmethod
    def of(cls, steps: Iterable[Step], *, rows_in: int = 1, rows_out: int = 1, reflected: int = 0) -> Reach:
        """The reach of convolutions one behind the other.

        Args:
            steps: first to last.
            rows_in, rows_out: see above.
            reflected: frames more on the left; see above.
        """
        first, last = 0, rows_out - 1
        for step in reversed(list(steps)):
            if step.transposed:
                first = -((step.kernel - 1 - step.left - first) // step.stride)
                last = (last + step.left) // step.stride
            else:
                first = first * step.stride - step.left
                last = last * step.stride - step.left + (step.kernel - 1) * step.dilation
        left, right = -(first // rows_in), -(-(last + 1 - rows_in) // rows_in)
        return cls(max(0, left) + reflected, max(0, right), rows_in, rows_out, reflected)


def convolutions(network: nn.Module) -> list[Step]:
    """The steps of a network whose convolutions were made, and are called, one behind the other."""
    steps = []
    for module in network.modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            [kernel], [stride], [dilation], padding = module.kernel_size, module.stride, module.dilation, module.padding
            assert isinstance(padding, tuple)
            transposed = isinstance(module, nn.ConvTranspose1d)
            steps.append(Step(kernel, stride, dilation, int(padding[0]), transposed))
    return steps


def network_of(layers: Iterable[Callable[[Tensor], Tensor]]) -> Run:
    """Layers one behind the other, as one function."""
    held = list(layers)

    def run(x: Float[Tensor, "batch channels _time"]) -> Float[Tensor, "batch channels_out _time_out"]:
        for layer in held:
            x = layer(x)
        return x

    return run

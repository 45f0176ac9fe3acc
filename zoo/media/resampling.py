"""Windowed-sinc resampling block by block, in bounded memory at any pair of rates.

One definition for all rates, torchaudio's with its defaults: output ``j`` is the sum over the inputs ``n`` with ``|t| < 6`` of
``input[n] * scale * sinc(t) * cos(pi * t / 12) ** 2``, where ``t = scale * (n - j * rate / new_rate)`` and
``scale = 0.99 * min(1, new_rate / rate)``.

torchaudio holds that kernel for each output between two coinciding samples: ``rate * new_rate`` numbers for rates without a
common divisor. Up to a few megabytes the same table is used here, the same to the last bit. Beyond, and where
the new rate is a hundredth or less, the kernel is interpolated between a few positions, within 1e-7 of the definition.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from zoo.errors import InputError
from zoo.precision import exact_float32

LOWEST_RATE, HIGHEST_RATE = 1, 1_000_000
# Values of the largest block that is resampled at once, of the input and of the output.
_BLOCK_VALUES = 1 << 20
_WIDTH, _ROLLOFF = 6, 0.99
# The table of all phases is used up to so many values; every pair of common rates lies below.
_LARGEST_TABLE = 5 << 18
_CACHE_BYTES = 16 << 20
# Positions per zero crossing between which the kernel is interpolated by cubic polynomials.
_POSITIONS = 64
_VALUES_AT_ONCE = 1 << 20

_Samples = Float[Tensor, "channels _"]


class _Tables:
    """Tables by pair of rates; the least recently used ones are dropped beyond a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[object, ...], make: Callable[[], Tensor]) -> Tensor:
        with self._lock:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
                return found
        table = make()
        with self._lock:
            self._held[key] = table
            while len(self._held) > 1 and sum(held.nbytes for held in self._held.values()) > self._limit:
                self._held.popitem(last=False)
        return table


_tables = _Tables(_CACHE_BYTES)


def check_rate(rate: int, what: str = "the sample rate") -> None:
    """Refuse a rate that no recording has.

    Raises:
        InputError: it lies outside 1 Hz to 1 MHz.
    """
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise InputError(f"{what} must lie from {LOWEST_RATE} Hz to {HIGHEST_RATE:,} Hz, not {rate}")


def resampled_length(samples: int, rate: int, new_rate: int) -> int:
    """Samples that `resample` gives: ``ceil(samples * new_rate / rate)``.

    >>> resampled_length(44_101, 44_100, 24_000)
    24001
    """
    return -(-samples * new_rate // rate)


class Resampler:
    """Windowed-sinc resampling of a stream; the blocks add up to what the whole signal would give.

    Args:
        rate: of what is pushed, from 1 Hz to 1 MHz.
        new_rate: of what comes out, in the same range.

    Raises:
        InputError: a rate lies outside that range.
    """

    def __init__(self, rate: int, new_rate: int) -> None:
        check_rate(rate)
        check_rate(new_rate)
        divisor = math.gcd(rate, new_rate)
        self.rate, self.new_rate = rate, new_rate
        self._channels = 1
        self._engine: _ByTable | _ByInterpolation | None = None
        if rate != new_rate:
            orig, new = rate // divisor, new_rate // divisor
            small = new * (orig + 2 * _reach(orig, new)) <= _LARGEST_TABLE and _step(orig, new) == 1
            self._engine = _ByTable(orig, new) if small else _ByInterpolation(orig, new)

    def push(self, block: Float[Tensor, "channels samples"]) -> Float[Tensor, "channels _"]:
        """Take the next samples; return those output samples that no later input can change."""
        self._channels = block.shape[0]
        return block if self._engine is None else self._engine.push(block)

    def finish(self) -> Float[Tensor, "channels _"]:
        """The rest of the output, which makes ``ceil(received * new_rate / rate)`` samples in all."""
        rest = None if self._engine is None else self._engine.finish()
        return torch.zeros(self._channels, 0, dtype=torch.float32) if rest is None else rest

    def state(self) -> dict[str, Any]:
        """The state of the stream, as tensors and plain values, for `restore`."""
        return {"channels": self._channels, "engine": None if self._engine is None else _remembered(self._engine)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` of a resampler of the same rates gave."""
        self._channels = state["channels"]
        if self._engine is not None:
            _recall(self._engine, state["engine"])

    def block_samples(self, channels: int) -> int:
        """Number of samples to push at once so that memory stays small."""
        return max(1, min(_BLOCK_VALUES, _BLOCK_VALUES * self.rate // self.new_rate) // channels)


def _remembered(engine: Any) -> dict[str, Any]:
    return {name: _remembered(own) if isinstance(own, _Reducer) else own for name, own in vars(engine).items()}


def _recall(engine: Any, state: Mapping[str, Any]) -> None:
    for name, own in vars(engine).items():
        if isinstance(own, _Reducer):
            _recall(own, state[name])
        else:
            setattr(engine, name, state[name])


def resample(waveform: Float[Tensor, "channels samples"], rate: int, new_rate: int) -> Float[Tensor, "channels _"]:
    """Windowed-sinc resampling (torchaudio's defaults: width 6, roll-off 0.99, Hann window) in bounded extra memory.

    Args:
        waveform: float32.
        rate: of ``waveform``, from 1 Hz to 1 MHz.
        new_rate: of the result, in the same range.

    Raises:
        InputError: a rate lies outside that range.
    """
    if rate == new_rate:
        return waveform
    resampler = Resampler(rate, new_rate)
    channels, samples = waveform.shape
    block = resampler.block_samples(channels)
    resampled = torch.empty(channels, resampled_length(samples, rate, new_rate), dtype=waveform.dtype)
    done = 0
    for part in waveform.cpu().split(block, dim=1):
        done = _append(resampled, done, resampler.push(part))
    _append(resampled, done, resampler.finish())
    return resampled.to(waveform.device)


def _append(whole: Tensor, done: int, part: Tensor) -> int:
    whole[:, done : done + part.shape[1]] = part
    return done + part.shape[1]


def _reach(orig: int, new: int) -> int:
    """Inputs to either side that an output takes in: ``ceil(6 * orig / (0.99 * min(orig, new)))``."""
    return math.ceil(_WIDTH * orig / (_ROLLOFF * min(orig, new)))


def _step(orig: int, new: int) -> int:
    """Inputs between nodes from which the kernel's values follow, so slowly does it change where the new rate is far lower."""
    return max(1, orig // (_POSITIONS * new))


def _kernel(t: Float[Tensor, "*shape"], gain: float) -> Float[Tensor, "*shape"]:
    """``gain * sinc(t)`` under a Hann window that ends at six zero crossings; computed in float64, rounded to float32."""
    t = t.clamp(-_WIDTH, _WIDTH)
    window = torch.cos(t * math.pi / _WIDTH / 2) ** 2
    t = t * math.pi
    sinc = torch.where(t == 0, torch.ones((), dtype=torch.float64), t.sin() / t)
    return (sinc * (window * gain)).to(torch.float32)


def _table(orig: int, new: int) -> Float[Tensor, "new 1 taps"]:
    """torchaudio's kernel: for each output between two coinciding samples, its weights on the inputs around.

    torchaudio itself computes the phases in torch's default type, so that its kernel changes with the caller's settings.
    """
    width, base = _reach(orig, new), min(orig, new) * _ROLLOFF
    inputs = torch.arange(-width, width + orig, dtype=torch.float64)[None, None] / orig
    table = torch.empty(new, 1, 2 * width + orig, dtype=torch.float32)
    rows = max(1, _VALUES_AT_ONCE // 4 // table.shape[2])
    for first in range(0, new, rows):
        phases = torch.arange(-first, -min(new, first + rows), -1).to(torch.float32)[:, None, None] / new
        table[first : first + rows] = _kernel((phases + inputs) * base, base / orig)
    return table


class _ByTable:
    """Convolution with the table of all phases."""

    def __init__(self, orig: int, new: int) -> None:
        self._orig, self._new = orig, new
        self._width = _reach(orig, new)
        self._context = -(-self._width // orig) * orig + orig
        self._pending: Tensor | None = None
        self._seen_context = 0

    def push(self, block: _Samples) -> _Samples:
        self._pending = block if self._pending is None else torch.cat([self._pending, block], dim=1)
        fixed = (self._pending.shape[1] - self._context) // self._orig * self._orig
        if fixed <= self._seen_context:
            return block[:, :0]
        kept = self._emit(self._seen_context, fixed)
        drop = max(0, fixed - self._context)
        self._pending = self._pending[:, drop:]
        self._seen_context = fixed - drop
        return kept

    def finish(self) -> _Samples | None:
        if self._pending is None:
            return None
        rest = self._emit(self._seen_context, None)
        self._pending = None
        return rest

    def _emit(self, start: int, stop: int | None) -> _Samples:
        """Resample the pending samples and keep the outputs that belong to inputs ``start`` to ``stop``."""
        assert self._pending is not None
        pending = self._pending
        table = _tables.get(("table", self._orig, self._new), lambda: _table(self._orig, self._new)).to(pending)
        with exact_float32(pending.device):
            padded = F.pad(pending, (self._width, self._width + self._orig))
            resampled = F.conv1d(padded[:, None], table, stride=self._orig)
        resampled = resampled.transpose(1, 2).reshape(pending.shape[0], -1)
        whole = resampled_length(pending.shape[1], self._orig, self._new)
        end = whole if stop is None else min(whole, stop // self._orig * self._new)
        return resampled[:, start // self._orig * self._new : end]


class _ByInterpolation:
    """Products with kernels that are interpolated between positions.

    A block of ``outputs`` neighbours is a product of the inputs around it with a matrix that depends on one number alone:
    where its first output lies between two inputs. The matrix is kept for a few such positions, and what it gives is
    interpolated by cubic polynomials. Where the new rate is far lower, the inputs are reduced first.
    """

    def __init__(self, orig: int, new: int) -> None:
        ratio = orig / new
        step = _step(orig, new)
        self._reducer = _Reducer(step) if step > 1 else None
        lead = _Reducer.LEAD if step > 1 else 0
        self._orig, self._new = orig, new * step
        self._received = 0
        self._true = (orig, new)
        self._gain = _ROLLOFF * min(1.0, 1 / ratio)
        ratio /= step
        self._scale = _ROLLOFF * min(1.0, 1 / ratio)
        self._reach = math.ceil(_WIDTH / self._scale)
        self.outputs = max(8, min(256, int(8 / ratio)))
        self._span = 2 * self._reach + math.ceil(self.outputs * ratio) + 2
        self._by_inputs = self._span < self.outputs
        self._positions = math.ceil(_POSITIONS * min(1.0, 1 / ratio))
        self._first = -lead - self._reach
        self._pending: Tensor | None = None
        self._done_blocks = self._given = 0

    def push(self, block: _Samples) -> _Samples:
        self._received += block.shape[1]
        return self._advance(block if self._reducer is None else self._reducer.push(block))

    def finish(self) -> _Samples | None:
        if not self._received:
            return None
        total = resampled_length(self._received, *self._true)
        last = [] if self._reducer is None else [self._advance(self._reducer.finish())]
        assert self._pending is not None
        given = self._given
        blocks = -(-total // self.outputs)
        needed = (blocks - 1) * self.outputs * self._orig // self._new - self._reach + self._span
        padding = max(0, needed - self._first - self._pending.shape[1])
        last.append(self._advance(torch.zeros(self._pending.shape[0], padding, dtype=self._pending.dtype)))
        return torch.cat(last, dim=1)[:, : total - given + sum(part.shape[1] for part in last[:-1])]

    def _advance(self, block: _Samples) -> _Samples:
        """Take inputs; return the outputs of the blocks that have all of theirs."""
        if self._pending is None:
            self._pending = torch.zeros(block.shape[0], self._reach, dtype=block.dtype)
        self._pending = torch.cat([self._pending, block], dim=1)
        end = self._first + self._pending.shape[1]
        # The last block whose inputs, from where its first output lies, end before that.
        latest = end + self._reach - self._span
        blocks = ((latest + 1) * self._new - 1) // (self.outputs * self._orig) + 1 if latest >= 0 else 0
        if blocks <= self._done_blocks:
            return self._pending[:, :0]
        resampled = torch.empty(block.shape[0], (blocks - self._done_blocks) * self.outputs, dtype=block.dtype)
        values = 4 * self._span if self._by_inputs else max(self._span, 4 * self.outputs)
        rows = max(1, _VALUES_AT_ONCE // (values * block.shape[0]))
        with exact_float32(block.device):
            for start in range(self._done_blocks, blocks, rows):
                stop = min(blocks, start + rows)
                offset = (start - self._done_blocks) * self.outputs
                self._products(start, stop, resampled[:, offset : offset + (stop - start) * self.outputs])
        self._done_blocks = blocks
        self._given += resampled.shape[1]
        drop = blocks * self.outputs * self._orig // self._new - self._reach - self._first
        drop = max(0, min(drop, self._pending.shape[1]))
        self._pending = self._pending[:, drop:].clone()
        self._first += drop
        return resampled

    def _products(self, start: int, stop: int, out: _Samples) -> None:
        """The outputs of some blocks."""
        assert self._pending is not None
        places = torch.arange(start, stop, dtype=torch.int64) * (self.outputs * self._orig)
        begins = places.div(self._new, rounding_mode="floor") - self._reach - self._first
        between = places.remainder(self._new) * self._positions
        positions = between.div(self._new, rounding_mode="floor")
        weights = _cubic_weights(between.remainder(self._new).double() / self._new).to(self._pending.dtype)
        key = ("positions", *self._true)
        table = _tables.get(key, self._table).to(self._pending)
        blocks = out.view(out.shape[0], stop - start, self.outputs).transpose(0, 1)
        order = positions.argsort()
        # Of blocks in the order of their positions: inputs [blocks, channels, span] and weights [blocks, 1, 4].
        inputs = self._pending.unfold(1, self._span, 1).transpose(0, 1)[begins[order]]
        weights = weights[order][:, None]
        # The product is linear: the weights of the four positions go to its smaller side.
        if self._by_inputs:
            inputs = (inputs[:, :, None] * weights[..., None]).flatten(2)
        done = 0
        for position, count in enumerate(torch.bincount(positions, minlength=self._positions).tolist()):
            if not count:
                continue
            own, around = slice(done, done + count), table[position : position + 4]
            if self._by_inputs:
                found = inputs[own] @ around.flatten(0, 1)
            else:
                four = inputs[own] @ around.transpose(0, 1).flatten(1)
                found = (four.unflatten(2, (4, -1)) * weights[own, ..., None]).sum(2)
            blocks[order[own]] = found
            done += count

    def _table(self) -> Float[Tensor, "positions span outputs"]:
        """Weights on the inputs around a block, for each position of its first output from one before to two behind."""
        places = torch.arange(-1, self._positions + 2, dtype=torch.float64) / self._positions
        places = places[:, None] + torch.arange(self.outputs, dtype=torch.float64) * (self._orig / self._new)
        inputs = torch.arange(self._span, dtype=torch.float64) - self._reach
        table = torch.empty(len(places), self._span, self.outputs, dtype=torch.float32)
        for own, place in zip(table, places, strict=True):
            own[:] = _kernel((inputs[:, None] - place) * self._scale, self._gain)
        return table


def _cubic_weights(x: Float[Tensor, " n"]) -> Float[Tensor, "n 4"]:
    """Lagrange's weights of the values at -1, 0, 1 and 2 for one at ``x`` in [0, 1)."""
    return torch.stack(
        [
            x * (1 - x) * (x - 2) / 6,
            (1 - x * x) * (2 - x) / 2,
            x * (x + 1) * (2 - x) / 2,
            x * (x * x - 1) / 6,
        ],
        dim=1,
    )


class _Reducer:
    """Sums of the inputs that stand for them under a slowly changing kernel.

    A kernel that is a cubic polynomial between nodes ``step`` inputs apart has the same product with the sums at the nodes as
    with the inputs. The first node lies ``LEAD`` steps before the first input.
    """

    LEAD = 1

    def __init__(self, step: int) -> None:
        self._step = step
        self._weights = _cubic_weights(torch.arange(step, dtype=torch.float64) / step)
        self._pending: Tensor | None = None
        self._open: Tensor | None = None

    def push(self, block: _Samples) -> _Samples:
        self._pending = block if self._pending is None else torch.cat([self._pending, block], dim=1)
        whole = self._pending.shape[1] // self._step
        sums = self._reduce(self._pending[:, : whole * self._step])
        self._pending = self._pending[:, whole * self._step :].clone()
        return sums

    def finish(self) -> _Samples:
        """The sums at the last nodes."""
        assert self._pending is not None
        parts = []
        if self._pending.shape[1]:
            parts.append(self._reduce(F.pad(self._pending, (0, self._step - self._pending.shape[1]))))
        assert self._open is not None
        return torch.cat([*parts, self._open], dim=1)

    def _reduce(self, inputs: _Samples) -> _Samples:
        channels, steps = inputs.shape[0], inputs.shape[1] // self._step
        if self._open is None:
            self._open = torch.zeros(channels, 3, dtype=inputs.dtype)
        sums = F.pad(self._open, (0, steps))
        with exact_float32(inputs.device):
            shares = inputs.reshape(channels, steps, self._step) @ self._weights.to(inputs)
        for node in range(4):
            sums[:, node : node + steps] += shares[:, :, node]
        self._open = sums[:, steps:]
        return sums[:, :steps]

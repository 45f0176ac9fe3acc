"""Equal-information windows: ids that all carry the same number of bits, by arithmetic coding in integers.

Idea: Lester et al., "Training LLMs over neurally compressed text" (arXiv 2404.03626). Their model and the details of their
coder are not public, so these ids are not the paper's: the format here is the zoo's own. A window of bytes is one code of
``bits`` bits. The coder and its byte model start anew in each window, so that windows decode in any order. No float is ever
computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from zoo.checkpoint import Checkpoint
from zoo.derived import Derived
from zoo.errors import InputError
from zoo.spec import Spec
from zoo.tokenizer.text import TextTokenizer
from zoo.tokens import Meta

END = 256
#: Sum of a symbol's frequencies.
TOTAL = 1 << 16
#: Widest window that is one id; wider ones are several of 16 bits.
ONE_ID = 24

#: Counts of the 256 bytes behind the bytes of the window so far.
Counts = Callable[[bytes], NDArray[np.int64]]


@dataclass(frozen=True)
class EqualInfoConfig:
    """Settings of a model.

    Attributes:
        bits: of a window, 9 to 24, or 32, 48 or 64.
        pairs: entries of the table of pairs of bytes.
        triples: entries of the table of three bytes.
    """

    bits: int = 16
    pairs: int = 0
    triples: int = 0

    def __post_init__(self) -> None:
        if not (9 <= self.bits <= ONE_ID or self.bits in (32, 48, 64)):
            raise InputError(f"a window has 9 to {ONE_ID} bits, or 32, 48 or 64, not {self.bits}")

    @property
    def ids(self) -> int:
        """Ids of a window."""
        return 1 if self.bits <= ONE_ID else self.bits // 16


class WindowCoder:
    """The coder of windows under a model of bytes.

    Args:
        counts: from the bytes of the window so far to 256 counts, none negative.
        bits: of a window.
        context: bytes at the end of the window that counts depend on.
    """

    def __init__(self, counts: Counts, bits: int, context: int = 2) -> None:
        self.bits, self._context = bits, context
        self._of = lru_cache(maxsize=1 << 14)(lambda recent: _Shares(frequencies(counts(recent))))

    def encode(self, octets: bytes) -> tuple[list[int], list[int]]:
        """The code of each window, and the bytes that it holds."""
        codes, widths, place = [], [], 0
        while place < len(octets):
            low, size, start = 0, 1 << self.bits, place
            while size > 1:
                shares = self._shares(octets[start:place])
                symbol = octets[place] if place < len(octets) else END
                if not shares.has(symbol, size):
                    symbol = END
                first, size = shares.interval(symbol, size)
                low += first
                if symbol == END:
                    break
                place += 1
            codes.append(low)
            widths.append(place - start)
        return codes, widths

    def decode(self, code: int) -> bytes:
        """The bytes of a window; every code below ``2^bits`` has some, or none."""
        found, size = bytearray(), 1 << self.bits
        while size > 1:
            symbol, first, size = self._shares(bytes(found)).symbol(code, size)
            code -= first
            if symbol == END:
                break
            found.append(symbol)
        return bytes(found)

    def _shares(self, window: bytes) -> _Shares:
        # A window's beginning is a context of its own, so the length counts up to the model's reach.
        return self._of(window[-self._context :] if len(window) > self._context else window)


def frequencies(counts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Frequencies of the 256 bytes and the end, at least 1 each, adding up to `TOTAL`.

    Args:
        counts: of the bytes ``[256]``, none negative.
    """
    weights = np.append(counts, 0).astype(np.int64)
    total = int(weights.sum())
    found = 1 + (weights * (TOTAL - 257) // total if total else np.zeros(257, np.int64))
    missing = TOTAL - int(found.sum())
    # The most frequent symbols share what rounding left, of equal ones the smaller first.
    order = np.argsort(-weights, kind="stable")
    found += missing // 257
    found[order[: missing % 257]] += 1
    return found.astype(np.uint64)


class _Shares:
    """How an interval of codes is shared among the symbols."""

    def __init__(self, frequency: NDArray[np.uint64]) -> None:
        self.frequency = frequency
        self.order = np.argsort(-frequency.astype(np.int64), kind="stable")
        ranked = self.order[self.order != END]
        self.ranked = ranked.tolist()
        self.rank = np.argsort(ranked).tolist()
        self._known: dict[int, tuple[NDArray[np.uint64], NDArray[np.uint64]]] = {}

    def has(self, symbol: int, size: int) -> bool:
        """Whether a symbol has a code in an interval of ``size`` codes."""
        return symbol == END or size >= 257 or self.rank[symbol] < size - 1

    def interval(self, symbol: int, size: int) -> tuple[int, int]:
        """First code of a symbol and number of its codes."""
        if size < 257:
            return (size - 1 if symbol == END else self.rank[symbol]), 1
        ends, counts = self._cut(size)
        count = int(counts[symbol])
        return (int(ends[symbol]) - count) % (1 << 64), count

    def symbol(self, code: int, size: int) -> tuple[int, int, int]:
        """The symbol of a code, and what `interval` gives for it."""
        if size < 257:
            return (END if code == size - 1 else self.ranked[code]), code, 1
        ends, _ = self._cut(size)
        # The last end of an interval of 2^64 codes is 0: nothing lies behind it.
        symbol = int(np.searchsorted(ends[:-1], np.uint64(code), side="right"))
        return (symbol, *self.interval(symbol, size))

    def _cut(self, size: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Ends of the symbols' codes, and their numbers; at least one each."""
        if size not in self._known:
            high, low = divmod(size - 257, TOTAL)
            # Frequency times size over the total, in two parts that fit into 64 bits.
            counts = 1 + self.frequency * np.uint64(high) + ((self.frequency * np.uint64(low)) >> np.uint64(16))
            spare = (size - int(counts.sum(dtype=np.uint64))) % (1 << 64)
            counts[self.order[:spare]] += np.uint64(1)
            if len(self._known) > 64:
                self._known.clear()
            self._known[size] = np.cumsum(counts, dtype=np.uint64), counts
        return self._known[size]


class EqualInfo(TextTokenizer[EqualInfoConfig]):
    """Windows of text as numbers of equally many bits, under counts of pairs and triples of bytes.

    Counts behind bytes a, b are ``16 * count(a b x) + 4 * count(b x) + count(x)``. Any bytes come back, and any id decodes. Ids
    are the same on every machine.
    """

    Config = EqualInfoConfig
    family = "equal_info"
    identity = ("singles", "pair_keys", "pair_counts", "triple_keys", "triple_counts")
    checkpoint = Checkpoint(
        recognises=lambda keys: set(keys) == set(EqualInfo.identity),
        convert=lambda state, config: (
            EqualInfoConfig(config.bits if config else 16, len(state["pair_keys"]), len(state["triple_keys"])),
            dict(state),
        ),
    )

    singles: Tensor
    pair_keys: Tensor
    pair_counts: Tensor
    triple_keys: Tensor
    triple_counts: Tensor

    def __init__(self, config: EqualInfoConfig | None = None, *, name: str = "equal-info") -> None:
        super().__init__(config or EqualInfoConfig(), name)
        self._coder: Derived[WindowCoder] = Derived()
        self.register_buffer("singles", torch.zeros(256, dtype=torch.int32))
        for name_, entries in (("pair", self.config.pairs), ("triple", self.config.triples)):
            self.register_buffer(f"{name_}_keys", torch.zeros(entries, dtype=torch.int32))
            self.register_buffer(f"{name_}_counts", torch.zeros(entries, dtype=torch.int32))

    @classmethod
    def of(cls, text: bytes, *, bits: int = 16, least: int = 2, name: str = "equal-info") -> EqualInfo:
        """A tokenizer with the counts of a text; pairs and triples that occur fewer than ``least`` times are left out."""
        octets = np.frombuffer(text, np.uint8).astype(np.int32)
        tables = []
        for order in (2, 3):
            keys = sum(octets[place : len(octets) - order + 1 + place] << (8 * (order - 1 - place)) for place in range(order))
            numbers, counts = np.unique(keys, return_counts=True)
            tables.append((numbers[counts >= least], counts[counts >= least]))
        model = cls(EqualInfoConfig(bits, *(len(numbers) for numbers, _ in tables)), name=name)
        model.singles = torch.from_numpy(np.bincount(octets, minlength=256).astype(np.int32))
        for part, (numbers, counts) in zip(("pair", "triple"), tables, strict=True):
            setattr(model, f"{part}_keys", torch.from_numpy(numbers.astype(np.int32)))
            setattr(model, f"{part}_counts", torch.from_numpy(counts.astype(np.int32)))
        return model

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="text",
            vocab_size=1 << (self.config.bits if self.config.ids == 1 else 16),
            dim=0,
            lossless=True,
            fingerprint=self.fingerprint,
        )

    def coder(self) -> WindowCoder:
        """The coder with the counts as they are."""
        return self._coder.of(tuple(self.buffers()), self._made)

    def _made(self) -> WindowCoder:
        singles = self.singles.cpu().numpy().astype(np.int64)
        tables = [
            (getattr(self, f"{part}_keys").cpu().numpy(), getattr(self, f"{part}_counts").cpu().numpy())
            for part in ("pair", "triple")
        ]

        def counts(recent: bytes) -> NDArray[np.int64]:
            found = singles.copy()
            for order, weight, (keys, numbers) in zip((1, 2), (4, 16), tables, strict=True):
                if len(recent) >= order:
                    first = int.from_bytes(recent[-order:], "big") << 8
                    start, end = np.searchsorted(keys, [first, first + 256])
                    found[keys[start:end] - first] += weight * numbers[start:end].astype(np.int64)
            return found

        return WindowCoder(counts, self.config.bits)

    def ids(self, octets: UInt8[Tensor, " length"]) -> Int[Tensor, " _"]:
        """The id of each window, or its ids from the first 16 bits on."""
        codes, _ = self.coder().encode(octets.numpy().tobytes())
        return torch.tensor(list(split(codes, self.config)), dtype=torch.int64)

    def octets(self, ids: Int[Tensor, " length"], meta: Meta) -> NDArray[np.uint8]:
        """The bytes of the windows.

        Raises:
            InputError: a window's last ids are missing.
        """
        return np.frombuffer(b"".join(self._windows(ids)), np.uint8)

    def widths(self, ids: Int[Tensor, " length"], meta: Meta) -> Int[Tensor, " length"]:
        """Bytes of each window; those of several ids are the first one's."""
        widths = torch.zeros(len(ids), dtype=torch.int64)
        widths[:: self.config.ids] = torch.tensor([len(window) for window in self._windows(ids)], dtype=torch.int64)
        return widths

    def _windows(self, ids: Int[Tensor, " length"]) -> list[bytes]:
        count = self.config.ids
        if len(ids) % count:
            raise InputError(f"{len(ids)} ids are no whole number of windows of {count}")
        coder, numbers = self.coder(), ids.tolist()
        windows = []
        for start in range(0, len(numbers), count):
            code = 0
            for number in numbers[start : start + count]:
                code = code << 16 | number
            windows.append(coder.decode(code))
        return windows


def split(codes: Iterable[int], config: EqualInfoConfig) -> Iterable[int]:
    """Ids of codes: themselves, or 16 bits each from the first on."""
    for code in codes:
        if config.ids == 1:
            yield code
        else:
            yield from (code >> (16 * place) & 0xFFFF for place in reversed(range(config.ids)))


TOKENIZER = EqualInfo

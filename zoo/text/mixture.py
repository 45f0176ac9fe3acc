"""The mixture of data behind the merges of a BPE tokenizer, by linear programming.

Hayase et al., "Data mixture inference: What do BPE tokenizers reveal about their training data?" (arXiv 2407.16607). The merge
that a trainer takes is the most frequent pair of its data. With counts of pairs in samples of each category, every step of the
list says which mixtures could have led to it.
"""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.errors import InputError, MissingExtraError
from zoo.utf8 import utf8

Pair = tuple[str, str]

# A pair is a rival of the merge that was taken if it is more frequent by more than this share.
_TOLERANCE = 1e-6
_RIVALS, _AT_ONCE = 10, 100


@dataclass(frozen=True)
class Mixture:
    """Shares of categories in the data that a merge list was trained on.

    Attributes:
        shares: of each category among the pairs of the training data, adding up to 1.
        intervals: for each category the least and the largest share with the same objective.
        of_bytes: the shares among bytes.
        objective: what the counts have to be changed by, in shares of pairs; 0 where a mixture explains every merge.
        missing: merges that no sample has.
        constraints: inequalities that the solution took.
    """

    shares: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    of_bytes: dict[str, float]
    objective: float
    missing: tuple[Pair, ...]
    constraints: int


def mixture(
    tokenizer: Any,
    samples: Mapping[str, str | Iterable[str] | Mapping[str, int]],
    *,
    merges: int | None = None,
    intervals: bool = True,
) -> Mixture:
    """The mixture of categories that a BPE tokenizer was trained on, as shares of pairs.

    The shares are among the given categories alone. Take out of the list before what somebody added to it by hand, and
    SentencePiece's redundant merges.

    Args:
        tokenizer: a fast tokenizer of ``transformers`` or a ``tokenizers.Tokenizer``, whose pre-tokenization cuts the samples
            into words; or a list of merges, each a pair or ``"left right"``, with samples of counted words.
        samples: of each category a text, several texts, or how often each word occurs.
        merges: use the first ones of the list alone.
        intervals: work out the interval of each share too, two programmes each.

    Returns:
        The shares that make the sum of all violations smallest, arXiv 2407.16607, section 3.2.

    Raises:
        InputError: the tokenizer's model is not BPE, there are fewer than two categories, or a sample has no pair.
        MissingExtraError: scipy is not installed.

    >>> words = {"a": {"ab": 3, "cd": 1}, "c": {"ab": 1, "cd": 3}}
    >>> found = zoo.text.mixture(["a b", "c d"], words)
    >>> found.objective, [round(end, 6) for end in found.intervals["a"]]
    (0.0, [0.5, 1.0])
    """
    pairs, split = _merges_of(tokenizer)
    if not isinstance(samples, Mapping):
        raise InputError(f"samples are a dictionary by category, not {type(samples).__name__}")
    if merges is not None and merges < 1:
        raise InputError(f"a mixture takes at least one merge, not {merges}")
    if len(samples) < 2:
        raise InputError(f"a mixture is of at least two categories, not {len(samples)}")
    counts = {}
    for name, sample in samples.items():
        words = sample if isinstance(sample, Mapping) else _counted(name, sample, split)
        if odd := next((word for word, count in words.items() if not 0 <= count < math.inf), None):
            raise InputError(f"the sample of {name!r} has the word {odd!r} {words[odd]} times")
        counts[name] = WordCounts(words)
        if not counts[name].pairs:
            raise InputError(f"the sample of {name!r} has no word of two symbols")
    return _Programme(pairs[:merges], counts).solved(intervals)


class WordCounts:
    """Counts of adjacent pairs in words that are merged step by step.

    Args:
        words: how often each occurs.

    Attributes:
        pairs: how often each pair occurs now.
        symbols: bytes of all words, by their letters.
    """

    def __init__(self, words: Mapping[str, int]) -> None:
        self._words = [(list(word), count) for word, count in words.items() if count > 0]
        self.symbols = sum(len(word) * count for word, count in self._words)
        self.pairs: Counter[Pair] = Counter()
        self._where: dict[Pair, set[int]] = {}
        for number in range(len(self._words)):
            self._add(number, 1, {})

    def merge(self, pair: Pair) -> dict[Pair, int]:
        """Apply a merge.

        Returns:
            The new count of each pair whose count has changed.
        """
        changed: dict[Pair, int] = {}
        for number in sorted(self._where.get(pair, ())):
            self._add(number, -1, changed)
            symbols, count = self._words[number]
            merged, place = [], 0
            while place < len(symbols):
                if tuple(symbols[place : place + 2]) == pair:
                    merged.append(pair[0] + pair[1])
                    place += 2
                else:
                    merged.append(symbols[place])
                    place += 1
            self._words[number] = (merged, count)
            self._add(number, 1, changed)
        return {pair: self.pairs.get(pair, 0) for pair, before in changed.items() if self.pairs.get(pair, 0) != before}

    def _add(self, number: int, sign: int, changed: dict[Pair, int]) -> None:
        symbols, count = self._words[number]
        for pair in pairwise(symbols):
            changed.setdefault(pair, self.pairs.get(pair, 0))
            total = self.pairs.get(pair, 0) + sign * count
            if total:
                self.pairs[pair] = total
            else:
                del self.pairs[pair]
            if sign > 0:
                self._where.setdefault(pair, set()).add(number)
            else:
                self._where.get(pair, set()).discard(number)


class _Programme:
    """The linear programme, whose inequalities are added as they are violated.

    Variables are the shares, a violation of each step and one of each pair that is a rival.
    """

    def __init__(self, merges: Sequence[Pair], counts: Mapping[str, WordCounts]) -> None:
        self.names, self.counts = list(counts), list(counts.values())
        self.totals = np.array([sum(part.pairs.values()) for part in self.counts], dtype=np.float64)
        self.bytes_per_pair = np.array([part.symbols for part in self.counts]) / self.totals
        # Counts as they were before the first merge, and what each merge changes.
        self.first = {pair: self._vector(pair) for part in self.counts for pair in part.pairs}
        self.steps: list[tuple[Pair, dict[Pair, NDArray[np.float64]]]] = []
        self.missing = []
        for pair in merges:
            if not any(part.pairs.get(pair) for part in self.counts):
                self.missing.append(pair)
                continue
            changed: set[Pair] = set()
            for part in self.counts:
                changed.update(part.merge(pair))
            self.steps.append((pair, {other: self._vector(other) for other in changed}))
        self.rows: list[tuple[int, Pair, NDArray[np.float64]]] = []
        self.slack: dict[Pair, int] = {}
        self.seen: set[tuple[int, Pair]] = set()

    def _vector(self, pair: Pair) -> NDArray[np.float64]:
        return np.array([part.pairs.get(pair, 0) for part in self.counts]) / self.totals

    def solved(self, intervals: bool) -> Mixture:
        shares = np.full(len(self.names), 1 / len(self.names))
        steps, pairs = np.zeros(len(self.steps)), dict[Pair, float]()
        objective = 0.0
        while self._tightened(shares, steps, pairs):
            solution, objective = self._minimum(self._costs())
            shares, steps, pairs = self._parts(solution)
        ends = {}
        if intervals:
            for number, name in enumerate(self.names):
                least, most = self._range(number, objective)
                ends[name] = (min(least, float(shares[number])), max(most, float(shares[number])))
        of_bytes = shares * self.bytes_per_pair
        return Mixture(
            dict(zip(self.names, shares.tolist(), strict=True)),
            ends,
            dict(zip(self.names, (of_bytes / of_bytes.sum()).tolist(), strict=True)),
            objective,
            tuple(self.missing),
            len(self.rows),
        )

    def _tightened(self, shares: NDArray[np.float64], steps: NDArray[np.float64], pairs: Mapping[Pair, float]) -> bool:
        """Whether a solution violates inequalities that were not there, and are now."""
        fresh = self._violated(shares, steps, pairs)
        for index, pair, row in fresh:
            self.seen.add((index, pair))
            self.slack.setdefault(pair, len(self.slack))
            self.rows.append((index, pair, row))
        return bool(fresh)

    def _violated(
        self, shares: NDArray[np.float64], steps: NDArray[np.float64], pairs: Mapping[Pair, float]
    ) -> list[tuple[int, Pair, NDArray[np.float64]]]:
        """Inequalities that the solution violates: of each step the most frequent rivals, until there are enough."""
        vectors = dict(self.first)
        values = {pair: float(shares @ vector) - pairs.get(pair, 0.0) for pair, vector in vectors.items()}
        queue = [(-value, pair) for pair, value in values.items()]
        heapq.heapify(queue)
        found = []
        for index, (merge, changed) in enumerate(self.steps):
            allowed = float(shares @ vectors[merge]) + steps[index] + _TOLERANCE
            kept, rivals = [], 0
            while queue and -queue[0][0] > allowed and rivals < _RIVALS:
                value, pair = heapq.heappop(queue)
                if values.get(pair) != -value:
                    continue
                kept.append((value, pair))
                if pair != merge and (index, pair) not in self.seen:
                    found.append((index, pair, vectors[merge] - vectors[pair]))
                    rivals += 1
            for entry in kept:
                heapq.heappush(queue, entry)
            if len(found) >= _AT_ONCE:
                break
            for pair, vector in changed.items():
                vectors[pair] = vector
                values[pair] = float(shares @ vector) - pairs.get(pair, 0.0)
                heapq.heappush(queue, (-values[pair], pair))
        return found

    def _costs(self) -> NDArray[np.float64]:
        count = len(self.names)
        return np.concatenate([np.zeros(count), np.ones(len(self.steps) + len(self.slack))])

    def _minimum(self, costs: NDArray[np.float64], most: float | None = None) -> tuple[NDArray[np.float64], float]:
        """The solution with the least cost, whose violations add up to ``most`` at most."""
        try:
            from scipy.optimize import linprog
            from scipy.sparse import csr_array, vstack
        except ImportError as error:
            raise MissingExtraError('mixtures need scipy: pip install "tokenizer-zoo[text]"') from error
        count, width = len(self.names), len(costs)
        values, columns, ends = [], [], [0]
        for index, pair, row in self.rows:
            values += [*(-row).tolist(), -1.0, -1.0]
            columns += [*range(count), count + index, count + len(self.steps) + self.slack[pair]]
            ends.append(len(values))
        upper: Any = csr_array((values, columns, ends), shape=(len(self.rows), width))
        limits = np.zeros(len(self.rows))
        if most is not None:
            upper = vstack([upper, csr_array(self._costs()[None])])
            limits = np.append(limits, most)
        equal = csr_array((np.ones(count), (np.zeros(count, int), np.arange(count))), shape=(1, width))
        bounds = [(0, 1)] * count + [(0, None)] * (width - count)
        result = linprog(costs, A_ub=upper, b_ub=limits, A_eq=equal, b_eq=[1], bounds=bounds, method="highs")
        if result.x is None:
            raise InputError(f"the linear programme has no solution: {result.message}")
        return result.x, max(0.0, float(result.fun))

    def _range(self, number: int, objective: float) -> tuple[float, float]:
        """Least and largest share of a category without more violations."""
        ends = []
        for sign in (1, -1):
            while True:
                costs = np.zeros_like(self._costs())
                costs[number] = sign
                solution, _ = self._minimum(costs, objective * (1 + 1e-9) + 1e-12)
                if not self._tightened(*self._parts(solution)):
                    break
            ends.append(float(solution[number]))
        return ends[0], ends[1]

    def _parts(self, solution: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], dict[Pair, float]]:
        count, steps = len(self.names), len(self.steps)
        slack = solution[count + steps :]
        pairs = {pair: float(slack[place]) for pair, place in self.slack.items()}
        return solution[:count], solution[count : count + steps], pairs


def _merges_of(tokenizer: Any) -> tuple[list[Pair], Any]:
    """The ordered merges, and the pre-tokenizer."""
    if isinstance(tokenizer, Sequence) and not isinstance(tokenizer, str):
        given, split = tokenizer, None
    else:
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(backend, "to_str"):
            raise InputError(f"expected a fast tokenizer or a list of merges, not {type(tokenizer).__name__}")
        model = json.loads(backend.to_str())["model"]
        if model["type"] != "BPE":
            raise InputError(f"the tokenizer's model is {model['type']}, not BPE: it has no merges")
        given, split = model["merges"], backend
    pairs = []
    for merge in given:
        parts = tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
        if len(parts) != 2 or not all(parts):
            raise InputError(f"a merge is a pair, not {merge!r}")
        pairs.append(parts)
    if not pairs:
        raise InputError("there are no merges")
    return pairs, split


def _counted(name: str, sample: Any, split: Any) -> Counter[str]:
    """Words of a sample as the tokenizer cuts them."""
    if split is None:
        raise InputError("a list of merges goes with samples of counted words, {word: count}")
    words: Counter[str] = Counter()
    if isinstance(sample, bytes) or not isinstance(sample, Iterable):
        raise InputError(f"the sample of {name!r} must be a text, texts or counted words, not {type(sample).__name__}")
    for text in [sample] if isinstance(sample, str) else sample:
        if not isinstance(text, str):
            raise InputError(f"the sample of {name!r} holds {type(text).__name__}: a text is a string")
        try:
            utf8(text)
        except InputError as error:
            raise InputError(f"the sample of {name!r}: {error.reason}") from error
        if split.normalizer is not None:
            text = split.normalizer.normalize_str(text)
        parts = [(text, None)] if split.pre_tokenizer is None else split.pre_tokenizer.pre_tokenize_str(text)
        words.update(word for word, _ in parts)
    return words

"""LiB, Less-is-Better: a lexicon that reading makes, and the longest of its units at each place of a text.

Yang, Cheng et al., "Less is Better: A cognitively inspired unsupervised model for language segmentation" (CogALex 2020), and
Yang, "Rethinking Tokenization" (2024). A reader goes through sentences by the longest units it knows, remembers pairs that it
meets again, tests a unit against reading without it, and forgets units that it does not use. Skip-grams are left out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from zoo.checkpoint import Checkpoint
from zoo.errors import InputError
from zoo.spec import Spec
from zoo.tokenizer.text import TextTokenizer
from zoo.tokens import Meta

#: Ids of bytes of characters that no unit begins with; units follow by rank.
BYTES = 256


@dataclass(frozen=True)
class LibSettings:
    """Settings of `Reader`.

    Attributes:
        life: documents that a unit on probation is given.
        max_len: characters of the longest unit.
        memory_in: chance that a pair is looked at.
        memory_out: share of the lexicon's end that is put on probation after each document.
        update_rate: share of its rank by which a unit moves.
        mini_gap: most unknown characters that may become a unit.
    """

    life: int = 10
    max_len: int = 12
    memory_in: float = 0.25
    memory_out: float = 0.0001
    update_rate: float = 0.2
    mini_gap: int = 2


@dataclass
class _Trial:
    """A reading that goes on without a unit, beside the one that took it."""

    end: int
    unknown: int
    number: int
    mine: list[str]
    alternative: list[str]


@dataclass
class Reader:
    """The reader of documents, whose lexicon grows.

    All that a training needs to go on is here: copy or pickle it after any epoch, and it goes on as if it had not stopped.

    Attributes:
        documents: each a list of sentences.
        seed: of the generator that draws documents and pairs.
        settings: see `LibSettings`.
        lexicon: units by rank, the best first.
        lives: documents left to the units on probation.

    Raises:
        InputError: there is no document with a character in the first.
    """

    documents: Sequence[Sequence[str]]
    seed: int = 0
    settings: LibSettings = field(default_factory=LibSettings)
    lexicon: list[str] = field(default_factory=list)
    lives: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        if not self.documents:
            raise InputError("there are no documents to read")
        if not self.lexicon:
            self.lexicon = list(dict.fromkeys("".join(self.documents[0])))
            if not self.lexicon:
                raise InputError("the first document has no characters")
            self.lives = dict.fromkeys(self.lexicon, self.settings.life)
        self._index()

    def read(self, epochs: int) -> Reader:
        """Read that many documents, each drawn at random."""
        for _ in range(epochs):
            self.epoch()
        return self

    def epoch(self) -> int:
        """Read one document; returns its number."""
        number = self.random.randrange(len(self.documents))
        seen: set[str] = set()
        rewards: list[tuple[str, int]] = []
        for sentence in self.documents[number]:
            self._sentence(sentence, seen, rewards)
        for unit, left in list(self.lives.items()):
            if left <= 1:
                del self.lives[unit]
                self._forget(unit)
            else:
                self.lives[unit] = left - 1
        self._apply(rewards)
        for unit in self.lexicon[int((1 - self.settings.memory_out) * len(self.lexicon)) :]:
            self.lives.setdefault(unit, self.settings.life)
        self._index()
        return number

    def _sentence(self, sentence: str, seen: set[str], rewards: list[tuple[str, int]]) -> None:
        settings = self.settings
        last, known, place = "", False, 0
        trials: dict[str, _Trial] = {}
        while place < len(sentence):
            self._meet(sentence, place, trials, rewards)
            short, unit = self._two_longest(sentence[place : place + settings.max_len])
            for trial in trials.values():
                trial.mine.append(unit)
            if not unit:
                last, known, place = ("" if known else last) + sentence[place], False, place + 1
                continue
            # The 2 stands for the length of ``last`` in the original's code.
            if 2 + len(unit) <= settings.max_len and self.random.random() < settings.memory_in:
                self._remember(last, known, unit, seen)
            if len(unit) > 1 and short:
                trials[unit] = _Trial(place + len(short), 0, 1, [unit], [short])
            else:
                self.lives.pop(unit, None)
            last, known, place = unit, True, place + len(unit)

    def _meet(self, sentence: str, place: int, trials: dict[str, _Trial], rewards: list[tuple[str, int]]) -> None:
        """Let the readings without a unit catch up, and judge those that have met."""
        for unit, trial in list(trials.items()):
            while trial.end < place:
                found = self.longest(sentence[trial.end : trial.end + self.settings.max_len])
                trial.alternative.append(found)
                trial.end += len(found) or 1
                trial.number += 1
                trial.unknown += not found
            if trial.end == place:
                del trials[unit]
                if self._is_worse(trial):
                    rewards += [(unit, 1), (self.longest(unit[:-1]), -1)]
                else:
                    rewards.append((unit, -1))
                    self.lives.pop(unit, None)

    def _is_worse(self, trial: _Trial) -> bool:
        unknown = sum(not unit for unit in trial.mine)
        mine, other = (
            (unknown, len(trial.mine) - unknown, self._ranks_of(trial.mine)),
            (trial.unknown, trial.number, self._ranks_of(trial.alternative)),
        )
        return mine > other

    def _ranks_of(self, units: Sequence[str]) -> int:
        return sum(self.ranks.get(unit, 0) for unit in units)

    def _remember(self, last: str, known: bool, unit: str, seen: set[str]) -> None:
        """Take up a pair on the second time that it is looked at in a document."""
        candidate = ""
        if known and len(last) + len(unit) <= self.settings.max_len:
            candidate = last + unit
        elif not known and 1 <= len(last) <= self.settings.mini_gap:
            candidate = last
        if not candidate or candidate in self.ranks:
            return
        if candidate in seen:
            seen.remove(candidate)
            self.ranks[candidate] = len(self.lexicon)
            self.lexicon.append(candidate)
        else:
            seen.add(candidate)

    def _apply(self, rewards: Sequence[tuple[str, int]]) -> None:
        for unit, sign in rewards:
            if unit not in self.ranks:
                continue
            rank = self.lexicon.index(unit)
            if rank == 0:
                continue
            target = rank + sign * (int(rank * self.settings.update_rate) + 1)
            if target >= len(self.lexicon):
                self._forget(unit)
            else:
                self.lexicon.insert(target, self.lexicon.pop(rank))

    def _forget(self, unit: str) -> None:
        # A unit that is pushed past the end stays on probation, and may be off the list when that runs out.
        if unit in self.ranks:
            self.lexicon.remove(unit)
            del self.ranks[unit]

    def _index(self) -> None:
        self.ranks = {unit: rank for rank, unit in enumerate(self.lexicon)}

    def longest(self, text: str) -> str:
        """The longest unit that a text begins with; empty where there is none."""
        return next(beginnings(self.ranks, text), "")

    def _two_longest(self, text: str) -> tuple[str, str]:
        found = beginnings(self.ranks, text)
        longest = next(found, "")
        return next(found, ""), longest


def beginnings(ranks: Mapping[str, int], text: str) -> Iterator[str]:
    """Units that a text begins with, the longest first."""
    for end in range(len(text), 0, -1):
        if text[:end] in ranks:
            yield text[:end]


def chunks(ranks: Mapping[str, int], text: str, window: int) -> list[str]:
    """The longest unit at each place, and a character where there is none.

    Args:
        ranks: of the units.
        text: to cut.
        window: characters that are looked at.
    """
    found, place = [], 0
    while place < len(text):
        unit = next(beginnings(ranks, text[place : place + window]), text[place])
        found.append(unit)
        place += len(unit)
    return found


def subchunks(ranks: Mapping[str, int], units: Sequence[str]) -> list[str]:
    """Units cut in two where both halves rank better than the whole, twice."""
    parts = list(units)
    for _ in range(2):
        parts = [half for unit in parts for half in _halves(ranks, unit)]
    return parts


def _halves(ranks: Mapping[str, int], unit: str) -> tuple[str, ...]:
    if unit not in ranks:
        return (unit,)
    firsts = [first for first in beginnings(ranks, unit[:-1]) if unit[len(first) :] in ranks]
    pairs = [(ranks[first], ranks[unit[len(first) :]], first) for first in firsts]
    if not pairs:
        return (unit,)
    first_rank, second_rank, first = min(pairs)
    return (first, unit[len(first) :]) if max(first_rank, second_rank) < ranks[unit] else (unit,)


@dataclass(frozen=True)
class LibConfig:
    """Settings of a model.

    Attributes:
        units: in the lexicon.
        octets: of all units in UTF-8.
        window: characters that are looked at for a unit, 12 as in training; the original's reader looks at 10.
        split: cut units in two where both halves rank better.
    """

    units: int = 0
    octets: int = 0
    window: int = 12
    split: bool = False


class Lib(TextTokenizer[LibConfig]):
    """Units of a lexicon by rank, and bytes of the characters between them.

    Ids 0 to 255 are bytes, 256 the best unit. Bytes that are no UTF-8 are ids of their own, so that everything comes back.
    """

    Config = LibConfig
    family = "lib"
    identity = ("letters", "ends")
    checkpoint = Checkpoint(
        recognises=lambda keys: set(keys) == {"letters", "ends"},
        convert=lambda state, config: (
            LibConfig(len(state["ends"]), len(state["letters"]), *((config.window, config.split) if config else ())),
            dict(state),
        ),
    )

    def __init__(self, config: LibConfig | None = None, *, name: str = "lib") -> None:
        super().__init__(config or LibConfig(), name)
        self.register_buffer("letters", torch.zeros(self.config.octets, dtype=torch.uint8))
        self.register_buffer("ends", torch.zeros(self.config.units, dtype=torch.int32))

    letters: Tensor
    ends: Tensor

    @classmethod
    def of(cls, lexicon: Sequence[str], *, window: int = 12, split: bool = False, name: str = "lib") -> Lib:
        """A tokenizer with a lexicon, such as a `Reader`'s.

        Raises:
            InputError: a unit is empty or there twice.
        """
        if len(set(lexicon)) != len(lexicon) or "" in lexicon:
            raise InputError("the units of a lexicon are different, and not empty")
        encoded = [unit.encode() for unit in lexicon]
        model = cls(LibConfig(len(encoded), sum(map(len, encoded)), window, split), name=name)
        model.letters = torch.tensor(list(b"".join(encoded)), dtype=torch.uint8)
        model.ends = torch.tensor(np.cumsum([len(unit) for unit in encoded]), dtype=torch.int32)
        return model

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="text",
            vocab_size=BYTES + self.config.units,
            dim=0,
            lossless=True,
            fingerprint=self.fingerprint,
        )

    @property
    def lexicon(self) -> list[str]:
        """Units by rank."""
        octets, starts = self.letters.cpu().numpy().tobytes(), [0, *self.ends.tolist()]
        return [octets[start:end].decode() for start, end in pairwise(starts)]

    def ids(self, octets: UInt8[Tensor, " length"]) -> Int[Tensor, " _"]:
        """The units of a text, and the bytes of unknown characters."""
        # Bytes that are no UTF-8 go through as lone surrogates, which no unit has.
        text = octets.numpy().tobytes().decode(errors="surrogateescape")
        ranks, ids = {unit: rank for rank, unit in enumerate(self.lexicon)}, list[int]()
        parts = chunks(ranks, text, self.config.window)
        for part in subchunks(ranks, parts) if self.config.split else parts:
            rank = ranks.get(part)
            ids += part.encode(errors="surrogateescape") if rank is None else [BYTES + rank]
        return torch.tensor(ids, dtype=torch.int64)

    def octets(self, ids: Int[Tensor, " length"], meta: Meta) -> NDArray[np.uint8]:
        """The bytes of units and of single bytes."""
        units = [unit.encode() for unit in self.lexicon]
        content = b"".join(bytes([number]) if number < BYTES else units[number - BYTES] for number in ids.tolist())
        return np.frombuffer(content, np.uint8)

    def widths(self, ids: Int[Tensor, " length"], meta: Meta) -> Int[Tensor, " length"]:
        """Bytes of each unit; 1 for a byte."""
        ends = self.ends.cpu().long()
        lengths = torch.cat([torch.ones(BYTES, dtype=torch.int64), ends.diff(prepend=ends.new_zeros(1))])
        return lengths[ids]


TOKENIZER = Lib

"""Words and hashed trigrams of T-Free (arXiv 2406.19223): no vocabulary, each word is a few ids of a table."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo.errors import InputError

_SPECIAL = re.compile(r"(<\|.*?\|>)")
_PIECE = re.compile(r"[^\W\d_]+|.", re.DOTALL)

SPACE, NO_SPACE, LINE = "<|ws|>", "<|no_ws|>", "<|\n|>"
_PACKED = {SPACE: ("<|2<-ws->|>", "<|4<-ws->|>"), LINE: ("<|2<-\n->|>", "<|4<-\n->|>")}
_UNPACKED = {packed: [single] * count for single, both in _PACKED.items() for packed, count in zip(both, (2, 4), strict=True)}

# Behind the first and in front of the second no space is expected.
_AFTER = set("#$=-+*/'\"\\(<[]~^&@%_\n ")
_BEFORE = set(".,:;?!=-+*/'\"\\)>]~^&@%_\n 0123456789")


def words(text: str) -> list[str]:
    """The words of a text, with markers where a space is and was not expected, or is not and was."""
    found: list[str] = []
    for number, part in enumerate(_SPECIAL.split(text)):
        found += [part] if number % 2 else _stretch(part)
    return found


def joined(parts: Sequence[str]) -> str:
    """The text of words; `words` undone, unless the text has the markers' own letters."""
    return "".join(written(parts))


def stretches(text: str) -> list[str]:
    """The text in parts that end where words do; a space that words leave out belongs to the next one."""
    found: list[str] = []
    for number, part in enumerate(_SPECIAL.split(text)):
        # What looks like a marker in the text is no marker here.
        found += [part] if number % 2 else written(_stretch(part))
    return [part for part in found if part]


def written(parts: Sequence[str]) -> Iterator[str]:
    """The text of each word, with the expected space in front of it."""
    before = ""
    for part in parts:
        singles = _UNPACKED.get(part, [part])
        text = "".join({SPACE: " ", LINE: "\n", NO_SPACE: ""}.get(single, single) for single in singles)
        plain = part == LINE or part in _UNPACKED or not _SPECIAL.fullmatch(part)
        yield " " + text if before and plain and text and _expected(before, text) else text
        before = text if plain else ""


def _stretch(text: str) -> list[str]:
    """Words of a text without specials."""
    pieces: list[str] = []
    for piece in _PIECE.findall(text):
        if pieces and _expected(pieces[-1], piece):
            pieces.append(NO_SPACE)
        pieces.append(piece)
    found = []
    for place, piece in enumerate(pieces):
        if piece == "\n":
            found.append(LINE)
        elif piece != " ":
            found.append(piece)
        elif not 0 < place < len(pieces) - 1 or not _expected(pieces[place - 1], pieces[place + 1]):
            found.append(SPACE)
    return [word for single, run in groupby(found) for word in _packed(single, len(list(run)))]


def _expected(first: str, second: str) -> bool:
    return first[-1] not in _AFTER and second[0] not in _BEFORE


def _packed(single: str, count: int) -> list[str]:
    """A run of equal words, those of spaces and line feeds in twos and fours."""
    if single not in _PACKED:
        return [single] * count
    two, four = _PACKED[single]
    halves, found = count // 2, []
    while halves > 2:
        found.append(four)
        halves -= 2
    if halves:
        found.append(two if halves == 1 else four)
    return found + [single] * (count % 2)


class Trigrams:
    """The ids of words: for each trigram of bytes a few rows of a table of vectors.

    Args:
        vocabulary: rows of the table.
        population: ids of a trigram.
        lowercase: how many of them are those of the trigram in lower case.

    Raises:
        InputError: the numbers do not fit together.
    """

    def __init__(self, vocabulary: int = 32000, population: int = 10, lowercase: int = 2) -> None:
        if not 0 <= lowercase <= population <= vocabulary or population < 1:
            raise InputError(f"{lowercase} of {population} ids of {vocabulary} cannot be")
        self.vocabulary, self.population, self.lowercase = vocabulary, population, lowercase
        # The whole table has 2^24 rows: rows are worked out when asked for.
        self._row = lru_cache(maxsize=1 << 16)(self._distinct)

    def ids(self, word: str) -> list[list[int]]:
        """The ids of each distinct trigram of a word ``[trigrams][population]``; of one row for a word with ``<|``."""
        if "<|" in word:
            kept = self.population - self.lowercase
            names = [f"{word}_{number}" for number in range(kept)]
            names += [f"{word.lower()}_lower_{number}" for number in range(self.lowercase)]
            return [[_hash(name) % self.vocabulary for name in names]]
        octets = f" {word} ".encode()
        trigrams = dict.fromkeys(octets[place : place + 3] for place in range(len(octets) - 2))
        return [self.row(trigram) for trigram in trigrams]

    def row(self, trigram: bytes) -> list[int]:
        """The ids of three bytes."""
        row = list(self._row(int.from_bytes(trigram, "little")))
        letters = all(byte == 32 or (byte < 128 and chr(byte).isalpha()) for byte in trigram)
        if self.lowercase and letters:
            row[-self.lowercase :] = self._row(int.from_bytes(trigram.lower(), "little"))[-self.lowercase :]
        return row

    def _distinct(self, number: int) -> tuple[int, ...]:
        row: list[int] = []
        for place in range(self.population):
            attempt = 0
            while (found := _hash(f"{number}_{place}_{attempt}") % self.vocabulary) in row:
                attempt += 1
            row.append(found)
        return tuple(sorted(row))

    def embed(self, table: Float[Tensor, "vocabulary dim"], parts: Sequence[str]) -> Float[Tensor, "words dim"]:
        """The vector of each word: the sum of the rows of all ids of its trigrams."""
        vectors = [table[torch.tensor(self.ids(word), dtype=torch.int64).flatten()].sum(0) for word in parts]
        return torch.stack(vectors) if vectors else table.new_zeros(0, table.shape[1])

    def log_probabilities(
        self, logits: Float[Tensor, "positions vocabulary"], dictionary: Sequence[str], edge_weight: float = 1.0
    ) -> Float[Tensor, "positions words"]:
        """Log-probabilities of the words of a dictionary, by the mean activation of their ids against that of all others.

        Each position is scored by itself. The original reads the first one's numbers for all.

        Args:
            logits: of the table's rows.
            dictionary: words to choose from.
            edge_weight: of ids of trigrams with a space at an end.
        """
        active = logits.float().sigmoid()
        whole, scores = active.sum(-1), []
        for word in dictionary:
            trigrams = self._trigrams(word)
            inner, edge = (self._set(trigrams, at_edge) for at_edge in (False, True))
            found = active[:, inner].sum(-1) + edge_weight * active[:, edge].sum(-1)
            count = self.population * len(trigrams)
            scores.append(found / count + (found - whole) / (self.vocabulary - count))
        return torch.stack(scores, -1).log_softmax(-1)

    def _trigrams(self, word: str) -> list[tuple[bytes, list[int]]]:
        if "<|" in word:
            return [(b" ", self.ids(word)[0])]
        octets = f" {word} ".encode()
        return [(part, self.row(part)) for part in dict.fromkeys(octets[i : i + 3] for i in range(len(octets) - 2))]

    @staticmethod
    def _set(trigrams: Sequence[tuple[bytes, list[int]]], at_edge: bool) -> Int[Tensor, " ids"]:
        chosen = {number for part, row in trigrams if (part[:1] == b" " or part[-1:] == b" ") == at_edge for number in row}
        return torch.tensor(sorted(chosen), dtype=torch.int64)


def _hash(text: str) -> int:
    return int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(), 16)

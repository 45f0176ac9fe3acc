"""Byte-pair encoding of one long word by a library that takes short ones.

`tokenizers` merges a word in time that grows faster than its length, and a chromosome is one word. What is cut up here is put
together exactly, by a property of merges in the order of training: a list of tokens is the encoding of its text if and only if
every two neighbours are the encoding of theirs. (van Antwerpen and Neubeck, GitHub's blog of 2024 on the crate ``bpe``;
Berglund and van der Merwe, "Formalizing BPE Tokenization", NCMA 2023.)
"""

from __future__ import annotations

import json
from array import array
from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer

from zoo.errors import CorruptWeightsError, InputError
from zoo.media.genome import IUPAC

#: Letters that are encoded at once.
WINDOW = 4096
#: Letters whose ids are a list at once, which takes much more memory than an array.
_BLOCK = 1 << 20
#: Tokens at the end of a window that are encoded again in the next one, which knows what follows them.
_OVERLAP = 4
#: Tokens of any length that a window must hold, so that it always gets further than what is encoded again.
_LEAST_TOKENS = 16


class Merges:
    """The byte-pair encoding of a ``tokenizer.json``.

    Attributes:
        library: the tokenizer of `tokenizers`.
        vocab_size: ids lie below it.
        unknown: id of a letter that has none of its own.
        before, behind: ids that the file's template puts around a sequence.
        texts: letters of each id; none of a special one.
        lengths: int64 ``[vocab_size]``, how many they are, and 1 of the unknown letter.

    Args:
        file: the file as it is.
        window: letters that are encoded at once.

    Raises:
        CorruptWeightsError: it cannot be read, is of another kind than BPE, or has settings under which a sequence could not be
            encoded in windows or would not come back.
    """

    def __init__(self, file: bytes, window: int = WINDOW) -> None:
        model, merges = _checked_model(file)
        vocabulary: dict[str, int] = model["vocab"]
        try:
            self.library = Tokenizer.from_str(file.decode())
        except Exception as error:  # the library raises nothing else
            raise CorruptWeightsError(f"tokenizers does not take this tokenizer.json: {error}") from error
        self.library.no_truncation()
        self.library.no_padding()
        _require_whole_words(self.library)
        self.vocab_size = max(self.library.get_vocab(with_added_tokens=True).values()) + 1
        self.unknown = vocabulary[model["unk_token"]]
        whole, [bare] = self.library.encode("A").ids, self.library.encode("A", add_special_tokens=False).ids
        place = whole.index(bare)
        self.before, self.behind = tuple(whole[:place]), tuple(whole[place + 1 :])
        self.texts = [""] * self.vocab_size
        for token in {token for token in vocabulary if len(token) == 1} | {left + right for left, right in merges}:
            self.texts[vocabulary[token]] = token
        self.lengths = torch.tensor([len(text) for text in self.texts])
        self.lengths[self.unknown] = 1
        self._lengths: list[int] = self.lengths.tolist()
        self.window = max(window, _LEAST_TOKENS * max(self._lengths))
        self._are_neighbours = lru_cache(1 << 18)(self._encoded_as_two)

    def encode(self, sequence: str) -> array[int]:
        """Ids of a word, exactly those that the library gives it whole."""
        if len(sequence) <= self.window:
            return array("i", self.encode_short([sequence])[0])
        ids, windows = array("i"), Windows(self)
        for start in range(0, len(sequence), _BLOCK):
            ids.extend(windows.push(sequence[start : start + _BLOCK], last=start + _BLOCK >= len(sequence)))
        return ids

    def encode_short(self, sequences: list[str]) -> list[list[int]]:
        """Ids of words that are no longer than a window, each in one call of the library."""
        return [found.ids for found in self.library.encode_batch_fast(sequences, add_special_tokens=False)]

    def are_neighbours(self, left: int, right: int) -> bool:
        """Whether two ids in a row are the encoding of their text."""
        # A letter without an id takes part in no merge.
        return self.unknown in (left, right) or self._are_neighbours(left, right)

    def _encoded_as_two(self, left: int, right: int) -> bool:
        return self.encode_short([self.texts[left] + self.texts[right]]) == [[left, right]]

    def length(self, ids: list[int]) -> int:
        """Letters that ids stand for."""
        lengths = self._lengths
        return sum([lengths[number] for number in ids])


class Windows:
    """The ids of one word that comes in pieces.

    Args:
        merges: the encoding.
    """

    def __init__(self, merges: Merges) -> None:
        self._merges = merges
        # Behind the last cut.
        self._text = ""
        # In front of it, encoded and not yet given away; and the id before them.
        self._held: list[int] = []
        self._held_text = ""
        self._given: int | None = None

    def push(self, piece: str, *, last: bool = False) -> list[int]:
        """Take the next letters, and give the ids that nothing behind them can change; with ``last``, all that are left.

        Raises:
            InputError: the ids of a whole window depend on what follows, so that the word has to be encoded at once.
        """
        merges = self._merges
        given: list[int] = []
        self._text += piece
        position, size = 0, self._merges.window
        while (ahead := len(self._text) - position) > size or (last and ahead):
            window = self._text[position : position + size]
            ids, window = self._continued(merges.encode_short([window])[0], window)
            again = len(window) - min(ahead, size)
            given += self._held
            self._given = given[-1] if given else self._given
            self._held = ids if last and ahead <= size else ids[:-_OVERLAP]
            taken = merges.length(self._held)
            self._held_text = window[:taken]
            position += taken - again
        self._text = self._text[position:]
        if last:
            given += self._held
            self._held = []
        return given

    def _continued(self, ids: list[int], window: str) -> tuple[list[int], str]:
        """The ids of a window and its text, begun so much earlier that they continue those that are held."""
        merges = self._merges
        while (before := self._held[-1] if self._held else self._given) is not None:
            if merges.are_neighbours(before, ids[0]):
                break
            if not self._held:
                raise InputError("its ids depend on what follows a whole window of letters, so that it cannot be cut up")
            taken = merges.length([self._held.pop()])
            window, self._held_text = self._held_text[-taken:] + window, self._held_text[:-taken]
            ids = merges.encode_short([window])[0]
        return ids, window


def _checked_model(file: bytes) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The model of a ``tokenizer.json`` and its merges."""
    try:
        content = json.loads(file)
        model = content["model"]
        kind = model.get("type", "BPE")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptWeightsError(f"this is no tokenizer.json: {error!r}") from error
    if kind != "BPE":
        raise CorruptWeightsError(f"this tokenizer.json is of the kind {kind}, and genomes are encoded by merges of a BPE")
    harmful = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback", "ignore_merges")
    if used := [name for name in harmful if model.get(name)]:
        raise CorruptWeightsError(f"a sequence would not come back from a BPE with {', '.join(used)}")
    if content.get("normalizer"):
        raise CorruptWeightsError("a sequence would not come back from a tokenizer.json with a normalizer")
    vocabulary, listed = model.get("vocab"), model.get("merges")
    if not isinstance(vocabulary, dict) or not isinstance(listed, list):
        raise CorruptWeightsError("this tokenizer.json has no vocabulary or no merges")
    if model.get("unk_token") not in vocabulary:
        raise CorruptWeightsError("a BPE without an unknown token drops letters that it does not know")
    merges = [_pair(merge) for merge in listed]
    known = {token for token in vocabulary if len(token) == 1}
    for left, right in merges:
        if not {left, right} <= known or left + right not in vocabulary:
            raise CorruptWeightsError(f"{left} and {right} are merged before they are there: this is no order of training")
        known.add(left + right)
    return model, merges


def _pair(merge: Any) -> tuple[str, str]:
    """The two sides of a merge, which files write as a list or as one string."""
    sides = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(sides, list) or len(sides) != 2 or not all(isinstance(side, str) for side in sides):
        raise CorruptWeightsError(f"{merge!r:.80} is no merge of two tokens")
    return sides[0], sides[1]


def _require_whole_words(library: Any) -> None:
    """Refuse a tokenizer that cuts a sequence before it merges.

    Raises:
        CorruptWeightsError: it does.
    """
    letters = set(IUPAC) | set(IUPAC.lower())
    added = [token.content for token in library.get_added_tokens_decoder().values()]
    pieces = [] if library.pre_tokenizer is None else library.pre_tokenizer.pre_tokenize_str(IUPAC)
    if len(pieces) > 1 or any(set(token) <= letters for token in added):
        raise CorruptWeightsError("this tokenizer.json cuts a sequence of letters before it merges them")

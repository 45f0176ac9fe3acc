"""Pieces of a tokenizer as bytes: the bytes of each id, and the ids that may follow it.

A list of ids is valid if encoding its own text gives the list back. A tokenizer only ever produces valid lists.
"""

from __future__ import annotations

import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zoo.errors import FormatError, InputError

#: How SentencePiece writes a space.
SPACE = "\u2581"

Allowed = NDArray[np.bool_]


class Pieces(ABC):
    """A vocabulary as bytes.

    Attributes:
        octets: bytes of each id; ``None`` for special ids.
        specials: ids that stand for no text, with their names.
        begin: id in front of a text; ``None`` where the tokenizer has none.
        lead: bytes that the tokenizer puts in front of a text.
        starts: whether a space behind something else always begins a piece.
    """

    def __init__(self, octets: list[bytes | None], specials: dict[int, str], begin: int | None, lead: bytes = b"") -> None:
        self.octets, self.specials, self.begin, self.lead = octets, specials, begin, lead
        self.space = b" "
        longest = max((len(piece) for piece in octets if piece), default=1)
        self.lengths = np.array([len(piece or b"") for piece in octets])
        self.table = np.zeros((len(octets), longest), np.uint8)
        for number, piece in enumerate(octets):
            if piece:
                self.table[number, : len(piece)] = np.frombuffer(piece, np.uint8)
        self.spelled = self.lengths > 0

    def settle(self) -> None:
        """Look at the pieces once they and the space are known."""
        self.starts = not any(self.space in piece.lstrip(self.space) for piece in self.octets if piece)

    def anchor(self, text: bytes) -> int:
        """The last place, 0 at least, at which every valid list has an edge."""
        if not self.starts:
            return 0
        place = text.rfind(self.space)
        while place > 0 and text[:place].endswith(self.space):
            place -= len(self.space)
        return max(0, place)

    @abstractmethod
    def encode(self, text: bytes) -> list[int]:
        """Ids of a text in UTF-8 that has the lead."""

    @abstractmethod
    def follows(self, tokens: Sequence[int]) -> Allowed:
        """The ids that make a valid list behind a valid list; special ids are never among them."""

    def unfinished(self, tokens: Sequence[int]) -> bytes:
        """The bytes of a character that ids begin and do not end."""
        tail = b""
        for number in reversed(tokens):
            tail = (self.octets[number] or b"") + tail
            if len(tail) >= 4:
                break
        return unfinished(tail)


class Merge(NamedTuple):
    """Two pieces that become one.

    Attributes:
        rank: order; lower ones come first.
        merged: id of the result.
    """

    rank: float
    merged: int


class MergePieces(Pieces):
    """Pieces of characters that are merged in an order, with byte pieces for characters that have none.

    Args:
        names: of all ids.
        characters: id of each single character that has a piece.
        bytes_: id of each byte piece, by byte.
        merges: of pairs of ids.
        specials, begin: as for `Pieces`.
        dummy: whether a space is put in front of a text.
        escaped: count a space as the bytes of U+2581.
    """

    def __init__(
        self,
        names: Sequence[str],
        characters: dict[str, int],
        bytes_: dict[int, int],
        merges: dict[tuple[int, int], Merge],
        specials: dict[int, str],
        begin: int | None,
        dummy: bool,
        escaped: bool = False,
    ) -> None:
        if len(bytes_) < 256:
            raise InputError(f"this tokenizer has no byte fallback: {256 - len(bytes_)} bytes have no piece")
        space = SPACE.encode() if escaped else b" "
        of_byte = {number: byte for byte, number in bytes_.items()}
        octets: list[bytes | None] = []
        for number, name in enumerate(names):
            if number in specials:
                octets.append(None)
            elif number in of_byte:
                octets.append(bytes([of_byte[number]]))
            else:
                octets.append(name.encode().replace(SPACE.encode(), space))
        super().__init__(octets, specials, begin, space if dummy else b"")
        self.space = space
        self.characters, self.bytes, self.merges = characters, bytes_, merges
        self._of_byte = of_byte
        self._names = names
        self._lead_bytes = self._allowed_leads()
        self._spines()
        self.settle()

    def encode(self, text: bytes) -> list[int]:
        written = text.decode().replace(" ", SPACE)
        ids: list[int] = []
        for word in _words(written) if self.starts else [written]:
            ids += [node.piece for node in self._merged(self._symbols(word))]
        return ids

    def follows(self, tokens: Sequence[int]) -> Allowed:
        tail = self.unfinished([number for number in tokens[-4:] if number in self._of_byte]) if tokens else b""
        if tail and tokens[-1] in self._of_byte:
            return self._continuations(tail)
        allowed = self._lead_bytes | self._whole
        if tokens and tokens[-1] not in self._of_byte:
            allowed = allowed & ~self._merging_behind(tokens[-1])
        return allowed

    def _symbols(self, word: str) -> list[int]:
        symbols: list[int] = []
        for character in word:
            if character in self.characters:
                symbols.append(self.characters[character])
            else:
                symbols += [self.bytes[byte] for byte in character.encode()]
        return symbols

    def _merged(self, symbols: list[int]) -> list[_Node]:
        """The word's pieces: the best adjacent pair becomes one piece, of equal ones the first, until there is none."""
        nodes = [_Node(symbol, None, None, -np.inf) for symbol in symbols]
        while len(nodes) > 1:
            best, place = None, 0
            for index, (left, right) in enumerate(pairwise(nodes)):
                merge = self.merges.get((left.piece, right.piece))
                if merge is not None and (best is None or merge.rank < best.rank):
                    best, place = merge, index
            if best is None:
                break
            nodes[place : place + 2] = [_Node(best.merged, nodes[place], nodes[place + 1], best.rank)]
        return nodes

    def _spines(self) -> None:
        """For each piece that comes of its own text: what lies at its edges while it is merged, and until which rank."""
        self._whole = np.zeros(len(self.octets), bool)
        self._right: dict[int, list[tuple[int, float]]] = {}
        left: dict[int, list[tuple[int, float]]] = {}
        for number, name in enumerate(self._names):
            if number in self.specials or number in self._of_byte:
                continue
            nodes = self._merged(self._symbols(name))
            if len(nodes) != 1 or nodes[0].piece != number:
                continue
            self._whole[number] = True
            self._right[number] = list(nodes[0].spine(right=True))
            if self._asked_for(number):
                for piece, until in nodes[0].spine(right=False):
                    left.setdefault(piece, []).append((number, until))
        self._left = {
            piece: (np.array([number for number, _ in found]), np.array([until for _, until in found]))
            for piece, found in left.items()
        }
        self._partners: dict[int, list[tuple[int, float]]] = {}
        for (first, second), merge in self.merges.items():
            if second in self._left:
                self._partners.setdefault(first, []).append((second, merge.rank))
        self._known: dict[int, Allowed] = {}

    def _asked_for(self, number: int) -> bool:
        """Whether it matters if a piece merges with one before it."""
        return True

    def _merging_behind(self, last: int) -> Allowed:
        """Pieces whose edge merges with that of ``last`` before either is whole."""
        if last not in self._known:
            merging = np.zeros(len(self.octets), bool)
            for piece, until in self._right.get(last, ()):
                for partner, rank in self._partners.get(piece, ()):
                    # Of equal merges the first is made first: inside of the left piece, then across, then inside of the right.
                    if rank < until:
                        numbers, ends = self._left[partner]
                        merging[numbers[rank <= ends]] = True
            self._known[last] = merging
        return self._known[last]

    def _allowed_leads(self) -> Allowed:
        """Byte pieces that may begin a character: one that has no piece."""
        allowed = np.zeros(len(self.octets), bool)
        for byte, number in self.bytes.items():
            one = chr(byte) if byte < 128 else ""
            allowed[number] = 0xC2 <= byte <= 0xF4 or (byte < 128 and one.replace(" ", SPACE) not in self.characters)
        return allowed

    def _continuations(self, tail: bytes) -> Allowed:
        allowed = np.zeros(len(self.octets), bool)
        for byte in range(0x80, 0xC0):
            longer = tail + bytes([byte])
            if unfinished(longer) == longer:
                allowed[self.bytes[byte]] = True
                continue
            try:
                character = longer.decode()
            except UnicodeDecodeError:
                continue
            allowed[self.bytes[byte]] = character not in self.characters
        return allowed


class _Node(NamedTuple):
    """A piece as it was merged."""

    piece: int
    left: _Node | None
    right: _Node | None
    rank: float

    def spine(self, right: bool) -> Iterator[tuple[int, float]]:
        """Pieces at one edge, the whole first, each with the rank at which it is merged into the one before."""
        node: _Node | None = self
        until = np.inf
        while node is not None:
            yield node.piece, until
            until = node.rank
            node = node.right if right else node.left


class BytePieces(Pieces):
    """Pieces of a byte-level tokenizer of the library ``tokenizers``: valid is what encoding the text again gives back.

    Args:
        backend: a ``tokenizers.Tokenizer`` whose model is BPE over the bytes' letters.
        specials, begin: as for `Pieces`.
    """

    def __init__(self, backend: Any, specials: dict[int, str], begin: int | None) -> None:
        state = json.loads(backend.to_str())
        letters = _byte_letters()
        plain = {token["id"]: token["content"] for token in state["added_tokens"] if token["id"] not in specials}
        octets: list[bytes | None] = [None] * backend.get_vocab_size(with_added_tokens=True)
        for name, number in backend.get_vocab(with_added_tokens=True).items():
            if number in plain:
                octets[number] = plain[number].encode()
            elif number not in specials and all(letter in letters for letter in name):
                octets[number] = bytes(letters[letter] for letter in name)
        if missing := 256 - len({piece for piece in octets if piece and len(piece) == 1}):
            raise InputError(f"this tokenizer has no byte fallback: {missing} bytes have no piece")
        super().__init__(octets, specials, begin)
        self._backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=False)
        merges = {}
        for rank, merge in enumerate(state["model"]["merges"]):
            first, second = merge.split(" ") if isinstance(merge, str) else merge
            merges[vocabulary[first], vocabulary[second]] = Merge(rank, vocabulary[first + second])
        # Bytes as characters: the rule of pairs for characters that are not finished.
        names = [""] * len(octets)
        for name, number in vocabulary.items():
            names[number] = name
        known = set(vocabulary.values())
        ignored = {number: "" for number in range(len(octets)) if number not in known or number in specials}
        single = {name: number for name, number in vocabulary.items() if len(name) == 1}
        self._pairs = _ByteMerges(names, single, merges, ignored, self._ragged())
        self._known: dict[tuple[int, ...], Allowed] = {}
        self.settle()
        self._sort()

    def encode(self, text: bytes) -> list[int]:
        ids: list[int] = self._backend.encode(text.decode(), add_special_tokens=False).ids
        return ids

    def follows(self, tokens: Sequence[int]) -> Allowed:
        tail = self._since_anchor(tokens)
        if tail in self._known:
            return self._known[tail]
        before = b"".join(self.octets[number] or b"" for number in tail)
        merging = self._pairs._merging_behind(tail[-1]) if tail else np.zeros(len(self.octets), bool)
        allowed = self._going_on(tail, before, merging) if unfinished(before) else self._behind(tail, before, merging)
        if len(self._known) >= 256:
            self._known.clear()
        self._known[tail] = allowed
        return allowed

    def _behind(self, tail: tuple[int, ...], before: bytes, merging: Allowed) -> Allowed:
        """Pieces that may follow whole characters."""
        # Whether a piece of an unfinished character is valid shows when it is finished; what merges now never is.
        allowed = self._begun & ~merging
        try:
            text = before.decode()
        except UnicodeDecodeError:
            return np.zeros(len(self.octets), bool)
        numbers = self._complete
        if self.starts and before and not before.endswith(b" "):
            allowed |= self._first
            numbers = self._inner
        for number, encoding in zip(
            numbers,
            self._backend.encode_batch_fast([text + self._strings[number] for number in numbers], add_special_tokens=False),
            strict=True,
        ):
            allowed[number] = encoding.ids == [*tail, number]
        return allowed

    def _going_on(self, tail: tuple[int, ...], before: bytes, merging: Allowed) -> Allowed:
        """Pieces that may follow the beginning of a character."""
        allowed = np.zeros(len(self.octets), bool)
        texts, numbers = [], []
        for number in np.flatnonzero(self.spelled).tolist():
            whole = before + self.octets[number]  # type: ignore[operator]  # spelled
            rest = unfinished(whole)
            try:
                text = whole[: len(whole) - len(rest)].decode()
            except UnicodeDecodeError:
                continue
            if rest:
                allowed[number] = not merging[number]
            else:
                texts.append(text)
                numbers.append(number)
        for number, encoding in zip(numbers, self._backend.encode_batch_fast(texts, add_special_tokens=False), strict=True):
            allowed[number] = encoding.ids == [*tail, number]
        return allowed

    def _ragged(self) -> set[int]:
        """Pieces that are no text by themselves."""
        found = set()
        for number, octets in enumerate(self.octets):
            try:
                (octets or b"").decode()
            except UnicodeDecodeError:
                found.add(number)
        return found

    def _sort(self) -> None:
        """Sort pieces: of whole characters, with a space in front and without, and with an unfinished character behind."""
        self._strings, self._begun = [""] * len(self.octets), np.zeros(len(self.octets), bool)
        self._complete: list[int] = []
        for number in np.flatnonzero(self.spelled).tolist():
            octets = self.octets[number] or b""
            rest = unfinished(octets)
            try:
                text = octets[: len(octets) - len(rest)].decode()
            except UnicodeDecodeError:
                continue
            if rest:
                self._begun[number] = True
            else:
                self._strings[number] = text
                self._complete.append(number)
        self._inner = [number for number in self._complete if not self._strings[number].startswith(" ")]
        words = [number for number in self._complete if self._strings[number].startswith(" ")]
        # Behind something else than a space they are what they are alone.
        self._first = np.zeros(len(self.octets), bool)
        for number in words:
            self._first[number] = self.encode(self._strings[number].encode()) == [number]

    def _since_anchor(self, tokens: Sequence[int]) -> tuple[int, ...]:
        if self.starts:
            for index in range(len(tokens) - 1, 0, -1):
                here, before = self.octets[tokens[index]] or b"", self.octets[tokens[index - 1]] or b""
                if here.startswith(b" ") and not before.endswith(b" ") and not self.unfinished(tokens[:index]):
                    return tuple(tokens[index:])
        return tuple(tokens)


class _ByteMerges(MergePieces):
    """The rule of pairs over the letters of bytes alone, for pieces behind a piece that are no whole characters."""

    def __init__(
        self,
        names: Sequence[str],
        letters: dict[str, int],
        merges: dict[tuple[int, int], Merge],
        ignored: dict[int, str],
        ragged: set[int],
    ) -> None:
        self._ragged = ragged
        self._names, self.characters, self.merges, self.specials = names, letters, merges, ignored
        self.bytes: dict[int, int] = {}
        self._of_byte: dict[int, int] = {}
        self.octets = [None] * len(names)
        self._spines()

    def _asked_for(self, number: int) -> bool:
        return number in self._ragged


def pieces_of(tokenizer: Any, escaped: bool = False) -> Pieces:
    """The pieces of a tokenizer.

    Args:
        tokenizer: a fast tokenizer of ``transformers``, a ``tokenizers.Tokenizer``, the path of a SentencePiece BPE model, or
            `Pieces`.
        escaped: count a space as the bytes of U+2581, as SentencePiece writes it.

    Raises:
        InputError: the tokenizer is of another kind, or has no pieces for single bytes.
        FormatError: the file is no SentencePiece model.
    """
    if isinstance(tokenizer, Pieces):
        return tokenizer
    if isinstance(tokenizer, str | Path):
        return read_sentencepiece(tokenizer, escaped)
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        raise InputError(f"{type(tokenizer).__name__} is no fast tokenizer, whose encoding can be looked into")
    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    if state["model"]["type"] != "BPE":
        raise InputError(f"the tokenizer's model is {state['model']['type']}, not BPE")
    if state["model"].get("dropout"):
        raise InputError("the tokenizer drops merges at random: its encoding is not deterministic")
    specials = {token["id"]: token["content"] for token in state["added_tokens"] if token["special"]}
    begin = getattr(tokenizer, "bos_token_id", None)
    copied = Tokenizer.from_str(backend.to_str())
    copied.no_truncation()
    copied.no_padding()
    copied.encode_special_tokens = True
    if state["model"].get("byte_fallback"):
        return _of_fallback(state, copied, specials, begin, escaped)
    if "ByteLevel" not in json.dumps(state["pre_tokenizer"]):
        raise InputError("this tokenizer has no byte fallback: characters without a piece are lost")
    return BytePieces(copied, specials, begin)


def _of_fallback(state: Any, backend: Any, specials: dict[int, str], begin: int | None, escaped: bool) -> MergePieces:
    """Pieces of a BPE with byte fallback, as Llama's converted tokenizer has them."""
    vocabulary: dict[str, int] = state["model"]["vocab"]
    names = [""] * backend.get_vocab_size(with_added_tokens=True)
    for name, number in backend.get_vocab(with_added_tokens=True).items():
        names[number] = name
    bytes_ = {byte: vocabulary[f"<0x{byte:02X}>"] for byte in range(256) if f"<0x{byte:02X}>" in vocabulary}
    taken = set(bytes_.values())
    unknown = state["model"].get("unk_token")
    if unknown is not None:
        specials = specials | {vocabulary[unknown]: unknown}
    merges = {}
    for rank, merge in enumerate(state["model"]["merges"]):
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        merges[vocabulary[first], vocabulary[second]] = Merge(rank, vocabulary[first + second])
    characters = {
        name: number for name, number in vocabulary.items() if len(name) == 1 and number not in taken and number not in specials
    }
    first = backend.encode("a", add_special_tokens=False).tokens
    dummy = bool(first) and first[0].startswith(SPACE)
    pieces = MergePieces(names, characters, bytes_, merges, specials, begin, dummy, escaped)
    for probe in ("the quick brown fox", " a  b", "é今🦓\n\tx.", "1234, (don't)"):
        text = pieces.lead + probe.encode().replace(b" ", pieces.space)
        if pieces.encode(text) != backend.encode(probe, add_special_tokens=False).ids:
            raise InputError("this tokenizer rewrites or splits texts in a way that its merges alone do not tell")
    return pieces


def read_sentencepiece(path: str | Path, escaped: bool = False) -> MergePieces:
    """The pieces of a SentencePiece file whose model is BPE.

    Raises:
        FormatError: the file is no such model.
        InputError: its model is not BPE, or it has no byte pieces.
    """
    names, scores, kinds = [], [], []
    kind_of_model, dummy, begin = 1, True, None
    try:
        for field, value in _fields(Path(path).read_bytes()):
            if field == 1:
                piece = dict(_fields(value))
                names.append(piece[1].decode())
                scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
                kinds.append(piece.get(3, 1))
            elif field == 2:
                trainer = dict(_fields(value))
                kind_of_model, begin = trainer.get(3, 1), trainer.get(41, 1)
            elif field == 3:
                dummy = bool(dict(_fields(value)).get(3, 1))
    except (IndexError, KeyError, struct.error, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise FormatError(f"{path} is no SentencePiece model") from error
    if not names:
        raise FormatError(f"{path} is no SentencePiece model")
    if kind_of_model != 2:
        raise InputError(f"the SentencePiece model in {path} is not BPE")
    return scored_pieces(names, scores, kinds, begin if begin is not None and begin < len(names) else None, dummy, escaped)


#: Kinds of SentencePiece's pieces.
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def scored_pieces(
    names: Sequence[str], scores: Sequence[float], kinds: Sequence[int], begin: int | None, dummy: bool, escaped: bool = False
) -> MergePieces:
    """Pieces whose merges are in the order of their scores, the highest first, as in SentencePiece's BPE.

    Args:
        names, scores, kinds: of all ids; kinds are SentencePiece's numbers.
        begin, dummy, escaped: as for `MergePieces`.

    Raises:
        InputError: there are no byte pieces.
    """
    index = {name: number for number, name in enumerate(names) if kinds[number] in (NORMAL, USER)}
    bytes_ = {int(name[1:-1], 16): number for number, name in enumerate(names) if kinds[number] == BYTE}
    merges = {}
    for name, number in index.items():
        for cut in range(1, len(name)):
            first, second = index.get(name[:cut]), index.get(name[cut:])
            if first is not None and second is not None:
                merges[first, second] = Merge(-scores[number], number)
    specials = {number: name for number, name in enumerate(names) if kinds[number] in (UNKNOWN, CONTROL, UNUSED)}
    characters = {name: number for name, number in index.items() if len(name) == 1}
    return MergePieces(names, characters, bytes_, merges, specials, begin, dummy, escaped)


# Second bytes that may stand behind a lead byte, where not all may.
_SECOND = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}


def unfinished(octets: bytes) -> bytes:
    """The last bytes where they begin a character of UTF-8 and do not end it; empty otherwise."""
    for count in range(1, min(3, len(octets)) + 1):
        lead = octets[-count]
        if lead >= 0xC0:
            tail = octets[-count:]
            length = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            if length <= count or not 0xC2 <= lead <= 0xF4:
                return b""
            low, high = _SECOND.get(lead, (0x80, 0xBF))
            return tail if count == 1 or low <= tail[1] <= high else b""
        if lead < 0x80:
            return b""
    return b""


def _words(text: str) -> Iterator[str]:
    """Parts of a text from each first space of a run to the next."""
    start = 0
    for place in range(1, len(text)):
        if text[place] == SPACE and text[place - 1] != SPACE:
            yield text[start:place]
            start = place
    yield text[start:]


def _byte_letters() -> dict[str, int]:
    """The printable letter that byte-level tokenizers write for each byte, as GPT-2 does."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of a message of Protocol Buffers: numbers, and bytes for all else."""
    place = 0

    def number() -> int:
        nonlocal place
        value, shift = 0, 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while place < len(message):
        key = number()
        kind = key & 7
        if kind == 0:
            yield key >> 3, number()
            continue
        length = {1: 8, 5: 4}.get(kind) or (number() if kind == 2 else -1)
        if length < 0 or place + length > len(message):
            raise IndexError("the message is cut off")
        yield key >> 3, message[place : place + length]
        place += length

"""The rest of a sequence beside its ids: letters that have no id, lower case, folded runs, and U in place of T.

Kept as bytes beside the ids: one byte of flags, then for each list of runs their number and the runs, each as the distance from
the run before, its length and, of letters, the letter. Numbers are in LEB128: a run of a megabase takes six bytes or less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from zoo.errors import InputError
from zoo.media.genome import IUPAC
from zoo.media.text import characters, file_hint

Letters = NDArray[np.uint8]
Runs = NDArray[np.int64]

_LOWER = 0x20
_FLAGS = {"rna": 1, "letters": 2, "lower": 4, "folded": 8}
_ALLOWED = np.zeros(256, bool)
_ALLOWED[list((IUPAC + IUPAC.lower()).encode())] = True


def _no_runs() -> Runs:
    return np.zeros((0, 2), np.int64)


@dataclass(frozen=True)
class Residue:
    """The rest of one sequence beside its ids. Runs are ``[runs, 2]``: first letter and length, in order.

    Attributes:
        rna: every T is a U.
        runs: of letters that the ids do not tell.
        letters: the letter of each of these runs.
        lower: of lower case.
        folded: of N that became one id.
    """

    rna: bool = False
    runs: Runs = field(default_factory=_no_runs)
    letters: bytes = b""
    lower: Runs = field(default_factory=_no_runs)
    folded: Runs = field(default_factory=_no_runs)

    def to_bytes(self) -> bytes:
        """Bytes of it; none where nothing is left over."""
        flags = self.rna * _FLAGS["rna"]
        body = bytearray()
        for name, runs in (("letters", self.runs), ("lower", self.lower), ("folded", self.folded)):
            if not len(runs):
                continue
            flags |= _FLAGS[name]
            body += _number(len(runs))
            end = 0
            for index, (start, length) in enumerate(runs.tolist()):
                body += _number(start - end) + _number(length)
                body += self.letters[index : index + 1] if name == "letters" else b""
                end = start + length
        return bytes([flags, *body]) if flags else b""

    @classmethod
    def from_bytes(cls, content: bytes) -> Residue:
        """Read what `to_bytes` wrote.

        Raises:
            InputError: it is something else.
        """
        if not content:
            return cls()
        flags, position = content[0], 1

        def number() -> int:
            nonlocal position
            value = shift = 0
            while True:
                if position >= len(content) or shift > 42:
                    raise InputError("what the sequence keeps besides its ids is cut short")
                byte = content[position]
                value |= (byte & 0x7F) << shift
                shift, position = shift + 7, position + 1
                if byte < 0x80:
                    return value

        def read(name: str) -> tuple[Runs, bytes]:
            nonlocal position
            if not flags & _FLAGS[name]:
                return _no_runs(), b""
            letters, end = bytearray(), 0
            rows: list[tuple[int, int]] = []
            for _ in range(number()):
                start, length = end + number(), number()
                rows.append((start, length))
                end = start + length
                if name == "letters":
                    letters += content[position : position + 1]
                    position += 1
            return np.array(rows, np.int64).reshape(-1, 2), bytes(letters)

        (runs, letters), (lower, _), (folded, _) = read("letters"), read("lower"), read("folded")
        if position != len(content) or len(letters) != len(runs) or flags >= 16:
            raise InputError("what the sequence keeps besides its ids cannot be read")
        return cls(bool(flags & _FLAGS["rna"]), runs, letters, lower, folded)


def _number(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def checked(octets: Letters, *, strip_whitespace: bool) -> Letters:
    """The letters of a sequence.

    Raises:
        InputError: there is something else than letters of the IUPAC alphabet, or the bytes are no UTF-8; names the position.
    """
    if strip_whitespace:
        octets = octets[~np.isin(octets, list(b" \t\r\n\v\f"))]
    if _ALLOWED[octets].all():
        return octets
    text = characters(octets)
    position = next(index for index, character in enumerate(text) if character.upper() not in IUPAC or not character.isascii())
    if text[position].isspace():
        raise InputError(f"white space at position {position} of the sequence: pass strip_whitespace=True to take it out")
    marks = {">": "FASTA", "@": "FASTQ"}
    read = (
        f"; this looks like {marks[text[0]]}, which zoo.media.genome.read and the command zoo tokenize take apart"
        if text[0] in marks
        else ""
    )
    raise InputError(
        f"{text[position]!r} at position {position} is no letter of the IUPAC alphabet of nucleotides ({IUPAC}){read}"
        f"{file_hint(text)}"
    )


def taken_apart(
    letters: Letters, known: NDArray[np.bool_], unknown: int, *, upper: bool, rna: bool, fold: bool
) -> tuple[Letters, Residue]:
    """The letters that are encoded, and what they do not tell.

    Args:
        letters: of the sequence.
        known: bool ``[256]``, letters that have ids.
        unknown: the letter that one without an id decodes to.
        upper: encode lower case as upper case.
        rna: encode U as T.
        fold: encode runs of N as one.
    """
    lower = _no_runs()
    if upper:
        lower = _runs_where(letters >= 0x60)
        letters = letters & ~np.uint8(_LOWER) if len(lower) else letters
    encoded = letters
    all_u = False
    if rna:
        uracil = (letters & ~np.uint8(_LOWER)) == ord("U")
        all_u = bool(uracil.any()) and not ((letters & ~np.uint8(_LOWER)) == ord("T")).any()
        encoded = np.where(uracil, letters - 1, letters)
    decoded = np.where(known[encoded], encoded, np.uint8(unknown))
    if all_u:
        decoded = np.where((decoded & ~np.uint8(_LOWER)) == ord("T"), decoded + 1, decoded).astype(np.uint8)
    other = np.flatnonzero(decoded != letters)
    runs, kinds = _no_runs(), b""
    if len(other):
        # A run ends where the next letter is another one, or one that the ids tell.
        first = np.concatenate([[True], (np.diff(other) > 1) | (np.diff(letters[other]) != 0)])
        starts = other[first]
        lengths = np.diff(np.append(np.flatnonzero(first), len(other)))
        runs, kinds = np.stack([starts, lengths], axis=1), letters[starts].tobytes()
    folded = _no_runs()
    if fold:
        found = _runs_where(encoded == ord("N"))
        folded = found[found[:, 1] > 1]
        encoded = encoded[_kept_of(folded, len(encoded))]
    return encoded, Residue(all_u, runs, kinds, lower, folded)


def put_together(encoded: Letters, residue: Residue) -> Letters:
    """The sequence of encoded letters, in which unknown ones are written as N; runs behind the end of a prefix do nothing."""
    if len(residue.folded):
        starts, more = folded_places(residue.folded)
        there = starts < len(encoded)
        repeats = np.ones(len(encoded), np.int64)
        repeats[starts[there]] += more[there]
        encoded = np.repeat(encoded, repeats)
    encoded = encoded.copy()
    if residue.rna:
        encoded[encoded == ord("T")] = ord("U")
        encoded[encoded == ord("t")] = ord("u")
    for (start, length), letter in zip(residue.runs.tolist(), residue.letters, strict=True):
        encoded[start : start + length] = letter
    for start, length in residue.lower.tolist():
        encoded[start : start + length] |= _LOWER
    return encoded


def folded_places(folded: Runs) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of folded runs among the encoded letters, and how many more letters each stands for."""
    more = folded[:, 1] - 1
    return folded[:, 0] - (np.cumsum(more) - more), more


def _runs_where(chosen: NDArray[np.bool_]) -> Runs:
    """First letter and length of the runs that are chosen."""
    inner = np.flatnonzero(chosen[1:] != chosen[:-1]) + 1
    edges = np.concatenate([[0] * bool(len(chosen) and chosen[0]), inner, [len(chosen)] * bool(len(chosen) and chosen[-1])])
    edges = edges.astype(np.int64)
    return np.stack([edges[::2], edges[1::2] - edges[::2]], axis=1)


def _kept_of(folded: Runs, length: int) -> NDArray[np.bool_]:
    """Which letters stay where each run becomes its first one."""
    change = np.zeros(length + 1, np.int64)
    np.add.at(change, folded[:, 0] + 1, 1)
    np.add.at(change, folded.sum(1), -1)
    return np.cumsum(change[:-1]) == 0


#: How a sequence is read before it is encoded, for callers that bind the options.
Reader = Callable[[Letters], tuple[Letters, Residue]]

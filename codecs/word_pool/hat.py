"""Words of the hierarchical models (HAT): Unicode word boundaries, cut further at punctuation and inside of camel case."""

from __future__ import annotations

from collections.abc import Iterable

import regex

# Unicode's default word boundaries (UAX #29).
_BOUNDARY = regex.compile(r"(?V1w)\b")
# Behind punctuation, and between a lower-case and an upper-case letter.
_CUT = regex.compile(r"(?V1)(?<=\p{P})|(?<=\p{Ll})(?=\p{Lu})")
_WHITE = regex.compile(r"\s+")
_PUNCTUATION = regex.compile(r"\p{P}")

# A piece of the second kind belongs to the word that a piece of the first kind ends.
_JOINED = {("space", "word"), ("space", "punctuation"), ("word", "punctuation"), ("punctuation", "punctuation")}


def words(text: str) -> list[str]:
    """The words of a text, each with the single space in front of it and the punctuation behind; joined, they are the text."""
    pieces: list[str] = []
    for segment in _BOUNDARY.split(text):
        for piece in _CUT.split(segment) if segment else ():
            if piece == " " and pieces and not pieces[-1].strip(" "):
                pieces[-1] += piece
            elif piece:
                pieces.append(piece)
    found: list[str] = []
    last = ""
    for piece in pieces:
        kind = _kind(piece)
        if (last, kind) in _JOINED:
            found[-1] += piece
        else:
            found.append(piece)
        last = kind
    return found


def limited(parts: Iterable[bytes], limit: int) -> list[bytes]:
    """Words of at most ``limit`` bytes: longer ones are cut between characters, or inside of one that is longer itself."""
    found = []
    for word in parts:
        start = 0
        while len(word) - start > limit:
            end = start + limit
            while end > start and word[end] & 0xC0 == 0x80:
                end -= 1
            if end == start:
                end = start + limit
            found.append(word[start:end])
            start = end
        found.append(word[start:])
    return found


def _kind(piece: str) -> str:
    if piece == " ":
        return "space"
    if _WHITE.fullmatch(piece):
        return "white"
    return "punctuation" if len(piece) == 1 and _PUNCTUATION.fullmatch(piece) else "word"

"""Templates: how the text and the items of a document follow each other, such as ``"{caption}{image}</s>"``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from string import Formatter

from zoo.errors import ArgumentError

#: What literal text of a template is called where stretches are chosen by name.
LITERALS = "literals"


@dataclass(frozen=True)
class Stretch:
    """A part of a document that is made at once.

    Attributes:
        section: section of the vocabulary, for an item between its markers; empty for text.
        parts: text in pieces: whether a piece is the name of a field, and the name or the text itself.
        loss: whether a model is to learn it.
    """

    section: str
    parts: tuple[tuple[bool, str], ...]
    loss: bool

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields in its text."""
        return tuple(text for is_field, text in self.parts if is_field)


def parsed(template: str, sections: Collection[str], loss: Sequence[str] | None = None) -> tuple[Stretch, ...]:
    """The stretches of a template, in order. Text with the same loss is one stretch, so that it is tokenized whole.

    Args:
        template: names between braces; ``{{`` and ``}}`` stand for braces.
        sections: names that are items; all others are fields of text.
        loss: names of what a model is to learn, `LITERALS` among them; ``None`` for everything.

    Raises:
        ArgumentError: the template is empty or malformed, or ``loss`` names something that it does not have.

    >>> [(s.section, s.fields, s.loss) for s in parsed("{question} {answer}{image}", {"image"}, ["answer"])]
    [('', ('question',), False), ('', ('answer',), True), ('image', (), False)]
    """
    pieces: list[tuple[str, bool, str]] = []
    try:
        for literal, name, spec, conversion in Formatter().parse(template):
            if literal:
                pieces.append(("", False, literal))
            if name is None:
                continue
            if not name or spec or conversion:
                raise ValueError("names stand alone between braces")
            pieces.append((name if name in sections else "", name not in sections, name))
    except ValueError as error:
        raise ArgumentError(f"the template {template!r} cannot be read: {error}") from error
    if not pieces:
        raise ArgumentError("the template is empty")
    names = {text for section, is_field, text in pieces if section or is_field}
    if unknown := [name for name in loss or () if name not in names | {LITERALS}]:
        raise ArgumentError(f"the template {template!r} has no {unknown[0]!r} to learn")

    def learned(piece: tuple[str, bool, str]) -> bool:
        section, is_field, text = piece
        return loss is None or (text if section or is_field else LITERALS) in loss

    stretches: list[Stretch] = []
    for (section, wanted), run in groupby(pieces, lambda piece: (piece[0], learned(piece))):
        members = list(run)
        if section:
            stretches += [Stretch(section, (), wanted)] * len(members)
        else:
            stretches.append(Stretch("", tuple((is_field, text) for _, is_field, text in members), wanted))
    return tuple(stretches)

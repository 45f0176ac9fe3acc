"""One id space for a language model: its text, and the tokens of several tokenizers beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from zoo.errors import FormatError, InputError, ItemError, MismatchError, listing
from zoo.media import file_content, replacing
from zoo.spec import Frame, Spec
from zoo.tokenizer import Tokenizer
from zoo.tokens import Tokens
from zoo.vocabulary.presets import PRESETS
from zoo.vocabulary.sections import MOST_DIGITS, Grid, MisplacedError, Naming, Section

__all__ = ["Grid", "Naming", "Section", "Segment", "Vocabulary"]

_MOST_SECTIONS = 256
_LARGEST_SIZE = 1 << 48


@dataclass(frozen=True)
class Segment:
    """A stretch of a language model's sequence: text, or an item of one of the tokenizers.

    Attributes:
        ids: ids in the vocabulary, without markers.
        name: name of the tokenizer's section; empty for text.
        tokens: the item, for the tokenizer to decode; ``None`` for text.
    """

    ids: tuple[int, ...]
    name: str = ""
    tokens: Tokens | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Vocabulary:
    """A text tokenizer and any number of zoo tokenizers side by side.

    Attributes:
        size: ids lie in ``[0, size)``. Those that no section takes are text.
        sections: the tokenizers' places.

    Raises:
        InputError: sections overlap, lie outside, or share a name or a string.

    >>> vocabulary = Vocabulary.build(32_000, {"img": zoo.load("seed-tiny", parts="encoder")})
    >>> vocabulary.sections[0].offset, vocabulary.size
    (32000, 33026)
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    size: int
    sections: tuple[Section, ...]

    # What the layout was made of, where that was loaded.
    _loaded: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        if len(self.sections) > _MOST_SECTIONS:
            raise InputError(f"{len(self.sections)} sections are more than the {_MOST_SECTIONS} that a vocabulary may have")
        if not 0 <= self.size <= _LARGEST_SIZE:
            raise InputError(f"a vocabulary has 0 to {_LARGEST_SIZE} ids, not {self.size}")
        if len({section.name for section in self.sections}) < len(self.sections):
            raise InputError("two sections have the same name")
        for section in self.sections:
            if section.vocab_size < 1:
                raise InputError(f"{section.name!r} has no ids: a continuous tokenizer has no place in a vocabulary")
            for first, last in _id_ranges(section):
                if first < 0 or last >= self.size:
                    outside = first if first < 0 else max(first, self.size)
                    raise InputError(f"id {outside} of {section.name!r} is outside the vocabulary, 0 to {self.size - 1}")
        if clash := _shared_id(self.sections) or _shared_string(self.sections):
            key, one, other = clash
            raise InputError(f"{key!r} is taken by {one!r} and by {other!r}: sections overlap")

    # ---- layouts

    @classmethod
    def build(
        cls,
        text: int | Any,
        tokenizers: Mapping[str, Tokenizer[Any] | Spec],
        naming: Mapping[str, Naming] | None = None,
    ) -> Vocabulary:
        """Lay tokenizers out behind the text: for each its ids, then its begin and its end marker.

        Args:
            text: the text tokenizer (of transformers or tokenizers, or one of text of ours), or the size of its vocabulary.
            tokenizers: by the names that they shall have, which are part of the strings.
            naming: strings of tokenizers that are not to be named `Naming.of` their name.

        Raises:
            InputError: a tokenizer is continuous, or strings collide.
        """
        naming = naming or {}
        start = text if isinstance(text, int) else _text_size(text)
        sections = []
        for name, tokenizer in tokenizers.items():
            spec = _spec_of(tokenizer)
            end = start + spec.vocab_size + 1
            sections.append(_section(name, spec, start, end - 1, end, naming.get(name, Naming.of(name))))
            start = end + 1
        return cls(start, tuple(sections))._bound_to(tokenizers)

    @classmethod
    def found_in(
        cls,
        text: Any,
        tokenizers: Mapping[str, Tokenizer[Any] | Spec],
        naming: Mapping[str, Naming] | None = None,
    ) -> Vocabulary:
        """The layout of a text tokenizer that has the strings already, such as that of a published language model.

        Raises:
            InputError: a string is missing, or the ids of the codes are not consecutive.
        """
        vocabulary = text.get_vocab()
        sections = []
        for name, tokenizer in tokenizers.items():
            spec, strings = _spec_of(tokenizer), (naming or {}).get(name, Naming.of(name))
            wanted = [*map(strings.written, range(spec.vocab_size)), strings.begin, strings.end]
            if missing := [string for string in wanted if string not in vocabulary]:
                raise InputError(f"the text tokenizer lacks {listing(missing)}")
            *codes, begin, end = (vocabulary[string] for string in wanted)
            if codes != list(range(codes[0], codes[0] + len(codes))):
                raise InputError(f"the ids of {name!r} in the text tokenizer are not consecutive")
            sections.append(_section(name, spec, codes[0], begin, end, strings))
        return cls(_text_size(text), tuple(sections))._bound_to(tokenizers)

    @classmethod
    def preset(cls, name: str, tokenizers: Mapping[str, Tokenizer[Any] | Spec] | None = None) -> Vocabulary:
        """The id layout of a published language model.

        Args:
            name: ``"emu3.5"``, ``"apertus-1.5"``, ``"cosyvoice2"`` or ``"orpheus"``; sources in `zoo.vocabulary.presets`.
            tokenizers: what is loaded for some of the sections, by their names. Without it tokens are told by the names of the
                catalogue, and tokens that come out do not name a checkpoint.

        Raises:
            InputError: there is no such layout or section, or a tokenizer has another number of ids.

        >>> vocabulary = Vocabulary.preset("emu3.5")
        >>> words, picture = vocabulary.split([5, 151852, 17, 9, 16, 151851, 151854, 151846, 151855, 151853])
        >>> picture.name, picture.tokens.tolist(), picture.tokens.meta
        ('image', [[0, 1]], ({'rows': 2},))
        """
        if name not in PRESETS:
            raise InputError(f"there are the layouts {', '.join(PRESETS)}, not {name!r}")
        size, sections = PRESETS[name]
        given = {key: _spec_of(tokenizer) for key, tokenizer in (tokenizers or {}).items()}
        if strange := sorted(given.keys() - {section.name for section in sections}):
            raise InputError(f"{name} has no section {strange[0]!r}")
        bound = []
        for section in sections:
            spec = given.get(section.name)
            if spec is not None and spec.vocab_size != section.vocab_size:
                raise InputError(f"{section.name!r} of {name} has {section.vocab_size} ids, and {spec.name} {spec.vocab_size}")
            bound.append(section if spec is None else replace(section, tokenizer=spec.name, fingerprint=spec.fingerprint))
        return cls(size, tuple(bound))._bound_to(tokenizers or {})

    def extend(self, text: Any) -> int:
        """Add the strings of all sections to a text tokenizer (of transformers or tokenizers); returns how many were new.

        Codes become ordinary added tokens and markers special ones, in any place of a text.

        Raises:
            InputError: the tokenizer has one of the strings at another id, or has not the size that the layout was made for.
        """
        from tokenizers import AddedToken

        if isinstance(text, Tokenizer):
            raise InputError(f"{text.name} has ids of its own only: it cannot be extended, and needs not be for join and split")
        known = text.get_vocab()
        special = {string for section in self.sections for string in section.markers.values()}
        layout: dict[int, str] = {}
        for section in self.sections:
            layout |= zip(section.ids(), section.strings(), strict=True)
        if clash := next((string for number, string in layout.items() if known.get(string, number) != number), None):
            raise InputError(f"the text tokenizer has {clash!r} already, as id {known[clash]}")
        new = {number: string for number, string in sorted(layout.items()) if string not in known}
        if not new:
            return 0
        size = _text_size(text)
        if list(new) != list(range(size, size + len(new))):
            raise InputError(f"the text tokenizer has ids up to {size - 1}, but this layout goes on at {min(new)}")
        text.add_tokens([AddedToken(string, special=string in special, normalized=False) for string in new.values()])
        extended = text.get_vocab()
        if wrong := next((string for number, string in new.items() if extended.get(string) != number), None):
            raise InputError(f"the text tokenizer gave {wrong!r} another id than this layout: its own ids have gaps")
        return len(new)

    def __getitem__(self, name: str) -> Section:
        """A section by its name."""
        for section in self.sections:
            if section.name == name:
                return section
        raise KeyError(name)

    # ---- tokens to sequences

    def section_of(self, tokens: Tokens) -> Section:
        """The section that tokens belong to.

        Raises:
            MismatchError: they are of a checkpoint that the vocabulary does not know.
            InputError: they are no `zoo.Tokens`.
        """
        if not isinstance(tokens, Tokens):
            raise InputError(f"tokens must be zoo.Tokens, which know their checkpoint, not {type(tokens).__name__}")
        for section in self.sections:
            unknown = not section.fingerprint and section.tokenizer == tokens.tokenizer
            if section.vocab_size == tokens.vocab_size and (section.fingerprint == tokens.fingerprint or unknown):
                return section
        known = ", ".join(f"{section.name!r} ({section.tokenizer})" for section in self.sections) or "text only"
        raise MismatchError(f"tokens of {tokens.tokenizer} have no place in this vocabulary, which knows {known}")

    def flatten(self, tokens: Tokens) -> list[Int[Tensor, " _"]]:
        """For each item the ids in the vocabulary, between its markers; of a grid with its header and between its rows.

        Raises:
            MismatchError: as `section_of`.
            InputError: an item has too few tokens, or too many, or one of a grid does not remember its rows.
        """
        section = self.section_of(tokens)
        sequences = []
        for index, ids in enumerate(tokens.unpadded()):
            sequences.append(section.write(ids, section.rows_of(tokens, index) if section.grid else None))
        return sequences

    def join(self, segments: Sequence[str | Sequence[int] | Tokens | Segment], text: Any = None) -> Int[Tensor, " length"]:
        """One sequence of text and items in the given order.

        Args:
            segments: strings, ids of text, tokens with all their items, and what `split` gave.
            text: the text tokenizer, where there are strings; no special tokens are added to them.

        Raises:
            MismatchError, InputError: as `flatten`; or an id of text is not one.

        >>> vocabulary = Vocabulary.build(256, {"audio": zoo.load("wavtokenizer-tiny")})
        >>> tokens = zoo.load("wavtokenizer-tiny").tokens([torch.tensor([5, 6])])
        >>> vocabulary.join([[72, 105], tokens]).tolist()
        [72, 105, 1280, 261, 262, 1281]
        """
        pieces: list[Tensor] = []
        for index, segment in enumerate(segments):
            if isinstance(segment, Segment):
                segment = segment.ids if segment.tokens is None else segment.tokens
            if isinstance(segment, Tokens):
                pieces += [ids.cpu() for ids in self.flatten(segment)]
                continue
            if isinstance(segment, str):
                if text is None:
                    raise ItemError("a string needs the text tokenizer: pass text=", index)
                segment = _text_ids(text, segment)
            if foreign := [number for number in segment if not self._is_text(number)]:
                raise ItemError(f"{foreign[0]} is no id of text", index)
            pieces.append(torch.tensor(segment, dtype=torch.int64))
        return torch.cat([*pieces, torch.empty(0, dtype=torch.int64)])

    def _is_text(self, number: int) -> bool:
        taken = any(section.holds(number) or number in section.markers for section in self.sections)
        return 0 <= number < self.size and not taken

    # ---- sequences to tokens

    def split(self, ids: Sequence[int] | Int[Tensor, " length"]) -> list[Segment]:
        """Take a sequence apart into text and items.

        Raises:
            InputError: an id is outside the vocabulary or no whole number, a marker is missing, something else stands between
                two markers, or an item has too few tokens or too many; names the position.

        >>> vocabulary = Vocabulary.build(256, {"audio": zoo.load("wavtokenizer-tiny")})
        >>> words, item = vocabulary.split([72, 105, 1280, 261, 262, 1281])
        >>> words.ids, item.name, item.tokens.tolist()
        ((72, 105), 'audio', [[5, 6]])
        """
        begins = {section.begin: section for section in self.sections}
        segments: list[Segment] = []
        inside: Section | None = None
        run: list[int] = []
        numbers = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        odd = next((place for place, number in enumerate(numbers) if not isinstance(number, Integral)), None)
        if odd is not None:
            raise InputError(f"position {odd}: an id is a whole number, not {numbers[odd]!r}"[:200])
        for position, number in enumerate(numbers):
            try:
                if inside is None and number in begins:
                    segments += [Segment(tuple(run))] if run else []
                    inside, run = begins[number], []
                elif inside is not None and number == inside.end:
                    segments.append(self._item(inside, run))
                    inside, run = None, []
                elif _belongs(number, inside) if inside else self._is_text(number):
                    run.append(number)
                else:
                    raise InputError(self._complaint(number, inside))
            except MisplacedError as error:
                raise InputError(f"position {position - len(run) + error.place}: {error.reason}") from error
            except InputError as error:
                raise InputError(f"position {position}: {error.reason}") from error
        if inside is not None:
            raise InputError(f"the sequence ends within an item of {inside.name!r}, after {len(run)} tokens")
        return segments + ([Segment(tuple(run))] if run else [])

    @staticmethod
    def _item(section: Section, run: list[int]) -> Segment:
        rows = None
        if section.grid is not None:
            run, rows = section.grid.read(run)
            if strange := [number for number in run if not section.holds(number)]:
                raise InputError(f"id {strange[0]} of text stands among the ids of {section.name!r}")
        return Segment(tuple(run), section.name, section.tokens([number - section.offset for number in run], rows))

    def _complaint(self, number: int, inside: Section | None) -> str:
        if not 0 <= number < self.size:
            return f"id {number} is outside the vocabulary, 0 to {self.size - 1}"
        if inside is not None:
            return f"id {number} stands within an item of {inside.name!r}"
        owner = next(s.name for s in self.sections if s.holds(number) or number in s.markers)
        return f"id {number} of {owner!r} stands outside of any item"

    # ---- text

    def to_text(self, tokens: Tokens) -> list[str]:
        """Each item as a string between its markers, as a text tokenizer reads it after `extend`.

        Raises:
            MismatchError, InputError: as `flatten`.

        >>> vocabulary = Vocabulary.build(256, {"img": zoo.load("flextok-tiny")})
        >>> tokens = zoo.load("flextok-tiny").tokens([torch.tensor([5, 6])])
        >>> vocabulary.to_text(tokens)
        ['<img><img_00005><img_00006></img>']
        """
        section = self.section_of(tokens)
        written = []
        for index, ids in enumerate(tokens.tolist()):
            written.append(section.write_text(ids, section.rows_of(tokens, index) if section.grid else None))
        return written

    def from_text(self, text: str) -> list[str | Tokens]:
        """Take a text apart into strings and items; space between tokens is ignored.

        Raises:
            InputError: an end marker is missing, or something else stands between two markers.
        """
        begins = "|".join(re.escape(section.naming.begin) for section in self.sections)
        found: list[str | Tokens] = []
        while match := re.search(begins, text) if begins else None:
            section = next(s for s in self.sections if s.naming.begin == match[0])
            content, end, rest = text[match.end() :].partition(section.naming.end)
            if not end:
                raise InputError(f"{match[0]} has no {section.naming.end}")
            found += [text[: match.start()]] if match.start() else []
            found.append(section.read_text(content))
            text = rest
        return found + ([text] if text else [])

    # ---- media

    def _bound_to(self, tokenizers: Mapping[str, Tokenizer[Any] | Spec]) -> Vocabulary:
        """This vocabulary, with the tokenizers at hand that it was made of."""
        loaded = {name: own for name, own in tokenizers.items() if not isinstance(own, Spec)}
        object.__setattr__(self, "_loaded", loaded)
        return self

    def _tokenizer_of(self, section: str, tokenizers: Mapping[str, Any] | None) -> Tokenizer[Any]:
        found = {**self._loaded, **(tokenizers or {})}.get(section)
        if found is None:
            name = self[section].tokenizer
            raise InputError(f"media of {section!r} need their tokenizer: pass tokenizers={{{section!r}: zoo.load({name!r})}}")
        return found

    def encode_media(
        self,
        segments: Sequence[str | Sequence[int] | Mapping[str, Any]],
        text: Any = None,
        tokenizers: Mapping[str, Tokenizer[Any]] | None = None,
    ) -> Int[Tensor, " length"]:
        """One sequence of ids of text and media in the given order.

        Args:
            segments: strings, ids of text, and media as ``{section: item}``, the item as `zoo.Tokenizer.encode` takes it.
            text: the text tokenizer, where there are strings; no special tokens are added to them.
            tokenizers: by section, beside those that the vocabulary was made of; a file does not hold them.

        Raises:
            InputError: a tokenizer is missing, or as `join`.

        >>> vocabulary = Vocabulary.build(256, {"audio": zoo.load("wavtokenizer-tiny")})
        >>> ids = vocabulary.encode_media([[72, 105], {"audio": torch.zeros(640)}])
        >>> words, sound = vocabulary.decode_media(ids)
        >>> words, list(sound.shape)
        ((72, 105), [1, 640])
        """
        parts: list[str | Sequence[int] | Tokens] = []
        for segment in segments:
            if not isinstance(segment, Mapping):
                parts.append(segment)
                continue
            for name, item in segment.items():
                if name not in {section.name for section in self.sections}:
                    raise InputError(f"there is no section {name!r}")
                section, encoded = self[name], self._tokenizer_of(name, tokenizers).encode([item])
                if not section.fingerprint and encoded.vocab_size == section.vocab_size:
                    # A layout without a checkpoint goes by the catalogue's name, and a saved model may have another.
                    encoded = replace(encoded, tokenizer=section.tokenizer)
                parts.append(encoded)
        return self.join(parts, text)

    def decode_media(
        self,
        ids: Sequence[int] | Int[Tensor, " length"],
        text: Any = None,
        tokenizers: Mapping[str, Tokenizer[Any]] | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> list[Any]:
        """Text and media of a sequence of ids, in its order.

        Args:
            ids: ids of a language model.
            text: the text tokenizer; without one text stays ids.
            tokenizers: by section, beside those that the vocabulary was made of; a file does not hold them.
            options: of ``decode``, by section.

        Returns:
            For text a string, or its ids as a tuple; for an item what its tokenizer decodes it to.

        Raises:
            InputError: as `split`, or a tokenizer is missing or of other ids.
        """
        segments = self.split(ids)
        decoded: list[Any] = [
            segment.ids if text is None or segment.tokens is not None else _written(text, segment.ids) for segment in segments
        ]
        for name in dict.fromkeys(segment.name for segment in segments if segment.tokens is not None):
            places = [place for place, segment in enumerate(segments) if segment.name == name]
            tokenizer = self._tokenizer_of(name, tokenizers)
            tokens = Tokens.cat([own for place in places if (own := segments[place].tokens) is not None])
            if not tokens.fingerprint:
                spec = tokenizer.spec
                if (tokens.frame or Frame((tokens.vocab_size,))) != (spec.frame or Frame((spec.vocab_size,))):
                    raise InputError(f"{tokenizer.name} has other ids than {name!r}, which are those of {tokens.tokenizer}")
                tokens = tokenizer.tokens(tokens.unpadded(), tokens.meta)
            for place, media in zip(places, tokenizer.decode(tokens, **(options or {}).get(name, {})), strict=True):
                decoded[place] = media
        return decoded

    # ---- files

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the layout as JSON."""
        with replacing(path) as temporary:
            # What readers before frames and grids do not know is left out where there is none.
            plain = {
                number: {field: True for field in ("frame", "grid") if getattr(section, field) is None}
                | ({} if section.naming.first else {"naming": {"first": True}})
                for number, section in enumerate(self.sections)
            }
            temporary.write_bytes(TypeAdapter(Vocabulary).dump_json(self, indent=1, exclude={"sections": plain}) + b"\n")
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Vocabulary:
        """Read what `save` wrote.

        Raises:
            InputError: there is no such file, or it cannot be read; names it.
            FormatError: it is not a sound vocabulary; names the file and the field.
        """
        try:
            return TypeAdapter(cls).validate_json(file_content(path))
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc'])) or 'vocabulary'}: {e['msg']}" for e in error.errors()]
            raise FormatError(f"{os.fspath(path)}: {'; '.join(problems)}") from error


def _belongs(number: int, section: Section) -> bool:
    """Whether an id may stand between the markers of an item, at one place or another."""
    grid = section.grid
    return section.holds(number) or (grid is not None and number in (grid.marker, grid.row_end, grid.times, *grid.digits))


def _spec_of(tokenizer: Tokenizer[Any] | Spec) -> Spec:
    return tokenizer if isinstance(tokenizer, Spec) else tokenizer.spec


def _section(name: str, spec: Spec, offset: int, begin: int, end: int, naming: Naming) -> Section:
    whole = spec.max_tokens is not None and not spec.ordered
    frame = spec.frame if spec.ids_per_frame > 1 else None
    return Section(
        name, spec.name, spec.fingerprint, spec.vocab_size, offset, begin, end, naming, spec.max_tokens, whole, frame
    )


def _text_size(text: Any) -> int:
    """One more than the largest id of a text tokenizer."""
    if isinstance(text, Tokenizer):
        return text.spec.vocab_size
    return max(text.get_vocab().values()) + 1


def _text_ids(text: Any, segment: str) -> Sequence[int]:
    """The ids of a string, without special ones."""
    if isinstance(text, Tokenizer):
        found: list[int] = text.encode(segment, **_without_specials(text)).tolist()[0]
        return found
    encoded = text.encode(segment, add_special_tokens=False)
    ids: Sequence[int] = getattr(encoded, "ids", encoded)
    return ids


def _without_specials(text: Tokenizer[Any]) -> dict[str, Any]:
    options = type(text).options("encode")
    return {name: value for name, value in (("specials", "none"), ("positions", False)) if name in options}


def _written(text: Any, ids: Sequence[int]) -> str:
    """The string of ids."""
    if isinstance(text, Tokenizer):
        decode: Any = text.decode
        return str(decode([list(ids)], as_text=True, errors="replace")[0])
    return str(text.decode(list(ids)))


def _id_ranges(section: Section) -> list[tuple[int, int]]:
    """First and last ids of what a section takes."""
    codes = (section.offset, section.offset + section.vocab_size - 1)
    return [codes, *((marker, marker) for marker in section.markers)]


def _shared_id(sections: Sequence[Section]) -> tuple[int, str, str] | None:
    """An id that is taken twice, and by whom."""
    ranges = sorted((*ids, number) for number, section in enumerate(sections) for ids in _id_ranges(section))
    for (_, last, one), (first, _, other) in pairwise(ranges):
        if first <= last:
            return first, sections[min(one, other)].name, sections[max(one, other)].name
    return None


def _shared_string(sections: Sequence[Section]) -> tuple[str, str, str] | None:
    """A string that is taken twice, and by whom, found without writing all of them out."""
    owners: dict[str, str] = {}
    for section in sections:
        for marker in section.markers.values():
            if marker in owners:
                return marker, owners[marker], section.name
            owners[marker] = section.name
    for section in sections:
        for marker, owner in owners.items():
            if section.code_of(marker) is not None:
                return marker, owner, section.name
    for one, other in combinations(sections, 2):
        if (code := _shared_code(one, other)) is not None:
            return code, one.name, other.name
    return None


def _shared_code(one: Section, other: Section) -> str | None:
    """A string that is a code of both.

    It begins with the longer of their beginnings and ends with the longer of their ends. What is between is part of both
    numbers, so if any digits fit there, then the smallest of that length do that make both numbers large enough, with a leading
    zero or without.
    """
    (before, behind), (other_before, other_behind) = one.naming.around, other.naming.around
    start, end = max(before, other_before, key=len), max(behind, other_behind, key=len)
    if not (start.startswith(before) and start.startswith(other_before)):
        return None
    if not (end.endswith(behind) and end.endswith(other_behind)):
        return None

    def least(section: Section, length: int) -> int:
        """The smallest digits that make a number of the section's, judged by its first number."""
        own_before, own_behind = section.naming.around
        front, back = start[len(own_before) :], end[: len(end) - len(own_behind)]
        if not f"0{front}{back}".isdecimal():
            return 0
        missing = section.naming.first - int(f"0{front}") * 10 ** (length + len(back)) - int(f"0{back}")
        return max(0, -(-missing // 10 ** len(back)))

    between = [""]
    for length in range(1, MOST_DIGITS + 1):
        lowest = max(least(one, length), least(other, length))
        between += [f"{number:0{length}d}" for number in (lowest, max(lowest, 10 ** (length - 1)))]
    candidates = [start + digits + end for digits in between]
    candidates += [start + end[shared:] for shared in range(1, len(end) + 1) if start.endswith(end[:shared])]
    return next((code for code in candidates if one.code_of(code) is not None and other.code_of(code) is not None), None)

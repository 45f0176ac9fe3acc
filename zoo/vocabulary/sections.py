"""Places of tokenizers in the id space of a language model, and the spelling of their items in ids and in text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from zoo.errors import InputError
from zoo.spec import Frame
from zoo.tokens import Tokens

_CODE_FORMAT = re.compile(r"([^{}]*)\{(?::0(\d{1,2})d)?\}([^{}]*)")
# Digits of the largest number that a code is padded to, or that a vocabulary has.
MOST_DIGITS = 99
# Of a number of rows or columns.
_MOST_GRID_DIGITS = 6


@dataclass(frozen=True)
class Naming:
    """Spelling of a tokenizer's tokens in text.

    Attributes:
        code: format of one token with its id, such as ``"<img_{:05d}>"``.
        begin, end: markers around an item.
        first: number that the tokenizer's id 0 is written with.
    """

    code: str
    begin: str
    end: str
    first: int = 0

    def __post_init__(self) -> None:
        if self.first < 0:
            raise InputError(f"numbers of codes begin at 0 or above, not at {self.first}")
        if not _CODE_FORMAT.fullmatch(self.code):
            raise InputError(f"the code {self.code!r} must hold one number, such as '<img_{{:05d}}>'")
        if not self.begin or not self.end or self.begin == self.end:
            raise InputError(f"begin and end must be two different strings, not {self.begin!r} and {self.end!r}")

    @property
    def around(self) -> tuple[str, str]:
        """Text before and behind the number of a code."""
        parts = _CODE_FORMAT.fullmatch(self.code)
        assert parts is not None
        return parts[1], parts[3]

    def written(self, own_id: int) -> str:
        """Text of one of the tokenizer's ids."""
        return self.code.format(self.first + own_id)

    @classmethod
    def of(cls, name: str) -> Naming:
        """SEED's way: ``<img_00000>`` between ``<img>`` and ``</img>``."""
        return cls(f"<{name}_{{:05d}}>", f"<{name}>", f"</{name}>")


class MisplacedError(InputError):
    """Something is wrong within an item; ``place`` counts from behind its first marker."""

    def __init__(self, place: int, reason: str) -> None:
        self.place = place
        super().__init__(reason)

    def __reduce__(self) -> tuple[type[MisplacedError], tuple[int, str]]:  # type: ignore[override]  # other arguments
        return type(self), (self.place, self.reason)


@dataclass(frozen=True)
class Grid:
    """Spelling of a grid of ids: its rows and columns in digits of text, a marker, and the rows apart from each other.

    The header of a grid of 12 x 9 is ``1 2 * 9`` in ids of text. A separator stands between rows, not behind the last.

    Attributes:
        marker: id behind the header.
        row_end: id between rows.
        times: id of ``*``.
        digits: ids of ``0`` to ``9``.
        marker_text, row_end_text: strings of the two.
    """

    marker: int
    row_end: int
    times: int
    digits: tuple[int, ...]
    marker_text: str
    row_end_text: str

    def __post_init__(self) -> None:
        ids = (self.marker, self.row_end, self.times, *self.digits)
        if len(self.digits) != 10 or len(set(ids)) < len(ids):
            raise InputError(f"a grid needs 13 different ids, of a marker, a separator, '*' and ten digits, not {ids}")
        if not self.marker_text or not self.row_end_text or self.marker_text == self.row_end_text:
            raise InputError("a grid needs two different strings, for its marker and between its rows")

    def header(self, rows: int, columns: int) -> list[int]:
        """The ids in front of the first row."""
        numbers = [[self.digits[int(digit)] for digit in str(number)] for number in (rows, columns)]
        return [*numbers[0], self.times, *numbers[1], self.marker]

    def write(self, ids: Int[Tensor, " length"], rows: int) -> Int[Tensor, " written"]:
        """A grid of ids of the vocabulary with its header and its separators."""
        grid = ids.reshape(rows, -1)
        apart = torch.cat([grid, grid.new_full((rows, 1), self.row_end)], dim=1).flatten()[:-1]
        return torch.cat([ids.new_tensor(self.header(*grid.shape)), apart])

    def read(self, run: Sequence[int]) -> tuple[list[int], int]:
        """Ids of the vocabulary, and their number of rows, from what stands between the markers of an item.

        Raises:
            MisplacedError: it is no grid; says where.
        """
        known = {*self.digits, self.times}
        if self.marker not in run:
            place = next((place for place, number in enumerate(run) if number not in known), len(run))
            raise MisplacedError(place, f"the grid has no header: id {self.marker} is missing")
        end = list(run).index(self.marker)
        for place, number in enumerate(run[:end]):
            if number not in known:
                raise MisplacedError(place, f"id {number} stands in the header of a grid")
        text = "".join("*" if number == self.times else str(self.digits.index(number)) for number in run[:end])
        if not (found := _HEADER.fullmatch(text)):
            raise MisplacedError(end, f"{text[:20]!r} is no header of a grid, such as '12*9'")
        rows, columns = int(found[1]), int(found[2])
        body = run[end + 1 :]
        for place, number in enumerate(body):
            row, column = divmod(place, columns + 1)
            if row >= rows or place == rows * (columns + 1) - 1:
                raise MisplacedError(end + 1 + place, f"something stands behind the last of {rows} rows")
            if (number == self.row_end) != (column == columns) or number == self.marker:
                raise MisplacedError(end + 1 + place, f"row {row} does not have {columns} ids")
        if len(body) != rows * (columns + 1) - 1:
            raise MisplacedError(len(run), f"the grid of {rows} x {columns} is not complete")
        return [number for number in body if number != self.row_end], rows


_HEADER = re.compile(rf"([1-9][0-9]{{0,{_MOST_GRID_DIGITS - 1}}})\*([1-9][0-9]{{0,{_MOST_GRID_DIGITS - 1}}})")


@dataclass(frozen=True)
class Section:
    """Place of a tokenizer's ids in the vocabulary.

    Attributes:
        name: what it is called in the vocabulary.
        tokenizer, fingerprint: the checkpoint that the ids belong to.
        vocab_size: number of its ids.
        offset: what is added to them.
        begin, end: ids of the markers around an item.
        naming: how they are written.
        max_tokens: most tokens of an item, where there is a limit.
        whole: whether an item must have that many, because no prefix of it decodes.
        frame: codebooks of each step, where ids come from several.
        grid: how rows are told from each other, where an item is a grid.
    """

    name: str
    tokenizer: str
    fingerprint: str
    vocab_size: int
    offset: int
    begin: int
    end: int
    naming: Naming
    max_tokens: int | None = None
    whole: bool = False
    frame: Frame | None = None
    grid: Grid | None = None

    @property
    def markers(self) -> dict[int, str]:
        """The ids of its own that are no codes, and how they are written."""
        own = {self.begin: self.naming.begin, self.end: self.naming.end}
        return (
            own
            if self.grid is None
            else own | {self.grid.marker: self.grid.marker_text, self.grid.row_end: self.grid.row_end_text}
        )

    def ids(self) -> Iterator[int]:
        """All of its ids in the vocabulary, in increasing order of the tokenizer's own ids, and the markers."""
        yield from range(self.offset, self.offset + self.vocab_size)
        yield from self.markers

    def strings(self) -> Iterator[str]:
        """Text for each of `ids`."""
        yield from map(self.naming.written, range(self.vocab_size))
        yield from self.markers.values()

    def holds(self, own_id: int) -> bool:
        """Whether an id of the vocabulary is one of the tokenizer's."""
        return self.offset <= own_id < self.offset + self.vocab_size

    def code_of(self, string: str) -> int | None:
        """The tokenizer's id that a string stands for; ``None`` if it is none of its codes."""
        before, behind = self.naming.around
        match = re.fullmatch(rf"{re.escape(before)}([0-9]{{1,{MOST_DIGITS}}}){re.escape(behind)}", string)
        return self._id_written(int(match[1]), string) if match else None

    def _id_written(self, number: int, string: str) -> int | None:
        """The tokenizer's id with a number, if that is how it is written."""
        own_id = number - self.naming.first
        return own_id if 0 <= own_id < self.vocab_size and self.naming.written(own_id) == string else None

    def check_length(self, count: int) -> None:
        """Refuse an item that does not decode.

        Raises:
            InputError: it has too few tokens, or too many.
        """
        most = self.max_tokens
        least = most if self.whole and most is not None else 1
        if count < least or (most is not None and count > most):
            limit = "at least 1" if most is None else str(most) if least == most else f"1 to {most}"
            raise InputError(f"an item of {self.name!r} has {count} tokens, not {limit}")
        if self.frame is not None and count % self.frame.ids_per_frame:
            raise InputError(
                f"an item of {self.name!r} has {count} tokens, no whole number of frames of {self.frame.ids_per_frame}"
            )

    def rows_of(self, tokens: Tokens, index: int) -> int:
        """Rows of an item of a grid.

        Raises:
            InputError: the item does not remember them, or they are not of one length.
        """
        rows = tokens.meta[index].get("rows", 0) if tokens.meta else 0
        length = int(tokens.lengths[index])
        if rows < 1 or length % rows:
            raise InputError(f"an item of {self.name!r} must remember its rows, of which its {length} ids make a whole number")
        return int(rows)

    def write(self, ids: Int[Tensor, " length"], rows: int | None) -> Int[Tensor, " written"]:
        """An item between its markers, from the tokenizer's own ids.

        Raises:
            InputError: as `check_length`.
        """
        self.check_length(len(ids))
        placed = ids + self.offset
        if self.grid is not None and rows is not None:
            placed = self.grid.write(placed, rows)
        markers = ids.new_tensor([self.begin, self.end])
        return torch.cat([markers[:1], placed, markers[1:]])

    def write_text(self, ids: Sequence[int], rows: int | None) -> str:
        """An item as a string between its markers, from the tokenizer's own ids.

        Raises:
            InputError: as `check_length`.
        """
        self.check_length(len(ids))
        codes = list(map(self.naming.written, ids))
        if self.grid is None or rows is None:
            content = "".join(codes)
        else:
            columns = len(codes) // rows
            lines = ["".join(codes[start : start + columns]) for start in range(0, len(codes), columns)]
            content = f"{rows}*{columns}{self.grid.marker_text}{self.grid.row_end_text.join(lines)}"
        return f"{self.naming.begin}{content}{self.naming.end}"

    def read_text(self, content: str) -> Tokens:
        """The item that is written between two markers; space between tokens is ignored.

        Raises:
            InputError: it is none.
        """
        if self.grid is None:
            return self.tokens(self._read_codes(content))
        header, marker, body = content.partition(self.grid.marker_text)
        if not marker or not (found := _HEADER.fullmatch(header.strip())):
            raise InputError(f"{content[:20]!r} is no header of a grid of {self.name!r}, such as '12*9{self.grid.marker_text}'")
        lines = [self._read_codes(line) for line in body.split(self.grid.row_end_text)]
        rows, columns = int(found[1]), int(found[2])
        if len(lines) != rows or any(len(line) != columns for line in lines):
            raise InputError(f"a grid of {self.name!r} has not the {rows} rows of {columns} tokens that its header tells")
        return self.tokens([code for line in lines for code in line], rows)

    def _read_codes(self, content: str) -> list[int]:
        before, behind = self.naming.around
        code = re.compile(rf"\s*{re.escape(before)}([0-9]{{1,{MOST_DIGITS}}}){re.escape(behind)}\s*")
        ids: list[int] = []
        position = 0
        while position < len(content):
            match = code.match(content, position)
            own_id = self._id_written(int(match[1]), match[0].strip()) if match else None
            if match is None or own_id is None:
                raise InputError(f"{content[position : position + 20]!r} is no token of {self.name!r}")
            ids.append(own_id)
            position = match.end()
        return ids

    def tokens(self, own_ids: Sequence[int], rows: int | None = None) -> Tokens:
        """One item's ids, the tokenizer's own, as tokens, which remember the rows of a grid.

        Raises:
            InputError: as `check_length`.
        """
        self.check_length(len(own_ids))
        ids = torch.tensor(own_ids, dtype=torch.int64)
        if self.frame is not None:
            self._check_places(ids)
        return Tokens.from_sequences(
            [ids],
            tokenizer=self.tokenizer,
            fingerprint=self.fingerprint,
            vocab_size=self.vocab_size,
            meta=() if rows is None else ({"rows": rows},),
            frame=self.frame,
        )

    def _check_places(self, ids: Int[Tensor, " length"]) -> None:
        assert self.frame is not None
        frames = ids.reshape(-1, self.frame.ids_per_frame)
        codes = frames - torch.tensor(self.frame.offsets)
        if len(wrong := ((codes < 0) | (codes >= torch.tensor(self.frame.placed_sizes))).nonzero()):
            step, place = wrong[0].tolist()
            position = step * self.frame.ids_per_frame + place
            raise InputError(
                f"token {int(ids[position])} at position {position} of an item of {self.name!r} does not belong to codebook "
                f"{self.frame.order[place]}"
            )

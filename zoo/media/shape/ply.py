"""PLY, as text and in binary of both byte orders: polygons, strips of triangles, and points with or without normals."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.errors import InputError
from zoo.media.shape.geometry import (
    NO_FACES,
    Geometry,
    Indices,
    Vectors,
    check_count,
    check_indices,
    floats,
    integers,
    strip,
    without_repeats,
)
from zoo.media.shape.polygons import triangulate, without_lines

_TYPES = {
    **dict.fromkeys(("char", "int8"), "i1"),
    **dict.fromkeys(("uchar", "uint8"), "u1"),
    **dict.fromkeys(("short", "int16"), "i2"),
    **dict.fromkeys(("ushort", "uint16"), "u2"),
    **dict.fromkeys(("int", "int32"), "i4"),
    **dict.fromkeys(("uint", "uint32"), "u4"),
    **dict.fromkeys(("long", "int64"), "i8"),
    **dict.fromkeys(("ulong", "uint64"), "u8"),
    **dict.fromkeys(("float", "float32"), "f4"),
    **dict.fromkeys(("double", "float64"), "f8"),
}
_ORDERS = {b"ascii": "", b"binary_little_endian": "<", b"binary_big_endian": ">"}
# A header keeps to one end of line: behind that of its last line, a byte that looks like another is a coordinate's.
_END = {end: re.compile(rb"[\r\n][ \t]*end_header[ \t]*" + end) for end in (b"\r\n", b"\n", b"\r")}
_FIRST_LINE = re.compile(rb"ply[ \t]*(\r\n|\n|\r)")
_FACES = ("vertex_indices", "vertex_index")
_READ = {"x", "y", "z", "nx", "ny", "nz", *_FACES}


@dataclass(frozen=True)
class _Property:
    """A number per row, or a list of them with its length before it."""

    name: str
    kind: str
    count: str | None = None


@dataclass(frozen=True)
class _Element:
    name: str
    rows: int
    properties: list[_Property]

    def property(self, *names: str) -> _Property | None:
        return next((each for each in self.properties if each.name in names), None)


# What is read of an element: numbers of each property, one per row; of a list all of them, and how many each row has.
_Columns = dict[str, NDArray[Any]]
_Lists = dict[str, tuple[NDArray[Any], Indices]]


def read(content: bytes, max_faces: int) -> Geometry:
    order, elements, start = _header(content)
    vertices, normals, faces, strips = np.zeros((0, 3)), None, None, None
    body = _Text(content[start:]) if order == "" else _Binary(content, start, order)
    for element in elements:
        what = "points" if element.name == "vertex" else "rows of an element"
        check_count(element.rows, "faces" if element.name == "face" else what, max_faces)
        columns, lists = body.read(element)
        if element.name == "vertex" and element.rows:
            vertices, normals = _vertices(columns)
        elif element.name in ("face", "tristrips") and element.rows:
            name = element.property(*_FACES)
            if name is None or name.count is None:
                raise InputError(f"its element {element.name} has no list {' or '.join(_FACES)}")
            corners, sizes = lists[name.name]
            if corners.dtype.kind == "f":
                raise InputError(f"its list {name.name} is of {corners.dtype}, not of whole numbers")
            if element.name == "face":
                faces = without_lines(corners.astype(np.int64), sizes)
            else:
                strips = corners, sizes
    triangles = [NO_FACES]
    if faces is not None:
        triangles.append(triangulate(vertices, *faces, max_faces))
    if strips is not None:
        triangles.append(_strips(*strips))
        check_indices(triangles[-1], len(vertices))
    found = np.concatenate(triangles)
    return Geometry(vertices, found, None if len(found) else normals)


def _header(content: bytes) -> tuple[str, list[_Element], int]:
    """Order of bytes (none for text), elements, and where these begin."""
    first = _FIRST_LINE.match(content)
    end = None if first is None else _END[first[1]].search(content)
    if end is None:
        raise InputError("it is truncated: the header has no end")
    order: str | None = None
    elements: list[_Element] = []
    for line in content[: end.start()].splitlines()[1:]:
        words = line.split()
        if not words or words[0] in (b"comment", b"obj_info"):
            continue
        match [words[0], *(word.decode("latin-1") for word in words[1:])]:
            case [b"format", _, _] if words[1] in _ORDERS:
                order = _ORDERS[words[1]]
            case [b"element", str(name), str(rows)] if rows.isdecimal():
                elements.append(_Element(name, int(rows), []))
            case [b"property", "list", str(count), str(kind), str(name)] if elements and {count, kind} <= _TYPES.keys():
                if _TYPES[count][0] == "f":
                    raise InputError(f"the lengths of its list {name} are of type {count}")
                elements[-1].properties.append(_Property(name, _TYPES[kind], _TYPES[count]))
            case [b"property", str(kind), str(name)] if elements and kind in _TYPES:
                elements[-1].properties.append(_Property(name, _TYPES[kind]))
            case _:
                raise InputError(f"a line of its PLY header makes no sense: {line[:80].decode('latin-1')!r}")
    if order is None:
        raise InputError("its PLY header names no format")
    for element in elements:
        if len({each.name for each in element.properties}) < len(element.properties):
            raise InputError(f"two properties of its element {element.name} have one name")
    return order, elements, end.end()


def _vertices(columns: _Columns) -> tuple[Vectors, Vectors | None]:
    if missing := [axis for axis in "xyz" if axis not in columns]:
        raise InputError(f"its vertices have no property {', '.join(missing)}")
    vertices = np.stack([columns[axis].astype(np.float64) for axis in "xyz"], axis=1)
    if not {"nx", "ny", "nz"} <= columns.keys():
        return vertices, None
    normals = np.stack([columns[axis].astype(np.float64) for axis in ("nx", "ny", "nz")], axis=1)
    # Some writers have the columns, and nothing to put there.
    return vertices, normals if normals.any() else None


def _strips(corners: NDArray[Any], sizes: Indices) -> Indices:
    """Triangles of strips, which -1 ends and begins anew."""
    ends = np.iinfo(corners.dtype).max if corners.dtype.kind == "u" else -1
    runs = [np.zeros(0, np.int64)]
    for row in np.split(corners, np.cumsum(sizes)[:-1]):
        stops = np.flatnonzero(row == ends)
        runs += [run[run != ends].astype(np.int64) for run in np.split(row, stops)]
    return without_repeats(np.concatenate([NO_FACES, *(strip(run) for run in runs if len(run) > 2)]))


class _Binary:
    """Elements of a binary file, one after the other."""

    def __init__(self, content: bytes, start: int, order: str) -> None:
        self.content, self.at, self.order = content, start, order

    def read(self, element: _Element) -> tuple[_Columns, _Lists]:
        least = sum(np.dtype(each.count or each.kind).itemsize for each in element.properties)
        if least * element.rows > len(self.content) - self.at:
            raise InputError(f"it is truncated: {element.rows} rows of its element {element.name} are not there")
        if not least or not element.rows:
            return {}, {each.name: _empty(each) for each in element.properties if each.count}
        lengths = self._lengths(element)
        rows = self._rows(element, lengths)
        if rows is None:
            return self._row_by_row(element)
        self.at += rows.nbytes
        columns = {each.name: rows[each.name] for each in element.properties if each.count is None}
        lists = {
            each.name: (rows[each.name].reshape(-1), np.full(element.rows, lengths[each.name]))
            for each in element.properties
            if each.count
        }
        return columns, lists

    def _lengths(self, element: _Element) -> dict[str, int]:
        """How long the lists of the next row are."""
        lengths, at = {}, self.at
        for each in element.properties:
            if each.count:
                lengths[each.name] = self._length(each, at)
                at += np.dtype(each.count).itemsize
            at += np.dtype(each.kind).itemsize * lengths.get(each.name, 1)
        return lengths

    def _length(self, each: _Property, at: int) -> int:
        size = np.dtype(each.count).itemsize
        signed = each.count is not None and each.count[0] == "i"
        length = int.from_bytes(self.content[at : at + size], "little" if self.order == "<" else "big", signed=signed)
        room = (len(self.content) - at - size) // np.dtype(each.kind).itemsize
        if not 0 <= length <= room:
            raise InputError(f"it is truncated or damaged: a list {each.name} of {length} numbers is not there")
        return length

    def _rows(self, element: _Element, lengths: dict[str, int]) -> Any:
        """All rows, if their lists are as long as those of the first one; `None` if not."""
        fields: list[tuple[str, str] | tuple[str, str, tuple[int]]] = []
        for each in element.properties:
            if each.count:
                fields += [
                    (f"{each.name} ", self.order + each.count),
                    (each.name, self.order + each.kind, (lengths[each.name],)),
                ]
            else:
                fields.append((each.name, self.order + each.kind))
        kind = np.dtype(fields)
        if kind.itemsize * element.rows > len(self.content) - self.at:
            return None
        rows = np.frombuffer(self.content, kind, element.rows, self.at)
        return rows if all((rows[f"{name} "] == length).all() for name, length in lengths.items()) else None

    def _row_by_row(self, element: _Element) -> tuple[_Columns, _Lists]:
        """Columns and lists of rows that differ in length."""
        pieces: dict[str, list[bytes]] = {each.name: [] for each in element.properties}
        lengths: dict[str, list[int]] = {each.name: [] for each in element.properties if each.count}
        at, content = self.at, self.content
        sizes = [(each, np.dtype(each.count or "u1").itemsize, np.dtype(each.kind).itemsize) for each in element.properties]
        for _ in range(element.rows):
            for each, of_count, of_number in sizes:
                length = 1
                if each.count:
                    length = self._length(each, at)
                    lengths[each.name].append(length)
                    at += of_count
                pieces[each.name].append(content[at : at + length * of_number])
                at += length * of_number
        if at > len(content):
            raise InputError(f"it is truncated: {element.rows} rows of its element {element.name} are not there")
        self.at = at
        found = {each.name: np.frombuffer(b"".join(pieces[each.name]), self.order + each.kind) for each in element.properties}
        return (
            {each.name: found[each.name] for each in element.properties if each.count is None},
            {name: (found[name], np.array(count, np.int64)) for name, count in lengths.items()},
        )


class _Text:
    """Elements of a text file, one after the other."""

    def __init__(self, content: bytes) -> None:
        self.words, self.at = content.split(), 0

    def read(self, element: _Element) -> tuple[_Columns, _Lists]:
        width = len(element.properties)
        if width * element.rows > len(self.words) - self.at:
            raise InputError(f"it is truncated: {element.rows} rows of its element {element.name} are not there")
        if any(each.count for each in element.properties):
            return self._row_by_row(element)
        words = self.words[self.at : self.at + width * element.rows]
        self.at += len(words)
        read = [(index, each) for index, each in enumerate(element.properties) if each.name in _READ]
        return {each.name: _numbers(words[index::width], each) for index, each in read}, {}

    def _row_by_row(self, element: _Element) -> tuple[_Columns, _Lists]:
        found: dict[str, list[bytes]] = {each.name: [] for each in element.properties}
        lengths: dict[str, list[int]] = {each.name: [] for each in element.properties if each.count}
        at = self.at
        for _ in range(element.rows):
            for each in element.properties:
                length = 1
                if each.count:
                    length = int(integers(self.words[at : at + 1])[0]) if at < len(self.words) else -1
                    if not 0 <= length < len(self.words) - at:
                        raise InputError(f"it is truncated or damaged: a list {each.name} of {length} numbers is not there")
                    lengths[each.name].append(length)
                    at += 1
                found[each.name] += self.words[at : at + length]
                at += length
        if at > len(self.words):
            raise InputError(f"it is truncated: {element.rows} rows of its element {element.name} are not there")
        self.at = at
        numbers = {each.name: _numbers(found[each.name], each) for each in element.properties if each.name in _READ}
        return (
            {name: column for name, column in numbers.items() if name not in lengths},
            {name: (numbers[name], np.array(count, np.int64)) for name, count in lengths.items() if name in numbers},
        )


def _numbers(words: list[bytes], each: _Property) -> NDArray[Any]:
    """Numbers of a property, of its type: -1 of an unsigned one is its largest."""
    if each.kind[0] == "f":
        # Text has the digits of float64 whatever the header says.
        return floats(words)
    found = integers(words)
    return found.astype(each.kind) if each.kind[0] == "u" else found


def _empty(each: _Property) -> tuple[NDArray[Any], Indices]:
    return np.zeros(0, each.kind), np.zeros(0, np.int64)

"""Scenes with questions: coloured shapes on a cluttered ground, and what one may ask about any one of them.

Every scene is a function of its seed and index alone. A question concerns one object of many, so a model that has lost the
tokens of that object can only guess.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.random import Generator
from torch import Tensor

#: Pixels of a picture's side, and of a patch's side: 12 x 12 patches.
SIZE, PATCH = 72, 6
GRID = SIZE // PATCH
#: The picture is laid out in three by three cells with at most one object each.
CELLS = 3
CELL = SIZE // CELLS

COLOURS = {
    "red": (214, 44, 44),
    "green": (48, 168, 62),
    "blue": (44, 76, 220),
    "yellow": (236, 214, 50),
    "purple": (150, 52, 186),
    "orange": (240, 138, 32),
    "cyan": (62, 206, 216),
    "white": (244, 244, 244),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
PLACES = tuple(f"{row}-{column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right"))
FEWEST, MOST = 5, 8
#: Counts that are asked for; in a scene no colour occurs more often.
COUNTS = ("1", "2", "3", "4")

KINDS = ("colour", "shape", "where", "count")
SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>")
WORDS = (
    *SPECIAL,
    *COLOURS,
    *SHAPES,
    *PLACES,
    *COUNTS,
    "what",
    "colour",
    "shape",
    "is",
    "the",
    "where",
    "how",
    "many",
    "at",
    "?",
)
IDS = {word: index for index, word in enumerate(WORDS)}
#: Words of every question, padded in front, and the chance of a guess that knows nothing but the kind of question.
QUESTION_LENGTH = 6


@dataclass(frozen=True)
class Object:
    """A shape in a cell.

    Attributes:
        colour, shape: positions in ``COLOURS`` and ``SHAPES``.
        cell: 0 to 8, row by row.
    """

    colour: int
    shape: int
    cell: int


@dataclass(frozen=True)
class Question:
    """A question in words, its kind, the answer's word, and the cells that show the answer."""

    words: tuple[str, ...]
    kind: str
    answer: str
    cells: tuple[int, ...]


@dataclass(frozen=True)
class Scene:
    """A picture with what is in it.

    Attributes:
        pixels: uint8 ``[3, 72, 72]``.
        objects: in the order of their cells; no two have the same colour and shape.
        patches: per patch 0 for ground, otherwise 1 + the position in ``objects`` of what covers most of it.
    """

    pixels: UInt8[np.ndarray, "3 side side"]
    objects: tuple[Object, ...]
    patches: Int[np.ndarray, "grid grid"]


def scene(seed: int, index: int) -> Scene:
    """The scene of this seed and index."""
    rng = np.random.default_rng((seed, index))
    objects = _objects(rng)
    pixels = _ground(rng)
    covered = np.zeros((GRID, GRID), np.int64)
    most = np.full((GRID, GRID), 0.25)  # of a patch, below which it counts as ground
    for number, placed in enumerate(objects, 1):
        rows, columns, alpha = _silhouette(rng, placed)
        tint = np.array(list(COLOURS.values())[placed.colour], np.float32) * rng.uniform(0.85, 1.0)
        light = np.linspace(1.08, 0.9, CELL, dtype=np.float32)[:, None]
        pixels[:, rows, columns] += alpha * (tint[:, None, None] * light - pixels[:, rows, columns])
        whole = np.zeros((SIZE, SIZE), np.float32)
        whole[rows, columns] = alpha
        share = whole.reshape(GRID, PATCH, GRID, PATCH).mean(axis=(1, 3))
        covered[share > most] = number
        most = np.maximum(most, share)
    pixels += rng.normal(0, 4, pixels.shape).astype(np.float32)
    return Scene(pixels.round().clip(0, 255).astype(np.uint8), objects, covered)


def _objects(rng: Generator) -> tuple[Object, ...]:
    count = int(rng.integers(FEWEST, MOST + 1))
    cells = np.sort(rng.permutation(CELLS**2)[:count])
    # Few colours and shapes in one scene, so that some are shared and some are one object's own.
    colours = rng.permutation(len(COLOURS))[: rng.integers(3, 7)]
    shapes = rng.permutation(len(SHAPES))[: rng.integers(3, 6)]
    pairs = [(int(colour), int(shape)) for colour in colours for shape in shapes]
    while True:
        chosen = [pairs[i] for i in rng.permutation(len(pairs))[:count]]
        most_alike = max(sum(colour == other for other, _ in chosen) for colour, _ in chosen)
        if most_alike <= len(COUNTS):
            return tuple(Object(colour, shape, int(cell)) for (colour, shape), cell in zip(chosen, cells, strict=True))


def _ground(rng: Generator) -> Float[np.ndarray, "3 side side"]:
    """Dull light that falls off across the picture, and faint scribbles that are no objects."""
    slope = rng.uniform(-25, 25, 2)
    axis = np.linspace(-1, 1, SIZE, dtype=np.float32)
    light = slope[0] * axis[:, None] + slope[1] * axis[None]
    ground = (rng.uniform(60, 120, (3, 1, 1)) + light).astype(np.float32)
    for _ in range(int(rng.integers(4, 12))):
        start, end = rng.integers(0, SIZE, (2, 2))
        steps = np.linspace(0, 1, 2 * SIZE)[:, None]
        rows, columns = (start + steps * (end - start)).round().astype(int).T
        ground[:, rows, columns] += rng.uniform(-30, 30)
    return ground


def _silhouette(rng: Generator, placed: Object) -> tuple[slice, slice, Float[np.ndarray, "cell cell"]]:
    """Where an object's cell is, and how much of each pixel of it the object covers."""
    radius = rng.uniform(7.0, 10.0)
    room = CELL / 2 - radius
    centre = CELL / 2 - 0.5 + rng.uniform(-room, room, 2)
    down, across = np.meshgrid(np.arange(CELL) - centre[0], np.arange(CELL) - centre[1], indexing="ij")
    distance = _outline(SHAPES[placed.shape], across, down, radius)
    row, column = divmod(placed.cell, CELLS)
    rows, columns = slice(row * CELL, (row + 1) * CELL), slice(column * CELL, (column + 1) * CELL)
    return rows, columns, np.clip(0.5 - distance, 0, 1).astype(np.float32)


def _outline(
    shape: str, x: Float[np.ndarray, "cell cell"], y: Float[np.ndarray, "cell cell"], radius: float
) -> Float[np.ndarray, "cell cell"]:
    """Signed distance in pixels from the outline of a shape, negative inside; y points down."""
    radial = np.hypot(x, y)
    if shape == "circle":
        return radial - radius
    if shape == "ring":
        return np.abs(radial - 0.72 * radius) - 0.28 * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.85 * radius
    if shape == "bar":
        return np.maximum(np.abs(x) - radius, np.abs(y) - 0.36 * radius)
    if shape == "cross":
        arms = [np.maximum(np.abs(a) - radius, np.abs(b) - 0.3 * radius) for a, b in ((x, y), (y, x))]
        return np.minimum(*arms)
    # An upright triangle: its base, and its two sides, which meet at the top.
    return np.maximum(y - 0.8 * radius, 0.894 * np.abs(x) - 0.447 * (y + radius))


def questions(content: Scene) -> tuple[Question, ...]:
    """Everything that may be asked about a scene and has one answer, in a fixed order."""
    asked = []
    colours, words = list(COLOURS), content.objects
    for item in words:
        colour, shape, place = colours[item.colour], SHAPES[item.shape], PLACES[item.cell]
        asked += [
            Question(("what", "colour", "is", "at", place, "?"), "colour", colour, (item.cell,)),
            Question(("what", "shape", "is", "at", place, "?"), "shape", shape, (item.cell,)),
            Question(("where", "is", "the", colour, shape, "?"), "where", place, (item.cell,)),
        ]
        if sum(other.shape == item.shape for other in words) == 1:
            asked.append(Question(("what", "colour", "is", "the", shape, "?"), "colour", colour, (item.cell,)))
        if sum(other.colour == item.colour for other in words) == 1:
            asked.append(Question(("what", "shape", "is", "the", colour, "?"), "shape", shape, (item.cell,)))
    for number, colour in enumerate(colours):
        cells = tuple(item.cell for item in words if item.colour == number)
        if cells:
            asked.append(Question(("how", "many", "the", colour, "?"), "count", str(len(cells)), cells))
    return tuple(asked)


def draw_questions(rng: Generator, content: Scene, count: int) -> list[Question]:
    """Random questions, of all kinds alike often."""
    by_kind = {kind: [question for question in questions(content) if question.kind == kind] for kind in KINDS}
    kinds = [KINDS[i] for i in rng.integers(len(KINDS), size=count)]
    return [by_kind[kind][rng.integers(len(by_kind[kind]))] for kind in kinds]


def question_ids(question: Question) -> list[int]:
    """Ids of a question's words, filled up in front with padding to the common length."""
    ids = [IDS[word] for word in question.words]
    return [IDS["<pad>"]] * (QUESTION_LENGTH - len(ids)) + ids


def pixel_values(pixels: UInt8[np.ndarray, "batch 3 side side"]) -> Float[Tensor, "batch 3 side side"]:
    """Pictures in the range of the model, [-1, 1]."""
    return torch.from_numpy(pixels).float() / 127.5 - 1

"""Training pictures made from nothing: leaves, landscapes, solids, portraits, still lifes, pages and textures.

What a codec of photographs has to know is mostly statistics: things that occlude each other at every scale (dead leaves,
Lee, Mumford and Huang 2001), power spectra that fall like 1/f², light from one side, few strong colours, much dull colour.
Every picture is a function of its seed and index alone, so the same call makes the same pictures in any order.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor
from tqdm import tqdm

from zoo.media import replacing

SIZE = 128
FIELD = 256

#: A plain number or one of NumPy's, which its random generator gives.
Number = float | int | np.number
Plane = Float[np.ndarray, "rows columns"]
Colour = Float[np.ndarray, "3"]
Picture = Float[np.ndarray, "3 rows columns"]
#: A set of pictures, and a batch of them in the range of the models.
Pictures = UInt8[np.ndarray, "count 3 height width"]
Images = Float[Tensor, "batch 3 height width"]
Scene = Callable[["Canvas"], None]
#: Signed distance in pixels from the outline of a shape, negative inside, at offsets (x, y) from its centre.
Outline = Callable[[Plane, Plane], Plane]

#: Directions of colour in RGB: blue to orange, in which daylight, skin, soil and sky vary, and green to magenta.
WARM = np.array([0.75, 0.1, -0.85], np.float32)
MAGENTA = np.array([0.5, -0.5, 0.3], np.float32)


# ---------------------------------------------------------------------------------------------------------------- colour


@dataclass(frozen=True)
class Palette:
    """The colours of one picture: how bright, how contrasting, how colourful and which way it leans."""

    brightness: float
    contrast: float
    tint: tuple[float, float]
    spread: tuple[float, float]

    @classmethod
    def draw(cls, rng: Generator) -> Palette:
        """Most pictures are dull, some are colourful, and blue to orange varies more than green to magenta."""
        saturation = 0.11 * rng.lognormal(0, 0.6)
        return cls(
            brightness=float(rng.normal(0.45, 0.13)),
            contrast=float(rng.uniform(0.12, 0.33)),
            tint=(float(rng.normal(0.05, 0.6 * saturation)), float(rng.normal(0, 0.3 * saturation))),
            spread=(saturation, 0.45 * saturation),
        )

    def colour(self, rng: Generator, brightness: Number | None = None) -> Colour:
        """A colour of the palette, at a brightness in [0, 1] if one is given."""
        light = rng.normal(self.brightness, self.contrast) if brightness is None else brightness
        light = float(np.clip(light, 0.02, 0.98))
        warm = self.tint[0] + rng.laplace(0, self.spread[0] / math.sqrt(2))
        magenta = self.tint[1] + rng.laplace(0, self.spread[1] / math.sqrt(2))
        # Black and white have no room for colour.
        room = 4 * light * (1 - light) * 0.8 + 0.2
        return np.clip(light + room * (warm * WARM + magenta * MAGENTA), 0, 1).astype(np.float32)


# --------------------------------------------------------------------------------------------------------------- texture


@functools.lru_cache(maxsize=1)
def noise_fields() -> Float[np.ndarray, "fields 256 256"]:
    """Periodic Gaussian fields of unit variance with amplitude 1/f^a, a from 0.4 to 2, some drawn out in one direction."""
    rng = np.random.default_rng(0)
    rows, columns = np.fft.fftfreq(FIELD)[:, None], np.fft.fftfreq(FIELD)[None]
    fields = []
    for index in range(64):
        exponent = rng.uniform(0.4, 2.0)
        angle, stretch = rng.uniform(0, np.pi), (1.0 if index % 2 else rng.uniform(2, 8))
        along = (math.cos(angle) * columns + math.sin(angle) * rows) * math.sqrt(stretch)
        across = (math.cos(angle) * rows - math.sin(angle) * columns) / math.sqrt(stretch)
        radius = np.hypot(along, across)
        radius[0, 0] = np.inf
        spectrum = np.fft.fft2(rng.standard_normal((FIELD, FIELD))) / radius**exponent
        values = np.fft.ifft2(spectrum).real
        if index % 4 == 0:  # ridges and clumps, as in bark, cloud edges and foliage
            values = np.abs(values)
        fields.append((values - values.mean()) / values.std())
    return np.stack(fields).astype(np.float32)


def noise(rng: Generator, rows: int, columns: int) -> Plane:
    """A piece of a random noise field, at its own scale or half of it, in any of its eight orientations."""
    fields = noise_fields()
    values = fields[rng.integers(len(fields))]
    if rng.random() < 0.5:
        values = values.T
    if rng.random() < 0.3 and max(rows, columns) <= FIELD // 2:
        values = values[::2, ::2]
    top, left = rng.integers(values.shape[0] - rows + 1), rng.integers(values.shape[1] - columns + 1)
    piece = values[top : top + rows, left : left + columns]
    return piece[:: rng.choice((-1, 1)), :: rng.choice((-1, 1))]


def stripes(rng: Generator, x: Plane, y: Plane) -> Plane:
    """Stripes, checks or dots in [-1, 1]: cloth, fences, tiles, windows."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(3, 16)
    first = np.sin((math.cos(angle) * x + math.sin(angle) * y) * (2 * np.pi / period) + rng.uniform(0, 6))
    if rng.random() < 0.5:
        second = np.sin((math.cos(angle) * y - math.sin(angle) * x) * (2 * np.pi / (period * rng.uniform(0.5, 2))))
        first = first * second if rng.random() < 0.5 else np.maximum(first, second)
    return np.clip(first * rng.uniform(1, 4), -1, 1).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------- shapes


def ellipse(a: Number, b: Number) -> Outline:
    """Half axes in pixels; exact for circles, near the outline for others."""
    return lambda x, y: (np.sqrt((x / a) ** 2 + (y / b) ** 2) - 1) * min(a, b)


def rectangle(a: Number, b: Number) -> Outline:
    """Half width and half height in pixels."""
    return lambda x, y: np.maximum(np.abs(x) - a, np.abs(y) - b)


def convex(normals: Float[np.ndarray, "sides 2"], distances: Float[np.ndarray, " sides"]) -> Outline:
    """The intersection of half planes."""

    def outline(x: Plane, y: Plane) -> Plane:
        inside = normals[0, 0] * x + normals[0, 1] * y - distances[0]
        for (nx, ny), distance in zip(normals[1:], distances[1:], strict=True):
            inside = np.maximum(inside, nx * x + ny * y - distance)
        return inside

    return outline


def polygon(corners: Float[np.ndarray, "sides 2"]) -> Outline:
    """A convex polygon by its corners (x, y)."""
    centre = corners.mean(axis=0)
    edges = np.roll(corners, -1, axis=0) - corners
    normals = np.stack([edges[:, 1], -edges[:, 0]], axis=1) / np.maximum(np.linalg.norm(edges, axis=1, keepdims=True), 1e-6)
    normals *= np.sign(((corners - centre) * normals).sum(axis=1, keepdims=True))
    return convex(normals.astype(np.float32), (corners * normals).sum(axis=1).astype(np.float32))


def blob(rng: Generator, radius: Number, roughness: Number) -> Outline:
    """A circle whose radius wavers with the angle."""
    orders = np.arange(2, 7)
    sizes = roughness * rng.standard_normal(5) / orders
    phases = rng.uniform(0, 2 * np.pi, 5)

    def outline(x: Plane, y: Plane) -> Plane:
        angle = np.arctan2(y, x)
        wave = sum(size * np.cos(order * angle + phase) for size, order, phase in zip(sizes, orders, phases, strict=True))
        return np.hypot(x, y) - radius * (1 + wave)

    return outline


def capsule(dx: Number, dy: Number, radius: Number) -> Outline:
    """A thick line from the centre to (dx, dy)."""
    length = dx * dx + dy * dy + 1e-6

    def outline(x: Plane, y: Plane) -> Plane:
        along = np.clip((x * dx + y * dy) / length, 0, 1)
        return np.hypot(x - along * dx, y - along * dy) - radius

    return outline


def turned(outline: Outline, angle: Number) -> Outline:
    """An outline rotated about its centre."""
    cos, sin = math.cos(angle), math.sin(angle)
    return lambda x, y: outline(cos * x + sin * y, cos * y - sin * x)


def leaf(rng: Generator, radius: Number) -> tuple[Outline, float]:
    """A random shape of about that radius, and how far it reaches."""
    kind = rng.random()
    aspect = float(np.exp(rng.normal(0, 0.45)))
    a, b = radius * math.sqrt(aspect), radius / math.sqrt(aspect)
    if kind < 0.35:
        return turned(ellipse(a, b), rng.uniform(0, np.pi)), max(a, b)
    if kind < 0.6:  # things that people make stand upright
        angle = rng.normal(0, 0.05) if rng.random() < 0.5 else rng.uniform(0, np.pi)
        return turned(rectangle(a, b), angle), math.hypot(a, b)
    if kind < 0.75:
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 7)))
        return polygon(np.stack([a * np.cos(angles), b * np.sin(angles)], axis=1)), max(a, b)
    if kind < 0.9:
        return blob(rng, radius, rng.uniform(0.1, 0.6)), 1.8 * radius
    angle, length = rng.uniform(0, 2 * np.pi), radius * rng.uniform(1, 3)
    thickness = radius * rng.uniform(0.05, 0.3)
    return capsule(length * math.cos(angle), length * math.sin(angle), thickness), length + thickness


# ---------------------------------------------------------------------------------------------------------------- canvas


@dataclass
class Canvas:
    """A picture under construction, with the light that falls on everything in it."""

    rng: Generator
    palette: Palette
    pixels: Picture = field(init=False)
    light: tuple[float, float] = field(init=False)
    shadow: float = field(init=False)
    texture: float = field(init=False)

    def __post_init__(self) -> None:
        angle = self.rng.uniform(-np.pi, 0) if self.rng.random() < 0.8 else self.rng.uniform(0, np.pi)
        self.light = (math.cos(angle), math.sin(angle))
        self.shadow = float(self.rng.uniform(0, 0.6))
        self.texture = float(0.06 * self.rng.lognormal(0, 0.7))
        self.pixels = np.empty((3, SIZE, SIZE), np.float32)
        self.pixels[:] = self.palette.colour(self.rng)[:, None, None]

    def box(self, x: Number, y: Number, reach: Number) -> tuple[slice, slice] | None:
        """The pixels within reach of a point."""
        top, bottom = max(0, math.floor(y - reach)), min(SIZE, math.ceil(y + reach) + 1)
        left, right = max(0, math.floor(x - reach)), min(SIZE, math.ceil(x + reach) + 1)
        return (slice(top, bottom), slice(left, right)) if top < bottom and left < right else None

    def offsets(self, box: tuple[slice, slice], x: Number, y: Number) -> tuple[Plane, Plane]:
        """Distances of a box's pixels from a point, as a grid."""
        columns = np.arange(box[1].start, box[1].stop, dtype=np.float32) - np.float32(x)
        rows = np.arange(box[0].start, box[0].stop, dtype=np.float32) - np.float32(y)
        dx, dy = np.broadcast_arrays(columns[None], rows[:, None])
        return dx, dy

    def paint(
        self,
        x: Number,
        y: Number,
        reach: Number,
        outline: Outline,
        colour: Colour | None = None,
        *,
        shading: str | None = None,
        texture: Number | None = None,
        softness: Number = 1.0,
        cast: bool = True,
    ) -> None:
        """Paint a shape, antialiased, lit, textured, and with its shadow on what lies below.

        Args:
            x, y: its centre in pixels.
            reach: no part of it is farther from the centre.
            shading: "flat", "slope" or "round"; drawn at random by default.
            texture: standard deviation of its texture, the canvas's own by default.
            softness: width of the edge in pixels.
            cast: whether it casts a shadow.
        """
        rng = self.rng
        if cast and self.shadow > 0.15 and reach > 6:
            self._cast(x, y, reach, outline)
        box = self.box(x, y, reach + softness)
        if box is None:
            return
        dx, dy = self.offsets(box, x, y)
        mask = np.clip(0.5 - outline(dx, dy) / softness, 0, 1)
        shade = self._shading(dx, dy, reach, shading)
        amount = self.texture * rng.lognormal(0, 0.5) if texture is None else texture
        if amount > 0.01 and reach > 3:
            if rng.random() < 0.12:
                shade = shade + 1.5 * amount * stripes(rng, dx, dy)
            else:
                shade = shade + amount * noise(rng, *mask.shape)
        chosen = self.palette.colour(rng) if colour is None else colour
        # Light multiplies, so dark things have weaker texture and keep their hue.
        painted = chosen[:, None, None] * (1 + 1.6 * shade) + 0.2 * shade
        target = self.pixels[:, box[0], box[1]]
        target += mask * (painted - target)

    def _cast(self, x: Number, y: Number, reach: Number, outline: Outline) -> None:
        width = reach * self.rng.uniform(0.15, 0.5)
        x, y = x - self.light[0] * width * 0.8, y - self.light[1] * width * 0.8
        box = self.box(x, y, reach + width / 2)
        if box is not None:
            dx, dy = self.offsets(box, x, y)
            self.pixels[:, box[0], box[1]] *= 1 - self.shadow * np.clip(0.5 - outline(dx, dy) / width, 0, 1)

    def _shading(self, dx: Plane, dy: Plane, reach: Number, kind: str | None) -> Plane:
        kind = kind or str(self.rng.choice(("flat", "slope", "round"), p=(0.25, 0.5, 0.25)))
        if kind == "flat":
            return np.zeros(dx.shape, np.float32)
        towards = (dx * self.light[0] + dy * self.light[1]) / reach
        if kind == "slope":
            return np.float32(self.rng.normal(0.12, 0.1)) * towards
        height = np.sqrt(np.clip(1 - (dx * dx + dy * dy) / (reach * reach), 0, 1))
        return 0.3 * (0.75 * towards + height - 0.7)

    def blur(self, radius: Number) -> None:
        """Put what was painted so far out of focus."""
        image = Image.fromarray(to_bytes(self.pixels).transpose(1, 2, 0))
        blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), np.float32)
        self.pixels = np.ascontiguousarray(blurred.transpose(2, 0, 1)) / 255


def to_bytes(pixels: Picture) -> UInt8[np.ndarray, "3 rows columns"]:
    """Clip to [0, 1] and round to 8 bits."""
    return np.clip(pixels * 255 + 0.5, 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------- scenes


def backdrop(canvas: Canvas) -> None:
    """A gradient between two colours, with clouds of a third."""
    rng, palette = canvas.rng, canvas.palette
    first, second, third = (palette.colour(rng) for _ in range(3))
    x, y = canvas.offsets((slice(0, SIZE), slice(0, SIZE)), SIZE / 2, SIZE / 2)
    angle = rng.normal(np.pi / 2, 0.5)
    ramp = np.clip(0.5 + (math.cos(angle) * x + math.sin(angle) * y) / SIZE, 0, 1)
    canvas.pixels = first[:, None, None] * (1 - ramp) + second[:, None, None] * ramp
    amount = np.clip(rng.uniform(-0.3, 0.6) + rng.uniform(0, 0.5) * noise(rng, SIZE, SIZE), 0, 1)
    canvas.pixels = canvas.pixels + amount * (third[:, None, None] - canvas.pixels)


def scatter(canvas: Canvas, count: Number, smallest: Number, largest: Number, top: Number = -0.1, bottom: Number = 1.1) -> None:
    """Dead leaves: shapes whose radii fall like r⁻³, largest first more often than not, within a band of the picture.

    At that density every scale covers as much. The band is given in shares of the picture's height.
    """
    rng = canvas.rng
    radii = smallest / np.sqrt(rng.uniform((smallest / largest) ** 2, 1, count))
    order = np.argsort(-radii * rng.lognormal(0, rng.uniform(0.1, 2), count))
    for radius in radii[order]:
        x, y = rng.uniform(-0.1, 1.1) * SIZE, rng.uniform(top, bottom) * SIZE
        outline, reach = leaf(rng, radius)
        canvas.paint(x, y, reach, outline)


def leaves(canvas: Canvas) -> None:
    """Dead leaves over all scales, the far ones sometimes out of focus."""
    rng = canvas.rng
    backdrop(canvas)
    scatter(canvas, rng.integers(10, 50), 12, 70)
    if rng.random() < 0.3:
        canvas.blur(rng.uniform(1, 6))
    scatter(canvas, rng.integers(10, 130), rng.uniform(1.5, 5), rng.uniform(12, 60))


def landscape(canvas: Canvas) -> None:
    """Sky, ridges that pale with distance, ground in perspective, and things on it."""
    rng, palette = canvas.rng, canvas.palette
    horizon = rng.uniform(0.2, 0.75) * SIZE
    _, y = canvas.offsets((slice(0, SIZE), slice(0, SIZE)), 0, 0)
    zenith = palette.colour(rng, rng.uniform(0.2, 0.8)) - np.float32(abs(rng.normal(0, 0.12))) * WARM
    haze = palette.colour(rng, rng.uniform(0.5, 0.98))
    clouds = palette.colour(rng, rng.uniform(0.6, 1.0))
    ramp = np.clip(y / horizon, 0, 1)
    canvas.pixels = zenith[:, None, None] * (1 - ramp) + haze[:, None, None] * ramp
    cover = np.clip(rng.uniform(-0.8, 0.5) + rng.uniform(0.1, 0.6) * noise(rng, SIZE, SIZE), 0, 1)
    canvas.pixels = canvas.pixels + cover * (clouds[:, None, None] - canvas.pixels)
    ridges = rng.integers(0, 4)
    for ridge in range(ridges):
        colour = palette.colour(rng, rng.uniform(0.1, 0.5))
        near = (ridge + 1) / (ridges + 1)
        colour = near * colour + (1 - near) * haze
        height = rng.uniform(2, 30) * (1 - 0.6 * near)
        crest = horizon - rng.uniform(0, 12) * (1 - near) - height * (0.5 + 0.5 * noise(rng, 1, SIZE))
        mask = np.clip(y - crest + 0.5, 0, 1)
        textured = colour[:, None, None] * (1 + canvas.texture * noise(rng, SIZE, SIZE))
        canvas.pixels = canvas.pixels + mask * (textured - canvas.pixels)
    ground(canvas, horizon)
    for _ in range(rng.integers(0, 5)):  # trees, houses, people: upright, on the ground, larger when near
        base = horizon + rng.random() ** 2 * (SIZE - horizon)
        size = rng.uniform(0.15, 0.6) * (base - horizon + 12)
        foot = rng.uniform(0, SIZE)
        colour = palette.colour(rng, rng.uniform(0.05, 0.6))
        width = size * rng.uniform(0.2, 0.9)
        shape = rectangle(width, size) if rng.random() < 0.5 else blob(rng, size, 0.5)
        canvas.paint(foot, base - size * 0.8, 2 * size, shape, colour, texture=canvas.texture * 2)
    scatter(canvas, rng.integers(0, 40), 1.5, rng.uniform(4, 25), horizon / SIZE - 0.05, 1.1)


def ground(canvas: Canvas, horizon: Number) -> None:
    """A plane that recedes to the horizon, with a texture or tiles on it."""
    rng = canvas.rng
    top = max(0, math.ceil(horizon))
    if top >= SIZE:
        return
    x, y = canvas.offsets((slice(top, SIZE), slice(0, SIZE)), rng.uniform(0, SIZE), horizon - 1)
    depth = rng.uniform(15, 60) / y
    across, along = x * depth / 4, depth * rng.uniform(4, 30)
    if rng.random() < 0.25:
        pattern = np.sign(np.sin(across * 0.3) * np.sin(along * 0.3)) * np.clip(1.5 / depth, 0, 1)
        amount = rng.uniform(0.03, 0.25)
    else:
        chosen = noise_fields()[rng.integers(64)]
        pattern = chosen[along.astype(int) % FIELD, across.astype(int) % FIELD]
        amount = canvas.texture
    near, far = canvas.palette.colour(rng), canvas.palette.colour(rng)
    share = np.clip(y / (SIZE - horizon + 1), 0, 1)
    colour = far[:, None, None] * (1 - share) + near[:, None, None] * share
    canvas.pixels[:, top:] = colour * (1 + 1.6 * amount * pattern)


def solids(canvas: Canvas) -> None:
    """Balls, boxes and cylinders on a floor in front of a wall."""
    rng, palette = canvas.rng, canvas.palette
    backdrop(canvas)
    if rng.random() < 0.4:
        scatter(canvas, rng.integers(3, 15), 6, 40, -0.1, 0.6)
        canvas.blur(rng.uniform(1, 4))
    horizon = rng.uniform(0.1, 0.7) * SIZE
    ground(canvas, horizon)
    feet = np.sort(horizon + (SIZE * 1.05 - horizon) * rng.random(rng.integers(2, 10)))
    for foot in feet:
        size = rng.uniform(0.1, 0.45) * (foot - horizon + 25)
        x, colour, kind = rng.uniform(0, SIZE), palette.colour(rng), rng.random()
        dark = np.zeros(3, np.float32)
        canvas.paint(  # contact shadow
            x - canvas.light[0] * size * 0.5, foot, 2 * size, ellipse(1.5 * size, 0.4 * size), dark + colour * 0.15,
            shading="flat", texture=0, softness=size * 0.8, cast=False,
        )  # fmt: skip
        if kind < 0.4:
            canvas.paint(x, foot - size, size, ellipse(size, size), colour, shading="round", cast=False)
            glint = (x + canvas.light[0] * size * 0.4, foot - size + canvas.light[1] * size * 0.4)
            if rng.random() < 0.5:
                bright = np.ones(3, np.float32)
                canvas.paint(*glint, size * 0.3, ellipse(size * 0.12, size * 0.12), bright, softness=size * 0.2, cast=False)
        elif kind < 0.75:
            cuboid(canvas, x, foot, size, colour)
        else:
            height = size * rng.uniform(0.8, 2.5)
            canvas.paint(x, foot - height, 2 * height, rectangle(size * 0.6, height), colour, shading="round", cast=False)
            canvas.paint(x, foot - 2 * height, size, ellipse(size * 0.6, size * 0.2), colour * 0.7, cast=False)


def cuboid(canvas: Canvas, x: Number, foot: Number, size: Number, colour: Colour) -> None:
    """A box seen from above and from one side: three faces, three brightnesses."""
    rng = canvas.rng
    width, height = size * rng.uniform(0.6, 1.2), size * rng.uniform(0.5, 2)
    dx, dy = size * rng.uniform(0.2, 0.8) * rng.choice((-1, 1)), -size * rng.uniform(0.1, 0.5)
    edge = width if dx > 0 else -width
    front = [(-width, -height), (width, -height), (width, height), (-width, height)]
    top = [(-width, -height), (width, -height), (width + dx, -height + dy), (-width + dx, -height + dy)]
    side = [(edge, -height), (edge, height), (edge + dx, height + dy), (edge + dx, -height + dy)]
    for face, brightness in ((front, rng.uniform(0.7, 1)), (top, rng.uniform(1, 1.4)), (side, rng.uniform(0.4, 0.9))):
        corners = np.array(face, np.float32)
        reach = float(np.abs(corners).sum(axis=1).max())
        canvas.paint(x, foot - height, reach, polygon(corners), np.clip(colour * brightness, 0, 1), shading="slope", cast=False)


def portrait(canvas: Canvas) -> None:
    """Head and shoulders of a person or an animal before something out of focus."""
    rng, palette = canvas.rng, canvas.palette
    backdrop(canvas)
    scatter(canvas, rng.integers(3, 25), 8, 50)
    canvas.blur(rng.uniform(1.5, 8))
    x, y = SIZE * rng.normal(0.5, 0.1), SIZE * rng.normal(0.42, 0.08)
    head = SIZE * rng.uniform(0.12, 0.34)
    skin = palette.colour(rng, rng.uniform(0.3, 0.8)) + np.float32(rng.uniform(0, 0.25)) * WARM * 0.6
    skin = np.clip(skin, 0, 1)
    cloth, hair = palette.colour(rng), palette.colour(rng, rng.uniform(0.05, 0.6))
    shoulders = head * rng.uniform(1.2, 2.4)
    canvas.paint(x + rng.normal(0, 6), y + head * 2.6, 3 * head, ellipse(shoulders, head * 1.7), cloth, shading="round")
    canvas.paint(x, y + head, 1.2 * head, rectangle(head * 0.4, head), skin * 0.8, shading="slope")
    canvas.paint(x, y - 0.15 * head, 2 * head, blob(rng, head * rng.uniform(0.9, 1.2), 0.2), hair, texture=0.15)
    if rng.random() < 0.3:
        for sign in (-1, 1):
            corners = np.array([(-0.35, 0.5), (0.35, 0.5), (0.1 * sign, -0.6)], np.float32) * head
            canvas.paint(x + sign * 0.6 * head, y - 0.8 * head, head, polygon(corners), hair, texture=0.1)
    canvas.paint(x, y, 1.3 * head, ellipse(head * rng.uniform(0.65, 0.95), head * 1.05), skin, shading="round")
    tilt, apart = rng.normal(0, 0.1), head * rng.uniform(0.28, 0.42)
    dark = palette.colour(rng, 0.08)
    for sign in (-1, 1):
        ex, ey = x + sign * apart, y - 0.1 * head + sign * tilt * apart
        canvas.paint(ex, ey, 0.3 * head, ellipse(0.18 * head, 0.11 * head), palette.colour(rng, 0.8), cast=False)
        canvas.paint(ex, ey, 0.2 * head, ellipse(0.1 * head, 0.1 * head), dark, cast=False)
        brow = capsule(sign * 0.3 * head, tilt * 0.3 * head, 0.04 * head)
        canvas.paint(ex - sign * 0.12 * head, ey - 0.2 * head, 0.5 * head, brow, hair * 0.6, cast=False)
    canvas.paint(x, y + 0.22 * head, 0.3 * head, ellipse(0.12 * head, 0.1 * head), skin * 0.7, softness=0.1 * head, cast=False)
    mouth = capsule(0.5 * head, tilt * head, 0.06 * head)
    canvas.paint(x - 0.25 * head, y + 0.52 * head, 0.8 * head, mouth, np.clip(skin * 0.6, 0, 1), cast=False)
    scatter(canvas, rng.integers(0, 20), 1.5, 8, 0.6, 1.1)


def still_life(canvas: Canvas) -> None:
    """Many things of one kind on an even ground: coins, stones, fruit, cells, windows."""
    rng, palette = canvas.rng, canvas.palette
    backdrop(canvas) if rng.random() < 0.5 else ground(canvas, -SIZE)
    radius = SIZE * 0.03 * rng.lognormal(0.5, 0.6)
    colour, spread, wide = palette.colour(rng), rng.uniform(0, 0.35), rng.uniform(0.7, 1)
    kind = rng.integers(4)
    step = radius * rng.uniform(1.4, 3)
    disorder = rng.choice((0.05, 0.4))
    shading = str(rng.choice(("flat", "slope", "round")))
    positions = [(x, y) for y in np.arange(0, SIZE + step, step) for x in np.arange(0, SIZE + step, step)]
    for x, y in rng.permutation(np.array(positions))[:160]:
        size = radius * rng.lognormal(0, 0.15)
        shape: Outline = (
            ellipse(size, size * wide) if kind == 0
            else rectangle(size, size * wide) if kind == 1
            else blob(rng, size, 0.5) if kind == 2
            else leaf(rng, size)[0]
        )  # fmt: skip
        own = np.clip(colour + spread * (palette.colour(rng) - colour) + rng.normal(0, 0.05), 0, 1).astype(np.float32)
        x, y = rng.normal((x, y), disorder * step)
        canvas.paint(x, y, 2 * size, shape, own, shading=shading)


def page(canvas: Canvas) -> None:
    """Writing or line drawing on paper or a wall, under uneven light."""
    rng, palette = canvas.rng, canvas.palette
    paper = palette.colour(rng, rng.choice((0.9, 0.75, 0.5, 0.15)))
    ink = palette.colour(rng, 0.1 if paper.mean() > 0.4 else 0.9)
    canvas.pixels[:] = paper[:, None, None]
    sheet = Image.new("L", (SIZE, SIZE))
    draw = ImageDraw.Draw(sheet)
    size = int(rng.integers(6, 22))
    if rng.random() < 0.75:
        font = writing_font(size)
        for line in np.arange(rng.uniform(-size, size), SIZE, size * rng.uniform(1.1, 1.6)):
            letters = "".join(rng.choice(LETTERS, rng.integers(10, 40)))
            draw.text((int(rng.integers(-10, 30)), int(line)), letters, fill=255, font=font)
    for _ in range(rng.integers(0, 25)):
        points = rng.uniform(0, SIZE, 2) + np.cumsum(rng.normal(0, 15, (rng.integers(2, 6), 2)), axis=0)
        draw.line([tuple(point) for point in points.tolist()], fill=255, width=int(rng.integers(1, 4)))
    mask = np.asarray(sheet.rotate(rng.normal(0, 4), Image.Resampling.BILINEAR), np.float32) / 255
    canvas.pixels += mask * (ink[:, None, None] - canvas.pixels)
    canvas.pixels *= 1 + 0.1 * rng.random() * noise(rng, SIZE, SIZE)
    if rng.random() < 0.3:
        scatter(canvas, rng.integers(1, 6), 8, 40)


LETTERS = [*"etaoinshrdlucmfwypvbgkETAOINS0123.,-", *(" " * 8)]


@functools.lru_cache
def writing_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own typeface."""
    return ImageFont.load_default(size)


def texture(canvas: Canvas) -> None:
    """One material over the whole picture: grass, gravel, cloth, cloud, brick, marble."""
    rng, palette = canvas.rng, canvas.palette
    first, second = palette.colour(rng), palette.colour(rng)
    kind = rng.random()
    if kind < 0.6:
        values = noise(rng, SIZE, SIZE)
        if rng.random() < 0.6:
            values = 0.6 * values + 0.6 * noise(rng, SIZE, SIZE)
    elif kind < 0.8:
        values = bricks(rng) + rng.uniform(0.1, 0.6) * noise(rng, SIZE, SIZE)
    else:
        x, y = canvas.offsets((slice(0, SIZE), slice(0, SIZE)), 0, 0)
        bend = rng.uniform(0, 6) * noise(rng, SIZE, SIZE)
        values = stripes(rng, x + bend, y + bend) + rng.uniform(0.1, 0.5) * noise(rng, SIZE, SIZE)
    share = np.clip(0.5 + rng.uniform(0.1, 0.4) * values, 0, 1)
    canvas.pixels = first[:, None, None] * (1 - share) + second[:, None, None] * share
    canvas.pixels = canvas.pixels * (1 + rng.uniform(0, 0.15) * noise(rng, SIZE, SIZE))
    if rng.random() < 0.3:
        scatter(canvas, rng.integers(1, 8), 6, 50)


def bricks(rng: Generator) -> Plane:
    """Rows of tiles of uneven brightness with joints between them."""
    high, wide = rng.uniform(6, 24), rng.uniform(10, 48)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    row = np.floor(y / high)
    column = np.floor(x / wide + 0.5 * (row % 2))
    joint = (y % high < high * 0.12) | ((x / wide + 0.5 * (row % 2)) % 1 < 1.5 / wide)
    tones = rng.normal(0.4, 0.5, (32, 32)).astype(np.float32)
    values = tones[row.astype(int) % 32, column.astype(int) % 32]
    return np.where(joint, np.float32(rng.choice((-1.5, 1.5))), values)


SCENES: dict[Scene, float] = {
    leaves: 0.27,
    landscape: 0.2,
    solids: 0.12,
    portrait: 0.15,
    still_life: 0.08,
    page: 0.06,
    texture: 0.12,
}


# --------------------------------------------------------------------------------------------------------------- camera


def photograph(canvas: Canvas) -> UInt8[np.ndarray, "3 128 128"]:
    """Photograph a scene: uneven light, exposure, contrast, focus, grain, now and then black and white."""
    rng = canvas.rng
    if rng.random() < 0.3:
        canvas.blur(abs(rng.normal(0, 1.2)))
    pixels = canvas.pixels
    x, y = canvas.offsets((slice(0, SIZE), slice(0, SIZE)), SIZE / 2, SIZE / 2)
    if rng.random() < 0.5:
        pixels = pixels * (1 + rng.normal(0, 0.3) * (x * canvas.light[0] + y * canvas.light[1]) / SIZE)
    if rng.random() < 0.3:
        pixels = pixels * (1 - rng.uniform(0, 1) * (x * x + y * y) / SIZE**2)
    pixels = np.clip(pixels, 0, 1) ** rng.lognormal(0, 0.25)
    grey = pixels.mean(axis=0)
    if rng.random() < 0.22:
        pixels = np.broadcast_to(grey, pixels.shape)
    if rng.random() < 0.5:
        pixels = (pixels - grey.mean()) * rng.lognormal(0.1, 0.3) + grey.mean()
    grain = abs(rng.normal(0, 0.012))
    pixels = pixels + grain * rng.standard_normal((3, SIZE, SIZE), dtype=np.float32)
    return to_bytes(pixels)


def _begin(index: int, seed: int) -> tuple[Canvas, Scene]:
    """An empty canvas, and what will be on it."""
    rng = np.random.default_rng((seed, index))
    canvas = Canvas(rng, Palette.draw(rng))
    scenes = list(SCENES)
    return canvas, scenes[rng.choice(len(scenes), p=list(SCENES.values()))]


def picture(index: int, seed: int = 0) -> UInt8[np.ndarray, "3 128 128"]:
    """Picture number ``index``, 128 by 128 pixels of 8-bit RGB."""
    canvas, scene = _begin(index, seed)
    scene(canvas)
    return photograph(canvas)


def scene_number(index: int, seed: int = 0) -> int:
    """Index into `SCENES` of picture number ``index``, without painting it."""
    return list(SCENES).index(_begin(index, seed)[1])


def pictures(count: int, seed: int, processes: int) -> Iterator[UInt8[np.ndarray, "3 128 128"]]:
    """The first ``count`` pictures of a seed, made by several processes."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(functools.partial(picture, seed=seed), range(count), chunksize=64)


def make_pictures(path: Path, count: int, seed: int, processes: int = 2) -> Pictures:
    """The first pictures of a seed, mapped from a file that is written on the first call."""
    if not path.exists():
        with replacing(path) as temporary:
            array = np.lib.format.open_memmap(temporary, "w+", np.uint8, (count, 3, SIZE, SIZE))
            drawn = pictures(count, seed, processes)
            for index, made in enumerate(tqdm(drawn, total=count, desc="pictures", mininterval=10)):
                array[index] = made
            array.flush()
    mapped: Pictures = np.load(path, mmap_mode="r")
    return mapped


def as_images(pixels: UInt8[np.ndarray, "batch 3 height width"]) -> Images:
    """8-bit pixels to the range of the models."""
    return torch.from_numpy(pixels).float() / 127.5 - 1


def random_rows(count: int, total: int, rng: torch.Generator) -> list[int]:
    """Random indices."""
    drawn: list[int] = torch.randint(total, (count,), generator=rng).tolist()
    return drawn

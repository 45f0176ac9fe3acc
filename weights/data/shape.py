"""Procedural solids as signed distances, and what a shape tokenizer is trained on: points, normals and distances.

Five ways of putting one to seven primitives together (heaps, turned stacks, mirrored frameworks, wheels, vessels) are meant to
cover what a small model should cope with. Distances are exact on and outside of single parts; unions and cuts keep the sign
exact and bound the distance. Everything is seeded: solid number ``index`` of a seed is always the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.random import Generator
from scipy.spatial.transform import Rotation
from torch import Tensor

Points = Float[Tensor, "batch points 3"]
Sizes = Float[Tensor, "batch 4"]
Distances = Float[Tensor, "batch points"]
Primitive = Callable[[Points, Sizes], Distances]

#: Most parts of a solid; a part that mirrors or turns about an axis counts once.
MOST_PARTS = 7
#: Length of the longest edge of a solid's box, as in `zoo.media.shape`.
EXTENT = 1.9

# Solids are put together within this distance of the origin along each axis, and searched on a grid of so many cells.
_REACH, _CELLS = 1.6, 28
# Points that are tried per point that is wanted, and how far from the surface they may start.
_TRIES, _BAND = 5, 0.03
_NEWTON_STEPS, _ON_SURFACE = 4, 2e-3


# -------------------------------------------------------------------------------------------------------------- primitives


def _column(sizes: Sizes, index: int) -> Float[Tensor, "batch 1"]:
    return sizes[:, index : index + 1]


def _length(*coordinates: Tensor) -> Tensor:
    # The gradient of a root is infinite at zero.
    return torch.stack([part * part for part in coordinates]).sum(0).add(1e-12).sqrt()


def _extruded(outline: Distances, height: Distances) -> Distances:
    """A plane outline's distance and that of a slab, as the distance to what both have in common."""
    outside = _length(outline.clamp(min=0), height.clamp(min=0))
    return outside + torch.maximum(outline, height).clamp(max=0)


def box(points: Points, sizes: Sizes) -> Distances:
    """Half edges and the radius of rounded edges."""
    radius = _column(sizes, 3)
    beyond = points.abs() - (sizes[:, None, :3] - radius[..., None])
    return _length(*beyond.clamp(min=0).unbind(-1)) + beyond.amax(-1).clamp(max=0) - radius


def ellipsoid(points: Points, sizes: Sizes) -> Distances:
    """Half axes; the distance is exact to first order at the surface."""
    axes = sizes[:, None, :3]
    level, slope = _length(*(points / axes).unbind(-1)), _length(*(points / axes**2).unbind(-1))
    return level * (level - 1) / slope


def cylinder(points: Points, sizes: Sizes) -> Distances:
    """Radius, half height, and the radius of rounded edges."""
    x, y, z = points.unbind(-1)
    rounding = _column(sizes, 2)
    outline = _length(x, y) - _column(sizes, 0) + rounding
    return _extruded(outline, z.abs() - _column(sizes, 1) + rounding) - rounding


def torus(points: Points, sizes: Sizes) -> Distances:
    """Radius of the ring and of its tube."""
    x, y, z = points.unbind(-1)
    return _length(_length(x, y) - _column(sizes, 0), z) - _column(sizes, 1)


def capsule(points: Points, sizes: Sizes) -> Distances:
    """Radius, and half the length between the balls."""
    x, y, z = points.unbind(-1)
    half = _column(sizes, 1)
    return _length(x, y, z - torch.minimum(torch.maximum(z, -half), half)) - _column(sizes, 0)


def cone(points: Points, sizes: Sizes) -> Distances:
    """Radius below, radius above, half height: a cone, or what is left of one that was cut."""
    x, y, z = points.unbind(-1)
    below, above, half = (_column(sizes, index) for index in range(3))
    slant = _length(below - above, 2 * half)
    side = ((_length(x, y) - (below + above) / 2) * 2 * half + z * (below - above)) / slant
    return torch.maximum(side, z.abs() - half)


def prism(points: Points, sizes: Sizes) -> Distances:
    """Inner radius, half height, and the number of sides."""
    x, y, z = points.unbind(-1)
    sides = _column(sizes, 2)
    sector = 2 * torch.pi / sides
    angle = torch.atan2(y, x + 1e-9)
    angle = angle - sector * (angle / sector).round()
    return _extruded(_length(x, y) * angle.cos() - _column(sizes, 0), z.abs() - _column(sizes, 1))


def tube(points: Points, sizes: Sizes) -> Distances:
    """Radius of the middle of the wall, half its thickness, half height."""
    x, y, z = points.unbind(-1)
    return _extruded((_length(x, y) - _column(sizes, 0)).abs() - _column(sizes, 1), z.abs() - _column(sizes, 2))


PRIMITIVES: tuple[Primitive, ...] = (box, ellipsoid, cylinder, torus, capsule, cone, prism, tube)


# ------------------------------------------------------------------------------------------------------------------ solids


@dataclass(frozen=True)
class Part:
    """A primitive in its place.

    Attributes:
        primitive: which one.
        size: what its docstring lists.
        position: of its middle.
        rotation: matrix from its own frame.
        cut: whether it is taken off what comes before instead of added.
        blend: width of the fillet between it and what comes before.
    """

    primitive: Primitive
    size: tuple[float, ...]
    position: np.ndarray
    rotation: np.ndarray
    cut: bool = False
    blend: float = 0.0


@dataclass(frozen=True)
class Solid:
    """Parts in their order, and the symmetry of the space that they are in.

    Attributes:
        parts: the first one is never a cut.
        mirrors: for each axis, whether space is folded so that negative coordinates see what positive ones do.
        turns: number of repetitions of space about the z axis; 1 leaves it alone.
        ripple: height and angular frequency of waves on the surface.
        rotation: of the whole solid, after everything else.
    """

    parts: tuple[Part, ...]
    mirrors: tuple[bool, bool, bool] = (False, False, False)
    turns: int = 1
    ripple: tuple[float, float] = (0.0, 1.0)
    rotation: np.ndarray | None = None


class Solids:
    """The signed distance of several solids at once, negative inside."""

    def __init__(self, solids: list[Solid]) -> None:
        def table(values: Any) -> Tensor:
            return torch.as_tensor(np.asarray(values), dtype=torch.float32)

        slots = [[solid.parts[i] if i < len(solid.parts) else None for solid in solids] for i in range(MOST_PARTS)]
        self._rotation = table([np.eye(3) if solid.rotation is None else solid.rotation for solid in solids])
        self._mirrors = torch.tensor([solid.mirrors for solid in solids])[:, None]
        self._sector = 2 * torch.pi / table([solid.turns for solid in solids])[:, None]
        self._ripple = table([solid.ripple for solid in solids])[:, None]
        self._slots: list[list[tuple[Primitive, Tensor, Sizes, Tensor, Tensor, Tensor, Tensor]]] = []
        for slot in slots:
            groups = []
            for primitive in PRIMITIVES:
                chosen = [i for i, part in enumerate(slot) if part is not None and part.primitive is primitive]
                parts = [part for i in chosen if (part := slot[i]) is not None]
                if not parts:
                    continue
                sizes = table([np.pad(part.size, (0, 4 - len(part.size))) for part in parts])
                groups.append(
                    (
                        primitive,
                        torch.tensor(chosen),
                        sizes,
                        table([part.position for part in parts])[:, None],
                        table([part.rotation for part in parts]),
                        torch.tensor([[part.cut] for part in parts]),
                        table([[part.blend] for part in parts]),
                    )
                )
            self._slots.append(groups)

    def distance(self, points: Points) -> Distances:
        """Of points ``[solids, points, 3]``."""
        local = self._folded(points @ self._rotation)
        found = torch.full(points.shape[:2], 10.0)
        for groups in self._slots:
            for primitive, chosen, sizes, position, rotation, cut, blend in groups:
                own = primitive((local[chosen] - position) @ rotation, sizes)
                before = found[chosen]
                sign = torch.where(cut, -1.0, 1.0)
                joined = sign * smooth_minimum(sign * before, own, blend)
                found = found.index_copy(0, chosen, joined)
        height, frequency = self._ripple.unbind(-1)
        return found + height * (points * frequency[..., None]).sin().prod(-1)

    def _folded(self, points: Points) -> Points:
        x, y, z = torch.where(self._mirrors, points.abs(), points).unbind(-1)
        angle = torch.atan2(y, x + 1e-9)
        angle, radius = angle - self._sector * (angle / self._sector).round(), _length(x, y)
        turned = self._sector < 6
        x, y = (torch.where(turned, new, old) for new, old in ((radius * angle.cos(), x), (radius * angle.sin(), y)))
        return torch.stack([x, y, z], dim=-1)

    def gradient(self, points: Points) -> tuple[Distances, Points]:
        """The distance, and the direction in which it grows."""
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            found = self.distance(points)
            (slope,) = torch.autograd.grad(found.sum(), points)
        return found.detach(), slope


def smooth_minimum(first: Tensor, second: Tensor, width: Tensor) -> Tensor:
    """The lower one of two distances, rounded off where they differ by less than ``width``."""
    overlap = (width - (first - second).abs()).clamp(min=0)
    return torch.minimum(first, second) - overlap.square() / (4 * width).clamp(min=1e-6)


# ---------------------------------------------------------------------------------------------------- ways to make a solid

_UPRIGHT = np.eye(3)
# A part along x or y instead of z.
_ALONG = (np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]]), np.array([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]]), _UPRIGHT)


def _any_rotation(rng: Generator) -> np.ndarray:
    return Rotation.random(random_state=rng).as_matrix()


def _between(rng: Generator, low: float, high: float) -> float:
    """A number that is as likely to be doubled as halved."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def any_primitive(rng: Generator, scale: float = 1.0) -> tuple[Primitive, tuple[float, ...]]:
    """A primitive of random proportions, from thin to plump."""

    def length(low: float = 0.1, high: float = 0.5) -> float:
        return scale * _between(rng, low, high)

    primitive = PRIMITIVES[rng.choice(len(PRIMITIVES), p=(0.25, 0.15, 0.13, 0.11, 0.1, 0.1, 0.08, 0.08))]
    if primitive is box:
        edges = sorted((length(0.06), length(), length(0.15, 0.6)))
        rng.shuffle(edges)
        return box, (*edges, min(edges) * rng.choice((0.0, 0.0, rng.uniform(0, 0.9))))
    if primitive is ellipsoid:
        first = length(0.15)
        return ellipsoid, (first,) * 3 if rng.random() < 0.35 else (first, length(0.12), length(0.12))
    if primitive is cylinder:
        radius, half = length(0.08), length(0.06, 0.6)
        return cylinder, (radius, half, min(radius, half) * rng.choice((0.0, 0.0, rng.uniform(0, 0.8))))
    if primitive is torus:
        ring = length(0.2)
        return torus, (ring, ring * _between(rng, 0.17, 0.75))
    if primitive is capsule:
        return capsule, (length(0.07, 0.3), length(0.1, 0.6))
    if primitive is cone:
        below = length(0.15)
        return cone, (below, below * rng.choice((0.02, rng.uniform(0.05, 0.9))), length(0.12, 0.6))
    if primitive is prism:
        return prism, (length(0.12), length(0.06, 0.6), float(rng.integers(3, 9)))
    radius = length(0.2)
    return tube, (radius, radius * rng.uniform(0.12, 0.4), length(0.08, 0.5))


def heap(rng: Generator) -> Solid:
    """Parts that lie about each other anyhow; some are cut out."""
    parts: list[Part] = []
    tilted = rng.random() < 0.5
    for index in range(rng.choice(5, p=(0.22, 0.25, 0.23, 0.17, 0.13)) + 1):
        primitive, size = any_primitive(rng)
        rotation = _any_rotation(rng) if tilted else _ALONG[rng.integers(3)]
        cut = index > 0 and rng.random() < 0.2
        position = rng.uniform(-0.45, 0.45, 3) if index else np.zeros(3)
        blend = rng.choice((0.0, rng.uniform(0.02, 0.25)))
        parts.append(Part(primitive, size, position, rotation, cut, 0.0 if cut else blend))
    return Solid(tuple(parts))


def turned(rng: Generator) -> Solid:
    """Round parts on one axis, each upon the last: bottles, bolts, pawns."""
    parts: list[Part] = []
    height, radius = -0.7, rng.uniform(0.15, 0.5)
    for _ in range(rng.integers(2, 6)):
        half, radius = _between(rng, 0.04, 0.4), float(np.clip(radius * _between(rng, 0.4, 2.2), 0.08, 0.6))
        kind = rng.integers(5)
        middle = np.array([0, 0, height + half])
        if kind == 0:
            part: tuple[Primitive, tuple[float, ...]] = (cylinder, (radius, half, min(radius, half) * rng.choice((0.0, 0.5))))
        elif kind == 1:
            other = float(np.clip(radius * _between(rng, 0.4, 2.2), 0.05, 0.6))
            part, radius = (cone, (radius, other, half)), other
        elif kind == 2:
            part = (ellipsoid, (radius, radius, half))
        elif kind == 3:
            part = (torus, (radius, min(half, 0.6 * radius)))
        else:
            part = (prism, (radius, half, float(rng.integers(3, 9))))
        parts.append(Part(*part, middle, _UPRIGHT, blend=rng.choice((0.0, 0.1))))
        height += 2 * half * rng.uniform(0.7, 1.0)
    if rng.random() < 0.25:
        parts.append(Part(cylinder, (0.6 * radius, _between(rng, 0.1, 1.2), 0), np.array([0, 0, height]), _UPRIGHT, cut=True))
    return Solid(tuple(parts))


def framework(rng: Generator) -> Solid:
    """Beams, plates and rods along the axes, alike on the left and the right, and perhaps in front and behind."""
    mirrors = (True, bool(rng.random() < 0.6), bool(rng.random() < 0.15))
    parts: list[Part] = []
    for index in range(rng.integers(2, 6)):
        long, thin = _between(rng, 0.25, 0.7), _between(rng, 0.04, 0.12)
        kind = rng.integers(4)
        axis = rng.integers(3)
        if kind == 0:
            edges = [thin, thin * rng.uniform(1, 2), long]
        elif kind == 1:
            edges = [thin, long, _between(rng, 0.25, 0.7)]
        else:
            edges = [_between(rng, 0.08, 0.45) for _ in range(3)]
        if kind == 3:
            part: tuple[Primitive, tuple[float, ...]] = (cylinder, (thin, long, 0.0))
        else:
            part = (box, (*(edges[(i - axis) % 3] for i in range(3)), 0.0))
        position = rng.uniform(0, 0.6, 3) * (1, 1, rng.choice((-1, 1)))
        if rng.random() < 0.4:
            position[0] = 0
        if index == 0:
            position = position * (0, 0, 1)
        parts.append(Part(*part, position, _ALONG[axis] if kind == 3 else _UPRIGHT, cut=index > 1 and rng.random() < 0.12))
    return Solid(tuple(parts), mirrors=mirrors)


def wheel(rng: Generator) -> Solid:
    """Parts that repeat about an axis, with a hub or a rim: wheels, flowers, propellers."""
    parts = []
    if rng.random() < 0.75:
        parts.append(Part(cylinder, (_between(rng, 0.1, 0.4), _between(rng, 0.05, 0.3), 0.0), np.zeros(3), _UPRIGHT))
    if rng.random() < 0.4 or not parts:
        ring = _between(rng, 0.35, 0.75)
        rim: tuple[Primitive, tuple[float, ...]] = (
            (torus, (ring, _between(rng, 0.05, 0.14))) if rng.random() < 0.5 else (tube, (ring, 0.07, rng.uniform(0.05, 0.3)))
        )
        parts.append(Part(*rim, np.zeros(3), _UPRIGHT))
    for _ in range(rng.integers(1, 3)):
        primitive, size = any_primitive(rng, scale=rng.uniform(0.4, 0.8))
        rotation = _any_rotation(rng) if rng.random() < 0.3 else _ALONG[rng.integers(3)]
        parts.append(
            Part(
                primitive,
                size,
                np.array([rng.uniform(0.1, 0.7), 0, rng.uniform(-0.2, 0.2)]),
                rotation,
                cut=rng.random() < 0.2,
                blend=rng.choice((0.0, 0.08)),
            )
        )
    return Solid(tuple(parts), turns=int(rng.integers(2, 9)))


def vessel(rng: Generator) -> Solid:
    """Something hollow, mostly open at one end: a part without a smaller one like it, perhaps with a handle or a foot."""
    wall = rng.uniform(0.07, 0.16)
    width, depth, half = (_between(rng, 0.25, 0.6) for _ in range(3))
    kind = rng.integers(3)
    if kind == 0:
        outer: tuple[Primitive, tuple[float, ...]] = (box, (width, depth, half, 0.0))
        inner: tuple[Primitive, tuple[float, ...]] = (box, (width - wall, depth - wall, half, 0.0))
    elif kind == 1:
        outer, inner = (cylinder, (width, half, 0.0)), (cylinder, (width - wall, half, 0.0))
    else:
        outer, inner = (ellipsoid, (width, width, half)), (ellipsoid, (width - wall, width - wall, half - wall))
    lift = 0.0 if kind == 2 else 2 * wall * rng.choice((0.5, 1.0))
    parts = [Part(*outer, np.zeros(3), _UPRIGHT), Part(*inner, np.array([0, 0, lift]), _UPRIGHT, cut=True)]
    if kind == 2:
        above = np.array([0, 0, half + rng.uniform(-0.3, 0.2) * half + 0.5])
        parts.append(Part(box, (1.0, 1.0, 0.5, 0.0), above, _UPRIGHT, cut=True))
    if rng.random() < 0.4:
        primitive, size = any_primitive(rng, scale=0.6)
        outside = np.array([width + 0.3 * rng.random(), 0, rng.uniform(-0.5, 0.5) * half])
        parts.append(Part(primitive, size, outside, _ALONG[rng.integers(3)]))
    if rng.random() < 0.3:
        parts.append(Part(cylinder, (_between(rng, 0.08, 0.4), 0.15, 0.0), np.array([0, 0, -half - 0.1]), _UPRIGHT))
    return Solid(tuple(parts))


WAYS: dict[Callable[[Generator], Solid], float] = {heap: 0.45, turned: 0.15, framework: 0.16, wheel: 0.12, vessel: 0.12}


def solid(index: int, seed: int = 0) -> Solid:
    """Solid number ``index``: half of them upright, the others along another axis or turned at random."""
    rng = np.random.default_rng((seed, index))
    made = list(WAYS)[rng.choice(len(WAYS), p=list(WAYS.values()))](rng)
    rotation = _any_rotation(rng) if rng.random() < 0.3 else _ALONG[rng.integers(3)]
    ripple = (rng.uniform(0.01, 0.05), rng.uniform(5, 14)) if rng.random() < 0.08 else (0.0, 1.0)
    return Solid(made.parts, made.mirrors, made.turns, ripple, rotation)


# ------------------------------------------------------------------------------------------------------------------ samples


@dataclass(frozen=True)
class Samples:
    """Solids in a model's frame, the centre of the box at 0 and its longest edge 1.9 long.

    Attributes:
        points, normals: on the surfaces, about uniform by area.
        volume, near: points anywhere in [-1, 1], and about the surfaces at a spread of 0.02 or 0.08.
        volume_distance, near_distance: signed distances of these, negative inside.
    """

    points: Points
    normals: Points
    volume: Float[Tensor, "batch volume 3"]
    volume_distance: Float[Tensor, "batch volume"]
    near: Float[Tensor, "batch near 3"]
    near_distance: Float[Tensor, "batch near"]


def sample(solids: list[Solid], points: int, volume: int, near: int, generator: torch.Generator) -> tuple[Samples, list[int]]:
    """Samples of the solids that have a surface to speak of, and their indices."""
    made = Solids(solids)
    tried, found = _near_surface(made, points, generator)
    kept = [index for index, count in enumerate(found.sum(1).tolist()) if count > points // 4]
    made, tried, found = Solids([solids[i] for i in kept]), tried[kept], found[kept]
    chosen = torch.multinomial(found.float(), points + points // 4, replacement=True, generator=generator)
    surface = tried.gather(1, chosen[..., None].expand(-1, -1, 3))
    for _ in range(_NEWTON_STEPS):
        value, slope = made.gradient(surface)
        surface = surface - (value / slope.square().sum(-1).clamp(min=0.25))[..., None] * slope
    value, slope = made.gradient(surface)
    good = (value.abs() < _ON_SURFACE).float() + 1e-9
    chosen = torch.multinomial(good, points, replacement=True, generator=generator)[..., None].expand(-1, -1, 3)
    surface, normals = surface.gather(1, chosen), torch.nn.functional.normalize(slope.gather(1, chosen), dim=-1)

    lower, upper = surface.amin(1, keepdim=True), surface.amax(1, keepdim=True)
    centre, scale = (lower + upper) / 2, (upper - lower).amax(-1, keepdim=True) / EXTENT

    def distance(placed: Points) -> Distances:
        return made.distance(placed * scale + centre) / scale[..., 0]

    placed = (surface - centre) / scale
    anywhere = torch.rand(len(kept), volume, 3, generator=generator) * 2 - 1
    spread = torch.where(torch.arange(near) % 2 == 0, 0.02, 0.08)[:, None]
    middle = placed[:, torch.randint(points, (near,), generator=generator)]
    about = (middle + spread * torch.randn(len(kept), near, 3, generator=generator)).clamp(-1, 1)
    return Samples(placed, normals, anywhere, distance(anywhere), about, distance(about)), kept


def _near_surface(
    solids: Solids, points: int, generator: torch.Generator
) -> tuple[Float[Tensor, "batch tries 3"], Bool[Tensor, "batch tries"]]:
    """Random points, and which are within a band about the surface that is as thick everywhere: cells first, then points."""
    edge = 2 * _REACH / _CELLS
    axis = -_REACH + edge * (torch.arange(_CELLS) + 0.5)
    cells = torch.cartesian_prod(axis, axis, axis)
    count = len(solids._mirrors)
    passed = solids.distance(cells.expand(count, -1, -1)).abs() < edge
    # Every row needs something to draw from.
    drawn: Int[Tensor, "batch tries"] = torch.multinomial(
        passed.float() + 1e-9, _TRIES * points, replacement=True, generator=generator
    )
    tried = cells[drawn] + edge * (torch.rand(count, _TRIES * points, 3, generator=generator) - 0.5)
    return tried, solids.distance(tried).abs() < _BAND


def samples(
    count: int, seed: int, *, points: int, volume: int, near: int, batch: int = 32, first: int = 0
) -> Iterator[Samples]:
    """Samples of the solids from number ``first`` on, in batches, until there are ``count``."""
    made, index = 0, first
    while made < count:
        generator = torch.Generator().manual_seed((seed << 32) + index)
        found, kept = sample([solid(i, seed) for i in range(index, index + batch)], points, volume, near, generator)
        index += batch
        made += len(kept)
        yield found

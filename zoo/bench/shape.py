"""Shape tokenizers: encoding, feature planes, and meshes coarse to fine, against the dense grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo import registry
from zoo.bench.measure import Job, Work, random_model

UNIT = "shape"
# ``lengths`` in cells of the grid along each side; by default those that the model is meant for.
CASES: dict[str, Any] = {"batches": (1,), "lengths": ()}

_RADIUS = 0.7


def jobs(entry: registry.Entry, device: str, peers: bool, batches: Sequence[int], lengths: Sequence[int]) -> Iterator[Job]:
    """Everything to measure: ours in float32, planes in bfloat16, then the mesh from every node of the grid.

    Decoding is planes, then a mesh for each shape.
    """
    tokenizer: Any = random_model(entry, device)
    for batch in batches:
        clouds = [ball(tokenizer.config.num_points, seed) for seed in range(batch)]
        tokens = tokenizer.encode(clouds)
        case = f"{batch} x {tokenizer.config.num_points} points"
        yield Job(entry.name, "encode", case, batch, partial(tokenizer.encode, clouds), tokenizer)
        case = f"{batch} x {tokens.ids.shape[1]} tokens"
        planes: Work = partial(tokenizer.field, tokens)
        yield Job(entry.name, "planes", case, batch, planes, tokenizer)
        tokenizer.set_precision("bf16")
        yield Job(f"{entry.name}, bf16", "planes", case, batch, planes, tokenizer, torch.bfloat16)
        tokenizer.set_precision("fp32")
    (field,) = tokenizer.field(tokens[0])
    mesh = partial(ball_mesh, import_module(f"zoo.codecs.{entry.family}.surface").extract, field)
    for resolution in lengths or (tokenizer.config.resolution,):
        case = f"ball, {resolution}³ cells"
        yield Job(entry.name, "mesh", case, 1, partial(mesh, resolution), tokenizer)
        if peers:
            yield Job(f"{entry.name}, dense", "mesh", case, 1, partial(mesh, resolution, dense=True), tokenizer)


def items(tokenizer: Any, count: int) -> list[tuple[Tensor, Tensor]]:
    """Input of a comparison of two releases: points on a ball with their normals."""
    return [ball(tokenizer.config.num_points, seed) for seed in range(count)]


def ball(points: int, seed: int) -> tuple[Float[Tensor, "points 3"], Float[Tensor, "points 3"]]:
    """Random points on a ball, and their normals."""
    generator = torch.Generator().manual_seed(seed)
    normals = torch.nn.functional.normalize(torch.randn(points, 3, generator=generator), dim=-1)
    return _RADIUS * normals, normals


def ball_mesh(extract: Callable[..., Any], field: Any, resolution: int, *, dense: bool = False) -> Any:
    """The mesh of a ball, extracted with a field computed at every node asked for.

    Fields of random weights have a surface everywhere, and would give the coarse grid no chance.
    """
    logits: Callable[[Tensor], Tensor] = field.on_grid(resolution)

    def ball_at(nodes: Int[Tensor, "nodes 3"]) -> Float[Tensor, " nodes"]:
        logits(nodes)
        return _RADIUS - (-1 + 2 * nodes / resolution).norm(dim=-1)

    return extract(ball_at, resolution, dense=dense)

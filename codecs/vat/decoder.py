"""Latents to three feature planes, and points in space to occupancy."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from zoo.codecs.vat.config import VATConfig
from zoo.codecs.vat.transformer import Block, learned
from zoo.nn.resnet import Decoder
from zoo.precision import Float32Module, compute_dtype, exact_float32

Planes = Float[Tensor, "batch 3 channels side side"]
Maps = tuple[Float[Tensor, "first second hidden"], ...]

# Coordinates of a point along the width and the height of each plane.
PLANE_AXES = ((0, 1), (0, 2), (2, 1))


def upsampler(config: VATConfig) -> nn.Module:
    """The convolutional decoder of latent diffusion, from tokens of a plane to its features."""
    return Decoder(
        config.width,
        config.triplane_channels,
        config.upsampler_channels,
        config.upsampler_layers,
        config.norm_groups,
        attention=config.mid_attention,
    )


class TriplaneDecoder(nn.Module):
    """Latents and learned plane tokens go through one transformer; the plane tokens are upsampled, each plane by itself."""

    def __init__(self, config: VATConfig) -> None:
        super().__init__()
        self.num_latents = config.num_latents
        self.plane_size = config.plane_size
        self.latent_proj = nn.Linear(config.latent_dim, config.width)
        self.latent_position = learned(config.num_latents, config.width)
        self.plane_queries = learned(config.num_plane_tokens, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.upsampler = upsampler(config)

    def plane_tokens(self, latents: Float[Tensor, "batch latents dim"]) -> Float[Tensor, "batch tokens width"]:
        """Tokens of the three planes, plane by plane and row by row, normalised."""
        x = self.latent_proj(latents.to(compute_dtype(self.latent_proj))) + self.latent_position
        x = torch.cat([x, self.plane_queries.expand(len(x), -1, -1)], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, self.num_latents :])

    def upsample(self, tokens: Float[Tensor, "batch tokens width"]) -> Planes:
        """Planes of plane tokens, as float32."""
        size = self.plane_size
        images = tokens.unflatten(1, (3, size, size)).permute(0, 1, 4, 2, 3).flatten(0, 1)
        # One plane at a time where memory is a CPU's: its convolutions gain nothing from a batch, and each is a large one.
        parts = images.split(1) if images.device.type == "cpu" and not torch.is_grad_enabled() else [images]
        planes = [self.upsampler(part.contiguous(memory_format=torch.channels_last)) for part in parts]
        return torch.cat(planes).float().contiguous().unflatten(0, (-1, 3))

    def forward(self, latents: Float[Tensor, "batch latents dim"]) -> Planes:
        """Planes as float32 ``[batch, 3, channels, side, side]``."""
        return self.upsample(self.plane_tokens(latents))


def sample_planes(planes: Planes, points: Float[Tensor, "batch points 3"]) -> Float[Tensor, "batch points 3 channels"]:
    """Features of points on each of the three planes, by bilinear interpolation; zero outside of [-1, 1].

    A plane is indexed by (x, y), (x, z) or (z, y), the first along its width and the second along its height, and its pixels
    are areas (``align_corners=False``), as in Direct3D (arXiv 2405.14832).
    """
    places = torch.stack([points[..., axes] for axes in PLANE_AXES], dim=1)
    sampled = F.grid_sample(planes.flatten(0, 1), places.flatten(0, 1)[:, None], align_corners=False)
    return sampled[:, :, 0].unflatten(0, (-1, 3)).permute(0, 3, 1, 2)


class Query(Float32Module):
    """Features of a point on the three planes to a logit, positive inside of the shape; stays in float32."""

    def __init__(self, channels: int, hidden: int, layers: int) -> None:
        super().__init__()
        widths = [3 * channels, *[hidden] * (layers - 1), 1]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))

    def forward(self, features: Float[Tensor, "*shape 3 channels"]) -> Float[Tensor, "*shape"]:
        """Logits of what `sample_planes` gives."""
        return self._after_first(self._first(features.flatten(-2)))

    @property
    def _first(self) -> nn.Linear:
        return cast(nn.Linear, self.layers[0])

    def _after_first(self, hidden: Float[Tensor, "*shape hidden"]) -> Float[Tensor, "*shape"]:
        for layer in self.layers[1:]:
            hidden = layer(F.relu(hidden))
        return hidden[..., 0]

    def fold(self, planes: Float[Tensor, "3 channels side side"]) -> Float[Tensor, "3 hidden side side"]:
        """Planes that have gone through the first layer already: it is linear, and so is sampling."""
        weight = self._first.weight.unflatten(1, (3, -1)).transpose(0, 1)
        return torch.einsum("phc,pcij->phij", weight, planes)

    def maps(self, planes: Float[Tensor, "3 channels side side"], resolution: int) -> Maps:
        """Folded planes at the nodes of a grid, where -1 + 2 i / resolution is node i, indexed as `PLANE_AXES` says."""
        nodes = -1 + 2 * torch.arange(resolution + 1, dtype=torch.float32, device=planes.device) / resolution
        first, second = torch.meshgrid(nodes, nodes, indexing="ij")
        places = torch.stack([first, second], dim=-1).expand(3, -1, -1, -1)
        sampled = F.grid_sample(self.fold(planes), places, align_corners=False)
        return tuple(sampled.permute(0, 2, 3, 1).contiguous())

    def at_nodes(self, maps: Maps, nodes: Int[Tensor, "nodes 3"]) -> Float[Tensor, " nodes"]:
        """Logits of nodes of the grid that the maps were made for: three lookups take the place of the widest layer."""
        hidden: Tensor = self._first.bias
        for part, (first, second) in zip(maps, PLANE_AXES, strict=True):
            hidden = hidden + part[nodes[:, first], nodes[:, second]]
        return self._after_first(hidden)


class Field:
    """The occupancy of one shape as a function of space.

    Calling it with points ``[points, 3]`` gives their logits, positive inside.

    Args:
        planes: features of the shape.
        query: what makes occupancy of them.
        centre, scale: the shape's frame: a point ``p`` of it is ``(p - centre) / scale`` in the planes' [-1, 1].
    """

    #: Points at a time, so that memory does not grow with their number; on a CPU few enough for its cache.
    CHUNK: ClassVar[dict[str, int]] = {"cpu": 1 << 13, "cuda": 1 << 18}

    def __init__(
        self,
        planes: Float[Tensor, "3 channels side side"],
        query: Query,
        centre: tuple[float, float, float] = (0.0, 0.0, 0.0),
        scale: float = 1.0,
    ) -> None:
        self.planes, self.query, self.centre, self.scale = planes, query, centre, scale

    @torch.no_grad()
    def __call__(self, points: Float[Tensor, "points 3"]) -> Float[Tensor, " points"]:
        # Far from the origin, float32 would lose the shape before the centre is taken off.
        placed = (points.double() - points.new_tensor(self.centre, dtype=torch.float64)) / self.scale
        placed = placed.to(self.planes.device, torch.float32)
        with exact_float32(placed.device):
            logits = [self.query(sample_planes(self.planes[None], part[None]))[0] for part in self._parts(placed)]
        return torch.cat([placed[:0, 0], *logits])

    @torch.no_grad()
    def on_grid(self, resolution: int) -> Callable[[Int[Tensor, "nodes 3"]], Float[Tensor, " nodes"]]:
        """The field at nodes of a grid over [-1, 1], given by their indices 0 to ``resolution``."""
        device = self.planes.device
        with exact_float32(device):
            maps = self.query.maps(self.planes, resolution)

        @torch.no_grad()
        def logits(nodes: Int[Tensor, "nodes 3"]) -> Float[Tensor, " nodes"]:
            with exact_float32(device):
                parts = [self.query.at_nodes(maps, part) for part in self._parts(nodes.to(device))]
            return torch.cat([self.planes.new_empty(0), *parts])

        return logits

    def _parts(self, points: Shaped[Tensor, "points 3"]) -> tuple[Tensor, ...]:
        return points.split(self.CHUNK.get(points.device.type, self.CHUNK["cuda"]))

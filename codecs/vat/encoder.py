"""Points with normals to a Gaussian over latents: a set function of the points."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.codecs.vat.config import VATConfig
from zoo.codecs.vat.transformer import Block, learned
from zoo.precision import Float32Module

Points = Float[Tensor, "batch points 3"]
Moments = Float[Tensor, "batch latents dim"]

LOG_VARIANCE_RANGE = (-30.0, 20.0)


def fourier(
    points: Float[Tensor, "*shape 3"], num_frequencies: int, *, include_pi: bool = True
) -> Float[Tensor, "*shape features"]:
    """Coordinates, then the sines and then the cosines of each coordinate times 2^i, coordinate by coordinate.

    Args:
        points: in [-1, 1].
        num_frequencies: number of i, counted from 0.
        include_pi: multiply by pi as well.
    """
    frequencies = 2.0 ** torch.arange(num_frequencies, dtype=points.dtype, device=points.device) * (
        math.pi if include_pi else 1.0
    )
    angles = (points[..., None] * frequencies).flatten(-2)
    return torch.cat([points, angles.sin(), angles.cos()], dim=-1)


def farthest_points(points: Points, count: int) -> Int[Tensor, "batch count"]:
    """Indices of points far from each other: each is the farthest from those before it, the first from the centroid."""
    distance = (points - points.mean(1, keepdim=True)).square().sum(-1)
    chosen = [distance.argmax(1)]
    distance = torch.full_like(distance, math.inf)
    for _ in range(count - 1):
        latest = points.gather(1, chosen[-1][:, None, None].expand(-1, 1, 3))
        distance = torch.minimum(distance, (points - latest).square().sum(-1))
        chosen.append(distance.argmax(1))
    return torch.stack(chosen, dim=1)


class Encoder(Float32Module):
    """Gathers points into features, lets latents attend to them in one sequence, and keeps the latents; stays in float32."""

    def __init__(self, config: VATConfig) -> None:
        super().__init__()
        self.config = config
        width, heads = config.width, config.heads
        self.point_proj = nn.Linear(config.point_dim, width)
        self.point_queries = learned(config.num_point_queries, width) if config.point_query == "learned" else None
        self.point_attention = Block(width, heads, cross=True)
        self.latent_queries = learned(config.num_latents, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(config.encoder_layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.moments = nn.Linear(width, 2 * config.latent_dim)

    def embed(self, points: Points, normals: Points) -> Float[Tensor, "batch points width"]:
        """Points in [-1, 1] and their unit normals, as vectors."""
        features = fourier(points, self.config.num_frequencies, include_pi=self.config.include_pi)
        return self.point_proj(torch.cat([features, normals], dim=-1))

    def gather(self, points: Points, embedded: Float[Tensor, "batch points width"]) -> Float[Tensor, "batch queries width"]:
        """Features of the shape; each one attended to all points."""
        if self.point_queries is not None:
            queries = self.point_queries.expand(len(points), -1, -1)
        else:
            indices = farthest_points(points, min(self.config.num_point_queries, points.shape[1]))
            queries = embedded.gather(1, indices[..., None].expand(-1, -1, embedded.shape[-1]))
        return self.point_attention(queries, embedded)

    def latent_tokens(self, features: Float[Tensor, "batch queries width"]) -> Float[Tensor, "batch latents width"]:
        """Normalised latents after the transformer."""
        count = self.config.num_latents
        x = torch.cat([self.latent_queries.expand(len(features), -1, -1), features], dim=1)
        for block in self.blocks[:-1]:
            x = block(x)
        # Nothing reads the last block's point features.
        for block in self.blocks[-1:]:
            x = block(x, kept=count)
        return self.norm(x[:, :count])

    def forward(self, points: Points, normals: Points) -> tuple[Moments, Moments]:
        """Mean and log-variance of the latents, the latter clamped to [-30, 20]."""
        features = self.gather(points, self.embed(points, normals))
        mean, log_variance = self.moments(self.latent_tokens(features)).chunk(2, dim=-1)
        return mean, log_variance.clamp(*LOG_VARIANCE_RANGE)


def kl_divergence(mean: Moments, log_variance: Moments) -> Float[Tensor, " batch"]:
    """Divergence of the latents' Gaussian from the standard one, in nats per number."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean((1, 2))


def draw(mean: Moments, log_variance: Moments, noise: Moments) -> Moments:
    """A sample of the latents' Gaussian, made of standard normal noise."""
    return mean + noise * (0.5 * log_variance).exp()

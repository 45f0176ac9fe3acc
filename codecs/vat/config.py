"""Sizes of a VAT."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

POINT_QUERIES = ("learned", "fps")
#: Tokens of the scales: squares of the sides that arXiv 2404.02905 gives its image scales, and two more.
SCHEDULE = (1, 4, 9, 16, 25, 36, 64, 100, 169, 256, 576, 1024)


@dataclass(frozen=True)
class VATConfig:
    """Sizes of one model; the defaults are those of ``vat-512b``.

    Attributes:
        width, heads: of all transformer blocks.
        num_points: points that are sampled from a surface.
        num_point_queries: features that the points are gathered into.
        point_query: what gathers them: ``learned`` vectors, or the points that farthest-point sampling picks (``fps``).
        num_frequencies: of the Fourier features of a coordinate, 2^i each.
        include_pi: whether they are multiplied by pi.
        num_latents: latents of a shape.
        encoder_layers, decoder_layers: transformer blocks.
        latent_dim: numbers in a latent.
        codebook_size: number of codes; the first code is zero.
        token_scales: tokens of each scale, coarse to fine.
        plane_size: side in tokens of each of the three planes.
        upsampler_channels: of the upsampler at each resolution, finest first; each step is a factor of 2.
        upsampler_layers: residual blocks per resolution, less one.
        norm_groups: of the upsampler's group norms.
        mid_attention: whether each plane attends to itself before it is upsampled.
        triplane_channels: channels of the planes that are sampled.
        query_hidden, query_layers: width and depth of the network that makes an occupancy of what is sampled.
        resolution: cells along each side of the grid that meshes are extracted from, unless `decode` is told otherwise.
    """

    width: int = 768
    heads: int = 12
    num_points: int = 16_384
    num_point_queries: int = 3072
    point_query: str = "learned"
    num_frequencies: int = 8
    include_pi: bool = True
    num_latents: int = 256
    encoder_layers: int = 12
    decoder_layers: int = 12
    latent_dim: int = 16
    codebook_size: int = 64
    token_scales: tuple[int, ...] = SCHEDULE[:10]
    plane_size: int = 32
    upsampler_channels: tuple[int, ...] = (128, 256, 512, 512)
    upsampler_layers: int = 2
    norm_groups: int = 32
    mid_attention: bool = True
    triplane_channels: int = 32
    query_hidden: int = 64
    query_layers: int = 5
    resolution: int = 256

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.point_query not in POINT_QUERIES:
            raise ValueError(f"point_query must be one of {', '.join(POINT_QUERIES)}, not {self.point_query!r}")
        if not self.token_scales or not all(1 <= count <= self.num_latents for count in self.token_scales):
            raise ValueError(
                f"a scale has 1 to {self.num_latents} tokens, as many as there are latents, not {self.token_scales}"
            )
        if self.codebook_size < 2:
            raise ValueError(f"the codebook needs a code besides the zero vector, not a size of {self.codebook_size}")
        if uneven := [channels for channels in self.upsampler_channels if channels % self.norm_groups]:
            raise ValueError(f"upsampler_channels {uneven[0]} is not a multiple of norm_groups {self.norm_groups}")
        if self.query_layers < 1 or self.resolution < 2:
            raise ValueError("query_layers must be at least 1 and resolution at least 2")

    @property
    def scale_ends(self) -> tuple[int, ...]:
        """End of each scale within the ids of a shape."""
        return tuple(accumulate(self.token_scales))

    @property
    def point_dim(self) -> int:
        """Numbers that describe a point: its coordinates, their Fourier features, and its normal."""
        return 3 + 6 * self.num_frequencies + 3

    @property
    def num_plane_tokens(self) -> int:
        """Tokens of the three planes."""
        return 3 * self.plane_size**2

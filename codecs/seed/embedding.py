"""The codebook, and the way from tokens to the image embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.codecs.seed.config import SeedConfig
from zoo.codecs.seed.qformer import QFormer, transformer_blocks
from zoo.kernels.codebook import CodebookSearch
from zoo.precision import Float32Module

States = Float[Tensor, "batch queries dim"]


class Codebook(Float32Module):
    """Vectors to ids by exact nearest neighbour, ids to vectors; stays in float32."""

    def __init__(self, config: SeedConfig) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.empty(config.codes, config.code_dim).uniform_(-1, 1) / max(1, config.codes))
        self._search = CodebookSearch()

    def nearest(self, z: Float[Tensor, "*shape dim"]) -> Int[Tensor, "*shape"]:
        """Ids of the nearest codes; the smallest id among equals."""
        return self._search(z, self.codes)

    def forward(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape dim"]:
        return F.embedding(ids, self.codes)


class Mixer(nn.Module):
    """Transformer blocks that see the whole sequence, with learned positions."""

    def __init__(self, config: SeedConfig) -> None:
        super().__init__()
        dim = config.qformer_dim
        self.positions = nn.Parameter(torch.zeros(1, config.queries, dim))
        self.blocks = transformer_blocks(
            dim, config.decoder_depth, config.decoder_heads, config.decoder_mlp_ratio, config.decoder_eps
        )

    def forward(self, states: States) -> States:
        mixed: Tensor = self.blocks(states + self.positions)
        return mixed


class MLPHead(nn.Module):
    """The image embedding from all tokens, each squeezed to a few numbers."""

    def __init__(self, config: SeedConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = config.qformer_dim
        for narrower in config.head_widths:
            layers += [nn.Linear(width, narrower, bias=False), nn.ReLU()]
            width = narrower
        self.squeeze = nn.Sequential(*layers[:-1])
        self.out = nn.Linear(config.queries * width, config.embedding_dim)

    def forward(self, states: States) -> Float[Tensor, "batch embedding"]:
        embedding: Tensor = self.out(self.squeeze(states).flatten(1))
        return embedding


class QueryHead(nn.Module):
    """The image embedding, or a sequence of text states, from a Q-Former that looks at the tokens."""

    def __init__(self, config: SeedConfig) -> None:
        super().__init__()
        dim = config.qformer_dim
        self.qformer = QFormer(
            dim,
            config.head_depth,
            config.qformer_heads,
            config.qformer_mlp_dim,
            config.qformer_act,
            config.qformer_eps,
            context_dim=dim,
            cross_attention_every=config.cross_attention_every,
            queries=config.head_queries,
            causal=False,
        )
        self.out = nn.Linear(dim, config.embedding_dim)
        self.sequence = config.head == "text"

    def forward(self, states: States) -> Float[Tensor, "batch ..."]:
        vectors: Tensor = self.out(self.qformer(states))
        return vectors if self.sequence else vectors[:, 0]


class Embedding(Float32Module):
    """Quantized vectors to the embedding that the diffusion model draws from; stays in float32, as it is cheap."""

    def __init__(self, config: SeedConfig) -> None:
        super().__init__()
        self.from_codes = nn.Sequential(
            nn.Linear(config.code_dim, config.code_dim), nn.Tanh(), nn.Linear(config.code_dim, config.qformer_dim)
        )
        self.mixer = Mixer(config)
        self.head = MLPHead(config) if config.head == "mlp" else QueryHead(config)

    def forward(self, vectors: Float[Tensor, "batch queries code"]) -> Float[Tensor, "batch ..."]:
        embedding: Tensor = self.head(self.mixer(self.from_codes(vectors)))
        return embedding


class Features(Mixer, Float32Module):
    """Quantized vectors, widened, to a reconstruction of the Q-Former's output; stays in float32."""

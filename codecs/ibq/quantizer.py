"""Maps of vectors to ids and back, and the losses that train the codes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.codecs.ibq.config import IBQConfig
from zoo.kernels.codebook import CodebookSearch
from zoo.precision import Float32Module
from zoo.quantizers import joint

LatentTensor = Float[Tensor, "batch dim rows columns"]
Ids = Int[Tensor, "batch rows columns"]

# Of the soft assignment in the entropy loss; the second one keeps its logarithm finite.
TEMPERATURE = 0.01
_LOG_EPS = 1e-5
#: Of the commitment term.
BETA = 0.25


@dataclass(frozen=True)
class Quantized:
    """One quantization with what training needs of it.

    Attributes:
        latents: codes, which carry the straight-through gradient.
        ids: numbers of the codes.
        loss: what moves codes and latents towards each other.
        sample_entropy: mean entropy of the soft assignments, to be lowered.
        mean_entropy: entropy of their mean, to be raised.
    """

    latents: LatentTensor
    ids: Ids
    loss: Float[Tensor, ""]
    sample_entropy: Float[Tensor, ""]
    mean_entropy: Float[Tensor, ""]

    @property
    def entropy_loss(self) -> Float[Tensor, ""]:
        """The one less the other."""
        return self.sample_entropy - self.mean_entropy


class Codebook(Float32Module):
    """The row of a codebook with the largest dot product, the smallest index among equals; rows are used as they are stored."""

    def __init__(self, config: IBQConfig) -> None:
        super().__init__()
        bound = 1 / config.codebook_size
        self.weight = nn.Parameter(torch.empty(config.codebook_size, config.code_dim).uniform_(-bound, bound))
        self._search = CodebookSearch(metric="dot")

    def project(self, latents: LatentTensor) -> LatentTensor:
        """Vectors to quantize."""
        return latents.float()

    def ids(self, latents: LatentTensor) -> Ids:
        """Ids of latents."""
        return self._search(self.project(latents).permute(0, 2, 3, 1), self.weight)

    def vectors(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape dim"]:
        """Codes of ids."""
        return F.embedding(ids, self.weight)

    def forward(self, latents: LatentTensor) -> Quantized:
        """Quantize for training; holds several matrices of cells by codes.

        The soft assignment lets gradients reach every code, not only the chosen one ("index back-propagation").
        """
        rows = latents.permute(0, 2, 3, 1).flatten(0, 2)
        logits = rows @ self.weight.T
        chosen = logits.argmax(1)
        soft = logits.softmax(1)
        hard = F.one_hot(chosen, len(self.weight)).to(soft.dtype)
        through = (hard - soft.detach() + soft) @ self.weight
        codes = F.embedding(chosen, self.weight)
        loss = F.mse_loss(through, rows) + F.mse_loss(codes.detach(), rows) + BETA * F.mse_loss(codes, rows.detach())
        sharp = (logits / TEMPERATURE).log_softmax(1)
        sample = -(sharp.exp() * sharp).sum(1).mean()
        mean = sharp.exp().mean(0)
        size = (len(latents), *latents.shape[2:])
        return Quantized(
            through.unflatten(0, size).permute(0, 3, 1, 2),
            chosen.reshape(size),
            loss,
            sample,
            -(mean * (mean + _LOG_EPS).log()).sum(),
        )


class Bits(Float32Module):
    """The signs of a few projections are the bits of an id, the first one the lowest; zero counts as negative (LFQ)."""

    def __init__(self, config: IBQConfig) -> None:
        super().__init__()
        projection = nn.Conv2d(config.widths[-1], config.latent_channels, 1)
        assert projection.bias is not None
        self.weight, self.bias = projection.weight, projection.bias

    def project(self, features: Float[Tensor, "batch channels rows columns"]) -> LatentTensor:
        """Vectors to quantize."""
        return F.conv2d(features.float(), self.weight, self.bias).contiguous()

    def ids(self, features: Float[Tensor, "batch channels rows columns"]) -> Ids:
        """Ids of the encoder's features."""
        return self._numbers(self.project(features))

    def _numbers(self, latents: LatentTensor) -> Ids:
        powers = 2 ** torch.arange(latents.shape[1], dtype=torch.int64, device=latents.device)
        return ((latents > 0) * powers[:, None, None]).sum(1)

    def vectors(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape bits"]:
        """Codes of ids, of numbers -1 and 1."""
        places = torch.arange(len(self.weight), dtype=torch.int64, device=ids.device)
        return (ids[..., None] >> places & 1).float() * 2 - 1

    def forward(self, features: Float[Tensor, "batch channels rows columns"]) -> Quantized:
        """Quantize the encoder's features for training."""
        return self.quantize(self.project(features))

    def quantize(self, latents: LatentTensor) -> Quantized:
        """Quantize what `project` gives for training, without a matrix of cells by codes.

        The soft assignment to all sign vectors, by twice the dot product, is a product of one for each bit. So its entropy is
        a sum over bits, and its mean over the cells a product of two matrices, of the lower and the upper bits.
        """
        codes = torch.where(latents > 0, 1.0, -1.0)
        loss = F.mse_loss(latents, codes)
        sharp = 4 / TEMPERATURE * latents.transpose(0, 1).flatten(1).T
        on, off = F.logsigmoid(sharp), F.logsigmoid(-sharp)
        sample = -(on.exp() * on + off.exp() * off).sum(1).mean()
        half = sharp.shape[1] // 2
        lower, upper = [joint(on[:, part].exp(), off[:, part].exp()) for part in (slice(None, half), slice(half, None))]
        mean = upper.T @ lower / len(sharp)
        return Quantized(
            latents + (codes - latents).detach(),
            self._numbers(latents),
            loss,
            sample,
            -(mean * (mean + _LOG_EPS).log()).sum(),
        )


def split_ids(ids: Int[Tensor, "*shape"], bits: int) -> tuple[Int[Tensor, "*shape"], Int[Tensor, "*shape"]]:
    """Ids of that many bits as two halves, the lower bits and the upper ones, which Open-MAGVIT2's language models predict.

    >>> [half.item() for half in split_ids(torch.tensor(5 + 512 * 7), 18)]
    [5, 7]
    """
    size = 1 << math.ceil(bits / 2)
    return ids % size, ids // size

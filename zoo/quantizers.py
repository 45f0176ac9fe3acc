"""Quantizers for models of your own, all with one signature: ``ids(z)``, ``vectors(ids)`` and ``sizes``.

The formulas are the field's, and the names in state dicts are those of vector-quantize-pytorch, so that what was trained with
that library loads here. Vectors are the last axis. Everything is computed in float32. Nearest codes are found by
`zoo.kernels.codebook`: exactly, and without a matrix of queries and codes.

>>> quantizer = LFQ(4)
>>> quantizer.ids(torch.tensor([[0.5, -1.0, 0.0, 2.0]])).tolist(), quantizer.sizes
([9], (16,))
>>> quantizer.vectors(torch.tensor([9])).tolist()
[[1.0, -1.0, -1.0, 1.0]]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.derived import Derived
from zoo.errors import ArgumentError
from zoo.kernels.codebook import CodebookSearch, nearest, prepare
from zoo.kernels.screening import PreparedCodebook
from zoo.nn.fsq import FSQ, require_codes
from zoo.precision import Float32Module

__all__ = ["BSQ", "FSQ", "LFQ", "VQ", "EntropyLoss", "ResidualVQ", "SimVQ"]

# The library clamps probabilities to this before it takes their logarithm.
_SMALLEST_PROBABILITY = 1e-5
#: Bits of the largest codebook whose mean use is computed.
_MOST_BITS = 24


@dataclass(frozen=True)
class EntropyLoss:
    """Terms of the loss that makes codes certain for each vector and even over a batch.

    Attributes:
        total: ``weight * (per_sample - gamma * batch)``.
        per_sample: mean entropy of the codes of a vector, in nats.
        batch: entropy of the mean use of the codes, in nats.
    """

    total: Float[Tensor, ""]
    per_sample: Float[Tensor, ""]
    batch: Float[Tensor, ""]


class LFQ(Float32Module):
    """Lookup-free quantization (arXiv 2310.05737): the sign of each number is a bit, the first one the most significant.

    Args:
        bits: numbers of a code; there are ``2 ** bits`` codes.
        dim: width of the vectors, which are projected to ``bits`` numbers and back where it is another one.
        scale: absolute value of the numbers of a code.

    Raises:
        ArgumentError: there are no bits, or more than 62.
    """

    spherical = False
    mask: Tensor

    def __init__(self, bits: int, dim: int | None = None, *, scale: float = 1.0) -> None:
        super().__init__()
        if not 1 <= bits <= 62:
            raise ArgumentError(f"a code has 1 to 62 bits, not {bits}")
        self.bits, self.scale = bits, scale
        self.register_buffer("mask", 2 ** torch.arange(bits - 1, -1, -1, dtype=torch.int64))
        projected = dim not in (None, bits)
        self.project_in = nn.Linear(dim or bits, bits) if projected else nn.Identity()
        self.project_out = nn.Linear(bits, dim or bits) if projected else nn.Identity()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of codes, of the one codebook that there is."""
        return (1 << self.bits,)

    @property
    def magnitude(self) -> float:
        """Absolute value of the numbers of a code."""
        return self.bits**-0.5 if self.spherical else self.scale

    def projected(self, z: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape bits"]:
        """The numbers whose signs are taken."""
        x: Tensor = self.project_in(z.float())
        return F.normalize(x, dim=-1) if self.spherical else x

    def ids(self, z: Float[Tensor, "*shape dim"]) -> Int[Tensor, "*shape"]:
        """Ids of the codes of vectors; 0 counts as negative."""
        return ((self.projected(z) > 0) * self.mask).sum(-1)

    def vectors(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape dim"]:
        """Vectors that ids stand for.

        Raises:
            InputError: an id is outside the codebook.
        """
        require_codes(ids, 1 << self.bits)
        set_bits = (ids[..., None] & self.mask) != 0
        found: Tensor = self.project_out(torch.where(set_bits, self.magnitude, -self.magnitude))
        return found

    def forward(self, z: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape dim"]:
        """Quantized vectors; gradients pass straight through the signs."""
        x = self.projected(z)
        codes = torch.where(x > 0, self.magnitude, -self.magnitude)
        found: Tensor = self.project_out(x + (codes - x).detach())
        return found

    def entropy(
        self,
        z: Float[Tensor, "*shape dim"],
        *,
        inv_temperature: float = 100.0,
        gamma: float = 1.0,
        weight: float = 0.1,
        clamped: bool = False,
    ) -> EntropyLoss:
        """Entropies of soft assignments, ``softmax(2 * inv_temperature * z . code)`` over all codes.

        Bits are independent, so the codes need not be listed: the entropy of a vector is the sum of those of its bits, and
        the mean use of all codes is one product of those of both halves of the bits.

        Args:
            z: the vectors.
            inv_temperature: of the softmax.
            gamma: weight of the batch's entropy within the total.
            weight: of the total.
            clamped: whether the entropy of a vector has the library's numbers, which clamps probabilities at 1e-5 inside the
                logarithm. It lists all codes for each vector, and differs by up to 1e-3 where these are many and uncertain.

        Raises:
            ArgumentError: there are more codes than a mean use can be held for.
        """
        if self.bits > _MOST_BITS:
            raise ArgumentError(
                f"the entropy over a batch takes at most {_MOST_BITS} bits, not {self.bits}: split them in groups"
            )
        logits = 4 * inv_temperature * self.magnitude * self.projected(z).reshape(-1, self.bits)
        on, off = logits.sigmoid(), (-logits).sigmoid()
        if clamped:
            per_sample = torch.stack(
                [_clamped_entropy(joint(*pair)).sum() for pair in zip(on.split(64), off.split(64), strict=True)]
            )
            per_sample = per_sample.sum() / len(logits)
        else:
            per_sample = -(on * F.logsigmoid(logits) + off * F.logsigmoid(-logits)).sum(1).mean()
        half = self.bits // 2
        use = joint(on[:, :half], off[:, :half]).T @ joint(on[:, half:], off[:, half:]) / len(logits)
        batch = _clamped_entropy(use).sum()
        return EntropyLoss(weight * (per_sample - gamma * batch), per_sample, batch)


def _clamped_entropy(probabilities: Tensor) -> Tensor:
    """What each probability adds to the entropy."""
    return -probabilities * probabilities.clamp(min=_SMALLEST_PROBABILITY).log()


def joint(on: Float[Tensor, "count bits"], off: Float[Tensor, "count bits"]) -> Float[Tensor, "count codes"]:
    """Probability of each combination of independent bits, the first bit the most significant.

    Args:
        on, off: probabilities of 1 and 0 for each bit.
    """
    joint = on.new_ones(len(on), 1)
    for bit in range(on.shape[1]):
        joint = (joint[:, :, None] * torch.stack([off[:, bit], on[:, bit]], dim=1)[:, None]).flatten(1)
    return joint


class BSQ(LFQ):
    """Binary spherical quantization (arXiv 2406.07548): `LFQ` on the unit sphere, codes as well."""

    spherical = True


class _Codebook(nn.Module):
    """The codes of one codebook, with what the library keeps beside them for training."""

    embed: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("initted", torch.tensor(1.0, dtype=torch.float32))
        self.register_buffer("cluster_size", torch.ones(1, size))
        self.register_buffer("embed_avg", torch.randn(1, size, dim))
        self.register_buffer("embed", cast(Tensor, self.embed_avg).clone())


class VQ(Float32Module):
    """A codebook: the nearest code, or with ``cosine`` the one at the smallest angle.

    Args:
        size: number of codes.
        dim: width of the vectors.
        codebook_dim: width of the codes, to and from which vectors are projected; ``dim`` by default.
        cosine: whether lengths are left out of the comparison.
    """

    def __init__(self, size: int, dim: int, codebook_dim: int | None = None, *, cosine: bool = False) -> None:
        super().__init__()
        width = codebook_dim or dim
        self.project_in = nn.Linear(dim, width) if width != dim else nn.Identity()
        self.project_out = nn.Linear(width, dim) if width != dim else nn.Identity()
        self._codebook = _Codebook(size, width)
        self._search = CodebookSearch(unit_widths=(width,) if cosine else ())

    @property
    def codebook(self) -> Float[Tensor, "size codebook_dim"]:
        """The codes as they are stored."""
        return self._codebook.embed[0]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of codes, of the one codebook that there is."""
        return (len(self.codebook),)

    def ids(self, z: Float[Tensor, "*shape dim"]) -> Int[Tensor, "*shape"]:
        """Ids of the codes of vectors; the smallest id among equals."""
        return self._search(self.project_in(z.float()), self.codebook)

    def vectors(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape dim"]:
        """Vectors that ids stand for."""
        found: Tensor = self.project_out(F.embedding(ids, self.codebook))
        return found

    def forward(self, z: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape dim"]:
        """Quantized vectors; gradients pass straight through the choice."""
        x: Tensor = self.project_in(z.float())
        codes = F.embedding(self._search(x, self.codebook), self.codebook)
        found: Tensor = self.project_out(x + (codes - x).detach())
        return found


class SimVQ(Float32Module):
    """A frozen random codebook behind a learned matrix, which moves all codes at once (arXiv 2411.02038).

    Args:
        size: number of codes.
        dim: width of the vectors.
    """

    frozen_codebook: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("frozen_codebook", torch.randn(size, dim) * dim**-0.5)
        self.code_transform = nn.Linear(dim, dim, bias=False)
        self._prepared: Derived[PreparedCodebook] = Derived()

    @property
    def codebook(self) -> Float[Tensor, "size dim"]:
        """The codes, behind the matrix."""
        codes: Tensor = self.code_transform(self.frozen_codebook)
        return codes

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of codes, of the one codebook that there is."""
        return (len(self.frozen_codebook),)

    def ids(self, z: Float[Tensor, "*shape dim"]) -> Int[Tensor, "*shape"]:
        """Ids of the nearest codes; the smallest id among equals."""
        sources = [self.frozen_codebook, self.code_transform.weight]
        return nearest(z.float(), self._prepared.of(sources, lambda: prepare(self.codebook.detach())))

    def vectors(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape dim"]:
        """Vectors that ids stand for, with a gradient to the matrix."""
        found: Tensor = self.code_transform(F.embedding(ids, self.frozen_codebook))
        return found

    def forward(self, z: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape dim"]:
        """Quantized vectors; gradients pass straight through the choice."""
        return z.float() + (self.vectors(self.ids(z)) - z.float()).detach()


class ResidualVQ(Float32Module):
    """Codebooks one behind the other, each for what those before it left over (arXiv 2107.03312).

    Args:
        sizes: number of codes of each codebook, coarse to fine.
        dim: width of the vectors.
    """

    def __init__(self, sizes: Sequence[int], dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([VQ(size, dim) for size in sizes])

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of codes of each codebook."""
        return tuple(cast(VQ, layer).sizes[0] for layer in self.layers)

    def ids(self, z: Float[Tensor, "*shape dim"]) -> Int[Tensor, "*shape codebooks"]:
        """Ids of the codes of vectors, one for each codebook."""
        left, found = z.float(), []
        for module in self.layers:
            layer = cast(VQ, module)
            found.append(layer.ids(left))
            left = left - layer.vectors(found[-1])
        return torch.stack(found, dim=-1)

    def vectors(self, ids: Int[Tensor, "*shape codebooks"]) -> Float[Tensor, "*shape dim"]:
        """Vectors that ids stand for, those of all codebooks or of the first few.

        Raises:
            ArgumentError: there are more ids than codebooks, or none.
        """
        if not 1 <= ids.shape[-1] <= len(self.layers):
            raise ArgumentError(f"{ids.shape[-1]} ids do not fit {len(self.layers)} codebooks")
        parts = [cast(VQ, layer).vectors(ids[..., book]) for book, layer in enumerate(self.layers) if book < ids.shape[-1]]
        return torch.stack(parts).sum(0)

    def forward(self, z: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape dim"]:
        """Quantized vectors; gradients pass straight through the choices."""
        return z.float() + (self.vectors(self.ids(z)) - z.float()).detach()

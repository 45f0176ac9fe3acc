"""Bytes to tokens: the embedding of bytes and the strided convolution over it, as sums of precomputed rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from zoo.codecs.byteformer.config import ByteFormerConfig
from zoo.derived import Derived
from zoo.precision import Float32Module

# Tokens at a time: bounds the indices, of which there are as many as bytes under all windows of the convolution.
_TOKENS_AT_ONCE = 1 << 16

Table = Float[Tensor, "rows dim"]


class ByteEmbedding(Float32Module):
    """Embedding, strided convolution without bias (section 3 of the paper) and positions.

    Nothing stands between embedding and convolution, so tap j of the convolution over byte v is one of ``kernel * vocab_size``
    vectors, ``W[:, :, j] E[v]``, and a token is the sum of ``kernel`` of them: additions instead of ``kernel * dim * dim``
    multiplications, and no embedded bytes in memory. The sums are those of the convolution in another order.
    """

    def __init__(self, config: ByteFormerConfig) -> None:
        super().__init__()
        self.kernel, self.stride = config.kernel, config.stride
        self.bytes = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.reduction = nn.Parameter(torch.empty(config.dim, config.dim, config.kernel))
        table = sinusoidal_positions(config.max_tokens, config.dim) if config.sinusoidal else None
        if table is None:
            self.positions: Tensor = nn.Parameter(torch.empty(config.max_tokens, config.dim))
        else:
            self.register_buffer("positions", table)
        # Larger than the parameters that it is made of.
        self._table: Derived[Tensor] = Derived()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The original's initialisation; the row of padding is zero."""
        nn.init.trunc_normal_(self.bytes, std=self.bytes.shape[1] ** -0.5)
        self.bytes[-1] = 0
        nn.init.kaiming_uniform_(self.reduction, a=math.sqrt(5))
        if isinstance(self.positions, nn.Parameter):
            nn.init.trunc_normal_(self.positions, std=self.positions.shape[1] ** -0.5)

    def _make_table(self) -> Table:
        # The row of padding gets no gradient.
        rows = torch.cat([self.bytes[:-1], self.bytes[-1:].detach()])
        return torch.einsum("oij,vi->jvo", self.reduction, rows).flatten(0, 1).contiguous()

    def table(self) -> Table:
        """Row ``j * vocab_size + v`` is for byte v at tap j; kept while the weights stay as they are."""
        if torch.is_grad_enabled() and (self.bytes.requires_grad or self.reduction.requires_grad):
            return self._make_table()
        with torch.no_grad():
            return self._table.of([self.bytes, self.reduction], self._make_table)

    def forward(
        self, sequences: Sequence[Int[Tensor, " _"] | UInt8[Tensor, " _"]], positions: bool = True
    ) -> Float[Tensor, "tokens dim"]:
        """Tokens of several sequences of ids one after the other, ``(length - kernel) // stride + 1`` of each.

        Args:
            sequences: each at least as long as the kernel.
            positions: add the first rows of the position table.
        """
        windows = [ids.to(self.bytes.device).unfold(0, self.kernel, self.stride) for ids in sequences]
        reduced = self._reduce(windows[0] if len(windows) == 1 else torch.cat(windows))
        if not positions:
            return reduced
        return reduced + torch.cat([self.positions[: len(own)] for own in windows])

    def _reduce(self, windows: Int[Tensor, "tokens kernel"] | UInt8[Tensor, "tokens kernel"]) -> Float[Tensor, "tokens dim"]:
        table = self.table()
        first_rows = torch.arange(self.kernel, dtype=torch.int64, device=table.device) * (len(table) // self.kernel)
        parts = [F.embedding_bag(part + first_rows, table, mode="sum") for part in windows.split(_TOKENS_AT_ONCE)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def sinusoidal_positions(count: int, dim: int) -> Float[Tensor, "count dim"]:
    """Sines in the first half of the channels and cosines in the second, frequencies from 1 down to 1 / 10,000."""
    half = dim // 2
    frequencies = torch.exp(-torch.arange(half, dtype=torch.float32) * (math.log(10_000) / (half - 1)))
    angles = torch.arange(count, dtype=torch.float32)[:, None] * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))

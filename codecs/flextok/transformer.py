"""Parts that encoder and decoder share: patches, attention with normalised queries and keys, gated feed-forward layers.

The stream of activations stays in float32; matrix products run in the precision of their weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from zoo.nn.linear import Linear

# muP's attention scale: equal to 1/sqrt(head_dim) at 64 only.
ATTENTION_SCALE = 8.0
EPS = 1e-5

Activations = Float[Tensor, "batch tokens dim"]


def normalise(x: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape dim"]:
    """Layer normalisation without affine parameters, in float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=EPS)


def hidden_dim(dim: int, mlp_ratio: float) -> int:
    """Width of a gated feed-forward layer: 2/3 of the ungated one's, so that both have as many parameters."""
    return int(2 * int(mlp_ratio * dim) / 3)


class Patches(nn.Module):
    """Latents to patch tokens, row by row; within a patch the order is row, column, channel (section 3.1)."""

    def __init__(self, patch_size: tuple[int, int], channels: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = Linear(patch_size[0] * patch_size[1] * channels, dim)

    def forward(self, latents: Float[Tensor, "batch channels rows columns"]) -> Activations:
        batch, channels, rows, columns = latents.shape
        height, width = self.patch_size
        cut = latents.view(batch, channels, rows // height, height, columns // width, width)
        tokens: Tensor = self.proj(cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
        return tokens.float()


def unpatch(
    tokens: Float[Tensor, "batch patches numbers"], grid: tuple[int, int], patch_size: tuple[int, int]
) -> Float[Tensor, "batch channels rows columns"]:
    """The inverse of cutting latents into patches."""
    (rows, columns), (height, width) = grid, patch_size
    cut = tokens.view(len(tokens), rows, columns, height, width, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, rows * height, columns * width)


def grid_positions(table: Float[Tensor, "1 dim rows columns"], grid: tuple[int, int]) -> Float[Tensor, "1 patches dim"]:
    """The part of a position table that a grid of patches uses, as tokens."""
    return table[:, :, : grid[0], : grid[1]].flatten(2).transpose(1, 2)


def sinusoidal_positions(grid: tuple[int, int], dim: int) -> Float[Tensor, "1 dim rows columns"]:
    """The fixed table of a new model: sine and cosine of the row in the first half of the channels, of the column in the other.

    Checkpoints bring their own table, and only that one is used with them.
    """
    # Also where the rest of a model has no memory: arithmetic there makes PyTorch import its compiler, which takes 2 seconds.
    with torch.device("cpu"):
        frequencies = 10_000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
        rows, columns = (torch.arange(count, dtype=torch.float64)[None, :] * frequencies[:, None] for count in grid)
    rows, columns = rows[:, :, None].expand(-1, *grid), columns[:, None, :].expand(-1, *grid)
    return torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()])[None].float()


class Attention(nn.Module):
    """Multi-head attention with layer-normalised queries and keys and no biases (section 3.2)."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.wq = Linear(dim, dim, bias=False)
        self.wk = Linear(dim, dim, bias=False)
        self.wv = Linear(dim, dim, bias=False)
        self.proj = Linear(dim, dim, bias=False)

    def _heads(self, x: Activations) -> Float[Tensor, "batch heads tokens head_dim"]:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def queries(self, x: Activations) -> Float[Tensor, "batch heads tokens head_dim"]:
        """Normalised queries of the tokens, in the precision of the weights."""
        return self._normalised_heads(self.wq(x))

    def _normalised_heads(self, x: Activations) -> Float[Tensor, "batch heads tokens head_dim"]:
        return self._heads(normalise(x.unflatten(-1, (-1, self.head_dim))).to(x.dtype).flatten(2))

    def keys_values(self, x: Activations) -> tuple[Float[Tensor, "batch heads tokens head_dim"], ...]:
        """Normalised keys, and values."""
        return self._normalised_heads(self.wk(x)), self._heads(self.wv(x))

    def attend(
        self,
        queries: Float[Tensor, "batch heads queries head_dim"],
        keys: Float[Tensor, "batch heads keys head_dim"],
        values: Float[Tensor, "batch heads keys head_dim"],
        mask: Float[Tensor, "#batch 1 #queries keys"] | Bool[Tensor, "queries keys"] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "batch queries dim"]:
        """Attention and its output projection. A float mask is added to the scores."""
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=causal, scale=ATTENTION_SCALE / self.head_dim
        )
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out.float()


class FeedForward(nn.Module):
    """SwiGLU: ``fc2(silu(fc1 x) * fc3 x)``, without biases."""

    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = hidden_dim(dim, mlp_ratio)
        self.fc1 = Linear(dim, hidden, bias=False)
        self.fc2 = Linear(hidden, dim, bias=False)
        self.fc3 = Linear(dim, hidden, bias=False)

    def forward(self, x: Activations) -> Activations:
        # Without gradients, in the memory of the first product.
        inplace = not torch.is_grad_enabled()
        gated: Tensor = F.silu(self.fc1(x), inplace=inplace)
        gated = gated.mul_(self.fc3(x)) if inplace else gated * self.fc3(x)
        out: Tensor = self.fc2(gated)
        return out.float()

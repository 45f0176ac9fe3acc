"""Inverse k-means: units and a prompt to speech vectors (equations 8 and 9 of the paper, by a reading note's account).

There is no position encoding: order comes from the depthwise convolutions, and the prompt is a set of vectors with their
neighbourhoods.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torchaudio.models.conformer import ConformerLayer

from zoo.codecs.vectok.config import InverseSizes

Activations = Float[Tensor, "batch frames width"]
Inside = Bool[Tensor, "batch frames"]


class ConformerBlock(ConformerLayer):  # type: ignore[misc]  # torchaudio is not typed
    """torchaudio's Conformer layer, time-major, and with padding that stays out of the depthwise convolution.

    The library's layer hides padding from attention alone, so that results depend on the batch.
    """

    def __init__(self, sizes: InverseSizes) -> None:
        super().__init__(sizes.width, sizes.ffn_dim, sizes.heads, sizes.depthwise_kernel)

    def forward(self, x: Activations, inside: Inside | None) -> Activations:
        x = x + 0.5 * self.ffn1(x)
        x = x + self._attend(self.self_attn_layer_norm(x), inside)
        x = x + self._convolve(x, inside)
        x = x + 0.5 * self.ffn2(x)
        return self.final_layer_norm(x)

    def _attend(self, x: Activations, inside: Inside | None) -> Activations:
        batch, frames, width = x.shape
        attention = self.self_attn
        projected = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = projected.view(batch, frames, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        mask = None if inside is None else inside[:, None, None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return attention.out_proj(mixed.transpose(1, 2).reshape(batch, frames, width))

    def _convolve(self, x: Activations, inside: Inside | None) -> Activations:
        widen, gate, depthwise, *rest = self.conv_module.sequential
        x = gate(widen(self.conv_module.layer_norm(x).transpose(1, 2)))
        if inside is not None:
            # Behind the biased projection, padding is no longer zero.
            x = x * inside[:, None]
        x = depthwise(x)
        for layer in rest:
            x = layer(x)
        return x.transpose(1, 2)


class InverseKMeans(nn.Module):
    """A Conformer over a prompt and the vectors that stand for units."""

    def __init__(self, sizes: InverseSizes, vector_dim: int) -> None:
        super().__init__()
        same = sizes.width == vector_dim
        self.in_proj: nn.Module = nn.Identity() if same else nn.Linear(vector_dim, sizes.width)
        self.segment = nn.Parameter(torch.empty(2, sizes.width).normal_(std=0.02))
        self.mask_vector = nn.Parameter(torch.zeros(vector_dim))
        self.layers = nn.ModuleList(ConformerBlock(sizes) for _ in range(sizes.layers))
        self.out_proj = nn.Linear(sizes.width, vector_dim)

    def embed(self, prompt: Float[Tensor, "prompt dim"], units: Float[Tensor, "units dim"]) -> Float[Tensor, "frames width"]:
        """The Conformer's input for one item: the prompt's vectors, then those of its units."""
        dtype = self.segment.dtype
        return torch.cat([self.in_proj(prompt.to(dtype)) + self.segment[0], self.in_proj(units.to(dtype)) + self.segment[1]])

    def refine(self, x: Activations, inside: Inside | None = None) -> Activations:
        """The Conformer."""
        for layer in self.layers:
            x = layer(x, inside)
        return x

    def forward(
        self, prompts: Sequence[Float[Tensor, "_prompt dim"]], units: Sequence[Float[Tensor, "_units dim"]]
    ) -> list[Float[Tensor, "_units dim"]]:
        """Speech vectors of every item.

        Args:
            prompts: speech vectors of the wanted voices, as they are.
            units: the vectors that stand for the units, or the mask vector in their places.
        """
        rows = [self.embed(prompt, item) for prompt, item in zip(prompts, units, strict=True)]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64, device=rows[0].device)
        # Each item's units follow its own prompt at once, so that all padding is at the right.
        x = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        inside = None
        if min(map(len, rows)) < x.shape[1]:
            inside = torch.arange(x.shape[1], dtype=torch.int64, device=x.device) < lengths[:, None]
        x = self.out_proj(self.refine(x, inside))
        return [row[len(prompt) : len(prompt) + len(item)] for row, prompt, item in zip(x, prompts, units, strict=True)]

    def masked(self, vectors: Float[Tensor, "units dim"], hidden: Bool[Tensor, " units"]) -> Float[Tensor, "units dim"]:
        """The vectors of units with the mask vector where they are hidden, for training."""
        return torch.where(hidden[:, None], self.mask_vector, vectors)

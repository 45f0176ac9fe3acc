"""FlexTok's and TokenFlow's networks as their authors write them: the contenders of `zoo bench originals`.

They have PyTorch's usual layout, the blocks of diffusers and of VQGAN, dense masks over all registers, and two passes a
guided step. Weights are copies of ours, in the layout that PyTorch gives new ones. Bookkeeping of the originals, such as
dictionaries that are copied at each step, is left out, so their times are lower bounds.
"""

from __future__ import annotations

import copy
import math
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Maps = Float[Tensor, "batch _channels _rows _columns"]
Stream = Float[Tensor, "batch tokens dim"]
#: Scale of FlexTok's guided steps.
GUIDANCE = 7.5


def plain_copy(module: nn.Module) -> Any:
    """A copy with PyTorch's own layers, whose weights lie as it makes them, whatever layout they have here."""
    copied = copy.deepcopy(module)
    for part in copied.modules():
        for plain in (nn.Conv2d, nn.GroupNorm, nn.Linear):
            if isinstance(part, plain):
                part.__class__ = plain
    for tensor in copied.parameters():
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return copied


# -------------------------------------------------------------------------------------------------------------- FlexTok


def _normalised(x: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape dim"]:
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-5).to(x.dtype)


def _attention(block: Any, x: Stream, mask: Bool[Tensor, "1 1 tokens tokens"]) -> Stream:
    attn = block.attn
    width = attn.head_dim
    query, key, value = (
        F.linear(x, own.weight).unflatten(-1, (-1, width)).transpose(1, 2) for own in (attn.wq, attn.wk, attn.wv)
    )
    query, key = _normalised(query), _normalised(key)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=8 / width)
    return F.linear(mixed.transpose(1, 2).flatten(2), attn.proj.weight)


def _gated(block: Any, x: Stream) -> Stream:
    mlp = block.mlp
    return F.linear(F.silu(F.linear(x, mlp.fc1.weight)) * F.linear(x, mlp.fc3.weight), mlp.fc2.weight)


def _patches(layer: Any, latents: Maps, positions: Float[Tensor, "1 dim rows columns"]) -> Stream:
    height, width = layer.patch_size
    batch, channels, rows, columns = latents.shape
    cut = latents.view(batch, channels, rows // height, height, columns // width, width).permute(0, 2, 4, 3, 5, 1)
    tokens = F.linear(cut.flatten(3), layer.proj.weight, layer.proj.bias)
    return (tokens.permute(0, 3, 1, 2) + positions[:, :, : tokens.shape[1], : tokens.shape[2]]).flatten(2).transpose(1, 2)


class FlexTokNetworks(nn.Module):
    """Encoder and decoder over packed sequences with dense masks; the timestep modulates every token.

    Args:
        tokenizer: whose weights are copied.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = plain_copy(tokenizer.encoder), plain_copy(tokenizer.decoder)
        self.fsq = tokenizer.fsq
        self.config = tokenizer.config

    def encode(self, latents: Maps) -> Int[Tensor, "batch registers"]:
        """Ids of scaled latents; patches do not see registers, and a register sees those before it."""
        own, count = self.encoder, self.config.registers
        x = _patches(own.patches, latents, own.positions)
        patches = x.shape[1]
        x = torch.cat([x, own.registers.expand(len(x), -1, -1)], dim=1)
        mask = torch.ones(patches + count, patches + count, dtype=torch.bool).tril()
        mask[:patches, :patches] = True
        for block in own.blocks:
            x = x + _attention(block, _normalised(x), mask[None, None])
            x = x + _gated(block, _normalised(x))
        z = F.linear(_normalised(x[:, patches:]), own.to_codes.weight, own.to_codes.bias)
        ids: Tensor = self.fsq.ids(z.float())
        return ids

    def step(
        self, x: Maps, t: float, codes: Float[Tensor, "batch registers components"], keep: int, running: Maps | None
    ) -> tuple[Maps, Maps]:
        """Guided velocity by two passes over all registers (APG), and what the guidance carries on."""
        kept = torch.arange(codes.shape[1]) < keep
        conditional = self._velocity(x, t, codes, kept, null=False)
        unconditional = self._velocity(x, t, codes, kept, null=True)
        running = conditional - unconditional + (0 if running is None else -0.5 * running)
        axes = (1, 2, 3)
        moved = running * (2.5 / torch.linalg.vector_norm(running, dim=axes, keepdim=True)).clamp(max=1)
        direction = F.normalize(conditional.double().flatten(1), dim=1).view_as(conditional)
        across = moved.double() - (moved.double() * direction).sum(axes, keepdim=True) * direction
        return conditional + (GUIDANCE - 1) * across.to(x.dtype), running

    def sample(self, noise: Maps, codes: Float[Tensor, "batch registers components"], keep: int, steps: int) -> Maps:
        """Scaled latents after guided steps of Euler's method."""
        x, running = noise, None
        for step in range(steps, 0, -1):
            velocity, running = self.step(x, step / steps, codes, keep, running)
            x = x - velocity / steps
        return x

    def _velocity(
        self,
        x: Maps,
        t: float,
        codes: Float[Tensor, "batch registers components"],
        kept: Bool[Tensor, " registers"],
        null: bool,
    ) -> Maps:
        own = self.decoder
        registers = F.linear(codes, own.from_codes.weight, own.from_codes.bias) + own.register_positions[0, 0].T
        registers = torch.where(kept[None, :, None], registers, own.mask_token.to(registers.dtype))
        if null:
            registers = own.null_token.to(registers.dtype).expand_as(registers)
        patches = _patches(own.patches, x, own.patch_positions)
        counts = patches.shape[1], registers.shape[1]
        mask = torch.ones(1, 1, sum(counts), sum(counts), dtype=torch.bool)
        time = self._time(torch.full((len(x),), t))
        h = torch.cat([patches, registers], dim=1)
        for block in own.blocks:
            vectors = F.linear(F.silu(time), block.modulation.weight, block.modulation.bias).unflatten(1, (2, 6, -1))
            expanded = torch.cat([vectors[:, kind, None].expand(-1, count, -1, -1) for kind, count in enumerate(counts)], dim=1)
            gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = expanded.unbind(2)
            h = h + gate_attn * _attention(block, _normalised(h) * (1 + scale_attn) + shift_attn, mask)
            h = h + gate_mlp * _gated(block, _normalised(h) * (1 + scale_mlp) + shift_mlp)
        shift, scale = (
            F.linear(F.silu(time), own.head.modulation.weight, own.head.modulation.bias).unflatten(1, (2, -1)).unbind(1)
        )
        out = _normalised(h[:, : counts[0]]) * (1 + scale[:, None]) + shift[:, None]
        out = F.linear(out, own.head.proj.weight, own.head.proj.bias)
        (rows, columns), (height, width) = self.config.grid, self.config.patch_size
        cut = out.view(len(x), rows, columns, height, width, -1).permute(0, 5, 1, 3, 2, 4)
        return cut.reshape(x.shape).float()

    def _time(self, t: Float[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        own = self.decoder.time
        half = own.num_features // 2
        frequencies = 1000.0 / own.max_timestep * torch.exp(-math.log(256.0) * torch.arange(half, dtype=torch.float32) / half)
        phases = t[:, None] * frequencies
        embedded: Tensor = own.mlp(torch.cat([phases.cos(), phases.sin()], dim=1))
        return embedded


# ------------------------------------------------------------------------------------------------------------ TokenFlow


def _norm(layer: Any, x: Maps) -> Maps:
    return F.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)


def _swish(x: Maps) -> Maps:
    return x * torch.sigmoid(x)


def _resized(x: Maps, side: int) -> Maps:
    return x if x.shape[-1] == side else F.interpolate(x, size=(side, side), mode="bicubic")


def _residual(block: Any, x: Maps) -> Maps:
    h = block.conv1(_swish(_norm(block.norm1, x)))
    h = block.conv2(_swish(_norm(block.norm2, h)))
    return (x if block.conv_shortcut is None else block.conv_shortcut(x)) + h


def _mixing(block: Any, x: Maps) -> Maps:
    """Attention of one head among all places, projected by convolutions of one pixel."""
    normed = _norm(block.group_norm, x)
    one = (1, 1)
    query, key, value = (
        F.conv2d(normed, own.weight.unflatten(1, (-1, *one)), own.bias).flatten(2)
        for own in (block.to_q, block.to_k, block.to_v)
    )
    weights = torch.softmax(query.transpose(1, 2) @ key * x.shape[1] ** -0.5, dim=2)
    mixed = (value @ weights.transpose(1, 2)).view_as(x)
    out = block.to_out[0]
    return x + F.conv2d(mixed, out.weight.unflatten(1, (-1, *one)), out.bias)


def _level(level: Any, x: Maps) -> Maps:
    for residual, attention in zip_longest(level.resnets, level.attentions):
        x = _residual(residual, x)
        if attention is not None:
            x = _mixing(attention, x)
    for step in level.downsamplers:
        x = step.conv(F.pad(x, (0, 1, 0, 1)))
    for step in level.upsamplers:
        x = step.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    return x


def _middle(mid: Any, x: Maps) -> Maps:
    return _residual(mid.resnets[1], _mixing(mid.attentions[0], _residual(mid.resnets[0], x)))


class TokenFlowEncoder(nn.Module):
    """CLIP's tower with the sequence first, as OpenAI wrote it, VQGAN's encoder, and dense distances to both codebooks.

    Args:
        tokenizer: whose weights are copied; its teacher must be CLIP.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.own, self.quantizer = plain_copy(tokenizer.encoder), plain_copy(tokenizer.quantizer)
        self.attentions = nn.ModuleList()
        for block in self.own.semantic.blocks:
            attention = nn.MultiheadAttention(block.attn.qkv.in_features, block.attn.num_heads)
            attention.in_proj_weight, attention.in_proj_bias = block.attn.qkv.weight, block.attn.qkv.bias
            attention.out_proj.weight, attention.out_proj.bias = block.attn.proj.weight, block.attn.proj.bias
            self.attentions.append(attention)
        self.eval()

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Int[Tensor, "batch length"]:
        """Ids of images in [-1, 1], scale by scale."""
        own = self.own
        semantic = own.to_codes(self._semantic(images)).transpose(1, 2).unflatten(2, (own.grid, own.grid))
        x, pixels = own.pixels.conv_in(_resized(images, own.pixel_size)), own.pixels
        for level in pixels.levels:
            x = _level(level, x)
        x = pixels.conv_out(_swish(_norm(pixels.norm_out, _middle(pixels.mid, x))))
        return self._ids(torch.cat([semantic, pixels.quant_conv(x)], dim=1).float())

    def _semantic(self, images: Float[Tensor, "batch 3 height width"]) -> Stream:
        own: Any = self.own.semantic
        x = own.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([own.class_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1) + own.positions.to(x.dtype)
        x = own.norm_pre(x.float()).to(x.dtype).transpose(0, 1)
        for block, attention in zip(own.blocks, self.attentions, strict=True):
            normed = block.norm1(x.float()).to(x.dtype)
            x = x + attention(normed, normed, normed, need_weights=False)[0]
            hidden = block.mlp.fc1(block.norm2(x.float()).to(x.dtype))
            x = x + block.mlp.fc2(hidden * torch.sigmoid(1.702 * hidden))
        x = own.norm(x.float()).to(x.dtype).transpose(0, 1)
        return x[:, 1:]

    def _ids(self, latents: Maps) -> Int[Tensor, "batch length"]:
        quantizer, grid = self.quantizer, self.own.grid
        books = [F.normalize(own, dim=1) for own in (quantizer.semantic, quantizer.pixels)]
        rest, found = latents, []
        for scale in quantizer.scales:
            pooled = F.interpolate(rest, size=(scale, scale), mode="area") if scale != grid else rest
            halves = [F.normalize(half, dim=1) for half in pooled.split(quantizer.widths, dim=1)]
            distance: Tensor | int = 0
            for half, book in zip(halves, books, strict=True):
                rows = half.permute(0, 2, 3, 1).flatten(0, 2)
                squares = rows.square().sum(1, keepdim=True) + book.square().sum(1)
                distance = distance + squares - 2 * torch.einsum("bd,dn->bn", rows, book.T)
            assert isinstance(distance, Tensor)
            ids = distance.argmin(1).view(len(latents), scale, scale)
            codes = torch.cat([F.embedding(ids, book) for book in books], dim=3).permute(0, 3, 1, 2)
            spread = F.interpolate(codes, size=(grid, grid), mode="bicubic") if scale != grid else codes
            rest = rest - spread
            found.append(ids.flatten(1))
        return torch.cat(found, dim=1)


class TokenFlowDecoder(nn.Module):
    """VQGAN's decoder of the pixel part of latents.

    Args:
        tokenizer: whose weights are copied.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.own = plain_copy(tokenizer.decoder)

    def forward(self, latents: Maps) -> Float[Tensor, "batch 3 height width"]:
        """Images, in the precision of the weights, not clamped."""
        own = self.own
        x = _middle(own.mid, own.conv_in(own.post_quant_conv(latents)))
        for level in own.levels:
            x = _level(level, x)
        return _resized(own.conv_out(_swish(_norm(own.norm_out, x))), own.image_size)

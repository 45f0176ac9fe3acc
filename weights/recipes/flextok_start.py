"""Starting point of training ``flextok-tiny``: principal components, a tree of regions, and regressions.

From random weights a short training ends where all tokens say the same. From here every token says something else from the
first step on, and the prefixes decode to pictures that get better with their length:

- The autoencoder's encoder computes principal components of 8 x 8 pixels, so that latents are linear in pixels.
- The registers are nodes of a tree: the whole picture, its halves, their halves and so on. A register attends to the patches of
  its region and of that region's four halves; the quantizer gets the means of the strongest channels and two differences.
- Patches of the decoder attend to the registers whose regions hold them, and a regression gives the velocity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.codecs.flextok import FlexTok
from zoo.codecs.flextok.decoder import GATE_ATTENTION, GATE_MLP, Condition, Decoder
from zoo.codecs.flextok.encoder import Encoder
from zoo.codecs.flextok.flow import prefix_ladder
from zoo.codecs.flextok.transformer import normalise
from zoo.nn.vae import VAE
from zoo.weights.data.image import Images
from zoo.weights.recipes.closed_form import CENTRE, close_branches, least_squares, pass_on, principal, regress

LatentTensor = Float[Tensor, "batch channels rows columns"]
Features = Float[Tensor, "batch _ _ _"]

# Of the latents; none of it is trained.
LOG_VARIANCE = -6.0
# Constants in spare channels of the autoencoder, and the points around which SiLU is almost linear.
CONSTANT, ENCODER_POINT, DECODER_POINT = 3.0, 6.0, 4.0
# Spread of what is linear in front of the last norm, small beside the constants.
ENCODER_SPREAD = 0.15
# Random part of queries and keys: enough that heads differ, little beside the places.
NOISE = 0.004
# Patches are faint beside their positions in the encoder, so that layer norms hardly bend them.
PATCH_GAIN = 0.3
# How strongly a register holds the halves of its region, beside the region itself.
HALVES_GAIN = 1.5
# What tells registers from patches in the decoder's attention.
FLAG, FLAG_GAIN = 1.5, 0.2
# Spread of what the quantizer's tanh gets, and the least share of its norm that a coarse register keeps.
CODE_SPREAD, LEAST_NORM = 0.6, 0.35
# Ridge of the regression behind the decoder, of the mean square of its inputs.
RIDGE = 1e-3


@torch.no_grad()
def initialise(model: FlexTok, latents: LatentTensor, generator: torch.Generator) -> None:
    """Encoder, decoder and the layers next to the quantizer, for latents whose channels are sorted by their variance."""
    config = model.config
    tree = regions(config.grid, config.registers)
    table = harmonic_positions(config.grid, config.encoder_dim)
    axes = Axes.of(table, config.patch_channels, generator)
    for network in (model.encoder, model.decoder):
        for name, parameter in network.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        for block in network.blocks:
            nn.init.zeros_(block.attn.proj.weight)
            nn.init.zeros_(block.mlp.fc2.weight)
    model.encoder.positions.copy_(table)
    model.decoder.patch_positions.copy_(table)
    initialise_encoder(model.encoder, axes, tree, latents, generator)
    fit_codes(model, tree, latents)
    initialise_decoder(model.decoder, axes, tree, generator)
    fit_head(model, latents, generator)


# --------------------------------------------------------------------------------------------------------------- regions


@dataclass(frozen=True)
class Region:
    """A rectangle of patches: rows ``top`` to ``bottom``, columns ``left`` to ``right``, the ends excluded."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def halves(self) -> tuple[Region, Region, Region, Region]:
        """Upper, lower, left and right half; a single row or column is its own half."""
        middle, height = (self.top + self.bottom) // 2, self.bottom - self.top
        centre, width = (self.left + self.right) // 2, self.right - self.left
        rows = ((self.top, middle), (middle, self.bottom)) if height > 1 else ((self.top, self.bottom),) * 2
        columns = ((self.left, centre), (centre, self.right)) if width > 1 else ((self.left, self.right),) * 2
        upper, lower = (Region(*span, self.left, self.right) for span in rows)
        left, right = (Region(self.top, self.bottom, *span) for span in columns)
        return upper, lower, left, right

    def place(self, grid: tuple[int, int]) -> Float[Tensor, " codes"]:
        """Share of each row of the grid, and of each column."""
        code = torch.zeros(sum(grid))
        code[self.top : self.bottom] = 1 / (self.bottom - self.top)
        code[grid[0] + self.left : grid[0] + self.right] = 1 / (self.right - self.left)
        return code


def regions(grid: tuple[int, int], count: int) -> list[tuple[int, Region]]:
    """Levels and regions of ``count`` registers, coarse to fine; those that make no whole level hold the whole grid again.

    Each level halves the regions of the one before, rows and columns in turn.
    """
    level, rows, columns = 0, 1, 1
    tree: list[tuple[int, Region]] = []
    while len(tree) + rows * columns <= count and rows <= grid[0] and columns <= grid[1]:
        height, width = grid[0] // rows, grid[1] // columns
        tree += [
            (level, Region(row * height, (row + 1) * height, column * width, (column + 1) * width))
            for row in range(rows)
            for column in range(columns)
        ]
        rows, columns = (2 * rows, columns) if level % 2 == 0 else (rows, 2 * columns)
        level += 1
    return (tree + [tree[0]] * count)[:count]


# ------------------------------------------------------------------------------------------------------------------ axes


def harmonic_positions(grid: tuple[int, int], dim: int) -> Float[Tensor, "1 dim rows columns"]:
    """Sines and cosines of evenly spaced frequencies: those of any two rows, or columns, are orthogonal."""
    frequencies = math.pi * (torch.arange(dim // 4) + 0.5) / (dim // 4)
    rows, columns = (torch.arange(count)[None, :] * frequencies[:, None] for count in grid)
    rows, columns = rows[:, :, None].expand(-1, *grid), columns[:, None, :].expand(-1, *grid)
    return torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()])[None]


@dataclass(frozen=True)
class Axes:
    """Directions of the stream of activations, all orthogonal.

    Attributes:
        read: gives a patch's row and column, one-hot, of its position.
        halves: where a register holds the places of its region's halves.
        content: the rest.
        patch_channels: how many of ``content`` hold the numbers of a patch.
    """

    read: Float[Tensor, "codes dim"]
    halves: Float[Tensor, "4 codes dim"]
    content: Float[Tensor, "contents dim"]
    patch_channels: int

    @classmethod
    def of(cls, table: Float[Tensor, "1 dim rows columns"], patch_channels: int, generator: torch.Generator) -> Axes:
        """Axes for a table of positions.

        Raises:
            ValueError: the model is too narrow.
        """
        dim, grid = table.shape[1], (table.shape[2], table.shape[3])
        positions = table[0].flatten(1).T.double()
        positions = positions - positions.mean(dim=1, keepdim=True)  # as the layer norm does
        rows, columns = torch.arange(grid[0]).repeat_interleave(grid[1]), torch.arange(grid[1]).repeat(grid[0])
        places = torch.cat([F.one_hot(rows, grid[0]), F.one_hot(columns, grid[1])], dim=1).double()
        left, strength, right = torch.linalg.svd(positions, full_matrices=False)
        used = strength > 1e-3 * strength[0]
        read = (places.T @ left[:, used] / strength[used]) @ right[used]
        taken = torch.cat([right[used], torch.ones(1, dim, dtype=torch.float64)])
        free = torch.linalg.svd(taken, full_matrices=True)[2][len(taken) :]
        mixed = torch.linalg.qr(torch.randn(len(free), len(free), generator=generator, dtype=torch.float64))[0]
        free = (mixed @ free).float()
        held = 4 * sum(grid)
        if len(free) < held + patch_channels + 8:
            raise ValueError(f"a width of {dim} does not hold patches of {patch_channels} numbers on a grid of {grid}")
        return cls(read.float(), free[:held].view(4, sum(grid), dim), free[held:], patch_channels)

    @property
    def grid_codes(self) -> int:
        """Rows and columns of the grid."""
        return len(self.read)

    def registers(self, tree: Sequence[tuple[int, Region]], grid: tuple[int, int]) -> Float[Tensor, "registers dim"]:
        """Register vectors that hold the places of their regions and of these regions' halves."""
        whole = torch.stack([region.place(grid) for _, region in tree])
        parts = torch.stack([torch.stack([half.place(grid) for half in region.halves]) for _, region in tree])
        return whole @ torch.linalg.pinv(self.read).T + HALVES_GAIN * torch.einsum("rhc,hcd->rd", parts, self.halves)


def set_places(block: nn.Module, axes: Axes, of_registers: str, of_patches: str, generator: torch.Generator) -> None:
    """Let queries and keys be places: the first head compares regions, the next four their halves."""
    attention = block.attn
    codes = axes.grid_codes
    for name in (of_registers, of_patches):
        weight = getattr(attention, name).weight
        weight.copy_(NOISE * torch.randn(weight.shape, generator=generator))
        for head, rows in enumerate(weight.view(-1, attention.head_dim, weight.shape[1])):
            half = head % 5 - 1
            rows[:codes] += 2 * axes.halves[half] if name == of_registers and half >= 0 else axes.read


# --------------------------------------------------------------------------------------------------------------- encoder


def initialise_encoder(
    encoder: Encoder, axes: Axes, tree: Sequence[tuple[int, Region]], latents: LatentTensor, generator: torch.Generator
) -> None:
    """Registers gather the strongest components of the patches of their regions and halves in the first block."""
    encoder.registers.copy_(axes.registers(tree, encoder.config.grid))
    encoder.patches.proj.weight.copy_(PATCH_GAIN * axes.content[: axes.patch_channels].T)
    for block in encoder.blocks:
        set_places(block, axes, "wq", "wk", generator)
    attention = encoder.blocks[0].attn
    heads = encoder.config.encoder_dim // encoder.config.encoder_head_dim
    width = min(encoder.config.encoder_head_dim, len(axes.content) // heads, axes.patch_channels)
    strongest = principal(cut(latents, encoder.config.patch_size).flatten(0, 1), width)[1]
    for head in range(heads):
        rows = slice(head * attention.head_dim, head * attention.head_dim + width)
        attention.wv.weight[rows] = strongest @ axes.content[: axes.patch_channels]
        attention.proj.weight[:, rows] = axes.content[head * width : (head + 1) * width].T


def cut(latents: LatentTensor, patch_size: tuple[int, int]) -> Float[Tensor, "batch patches numbers"]:
    """Patches of latents, in the order of rows, columns and channels that the model uses."""
    height, width = patch_size
    return latents.unfold(2, height, height).unfold(3, width, width).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def contents(latents: LatentTensor, region: Region, patch_size: tuple[int, int], components: int) -> Float[Tensor, "batch _"]:
    """Content of a region's token: mean of the strongest channel, its differences, and the means of the next channels."""

    def mean(part: Region) -> Float[Tensor, "batch channels"]:
        rows = slice(part.top * patch_size[0], part.bottom * patch_size[0])
        columns = slice(part.left * patch_size[1], part.right * patch_size[1])
        return latents[:, :, rows, columns].mean(dim=(2, 3))

    upper, lower, left, right = (mean(half)[:, :1] for half in region.halves)
    means = mean(region)
    return torch.cat([means[:, :1], left - right, upper - lower, means[:, 1:]], dim=1)[:, :components]


def fit_codes(model: FlexTok, tree: Sequence[tuple[int, Region]], latents: LatentTensor) -> None:
    """Regress what each token has to say on the registers.

    Coarse regions vary less. Their registers get shorter, which makes what they gathered larger behind the layer norm.
    """
    encoder, config = model.encoder, model.config
    wanted = torch.stack([contents(latents, region, config.patch_size, len(config.levels)) for _, region in tree], dim=1)
    levels = torch.tensor([level for level, _ in tree])
    spread = torch.stack([wanted[:, levels == level].flatten(0, 1).std(dim=0) for level in levels.unique()]).clamp(min=1e-6)
    shrunk = (spread / spread[-1]).log().mean(dim=1).exp().clamp(LEAST_NORM, 1.0)
    encoder.registers.mul_(shrunk[levels, None])
    centred = CODE_SPREAD * (wanted - wanted.mean(dim=0)) / spread[levels]
    features = torch.cat([normalise(encoder.trunk(some, config.registers)) for some in latents.split(100)])
    weight, bias = least_squares(features.flatten(0, 1), (centred - model.fsq.shift(centred)).flatten(0, 1), ridge=RIDGE / 10)
    encoder.to_codes.weight.copy_(weight)
    encoder.to_codes.bias.copy_(bias)


# --------------------------------------------------------------------------------------------------------------- decoder


def initialise_decoder(decoder: Decoder, axes: Axes, tree: Sequence[tuple[int, Region]], generator: torch.Generator) -> None:
    """Patches gather the codes of the registers whose regions hold them in the first block; the noise stays beside them."""
    config, content = decoder.config, axes.content
    spare = content[axes.patch_channels :]
    components = len(config.levels)
    flag, constant = spare[components], spare[components + 1]
    decoder.patches.proj.weight.copy_(content[: axes.patch_channels].T)
    decoder.patches.proj.bias.copy_(FLAG * constant)
    decoder.from_codes.weight.copy_(spare[:components].T)
    names = torch.randn(1 + max(level for level, _ in tree), len(spare) - components, generator=generator)
    names[:, 0] = FLAG
    levels = torch.tensor([level for level, _ in tree])
    decoder.register_positions.copy_((axes.registers(tree, config.grid) + names[levels] @ spare[components:]).T[None, None])
    signs = torch.tensor([1.0, -1.0])
    for block in decoder.blocks:
        set_places(block, axes, "wk", "wq", generator)
        for name, direction in (("wq", constant), ("wk", flag)):
            for rows in getattr(block.attn, name).weight.view(-1, block.attn.head_dim, config.decoder_dim):
                free = rows[axes.grid_codes :]
                free += FLAG_GAIN * signs.repeat(-(-len(free) // 2))[: len(free), None] * direction
        nn.init.zeros_(block.modulation.weight)
        block.modulation.bias.view(2, 6, -1)[:, [GATE_ATTENTION, GATE_MLP]] = 1.0
    nn.init.zeros_(decoder.head.modulation.weight)
    attention = decoder.blocks[0].attn
    heads = config.decoder_dim // config.decoder_head_dim
    free = torch.cat([axes.halves.flatten(0, 1), spare])
    width = min(config.decoder_head_dim, len(free) // heads, len(spare))
    for head in range(heads):
        rows = slice(head * attention.head_dim, head * attention.head_dim + width)
        attention.wv.weight[rows] = spare[:width]
        attention.proj.weight[:, rows] = free[head * width : (head + 1) * width].T


def fit_head(model: FlexTok, latents: LatentTensor, generator: torch.Generator) -> None:
    """Regress the velocity at t = 1 on the patches behind the last block, each length of prefix on a part of the latents."""
    decoder, config = model.decoder, model.config
    codes = torch.cat([model.fsq(model.encoder(some)) for some in latents.split(100)])
    features, targets = [], []
    hook = decoder.head.register_forward_pre_hook(lambda _, inputs: features.append(normalise(inputs[0]).flatten(0, 1)))
    lengths = list(prefix_ladder(config.registers))
    for count, some, known in zip(lengths, latents.chunk(len(lengths)), codes.chunk(len(lengths)), strict=False):
        noise = torch.randn(some.shape, generator=generator)
        condition = prefix_condition(decoder, known[:, :count], None)
        decoder(noise, decoder.timestep(torch.ones(len(some))), condition)
        targets.append(cut(noise - some, config.patch_size).flatten(0, 1))
    hook.remove()
    weight, bias = least_squares(torch.cat(features), torch.cat(targets), ridge=RIDGE)
    decoder.head.proj.weight.copy_(weight)
    decoder.head.proj.bias.copy_(bias)


def prefix_condition(decoder: Decoder, codes: Float[Tensor, "batch count components"], null: Tensor | None) -> Condition:
    """The collapsed condition of prefixes of one length; null items have as many rows as the others."""
    dropped = decoder.config.registers - codes.shape[1]
    rows, log_count = decoder.registers(codes), codes.new_zeros(codes.shape[:2])
    if dropped:
        rows = torch.cat([rows, decoder.mask_token.expand(len(rows), 1, -1)], dim=1)
        log_count = F.pad(log_count, (0, 1), value=math.log(dropped))
    if null is not None:
        rows = torch.where(null[:, None, None], decoder.null_token, rows)
    return Condition(rows, log_count)


# ----------------------------------------------------------------------------------------------------------- autoencoder


@torch.no_grad()
def initialise_autoencoder(vae: VAE, images: Images) -> None:
    """Latents of mean 0 that are principal components of cells of pixels, strongest first, all together of variance 1."""
    network, into = vae.encoder.network, vae.encoder.quant_conv
    close_branches(network)
    channels = into.out_channels // 2
    mean = images.mean(dim=(0, 2, 3))
    pass_on(network.conv_in, 3, (CENTRE,), 0.0)
    network.conv_in.bias[:3] = -mean
    levels = [images - mean[:, None, None]]
    for block in network.down_blocks:
        shortcut = block.resnets[0].conv_shortcut
        if shortcut is not None:
            pass_on(shortcut, levels[-1].shape[1], (CENTRE,), 0.0)
        if block.downsamplers:
            levels.append(halve(block.downsamplers[0].conv, levels[-1]))
    last = network.down_blocks[-1].resnets[0].conv_shortcut
    latents = levels[-1][:, :channels]
    scale = latents.std()
    # The last norm sees latents that are faint beside constants.
    spread_out(last if last is not None else network.down_blocks[-2].downsamplers[0].conv, channels, ENCODER_SPREAD / scale)
    nn.init.constant_(network.conv_norm_out.bias, ENCODER_POINT)
    found: list[Tensor] = []
    with network.conv_out.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0])):
        for some in images.split(32):
            network(some)
    rows = torch.cat(found).permute(0, 2, 3, 1).flatten(0, 2)[:, :channels]
    weight, bias = least_squares(rows, (latents / scale).permute(0, 2, 3, 1).flatten(0, 2))
    for parameter in (network.conv_out.weight, network.conv_out.bias, into.weight, into.bias):
        nn.init.zeros_(parameter)
    network.conv_out.weight[:channels, :channels, 1, 1] = weight
    network.conv_out.bias[:channels] = bias
    into.weight[:channels, :channels, 0, 0] = torch.eye(channels)
    into.bias[channels:] = LOG_VARIANCE
    initialise_pixels(vae, latents / scale, levels[-2::-1])


def initialise_pixels(vae: VAE, latents: LatentTensor, levels: Sequence[Features]) -> None:
    """Let every doubling regress the components of the next finer level, and hand on what it got beside them.

    Args:
        latents: of the pictures.
        levels: components of the pictures at each resolution, coarse to fine; the finest are the pictures less their mean.
    """
    network = vae.decoder.network
    close_branches(network)
    channels = latents.shape[1]
    pass_on(vae.decoder.post_quant_conv, channels, (CENTRE,), 0.0)
    pass_on(network.conv_in, channels, (CENTRE,), 0.0)
    held = latents
    wanted = iter(levels)
    for block in network.up_blocks:
        shortcut = block.resnets[0].conv_shortcut
        if shortcut is not None:
            pass_on(shortcut, held.shape[1], (CENTRE,), 0.0)
            held = held[:, : shortcut.out_channels - 1]
        if block.upsamplers:
            held = double(block.upsamplers[0].conv, held, next(wanted))
    last = network.up_blocks[-1].resnets[0].conv_shortcut
    # Half of what reaches the last norm stays what it is; constants that it hardly changes take the rest.
    spread_out(network.up_blocks[-2].upsamplers[0].conv if last is None else last, network.conv_out.in_channels // 2)
    nn.init.constant_(network.conv_norm_out.bias, DECODER_POINT)
    found: list[Tensor] = []
    with network.conv_out.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0])):
        for some in latents.split(32):
            network(vae.decoder.post_quant_conv(some))
    pictures = levels[-1] + vae.encoder.network.conv_in.bias[:3].neg()[:, None, None]
    regress(network.conv_out, torch.cat(found), pictures)


def double(convolution: nn.Conv2d, inputs: Features, wanted: Features) -> Features:
    """Let a convolution regress what is wanted on inputs of half the resolution, hand on the inputs beside it, and apply it."""
    enlarged = F.interpolate(inputs, scale_factor=2.0, mode="nearest")
    held, found = inputs.shape[1], wanted.shape[1]
    regression = nn.Conv2d(held, found, 3, padding=1)
    assert regression.bias is not None
    regress(regression, enlarged, wanted)
    room = min(held, convolution.out_channels - found - 1)
    pass_on(convolution, 0, (CENTRE,), 0.0)
    convolution.weight[:found, :held] = regression.weight
    convolution.bias[:found] = regression.bias
    for channel in range(room):
        convolution.weight[found + channel, channel, 1, 1] = 1
    return torch.cat([regression(enlarged), enlarged[:, :room]], dim=1)


def halve(convolution: nn.Conv2d, inputs: Features) -> Features:
    """Let a convolution of stride 2 give the principal components of 2 x 2 cells, and apply it."""
    held, outputs = inputs.shape[1], convolution.out_channels
    cells = inputs.unfold(2, 2, 2).unfold(3, 2, 2)  # batch, channels, rows, columns, 2, 2
    vectors = cells.permute(0, 2, 3, 1, 4, 5).flatten(3)
    sample = vectors.flatten(0, 2)
    # Of the second moments: the mean of all pictures is no direction of its own.
    axes = torch.linalg.eigh(sample.T @ sample / len(sample))[1].T.flip(0)[:outputs]
    nn.init.zeros_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    convolution.weight[: len(axes), :held, :2, :2] = axes.view(-1, held, 2, 2)
    return torch.einsum("brcv,av->barc", vectors, axes).contiguous()


def spread_out(convolution: nn.Conv2d, channels: int, gain: Float[Tensor, ""] | float = 1.0) -> None:
    """Scale the first outputs of a convolution, and let the others be constants of both signs."""
    convolution.weight[:channels] *= gain
    convolution.weight[channels:] = 0
    constants = convolution.bias[channels:]
    constants.copy_(CONSTANT * (1 - 2 * (torch.arange(len(constants)) % 2)))

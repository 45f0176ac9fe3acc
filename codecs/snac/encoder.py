"""Waveform to latents."""

from __future__ import annotations

from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from zoo.codecs.snac.config import SNACConfig
from zoo.codecs.snac.layers import UNITS_REACH, Conv, LocalAttention, Mask, Snake, in_blocks, residual_units
from zoo.codecs.snac.windows import Masks, Reach, Window
from zoo.precision import Float32Module


class EncoderStage(nn.Module):
    """Residual units, then a strided convolution that doubles the channels; that one is dense always."""

    def __init__(self, channels: int, stride: int, depthwise: bool) -> None:
        super().__init__()
        self.stride = stride
        self.units = residual_units(channels, depthwise)
        self.snake = Snake(channels)
        self.down = Conv(channels, 2 * channels, 2 * stride, stride, padding=-(-stride // 2))

    def forward(
        self, x: Float[Tensor, "batch time channels"], mask: Mask | None
    ) -> Float[Tensor, "batch time_out channels_out"]:
        def run(first: int, last: int) -> Tensor:
            part = slice(first * self.stride, last * self.stride)
            y, ends = x[:, part], None if mask is None else mask[:, part]
            for unit in self.units:
                y = unit(y, ends)
            return self.down(self.snake(y), ends)

        context = -(-(UNITS_REACH + 2 * self.stride) // self.stride)
        return in_blocks(run, x, rows_in=self.stride, rows_out=1, context=context)


class Encoder(Float32Module):
    """Waveform to latents, one per ``hop_length`` samples. Stays in float32 under ``.to(dtype)``."""

    KERNEL = 7

    def __init__(self, config: SNACConfig) -> None:
        super().__init__()
        self.hop_length = config.hop_length
        halo = self.KERNEL // 2
        channels = config.encoder_dim
        self.stem = Conv(1, channels, self.KERNEL, padding=halo)
        self.stages = nn.ModuleList()
        for stride in config.encoder_rates:
            self.stages.append(EncoderStage(channels, stride, config.depthwise))
            channels *= 2
        self.attention = LocalAttention(channels, config.window) if config.attn_window_size else None
        self.out = Conv(channels, channels, self.KERNEL, padding=halo, groups=channels if config.depthwise else 1)

        first, last = 0, 0
        for module in reversed(self.stages):
            stage = cast(EncoderStage, module)
            down_padding = -(-stage.stride // 2)
            first = first * stage.stride - down_padding - UNITS_REACH
            last = last * stage.stride - down_padding + 2 * stage.stride - 1 + UNITS_REACH
        first, last = first - halo, last + halo
        #: Samples after the last one of a latent frame that it depends on, in front of attention.
        self.lookahead = last + 1 - self.hop_length
        frames = max(-(first // self.hop_length), -(-self.lookahead // self.hop_length))
        self.reach = Reach(inner=frames, window=config.window, outer=halo, unit=config.vq_strides[0])

    def forward(self, waveform: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch frames latent"]:
        """The whole waveform at once, differentiable: a whole number of `SNACConfig.unit` frames."""
        x = self.convolve(waveform, Masks())
        return self.out(x if self.attention is None else self.attention(x))

    def convolve(self, waveform: Float[Tensor, "batch samples"], masks: Masks) -> Float[Tensor, "batch frames latent"]:
        """The stack of convolutions in front of attention."""
        rate = self.hop_length
        x = self.stem(waveform[..., None], masks.at(rate))
        for module in self.stages:
            stage = cast(EncoderStage, module)
            x = stage(x, masks.at(rate))
            rate //= stage.stride
        return x

    def through(
        self, waveform: Float[Tensor, "batch samples"], window: Window, masks: Masks
    ) -> Float[Tensor, "batch frames latent"]:
        """Latents of the frames of a window from the samples that they depend on; what is behind an item's end is arbitrary."""
        x = self.convolve(waveform, masks)[:, window.middle]
        if self.attention is not None:
            x = self.attention(x)
        return self.out(x, masks.middle(window))[:, window.kept]

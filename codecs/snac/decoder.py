"""Code vectors to samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.codecs.snac.config import SNACConfig
from zoo.codecs.snac.layers import UNITS_REACH, Conv, LocalAttention, Mask, Pointwise, Snake, in_blocks, residual_units
from zoo.codecs.snac.windows import Masks, Reach, Window

#: Noise of each block, one number per time step; ``None`` for none.
Noise = Sequence[Float[Tensor, "_ _ 1"]] | None


class Upsample(nn.Module):
    """Transposed convolution of kernel ``2 * stride`` that gives exactly ``stride`` samples per sample.

    Each input makes two strides of output; the second one overlaps with the first one of the next input. Both are
    rows of a matrix: ``spread.weight`` is ``[2 * stride * channels_out, channels_in]``, early samples first.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.stride, self.padding = stride, -(-stride // 2)
        self.spread = Pointwise(channels_in, 2 * stride * channels_out, bias=False)
        self.bias = nn.Parameter(torch.zeros(channels_out))

    def forward(
        self, x: Float[Tensor, "batch time channels_in"], mask: Mask | None
    ) -> Float[Tensor, "batch time_out channels_out"]:
        if mask is not None:
            x = x * mask
        time = x.shape[1]
        now, later = self.spread(x).chunk(2, dim=2)
        total = F.pad(now, (0, 0, 0, 1)) + F.pad(later, (0, 0, 1, 0)) if torch.is_grad_enabled() else _overlapped(now, later)
        samples = total.unflatten(2, (self.stride, -1)).flatten(1, 2)
        return samples[:, self.padding : self.padding + time * self.stride] + self.bias.float()


def _overlapped(
    now: Float[Tensor, "batch time strides"], later: Float[Tensor, "batch time strides"]
) -> Float[Tensor, "batch time_and_one strides"]:
    total = now.new_empty(now.shape[0], now.shape[1] + 1, now.shape[2])
    total[:, 0], total[:, -1] = now[:, 0], later[:, -1]
    torch.add(now[:, 1:], later[:, :-1], out=total[:, 1:-1])
    return total


class DecoderStage(nn.Module):
    """Upsampling that halves the channels, noise in proportion to the signal, and residual units."""

    def __init__(self, channels: int, stride: int, noise: bool, depthwise: bool) -> None:
        super().__init__()
        self.stride = stride
        self.snake = Snake(channels)
        self.up = Upsample(channels, channels // 2, stride)
        self.noise = Pointwise(channels // 2, channels // 2, bias=False) if noise else None
        self.units = residual_units(channels // 2, depthwise)

    def forward(
        self,
        x: Float[Tensor, "batch time channels"],
        noise: Float[Tensor, "_ time_out 1"] | None,
        before: Mask | None,
        after: Float[Tensor, "batch time_out 1"] | None,
    ) -> Float[Tensor, "batch time_out channels_out"]:
        def run(first: int, last: int) -> Tensor:
            inner, outer = slice(first, last), slice(first * self.stride, last * self.stride)
            y = self.up(self.snake(x[:, inner]), None if before is None else before[:, inner])
            if self.noise is not None and noise is not None:
                y = torch.addcmul(y, noise[:, outer], self.noise(y))
            for unit in self.units:
                y = unit(y, None if after is None else after[:, outer])
            return y

        context = -(-UNITS_REACH // self.stride) + 2
        return in_blocks(run, x, rows_in=1, rows_out=self.stride, context=context)


class Decoder(nn.Module):
    """Code vectors to samples, ``hop_length`` per latent frame."""

    KERNEL = 7

    def __init__(self, config: SNACConfig) -> None:
        super().__init__()
        halo = self.KERNEL // 2
        latent, channels = config.latent_dim, config.decoder_dim
        # With dense convolutions the first one changes the width by itself.
        self.stem = Conv(
            latent,
            latent if config.depthwise else channels,
            self.KERNEL,
            padding=halo,
            groups=latent if config.depthwise else 1,
        )
        self.widen = Pointwise(latent, channels) if config.depthwise else None
        self.attention = LocalAttention(channels, config.window) if config.attn_window_size else None
        self.stages = nn.ModuleList()
        for stride in config.decoder_rates:
            self.stages.append(DecoderStage(channels, stride, config.noise, config.depthwise))
            channels //= 2
        self.snake = Snake(channels)
        self.out = Conv(channels, 1, self.KERNEL, padding=halo)
        self.rates, self.hop_length = config.decoder_rates, config.hop_length
        self.reach = Reach(inner=halo, window=config.window, outer=self._frames_seen(halo), unit=config.vq_strides[0])

    def _frames_seen(self, halo: int) -> int:
        """Latent frames on either side of one that its samples depend on, behind attention."""
        first, last = -halo, self.hop_length - 1 + halo
        for rate in reversed(self.rates):
            padding = -(-rate // 2)
            first = -((2 * rate - 1 - padding - (first - UNITS_REACH)) // rate)
            last = (last + UNITS_REACH + padding) // rate
        return max(-first, last)

    @property
    def noisy(self) -> bool:
        """Whether the blocks take noise."""
        return cast(DecoderStage, self.stages[0]).noise is not None

    def forward(self, latents: Float[Tensor, "batch frames latent"], noise: Noise) -> Float[Tensor, "batch samples"]:
        """The whole sequence at once, differentiable: a whole number of `SNACConfig.unit` frames."""
        x = self.enter(latents, None)
        return self.synthesise(x if self.attention is None else self.attention(x), noise, Masks())

    def enter(self, latents: Float[Tensor, "batch frames latent"], mask: Mask | None) -> Float[Tensor, "batch frames channels"]:
        """The convolution in front of attention."""
        x = self.stem(latents, mask)
        return x if self.widen is None else self.widen(x)

    def synthesise(
        self, x: Float[Tensor, "batch frames channels"], noise: Noise, masks: Masks
    ) -> Float[Tensor, "batch samples"]:
        """The stack of convolutions behind attention."""
        rate = 1
        for index, module in enumerate(self.stages):
            stage = cast(DecoderStage, module)
            x = stage(x, None if noise is None else noise[index], masks.at(rate), masks.at(rate * stage.stride))
            rate *= stage.stride
        return torch.tanh(self.out(self.snake(x), masks.at(rate))[..., 0])

    def through(
        self, latents: Float[Tensor, "batch frames latent"], window: Window, noise: Noise, masks: Masks
    ) -> Float[Tensor, "batch samples"]:
        """Samples of the frames of a window from the frames that they depend on; what is behind an item's end is arbitrary.

        Args:
            latents: those of ``window.first`` to ``window.last``.
            window: of the longest item.
            noise: for the frames from ``window.seen`` on.
            masks: where the items end, counted from ``window.first``.
        """
        x = self.enter(latents, masks.at(1))[:, window.middle]
        if self.attention is not None:
            x = self.attention(x)
        samples = self.synthesise(x, noise, masks.from_middle(window))
        return samples[:, window.kept.start * self.hop_length : window.kept.stop * self.hop_length]

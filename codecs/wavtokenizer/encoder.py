"""Waveform to latents, and latents to ids: the convolution and LSTM encoder, and the codebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.codecs.wavtokenizer.config import WavTokenizerConfig
from zoo.kernels.codebook import CodebookSearch
from zoo.nn.conv import ReflectConv1d, conv1d, elu, reflect_pad
from zoo.precision import Float32Module


class EncoderBlock(nn.Module):
    """Residual block of two convolutions with a convolved shortcut, both on the block's input (SEANet)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.narrow = ReflectConv1d(channels, channels // 2, kernel=3)
        self.widen = ReflectConv1d(channels // 2, channels, kernel=1)
        self.shortcut = ReflectConv1d(channels, channels, kernel=1)

    def forward(
        self, x: Float[Tensor, "batch time channels"], lengths: Int[Tensor, " batch"] | None
    ) -> Float[Tensor, "batch time channels"]:
        hidden = elu(self.narrow(x, lengths, activate=True))
        if torch.is_grad_enabled():
            return self.widen(hidden) + self.shortcut(x)
        # The product is added where the shortcut lies, which saves passes over the largest activations there are.
        total = F.linear(x, self.shortcut.weight[:, :, 0], self.shortcut.bias + self.widen.bias)
        total.view(-1, total.shape[2]).addmm_(hidden.flatten(0, 1), self.widen.weight[:, :, 0].T)
        return total


class EncoderStage(nn.Module):
    """A residual block, then a strided convolution that doubles the channels."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.block = EncoderBlock(channels)
        self.down = ReflectConv1d(channels, 2 * channels, kernel=2 * stride, stride=stride)

    def forward(
        self, x: Float[Tensor, "batch time channels"], lengths: Int[Tensor, " batch"] | None
    ) -> Float[Tensor, "batch time_out channels_out"]:
        return self.down(self.block(x, lengths), lengths, activate=True)


@dataclass
class EncoderState:
    """State that the encoder carries from one chunk to the next, for each item of the batch.

    Attributes:
        hidden, cell: LSTM state after the last chunk.
        recent: last frames before the final convolution.
    """

    hidden: Float[Tensor, "layers batch latent"]
    cell: Float[Tensor, "layers batch latent"]
    recent: Float[Tensor, "batch halo latent"]

    def rows(self, items: slice) -> EncoderState:
        """The state of some items of the batch."""
        return EncoderState(self.hidden[:, items].contiguous(), self.cell[:, items].contiguous(), self.recent[items])


class Encoder(Float32Module):
    """Waveform to latents, one per ``hop_length`` samples (paper section 3.1). Stays in float32 under ``.to(dtype)``."""

    HALO = 3
    # How far back the reflection at the end of the signal can reach into a chunk, on top of the receptive field.
    REFLECTED_HOPS = 3

    def __init__(self, config: WavTokenizerConfig) -> None:
        super().__init__()
        self.hop_length = config.hop_length
        channels = config.n_filters
        self.stem = ReflectConv1d(1, channels, kernel=7)
        self.stages = nn.ModuleList()
        for stride in config.strides:
            self.stages.append(EncoderStage(channels, stride))
            channels *= 2
        self.lstm = nn.LSTM(channels, channels, config.lstm_layers, batch_first=True)
        self.out = ReflectConv1d(channels, config.latent_dim, kernel=2 * self.HALO + 1)

        before = after = 0
        for module in reversed(self.stages):
            stage = cast(EncoderStage, module)
            before = before * stage.stride + stage.down.left + stage.block.narrow.left
            after = after * stage.stride + 2 * stage.stride - 1 - stage.down.left + stage.block.narrow.right
        #: Whole hops before a frame that its LSTM input depends on.
        self.context = -(-(before + self.stem.left) // self.hop_length)
        #: Samples after the last one of a frame that its LSTM input depends on.
        self.lookahead = after + self.stem.right + 1 - self.hop_length

    def forward(self, waveform: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch frames latent"]:
        """The whole waveform at once, differentiable; every item has the full length."""
        return self.out(self._recur(self._convolve(waveform, None), None)[0])

    def advance(
        self,
        waveform: Float[Tensor, "batch samples"],
        lengths: Sequence[int],
        state: EncoderState | None,
        *,
        context: int,
        new_frames: int | None,
    ) -> tuple[Float[Tensor, "batch frames latent"], EncoderState | None]:
        """Encode the next chunk of every item; the latents are those of the whole recording.

        Args:
            waveform: ``context`` hops that were seen before, then the new samples; item ``i`` ends at ``lengths[i]``.
            lengths: samples per item.
            state: what the chunk before returned; ``None`` at the start.
            context: hops to be seen again, at least ``self.context`` (0 at the start).
            new_frames: frames that this chunk completes (at least 4 in the first one), for which ``lookahead`` samples must
                follow; ``None`` when the items end here.

        Returns:
            Latents, which lag three frames behind until the items end, and the state for the next chunk.
        """
        ragged = torch.tensor(lengths, dtype=torch.int64, device=waveform.device) if min(lengths) < waveform.shape[1] else None
        x = self._convolve(waveform, ragged)[:, context:]
        if new_frames is not None:
            x = x[:, :new_frames]
        y, (hidden, cell) = self._recur(x.contiguous(), state)

        frames = None if ragged is None else -(-ragged // self.hop_length) - context
        if state is None:
            if new_frames is None:
                return self.out(y, frames), None
            window = torch.cat([y[:, 1 : 1 + self.HALO].flip(1), y], dim=1)
        else:
            window = torch.cat([state.recent, y], dim=1)
            if new_frames is None:
                valid = None if frames is None else frames + state.recent.shape[1]
                window = reflect_pad(window, 0, self.HALO, lengths=valid)[:, : window.shape[1] + self.HALO]
        latents = conv1d(window, self.out.weight, self.out.bias)
        if new_frames is None:
            return latents, None
        return latents, EncoderState(hidden, cell, window[:, -2 * self.HALO :])

    def _convolve(
        self, waveform: Float[Tensor, "batch samples"], lengths: Int[Tensor, " batch"] | None
    ) -> Float[Tensor, "batch frames channels"]:
        """The stack of convolutions before the LSTM; a ragged item ends at frame ``ceil(length / hop_length)``."""
        x = self.stem(waveform[..., None], lengths)
        for module in self.stages:
            stage = cast(EncoderStage, module)
            x = stage(x, lengths)
            lengths = None if lengths is None else -(-lengths // stage.stride)
        return x

    def _recur(
        self, x: Float[Tensor, "batch frames channels"], state: EncoderState | None
    ) -> tuple[Float[Tensor, "batch frames channels"], tuple[Tensor, Tensor]]:
        """LSTM with its skip connection, and the ELU that follows."""
        y, memory = self.lstm(x, None if state is None else (state.hidden, state.cell))
        return elu(y + x), memory


class Codebook(Float32Module):
    """The single codebook (paper section 3.2): latents to ids by exact nearest neighbour, ids to vectors. Stays in float32."""

    def __init__(self, config: WavTokenizerConfig) -> None:
        super().__init__()
        self.register_buffer("embed", torch.zeros(config.codebook_size, config.latent_dim))
        self._search = CodebookSearch()

    embed: Tensor

    def nearest(self, latents: Float[Tensor, "*shape latent"]) -> Int[Tensor, "*shape"]:
        """Ids of the nearest codes; the smallest id among equals."""
        return self._search(latents, self.embed)

    def forward(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape latent"]:
        return F.embedding(ids, self.embed)

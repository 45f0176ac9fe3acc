"""WavTokenizer: 24 kHz audio as one stream of 40 or 75 tokens per second.

A convolution + LSTM encoder in the manner of EnCodec, one codebook of 4096 vectors, and a decoder in the manner of Vocos
(residual blocks and one global attention, ConvNeXt blocks, inverse STFT). Paper: arXiv 2408.16532 (ICLR 2025).

Activations are stored time-major, ``[batch, time, channels]``, throughout. Both directions work on ragged batches and on
recordings of any length with the numbers of a single whole-sequence pass: the encoder walks through chunks with exact
convolution context and a carried LSTM state, the decoder normalises in two passes, attends in query blocks and runs its
ConvNeXt stack and inverse STFT in blocks with a halo.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex, Float, Int, Shaped
from torch import Tensor, nn

from zoo import media
from zoo.errors import InputError, KeysError, WeightsError
from zoo.kernels import codebook as codebook_search
from zoo.nn.conv import ReflectConv1d, conv1d, elu, reflect_pad
from zoo.nn.istft import InverseSTFT
from zoo.nn.precision import Float32Module, exact_float32
from zoo.spec import Spec
from zoo.tokenizer import Tokenizer, as_items, groups_of_similar_length, naming_item, progress_bar
from zoo.tokens import Tokens

# Fixed in the original code for every checkpoint.
GROUPS = 32
EPS = 1e-6
MAGNITUDE_LIMIT = 100.0


@dataclass(frozen=True)
class WavTokenizerConfig:
    """Sizes of one model; the defaults are the official 75-tokens-per-second checkpoints.

    Attributes:
        ratios: up-sampling ratios in decoder order, as upstream writes them; the encoder's strides are the reverse.
        latent_dim: width of the encoder output, of a codebook vector and of the LSTM.
        n_filters: channels after the first convolution; they double with every stride.
        lstm_layers: layers of the LSTM.
        codebook_size: number of codes.
        dim, intermediate_dim, num_layers: widths and depth of the ConvNeXt stack.
        num_bandwidths: rows of the adaptive layer norms; all were trained alike and row 0 is the one in use.
        sample_rate: samples per second.
    """

    ratios: tuple[int, ...] = (8, 5, 4, 2)
    latent_dim: int = 512
    n_filters: int = 32
    lstm_layers: int = 2
    codebook_size: int = 4096
    dim: int = 768
    intermediate_dim: int = 2304
    num_layers: int = 12
    num_bandwidths: int = 4
    sample_rate: int = 24_000

    def __post_init__(self) -> None:
        if self.dim % GROUPS:
            raise ValueError(f"dim must be a multiple of {GROUPS}, not {self.dim}")
        if len(self.ratios) != 4 or min(self.ratios) < 2:
            raise ValueError(f"ratios must be four integers of at least 2, not {self.ratios}")

    @property
    def strides(self) -> tuple[int, ...]:
        """Encoder strides, first to last."""
        return self.ratios[::-1]

    @property
    def hop_length(self) -> int:
        """Samples per token."""
        return math.prod(self.ratios)


# --------------------------------------------------------------------------------------------------------------- encoder


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
    """What the encoder carries from one chunk to the next, for each item of the batch.

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
        ragged = torch.tensor(lengths, device=waveform.device) if min(lengths) < waveform.shape[1] else None
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


# -------------------------------------------------------------------------------------------------------------- codebook


class Codebook(Float32Module):
    """The single codebook (paper section 3.2): latents to ids by exact nearest neighbour, ids to vectors. Stays in float32."""

    def __init__(self, config: WavTokenizerConfig) -> None:
        super().__init__()
        self.register_buffer("embed", torch.zeros(config.codebook_size, config.latent_dim))
        self._prepared: tuple[tuple[int, int, torch.device], codebook_search.PreparedCodebook] | None = None

    embed: Tensor

    def nearest(self, latents: Float[Tensor, "*shape latent"]) -> Int[Tensor, "*shape"]:
        """Ids of the nearest codes; the smallest id among equals."""
        version = (self.embed.data_ptr(), 0 if self.embed.is_inference() else self.embed._version, self.embed.device)
        if self._prepared is None or self._prepared[0] != version:
            self._prepared = (version, codebook_search.prepare(self.embed))
        return codebook_search.nearest(latents, self._prepared[1])

    def forward(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape latent"]:
        return F.embedding(ids, self.embed)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": None}


# --------------------------------------------------------------------------------------------------------------- decoder
#
# The stream of activations stays in float32; matrix products run in the precision of their weights. ``mask`` marks the
# valid frames of a ragged batch and is None when all frames are valid. What stands in the invalid frames is arbitrary: it
# is masked wherever frames mix (convolution, statistics, keys, overlap-add).

Mask = Bool[Tensor, "batch frames 1"]


def _spans(frames: int, block: int) -> Iterator[tuple[int, int]]:
    """Cut ``frames`` into blocks of nearly equal size, at most ``block``."""
    count = -(-frames // block)
    for index in range(count):
        yield index * frames // count, (index + 1) * frames // count


def _window(
    x: Shaped[Tensor, "batch frames channels"], start: int, stop: int, halo: int
) -> tuple[Shaped[Tensor, "batch window channels"], int]:
    """The frames from ``start`` to ``stop`` with up to ``halo`` more on either side, and how many were added in front."""
    first = max(0, start - halo)
    return x[:, first : stop + halo], start - first


class GroupNorm(Float32Module):
    """Group normalisation over time-major activations, expressed as one scale and shift per item and channel.

    Statistics run over all valid frames, in two passes, so that the normalisation can be applied block by block.
    """

    BLOCK = 1024

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def coefficients(
        self, x: Float[Tensor, "batch frames channels"], mask: Mask | None
    ) -> tuple[Float[Tensor, "batch 1 channels"], Float[Tensor, "batch 1 channels"]]:
        """``scale`` and ``shift`` such that the normalised activations are ``x * scale + shift``."""
        batch, frames, channels = x.shape
        valid = torch.full((batch, 1), frames, device=x.device) if mask is None else mask.sum(1)
        count = valid * (channels // GROUPS)
        spans = list(_spans(frames, self.BLOCK))

        def total(block_values: Iterator[Tensor]) -> Float[Tensor, "batch groups"]:
            """Sum per group over all frames; masked frames contribute nothing."""
            sums = [values.sum(1).view(batch, GROUPS, -1).sum(2) for values in block_values]
            return torch.stack(sums).sum(0)

        def masked(values: Tensor, start: int, stop: int) -> Tensor:
            return values if mask is None else values * mask[:, start:stop]

        mean = total(masked(x[:, a:b], a, b) for a, b in spans) / count
        mean = mean.repeat_interleave(channels // GROUPS, dim=1)[:, None]
        variance = total(masked((x[:, a:b] - mean).square(), a, b) for a, b in spans) / count
        scale = (variance + EPS).rsqrt().repeat_interleave(channels // GROUPS, dim=1)[:, None] * self.weight
        return scale, self.bias - mean * scale


class ResidualBlock(nn.Module):
    """Two convolutions, each behind a group norm and SiLU, around a skip connection."""

    BLOCK = 2048

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(channels)
        self.conv1 = nn.Conv1d(channels, channels, kernel_size=3)
        self.norm2 = GroupNorm(channels)
        self.conv2 = nn.Conv1d(channels, channels, kernel_size=3)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Float[Tensor, "batch frames channels"], mask: Mask | None) -> Float[Tensor, "batch frames channels"]:
        hidden = self._normalise_and_convolve(x, self.norm1, self.conv1, mask)
        return x + self._normalise_and_convolve(hidden, self.norm2, self.conv2, mask)

    def _normalise_and_convolve(
        self, x: Float[Tensor, "batch frames channels"], norm: GroupNorm, conv: nn.Conv1d, mask: Mask | None
    ) -> Float[Tensor, "batch frames channels"]:
        scale, shift = norm.coefficients(x, mask)
        frames = x.shape[1]
        blocks = []
        for start, stop in _spans(frames, self.BLOCK):
            window, before = _window(x, start, stop, halo=1)
            active = F.silu(torch.addcmul(shift, window, scale), inplace=not torch.is_grad_enabled())
            if mask is not None:
                active = active * _window(mask, start, stop, halo=1)[0]
            if norm is self.norm2:
                active = self.dropout(active)
            after = window.shape[1] - before - (stop - start)
            active = F.pad(active.to(conv.weight.dtype), (0, 0, 1 - before, 1 - after))
            blocks.append(conv1d(active, conv.weight, conv.bias).float())
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


class Attention(nn.Module):
    """One global self-attention head over all frames, without positions. Queries go block by block."""

    BLOCK = 1024

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Float[Tensor, "batch frames channels"], mask: Mask | None) -> Float[Tensor, "batch frames channels"]:
        scale, shift = self.norm.coefficients(x, mask)
        q_weight, kv_weight = self.qkv.weight.split([x.shape[2], 2 * x.shape[2]])
        q_bias, kv_bias = self.qkv.bias.split([x.shape[2], 2 * x.shape[2]])
        spans = list(_spans(x.shape[1], self.BLOCK))

        def normalised(start: int, stop: int) -> Tensor:
            return torch.addcmul(shift, x[:, start:stop], scale).to(self.qkv.weight.dtype)

        keys_values = torch.cat([F.linear(normalised(a, b), kv_weight, kv_bias) for a, b in spans], dim=1)
        keys, values = keys_values.chunk(2, dim=2)
        hidden = None if mask is None else torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -math.inf)
        blocks = []
        for start, stop in spans:
            queries = F.linear(normalised(start, stop), q_weight, q_bias) * x.shape[2] ** -0.5
            scores = (queries @ keys.transpose(1, 2)).float()
            if hidden is not None:
                scores = scores + hidden.transpose(1, 2)
            attended = scores.softmax(dim=2).to(values.dtype) @ values
            blocks.append(x[:, start:stop] + self.proj_out(attended))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


class AdaptiveLayerNorm(Float32Module):
    """Layer norm whose scale and shift are looked up by bandwidth id."""

    def __init__(self, num_bandwidths: int, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_bandwidths, channels))
        self.shift = nn.Parameter(torch.zeros(num_bandwidths, channels))

    def forward(self, x: Float[Tensor, "batch frames channels"], bandwidth_id: int) -> Float[Tensor, "batch frames channels"]:
        return F.layer_norm(x, x.shape[-1:], self.scale[bandwidth_id], self.shift[bandwidth_id], EPS)


class ConvNeXtBlock(nn.Module):
    """Depth-wise convolution, adaptive layer norm, two-layer perceptron, layer scale and skip (arXiv 2201.03545, Vocos)."""

    HALO = 3

    def __init__(self, config: WavTokenizerConfig) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(config.dim, config.dim, kernel_size=2 * self.HALO + 1, groups=config.dim)
        self.norm = AdaptiveLayerNorm(config.num_bandwidths, config.dim)
        self.pwconv1 = nn.Linear(config.dim, config.intermediate_dim)
        self.pwconv2 = nn.Linear(config.intermediate_dim, config.dim)
        self.gamma = nn.Parameter(torch.full((config.dim,), 1 / config.num_layers))

    def forward(
        self, x: Float[Tensor, "batch frames channels"], mask: Mask | None, bandwidth_id: int
    ) -> Float[Tensor, "batch frames channels"]:
        padded = F.pad(x if mask is None else x * mask, (0, 0, self.HALO, self.HALO))
        assert self.dwconv.bias is not None
        mixed = conv1d(padded, self.dwconv.weight.float(), self.dwconv.bias.float(), groups=x.shape[2])
        hidden = self.norm(mixed, bandwidth_id).to(self.pwconv1.weight.dtype)
        return torch.addcmul(x, self.gamma.float(), self.pwconv2(F.gelu(self.pwconv1(hidden))).float())


class Backbone(nn.Module):
    """Code vectors to decoder frames (paper section 3.3): residual blocks and attention, then the ConvNeXt stack."""

    HALO = 3

    def __init__(self, config: WavTokenizerConfig) -> None:
        super().__init__()
        self.embed = nn.Conv1d(config.latent_dim, config.dim, kernel_size=2 * self.HALO + 1)
        self.pos_net = nn.ModuleList(
            [
                ResidualBlock(config.dim),
                ResidualBlock(config.dim),
                Attention(config.dim),
                ResidualBlock(config.dim),
                ResidualBlock(config.dim),
            ]
        )
        self.pos_norm = GroupNorm(config.dim)
        self.norm = AdaptiveLayerNorm(config.num_bandwidths, config.dim)
        self.convnext = nn.ModuleList([ConvNeXtBlock(config) for _ in range(config.num_layers)])
        self.final_layer_norm = nn.LayerNorm(config.dim, eps=EPS)
        # The original initialises these before it creates pos_net, which keeps PyTorch's defaults.
        for module in (self.embed, *self.convnext.modules()):
            if isinstance(module, nn.Conv1d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def halo(self) -> int:
        """Frames on either side that `refine` needs for an exact result."""
        return ConvNeXtBlock.HALO * len(self.convnext)

    def mix(
        self, latents: Float[Tensor, "batch frames latent"], mask: Mask | None
    ) -> tuple[Float[Tensor, "batch frames channels"], tuple[Tensor, Tensor]]:
        """The part in which every frame depends on the whole sequence; also the coefficients of its last group norm."""
        padded = F.pad(latents.to(self.embed.weight.dtype), (0, 0, self.HALO, self.HALO))
        x = conv1d(
            padded if mask is None else padded * F.pad(mask, (0, 0, self.HALO, self.HALO)), self.embed.weight, self.embed.bias
        ).float()
        for layer in self.pos_net:
            x = layer(x, mask)
        return x, self.pos_norm.coefficients(x, mask)

    def refine(
        self,
        x: Float[Tensor, "batch frames channels"],
        coefficients: tuple[Tensor, Tensor],
        mask: Mask | None,
        bandwidth_id: int,
    ) -> Float[Tensor, "batch frames channels"]:
        """The part with a finite receptive field, exact ``halo`` frames away from a cut."""
        scale, shift = coefficients
        x = self.norm(torch.addcmul(shift, x, scale), bandwidth_id)
        for block in self.convnext:
            x = block(x, mask, bandwidth_id)
        norm = self.final_layer_norm
        return F.layer_norm(x, x.shape[-1:], norm.weight.float(), norm.bias.float(), EPS)


class Head(nn.Module):
    """Frames to a complex spectrum, log-magnitude and phase side by side, and to samples (Vocos section 3)."""

    def __init__(self, config: WavTokenizerConfig) -> None:
        super().__init__()
        self.istft = InverseSTFT(config.hop_length)
        self.out = nn.Linear(config.dim, self.istft.n_fft + 2)

    def spectrum(self, x: Float[Tensor, "batch frames channels"], mask: Mask | None) -> Complex[Tensor, "batch frames bins"]:
        log_magnitude, phase = self.out(x.to(self.out.weight.dtype)).float().chunk(2, dim=2)
        magnitude = log_magnitude.exp().clamp(max=MAGNITUDE_LIMIT)
        if mask is not None:
            magnitude = magnitude * mask
        return torch.complex(magnitude * phase.cos(), magnitude * phase.sin())


# ------------------------------------------------------------------------------------------------------------- tokenizer


class WavTokenizer(Tokenizer[WavTokenizerConfig]):
    """The single-codebook audio tokenizer of arXiv 2408.16532.

    Audio of any sample rate and channel count is averaged to mono and resampled to 24 kHz; the tokens remember the original
    rate and length. ``ceil(samples / hop_length)`` ids come out per item, in time order. Encoding always runs in float32,
    whatever the dtype of the model, autocast or TF32 settings, because two thirds of the ids change in bfloat16.
    """

    Config = WavTokenizerConfig
    family = "wavtokenizer"
    modality = "audio"
    identity = ("codebook.embed",)

    # Samples in flight per encoding step and decoder frames per step: small enough for the caches of a CPU, large enough to
    # fill a GPU. They change memory and speed, never the numbers.
    CHUNK_SAMPLES: ClassVar[dict[str, int]] = {"cpu": 128_000, "cuda": 8_000_000}
    BLOCK_FRAMES: ClassVar[dict[str, int]] = {"cpu": 1_500, "cuda": 60_000}

    def __init__(self, config: WavTokenizerConfig | None = None, *, name: str = "wavtokenizer") -> None:
        super().__init__(config or WavTokenizerConfig(), name)
        self.encoder = Encoder(self.config)
        self.codebook = Codebook(self.config)
        self.backbone = Backbone(self.config)
        self.head = Head(self.config)

    @property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            family=self.family,
            modality="audio",
            vocab_size=self.config.codebook_size,
            dim=self.config.latent_dim,
            fingerprint=self.fingerprint,
            sample_rate=self.config.sample_rate,
            hop_length=self.config.hop_length,
        )

    # ---- encode

    def encode(self, items: Any, *, progress: bool = False) -> Tokens:
        """Audio to tokens.

        Args:
            items: one item or a list of them, each a path, the bytes of an audio file, ``(array, sample_rate)`` or an array or
                tensor at the model's rate, ``[samples]`` or ``[channels, samples]``. Integer arrays are scaled to [-1, 1).
                A tensor ``[batch, channels, samples]`` is a list. Channels are averaged.
            progress: show a progress bar over chunks of audio.

        Raises:
            InputError: an item is empty, unreadable, not finite or of the wrong kind; names the item.
        """
        prepared = [self._prepare(index, item) for index, item in enumerate(as_items(items, batch_rank=3))]
        ids = self._encode_waveforms([waveform for waveform, _ in prepared], progress)
        return self.tokens(ids, [meta for _, meta in prepared])

    def _prepare(self, index: int, item: Any) -> tuple[Float[Tensor, " samples"], dict[str, int]]:
        with naming_item(index):
            rate = self.config.sample_rate
            audio = media.read_audio(item, sample_rate=rate, mono=True, default_sample_rate=rate)
            return audio.waveform[0], {"samples": audio.original_samples, "sample_rate": audio.original_rate}

    @torch.inference_mode()
    def _encode_waveforms(self, waveforms: Sequence[Float[Tensor, " _"]], progress: bool) -> list[Int[Tensor, " _"]]:
        """Ids of every waveform, in lockstep chunk by chunk, each as if it were alone."""
        order = sorted(range(len(waveforms)), key=lambda i: -len(waveforms[i]))
        ids: list[list[Tensor]] = [[] for _ in waveforms]
        budget = self.CHUNK_SAMPLES.get(self.device.type, self.CHUNK_SAMPLES["cuda"])
        hop = self.config.hop_length
        group_size = max(1, budget // (16 * hop))
        total = sum(-(-len(waveform) // hop) for waveform in waveforms)
        with exact_float32(self.device), progress_bar("encode", total, progress) as advance:
            for first in range(0, len(order), group_size):
                group = order[first : first + group_size]
                chunk = max(16, budget // (len(group) * hop))
                for item, found in self._encode_lockstep([waveforms[i] for i in group], chunk):
                    ids[group[item]].append(found)
                    advance(len(found))
        return [torch.cat(parts) for parts in ids]

    def _encode_lockstep(
        self, waveforms: Sequence[Float[Tensor, " _"]], chunk: int
    ) -> Iterator[tuple[int, Int[Tensor, " frames"]]]:
        """Ids of waveforms sorted longest first, ``chunk`` frames at a time, as ``(item, ids)``."""
        hop, encoder = self.config.hop_length, self.encoder
        state: EncoderState | None = None
        active = len(waveforms)
        start = 0
        while active:
            need = (start + chunk) * hop + encoder.lookahead
            staying = sum(len(waveform) > need for waveform in waveforms[:active])
            following: EncoderState | None = None
            for items, new_frames in ((slice(0, staying), chunk), (slice(staying, active), None)):
                if items.start == items.stop:
                    continue
                kept_hops = encoder.context + (encoder.REFLECTED_HOPS if new_frames is None else 0)
                context = min(start, kept_hops)
                begin = (start - context) * hop
                end = need if new_frames is not None else None
                pieces = [waveform[begin:end].to(self.device) for waveform in waveforms[items]]
                latents, advanced = encoder.advance(
                    nn.utils.rnn.pad_sequence(pieces, batch_first=True),
                    [len(piece) for piece in pieces],
                    None if state is None else state.rows(items),
                    context=context,
                    new_frames=new_frames,
                )
                found = self.codebook.nearest(latents)
                lag = 0 if start == 0 else encoder.HALO
                for row, item in enumerate(range(items.start, items.stop)):
                    if new_frames is None:
                        frames = -(-len(waveforms[item]) // hop) - start + lag
                        yield item, found[row, :frames]
                    else:
                        yield item, found[row]
                following = advanced if new_frames is not None else following
            state, active, start = following, staying, start + chunk

    def stream_encoder(self, sample_rate: int | None = None) -> StreamEncoder:
        """Encode audio as it arrives, with exactly the ids of the whole recording; see `StreamEncoder`."""
        return StreamEncoder(self, sample_rate or self.config.sample_rate)

    # ---- decode

    def decode(
        self,
        tokens: Tokens | Tensor | Sequence[Tensor],
        *,
        bandwidth_id: int = 0,
        trim: bool = True,
        sample_rate: int | Literal["original"] | None = None,
        window: int | None = None,
        progress: bool = False,
    ) -> list[Float[Tensor, "1 _"]]:
        """Tokens to audio: a list of float tensors ``[1, samples]``, nominally in [-1, 1], not clipped.

        Args:
            tokens: what `encode` returned, or bare ids ``[batch, length]`` (right-padded with -1) or a list of ``[length]``.
            bandwidth_id: row of the adaptive layer norms; all rows were trained alike.
            trim: cut to the length of the encoded audio; otherwise ``length * hop_length`` samples.
            sample_rate: resample the result; ``"original"`` gives back each item's own rate and number of samples.
            window: decode in windows of that many frames, cross-faded. An approximation: every frame of the exact result
                depends on the whole sequence. For hours of audio, and what `stream_decoder` does.
            progress: show a progress bar.

        Raises:
            MismatchError: the tokens belong to another checkpoint.
            InputError: an id is out of range, or an item is empty.
        """
        tokens = self._check(tokens)
        if not 0 <= bandwidth_id < self.config.num_bandwidths:
            raise InputError(f"bandwidth_id must lie in [0, {self.config.num_bandwidths}), not {bandwidth_id}")
        if window is not None:
            decoded = [self._decode_windowed(ids, bandwidth_id, window) for ids in tokens.unpadded()]
        else:
            decoded = self._decode_exact(tokens, bandwidth_id, progress)
        return [
            self._finish_item(audio[None], tokens.meta[i] if tokens.meta else {}, trim, sample_rate)
            for i, audio in enumerate(decoded)
        ]

    def _finish_item(
        self, audio: Float[Tensor, "1 samples"], meta: Mapping[str, Any], trim: bool, sample_rate: int | str | None
    ) -> Float[Tensor, "1 _"]:
        own_rate = self.config.sample_rate
        samples, original_rate = meta.get("samples"), meta.get("sample_rate", own_rate)
        if trim and samples is not None:
            audio = audio[:, : media.resampled_length(samples, original_rate, own_rate)]
        wanted = original_rate if sample_rate == "original" else sample_rate or own_rate
        if wanted != own_rate:
            audio = media.resample(audio, own_rate, int(wanted))
            if trim and samples is not None and wanted == original_rate:
                audio = audio[:, :samples]
        return audio

    @torch.inference_mode()
    def _decode_exact(self, tokens: Tokens, bandwidth_id: int, progress: bool) -> list[Float[Tensor, " _"]]:
        lengths = tokens.lengths.tolist()
        decoded: dict[int, Tensor] = {}
        block = self.BLOCK_FRAMES.get(self.device.type, self.BLOCK_FRAMES["cuda"])
        with exact_float32(self.device), progress_bar("decode", sum(lengths), progress) as advance:
            for group in groups_of_similar_length(lengths, budget=block):
                longest = max(lengths[i] for i in group)
                ids = tokens.ids[group, :longest].to(self.device)
                mask = None
                if min(lengths[i] for i in group) < longest:
                    mask = (ids >= 0)[..., None]
                total = self._synthesise(self.codebook(ids.clamp(min=0)), mask, bandwidth_id)
                for row, item in enumerate(group):
                    decoded[item] = self.head.istft.finish(total[row : row + 1], lengths[item])[0].clone()
                    advance(lengths[item])
        return [decoded[i] for i in range(len(lengths))]

    def _synthesise(
        self, latents: Float[Tensor, "batch frames latent"], mask: Mask | None, bandwidth_id: int
    ) -> Float[Tensor, "batch samples"]:
        """Overlap-added frames, before the envelope is divided out and the ends are cut."""
        batch, frames, _ = latents.shape
        hop, istft, halo = self.config.hop_length, self.head.istft, self.backbone.halo
        x, coefficients = self.backbone.mix(latents, mask)
        block = max(8 * halo, self.BLOCK_FRAMES.get(latents.device.type, self.BLOCK_FRAMES["cuda"]) // batch)
        total = x.new_zeros(batch, (frames + istft.OVERLAP - 1) * hop)
        for start, stop in _spans(frames, block):
            window, before = _window(x, start, stop, halo)
            window_mask = None if mask is None else _window(mask, start, stop, halo)[0]
            refined = self.backbone.refine(window, coefficients, window_mask, bandwidth_id)
            kept = slice(before, before + stop - start)
            spectrum = self.head.spectrum(refined[:, kept], None if mask is None else mask[:, start:stop])
            total[:, start * hop : (stop + istft.OVERLAP - 1) * hop] += istft.overlap_add(spectrum)
        return total

    def decode_latents(
        self, latents: Float[Tensor, "batch frames latent"], bandwidth_id: int = 0
    ) -> Float[Tensor, "batch samples"]:
        """Latents to audio at once, differentiable: ``samples = frames * hop_length``. What training calls."""
        x, coefficients = self.backbone.mix(latents, None)
        return self.head.istft(self.head.spectrum(self.backbone.refine(x, coefficients, None, bandwidth_id), None))

    def _decode_windowed(self, ids: Int[Tensor, " frames"], bandwidth_id: int, window: int) -> Float[Tensor, " samples"]:
        with self.stream_decoder(window=window, bandwidth_id=bandwidth_id) as stream:
            return torch.cat([stream.push(ids), stream.finish()], dim=1)[0]

    def stream_decoder(self, *, window: int = 300, bandwidth_id: int = 0) -> StreamDecoder:
        """Decode ids as they arrive, approximately, in cross-faded windows; see `StreamDecoder`."""
        return StreamDecoder(self, window, bandwidth_id)

    # ---- embed

    def embed(self, tokens: Tokens | Tensor | Sequence[Tensor]) -> Float[Tensor, "batch length dim"]:
        """The codebook vectors of the ids, zero where an item has ended."""
        ids = self._check(tokens).ids.to(self.device)
        return self.codebook(ids.clamp(min=0)) * (ids >= 0)[..., None]

    # ---- official checkpoints

    def compile_modules(self) -> None:
        """Compile the decoder's blocks; the first calls are slow. The encoder writes into its buffers by hand instead."""
        for module in (*self.backbone.pos_net, *self.backbone.convnext):
            module.compile(dynamic=True)

    @classmethod
    def recognises(cls, keys: Collection[str]) -> bool:
        head = "head.out.weight" in keys or "head.linear.weight" in keys
        return head and "backbone.pos_net.2.q.weight" in keys and "backbone.norm.scale.weight" in keys

    @classmethod
    def wanted(cls, key: str) -> bool:
        return not _DROPPED.match(key)

    @classmethod
    def upstream_config(cls, raw: Mapping[str, Any]) -> WavTokenizerConfig | None:
        """Read ``model.init_args.{feature_extractor,backbone,head}.init_args`` of upstream's yaml; class paths are ignored."""
        model = raw.get("model")
        if not isinstance(model, Mapping):
            return None
        try:
            parts = {name: model["init_args"][name]["init_args"] for name in ("feature_extractor", "backbone", "head")}
            features, backbone, head = parts["feature_extractor"], parts["backbone"], parts["head"]
            ratios = tuple(features.get("dowmsamples") or features["downsamples"])
            encoder = raw.get("overrides", {}).get("seanet_encoder", {})
            config = WavTokenizerConfig(
                ratios=ratios,
                latent_dim=backbone["input_channels"],
                n_filters=encoder.get("n_filters", WavTokenizerConfig.n_filters),
                lstm_layers=encoder.get("lstm", WavTokenizerConfig.lstm_layers),
                codebook_size=features["vq_bins"],
                dim=backbone["dim"],
                intermediate_dim=backbone["intermediate_dim"],
                num_layers=backbone["num_layers"],
                num_bandwidths=backbone.get("adanorm_num_embeddings", WavTokenizerConfig.num_bandwidths),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"the WavTokenizer configuration cannot be used: {error!r}") from error
        if features.get("num_quantizers", 1) != 1:
            raise WeightsError("only checkpoints with a single quantizer exist; num_quantizers must be 1")
        hop = config.hop_length
        if (head["hop_length"], head["n_fft"]) != (hop, 4 * hop):
            raise WeightsError(
                f"the head's hop_length {head['hop_length']} and n_fft {head['n_fft']} do not fit ratios {ratios}, "
                f"which make {hop} and {4 * hop}"
            )
        return config

    @classmethod
    def convert_checkpoint(
        cls, state: Mapping[str, Tensor], config: WavTokenizerConfig | None
    ) -> tuple[WavTokenizerConfig, dict[str, Tensor]]:
        """Rename upstream's tensors, fold weight norm (old and new style, or folded already), and infer the sizes.

        The key layout of the public safetensors conversions is accepted as well.
        """
        named: dict[str, Tensor] = {}
        unexpected = []
        for key, tensor in state.items():
            if not cls.wanted(key):
                continue
            name = _rename(key)
            if name is None:
                unexpected.append(key)
            else:
                named[name] = tensor
        if unexpected:
            raise KeysError(f"unexpected in a WavTokenizer checkpoint: {_listing(unexpected)}")

        inited = named.pop("codebook.inited", None)
        if inited is not None and not bool(inited.any()):
            raise KeysError("the codebook of this checkpoint was never initialised (inited is 0)")
        for name in [name for name in named if name.endswith(".weight_v")]:
            stem = name.removesuffix("_v")
            if f"{stem}_g" not in named:
                raise KeysError(f"{name} has no {stem}_g beside it")
            direction, gain = named.pop(name).float(), named.pop(f"{stem}_g").float()
            named[stem] = gain * (direction / direction.flatten(1).norm(dim=1)[:, None, None])
        attention = "backbone.pos_net.2"
        for kind in ("weight", "bias"):
            parts = [named.pop(f"{attention}.{part}.{kind}", None) for part in "qkv"]
            if all(part is not None for part in parts):
                fused = torch.cat([part for part in parts if part is not None])
                named[f"{attention}.qkv.{kind}"] = fused[:, :, 0] if kind == "weight" else fused
        if f"{attention}.proj_out.weight" in named:
            named[f"{attention}.proj_out.weight"] = named[f"{attention}.proj_out.weight"][:, :, 0]

        inferred = _infer_config(named)
        if config is not None and replace(inferred, sample_rate=config.sample_rate) != config:
            differing = [
                f"{name} is {getattr(inferred, name)} in the tensors and {getattr(config, name)} in the configuration"
                for name in config.__dataclass_fields__
                if name != "sample_rate" and getattr(inferred, name) != getattr(config, name)
            ]
            raise KeysError(f"the checkpoint does not fit its configuration: {'; '.join(differing)}")
        config = config or inferred

        with torch.device("meta"):
            expected = cls(config).state_dict()
        missing = sorted(expected.keys() - named.keys())
        if missing or (surplus := sorted(named.keys() - expected.keys())):
            raise KeysError(f"missing: {_listing(missing)}" if missing else f"unexpected: {_listing(surplus)}")
        wrong = [
            f"{name} is {list(named[name].shape)}, not {list(tensor.shape)}"
            for name, tensor in expected.items()
            if named[name].shape != tensor.shape
        ]
        if wrong:
            raise KeysError(f"wrong shapes: {_listing(wrong)}")
        return config, named


# Not needed for inference: discriminators and their losses, the SEANet decoder that upstream builds and never runs, the
# Hann window, and the codebook's training statistics.
_DROPPED = re.compile(
    r"multiperioddisc\.|multiresddisc\.|dac\.|dacdiscriminator\.|melspec_loss\."
    r"|feature_extractor\.encodec\.decoder\.|head\.istft\.window$"
    r"|.*codebook\.(cluster_size|embed_avg)$"
)

_CODEBOOK = re.compile(
    r"(?:feature_extractor\.encodec\.quantizer\.vq\.layers\.0\._codebook|(?:encoder_model\.)?quantizer\.codebook)\.(\w+)"
)
_ENCODER = re.compile(r"(?:feature_extractor\.encodec\.encoder\.model|(?:encoder_model\.)?encoder\.layers)\.(\d+)\.(.+)")
_BACKBONE = (
    (re.compile(r"head\.(?:out|linear)\."), "head.out."),
    (re.compile(r"backbone\.pos_net\.5\."), "backbone.pos_norm."),
    (re.compile(r"(backbone\..*norm\.(?:scale|shift))\.weight"), r"\1"),
)
# The two spellings of PyTorch's weight norm.
_WEIGHT_NORM = (("parametrizations.weight.original0", "weight_g"), ("parametrizations.weight.original1", "weight_v"))


def _rename(key: str) -> str | None:
    """Our name for an entry of an official checkpoint or of a public conversion; ``None`` if it belongs to neither."""
    if found := _CODEBOOK.fullmatch(key):
        return f"codebook.{found[1]}"
    if found := _ENCODER.fullmatch(key):
        for theirs, ours in _WEIGHT_NORM:
            key = found[2].replace(theirs, ours)
            if key != found[2]:
                break
        return _rename_encoder_layer(int(found[1]), key)
    if not key.startswith(("backbone.", "head.")):
        return None
    for pattern, ours in _BACKBONE:
        key = pattern.sub(ours, key)
    return key


def _rename_encoder_layer(index: int, rest: str) -> str | None:
    """Upstream counts one flat list of layers, activations included: a stage is a block, an ELU and a convolution."""
    if index == 13:
        return f"encoder.{rest}"
    stage, place = divmod(index - 1, 3)
    prefix, _, kind = rest.replace(".conv.conv.", ".conv.").rpartition("conv.")
    if prefix == "conv.":
        prefix = ""
    if index in (0, 15):
        return f"encoder.{'stem' if index == 0 else 'out'}.{kind}" if not prefix else None
    if stage < 4 and place == 2:
        return f"encoder.stages.{stage}.down.{kind}" if not prefix else None
    part = {"block.1.": "narrow", "block.3.": "widen", "shortcut.": "shortcut"}.get(prefix)
    return f"encoder.stages.{stage}.block.{part}.{kind}" if stage < 4 and place == 0 and part else None


def _infer_config(named: Mapping[str, Tensor]) -> WavTokenizerConfig:
    """The sizes that the shapes of our tensors imply."""

    def shape(name: str) -> torch.Size:
        if name not in named:
            raise KeysError(f"missing: {name}")
        return named[name].shape

    kernels = [shape(f"encoder.stages.{stage}.down.weight")[2] for stage in range(4)]
    if any(kernel % 2 for kernel in kernels):
        raise KeysError(f"the strided convolutions have kernels {kernels}, which are not twice a stride")
    ratios = tuple(kernel // 2 for kernel in reversed(kernels))
    spectrum_rows = shape("head.out.weight")[0]
    if spectrum_rows != 4 * math.prod(ratios) + 2:
        raise KeysError(
            f"head.out has {spectrum_rows} rows, but strides {ratios[::-1]} make a hop of {math.prod(ratios)} samples, "
            f"which needs {4 * math.prod(ratios) + 2}"
        )
    layers = {int(found[1]) for name in named if (found := re.match(r"backbone\.convnext\.(\d+)\.", name))}
    return WavTokenizerConfig(
        ratios=ratios,
        latent_dim=shape("encoder.out.weight")[0],
        n_filters=shape("encoder.stem.weight")[0],
        lstm_layers=sum(name.startswith("encoder.lstm.weight_ih_l") for name in named),
        codebook_size=shape("codebook.embed")[0],
        dim=shape("backbone.embed.weight")[0],
        intermediate_dim=shape("backbone.convnext.0.pwconv1.weight")[0],
        num_layers=len(layers),
        num_bandwidths=shape("backbone.norm.scale")[0],
    )


def _listing(names: Sequence[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


# ------------------------------------------------------------------------------------------------------------- streaming


class StreamEncoder:
    """Encodes audio as it arrives; the ids are exactly those of the whole recording, however it is cut.

    A frame's id is final ``latency`` seconds after the frame began. Use as a context manager, or call `finish` at the end::

        with tokenizer.stream_encoder() as stream:
            for chunk in microphone:
                ids = stream.push(chunk)
        tokens = stream.tokens
    """

    # The left reflection at the very start needs this many frames before it can be told.
    FIRST_FRAMES = Encoder.HALO + 1

    def __init__(self, tokenizer: WavTokenizer, sample_rate: int) -> None:
        self.tokenizer = tokenizer
        self.sample_rate = sample_rate
        self._resampler = media.Resampler(sample_rate, tokenizer.config.sample_rate)
        self._pending = torch.zeros(0)
        self._pending_start = 0
        self._frames = 0
        self._samples = 0
        self._state: EncoderState | None = None
        self._ids: list[Tensor] = []
        self._finished = False

    @property
    def latency(self) -> float:
        """Seconds from the beginning of a frame to the sample that settles its id (after the first few frames)."""
        hop, encoder = self.tokenizer.config.hop_length, self.tokenizer.encoder
        return ((encoder.HALO + 1) * hop + encoder.lookahead) / self.tokenizer.config.sample_rate

    @property
    def tokens(self) -> Tokens:
        """All ids so far, as tokens of one item."""
        meta = {"samples": self._samples, "sample_rate": self.sample_rate}
        return self.tokenizer.tokens([torch.cat([*self._ids, torch.zeros(0, dtype=torch.int64)])], [meta])

    def push(self, chunk: Any) -> Int[Tensor, " frames"]:
        """Take the next samples, ``[samples]`` or ``[channels, samples]``, and return the ids that they settle.

        Raises:
            InputError: the samples are not finite or not an array, or the stream has been finished.
        """
        self._refuse_if_finished()
        audio = media.read_audio((chunk, self.sample_rate), mono=True)
        self._samples += audio.original_samples
        self._append(self._resampler.push(audio.waveform))
        hop, encoder = self.tokenizer.config.hop_length, self.tokenizer.encoder
        received = self._pending_start + len(self._pending)
        ready = (received - encoder.lookahead) // hop - self._frames
        if ready < (self.FIRST_FRAMES if self._state is None else 1):
            return torch.zeros(0, dtype=torch.int64, device=self.tokenizer.device)
        return self._advance(ready)

    def finish(self) -> Int[Tensor, " frames"]:
        """The audio has ended: the remaining ids."""
        self._refuse_if_finished()
        self._append(self._resampler.finish())
        self._finished = True
        if not self._samples:
            return torch.zeros(0, dtype=torch.int64, device=self.tokenizer.device)
        return self._advance(None)

    def _refuse_if_finished(self) -> None:
        if self._finished:
            raise InputError("the stream has been finished; open another one")

    def _append(self, waveform: Float[Tensor, "1 samples"]) -> None:
        self._pending = torch.cat([self._pending, waveform[0]])

    @torch.inference_mode()
    def _advance(self, new_frames: int | None) -> Int[Tensor, " frames"]:
        tokenizer, encoder, hop = self.tokenizer, self.tokenizer.encoder, self.tokenizer.config.hop_length
        context = min(self._frames, encoder.context + (encoder.REFLECTED_HOPS if new_frames is None else 0))
        begin = (self._frames - context) * hop - self._pending_start
        end = None if new_frames is None else begin + (context + new_frames) * hop + encoder.lookahead
        piece = self._pending[begin:end].to(tokenizer.device)
        with exact_float32(tokenizer.device):
            latents, self._state = encoder.advance(
                piece[None], [len(piece)], self._state, context=context, new_frames=new_frames
            )
            ids = tokenizer.codebook.nearest(latents[0])
        self._ids.append(ids.cpu())
        self._frames += new_frames or 0
        outdated = max(0, self._frames - encoder.context - encoder.REFLECTED_HOPS) * hop - self._pending_start
        if outdated > 0:
            self._pending = self._pending[outdated:].clone()
            self._pending_start += outdated
        return ids

    def __enter__(self) -> StreamEncoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and not self._finished:
            self.finish()


class StreamDecoder:
    """Decodes ids as they arrive, in windows with context on both sides and a linear cross-fade between them.

    An approximation: the exact decoder normalises and attends over the whole sequence, a window only over itself. Audio comes
    out ``window`` frames late, at most.
    """

    FADE_FRAMES = 8

    def __init__(self, tokenizer: WavTokenizer, window: int, bandwidth_id: int) -> None:
        # Frames within reach of the convolutions around the parts that see everything.
        self._context = tokenizer.backbone.halo + tokenizer.backbone.HALO + 2
        smallest = 2 * self._context + 2 * self.FADE_FRAMES
        if window < smallest:
            raise InputError(f"a window of {window} frames is too short; use at least {smallest}")
        self.tokenizer = tokenizer
        self.window = window
        self.bandwidth_id = bandwidth_id
        self._ids = torch.zeros(0, dtype=torch.int64)
        self._ids_start = 0
        self._done = 0
        self._fading: Tensor | None = None
        self._finished = False

    def push(self, ids: Int[Tensor, " frames"]) -> Float[Tensor, "1 samples"]:
        """Take the next ids and return the audio that is ready.

        Raises:
            InputError: an id is out of range, or the stream has been finished.
        """
        if self._finished:
            raise InputError("the stream has been finished; open another one")
        if len(ids):
            self._ids = torch.cat([self._ids, *self.tokenizer._check([ids.cpu()]).unpadded()])
        parts = []
        while len(self._ids) - self._window_start() >= self.window:
            start = self._window_start()
            parts.append(self._decode(start, start + self.window, final=False))
        return torch.cat([torch.zeros(1, 0, device=self.tokenizer.device), *parts], dim=1)

    def finish(self) -> Float[Tensor, "1 samples"]:
        """The sequence has ended: the remaining audio."""
        if self._finished:
            raise InputError("the stream has been finished; open another one")
        self._finished = True
        if len(self._ids) + self._ids_start == self._done:
            return torch.zeros(1, 0, device=self.tokenizer.device)
        start = max(0, min(self._window_start(), len(self._ids) - self.window))
        return self._decode(start, len(self._ids), final=True)

    def _window_start(self) -> int:
        """Where the next window begins within the kept ids."""
        return max(0, self._done - self._context - self._ids_start)

    @torch.inference_mode()
    def _decode(self, start: int, stop: int, final: bool) -> Float[Tensor, "1 samples"]:
        tokenizer, hop = self.tokenizer, self.tokenizer.config.hop_length
        ids = self._ids[start:stop].to(tokenizer.device)[None]
        with exact_float32(tokenizer.device):
            total = tokenizer._synthesise(tokenizer.codebook(ids), None, self.bandwidth_id)
            audio = tokenizer.head.istft.finish(total, ids.shape[1])
        audio = audio[:, (self._done - self._ids_start - start) * hop :]
        if self._fading is not None:
            fade = self._fading.shape[1]
            rise = (torch.arange(fade, device=audio.device) + 0.5) / fade
            head = self._fading + rise * (audio[:, :fade] - self._fading)
            audio = torch.cat([head, audio[:, fade:]], dim=1)
        if final:
            return audio
        kept_frames = stop - self._context - self.FADE_FRAMES - (self._done - self._ids_start)
        kept, fading_end = kept_frames * hop, (kept_frames + self.FADE_FRAMES) * hop
        self._fading = audio[:, kept:fading_end]
        self._done += kept_frames
        # The last window may reach back a full window from the end.
        outdated = self._done - self.window - self._ids_start
        if outdated > 0:
            self._ids = self._ids[outdated:]
            self._ids_start += outdated
        return audio[:, :kept]

    def __enter__(self) -> StreamDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._finished = True


TOKENIZER = WavTokenizer

"""Networks of sound as their authors' code computes them: plain modules, channels before time, one operator after another.

What `zoo bench originals` sets ours beside where the authors' code is no package. The architecture is that of the papers and
of the official checkpoints: the state dicts have the checkpoints' keys, so `zoo.load_upstream` reads them.
Sizes are those of the families' configurations.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

# Fixed in the authors' code.
_EPS, _GROUPS = 1e-6, 32

Signal = Float[Tensor, "batch channels time"]


# --------------------------------------------------------------------------------------------------------- WavTokenizer


class _Wrapped(nn.Module):
    """A module under a name of its own, as EnCodec's code nests its convolutions."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv


class SEANetConv(nn.Module):
    """A convolution with weight norm behind asymmetric padding by reflection."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.conv = _Wrapped(weight_norm(nn.Conv1d(channels_in, channels_out, kernel, stride)))

    def forward(self, x: Signal) -> Float[Tensor, "batch channels_out time_out"]:
        total = self.kernel - self.stride
        right = total // 2
        extra = -x.shape[-1] % self.stride
        found: Tensor = self.conv.conv(F.pad(x, (total - right, right + extra), mode="reflect"))
        return found


class SEANetBlock(nn.Module):
    """Two convolutions, each behind an ELU, and one around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.ELU(), SEANetConv(channels, channels // 2, 3), nn.ELU(), SEANetConv(channels // 2, channels, 1)
        )
        self.shortcut = SEANetConv(channels, channels, 1)

    def forward(self, x: Signal) -> Signal:
        return self.shortcut(x) + self.block(x)


class SkippedLSTM(nn.Module):
    """An LSTM and the signal around it."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(channels, channels, layers)

    def forward(self, x: Signal) -> Signal:
        x = x.permute(2, 0, 1)
        y, _ = self.lstm(x)
        return (y + x).permute(1, 2, 0)


class _Codebook(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.randn(config.codebook_size, config.latent_dim))

    def forward(self, latents: Float[Tensor, "batch latent frames"]) -> Int[Tensor, "batch frames"]:
        flat = latents.transpose(1, 2).flatten(0, 1)
        codes = self.embed.t()
        distance = -(flat.pow(2).sum(1, keepdim=True) - 2 * flat @ codes + codes.pow(2).sum(0, keepdim=True))
        return distance.max(dim=-1).indices.view(len(latents), -1)


class GroupNormBlock(nn.Module):
    """Two convolutions, each behind a group norm and SiLU, and the signal around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_GROUPS, channels, _EPS)
        self.conv1 = nn.Conv1d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(_GROUPS, channels, _EPS)
        self.dropout = nn.Dropout(0.1)
        self.conv2 = nn.Conv1d(channels, channels, 3, padding=1)

    def forward(self, x: Signal) -> Signal:
        hidden = self.norm1(x)
        hidden = self.conv1(hidden * torch.sigmoid(hidden))
        hidden = self.norm2(hidden)
        return x + self.conv2(self.dropout(hidden * torch.sigmoid(hidden)))


class ConvAttention(nn.Module):
    """One head over all frames, with convolutions of kernel 1 for its products."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_GROUPS, channels, _EPS)
        self.q, self.k, self.v, self.proj_out = (nn.Conv1d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Signal) -> Signal:
        hidden = self.norm(x)
        q, k, v = self.q(hidden), self.k(hidden), self.v(hidden)
        scores = torch.bmm(q.permute(0, 2, 1), k) * q.shape[1] ** -0.5
        weights = F.softmax(scores, dim=2)
        return x + self.proj_out(torch.bmm(v, weights.permute(0, 2, 1)))


class BandwidthNorm(nn.Module):
    """Layer norm whose scale and shift are embeddings of a bandwidth id."""

    def __init__(self, bandwidths: int, channels: int) -> None:
        super().__init__()
        self.scale = nn.Embedding(bandwidths, channels)
        self.shift = nn.Embedding(bandwidths, channels)

    def forward(self, x: Float[Tensor, "batch time channels"], bandwidth: Int[Tensor, 1]) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=_EPS) * self.scale(bandwidth) + self.shift(bandwidth)


class PlainConvNeXt(nn.Module):
    """Depth-wise convolution, norm, two linear layers with a GELU between, layer scale, and the signal around them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(config.dim, config.dim, 7, padding=3, groups=config.dim)
        self.norm = BandwidthNorm(config.num_bandwidths, config.dim)
        self.pwconv1 = nn.Linear(config.dim, config.intermediate_dim)
        self.pwconv2 = nn.Linear(config.intermediate_dim, config.dim)
        self.gamma = nn.Parameter(torch.full((config.dim,), 1 / config.num_layers))

    def forward(self, x: Signal, bandwidth: Int[Tensor, 1]) -> Signal:
        hidden = self.norm(self.dwconv(x).transpose(1, 2), bandwidth)
        hidden = self.gamma * self.pwconv2(F.gelu(self.pwconv1(hidden)))
        return x + hidden.transpose(1, 2)


class PlainBackbone(nn.Module):
    """Code vectors to frames of the decoder."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim = config.dim
        self.embed = nn.Conv1d(config.latent_dim, dim, 7, padding=3)
        self.pos_net = nn.Sequential(
            GroupNormBlock(dim),
            GroupNormBlock(dim),
            ConvAttention(dim),
            GroupNormBlock(dim),
            GroupNormBlock(dim),
            nn.GroupNorm(_GROUPS, dim, _EPS),
        )
        self.norm = BandwidthNorm(config.num_bandwidths, dim)
        self.convnext = nn.ModuleList(PlainConvNeXt(config) for _ in range(config.num_layers))
        self.final_layer_norm = nn.LayerNorm(dim, eps=_EPS)

    def forward(self, x: Signal, bandwidth: Int[Tensor, 1]) -> Float[Tensor, "batch time dim"]:
        x = self.pos_net(self.embed(x))
        x = self.norm(x.transpose(1, 2), bandwidth).transpose(1, 2)
        for block in self.convnext:
            x = block(x, bandwidth)
        found: Tensor = self.final_layer_norm(x.transpose(1, 2))
        return found


class PlainHead(nn.Module):
    """Frames to a spectrum, and its inverse STFT by one fold for the frames and one for the window."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.hop, self.n_fft = config.hop_length, 4 * config.hop_length
        self.out = nn.Linear(config.dim, self.n_fft + 2)
        self.window = nn.Buffer(torch.hann_window(self.n_fft), persistent=False)

    def forward(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch samples"]:
        magnitude, phase = self.out(x).transpose(1, 2).float().chunk(2, dim=1)
        magnitude = magnitude.exp().clip(max=1e2)
        spectrum = magnitude * (torch.cos(phase) + 1j * torch.sin(phase))
        frames = torch.fft.irfft(spectrum, self.n_fft, dim=1, norm="backward") * self.window[None, :, None]
        count = frames.shape[2]
        samples = (count - 1) * self.hop + self.n_fft
        margin = (self.n_fft - self.hop) // 2

        def fold(columns: Float[Tensor, "rows n_fft count"]) -> Float[Tensor, "rows trimmed"]:
            folded = F.fold(columns, (1, samples), (1, self.n_fft), stride=(1, self.hop))
            return folded[:, 0, 0, margin : samples - margin]

        return fold(frames) / fold(self.window.square().expand(1, count, -1).transpose(1, 2))


class PlainWavTokenizer(nn.Module):
    """WavTokenizer with the keys of an official checkpoint and random weights."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        channels = config.n_filters
        layers: list[nn.Module] = [SEANetConv(1, channels, 7)]
        for stride in config.strides:
            layers += [SEANetBlock(channels), nn.ELU(), SEANetConv(channels, 2 * channels, 2 * stride, stride)]
            channels *= 2
        layers += [SkippedLSTM(channels, config.lstm_layers), nn.ELU(), SEANetConv(channels, config.latent_dim, 7)]
        self.encoder = nn.Sequential(*layers)
        self.codebook = _Codebook(config)
        self.backbone = PlainBackbone(config)
        self.head = PlainHead(config)

    def encode(self, waveform: Float[Tensor, "batch samples"]) -> Int[Tensor, "batch frames"]:
        """Ids of a batch of one length."""
        found: Tensor = self.codebook(self.encoder(waveform[:, None]))
        return found

    def decode(self, ids: Int[Tensor, "batch frames"]) -> Float[Tensor, "batch samples"]:
        """Samples of a batch of one length."""
        latents = F.embedding(ids, self.codebook.embed).transpose(1, 2)
        bandwidth = torch.zeros(1, dtype=torch.int64)
        found: Tensor = self.head(self.backbone(latents, bandwidth))
        return found

    def official_state(self) -> dict[str, Tensor]:
        """The tensors under the names of an official checkpoint."""
        theirs = {
            "encoder.": "feature_extractor.encodec.encoder.model.",
            "codebook.": "feature_extractor.encodec.quantizer.vq.layers.0._codebook.",
        }
        state = {}
        for key, value in self.state_dict().items():
            start = next((ours for ours in theirs if key.startswith(ours)), "")
            state[theirs.get(start, "") + key.removeprefix(start)] = value
        return state


# ------------------------------------------------------------------------------------------------------------- HiFi-GAN


class PlainResidualBlock(nn.Module):
    """Pairs of a dilated and a plain convolution, each behind a leaky ReLU, and the signal around each pair."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel, dilation=step, padding=step * (kernel - 1) // 2) for step in dilations
        )
        self.convs2 = nn.ModuleList(nn.Conv1d(channels, channels, kernel, padding=(kernel - 1) // 2) for _ in dilations)

    def forward(self, x: Signal) -> Signal:
        for first, second in zip(self.convs1, self.convs2, strict=True):
            y = first(F.leaky_relu(x, 0.1))
            x = second(F.leaky_relu(y, 0.1)) + x
        return x


class PlainHiFiGAN(nn.Module):
    """HiFi-GAN's generator behind a linear layer, with the keys of kNN-VC's checkpoint and random weights.

    Weight norm is folded, as kNN-VC does before it uses the generator.
    """

    def __init__(self, sizes: Any, vector_dim: int) -> None:
        super().__init__()
        self.lin_pre = nn.Linear(vector_dim, sizes.pre_width)
        self.conv_pre = nn.Conv1d(sizes.pre_width, sizes.channels, 7, padding=3)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        channels = sizes.channels
        for rate, kernel in zip(sizes.rates, sizes.kernels, strict=True):
            self.ups.append(nn.ConvTranspose1d(channels, channels // 2, kernel, rate, padding=(kernel - rate) // 2))
            channels //= 2
            for size, dilations in zip(sizes.resblock_kernels, sizes.resblock_dilations, strict=True):
                self.resblocks.append(PlainResidualBlock(channels, size, dilations))
        self.kernels = len(sizes.resblock_kernels)
        self.conv_post = nn.Conv1d(channels, 1, 7, padding=3)

    def forward(self, vectors: Float[Tensor, "batch frames dim"]) -> Float[Tensor, "batch samples"]:
        """``samples = frames * hop_length``."""
        x = self.conv_pre(self.lin_pre(vectors).transpose(1, 2))
        for stage, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, 0.1))
            blocks = self.resblocks[stage * self.kernels : (stage + 1) * self.kernels]
            total = blocks[0](x)
            for block in blocks[1:]:
                total += block(x)
            x = total / self.kernels
        found: Tensor = torch.tanh(self.conv_post(F.leaky_relu(x)))[:, 0]
        return found

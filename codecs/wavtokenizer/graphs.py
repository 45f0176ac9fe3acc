"""Encoder and decoder as plain functions of whole items, for `zoo.export`: one pass each, of the same weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.codecs.wavtokenizer.decoder import MAGNITUDE_LIMIT, Backbone, Head
from zoo.codecs.wavtokenizer.encoder import Codebook, Encoder
from zoo.nn.conv import elu


class EncoderGraph(nn.Module):
    """Waveforms of one length, however short, to ids."""

    def __init__(self, encoder: Encoder, codebook: Codebook) -> None:
        super().__init__()
        self.encoder, self.codebook = encoder, codebook
        self.lstm = nn.Sequential(*(LSTMLayer(encoder.lstm, layer) for layer in range(encoder.lstm.num_layers)))

    def forward(self, waveform: Float[Tensor, "batch 1 samples"]) -> Int[Tensor, "batch frames"]:
        # Lengths, though all are equal, keep the padding from looking at them: it is one rule for any length.
        batch, _, samples = waveform.shape
        x = self.encoder.stem(waveform.transpose(1, 2), whole(batch, samples))
        for stage in self.encoder.stages:
            lengths = whole(batch, x.shape[1])
            x = stage(x, lengths)
        x = elu(self.lstm(x.transpose(0, 1)).transpose(0, 1) + x)
        return self.codebook.nearest(self.encoder.out(x, whole(batch, x.shape[1])))


def whole(batch: int, length: int) -> Int[Tensor, " batch"]:
    """Lengths of a batch in which all items fill their row."""
    return torch.full((batch,), length, dtype=torch.int64)


class LSTMLayer(nn.Module):
    """One layer of an LSTM, time first, as the operator of ONNX, which PyTorch's exporter has no translation to.

    The operator orders its gates input, output, forget, cell, and PyTorch input, forget, cell, output.
    """

    def __init__(self, lstm: nn.LSTM, layer: int) -> None:
        super().__init__()
        parts = {kind: getattr(lstm, f"{kind}_l{layer}").detach() for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        ordered = {}
        for kind, tensor in parts.items():
            into, forget, cell, out = tensor.chunk(4)
            ordered[kind] = torch.cat([into, out, forget, cell])[None]
        self.register_buffer("into", ordered["weight_ih"])
        self.register_buffer("again", ordered["weight_hh"])
        self.register_buffer("bias", torch.cat([ordered["bias_ih"], ordered["bias_hh"]], dim=1))

    into: Tensor
    again: Tensor
    bias: Tensor

    def forward(self, x: Float[Tensor, "frames batch channels"]) -> Float[Tensor, "frames batch channels"]:
        frames, batch, channels = x.shape
        y = torch.onnx.ops.symbolic(
            "LSTM",
            [x, self.into, self.again, self.bias],
            {"hidden_size": channels},
            dtype=x.dtype,
            shape=(frames, 1, batch, channels),
            version=14,
        )
        return y[:, 0]


class DecoderGraph(nn.Module):
    """Ids to waveforms; the inverse Fourier transform is a product with its matrix."""

    def __init__(self, codebook: Codebook, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.codebook, self.backbone, self.out = codebook, backbone, head.out
        istft = head.istft
        self.overlap, self.hop_length = istft.OVERLAP, istft.hop_length
        bins = istft.n_fft // 2 + 1
        unit = torch.eye(bins, dtype=torch.float64)
        parts = [torch.fft.irfft(torch.complex(*pair), istft.n_fft) for pair in ((unit, 0 * unit), (0 * unit, unit))]
        self.register_buffer("synthesis", (torch.cat(parts) * istft.window.double()).float())
        self.register_buffer("squared", istft.window.square().view(1, 1, self.overlap, self.hop_length))

    synthesis: Tensor
    squared: Tensor

    def forward(self, ids: Int[Tensor, "batch frames"]) -> Float[Tensor, "batch 1 samples"]:
        x, coefficients = self.backbone.mix(self.codebook(ids), None)
        log_magnitude, phase = self.out(self.backbone.refine(x, coefficients, None, 0)).chunk(2, dim=2)
        magnitude = log_magnitude.exp().clamp(max=MAGNITUDE_LIMIT)
        frames = torch.cat([magnitude * phase.cos(), magnitude * phase.sin()], dim=2) @ self.synthesis
        total = self.added(frames.unflatten(2, (self.overlap, self.hop_length)))
        envelope = self.added(self.squared.expand(1, frames.shape[1], -1, -1))
        # Half of what overlaps is cut on either side: 1.5 hops.
        margin = (self.overlap - 1) * self.hop_length // 2
        return (total / envelope)[:, None, margin : margin + frames.shape[1] * self.hop_length]

    def added(self, segments: Float[Tensor, "batch frames overlap hop"]) -> Float[Tensor, "batch samples"]:
        """Frames added up where they overlap, which are each as many segments long."""
        last = self.overlap - 1
        parts = [F.pad(segments[:, :, part], (0, 0, part, last - part)) for part in range(self.overlap)]
        return torch.stack(parts).sum(0).flatten(1)

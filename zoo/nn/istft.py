"""Inverse short-time Fourier transform with "same" padding, by strided overlap-add."""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from zoo.precision import Float32Module


class InverseSTFT(Float32Module):
    """Frames of a spectrum to samples, for a window of exactly four hops.

    The window is the periodic Hann window, applied at synthesis and divided out by the overlap-added squared window. The
    first and the last 1.5 hops of the overlap-added signal are cut, so that ``frames`` spectra give ``frames * hop_length``
    samples (Vocos, arXiv 2306.00814, "same" padding). The window stays in float32. The steps are exposed so that long signals
    can be built block by block.
    """

    OVERLAP = 4

    def __init__(self, hop_length: int) -> None:
        super().__init__()
        self.hop_length = hop_length
        self.n_fft = self.OVERLAP * hop_length
        self.register_buffer("window", torch.empty(self.n_fft), persistent=False)
        self.reset_buffers()

    window: Tensor

    def reset_buffers(self) -> None:
        """Fill in the window; needed after the module was built on the meta device."""
        device = "cpu" if self.window.device.type == "meta" else self.window.device
        self.window = torch.hann_window(self.n_fft, periodic=True, dtype=torch.float32, device=device)

    def overlap_add(self, spectrum: Complex[Tensor, "batch frames bins"]) -> Float[Tensor, "batch samples"]:
        """Windowed, overlap-added frames, neither cut nor normalised: ``samples = (frames + 3) * hop_length``."""
        frames = torch.fft.irfft(spectrum, self.n_fft) * self.window
        batch, count, _ = frames.shape
        segments = frames.view(batch, count, self.OVERLAP, self.hop_length)
        total = segments.new_zeros(batch, count + self.OVERLAP - 1, self.hop_length)
        for part in range(self.OVERLAP):
            total[:, part : part + count] += segments[:, :, part]
        return total.flatten(1)

    def finish(self, total: Float[Tensor, "batch samples"], frames: int) -> Float[Tensor, "batch trimmed"]:
        """Divide by the window envelope of ``frames`` frames and cut both ends: ``trimmed = frames * hop_length``."""
        margin = (self.n_fft - self.hop_length) // 2
        kept = slice(margin, margin + frames * self.hop_length)
        return total[:, kept] / self._envelope(frames)[kept]

    def _envelope(self, frames: int) -> Float[Tensor, " samples"]:
        squared = self.window.square().view(self.OVERLAP, self.hop_length)
        envelope = squared.new_zeros(frames + self.OVERLAP - 1, self.hop_length)
        for part in range(self.OVERLAP):
            envelope[part : part + frames] += squared[part]
        return envelope.flatten()

    def forward(self, spectrum: Complex[Tensor, "batch frames bins"]) -> Float[Tensor, "batch samples"]:
        """The whole signal at once."""
        return self.finish(self.overlap_add(spectrum), spectrum.shape[1])

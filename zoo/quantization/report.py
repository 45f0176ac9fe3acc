"""Report of quantization about each layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """Result for a layer.

    Attributes:
        name: of the layer.
        method: how it is quantized; ``None`` if it stayed.
        reason: why it stayed, or differs from the others.
        format: of its weights; empty if it stayed.
        clip: median of the clipping values over the largest magnitudes; ``None`` in block formats.
        weight_sqnr: signal over squared rounding error of the weights, in dB.
        zeros: share of weights that are exactly zero.
        activations: format of its inputs; empty if they stay.
        output_error: mean squared error of the outputs on the calibration inputs with nearest and with learned rounding; of
            the block's outputs where one is named.
        block: the block that it was learned with; empty if it was alone.
    """

    name: str
    method: str | None
    reason: str = ""
    format: str = ""
    clip: float | None = None
    weight_sqnr: float | None = None
    zeros: float | None = None
    activations: str = ""
    output_error: tuple[float, float] | None = None
    block: str = ""

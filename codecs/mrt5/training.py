"""Losses of fine-tuning, with a rate of deletion that is held."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from zoo.codecs.mrt5.tokenizer import MrT5
from zoo.nn.mrt5 import DeletionController


class Losses(NamedTuple):
    """Losses of a batch.

    Attributes:
        total: to be minimised: ``cross_entropy + weight * gate``.
        cross_entropy: of the labels.
        gate: mean gate of what is no padding.
        rate: share of it that hard deletion would remove.
        weight: of ``gate`` in this batch.
    """

    total: Float[Tensor, ""]
    cross_entropy: Float[Tensor, ""]
    gate: Float[Tensor, ""]
    rate: float
    weight: float


def losses(
    tokenizer: MrT5, ids: Int[Tensor, "batch length"], labels: Int[Tensor, "batch labels"], controller: DeletionController
) -> Losses:
    """Losses under soft deletion; the controller learns the rate of the batch.

    The gate's loss has the weight that the batches before led to, and this batch's rate counts from the next one on, as
    upstream does it.

    Args:
        tokenizer: in training mode, so that gates have noise.
        ids: of texts with their end markers, padded with 0.
        labels: of the texts to write, padded with -100.
        controller: of the rate, one for a whole training.
    """
    output = tokenizer(ids, labels, deletion="soft")
    weight, rate = controller.weight, float(output.deletion_rate)
    controller.update(rate)
    total = output.loss + weight * output.gate_loss
    return Losses(total, output.loss, output.gate_loss, rate, weight)

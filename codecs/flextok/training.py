"""The loss of the training step."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from zoo.codecs.flextok.flow import flow_loss
from zoo.codecs.flextok.tokenizer import FlexTok, LatentTensor
from zoo.nn.terms import Losses


def losses(
    tokenizer: FlexTok,
    latents: LatentTensor,
    *,
    noise: LatentTensor,
    t: Float[Tensor, " batch"],
    keep: Tensor,
    null: Tensor | None = None,
) -> Losses:
    """The flow's loss of a batch, differentiable through quantizer and encoder; see `flow.flow_loss`.

    Returns:
        ``flow``, the mean over items. Outputs: ``items``, the loss of each ``[batch]``.
    """
    codes = tokenizer.fsq(tokenizer.encoder(latents))
    items = flow_loss(tokenizer.decoder, latents, codes, noise=noise, t=t, keep=keep, null=null)
    return Losses({"flow": items.mean()}, {"items": items})

"""The losses of the second stage of training, which learns codebook and embedding over a frozen encoder."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from zoo.codecs.seed.embedding import States
from zoo.codecs.seed.tokenizer import Seed
from zoo.nn.terms import Losses

# Weight of the codes' own half of the quantizer's loss, and weights of the terms.
CODEBOOK_WEIGHT = 0.25
WEIGHTS = {"quantizer": 5.0, "reconstruction": 2.0, "embedding": 0.5}


def losses(tokenizer: Seed, states: States, target: Float[Tensor, "batch ..."]) -> Losses:
    """The losses of a batch, differentiable.

    Args:
        tokenizer: the model.
        states: what `Seed.causal_embedding` gives.
        target: image embeddings of a CLIP model for the same images.

    Returns:
        ``quantizer``; ``reconstruction`` of the states; ``embedding``, mean squared error of the image embeddings.

    Raises:
        WeightsError: a part was not loaded.
    """
    tokenizer.require("encoder", "training")
    tokenizer.require("features", "training")
    z = tokenizer.encoder.summary.to_codes(states)
    codes = tokenizer.codebook(tokenizer.codebook.nearest(z))
    wide = tokenizer.embedding.from_codes(z + (codes - z).detach())
    plain = {
        "quantizer": F.mse_loss(z, codes.detach()) + CODEBOOK_WEIGHT * F.mse_loss(codes, z.detach()),
        "reconstruction": 1 - F.cosine_similarity(tokenizer.features_decoder(wide), states, dim=-1).mean(),
        "embedding": F.mse_loss(tokenizer.embedding.head(tokenizer.embedding.mixer(wide)), target),
    }
    return Losses({name: WEIGHTS[name] * loss for name, loss in plain.items()})

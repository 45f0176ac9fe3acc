"""A SNAC with random weights, small enough for tests, and its state dict in upstream's names."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from zoo.codecs.snac import SNAC, SNACConfig

SMALL_SNAC = SNACConfig(
    sample_rate=8_000,
    encoder_dim=4,
    encoder_rates=(2, 3, 2),
    decoder_dim=32,
    decoder_rates=(2, 3, 2),
    codebook_size=32,
    codebook_dim=4,
    vq_strides=(4, 2, 1),
)


def small_snac(seed: int = 0, config: SNACConfig = SMALL_SNAC) -> SNAC:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = SNAC(config, name="small-snac").eval().requires_grad_(False)
        for name, parameter in tokenizer.named_parameters():
            if name.endswith("alpha"):
                parameter.copy_(torch.rand(parameter.shape) * 2)
            elif parameter.ndim > 1 and "codebook" not in name:
                # Wide enough that what goes in is still there in what comes out.
                parameter.mul_(1.5)
    tokenizer.fingerprint = tokenizer.compute_fingerprint()
    return tokenizer


def old_weight_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of PyTorch's weight norm before parametrizations."""
    spelled = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    pattern = re.compile("|".join(map(re.escape, spelled)))
    return {pattern.sub(lambda found: spelled[found[0]], key): tensor for key, tensor in state.items()}


def folded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Plain weights in place of weight norm."""
    plain = {}
    for key, tensor in old_weight_norm(state).items():
        if key.endswith("weight_v"):
            gain = old_weight_norm(state)[key[:-1] + "g"]
            plain[key[:-2]] = gain * tensor / tensor.norm(dim=(1, 2), keepdim=True)
        elif not key.endswith("weight_g"):
            plain[key] = tensor
    return plain

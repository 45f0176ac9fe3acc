"""Random tokenizers of video, around networks of diffusers and transformers, small enough for every test."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.codecs.vidtok import VidTok, VidTokConfig

SMALL_VIDTOK = {"ch": 8, "ch_mult": [1, 2, 2], "num_res_blocks": 1, "z_channels": 4}
SMALL_FSQ = SMALL_VIDTOK | {"regularizer": "fsq", "codebook_size": 4096, "double_z": False}


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """A library's network with weights that let different clips have different ids, ready to run."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.data.copy_(values / fan_in**0.5)
        elif name.endswith("weight"):
            parameter.data.copy_(1 + 0.1 * values)
        else:
            parameter.data.copy_(0.1 * values)
    return network.eval().requires_grad_(False)


def vidtok_network(**settings: Any) -> Any:
    """Diffusers' class with random weights, whose latents reach several levels."""
    from diffusers import AutoencoderVidTok

    network: Any = randomised(AutoencoderVidTok(**SMALL_VIDTOK | settings))
    out = network.encoder.conv_out
    getattr(out, "conv", out).weight.mul_(2)
    return network


def wrapped(cls: Any, config: Any, network: nn.Module, name: str) -> Any:
    """A tokenizer with the weights of a library's network, through the family's own mapping of official keys."""
    _, state = cls.checkpoint.convert(
        {k: v.clone() for k, v in network.state_dict().items() if cls.checkpoint.wanted(k)}, config
    )
    tokenizer = cls(config, name=name)
    tokenizer.load_state_dict(state)
    tokenizer.eval().requires_grad_(False)
    tokenizer.fingerprint = tokenizer.compute_fingerprint()
    return tokenizer


def small_vidtok(name: str = "small-vidtok", **settings: Any) -> VidTok:
    """A causal VidTok with 4096 ids, one for 4 frames of 4 x 4 pixels; other ``settings`` make other models."""
    library = SMALL_FSQ | settings
    tokenizer: VidTok = wrapped(VidTok, VidTokConfig(library), vidtok_network(**library), name)
    return tokenizer


def small_vidtok_kl() -> VidTok:
    """A causal VidTok with latents of 4 channels."""
    return small_vidtok("small-vidtok-kl", regularizer="kl", double_z=True)


def small_vidtok_noncausal() -> VidTok:
    """A VidTok whose latent frames depend on later ones."""
    return small_vidtok("small-vidtok-noncausal", is_causal=False)

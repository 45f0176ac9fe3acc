"""Random tokenizers of video, around networks of diffusers and transformers, small enough for every test."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.codecs.emu3_video import Emu3Video, Emu3VideoConfig
from zoo.codecs.video_kl import VideoKL, VideoKLConfig
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


_SCALES = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.5, 1.0, 2.0]}
SMALL_VIDEO_KL: dict[str, dict[str, Any]] = {
    "AutoencoderKLWan": {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1} | _SCALES,
    "AutoencoderKLQwenImage": {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1} | _SCALES,
    "AutoencoderKLCogVideoX": {
        **{"block_out_channels": [8, 8, 8, 16], "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4},
        "scaling_factor": 0.7,
    },
    "AutoencoderKLCosmos": {
        **{"latent_channels": 4, "encoder_block_out_channels": [8, 8, 16, 16], "decode_block_out_channels": [8, 16, 16, 16]},
        # Two latent frames have statistics of their own.
        **{"num_layers": 1, "latents_mean": [0.1, 0.2, 0.3, 0.4, 0, 0, 0.5, 1], "latents_std": [1, 2, 1, 0.5, 1, 1, 2, 3]},
    },
}


def video_kl_network(network: str) -> Any:
    """One of diffusers' classes with random weights."""
    import diffusers

    return randomised(getattr(diffusers, network)(**SMALL_VIDEO_KL[network]))


def small_video_kl(network: str = "AutoencoderKLWan") -> VideoKL:
    """An autoencoder of video with latents of 4 channels, one for 8 x 8 pixels."""
    config = VideoKLConfig(network, SMALL_VIDEO_KL[network])
    tokenizer: VideoKL = wrapped(VideoKL, config, video_kl_network(network), network.removeprefix("AutoencoderKL").lower())
    return tokenizer


SMALL_EMU3 = {
    "base_channels": 32,
    "channel_multiplier": [1, 1, 2],
    "hidden_size": 64,
    "num_res_blocks": 1,
    "attn_resolutions": [2],
}
EMU3_STATISTICS = {"mean": (0.4, 0.5, 0.6), "std": (0.3, 0.25, 0.2)}


def emu3_network() -> Any:
    """Transformers' class with random weights and 64 codes."""
    from transformers import Emu3VQVAE, Emu3VQVAEConfig

    network: Any = randomised(Emu3VQVAE(Emu3VQVAEConfig(**SMALL_EMU3, codebook_size=64)))
    network.quant_conv.conv.weight.mul_(4)
    return network


def small_emu3_video() -> Emu3Video:
    """Emu3's tokenizer for video with 64 ids, one for 4 frames of 4 x 4 pixels."""
    config = Emu3VideoConfig(SMALL_EMU3 | {"codebook_size": 64}, **EMU3_STATISTICS)
    tokenizer: Emu3Video = wrapped(Emu3Video, config, emu3_network(), "small-emu3-video")
    return tokenizer

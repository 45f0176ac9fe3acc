"""Random models small enough for every test, and their weights as upstream would have written them."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.codecs.flextok import FlexTok, FlexTokConfig
from zoo.codecs.wavtokenizer import WavTokenizer, WavTokenizerConfig

SMALL = WavTokenizerConfig(
    ratios=(4, 2, 2, 2), latent_dim=16, n_filters=4, codebook_size=64, dim=32, intermediate_dim=48, num_layers=2
)


def small_wavtokenizer(seed: int = 0, config: WavTokenizerConfig = SMALL) -> WavTokenizer:
    """A WavTokenizer with random weights whose codebook covers what its encoder produces."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = WavTokenizer(config, name=f"small-{seed}").eval().requires_grad_(False)
        latents = tokenizer.encoder(torch.randn(1, 400 * config.hop_length) * 0.3)[0]
        spread = latents[torch.randperm(len(latents))[: config.codebook_size]]
        tokenizer.codebook.embed.copy_(spread + 0.01 * torch.randn_like(spread))
    tokenizer.fingerprint = tokenizer.compute_fingerprint()
    return tokenizer


def upstream_state(tokenizer: WavTokenizer) -> dict[str, Tensor]:
    """The state dict in upstream's key names, weights already folded."""
    encoder = "feature_extractor.encodec.encoder.model"
    state = {}
    for key, tensor in tokenizer.state_dict().items():
        parts = key.split(".")
        if key.startswith("encoder.stages"):
            stage, layer = int(parts[2]), parts[3]
            if layer == "down":
                name = f"{encoder}.{3 * stage + 3}.conv.conv.{parts[4]}"
            else:
                place = {"narrow": "block.1", "widen": "block.3", "shortcut": "shortcut"}[parts[4]]
                name = f"{encoder}.{3 * stage + 1}.{place}.conv.conv.{parts[5]}"
        elif key.startswith("encoder.lstm"):
            name = f"{encoder}.13.lstm.{parts[2]}"
        elif key.startswith("encoder."):
            name = f"{encoder}.{0 if parts[1] == 'stem' else 15}.conv.conv.{parts[2]}"
        elif key == "codebook.embed":
            name = "feature_extractor.encodec.quantizer.vq.layers.0._codebook.embed"
        elif ".qkv." in key:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                state[key.replace("qkv", part)] = piece[..., None].clone() if piece.ndim == 2 else piece.clone()
            continue
        elif key.endswith((".scale", ".shift")):
            name = f"{key}.weight"
        elif ".proj_out.weight" in key:
            state[key] = tensor[..., None].clone()
            continue
        else:
            name = key.replace("pos_norm", "pos_net.5")
        state[name] = tensor.clone()
    return state


SMALL_FLEXTOK = FlexTokConfig(
    vae_widths=(8, 8, 16, 16),
    vae_layers_per_block=1,
    vae_groups=4,
    latent_channels=4,
    grid=(2, 3),
    registers=8,
    levels=(4, 3, 5),
    encoder_dim=32,
    encoder_depth=2,
    encoder_head_dim=16,
    decoder_dim=48,
    decoder_depth=2,
    decoder_head_dim=16,
    steps=3,
    guidance=2.0,
)


def small_flextok(seed: int = 0, config: FlexTokConfig = SMALL_FLEXTOK) -> FlexTok:
    """A FlexTok with random weights throughout, none of them zero; images of 32 x 48 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = FlexTok(config, name=f"small-flextok-{seed}").eval().requires_grad_(False)
        # The quantizer should see values on both sides of its boundaries.
        tokenizer.encoder.to_codes.weight.mul_(3)
    tokenizer.fingerprint = tokenizer.compute_fingerprint()
    return tokenizer

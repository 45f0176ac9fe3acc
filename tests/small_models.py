"""Random models small enough for every test, and their weights as upstream would have written them."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.codecs.flextok import FlexTok, FlexTokConfig
from zoo.codecs.seed import Seed, SeedConfig
from zoo.codecs.tokenflow import TokenFlow, TokenFlowConfig
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


SMALL_TOKENFLOW = TokenFlowConfig(
    image_size=32,
    patch_size=8,
    scales=(1, 2, 4),
    semantic_dim=32,
    semantic_depth=1,
    semantic_heads=2,
    semantic_hidden=48,
    codebook_size=100,
    semantic_code_dim=6,
    pixel_code_dim=4,
    encoder_stem=8,
    encoder_widths=(8, 16, 16),
    encoder_blocks=1,
    latent_channels=8,
    decoder_widths=(16, 16, 8),
    decoder_blocks=1,
    norm_groups=4,
    semantic_decoder_depth=1,
    semantic_decoder_heads=2,
    feature_dim=12,
)

SMALL_SEED = SeedConfig(
    image_size=32,
    patch_size=8,
    vision_dim=32,
    vision_depth=1,
    vision_heads=2,
    vision_mlp_dim=48,
    queries=6,
    qformer_dim=24,
    qformer_depth=2,
    qformer_heads=2,
    qformer_mlp_dim=32,
    codes=60,
    code_dim=8,
    decoder_depth=1,
    decoder_heads=2,
    head_widths=(8, 4),
    embedding_dim=16,
    diffusion={
        "unet": {
            "sample_size": 8,
            "block_out_channels": [8, 16],
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 2,
            "cross_attention_dim": 12,
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 32,
        },
        # Images come out at 16 pixels, which is not the size that goes in.
        "vae": {"block_out_channels": [8, 8], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4},
        "text_encoder": {"max_position_embeddings": 3, "hidden_size": 12},
        "image_normalizer": {"embedding_dim": 16},
        "scheduler": {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "clip_sample": False},
        "image_noising_scheduler": {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"},
    },
    steps=2,
    guidance=1.5,
)


def small_tokenflow(seed: int = 0, config: TokenFlowConfig = SMALL_TOKENFLOW) -> TokenFlow:
    """A TokenFlow with random weights; images of 32 x 32 pixels by default."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = TokenFlow(config, name=f"small-tokenflow-{seed}").eval().requires_grad_(False)
    tokenizer.fingerprint = tokenizer.compute_fingerprint()
    return tokenizer


def small_seed(seed: int = 0, config: SeedConfig = SMALL_SEED) -> Seed:
    """A SEED with random weights and a codebook that covers what its encoder gives; 32 x 32 pixels in, 16 x 16 out."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = Seed(config, name=f"small-seed-{seed}").eval().requires_grad_(False)
        tokenizer.reset_buffers()
        summary = tokenizer.encoder.summary
        summary.qformer.queries.mul_(50)
        side = config.image_size
        z = summary.to_codes(tokenizer.encoder(torch.rand(20, 3, side, side) * 2 - 1)).flatten(0, 1)
        tokenizer.codebook.codes.copy_(z[torch.randperm(len(z))[: config.codes]] + 0.01 * torch.randn(config.codes, z.shape[1]))
    tokenizer.fingerprint = tokenizer.compute_fingerprint()
    return tokenizer

"""Sizes of a SEED."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Head = Literal["mlp", "qformer", "text"]

#: What a SEED consists of besides the codebook and the way from tokens to the image embedding, which are always there.
PARTS = ("encoder", "features", "decoder")

# stabilityai/stable-diffusion-2-1-unclip: Stability's v2-1-stable-unclip-h-inference.yaml in diffusers' terms.
UNCLIP: Mapping[str, Any] = {
    "unet": {
        "sample_size": 96,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 2048,
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
    },
    "text_encoder": {
        "vocab_size": 49_408,
        "max_position_embeddings": 77,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 512,
        "bos_token_id": 49_406,
        "eos_token_id": 49_407,
        "pad_token_id": 0,
    },
    "image_normalizer": {"embedding_dim": 1024},
    "scheduler": {
        "_class_name": "PNDMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    },
    "image_noising_scheduler": {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"},
}


@dataclass(frozen=True)
class SeedConfig:
    """Sizes of one model; the defaults are SEED-2.

    Attributes:
        image_size, patch_size: height and width of the images and of their patches.
        vision_dim, vision_depth, vision_heads, vision_mlp_dim, vision_eps: the vision transformer.
        summary_eps: of the normalisation between vision transformer and Q-Former.
        queries: tokens per image.
        qformer_dim, qformer_depth, qformer_heads, qformer_mlp_dim, qformer_act, qformer_eps: the Q-Former.
        cross_attention_every: layers of the Q-Former from one that looks at the image to the next.
        causal: whether a query sees those before it only.
        codes, code_dim: codebook; without codes the model is a diffusion decoder by itself, which draws image embeddings.
        decoder_depth, decoder_heads, decoder_mlp_ratio, decoder_eps: the transformer from tokens to the image embedding.
        head: what follows it: ``mlp`` (SEED-2), ``qformer`` (one query; SEED-2's training code) or ``text`` (77 queries that
            stand for the text states of a diffusion model; SEED-1).
        head_widths: of ``mlp``, per token.
        head_queries, head_depth: of the other two.
        embedding_dim: width of the embedding, or of each of ``text``'s vectors.
        diffusion: configurations of the components of the diffusion model, in diffusers' own terms.
        steps, guidance, noise_level: drawing when `decode` is not told otherwise.
        parts: what the model consists of besides codebook and image embedding: ``encoder`` (images to tokens), ``features``
            (reconstruction of the Q-Former's output, for retrieval and training) and ``decoder`` (image embedding to images).
    """

    image_size: int = 224
    patch_size: int = 14
    vision_dim: int = 1408
    vision_depth: int = 39
    vision_heads: int = 16
    vision_mlp_dim: int = 6144
    vision_eps: float = 1e-6
    summary_eps: float = 1e-5
    queries: int = 32
    qformer_dim: int = 768
    qformer_depth: int = 12
    qformer_heads: int = 12
    qformer_mlp_dim: int = 3072
    qformer_act: str = "gelu"
    qformer_eps: float = 1e-12
    cross_attention_every: int = 2
    causal: bool = True
    codes: int = 8192
    code_dim: int = 32
    decoder_depth: int = 4
    decoder_heads: int = 12
    decoder_mlp_ratio: float = 4.0
    decoder_eps: float = 1e-6
    head: Head = "mlp"
    head_widths: tuple[int, ...] = (256, 128, 32)
    head_queries: int = 1
    head_depth: int = 4
    embedding_dim: int = 1024
    diffusion: Mapping[str, Any] = field(default_factory=lambda: UNCLIP)
    steps: int = 20
    guidance: float = 10.0
    noise_level: int = 0
    parts: tuple[str, ...] = PARTS

    def __post_init__(self) -> None:
        for what, dim, heads in (
            ("vision_dim", self.vision_dim, self.vision_heads),
            ("qformer_dim", self.qformer_dim, self.qformer_heads),
            ("qformer_dim", self.qformer_dim, self.decoder_heads),
        ):
            if dim % heads:
                raise ValueError(f"{what} {dim} is not a multiple of {heads} heads")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.head not in get_args(Head):
            raise ValueError(f"head must be one of {', '.join(get_args(Head))}, not {self.head!r}")
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise ValueError(f"parts are {', '.join(PARTS)}, not {unknown[0]!r}")
        if not self.codes and "decoder" not in self.parts:
            raise ValueError("a model without codes must have a decoder")

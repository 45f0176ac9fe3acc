"""Random image models of transformers and diffusers, small enough for every test, and our tokenizers around them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderRAE, AutoencoderTiny, VQModel
from torch import Tensor, nn
from transformers import Emu3VQVAE, Emu3VQVAEConfig, JanusVQVAE
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor
from transformers.models.janus.configuration_janus import JanusVQVAEConfig

import zoo

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PLAIN = dict(
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(32, 64, 64),
    layers_per_block=1,
    latent_channels=4,
)
MOVQ = PLAIN | dict(
    down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
    norm_type="spatial",
)


def refilled(model: Any, spread: float = 0.5, seed: int = 0) -> Any:
    """A model with weights of unit gain, so that activations neither vanish nor grow, and codes of the given spread."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "quantize.embedding" in name:
                parameter.copy_(spread * noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.1 * noise + name.endswith("weight"))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval().requires_grad_(False)


def emu3() -> Emu3VQVAE:
    sizes = dict(base_channels=32, channel_multiplier=[1, 2, 2], num_res_blocks=1, attn_resolutions=[2], hidden_size=64)
    return refilled(Emu3VQVAE(Emu3VQVAEConfig(**sizes, codebook_size=300)), spread=0.15)


def janus() -> JanusVQVAE:
    sizes = dict(base_channels=32, channel_multiplier=[1, 2, 2], num_res_blocks=1, latent_channels=16, num_patches=8)
    return refilled(JanusVQVAE(JanusVQVAEConfig(**sizes, num_embeddings=300)))


def amused() -> VQModel:
    return refilled(VQModel(**PLAIN, num_vq_embeddings=300, mid_block_add_attention=False, lookup_from_codebook=True))


def movq() -> VQModel:
    return refilled(VQModel(**MOVQ, num_vq_embeddings=300, vq_embed_dim=4))


VQ: dict[str, Callable[[], Any]] = {"emu3": emu3, "janus": janus, "amused": amused, "movq": movq}


def save(model: nn.Module, folder: Path) -> Path:
    """Write a model as its library does, with an image processor where there is one to be."""
    model.save_pretrained(folder)
    if isinstance(model, Emu3VQVAE | JanusVQVAE):
        Emu3ImageProcessor(**HALF).save_pretrained(folder)
    return folder


def small_vq(kind: str) -> zoo.Tokenizer:
    """Our tokenizer around one of the models."""
    model = VQ[kind]()
    config = dict(model.config) if isinstance(model, VQModel) else model.config.to_dict() | {"preprocessor_config.json": HALF}
    if isinstance(model, VQModel):
        config["_class_name"] = "VQModel"
    return zoo.load_upstream("vq_images", config, model.state_dict())


def dc() -> AutoencoderDC:
    halves = dict(block_types=("ResBlock", "EfficientViTBlock", "EfficientViTBlock"), block_out_channels=(8, 16, 32))
    sizes = {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in halves.items()}
    layers = dict(encoder_layers_per_block=(0, 1, 1), decoder_layers_per_block=(0, 1, 1))
    scales = dict(encoder_qkv_multiscales=((), (5,), ()), decoder_qkv_multiscales=((), (), ()))
    norms = dict(decoder_norm_types=("batch_norm", "rms_norm", "rms_norm"), decoder_act_fns=("relu", "silu", "silu"))
    model = AutoencoderDC(**sizes, **layers, **scales, **norms, latent_channels=8, attention_head_dim=8, scaling_factor=0.5)
    return refilled(model)


def tiny() -> AutoencoderTiny:
    widths = dict(encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8))
    return refilled(AutoencoderTiny(**widths, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1)))


def rae(kind: str = "dinov2") -> AutoencoderRAE:
    patch = (
        {"encoder_patch_size": 14, "encoder_input_size": 56}
        if kind == "dinov2"
        else {"encoder_patch_size": 16, "encoder_input_size": 64}
    )
    encoder = dict(encoder_type=kind, encoder_hidden_size=64, encoder_num_hidden_layers=2)
    decoder = dict(
        decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=2, decoder_intermediate_size=64
    )
    means = torch.linspace(-0.5, 0.5, 64 * 16).reshape(64, 4, 4)
    # Of one size, so that an encoder of patches of 14 sees images of 32 pixels at 56.
    model = AutoencoderRAE(**encoder, **patch, **decoder, patch_size=8, latents_mean=means, latents_std=means.abs() + 0.5)
    return refilled(model)


def small_rae(kind: str = "dinov2") -> zoo.Tokenizer:
    """Our tokenizer around one of the models: 4 x 4 latents of images of 32 x 32 pixels."""
    model = rae(kind)
    return zoo.load_upstream("rae", dict(model.config) | {"_class_name": "AutoencoderRAE"}, model.state_dict())


DETERMINISTIC: dict[str, Callable[[], Any]] = {"dc": dc, "tiny": tiny}


def small_deterministic(kind: str) -> zoo.Tokenizer:
    """Our tokenizer around one of the models."""
    model = DETERMINISTIC[kind]()
    config = dict(model.config) | {"_class_name": type(model).__name__}
    return zoo.load_upstream("deterministic_ae", config, model.state_dict())


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1

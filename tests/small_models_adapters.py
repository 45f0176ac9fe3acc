"""Tiny random models of the libraries' classes, and the tokenizers around them.

Weights of a library's own initialisation give constant ids, and its codebooks start at zero: all are drawn anew.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import zoo


def refilled(model: nn.Module, seed: int = 0, gain: float = 1.0, norms: float = 2.0) -> nn.Module:
    """A library's model with other random numbers: weights of variance ``gain``/fan_in, codebooks of 0.3, scales about 0.5."""
    generator = torch.Generator().manual_seed(seed)
    model.eval().requires_grad_(False)
    transposed = {f"{name}." for name, own in model.named_modules() if isinstance(own, nn.ConvTranspose1d)}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or name.endswith(("inited", "initialized", "inv_freq")):
            continue
        drawn = torch.randn(tensor.shape, generator=generator)
        if any(part in name for part in ("codebook", "embed")) and tensor.ndim == 2:
            tensor.copy_(0.3 * drawn)
        elif name.endswith(("alpha", "beta", "cluster_size", "cluster_usage")):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif name.endswith(("scale", "gamma")):
            tensor.fill_(0.5)
        elif name.endswith(("original0", "weight_g")):
            tensor.mul_(norms)
        elif "norm" in name:
            continue
        elif tensor.ndim > 1:
            # A sample of a transposed convolution of kernel 2 * stride gets two of its inputs.
            fan = 2 * tensor.shape[0] if any(name.startswith(stem) for stem in transposed) else tensor[0].numel()
            tensor.copy_((gain / fan) ** 0.5 * drawn)
    return model


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def config_of(model: Any) -> dict[str, Any]:
    """What `config.json` would hold."""
    config: Any = model.config
    found: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return found if "model_type" in found else found | {"_class_name": type(model).__name__}


def adapter(family: str, model: Any, name: str) -> Any:
    """The tokenizer around a library's model."""
    tokenizer = zoo.load_upstream(family, config_of(model), state_of(model))
    tokenizer.name = name
    return tokenizer


SMALL_DAC = dict(
    encoder_hidden_size=4, decoder_hidden_size=32, downsampling_ratios=[2, 4, 5, 8], n_codebooks=4, codebook_size=64,
    codebook_dim=4,
)  # fmt: skip


@cache
def dac_model(ratios: tuple[int, ...] = (2, 4, 5, 8)) -> Any:
    from transformers import DacConfig, DacModel

    config = DacConfig(**SMALL_DAC | {"downsampling_ratios": list(ratios)}, sampling_rate=16_000)
    return refilled(DacModel(config), gain=0.4)


def small_dac() -> Any:
    return adapter("dac", dac_model(), "small-dac")


@cache
def encodec_model(causal: bool = True) -> Any:
    from transformers import EncodecConfig, EncodecModel

    # Four codebooks of 64: 4 * 6 bits * 400 frames a second.
    sizes = dict(num_filters=4, hidden_size=8, upsampling_ratios=[5, 4, 2], codebook_size=64, target_bandwidths=[4.8, 9.6])
    config = EncodecConfig(**sizes, sampling_rate=16_000, use_causal_conv=causal, use_conv_shortcut=causal)
    return refilled(EncodecModel(config), gain=2.0)


@cache
def encodec_chunks_model() -> Any:
    """As the model of 48 kHz: stereo, chunks that overlap by a frame and a half, group norms."""
    from transformers import EncodecConfig, EncodecModel

    sizes = dict(num_filters=4, hidden_size=8, upsampling_ratios=[5, 4, 2], codebook_size=64, target_bandwidths=[4.8, 9.6])
    config = EncodecConfig(
        **sizes, sampling_rate=16_000, use_causal_conv=False, audio_channels=2, normalize=True, norm_type="time_group_norm",
        chunk_length_s=0.1, overlap=0.0375,
    )  # fmt: skip
    return refilled(EncodecModel(config), gain=2.0)


@cache
def mimi_model() -> Any:
    from transformers import MimiConfig, MimiModel

    config = MimiConfig(
        hidden_size=32, num_filters=4, upsampling_ratios=[5, 4, 2], upsample_groups=32, sliding_window=12, num_hidden_layers=2,
        codebook_size=64, codebook_dim=16, vector_quantization_hidden_dimension=16, num_quantizers=4, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, intermediate_size=32, sampling_rate=16_000, compress=2,
    )  # fmt: skip
    return refilled(MimiModel(config), gain=2.0)


def small_encodec() -> Any:
    return adapter("encodec", encodec_model(), "small-encodec")


def small_encodec_chunks() -> Any:
    return adapter("encodec", encodec_chunks_model(), "small-encodec-chunks")


def small_mimi() -> Any:
    return adapter("mimi", mimi_model(), "small-mimi")


@cache
def oobleck_model() -> Any:
    from diffusers import AutoencoderOobleck

    model = AutoencoderOobleck(
        encoder_hidden_size=8, downsampling_ratios=[2, 4, 5], channel_multiples=[1, 2, 4], decoder_channels=8,
        decoder_input_channels=4, sampling_rate=16_000,
    )  # fmt: skip
    return refilled(model, norms=0.5)


@cache
def pocket_tts_model() -> Any:
    from transformers import PocketTTSAudioTokenizerConfig, PocketTTSAudioTokenizerModel

    config = PocketTTSAudioTokenizerConfig(
        hidden_size=32, num_filters=4, upsampling_ratios=[5, 4], upsample_groups=32, sliding_window=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, intermediate_size=32, sampling_rate=16_000, latent_stride=4,
        latent_dim=8,
    )  # fmt: skip
    return refilled(PocketTTSAudioTokenizerModel(config), gain=1.5)


@cache
def vibevoice_model() -> Any:
    from transformers import VibeVoiceAcousticTokenizerConfig, VibeVoiceAcousticTokenizerModel

    config = VibeVoiceAcousticTokenizerConfig(hidden_size=8, num_filters=4, downsampling_ratios=[2, 4, 5], depths=[1, 1, 2, 1])
    return refilled(VibeVoiceAcousticTokenizerModel(config), gain=1.5)


def small_oobleck() -> Any:
    return adapter("oobleck", oobleck_model(), "small-oobleck")


def small_pocket_tts() -> Any:
    return adapter("pocket_tts", pocket_tts_model(), "small-pocket-tts")


def small_vibevoice() -> Any:
    return adapter("vibevoice", vibevoice_model(), "small-vibevoice")


@cache
def xcodec_model(higgs: bool = False) -> Any:
    from transformers import (
        DacConfig,
        HiggsAudioV2TokenizerConfig,
        HiggsAudioV2TokenizerModel,
        HubertConfig,
        XcodecConfig,
        XcodecModel,
    )

    ratios = [8, 5, 4, 2, 3] if higgs else [8, 5, 4, 2]
    speech = HubertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=[8] * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, mask_time_prob=0.0,
    )  # fmt: skip
    sound = DacConfig(
        encoder_hidden_size=2, decoder_hidden_size=64, downsampling_ratios=ratios, hidden_size=16, codebook_size=64
    ).to_dict() | {"upsampling_ratios": ratios, "hidden_size": 16}
    sizes = dict(acoustic_model_config=sound, semantic_model_config=speech.to_dict(), codebook_size=64)
    if higgs:
        # Three codebooks of 6 bits, 25 times a second.
        config = HiggsAudioV2TokenizerConfig(**sizes, codebook_dim=8, target_bandwidths=[0.3, 0.45])
        return refilled(HiggsAudioV2TokenizerModel(config), gain=0.4, norms=1.0)
    return refilled(XcodecModel(XcodecConfig(**sizes, target_bandwidths=[0.6, 0.9])), gain=0.4, norms=1.0)


def small_xcodec() -> Any:
    return adapter("xcodec", xcodec_model(), "small-xcodec")


@cache
def xcodec2_model(neucodec: bool = False) -> Any:
    from transformers import NeuCodecConfig, NeuCodecModel, Wav2Vec2BertConfig, Xcodec2Config, Xcodec2Model

    speech = Wav2Vec2BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, feature_projection_input_dim=160,
        conv_depthwise_kernel_size=5,
    )  # fmt: skip
    # The widths of both encoders add up to that of the quantizer, and 32 groups want a multiple of 32.
    sizes = dict(
        encoder_hidden_size=2, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, semantic_model_config=speech.to_dict(), quantization_dim=96,
    )  # fmt: skip
    model: Any = NeuCodecModel(NeuCodecConfig(**sizes)) if neucodec else Xcodec2Model(Xcodec2Config(**sizes))
    # Filters, windows and the grid of codes are no weights, and are in no file.
    stored = model.state_dict()
    fixed = {name: tensor.clone() for name, tensor in model.named_buffers() if name not in stored}
    refilled(model, gain=2.0)
    for name, tensor in model.named_buffers():
        if name in fixed:
            tensor.copy_(fixed[name])
    return model


def small_xcodec2() -> Any:
    return adapter("xcodec2", xcodec2_model(), "small-xcodec2")


def small_neucodec() -> Any:
    return adapter("xcodec2", xcodec2_model(True), "small-neucodec")


#: By the name that they have in the contract suite.
AUDIO_ADAPTERS = {
    "dac": small_dac,
    "encodec": small_encodec,
    "encodec-chunks": small_encodec_chunks,
    "mimi": small_mimi,
    "oobleck": small_oobleck,
    "pocket_tts": small_pocket_tts,
    "vibevoice": small_vibevoice,
    "xcodec": small_xcodec,
    "xcodec2": small_xcodec2,
    "neucodec": small_neucodec,
}

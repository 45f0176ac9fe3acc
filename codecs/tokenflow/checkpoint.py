"""Mapping of official checkpoints to our state dict, and of official configurations to ours."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from zoo.checkpoint import Checkpoint, layer_numbers, renamed, require_agreement, shape_of
from zoo.codecs.tokenflow.config import PARTS, TokenFlowConfig
from zoo.errors import KeysError, WeightsError
from zoo.nn import vqgan
from zoo.nn.vit import fuse_qkv_bias

# The official architectures, by the name of the teacher.
_OFFICIAL = {
    "clipb_224": TokenFlowConfig(
        image_size=224,
        scales=(1, 2, 4, 6, 8, 10, 12, 14),
        decoder_widths=(512, 256, 256, 128, 128),
        decoder_blocks=3,
    ),
    "siglip_384": TokenFlowConfig(
        teacher="siglip",
        image_size=384,
        patch_size=14,
        scales=(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27),
        semantic_dim=1152,
        semantic_depth=26,
        semantic_heads=16,
        semantic_hidden=4304,
        decoder_widths=(512, 256, 256, 128, 128),
        decoder_blocks=3,
        feature_dim=1152,
    ),
}
_ENHANCED = {"channels": 256, "num_res_blocks": 4}
_BASE = {"channels": 128, "num_res_blocks": 2}
_MULTIPLIERS = (1, 1, 2, 2, 4)
_KINDS = {"clipb_224": "openai-clip-vit", "siglip_384": "siglip"}

# The queue of recently used codes, the constants of the input's scaling, and SigLIP's pooling above the features in use.
_DROPPED = re.compile(
    r"quantize\.codebook_used$|scaling_layer\.(shift|scale)$|encoder_vqkd\.(vision_model\.)?(post_layernorm|head)\."
)

# Names of the official files and ours, applied one after the other.
_RENAMED = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^quantize\.embedding_vqkd\.weight$", "quantizer.semantic"),
        (r"^quantize\.embedding_vqgan\.weight$", "quantizer.pixels"),
        (r"^encode_task_layer\.", "encoder.to_codes."),
        (r"^decode_task_layer\.", "semantic_decoder.to_features."),
        (r"^quant_conv\.", "encoder.pixels.quant_conv."),
        (r"^post_quant_conv\.", "decoder.post_quant_conv."),
        (r"^encoder\.(?=conv_|mid|norm_out)", "encoder.pixels."),
        # Convolutional networks.
        (r"\.conv_blocks\.(\d+)\.res\.", r".levels.\1.resnets."),
        (r"\.conv_blocks\.(\d+)\.attn\.", r".levels.\1.attentions."),
        (r"\.conv_blocks\.(\d+)\.downsample\.", r".levels.\1.downsamplers.0."),
        (r"\.conv_blocks\.(\d+)\.upsample\.", r".levels.\1.upsamplers.0."),
        (r"\.mid\.0\.", ".mid.resnets.0."),
        (r"\.mid\.1\.", ".mid.attentions.0."),
        (r"\.mid\.2\.", ".mid.resnets.1."),
        *vqgan.BLOCK_NAMES,
        # OpenAI's CLIP.
        (r"^encoder_vqkd\.class_embedding$", "encoder.semantic.class_token"),
        (r"^encoder_vqkd\.positional_embedding$", "encoder.semantic.positions"),
        (r"^encoder_vqkd\.conv1\.", "encoder.semantic.patches."),
        (r"^encoder_vqkd\.ln_pre\.", "encoder.semantic.norm_pre."),
        (r"^encoder_vqkd\.ln_post\.", "encoder.semantic.norm."),
        (r"^encoder_vqkd\.transformer\.resblocks\.", "encoder.semantic.blocks."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.attn\.in_proj_", ".attn.qkv."),
        (r"\.attn\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.c_fc\.", ".mlp.fc1."),
        (r"\.mlp\.c_proj\.", ".mlp.fc2."),
        # SigLIP, which transformers has with one level more or less.
        (r"^encoder_vqkd\.(?:vision_model\.)?embeddings\.patch_embedding\.", "encoder.semantic.patches."),
        (r"^encoder_vqkd\.(?:vision_model\.)?embeddings\.position_embedding\.weight$", "encoder.semantic.positions"),
        (r"^encoder_vqkd\.(?:vision_model\.)?encoder\.layers\.", "encoder.semantic.blocks."),
        (r"\.layer_norm([12])\.", r".norm\1."),
        (r"\.self_attn\.out_proj\.", ".attn.proj."),
        (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
        # The semantic decoder.
        (r"^decoder_vqkd\.cls_token$", "semantic_decoder.class_token"),
        (r"^decoder_vqkd\.pos_embed$", "semantic_decoder.positions"),
        (r"^decoder_vqkd\.patch_embed\.proj\.", "semantic_decoder.patches."),
        (r"^decoder_vqkd\.fc_norm\.", "semantic_decoder.norm."),
        (r"^decoder_vqkd\.blocks\.", "semantic_decoder.blocks."),
    )
]
# Projections of queries, keys and values that stand apart: SigLIP's, and the biases of the semantic decoder.
_PARTS = re.compile(r"(.*\.attn\.)([qkv])[._](weight|bias)")
_PATCHES = "semantic_decoder.patches.weight"
_OURS = re.compile(r"(encoder\.(semantic|pixels|to_codes)|quantizer|decoder|semantic_decoder)\.")


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of an official checkpoint."""
    return {"quantize.embedding_vqkd.weight", "quantize.embedding_vqgan.weight", "encode_task_layer.0.weight"} <= set(keys)


def wanted(key: str) -> bool:
    """Whether inference needs an entry of an official checkpoint."""
    return not _DROPPED.match(key)


# ----------------------------------------------------------------------------------------------------------- configuration


def upstream_config(raw: Mapping[str, Any]) -> TokenFlowConfig | None:
    """Read the arguments of the official class; ``shrunk`` among them holds what the official code fixes.

    Raises:
        WeightsError: a setting is one that no official model uses, or sizes contradict each other.
    """
    model = raw.get("model", raw)
    if not isinstance(model, Mapping) or "teacher" not in model:
        return None
    _require_settings(model)
    try:
        return _read_arguments(model)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"the TokenFlow configuration cannot be used: {error!r}") from error


def _require_settings(model: Mapping[str, Any]) -> None:
    """Refuse settings that would change the numbers and are in no official model."""
    kind = model.get("shrunk", {}).get("semantic_encoder", {}).get("kind")
    checks = {
        f"teacher must be one of {', '.join(_OFFICIAL)}": model["teacher"] in _OFFICIAL,
        "semantic_encoder.kind must be that of the teacher": kind is None or kind == _KINDS.get(model["teacher"]),
        "codebook_l2_norm must be true": model.get("codebook_l2_norm", True),
        "kmeans must be false": not model.get("kmeans", False),
    }
    if failed := [text for text, holds in checks.items() if not holds]:
        raise WeightsError(f"these settings of a TokenFlow are not supported: {'; '.join(failed)}")


def _read_arguments(model: Mapping[str, Any]) -> TokenFlowConfig:
    official = _OFFICIAL[model["teacher"]]
    shrunk = model.get("shrunk", {})
    vision, semantic_decoder = shrunk.get("semantic_encoder", {}), shrunk.get("semantic_decoder", {})
    siglip, interpolate = official.teacher == "siglip", bool(model.get("infer_interpolate", False))
    defaults = TokenFlowConfig()
    patch_size = vision.get("patch_size", official.patch_size)
    native = vision.get("input_resolution", official.image_size)
    image_size = model.get("image_size", defaults.image_size if interpolate and not siglip else native)
    if image_size // patch_size != native // patch_size and (siglip or not interpolate):
        raise ValueError(f"images of {image_size} pixels need infer_interpolate: positions are those of {native}")
    scales = shrunk.get("scale_rq_layers", defaults.scales if interpolate and not siglip else official.scales)
    dim = shrunk.get("embed_dim", official.semantic_dim)
    hidden = vision.get("intermediate_size", official.semantic_hidden) if siglip else 4 * dim
    layers = vision.get("layers", official.semantic_depth + siglip)
    encoder_channels = shrunk.get("encoder_ch", defaults.encoder_stem)
    size = _ENHANCED if model.get("enhanced_decoder", False) else _BASE
    decoder_channels = shrunk.get("decoder_ch", size["channels"])
    return TokenFlowConfig(
        teacher=official.teacher,
        image_size=image_size,
        patch_size=patch_size,
        scales=tuple(scales),
        semantic_dim=dim,
        semantic_depth=layers - siglip,
        semantic_heads=vision.get("heads", official.semantic_heads),
        semantic_hidden=hidden,
        codebook_size=model.get("codebook_size", defaults.codebook_size),
        semantic_code_dim=model.get("semantic_code_dim", defaults.semantic_code_dim),
        pixel_code_dim=model.get("codebook_embed_dim", defaults.pixel_code_dim),
        encoder_stem=encoder_channels,
        encoder_widths=tuple(encoder_channels * m for m in model.get("encoder_ch_mult", _MULTIPLIERS)),
        encoder_blocks=shrunk.get("encoder_num_res_blocks", defaults.encoder_blocks),
        latent_channels=model.get("z_channels", defaults.latent_channels),
        decoder_widths=tuple(decoder_channels * m for m in reversed(model.get("decoder_ch_mult", _MULTIPLIERS))),
        decoder_blocks=shrunk.get("decoder_num_res_blocks", size["num_res_blocks"]) + 1,
        semantic_decoder_depth=semantic_decoder.get("depth", defaults.semantic_decoder_depth),
        semantic_decoder_heads=semantic_decoder.get("heads", defaults.semantic_decoder_heads),
        feature_dim=shrunk.get("decoder_out_dim", official.feature_dim),
        commitment=model.get("commit_loss_beta", defaults.commitment),
        entropy=model.get("entropy_loss_ratio", defaults.entropy),
    )


# ----------------------------------------------------------------------------------------------------------------- tensors


def convert(state: Mapping[str, Tensor], config: TokenFlowConfig | None) -> tuple[TokenFlowConfig, dict[str, Tensor]]:
    """Rename the official tensors and compare their sizes with the configuration.

    Without one, sizes are inferred and what leaves no trace in them (the size of images, scales, attention heads) is taken from
    the official models; a CLIP checkpoint is taken to work at 256 pixels then.

    Raises:
        KeysError: tensors are missing or unexpected, or their shapes contradict each other or ``config``.
    """
    named = renamed(state, our_key, "TokenFlow", wanted)
    found = _infer_config(named, config)
    require_agreement(found, config)
    return found, _our_tensors(named, found)


def our_key(key: str) -> str | None:
    """Our name for an entry of an official checkpoint; ``None`` if there is none."""
    name = key
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name if _OURS.match(name) else None


def _infer_config(named: Mapping[str, Tensor], config: TokenFlowConfig | None) -> TokenFlowConfig:
    """The configuration, or the official one for this kind of semantic encoder, with the sizes that the shapes imply."""
    shape = partial(shape_of, named)

    def count(stem: str) -> int:
        return len(layer_numbers(named, stem))

    siglip = "encoder.semantic.patches.bias" in named
    base = config or (_OFFICIAL["siglip_384"] if siglip else TokenFlowConfig())
    encoder, decoder = "encoder.pixels.levels", "decoder.levels"
    semantic_dim, _, patch_size, _ = shape("encoder.semantic.patches.weight")
    codebook_size, semantic_code_dim = shape("quantizer.semantic")
    try:
        return replace(
            base,
            teacher="siglip" if siglip else "clip",
            patch_size=patch_size,
            semantic_dim=semantic_dim,
            semantic_depth=count("encoder.semantic.blocks") - siglip,
            semantic_hidden=shape("encoder.semantic.blocks.0.mlp.fc1.weight")[0],
            codebook_size=codebook_size,
            semantic_code_dim=semantic_code_dim,
            pixel_code_dim=shape("quantizer.pixels")[1],
            encoder_stem=shape("encoder.pixels.conv_in.weight")[0],
            encoder_widths=tuple(shape(f"{encoder}.{i}.resnets.0.conv1.weight")[0] for i in range(count(encoder))),
            encoder_blocks=count(f"{encoder}.0.resnets"),
            latent_channels=shape("encoder.pixels.conv_out.weight")[0],
            decoder_widths=tuple(shape(f"{decoder}.{i}.resnets.0.conv1.weight")[0] for i in range(count(decoder))),
            decoder_blocks=count(f"{decoder}.0.resnets"),
            semantic_decoder_depth=count("semantic_decoder.blocks"),
            feature_dim=shape("semantic_decoder.to_features.2.weight")[0],
        )
    except ValueError as error:
        raise KeysError(f"the sizes of this checkpoint do not fit together, or need its configuration: {error}") from error


def _our_tensors(named: Mapping[str, Tensor], config: TokenFlowConfig) -> dict[str, Tensor]:
    """Tensors in our shapes: fused projections, positions of the grid in use, matrices instead of 1x1 convolutions."""
    ours: dict[str, Tensor] = {}
    fused: dict[str, dict[str, Tensor]] = {}
    for name, tensor in named.items():
        owner = name.partition(".")[0]
        if owner in PARTS and owner not in config.parts:
            continue
        block = re.match(r"encoder\.semantic\.blocks\.(\d+)\.", name)
        if block and config.teacher == "siglip" and int(block[1]) >= config.semantic_depth:
            # The features in use do not reach SigLIP's last block.
            continue
        if part := _PARTS.fullmatch(name):
            fused.setdefault(f"{part[1]}qkv.{part[3]}", {})[part[2]] = tensor
        elif name.endswith("class_token"):
            ours[name] = tensor.reshape(1, -1)
        elif name.endswith("positions"):
            ours[name] = _resize_positions(name, tensor.flatten(0, -2), config)
        elif tensor.ndim == 4 and (name == _PATCHES or vqgan.MATRICES.search(name)):
            ours[name] = tensor[:, :, 0, 0]
        else:
            ours[name] = tensor
    for name, parts in fused.items():
        ours[name] = _fuse(name, parts)
    return ours


def _fuse(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """Queries, keys and values one after the other."""
    optional = {"k"} if name.startswith("semantic_decoder.") else set()
    if missing := sorted(set("qkv") - optional - parts.keys()):
        raise KeysError(f"missing: the {' and '.join(missing)} part of {name}")
    return torch.cat([parts[part] for part in "qkv"]) if "k" in parts else fuse_qkv_bias(parts["q"], parts["v"])


def _resize_positions(
    name: str, table: Float[Tensor, "positions dim"], config: TokenFlowConfig
) -> Float[Tensor, "resized dim"]:
    """Positions of the grid in use, that of a class token first where there is one.

    The original resizes by the factor (grid + 0.1) / side, as DINO does (arXiv 2104.14294), and samples by that factor too,
    which is not what resizing to the same size gives.
    """
    class_tokens = 0 if name.startswith("encoder.") and config.teacher == "siglip" else 1
    first, patches = table[:class_tokens], table[class_tokens:]
    side = round(len(patches) ** 0.5)
    if side * side != len(patches):
        raise KeysError(f"{name} has {len(table)} rows, which is no square grid")
    if side == config.grid:
        return table
    if config.teacher == "siglip":
        raise KeysError(f"{name} is a grid of {side}, not of {config.grid}, and SigLIP's positions are not resized")
    grid = patches.float().T.unflatten(1, (side, side))[None]
    resized = F.interpolate(grid, scale_factor=(config.grid + 0.1) / side, mode="bicubic")
    return torch.cat([first.float(), resized[0].flatten(1).T])


CHECKPOINT = Checkpoint(recognises=recognises, convert=convert, config=upstream_config, wanted=wanted)

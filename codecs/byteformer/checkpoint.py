"""Mapping of official checkpoints to our state dict, and of official configurations to ours."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from zoo.checkpoint import Checkpoint, layer_numbers, renamed, require_agreement, shape_of
from zoo.codecs.byteformer.config import ByteFormerConfig
from zoo.codecs.byteformer.embedding import sinusoidal_positions
from zoo.errors import KeysError, WeightsError, listing

_POSITIONS = "pos_embed.pos_embed.pos_embed"
_NAMES = {
    "embeddings.weight": "embedding.bytes",
    "token_reduction_net.weight": "embedding.reduction",
    _POSITIONS: "embedding.positions",
    "post_transformer_norm.weight": "transformer.norm.weight",
    "post_transformer_norm.bias": "transformer.norm.bias",
    "classifier.weight": "classifier.weight",
    "classifier.bias": "classifier.bias",
}
# A block's parts by their place in the original's sequences; between them are activation and dropout, which hold no tensors.
_BLOCK = re.compile(r"transformer\.(\d+)\.(pre_norm_mha|pre_norm_ffn)\.([\d.a-z_]+)\.(weight|bias)")
_BLOCK_PARTS = {
    ("pre_norm_mha", "0"): "norm1",
    ("pre_norm_mha", "1.qkv_proj"): "attn.qkv",
    ("pre_norm_mha", "1.out_proj"): "attn.proj",
    ("pre_norm_ffn", "0"): "norm2",
    ("pre_norm_ffn", "1"): "mlp.fc1",
    ("pre_norm_ffn", "4"): "mlp.fc2",
}
_MERGE = re.compile(r"downsamplers\.downsample_(\d+)\.(reduction\.weight|norm\.weight|norm\.bias)")

# The presets that the original's ``mode`` names: width, blocks, heads, feed-forward width.
_SIZES = ("embed_dim", "n_transformer_layers", "n_attn_heads", "ffn_dim")
_MODES = {
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "huge": (1280, 32, 20, 5120),
}
# Settings that would change the numbers, and the only values that any official model has.
_FIXED = {"norm_layer": "layer_norm", "norm": "layer_norm", "activation": "gelu"}


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of an official checkpoint."""
    return {"embeddings.weight", "token_reduction_net.weight", "post_transformer_norm.weight"} <= set(keys)


# ----------------------------------------------------------------------------------------------------------- configuration


def upstream_config(raw: Mapping[str, Any]) -> ByteFormerConfig | None:
    """Read the official settings: the values themselves, or a whole configuration of a training run that holds them.

    Raises:
        WeightsError: a size is missing or impossible, a list has the wrong length, or no official model has such a setting.
    """
    settings = _settings(raw)
    if settings is None:
        return None
    if wrong := [f"{name} {settings[name]}" for name, value in _FIXED.items() if settings.get(name, value) != value]:
        raise WeightsError(f"these settings of a ByteFormer are not supported: {listing(wrong)}")
    try:
        return _read_settings(settings, raw)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise WeightsError(f"the ByteFormer configuration cannot be used: {reason}") from error


def _settings(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The settings of the model, wherever a configuration has them."""
    if "conv_kernel_size" in raw:
        return raw
    for task in ("classification", "audio_classification"):
        section = raw.get("model", {}).get(task)
        if isinstance(section, Mapping) and isinstance(section.get("byteformer"), Mapping):
            counts = {"n_classes": section["n_classes"]} if "n_classes" in section else {}
            return counts | section["byteformer"]
    return None


def _read_settings(settings: Mapping[str, Any], raw: Mapping[str, Any]) -> ByteFormerConfig:
    defaults = ByteFormerConfig()
    mode = settings.get("mode", "tiny")
    sizes = dict(zip(_SIZES, _MODES.get(mode, ()), strict=False)) | {
        name: settings[name] for name in _SIZES if settings.get(name) is not None
    }
    depth = sizes["n_transformer_layers"]
    shifts = tuple(settings.get("window_shifts", defaults.shifts))
    if len(shifts) != depth:
        raise ValueError(f"{len(shifts)} window_shifts for {depth} blocks")
    return ByteFormerConfig(
        dim=sizes["embed_dim"],
        heads=sizes["n_attn_heads"],
        hidden=sizes["ffn_dim"],
        kernel=settings["conv_kernel_size"],
        windows=_shortest(settings.get("window_sizes", defaults.windows)),
        shifts=shifts,
        merges=_merges(settings, depth, defaults.merges),
        max_tokens=settings.get("max_num_tokens", defaults.max_tokens),
        vocab_size=settings.get("vocab_size", defaults.vocab_size),
        classes=settings.get("n_classes", defaults.classes),
        sinusoidal=bool(settings.get("sinusoidal_pos_emb", False)),
        layernorm_axis_rule=bool(settings.get("layernorm_axis_rule", True)),
        **_files(raw),
    )


def _files(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that say how a training run made its files, with the original's defaults where its configuration is silent."""
    image, audio = raw.get("image_augmentation", {}), raw.get("audio_augmentation", {})

    def enabled(section: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
        settings = section.get(name) or {}
        return settings if settings.get("enable", False) else None

    found: dict[str, Any] = {}
    if (saved := enabled(image, "pil_save")) is not None:
        found |= {"file": saved.get("file_encoding", "TIFF"), "quality": saved.get("quality", 100)}
    if (resize := enabled(image, "resize")) is not None:
        found |= {"resized": resize.get("size", 256), "interpolation": resize.get("interpolation", "bilinear")}
    if (crop := enabled(image, "center_crop")) is not None:
        found["cropped"] = crop.get("size", 224)
    if (saved := enabled(audio, "torchaudio_save")) is not None:
        found |= {"file": saved.get("format", "wav").upper(), "sample_type": saved.get("encoding_dtype", "float32")}
    if (order := enabled(image, "shuffle_bytes")) is not None:
        found |= {
            "shuffle": order.get("mode", "reverse"),
            "shuffle_stride": order.get("stride", 1024),
            "shuffle_window": order.get("window_size", 1024),
        }
    if (camera := enabled(image, "mask_positions")) is not None:
        found["keep"] = camera.get("keep_frac", 0.5)
    if (noise := enabled(image, "random_uniform")) is not None:
        found["noise"] = tuple(noise.get("width_range", (-5, 5)))
    if enabled(image, "byte_permutation") is not None:
        found["permuted"] = True
    return found


def _shortest(windows: Any) -> tuple[int, ...]:
    """One window for all blocks where they are equal."""
    sizes = (windows,) if isinstance(windows, int) else tuple(windows)
    return sizes[:1] if len(set(sizes)) == 1 else sizes


def _merges(settings: Mapping[str, Any], depth: int, default: tuple[int, ...]) -> tuple[int, ...]:
    if "downsample_after_blocks" in settings:
        return tuple(settings["downsample_after_blocks"])
    flags = settings.get("downsample", [block in default for block in range(12)])
    if len(flags) != depth:
        raise ValueError(f"{len(flags)} values of downsample for {depth} blocks")
    # The original's command line takes any text for true; a list of texts is no configuration of anything.
    if not all(flag in (True, False) for flag in flags):
        raise ValueError(f"downsample must hold true and false, not {flags}")
    return tuple(block for block, flag in enumerate(flags) if flag)


# ----------------------------------------------------------------------------------------------------------------- tensors


def convert(state: Mapping[str, Tensor], config: ByteFormerConfig | None) -> tuple[ByteFormerConfig, dict[str, Tensor]]:
    """Rename the official tensors and compare their sizes with the configuration.

    Without one, sizes are inferred, and what leaves no trace in them is taken from the official models: heads of 64 channels,
    windows of 128 tokens, every other one shifted by half.

    Raises:
        KeysError: tensors are missing or unexpected, or their shapes contradict each other or ``config``.
    """
    named = {name: _our_tensor(name, tensor) for name, tensor in renamed(state, our_key, "ByteFormer").items()}
    if config is not None and config.sinusoidal and "embedding.positions" not in named:
        named["embedding.positions"] = sinusoidal_positions(config.max_tokens, config.dim)
    found = _infer_config(named, config)
    require_agreement(found, config)
    return found, named


def our_key(key: str) -> str | None:
    """Our name for an entry of an official checkpoint; ``None`` if there is none."""
    if key in _NAMES:
        return _NAMES[key]
    if merge := _MERGE.fullmatch(key):
        return f"transformer.merges.{merge[1]}.{merge[2]}"
    if (block := _BLOCK.fullmatch(key)) and (part := _BLOCK_PARTS.get((block[2], block[3]))):
        return f"transformer.blocks.{block[1]}.{part}.{block[4]}"
    return None


def _our_tensor(name: str, tensor: Tensor) -> Tensor:
    if name == "embedding.positions":
        return tensor.reshape(-1, tensor.shape[-1])
    if name.endswith("reduction.weight"):
        if tensor.ndim != 2 or tensor.shape[1] % 2:
            raise KeysError(f"{name} is {list(tensor.shape)}, which does not take pairs of tokens")
        # The original interleaves the channels of the two tokens; here one token follows the other, as they lie in memory.
        return tensor.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1)
    return tensor


def _infer_config(named: Mapping[str, Tensor], config: ByteFormerConfig | None) -> ByteFormerConfig:
    """The configuration, or the official one, with the sizes that the shapes imply."""
    shape = partial(shape_of, named)

    def numbers(part: str) -> list[int]:
        return layer_numbers(named, f"transformer.{part}")

    vocab_size, dim = shape("embedding.bytes", 2)
    depth = len(numbers("blocks"))
    if config is None:
        config = replace(
            ByteFormerConfig(), heads=max(1, dim // 64), shifts=tuple(64 * (i % 2) for i in range(depth)), merges=()
        )
    if depth != config.depth:
        raise KeysError(f"the checkpoint has {depth} blocks, the configuration {config.depth}")
    try:
        return replace(
            config,
            dim=dim,
            hidden=shape("transformer.blocks.0.mlp.fc1.weight", 2)[0],
            kernel=shape("embedding.reduction", 3)[2],
            merges=tuple(numbers("merges")),
            max_tokens=shape("embedding.positions", 2)[0],
            vocab_size=vocab_size,
            classes=shape("classifier.weight", 2)[0],
        )
    except ValueError as error:
        raise KeysError(f"the sizes of this checkpoint do not fit together: {error}") from error


CHECKPOINT = Checkpoint(recognises=recognises, convert=convert, config=upstream_config)

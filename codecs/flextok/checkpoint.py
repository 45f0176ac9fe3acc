"""Mapping of official checkpoints to our state dict, and of official configurations to ours.

The configuration is a tree of modules with a class path each, in ``config.json`` or in the metadata of the safetensors file.
It is read as data: known class paths say what a number means, any other one is refused, and nothing is ever imported or called.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from zoo.checkpoint import Checkpoint, layer_numbers, renamed, require_agreement, shape_of
from zoo.codecs.flextok.config import FlexTokConfig
from zoo.codecs.flextok.transformer import hidden_dim
from zoo.errors import KeysError, WeightsError
from zoo.nn import vae

# Module names of the official files, in the order in which data meets them, and ours.
_MODULES = {
    "encoder.module_dict.enc_patch_emb.patch_proj.": "encoder.patches.proj.",
    "encoder.module_dict.enc_posemb_module.posembs": "encoder.positions",
    "encoder.module_dict.enc_register_module.registers": "encoder.registers",
    "encoder.module_dict.enc_transformer.blocks.": "encoder.blocks.",
    "encoder.module_dict.enc_to_latents.proj.": "encoder.to_codes.",
    "decoder.module_dict.dec_from_latents.proj.": "decoder.from_codes.",
    "decoder.module_dict.dec_registers_posemb_module.posembs": "decoder.register_positions",
    "decoder.module_dict.dec_nested_dropout.dropout_mask_token": "decoder.mask_token",
    "decoder.module_dict.dec_latent_dropout.nullcond": "decoder.null_token",
    "decoder.module_dict.dec_noise_patch_emb.patch_proj.": "decoder.patches.proj.",
    "decoder.module_dict.dec_patches_posemb_module.posembs": "decoder.patch_positions",
    "decoder.module_dict.dec_time_embedder.": "decoder.time.",
    "decoder.module_dict.dec_transformer.blocks.": "decoder.blocks.",
    "decoder.module_dict.dec_to_patches.": "decoder.head.",
}
_MODULATION = ("adaLN_modulation.1.", "modulation.")
# The projector of the alignment loss (REPA), which training alone uses.
_DROPPED = re.compile(r"decoder\.module_dict\.dec_repa")
_CHECKPOINTED = "_checkpoint_wrapped_module."

# The modules that decide the numbers, in their order (which says, for one, that a mask token carries no position), and the
# only class that each may have.
_ENCODER_CLASSES = {
    "enc_patch_emb": "flextok.model.preprocessors.patching.PatchEmbedder",
    "enc_posemb_module": "flextok.model.utils.posembs.PositionalEmbeddingAdder",
    "enc_register_module": "flextok.model.preprocessors.registers.Registers1D",
    "enc_seq_packer": "flextok.model.preprocessors.flex_seq_packing.BlockWiseSequencePacker",
    "enc_transformer": "flextok.model.trunks.transformers.FlexTransformer",
    "enc_to_latents": "flextok.model.postprocessors.heads.LinearHead",
}
_DECODER_CLASSES = {
    "dec_from_latents": "flextok.model.preprocessors.linear.LinearLayer",
    "dec_registers_posemb_module": "flextok.model.utils.posembs.PositionalEmbeddingAdder",
    "dec_nested_dropout": "flextok.model.preprocessors.token_dropout.MaskedNestedDropout",
    "dec_latent_dropout": "flextok.model.preprocessors.nullcond.LearnedNullCond",
    "dec_noise_patch_emb": "flextok.model.preprocessors.patching.PatchEmbedder",
    "dec_patches_posemb_module": "flextok.model.utils.posembs.PositionalEmbeddingAdder",
    "dec_seq_packer": "flextok.model.preprocessors.flex_seq_packing.BlockWiseSequencePacker",
    "dec_time_embedder": "flextok.model.preprocessors.time_embedding.TimestepEmbedder",
    "dec_transformer": "flextok.model.trunks.transformers.FlexTransformer",
    "dec_to_patches": "flextok.model.postprocessors.heads.ToPatchesLinearHead",
}
# Changes of layout, without weights and under any name.
_LAYOUT_CLASSES = {
    "flextok.model.utils.dict_ops.PerSampleOp",
    "flextok.model.postprocessors.seq_unpacking.SequenceUnpacker",
}
_TARGETS = {
    *_ENCODER_CLASSES.values(),
    *_DECODER_CLASSES.values(),
    *_LAYOUT_CLASSES,
    "flextok.flextok_wrapper.FlexTok",
    "flextok.flextok_wrapper.FlexTokFromHub",
    "flextok.vae_wrapper.StableDiffusionVAE",
    "flextok.model.utils.wrappers.SequentialModuleDictWrapper",
    "flextok.model.utils.dict_ops.channels_first_to_last",
    "flextok.model.utils.dict_ops.channels_last_to_first",
    "flextok.model.postprocessors.heads.MLPHead",
    "flextok.regularizers.quantize_fsq.FSQ",
    "flextok.flow_matching.noise_modules.MinRFNoiseModule",
    "flextok.flow_matching.pipelines.MinRFPipeline",
}
# A generous bound on what one entry of the metadata may hold; the official ones have a few kilobytes.
_LONGEST_ENTRY = 1 << 18
_OF_THE_TENSORS = ("vae_widths", "vae_layers_per_block")
_TREE = ("vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module")


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of an official checkpoint."""
    return {
        "encoder.module_dict.enc_register_module.registers",
        "decoder.module_dict.dec_nested_dropout.dropout_mask_token",
    } <= set(keys)


def wanted(key: str) -> bool:
    """Whether inference needs an entry of an official checkpoint."""
    return not _DROPPED.match(key)


# ----------------------------------------------------------------------------------------------------------- configuration


def tree_of_metadata(metadata: Mapping[str, str]) -> Mapping[str, Any] | None:
    """The configuration tree in a safetensors file's metadata, every entry a Python literal; ``None`` if there is none.

    Raises:
        WeightsError: an entry is too long or no literal.
    """
    if not set(_TREE) <= metadata.keys():
        return None
    tree = {}
    for key, text in metadata.items():
        if len(text) > _LONGEST_ENTRY:
            raise WeightsError(f"the metadata entry {key!r} has {len(text)} characters, which no FlexTok needs")
        try:
            tree[key] = text if key == "_target_" else ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise WeightsError(f"the metadata entry {key!r} is not a Python literal") from error
    return tree


def upstream_config(raw: Mapping[str, Any]) -> FlexTokConfig | None:
    """Read the official configuration tree.

    Raises:
        WeightsError: a class path is unknown, a module is missing, or a setting is one that no official model uses.
    """
    if not set(_TREE) <= raw.keys():
        return None
    for where, target in _targets(raw):
        if target not in _TARGETS:
            raise WeightsError(f"{where} names {target!r}, which is no part of a FlexTok; it was not loaded or run")
    try:
        return _read_tree(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"the FlexTok configuration cannot be used: {error!r}") from error


def _targets(tree: Any, where: str = "configuration") -> Iterator[tuple[str, Any]]:
    """Every class path in a tree with the place where it stands."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if key == "_target_":
                yield where, value
            else:
                yield from _targets(value, f"{where}.{key}")
    elif isinstance(tree, list | tuple):
        for position, value in enumerate(tree):
            yield from _targets(value, f"{where}[{position}]")


def _read_tree(raw: Mapping[str, Any]) -> FlexTokConfig:
    encoder, decoder = raw["encoder"]["module_dict"], raw["decoder"]["module_dict"]
    _require_modules(encoder, _ENCODER_CLASSES)
    _require_modules(decoder, _DECODER_CLASSES)
    _require_settings(encoder, decoder)
    trunk, flow = encoder["enc_transformer"], decoder["dec_transformer"]
    levels = tuple(raw["regularizer"]["levels"])
    autoencoder = raw.get("vae_autoencoder_kl") or {}
    scaling = raw["vae"].get("scaling_factor")
    noise = raw["flow_matching_noise_module"]
    defaults = FlexTokConfig()
    return FlexTokConfig(
        vae_widths=tuple(autoencoder.get("block_out_channels", defaults.vae_widths)),
        vae_layers_per_block=autoencoder.get("layers_per_block", defaults.vae_layers_per_block),
        vae_groups=autoencoder.get("norm_num_groups", defaults.vae_groups),
        latent_channels=raw["vae"].get("latent_channels", encoder["enc_patch_emb"]["channels_in"]),
        # diffusers' default, where neither of the two says anything.
        scaling_factor=scaling if scaling is not None else autoencoder.get("scaling_factor") or 0.18215,
        grid=tuple(encoder["enc_posemb_module"]["max_sizes"]),
        patch_size=tuple(encoder["enc_patch_emb"]["patch_sizes"]),
        registers=encoder["enc_register_module"]["n_max"],
        levels=levels,
        encoder_dim=trunk["dim"],
        encoder_depth=trunk["depth"],
        encoder_head_dim=trunk.get("head_dim", 64),
        encoder_mask=encoder["enc_seq_packer"].get("mask_mode", "full"),
        decoder_dim=flow["dim"],
        decoder_depth=flow["depth"],
        decoder_head_dim=flow.get("head_dim", 64),
        mlp_ratio=trunk.get("mlp_ratio", 4.0),
        max_timestep=decoder["dec_time_embedder"].get("max_timestep", 1000.0),
        frequency_embedding_size=decoder["dec_time_embedder"].get("frequency_embedding_size", 256),
        logit_normal=noise.get("ln", True),
        mode_scale=noise.get("mode_scale", defaults.mode_scale),
    )


def _require_modules(modules: Mapping[str, Any], classes: Mapping[str, str]) -> None:
    """Refuse a module that is missing, unknown, of another class or out of order."""
    if missing := [name for name in classes if name not in modules]:
        raise ValueError(f"missing modules: {', '.join(missing)}")
    order = [name for name in modules if name in classes and name != "dec_time_embedder"]
    if order != [name for name in classes if name != "dec_time_embedder"]:
        raise ValueError(f"the modules stand in the order {', '.join(order)}, not {', '.join(classes)}")
    for name, module in modules.items():
        target = module["_target_"]
        known = target == classes[name] if name in classes else target in _LAYOUT_CLASSES or name.startswith("dec_repa")
        if not known:
            raise ValueError(f"module {name} of class {target} is not known")


def _require_settings(encoder: Mapping[str, Any], decoder: Mapping[str, Any]) -> None:
    """Refuse settings that would change the numbers and are in no official model."""
    trunk, flow = encoder["enc_transformer"], decoder["dec_transformer"]
    same_grid = list(encoder["enc_posemb_module"]["max_sizes"]) == list(decoder["dec_patches_posemb_module"]["max_sizes"])
    same_patches = list(encoder["enc_patch_emb"]["patch_sizes"]) == list(decoder["dec_noise_patch_emb"]["patch_sizes"])
    mup = any(module.get("use_mup_readout") for module in (*encoder.values(), *decoder.values()))
    checks = {
        "dec_seq_packer.mask_mode must be full": decoder["dec_seq_packer"].get("mask_mode", "full") == "full",
        "dec_transformer.adaLN_expansion must be 2": flow.get("adaLN_expansion") == 2,
        "use_mup_readout is not supported": not mup,
        "encoder and decoder must have the same grid and patch size": same_grid and same_patches,
        "encoder and decoder must have the same mlp_ratio": trunk.get("mlp_ratio", 4.0) == flow.get("mlp_ratio", 4.0),
        "posemb_scaling must be absolute": all(
            module.get("posemb_scaling", "absolute") == "absolute" for module in (*encoder.values(), *decoder.values())
        ),
        "qk_norm and gated_mlp must be on": all(
            part.get(name, True) for part in (trunk, flow) for name in ("qk_norm", "gated_mlp")
        ),
        "activations and norms must be the original's": all(
            part.get(name) is None for part in (trunk, flow) for name in ("act_layer", "norm_layer")
        ),
    }
    if failed := [text for text, holds in checks.items() if not holds]:
        raise ValueError("; ".join(failed))


# ----------------------------------------------------------------------------------------------------------------- tensors


def convert(state: Mapping[str, Tensor], config: FlexTokConfig | None) -> tuple[FlexTokConfig, dict[str, Tensor]]:
    """Rename the official tensors and compare their sizes with the configuration.

    The official configuration does not describe the autoencoder: its sizes are always those of the tensors. Without any
    configuration all sizes are, and what leaves no trace in them (the number of groups, the scaling factor, the timestep's
    scale) is taken from the official models.
    """
    named = {name: vae.our_tensor(name, tensor) for name, tensor in renamed(state, our_key, "FlexTok", wanted).items()}
    found = _infer_config(named, config or FlexTokConfig())
    require_agreement(found, config, besides=_OF_THE_TENSORS)
    return found, named


def our_key(key: str) -> str | None:
    """Our name for an entry of an official checkpoint; ``None`` if there is none."""
    key = key.replace(_CHECKPOINTED, "")
    if key.startswith("vae.vae."):
        name = vae.our_key(key.removeprefix("vae.vae."))
        return None if name is None else f"vae.{name}"
    for theirs, ours in _MODULES.items():
        if key.startswith(theirs):
            return (ours + key.removeprefix(theirs)).replace(*_MODULATION)
    return None


def _infer_config(named: Mapping[str, Tensor], base: FlexTokConfig) -> FlexTokConfig:
    """``base`` with the sizes that the shapes of our tensors imply."""
    shape = partial(shape_of, named)

    def depth(part: str) -> int:
        return len(layer_numbers(named, f"{part}.blocks"))

    sizes = vae.infer_sizes(named, base.vae_groups, "vae.")
    registers, encoder_dim = shape("encoder.registers")
    positions = shape("encoder.positions")
    decoder_dim = shape("decoder.mask_token")[0]
    hidden = shape("encoder.blocks.0.mlp.fc1.weight")[0]
    ratio = base.mlp_ratio if hidden_dim(encoder_dim, base.mlp_ratio) == hidden else hidden * 3 / (2 * encoder_dim)
    patch_size = base.patch_size
    if shape("encoder.patches.proj.weight")[1] != patch_size[0] * patch_size[1] * sizes.latent_channels:
        side = round((shape("encoder.patches.proj.weight")[1] / sizes.latent_channels) ** 0.5)
        patch_size = (side, side)
    components = shape("encoder.to_codes.weight")[0]
    if components != len(base.levels):
        raise KeysError(f"the quantizer has {components} components, but the configuration names levels {base.levels}")
    return replace(
        base,
        vae_widths=sizes.widths,
        vae_layers_per_block=sizes.layers_per_block,
        latent_channels=sizes.latent_channels,
        grid=(positions[2], positions[3]),
        patch_size=patch_size,
        registers=registers,
        encoder_dim=encoder_dim,
        encoder_depth=depth("encoder"),
        decoder_dim=decoder_dim,
        decoder_depth=depth("decoder"),
        mlp_ratio=ratio,
        frequency_embedding_size=shape("decoder.time.mlp.0.weight")[1],
    )


CHECKPOINT = Checkpoint(
    recognises=recognises, convert=convert, config=upstream_config, wanted=wanted, metadata=tree_of_metadata
)

"""Mapping of official checkpoints to our state dict, and of official configurations to ours.

A SEED is spread over several files. Here they are one state dict in the names of the original code's assembled model: the
vision transformer under ``visual_encoder.``, and the components of the diffusion model under their names in a pipeline.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from zoo.checkpoint import Checkpoint, layer_numbers, require_agreement, shape_of
from zoo.codecs.seed.config import PARTS, SeedConfig
from zoo.codecs.seed.diffusion import SOLVERS, empty_prompt_states, solver_name
from zoo.errors import KeysError, WeightsError, listing
from zoo.nn import vae

_VISION = "visual_encoder."
_TEXT_ENCODER = "text_encoder."
_IMAGE_HEAD = "distill_image_proj.weight"

# Modules of the assembled model, and ours. The Q-Formers' names are finished by `_QFORMER`.
_MODULES = {
    _VISION: "encoder.vision.network.",
    "ln_vision.": "encoder.summary.norm.",
    "query_tokens": "encoder.summary.qformer.queries",
    "Qformer.bert.": "encoder.summary.qformer.network.",
    "encode_task_layer.": "encoder.summary.to_codes.",
    "quantize.embedding.weight": "codebook.codes",
    "decode_task_layer.": "embedding.from_codes.",
    "reverse_tokens": "embedding.head.qformer.queries",
    "Reverse_Qformer.bert.": "embedding.head.qformer.network.",
    "pos_embed": "features_decoder.positions",
    "blocks.": "features_decoder.blocks.",
    "unet.": "decoder.unet.",
    "image_normalizer.": "decoder.",
}
_IMAGE_BRANCH = {
    "pos_embed_image": "embedding.mixer.positions",
    "blocks_image.": "embedding.mixer.blocks.",
    "image_down.": "embedding.head.squeeze.",
    "distill_image_proj.": "embedding.head.out.",
}
_TEXT_BRANCH = {
    "pos_embed_text": "embedding.mixer.positions",
    "blocks_text.": "embedding.mixer.blocks.",
    "distill_text_proj.": "embedding.head.out.",
}
# A tensor of each part that tells whether it is there.
_TELLTALES = {"encoder": f"{_VISION}cls_token", "features": "pos_embed", "decoder": "unet.conv_in.weight"}
# BERT's names, and those of transformers' Blip2 Q-Former.
_QFORMER = (
    ("embeddings.LayerNorm.", "layernorm."),
    (".crossattention.self.", ".crossattention.attention."),
    (".attention.self.", ".attention.attention."),
)

# Knowingly left out: the Q-Formers' text side (embeddings, text feed-forward layers, language head), the contrastive and
# matching heads of the first stage, counters of positions, and what vision transformers have after their blocks.
_DROPPED = re.compile(
    r"(?:Reverse_)?Qformer(?:_text)?\.(?:cls\..*|bert\.(?:embeddings\.(?:word|position)_embeddings\..*|pooler\..*"
    r"|encoder\.layer\.\d+\.(?:intermediate|output)\..*))"
    r"|temp|(?:text|vision)_proj\..*|itm_head\..*|(?:.*\.)?position_ids"
    r"|visual_encoder\.(?:norm|fc_norm|head|rel_pos_bias|mask_token)\b.*"
    r"|vae\.(?:encoder|quant_conv)\..*|text_encoder\.(?:.*\.)?logit_scale|text_encoder\.text_projection\..*"
)
# The branch to text states beside that to image embeddings, which SEED-2's training left in its file.
_UNUSED_BRANCH = re.compile(
    r"pos_embed_text|blocks_text\..*|reverse_tokens_text|Reverse_Qformer_text\..*|distill_text_proj\..*"
)


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of an official checkpoint: the codebook's file, or all of it."""
    return {"quantize.embedding.weight", "encode_task_layer.0.weight", "decode_task_layer.0.weight"} <= set(keys)


def wanted(key: str) -> bool:
    """Whether inference needs an entry of the assembled model."""
    return not _DROPPED.fullmatch(key)


# ----------------------------------------------------------------------------------------------------------- configuration


def upstream_config(raw: Mapping[str, Any]) -> SeedConfig | None:
    """Read the sizes of the original's classes, the configurations of a diffusers pipeline's components, or both.

    Raises:
        WeightsError: a setting is missing, of the wrong kind, or one that is not supported.
    """
    tokenizer, diffusion = "qformer" in raw, "unet" in raw
    if not tokenizer and not diffusion:
        return None
    # Tuples and lists are one thing in JSON, and configurations are compared.
    raw = json.loads(json.dumps(raw))
    try:
        config = _read_sizes(raw) if tokenizer else SeedConfig()
        return replace(config, **_read_diffusion(raw)) if diffusion else config
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"the SEED configuration cannot be used: {error!r}") from error


def _read_sizes(raw: Mapping[str, Any]) -> SeedConfig:
    vision, qformer, codebook, decoder = raw["vit"], raw["qformer"], raw["quantizer"], raw["decoder"]
    text = "text_features_dim" in decoder
    by_query = text or decoder.get("use_qformer_image", False)
    reverse = decoder.get("reverse_qformer") or {}
    defaults = SeedConfig()
    queries = qformer.get("num_query_token", defaults.queries)
    return SeedConfig(
        image_size=vision["img_size"],
        patch_size=vision["patch_size"],
        vision_dim=vision["embed_dim"],
        vision_depth=vision["depth"],
        vision_heads=vision["num_heads"],
        vision_mlp_dim=vision.get("mlp_hidden") or int(vision["embed_dim"] * vision["mlp_ratio"]),
        vision_eps=float(vision.get("layer_norm_eps", defaults.vision_eps)),
        summary_eps=float(raw.get("ln_vision_eps", defaults.summary_eps)),
        queries=queries,
        qformer_dim=qformer["hidden_size"],
        qformer_depth=qformer["num_hidden_layers"],
        qformer_heads=qformer["num_attention_heads"],
        qformer_mlp_dim=qformer["intermediate_size"],
        qformer_act=qformer.get("hidden_act", defaults.qformer_act),
        qformer_eps=float(qformer.get("layer_norm_eps", defaults.qformer_eps)),
        cross_attention_every=qformer.get("cross_attention_freq", defaults.cross_attention_every),
        # The original switches the mask on by this number of queries and says so nowhere else.
        causal=qformer.get("causal", queries == 32),
        codes=codebook["n_embed"],
        code_dim=codebook["codebook_embed_dim"],
        decoder_depth=decoder["decode_depth"],
        decoder_heads=decoder["num_heads"],
        decoder_mlp_ratio=float(decoder.get("mlp_ratio", defaults.decoder_mlp_ratio)),
        decoder_eps=float(decoder.get("layer_norm_eps", defaults.decoder_eps)),
        head="text" if text else "qformer" if by_query else "mlp",
        head_widths=defaults.head_widths if by_query else tuple(decoder.get("image_down", defaults.head_widths)),
        head_queries=reverse.get("num_query_token", 77 if text else 1),
        head_depth=reverse.get("num_hidden_layers", defaults.head_depth),
        embedding_dim=decoder["text_features_dim"] if text else decoder["image_features_dim"],
    )


def _read_diffusion(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of our configuration that the components of a pipeline decide."""
    components = {name: raw[name] for name in ("unet", "vae", "text_encoder", "scheduler")}
    optional = ("image_normalizer", "image_noising_scheduler")
    components |= {name: raw[name] for name in optional if name in raw}
    call = raw.get("call", {})
    fields = {"diffusion": components}
    if "image_normalizer" in raw and "qformer" not in raw:
        fields["embedding_dim"] = raw["image_normalizer"]["embedding_dim"]
    given = {"steps": "num_inference_steps", "guidance": "guidance_scale", "noise_level": "noise_level"}
    return fields | {ours: call[theirs] for ours, theirs in given.items() if theirs in call}


def _require_supported(components: Mapping[str, Any]) -> None:
    """Refuse settings that would change the numbers without a sign.

    Raises:
        WeightsError: a component has one.
    """
    unet, autoencoder = components["unet"], components["vae"]
    by_class = unet.get("class_embed_type")
    checks = {
        f"a UNet with class_embed_type {by_class!r}": by_class in (None, "projection"),
        "an unCLIP without image_normalizer and image_noising_scheduler": by_class is None
        or {"image_normalizer", "image_noising_scheduler"} <= components.keys(),
        f"the scheduler {solver_name(components['scheduler'])}": solver_name(components["scheduler"]) in SOLVERS,
        "an autoencoder of other blocks": set(autoencoder.get("up_block_types", ())) <= {"UpDecoderBlock2D"}
        and autoencoder.get("act_fn", "silu") == "silu"
        and autoencoder.get("mid_block_add_attention", True)
        and autoencoder.get("use_post_quant_conv", True),
        "an autoencoder that shifts its latents": not autoencoder.get("shift_factor"),
    }
    if unsupported := [text for text, holds in checks.items() if not holds]:
        raise WeightsError(f"not supported: {'; '.join(unsupported)}")


# ----------------------------------------------------------------------------------------------------------------- tensors


def convert(state: Mapping[str, Tensor], config: SeedConfig | None) -> tuple[SeedConfig, dict[str, Tensor]]:
    """Rename the tensors of the assembled model that are there, and compare their sizes with the configuration.

    A part is there if the configuration asks for it and its tensors are there. Without a configuration sizes are inferred, and
    what leaves no trace in them (numbers of heads, epsilons) is taken from the official models.
    """
    base = config or SeedConfig()
    parts = tuple(part for part in base.parts if _TELLTALES[part] in state)
    by_image = _IMAGE_HEAD in state
    table = _MODULES | (_IMAGE_BRANCH if by_image else _TEXT_BRANCH)
    named: dict[str, Tensor] = {}
    prompt: dict[str, Tensor] = {}
    unexpected = []
    for key, tensor in state.items():
        if not wanted(key) or (by_image and _UNUSED_BRANCH.fullmatch(key)):
            continue
        if key.startswith(_TEXT_ENCODER):
            prompt[key.removeprefix(_TEXT_ENCODER)] = tensor
            continue
        name = _our_key(key, table)
        if name is None:
            unexpected.append(key)
        elif _is_used(name, parts, base.vision_depth):
            named[name] = _our_tensor(name, tensor)
    if unexpected:
        raise KeysError(f"unexpected in a SEED checkpoint: {listing(sorted(unexpected))}")
    if "decoder" in parts:
        _require_supported(base.diffusion)
        if not prompt:
            raise KeysError(f"missing: {_TEXT_ENCODER}*, which describes the empty prompt")
        named["decoder.prompt_states"] = empty_prompt_states(base.diffusion["text_encoder"], prompt)
    found = _infer_config(named, replace(base, parts=parts, codes=base.codes if "codebook.codes" in named else 0))
    if config is not None:
        # Parts may be absent.
        require_agreement(found, replace(config, parts=found.parts, codes=config.codes if found.codes else 0))
    return found, named


def _is_used(name: str, parts: Collection[str], vision_depth: int) -> bool:
    """Whether one of our tensors belongs to a part that is built; the released vision transformer has a block too many."""
    owner = name.partition(".")[0].removesuffix("_decoder")
    block = re.match(r"encoder\.vision\.network\.blocks\.(\d+)\.", name)
    return (owner not in PARTS or owner in parts) and (block is None or int(block[1]) < vision_depth)


def _our_key(key: str, table: Mapping[str, str]) -> str | None:
    """Our name for an entry of the assembled model; ``None`` if there is none."""
    if key.startswith("vae."):
        name = vae.our_key(key.removeprefix("vae."))
        return None if name is None or "decoder." not in name else f"decoder.vae.{name.removeprefix('decoder.')}"
    for theirs, ours in table.items():
        if key == theirs or (theirs.endswith(".") and key.startswith(theirs)):
            name = ours + key.removeprefix(theirs)
            if "qformer.network." in name:
                for old, new in _QFORMER:
                    name = name.replace(old, new)
            return name
    return None


def _our_tensor(name: str, tensor: Tensor) -> Tensor:
    if name.startswith("decoder.vae."):
        return vae.our_tensor(name, tensor)
    return tensor.flatten() if name in ("decoder.mean", "decoder.std") else tensor


def _infer_config(named: Mapping[str, Tensor], base: SeedConfig) -> SeedConfig:
    """``base`` with the sizes that the shapes of our tensors imply."""
    found: dict[str, Any] = {}
    if base.codes:
        found |= _infer_embedding(named, base)
    if "encoder" in base.parts:
        found |= _infer_encoder(named, base)
    if "decoder" in base.parts and not base.codes and "decoder.mean" in named:
        found["embedding_dim"] = len(named["decoder.mean"])
    return replace(base, **found)


def _infer_embedding(named: Mapping[str, Tensor], base: SeedConfig) -> dict[str, Any]:
    codes, code_dim = shape_of(named, "codebook.codes")
    _, queries, dim = shape_of(named, "embedding.mixer.positions")
    hidden = shape_of(named, "embedding.mixer.blocks.0.mlp.fc1.weight")[0]
    ratio = base.decoder_mlp_ratio if int(dim * base.decoder_mlp_ratio) == hidden else hidden / dim
    found = {
        "codes": codes,
        "code_dim": code_dim,
        "queries": queries,
        "qformer_dim": dim,
        "decoder_depth": len(layer_numbers(named, "embedding.mixer.blocks")),
        "decoder_mlp_ratio": ratio,
        "embedding_dim": shape_of(named, "embedding.head.out.weight")[0],
    }
    if "embedding.head.qformer.queries" not in named:
        layers = layer_numbers(named, "embedding.head.squeeze")
        widths = [shape_of(named, f"embedding.head.squeeze.{i}.weight")[0] for i in layers]
        return found | {"head": "mlp", "head_widths": tuple(widths)}
    head_queries = shape_of(named, "embedding.head.qformer.queries")[1]
    # One vector for the whole image, or as many as a prompt has.
    head = base.head if base.head != "mlp" else "qformer" if head_queries == 1 else "text"
    return found | {
        "head": head,
        "head_queries": head_queries,
        "head_depth": len(layer_numbers(named, "embedding.head.qformer.network.encoder.layer")),
    }


def _infer_encoder(named: Mapping[str, Tensor], base: SeedConfig) -> dict[str, Any]:
    vision, qformer = "encoder.vision.network.", "encoder.summary.qformer."
    vision_dim, _, patch_size, _ = shape_of(named, f"{vision}patch_embed.proj.weight")
    side = round((shape_of(named, f"{vision}pos_embed")[1] - 1) ** 0.5)
    _, queries, dim = shape_of(named, f"{qformer}queries")
    looking = layer_numbers(named, f"{qformer}network.encoder.layer", "crossattention.")
    depth = len(layer_numbers(named, f"{qformer}network.encoder.layer"))
    every = looking[1] if len(looking) > 1 else base.cross_attention_every
    if looking != list(range(0, depth, every)):
        raise KeysError(f"layers {looking} of the Q-Former look at the image, which is no regular pattern")
    return {
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "vision_dim": vision_dim,
        "vision_depth": len(layer_numbers(named, f"{vision}blocks")),
        "vision_mlp_dim": shape_of(named, f"{vision}blocks.0.mlp.fc1.weight")[0],
        "queries": queries,
        "qformer_dim": dim,
        "qformer_depth": depth,
        "qformer_mlp_dim": shape_of(named, f"{qformer}network.encoder.layer.0.intermediate_query.dense.weight")[0],
        "cross_attention_every": every,
    }


CHECKPOINT = Checkpoint(recognises=recognises, convert=convert, config=upstream_config, wanted=wanted)

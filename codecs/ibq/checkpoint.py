"""Mapping of official checkpoints to our state dict: SEED-Voken's two sets of weights, Emu3.5's, and Apertus' encoder."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, Literal

from torch import Tensor

from zoo.checkpoint import Checkpoint, layer_numbers, renamed, require_agreement, shape_of
from zoo.codecs.ibq.config import GROUPS, IBQConfig, Quantization
from zoo.errors import KeysError, WeightsError, listing
from zoo.nn import vqgan

# The exponential averages, whose names have lost their dots.
_AVERAGES = "model_ema."
# Discriminator and LPIPS, the counters of the averages, and what else lies in a checkpoint of Apertus.
_DROPPED = re.compile(
    r"(?:model_ema\.)?loss|model_ema\.(?:decay|num_updates)$|model\.(?:language_model|audio_tokenizer)\.|lm_head\."
)
_APERTUS = re.compile(r"^(?:model\.)?(?:vision_tokenizer\.)?(?=encoder\.|quant_conv\.|quantize\.)")

# Names of the official files and ours, applied one after the other; up to here levels of decoders are counted from the finest.
_VQGAN = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^quantize\.embedding\.weight$", "quantizer.weight"),
        (r"^quant_conv\.", "encoder.quant_conv."),
        (r"^post_quant_conv\.", "decoder.post_quant_conv."),
        (r"\.(?:down|up|stages)\.(\d+)\.(?=block|attn|layers|downsample|upsample)", r".levels.\1."),
        (r"\.layers\.(\d+)\.resnet\.", r".resnets.\1."),
        (r"\.layers\.(\d+)\.attention\.", r".attentions.\1."),
        (r"(levels\.\d+)\.block\.(\d+)\.", r"\1.resnets.\2."),
        (r"(levels\.\d+)\.attn\.(\d+)\.", r"\1.attentions.\2."),
        (r"\.downsample\.conv\.", ".downsamplers.0.conv."),
        (r"\.upsample\.conv\.", ".upsamplers.0.conv."),
        (r"\.mid\.block_1\.", ".mid.resnets.0."),
        (r"\.mid\.attn_1\.", ".mid.attentions.0."),
        (r"\.mid\.block_2\.", ".mid.resnets.1."),
        *vqgan.BLOCK_NAMES,
    )
]
_BITS = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^encoder\.conv_out\.", "quantizer."),
        (r"\.mid_block\.", ".mid."),
        (r"\.(?:down|up)\.(\d+)\.block\.", r".levels.\1.resnets."),
        (r"\.down\.(\d+)\.downsample\.", r".levels.\1.downsample."),
        (r"\.up\.(\d+)\.upsample\.conv1\.", r".levels.\1.upsample."),
        (r"\.adaptive\.(\d+)\.", r".levels.\1.adaptive."),
        (r"\.nin_shortcut\.", ".shortcut."),
    )
]
_OURS = re.compile(r"(?:encoder|decoder)\.(?:conv_in|levels|mid|norm_out|conv_out|(?:post_)?quant_conv)\.|quantizer\.")
_DECODER_LEVEL = re.compile(r"(decoder\.levels\.)(\d+)\.")

# Names of a setting in Apertus' configuration, and in those of the others.
_SETTINGS = {
    "base_channels": "ch",
    "channel_multiplier": "ch_mult",
    "latent_channels": "z_channels",
}


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of an official checkpoint."""
    found = set(keys)
    bits = {"decoder.adaptive.0.gamma.weight", "encoder.conv_out.weight"} <= found
    codebook = {"quantize.embedding.weight", "quant_conv.weight", "encoder.mid.attn_1.q.weight"} <= found
    # Levels of these decoders are counted from the finest, which has nothing to upsample to.
    codebook &= "decoder.up.0.upsample.conv.weight" not in found
    return bits or codebook or "model.vision_tokenizer.quantize.embedding.weight" in found


def wanted(key: str) -> bool:
    """Whether inference needs an entry of an official checkpoint."""
    return not _DROPPED.match(key)


# ----------------------------------------------------------------------------------------------------------- configuration


def upstream_config(raw: Mapping[str, Any]) -> IBQConfig | None:
    """Read the configuration of any of the originals.

    Under ``model``, or at the top: the fields of Emu3.5's ``config.json`` or of Apertus' vision tokenizer; ``ddconfig``,
    ``n_embed`` and ``embed_dim``; or a class and such ``init_args``. ``variant`` may be ``emu3.5``, ``ibq`` or
    ``open-magvit2``, and ``weights`` ``ema`` or ``training``. What belongs to training is ignored.

    Raises:
        WeightsError: a setting is one that no official model uses, or sizes contradict each other.
    """
    model = raw.get("model", raw)
    try:
        path, model = str(model.get("class_path", "")), model.get("init_args", model)
        sizes = model.get("ddconfig", model)
        sizes = {_SETTINGS.get(key, key): value for key, value in sizes.items()}
        if "ch" not in sizes:
            return None
        variant = raw.get("variant") or ("open-magvit2" if "Open_MAGVIT2" in path else "ibq")
        if variant not in ("emu3.5", "ibq", "open-magvit2"):
            raise ValueError(f"variant must be emu3.5, ibq or open-magvit2, not {variant!r}")
        _require_settings(sizes, model)
        return _read_sizes("lfq" if variant == "open-magvit2" else "ibq", sizes, model, raw.get("weights", "ema"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"the IBQ configuration cannot be used: {error!r}") from error


def _require_settings(sizes: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Refuse settings that would change the numbers and are in no official model."""
    settings = {**model, **sizes}
    checks = {
        "double_z must be false": not settings.get("double_z", False),
        "remap must be empty": settings.get("remap") is None,
        "l2_normalize must be false": not settings.get("l2_normalize", False),
        "resamp_with_conv must be true": settings.get("resamp_with_conv", True),
        "give_pre_end must be false": not settings.get("give_pre_end", False),
        "in_channels and out_ch must be 3": settings.get("in_channels", 3) == settings.get("out_ch", 3) == 3,
    }
    if failed := [text for text, holds in checks.items() if not holds]:
        raise ValueError("; ".join(failed))


def _read_sizes(
    quantization: Quantization, sizes: Mapping[str, Any], model: Mapping[str, Any], weights: Literal["ema", "training"]
) -> IBQConfig:
    channels, multipliers = sizes["ch"], sizes["ch_mult"]
    bits = quantization == "lfq"
    resolutions = [] if bits else sizes.get("attn_resolutions", [])
    codes = model.get("n_embed", sizes.get("codebook_size"))
    return IBQConfig(
        quantization=quantization,
        stem=channels,
        widths=tuple(channels * multiplier for multiplier in multipliers),
        blocks=sizes["num_res_blocks"],
        # A matter of the configured resolution, whatever the size of an image.
        attention=tuple(
            level for level in range(len(multipliers)) if any(sizes["resolution"] == size << level for size in resolutions)
        ),
        latent_channels=sizes["z_channels"],
        code_dim=sizes["z_channels"] if bits else model.get("embed_dim", sizes.get("embed_dim")),
        codebook_size=codes if codes is not None else 2 ** sizes["z_channels"],
        weights=weights,
    )


# ----------------------------------------------------------------------------------------------------------------- tensors


def convert(state: Mapping[str, Tensor], config: IBQConfig | None) -> tuple[IBQConfig, dict[str, Tensor]]:
    """Choose a set of weights, rename the tensors and compare their sizes with the configuration.

    Without one, all sizes follow from the tensors, and the averages are taken where there are any.

    Raises:
        KeysError: tensors are missing or unexpected, one of two sets is incomplete, or shapes contradict each other or
            ``config``.
    """
    chosen = _chosen_set(state, averages=config is None or config.weights == "ema")
    encoder_only = any(".stages." in key for key in chosen)
    if encoder_only:
        chosen = {_APERTUS.sub("", key): tensor for key, tensor in chosen.items()}
    bits = any(".adaptive." in key for key in chosen) or "encoder.mid_block.0.conv1.weight" in chosen
    named = renamed(chosen, partial(our_key, bits=bits, levels=_levels(chosen)), "IBQ", wanted)
    parts = (config or IBQConfig()).parts
    parts = tuple(part for part in parts if part == "encoder" or not encoder_only)
    found = _infer_config(named, config, bits, parts)
    require_agreement(found, config, besides=["parts"])
    absent = {f"{part}." for part in ("encoder", "decoder") if part not in parts}
    ours = {key: tensor for key, tensor in named.items() if not key.startswith(tuple(absent))}
    return found, {
        key: tensor[:, :, 0, 0] if tensor.ndim == 4 and vqgan.MATRICES.search(key) else tensor for key, tensor in ours.items()
    }


def _chosen_set(state: Mapping[str, Tensor], averages: bool) -> dict[str, Tensor]:
    """The plain tensors, or the averages under their names, which are found by taking each plain name without its dots."""
    plain = {key: tensor for key, tensor in state.items() if not key.startswith(_AVERAGES)}
    shadow = {key.removeprefix(_AVERAGES): tensor for key, tensor in state.items() if key.startswith(_AVERAGES)}
    if not shadow:
        return plain
    places = {key.replace(".", ""): key for key in plain}
    if missing := sorted(key for place, key in places.items() if place not in shadow):
        raise KeysError(f"there are averages, but none of {listing(missing)}")
    if surplus := sorted(shadow.keys() - places.keys()):
        raise KeysError(f"unexpected averages: {listing(surplus)}")
    if wrong := sorted(key for place, key in places.items() if shadow[place].shape != plain[key].shape):
        raise KeysError(f"averages of other shapes than the weights: {listing(wrong)}")
    return {key: shadow[place] for place, key in places.items()} if averages else plain


def _levels(state: Mapping[str, Tensor]) -> int:
    """Levels of the networks; 0 if this is no checkpoint at all."""
    numbers = [*layer_numbers(state, "encoder.down"), *layer_numbers(state, "encoder.stages")]
    return max(numbers, default=-1) + 1


def our_key(key: str, bits: bool, levels: int) -> str | None:
    """Our name for an entry of an official checkpoint; ``None`` if there is none."""
    name = key
    for pattern, replacement in _BITS if bits else _VQGAN:
        name = pattern.sub(replacement, name)
    # Ours run in the order of their numbers.
    name = _DECODER_LEVEL.sub(lambda found: f"{found[1]}{levels - 1 - int(found[2])}.", name)
    return name if _OURS.match(name) else None


def _infer_config(named: Mapping[str, Tensor], config: IBQConfig | None, bits: bool, parts: tuple[str, ...]) -> IBQConfig:
    """The sizes that the shapes imply."""
    shape = partial(shape_of, named)
    levels = len(layer_numbers(named, "encoder.levels"))
    widths = [shape(f"encoder.levels.{level}.resnets.0.conv1.weight", 4)[0] for level in range(levels)]
    rows, columns = shape("quantizer.weight")[:2]
    attention = [level for level in range(levels) if layer_numbers(named, f"encoder.levels.{level}.attentions")]
    if bits:
        latent_channels = code_dim = rows
        rows = 2**rows if rows < 63 else 0
    else:
        latent_channels, code_dim = shape("encoder.conv_out.weight", 4)[0], columns
    try:
        return IBQConfig(
            quantization="lfq" if bits else "ibq",
            stem=shape("encoder.conv_in.weight", 4)[0],
            widths=tuple(widths),
            blocks=len(layer_numbers(named, "encoder.levels.0.resnets")),
            attention=tuple(attention),
            latent_channels=latent_channels,
            code_dim=code_dim,
            codebook_size=rows,
            groups=config.groups if config else GROUPS,
            weights=config.weights if config else "ema",
            parts=parts,
        )
    except ValueError as error:
        raise KeysError(f"the sizes of this checkpoint do not fit together: {error}") from error


CHECKPOINT = Checkpoint(recognises=recognises, convert=convert, config=upstream_config, wanted=wanted)

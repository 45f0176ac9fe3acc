"""Mapping of public checkpoints of the components to our state dict, and of their configurations to ours.

The components' keys do not clash, so a model is the union of their state dicts: WavLM's in its official names or in those of
transformers, the HiFi-GAN generator's in kNN-VC's, the inverse k-means model's in the reference design's, with ``centroids``,
and ``pairs``, the byte-pair encoding as ids that are joined. Missing components simply leave that part out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zoo.checkpoint import Checkpoint
from zoo.codecs.vectok.config import PARTS, HiFiGANSizes, InverseSizes, VecTokConfig, WavLMSizes
from zoo.codecs.vectok.units import BPE
from zoo.errors import KeysError, WeightsError, listing

# A tensor of each part that tells whether it is there, in our names.
_TELLTALES = {
    "vectors": "analysis.proj.weight",
    "units": "units.centroids",
    "inverse": "inverse.out_proj.weight",
    "vocoder": "vocoder.lin_pre.weight",
}
# Knowingly left out: WavLM's masking vector and the norm behind its last block, which the earlier blocks do not pass, and
# counters of batches.
_DROPPED = re.compile(r"(?:wavlm\.)?(?:mask_emb|masked_spec_embed|encoder\.layer_norm\..*)|.*\.num_batches_tracked")
_BLOCK = re.compile(r"encoder\.layers\.(\d+)\.(.+)")

# Names of modules, official or transformers', and ours; the first that fits counts.
_WAVLM = (
    (re.compile(r"feature_extractor\.conv_layers\.(\d+)\.(?:0|conv)\.weight"), r"analysis.convs.\1.weight"),
    (re.compile(r"feature_extractor\.conv_layers\.(\d+)\.(?:2\.1|layer_norm)\.(.+)"), r"analysis.convs.\1.norm.\2"),
    (re.compile(r"(?:feature_projection\.)?layer_norm\.(.+)"), r"analysis.norm.\1"),
    (re.compile(r"(?:post_extract_proj|feature_projection\.projection)\.(.+)"), r"analysis.proj.\1"),
    (re.compile(r"encoder\.(?:pos_conv\.0|pos_conv_embed\.conv)\.(.+)"), r"analysis.position.\1"),
)
_WAVLM_BLOCK = (
    (re.compile(r"(?:self_attn|attention)\.([qkv])_proj\.(.+)"), r"attention.\1.\2"),
    (re.compile(r"(?:self_attn|attention)\.out_proj\.(.+)"), r"attention.out.\1"),
    (re.compile(r"(?:self_attn\.grep_linear|attention\.gru_rel_pos_linear)\.(.+)"), r"attention.gate.\1"),
    (re.compile(r"self_attn\.grep_a|attention\.gru_rel_pos_const"), "attention.gate_scale"),
    (re.compile(r"(?:self_attn_layer_norm|layer_norm)\.(.+)"), r"norm1.\1"),
    (re.compile(r"final_layer_norm\.(.+)"), r"norm2.\1"),
    (re.compile(r"(?:fc1|feed_forward\.intermediate_dense)\.(.+)"), r"fc1.\1"),
    (re.compile(r"(?:fc2|feed_forward\.output_dense)\.(.+)"), r"fc2.\1"),
)
_RELATIVE = re.compile(r"encoder\.layers\.0\.(?:self_attn\.relative_attention_bias|attention\.rel_attn_embed)\.weight")
_OTHERS = (
    (re.compile(r"centroids"), "units.centroids"),
    (re.compile(r"pairs"), "units.pairs"),
    (re.compile(r"(segment|mask_vector|in_proj\.\w+|out_proj\.\w+)"), r"inverse.\1"),
    (re.compile(r"conformer\.conformer_layers\.(\d+\..+)"), r"inverse.layers.\1"),
    (re.compile(r"((?:lin_pre|conv_pre|conv_post|ups\.\d+)\..+)"), r"vocoder.\1"),
)
_RESBLOCK = re.compile(r"resblocks\.(\d+)\.(convs[12]?)\.(\d+\..+)")
# The two spellings of PyTorch's weight norm.
_WEIGHT_NORM = ((".parametrizations.weight.original0", ".weight_g"), (".parametrizations.weight.original1", ".weight_v"))


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of a WavLM, of kNN-VC's generator, or of an inverse k-means model."""
    keys = {key.removeprefix("wavlm.") for key in keys}
    return bool(
        keys & {"encoder.layers.0.self_attn.grep_a", "encoder.layers.0.attention.gru_rel_pos_const"}
        or {"lin_pre.weight", "conv_post.bias"} <= keys
        or {"centroids", "mask_vector", "segment"} <= keys
    )


def wanted(key: str) -> bool:
    """Whether inference needs an entry of a public checkpoint."""
    return not _DROPPED.fullmatch(key)


# ----------------------------------------------------------------------------------------------------------- configuration


def upstream_config(raw: Mapping[str, Any]) -> VecTokConfig | None:
    """Read the configuration of one component, or of several: under ``wavlm``, ``inverse`` and ``vocoder``, or side by side.

    WavLM's own or transformers' ``config.json``, kNN-VC's HiFi-GAN's, and the reference design's of the inverse model.

    Raises:
        WeightsError: a setting would change the numbers and is none that is supported.
    """
    wavlm, vocoder, inverse = (raw.get(name, raw) for name in ("wavlm", "vocoder", "inverse"))
    settings: dict[str, Any] = {}
    try:
        if "encoder_embed_dim" in wavlm:
            settings["vectors"] = _official_wavlm(wavlm, raw)
        elif wavlm.get("model_type") == "wavlm":
            settings["vectors"] = _transformers_wavlm(wavlm, raw)
        if "upsample_rates" in vocoder:
            settings["vocoder"] = _hifigan(vocoder)
            settings |= {"vector_dim": vocoder["hubert_dim"], "sample_rate": vocoder.get("sampling_rate", 16_000)}
            settings |= {"neighbours": vocoder["topk"]} if "topk" in vocoder else {}
        if "depthwise_kernel" in inverse:
            names = ("width", "heads", "ffn_dim", "layers", "depthwise_kernel")
            settings["inverse"] = InverseSizes(**{name: inverse[name] for name in names})
        if "num_units" in inverse:
            settings |= {"num_units": inverse["num_units"], "vector_dim": inverse["vector_dim"], "merges": 0}
            settings["vocab_size"] = inverse["num_units"]
        if "vectors" in settings:
            settings["vector_dim"] = settings["vectors"].width
        if not settings:
            return None
        settings |= {"prompt_frames": raw["prompt_frames"]} if "prompt_frames" in raw else {}
        # Components that are not described have no sizes yet that could contradict these.
        described = {"vectors": "vectors", "inverse": "inverse", "vocoder": "vocoder"}
        parts = tuple(p for p in PARTS if described.get(p, "num_units") in settings)
        return VecTokConfig(**settings, parts=parts)
    except (KeyError, TypeError, ValueError, SyntaxError) as error:
        raise WeightsError(f"the configuration cannot be used: {error!r}") from error


def _official_wavlm(wavlm: Mapping[str, Any], raw: Mapping[str, Any]) -> WavLMSizes:
    _require(
        {
            "extractor_mode": wavlm.get("extractor_mode") == "layer_norm",
            "layer_norm_first": wavlm.get("layer_norm_first") is True,
            "conv_bias": not wavlm.get("conv_bias"),
            "activation_fn": wavlm.get("activation_fn", "gelu") == "gelu",
            "relative_position_embedding": wavlm.get("relative_position_embedding") is True,
            "gru_rel_pos": wavlm.get("gru_rel_pos") is True,
        }
    )
    blocks = wavlm["encoder_layers"]
    layers = _conv_layers(wavlm["conv_feature_layers"]) if "conv_feature_layers" in wavlm else WavLMSizes.conv_layers
    return WavLMSizes(
        width=wavlm["encoder_embed_dim"],
        layer=raw.get("layer", min(WavLMSizes.layer, blocks)),
        blocks=raw.get("layer", blocks),
        heads=wavlm["encoder_attention_heads"],
        ffn_dim=wavlm["encoder_ffn_embed_dim"],
        conv_layers=layers,
        buckets=wavlm["num_buckets"],
        max_distance=wavlm["max_distance"],
        conv_kernel=wavlm["conv_pos"],
        conv_groups=wavlm["conv_pos_groups"],
        # WavLM's own ``normalize`` says how it was trained; what reads its vectors decides, and kNN-VC does without.
        normalize_waveform=raw.get("normalize_waveform", False),
    )


_CONV_LAYERS = re.compile(r"\[\s*\((\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\)\s*\]\s*(?:\*\s*(\d+))?")


def _conv_layers(text: str | list[Any]) -> tuple[tuple[int, int, int], ...]:
    """Read ``[(512,10,5)] + [(512,3,2)] * 4``, which the original evaluates as Python."""
    if not isinstance(text, str):
        return tuple((int(width), int(kernel), int(stride)) for width, kernel, stride in text)
    layers: list[tuple[int, int, int]] = []
    for term in text.split("+"):
        found = _CONV_LAYERS.fullmatch(term.strip())
        if found is None:
            raise ValueError(f"conv_feature_layers has the term {term!r}")
        width, kernel, stride, times = found.groups()
        layers += [(int(width), int(kernel), int(stride))] * int(times or 1)
    return tuple(layers)


def _transformers_wavlm(wavlm: Mapping[str, Any], raw: Mapping[str, Any]) -> WavLMSizes:
    _require(
        {
            "feat_extract_norm": wavlm.get("feat_extract_norm") == "layer",
            "do_stable_layer_norm": wavlm.get("do_stable_layer_norm") is True,
            "conv_bias": not wavlm.get("conv_bias"),
            "feat_extract_activation": wavlm.get("feat_extract_activation", "gelu") == "gelu",
            "hidden_act": wavlm.get("hidden_act", "gelu") == "gelu",
        }
    )
    blocks = wavlm["num_hidden_layers"]
    return WavLMSizes(
        width=wavlm["hidden_size"],
        layer=raw.get("layer", min(WavLMSizes.layer, blocks)),
        blocks=raw.get("layer", blocks),
        heads=wavlm["num_attention_heads"],
        ffn_dim=wavlm["intermediate_size"],
        conv_layers=tuple(zip(wavlm["conv_dim"], wavlm["conv_kernel"], wavlm["conv_stride"], strict=True)),
        buckets=wavlm.get("num_buckets", WavLMSizes.buckets),
        max_distance=wavlm.get("max_bucket_distance", WavLMSizes.max_distance),
        conv_kernel=wavlm["num_conv_pos_embeddings"],
        conv_groups=wavlm["num_conv_pos_embedding_groups"],
        normalize_waveform=raw.get("normalize_waveform", False),
    )


def _hifigan(vocoder: Mapping[str, Any]) -> HiFiGANSizes:
    return HiFiGANSizes(
        resblock=str(vocoder.get("resblock", "1")),
        pre_width=vocoder["hifi_dim"],
        channels=vocoder["upsample_initial_channel"],
        rates=tuple(vocoder["upsample_rates"]),
        kernels=tuple(vocoder["upsample_kernel_sizes"]),
        resblock_kernels=tuple(vocoder["resblock_kernel_sizes"]),
        resblock_dilations=tuple(tuple(dilations) for dilations in vocoder["resblock_dilation_sizes"]),
    )


def _require(checks: Mapping[str, bool]) -> None:
    if failed := [name for name, holds in checks.items() if not holds]:
        raise WeightsError(f"this WavLM differs from the large model's kind in {', '.join(failed)}, which is not supported")


# ----------------------------------------------------------------------------------------------------------------- tensors


def convert(state: Mapping[str, Tensor], config: VecTokConfig | None) -> tuple[VecTokConfig, dict[str, Tensor]]:
    """Rename the tensors, fold weight norm, and leave out the parts whose tensors are not there.

    Raises:
        KeysError: a tensor belongs to no component, none is there, or the pairs do not fit the units.
    """
    config = config or VecTokConfig()
    kernels = len(config.vocoder.resblock_kernels) if isinstance(config.vocoder, HiFiGANSizes) else 1
    blocks = config.vectors.blocks if isinstance(config.vectors, WavLMSizes) else 0
    named: dict[str, Tensor] = {}
    unexpected = []
    for key, tensor in state.items():
        if not wanted(key):
            continue
        name = our_key(key.removeprefix("wavlm."), kernels)
        if name is None:
            unexpected.append(key)
        elif not _is_later_block(name, blocks):
            named[name] = tensor
    if unexpected:
        raise KeysError(f"unexpected in a checkpoint of Vec-Tok or of its components: {listing(sorted(unexpected))}")
    _fold_weight_norm(named)
    _fuse_attention(named)
    parts = tuple(part for part in PARTS if _TELLTALES[part] in named)
    if not parts:
        raise KeysError("there are no tensors of a WavLM, of centroids, of an inverse k-means model or of a HiFi-GAN")
    _count_no_batches(named)
    return _with_units(replace(config, parts=parts), named), named


def our_key(key: str, kernels: int = 3) -> str | None:
    """Our name for an entry of a component; ``None`` if it belongs to none. ``kernels``: residual blocks of a stage."""
    for theirs, ours in _WEIGHT_NORM:
        key = key.replace(theirs, ours)
    if _RELATIVE.fullmatch(key):
        return "analysis.relative.weight"
    if found := _BLOCK.fullmatch(key):
        inner = _renamed(found[2], _WAVLM_BLOCK)
        return None if inner is None else f"analysis.blocks.{found[1]}.{inner}"
    if found := _RESBLOCK.fullmatch(key):
        stage, block = divmod(int(found[1]), kernels)
        kind = "plain" if found[2] == "convs2" else "convs"
        return f"vocoder.stages.{stage}.{block}.{kind}.{found[3]}"
    return _renamed(key, _WAVLM) or _renamed(key, _OTHERS)


def _renamed(key: str, patterns: Collection[tuple[re.Pattern[str], str]]) -> str | None:
    return next((found.expand(ours) for theirs, ours in patterns if (found := theirs.fullmatch(key))), None)


def _is_later_block(name: str, blocks: int) -> bool:
    found = re.match(r"analysis\.blocks\.(\d+)\.", name)
    return found is not None and int(found[1]) >= blocks


def _fold_weight_norm(named: dict[str, Tensor]) -> None:
    """Make one weight of each direction and length, along the axis that the lengths have."""
    for name in [name for name in named if name.endswith(".weight_v")]:
        stem = name.removesuffix("_v")
        if f"{stem}_g" not in named:
            raise KeysError(f"{name} has no {stem}_g beside it")
        direction, length = named.pop(name).float(), named.pop(f"{stem}_g").float()
        axes = [axis for axis, size in enumerate(length.shape) if size == 1 and direction.shape[axis] > 1]
        axes = axes or list(range(1, direction.ndim))
        named[stem] = length * direction / direction.norm(dim=axes, keepdim=True)


def _fuse_attention(named: dict[str, Tensor]) -> None:
    for name in [name for name in named if re.fullmatch(r"analysis\..+\.attention\.q\.(weight|bias)", name)]:
        stem, kind = name.rsplit(".q.", 1)
        try:
            named[f"{stem}.qkv.{kind}"] = torch.cat([named.pop(f"{stem}.{part}.{kind}") for part in "qkv"])
        except KeyError as error:
            raise KeysError(f"missing: {error.args[0]}") from error
    for name in named:
        if name.endswith(".gate_scale"):
            named[name] = named[name].flatten()


def _count_no_batches(named: dict[str, Tensor]) -> None:
    """Batch norm counts the batches it was trained on, which inference does not ask for."""
    for name in [name for name in named if name.endswith("running_mean")]:
        named[name.replace("running_mean", "num_batches_tracked")] = torch.zeros((), dtype=torch.int64)


def _with_units(config: VecTokConfig, named: dict[str, Tensor]) -> VecTokConfig:
    """The configuration with the numbers of units and pairs that are there; without pairs, units are the tokens."""
    if not config.has_units:
        return config
    if "units.centroids" not in named:
        raise KeysError("missing: centroids")
    num_units = len(named["units.centroids"])
    pairs = named.setdefault("units.pairs", torch.zeros(0, 2, dtype=torch.int64))
    if pairs.is_meta:
        return replace(config, num_units=num_units)
    vocab_size = BPE(num_units, pairs.tolist()).vocab_size
    return replace(config, num_units=num_units, merges=len(pairs), vocab_size=vocab_size)


CHECKPOINT = Checkpoint(recognises=recognises, convert=convert, config=upstream_config, wanted=wanted)

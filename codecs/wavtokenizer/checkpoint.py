"""Mapping of official checkpoints, and of public conversions of them, to our state dict."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.checkpoint import Checkpoint, renamed, require_agreement, shape_of
from zoo.codecs.wavtokenizer.config import WavTokenizerConfig
from zoo.errors import KeysError, WeightsError

# Not needed for inference: discriminators and their losses, the SEANet decoder that upstream builds and never runs, the
# Hann window, and the codebook's training statistics.
_DROPPED = re.compile(
    r"multiperioddisc\.|multiresddisc\.|dac\.|dacdiscriminator\.|melspec_loss\."
    r"|feature_extractor\.encodec\.decoder\.|head\.istft\.window$"
    r"|.*codebook\.(cluster_size|embed_avg)$"
)

_CODEBOOK = re.compile(
    r"(?:feature_extractor\.encodec\.quantizer\.vq\.layers\.0\._codebook|(?:encoder_model\.)?quantizer\.codebook)\.(\w+)"
)
_ENCODER = re.compile(r"(?:feature_extractor\.encodec\.encoder\.model|(?:encoder_model\.)?encoder\.layers)\.(\d+)\.(.+)")
_BACKBONE = (
    (re.compile(r"head\.(?:out|linear)\."), "head.out."),
    (re.compile(r"backbone\.pos_net\.5\."), "backbone.pos_norm."),
    (re.compile(r"(backbone\..*norm\.(?:scale|shift))\.weight"), r"\1"),
)
# The two spellings of PyTorch's weight norm.
_WEIGHT_NORM = (("parametrizations.weight.original0", "weight_g"), ("parametrizations.weight.original1", "weight_v"))


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of an official checkpoint or of a public conversion."""
    head = "head.out.weight" in keys or "head.linear.weight" in keys
    return head and "backbone.pos_net.2.q.weight" in keys and "backbone.norm.scale.weight" in keys


def wanted(key: str) -> bool:
    """Whether inference needs an entry of an official checkpoint."""
    return not _DROPPED.match(key)


def upstream_config(raw: Mapping[str, Any]) -> WavTokenizerConfig | None:
    """Read ``model.init_args.{feature_extractor,backbone,head}.init_args`` of upstream's yaml; class paths are ignored."""
    model = raw.get("model")
    if not isinstance(model, Mapping):
        return None
    try:
        parts = {name: model["init_args"][name]["init_args"] for name in ("feature_extractor", "backbone", "head")}
        features, backbone, head = parts["feature_extractor"], parts["backbone"], parts["head"]
        ratios = tuple(features.get("dowmsamples") or features["downsamples"])
        encoder = raw.get("overrides", {}).get("seanet_encoder", {})
        config = WavTokenizerConfig(
            ratios=ratios,
            latent_dim=backbone["input_channels"],
            n_filters=encoder.get("n_filters", WavTokenizerConfig.n_filters),
            lstm_layers=encoder.get("lstm", WavTokenizerConfig.lstm_layers),
            codebook_size=features["vq_bins"],
            dim=backbone["dim"],
            intermediate_dim=backbone["intermediate_dim"],
            num_layers=backbone["num_layers"],
            num_bandwidths=backbone.get("adanorm_num_embeddings", WavTokenizerConfig.num_bandwidths),
        )
        head_sizes = head["hop_length"], head["n_fft"]
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"the WavTokenizer configuration cannot be used: {error!r}") from error
    if features.get("num_quantizers", 1) != 1:
        raise WeightsError("only checkpoints with a single quantizer exist; num_quantizers must be 1")
    hop = config.hop_length
    if head_sizes != (hop, 4 * hop):
        raise WeightsError(
            f"the head's hop_length {head_sizes[0]} and n_fft {head_sizes[1]} do not fit ratios {ratios}, "
            f"which make {hop} and {4 * hop}"
        )
    return config


def convert(state: Mapping[str, Tensor], config: WavTokenizerConfig | None) -> tuple[WavTokenizerConfig, dict[str, Tensor]]:
    """Rename upstream's tensors, fold weight norm (old and new style, or folded already), and infer the sizes.

    The key layout of the public safetensors conversions is accepted as well.
    """
    named = renamed(state, _rename, "WavTokenizer", wanted)

    inited = named.pop("codebook.inited", None)
    if inited is not None and not bool(inited.any()):
        raise KeysError("the codebook of this checkpoint was never initialised (inited is 0)")
    for name in [name for name in named if name.endswith(".weight_v")]:
        stem = name.removesuffix("_v")
        if f"{stem}_g" not in named:
            raise KeysError(f"{name} has no {stem}_g beside it")
        direction, gain = named.pop(name).float(), named.pop(f"{stem}_g").float()
        named[stem] = gain * (direction / direction.flatten(1).norm(dim=1)[:, None, None])
    attention = "backbone.pos_net.2"
    for kind in ("weight", "bias"):
        parts = [named.pop(f"{attention}.{part}.{kind}", None) for part in "qkv"]
        if all(part is not None for part in parts):
            fused = torch.cat([part for part in parts if part is not None])
            named[f"{attention}.qkv.{kind}"] = fused[:, :, 0] if kind == "weight" else fused
    if f"{attention}.proj_out.weight" in named:
        named[f"{attention}.proj_out.weight"] = named[f"{attention}.proj_out.weight"][:, :, 0]

    inferred = _infer_config(named)
    require_agreement(inferred, config, besides=["sample_rate"])
    return config or inferred, named


def _rename(key: str) -> str | None:
    """Our name for an entry of an official checkpoint or of a public conversion; ``None`` if it belongs to neither."""
    if found := _CODEBOOK.fullmatch(key):
        return f"codebook.{found[1]}"
    if found := _ENCODER.fullmatch(key):
        for theirs, ours in _WEIGHT_NORM:
            key = found[2].replace(theirs, ours)
            if key != found[2]:
                break
        return _rename_encoder_layer(int(found[1]), key)
    if not key.startswith(("backbone.", "head.")):
        return None
    for pattern, ours in _BACKBONE:
        key = pattern.sub(ours, key)
    return key


def _rename_encoder_layer(index: int, rest: str) -> str | None:
    """Upstream counts one flat list of layers, activations included: a stage is a block, an ELU and a convolution."""
    if index == 13:
        return f"encoder.{rest}"
    stage, place = divmod(index - 1, 3)
    prefix, _, kind = rest.replace(".conv.conv.", ".conv.").rpartition("conv.")
    if prefix == "conv.":
        prefix = ""
    if index in (0, 15):
        return f"encoder.{'stem' if index == 0 else 'out'}.{kind}" if not prefix else None
    if stage < 4 and place == 2:
        return f"encoder.stages.{stage}.down.{kind}" if not prefix else None
    part = {"block.1.": "narrow", "block.3.": "widen", "shortcut.": "shortcut"}.get(prefix)
    return f"encoder.stages.{stage}.block.{part}.{kind}" if stage < 4 and place == 0 and part else None


def _infer_config(named: Mapping[str, Tensor]) -> WavTokenizerConfig:
    """The sizes that the shapes of our tensors imply."""
    shape = partial(shape_of, named)
    kernels = [shape(f"encoder.stages.{stage}.down.weight")[2] for stage in range(4)]
    if any(kernel % 2 for kernel in kernels):
        raise KeysError(f"the strided convolutions have kernels {kernels}, which are not twice a stride")
    ratios = tuple(kernel // 2 for kernel in reversed(kernels))
    spectrum_rows = shape("head.out.weight")[0]
    if spectrum_rows != 4 * math.prod(ratios) + 2:
        raise KeysError(
            f"head.out has {spectrum_rows} rows, but strides {ratios[::-1]} make a hop of {math.prod(ratios)} samples, "
            f"which needs {4 * math.prod(ratios) + 2}"
        )
    layers = {int(found[1]) for name in named if (found := re.match(r"backbone\.convnext\.(\d+)\.", name))}
    return WavTokenizerConfig(
        ratios=ratios,
        latent_dim=shape("encoder.out.weight")[0],
        n_filters=shape("encoder.stem.weight")[0],
        lstm_layers=sum(name.startswith("encoder.lstm.weight_ih_l") for name in named),
        codebook_size=shape("codebook.embed")[0],
        dim=shape("backbone.embed.weight")[0],
        intermediate_dim=shape("backbone.convnext.0.pwconv1.weight")[0],
        num_layers=len(layers),
        num_bandwidths=shape("backbone.norm.scale")[0],
    )


CHECKPOINT = Checkpoint(recognises=recognises, convert=convert, config=upstream_config, wanted=wanted)

"""Mapping of official checkpoints to our state dict."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

from torch import Tensor

from zoo.checkpoint import Checkpoint, layer_numbers, renamed, require_agreement, shape_of
from zoo.codecs.snac.config import SNACConfig
from zoo.codecs.snac.layers import ResidualUnit
from zoo.errors import KeysError, WeightsError

# What a module of upstream's holds, with the two spellings of PyTorch's weight norm.
_HELD = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
    **{name: name for name in ("weight_g", "weight_v", "weight", "bias", "alpha", "inv_freq")},
}
# Our pointwise convolutions, whose weights upstream stores as kernels of one sample.
_POINTWISE = re.compile(r".*\.(?:out|noise|widen|in_proj|out_proj)\.weight")


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of an official checkpoint."""
    return {"encoder.block.0.bias", "decoder.model.0.bias", "quantizer.quantizers.0.codebook.weight"} <= set(keys)


def upstream_config(raw: Mapping[str, Any]) -> SNACConfig | None:
    """Read upstream's ``config.json``, which holds the arguments of its class.

    Raises:
        WeightsError: an argument is missing or not known, or they do not fit each other.
    """
    if "sampling_rate" not in raw:
        return None
    arguments = dict(raw)
    latent_dim = arguments.pop("latent_dim", None)
    arguments["sample_rate"] = arguments.pop("sampling_rate")
    names = {field.name for field in fields(SNACConfig)}
    if arguments.keys() != names:
        raise WeightsError(f"the SNAC configuration lacks, or has in addition, {sorted(arguments.keys() ^ names)}")
    try:
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()
        }
        config = SNACConfig(**settings)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"the SNAC configuration cannot be used: {error}") from error
    if latent_dim not in (None, config.latent_dim):
        raise WeightsError(f"latent_dim is {latent_dim}, but the encoder ends with {config.latent_dim} channels")
    return config


def convert(state: Mapping[str, Tensor], config: SNACConfig | None) -> tuple[SNACConfig, dict[str, Tensor]]:
    """Rename upstream's tensors, fold weight norm (old and new style, or folded already), and check the sizes."""
    if config is None:
        raise KeysError("the tensors of SNAC tell neither sampling_rate nor attn_window_size nor vq_strides: pass config.json")
    named = renamed(state, partial(_our_name, _our_modules(state)), "SNAC")
    for name in [name for name in named if name.endswith(".weight_v")]:
        stem = name.removesuffix("_v")
        if f"{stem}_g" not in named:
            raise KeysError(f"{name} has no {stem}_g beside it")
        direction, gain = named.pop(name).float(), named.pop(f"{stem}_g").float()
        # Over all axes but the first, which is the input's of a transposed convolution.
        named[stem] = gain * (direction / direction.flatten(1).norm(dim=1)[:, None, None])
    require_agreement(_infer_config(named, config), config)
    for name, tensor in named.items():
        if name.endswith(".alpha"):
            named[name] = tensor.reshape(-1)
        elif name.endswith(".up.spread.weight"):
            named[name] = tensor.permute(2, 1, 0).flatten(0, 1).contiguous()
        elif _POINTWISE.fullmatch(name) and tensor.ndim == 3 and tensor.shape[2] == 1:
            named[name] = tensor[:, :, 0]
    return config, named


def _our_name(modules: Mapping[str, str], key: str) -> str | None:
    """Our name for an entry of an official checkpoint; ``None`` if there is none."""
    if found := re.fullmatch(r"quantizer\.quantizers\.(\d+)\.codebook\.weight", key):
        return f"quantizer.levels.{found[1]}.codebook"
    for theirs, ours in _HELD.items():
        if not key.endswith(f".{theirs}"):
            continue
        module = key.removesuffix(f".{theirs}")
        if found := re.fullmatch(r"quantizer\.quantizers\.(\d+)\.(in_proj|out_proj)", module):
            return f"quantizer.levels.{found[1]}.{found[2]}.{ours}"
        if module in modules:
            inside = ".spread" if modules[module].endswith(".up") and ours.startswith("weight") else ""
            return f"{modules[module]}{inside}.{ours}"
    return None


def _our_modules(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Our name of each of upstream's modules, which are numbered in one list whatever they are."""
    encoder = [f"encoder.block.{number}" for number in layer_numbers(state, "encoder.block")]
    decoder = [f"decoder.model.{number}" for number in layer_numbers(state, "decoder.model")]
    if len(encoder) < 3 or len(decoder) < 4:
        raise KeysError("these are not the layers of a SNAC")
    modules = {encoder[0]: "encoder.stem", encoder[-1]: "encoder.out", decoder[0]: "decoder.stem"}
    modules |= {decoder[-2]: "decoder.snake", decoder[-1]: "decoder.out"}
    stages = 0
    for theirs in encoder[1:-1]:
        if f"{theirs}.norm.weight" in state:
            modules |= _attention(theirs, "encoder.attention")
            continue
        ours = f"encoder.stages.{stages}"
        modules |= _units(theirs, 0, ours) | {f"{theirs}.block.3": f"{ours}.snake", f"{theirs}.block.4": f"{ours}.down"}
        stages += 1
    stages = 0
    for theirs in decoder[1:-2]:
        if f"{theirs}.bias" in state:
            modules[theirs] = "decoder.widen"
            continue
        if f"{theirs}.norm.weight" in state:
            modules |= _attention(theirs, "decoder.attention")
            continue
        ours = f"decoder.stages.{stages}"
        modules |= {f"{theirs}.block.0": f"{ours}.snake", f"{theirs}.block.1": f"{ours}.up"}
        noise = any(key.startswith(f"{theirs}.block.2.linear.") for key in state)
        if noise:
            modules[f"{theirs}.block.2.linear"] = f"{ours}.noise"
        modules |= _units(theirs, 3 if noise else 2, ours)
        stages += 1
    return modules


def _units(theirs: str, first: int, ours: str) -> dict[str, str]:
    """The residual units of a stage, which upstream counts from ``first`` on."""
    parts = ("snake1", "mix", "snake2", "out")
    return {
        f"{theirs}.block.{first + unit}.block.{place}": f"{ours}.units.{unit}.{part}"
        for unit in range(len(ResidualUnit.DILATIONS))
        for place, part in enumerate(parts)
    }


def _attention(theirs: str, ours: str) -> dict[str, str]:
    parts = {"norm": "norm", "to_qkv": "to_qkv", "rel_pos": "rotary", "to_out": "to_out"}
    return {f"{theirs}.{part}": f"{ours}.{own}" for part, own in parts.items()}


def _infer_config(named: Mapping[str, Tensor], config: SNACConfig) -> SNACConfig:
    """A configuration with the sizes that the shapes of tensors imply; kernels are still as upstream has them."""
    shape = partial(shape_of, named, rank=3)
    encoder, decoder = layer_numbers(named, "encoder.stages"), layer_numbers(named, "decoder.stages")
    books, dim = shape_of(named, "quantizer.levels.0.codebook", rank=2)
    levels = len(layer_numbers(named, "quantizer.levels"))
    attention = "encoder.attention.norm.weight" in named
    if levels != len(config.vq_strides):
        raise KeysError(f"there are {levels} levels in the tensors and {len(config.vq_strides)} in the configuration")
    if attention != (config.attn_window_size is not None):
        raise KeysError(f"there is {'' if attention else 'no '}attention in the tensors, unlike in the configuration")
    try:
        return replace(
            config,
            encoder_dim=shape("encoder.stem.weight")[0],
            encoder_rates=tuple(shape(f"encoder.stages.{stage}.down.weight")[2] // 2 for stage in encoder),
            decoder_dim=shape("decoder.stages.0.up.spread.weight")[0],
            decoder_rates=tuple(shape(f"decoder.stages.{stage}.up.spread.weight")[2] // 2 for stage in decoder),
            codebook_size=books,
            codebook_dim=dim,
            noise="decoder.stages.0.noise.weight" in named,
            depthwise="decoder.widen.weight" in named,
        )
    except ValueError as error:
        raise KeysError(f"the shapes of the tensors do not fit each other: {error}") from error


CHECKPOINT = Checkpoint(recognises=recognises, convert=convert, config=upstream_config)

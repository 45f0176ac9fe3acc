"""Mapping of official files to our state dict: ONNX graphs, and state dicts in the names of the package ``s3tokenizer``."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from zoo.checkpoint import Checkpoint, layer_numbers, renamed, require_agreement, shape_of
from zoo.codecs.s3tokenizer.config import ROTARY_HEAD, S3TokenizerConfig
from zoo.errors import KeysError, WeightsError

_V1 = S3TokenizerConfig(memory=0, positions=1500, stride=1, codebook_size=4096)
#: The official models by the names of the package.
OFFICIAL = {
    "speech_tokenizer_v1": _V1,
    "speech_tokenizer_v1_25hz": replace(_V1, stride=2),
    "speech_tokenizer_v2_25hz": S3TokenizerConfig(),
    "speech_tokenizer_v3_25hz": S3TokenizerConfig(depth=12),
}
# Fields of the package's configuration, and ours.
_FIELDS = {
    "n_mels": "bands",
    "n_audio_state": "dim",
    "n_audio_head": "heads",
    "n_audio_layer": "depth",
    "n_codebook_size": "codebook_size",
}

# ---- names of the package

_BLOCK = (
    r"encoder\.blocks\.\d+\.(?:(?:attn_ln|mlp_ln|attn\.query|attn\.value|attn\.out|mlp\.0|mlp\.2)\.(?:weight|bias)"
    r"|attn\.key\.weight|attn\.fsmn_block\.weight)"
)
_KNOWN = re.compile(rf"encoder\.conv[12]\.(?:weight|bias)|encoder\.positional_embedding|{_BLOCK}")
_QUANTIZER = {
    "quantizer._codebook.embed": "quantizer.weight",
    "quantizer._codebook.project_down.weight": "quantizer.weight",
    "quantizer._codebook.project_down.bias": "quantizer.bias",
}

# ---- names of ONNX graphs

_ATTENTION = re.compile(r"(?:.*/)?blocks\.(\d+)/attn/query/MatMul#1")
_PREFIX = re.compile(r"(.*/)?blocks\.0/attn/query/MatMul#1")
_CODEBOOK = re.compile(r".*quantizer/.*_codebook/Pow_1#[01]")
_PROJECTION = re.compile(r".*quantizer.*/MatMul#1")
# Exporters lose the name of a matrix; these are the ones in the official files.
_PROJECTION_NAMES = ("onnx::MatMul_2536", "onnx::MatMul_4618")
_CONVOLUTION_NAMES = {
    "encoder.conv1.weight": ("encoders.conv1.weight", "onnx::Conv_1519", "onnx::Conv_2216", "onnx::Conv_3986"),
    "encoder.conv1.bias": ("encoders.conv1.bias", "onnx::Conv_1520", "onnx::Conv_2217", "onnx::Conv_3987"),
    "encoder.conv2.weight": ("encoders.conv2.weight", "onnx::Conv_1521", "onnx::Conv_2218", "onnx::Conv_3988"),
    "encoder.conv2.bias": ("encoders.conv2.bias", "onnx::Conv_1522", "onnx::Conv_2219", "onnx::Conv_3989"),
}


def recognises(keys: Collection[str]) -> bool:
    """Whether these are the keys of an official file, or of one that the package converted."""
    package = "encoder.conv1.weight" in keys and any(key in keys for key in _QUANTIZER)
    return package or any(_PREFIX.fullmatch(key) for key in keys)


def upstream_config(raw: Mapping[str, Any]) -> S3TokenizerConfig | None:
    """Read the package's name of a model under ``model``, and its ``ModelConfig`` under ``config``, or either of them.

    The name decides what no tensor tells: the rate.

    Raises:
        WeightsError: there is no such model, or sizes contradict each other.
    """
    name, sizes = raw.get("model"), raw.get("config", {})
    if name is None:
        return None
    if name not in OFFICIAL:
        raise WeightsError(f"an S3Tokenizer is one of {', '.join(OFFICIAL)}, not {str(name)[:80]!r}")
    try:
        settings = {ours: sizes[theirs] for theirs, ours in _FIELDS.items() if theirs in sizes}
        if not OFFICIAL[name].rotary and "n_audio_ctx" in sizes:
            settings["positions"] = sizes["n_audio_ctx"]
        return replace(OFFICIAL[name], **settings)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"the S3Tokenizer configuration cannot be used: {error}") from error


def convert(state: Mapping[str, Tensor], config: S3TokenizerConfig | None) -> tuple[S3TokenizerConfig, dict[str, Tensor]]:
    """The tensors in our names, and the configuration that they imply.

    What a model is follows from its tensors, never from the name of a file. Epsilons of layer norms are those of an ONNX graph;
    the configuration's otherwise.

    Raises:
        KeysError: tensors are missing or unexpected, or their shapes contradict each other or ``config``.
    """
    graph = any(_PREFIX.fullmatch(key) for key in state)
    named, facts = _from_graph(state) if graph else (dict(state), {})
    ours = renamed(named, our_key, "S3Tokenizer")
    found = _infer_config(ours, config, facts)
    require_agreement(found, config, besides=["attention_eps", "mlp_eps", "parts"])
    return found, ours


def our_key(key: str) -> str | None:
    """Our name for an entry in the package's names; ``None`` if there is none."""
    if key in _QUANTIZER:
        return _QUANTIZER[key]
    if not _KNOWN.fullmatch(key):
        return None
    return key.replace(".fsmn_block.", ".memory.").replace("positional_embedding", "positions")


def _infer_config(ours: Mapping[str, Tensor], config: S3TokenizerConfig | None, facts: Mapping[str, Any]) -> S3TokenizerConfig:
    """The sizes that the shapes imply; the rate and the number of heads leave no trace in them."""
    dim, bands, _ = shape_of(ours, "encoder.conv1.weight", 3)
    depth = len(layer_numbers(ours, "encoder.blocks", "attn."))
    memory = shape_of(ours, "encoder.blocks.0.attn.memory.weight", 3)[2] if "encoder.blocks.0.attn.memory.weight" in ours else 0
    positions = 0 if memory else shape_of(ours, "encoder.positions", 2)[0]
    rows = shape_of(ours, "quantizer.weight", 2)[0]
    stride = facts.get("stride", config.stride if config else 2 if memory else None)
    if stride is None:
        raise KeysError(
            "version 1 exists at 25 and at 50 ids per second, which its tensors do not tell: give the configuration "
            "{'model': 'speech_tokenizer_v1_25hz'} or {'model': 'speech_tokenizer_v1'}"
        )
    if memory or config is None:
        if dim % ROTARY_HEAD:
            raise KeysError(f"the number of heads of an encoder {dim} wide is not known: give its configuration")
        heads = dim // ROTARY_HEAD
    else:
        heads = config.heads
    base = config or S3TokenizerConfig()
    try:
        return replace(
            base,
            dim=dim,
            depth=depth,
            heads=heads,
            memory=memory,
            positions=positions,
            stride=stride,
            codebook_size=3**rows if memory else rows,
            bands=bands,
            attention_eps=facts.get("attention_eps", base.attention_eps),
            mlp_eps=facts.get("mlp_eps", base.mlp_eps),
        )
    except ValueError as error:
        raise KeysError(f"the sizes of this checkpoint do not fit together: {error}") from error


# --------------------------------------------------------------------------------------------------------------- ONNX graphs


def _from_graph(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of `zoo.onnx_weights.read_onnx` under the package's names, and what the graph tells besides.

    A tensor is found by the node that takes it, because its own name may be a number.
    """
    prefix = next(found[1] or "" for key in state if (found := _PREFIX.fullmatch(key)))
    named: dict[str, Tensor] = {}
    for key, names in _CONVOLUTION_NAMES.items():
        layer, kind = key.split(".")[1:]
        place = f"{layer}/Conv#{1 if kind == 'weight' else 2}"
        named[key] = _first(state, key, [prefix + place, f"/{place}", f"/encoder/{place}", f"/encoders/{place}", *names])
    for number in sorted({int(found[1]) for key in state if (found := _ATTENTION.fullmatch(key))}):
        named |= _block(state, f"{prefix}blocks.{number}", number)
    for name in ("encoders.positional_embedding", "encoder.positional_embedding"):
        if name in state:
            named["encoder.positional_embedding"] = state[name]
    named |= _quantizer(state, named["encoder.conv1.bias"].shape[0])
    return named, _facts(state, prefix)


def _block(state: Mapping[str, Tensor], node: str, number: int) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    stem = f"encoder.blocks.{number}"
    for ours, theirs in (
        ("attn.query", "attn/query"),
        ("attn.key", "attn/key"),
        ("attn.value", "attn/value"),
        ("attn.out", "attn/out"),
    ):
        named |= _linear(state, f"{stem}.{ours}", f"{node}/{theirs}", bias=ours != "attn.key")
    for layer in ("0", "2"):
        named |= _linear(state, f"{stem}.mlp.{layer}", f"{node}/mlp/mlp.{layer}", bias=True)
    for norm in ("attn_ln", "mlp_ln"):
        fused, place = f"{node}/{norm}/LayerNormalization", f"{node}/{norm}"
        named[f"{stem}.{norm}.weight"] = _first(
            state, f"{stem}.{norm}.weight", [f"{fused}#1", *_either(f"{place}/Mul")], rank=1
        )
        named[f"{stem}.{norm}.bias"] = _first(state, f"{stem}.{norm}.bias", [f"{fused}#2", *_either(f"{place}/Add_1")], rank=1)
    for memory in (f"blocks.{number}.attn.fsmn_block.weight", f"{node}/attn/fsmn_block/Conv#1"):
        if memory in state:
            named[f"{stem}.attn.fsmn_block.weight"] = state[memory]
    return named


def _linear(state: Mapping[str, Tensor], ours: str, node: str, *, bias: bool) -> dict[str, Tensor]:
    """A matrix, which products take from the right and so transposed, and what is added then."""
    named = {f"{ours}.weight": _first(state, f"{ours}.weight", [f"{node}/MatMul#1"], rank=2).T.contiguous()}
    if bias:
        named[f"{ours}.bias"] = _first(state, f"{ours}.bias", _either(f"{node}/Add"), rank=1)
    return named


def _quantizer(state: Mapping[str, Tensor], dim: int) -> dict[str, Tensor]:
    codebook = next((tensor for key, tensor in state.items() if _CODEBOOK.fullmatch(key) and tensor.ndim == 2), None)
    if codebook is not None:
        return {"quantizer._codebook.embed": codebook.T.contiguous()}
    places = ["quantizer.project_in.bias", *_either("/quantizer/project_in/Add")]
    bias = _first(state, "quantizer._codebook.project_down.bias", places, rank=1)
    candidates = [key for key in state if _PROJECTION.fullmatch(key)] + [name for name in _PROJECTION_NAMES if name in state]
    wanted = (dim, len(bias))
    weight = next((state[key] for key in candidates if state[key].shape == wanted), None)
    if weight is None:
        # A matrix of this shape occurs nowhere else in the model.
        weight = next((tensor for key, tensor in state.items() if "#" not in key and tensor.shape == wanted), None)
    if weight is None:
        raise KeysError("missing in the ONNX graph: quantizer._codebook.project_down.weight")
    return {
        "quantizer._codebook.project_down.weight": weight.T.contiguous(),
        "quantizer._codebook.project_down.bias": bias,
    }


def _facts(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """The rate and the epsilons, where the graph tells them."""
    facts: dict[str, Any] = {}
    strides = next((tensor for key, tensor in state.items() if re.fullmatch(r"(?:.*/)?conv1/Conv@strides", key)), None)
    if strides is not None:
        facts["stride"] = int(strides.flatten()[0])
    elif "encoders.conv1.weight" in state:
        facts["stride"] = 2
    elif "onnx::Conv_1519" in state:
        facts["stride"] = 1
    for norm, field in (("attn_ln", "attention_eps"), ("mlp_ln", "mlp_eps")):
        own = re.compile(rf"{re.escape(prefix)}blocks\.\d+/{norm}/(?:LayerNormalization@epsilon|Add#[01])")
        found = {float(tensor) for key, tensor in state.items() if own.fullmatch(key) and tensor.numel() == 1}
        if len(found) > 1:
            raise KeysError(f"the layer norms of this graph have different epsilons: {sorted(found)}")
        if found:
            # Of the float that the file holds, the decimal number that was meant.
            facts[field] = float(f"{found.pop():.6g}")
    return facts


def _either(node: str) -> list[str]:
    """A node's first and second input."""
    return [f"{node}#0", f"{node}#1"]


def _first(state: Mapping[str, Tensor], ours: str, places: list[str], rank: int | None = None) -> Tensor:
    """The tensor at the first of several places that has one.

    Raises:
        KeysError: none has.
    """
    for place in places:
        if place in state and (rank is None or state[place].ndim == rank):
            return state[place].contiguous()
    raise KeysError(f"missing in the ONNX graph: {ours}, which was looked for at {', '.join(places[:2])}")


CHECKPOINT = Checkpoint(recognises=recognises, convert=convert, config=upstream_config)

"""Official checkpoints: T5's keys, and those of the gate."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from zoo.checkpoint import Checkpoint, layer_numbers, renamed, shape_of
from zoo.codecs.mrt5.config import MrT5ModelConfig
from zoo.errors import InputError, KeysError, WeightsError
from zoo.nn.mrt5 import encoder_key

_GATE = "delete_gate.feed_forward.weight"
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_LAYERS = {"0.SelfAttention": "attention", "1.EncDecAttention": "cross_attention", "2.DenseReluDense": "feed_forward"}
_NORMS = {"0": "attention_norm", "1": "cross_attention_norm", "2": "feed_forward_norm"}
_DECODER_NAMES = {
    "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "decoder.relative_bias.weight",
    "decoder.final_layer_norm.weight": "decoder.norm.weight",
    "lm_head.weight": "decoder.head.weight",
}


def _our_key(key: str) -> str | None:
    if key in _DECODER_NAMES:
        return _DECODER_NAMES[key]
    if not key.startswith("decoder."):
        ours = encoder_key(key)
        return None if ours == key else f"encoder.{ours}"
    if found := re.fullmatch(r"decoder\.block\.(\d+)\.layer\.(\d)\.layer_norm\.weight", key):
        return f"decoder.blocks.{found[1]}.{_NORMS[found[2]]}.weight" if found[2] in _NORMS else None
    if found := re.fullmatch(r"decoder\.block\.(\d+)\.layer\.(\d\.\w+)\.(\w+)\.weight", key):
        # Upstream's wi_0 goes through the activation, and wi_1 is multiplied by it.
        tensor = {"wi_0": "gate", "wi_1": "wi"}.get(found[3], found[3])
        return f"decoder.blocks.{found[1]}.{_LAYERS[found[2]]}.{tensor}.weight" if found[2] in _LAYERS else None
    return None


def _recognises(keys: Collection[str]) -> bool:
    return "shared.weight" in keys and any(key.endswith(_GATE) for key in keys)


def _config(raw: Mapping[str, Any]) -> MrT5ModelConfig:
    """Settings of upstream's ``config.json``.

    Raises:
        WeightsError: they cannot be used.
    """
    known = {field.name for field in fields(MrT5ModelConfig)} - {"parts"}
    chosen = {key: value for key, value in raw.items() if key in known and (value is not None or key == "deletion_threshold")}
    try:
        return MrT5ModelConfig(**chosen)
    except (InputError, TypeError) as error:
        raise WeightsError(f"the configuration cannot be used: {error}") from error


def _convert(state: Mapping[str, Tensor], config: MrT5ModelConfig | None) -> tuple[MrT5ModelConfig, dict[str, Tensor]]:
    wanted = config or MrT5ModelConfig()
    vocab_size, d_model = shape_of(state, "shared.weight", rank=2)
    gates = [key for key in state if key.endswith(_GATE)]
    if len(gates) != 1:
        raise KeysError(f"there is one gate in a checkpoint, not {len(gates)}")
    gate = gates[0].removesuffix("feed_forward.weight")
    number = re.fullmatch(r"encoder\.block\.(\d+)\.delete_gate\.", gate)
    if number is None:
        raise KeysError(f"{gates[0]} is no gate of a block of the encoder")
    gate_layer = int(number[1])
    first = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = shape_of(state, f"{first}.relative_attention_bias.weight", rank=2)
    inner = shape_of(state, f"{first}.q.weight", rank=2)[0]
    dense = "encoder.block.0.layer.1.DenseReluDense"
    gated = f"{dense}.wi_0.weight" in state
    if gated != wanted.feed_forward_proj.startswith("gated-"):
        raise KeysError(f"the feed-forward layers do not suit {wanted.feed_forward_proj!r}")
    layers, decoder_layers = (len(layer_numbers(state, f"{stack}.block")) for stack in ("encoder", "decoder"))
    parts = tuple(part for part in wanted.parts if part == "encoder" or decoder_layers)
    found = replace(
        wanted,
        vocab_size=vocab_size,
        d_model=d_model,
        num_layers=layers,
        num_decoder_layers=decoder_layers or wanted.num_decoder_layers,
        num_heads=heads,
        d_kv=inner // heads,
        d_ff=shape_of(state, f"{dense}.wi_0.weight" if gated else f"{dense}.wi.weight", rank=2)[0],
        relative_attention_num_buckets=buckets,
        delete_gate_layer=gate_layer,
        gate_layer_norm=f"{gate}layer_norm.weight" in state,
        # A tied head is the embedding, of which a file may hold a copy.
        tie_word_embeddings=wanted.tie_word_embeddings,
        parts=parts,
    )
    kept = {
        key: tensor
        for key, tensor in state.items()
        if ("decoder" in parts or not key.startswith(("decoder.", "lm_head.")))
        and not (key == "lm_head.weight" and found.tie_word_embeddings)
    }
    return found, renamed(kept, _our_key, "MrT5", CHECKPOINT.wanted)


CHECKPOINT = Checkpoint(recognises=_recognises, convert=_convert, config=_config, wanted=lambda key: key not in _COPIES)

"""Checkpoints of HAT: its byte encoder and the connector to words. The backbone and the byte decoder are dropped.

Layers inside the byte encoder are taken to have the names of the library's Llama, as the original builds on it. No official
file was at hand.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from zoo.checkpoint import Checkpoint, renamed
from zoo.codecs.word_pool.config import Normed, WordPoolConfig
from zoo.errors import KeysError, WeightsError

_CONNECTOR = "encoder_connector."
_ATTENTION = f"{_CONNECTOR}cross_attention_encoder_connector."
_BYTES = "encoder."
_EMBEDDING = "encoder.embedding_layer.weight"
# Settings of the byte layers that the library's Mistral, whose attention has a window, calls by the same names.
_SETTINGS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "intermediate_size"),
    *("max_position_embeddings", "rope_theta", "rope_scaling", "hidden_act", "sliding_window", "vocab_size"),
)


def _our_key(key: str) -> str | None:
    if key == _EMBEDDING:
        return "network.network.embed_tokens.weight"
    if key.startswith(_ATTENTION):
        return f"network.{key.removeprefix(_ATTENTION)}"
    if key.startswith(_CONNECTOR):
        return f"network.{key.removeprefix(_CONNECTOR)}"
    return f"network.network.{key.removeprefix(_BYTES)}"


def _recognises(keys: Collection[str]) -> bool:
    return f"{_CONNECTOR}latent_query" in keys


def _config(raw: Mapping[str, Any]) -> WordPoolConfig:
    """Settings of upstream's ``config.json``.

    Raises:
        WeightsError: they cannot be used.
    """
    try:
        encoder, backbone = raw["encoder_config"], raw["backbone_config"]
        attention = encoder["cross_attention_config"]
        if encoder.get("key_query_norm") or encoder.get("mlp_bias"):
            raise WeightsError("byte layers with norms of queries and keys, or with biases, are not known here")
        normed: Normed = "none"
        if attention["key_query_norm"]:
            normed = "head" if attention["key_query_norm_per_head"] else "whole"
        return WordPoolConfig(
            limit=raw.get("max_word_size", 100),
            pool="cross_attention",
            dim=backbone["hidden_size"],
            byte_layers={name: encoder[name] for name in _SETTINGS if name in encoder},
            heads=attention["num_attention_heads"],
            kv_heads=attention["attention_num_kv_heads"],
            inner=attention["hidden_size"],
            normed=normed,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"the configuration cannot be used: {error!r}") from error


def _convert(state: Mapping[str, Tensor], config: WordPoolConfig | None) -> tuple[WordPoolConfig, dict[str, Tensor]]:
    if config is None:
        raise KeysError("the tensors of HAT tell no number of heads: pass config.json")
    return config, renamed(state, _our_key, "HAT", CHECKPOINT.wanted)


CHECKPOINT = Checkpoint(
    recognises=_recognises,
    convert=_convert,
    config=_config,
    wanted=lambda key: key.startswith((_BYTES, _CONNECTOR)) and not key.endswith("rotary_emb.inv_freq"),
)

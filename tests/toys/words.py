"""Small random models whose vectors are those of words."""

from __future__ import annotations

from typing import Any

import torch

import zoo
from zoo.codecs.magnet import MagnetConfig, MagnetTokenizer
from zoo.codecs.word_pool import WordPool, WordPoolConfig

#: Layers of a byte encoder, by the names of transformers.
BYTE_LAYERS: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "sliding_window": 5,
    "rope_theta": 500.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}


def small_words(**settings: Any) -> WordPool:
    """A `WordPool` of any settings."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return finished(WordPool(WordPoolConfig(**settings), name="small-words"))


def small_hat(**settings: Any) -> WordPool:
    """HAT's encoder: one query a word."""
    sizes = {
        "pool": "cross_attention",
        "dim": 40,
        "inner": 48,
        "heads": 6,
        "kv_heads": 3,
        "limit": 12,
        "byte_layers": BYTE_LAYERS,
    }
    return small_words(**sizes | settings)


def small_magnet() -> MagnetTokenizer:
    """MAGNET of two scripts, whose predictors close some words and leave others open."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MagnetConfig(264, 16, 2, 8, 24, (1, 1, 1), ("latin", "cyrillic"), (0.3, 0.2))
        return finished(MagnetTokenizer(config, name="small-magnet"))


def finished(model: Any) -> Any:
    """A model that stands still and knows its fingerprint."""
    model.eval().requires_grad_(False)
    model.fingerprint = model.compute_fingerprint()
    assert isinstance(model, zoo.Tokenizer)
    return model

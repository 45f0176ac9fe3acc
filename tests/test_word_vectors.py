"""Vectors of words: HAT's byte encoder and connector by their formulas, and shapes of other systems that learn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from toys.words import BYTE_LAYERS, small_hat, small_words
from zoo.codecs.word_pool import WordPool, WordPoolConfig, tfree
from zoo.codecs.word_pool.pools import CrossAttention

TEXTS = ["Hello, big world!", "", "snake_case और हिन्दी", b"ab\xff cd"]
#: A HAT as its ``config.json`` describes it.
UPSTREAM: dict[str, Any] = {
    "max_word_size": 12,
    "backbone_config": {"hidden_size": 40},
    "encoder_config": {
        **BYTE_LAYERS,
        "vocab_size": 256,
        "rope_scaling": None,
        "hidden_act": "silu",
        "mlp_bias": False,
        "key_query_norm": False,
        "cross_attention_config": {
            "hidden_size": 48,
            "hidden_size_q": 40,
            "hidden_size_kv": 32,
            "num_attention_heads": 6,
            "attention_num_kv_heads": 3,
            "word_window_size": 1,
            "key_query_norm": True,
            "key_query_norm_per_head": True,
        },
    },
}


def upstream_state(model: WordPool) -> dict[str, Tensor]:
    names = {}
    for key, tensor in model.network.state_dict().items():
        if key.startswith("network."):
            names[f"encoder.{key.removeprefix('network.').replace('embed_tokens', 'embedding_layer')}"] = tensor
        elif key == "latent_query":
            names[f"encoder_connector.{key}"] = tensor
        else:
            names[f"encoder_connector.cross_attention_encoder_connector.{key}"] = tensor
    return names


def rotated(x: Tensor, position: int, base: float) -> Tensor:
    """Rotary positions of one head's vector as complex numbers."""
    half = len(x) // 2
    angles = position * base ** (-torch.arange(half) * 2 / len(x))
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half), angles)
    return torch.cat([turned.real, turned.imag])


@pytest.mark.parametrize("normed", ["none", "whole", "head"])
def test_one_query_a_word_over_its_own_bytes(normed: str) -> None:
    model = small_hat(normed=normed)
    network = model.network
    assert isinstance(network, CrossAttention)
    words = model.split(TEXTS[0].encode())
    assert len(words) == 3
    octets = torch.tensor([list(TEXTS[0].encode())])
    hidden = network.network(octets).last_hidden_state[0]
    query, keys, values = network.q_proj(network.latent_query)[0, 0], network.k_proj(hidden), network.v_proj(hidden)
    if normed == "whole":
        query, keys = network.norm_query(query), network.norm_key(keys)
    query, keys, values = query.view(6, 8), keys.view(-1, 3, 8), values.view(-1, 3, 8)
    if normed == "head":
        query, keys = network.norm_query(query), network.norm_key(keys)
    expected, start = [], 0
    for number, word in enumerate(words):
        places = range(start, start + len(word))
        heads = []
        for head in range(6):
            turned = rotated(query[head], number, 500.0)
            scores = torch.stack([turned @ rotated(keys[place, head // 2], place, 500.0) for place in places])
            heads.append((scores / math.sqrt(8)).softmax(0) @ values[list(places), head // 2])
        expected.append(network.o_proj(torch.cat(heads)))
        start += len(word)
    found = model.embed(model.encode(TEXTS[0]))[0]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-6, rtol=1e-4)


def test_what_comes_later_changes_nothing_and_layers_look_back_over_a_window() -> None:
    model = small_hat()
    whole = model.embed(model.encode("one two three four"))[0]
    torch.testing.assert_close(model.embed(model.encode("one two"))[0], whole[:2], atol=1e-6, rtol=1e-5)
    network = model.network.network
    ids = torch.tensor([list(b"abcdefghijklmnop")])
    other = ids.clone()
    other[0, 0] += 1
    changed = (network(ids).last_hidden_state != network(other).last_hidden_state).any(-1)[0]
    # Two layers look back over four bytes each.
    assert changed.nonzero().flatten().tolist() == list(range(9))


def test_checkpoints_of_the_original() -> None:
    model = small_hat(normed="head")
    state = upstream_state(model)
    others = {"backbone.layers.0.x": torch.zeros(1), "lm_head.weight": torch.zeros(1), "layer_norm.weight": torch.zeros(1)}
    assert WordPool.checkpoint.recognises(state.keys())
    found = zoo.load_upstream("word_pool", UPSTREAM, state | others)
    assert isinstance(found, WordPool) and found.config.dim == 40 and found.spec.dim == 40
    tokens = found.encode(TEXTS)
    torch.testing.assert_close(found.embed(tokens), model.embed(model.encode(TEXTS)), atol=1e-6, rtol=1e-4)
    assert found.decode(tokens) == TEXTS
    with pytest.raises(zoo.KeysError, match="pass config"):
        WordPool.checkpoint.convert(state, None)
    with pytest.raises(zoo.KeysError, match="unexpected"):
        zoo.load_upstream("word_pool", UPSTREAM, state | {"encoder.layers.0.more": torch.zeros(1)})
    encoder = UPSTREAM["encoder_config"]
    for broken in ({"mlp_bias": True}, {"cross_attention_config": {}}):
        with pytest.raises(zoo.WeightsError):
            zoo.load_upstream("word_pool", UPSTREAM | {"encoder_config": encoder | broken}, state)


@pytest.mark.parametrize(
    "settings",
    [
        {"boundaries": "hat", "pool": "cross_attention", "dim": 32, "byte_layers": BYTE_LAYERS},
        {"boundaries": "whitespace", "pool": "cls", "dim": 16, "heads": 2, "vectors": 3, "limit": 9},
        {
            "boundaries": "whitespace",
            "pool": "cross_attention",
            "dim": 32,
            "byte_layers": BYTE_LAYERS | {"num_hidden_layers": 0},
        },
    ],
    ids=["hat", "learn your tokens", "byte2word"],
)
def test_a_batch_gives_what_its_items_give(settings: dict[str, Any], tmp_path: Path) -> None:
    model = small_words(**settings)
    tokens = model.encode(TEXTS)
    vectors, several = model.embed(tokens), model.config.vectors
    for index, (alone, ends, own) in enumerate(zip(tokens, model.words(tokens), model.vectors(tokens), strict=True)):
        assert own.shape == (len(ends), several, model.config.dim)
        torch.testing.assert_close(vectors[index, : len(ends) * several], own.flatten(0, 1))
        torch.testing.assert_close(model.embed(alone)[0], own.flatten(0, 1), atol=1e-6, rtol=1e-4)
        assert not vectors[index, len(ends) * several :].any()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(zoo.load(f"local-dir:{tmp_path}").embed(tokens), vectors, atol=1e-6, rtol=1e-4)


def test_trigrams_are_summed() -> None:
    model = small_words(boundaries="tfree", limit=0, pool="hash_sum", dim=8, vocabulary=500)
    texts = ["snake_case  here", "und ß", ""]
    trigrams = tfree.Trigrams(500, 10, 2)
    for text, own in zip(texts, model.vectors(model.encode(texts)), strict=True):
        expected = trigrams.embed(model.network.table, tfree.words(text))
        torch.testing.assert_close(own[:, 0], expected)
    with pytest.raises(zoo.ItemError, match="item 0: the byte 0xff at offset 1 does not belong to UTF-8"):
        model.embed(model.encode(b"a\xff"))


def test_words_are_spelled_from_their_vectors() -> None:
    """The whole of Learn Your Tokens, pool and decoder, learns to write the words that it read."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"dim": 32, "heads": 2, "vectors": 2, "limit": 8, "layers": 1, "hidden": 64}
    model = WordPool(WordPoolConfig("whitespace", pool="cls", decoder="prefix_word", **sizes)).train()
    words = [b"the", b" cat", b" and", b" then", b" it", "\u00e9t\u00e9".encode(), b" longwrd", b"\xff"]
    assert model.split(b" longwrds") == [b" longwrd", b"s"]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(80):
        loss = model.decoder.loss(model.network(words), words)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert model.decoder.spell(model.network(words)) == words
    # Steps see no later byte.
    vectors, octets = model.network(words[:1]), torch.tensor([list(b"the")])
    torch.testing.assert_close(
        model.decoder(vectors, octets[:, :1]), model.decoder(vectors, octets)[:, :2], atol=1e-5, rtol=1e-4
    )


def test_subwords_are_told_from_words() -> None:
    """Byte2Word's attention over a word's bytes, without layers, tells words that begin alike."""
    torch.manual_seed(0)
    layers = BYTE_LAYERS | {"num_hidden_layers": 0}
    settings: dict[str, Any] = {"dim": 32, "byte_layers": layers, "vocabulary": 20, "limit": 16}
    model = WordPool(WordPoolConfig("whitespace", pool="cross_attention", decoder="subword", **settings)).train()
    words = [b"then", b" the", b" there", b" them", b" these"]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        logits = model.decoder(model.network(words))
        loss = F.cross_entropy(logits, torch.arange(len(words)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logits.shape == (5, 20) and logits.argmax(-1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pool": "cls"}, "does not go with dim=0"),
        ({"dim": 8}, "does not go with dim=8"),
        ({"decoder": "subword"}, "needs the vectors of a pool"),
        ({"pool": "cls", "dim": 8, "limit": 0}, "need a limit of its length"),
        ({"pool": "hash_sum", "dim": 8, "vectors": 2}, "one vector in the pool 'hash_sum', not 2"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(zoo.InputError, match=message):
        WordPoolConfig(**settings)


def test_networks_that_cannot_be() -> None:
    with pytest.raises(zoo.InputError, match="a width of 40 does not go with 7"):
        small_hat(heads=7, inner=None)
    with pytest.raises(zoo.InputError, match="positions need one width"):
        small_hat(heads=3, inner=48)
    model = small_hat()
    with pytest.raises(zoo.ItemError, match="item 1: 9000 bytes are more than the 8192"):
        model.embed(model.encode(["a", "a" * 9000]))
    with pytest.raises(zoo.ArgumentError, match="has no vectors"):
        small_words().embed(small_words().encode("a"))

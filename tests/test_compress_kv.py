"""Cache policies give the original code's results, and exactly the model's own wherever the budget covers everything."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    Phi3Config,
    Qwen3Config,
    StaticCache,
    T5Config,
    T5EncoderModel,
)

import small_vlm
import zoo
from zoo import compress
from zoo.compress import kv


def case(golden: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    folder = golden / "compress" / name
    weights = folder / "weights.safetensors"
    return (
        json.loads((folder / "config.json").read_text()),
        load_file(folder / "io.safetensors"),
        load_file(weights) if weights.exists() else {},
    )


def llama(layers: int = 3, kv_heads: int = 2, attention: str = "sdpa", seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=128,
        initializer_range=0.4,
        pad_token_id=0,
        eos_token_id=None,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def prompt(length: int, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.randint(1, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


def stepwise(model: Any, ids: Tensor, first: int, mask: Tensor | None = None) -> tuple[Tensor, DynamicCache]:
    """Logits of the tokens from ``first - 1`` on, the first ones as a prompt and the others one by one."""
    cache = DynamicCache()
    parts = []
    for start, end in [(0, first), *((i, i + 1) for i in range(first, ids.shape[1]))]:
        positions = None if mask is None else (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, start:end]
        out = model(
            ids[:, start:end],
            attention_mask=None if mask is None else mask[:, :end],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        parts.append(out.logits[:, -1:])
    return torch.cat(parts, dim=1), cache


POLICIES = {
    "h2o": kv.H2O(heavy=3, recent=4),
    "h2o, merging": kv.H2O(heavy=3, recent=4, merge=True),
    "double sparsity": kv.DoubleSparsity(tokens=5, group=2, dense_layers=1),
    "tidal decode": kv.TidalDecode(tokens=5, start=0, correction=1),
    "token select": kv.TokenSelect(tokens=4, init=1, local=3, chunk=2),
    "token select, true positions": kv.TokenSelect(tokens=4, init=1, local=3, chunk=2, positions="true"),
}
COVERING = {
    "h2o": kv.H2O(heavy=1.0, recent=20),
    "h2o, merging": kv.H2O(heavy=1.0, recent=20, merge=True),
    "double sparsity": kv.DoubleSparsity(tokens=99, group=4, bits=2, dense_layers=0),
    "tidal decode": kv.TidalDecode(tokens=99, start=0, correction=1),
    "token select": kv.TokenSelect(tokens=99, init=1, local=3, chunk=2),
    "token select, true positions": kv.TokenSelect(tokens=99, init=1, local=3, chunk=2, positions="true"),
}

# ---------------------------------------------------------------------------------------------------- the original's results


def test_h2o_golden(golden: Path) -> None:
    config, io, _ = case(golden, "kv-h2o-4-12")
    heavy, recent = config["hh_size"], config["recent_size"]
    key, value, attention = io["prefill_key"], io["prefill_value"], io["prefill_attention"]
    scores = None
    for step in range(config["steps"] + 1):
        if step:
            key = torch.cat([key, io[f"step{step}.new_key"]], dim=2)
            value = torch.cat([value, io[f"step{step}.new_value"]], dim=2)
            attention = io[f"step{step}.attention"]
        scores = kv.h2o_scores(attention.sum(2), config["heads"], scores)
        kept = kv.h2o_kept(scores, heavy, recent)
        key, value, scores = kv.gather_entries(key, kept), kv.gather_entries(value, kept), scores.gather(2, kept)
        assert torch.equal(key, io[f"step{step}.key"])
        assert torch.equal(value, io[f"step{step}.value"])
        torch.testing.assert_close(scores[0], io[f"step{step}.score"], atol=1e-6, rtol=1e-6)


def test_double_sparsity_golden(golden: Path) -> None:
    config, io, weights = case(golden, "kv-doublesparse-h4")
    order = io["sorted_channel"]
    channels = order[:, : order.shape[1] // config["group_factor"]]
    heads = config["heads"]

    model = decoder_of(config, layers=3)
    attention = model.layers[2].self_attn
    attention.load_state_dict(weights)
    cache = DynamicCache()
    filled(cache, 2, io["past_key"], io["past_value"])
    policy = kv.DoubleSparsity(config["heavy_const"], config["group_factor"], config["label_bits"], channels=(order,) * 3)
    with kv.apply(model, policy):
        output, _ = attention(io["hidden"], (io["cos"], io["sin"]), None, past_key_values=cache)
    torch.testing.assert_close(output, io["output"], atol=1e-5, rtol=1e-5)

    # And which tokens: the exact zeros of the original's probabilities.
    key = cache.layers[2].keys
    query = rotated(attention.q_proj(io["hidden"]), heads, io)
    scores = kv.label_scores(query, kv.channel_labels(key, channels), channels, config["label_bits"])
    selected = kv.top_tokens(scores, config["heavy_const"])
    assert torch.equal(selected, (io["attention"][:, :, 0] > 0).nonzero()[:, 2].view(1, heads, -1))


def test_tidal_decode_golden(golden: Path) -> None:
    config, io, weights = case(golden, "kv-tidaldecode-6layers")
    model = decoder_of(config, layers=config["layers"])
    cache = DynamicCache()
    policy = kv.TidalDecode(config["top_k"], config["sparse_layer_start"], config["correction_layer"])
    with kv.apply(model, policy):
        for index, layer in enumerate(model.layers):
            prefix = f"{index}."
            layer.self_attn.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
            filled(cache, index, io[f"layer{index}.past_key"], io[f"layer{index}.past_value"])
            output, _ = layer.self_attn(io[f"layer{index}.hidden"], (io["cos"], io["sin"]), None, past_key_values=cache)
            torch.testing.assert_close(output, io[f"layer{index}.output"], atol=1e-5, rtol=1e-5)
    for index in (policy.start, policy.correction):
        mask = io[f"layer{index}.selected_mask"][:, :, 0]
        assert torch.equal(cache.layers[index].selected, mask.nonzero()[:, 2].view(*mask.shape[:2], -1))


def decoder_of(config: dict[str, Any], layers: int) -> LlamaModel:
    return LlamaModel(
        LlamaConfig(
            vocab_size=8,
            hidden_size=config["hidden_size"],
            intermediate_size=8,
            num_hidden_layers=layers,
            num_attention_heads=config["heads"],
            num_key_value_heads=config["kv_heads"],
        )
    ).eval()


def filled(cache: DynamicCache, index: int, key: Tensor, value: Tensor) -> None:
    """Put entries into one layer of an empty cache, as a prompt of the original did."""
    while len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    cache.update(key, value, index)


def rotated(projected: Tensor, heads: int, io: dict[str, Tensor]) -> Tensor:
    query = projected.unflatten(-1, (heads, -1)).transpose(1, 2)
    first, second = query.chunk(2, dim=-1)
    return query * io["cos"][:, None] + torch.cat([-second, first], dim=-1) * io["sin"][:, None]


# ------------------------------------------------------------------------------------------------------------- on tensors


def test_h2o_keeps_everything_within_the_budget() -> None:
    scores = torch.rand(2, 3, 7)
    assert torch.equal(kv.h2o_kept(scores, 3, 4), torch.arange(7).expand(2, 3, 7))


def test_h2o_without_recent_entries_ranks_all() -> None:
    scores = torch.tensor([[[1.0, 5.0, 5.0, 0.0, 3.0]]])
    assert kv.h2o_kept(scores, 3, 0).tolist() == [[[1, 2, 4]]]
    assert kv.h2o_kept(scores, 1, 0).tolist() == [[[1]]], "equal ones by age"
    assert kv.h2o_kept(scores, 0, 2).tolist() == [[[3, 4]]]


@pytest.mark.parametrize("chunk", [1 << 26, 60])
def test_attention_mass_is_the_column_sum_of_the_probabilities(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv.tensors, "_MOST_LOGITS", chunk)
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8)
    logits = query @ key.repeat_interleave(2, dim=1).transpose(-1, -2) * 0.3
    causal = torch.arange(9)[None] <= torch.arange(4, 9)[:, None]
    probabilities = logits.masked_fill(~causal, -torch.inf).softmax(-1)
    torch.testing.assert_close(kv.attention_mass(query, key, 0.3), probabilities.sum(2))
    asking = torch.tensor([[True, False, True, True, True], [True] * 5])
    torch.testing.assert_close(
        kv.attention_mass(query, key, 0.3, asking=asking), (probabilities * asking[:, None, :, None]).sum(2)
    )


def test_merged_values_are_averages_weighted_by_norm() -> None:
    keys = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 2.0], [0.1, 1.0]])[None, None]
    values = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 4.0], [0.0, 0.0]])[None, None]
    kept, valid = torch.tensor([[[0, 3]]]), torch.ones(1, 1, 4, dtype=torch.bool)
    # Entry 1 is like entry 0: (3 [3, 0] + 1 [0, 1]) / 4. Entry 2 is like entry 3, whose value of norm 0 does not count.
    expected = torch.tensor([[9 / 4, 1 / 4], [0.0, 4.0]])[None, None]
    torch.testing.assert_close(kv.merged_values(keys, values, kept, valid), expected)
    valid[..., 1] = False
    expected[..., 0, :] = torch.tensor([3.0, 0.0])
    torch.testing.assert_close(kv.merged_values(keys, values, kept, valid), expected)


def test_channels_are_ordered_by_the_mean_product() -> None:
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    products = (query * key.repeat_interleave(2, dim=1)).abs()
    torch.testing.assert_close(kv.channel_mass(query, key), products.sum(dim=(0, 2)))
    real = torch.ones(2, 6, dtype=torch.bool)
    real[0, :4] = False
    chosen = torch.cat([products[0, :, 4:], products[1]], dim=1)
    torch.testing.assert_close(kv.channel_mass(query, key, real), chosen.sum(1))
    assert kv.channel_order(torch.tensor([[1.0, 3.0, 0.0, 3.0]])).tolist() == [[1, 3, 0, 2]]


def test_calibration_is_over_all_prompts_and_no_padding() -> None:
    """Channels of the first layer, whose queries and keys follow from the embeddings alone."""
    model = llama(kv_heads=2)
    prompts = [{"input_ids": prompt(9)}, {"input_ids": prompt(12, 2, seed=5), "attention_mask": torch.ones(2, 12).long()}]
    prompts[1]["attention_mask"][0, :4] = 0
    order = kv.calibrate(model, prompts)
    assert len(order) == 3 and all(torch.equal(layer.sort().values, torch.arange(8).expand(4, 8)) for layer in order)
    total = torch.zeros(4, 8)
    layer = model.model.layers[0]
    for inputs in prompts:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        states = layer.input_layernorm(model.model.embed_tokens(ids))
        io = dict(zip(("cos", "sin"), model.model.rotary_emb(states, torch.arange(ids.shape[1])[None]), strict=True))
        query = rotated(layer.self_attn.q_proj(states), 4, io)
        key = rotated(layer.self_attn.k_proj(states), 2, io).repeat_interleave(2, dim=1)
        total += ((query * key).abs() * mask[:, None, :, None]).sum(dim=(0, 2))
    assert torch.equal(order[0], total.argsort(descending=True))
    with kv.apply(model, kv.DoubleSparsity(4, channels=order)):
        assert model.generate(prompt(9), max_new_tokens=3).shape == (1, 12)
    with pytest.raises(zoo.InputError, match="no prompts"):
        kv.calibrate(model, [])


def test_all_channels_give_the_true_best_tokens() -> None:
    query, key = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 30, 8)
    channels = torch.stack([torch.randperm(8) for _ in range(4)])
    estimated = kv.label_scores(query, kv.channel_labels(key, channels), channels)
    exact = kv.attention_logits(query, key, 8**-0.5)[:, :, 0]
    torch.testing.assert_close(estimated, exact)
    assert torch.equal(kv.top_tokens(estimated, 5), exact.topk(5).indices.sort().values)


def test_labels_are_rounded_between_their_extremes() -> None:
    x = torch.tensor([[0.0, 1.0, 0.4, 0.1], [2.0, 2.0, 2.0, 2.0], [-3.0, 0.0, -1.4, -1.6]])
    expected = torch.tensor([[0.0, 1.0, 1 / 3, 0.0], [2.0, 2.0, 2.0, 2.0], [-3.0, 0.0, -1.0, -2.0]])
    torch.testing.assert_close(kv.fake_quantized(x, 2), expected)
    assert kv.fake_quantized(x, 16) is x


def test_selected_attention_is_a_softmax_over_the_selected() -> None:
    query, key, value = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 30, 8), torch.randn(2, 2, 30, 8)
    selected = torch.stack([torch.randperm(30)[:6].sort().values for _ in range(8)]).view(2, 4, 6)
    visible = torch.ones(2, 1, 30, dtype=torch.bool)
    visible[1, :, :12] = False
    visible[1, :, selected[1].flatten()[:3]] = True
    chosen = torch.zeros(2, 4, 30, dtype=torch.bool).scatter_(2, selected, True) & visible
    logits = (query @ key.repeat_interleave(2, dim=1).transpose(-1, -2) * 0.2)[:, :, 0].masked_fill(~chosen, -torch.inf)
    expected = logits.softmax(-1)[:, :, None] @ value.repeat_interleave(2, dim=1)
    actual = kv.selected_attention(query, key, value, selected, 0.2, visible)
    rows = chosen.any(-1)
    torch.testing.assert_close(actual[rows], expected[rows])


def test_low_precision_is_ranked_in_float32() -> None:
    # In bfloat16 both products round to 1.
    query = torch.tensor([1.0, 1.0]).bfloat16()[None, None, None]
    key = torch.tensor([[1.0, 0.0], [1.0, 1 / 512]]).bfloat16()[None, None]
    logits = kv.attention_logits(query, key, 1.0)[:, :, 0]
    assert logits.dtype == torch.float32 and kv.top_tokens(logits, 1).item() == 1


# -------------------------------------------------------------------------------------------------------------- in a model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("policy", COVERING)
def test_a_budget_for_everything_changes_nothing(policy: str, kv_heads: int, attention: str) -> None:
    model, ids = llama(kv_heads=kv_heads, attention=attention), prompt(20, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected, _ = stepwise(model, ids, 14, mask)
    with kv.apply(model, COVERING[policy]):
        actual, _ = stepwise(model, ids, 14, mask)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_h2o_in_a_model_reads_what_the_rule_leaves(attention: str) -> None:
    """Against the rule written out with the probabilities of eager attention, in a layer that recomputes everything."""
    model, ids, first = llama(layers=1, kv_heads=4, attention=attention), prompt(26), 16
    policy = POLICIES["h2o"]
    assert isinstance(policy, kv.H2O)
    with kv.apply(model, policy):
        actual, cache = stepwise(model, ids, first)
    assert cache.layers[0].keys.shape[2] == policy.heavy + policy.recent
    assert cache.get_seq_length() == ids.shape[1]

    reference = llama(layers=1, kv_heads=4, attention="eager")
    length = ids.shape[1]
    visible = torch.ones(1, 4, length, length, dtype=torch.bool).tril()
    alive = [set(range(first)) for _ in range(4)]
    mass = torch.zeros(4, length)
    for end in range(first, length + 1):
        mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
        probabilities = reference(ids, attention_mask=mask, output_attentions=True).attentions[0][0]
        mass += probabilities[:, :first].sum(1) if end == first else probabilities[:, end - 1]
        for head, entries in enumerate(alive):
            entries |= set(range(end - 1, end))
            candidates = sorted(entries)[: -policy.recent]
            for entry in sorted(candidates, key=lambda j, h=head: -mass[h, j])[policy.heavy :]:
                entries.remove(entry)
                visible[0, head, end:, entry] = False
    expected = reference(ids, attention_mask=torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)).logits
    torch.testing.assert_close(actual, expected[:, first - 1 :], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
def test_padding_changes_nothing(policy: str) -> None:
    """Items of a left-padded batch give what they give alone, although the policy counts tokens."""
    model = llama()
    lengths, width, steps = (9, 16), 16, 4
    # No token twice: equal ones have equal keys in the first layer, and rounding decides which of them TokenSelect chooses.
    items = [torch.randperm(49, generator=torch.Generator().manual_seed(n))[None, : n + steps] + 1 for n in lengths]
    padded = torch.zeros(2, width + steps, dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for row, item in enumerate(items):
        padded[row, -item.shape[1] :], mask[row, -item.shape[1] :] = item[0], 1
    # Channels are an average over the batch, so they have to be given to compare items.
    chosen = POLICIES[policy]
    if isinstance(chosen, kv.DoubleSparsity):
        chosen = kv.DoubleSparsity(5, 2, dense_layers=1, channels=(torch.arange(8).expand(4, 8),) * 3)
    with kv.apply(model, chosen):
        together, _ = stepwise(model, padded, width, mask)
        for row, (item, length) in enumerate(zip(items, lengths, strict=True)):
            alone, _ = stepwise(model, item, length)
            torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", ["double sparsity", "tidal decode", "token select"])
def test_grouped_heads_equal_repeated_ones(policy: str) -> None:
    model, wide, ids = llama(kv_heads=2), llama(kv_heads=4), prompt(24)
    state = copy.deepcopy(model.state_dict())
    for key in state:
        if "k_proj" in key or "v_proj" in key:
            state[key] = state[key].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    wide.load_state_dict(state)
    with kv.apply(model, POLICIES[policy]), kv.apply(wide, POLICIES[policy]):
        grouped, repeated = stepwise(model, ids, 16)[0], stepwise(wide, ids, 16)[0]
    torch.testing.assert_close(grouped, repeated, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_differ_from_the_model_when_they_drop(policy: str) -> None:
    model, ids = llama(), prompt(30)
    expected, _ = stepwise(model, ids, 24)
    with kv.apply(model, POLICIES[policy]):
        actual, _ = stepwise(model, ids, 24)
    if not isinstance(POLICIES[policy], kv.TokenSelect):
        torch.testing.assert_close(actual[:, 0], expected[:, 0], msg="the prompt is read in full")
    assert (actual[:, 1:] - expected[:, 1:]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("policy", "beams"), [("h2o", 3), ("h2o, merging", 1), ("double sparsity", 3), ("tidal decode", 3), ("token select", 3)]
)
def test_generate(policy: str, beams: int) -> None:
    model, ids = llama(), prompt(16, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 4, "num_beams": beams, "do_sample": False}
    plain = model.generate(ids, **options)
    with kv.apply(model, COVERING[policy]):
        assert torch.equal(model.generate(ids, **options), plain)
    with kv.apply(model, POLICIES[policy]):
        assert model.generate(ids, **options).shape == (2, 20)
    assert torch.equal(model.generate(ids, **options), plain)


def test_a_filled_cache_is_taken_over() -> None:
    model, ids = llama(), prompt(24)
    cache = model(ids[:, :20], use_cache=True).past_key_values
    with kv.apply(model, kv.H2O(heavy=4, recent=6)):
        model(ids[:, 20:], past_key_values=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [10, 10, 10]
    assert cache.get_seq_length() == 24


def test_several_new_tokens_at_once_see_what_is_left() -> None:
    """A chunk after an eviction equals its tokens one by one, as long as nothing is dropped in between."""
    model, ids = llama(), prompt(24)
    policy = kv.H2O(heavy=4, recent=20)
    with kv.apply(model, policy):
        single, _ = stepwise(model, ids, 18)
        cache = DynamicCache()
        model(ids[:, :18], past_key_values=cache)
        chunk = model(ids[:, 18:], past_key_values=cache).logits
    torch.testing.assert_close(chunk, single[:, 1:], atol=1e-4, rtol=1e-4)


def test_entries_that_a_step_reads() -> None:
    assert kv.H2O(heavy=4, recent=0.1).entries_read(0, 100, 150) == 15
    assert kv.H2O(heavy=4, recent=0.1).entries_read(0, 100, 9) == 9
    sparse = kv.DoubleSparsity(tokens=0.1, group=4)
    assert [sparse.entries_read(layer, 100, 160) for layer in (1, 2)] == [160, 160 / 8 + 10]
    tidal = kv.TidalDecode(tokens=10, start=2, correction=5)
    assert [tidal.entries_read(layer, 100, 160) for layer in range(7)] == [160, 160, 160, 10, 10, 160, 10]


def test_shares_count_from_the_prompt() -> None:
    model, ids = llama(), prompt(25)
    with kv.apply(model, kv.H2O(heavy=0.25, recent=0.1)):
        _, cache = stepwise(model, ids, 20)
    assert cache.layers[0].budget == (5, 2) and cache.layers[0].keys.shape[2] == 7


@pytest.mark.parametrize("kind", [Phi3Config, Qwen3Config])
def test_other_decoders(kind: type) -> None:
    """One with a single projection for queries, keys and values, one that normalises queries and keys."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "initializer_range": 0.4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = AutoModelForCausalLM.from_config(kind(**sizes, **heads, pad_token_id=0, eos_token_id=None)).eval()
    expected, _ = stepwise(model, prompt(20), 14)
    for policy in COVERING.values():
        with kv.apply(model, policy):
            torch.testing.assert_close(stepwise(model, prompt(20), 14)[0], expected, atol=1e-4, rtol=1e-4)


def test_sliding_windows_are_refused() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(MistralConfig(**sizes, num_key_value_heads=2, sliding_window=8)).eval()
    with kv.apply(model, kv.H2O(2, 2)), pytest.raises(zoo.InputError, match="DynamicSlidingWindowLayer"):
        model(prompt(5))


def image_prompt() -> dict[str, Tensor]:
    """Two prompts of 10 words and an image of 36 patches, the first with two words less."""
    ids = torch.cat([prompt(4, 2), torch.full((2, 36), small_vlm.IMAGE), prompt(6, 2, seed=2)], dim=1)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    pixels = torch.randn(2, 3, 84, 84, generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


@pytest.mark.parametrize("method", ["uniform", "fastv"])
def test_together_with_dropping_visual_tokens(method: str) -> None:
    model = small_vlm.llava()
    options = {**image_prompt(), "max_new_tokens": 4, "do_sample": False}
    with compress.apply(model, method, keep=0.25):
        expected = model.generate(**options)
        with kv.apply(model, kv.H2O(heavy=1.0, recent=9)):
            assert torch.equal(model.generate(**options), expected)
        with kv.apply(model, kv.H2O(heavy=3, recent=4)):
            cache = model.generate(**options, return_dict_in_generate=True).past_key_values
        assert {layer.keys.shape[2] for layer in cache.layers} == {7}
        assert torch.equal(model.generate(**options), expected)


def test_together_with_what_cuts_the_cache() -> None:
    model = small_vlm.llava()
    with compress.apply(model, "mustdrop", keep=0.25), pytest.raises(zoo.InputError, match="mustdrop cuts the cache itself"):
        kv.apply(model, kv.H2O(2, 2))
    text, ids = llama(), prompt(20)
    for policy in (POLICIES["h2o"], POLICIES["double sparsity"]):
        with kv.apply(text, policy):
            cache = text(ids).past_key_values
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]
            with pytest.raises(zoo.InputError, match="something else cuts the cache"):
                text(ids[:, :1], past_key_values=cache)


def test_without_a_cache_nothing_happens() -> None:
    model, ids = llama(), prompt(20)
    expected = model(ids, use_cache=False).logits
    with kv.apply(model, kv.H2O(1, 1)):
        assert torch.equal(model(ids, use_cache=False).logits, expected)


def test_removal_leaves_the_model_as_it_was() -> None:
    model, ids = llama(), prompt(20)
    expected = model(ids).logits
    configs = [layer.self_attn.config for layer in model.model.layers]
    handle = kv.apply(model, kv.TidalDecode(4, 0, 1))
    model(ids)
    handle.remove()
    handle.remove()
    assert all(layer.self_attn.config is config for layer, config in zip(model.model.layers, configs, strict=True))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(ids).logits, expected)
    with pytest.raises(ZeroDivisionError), kv.apply(model, kv.H2O(1, 1)):
        raise ZeroDivisionError
    kv.remove(model)
    assert torch.equal(model(ids).logits, expected)


# ----------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kv.H2O(heavy=-1), "heavy"),
        (lambda: kv.H2O(heavy=1.5), "heavy"),
        (lambda: kv.H2O(recent=float("nan")), "recent"),
        (lambda: kv.H2O(heavy=0, recent=0), "keep something"),
        (lambda: kv.DoubleSparsity(tokens=0), "tokens"),
        (lambda: kv.DoubleSparsity(tokens=0.0), "tokens"),
        (lambda: kv.DoubleSparsity(group=0), "group"),
        (lambda: kv.TidalDecode(tokens=1.01), "tokens"),
        (lambda: kv.TidalDecode(start=5, correction=4), "cannot correct"),
    ],
)
def test_budgets_that_make_no_sense(make: Any, message: str) -> None:
    with pytest.raises(zoo.InputError, match=message):
        make()


def test_unsupported_models_and_caches() -> None:
    policy = kv.H2O(2, 2)
    t5 = T5EncoderModel(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(zoo.InputError, match="Llama"):
        kv.apply(t5, policy)
    model = llama()
    with kv.apply(model, policy):
        with pytest.raises(zoo.InputError, match="already"):
            kv.apply(model, policy)
        with pytest.raises(zoo.InputError, match="StaticCache"):
            model(prompt(4), past_key_values=StaticCache(model.config, max_cache_len=8))
        offloaded = DynamicCache()
        offloaded.offloading = True  # the constructor wants a GPU
        with pytest.raises(zoo.InputError, match="offloaded"):
            model(prompt(4), past_key_values=offloaded)
        cache = model(prompt(9)).past_key_values
        with pytest.raises(zoo.InputError, match="cropped"):
            cache.layers[0].crop(-1)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(zoo.InputError, match="sdpa"):
        kv.apply(model, policy)


def test_channels_have_to_fit_the_model() -> None:
    model = llama()
    few, narrow = (torch.arange(8).expand(4, 8),), (torch.arange(4).expand(4, 4),) * 3
    for policy, message in (
        (kv.DoubleSparsity(4, channels=few), "1 layers, none for layer 2"),
        (kv.DoubleSparsity(4, channels=narrow), r"layer 2 are \[4, 4\], not \[4, 8\]"),
        (kv.DoubleSparsity(4, group=16), "none left"),
    ):
        with kv.apply(model, policy), pytest.raises(zoo.InputError, match=message):
            model(prompt(9))


def test_a_method_that_cuts_the_cache_is_refused_beside_a_policy() -> None:
    from zoo.eval.studies.compress import embedded_weights
    from zoo.weights.recipes import vlm

    model = vlm.load(embedded_weights())
    with kv.apply(model, kv.H2O(heavy=0.2, recent=0.2)):
        with pytest.raises(zoo.InputError, match="mustdrop cuts the cache itself"):
            zoo.compress.apply(model, "mustdrop", keep=0.25)
        with zoo.compress.apply(model, "fastv", keep=0.25):  # the refused one has left nothing behind
            pass
    with zoo.compress.apply(model, "mustdrop", keep=0.25), pytest.raises(zoo.InputError, match="cuts the cache itself"):
        kv.apply(model, kv.H2O(heavy=0.2, recent=0.2))

"""TokenSelect chooses the original's tokens, and attends as its formulas say."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LlamaModel, MistralConfig, MistralForCausalLM

import zoo
from zoo.compress import kv
from zoo.compress.kv.tokenselect import Choice

CASES = ("mha", "gqa_pool")


def case(golden: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = golden / "compress" / f"kv-tokenselect-{name}"
    return json.loads((folder / "config.json").read_text()), load_file(folder / "io.safetensors")


def policy_of(config: dict[str, Any], **options: Any) -> kv.TokenSelect:
    pool = max(0, config["kernel_size"])
    return kv.TokenSelect(config["top_k"], config["n_init"], config["n_local"], config["prefill_chunk"], pool, **options)


def attention_over(config: dict[str, Any]) -> LlamaModel:
    """A layer whose hidden states are its queries, keys and values side by side, and its outputs."""
    heads, kv_heads, dim = config["heads"], config["kv_heads"], config["head_dim"]
    widths = [heads * dim, kv_heads * dim, kv_heads * dim]
    model = LlamaModel(
        LlamaConfig(
            vocab_size=2,
            eos_token_id=None,
            bos_token_id=None,
            hidden_size=sum(widths),
            head_dim=dim,
            intermediate_size=4,
            num_hidden_layers=1,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            rope_parameters={"rope_type": "default", "rope_theta": config["rope_base"]},
            max_position_embeddings=4096,
        )
    ).eval()
    layer = model.layers[0].self_attn
    slots = torch.eye(sum(widths)).split(widths)
    for name, rows in zip(("q_proj", "k_proj", "v_proj"), slots, strict=True):
        getattr(layer, name).weight = torch.nn.Parameter(rows.clone())
    layer.o_proj.weight = torch.nn.Parameter(slots[0].T.clone())
    return model.requires_grad_(False)


def run_case(config: dict[str, Any], io: dict[str, Tensor], policy: kv.TokenSelect, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Outputs of the case's calls, the prompt in one, and the tokens that each chunk read."""
    choices: list[Choice] = []
    original = kv.TokenSelect._choices

    def recorded(self: Any, *arguments: Any) -> list[Choice]:
        found = original(self, *arguments)
        choices.extend(found)
        return found

    monkeypatch.setattr(kv.TokenSelect, "_choices", recorded)
    model, cache, outputs = attention_over(config), DynamicCache(), []
    hidden = torch.cat([io[name].flatten(1) for name in ("query", "key", "value")], dim=1)[None]
    cuts = [0, *range(config["prompt"], len(hidden[0]) + 1)]
    with kv.apply(model, policy):
        for start, stop in pairwise(cuts):
            positions = torch.arange(start, stop)[None]
            states = hidden[:, start:stop]
            output, _ = model.layers[0].self_attn(
                states, model.rotary_emb(states, positions), None, past_key_values=cache, position_ids=positions
            )
            outputs.append(output[0, :, : io["query"][0].numel()].unflatten(-1, (config["heads"], -1)))
    return torch.cat(outputs), choices


@pytest.mark.parametrize("name", CASES)
def test_the_originals_choice(name: str, golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the original chooses, where rounding leaves no tie, and the formulas' outputs where the whole list is the same."""
    config, io = case(golden, name)
    outputs, choices = run_case(config, io, policy_of(config, heads="modulo", scores="bfloat16"), monkeypatch)
    compared = 0
    for index, (call, choice) in enumerate(zip(config["calls"], choices, strict=True)):
        positions = io[f"call.{index}.positions"].long()
        if not call["selected"]:
            assert choice.selected is None
            selected = choice.entries
        else:
            assert choice.selected is not None
            selected = choice.selected
        first, local = config["n_init"], config["n_local"]
        if call.get("tie_in_bfloat16"):
            span = call["span"]
            middle = slice(first, span[1] - local)
            summary = kv.rotated(
                io["query"][slice(*span)].transpose(0, 1), local + torch.arange(span[1] - span[0]), frequencies(config)
            ).mean(1)
            votes = kv.token_votes(
                summary, io["key"][middle].transpose(0, 1), "modulo", "bfloat16", max(0, config["kernel_size"])
            )
            chosen = [votes[picked[first:-local] - first].sort().values for picked in (selected, positions)]
            torch.testing.assert_close(*chosen, rtol=0, atol=0)
        else:
            assert torch.equal(selected, positions)
        if torch.equal(selected, positions):
            compared += 1
            torch.testing.assert_close(outputs[slice(*call["span"])], io[f"call.{index}.output"], atol=1e-5, rtol=1e-5)
    assert compared >= len(choices) - 3


@pytest.mark.parametrize("name", CASES)
def test_the_usual_heads_in_float32(name: str, golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, io = case(golden, name)
    _, choices = run_case(config, io, policy_of(config), monkeypatch)
    for index, choice in enumerate(choices):
        if choice.selected is not None:
            chosen = choice.selected[config["n_init"] : -config["n_local"]]
            assert torch.equal(chosen, io[f"call.{index}.top_grouped_float32"].long())


@pytest.mark.parametrize("heads", ["grouped", "modulo"])
@pytest.mark.parametrize("name", CASES)
def test_votes(name: str, heads: Any, golden: Path) -> None:
    config, io = case(golden, name)
    local = config["n_local"]
    for index, call in enumerate(config["calls"]):
        if call["selected"]:
            start, stop = call["span"]
            query = kv.rotated(io["query"][start:stop].transpose(0, 1), local + torch.arange(stop - start), frequencies(config))
            keys = io["key"][config["n_init"] : stop - local].transpose(0, 1)
            votes = kv.token_votes(query.mean(1), keys, heads, pool=max(0, config["kernel_size"]))
            torch.testing.assert_close(votes, io[f"call.{index}.scores_{heads}"], atol=1e-5, rtol=1e-5)


def frequencies(config: dict[str, Any]) -> Tensor:
    dim = config["head_dim"]
    return (config["rope_base"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)).float()


# -------------------------------------------------------------------------------------------------------------- in a model


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **{"vocab_size": 50, "num_key_value_heads": 2, "initializer_range": 0.4, "eos_token_id": None, **sizes, **options}
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def logits(model: Any, ids: Tensor, cuts: list[int], **options: Any) -> Tensor:
    cache, parts = DynamicCache(), []
    for start, stop in pairwise(cuts):
        parts.append(model(ids[:, start:stop], past_key_values=cache, **options).logits)
    return torch.cat(parts, dim=1)


# No token twice in an item: equal ones have equal keys in the first layer, and rounding decides which is chosen.
IDS = torch.stack([torch.randperm(49, generator=torch.Generator().manual_seed(seed))[:40] + 1 for seed in (4, 5)])


@pytest.mark.parametrize("positions", ["compact", "true"])
def test_a_prompt_in_chunks_of_one_is_decoding(positions: Any) -> None:
    model, policy = llama(), kv.TokenSelect(tokens=5, init=2, local=4, chunk=1, positions=positions)
    with kv.apply(model, policy):
        whole = logits(model, IDS, [0, 40])
        single = logits(model, IDS, list(range(41)))
        calls = logits(model, IDS, [0, 7, 25, 40])
    torch.testing.assert_close(whole, single, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole, calls, atol=1e-4, rtol=1e-4)


def test_generate_reads_prompts_in_chunks_as_a_whole() -> None:
    model, policy = llama(), kv.TokenSelect(tokens=0.2, init=2, local=4, chunk=4)
    with kv.apply(model, policy):
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        whole = model.generate(IDS, **options)
        assert torch.equal(model.generate(IDS, prefill_chunk_size=8, **options), whole)


def test_a_cache_that_was_filled_before_loses_its_positions_too() -> None:
    model, policy = llama(num_hidden_layers=1), kv.TokenSelect(tokens=5, init=2, local=4, chunk=1)
    with kv.apply(model, policy):
        expected = logits(model, IDS, [0, 30, 40])[:, 30:]
    cache = model(IDS[:, :30], use_cache=True).past_key_values
    with kv.apply(model, policy):
        actual = model(IDS[:, 30:], past_key_values=cache).logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_compact_positions_do_not_know_where_the_middle_was() -> None:
    """Tokens between the chosen ones and the window change nothing in a layer that does not choose them."""
    model, policy = llama(num_hidden_layers=1), kv.TokenSelect(tokens=3, init=2, local=4, chunk=1)
    cache = DynamicCache()
    with kv.apply(model, policy):
        logits_before = [model(IDS[:1, i : i + 1], past_key_values=cache).logits for i in range(20)][-1]
        chosen = cache.layers[0].chosen[0].tolist()
        kept = [0, 1, *chosen, 16, 17, 18, 19]
    alone = model(IDS[:1, kept]).logits[:, -1]
    torch.testing.assert_close(logits_before[:, -1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("reuse", "rate"), [(None, 0.0), (1.01, 0.0), (-1.0, 5 / 6)])
def test_reuse_of_a_selection(reuse: float | None, rate: float) -> None:
    model = llama()
    cuts = [0, *range(34, 41)]
    with kv.apply(model, kv.TokenSelect(tokens=5, init=2, local=4, chunk=4, reuse=reuse)) as handle:
        first = logits(model, IDS, cuts)
        assert handle.stats.hit_rate == pytest.approx(rate)
        assert handle.stats.made + handle.stats.reused == 2 * 2 * 6
        assert torch.equal(logits(model, IDS, cuts), first), "never across prompts"
    with kv.apply(model, kv.TokenSelect(tokens=5, init=2, local=4, chunk=4)):
        always = logits(model, IDS, cuts)
    assert torch.equal(first[:, :35], always[:, :35])
    assert torch.equal(first, always) == (rate == 0)


def test_reads() -> None:
    policy = kv.TokenSelect(tokens=100, init=10, local=20, chunk=20)
    assert policy.entries_read(0, 1000, 130) == 130
    assert policy.entries_read(0, 1000, 1000) == 485 + 130
    assert policy.entries_read(0, 1000, 1000, hit_rate=0.6) == pytest.approx(0.4 * 485 + 130)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens is a share"),
        ({"local": 8, "chunk": 9}, "local = 8 is below chunk = 9"),
        ({"pool": 4}, "odd number"),
        ({"init": -1}, "init is at least 0"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(zoo.InputError, match=message):
        kv.TokenSelect(**options)


def test_models_whose_positions_cannot_be_taken_out() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    with pytest.raises(zoo.InputError, match="kind 'yarn'"):
        kv.apply(llama(rope_parameters=yarn), kv.TokenSelect())
    with kv.apply(llama(rope_parameters=yarn), kv.TokenSelect(positions="true")):
        pass
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    with pytest.raises(zoo.InputError, match="a sliding window"):
        kv.apply(MistralForCausalLM(MistralConfig(vocab_size=8, sliding_window=8, **sizes)), kv.TokenSelect())
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    model, policy = llama(rope_parameters=scaled), kv.TokenSelect(tokens=99, init=1, local=3, chunk=2)
    expected = logits(model, IDS, [0, 40])
    with kv.apply(model, policy):
        assert torch.equal(logits(model, IDS, [0, 40]), expected)

"""Every method and every cache policy in every use that a model is put to: the same numbers, or an error that says why not."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from small_vlm import IMAGE, llava
from zoo import InputError, compress
from zoo.compress import kv
from zoo.compress.quecc import QueCCConfig, QueCCProjector

POLICIES = {
    "kv h2o": kv.H2O(heavy=0.2, recent=0.1),
    "kv h2o, merging": kv.H2O(heavy=0.2, recent=0.1, merge=True),
    "kv h2o, numbers": kv.H2O(heavy=5, recent=3),
    "kv double sparsity": kv.DoubleSparsity(tokens=0.2, group=2, dense_layers=1),
    "kv tidal decode": kv.TidalDecode(tokens=0.2, start=0, correction=2),
    "kv token select": kv.TokenSelect(tokens=0.2, init=2, local=3, chunk=1),
}
NAMES = [*compress.METHODS, *POLICIES]


def build(layers: int = 4) -> Any:
    return llava(layers=layers, tower_layers=3)


@pytest.fixture
def model() -> Any:
    return build()


def attach(model: Any, name: str) -> AbstractContextManager[Any]:
    """The method or policy of a name in a model."""
    if name in POLICIES:
        return kv.apply(model, POLICIES[name])
    if name == "quecc":
        torch.manual_seed(1)
        config = QueCCConfig(dim=32, multi_dim=64, text_dim=32, tokens=36, kernel=3, llm_dim=32)
        question = torch.randn(32, generator=torch.Generator().manual_seed(1))
        return compress.apply(model, name, projector=QueCCProjector(config), question=question, layers=(1, 2))
    return compress.apply(model, name, keep=0.3)


def detach(model: Any, name: str) -> None:
    (kv if name in POLICIES else compress).remove(model)


def prompt(questions: int = 9) -> dict[str, Tensor]:
    """Two rows of an image each, the second with padding in front."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 90, (2, 4 + 36 + questions), generator=generator)
    ids[:, 4:40] = IMAGE
    mask = torch.ones_like(ids)
    ids[1, :2] = mask[1, :2] = 0
    pixels = torch.randn(2, 3, 84, 84, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def words() -> Tensor:
    """Two rows of text, no token twice in one: equal keys tie in the first layer, and rounding decides for TokenSelect."""
    return torch.stack([torch.randperm(87, generator=torch.Generator().manual_seed(seed))[:36] + 3 for seed in (3, 4)])


def generated(model: Any, **options: Any) -> Tensor:
    """Logits of new tokens after the prompt, parts of which ``options`` change or, as ``None``, leave out."""
    options = {"max_new_tokens": 3, "do_sample": False, **prompt(), **options}
    options = {name: value for name, value in options.items() if value is not None}
    with torch.no_grad():
        out = model.generate(**options, output_logits=True, return_dict_in_generate=True)
    return torch.stack(out.logits, 1)


def same(one: Tensor, other: Tensor, tolerance: float = 2e-4) -> None:
    torch.testing.assert_close(one.float(), other.float(), atol=tolerance * float(other.abs().max()), rtol=tolerance)


# ------------------------------------------------------------------------------------------------------------------ copies


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_torch(model: Any) -> Any:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch])
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_has_a_method_of_its_own(model: Any, name: str, duplicate: Callable[[Any], Any]) -> None:
    handle = attach(model, name)
    # Copied before they run: transformers leaves hooks of its own in a model that has run, which cannot be pickled.
    first, second = duplicate(model), duplicate(model)
    expected = generated(model)
    assert torch.equal(generated(first), expected) and torch.equal(generated(second), expected)
    if duplicate is copy.deepcopy:
        assert torch.equal(generated(duplicate(first)), expected)
    detach(first, name)
    plain = generated(first)
    assert not torch.equal(expected, plain)
    assert torch.equal(generated(model), expected) and torch.equal(generated(second), expected)
    detach(model, name)
    assert torch.equal(generated(model), plain) and torch.equal(generated(second), expected)
    detach(second, name)
    assert torch.equal(generated(second), plain) and not handle._hooks
    with attach(first, name):
        assert torch.equal(generated(first), expected) and torch.equal(generated(second), plain)


@pytest.mark.parametrize("name", ["fastv", "visionzip", "mustdrop", "kv h2o"])
def test_a_copy_follows_its_own_weights(model: Any, name: str) -> None:
    with attach(model, name):
        expected = generated(model)
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert float(generated(other).abs().max()) == 0
        assert torch.equal(generated(model), expected)


def test_statistics_are_of_the_copy(model: Any) -> None:
    with compress.apply(model, "fastv", keep=0.5) as handle:
        generated(model)
        other = copy.deepcopy(model)
        one = {key: value[:1] for key, value in prompt().items()}
        with torch.no_grad():
            other(**one)
        assert handle.stats.visual == [36, 36]
        assert other._zoo_compress.stats.visual == [36] and other._zoo_compress.model is other


def test_a_method_and_a_policy_come_out_in_any_order(model: Any) -> None:
    plain, signature = generated(model), inspect.signature(model.generate)
    for order in ((compress, kv), (kv, compress)):
        compress.apply(model, "fastv", keep=0.3)
        kv.apply(model, POLICIES["kv h2o"])
        assert inspect.signature(model.generate) == signature
        both = generated(model)
        assert torch.equal(generated(copy.deepcopy(model)), both)
        for package in order:
            package.remove(model)
        assert torch.equal(generated(model), plain)
        assert not {"generate", "forward"} & (vars(model).keys() | vars(model.model.language_model).keys())


# ------------------------------------------------------------------------------------------------------- settings of a model


@pytest.mark.parametrize("name", NAMES)
def test_uses_that_change_no_number(model: Any, name: str, tmp_path: Path) -> None:
    """Twice, in inference mode, in training mode, and saved."""
    keys = list(model.state_dict())
    with attach(model, name):
        expected = generated(model)
        assert torch.equal(generated(model), expected)
        with torch.inference_mode():
            assert torch.equal(generated(model), expected)
        same(generated(model.train()), expected)
        model.eval()
        assert list(model.state_dict()) == keys
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        model.save_pretrained(tmp_path)
        assert torch.equal(generated(model), expected)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = set(file.keys())
    assert len(saved) == len(keys) and not any("zoo" in key for key in saved)
    assert "zoo" not in (tmp_path / "config.json").read_text() and "kv_policy" not in (tmp_path / "config.json").read_text()
    again = type(model).from_pretrained(tmp_path).eval()
    with attach(again, name):
        same(generated(again), expected)


@pytest.mark.parametrize("name", NAMES)
def test_precisions(model: Any, name: str) -> None:
    """A method follows ``model.to(...)``: in float64 it gives what it gave, in bfloat16 something finite, and then the same."""
    with attach(model, name):
        expected = generated(model)
        pixels = prompt()["pixel_values"]
        same(generated(model.double(), pixel_values=pixels.double()), expected, 1e-3)
        assert bool(generated(copy.deepcopy(model).bfloat16(), pixel_values=pixels.bfloat16()).isfinite().all())
        same(generated(model.float()), expected)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(model: Any, name: str) -> None:
    """Those of a loss are the same with checkpoints, or checkpoints are refused."""
    model.train()
    inputs = {**prompt(), "labels": prompt()["input_ids"]}

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**inputs, use_cache=name in POLICIES and not model.model.language_model.is_gradient_checkpointing).loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    with attach(model, name):
        expected = gradients()
        assert all(bool(grad.isfinite().all()) for grad in expected.values())
        assert (
            float(expected["lm_head.weight"].norm()) > 0
            and float(expected["model.language_model.embed_tokens.weight"].norm()) > 0
        )
        model.gradient_checkpointing_enable()
        try:
            actual = gradients()
        except InputError as error:
            assert "gradient checkpointing" in str(error)
            assert name not in POLICIES
        else:
            if name in POLICIES:
                return
            assert actual.keys() == expected.keys()
            for key, grad in actual.items():
                same(grad, expected[key])


# --------------------------------------------------------------------------------------------------------------- generation


# A token at a time takes seconds for each method.
CHUNKS = [
    pytest.param(name, size, marks=[pytest.mark.slow] if size < 41 else [])
    for name in NAMES
    for size in ((1, 41, 48) if name in POLICIES else (3, 41, 49))
]


@pytest.mark.parametrize(("name", "size"), CHUNKS)
def test_prompts_read_in_chunks(model: Any, name: str, size: int) -> None:
    """A policy gives what it gives at once, shares being of the whole prompt; a method refuses, but for prompts of text."""
    with attach(model, name):
        expected = generated(model)
        if name in POLICIES:
            same(generated(model, prefill_chunk_size=size), expected)
        else:
            with pytest.raises(InputError, match="leave prefill_chunk_size out"):
                generated(model, prefill_chunk_size=size)
        assert torch.equal(generated(model), expected)
        text = {"input_ids": prompt()["input_ids"][:, 40:], "attention_mask": None, "pixel_values": None}
        same(generated(model, **text, prefill_chunk_size=size), generated(model, **text))


@pytest.mark.parametrize("name", POLICIES)
def test_chunks_in_a_configuration_and_by_hand(model: Any, name: str) -> None:
    ids = words()

    def stepwise(*ends: int, whole: bool = True) -> Tensor:
        cache, start = None, 0
        parts = []
        for end in (*ends, ids.shape[1] + 1, ids.shape[1] + 2):
            piece = ids[:, start:end] if end <= ids.shape[1] else ids[:, :1]
            out = model(piece, past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, end
            parts.append(out.logits[:, -1])
        return torch.stack(parts[-3:], 1)

    with attach(model, name) as handle, torch.no_grad():
        expected = stepwise(ids.shape[1])
        with handle.prompt(ids.shape[1]):
            same(stepwise(5, 20, 21, ids.shape[1]), expected)
        text = {"input_ids": ids, "attention_mask": None, "pixel_values": None}
        at_once = generated(model, **text)
        config = copy.deepcopy(model.generation_config)
        config.prefill_chunk_size = 5
        same(generated(model, **text, generation_config=config), at_once)
        model.generation_config.prefill_chunk_size = 5
        same(generated(model, **text), at_once)


@pytest.mark.parametrize("name", POLICIES)
def test_a_second_turn_in_chunks(model: Any, name: str) -> None:
    ids = words()
    with attach(model, name):

        def second(**options: Any) -> Tensor:
            first = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
            longer = torch.cat([first.sequences, ids], 1)
            text = {"input_ids": longer, "attention_mask": torch.ones_like(longer), "pixel_values": None}
            return generated(model, **text, past_key_values=first.past_key_values, **options)

        same(second(prefill_chunk_size=7), second())


def test_a_second_turn_in_chunks_is_refused_after_compression(model: Any) -> None:
    with compress.apply(model, "fastv", keep=0.3):
        first = model.generate(**prompt(), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, first.sequences[:, -9:]], 1)
        mask = torch.cat([prompt()["attention_mask"], torch.ones_like(longer)], 1)[:, : longer.shape[1]]
        text = {"input_ids": longer, "attention_mask": mask, "pixel_values": None}
        with pytest.raises(InputError, match="leave prefill_chunk_size out"):
            generated(model, **text, past_key_values=first.past_key_values, prefill_chunk_size=4)


@pytest.mark.parametrize("name", NAMES)
def test_beams_and_assistance(model: Any, name: str) -> None:
    """Beams see what one row sees; tokens proposed by a look-up change nothing, or are refused."""
    options = {**prompt(), "max_new_tokens": 4, "do_sample": False}
    with attach(model, name) as handle:
        greedy = model.generate(**options)
        beams = model.generate(**options, num_beams=3, num_return_sequences=3).view(2, 3, -1)
        if name not in POLICIES and not handle.method.pruned:  # what text attends to changes what is dropped
            uncached = model.generate(**options, num_beams=3, num_return_sequences=3, use_cache=False)
            assert torch.equal(beams.flatten(0, 1), uncached)
        sampled = model.generate(**options, num_beams=1, num_return_sequences=1)
        assert torch.equal(sampled, greedy)
        alone = {key: value[:1] for key, value in prompt().items()} | {"max_new_tokens": 6, "do_sample": False}
        try:
            assisted = model.generate(**alone, prompt_lookup_num_tokens=2)
        except InputError as error:
            assert "assisted" in str(error)
        else:
            assert torch.equal(assisted, model.generate(**alone))


# ------------------------------------------------------------------------------------------------------------ torch.compile


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("mustdrop", "kv h2o", "uniform") else [pytest.mark.slow]) for name in NAMES],
)
def test_compiled_models(name: str) -> None:
    model, inputs = build(layers=3), prompt()
    if name in POLICIES:  # which leave the tower alone
        inputs = {"input_ids": inputs["input_ids"][:, 40:]}
    with attach(model, name), torch.no_grad():
        expected = model(**inputs).logits
        torch.compiler.reset()
        same(torch.compile(model, backend="eager")(**inputs).logits, expected)
        model.model.language_model.compile(backend="eager")
        same(model(**inputs).logits, expected)


@pytest.mark.slow
def test_code_compiled_before_is_not_used_after() -> None:
    model = llava(layers=1, tower_layers=2)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = model(**prompt()).logits
        same(compiled(**prompt()).logits, plain)
        with compress.apply(model, "visionzip", keep=0.3):
            expected = model(**prompt()).logits
            assert float((expected - plain).abs().max()) > 0.1
            same(compiled(**prompt()).logits, expected)
        same(compiled(**prompt()).logits, plain)
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["fastv", "visionzip", "kv h2o"])
def test_layers_compiled_by_themselves_are_refused(model: Any, name: str) -> None:
    model.model.language_model.layers[1].compile(backend="eager")
    with pytest.raises(InputError, match="is compiled by itself"):
        attach(model, name)
    model.model.language_model.layers[1]._compiled_call_impl = None
    assert "generate" not in vars(model) and "forward" not in vars(model.model)
    with attach(model, name), torch.no_grad():
        model.model.language_model.layers[1] = torch.compile(model.model.language_model.layers[1], backend="eager")
        with pytest.raises(InputError, match="is compiled by itself"):
            model(**prompt())

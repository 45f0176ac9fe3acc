"""Compression of loaded LLaVA models: the original's results end to end, and `generate` in every form that users have it in."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from small_vlm import IMAGE, expand_images, from_original, llava
from zoo import InputError, compress
from zoo.compress.mustdrop import key_set, merge_windows
from zoo.compress.quecc import QueCCConfig, QueCCProjector, query_text, question_embeddings

CASES = Path(__file__).parent / "golden" / "compress"
PATCHES = 36
METHODS = [name for name in compress.METHODS if name != "quecc"]
TOWER = ["globalcom2", "visionzip", "prumerge", "pool"]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    return llava(layers=6, tower_layers=3)


@pytest.fixture(scope="module")
def views() -> Any:
    return llava(views=True, layers=4, tower_layers=3)


def text(count: int, seed: int) -> Tensor:
    return torch.randint(3, 90, (count,), generator=torch.Generator().manual_seed(seed))


def row(images: list[int], question: int, seed: int, lead: int = 2) -> Tensor:
    """A beginning, images of so many placeholders with a word after each, and a question."""
    parts = [torch.tensor([1]), text(lead, seed)]
    for index, length in enumerate(images):
        parts += [torch.full((length,), IMAGE), text(1, seed + 10 + index)]
    return torch.cat([*parts, text(question, seed + 5)])


def pad(rows: list[Tensor]) -> dict[str, Tensor]:
    length = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.zeros(length - len(part), dtype=torch.long), part]) for part in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def pixels(count: int, seed: int, side: int = 6) -> Tensor:
    """Images with flat corners of different sizes, so that windows merge."""
    images = torch.randn(count, 3, 14 * side, 14 * side, generator=torch.Generator().manual_seed(seed))
    flat = 14 * 3 * (1 + seed % 2)
    images[:, :, :42, :flat] = 0.2
    return images


ROWS = [row([PATCHES], 5, 1), row([PATCHES, PATCHES], 9, 2), row([PATCHES], 3, 3, lead=6)]
IMAGES = [pixels(1, 11), pixels(2, 12), pixels(1, 14)]


def generate(model: Any, inputs: dict[str, Tensor], tokens: int = 4, **options: Any) -> tuple[Tensor, Tensor]:
    """Sequences, and the logits of each new token."""
    out = model.generate(
        **inputs, max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )
    return out.sequences, torch.stack(out.logits, 1)


def batch() -> dict[str, Tensor]:
    return pad(ROWS) | {"pixel_values": torch.cat(IMAGES)}


def alone(index: int) -> dict[str, Tensor]:
    return pad(ROWS[index : index + 1]) | {"pixel_values": IMAGES[index]}


# ------------------------------------------------------------------------------------------------ the original's results


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_golden_mustdrop(attention: str) -> None:
    case = json.loads((CASES / "mustdrop-e2e-336" / "config.json").read_text())
    io, weights = (load_file(CASES / "mustdrop-e2e-336" / f"{name}.safetensors") for name in ("io", "weights"))
    options = case["mustdrop"]
    model, image = from_original(case, weights, io["input_ids"], attention=attention)
    handle = compress.apply(
        model,
        "mustdrop",
        compat="official",
        merge_layer=options["merge_layer"],
        merge_threshold=options["merge_threshold"],
        merge_window=tuple(options["merge_window"]),
        key_layer=options["key_layer"],
        key_ratio=options["key_ratio"],
        pruning_layers=options["pruning_layers"],
        global_thr=options["global_thr"],
        individual_thr=options["individual_thr"],
    )
    seen: list[dict[str, Tensor]] = []
    model.model.language_model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    norms: list[Tensor] = []
    model.model.language_model.norm.register_forward_hook(lambda module, args, output: norms.append(output))
    pixel_values = io["pixel_values"].float()
    ids = expand_images(io["input_ids"], [576 * case["num_crops"]], image=image)
    sequences, logits = generate(
        model,
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixel_values},
        tokens=case["max_new_tokens"],
    )
    torch.testing.assert_close(seen[0]["inputs_embeds"], io["inputs_embeds"], atol=2e-4, rtol=0)
    torch.testing.assert_close(norms[0], io["prefill_last_hidden"], atol=2e-4 * float(norms[0].abs().max()), rtol=0)
    torch.testing.assert_close(logits[0], io["step_logits"], atol=2e-4 * float(logits.abs().max()), rtol=0)
    assert sequences[0, ids.shape[1] :].tolist() == io["generated_ids"][0, 1:].tolist()
    assert [lengths[0] for lengths in handle.stats.cache_per_layer] == io["kv_lengths"].tolist()
    assert [handle.stats.visual_per_layer[layer][0] for layer in (2, 6, 10, 14)] == [
        len(io[f"prune{stage}.attn_sum"]) for stage in range(4)
    ]
    cache = model(input_ids=ids, pixel_values=pixel_values).past_key_values
    for name, expected in io.items():
        if name.startswith("kv_prefill."):
            _, layer, kind = name.split(".")
            kept = getattr(cache.layers[int(layer)], kind + "s")
            torch.testing.assert_close(kept, expected, atol=2e-4 * float(expected.abs().max()), rtol=0)


def test_golden_globalcom2() -> None:
    case = json.loads((CASES / "globalcom2-e2e-168" / "config.json").read_text())
    io, weights = (load_file(CASES / "globalcom2-e2e-168" / f"{name}.safetensors") for name in ("io", "weights"))
    model, image = from_original(case, weights, io["input_ids"])
    width, height = case["image_size_wh"]
    inputs = {"pixel_values": io["pixel_values"].float()[None], "image_sizes": torch.tensor([[height, width]])}
    placeholders = len(model.get_image_features(**inputs, return_dict=True).pooler_output[0])
    handle = compress.apply(model, "globalcom2", keep=case["globalcom2"]["retention_ratio"], compat="official")
    (features,) = handle.image_features(**inputs)
    assert features.shape == io["image_tokens"].shape
    kept = int(144 * case["globalcom2"]["retention_ratio"])
    torch.testing.assert_close(features[:kept], io["image_tokens"][:kept], atol=2e-5, rtol=0)
    torch.testing.assert_close(features, io["image_tokens"], atol=2e-5, rtol=1e-3)
    seen: list[Tensor] = []
    model.model.language_model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ids = expand_images(io["input_ids"], [placeholders], image=image)
    generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs})
    torch.testing.assert_close(seen[0], io["inputs_embeds"], atol=2e-5, rtol=1e-3)


def original_mustdrop(
    model: Any,
    before: Tensor,
    crops: Tensor,
    after: Tensor,
    steps: int,
    layers: tuple[int, ...],
    thresholds: tuple[float, float],
) -> tuple[Tensor, list[int]]:
    """The original procedure for one prompt, written out with full attention maps; logits, and lengths of the caches."""
    tower, language = model.model.vision_tower, model.model.language_model
    states = tower.pre_layrnorm(tower.embeddings(crops))
    for index, layer in enumerate(tower.encoder.layers):
        if index == len(tower.encoder.layers) - 1:
            features = states
            normed, heads = layer.layer_norm1(states), layer.self_attn.num_heads
            query, keys = (part(normed).unflatten(2, (heads, -1)) for part in (layer.self_attn.q_proj, layer.self_attn.k_proj))
            maps = torch.einsum("cqhd,ckhd->chqk", query, keys) * layer.self_attn.scale
            key_ids = key_set(maps.softmax(-1).mean(1)[:, 0, 1:])
        states = layer(states, None)
        if index == 0:
            states = merge_windows(states, (6, 6), shared=True).hidden
    visual = model.model.multi_modal_projector(features[:, 1:]).flatten(0, 1)
    hidden = torch.cat([language.embed_tokens(before), visual, language.embed_tokens(after)])[None]
    start, alive, positions = len(before), len(visual), torch.arange(hidden.shape[1])[None]
    caches: list[tuple[Tensor, Tensor]] = []
    kept: list[Tensor] = []

    def run(layer: Any, hidden: Tensor, positions: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Any]:
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, keys, values = (part(normed).unflatten(2, (-1, attention.head_dim)).transpose(1, 2) for part in parts)
        query, keys = apply_rotary_pos_emb(query, keys, *language.rotary_emb(hidden, positions))
        if past is not None:
            keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        groups = query.shape[1] // keys.shape[1]
        logits = query @ keys.repeat_interleave(groups, 1).transpose(2, 3) * attention.scaling
        causal = torch.ones(logits.shape[-2:], dtype=torch.bool).tril(logits.shape[-1] - logits.shape[-2])
        maps = logits.masked_fill(~causal, -torch.inf).softmax(-1)
        mixed = (maps @ values.repeat_interleave(groups, 1)).transpose(1, 2).flatten(2)
        hidden = hidden + attention.o_proj(mixed)
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), maps, (keys, values)

    for index, layer in enumerate(language.layers):
        hidden, maps, cache = run(layer, hidden, positions, None)
        caches.append(cache)
        if index in layers:
            seen = maps.mean(1)[0, -len(after) :, start : start + alive]
            total, highest = seen.sum(0), seen.amax(0)
            keep = ~((total < thresholds[0] * total.sum()) & (highest < thresholds[1]))
            keep[key_ids] = True
            chosen = keep.nonzero()[:, 0]
            key_ids = torch.tensor([chosen.tolist().index(key) for key in key_ids.tolist()])
            tail = torch.arange(start + alive, hidden.shape[1])
            kept.append(torch.cat([torch.arange(start), start + chosen, tail]))
            alive, hidden = len(chosen), hidden[:, kept[-1]]
            positions = positions[:, : hidden.shape[1]]
    composed = kept[-1]
    for stage in reversed(range(len(layers))):
        if stage < len(layers) - 1:
            composed = kept[stage][composed]
        for index in range(layers[0] if stage == 0 else layers[stage - 1] + 1, layers[stage] + 1):
            caches[index] = tuple(part[:, :, composed] for part in caches[index])  # type: ignore[assignment]
    lengths = [cache[0].shape[2] for cache in caches]
    logits = [model.lm_head(language.norm(hidden[:, -1:]))[0, 0]]
    while len(logits) < steps:
        hidden = language.embed_tokens(logits[-1].argmax()[None, None])
        for index, layer in enumerate(language.layers):
            own = torch.tensor([[caches[index][0].shape[2]]])
            hidden, _, caches[index] = run(layer, hidden, own, caches[index])
        logits.append(model.lm_head(language.norm(hidden))[0, 0])
    return torch.stack(logits), lengths


@pytest.mark.parametrize("layers", [(1, 2, 4), (0, 3), (5,)])
def test_several_crops_as_the_original_has_them(model: Any, layers: tuple[int, ...]) -> None:
    """Three crops in a row, grouped queries, other layers and thresholds than the golden case's."""
    before, after, crops = text(4, 1), text(6, 2), pixels(3, 5)
    expected, lengths = original_mustdrop(model, before, crops, after, 4, layers, (0.01, 0.03))
    ids = torch.cat([before, torch.full((3 * PATCHES,), IMAGE), after])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": crops}
    options = {"compat": "official", "pruning_layers": layers, "global_thr": 0.01, "individual_thr": 0.03}
    with compress.apply(model, "mustdrop", **options) as handle:
        logits = generate(model, inputs)[1][0]
        assert [length[0] for length in handle.stats.cache_per_layer] == lengths
        counts = [count[0] for count in handle.stats.visual_per_layer]
        assert layers == (5,) or counts[0] > counts[-1] > 3 * 3
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


# -------------------------------------------------------------------------------------------------------------- generate


@pytest.mark.parametrize(
    ("method", "positions"),
    [(method, None) for method in METHODS] + [(method, "keep") for method in ("mustdrop", "visionzip", "prumerge", "tome")],
)
def test_a_batch_changes_nothing(model: Any, method: str, positions: Any) -> None:
    """Left padding, several images, beams: every row as alone; and the model as before afterwards."""
    plain = model(**batch()).logits
    with compress.apply(model, method, keep=0.25, positions=positions) as handle:
        sequences, logits = generate(model, batch())
        stats = handle.stats
        beams = model.generate(**batch(), max_new_tokens=4, num_beams=2, do_sample=False)
        assert torch.equal(sequences[:, : batch()["input_ids"].shape[1]], batch()["input_ids"])
        for index in range(len(ROWS)):
            sequence, own = generate(model, alone(index))
            torch.testing.assert_close(logits[index], own[0], atol=2e-4, rtol=1e-4)
            assert sequences[index, -4:].tolist() == sequence[0, -4:].tolist()
            assert torch.equal(stats.kept[index], handle.stats.kept[0])
        searched = model.generate(**alone(1), max_new_tokens=4, num_beams=2, do_sample=False)
        assert beams[1, -4:].tolist() == searched[0, -4:].tolist()
    assert stats.visual == [36, 72, 36]
    assert stats.text == [len(part) - visual for part, visual in zip(ROWS, stats.visual, strict=True)]
    assert stats.visual_per_layer[-1] == [9, 18, 9]
    assert torch.equal(model(**batch()).logits, plain)


def test_thresholds_leave_rows_of_different_lengths(model: Any) -> None:
    with compress.apply(model, "mustdrop", global_thr=0.02, individual_thr=0.2) as handle:
        _, logits = generate(model, batch())
        lengths = handle.stats.visual_per_layer[-1]
        assert len({lengths[0], lengths[2]}) == 2
        for index in range(len(ROWS)):
            torch.testing.assert_close(logits[index], generate(model, alone(index))[1][0], atol=2e-4, rtol=1e-4)
    with compress.apply(model, "prumerge") as handle:
        _, logits = generate(model, batch())
        torch.testing.assert_close(logits[1], generate(model, alone(1))[1][0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["mustdrop", "fastv", "tome", "visionzip"])
def test_eager_attention_gives_the_same(model: Any, method: str) -> None:
    try:
        with compress.apply(model, method, keep=0.3) as handle:
            _, logits = generate(model, batch())
            kept = handle.stats.kept
            model.set_attn_implementation("eager")
            _, eager = generate(model, batch())
        torch.testing.assert_close(logits, eager, atol=2e-4, rtol=1e-4)
        assert all(torch.equal(a, b) for a, b in zip(kept, handle.stats.kept, strict=True))
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("method", METHODS)
def test_a_share_of_one_is_the_plain_model(model: Any, method: str) -> None:
    plain = generate(model, batch())[1]
    with compress.apply(model, method, keep=1) as handle:
        assert torch.equal(generate(model, batch())[1], plain)
        assert handle.stats.share == 1


def test_thresholds_that_drop_nothing_are_the_plain_model(model: Any) -> None:
    plain = generate(model, batch())[1]
    for compat in (None, "official"):
        with compress.apply(model, "mustdrop", merge=False, global_thr=1.0, individual_thr=0.0, compat=compat):
            torch.testing.assert_close(generate(model, batch())[1], plain, atol=1e-5, rtol=1e-5)


def test_text_alone_passes_through(model: Any) -> None:
    inputs = pad([text(7, 1)])
    plain = generate(model, inputs)[1]
    for method in ("mustdrop", "fastv", "random"):
        with compress.apply(model, method, keep=0.2) as handle:
            assert torch.equal(generate(model, inputs)[1], plain)
            with pytest.raises(InputError, match="no prompt with an image"):
                _ = handle.stats


@pytest.mark.parametrize("method", ["random", *TOWER])
def test_the_cache_changes_nothing(model: Any, method: str) -> None:
    with compress.apply(model, method, keep=0.25):
        cached, recomputed = (generate(model, alone(1), use_cache=use_cache)[1] for use_cache in (True, False))
    torch.testing.assert_close(cached, recomputed, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("end", ["question", "image"])
def test_dropping_before_the_model_is_leaving_tokens_out(model: Any, end: str) -> None:
    """The same as a shorter prompt of embeddings, in prefill and in decoding."""
    inputs = alone(1)
    if end == "image":
        inputs = {key: value if key == "pixel_values" else value[:, : -9 - 1] for key, value in inputs.items()}
    with compress.apply(model, "random", keep=0.25, seed=3) as handle:
        _, logits = generate(model, inputs)
        kept = handle.stats.kept[0]
    ids = inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    features = torch.cat(model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True).pooler_output)
    embeds[ids == IMAGE] = features
    stays = ids[0] != IMAGE
    stays[(ids[0] == IMAGE).nonzero()[kept, 0]] = True
    short = model.generate(
        inputs_embeds=embeds[:, stays], max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    torch.testing.assert_close(logits, torch.stack(short.logits, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["uniform", "globalcom2"])
def test_tokens_may_keep_their_positions(model: Any, method: str) -> None:
    """As a prompt of embeddings with the positions of the full one, gaps and all; decoding goes on behind the full prompt."""
    inputs = alone(0)
    ids, length = inputs["input_ids"], inputs["input_ids"].shape[1]
    with compress.apply(model, method, keep=0.25, positions="keep") as handle:
        sequences, logits = generate(model, inputs, tokens=2)
        kept = handle.stats.kept[0]
        if method == "globalcom2":
            assert torch.equal(kept, handle.stats.sources[0].sort().values)
        without_cache = generate(model, inputs, tokens=1, use_cache=False)[1]
    embeds = model.get_input_embeddings()(ids)
    embeds[ids == IMAGE] = torch.cat(model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output)
    stays = ids[0] != IMAGE
    stays[(ids[0] == IMAGE).nonzero()[kept, 0]] = True
    places = stays.nonzero()[:, 0][None]
    mask = torch.ones_like(places)
    first = model(inputs_embeds=embeds[:, stays], position_ids=places, attention_mask=mask)
    new = {"input_ids": sequences[:, length : length + 1], "position_ids": torch.tensor([[length]])}
    second = model(**new, past_key_values=first.past_key_values)
    expected = torch.cat([first.logits[:, -1:], second.logits], 1)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(without_cache, logits[:, :1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["fastv", "mustdrop"])
def test_dropping_within_the_model_is_hiding_tokens(model: Any, method: str) -> None:
    """The same as the full sequence with what went hidden from later layers, positions and all."""
    options = {"fastv": {"keep": 0.3}, "mustdrop": {"keep": 0.3, "merge": False, "pruning_layers": (1, 3)}}[method]
    inputs = alone(1)
    with compress.apply(model, method, **options) as handle:
        out = model(**inputs)
        sequences, logits = generate(model, inputs)
        visual = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
        kept, counts = handle.stats.kept[0], handle.stats.visual_per_layer
        first = next(layer for layer, count in enumerate(counts) if count[0] < len(visual))
    assert [count[0] for count in counts] == {"fastv": [72, 72, 22, 22, 22, 22], "mustdrop": [72, 72, 39, 39, 22, 22]}[method]
    if method == "mustdrop":
        # one stage is enough to compare with: what the second leaves is not visible from outside before its layer
        with compress.apply(model, method, **{**options, "pruning_layers": (1,)}) as handle:
            out = model(**inputs)
            sequences, logits = generate(model, inputs)
            kept = handle.stats.kept[0]
    length = inputs["input_ids"].shape[1]
    hidden = torch.ones(length + 3, dtype=torch.bool)
    hidden[visual] = False
    hidden[visual[kept]] = True

    def reference(ids: Tensor) -> Tensor:
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()

        def hide(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "attention_mask": (causal & hidden[: ids.shape[1]])[None, None]}

        hooks = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in model.model.language_model.layers[first:]]
        full = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
        for hook in hooks:
            hook.remove()
        return full

    expected = reference(sequences[:, : length + 3])
    torch.testing.assert_close(out.logits[:, hidden[:length]], expected[:, :length][:, hidden[:length]], atol=2e-4, rtol=1e-4)
    if method == "fastv":
        torch.testing.assert_close(logits[0], expected[0, length - 1 :], atol=2e-4, rtol=1e-4)
    else:
        # the first new token; later ones don't see what has been evicted from the pruned layer itself
        torch.testing.assert_close(logits[0, 0], expected[0, length - 1], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_prompts_may_end_with_the_image(model: Any, method: str) -> None:
    """The logits at the end are those of the last token that is left, alone and beside a longer row."""
    short = torch.cat([torch.tensor([1]), text(3, 1), torch.full((PATCHES,), IMAGE)])
    inputs = pad([short, ROWS[0]]) | {"pixel_values": torch.cat([IMAGES[0], IMAGES[2]])}
    with compress.apply(model, method, keep=0.2):
        logits = generate(model, inputs)[1]
        own = generate(model, pad([short]) | {"pixel_values": IMAGES[0]})[1]
    torch.testing.assert_close(logits[0], own[0], atol=2e-4, rtol=1e-4)
    assert own[0, 0].std() > 0.01


def test_logits_keep_their_places_so_that_a_loss_can_be_taken(model: Any) -> None:
    inputs = batch()
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0), -100)
    with compress.apply(model, "fastv", keep=0.25):
        out = model(**inputs, labels=labels)
        one = model(**alone(2))
    assert out.logits.shape[:2] == labels.shape
    length = one.logits.shape[1]
    words = alone(2)["input_ids"][0] != IMAGE
    torch.testing.assert_close(out.logits[2, -length:][words], one.logits[0][words], atol=2e-4, rtol=1e-4)
    shifted = out.logits[:, :-1].transpose(1, 2), labels[:, 1:]
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(*shifted))


@pytest.mark.parametrize("options", [{}, {"compat": "official"}])
def test_several_tokens_may_follow_at_once(model: Any, options: dict[str, Any]) -> None:
    extra = text(3, 9)[None]
    with compress.apply(model, "mustdrop", keep=0.3, **options):
        cache = model(**alone(1)).past_key_values
        together = model(input_ids=extra, past_key_values=cache).logits
        cache = model(**alone(1)).past_key_values
        single = torch.cat([model(input_ids=token, past_key_values=cache).logits for token in extra.split(1, 1)], 1)
    torch.testing.assert_close(together, single, atol=2e-4, rtol=1e-4)


def test_rows_that_keep_everything_stand_beside_rows_that_do_not(model: Any) -> None:
    """A long row of text alone and a short one with an image: all logits stand where their tokens do."""
    inputs = pad([text(60, 3), ROWS[0]]) | {"pixel_values": IMAGES[0]}
    with compress.apply(model, "uniform", keep=0.5):
        both, image = model(**inputs).logits, model(**alone(0)).logits
    torch.testing.assert_close(both[0], model(**pad([text(60, 3)])).logits[0], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(both[1, -image.shape[1] :], image[0], atol=2e-4, rtol=1e-4)


def test_gradient_checkpointing_is_refused() -> None:
    trained = llava(layers=3, tower_layers=3).train()
    trained.gradient_checkpointing_enable()
    for method, options in (("fastv", {}), ("visionzip", {}), ("tome", {}), ("random", {"positions": "keep"})):
        with (
            torch.enable_grad(),
            compress.apply(trained, method, **options),
            pytest.raises(InputError, match="gradient checkpointing"),
        ):
            trained(**alone(0))


@pytest.mark.parametrize("method", ["random", "visionzip", "fastv", "pyramiddrop", "mustdrop"])
def test_conversations_go_on(model: Any, method: str) -> None:
    """`generate` with a cache and all ids so far, and a cache that is used twice."""
    further = text(4, 7)[None]
    with compress.apply(model, method, keep=0.3):
        first = model.generate(**alone(1), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        cache = copy.deepcopy(first.past_key_values)
        ids = torch.cat([first.sequences, further], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        _, logits = generate(model, inputs, past_key_values=first.past_key_values)
        for token in torch.cat([first.sequences[:, -1:], further], 1).split(1, 1):
            expected = model(input_ids=token, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(logits[:, 0], expected, atol=2e-4, rtol=1e-4)


def test_threads_do_not_see_each_other(model: Any) -> None:
    with compress.apply(model, "mustdrop", keep=0.3), ThreadPoolExecutor(3) as pool:
        expected = [generate(model, alone(index))[1] for index in range(3)]

        def again(index: int) -> Tensor:
            with torch.no_grad():
                return generate(model, alone(index))[1]

        for _ in range(2):
            for logits, own in zip(pool.map(again, range(3)), expected, strict=True):
                torch.testing.assert_close(logits, own, atol=1e-5, rtol=1e-5)


def test_low_precision_and_other_samplers(model: Any) -> None:
    half = llava(layers=3, tower_layers=3).to(torch.bfloat16)
    inputs = batch() | {"pixel_values": batch()["pixel_values"].bfloat16()}
    for method in ("mustdrop", "visionzip", "tome", "prumerge"):
        with compress.apply(half, method, keep=0.25) as handle:
            out = half.generate(**inputs, max_new_tokens=2, do_sample=True, num_return_sequences=2)
            assert len(out) == 6 and handle.stats.visual_per_layer[-1] == [9, 9, 18, 18, 9, 9]


@contextmanager
def largest_tensor() -> Iterator[list[int]]:
    """Numbers in the largest tensor that any operation makes."""
    sizes = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes[0] = max(
                [sizes[0], *(part.numel() for part in torch.utils._pytree.tree_leaves(out) if hasattr(part, "numel"))]
            )
            return out

    with Watch():
        yield sizes


def test_no_map_of_all_tokens_is_made() -> None:
    """The largest tensor grows with the sequence as the plain model's does, not with its square."""
    wide = llava(side=24, layers=3, tower_layers=3)
    inputs = pad([row([576], 8, 1)]) | {"pixel_values": pixels(1, 1, side=24)}
    with largest_tensor() as plain:
        wide(**inputs)
    for method in ("mustdrop", "fastv", "visionzip", "globalcom2"):
        with compress.apply(wide, method, keep=0.5), largest_tensor() as sizes:
            wide(**inputs)
        assert sizes[0] <= plain[0] < 576 * 576, method


# ------------------------------------------------------------------------------------------------------------ LLaVA-NeXT


def view_inputs(model: Any, sizes: list[tuple[int, int]], seed: int = 1) -> dict[str, Tensor]:
    """One image of each size per row, with its placeholders."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    tile = model.config.vision_config.image_size
    counts = [image_size_to_num_patches(size, model.config.image_grid_pinpoints, tile) for size in sizes]
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(len(sizes), max(counts), 3, tile, tile)
    for image, count, (height, width) in zip(images, counts, sizes, strict=True):
        image[:count] = torch.randn(count, 3, tile, tile, generator=generator.manual_seed(height + 7 * width))
        image[:count, :, :42, :42] = 0.2
    inputs = {"pixel_values": images, "image_sizes": torch.tensor(sizes)}
    lengths = [len(part) for part in model.get_image_features(**inputs, return_dict=True).pooler_output]
    rows = [row([length], 4, seed + height) for length, (height, _) in zip(lengths, sizes, strict=True)]
    return pad(rows) | inputs


@pytest.mark.parametrize("method", METHODS)
def test_images_of_many_views(views: Any, method: str) -> None:
    """Two images of different size in a batch give what each gives alone."""
    sizes = [(100, 160), (168, 168)]
    inputs = view_inputs(views, sizes)
    with compress.apply(views, method, keep=0.25) as handle:
        _, logits = generate(views, inputs)
        stats = handle.stats
        for index in range(len(sizes)):
            with_plain = {key: value[index : index + 1] for key, value in inputs.items()}
            used = with_plain["attention_mask"][0].bool()
            single = {key: with_plain[key][:, used] for key in ("input_ids", "attention_mask")}
            own = generate(views, {**with_plain, **single})[1]
            torch.testing.assert_close(logits[index], own[0], atol=2e-4, rtol=1e-4)
            assert torch.equal(stats.kept[index], handle.stats.kept[0])
    assert "pack_image_features" not in vars(views.model) and not hasattr(views, "_zoo_compress")
    assert 0.15 < stats.final_share < 0.4
    assert all(len(source) == count for source, count in zip(stats.sources, stats.visual_per_layer[0], strict=False))


def test_views_follow_each_other_flat_in_the_original(views: Any) -> None:
    inputs = view_inputs(views, [(168, 168)])
    with compress.apply(views, "mustdrop", compat="official", merge_threshold=-1.0, global_thr=0.0) as handle:
        generate(views, inputs)
        stats = handle.stats
    assert stats.visual_per_layer[0] == [5 * 4]
    assert (stats.sources[0] // PATCHES).tolist() == [view for view in range(5) for _ in range(4)]
    with (
        compress.apply(views, "mustdrop", compat="official", merge_threshold=1.1),
        pytest.raises(InputError, match=r"180 tokens after compression, but 140 placeholders"),
    ):
        generate(views, view_inputs(views, [(100, 168)]))


# ----------------------------------------------------------------------------------------------------------------- QueCC


class Characters:
    """A tokenizer of characters: ids 3 and up, 1 for the beginning, and the image's placeholder."""

    def __call__(self, prompt: str) -> dict[str, list[int]]:
        return {"input_ids": [1, *(3 + ord(character) % 90 for character in prompt)]}

    def decode(self, ids: Tensor, skip_special_tokens: bool) -> str:
        alphabet = {3 + ord(character) % 90: character for character in map(chr, range(32, 122))} | {3 + 10: "\n"}
        return "".join(alphabet[int(token)] for token in ids if not skip_special_tokens or token > 2)


def quecc_inputs(questions: list[str], images: list[int]) -> dict[str, Tensor]:
    tokenizer, rows = Characters(), []
    for question, count in zip(questions, images, strict=True):
        before, after = tokenizer("USER: ")["input_ids"], tokenizer(f"\n{question} ASSISTANT:")["input_ids"][1:]
        rows.append(torch.tensor([*before, *[IMAGE] * (PATCHES * count), *after]))
    return pad(rows) | {"pixel_values": pixels(sum(images), 4)}


def test_quecc_generates_with_few_tokens(model: Any) -> None:
    torch.manual_seed(0)
    projector = QueCCProjector(
        QueCCConfig(dim=32, multi_dim=64, text_dim=32, tokens=PATCHES, kernel=3, heads=4, llm_dim=32)
    ).eval()
    plain = model(**batch()).logits
    options = {"projector": projector, "tokenizer": Characters(), "layers": (1, 3)}
    inputs = quecc_inputs(["What is this?", "Where?"], [2, 1])
    with compress.apply(model, "quecc", **options) as handle:
        _, logits = generate(model, inputs)
        assert handle.stats.visual_per_layer[0] == [8, 4]
        one = {key: value[1:] for key, value in inputs.items() if key != "pixel_values"}
        used = one["attention_mask"][0].bool()
        one = {key: value[:, used] for key, value in one.items()} | {"pixel_values": inputs["pixel_values"][2:]}
        torch.testing.assert_close(logits[1], generate(model, one)[1][0], atol=2e-4, rtol=1e-4)
        beams = model.generate(**inputs, max_new_tokens=3, num_beams=2, do_sample=False)
        assert beams[1, -3:].tolist() == model.generate(**one, max_new_tokens=3, num_beams=2, do_sample=False)[0, -3:].tolist()

        # the tokens are the projector's, of the tower's states and the question's embedding
        tower = model.model.vision_tower(one["pixel_values"], output_hidden_states=True)
        states = [tower.hidden_states[layer][:, 1:] for layer in (1, 3)]
        question = question_embeddings(model, Characters(), [query_text("<image>\nWhere? ASSISTANT:")])
        expected = projector(tower.hidden_states[-2][:, 1:], torch.cat(states, -1), question[None])[0]
        seen: list[Tensor] = []
        hook = model.model.language_model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(**one)
        hook.remove()
        torch.testing.assert_close(seen[-1][0, 7:11], expected, atol=1e-5, rtol=1e-5)
    ids = torch.tensor(Characters()("Where?")["input_ids"])[None]
    torch.testing.assert_close(model.model.language_model(input_ids=ids).last_hidden_state[:, -1], question)
    with compress.apply(model, "quecc", projector=projector, question=question[0], layers=(1, 3)):
        torch.testing.assert_close(generate(model, one)[1][0], logits[1], atol=2e-4, rtol=1e-4)
    assert torch.equal(model(**batch()).logits, plain)


# ------------------------------------------------------------------------------------------------------------- bad input


def test_input_errors(model: Any, views: Any) -> None:
    for keep in (0, -0.5, 1.5):
        with pytest.raises(InputError, match=r"must be in \(0, 1\]"):
            compress.apply(model, "fastv", keep=keep)
    with pytest.raises(InputError, match="positions can be 'keep' or 'renumber', not 'drop'"):
        compress.apply(model, "fastv", positions="drop")
    with pytest.raises(InputError, match="lays out views anew"):
        compress.apply(views, "globalcom2", positions="keep")
    with pytest.raises(InputError, match="no method 'fastw'; there are mustdrop, globalcom2"):
        compress.apply(model, "fastw")
    with pytest.raises(InputError, match="unexpected keyword argument 'lair'"):
        compress.apply(model, "fastv", lair=3)
    with pytest.raises(InputError, match=r"LlamaModel cannot be compressed; supported are LlavaForConditionalGeneration"):
        compress.apply(model.model.language_model, "fastv")
    with pytest.raises(InputError, match="4 x 4 tokens do not tile a grid of 6 x 6"):
        compress.apply(model, "mustdrop", merge_window=(4, 4))
    with pytest.raises(InputError, match=r"within 0 to 5, not \[2, 6\]"):
        compress.apply(model, "mustdrop", pruning_layers=(2, 6))
    with pytest.raises(InputError, match="FastV can start at layers 1 to 5, not 6"):
        compress.apply(model, "fastv", layer=6)
    with pytest.raises(InputError, match="has not been compressed"):
        compress.remove(model)
    with compress.apply(model, "fastv"), pytest.raises(InputError, match=r"compressed already \(fastv\)"):
        compress.apply(model, "random")
    projector = QueCCProjector(QueCCConfig(dim=32, multi_dim=32, text_dim=8, tokens=PATCHES, kernel=3, llm_dim=32))
    for target, options, reason in (
        (model, {"projector": projector}, "needs the model's tokenizer"),
        (model, {"projector": projector, "keep": 0.1}, "gives 4 tokens per image"),
        (model, {"projector": projector, "question": torch.zeros(8), "layers": (1,)}, "does not fit a model"),
        (views, {"projector": projector, "question": torch.zeros(8)}, "not those of LLaVA-NeXT"),
    ):
        with pytest.raises(InputError, match=reason):
            compress.apply(target, "quecc", **options)


def test_caches_that_cannot_go_on(model: Any) -> None:
    with compress.apply(model, "fastv"):
        cache = model(**alone(0)).past_key_values
        with pytest.raises(InputError, match="a new image in a conversation"):
            model(**alone(0), past_key_values=cache)
        cache.crop(-20)
        with pytest.raises(InputError, match="cut or re-batched from outside"):
            model(input_ids=text(1, 1)[None], past_key_values=cache)
        with pytest.raises(InputError, match="StaticCache cannot hold"):
            model.generate(**alone(0), max_new_tokens=2, cache_implementation="static", disable_compile=True)


@pytest.mark.parametrize("model_of_views", [False, True])
def test_towers_of_patches_only(model_of_views: bool) -> None:
    """SigLIP has no [CLS]: GlobalCom2 scores by unlikeness to the mean, and methods that need [CLS] say so."""
    from transformers import SiglipVisionConfig

    siglip = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=84, patch_size=14
    )
    model = llava(views=model_of_views, layers=3, tower=siglip, vision_feature_select_strategy="full")
    inputs = view_inputs(model, [(168, 168)]) if model_of_views else alone(0)
    for method in ("globalcom2", "pool", "fastv"):
        with compress.apply(model, method, keep=0.25) as handle:
            generate(model, inputs)
            assert 0.2 < handle.stats.final_share < 0.35
    with pytest.raises(InputError, match="VisionZip needs a vision tower with a"):
        compress.apply(model, "visionzip")
    with pytest.raises(InputError, match=r"needs the \[CLS\] token"):
        compress.apply(model, "globalcom2", score="softmax")
    if not model_of_views:
        with compress.apply(model, "globalcom2", keep=0.25) as handle:
            generate(model, inputs)
            states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
        scores = -torch.nn.functional.cosine_similarity(states, states.mean(1, keepdim=True), dim=-1)
        assert torch.equal(handle.stats.sources[0], scores[0].topk(9).indices)


def test_towers_without_cls_and_sliding_windows() -> None:
    with pytest.raises(InputError, match="needs a vision tower with a"):
        compress.apply(llava(layers=2, tower_layers=2, vision_feature_select_strategy="full"), "visionzip")
    with pytest.raises(InputError, match="crops of 84 x 84 pixels do not tile a canvas of 168 x 100"):
        compress.apply(llava(views=True, layers=2, image_grid_pinpoints=[[168, 168], [168, 100]]), "globalcom2")
    sliding = llava(layers=2, tower_layers=2)
    sliding.model.language_model.config.sliding_window = 8
    with pytest.raises(InputError, match="sliding-window"):
        compress.apply(sliding, "random")


# --------------------------------------------------------------------------------------------------------------- Qwen-VL


def qwen(version: str = "2") -> Any:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
    )

    torch.manual_seed(0)
    settings, kind, vision = {
        "2": (
            Qwen2VLConfig,
            Qwen2VLForConditionalGeneration,
            {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2},
        ),
        "2.5": (
            Qwen2_5_VLConfig,
            Qwen2_5_VLForConditionalGeneration,
            {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32},
        ),
    }[version]
    config = settings(
        text_config={
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=94,
        vision_start_token_id=93,
        vision_end_token_id=92,
    )
    model = kind(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(3)
    return model


def qwen_inputs(grids: list[tuple[int, int]]) -> dict[str, Tensor]:
    rows = []
    for seed, (height, width) in enumerate(grids):
        image = torch.tensor([93, *[IMAGE] * (height * width // 4), 92])
        rows.append(torch.cat([torch.tensor([1]), text(2 + seed, seed), image, text(4, seed + 9)]))
    inputs = pad(rows)
    patches = [torch.randn(h * w, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(h)) for h, w in grids]
    return inputs | {
        "pixel_values": torch.cat(patches),
        "image_grid_thw": torch.tensor([[1, height, width] for height, width in grids]),
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE).int(),
    }


@pytest.mark.parametrize(
    ("version", "method"), [("2", "fastv"), ("2", "pyramiddrop"), ("2", "random"), ("2.5", "fastv"), ("2.5", "uniform")]
)
def test_qwen(version: str, method: str) -> None:
    """Methods of the language model, where a token's place in its image is part of its position and stays."""
    model, grids = qwen(version), [(8, 12), (8, 6)]
    inputs = qwen_inputs(grids)
    plain = generate(model, inputs)[1]
    with compress.apply(model, method, keep=1):
        assert torch.equal(generate(model, inputs)[1], plain)
    with compress.apply(model, method, keep=0.25) as handle:
        logits = generate(model, inputs)[1]
        assert handle.stats.visual == [24, 12] and handle.stats.visual_per_layer[-1] == [6, 3]
        torch.testing.assert_close(logits[0], generate(model, qwen_inputs(grids[:1]))[1][0], atol=2e-4, rtol=1e-4)
        recomputed = generate(model, inputs, use_cache=False)[1]
    if method in ("random", "uniform"):
        torch.testing.assert_close(recomputed, logits, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(logits, plain, atol=1e-3)
    assert torch.equal(generate(model, inputs)[1], plain)


def test_qwen_takes_no_method_of_the_tower() -> None:
    for method in ("visionzip", "pool", "mustdrop"):
        with pytest.raises(InputError, match="acts on the vision tower, which works for LLaVA models, not Qwen2VL"):
            compress.apply(qwen(), method)

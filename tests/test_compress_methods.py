"""Methods that shorten visual sequences, as functions on tensors: golden cases, and what must hold anyway."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from zoo import InputError, KeysError
from zoo.compress.globalcom2 import (
    best_of_thumbnail,
    compress_image,
    global_scores,
    official_placement,
    retention_scales,
    to_canvas,
    to_crops,
    valid_rectangle,
    valid_tokens,
)
from zoo.compress.mustdrop import (
    eviction_indices,
    key_set,
    merge_windows,
    stage_shares,
    text_attention,
    text_filter,
    unite,
    window_similarity,
)
from zoo.compress.peers import contextual_tokens, merge_pairs, neighbour_sums, outliers
from zoo.compress.quecc import QueCC, QueCCConfig, QueCCProjector, query_text
from zoo.compress.scores import attention_of_rows, cls_attention, cls_logits, left_padded, top_counts
from zoo.compress.stats import prefill_flops

CASES = Path(__file__).parent / "golden" / "compress"


def load(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((CASES / case / "config.json").read_text()), load_file(CASES / case / "io.safetensors")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------ scores


def test_attention_of_some_rows_is_that_of_the_map() -> None:
    batch, heads, kv_heads, length, dim = 2, 6, 2, 11, 4
    query, keys = normal(batch, heads, length, dim), normal(batch, kv_heads, length, dim, seed=1)
    valid = torch.ones(batch, length, dtype=torch.bool)
    valid[1, :3] = False
    logits = query @ keys.repeat_interleave(3, 1).transpose(2, 3) * 0.5
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    attention = logits.masked_fill(~(causal & valid[:, None, None]), -torch.inf).softmax(-1).mean(1)
    rows = torch.tensor([[8, 9, 10], [4, 7, 10]])
    counted = torch.tensor([[True, True, True], [False, True, True]])
    chosen = attention.gather(1, rows[..., None].expand(-1, -1, length)).masked_fill(~counted[..., None], 0)
    picked = query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, dim))
    total, highest = attention_of_rows(picked, keys, rows, counted, valid, 0.5)
    torch.testing.assert_close(total, chosen.sum(1))
    torch.testing.assert_close(highest, chosen.amax(1))


def test_attention_of_cls_is_that_of_the_map() -> None:
    query, keys = normal(3, 8), normal(3, 10, 8, seed=1)
    split = keys.view(3, 10, 2, 4).transpose(1, 2)
    logits = (query.view(3, 2, 1, 4) @ split.transpose(2, 3))[:, :, 0] * 0.5
    torch.testing.assert_close(cls_attention(query, keys, 2), logits.softmax(-1).mean(1)[:, 1:])
    torch.testing.assert_close(cls_logits(query, keys, 2), logits.mean(1)[:, 1:])
    short = cls_attention(query, torch.cat([keys, keys], 1), 2, torch.arange(20).expand(3, -1) < 10)
    torch.testing.assert_close(short[:, :9], cls_attention(query, keys, 2))
    assert (short[:, 9:] == 0).all()


def test_the_best_are_chosen_among_the_marked_ones() -> None:
    scores = torch.tensor([[5.0, 1.0, 5.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    among = torch.tensor([[True, True, True, True], [True, True, False, False]])
    best = top_counts(scores, torch.tensor([2, 3]), among)
    assert best.tolist() == [[True, False, True, False], [True, True, False, False]]
    order, valid, full = left_padded(best & torch.tensor([[True], [False]]))
    assert (order[0].tolist(), valid.tolist(), full) == ([0, 2], [[True, True], [False, False]], False)


# ---------------------------------------------------------------------------------------------------------- MustDrop


def test_golden_merge() -> None:
    case, io = load("mustdrop-merge-24x24-w3")
    merged = merge_windows(
        io["hidden_states"],
        (case["grid"], case["grid"]),
        window=tuple(case["window_size"]),
        threshold=case["threshold"],
        shared=True,
    )
    assert torch.equal(merged.num_merged, io["num_merged"])
    for name in ("dst_idx", "src_idx", "unm_idx"):
        assert torch.equal(getattr(merged, name), io[name]), name
    torch.testing.assert_close(merged.hidden, io["merged"], atol=1e-5, rtol=0)
    assert torch.equal(merged.size, io["size"][..., 0].long())


def flat_windows(counts: list[int], rows: int = 6, columns: int = 8, window: tuple[int, int] = (3, 2)) -> Tensor:
    """Tokens of items in which so many windows are nearly constant."""
    hidden = normal(len(counts), 1 + rows * columns, 16)
    per_row = columns // window[1]
    for item, count in enumerate(counts):
        for index in range(count):
            top, left = index // per_row * window[0], index % per_row * window[1]
            cells = [1 + (top + y) * columns + left + x for y in range(window[0]) for x in range(window[1])]
            hidden[item, cells] = hidden[item, cells[0]] + 0.02 * (1 + index) * hidden[item, cells]
    return hidden


def test_merging_against_the_definition() -> None:
    hidden = flat_windows([3])
    similarity = window_similarity(hidden[:, 1:], (6, 8), (3, 2))[0]
    for index in (0, 5, 7):
        top, left = index // 4 * 3, index % 4 * 2
        cells = torch.tensor([(top + y) * 8 + left + x for y in range(3) for x in range(2)])
        pairs = F.cosine_similarity(hidden[0, 1 + cells][:, None], hidden[0, 1 + cells][None], dim=-1)
        assert abs(similarity[index] - (pairs.sum() - 6) / 30) < 1e-5
    merged = merge_windows(hidden, (6, 8), window=(3, 2))
    assert merged.hidden.shape[1] == 1 + 48 - 3 * 5
    torch.testing.assert_close(merged.hidden[:, 0], hidden[:, 0])
    # the first window is the most uniform one
    cells = torch.tensor([0, 1, 8, 9, 16, 17])
    assert merged.dst_idx[0, 0] == 17
    torch.testing.assert_close(merged.hidden[0, 1], hidden[0, 1 + cells].mean(0))
    torch.testing.assert_close(merged.hidden[0, 4:], hidden[0, 1 + merged.unm_idx[0]])


def test_items_merge_as_they_would_alone_unless_the_original_is_asked_for() -> None:
    hidden = flat_windows([4, 0, 2])
    merged = merge_windows(hidden, (6, 8), window=(3, 2))
    assert merged.num_merged.tolist() == [4, 0, 2]
    for item in range(3):
        alone = merge_windows(hidden[item : item + 1], (6, 8), window=(3, 2))
        assert alone.valid.all()
        torch.testing.assert_close(merged.hidden[item][merged.valid[item]], alone.hidden[0])
        assert torch.equal(merged.anchor[item][merged.valid[item, 1:]], alone.anchor[0])
        assert merged.size[item].sum() == 49
    shared = merge_windows(hidden, (6, 8), window=(3, 2), shared=True)
    assert shared.num_merged.tolist() == [0, 0, 0]
    assert torch.equal(shared.hidden, hidden)
    assert merge_windows(hidden[::2], (6, 8), window=(3, 2), shared=True).num_merged.tolist() == [2, 2]


def test_windows_must_tile_the_grid() -> None:
    with pytest.raises(InputError, match=r"3 x 3 tokens do not tile a grid of 6 x 8"):
        merge_windows(flat_windows([0]), (6, 8), window=(3, 3))
    with pytest.raises(InputError, match="48 tokens do not fill a grid of 6 x 6"):
        merge_windows(flat_windows([0]), (6, 6))


def test_golden_filter() -> None:
    case, io = load("mustdrop-filter-h4")
    total, highest = text_attention(io["attention"], case["v_token_start"], case["num_visual"], case["num_text"])
    torch.testing.assert_close(total[0], io["attn_sum"])
    torch.testing.assert_close(highest[0], io["attn_max"])
    for index, pair in enumerate(case["cases"]):
        keep = text_filter(total, highest, global_thr=pair["global_thr"], individual_thr=pair["individual_thr"])[0]
        united, keys = unite(keep, io["key_set"])
        assert torch.equal(keep.nonzero()[:, 0], io[f"case{index}.filter_keep"])
        assert torch.equal(united, io[f"case{index}.kept_union"])
        assert torch.equal(keys, io[f"case{index}.key_set_reindexed"])
    stages = sorted(name for name in io if name.startswith("evict.") and name.endswith(".keep"))
    composed = eviction_indices([io[name] for name in stages])
    for name, index in zip(stages, composed, strict=True):
        assert torch.equal(index, io[name.replace("keep", "cache_index")])


def test_key_sets_are_offset_by_crop() -> None:
    attention = torch.tensor([[0.1, 0.4, 0.2, 0.3, 0.0], [0.5, 0.0, 0.1, 0.2, 0.2]])
    assert key_set(attention, 0.25).tolist() == [1, 3, 5, 8]


def test_budgets_end_or_average_at_the_share_asked_for() -> None:
    assert stage_shares(0.0625, (2, 6, 10, 14), 32, "final") == pytest.approx([0.5, 0.25, 0.125, 0.0625])
    shares = stage_shares(1 / 3, (2, 6, 10, 14), 32, "average")
    alive = [1.0] * 3 + [shares[0]] * 4 + [shares[1]] * 4 + [shares[2]] * 4 + [shares[3]] * 17
    assert sum(alive) / 32 == pytest.approx(1 / 3)
    with pytest.raises(InputError, match=r"above 0\.094"):
        stage_shares(0.05, (2, 6, 10, 14), 32, "average")


# -------------------------------------------------------------------------------------------------------- GlobalCom2


def test_golden_globalcom2() -> None:
    case, io = load("globalcom2-2x2-pad-r25")
    (width, height), (columns, rows), side = case["image_size_wh"], case["grid_wh"], case["tokens_per_side"]
    canvas, grid = (rows * side, columns * side), (rows, columns)
    scores = io["cls_scores"]
    packed = compress_image(
        io["image_features"],
        scores,
        io["image_newline"],
        (height, width),
        grid,
        ratio=case["retention_ratio"],
        temperature=case["temperature"],
        compat="official",
    )
    torch.testing.assert_close(packed.scales, io["retention_scales"], atol=1e-9, rtol=0)
    assert torch.equal(packed.thumbnail, io["thumbnail_indices"])
    assert torch.equal(packed.features, io["final_features"])
    valid = valid_rectangle((height, width), canvas, "llava")
    marks = valid_tokens(canvas, grid, valid, scores.device)
    commanded = to_crops(global_scores(scores[0], canvas, valid), grid)
    for crop in range(rows * columns):
        torch.testing.assert_close(commanded[crop][marks[crop]], io[f"crop{crop}.global_scores"].flatten())
        ranked = packed.selection.scores[crop][marks[crop]].argsort(descending=True, stable=True)
        assert torch.equal(ranked[: packed.selection.counts[crop]], io[f"crop{crop}.kept_valid_indices"])


def test_kept_tokens_stand_in_their_places() -> None:
    """Corrected placement: features name their own place, so the sequence must be in raster order, row by row."""
    side, grid = 6, (2, 3)
    features = torch.arange(7 * side * side, dtype=torch.float32).view(7, -1, 1)
    newline = torch.tensor([-1.0])
    packed = compress_image(features, normal(7, side * side), newline, (300, 700), grid, ratio=0.4)
    kept = len(packed.thumbnail)
    assert torch.equal(packed.features[:, 0].long(), packed.source)
    top, bottom, _, _ = valid_rectangle((300, 700), (12, 18))
    lines = packed.features[kept:, 0].split(1)
    assert sum(int(line) == -1 for line in lines) == bottom - top
    row = top
    for value in packed.features[kept:, 0].long().tolist():
        if value == -1:
            row += 1
            continue
        crop, index = divmod(value - side * side, side * side)
        assert crop // 3 * side + index // side == row
    # the original's placement shows the same tokens elsewhere
    moved = compress_image(features, normal(7, side * side), newline, (300, 700), grid, ratio=0.4, placement="compat")
    assert moved.source.sort().values.tolist() == packed.source.sort().values.tolist()
    assert not torch.equal(moved.source, packed.source)


def test_without_padding_the_original_placement_is_right() -> None:
    features, scores, newline = normal(5, 36, 4), normal(5, 36, seed=1), normal(4, seed=2)
    packed, official = (
        compress_image(features, scores, newline, (200, 200), (2, 2), ratio=0.3, compat=compat) for compat in (None, "official")
    )
    assert torch.equal(packed.source, official.source)
    torch.testing.assert_close(packed.features, official.features, atol=2e-3, rtol=1e-3)


def test_cells_that_do_not_divide_leave_the_rest_to_the_last() -> None:
    scores = torch.rand(256, dtype=torch.float64)
    scales = retention_scales(scores.float(), (2, 3), 0.5)
    square = scores.float().double().view(16, 16)
    cells = torch.stack(
        [square[top : top + 8, left:right].sum() for top in (0, 8) for left, right in ((0, 5), (5, 10), (10, 16))]
    )
    share = (cells / 10).softmax(0)
    torch.testing.assert_close(scales, (0.5 * (1 + share - 1 / 6)).clamp(max=1), atol=1e-7, rtol=0)


@pytest.mark.parametrize("ratio", [1.0, 0.01])
def test_extreme_ratios(ratio: float) -> None:
    packed = compress_image(normal(5, 36, 4), normal(5, 36, seed=1), None, (100, 200), (2, 2), ratio=ratio)
    assert len(packed.thumbnail) == int(36 * ratio)
    assert len(packed.features) == len(packed.thumbnail) + int(packed.selection.counts.sum())
    valid = valid_tokens((12, 12), (2, 2), valid_rectangle((100, 200), (12, 12)), torch.device("cpu")).sum(1)
    assert packed.selection.counts.tolist() == [
        int(count * scale) for count, scale in zip(valid.tolist(), packed.scales.tolist(), strict=True)
    ]


def test_canvas_and_crops_are_inverse() -> None:
    canvas = torch.arange(12 * 18).view(12, 18)
    assert torch.equal(to_canvas(to_crops(canvas, (2, 3)), (2, 3)), canvas)
    assert to_crops(canvas, (2, 3))[1, 0] == 6
    keep, valid = torch.zeros(1, 4, dtype=torch.bool), torch.tensor([[False, True, False, True]])
    keep[0, 3] = True
    places, shown = official_placement(keep, valid)
    assert places.tolist() == [[False, True, False, False]] and shown[0, 1] == 3
    assert best_of_thumbnail(torch.tensor([0.1, 0.9, 0.5, 0.7]), 0.5).tolist() == [1, 3]


def test_globalcom2_input_errors() -> None:
    arguments = (normal(5, 36, 4), normal(5, 36), None, (100, 100))
    for ratio in (0, 1.1):
        with pytest.raises(InputError, match=r"in \(0, 1\]"):
            compress_image(*arguments, (2, 2), ratio=ratio)
    with pytest.raises(InputError, match="5 views are not a thumbnail and 2 x 3 crops"):
        compress_image(*arguments, (2, 3), ratio=0.5)
    with pytest.raises(InputError, match="35 tokens do not tile a square grid"):
        compress_image(normal(5, 35, 4), normal(5, 35), None, (100, 100), (2, 2), ratio=0.5)


# ------------------------------------------------------------------------------------------------------------- QueCC


def quecc_case() -> tuple[QueCCProjector, dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    case, io = load("quecc-576-to-36")
    weights = load_file(CASES / "quecc-576-to-36" / "weights.safetensors")
    io["multi"] = io.pop("multi_level_features_int8").float() / 32
    return QueCCProjector.from_upstream(case, weights), io, weights, case


@torch.no_grad()
def test_golden_quecc() -> None:
    projector, io, weights, case = quecc_case()
    queries = projector[0].queries(io["single_level_features"], io["text_embedding"])
    tokens, attention = projector[0].attend(queries, io["multi"])
    out = projector(io["single_level_features"], io["multi"], io["text_embedding"])
    for name, value in {
        "downsampled_query": queries,
        "local_attention_weights": attention,
        "compressor_output": tokens,
        "projector_output": out,
    }.items():
        torch.testing.assert_close(value, io[name], atol=2e-5, rtol=0)
    prefixed = {"model.mm_projector." + key: value for key, value in weights.items()} | {"model.norm.weight": torch.ones(2)}
    again = QueCCProjector.from_upstream(case, prefixed)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), projector.state_dict().values(), strict=True))
    batch = projector(*(part.repeat(2, 1, 1) for part in (io["single_level_features"], io["multi"], io["text_embedding"])))
    torch.testing.assert_close(batch[1:], out, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kernel", [2, 3, 6])
def test_reassociated_attention_is_the_fused_block(kernel: int) -> None:
    torch.manual_seed(0)
    config = QueCCConfig(dim=16, multi_dim=40, text_dim=12, tokens=36, kernel=kernel, heads=4, llm_dim=8)
    module = QueCC(config)
    module.clip_attn.in_proj_bias.normal_()
    single, multi, text = normal(2, 36, 16), normal(2, 36, 40, seed=1), normal(2, 1, 12, seed=2)
    queries = module.queries(single, text)
    out, shares = module.attend(queries, multi)
    keys, values = module.k_proj(multi).view(2, 6, 6, 16), module.v_proj(multi).view(2, 6, 6, 16)
    count = 6 // kernel
    for index in range(count * count):
        y, x = index // count * kernel, index % count * kernel
        region = (slice(None), slice(y, y + kernel), slice(x, x + kernel))
        query = queries[:, :, index // count, index % count][:, None]
        expected, weights = module.clip_attn(query, keys[region].flatten(1, 2), values[region].flatten(1, 2))
        torch.testing.assert_close(out[:, index], expected[:, 0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(shares[:, index], weights[:, 0], atol=1e-6, rtol=1e-5)


def test_quecc_has_the_official_tensors() -> None:
    manifest = json.loads((Path(__file__).parent / "golden/manifests/compress-quecc-llava-v1.5-7b-36tok.json").read_text())
    with torch.device("meta"):
        projector = QueCCProjector()
    state = {"model.mm_projector." + key: list(value.shape) for key, value in projector.state_dict().items()}
    assert state == manifest["tensors"]
    assert [QueCCConfig(kernel=kernel).tokens_out for kernel in (4, 6, 12, 24)] == [36, 16, 4, 1]


def test_query_texts_are_the_original_ones() -> None:
    batches = {"image+question": "A chat. USER: <image>\nWhat is this? ASSISTANT:", "text only": "A chat. USER: hi ASSISTANT:"}
    for case in json.loads((CASES / "quecc-576-to-36" / "query_text.json").read_text())["cases"]:
        prompts = [case["prompt"]] * len(case["query_texts"]) if "prompt" in case else map(batches.get, case["batch"])
        assert [query_text(prompt, compat="official") for prompt in prompts] == case["query_texts"]
    assert query_text("<image>\nNo marker here") == "No marker here"


def test_quecc_input_errors() -> None:
    projector, io, weights, case = quecc_case()
    with pytest.raises(InputError, match="5 x 5 patches do not tile a grid of 24 x 24"):
        QueCCConfig(kernel=5)
    with pytest.raises(InputError, match="stride equal to its kernel"):
        QueCCProjector.from_upstream({**case, "mm_vision_token_compression_stride": 2}, weights)
    with pytest.raises(KeysError, match="missing"):
        QueCCProjector.from_upstream(case, {"1.weight": weights["1.weight"]})
    with pytest.raises(KeysError, match=r"0\.k_proj\.2\.bias"):
        QueCCProjector.from_upstream(case, {key: value for key, value in weights.items() if key != "0.k_proj.2.bias"})
    with pytest.raises(InputError, match="100 patches, where QueCC was made for 576"):
        projector(io["single_level_features"][:, :100], io["multi"][:, :100], io["text_embedding"])


def test_quecc_learns_what_the_question_asks() -> None:
    """Which of four regions a question means decides the answer: no constant question can do it."""
    torch.manual_seed(0)
    module = QueCC(QueCCConfig(dim=16, multi_dim=16, text_dim=4, tokens=16, kernel=4, heads=2, llm_dim=8))
    head = torch.nn.Linear(16, 1)
    optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], lr=3e-3)
    places = torch.eye(16)[None] * 3
    losses = {}
    for step in range(250):
        values = torch.randn(64, 16, generator=torch.Generator().manual_seed(step)).sign()
        asked = torch.randint(4, (64,), generator=torch.Generator().manual_seed(1000 + step))
        patches = places + values[..., None] * F.pad(torch.ones(1), (0, 15))
        answer = values[torch.arange(64), asked * 5]
        text = F.one_hot(asked, 4).float()[:, None]
        loss = F.soft_margin_loss(head(module(patches, patches, text))[:, 0, 0], answer)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            losses["gradients"] = [
                float(part.grad.abs().sum()) for part in (module.q_downsample.weight, module.clip_attn.in_proj_weight)
            ] + [float(module.text_projection[0].weight.grad.abs().sum())]
        optimizer.step()
        losses["last"] = loss.item()
    assert min(losses["gradients"]) > 0
    # the best constant question answers by the mean of four signs: a loss of about 0.4
    assert losses["last"] < 0.2


# ------------------------------------------------------------------------------------------------------------- peers


def test_contextual_tokens_gather_their_most_similar() -> None:
    metric = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [0.2, 0.9]]])
    features = torch.arange(5.0).view(1, 5, 1)
    tokens, around = contextual_tokens(features, metric, 2)
    assert around.tolist() == [[0, 2]]
    assert tokens[0, :, 0].tolist() == [0 + 1, 2 + 3.5]
    assert contextual_tokens(features, metric, 0)[0].shape == (1, 0, 1)


def test_pairs_that_merge_are_the_most_similar() -> None:
    metric = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.9], [0.7, 0.7], [1.0, 0.1]]])
    place, kept = merge_pairs(metric, 1)
    assert kept.tolist() == [[0, 1, 3, 4]]
    assert place.tolist() == [[0, 1, 1, 2, 3]]


def test_neighbours_are_added_by_weight_and_the_rest_summed_up() -> None:
    metric = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]])
    features, weights = torch.tensor([[[1.0], [10.0], [100.0]]]), torch.tensor([[0.5, 0.3, 0.2]])
    merged, rest = neighbour_sums(features, metric, weights, torch.tensor([[True, False, False]]), 1)
    assert merged[0, 0, 0] == pytest.approx(1 + 3)
    assert rest[0, 0] == pytest.approx(3 + 20)
    assert outliers(torch.tensor([[1.0] * 10 + [1.1] * 5 + [9.0]])).tolist() == [1]


# ------------------------------------------------------------------------------------------------------------- costs


def test_flops_are_those_that_papers_print() -> None:
    """GlobalCom2's table: 41.7 and 3.8 TFLOPs for 2880 and 288 tokens in LLaVA-NeXT-7B."""
    seven_billion = SimpleNamespace(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32)
    assert prefill_flops([2880] * 32, seven_billion) == pytest.approx(41.65e12, rel=1e-3)
    assert prefill_flops([288] * 32, seven_billion) == pytest.approx(3.774e12, rel=1e-3)
    shared = SimpleNamespace(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=1, head_dim=32)
    projections = 64 * 128 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    assert prefill_flops([5, 3], shared) == 8 * 2 * projections + 4 * 128 * (25 + 9)

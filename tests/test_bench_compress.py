"""The benchmark of token compression counts what it says; how fast anything is, is nobody's business here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner

import zoo
from zoo.bench import compress
from zoo.bench.compress import Size, cache_bytes, inputs, print_tables, run
from zoo.cli import app

TINY = Size(
    image=84, tower_layers=2, tower_width=32, tower_heads=2, layers=6, width=32, hidden=48, heads=2, kv_heads=2, vocabulary=40
)
PATCHES, TEXT, STEPS = 36, 12, 3
LENGTH = PATCHES + TEXT


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    measured = run(
        size=TINY,
        methods=["fastv", "uniform", "pool", "quecc", "h2o", "tidal decode"],
        keeps=[0.25, 1.0],
        text=TEXT,
        steps=STEPS,
        repetitions=1,
        json_path=folder / "bench.json",
        plot_path=folder / "bench.png",
    )
    assert json.loads((folder / "bench.json").read_text()) == json.loads(json.dumps(measured))
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    return measured


def result(content: dict[str, Any], method: str, keep: float) -> dict[str, Any]:
    return next(row for row in content["results"] if row["method"] == method and row["keep"] == keep)


def test_tokens_per_layer(content: dict[str, Any]) -> None:
    assert content["model"]["tokens"] == PATCHES
    assert result(content, "full", 1.0)["tokens"] == (LENGTH,) * 6
    assert result(content, "uniform", 0.25)["tokens"] == (TEXT + 9,) * 6
    assert result(content, "pool", 0.25)["tokens"] == (TEXT + 9,) * 6
    assert result(content, "fastv", 0.25)["tokens"] == (LENGTH, LENGTH, *[TEXT + 9] * 4)
    assert result(content, "h2o", 0.25)["tokens"] == (LENGTH,) * 6


def test_operations_by_formula_and_by_counter(content: dict[str, Any]) -> None:
    """Of all layers alike: 2 (4 n d^2 + 3 n d m) + 4 n^2 d; the counter sees the tower, the projector and the head besides."""

    def formula(tokens: int) -> int:
        d, m = TINY.width, TINY.hidden
        return 2 * (4 * tokens * d * d + 3 * tokens * d * m) + 4 * tokens * tokens * d

    full, uniform, fastv = (result(content, *which) for which in (("full", 1.0), ("uniform", 0.25), ("fastv", 0.25)))
    assert full["formula_flops"] == 6 * formula(LENGTH)
    assert uniform["formula_flops"] == 6 * formula(TEXT + 9)
    assert fastv["formula_flops"] == 2 * formula(LENGTH) + 4 * formula(TEXT + 9)
    outside = full["flops"] - full["formula_flops"]
    width, inner = TINY.tower_width, 4 * TINY.tower_width
    tower = TINY.tower_layers * (2 * 37 * (4 * width**2 + 2 * width * inner) + 4 * 37**2 * width)
    convolution = 2 * PATCHES * 3 * 14**2 * width
    projector = 2 * PATCHES * (width * TINY.width + TINY.width**2)
    assert outside == tower + convolution + projector + 2 * TINY.width * TINY.vocabulary
    assert uniform["method_flops"] == 0
    saved = full["formula_flops"] - fastv["formula_flops"]
    assert 0 <= fastv["method_flops"] <= 0.05 * saved, "the method itself costs at most 5 % of what it saves"


def test_bytes_of_the_cache(content: dict[str, Any]) -> None:
    per_token = 2 * TINY.width * 4  # keys and values in float32, of one layer
    whole = LENGTH + STEPS - 1
    assert result(content, "full", 1.0)["cache_bytes"] == 6 * whole * per_token
    assert result(content, "uniform", 0.25)["cache_bytes"] == 6 * (TEXT + 9 + STEPS - 1) * per_token
    assert result(content, "tidal decode", 0.25)["cache_bytes"] == 6 * whole * per_token
    budget = 2 * round(LENGTH * 0.125)
    assert result(content, "h2o", 0.25)["cache_bytes"] == 6 * budget * per_token
    # 6 layers: four that read everything (0, 1, 2 and 4), and two that read a quarter of the prompt.
    assert result(content, "tidal decode", 0.25)["read_bytes"] == (4 * whole + 2 * LENGTH // 4) * per_token
    assert result(content, "uniform", 0.25)["read_bytes"] == result(content, "uniform", 0.25)["cache_bytes"]
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), 0)
    assert cache_bytes(cache) == 2 * 2 * 5 * 4 * 4


def test_drift_is_the_divergence_from_the_full_model(content: dict[str, Any]) -> None:
    assert result(content, "full", 1.0)["drift"] == 0
    for method in ("fastv", "uniform", "pool"):
        assert result(content, method, 1.0)["drift"] < 1e-10
    for method in ("fastv", "uniform", "pool", "h2o", "tidal decode"):
        assert result(content, method, 0.25)["drift"] > 1e-10


def test_a_projector_gives_the_nearest_number_of_tokens(content: dict[str, Any]) -> None:
    assert result(content, "quecc", 0.25)["tokens"] == (TEXT + 9,) * 6
    assert result(content, "quecc", 1.0)["tokens"] == (LENGTH,) * 6


def test_what_was_left_out_is_named() -> None:
    content = run(size=TINY, methods=["fastv"], keeps=[0.5], text=TEXT, steps=2, repetitions=1)
    assert content["skipped"] == {}
    shallow = Size(**{**vars(TINY), "layers": 2})
    content = run(size=shallow, methods=["fastv"], keeps=[0.5], text=TEXT, steps=2, repetitions=1)
    assert list(content["skipped"]) == ["fastv 0.5"] and len(content["results"]) == 1


def test_tables_tell_measured_from_reported(content: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    print_tables(content)
    shown = capsys.readouterr().out
    assert "measured" in shown and "reported" in shown and "visionzip" in shown


def test_prompts() -> None:
    prompt = inputs(TINY, "cpu", batch=2, text=TEXT)
    assert prompt["input_ids"].shape == (2, LENGTH) and prompt["pixel_values"].shape == (2, 3, 84, 84)
    assert (prompt["input_ids"] == 2).sum(1).tolist() == [PATCHES, PATCHES]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "huge"}, "no size 'huge'; there are small"),
        ({"methods": ["best"]}, "no method 'best'; there are"),
        ({"keeps": [0.0]}, "shares"),
        ({"keeps": [1.1]}, "shares"),
        ({"steps": 1}, "2 steps"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(zoo.InputError, match=message):
        run(**options)


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(compress.SIZES, "small", TINY)
    out = tmp_path / "bench.json"
    arguments = ["bench", "compress", "--method", "pool", "--keep", "0.25", "--steps", "2", "--json", "-o", str(out)]
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert shown.exit_code == 0
    assert json.loads(shown.output) == json.loads(out.read_text())
    assert [row["method"] for row in json.loads(out.read_text())["results"]] == ["full", "pool"]

"""Benchmarks measure what they say; how fast anything is, is nobody's business here."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

import zoo
from small_models import SMALL, SMALL_FLEXTOK, SMALL_TOKENFLOW
from zoo import registry
from zoo.bench import image, print_table, run
from zoo.bench.measure import count_flops, peak_memory, random_model


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models of two modalities, without weights."""
    entries = [
        {
            "name": f"micro-{family}",
            "family": family,
            "modality": modality,
            "description": "for tests",
            "config": {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()},
            "weights": {"source": "none"},
            "licence": {"code": "Apache-2.0", "weights": "Apache-2.0"},
            "card": "none.md",
        }
        for family, modality, config in (
            ("flextok", "image", SMALL_FLEXTOK),
            ("tokenflow", "image", SMALL_TOKENFLOW),
            ("wavtokenizer", "audio", SMALL),
        )
    ]
    path = tmp_path / "catalogue.yaml"
    path.write_text(yaml.safe_dump(entries))
    monkeypatch.setenv("ZOO_REGISTRY", str(path))


def test_images(catalogue: None, capsys: pytest.CaptureFixture[str]) -> None:
    content = run("micro-flextok", lengths=(2, 8, 99), steps=2, repetitions=1)
    assert [(m["contender"].removeprefix("micro-flextok"), m["direction"], m["case"]) for m in content["measurements"]] == [
        ("", "encode", "1"),
        ("", "decode", "1 x 2 tokens"),
        ("", "decode", "1 x 8 tokens"),
        (", dense", "decode", "1 x 2 tokens"),
        (", dense", "decode", "1 x 8 tokens"),
        (", bf16", "encode", "1"),
        (", bf16", "decode", "1 x 2 tokens"),
        (", bf16", "decode", "1 x 8 tokens"),
    ]
    ours = [m["flops"] for m in content["measurements"] if m["contender"] == "micro-flextok"]
    # More tokens are more work, even in a model this small.
    assert 0 < ours[1] < ours[2]
    print_table(content)
    assert "image/s" in capsys.readouterr().out


def test_the_usual_layout_computes_the_same(catalogue: None) -> None:
    content = run("micro-tokenflow", repetitions=1)
    assert [(m["contender"].removeprefix("micro-tokenflow"), m["direction"]) for m in content["measurements"]] == [
        (layout, direction) for layout in ("", ", NCHW", ", bf16") for direction in ("encode", "decode")
    ]
    tokenizer = random_model(registry.get("micro-tokenflow"), "cpu")
    pictures = image.pictures(1, 32, 32)
    tokens = tokenizer.encode(pictures)
    layouts: list[bool] = []
    hook = tokenizer.decoder.norm_out.register_forward_pre_hook(lambda _, inputs: layouts.append(inputs[0].is_contiguous()))
    plain = image.in_plain_layout(tokenizer, lambda: tokenizer.decode(tokens))()
    ours = tokenizer.decode(tokens)
    hook.remove()
    assert layouts == [True, False]
    assert (plain[0] - ours[0]).abs().max() < 1e-5


def test_audio(catalogue: None) -> None:
    content = run("micro-wavtokenizer", seconds=(0.5,), batches=(1, 2), repetitions=1, peers=False)
    assert [(m["contender"], m["direction"], m["amount"]) for m in content["measurements"]] == [
        ("micro-wavtokenizer", "encode", 0.5),
        ("micro-wavtokenizer", "decode", 0.5),
        ("micro-wavtokenizer", "encode", 1.0),
        ("micro-wavtokenizer", "decode", 1.0),
        ("micro-wavtokenizer, bf16", "decode", 0.5),
        ("micro-wavtokenizer, bf16", "decode", 1.0),
    ]


def test_the_dense_peer_computes_the_same_images(catalogue: None) -> None:
    """It is slower, not another model: at one step from a noise of zeros both give one image."""
    tokenizer = random_model(registry.get("micro-flextok"), "cpu")
    tokens = tokenizer.encode(image.pictures(2, 32, 48))
    for k in (1, 5, 8):
        dense = image.dense_decoding(tokenizer, tokens, k, steps=2)()
        ours = tokenizer.decode(tokens.truncate(k), noise=torch.zeros(2, 4, 4, 6), steps=2, guidance=7.5, guidance_method="cfg")
        assert (dense - torch.stack(ours)).abs().max() < 1e-4


def test_what_cannot_be_varied_is_named(catalogue: None) -> None:
    with pytest.raises(zoo.InputError, match="does not vary seconds"):
        run("micro-flextok", seconds=(1,))


def test_operations_are_counted() -> None:
    linear, lstm = torch.nn.Linear(10, 20), torch.nn.LSTM(8, 16, batch_first=True)
    assert count_flops(linear, lambda: linear(torch.zeros(3, 10))) == 2 * 3 * 10 * 20
    assert count_flops(lstm, lambda: lstm(torch.zeros(2, 5, 8))) == 2 * 10 * 4 * 16 * (8 + 16)


def test_peak_memory_sees_what_was_freed() -> None:
    with peak_memory("cpu") as peak:
        torch.ones(50_000_000)
    assert peak[0] > 100_000_000

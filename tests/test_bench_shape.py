"""The benchmark of shapes measures what it says."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml

from small_models_vat import SMALL_VAT
from zoo import registry
from zoo.bench import run
from zoo.bench.measure import random_model
from zoo.bench.shape import ball, ball_mesh
from zoo.codecs.vat.surface import extract


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model without weights."""
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(SMALL_VAT).items()}
    entry = {
        "name": "micro-vat",
        "family": "vat",
        "modality": "shape",
        "description": "for tests",
        "config": config,
        "weights": {"source": "none"},
        "licence": {"code": "Apache-2.0", "weights": "Apache-2.0"},
        "card": "none.md",
    }
    path = tmp_path / "catalogue.yaml"
    path.write_text(yaml.safe_dump([entry]))
    monkeypatch.setenv("ZOO_REGISTRY", str(path))


def test_shapes(catalogue: None) -> None:
    content = run("micro-vat", batches=(1, 2), lengths=(32,), repetitions=1)
    assert [(m["contender"].removeprefix("micro-vat"), m["direction"], m["case"]) for m in content["measurements"]] == [
        ("", "encode", "1 x 256 points"),
        ("", "planes", "1 x 25 tokens"),
        (", bf16", "planes", "1 x 25 tokens"),
        ("", "encode", "2 x 256 points"),
        ("", "planes", "2 x 25 tokens"),
        (", bf16", "planes", "2 x 25 tokens"),
        ("", "mesh", "ball, 32³ cells"),
        (", dense", "mesh", "ball, 32³ cells"),
    ]
    coarse, dense = (m["flops"] for m in content["measurements"][-2:])
    assert 0 < coarse < dense


def test_both_ways_make_the_same_ball(catalogue: None) -> None:
    tokenizer = random_model(registry.get("micro-vat"), "cpu")
    (field,) = tokenizer.field(tokenizer.encode([ball(256, 0)]))
    (vertices, faces), (dense_vertices, dense_faces) = (ball_mesh(extract, field, 32, dense=dense) for dense in (False, True))
    assert np.array_equal(vertices, dense_vertices) and np.array_equal(faces, dense_faces)
    assert np.abs(np.linalg.norm(vertices, axis=1) - 0.7).max() < 0.01

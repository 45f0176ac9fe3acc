"""FlexTok from the Hub: the official layout, where ``config.json`` says what the tensors cannot."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import zoo
from hub_server import HubServer
from zoo.codecs.flextok import FlexTok

CASE = Path(__file__).parent / "golden" / "flextok" / "tiny64"
REPO = "lab/flextok"


@pytest.fixture
def published(server: HubServer) -> HubServer:
    files = {"config.json": CASE / "config.json", "model.safetensors": CASE / "weights.safetensors"}
    server.repo(REPO).commit({name: path.read_bytes() for name, path in files.items()})
    return server


def is_golden(tokenizer: zoo.Tokenizer) -> bool:
    recorded = load_file(CASE / "io.safetensors")
    found = tokenizer.decode_latents(recorded["tokens_mode"], recorded["flow_noise"], steps=4, guidance=1.0)
    return torch.equal(tokenizer.encode(recorded["images"]).ids, recorded["tokens_mode"]) and bool(
        (found - recorded["dec_latents_k16_g1"]).abs().max() < 1e-4
    )


def test_a_repository_in_the_official_layout(published: HubServer) -> None:
    assert is_golden(zoo.load(f"hf-hub:{REPO}"))


def test_an_entry_whose_configuration_is_in_the_repository(
    published: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tree = json.loads((CASE / "config.json").read_text())
    config = asdict(FlexTok.checkpoint.config(tree)) | {"max_timestep": 1000.0}
    entry = {
        "name": "official",
        "family": "flextok",
        "modality": "image",
        "description": "for tests",
        "config": {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()},
        "weights": {"source": "hub", "repo": REPO, "file": "model.safetensors", "config": "config.json"},
        "licence": {"code": "Apache-2.0", "weights": "research", "non_commercial": True},
        "card": "flextok.md",
    }
    (tmp_path / "catalogue.yaml").write_text(yaml.safe_dump([entry]))
    monkeypatch.setenv("ZOO_REGISTRY", str(tmp_path / "catalogue.yaml"))
    with caplog.at_level(logging.WARNING, logger="zoo"):
        tokenizer = zoo.load("official")
    assert is_golden(tokenizer)
    assert "differs from the catalogue and is used: max_timestep is 1.0, not 1000.0" in caplog.text
    assert "forbids commercial use" in caplog.text
    assert tokenizer.name == "official"
    # The converted file is what later loads use, without a network.
    zoo.convert("official")
    published.repo(REPO).commits.clear()
    assert is_golden(zoo.load("official", local_files_only=True))


def test_pushed_and_loaded_again(server: HubServer) -> None:
    tokenizer = zoo.load_upstream("flextok", CASE / "config.json", CASE / "weights.safetensors")
    tokenizer.push_to_hub("me/flextok", token="hf_secret")
    again = zoo.load("hf-hub:me/flextok")
    assert again.config == tokenizer.config and is_golden(again)

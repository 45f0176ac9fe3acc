"""RAE: the latents and images of diffusers' class, one image at a time."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from hub_server import HubServer
from small_models_adapters_image import picture, rae, small_rae
from zoo.errors import KeysError, WeightsError


@pytest.mark.parametrize("kind", ["dinov2", "mae"])
def test_equals_the_class(kind: str) -> None:
    model, tokenizer = rae(kind), small_rae(kind)
    images = [picture(32, 32, seed) for seed in range(3)]
    encoded: Any = tokenizer.encode(images)
    decoded: Any = tokenizer.decode(encoded)
    for image, values, found in zip(images, encoded.values, decoded, strict=True):
        with torch.no_grad():
            expected = model.encode((image[None] + 1) / 2).latent
            shown = model.decode(expected).sample[0] * 2 - 1
        assert values.shape == (64, 4, 4) and (values - expected[0]).abs().max() < 1e-4
        assert found.shape == (3, 32, 32) and (found - shown).abs().max() < 1e-4
    assert (encoded.values[0] - encoded.values[1]).abs().max() > 0.1
    assert tokenizer.encode(images[1]).equal(zoo.Latents((encoded.values[1],), *_rest(encoded, 1)))
    assert pickle.loads(pickle.dumps(tokenizer)).encode(images).equal(encoded)


def _rest(encoded: Any, index: int) -> tuple[Any, ...]:
    return encoded.tokenizer, encoded.fingerprint, encoded.meta[index : index + 1]


def test_an_encoder_that_the_library_cannot_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """As SigLIP 2 of diffusers 0.42.1 with transformers 5.23."""
    config, state = dict(rae().config) | {"_class_name": "AutoencoderRAE", "encoder_type": "siglip2"}, rae().state_dict()

    def fail(*_: Any, **__: Any) -> None:
        raise AttributeError("no attribute 'vision_model'")

    monkeypatch.setattr("diffusers.models.autoencoders.autoencoder_rae._build_encoder", fail)
    with pytest.raises(WeightsError, match=r"cannot build siglip2 with this release of transformers: .*vision_model"):
        zoo.load_upstream("rae", config, state)


def test_sizes_come_back() -> None:
    tokenizer: Any = small_rae()
    tokens = tokenizer.encode([picture(40, 24), picture(32, 32)], fit="stretch")
    assert [list(image.shape) for image in tokenizer.decode(tokens, size="original")] == [[3, 40, 24], [3, 32, 32]]
    with pytest.raises(zoo.ItemError, match="item 0: an image of 24 x 40 does not fit"):
        tokenizer.encode(picture(40, 24), fit="none")


def test_entries_load_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: HubServer) -> None:
    rae().save_pretrained(tmp_path / "library")
    files = {path.name: path.read_bytes() for path in (tmp_path / "library").iterdir()}
    server.repo("org/rae").commit(files | {"modeling_x.py": b"raise SystemExit"})
    entry = {
        "name": "tiny-rae",
        "family": "rae",
        "modality": "image",
        "description": "tiny",
        "config": {},
        "weights": {"source": "hub", "repo": "org/rae", "file": "diffusion_pytorch_model.safetensors", "config": "config.json"},
        "licence": {"code": "MIT", "weights": "MIT"},
        "card": "rae.md",
    }
    (tmp_path / "own.yaml").write_text(json.dumps([entry]))
    monkeypatch.setenv("ZOO_REGISTRY", str(tmp_path / "own.yaml"))
    expected = small_rae().encode(picture(32, 32))
    loaded = zoo.load("tiny-rae")
    assert not any(path.endswith(".py") for _, path, _ in server.requests)
    for tokenizer in (
        loaded,
        zoo.load(f"local-dir:{tmp_path / 'library'}"),
        zoo.load(f"local-dir:{loaded.save_pretrained(tmp_path / 'ours')}"),
    ):
        found: Any = tokenizer.encode(picture(32, 32))
        assert tokenizer.fingerprint == small_rae().fingerprint and torch.equal(found.values[0], expected.values[0])


def test_files_that_do_not_fit() -> None:
    model = rae()
    config, state = dict(model.config) | {"_class_name": "AutoencoderRAE"}, dict(model.state_dict())
    for change, reason in (
        ({"encoder.layernorm.surplus": torch.zeros(1)}, "surplus"),
        ({"decoder.trainable_cls_token": torch.zeros(1, 1, 3)}, "trainable_cls_token"),
    ):
        with pytest.raises(KeysError, match=reason):
            zoo.load_upstream("rae", config, state | change)
    for missing in ("_latents_mean", "encoder_mean", "decoder.decoder_pred.bias"):
        with pytest.raises(KeysError, match="missing"):
            zoo.load_upstream("rae", config, {key: tensor for key, tensor in state.items() if key != missing})
    with pytest.raises(WeightsError, match=r"needs its config\.json"):
        zoo.load_upstream("rae", None, state)
    for wrong, reason in (
        ({"reshape_to_2d": False}, "reshape_to_2d"),
        ({"encoder_type": "clip"}, "encoder_type"),
        ({"encoder_input_size": 57}, "divide"),
    ):
        with pytest.raises(WeightsError, match=reason):
            zoo.load_upstream("rae", config | wrong, state)

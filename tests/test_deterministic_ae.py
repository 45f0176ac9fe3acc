"""Autoencoders without a posterior against the classes of diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import Tensor

import zoo
from hub_server import HubServer
from small_models_adapters_image import DETERMINISTIC, picture, small_deterministic
from zoo import registry
from zoo.codecs.deterministic_ae import DeterministicAE, DeterministicAEConfig

SIZES = [(32, 32), (33, 47)]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {kind: make() for kind, make in DETERMINISTIC.items()}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, DeterministicAE]:
    return {kind: small_deterministic(kind) for kind in DETERMINISTIC}


def whole(image: Tensor) -> Tensor:
    """A batch of the image, continued to cells of 4 x 4 pixels."""
    return F.pad(image[None], (0, -image.shape[2] % 4, 0, -image.shape[1] % 4), mode="replicate")


@pytest.mark.parametrize("kind", DETERMINISTIC)
@torch.no_grad()
def test_equals_the_class(kind: str, models: dict[str, Any], tokenizers: dict[str, DeterministicAE]) -> None:
    model, tokenizer = models[kind], tokenizers[kind]
    assert tokenizer.config.factor == 4
    for height, width in SIZES:
        image = picture(height, width)
        latents = tokenizer.encode(image)
        raw = model.encode(whole(image), return_dict=False)[0]
        assert raw.std() > 0.1
        assert (latents.values[0] - raw[0] * model.config.scaling_factor).abs().max() < 1e-4
        expected = model.decode(raw, return_dict=False)[0][0]
        assert (tokenizer.decode(latents)[0] - expected[:, :height, :width]).abs().max() < 1e-4
        assert (tokenizer.decode(latents, size=None)[0] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("kind", DETERMINISTIC)
def test_every_image_gets_what_it_gets_alone(kind: str, tokenizers: dict[str, DeterministicAE]) -> None:
    tokenizer = tokenizers[kind]
    images = [picture(20, 24), picture(5, 9, 1), picture(20, 24, 2), picture(1, 1, 3)]
    latents = tokenizer.encode(images)
    torch.manual_seed(1)
    decoded = tokenizer.decode(latents)
    for index, image in enumerate(images):
        assert tokenizer.encode(image).equal(latents[index])
        assert decoded[index].shape == image.shape
        assert torch.equal(tokenizer.decode(latents[index])[0], decoded[index])


@pytest.mark.parametrize("kind", DETERMINISTIC)
def test_a_repository(
    kind: str,
    models: dict[str, Any],
    tokenizers: dict[str, DeterministicAE],
    server: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, weights = tmp_path / kind, "diffusion_pytorch_model.safetensors"
    models[kind].save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModel": "modeling_x.X"}}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "modeling_x.py").write_text("raise SystemExit")
    server.repo("lab/ae").commit({path.name: path.read_bytes() for path in folder.iterdir()})
    entry = {
        "name": "one",
        "family": "deterministic_ae",
        "modality": "image",
        "description": "for tests",
        "config": {"network": kind},
        "weights": {"source": "hub", "repo": "lab/ae", "file": weights, "config": "config.json"},
        "licence": {"code": "Apache-2.0", "weights": "Apache-2.0"},
        "card": "deterministic_ae.md",
    }
    (tmp_path / "catalogue.yaml").write_text(yaml.safe_dump([entry]))
    monkeypatch.setenv("ZOO_REGISTRY", str(tmp_path / "catalogue.yaml"))
    image = picture(16, 12)
    expected = tokenizers[kind].encode(image)
    for address in ("one", "hf-hub:lab/ae", f"local-dir:{folder}"):
        assert zoo.load(address).encode(image).equal(expected)
    fetched = {path.rpartition("/")[2] for _, path, _ in server.requests if "/resolve/" in path}
    assert fetched == {"config.json", weights}
    again = zoo.load(f"local-dir:{zoo.load('one').save_pretrained(tmp_path / 'saved')}")
    assert again.encode(image).equal(expected) and again.config == tokenizers[kind].config

    state = load_file(folder / weights)
    key = next(key for key in state if key.startswith("decoder.") and state[key].ndim == 4)
    last = tokenizers[kind].identity_keys()[1].replace(".network", "")
    other = zoo.load_upstream("deterministic_ae", raw, state | {last: state[last] + 1})
    assert other.fingerprint != tokenizers[kind].fingerprint
    for reason, wrong in (
        ("missing", {name: tensor for name, tensor in state.items() if name != key}),
        ("unexpected", state | {"encoder.surplus": torch.zeros(1)}),
        ("unexpected in a", state | {"surplus": torch.zeros(1)}),
        ("wrong shapes", state | {key: torch.zeros(3, 3)}),
    ):
        with pytest.raises(zoo.KeysError, match=reason):
            zoo.load_upstream("deterministic_ae", raw, wrong)
    with pytest.raises(zoo.WeightsError, match=r"needs its config\.json"):
        zoo.load_upstream("deterministic_ae", None, state)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"network": "vae"}, "network must be one of"),
        ({"library": {"depth": 8}}, "no settings depth"),
        ({"library": {"in_channels": 4}}, "must be 3"),
        ({"library": {"upsampling_scaling_factor": 4}}, "must be 2"),
        ({"network": "dc", "library": {"scaling_factor": 0}}, "must not be 0"),
    ],
)
def test_impossible_configurations(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(zoo.WeightsError, match=reason):
        DeterministicAEConfig(**change)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "millions"),
    [("dc-ae-f32c32", 323.4), ("dc-ae-f64c128", 676.9), ("taesd", 2.4), ("taesdxl", 2.4), ("taef1", 2.5)],
)
def test_official_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        outline = DeterministicAE(registry.check_config(registry.get(name)))
    assert round(sum(tensor.numel() for tensor in outline.parameters()) / 1e6, 1) == millions

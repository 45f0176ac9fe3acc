"""Entries of video tokenizers load from the Hub, without any code that lies there, and in halves."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import zoo
from hub_server import HubServer
from small_models_adapters import config_of
from small_models_adapters_video import (
    EMU3_STATISTICS,
    SMALL_FSQ,
    emu3_network,
    small_emu3_video,
    small_video_kl,
    small_vidtok,
    video_kl_network,
    vidtok_network,
)

DECOY = {"auto_map": {"AutoModel": "modeling_x.Model"}, "architectures": ["Model"]}


def lightning_file() -> bytes:
    """As training with Lightning leaves it: the network beside its losses, in a pickle of tensors."""
    buffer = io.BytesIO()
    losses = {"loss.discriminator.weight": torch.ones(2, 2), "loss.logvar": torch.zeros(())}
    state = {key: tensor.clone() for key, tensor in vidtok_network(**SMALL_FSQ).state_dict().items()}
    torch.save({"state_dict": state | losses, "epoch": 3}, buffer)
    return buffer.getvalue()


def library_file(network: Any) -> bytes:
    return save({key: tensor.contiguous().clone() for key, tensor in network.state_dict().items()})


def described(network: Any) -> bytes:
    return json.dumps(config_of(network) | DECOY, default=str).encode()


def repository(family: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, bytes]]:
    """Settings and ``weights`` of an entry, and the files of its repository."""
    if family == "vidtok":
        file = "checkpoints/v1_1/vidtok.ckpt"
        return {"library": SMALL_FSQ}, {"file": file, "format": "ckpt"}, {file: lightning_file()}
    if family == "video_kl":
        network = video_kl_network("AutoencoderKLWan")
        file, config = "vae/diffusion_pytorch_model.safetensors", "vae/config.json"
        return {}, {"file": file, "config": config}, {file: library_file(network), config: described(network)}
    network = emu3_network()
    processor = {"image_mean": EMU3_STATISTICS["mean"], "image_std": EMU3_STATISTICS["std"], "auto_map": DECOY["auto_map"]}
    files = {
        "model.safetensors": library_file(network),
        "config.json": described(network),
        "preprocessor_config.json": json.dumps(processor).encode(),
    }
    return {}, {"file": "model.safetensors", "config": "config.json"}, files


@pytest.mark.parametrize("family", ["vidtok", "video_kl", "emu3_video"])
def test_entries_load_from_the_hub(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: HubServer) -> None:
    makers: dict[str, Any] = {"vidtok": small_vidtok, "video_kl": small_video_kl, "emu3_video": small_emu3_video}
    config, weights, files = repository(family)
    code = {f"{folder}modeling_x.py": b"raise SystemExit('code of a repository was run')" for folder in ("", "vae/")}
    server.repo("org/tiny").commit(code | files)
    entry = {
        "name": "tiny-video",
        "family": family,
        "modality": "video",
        "description": "tiny",
        "config": config,
        "weights": {"source": "hub", "repo": "org/tiny"} | weights,
        "licence": {"code": "MIT", "weights": "MIT"},
        "card": f"{family}.md",
    }
    (tmp_path / "own.yaml").write_text(json.dumps([entry]))
    monkeypatch.setenv("ZOO_REGISTRY", str(tmp_path / "own.yaml"))
    both, encoder, decoder = (zoo.load("tiny-video", parts=parts) for parts in (None, "encoder", "decoder"))
    asked = {path for _, path, _ in server.requests}
    assert all(any(path.endswith(file) for path in asked) for file in files)
    assert not any(path.endswith(".py") for path in asked)
    tokenizer = makers[family]()
    assert {own.fingerprint for own in (both, encoder, decoder)} == {tokenizer.fingerprint}
    film = zoo.media.write_video(tmp_path / "film.mkv", torch.rand(3, 6, 16, 20) * 2 - 1, 12)
    encoded = both.encode(film)
    assert encoded.equal(encoder.encode(film))
    ids = encoded.tolist() if family != "video_kl" else [values.tolist() for values in encoded.values]
    expected: Any = tokenizer.encode(film)
    assert ids == (expected.tolist() if family != "video_kl" else [values.tolist() for values in expected.values])
    [shown] = decoder.decode(encoded)
    assert shown.shape == (3, 6, 16, 20) and (shown - tokenizer.decode(expected)[0]).abs().max() < 1e-5
    assert encoder.num_parameters < both.num_parameters > decoder.num_parameters
    again = zoo.load(f"local-dir:{both.save_pretrained(tmp_path / 'ours')}")
    assert again.encode(film).equal(encoded)

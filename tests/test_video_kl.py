"""Autoencoders of video: the numbers of diffusers' classes, for clips of any length and size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from small_models_adapters_video import SMALL_VIDEO_KL, small_video_kl, video_kl_network
from zoo.codecs.video_kl import NETWORKS, VideoKL, VideoKLConfig
from zoo.errors import KeysError, WeightsError

GROUPS = {"AutoencoderKLWan": 4, "AutoencoderKLQwenImage": 4, "AutoencoderKLCogVideoX": 8, "AutoencoderKLCosmos": 8}


def clip(frames: int, height: int = 16, width: int = 16) -> Tensor:
    return torch.randn(3, frames, height, width, generator=torch.Generator().manual_seed(frames)).clamp(-1, 1)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_numbers_are_those_of_the_class(network: str) -> None:
    tokenizer, library = small_video_kl(network), video_kl_network(network)
    for frames in (1, 2, 3, 4, 5, 8, 9, 16, 17):
        height, width = (33, 47) if frames in (2, 5) else (32, 32) if frames == 9 else (8, 16)
        item = clip(frames, height, width)
        latents = tokenizer.encode(item)
        whole = F.pad(item, (0, -width % 8, 0, -height % 8), mode="replicate")
        whole = torch.cat([whole] + [whole[:, -1:]] * (-(frames - 1) % GROUPS[network]), dim=1)
        with torch.no_grad():
            expected = library.encode(whole[None]).latent_dist.mode()
            media = library.decode(expected).sample[0]
        settings = SMALL_VIDEO_KL[network]
        if network == "AutoencoderKLCogVideoX":
            scaled = expected[0] * 0.7
        else:
            columns = [torch.tensor(settings[name]).reshape(4, -1) for name in ("latents_mean", "latents_std")]
            mean, deviation = (
                torch.stack([column[:, min(place, column.shape[1] - 1)] for place in range(expected.shape[2])], 1)
                for column in columns
            )
            scaled = (expected[0] - mean[..., None, None]) / deviation[..., None, None]
        assert (latents.values[0] - scaled).abs().max() < 1e-5
        [decoded] = tokenizer.decode(latents)
        assert decoded.shape == (3, frames, height, width)
        assert (decoded - media[:, :frames, :height, :width]).abs().max() < 1e-4
        assert tokenizer.grid(latents) == [tuple(expected.shape[2:])]


@pytest.mark.parametrize("network", NETWORKS)
def test_causal(network: str) -> None:
    """What comes later changes nothing: a clip's first 9 frames have the latents that they have alone."""
    tokenizer, item = small_video_kl(network), clip(17, 8, 8)
    first = tokenizer.encode(item[:, :9]).values[0]
    assert (tokenizer.encode(item).values[0][:, : first.shape[1]] - first).abs().max() < 1e-5


def test_a_posterior_is_drawn_from_when_asked() -> None:
    tokenizer, item = small_video_kl(), clip(2, 8, 8)
    draws = [tokenizer.encode(item, posterior="sample", generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert draws[0].equal(draws[1]) and not draws[0].equal(draws[2])
    point = small_video_kl("AutoencoderKLCosmos")
    assert point.encode(item, posterior="sample").equal(point.encode(item))


@pytest.mark.parametrize("network", NETWORKS)
def test_folders_of_diffusers(network: str, tmp_path: Path) -> None:
    video_kl_network(network).save_pretrained(tmp_path)
    # What a repository may carry besides is not looked at.
    (tmp_path / "modeling.py").write_text("raise SystemExit")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling.Model"}}))
    tokenizer, own = zoo.load(f"local-dir:{tmp_path}"), small_video_kl(network)
    assert isinstance(tokenizer, VideoKL) and tokenizer.fingerprint == own.fingerprint
    assert torch.equal(tokenizer.encode(clip(5)).values[0], own.encode(clip(5)).values[0])


def test_halves(tmp_path: Path) -> None:
    whole = small_video_kl()
    latents = whole.encode(clip(2))
    whole.save_pretrained(tmp_path)
    encoder, decoder = (zoo.load(f"local-dir:{tmp_path}", parts=part) for part in ("encoder", "decoder"))
    assert encoder.encode(clip(2)).equal(latents) and torch.equal(decoder.decode(latents)[0], whole.decode(latents)[0])
    assert decoder.num_parameters < whole.num_parameters


def test_files_that_cannot_be_used() -> None:
    state, settings = dict(video_kl_network("AutoencoderKLWan").state_dict()), SMALL_VIDEO_KL["AutoencoderKLWan"]
    config = settings | {"_class_name": "AutoencoderKLWan"}
    with pytest.raises(WeightsError, match=r"without config\.json"):
        zoo.load_upstream("video_kl", None, state)
    with pytest.raises(WeightsError, match="configuration of AutoencoderKLLTXVideo"):
        zoo.load_upstream("video_kl", {"_class_name": "AutoencoderKLLTXVideo"}, state)
    for wrong in ({"patch_size": 2}, {"is_residual": True}, {"in_channels": 12}, {"temperal_downsample": [True, True, True]}):
        with pytest.raises(WeightsError, match=f"not supported: {next(iter(wrong))}"):
            zoo.load_upstream("video_kl", config | wrong, state)
    for change in ({"decoder.surplus": torch.zeros(1)}, {"decoder.conv_in.bias": torch.zeros(3)}):
        with pytest.raises(KeysError):
            zoo.load_upstream("video_kl", config, state | change)
    del state["decoder.conv_in.bias"]
    with pytest.raises(KeysError, match="missing"):
        zoo.load_upstream("video_kl", config, state)


@pytest.mark.slow
@pytest.mark.parametrize("name", [entry.name for entry in zoo.registry.entries().values() if entry.family == "video_kl"])
def test_official_sizes(name: str) -> None:
    with torch.device("meta"):
        tokenizer = VideoKL(VideoKLConfig(**zoo.info(name).config), name=name)
    assert tokenizer.cell == (8, 8) and tokenizer.spec.dim == 16
    assert 90e6 < sum(parameter.numel() for parameter in tokenizer.parameters()) < 250e6

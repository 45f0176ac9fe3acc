"""Emu3's tokenizer for video: the ids and the frames of transformers' class, in bounded memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from small_models_adapters_video import EMU3_STATISTICS, SMALL_EMU3, emu3_network, small_emu3_video
from zoo.codecs.emu3_video import Emu3Video, Emu3VideoConfig
from zoo.errors import KeysError, WeightsError


def clip(frames: int, height: int = 16, width: int = 16) -> Tensor:
    return torch.randn(3, frames, height, width, generator=torch.Generator().manual_seed(frames)).clamp(-1, 1)


def test_the_numbers_are_those_of_the_class() -> None:
    tokenizer, library = small_emu3_video(), emu3_network()
    mean, std = (torch.tensor(EMU3_STATISTICS[name])[:, None, None, None] for name in ("mean", "std"))
    seen: set[int] = set()
    for frames in (1, 2, 3, 4, 5, 8, 9, 16, 17):
        height, width = (33, 47) if frames == 5 else (32, 32) if frames == 9 else (8, 12)
        item = clip(frames, height, width)
        tokens = tokenizer.encode(item)
        whole = F.pad(item, (0, -width % 4, 0, -height % 4), mode="replicate")
        whole = torch.cat([whole] + [whole[:, -1:]] * (-frames % 4), dim=1)
        pixels = (((whole + 1) / 2 - mean) / std).transpose(0, 1)[None]
        with torch.no_grad():
            # The class cuts the first two axes to the size of the image, which are time and rows here: nothing is cut.
            [expected] = library.encode(pixels, torch.tensor([[4096, 4096]])).image_tokens
            media = library.decode(expected[None])[0].transpose(0, 1)
        assert tokens.tolist() == [expected.flatten().tolist()]
        seen |= set(tokens.tolist()[0])
        assert tokenizer.grid(tokens) == [tuple(expected.shape)]
        [decoded] = tokenizer.decode(tokens)
        assert decoded.shape == (3, frames, height, width)
        assert (decoded - ((media * std + mean) * 2 - 1)[:, :frames, :height, :width]).abs().max() < 1e-4
    assert len(seen) > 8


def test_few_frames_at_a_time_are_the_whole() -> None:
    tokenizer, item = small_emu3_video(), clip(21)
    whole = {}
    for frames in (1, 4, 24):
        tokenizer.block_frames = frames
        tokens = tokenizer.encode(item)
        whole[frames] = (tokens.tolist(), tokenizer.decode(tokens)[0])
    assert whole[1][0] == whole[4][0] == whole[24][0]
    assert (whole[1][1] - whole[24][1]).abs().max() < 1e-4 and (whole[4][1] - whole[24][1]).abs().max() < 1e-4


def test_official_names_and_halves(tmp_path: Path) -> None:
    names = {"base_channels": "ch", "channel_multiplier": "ch_mult", "hidden_size": None}
    raw = {names.get(key, key): value for key, value in SMALL_EMU3.items() if names.get(key, key)}
    raw |= {"double_z": False, "z_channels": 4, "embed_dim": 4, "codebook_size": 64, "auto_map": {"AutoModel": "x.Y"}}
    processor = {"image_mean": EMU3_STATISTICS["mean"], "image_std": EMU3_STATISTICS["std"]}
    state = emu3_network().state_dict()
    tokenizer = zoo.load_upstream("emu3_video", raw | {"preprocessor_config.json": processor}, state)
    own, tokens = small_emu3_video(), small_emu3_video().encode(clip(5))
    assert tokenizer.fingerprint == own.fingerprint and tokenizer.encode(clip(5)).tolist() == tokens.tolist()
    own.save_pretrained(tmp_path / "own")
    encoder, decoder = (zoo.load(f"local-dir:{tmp_path / 'own'}", parts=part) for part in ("encoder", "decoder"))
    assert encoder.encode(clip(5)).equal(tokens) and torch.equal(decoder.decode(tokens)[0], own.decode(tokens)[0])
    with pytest.raises(WeightsError, match=r"needs its config\.json"):
        zoo.load_upstream("emu3_video", None, state)
    with pytest.raises(WeightsError, match="not the configuration"):
        zoo.load_upstream("emu3_video", {"model_type": "bert"}, state)
    with pytest.raises(KeysError):
        zoo.load_upstream("emu3_video", raw | {"preprocessor_config.json": processor}, state | {"surplus": torch.zeros(1)})


@pytest.mark.slow
def test_official_size() -> None:
    with torch.device("meta"):
        tokenizer = Emu3Video(Emu3VideoConfig(**zoo.info("emu3-video").config), name="emu3-video")
    assert tokenizer.cell == (8, 8) and tokenizer.spec.vocab_size == 32_768
    assert 250e6 < sum(parameter.numel() for parameter in tokenizer.parameters()) < 290e6

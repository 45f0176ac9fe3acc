"""Continuous audio tokenizers of transformers and diffusers: the library's numbers for an item alone, in pieces and streams."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from hub_server import HubServer
from small_models_adapters import adapter, config_of, oobleck_model, pocket_tts_model, state_of, vibevoice_model
from test_adapters_audio import difference, publish, stored, whole_frames
from zoo.tokenizer import Budget


@dataclass(frozen=True)
class Case:
    """A library's class behind a tokenizer; see the discrete ones. Latents are ``[dim, frames]``."""

    family: str
    model: Callable[[], Any]
    hop: int
    encode: Callable[[Any, Tensor], Tensor]
    decode: Callable[[Any, Tensor], Tensor]
    file: str = "model.safetensors"


def _as_extracted(wave: Tensor) -> Tensor:
    """What the library's feature extractor makes of a recording, at a multiple of the small model's hop."""
    from transformers import VibeVoiceAcousticTokenizerFeatureExtractor

    extractor = VibeVoiceAcousticTokenizerFeatureExtractor(pad_to_multiple_of=40)
    found: Tensor = extractor(wave[0, 0].numpy(), sampling_rate=24_000)["input_values"]
    return found


CASES = {
    "oobleck": Case(
        "oobleck",
        oobleck_model,
        40,
        lambda model, wave: model.encode(whole_frames(wave, 40)).latent_dist.mode()[0],
        lambda model, latents: model.decode(latents[None]).sample[0],
        "diffusion_pytorch_model.safetensors",
    ),
    "pocket_tts": Case(
        "pocket_tts",
        pocket_tts_model,
        80,
        lambda model, wave: model.encode(whole_frames(wave, 80)).latents[0].T,
        lambda model, latents: model.decode(latents.T[None]).audio_values[0],
    ),
    "vibevoice": Case(
        "vibevoice",
        vibevoice_model,
        40,
        lambda model, wave: model.encode(_as_extracted(wave), sample=False).latents[0].T,
        lambda model, latents: model.decode(latents.T[None]).audio[0],
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


@cache
def tokenizer_of(name: str) -> Any:
    case = CASES[name]
    return adapter(case.family, case.model(), f"small-{name}")


def sound(samples: int, seed: int, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    envelope = F.interpolate(torch.rand(1, channels, samples // 300 + 2, generator=generator), samples, mode="linear")[0]
    return torch.randn(channels, samples, generator=generator) * envelope * 0.3


def lengths_of(case: Case) -> list[int]:
    hop = case.hop
    return [1, hop - 1, hop, hop + 1, 7 * hop, 10 * hop + 7, 45 * hop + 5]


@every_case
def test_numbers_of_the_class_on_the_item_alone_in_any_batch(name: str) -> None:
    case, tokenizer = CASES[name], tokenizer_of(name)
    model = case.model()
    waves = [sound(samples, samples, tokenizer.channels) for samples in lengths_of(case)]
    order = random.Random(0).sample(range(len(waves)), len(waves))
    latents = tokenizer.encode([waves[i] for i in order])
    audio = tokenizer.decode(latents)
    for row, index in enumerate(order):
        with torch.no_grad():
            values = case.encode(model, waves[index][None])
            expected = case.decode(model, values)
        gain = latents.meta[row].get("gain", 1.0)
        assert difference(latents.values[row], values) < 1e-5 * max(1.0, values.abs().max().item())
        samples = waves[index].shape[1]
        assert audio[row].shape == (tokenizer.channels, samples)
        heard = min(samples, expected.shape[-1])
        scale = max(1.0, expected.abs().max().item())
        assert difference(audio[row][:, :heard] * gain, expected[:, :heard]) < 1e-5 * scale
        assert samples - heard <= 8
    assert latents.values[order.index(len(waves) - 1)].std() > 0.02


@every_case
def test_pieces_and_streams_give_the_numbers_of_one_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, tokenizer = CASES[name], tokenizer_of(name)
    assert tokenizer.spec.streaming == "exact"
    waves = [sound(samples, samples, tokenizer.channels) for samples in (47 * case.hop + 11, 20 * case.hop)]
    alone = [tokenizer.encode(wave) for wave in waves]
    heard = [tokenizer.decode(own, trim=False)[0] for own in alone]
    monkeypatch.setattr(type(tokenizer), "at_once", {"encode": Budget(5 * case.hop, 1), "decode": Budget(5, 1)})
    pieces = tokenizer.encode(waves)
    for own, other in zip(pieces.values, alone, strict=True):
        assert difference(own, other.values[0]) < 1e-4
    for audio, other in zip(tokenizer.decode(pieces, trim=False), heard, strict=True):
        assert difference(audio, other) < 1e-3 * max(1.0, other.abs().max().item())
    monkeypatch.undo()
    cuts = random.Random(0)
    for wave, whole, expected in zip(waves, alone, heard, strict=True):
        gain = whole.meta[0].get("gain", 1.0)
        encoder = tokenizer.stream_encoder()
        rest = wave * gain
        while rest.shape[1]:
            count = cuts.choice((1, 2 * case.hop, 9 * case.hop))
            encoder.push(rest[:, :count])
            rest = rest[:, count:]
            if cuts.random() < 0.3:
                encoder = stored(encoder, tokenizer.stream_encoder())
        encoder.finish()
        [latents] = encoder.tokens.values
        assert difference(latents, whole.values[0].cpu()) < 1e-4
        decoder, parts, rest = tokenizer.stream_decoder(), [], latents
        while rest.shape[1]:
            count = cuts.choice((1, 7, 20))
            parts.append(decoder.push(rest[:, :count]))
            rest = rest[:, count:]
            if cuts.random() < 0.3:
                decoder = stored(decoder, tokenizer.stream_decoder())
        given = torch.cat([*parts, decoder.finish()], dim=1) / gain
        assert difference(given, expected) < 1e-3 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("name", ["oobleck", *(pytest.param(name, marks=pytest.mark.slow) for name in list(CASES)[1:])])
def test_entries_load_from_the_hub_and_halves_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: HubServer
) -> None:
    import json

    case, tokenizer = CASES[name], tokenizer_of(name)
    model = case.model()
    model.save_pretrained(tmp_path / "library")
    entry = {
        "name": "tiny-adapter",
        "family": case.family,
        "modality": "audio",
        "description": "tiny",
        "config": {},
        "weights": {"source": "hub", "repo": "org/tiny", "file": f"vae/{case.file}", "config": "vae/config.json"},
        "licence": {"code": "MIT", "weights": "MIT"},
        "card": f"{case.family}.md",
    }
    (tmp_path / "own.yaml").write_text(json.dumps([entry]))
    publish(server.repo("org/tiny"), model, "vae/", **{f"vae/{case.file}": (tmp_path / "library" / case.file).read_bytes()})
    monkeypatch.setenv("ZOO_REGISTRY", str(tmp_path / "own.yaml"))
    wave = sound(10 * case.hop, 1, tokenizer.channels)
    expected = tokenizer.encode(wave)
    loaded = [zoo.load("tiny-adapter", parts=parts) for parts in (None, "encoder", "decoder")]
    assert not any(path.endswith(".py") for _, path, _ in server.requests)
    assert {own.fingerprint for own in loaded} == {tokenizer.fingerprint}
    both, encoder, decoder = loaded
    assert both.encode(wave).equal(expected) and encoder.encode(wave).equal(expected)
    assert difference(decoder.decode(expected)[0], tokenizer.decode(expected)[0]) < 1e-6
    assert encoder.num_parameters < both.num_parameters > decoder.num_parameters
    again = zoo.load(f"local-dir:{both.save_pretrained(tmp_path / 'ours')}")
    assert again.encode(wave).equal(expected)
    assert zoo.load(f"local-dir:{tmp_path / 'library'}").encode(wave).equal(expected)


@every_case
def test_bad_checkpoints_are_refused(name: str) -> None:
    case = CASES[name]
    config, state = config_of(case.model()), state_of(case.model())
    key = next(key for key in state if key.startswith("decoder") and key.endswith("bias"))
    for change, reason in (
        (lambda own: own.pop(key), "missing"),
        (lambda own: own.update({"decoder.surplus": torch.zeros(1)}), "unexpected"),
        (lambda own: own.update({key: torch.zeros(99)}), "shape"),
    ):
        changed = dict(state)
        change(changed)
        with pytest.raises(zoo.KeysError, match=reason):
            zoo.load_upstream(case.family, config, changed)
    with pytest.raises(zoo.KeysError, match=r"pass config\.json"):
        zoo.load_upstream(case.family, None, state)
    with pytest.raises(zoo.WeightsError, match="configuration of"):
        zoo.load_upstream(case.family, {"model_type": "bert"}, state)


def test_loudness_comes_back() -> None:
    """A quiet and a loud recording of one shape have the same latents, and each its own loudness again."""
    tokenizer = tokenizer_of("vibevoice")
    wave = sound(3000, 1, 1)
    quiet, loud = tokenizer.encode([wave * 0.01, wave])
    assert difference(quiet.values[0], loud.values[0]) < 1e-3
    [soft], [strong] = tokenizer.decode(quiet), tokenizer.decode(loud)
    assert difference(soft, strong * 0.01) < 1e-2 * soft.abs().max()
    [level] = tokenizer.decode(quiet, loudness="model")
    assert difference(level, soft * quiet.meta[0]["gain"]) < 1e-5
    with pytest.raises(zoo.InputError, match="loudness must be"):
        tokenizer.decode(quiet, loudness="loud")
    assert torch.isfinite(tokenizer.decode(tokenizer.encode(torch.zeros(100)))[0]).all()

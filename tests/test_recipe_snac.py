"""The recipe of ``snac-tiny``: layers that equal the model's, resuming, and the file it writes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import zoo
from zoo.codecs.snac import SNAC, SNACConfig
from zoo.weights.data import audio as audio_data
from zoo.weights.recipes import snac
from zoo.weights.recipes.wavtokenizer import Corpus

SMALL = SNACConfig(
    encoder_dim=4,
    encoder_rates=(4, 8),
    decoder_dim=16,
    decoder_rates=(8, 4),
    codebook_size=16,
    codebook_dim=4,
    vq_strides=(2, 1),
)
#: Nine coarse frames, so that all dilations divide every length.
BRIEF = snac.Recipe(steps=8, batch=2, crop_frames=45, warmup=2, continuous=3, seed=7)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    composer = np.random.default_rng(0)
    return Corpus([audio_data.music(composer, 2.0) for _ in range(3)])


def advance(training: snac.Training, steps: int) -> list[dict[str, float]]:
    return [training.stage.train_step() for _ in range(steps)]


@pytest.mark.parametrize("depthwise", [True, False])
def test_layers_in_training_are_those_of_the_model(depthwise: bool) -> None:
    torch.manual_seed(0)
    model = SNAC(replace(SMALL, depthwise=depthwise))
    for stage in model.decoder.stages:
        stage.noise.weight.data.zero_()
    waveform = torch.randn(2, 45 * 64) * 0.3
    latents = model.encoder(waveform)
    assert (latents - snac.encode(model.encoder, waveform).transpose(1, 2)).abs().max() < 1e-5
    estimate = snac.decode(model.decoder, latents.transpose(1, 2), torch.Generator())
    assert (model.decoder(latents, None) - estimate).abs().max() < 1e-5


def test_the_gradient_of_snake() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    rate = torch.rand(3, 1, dtype=torch.float64, generator=generator).add(0.1).requires_grad_()
    assert torch.autograd.gradcheck(snac._Snake.apply, (x, rate))


def test_what_is_trained_is_what_the_model_quantizes_to(corpus: Corpus) -> None:
    training = snac.Training(BRIEF, corpus, SMALL)
    advance(training, 5)
    stage, model = training.stage, training.model
    for index, codebook in enumerate(stage.codebooks):
        model.quantizer.level(index).codebook.data.copy_(codebook.embed)
        assert torch.allclose(codebook.embed.norm(dim=1), torch.ones(16), atol=1e-5)
    waveform = corpus.batch(2, stage.crop, torch.Generator().manual_seed(0))
    stage.codebooks.eval()
    with torch.no_grad():
        latents = snac.encode(model.encoder, waveform)
        trained, _ = stage.quantize(latents)
        coded = model.quantizer.vectors(model.quantizer.ids(latents.transpose(1, 2)))
    assert (trained.transpose(1, 2) - coded).abs().max() < 1e-4


@pytest.mark.parametrize("stop", [2, 5], ids=["before the codebooks", "with the codebooks"])
def test_resuming_gives_the_model_of_an_uninterrupted_run(corpus: Corpus, tmp_path: Path, stop: int) -> None:
    whole = snac.Training(BRIEF, corpus, SMALL)
    terms = advance(whole, 8)
    assert all(math.isfinite(value) for own in terms for value in own.values())
    assert terms[0]["commit"] == 0 < terms[-1]["commit"]
    interrupted = snac.Training(BRIEF, corpus, SMALL)
    advance(interrupted, stop)
    interrupted.save(tmp_path / "checkpoint.pt")
    torch.rand(100)
    resumed = snac.Training(BRIEF, corpus, SMALL)
    resumed.restore(tmp_path / "checkpoint.pt")
    advance(resumed, 8 - stop)
    for left, right in zip(whole.snapshot().state_dict().values(), resumed.snapshot().state_dict().values(), strict=True):
        assert torch.equal(left, right)


def test_from_sound_to_a_file(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snac, "make_corpus", lambda recipe, folders: corpus)
    out = tmp_path / "snac-tiny.safetensors"
    model = snac.train(BRIEF, out, config=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    with safe_open(out, "pt") as file:
        saved = json.loads(file.metadata()["zoo"])
    assert saved["family"] == "snac" and saved["fingerprint"] == model.fingerprint
    waveform = corpus.samples[:24_000].float() / 32_768
    loaded = zoo.load(f"local-dir:{out}")
    assert loaded.encode(waveform).equal(model.encode(waveform))
    with pytest.raises(ValueError, match="another recipe"):
        broken = snac.Training(BRIEF, corpus, SMALL)
        broken.save(out.with_suffix(".checkpoint.pt"))
        snac.train(replace(BRIEF, steps=9), out, config=SMALL)

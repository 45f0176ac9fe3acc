"""The recipe of vectok-tiny: its corpus, units, stages, resuming, and the file it writes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import zoo
from small_models_vectok import SMALL_LOGMEL_VECTOK, noise
from zoo.codecs.vectok import ISTFTSizes
from zoo.codecs.vectok.vocoder import ISTFTVocoder
from zoo.weights.recipes import vectok as recipe_module
from zoo.weights.recipes.vectok import TINY, Recipe, Training, VocoderStage, start_vocoder, train

SMALL = replace(SMALL_LOGMEL_VECTOK, merges=30, vocab_size=50)
BRIEF = Recipe(
    kmeans_batches=5,
    kmeans_batch=256,
    inverse_steps=4,
    inverse_batch=2,
    inverse_frames=24,
    vocoder_steps=4,
    vocoder_batch=2,
    vocoder_frames=8,
    warmup=2,
    seed=7,
)


@pytest.fixture(autouse=True)
def noises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short noises in the place of speech, the last of them too short."""

    def recordings(*arguments: object) -> Iterator[Tensor]:
        yield from (noise(samples, seed) for seed, samples in enumerate((64_000, 80_100, 70_000, 30_000)))

    def voices(sample_rate: int) -> Iterator[tuple[str, Tensor]]:
        yield from (("low", noise(50_000, 8)), ("high", noise(40_000, 9)))

    monkeypatch.setattr(recipe_module, "recordings", recordings)
    monkeypatch.setattr(recipe_module, "voices", voices)


def test_corpus_is_standardised_and_has_units() -> None:
    training = Training(BRIEF, [], SMALL)
    assert [len(own.waveform) for own in training.corpus] == [64_000, 80_000, 69_760], "whole hops, no short recording"
    vectors = torch.cat([own.vectors for own in training.corpus])
    assert vectors.mean(0).abs().max() < 1e-2 and (vectors.std(0) - 1).abs().max() < 1e-2
    for own in training.corpus:
        assert own.units is not None and own.units.tolist() == training.model.unit_ids(own.waveform)[0].tolist()
        tokens = training.model.units.bpe.encode(own.units)
        assert len(tokens) < len(own.units), "byte pairs were learnt"
        assert torch.equal(training.model.units.expand(tokens), own.units)


def test_crops_and_prompts_do_not_overlap_and_units_are_those_of_the_crop() -> None:
    stage = Training(BRIEF, [], SMALL).stage
    for _ in range(50):
        prompt, units, target = stage.example(100)
        assert (len(prompt), len(units), len(target)) == (100, 24, 24)
        assert not (prompt[:, None] == target).all(-1).any()
        assert any(
            torch.equal(own.vectors[i : i + 24], target) and torch.equal(own.units[i : i + 24], units)
            for own in stage.corpus
            for i in range(len(own.vectors) - 23)
        )


def test_crops_of_sound_lie_under_their_vectors() -> None:
    training = Training(BRIEF, [], SMALL)
    training.advance()
    stage = training.stage
    assert isinstance(stage, VocoderStage)
    vectors, waveform = stage.example()
    starts = [
        320 * i
        for own in stage.corpus
        for i in range(len(own.vectors) - 7)
        if torch.equal(own.vectors[i : i + 8], vectors) and torch.equal(own.waveform[320 * i : 320 * (i + 8)], waveform)
    ]
    assert len(starts) == 1
    stage.step = stage.steps  # at the end of the schedule, half of the vectors are the inverse model's
    restored = sum(
        any(torch.equal(own.restored[i : i + 8], found) for own in stage.corpus for i in range(len(own.vectors) - 7))
        for found, _ in (stage.example() for _ in range(20))
    )
    assert 3 <= restored <= 17


def test_the_vocoder_starts_from_wavtokenizer() -> None:
    source = zoo.load("wavtokenizer-tiny")
    assert isinstance(TINY.vocoder, ISTFTSizes)
    vocoder = ISTFTVocoder(TINY.vocoder, TINY.vector_dim)
    before = vocoder.state_dict()["conv.weight"].clone()
    start_vocoder(vocoder, source)
    state = source.state_dict()
    x = torch.randn(1, 9, 192, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = vocoder.last_norm(vocoder.blocks[7](vocoder.blocks[0](x, None), None))
        backbone = source.backbone
        theirs = backbone.final_layer_norm(backbone.convnext[7](backbone.convnext[0](x, None, 0), None, 0))
    assert (ours - theirs).abs().max() < 1e-4
    assert torch.equal(vocoder.head.weight, state["head.out.weight"]) and torch.equal(vocoder.conv.weight, before)
    other = ISTFTVocoder(ISTFTSizes(width=16, ffn_dim=24, blocks=2), 24)
    start_vocoder(other, source)  # nothing fits


@pytest.mark.parametrize("stop", [2, 5], ids=["in the inverse model", "in the vocoder"])
def test_resuming_goes_on_where_it_stopped(tmp_path: Path, stop: int) -> None:
    def advance(training: Training, steps: int) -> None:
        for _ in range(steps):
            if training.stage.progress == 1:
                training.advance()
            training.stage.train_step()

    whole, interrupted, resumed = (Training(BRIEF, [], SMALL) for _ in range(3))
    advance(whole, 7)
    advance(interrupted, stop)
    interrupted.save(tmp_path / "checkpoint.pt")
    torch.rand(1000)  # another process would not have this process's global random state
    resumed.restore(tmp_path / "checkpoint.pt")
    advance(resumed, 7 - stop)
    assert resumed.index == whole.index == 1 and resumed.stage.step == whole.stage.step
    for key, tensor in whole.model.state_dict().items():
        assert (tensor.float() - resumed.model.state_dict()[key].float()).abs().max() < 1e-2, key
    with pytest.raises(ValueError, match="another recipe"):
        Training(replace(BRIEF, inverse_batch=3), [], SMALL).restore(tmp_path / "checkpoint.pt")


def test_both_stages_learn() -> None:
    training = Training(replace(BRIEF, inverse_steps=25, vocoder_steps=25), [], SMALL)
    for _ in range(2):
        losses = []
        while training.stage.progress < 1:
            terms = training.stage.train_step()
            assert all(math.isfinite(value) for value in terms.values())
            losses.append(sum(terms.values()))
        assert sum(losses[-5:]) < 0.95 * sum(losses[:5]), training.stage.name
        training.advance()


def test_the_written_file_holds_the_exported_model(tmp_path: Path) -> None:
    out = tmp_path / "tiny.safetensors"
    exported = train(BRIEF, out, config=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [out.name], "no checkpoint or temporary file is left"
    with safe_open(out, "pt") as file:
        saved = json.loads(file.metadata()["zoo"])
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
    assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {torch.float16}
    assert saved["config"]["voices"] == ["low", "high"]
    loaded = zoo.load(f"local-dir:{exported.save_pretrained(tmp_path / 'saved')}")
    for key, tensor in state.items():
        assert torch.equal(loaded.state_dict()[key], tensor.to(loaded.state_dict()[key].dtype)), key
    item = noise(20_000, 3)
    assert torch.equal(loaded.encode(item).ids, exported.encode(item).ids)
    assert loaded.decode(loaded.encode(item))[0].isfinite().all()

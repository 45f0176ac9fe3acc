"""What the embedded image models are shipped for: pictures, prefixes, meaning, and a causal order of tokens."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

import zoo
from zoo.eval.modality.image import psnr, ssim
from zoo.eval.modality.thumbnail import thumbnail
from zoo.eval.photographs import write_photographs
from zoo.eval.studies import consistency, precision, probe
from zoo.eval.studies.record import write_result
from zoo.media import prepare_image

EMBEDDED = Path(__file__).parents[1] / "weights"


@pytest.fixture(scope="module")
def tokenflow() -> zoo.Tokenizer:
    return zoo.load("tokenflow-tiny")


@pytest.fixture(scope="module")
def seed() -> zoo.Tokenizer:
    return zoo.load("seed-tiny")


@pytest.fixture(scope="module")
def flextok() -> zoo.Tokenizer:
    return zoo.load("flextok-tiny")


@pytest.mark.parametrize("name", ["flextok-tiny", "tokenflow-tiny", "seed-tiny"])
def test_they_are_small(name: str) -> None:
    assert (EMBEDDED / f"{name}.safetensors").stat().st_size <= 8_000_000


def test_every_prefix_of_a_photograph_beats_a_thumbnail_of_the_same_bits(flextok: zoo.Tokenizer, tmp_path: Path) -> None:
    paths = write_photographs(tmp_path)
    originals = [(prepare_image(path, flextok.spec.image_size).pixels + 1) / 2 for path in paths]
    tokens = flextok.encode(paths)
    quality = []
    for k in (1, 2, 4, 8, 16, 32, 64):
        decoded = [(image.clamp(-1, 1) + 1) / 2 for image in flextok.decode(tokens.truncate(k))]
        rivals = [thumbnail(original, k * flextok.spec.bits_per_token).image for original in originals]
        ours, theirs = (
            [sum(map(metric, originals, images)) / len(paths) for metric in (psnr, ssim)] for images in (decoded, rivals)
        )
        assert ours[0] > theirs[0] or ours[1] > theirs[1], k
        quality.append(ours[0])
    assert quality == sorted(quality)


def test_its_tokens_depend_on_the_picture(flextok: zoo.Tokenizer, tmp_path: Path) -> None:
    paths = write_photographs(tmp_path)
    tokens = flextok.encode(paths)
    assert tokens.ids.unique().numel() > tokens.ids.numel() / 2
    swapped = flextok.decode(tokens.ids.roll(1, dims=0))
    for image, other in zip(flextok.decode(tokens), swapped, strict=True):
        assert (image - other).abs().mean() > 0.05


def test_reduced_precision_is_measured(flextok: zoo.Tokenizer, tmp_path: Path) -> None:
    [path, *_] = write_photographs(tmp_path)
    found = precision.run("flextok-tiny", [path])
    ids = flextok.encode(path).ids
    assert found["ids_changed"] == (flextok.encode(path, encoder_precision="bf16").ids != ids).float().mean().item()
    original = (prepare_image(path, flextok.spec.image_size).pixels + 1) / 2
    decoded = (flextok.decode(ids)[0].clamp(-1, 1) + 1) / 2
    assert found["psnr"] == pytest.approx(psnr(original, decoded), abs=1e-3)
    assert found["psnr"] > max(found["psnr_decoded_in_bf16"], found["psnr_encoded_in_bf16"]) - 0.2
    with pytest.raises(zoo.InputError, match="no image tokenizer"):
        precision.run("wavtokenizer-tiny", [path])


def test_photographs_beat_thumbnails_of_the_same_bits(tokenflow: zoo.Tokenizer, tmp_path: Path) -> None:
    paths = write_photographs(tmp_path)
    decoded = [(image.clamp(-1, 1) + 1) / 2 for image in tokenflow.reconstruct(paths)]
    originals = [(prepare_image(path, tokenflow.spec.image_size).pixels + 1) / 2 for path in paths]
    bits = tokenflow.spec.bits_per_item
    ours = [psnr(original, image) for original, image in zip(originals, decoded, strict=True)]
    rivals = [psnr(original, thumbnail(original, bits).image) for original in originals]
    assert sum(ours) > sum(rivals)


def test_more_scales_are_closer(tokenflow: zoo.Tokenizer, tmp_path: Path) -> None:
    path = write_photographs(tmp_path)[0]
    original = prepare_image(path, tokenflow.spec.image_size).pixels
    tokens = tokenflow.encode(path)
    errors = [(tokenflow.decode(tokens, scales=k)[0] - original).square().mean().item() for k in range(1, 6)]
    assert errors[-1] == min(errors) and errors[0] == max(errors)


def test_later_tokens_do_not_reach_earlier_ones(seed: zoo.Tokenizer) -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = seed.encode(images)
    assert tokens.lengths.tolist() == [32, 32]
    states, vectors = seed.causal_embedding(images), seed.embed(tokens)
    for first_changed in (1, 16, 31):
        other = copy.deepcopy(seed)
        queries = other.encoder.summary.qformer.queries
        queries[:, first_changed:] += torch.randn(queries[:, first_changed:].shape, generator=torch.Generator().manual_seed(1))
        found = other.causal_embedding(images)
        assert torch.allclose(found[:, :first_changed], states[:, :first_changed], atol=1e-5)
        assert not torch.allclose(found[:, first_changed:], states[:, first_changed:], atol=1e-2)
        assert torch.equal(other.encode(images).ids[:, :first_changed], tokens.ids[:, :first_changed])
        changed = tokens.ids.clone()
        changed[:, first_changed:] = (changed[:, first_changed:] + 1) % seed.spec.vocab_size
        assert torch.equal(seed.embed(changed)[:, :first_changed], vectors[:, :first_changed])


def test_a_probe_learns_what_is_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 6, generator=generator)
    labels = (features[:, 0] > 0).long() + 2 * (features[:, 3] > features[:, 1]).long()
    learned = probe.LinearProbe(features[:300], labels[:300], 4)
    assert learned.accuracy(features[300:], labels[300:]) > 0.9
    shuffled = probe.LinearProbe(features[:300], labels[:300].roll(1), 4)
    assert shuffled.accuracy(features[300:], labels[300:]) < 0.5


def test_results_are_written_with_their_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/zoo", "study", "x y"])
    write_result({"accuracy": 0.5}, tmp_path / "result.json")
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["command"] == "zoo study 'x y'" and written["accuracy"] == 0.5 and written["device"]
    assert json.loads(capsys.readouterr().out) == written


@pytest.mark.slow
def test_semantic_tokens_say_more_about_the_kind_of_scene() -> None:
    content = probe.run("tokenflow-tiny", 500, 300)
    for title in ("all kinds", "kinds that were not taught"):
        assert content[title]["semantic"] > content[title]["pixel"]
        assert content[title]["semantic"] > content[title]["most frequent"]


@pytest.mark.slow
def test_what_is_drawn_is_rather_of_the_same_kind() -> None:
    content = consistency.run("seed-tiny", 1500, 300)
    assert content["drawn as the original"] > content["drawn as another original"]

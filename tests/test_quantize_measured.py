"""The commands that measure quantized models say what they measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import soundfile
import torch
import torch.nn.functional as F

import zoo
from zoo import InputError
from zoo.bench import print_table
from zoo.bench import quantize as benchmark
from zoo.bench import search as search_benchmark
from zoo.eval.studies import quantize as evaluation
from zoo.media import write_bytes, write_image
from zoo.quantization.fp import finite
from zoo.weights.data import files as file_data


def test_the_benchmark_compares_all_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = benchmark.run(sizes=(128,), batches=(1, 70), repetitions=1, json_path=tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == content
    cases = {(row["contender"], row["case"]) for row in content["measurements"]}
    names = {"float32", "bfloat16", *benchmark.MEASURED, "fp4-e2m1, in tiles", "int8, 8-bit inputs"}
    assert {(name, case) for name in names for case in ("1 inputs", "70 inputs")} <= cases
    weights = content["weight_bytes"]
    assert weights["float32"] == 4 * 128 * 128
    assert weights["fp4-e2m1"] == 128 * 64 + 128 * 4
    assert weights["mxfp4"] == 128 * 64 + 128 * 4
    print_table(content)
    assert "fp6-e3m2" in capsys.readouterr().out


def test_every_contender_multiplies_the_same_weight() -> None:
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    found = benchmark.contenders(128, "cpu", peers=True)
    exact = found["float32"][1](x)
    for name, (_, product) in found.items():
        assert float((product(x).float() - exact).norm() / exact.norm()) < (0.2 if "4" in name else 0.1), name


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One method of each kind."""
    monkeypatch.setattr(evaluation, "NEAREST", ("int8",))
    monkeypatch.setattr(evaluation, "UNSEARCHED", ())
    monkeypatch.setattr(evaluation, "CALIBRATED", ("int8",))
    monkeypatch.setattr(evaluation, "LEARNED", ())


def test_the_evaluation_holds_decoders_against_float32(tmp_path: Path, few_rows: None) -> None:
    files = [str(tmp_path / f"{index}.wav") for index in range(2)]
    for index, file in enumerate(files):
        noise = torch.randn(6000, generator=torch.Generator().manual_seed(index))
        soundfile.write(file, (0.1 * noise).numpy(), 24_000)
    content = evaluation.run("wavtokenizer-tiny", files[:1], files[1:], iterations=1, json_path=tmp_path / "out.json")
    plain, nearest, calibrated = content["rows"]
    assert plain["snr"] == float("inf") and plain["mel_from_float32"] == 0
    assert nearest["snr"] > 20 and nearest["mel_from_float32"] > 0
    assert nearest["file_bytes"] < 0.6 * plain["file_bytes"]
    assert abs(nearest["packed_of_float32"] - 0.255) < 0.01
    assert (nearest["inputs"], calibrated["inputs"]) == ("float32", "static 8 bits")
    assert calibrated["snr"] != nearest["snr"]
    assert content["calibration"] == ["1.wav"] and (content["amount"], content["unit"]) == (0.25, "s of audio")
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == content["rows"]


def test_images_are_held_against_float32_and_the_originals(
    tmp_path: Path, few_rows: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluation, "NEAREST", ("mxfp4",))
    monkeypatch.setattr(evaluation, "CALIBRATED", ())
    files = []
    for index in range(3):
        coarse = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(index)) * 2 - 1
        files.append(write_image(tmp_path / f"{index}.png", F.interpolate(coarse, (150, 200), mode="bicubic")[0].clamp(-1, 1)))
    content = evaluation.run("tokenflow-tiny", files[:2], files[2:])
    plain, nearest = content["rows"]
    assert plain["psnr_from_float32"] == 100 and plain["snr"] == float("inf")
    tokenizer = zoo.load("tokenflow-tiny")
    tokens = tokenizer.encode([str(file) for file in files[:2]])
    quantized = zoo.load("tokenflow-tiny", quantize="mxfp4").decode(tokens)
    exact = [image.clamp(-1, 1) / 2 + 0.5 for image in tokenizer.decode(tokens)]
    squares = [(image.clamp(-1, 1) / 2 + 0.5 - other).square().mean() for image, other in zip(quantized, exact, strict=True)]
    assert nearest["psnr_from_float32"] == pytest.approx(float(-10 * torch.stack(squares).log10().mean()), abs=0.05)
    # Errors that have nothing to do with each other add up: those of the tokenizer are much larger.
    assert plain["psnr_from_original"] < nearest["psnr_from_float32"]
    assert content["unit"] == "images" and content["amount"] == 2
    monkeypatch.setenv("COLUMNS", "200")
    evaluation.print_table(content)
    assert "PSNR from original" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_files_are_classified(tmp_path: Path, few_rows: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "NEAREST", ("int8", "fp4-e3m0"))
    monkeypatch.setattr(evaluation, "LEARNED", ("fp4-e2m1",))
    files = []
    for label, extension, content in file_data.held_out(pictures=2):
        if extension == "wav":
            break
        files.append(write_bytes(tmp_path / label / f"{len(files)}.{extension}", content))
    files.append(write_bytes(tmp_path / "unknown" / "other.bin", bytes(range(256)) * 4))
    result = evaluation.run("byteformer-tiny", files[::2], files[1::6], iterations=4)
    plain, *rows = result["rows"]
    assert plain["agreement"] == 1 and plain["divergence"] == pytest.approx(0, abs=1e-6)
    tokenizer = zoo.load("byteformer-tiny")
    labels = [tokenizer.config.labels.index(file.parent.name) for file in files[::2] if file.parent.name != "unknown"]
    found = tokenizer.classify(tokenizer.encode([file for file in files[::2] if file.parent.name != "unknown"])).argmax(1)
    assert plain["accuracy"] == pytest.approx(float((found == torch.tensor(labels)).float().mean()))
    eight, four, calibrated, *learned = rows
    assert 0 < eight["divergence"] < four["divergence"] and eight["snr"] > four["snr"] + 10
    assert calibrated["inputs"] == "static 8 bits" and calibrated["divergence"] != eight["divergence"]
    assert [(row["rounding"], row["inputs"]) for row in learned] == [
        ("learned", "static 8 bits"),
        ("learned", "float32"),
        ("learned in blocks", "static 8 bits"),
        ("learned in blocks", "float32"),
    ]
    assert all(row["output_error_ratio"] < 1 for row in learned)
    assert result["unit"] == "files" and result["amount"] == len(files[::2])


def test_what_cannot_be_measured(few_rows: None) -> None:
    with pytest.raises(InputError, match="no measure of quantization for shape yet, only for image, audio, bytes"):
        evaluation.run("vat-tiny", ["a.glb"], ["b.glb"])
    with pytest.raises(InputError, match="no files to calibrate with"):
        evaluation.run("byteformer-tiny", ["a"], [])
    with pytest.raises(InputError, match="no files to measure on"):
        evaluation.run("byteformer-tiny", [], ["a"])


def test_full_passes_choose_what_the_search_chooses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = search_benchmark.run(side=80, json_path=tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == content
    assert (content["numbers"], content["candidates"], len(content["formats"])) == (6400, 111, 6)
    names, choices = [], set()
    for found in content["measurements"]:
        names.append(found["contender"])
        choices.add((found["format"], found["candidate"]))
        assert found["largest_difference"] < 1e-4
    assert names == ["search", "full passes", "full passes, exact exponents"]
    assert len(choices) == 1
    search_benchmark.print_table(content)
    assert "full passes" in capsys.readouterr().out
    x = torch.linspace(-7, 7, 2001).view(3, -1)
    rounded = search_benchmark.by_formula(x, finite(2, 1), torch.tensor(6.0))
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert torch.allclose((rounded.abs()[..., None] - table).abs().amin(-1), torch.zeros(()), atol=1e-5)
    assert float((rounded - x.clamp(-6, 6)).abs().max()) <= 1 + 1e-5

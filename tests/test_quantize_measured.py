"""The commands that measure quantized models say what they measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soundfile
import torch

from zoo import InputError
from zoo.bench import print_table
from zoo.bench import quantize as benchmark
from zoo.eval import quantize as evaluation


def test_the_benchmark_compares_all_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = benchmark.run(sizes=(64,), batches=(1, 70), repetitions=1, json_path=tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == content
    cases = {(row["contender"], row["case"]) for row in content["measurements"]}
    names = {"float32", "bfloat16", *benchmark.METHODS, "fp4-e2m1, in tiles", "int8, 8-bit inputs"}
    assert {(name, case) for name in names for case in ("1 inputs", "70 inputs")} <= cases
    weights = content["weight_bytes"]
    assert weights["float32"] == 4 * 64 * 64
    assert weights["fp4-e2m1"] == 64 * 32 + 64 * 4
    assert weights["mxfp4"] == 64 * 32 + 64 * 2
    print_table(content)
    assert "fp6-e3m2" in capsys.readouterr().out


def test_every_contender_multiplies_the_same_weight() -> None:
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    found = benchmark.contenders(64, "cpu", peers=True)
    exact = found["float32"][1](x)
    for name, (_, product) in found.items():
        assert float((product(x).float() - exact).norm() / exact.norm()) < (0.2 if "4" in name else 0.1), name


def test_the_evaluation_holds_decoders_against_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [str(tmp_path / f"{index}.wav") for index in range(2)]
    for index, file in enumerate(files):
        noise = torch.randn(6000, generator=torch.Generator().manual_seed(index))
        soundfile.write(file, (0.1 * noise).numpy(), 24_000)
    monkeypatch.setattr(evaluation, "NEAREST", ("int8",))
    monkeypatch.setattr(evaluation, "UNSEARCHED", ())
    monkeypatch.setattr(evaluation, "CALIBRATED", ("int8",))
    monkeypatch.setattr(evaluation, "LEARNED", ())
    content = evaluation.run("wavtokenizer-tiny", files[:1], files[1:], iterations=1, json_path=tmp_path / "out.json")
    plain, nearest, calibrated = content["rows"]
    assert plain["snr"] == float("inf") and plain["mel_from_float32"] == 0
    assert nearest["snr"] > 20 and nearest["mel_from_float32"] > 0
    assert nearest["file_bytes"] < 0.6 * plain["file_bytes"]
    assert abs(nearest["packed_of_float32"] - 0.255) < 0.01
    assert (nearest["inputs"], calibrated["inputs"]) == ("float32", "static 8 bits")
    assert calibrated["snr"] != nearest["snr"]
    assert content["calibration"] == ["1.wav"] and content["seconds"] == 0.25
    with pytest.raises(InputError, match="no audio tokenizer"):
        evaluation.run("byteformer-commands-wav", [], [])

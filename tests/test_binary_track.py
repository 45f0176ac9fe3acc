"""The binary track: summaries by their formulas, and every method trained, packed, scored and written down."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import InputError
from zoo.bench import binary as benchmark
from zoo.eval.studies import binary as track
from zoo.eval.studies.binary_tracks import TRACKS, FileTrack, SpeechTrack, Track


def test_summaries() -> None:
    assert track.quadratic_mean([3.0, 4.0]) == pytest.approx(math.sqrt(12.5))
    assert track.task_metric({"a": [0.5, 0.7], "b": [0.8]}) == pytest.approx(math.sqrt((0.36 + 0.64) / 2))
    assert track.architecture_metric({"conv": [1.0], "transformer": [0.5], "mlp": [0.5]}) == pytest.approx(math.sqrt(0.5))
    found = track.robustness_metric({"noise": 0.2, "blur": 0.3, "free": 0.0}, {"noise": 0.1, "blur": 0.3, "free": 0.5})
    assert found == pytest.approx(math.sqrt((4 + 1) / 2))
    assert track.robustness_metric({"noise": 0.2}, {"noise": -0.1}) is None
    assert track.training_metric([(2.0, 1.0)], [([1.0, 3.0], [1.0, 2.0])]) == pytest.approx(2.0)
    assert track.compression(100.0, 96.0) == pytest.approx(100 / 7)
    assert track.speedup(100.0, 64.0) == pytest.approx(100 / 37)
    assert track.complexity_metric([3.0], [4.0]) == pytest.approx(math.sqrt(12.5))
    assert track.inference_metric([(2.0, 1.0)], [(9.0, 3.0), (3.0, 3.0)]) == pytest.approx(2.0)
    with pytest.raises(InputError, match="no values"):
        track.quadratic_mean([])


class Toy(Track):
    """Two layers, of which the first becomes binary."""

    metric = "agreement"
    corruptions = ("noise",)
    part = "inner"

    def __init__(self, name: str, seed: int) -> None:
        self.seed = seed
        torch.manual_seed(0)
        layers = {"inner": nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)), "outer": nn.Linear(64, 4)}
        self.teacher = nn.ModuleDict(layers).eval()
        self.x = torch.randn(200, 64)

    def run(self, model: Any, x: Tensor) -> Tensor:
        return model["outer"](model["inner"](x))

    def loss(self, student: Any, generator: torch.Generator) -> Tensor:
        x = torch.randn(32, 64, generator=generator)
        with torch.no_grad():
            wanted = self.run(self.teacher, x)
        return F.mse_loss(self.run(student, x), wanted)

    def score(self, model: Any, corruption: str | None = None) -> float:
        noise = torch.randn(self.x.shape, generator=torch.Generator().manual_seed(self.seed))
        x = self.x + noise if corruption else self.x
        same = self.run(model, x).argmax(1) == self.run(self.teacher, self.x).argmax(1)
        return float(same.float().mean())

    def work(self, model: Any) -> Callable[[], Any]:
        return lambda: self.run(model, self.x)

    def running(self, model: Any) -> Sequence[nn.Module]:
        return model["inner"], model["outer"]


def test_every_method_is_trained_packed_and_written_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TRACKS, "wavtokenizer", Toy)
    monkeypatch.setattr(benchmark, "_MILLISECONDS", 1)
    path = tmp_path / "track.json"
    content = track.run("wavtokenizer-tiny", steps=40, json_path=path)
    assert json.loads(path.read_text()) == content
    assert list(content["methods"]) == [track.FULL, *track.OPERATORS]
    theory = content["complexity"]
    assert (theory["binary_parameters"], theory["binary_operations"]) == (64 * 64, 2 * 200 * 64 * 64)
    assert theory["parameters"] == 64 * 64 + 64 + 2 * 64 + 4 * 64 + 4
    assert theory["operations"] == 2 * 200 * (64 * 64 + 64 * 4)

    rows = track.summary(content)
    assert rows[track.FULL] == {
        "score": 1.0,
        "relative": 1.0,
        "corrupted": content["methods"][track.FULL]["corrupted"]["noise"],
        "robustness": pytest.approx(1.0),
        "latency": 1.0,
        "storage": 1.0,
        "ms_per_step": None,
    }
    for method in track.OPERATORS:
        assert rows[method]["score"] > 0.4, method  # a quarter by chance
        assert rows[method]["storage"] > 4

    # What is there is not made again, and other settings start anew.
    monkeypatch.setattr(track, "_evaluate", None)
    assert track.run("wavtokenizer-tiny", steps=40, json_path=path) == content
    with pytest.raises(TypeError):
        track.run("wavtokenizer-tiny", steps=41, json_path=path)
    track.main("wavtokenizer-tiny", steps=40, out=path)
    assert "bireal" in capsys.readouterr().out


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="no binary track for flextok"):
        track.run("flextok-d12-d12-in1k")
    with pytest.raises(InputError, match="known: bnn"):
        track.run("wavtokenizer-tiny", methods=["ternary"])


def test_corruptions_of_speech_are_what_they_are_called() -> None:
    subject = SpeechTrack.__new__(SpeechTrack)
    subject.seed = 0
    subject.teacher = type("Teacher", (), {"spec": type("Spec", (), {"sample_rate": 24_000})})
    time = torch.arange(24_000) / 24_000
    tone = 0.5 * torch.sin(2 * math.pi * 440 * time)[None]
    noise = subject._corrupt(tone, "noise at 10 dB") - tone
    assert 10 * math.log10(float(tone.square().mean() / noise.square().mean())) == pytest.approx(10, abs=0.2)
    assert float(subject._corrupt(tone, "clipping").abs().max()) == pytest.approx(0.1, abs=1e-3)
    high = torch.sin(2 * math.pi * 9_000 * time)[None]
    assert float(subject._corrupt(high, "low-pass at 2 kHz").abs().mean()) < 0.1 * float(high.abs().mean())
    lost = (subject._corrupt(tone, "dropouts") == 0).float().mean()
    assert 0.02 < float(lost) < 0.25
    for corruption in (None, *SpeechTrack.corruptions):
        assert torch.equal(subject._corrupt(tone, corruption), subject._corrupt(tone, corruption))


def test_corruptions_of_files_are_what_they_are_called() -> None:
    subject = FileTrack.__new__(FileTrack)
    subject.seed = 0
    content = bytes(range(256)) * 40
    assert subject._corrupt(content, 0, None) == content
    changed = subject._corrupt(content, 0, "5 % of the bytes at random")
    share = sum(a != b for a, b in zip(content, changed, strict=True)) / len(content)
    assert share == pytest.approx(0.05, abs=0.01)
    assert len(subject._corrupt(content, 0, "5 % of the bytes lost")) == pytest.approx(0.95 * len(content), rel=0.01)
    noisy = subject._corrupt(content, 0, "noise of 8 levels")
    steps = [(b - a + 128) % 256 - 128 for a, b in zip(content, noisy, strict=True)]
    assert math.sqrt(sum(step * step for step in steps) / len(steps)) == pytest.approx(8, rel=0.05)


def test_the_benchmark_measures_every_contender(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(benchmark, "_MILLISECONDS", 0)
    monkeypatch.setattr(benchmark, "_PARTS", 1)
    monkeypatch.setattr(
        benchmark, "_layers", lambda: [("linear", nn.Linear(8, 8), (4, 8)), ("conv", nn.Conv2d(8, 8, 3), (1, 8, 4, 4))]
    )
    content = benchmark.run(widths=[64], rows=[1, 70], json_path=tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text()) == content
    ways = {found["contender"] for found in content["products"]}
    assert {"float32", "bfloat16", "packed, int8"} <= ways
    assert {found["contender"] for found in content["layers"]} == {"full precision", "packed"}
    assert {found["method"] for found in content["training"]} == {"full precision", *track.OPERATORS}
    for contender, work in benchmark.products(64, 3, "cpu"):
        if contender.startswith("packed"):
            torch.manual_seed(0)
            generator = torch.Generator().manual_seed(0)
            weight, x = (torch.randn(count, 64, generator=generator) for count in (64, 3))
            assert torch.equal(work().float(), x.sign() @ weight.sign().T)

"""Every audio metric against a known answer, and a run that loses nothing when it is interrupted."""

from __future__ import annotations

import json
import math
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import torch
from torch import Tensor
from typer.testing import CliRunner

import zoo
from small_models import small_wavtokenizer
from zoo.cli import app
from zoo.eval import reconstruct
from zoo.eval.journal import PART_FILE, RunJournal
from zoo.eval.modality import audio
from zoo.eval.modality import base as modality
from zoo.eval.tokens import position_entropy, usage_statistics

RATE = 24_000


def tone(frequency: float, seconds: float = 1.0) -> Tensor:
    """A voice-like tone with ten harmonics."""
    time = torch.arange(round(seconds * RATE)) / RATE
    return sum(torch.sin(2 * math.pi * frequency * k * time) / k for k in range(1, 11)) * 0.2  # type: ignore[return-value]


def speech_like(seconds: float = 2.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    syllables = (torch.sin(torch.arange(round(seconds * RATE)) / RATE * 2 * math.pi * 4) + 1.1) / 2
    return (tone(140, seconds) + 0.05 * torch.randn(round(seconds * RATE), generator=generator)) * syllables


# ----------------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("decibels", [0, 10, 30])
def test_si_sdr_of_known_noise(decibels: int) -> None:
    signal = torch.sin(torch.arange(RATE) / 10)
    noise = torch.cos(torch.arange(RATE) / 10) * 10 ** (-decibels / 20)
    assert audio.si_sdr(signal, 3 * (signal + noise), RATE) == pytest.approx(decibels, abs=0.05)


def test_distances_vanish_for_equal_signals_and_grow_with_noise() -> None:
    signal = speech_like()
    noise = torch.randn(len(signal), generator=torch.Generator().manual_seed(1))
    for measure in (audio.log_mel_l1, audio.stft_distance):
        steps = [measure(signal, signal + level * noise, RATE) for level in (0, 0.01, 0.1, 1)]
        assert steps[0] == pytest.approx(0, abs=1e-6)
        assert steps == sorted(steps)
    assert audio.log_mel_l1(signal, signal * math.e, RATE) == pytest.approx(1, abs=0.02), "a factor e is one neper"


def test_stoi() -> None:
    signal = speech_like()
    noise = torch.randn(len(signal), generator=torch.Generator().manual_seed(1))
    assert audio.stoi(signal, signal, RATE) == pytest.approx(1, abs=1e-6)
    assert audio.stoi(signal, noise, RATE) < 0.3
    assert audio.stoi(signal[:1_000], signal[:1_000], RATE) is None


@pytest.mark.parametrize("frequency", [60, 98.7, 220, 431, 540])
def test_pitch_of_tones(frequency: float) -> None:
    found, voiced = audio.pitch(tone(frequency), RATE)
    assert voiced.float().mean() > 0.9
    assert found[voiced].median().item() == pytest.approx(frequency, rel=0.003)


def test_f0_rmse_is_the_interval_in_cents() -> None:
    assert audio.f0_rmse(tone(200), tone(200 * 2 ** (1 / 12)), RATE) == pytest.approx(100, abs=6)
    assert audio.f0_rmse(tone(200), tone(200), RATE) == 0
    assert audio.f0_rmse(tone(200), torch.zeros(RATE), RATE) is None


def test_voicing_f1() -> None:
    half = torch.cat([tone(200, 0.5), torch.zeros(RATE // 2)])
    assert audio.voicing_f1(tone(200), tone(150), RATE) == pytest.approx(1, abs=0.02)
    assert audio.voicing_f1(tone(200), half, RATE) == pytest.approx(2 / 3, abs=0.05)
    assert audio.voicing_f1(torch.zeros(RATE), tone(200), RATE) is None
    assert not audio.pitch(torch.randn(RATE, generator=torch.Generator().manual_seed(0)), RATE)[1].float().mean() > 0.1


@pytest.mark.skipif(find_spec("pesq") is None, reason="the pesq extra is not installed")
def test_pesq_of_equal_signals() -> None:
    assert audio.pesq(speech_like(), speech_like(), RATE) == pytest.approx(4.64, abs=0.01)


def test_mu_law_baseline_has_the_bandwidth_of_its_bits() -> None:
    low = torch.sin(2 * math.pi * 100 * torch.arange(RATE) / RATE)
    high = torch.sin(2 * math.pi * 3_000 * torch.arange(RATE) / RATE)
    assert audio.si_sdr(low, audio.mu_law_baseline(low, RATE, 8 * 1_000), RATE) > 25
    assert audio.mu_law_baseline(high, RATE, 8 * 1_000).square().mean() < 0.01 * high.square().mean()


def test_usage_statistics() -> None:
    even = usage_statistics(np.full(64, 5), {"second": 75.0})
    assert (even["used"], even["entropy_bits"], even["perplexity"]) == (1, 6, 64)
    assert (even["bits_per_second"], even["entropy_bits_per_second"]) == (450, 450)
    single = usage_statistics(np.bincount([3, 3, 3], minlength=64), {})
    assert (single["used"], single["entropy_bits"], single["perplexity"]) == (1 / 64, 0, 1)
    assert "bits_per_second" not in single


def test_position_entropy() -> None:
    assert position_entropy([[0, 1, 5], [0, 2, 5], [0, 3, 6], [0, 4, 6]]) == [0, 2, 1]
    assert position_entropy([[0, 1], [0]]) is None, "items of different lengths have no common positions"
    assert position_entropy([[0, 1]]) is None


# -------------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(4):
        path = tmp_path / "data" / f"item-{index}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, speech_like(0.6 + 0.1 * index, index).numpy() * 0.3, RATE)
    return tmp_path / "data"


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without the page, whose plots take longer than small items do."""
    monkeypatch.setattr("zoo.eval.report.html.write", lambda *arguments: None)


def run(folder: Path, **options: object) -> dict[str, object]:
    settings = {"metrics": ["log_mel_l1", "si_sdr", "voicing_f1"], "progress": False}
    return reconstruct.run(small_wavtokenizer(), folder, folder.parent / "report", **(settings | options))


def test_report(folder: Path) -> None:
    (folder / "broken.wav").write_bytes(b"not audio")
    summary = run(folder, command="how it was run")
    out = folder.parent / "report"
    assert (summary["items"], summary["failed"]) == (5, 1)
    assert "is not an audio file" in next(iter(summary["errors"].values()))
    assert summary["metrics"]["log_mel_l1"]["ours"]["n"] == 4
    assert json.loads((out / "metrics.json").read_text()) == summary
    rows = pyarrow.parquet.read_table(out / "items.parquet").to_pylist()
    assert [row["error"] is None for row in rows] == [False, True, True, True, True]
    html = (out / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", html), "the report must need nothing else"
    assert html.count("<audio") == 8
    assert "how it was run" in html
    assert "item-3.wav" in html
    assert summary["baseline"].startswith("8-bit µ-law")
    assert summary["curve"] == []
    assert 'type="range"' not in html
    assert sorted(path.name for path in out.iterdir()) == ["items.parquet", "metrics.json", "report.html"]


def test_interrupted_run_goes_on_where_it_stopped(folder: Path, no_report: None, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    measure = reconstruct._measure

    def interrupted(*arguments: object) -> object:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(str(arguments[1]))
        return measure(*arguments)

    monkeypatch.setattr(reconstruct, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    with (folder.parent / "report" / PART_FILE).open("a") as part:
        part.write('{"file": "cut o')
    soundfile.write(folder / "item-0.wav", speech_like(0.9, 9).numpy() * 0.3, RATE)  # changed since it was measured

    again: list[str] = []
    monkeypatch.setattr(reconstruct, "_measure", lambda *a: (again.append(Path(a[1]).name), measure(*a))[1])
    assert run(folder)["items"] == 4
    assert again == ["item-0.wav", "item-2.wav", "item-3.wav"]


def test_other_settings_start_afresh(folder: Path, no_report: None) -> None:
    out = folder.parent / "report"
    out.mkdir()
    (out / PART_FILE).write_text('{"fingerprint": "another"}\n{"file": "x"}\n')
    assert run(folder, limit=1)["items"] == 1


def test_journal_keeps_the_features_of_each_item(tmp_path: Path) -> None:
    first, second = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((4, 3), np.float32)
    journal = RunJournal(tmp_path, {"metrics": ["rfid"]}, resume=True)
    journal.append({"file": "a"}, {"rfid": first})
    (tmp_path / "items.part.rfid.f32").open("ab").write(b"cut o")  # a process that died while it wrote
    journal = RunJournal(tmp_path, {"metrics": ["rfid"]}, resume=True)
    journal.append({"file": "b"}, {"rfid": second})
    assert np.array_equal(journal.features("rfid", journal.rows["a"]), first)
    assert np.array_equal(journal.features("rfid", journal.rows["b"]), second)
    assert not RunJournal(tmp_path, {"metrics": []}, resume=True).rows
    journal.remove()
    assert not list(tmp_path.iterdir())


def test_utmos_is_skipped_or_brought(folder: Path, no_report: None, tmp_path: Path) -> None:
    assert "--network utmos=PATH takes a TorchScript file" in run(folder, metrics=["utmos"])["skipped"]["utmos"]
    brought = {"utmos": lambda reference, estimate, rate: float(len(estimate) / rate)}
    summary = run(folder, metrics=["utmos"], networks=brought)
    assert summary["metrics"]["utmos"]["ours"]["mean"] == pytest.approx(0.75)

    class Loudness(torch.nn.Module):
        def forward(self, audio: Tensor) -> Tensor:
            return audio.square().mean(1) * 0 + audio.shape[1]

    torch.jit.script(Loudness()).save(str(tmp_path / "utmos.pt"))
    summary = run(folder, metrics=["utmos"], networks={"utmos": tmp_path / "utmos.pt"})
    assert summary["metrics"]["utmos"]["ours"]["mean"] == pytest.approx(0.75 * 16_000, abs=1)
    with pytest.raises(zoo.WeightsError, match="not a TorchScript file"):
        run(folder, metrics=["utmos"], networks={"utmos": folder / "item-0.wav"})


def test_what_cannot_be_run(folder: Path, no_report: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(zoo.InputError, match="unknown metric 'beauty'"):
        run(folder, metrics=["beauty"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(zoo.InputError, match="no such file"):
        run(tmp_path / "empty")
    with pytest.raises(zoo.InputError, match="'stoi' takes no network; utmos, speaker do"):
        run(folder, networks={"stoi": "stoi.pt"})
    with pytest.raises(zoo.InputError, match="takes no steps to decode"):
        run(folder, decode={"steps": 3})
    with pytest.raises(zoo.InputError, match="its tokens are not ordered"):
        run(folder, prefixes=[1])
    monkeypatch.setattr(modality, "find_spec", lambda package: None)
    assert 'pip install "tokenizer-zoo[eval]"' in run(folder, metrics=None)["skipped"]["stoi"]
    monkeypatch.setattr(reconstruct, "find_spec", lambda package: None)
    with pytest.raises(zoo.MissingExtraError, match=r'pip install "tokenizer-zoo\[eval\]"'):
        run(folder)


def test_command_line(folder: Path, tmp_path: Path) -> None:
    saved = small_wavtokenizer().save_pretrained(tmp_path / "model")
    arguments = [
        f"local-dir:{saved}",
        "--data",
        str(folder),
        "--out",
        str(tmp_path / "r"),
        "--metrics",
        "si_sdr",
        "--limit",
        "2",
    ]
    done = CliRunner().invoke(app, ["eval", *arguments])
    assert done.exit_code == 0 and "report.html" in done.output

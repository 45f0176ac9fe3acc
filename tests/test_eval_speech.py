"""Evaluation of speech whose tokens hold no voice: each item in its own, and tokens counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from torch import Tensor

import zoo
from small_models_vectok import noise, small_vectok
from zoo.eval import reconstruct
from zoo.eval.modality import audio
from zoo.eval.studies import voices
from zoo.media import read_audio

pytest.importorskip("jinja2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, samples in enumerate((24_000, 40_000)):
        soundfile.write(tmp_path / f"{number}.wav", noise(samples, number).numpy(), 16_000)
    return tmp_path


def run(folder: Path, **options: Any) -> dict[str, Any]:
    return reconstruct.run(
        small_vectok(), folder, folder / "out", metrics=["log_mel_l1"], progress=False, resume=False, **options
    )


def test_tokens_are_counted_and_voices_are_the_items_own(folder: Path) -> None:
    summary, tokenizer = run(folder), small_vectok()
    waveforms = [read_audio(folder / f"{number}.wav").waveform for number in (0, 1)]
    tokens = tokenizer.encode(waveforms)
    rate = int(tokens.lengths.sum()) / 4
    assert summary["tokens"]["bits_per_second"] == pytest.approx(rate * tokenizer.spec.bits_per_token)
    own = [
        audio.log_mel_l1(waveform[0], decoded[0], 16_000)
        for waveform, decoded in zip(waveforms, tokenizer.reconstruct(waveforms), strict=True)
    ]
    assert summary["metrics"]["log_mel_l1"]["ours"]["mean"] == pytest.approx(sum(own) / 2, rel=1e-4)
    assert "tokens per second" in (folder / "out" / "report.html").read_text(encoding="utf-8")


def test_a_given_voice_is_for_all(folder: Path) -> None:
    own, given = run(folder), run(folder, decode={"prompt": "high"})
    assert given["options"]["decode"]["prompt"] == "high"
    assert given["metrics"]["log_mel_l1"]["ours"]["mean"] != own["metrics"]["log_mel_l1"]["ours"]["mean"]


def test_speaker_similarity_by_a_given_network(folder: Path) -> None:
    class Loudness(torch.nn.Module):
        def forward(self, audio: Tensor) -> Tensor:
            return torch.stack([audio.square().mean(1), audio.abs().mean(1)], dim=1)

    torch.jit.script(Loudness()).save(str(folder / "speaker.pt"))
    similarity = audio.METRICS["speaker"].network
    assert similarity is not None
    function = similarity.load(folder / "speaker.pt", torch.device("cpu"), False)
    one, other = noise(16_000, 1), noise(16_000, 1) * 3
    expected = torch.nn.functional.cosine_similarity(*(Loudness()(signal[None]) for signal in (one, other)))
    assert function(one, one, 16_000) == pytest.approx(1)
    assert function(one, other, 16_000) == pytest.approx(float(expected), abs=1e-5)
    assert function(one[:5_000], other[:5_000], 16_000) is None


def test_voices_matter_as_much_as_they_are_said_to(folder: Path) -> None:
    """Every figure of the report on voices, computed again by hand."""
    for name, samples, seed in (("x-1", 20_000, 5), ("x-2", 24_000, 6), ("y-1", 22_000, 7), ("y-2", 26_000, 8)):
        soundfile.write(folder / f"{name}.wav", noise(samples, seed).numpy() * (1 + (name[0] == "y")), 16_000, subtype="FLOAT")
    speakers = voices.speakers_in(sorted(folder.glob("?-?.wav")))
    assert {name: [path.stem for path in own] for name, own in speakers.items()} == {"x": ["x-1", "x-2"], "y": ["y-1", "y-2"]}
    tokenizer = small_vectok()
    found = voices.measure(tokenizer, speakers)

    paths = [path for own in speakers.values() for path in own]
    waveforms = [read_audio(path).waveform for path in paths]
    tokens = tokenizer.encode(waveforms)
    for kind, prompts in (("same", [paths[i] for i in (1, 0, 3, 2)]), ("other", [paths[i] for i in (2, 3, 0, 1)])):
        decoded = tokenizer.decode(tokens, prompt=prompts)
        distances = [
            audio.log_mel_l1(*pair, 16_000) for pair in zip(*((w[0] for w in m) for m in (waveforms, decoded)), strict=True)
        ]
        assert found[kind]["log_mel_l1"] == pytest.approx(sum(distances) / 4, rel=1e-4)
    assert found["own"]["log_mel_l1"] not in (found["same"]["log_mel_l1"], found["other"]["log_mel_l1"])
    seconds = sum(waveform.shape[1] for waveform in waveforms) / 16_000
    assert found["seconds"] == pytest.approx(seconds)
    assert found["tokens_per_second"] == pytest.approx(int(tokens.lengths.sum()) / seconds)
    assert found["bits_per_second"] == pytest.approx(found["tokens_per_second"] * tokenizer.spec.bits_per_token)
    assert {found[kind]["arrived"] * 4 % 1 for kind in ("tokens", "knn")} == {0}
    with pytest.raises(zoo.InputError, match="two speakers"):
        voices.speakers_in(paths[:3])

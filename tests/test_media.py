"""Reading and writing audio."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

import zoo
from zoo import media


def tone(samples: int, rate: int) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * 440 * np.arange(samples) / rate)).astype(np.float32)


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_formats(extension: str, tmp_path: Path) -> None:
    path = tmp_path / f"tone.{extension}"
    soundfile.write(path, tone(24_000, 24_000), 24_000)
    for source in (path, str(path), path.read_bytes()):
        audio = media.read_audio(source)
        assert audio.sample_rate == 24_000
        assert abs(audio.waveform.shape[1] - 24_000) < 2_000  # MP3 pads its frames
        assert 0.2 < audio.waveform.abs().max() < 0.5


@pytest.mark.parametrize(
    ("rate", "new_rate"), [(44_100, 24_000), (8_000, 24_000), (48_000, 16_000), (24_000, 22_050), (11_025, 24_000)]
)
@pytest.mark.parametrize("piece", [1_000, 7_777, 10**6])
def test_streamed_resampling_equals_whole(rate: int, new_rate: int, piece: int) -> None:
    audio = torch.randn(2, 30_001, generator=torch.Generator().manual_seed(0))
    whole = torchaudio.transforms.Resample(rate, new_rate)(audio)
    resampler = media.Resampler(rate, new_rate)
    streamed = torch.cat([*(resampler.push(part) for part in audio.split(piece, dim=1)), resampler.finish()], dim=1)
    assert streamed.shape == whole.shape == (2, media.resampled_length(30_001, rate, new_rate))
    assert (streamed - whole).abs().max() < 1e-6


def test_long_files_are_read_block_by_block(tmp_path: Path) -> None:
    samples = np.stack([tone(1_000_000, 44_100), tone(1_000_000, 44_100) / 2], axis=1)
    soundfile.write(tmp_path / "long.wav", samples, 44_100, subtype="FLOAT")
    audio = media.read_audio(tmp_path / "long.wav", sample_rate=24_000, mono=True)
    whole = torchaudio.transforms.Resample(44_100, 24_000)(torch.from_numpy(samples.mean(1))[None])
    assert (audio.waveform - whole).abs().max() < 1e-6
    assert (audio.original_samples, audio.original_rate) == (1_000_000, 44_100)


def test_truncated_wav_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "tone.wav", tone(24_000, 24_000), 24_000)
    content = (tmp_path / "tone.wav").read_bytes()
    for source in (content[: len(content) // 2], content[:60]):
        with pytest.raises(zoo.InputError, match="truncated"):
            media.read_audio(source)


def test_damaged_flac_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "noise.flac", np.random.default_rng(0).uniform(-0.5, 0.5, 48_000), 24_000)
    content = (tmp_path / "noise.flac").read_bytes()
    with pytest.raises(zoo.InputError, match=r"truncated|damaged"):
        media.read_audio(content[: len(content) // 2])


def test_written_audio_is_clipped_and_complete(tmp_path: Path) -> None:
    path = media.write_audio(tmp_path / "new" / "loud.wav", torch.tensor([[2.0, -2.0, 0.5]]), 24_000)
    samples, rate = soundfile.read(path)
    assert rate == 24_000
    assert samples == pytest.approx([1, -1, 0.5], abs=1e-4)
    assert [p.name for p in path.parent.iterdir()] == ["loud.wav"]
    with pytest.raises(zoo.InputError, match=r"\.xyz"):
        media.write_audio(tmp_path / "a.xyz", torch.zeros(1, 3), 24_000)


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "keep").write_text("old")
    with pytest.raises(RuntimeError), media.replacing(tmp_path / "keep") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["keep"]
    assert (tmp_path / "keep").read_text() == "old"


def test_paths_folders_and_patterns(tmp_path: Path) -> None:
    for name in ("b.wav", "a.flac", "sub/c.WAV", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = media.expand_paths([tmp_path, str(tmp_path / "*.wav"), tmp_path / "notes.txt"], media.AUDIO_EXTENSIONS)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.flac", "b.wav", "sub/c.WAV", "notes.txt"]
    with pytest.raises(zoo.InputError, match=r"nothing-here"):
        media.expand_paths([tmp_path / "nothing-here*"], media.AUDIO_EXTENSIONS)

"""Recordings of any length in bounded memory. At full size they are slow: run with ``make test-slow``."""

from __future__ import annotations

import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import zoo
from zoo import media
from zoo.bench import peak_memory
from zoo.codecs.wavtokenizer import WavTokenizer, WavTokenizerConfig
from zoo.tokenizer import audio, recordings

RATE = 24_000
HOUR = 3_600


@cache
def full_size() -> WavTokenizer:
    """The official 75-token architecture with random weights."""
    torch.manual_seed(0)
    tokenizer = WavTokenizer(WavTokenizerConfig()).eval().requires_grad_(False)
    tokenizer.codebook.embed.normal_()
    tokenizer.reconstruct(torch.zeros(RATE))
    return tokenizer


def noise_file(path: Path, seconds: int, rate: int, channels: int = 1) -> Path:
    """Noise written a second at a time, so that the test itself needs no memory."""
    rng = np.random.default_rng(0)
    with soundfile.SoundFile(path, "w", rate, channels) as file:
        for _ in range(seconds):
            file.write((rng.standard_normal((rate, channels)) * 0.1).astype(np.float32))
    return path


@pytest.mark.slow
def test_an_hour_of_audio_encodes_in_less_than_a_gigabyte(tmp_path: Path) -> None:
    tokenizer, path = full_size(), noise_file(tmp_path / "hour.wav", HOUR, RATE)
    with peak_memory("cpu") as peak:
        tokens = tokenizer.encode(path)
    print(f"\nencode, one hour: +{peak[0] / 2**20:.0f} MiB")
    assert tokens.lengths.tolist() == [HOUR * 75]
    # The features of all frames, 512 numbers for each, are what remains until they are quantized.
    assert peak[0] < 1_000_000_000


@pytest.mark.slow
def test_three_minutes_decode_in_less_than_half_a_gigabyte() -> None:
    tokenizer = full_size()
    ids = torch.randint(4096, (1, 180 * 75), generator=torch.Generator().manual_seed(0))
    with peak_memory("cpu") as peak:
        [audio] = tokenizer.decode(ids)
    print(f"\ndecode, three minutes: +{peak[0] / 1e6:.0f} MB")
    assert audio.shape == (1, 180 * RATE)
    assert peak[0] < 500_000_000


# ---- streams


@pytest.mark.parametrize(("rate", "channels"), [(RATE, 1), (44_100, 2), (22_254, 1)])
def test_blocks_are_what_is_read_at_once(rate: int, channels: int, tmp_path: Path) -> None:
    path = noise_file(tmp_path / "noise.wav", 45, rate, channels)
    for source in (path, path.read_bytes()):
        for mono in (True, False):
            stream = media.stream_audio(source, sample_rate=RATE, mono=mono)
            blocks = list(stream)
            read = media.read_audio(source, sample_rate=RATE, mono=mono)
            assert torch.equal(torch.cat(blocks, dim=1), read.waveform)
            assert (stream.samples, stream.sample_rate) == (read.waveform.shape[1], read.sample_rate)
            assert (stream.original_samples, stream.original_rate) == (read.original_samples, read.original_rate)
            assert len(blocks) > 1
    assert media.stream_audio(path).read(45 * rate - 1) is None


def short_hold(monkeypatch: pytest.MonkeyPatch, samples: int) -> None:
    monkeypatch.setattr(audio, "MOST_HELD", samples)


def test_long_files_are_read_while_they_are_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = zoo.load("wavtokenizer-tiny")
    paths = [noise_file(tmp_path / f"{i}.wav", seconds, 16_000, 2) for i, seconds in enumerate((2, 1, 5))]
    items = [*paths, paths[0].read_bytes(), torch.randn(3 * RATE, generator=torch.Generator().manual_seed(0)) * 0.1]
    whole = tokenizer.encode(items)
    short_hold(monkeypatch, 3 * RATE // 2)
    prepared = tokenizer.prepare(items)
    in_files = [isinstance(item.tensors, recordings.RecordingInFile) for item in prepared]
    assert in_files == [True, False, True, True, False]
    assert tokenizer.encode(items).equal(whole)
    # What travels takes its samples along.
    sent = pickle.dumps(prepared)
    for path in paths:
        path.unlink()
    arrived = pickle.loads(sent)
    assert all(list(item.tensors) == ["waveform"] and item.tensors["waveform"].shape == (1, item.amount) for item in arrived)
    assert tokenizer.encode_prepared(arrived).equal(whole)
    with pytest.raises(zoo.ItemError, match=r"item 2: .*2\.wav does not exist"):
        tokenizer.encode_prepared(prepared)


@pytest.mark.parametrize("seconds", [2, 4])
def test_a_file_that_changed_in_between_is_refused(seconds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = zoo.load("wavtokenizer-tiny")
    short_hold(monkeypatch, 3 * RATE // 2)
    path = noise_file(tmp_path / "a.wav", 3, RATE)
    prepared = tokenizer.prepare([torch.zeros(100), path])
    noise_file(path, seconds, RATE)
    with pytest.raises(zoo.ItemError, match=r"item 1: .*a\.wav has changed since it was prepared"):
        tokenizer.encode_prepared(prepared)


MEASURED = """
import resource, sys, torch, zoo
from zoo.tokenizer.recordings import ForwardReader
torch.set_num_threads(1)
tok = zoo.load("wavtokenizer-tiny")
tok.encode(torch.zeros(12 * 24_000))

def read(path):
    [item] = tok.prepare(path)
    reader = ForwardReader(item, 0)
    return sum(reader.part(start, start + 128_000).shape[1] for start in range(0, len(reader), 128_000)) / tok.spec.hop_length

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
frames = read(sys.argv[2]) if sys.argv[1] == "read" else tok.encode(sys.argv[2]).lengths.item()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, int(frames))
"""


@pytest.mark.parametrize(
    ("action", "seconds"),
    [
        ("read", 1_200),
        pytest.param("encode", 600, marks=pytest.mark.slow),
        pytest.param("encode", HOUR, marks=pytest.mark.slow),
    ],
)
def test_memory_does_not_grow_with_a_file(action: str, seconds: int, tmp_path: Path) -> None:
    path = noise_file(tmp_path / "long.wav", seconds, RATE)
    done = subprocess.run([sys.executable, "-c", MEASURED, action, str(path)], capture_output=True, text=True, check=True)
    extra, frames = map(int, done.stdout.split())
    assert frames == seconds * 75
    assert extra * (1 if sys.platform == "darwin" else 1024) < 80_000_000

"""Recordings of any length in bounded memory, at full size. Slow: run with ``make test-slow``."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from zoo.bench import peak_memory
from zoo.codecs.wavtokenizer import WavTokenizer, WavTokenizerConfig

pytestmark = pytest.mark.slow

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


def test_an_hour_of_audio_encodes_in_less_than_a_gibibyte(tmp_path: Path) -> None:
    tokenizer, path = full_size(), noise_file(tmp_path / "hour.wav", HOUR, RATE)
    with peak_memory("cpu") as peak:
        tokens = tokenizer.encode(path)
    print(f"\nencode, one hour: +{peak[0] / 2**20:.0f} MiB")
    assert tokens.lengths.tolist() == [HOUR * 75]
    assert peak[0] < 2**30


def test_three_minutes_decode_in_less_than_half_a_gigabyte() -> None:
    tokenizer = full_size()
    ids = torch.randint(4096, (1, 180 * 75), generator=torch.Generator().manual_seed(0))
    with peak_memory("cpu") as peak:
        [audio] = tokenizer.decode(ids)
    print(f"\ndecode, three minutes: +{peak[0] / 1e6:.0f} MB")
    assert audio.shape == (1, 180 * RATE)
    assert peak[0] < 500_000_000

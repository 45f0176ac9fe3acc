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
#: Samples of a frame of ids.
HOPS = {"wavtokenizer-tiny": 320, "wavtokenizer-small-75": 320, "snac-24khz": 2_048, "s3tokenizer-v2-25hz": 640}


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


@pytest.mark.parametrize("name", ["wavtokenizer-tiny", "snac-tiny"])
def test_long_files_are_read_while_they_are_encoded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = zoo.load(name)
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


# Outside of pytest, where the checks of types look into what is prepared, and so would read a whole recording.
MEASURED = """
import sys, torch, zoo
from zoo.bench.measure import peak_memory, random_model
from zoo.tokenizer.recordings import ForwardReader
torch.set_num_threads(1)
name, action, path = sys.argv[1:]
tok = zoo.load(name) if name.endswith("-tiny") else random_model(zoo.info(name), "cpu")
rate, hop = tok.spec.sample_rate, tok.spec.hop_length
tok.encode(torch.zeros(35 * rate))

def read(path):
    [item] = tok.prepare(path)
    reader = ForwardReader(item, 0)
    return sum(reader.part(start, start + 128_000).shape[1] for start in range(0, len(reader), 128_000)) / hop

with peak_memory("cpu") as peak:
    frames = read(path) if action == "read" else tok.encode(path).lengths.item() / tok.spec.ids_per_frame
print(peak[0], int(frames))
"""


@pytest.mark.parametrize(
    ("name", "action", "seconds", "most"),
    [
        ("wavtokenizer-tiny", "read", 1_200, 80),
        *(
            pytest.param(name, "encode", seconds, most, marks=pytest.mark.slow)
            for name, seconds, most in (
                ("wavtokenizer-tiny", 600, 80),
                ("wavtokenizer-tiny", HOUR, 80),
                ("wavtokenizer-small-75", HOUR, 150),
                ("snac-24khz", HOUR, 300),
                # The floor of the spectrogram is the whole recording's, so that this one holds it.
                ("s3tokenizer-v2-25hz", HOUR, 1_000),
            )
        ),
    ],
)
def test_memory_does_not_grow_with_a_file(name: str, action: str, seconds: int, most: int, tmp_path: Path) -> None:
    """Megabytes beside the model; official sizes have random weights."""
    rate = zoo.info(name).config.get("sample_rate", 16_000)
    path = noise_file(tmp_path / "long.wav", seconds, rate)
    done = subprocess.run([sys.executable, "-c", MEASURED, name, action, str(path)], capture_output=True, text=True, check=True)
    extra, frames = map(int, done.stdout.split())
    print(f"\n{name}, {action}, {seconds} s: +{extra / 1e6:.0f} MB")
    assert frames == -(-seconds * rate // HOPS[name])
    assert extra < most * 1_000_000


# Nothing is run before but a moment of sound. "narrow" models have few channels, and the strides, codebooks and rates of the
# official ones: what grows with a recording is theirs, and an hour takes minutes.
GROWING = """
import sys, numpy as np, soundfile, torch, zoo
from zoo import registry
from zoo.bench.measure import peak_memory, random_model
from zoo.codecs.dac import DAC, DACConfig
from zoo.codecs.mimi import Mimi, MimiConfig
torch.set_num_threads(1)
name, width, seconds, path = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
NARROW = {
    "dac-24khz": (DAC, DACConfig, dict(encoder_hidden_size=1, decoder_hidden_size=16, hidden_size=16)),
    "mimi": (Mimi, MimiConfig, dict(
        num_filters=4, compress=2, hidden_size=32, upsample_groups=32, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, intermediate_size=32, vector_quantization_hidden_dimension=16, codebook_dim=16, num_hidden_layers=2,
    )),
}
if width == "narrow":
    cls, config, sizes = NARROW[name]
    official = registry.check_config(zoo.info(name))
    torch.manual_seed(0)
    tok = cls(config({**official.library, **sizes}, codebooks=official.codebooks)).eval().requires_grad_(False)
    for tensor in tok.state_dict().values():
        if not tensor.any():
            tensor.normal_()
else:
    tok = random_model(zoo.info(name), "cpu")
rate, rng = tok.spec.sample_rate, np.random.default_rng(0)
with soundfile.SoundFile(path, "w", rate, 1) as file:
    for _ in range(seconds):
        file.write((rng.standard_normal(rate) * 0.1).astype(np.float32))
tok.decode(tok.encode(torch.zeros(rate // 20)))
with peak_memory("cpu") as encoding:
    tokens = tok.encode(path)
with peak_memory("cpu") as decoding:
    [audio] = tok.decode(tokens)
print(encoding[0], decoding[0], tokens.lengths.item() // tokens.ids_per_frame, audio.shape[1])
"""


def growth(name: str, width: str, seconds: int, folder: Path) -> tuple[int, int]:
    """Bytes beside the model, to encode a file and to decode its tokens."""
    command = [sys.executable, "-c", GROWING, name, width, str(seconds), str(folder / "long.wav")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    encoding, decoding, frames, samples = map(int, done.stdout.split())
    rate, hop = {"encodec-24khz": (RATE, 320), "dac-24khz": (RATE, 320), "mimi": (RATE, 1_920)}[name]
    assert (frames, samples) == (-(-seconds * rate // hop), seconds * rate)
    print(f"\n{name}, {width}, {seconds} s: +{encoding / 1e6:.0f} MB to encode, +{decoding / 1e6:.0f} MB to decode")
    return encoding, decoding


def test_ids_alone_grow_with_a_file(tmp_path: Path) -> None:
    """Ten minutes through Mimi's strides: 480 kB of ids, and one piece of the network at a time."""
    encoding, _ = growth("mimi", "narrow", 600, tmp_path)
    assert encoding < 100_000_000


@pytest.mark.slow
def test_a_minute_through_encodec_takes_sixty_megabytes(tmp_path: Path) -> None:
    assert max(growth("encodec-24khz", "official", 60, tmp_path)) < 60_000_000


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seconds"), [("mimi", 60), ("dac-24khz", 20)])
def test_an_hour_takes_less_than_a_gibibyte(name: str, seconds: int, tmp_path: Path) -> None:
    """What the network takes, as measured at the official sizes, and what an hour leaves, as measured in a narrow one."""
    network = growth(name, "official", seconds, tmp_path)
    hour = growth(name, "narrow", HOUR, tmp_path)
    assert all(sum(both) < 1 << 30 for both in zip(network, hour, strict=True))

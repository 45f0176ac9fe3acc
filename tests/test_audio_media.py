"""Audio as the world ships it: lengths that writers did not know, glued files, odd rates, containers of other libraries."""

from __future__ import annotations

import io
import math
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

import zoo
from zoo import media
from zoo.media.resampling import _table

FILES = Path(__file__).parent / "audio"
RATE = 22_050
SAMPLES = (np.arange(3_001) * 7_919 % 20_011 - 10_005).astype(np.int16)

needs_av = pytest.mark.skipif(not pytest.importorskip("importlib.util").find_spec("av"), reason="PyAV is not installed")


def read(content: bytes | Path) -> np.ndarray:
    return media.read_audio(content).waveform.numpy()


def expected(samples: np.ndarray = SAMPLES) -> np.ndarray:
    return samples.astype(np.float32)[None] / 32768


# ---- files of other programs; the numbers are ffmpeg's, or the encoder's input


@pytest.mark.parametrize(
    ("name", "samples", "rate"),
    [
        ("sox-pipe.wav", 11_025, 22_050),
        ("espeak-stdout.wav", 14_073, 22_050),
        ("data-length-0.wav", 22_050, 44_100),
        ("rf64-pipe.wav", 22_050, 44_100),
        ("unknown-length.flac", 22_050, 44_100),
        ("cbr-without-tag.mp3", 24_192, 44_100),
        ("vbr-without-tag.mp3", 89_856, 44_100),
        ("gapless.mp3", 22_050, 44_100),
        ("mpeg-2.5.mp3", 6_912, 11_025),
        ("free-format.mp3", 4_608, 32_000),
        ("flac-in-ogg.oga", 22_050, 44_100),
    ],
)
def test_files_of_other_programs(name: str, samples: int, rate: int) -> None:
    audio = media.read_audio(FILES / name)
    assert (audio.waveform.shape, audio.sample_rate, audio.original_samples) == ((1, samples), rate, samples)
    assert audio.waveform.abs().max() > 0.05
    assert media.audio_info(FILES / name) == media.AudioInfo(samples, rate, 1)


@needs_av
@pytest.mark.parametrize(
    ("name", "samples", "rate"),
    [("aac.m4a", 22_528, 44_100), ("alac.m4a", 22_050, 44_100), ("adts.aac", 23_552, 44_100), ("opus.webm", 24_000, 48_000)],
)
def test_files_that_ffmpeg_reads(name: str, samples: int, rate: int) -> None:
    for source in (FILES / name, (FILES / name).read_bytes()):
        audio = media.read_audio(source)
        assert (audio.waveform.shape, audio.sample_rate) == ((1, samples), rate)
    assert media.audio_info(FILES / name) == media.AudioInfo(None, rate, 1)
    tone = media.read_audio(FILES / name, sample_rate=16_000).waveform[0, 2_000:6_000]
    assert 16_000 * torch.fft.rfft(tone).abs().argmax() / 4_000 == pytest.approx(440, abs=4)


@needs_av
@pytest.mark.parametrize("name", ["aac.m4a", "alac.m4a", "opus.webm"])
def test_truncated_boxes_are_refused(name: str) -> None:
    content = (FILES / name).read_bytes()
    with pytest.raises(zoo.InputError, match="truncated"):
        media.read_audio(content[: len(content) * 2 // 3])


@pytest.mark.parametrize("name", ["aac.m4a", "adts.aac", "opus.webm"])
def test_the_extra_is_named_where_it_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(zoo.InputError, match=r"tokenizer-zoo\[video\]") as caught:
        media.read_audio(FILES / name)
    assert isinstance(caught.value, zoo.MissingExtraError)
    with pytest.raises(zoo.InputError, match="not an audio file"):
        media.read_audio(b"no audio at all, whatever one makes of it" * 20)


# ---- lengths in headers


def wav(
    data: bytes, length: int | None = None, *, riff: int | None = None, before: bytes = b"", after: bytes = b"", tag: int = 1
) -> bytes:
    depth = {1: 16, 3: 32}[tag]
    length = len(data) if length is None else length
    body = struct.pack("<4sIHHIIHH", b"fmt ", 16, tag, 1, RATE, RATE * depth // 8, depth // 8, depth)
    body += before + struct.pack("<4sI", b"data", length) + data + b"\0" * (len(data) % 2) + after
    return struct.pack("<4sI4s", b"RIFF", 4 + len(body) if riff is None else riff, b"WAVE") + body


def listing() -> bytes:
    return struct.pack("<4sI4s4sI", b"LIST", 18, b"INFO", b"ISFT", 6) + b"writer"


def rf64(data: bytes, sizes: tuple[int, int, int], length: int = 0xFFFFFFFF) -> bytes:
    head = struct.pack("<4sI4s4sIQQQI", b"RF64", 0xFFFFFFFF, b"WAVE", b"ds64", 28, *sizes, 0)
    head += struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    return head + struct.pack("<4sI", b"data", length) + data


def w64(data: bytes, length: int) -> bytes:
    tail = bytes.fromhex("f3acd3118cd100c04f8edb8a")
    head = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000") + struct.pack("<Q", (1 << 64) - 1) + b"wave" + tail
    head += b"fmt " + tail + struct.pack("<QHHIIHH", 40, 1, 1, RATE, 2 * RATE, 2, 16)
    return head + b"data" + tail + struct.pack("<Q", length) + data


def aiff(data: bytes, form: int, frames: int, sound: int) -> bytes:
    rate = struct.pack(">HQ", 16383 + 14, RATE << (63 - 14))
    head = struct.pack(">4sI4s4sIHIH", b"FORM", form, b"AIFF", b"COMM", 18, 1, frames, 16) + rate
    return head + struct.pack(">4sIII", b"SSND", sound, 0, 0) + data


def au(data: bytes, length: int) -> bytes:
    return struct.pack(">4sIIIII", b".snd", 24, length, 3, RATE, 1) + data


def caf(data: bytes, length: int) -> bytes:
    head = struct.pack(">4sHH4sqd4sIIIII", b"caff", 1, 0, b"desc", 32, float(RATE), b"lpcm", 0, 2, 1, 1, 16)
    return head + struct.pack(">4sqI", b"data", length, 0) + data


LITTLE, BIG = SAMPLES.tobytes(), SAMPLES.astype(">i2").tobytes()
CLAIMS = [0, 0x7FFFFFFF, 0x7FFFF000, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFF - 36, 0xFFFFFFFE, 0x7F000000]
PIPED = {
    **{f"wav-{claim:x}": wav(LITTLE, claim, riff=min(claim + 36, 0xFFFFFFFF)) for claim in CLAIMS},
    "wav-list-before": wav(LITTLE, 0xFFFFFFFF, before=listing()),
    "wav-list-behind": wav(LITTLE, 0xFFFFFFFF, after=listing()),
    "wav-list-behind-0": wav(LITTLE, 0, after=listing()),
    "wav-data-not-last": wav(LITTLE, after=listing()),
    "wav-riff-0": wav(LITTLE, riff=0),
    "rf64-empty": rf64(LITTLE, (0, 0, 0)),
    "rf64-ones": rf64(LITTLE, ((1 << 64) - 1,) * 3),
    "rf64-32-bits": rf64(LITTLE, (0xFFFFFFFF, 0xFFFFFFFF, 0)),
    "rf64-right": rf64(LITTLE, (len(LITTLE) + 72, len(LITTLE), len(SAMPLES))),
    "rf64-length-in-data": rf64(LITTLE, (0, 0, 0), len(LITTLE)),
    **{f"w64-{claim:x}": w64(LITTLE, claim) for claim in (0, 24, (1 << 64) - 1, (1 << 63) - 1, 24 + len(LITTLE))},
    "aiff-zeros": aiff(BIG, 0, 0, 0),
    "aiff-sox": aiff(BIG, 0x7F00002E, 0x3F800000, 0x7F000008),
    "aiff-ones": aiff(BIG, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
    "aiff-frames-0": aiff(BIG, 46 + len(BIG), 0, 8 + len(BIG)),
    **{f"au-{claim:x}": au(BIG, claim) for claim in (0xFFFFFFFF, 0, 0x7FFFFFFF, len(BIG))},
    **{f"caf-{claim}": caf(BIG, claim) for claim in (-1, 0, (1 << 63) - 1, 4 + len(BIG))},
}


@pytest.mark.parametrize("kind", PIPED)
@pytest.mark.parametrize("id3", [False, True])
def test_a_length_that_the_writer_did_not_know(kind: str, id3: bool) -> None:
    content = (b"ID3\x03\0\0\0\0\x01\x00" + bytes(128) if id3 else b"") + PIPED[kind]
    assert np.array_equal(read(content), expected())
    assert media.audio_info(content) == media.AudioInfo(len(SAMPLES), RATE, 1)


@pytest.mark.parametrize(
    "content",
    [
        wav(LITTLE[:-1], 0xFFFFFFFF)[:-1],
        rf64(LITTLE[:-1], (0, 0, 0)),
        w64(LITTLE[:-1], 0),
        aiff(BIG[:-1], 0, 0, 0),
        au(BIG[:-1], 0xFFFFFFFF),
        caf(BIG[:-1], -1),
    ],
    ids=["wav", "rf64", "w64", "aiff", "au", "caf"],
)
def test_a_file_that_ends_inside_a_sample_is_refused(content: bytes) -> None:
    with pytest.raises(zoo.InputError, match=r"truncated.* inside a sample"):
        media.read_audio(content)


@pytest.mark.parametrize(
    "content",
    [
        wav(LITTLE[:-2], len(LITTLE)),
        wav(LITTLE, 2 * len(LITTLE)),
        rf64(LITTLE, (2 * len(LITTLE), 2 * len(LITTLE), 0)),
        w64(LITTLE, 26 + len(LITTLE)),
        aiff(BIG, 48 + len(BIG), 3_002, 10 + len(BIG)),
        au(BIG, len(BIG) + 2),
        caf(BIG, len(BIG) + 6),
    ],
    ids=["wav", "wav-half", "rf64", "w64", "aiff", "au", "caf"],
)
def test_less_than_a_definite_length_is_refused(content: bytes) -> None:
    with pytest.raises(zoo.InputError, match=f"truncated: {len(LITTLE)}|truncated: {len(LITTLE) - 2}"):
        media.read_audio(content)


def test_a_definite_length_is_kept() -> None:
    assert read(wav(LITTLE + b"rubbish!", len(LITTLE))).shape == (1, len(SAMPLES))
    # One byte more than whole samples, which is there, or is not.
    assert read(wav(LITTLE, len(LITTLE) + 1)).shape == (1, len(SAMPLES))
    assert read(wav(LITTLE + b"\0\0", len(LITTLE) + 1)).shape == (1, len(SAMPLES))
    with pytest.raises(zoo.InputError, match="no samples"):
        media.read_audio(wav(b""))
    with pytest.raises(zoo.InputError, match="no samples"):
        media.read_audio(wav(b"", 0, after=listing()))


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ALAW", "ULAW", "IMA_ADPCM", "MS_ADPCM"])
@pytest.mark.parametrize("kind", ["WAV", "WAVEX", "W64"])
def test_encodings_of_unknown_length(kind: str, subtype: str) -> None:
    if kind != "WAV" and "ADPCM" in subtype and not soundfile.check_format(kind, subtype):
        pytest.skip("libsndfile does not write this")
    file = io.BytesIO()
    samples = np.stack([SAMPLES, SAMPLES[::-1]], axis=1)[:3_000] / 32768
    soundfile.write(file, samples, RATE, format=kind, subtype=subtype)
    content = bytearray(file.getvalue())
    right = read(bytes(content))
    assert right.shape[0] == 2
    assert np.array_equal(right, soundfile.read(io.BytesIO(bytes(content)), dtype="float32")[0].T)
    position = content.index(b"data") + (16 if kind == "W64" else 4)
    content[position : position + 4] = b"\xff" * 4
    if kind == "W64":
        content[position : position + 8] = b"\xff" * 8
    assert np.array_equal(read(bytes(content)), right)


@pytest.mark.parametrize("kind", ["WAV", "W64"])
@pytest.mark.parametrize("samples", [1, 320, 321, 960, 11_025])
def test_blocks_of_gsm_are_whole(kind: str, samples: int) -> None:
    """As many samples as ffmpeg and SoX read, whether the number of blocks is even or odd, padded by the writer or not."""
    tone = 0.3 * np.sin(np.arange(samples) / 9)
    buffer = io.BytesIO()
    soundfile.write(buffer, tone, 8_000, format=kind, subtype="GSM610")
    expected = -(-samples // 320) * 320
    audio = media.read_audio(buffer.getvalue())
    assert audio.waveform.shape[1] == audio.original_samples == media.audio_info(buffer.getvalue()).samples == expected
    assert np.abs(audio.waveform[0, :samples].numpy() - tone).mean() < 0.1
    if kind == "WAV":
        # SoX counts the byte that makes the chunk even among the data.
        content = bytearray(buffer.getvalue())
        place = content.index(b"data") + 4
        content[place : place + 4] = struct.pack("<I", len(content) - place - 4)
        assert media.audio_info(bytes(content)).samples == expected
        assert torch.equal(media.read_audio(bytes(content)).waveform, audio.waveform)


def test_files_one_behind_the_other() -> None:
    twice = np.concatenate([expected()] * 2, axis=1)
    assert np.array_equal(read(wav(LITTLE) * 2), twice)
    assert np.array_equal(read(wav(LITTLE, 0xFFFFFFFF) * 2), twice)
    flac = encoded("FLAC")
    assert np.array_equal(read(flac * 2), twice)
    unknown = (FILES / "unknown-length.flac").read_bytes()
    assert np.array_equal(read(unknown * 2), np.concatenate([read(unknown)] * 2, axis=1))
    oga = (FILES / "flac-in-ogg.oga").read_bytes()
    assert np.array_equal(read(oga * 2), np.concatenate([read(oga)] * 2, axis=1))
    with pytest.raises(zoo.InputError, match=r"parts that differ: 44100 Hz .* 22050 Hz"):
        media.read_audio(unknown + flac)


def encoded(kind: str, subtype: str | None = None, rate: int = RATE, samples: np.ndarray = SAMPLES) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize(("subtype", "rate"), [("VORBIS", 44_100), ("OPUS", 48_000)])
def test_links_of_ogg(subtype: str, rate: int) -> None:
    tone = (0.3 * np.sin(np.arange(30_000) / 20)).astype(np.float32)
    one, other = encoded("OGG", subtype, rate, tone), encoded("OGG", subtype, rate, tone[:20_000])
    assert np.array_equal(read(one + other), np.concatenate([read(one), read(other)], axis=1))
    assert read(one).shape[1] == 30_000
    with pytest.raises(zoo.InputError, match="parts that differ"):
        media.read_audio(one + encoded("OGG", subtype, 24_000, tone))
    with pytest.raises(zoo.InputError, match=r"truncated.* inside the Ogg page at byte"):
        media.read_audio(one[:-10])
    damaged = bytearray(one)
    damaged[len(one) * 2 // 3] ^= 0xFF
    with pytest.raises(zoo.InputError, match=r"damaged.*page at byte"):
        media.read_audio(bytes(damaged))


# ---- FLAC


def with_total(content: bytes, total: int) -> bytes:
    packed = int.from_bytes(content[18:26], "big") >> 36 << 36 | total
    return content[:18] + packed.to_bytes(8, "big") + content[26:]


def test_total_of_flac() -> None:
    noise = np.random.default_rng(0).integers(-9_000, 9_000, 30_000).astype(np.int16)
    content = encoded("FLAC", samples=noise)
    for total in (0, 30_000, 20_000, 1):
        assert np.array_equal(read(with_total(content, total)), expected(noise))
    with pytest.raises(zoo.InputError, match=r"truncated.* 30000 of 30001 samples"):
        media.read_audio(with_total(content, 30_001))
    for total in (0, 30_000):
        for cut in (1, 5_000, len(content) - 3_000):
            with pytest.raises(zoo.InputError, match=r"truncated|damaged"):
                media.read_audio(with_total(content, total)[:-cut])


# ---- MPEG


def test_gapless_tags_are_kept() -> None:
    content = (FILES / "gapless.mp3").read_bytes()
    assert np.array_equal(read(content), soundfile.read(FILES / "gapless.mp3", dtype="float32", always_2d=True)[0].T)
    assert read(content * 2).shape == (1, 44_100)
    tagless = (FILES / "cbr-without-tag.mp3").read_bytes()
    assert read(content + tagless).shape == (1, 22_050 + 24_192)
    assert read(tagless + content).shape == (1, 22_050 + 24_192)
    assert read(tagless * 3).shape == (1, 3 * 24_192)


def test_a_tag_with_a_wrong_number_of_frames() -> None:
    content = bytearray((FILES / "gapless.mp3").read_bytes())
    position = max(content.find(b"Xing"), content.find(b"Info")) + 8
    count = int.from_bytes(content[position : position + 4], "big")
    content[position : position + 4] = (count + 5).to_bytes(4, "big")
    with pytest.raises(zoo.InputError, match=f"truncated: {count} of {count + 5} MPEG frames"):
        media.read_audio(bytes(content))
    content[position - 1] &= 0xFE  # no number of frames, whose place goes to the next field
    del content[position : position + 4]
    content[position + 100 : position + 100] = bytes(4)
    assert read(bytes(content)).shape[1] >= 22_050


def test_tags_around_mpeg_and_pieces_of_frames() -> None:
    content = (FILES / "cbr-without-tag.mp3").read_bytes()
    plain = read(content)
    id3v1, ape = b"TAG" + b"x" * 125, b"APETAGEX" + struct.pack("<IIII", 2_000, 32, 0, 0) + bytes(8)
    id3v2 = b"ID3\x04\0\0\0\0\x02\x00" + b"\xff\xfb\x90\x00" * 64
    for wrapped in (content + id3v1, content + ape, content + ape + id3v1, id3v2 + content, id3v2 + content + id3v1):
        assert np.array_equal(read(wrapped), plain)
    assert read(content + id3v1 + content).shape == (1, 2 * plain.shape[1])
    assert read(content + id3v2 + content).shape == (1, 2 * plain.shape[1])
    assert read(content[300:]).shape == (1, plain.shape[1] - 1_152)
    with pytest.raises(zoo.InputError, match="truncated: the MPEG frame at byte"):
        media.read_audio(content[:-100])
    with pytest.raises(zoo.InputError, match="truncated"):
        media.read_audio(content[300:-100])


def test_mpeg_in_wav() -> None:
    content = (FILES / "cbr-without-tag.mp3").read_bytes()
    form = struct.pack("<4sIHHIIHHHHIHHH", b"fmt ", 30, 0x55, 1, 44_100, 16_000, 1, 0, 12, 1, 2, 417, 1, 1393)
    for length in (len(content), 0xFFFFFFFF):
        file = struct.pack("<4sI4s", b"RIFF", 0xFFFFFFFF, b"WAVE") + form + struct.pack("<4sI", b"data", length) + content
        assert np.array_equal(read(file), read(content))


# ---- channels


def test_channels_come_in_the_order_of_wav(tmp_path: Path) -> None:
    rate, tones = 48_000, [500, 900, 1_300, 60, 1_700, 2_100]
    waveform = torch.stack([0.2 * torch.sin(2 * torch.pi * tone * torch.arange(rate) / rate) for tone in tones])
    for extension in ("wav", "flac", "ogg", "opus", "caf", "aiff", "w64", "au"):
        found = media.read_audio(media.write_audio(tmp_path / f"surround.{extension}", waveform, rate)).waveform
        assert torch.fft.rfft(found[:, :rate]).abs().argmax(1).tolist() == pytest.approx(tones, abs=2), extension


def test_stereo_at_its_own_rate(tmp_path: Path) -> None:
    stereo = torch.from_numpy(np.stack([SAMPLES, SAMPLES[::-1]]) / 32768).float()
    media.write_audio(tmp_path / "stereo.wav", stereo, RATE)
    assert torch.equal(media.read_audio(tmp_path / "stereo.wav").waveform, stereo)
    assert torch.equal(media.read_audio((stereo, RATE)).waveform, stereo)
    assert media.read_audio((stereo, RATE), mono=True).waveform.shape == (1, 3_001)


# ---- writing


@pytest.mark.parametrize("extension", media.AUDIO_EXTENSIONS)
def test_every_listed_extension_is_written(extension: str, tmp_path: Path) -> None:
    tone = 0.4 * torch.sin(torch.arange(24_000) / 20)[None].expand(2, -1)
    audio = media.read_audio(media.write_audio(tmp_path / f"tone{extension}", tone, 24_000))
    assert (audio.sample_rate, audio.waveform.shape[0]) == (24_000, 2)
    assert 24_000 <= audio.waveform.shape[1] < 27_000
    assert torch.fft.rfft(audio.waveform[:, 4_000:20_000]).abs().argmax(1).tolist() == [127, 127]


@pytest.mark.parametrize("extension", ["mp3", "opus"])
def test_rates_that_a_format_does_not_know(extension: str, tmp_path: Path) -> None:
    for rate in (96_000, 22_051):
        with pytest.raises(zoo.InputError, match=r"8000.*48000"):
            media.write_audio(tmp_path / f"tone.{extension}", torch.zeros(1, 100), rate)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    for name, channels, rate in (("a.mp3", 3, 48_000), ("a.flac", 9, 48_000), ("a.flac", 1, 700_000), ("a.wav", 0, 8_000)):
        with pytest.raises(zoo.InputError, match=r"cannot write a\."):
            media.write_audio(tmp_path / name, torch.zeros(channels, 100), rate)
    assert not list(tmp_path.iterdir())


# ---- resampling


def reference(samples: torch.Tensor, rate: int, new_rate: int, places: torch.Tensor) -> torch.Tensor:
    """Some outputs by the definition, in float64."""
    scale = 0.99 * min(1, new_rate / rate)
    t = torch.arange(samples.shape[1], dtype=torch.float64) - (places * rate).double()[:, None] / new_rate
    t = (t * scale).clamp(-6, 6)
    return samples.double() @ (torch.sinc(t) * torch.cos(t * torch.pi / 12) ** 2 * scale).T


@pytest.mark.parametrize(
    ("rate", "new_rate", "samples"),
    [
        *[(44_099, 24_000, 9_001), (24_000, 44_099, 5_001), (22_254, 24_000, 9_000), (44_100, 44_099, 5_000)],
        *[
            (999_983, 24_000, 60_000),
            (24_000, 999_983, 300),
            (999_983, 3_001, 200_000),
            (999_983, 61, 500_000),
            (44_100, 1, 300_000),
            (1, 999_983, 3),
        ],
    ],
)
def test_odd_rates_follow_the_definition(rate: int, new_rate: int, samples: int) -> None:
    waveform = torch.randn(2, samples, generator=torch.Generator().manual_seed(0))
    resampled = media.resample(waveform, rate, new_rate)
    assert resampled.shape == (2, media.resampled_length(samples, rate, new_rate))
    places = torch.linspace(0, resampled.shape[1] - 1, 60).long()
    assert (resampled[:, places] - reference(waveform, rate, new_rate, places)).abs().max() < 1e-6
    resampler = media.Resampler(rate, new_rate)
    pieces = waveform.split(max(1, samples // 7), dim=1)
    streamed = torch.cat([*(resampler.push(piece) for piece in pieces), resampler.finish()], dim=1)
    assert streamed.shape == resampled.shape
    assert (streamed - resampled).abs().max() < 1e-6


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 96_000, 192_000])
@pytest.mark.parametrize("new_rate", [16_000, 24_000, 44_100])
def test_common_rates_are_those_of_torchaudio(rate: int, new_rate: int) -> None:
    waveform = torch.randn(1, 20_001, generator=torch.Generator().manual_seed(0))
    transform = torchaudio.transforms.Resample(rate, new_rate)
    assert (media.resample(waveform, rate, new_rate) - transform(waveform)).abs().max() < 1e-6
    if rate == new_rate:
        return
    divisor = math.gcd(rate, new_rate)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(_table(rate // divisor, new_rate // divisor), transform.kernel)
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("rate", [0, -1, 2_147_483_647, 1_000_001])
def test_absurd_rates_are_refused(rate: int) -> None:
    tone = torch.zeros(1, 100)
    for call in (
        lambda: media.resample(tone, rate, 24_000),
        lambda: media.resample(tone, 24_000, rate),
        lambda: media.read_audio((tone, 24_000), sample_rate=rate),
        lambda: media.read_audio((tone, rate), sample_rate=24_000),
    ):
        with pytest.raises(zoo.InputError, match="sample rate"):
            call()
    if rate > 0:
        content = bytearray(wav(LITTLE))
        content[24:28] = struct.pack("<I", rate)
        with pytest.raises(zoo.InputError, match="sample rate"):
            media.read_audio(bytes(content))


PEAKS = """
import sys, torch, zoo
from zoo import media

def peak(call):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = held()
    call()
    return held() - before

def held():
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))

def attempt(call, *arguments, **options):
    try:
        return call(*arguments, **options)
    except zoo.InputError:
        pass

media.resample(torch.zeros(1, 9), 8000, 16000)
attempt(media.read_audio, b"x" * 100)
"""


def peaks(code: str) -> list[int]:
    """The numbers that some code prints, in a process of its own whose ``peak`` tells what a call takes at its peak."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is measured on Linux")
    done = subprocess.run([sys.executable, "-c", PEAKS + code], capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


def extra_memory(pairs: list[tuple[int, int, int]]) -> list[int]:
    """What resampling takes at its peak beside input and result, for each pair of rates and number of seconds."""
    code = (
        f"for rate, new_rate, seconds in {pairs}:\n"
        "    x = torch.ones(1, seconds * rate)\n"
        "    result = 4 * media.resampled_length(seconds * rate, rate, new_rate)\n"
        "    print(peak(lambda: media.resample(x, rate, new_rate)) - result)"
    )
    return peaks(code)


# Of a table and without one, with many phases and few, far apart both ways.
ODD_PAIRS = [(44_099, 24_000), (24_000, 44_099), (1, 48_000), (44_100, 1), (96_001, 44_100), (22_254, 24_000)]
EXTREME_PAIRS = [(999_983, 24_000), (1_000_000, 24_000), (1_000_000, 1), (1, 1_000_000), (24_000, 999_983), (24_000, 1_000_000)]


def test_memory_at_odd_rates() -> None:
    pairs = [(*pair, 60) for pair in ODD_PAIRS] + [(*pair, 8) for pair in EXTREME_PAIRS]
    for pair, extra in zip(pairs, extra_memory(pairs), strict=True):
        assert extra < 64_000_000, pair


@pytest.mark.slow
@pytest.mark.parametrize("pair", EXTREME_PAIRS)
def test_memory_of_a_minute_at_extreme_rates(pair: tuple[int, int]) -> None:
    [extra] = extra_memory([(*pair, 60)])
    assert extra < 64_000_000


def test_a_long_file_is_held_once_and_a_claim_takes_nothing(tmp_path: Path) -> None:
    seconds, rate = 1_000, 44_100
    with soundfile.SoundFile(tmp_path / "long.wav", "w", rate, 1, "PCM_16") as file:
        for _ in range(seconds // 20):
            file.write(np.zeros(20 * rate, np.int16))
    claim = wav(LITTLE)[:22] + struct.pack("<HIIHH", 1_024, 900_000, 4_000_000, 2_048, 16) + wav(LITTLE)[36:]
    code = (
        f"print(peak(lambda: media.read_audio({str(tmp_path / 'long.wav')!r}, sample_rate=24000, mono=True)))\n"
        f"print(peak(lambda: attempt(media.read_audio, {claim!r})))"
    )
    whole, claimed = peaks(code)
    assert whole < 4 * 24_000 * seconds + (48 << 20)
    assert claimed < 64 << 20


# ---- damage


@pytest.mark.parametrize(
    "name", sorted(path.name for path in FILES.iterdir() if path.suffix in (".wav", ".flac", ".mp3", ".oga"))
)
def test_damage_gives_an_input_error_or_audio(name: str) -> None:
    content = (FILES / name).read_bytes()
    draw = np.random.default_rng(len(content))
    for _ in range(40):
        damaged = bytearray(content)
        for position in draw.integers(0, min(len(content), 600), 1 + draw.integers(4)):
            damaged[position] = draw.integers(256)
        if draw.random() < 0.3:
            del damaged[draw.integers(len(damaged)) :]
        if not damaged:
            continue
        try:
            audio = media.read_audio(bytes(damaged))
        except zoo.InputError:
            continue
        assert audio.waveform.shape[1] == audio.original_samples > 0

"""EnCodec of stereo chunks of a loudness of their own, as at 48 kHz: the class's numbers for each chunk alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from small_models_adapters import config_of, encodec_chunks_model, small_encodec_chunks, state_of
from zoo.codecs.encodec import Chunking
from zoo.tokenizer import Budget

SIZE, STRIDE, HOP = 1600, 1540, 40
#: Around the ends of chunks, where the class's own ``encode`` or ``decode`` raises or fades with another triangle.
LENGTHS = (1, 1000, 1540, 1541, 1580, 1581, 1600, 3079, 3080, 3081, 3120, 3121, 5000)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return small_encodec_chunks()


def sound(samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(samples)
    return torch.randn(2, samples, generator=generator) * torch.rand(1, generator=generator)


@torch.no_grad()
def chunk_by_chunk(model: Any, wave: Tensor) -> tuple[Tensor, list[float], Tensor]:
    """Codes, scales and audio: the class on each chunk, and its triangles over all of them."""
    samples = wave.shape[1]
    codes, scales, total, weights = [], [], torch.zeros(2, samples), torch.zeros(samples)
    triangle = 0.5 - (torch.linspace(0, 1, SIZE + 2)[1:-1] - 0.5).abs()
    for start in range(0, samples, STRIDE):
        own, scale = model._encode_frame(wave[None, :, start : start + SIZE], 9.6)
        stop = min(start + SIZE, samples)
        audio = model._decode_frame(own, scale)[0, :, : stop - start]
        total[:, start:stop] += triangle[: stop - start] * audio
        weights[start:stop] += triangle[: stop - start]
        codes.append(own[0].T)
        scales.append(float(scale))
    return torch.cat(codes), scales, total / weights


def scales_of(tokens: zoo.Tokens) -> list[list[float]]:
    return [memoryview(meta["scales"]).cast("f").tolist() for meta in tokens.meta]


def test_numbers_of_the_class_on_each_chunk_alone_in_any_batch(tokenizer: Any) -> None:
    model, waves = encodec_chunks_model(), [sound(samples) for samples in LENGTHS]
    order = random.Random(0).sample(range(len(waves)), len(waves))
    tokens = tokenizer.encode([waves[i] for i in order])
    audio = tokenizer.decode(tokens)
    seen: set[int] = set()
    for row, index in enumerate(order):
        codes, scales, expected = chunk_by_chunk(model, waves[index])
        assert torch.equal(tokens[row].codes()[0], codes)
        assert scales_of(tokens)[row] == scales
        assert audio[row].shape == waves[index].shape
        assert (audio[row] - expected).abs().max() < 1e-4
        seen |= set(codes.flatten().tolist())
    assert len(seen) >= 32


@pytest.mark.parametrize("samples", [1000, 1540, 1581, 1600, 3079, 5000])
@torch.no_grad()
def test_what_the_class_gives_a_whole_recording_where_it_can(tokenizer: Any, samples: int) -> None:
    model, wave = encodec_chunks_model(), sound(samples)
    found = model.encode(wave[None], bandwidth=9.6)
    missing = found.last_frame_pad_length
    tokens = tokenizer.encode(wave)
    codes = torch.cat(list(found.audio_codes[:, 0]), dim=-1).T
    assert torch.equal(tokens.codes()[0], codes[: len(codes) - missing])
    expected = model.decode(found.audio_codes, found.audio_scales, last_frame_pad_length=missing).audio_values[0]
    assert (tokenizer.decode(tokens)[0] - expected[:, :samples]).abs().max() < 1e-4


@pytest.mark.parametrize("chunking", [Chunking(48_000, 47_520, 320), Chunking(SIZE, STRIDE, HOP), Chunking(80, 80, 40)])
def test_frames_tell_where_chunks_end(chunking: Chunking) -> None:
    for samples in (*range(1, 3 * chunking.hop), *range(chunking.size - 400, 2 * chunking.size + 700, 7)):
        if samples < 1:
            continue
        ends = [min(start + chunking.size, samples) - start for start in range(0, samples, chunking.stride)]
        frames = [-(-own // chunking.hop) for own in ends]
        assert chunking.split(sum(frames)) == frames
        assert samples <= chunking.samples(sum(frames)) < samples + chunking.hop


def test_pieces_and_streams_give_the_numbers_of_one_pass(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (tokenizer.spec.streaming, tokenizer.channels, tokenizer.spec.chunk) == ("exact", 2, (SIZE, STRIDE))
    assert tokenizer.spec.frame_rate == 16_000 / HOP * SIZE / STRIDE
    waves = [sound(samples) for samples in (5000, 1580, 3081, 7)]
    alone = [tokenizer.encode(wave) for wave in waves]
    heard = [tokenizer.decode(tokens, trim=False)[0] for tokens in alone]
    monkeypatch.setattr(type(tokenizer), "at_once", {"encode": Budget(3 * HOP, 1), "decode": Budget(7, 1)})
    tokens = tokenizer.encode(waves)
    assert all(own.equal(other) for own, other in zip(tokens, alone, strict=True))
    for audio, other in zip(tokenizer.decode(tokens, trim=False), heard, strict=True):
        assert audio.shape == other.shape and (audio - other).abs().max() < 1e-5
    monkeypatch.undo()
    cuts = random.Random(0)
    for wave, tokens, expected in zip(waves, alone, heard, strict=True):
        encoder, rest = tokenizer.stream_encoder(), wave
        while rest.shape[1]:
            taken = cuts.choice((1, 90, 1700))
            encoder.push(rest[:, :taken])
            rest, state = rest[:, taken:], encoder.state()
            encoder = tokenizer.stream_encoder()
            encoder.restore(state)
        encoder.finish()
        assert encoder.tokens.equal(tokens)
        decoder, ids, parts = tokenizer.stream_decoder(tokens.meta[0]), tokens.ids[0], []
        while len(ids):
            taken = cuts.choice((1, 60, 300))
            parts.append(decoder.push(ids[:taken]))
            ids, state = ids[taken:], decoder.state()
            decoder = tokenizer.stream_decoder()
            decoder.restore(state)
        audio = torch.cat([*parts, decoder.finish()], dim=1)
        assert audio.shape == expected.shape and (audio - expected).abs().max() < 1e-5


def test_streams_give_a_frame_as_late_as_they_say(tokenizer: Any) -> None:
    frames = SIZE // HOP
    encoder = tokenizer.stream_encoder()
    assert round(encoder.latency * tokenizer.spec.frame_rate) == frames - 1
    assert not len(encoder.push(sound(SIZE - 1)))
    assert len(encoder.push(sound(1))) == frames * tokenizer.spec.ids_per_frame
    tokens = tokenizer.encode(sound(5000))
    decoder = tokenizer.stream_decoder(tokens.meta[0])
    delay = round(decoder.latency * tokenizer.spec.frame_rate)
    # The first frame that fades into the next chunk.
    first = STRIDE // HOP
    places = tokenizer.spec.ids_per_frame
    given = decoder.push(tokens.ids[0, : (first + delay) * places])
    assert given.shape[1] == STRIDE
    assert decoder.push(tokens.ids[0, (first + delay) * places : (first + delay + 1) * places]).shape[1] == STRIDE


def test_scales_travel_with_the_tokens(tokenizer: Any, tmp_path: Path) -> None:
    wave = sound(5000)
    tokens = tokenizer.encode([wave, sound(30)])
    loaded = zoo.Tokens.load(tokens.save(tmp_path / "stereo.zt"))
    assert loaded.equal(tokens) and scales_of(loaded) == scales_of(tokens)
    assert all(torch.equal(*pair) for pair in zip(tokenizer.decode(loaded), tokenizer.decode(tokens), strict=True))
    fewer = tokenizer.encode(wave, codebooks=2)
    assert fewer.equal(tokens[0].keep(2))
    # A louder recording has the same ids.
    louder = tokenizer.encode(wave * 4)
    assert torch.equal(louder.ids, tokens[0].ids)
    assert torch.allclose(tokenizer.decode(louder)[0], tokenizer.decode(tokens[0])[0] * 4, atol=1e-4)


def test_bare_ids_have_a_loudness_of_one(tokenizer: Any) -> None:
    tokens = tokenizer.encode(sound(5000))
    [bare] = tokenizer.decode(tokens.ids)
    chunks = len(scales_of(tokens)[0])
    meta = {**tokens.meta[0], "scales": torch.ones(chunks).numpy().tobytes()}
    [even] = tokenizer.decode(tokenizer.tokens([tokens.ids[0]], [meta]))
    assert torch.equal(bare[:, :5000], even)
    mixed = tokenizer.tokens([tokens.ids[0]] * 2, [{"samples": 5000, "sample_rate": 16_000}, tokens.meta[0]])
    first, second = tokenizer.decode(mixed)
    assert torch.equal(first, even)
    assert (second - tokenizer.decode(tokens)[0]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("scales", "reason"),
    [(b"\0\0\x80\x3f", "1 scales for 4 chunks"), (b"abc", "no numbers of 32 bits"), (b"\0\0\xc0\x7f" * 4, "not finite")],
)
def test_bad_scales_are_named(tokenizer: Any, scales: bytes, reason: str) -> None:
    tokens = tokenizer.encode(sound(5000))
    meta = [tokens.meta[0], {**tokens.meta[0], "scales": scales}]
    with pytest.raises(zoo.InputError, match=reason) as caught:
        tokenizer.decode(tokenizer.tokens([tokens.ids[0]] * 2, meta))
    assert caught.value.index == 1


def test_a_stream_with_too_few_scales_stops(tokenizer: Any) -> None:
    tokens = tokenizer.encode(sound(5000))
    decoder = tokenizer.stream_decoder({"scales": b"\0\0\x80\x3f"})
    with pytest.raises(zoo.InputError, match="1 scales, and more chunks"):
        decoder.push(tokens.ids[0])


def test_bad_checkpoints_are_refused() -> None:
    model = encodec_chunks_model()
    config, state = config_of(model), state_of(model)
    key = "decoder.layers.0.norm.weight"
    for change, reason in (
        (lambda own: own.pop(key), "missing"),
        (lambda own: own.update({"decoder.surplus": torch.zeros(1)}), "unexpected"),
        (lambda own: own.update({key: torch.zeros(99)}), "shape"),
    ):
        changed = dict(state)
        change(changed)
        with pytest.raises(zoo.KeysError, match=reason):
            zoo.load_upstream("encodec", config, changed)
    for settings, reason in (
        ({"overlap": 0.2}, "overlap by two or more"),
        ({"chunk_length_s": 0.101}, "not whole frames"),
        ({"normalize": False}, "loudness of their own"),
        ({"chunk_length_s": None, "overlap": None}, "whole recordings is not mono"),
    ):
        with pytest.raises(zoo.WeightsError, match=reason):
            zoo.load_upstream("encodec", config | settings, state)

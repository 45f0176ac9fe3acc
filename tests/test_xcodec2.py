"""X-Codec 2 and NeuCodec: the class's numbers for an item alone, and streams that come close to them."""

from __future__ import annotations

import random
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import NeuCodecFeatureExtractor, Xcodec2FeatureExtractor

import zoo
from small_models_adapters import adapter, config_of, state_of, xcodec2_model
from zoo.nn.stages import Whole

KINDS = ("xcodec2", "neucodec")
RATE = 16_000
every_kind = pytest.mark.parametrize("kind", KINDS)


@cache
def model_of(kind: str) -> Any:
    return xcodec2_model(kind == "neucodec")


@cache
def tokenizer_of(kind: str) -> Any:
    return adapter("xcodec2", model_of(kind), f"small-{kind}")


def sound(samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(samples)
    envelope = F.interpolate(torch.rand(1, 1, samples // 900 + 2, generator=generator), samples, mode="linear")[0]
    return torch.randn(1, samples, generator=generator) * envelope * 0.5


@torch.no_grad()
def alone(kind: str, wave: Tensor) -> tuple[Tensor, Tensor]:
    """The class on one item after its own extractor: ids ``[frames]`` and audio ``[1, samples]``, before anything is cut."""
    extractor = NeuCodecFeatureExtractor() if kind == "neucodec" else Xcodec2FeatureExtractor()
    # NeuCodec would leave out the last samples, and cannot take few of them.
    whole = F.pad(wave, (0, -wave.shape[1] % 320)) if kind == "neucodec" else wave
    made = extractor(whole[0], sampling_rate=RATE, return_tensors="pt")
    codes = model_of(kind).encode(**made).audio_codes
    return codes[0, 0].long(), model_of(kind).decode(audio_codes=codes).audio_values[0]


@every_kind
def test_numbers_of_the_class_on_the_item_alone_in_any_batch(kind: str) -> None:
    tokenizer, waves = tokenizer_of(kind), [sound(samples) for samples in (1, 319, 320, 321, 2240, 3207, 16_000)]
    order = random.Random(0).sample(range(len(waves)), len(waves))
    tokens = tokenizer.encode([(waves[i], RATE) for i in order])
    audio = tokenizer.decode(tokens, sample_rate="original")
    whole = tokenizer.decode(tokens, trim=False)
    seen: set[int] = set()
    for row, index in enumerate(order):
        ids, expected = alone(kind, waves[index])
        samples = waves[index].shape[1]
        assert len(ids) == (-(-samples // 320) if kind == "neucodec" else samples // 320 + 1)
        assert torch.equal(tokens[row].ids[0], ids)
        assert whole[row].shape == expected.shape and (whole[row] - expected).abs().max() < 1e-4
        assert audio[row].shape == (1, samples)
        seen |= set(ids.tolist())
    assert len(seen) >= 32


def test_neucodec_takes_and_gives_24_khz() -> None:
    tokenizer = tokenizer_of("neucodec")
    assert (tokenizer.spec.sample_rate, tokenizer.spec.hop_length, tokenizer.spec.frame_rate) == (24_000, 480, 50.0)
    wave = sound(24_000)
    tokens = tokenizer.encode(wave)
    assert tokens.meta == ({"samples": 24_000, "sample_rate": 24_000},) and tokens.lengths.tolist() == [50]
    assert tokenizer.decode(tokens)[0].shape == (1, 24_000)
    assert tokenizer.prepare([wave])[0].tensors["waveform"].shape == (1, 16_000)


@every_kind
def test_streams_are_approximations_by_windows(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    assert tokenizer.spec.streaming == "approximate"
    wave, window = sound(RATE + 123), 20
    exact = tokenizer.encode((wave, RATE))
    found = []
    cuts = random.Random(0)
    for steps in ((1, 700), (RATE * 2,)):
        encoder, rest = tokenizer.stream_encoder(RATE, window=window), wave
        while rest.shape[1]:
            taken = cuts.choice(steps)
            encoder.push(rest[:, :taken])
            rest, state = rest[:, taken:], encoder.state()
            encoder = tokenizer.stream_encoder(RATE, window=window)
            encoder.restore(state)
        encoder.finish()
        found.append(encoder.tokens)
    # However it is cut.
    assert found[0].equal(found[1])
    assert found[0].lengths.tolist() == exact.lengths.tolist() and found[0].meta == exact.meta
    # A window that holds all of the recording sees what a single pass sees.
    wide = tokenizer.stream_encoder(RATE, window=400)
    wide.push(wave)
    wide.finish()
    assert wide.tokens.equal(exact)
    [whole] = tokenizer.decode(exact, trim=False)
    heard = []
    for steps in ((1, 13), (99,)):
        decoder, ids, parts = tokenizer.stream_decoder(window=window), exact.ids[0], []
        while len(ids):
            taken = cuts.choice(steps)
            parts.append(decoder.push(ids[:taken]))
            ids, state = ids[taken:], decoder.state()
            decoder = tokenizer.stream_decoder(window=window)
            decoder.restore(state)
        heard.append(torch.cat([*parts, decoder.finish()], dim=1))
    assert torch.equal(*heard) and heard[0].shape == whole.shape
    decoder = tokenizer.stream_decoder(window=400)
    audio = torch.cat([decoder.push(exact.ids[0]), decoder.finish()], dim=1)
    assert torch.equal(audio, whole)
    # More context comes closer.
    narrow, middling = (streamed(tokenizer, exact.ids[0], size) - whole for size in (4, 48))
    assert middling.square().mean() < narrow.square().mean()
    with pytest.raises(zoo.ArgumentError, match="at least four frames"):
        tokenizer.stream_encoder(window=3)


def streamed(tokenizer: Any, ids: Tensor, window: int) -> Tensor:
    decoder = tokenizer.stream_decoder(window=window)
    return torch.cat([decoder.push(ids), decoder.finish()], dim=1)


def test_streams_give_a_frame_as_late_as_they_say() -> None:
    tokenizer = tokenizer_of("xcodec2")
    encoder = tokenizer.stream_encoder(window=20)
    # Half a window at a time, when the quarter behind it is there in the next half.
    assert round(encoder.latency * tokenizer.spec.frame_rate) == 14
    given = [len(encoder.push(sound(320))) for _ in range(45)]
    assert [place for place, own in enumerate(given) if own] == [9, 19, 29, 39]
    assert [own for own in given if own] == [5, 10, 10, 10]


@every_kind
def test_bad_checkpoints_are_refused(kind: str) -> None:
    config, state = config_of(model_of(kind)), state_of(model_of(kind))
    key = "acoustic_decoder.head.linear.bias"
    for change, reason in (
        (lambda own: own.pop(key), "missing"),
        (lambda own: own.update({"acoustic_decoder.surplus": torch.zeros(1)}), "unexpected"),
        (lambda own: own.update({"surplus": torch.zeros(1)}), "unexpected"),
        (lambda own: own.update({key: torch.zeros(99)}), "shape"),
    ):
        changed = dict(state)
        change(changed)
        with pytest.raises(zoo.KeysError, match=reason):
            zoo.load_upstream("xcodec2", config, changed)
    with pytest.raises(zoo.KeysError, match=r"pass config\.json"):
        zoo.load_upstream("xcodec2", None, state)
    with pytest.raises(zoo.WeightsError, match="configuration of bert"):
        zoo.load_upstream("xcodec2", {"model_type": "bert"}, state)


@every_kind
def test_halves_load_alone(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(kind)
    folder = tokenizer.save_pretrained(tmp_path / "both")
    wave = (sound(3000), RATE)
    tokens = tokenizer.encode(wave)
    encoder, decoder = (zoo.load(f"local-dir:{folder}", parts=part) for part in ("encoder", "decoder"))
    assert encoder.num_parameters < tokenizer.num_parameters > decoder.num_parameters
    assert encoder.encode(wave).equal(tokens)
    assert torch.equal(decoder.decode(tokens)[0], tokenizer.decode(tokens)[0])
    with pytest.raises(zoo.WeightsError, match="encoder, which is not loaded"):
        decoder.encode(wave)
    with pytest.raises(zoo.WeightsError, match="decoder, which is not loaded"):
        encoder.stream_decoder()


@every_kind
def test_ids_survive_every_precision(kind: str) -> None:
    tokenizer = adapter("xcodec2", model_of(kind), "cast")
    wave = (sound(5003), RATE)
    tokens = tokenizer.encode(wave)
    for dtype in (torch.bfloat16, torch.float64):
        tokenizer.to(dtype)
        assert tokenizer.encode(wave).equal(tokens)
        assert tokenizer.decode(tokens)[0].dtype == torch.float32


def test_a_recording_is_not_endless(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of("xcodec2")
    monkeypatch.setattr("zoo.codecs.xcodec2.LONGEST", 1)
    with pytest.raises(zoo.InputError, match=r"item 1: 2 s are too long.*stream_encoder takes more"):
        tokenizer.encode([sound(320), sound(32_000)])


def test_windows_of_a_local_network_are_exact() -> None:
    """Each output of the moving sum depends on a frame on either side, which the context holds."""
    from zoo.codecs.xcodec2 import Windows

    run = partial(F.avg_pool1d, kernel_size=3, stride=1, padding=1)
    x = torch.rand(1, 1, 57)
    whole = Whole(run).push(x, True)
    for window in (4, 8, 60):
        stage = Windows(run, window)
        parts = [stage.push(piece, False) for piece in x.split(5, dim=-1)]
        parts.append(stage.push(None, True))
        found = torch.cat([own for own in parts if own is not None], dim=-1)
        assert torch.allclose(found, whole, atol=1e-6) and found.shape == whole.shape

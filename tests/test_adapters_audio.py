"""Audio codecs of transformers: the library's numbers for an item alone, whatever the batch, the pieces, the stream."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import zoo
from hub_server import HubServer
from small_models_adapters import (
    adapter,
    config_of,
    dac_model,
    encodec_model,
    mimi_model,
    state_of,
    xcodec_model,
)
from zoo.nn.stages import Recurrent, Window
from zoo.tokenizer import Budget


@dataclass(frozen=True)
class Case:
    """A library's class behind a tokenizer.

    Attributes:
        family: of the tokenizer.
        model: makes the library's model, the same at every call.
        hop: samples of a frame.
        encode: the class on one item alone ``[1, channels, samples]``, after the zoo's rule: codes ``[frames, codebooks]``.
        decode: the class on codes ``[frames, codebooks]``: audio ``[channels, samples]``.
        shortest: samples that the class takes at least.
    """

    family: str
    model: Callable[[], Any]
    hop: int
    encode: Callable[[Any, Tensor], Tensor]
    decode: Callable[[Any, Tensor], Tensor]
    different: int = 8


def whole_frames(waveform: Tensor, hop: int) -> Tensor:
    return F.pad(waveform, (0, -waveform.shape[-1] % hop))


CASES = {
    "dac": Case(
        "dac",
        dac_model,
        320,
        lambda model, wave: model.encode(whole_frames(wave, 320)).audio_codes[0].T,
        lambda model, codes: model.decode(audio_codes=codes.T[None]).audio_values,
    ),
    "encodec": Case(
        "encodec",
        encodec_model,
        40,
        lambda model, wave: model.encode(wave, bandwidth=9.6).audio_codes[0, 0].T,
        lambda model, codes: model.decode(codes.T[None, None], [None]).audio_values[0],
    ),
    "encodec-musicgen": Case(
        "encodec",
        partial(encodec_model, False),
        40,
        lambda model, wave: model.encode(wave, bandwidth=9.6).audio_codes[0, 0].T,
        lambda model, codes: model.decode(codes.T[None, None], [None]).audio_values[0],
    ),
    "mimi": Case(
        "mimi",
        mimi_model,
        80,
        lambda model, wave: model.encode(whole_frames(wave, 80)).audio_codes[0].T,
        lambda model, codes: model.decode(codes.T[None]).audio_values[0],
    ),
    "xcodec": Case(
        "xcodec",
        xcodec_model,
        320,
        lambda model, wave: model.encode(whole_frames(wave, 320)).audio_codes[0].T,
        lambda model, codes: model.decode(codes.T[None]).audio_values[0],
    ),
    "higgs": Case(
        "xcodec",
        partial(xcodec_model, True),
        960,
        lambda model, wave: model.encode(whole_frames(wave, 960)).audio_codes[0].T,
        lambda model, codes: model.decode(codes.T[None]).audio_values[0],
    ),
    "dac-even": Case(
        "dac",
        partial(dac_model, (2, 4, 4, 8)),
        256,
        lambda model, wave: model.encode(whole_frames(wave, 256)).audio_codes[0].T,
        lambda model, codes: model.decode(audio_codes=codes.T[None]).audio_values,
    ),
}


@cache
def tokenizer_of(name: str) -> Any:
    case = CASES[name]
    return adapter(case.family, case.model(), f"small-{name}")


def sound(samples: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    envelope = F.interpolate(torch.rand(1, 1, samples // 300 + 2, generator=generator), samples, mode="linear")[0]
    return torch.randn(1, samples, generator=generator) * envelope * 0.5


def difference(left: Tensor, right: Tensor) -> float:
    assert left.shape == right.shape
    return (left - right).abs().max().item() if left.numel() else 0.0


def lengths_of(case: Case) -> list[int]:
    hop = case.hop
    return [1, hop - 1, hop, hop + 1, 7 * hop, 10 * hop + 7, 21 * hop + 5]


#: Second cases of a family go the same way as the first.
SECOND = ("dac-even", "encodec-musicgen", "higgs")


def cases_of(*names: str, slow: tuple[str, ...] = SECOND) -> Any:
    return pytest.mark.parametrize("name", [pytest.param(own, marks=pytest.mark.slow) if own in slow else own for own in names])


every_case = cases_of(*CASES)
every_stream = cases_of(*(name for name, case in CASES.items() if case.family != "xcodec"))
every_streaming_family = cases_of("dac", "encodec", "encodec-musicgen", "mimi")
every_family = cases_of("dac", "encodec", "mimi", "xcodec")
#: Where what is tested is the same code for all.
one_family = cases_of("mimi", "dac", "encodec", "xcodec", slow=("dac", "encodec", "xcodec"))


@every_case
def test_numbers_of_the_class_on_the_item_alone_in_any_batch(name: str) -> None:
    case, tokenizer = CASES[name], tokenizer_of(name)
    model, waves = case.model(), [sound(samples, samples) for samples in lengths_of(case)]
    order = random.Random(0).sample(range(len(waves)), len(waves))
    tokens = tokenizer.encode([waves[i] for i in order])
    audio = tokenizer.decode(tokens)
    seen: set[int] = set()
    for row, index in enumerate(order):
        with torch.no_grad():
            codes = case.encode(model, waves[index][None])
            expected = case.decode(model, codes)
        own = tokens[row].codes()[0]
        assert torch.equal(own, codes)
        seen |= set(own.flatten().tolist())
        samples = waves[index].shape[1]
        assert audio[row].shape == (1, samples)
        heard = min(samples, expected.shape[-1])
        assert difference(audio[row][:, :heard], expected[:, :heard]) < 1e-4
        assert not audio[row][:, heard:].any() and samples - heard <= 8
    assert len(seen) >= case.different


@every_stream
def test_pieces_and_streams_give_the_numbers_of_one_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, tokenizer = CASES[name], tokenizer_of(name)
    assert tokenizer.spec.streaming == "exact"
    waves = [sound(samples, samples) for samples in (47 * case.hop + 11, 20 * case.hop, case.hop // 2)]
    alone = [tokenizer.encode(wave) for wave in waves]
    heard = [tokenizer.decode(tokens, trim=False)[0] for tokens in alone]
    monkeypatch.setattr(type(tokenizer), "at_once", {"encode": Budget(5 * case.hop, 1), "decode": Budget(5, 1)})
    tokens = tokenizer.encode(waves)
    assert all(own.equal(other) for own, other in zip(tokens, alone, strict=True))
    for audio, other in zip(tokenizer.decode(tokens, trim=False), heard, strict=True):
        assert difference(audio, other) < 1e-5 * max(1.0, other.abs().max().item())
    monkeypatch.undo()
    # Several at once, each with its own clock, and each stored and taken up again at times.
    cuts = random.Random(0)
    encoders, places = [tokenizer.stream_encoder() for _ in waves], [0] * len(waves)
    while any(place < wave.shape[1] for place, wave in zip(places, waves, strict=True)):
        for index, wave in enumerate(waves):
            stop = places[index] + cuts.choice((1, 2 * case.hop, 9 * case.hop))
            if places[index] < wave.shape[1]:
                encoders[index].push(wave[:, places[index] : stop])
                places[index] = stop
            if cuts.random() < 0.2:
                encoders[index] = stored(encoders[index], tokenizer.stream_encoder())
    for encoder, tokens in zip(encoders, alone, strict=True):
        encoder.finish()
        assert encoder.tokens.equal(tokens)
        with pytest.raises(zoo.InputError, match="finished"):
            encoder.push(torch.zeros(4))
    decoders: list[Any] = [tokenizer.stream_decoder() for _ in alone]
    for decoder, tokens, expected in zip(decoders, alone, heard, strict=True):
        rest, parts = tokens.ids[0], []
        while len(rest):
            count = cuts.choice((3, 50, 70))
            parts.append(decoder.push(rest[:count]))
            rest = rest[count:]
            decoder = stored(decoder, tokenizer.stream_decoder()) if cuts.random() < 0.3 else decoder
        heard_live = torch.cat([*parts, decoder.finish()], dim=1)
        assert difference(heard_live, expected) < 1e-5 * max(1.0, expected.abs().max().item())


def stored(stream: Any, fresh: Any) -> Any:
    """A new stream that goes on where another one is, by way of a file without code."""
    file = io.BytesIO()
    torch.save(stream.state(), file)
    file.seek(0)
    fresh.restore(torch.load(file, weights_only=True))
    return fresh


@every_streaming_family
def test_streams_at_another_rate_are_the_whole_recording(name: str) -> None:
    case, tokenizer = CASES[name], tokenizer_of(name)
    rate = tokenizer.spec.sample_rate * 2 - 1000
    wave = sound(20 * case.hop, 1)
    stream = tokenizer.stream_encoder(sample_rate=rate)
    for piece in wave.split(3 * case.hop, dim=1):
        stream.push(piece)
        stream = stored(stream, tokenizer.stream_encoder(sample_rate=rate))
    stream.finish()
    assert stream.tokens.equal(tokenizer.encode((wave, rate)))


@every_streaming_family
def test_latency_of_streams_is_as_stated(name: str) -> None:
    case, tokenizer = CASES[name], tokenizer_of(name)
    stream = tokenizer.stream_encoder()
    delay = round(stream.latency * tokenizer.spec.frame_rate)
    stream.push(sound(20 * case.hop, 3))
    places = tokenizer.spec.ids_per_frame
    assert len(stream.push(sound(case.hop, 4))) == places
    stream.finish()
    assert stream.tokens.lengths.tolist() == [21 * places]
    with_delay = tokenizer.stream_encoder()
    assert len(with_delay.push(sound(40 * case.hop, 3))) == (40 - delay) * places


@every_stream
def test_what_lies_beyond_the_reach_changes_nothing(name: str) -> None:
    """The windows of the stages hold all that an output depends on, and little else."""
    case, tokenizer = CASES[name], tokenizer_of(name)
    wave = sound(81 * case.hop, 1)
    codes = tokenizer.encode(wave).codes()[0].T[None]
    for steps, given in ((tokenizer.encoder_steps(1), wave[None]), (tokenizer.decoder_steps(), codes)):
        seen: list[tuple[Window, Any, Tensor]] = []
        for stage in steps.stages:
            if isinstance(stage, Window):
                run = stage.run
                stage.run = lambda x, stage=stage, run=run, seen=seen: seen.append((stage, run, x)) or run(x)
        with torch.no_grad():
            steps.push(given, True)
            for stage, run, x in seen:
                reach, middle = stage.reach, x.shape[-1] // stage.reach.rows_in // 2
                whole = run(x)

                def change(frame: int, x=x, run=run, reach=reach, middle=middle, whole=whole) -> float:
                    other = x.clone()
                    other[..., frame * reach.rows_in : (frame + 1) * reach.rows_in] += 1
                    rows = slice(middle * reach.rows_out, (middle + 1) * reach.rows_out)
                    return float((run(other)[..., rows] - whole[..., rows]).abs().max())

                assert all(change(middle - reach.left - k) == change(middle + reach.right + k) == 0 for k in (1, 2, 5, 20))
                left = middle - reach.left + reach.reflected
                assert change(middle) > 0 and max(change(left), change(left + 1)) > 0
                assert max(change(middle + reach.right), change(middle + reach.right - 1)) > 0
        assert seen


def test_sequences_of_any_lengths_go_through_an_lstm_together() -> None:
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(3, 3, num_layers=2).double().requires_grad_(False)
    calls: list[tuple[int, ...]] = []
    lstm.register_forward_hook(lambda _, given, out: calls.append(tuple(given[0].shape[:2])))
    sizes = [[5, 5, 2], [5, 7], [0, 9, 1], [5, 5, 5]]
    waves = [torch.randn(1 + (place == 2), 3, sum(own)) for place, own in enumerate(sizes)]
    expected = [Recurrent(lstm).push(wave, True) for wave in waves]
    calls.clear()
    stages, found = [Recurrent(lstm) for _ in waves], [list[Tensor]() for _ in waves]
    pieces = [list(wave.split(own, dim=2)) for wave, own in zip(waves, sizes, strict=True)]
    for turn in range(3):
        given = [own[turn] if turn < len(own) and own[turn].shape[2] else None for own in pieces]
        out = Recurrent.push_all(stages, given, [turn + 1 >= len(own) for own in pieces])
        assert [own is None for own in out] == [own is None for own in given]
        for own, more in zip(found, out, strict=True):
            own += [] if more is None else [more]
        if turn == 1:
            # As if the program had been stopped here.
            states = [stage.state() for stage in stages]
            stages = [Recurrent(lstm) for _ in waves]
            for stage, state in zip(stages, states, strict=True):
                stage.restore(state)
    assert all(torch.allclose(torch.cat(own, 2), right, atol=1e-6) for own, right in zip(found, expected, strict=True))
    # Steps and sequences: whoever is through no longer takes part.
    assert calls == [(5, 3), (5, 5), (2, 3), (2, 2), (1, 4), (1, 2), (3, 1)]


@every_family
def test_first_codebooks_are_those_of_all(name: str) -> None:
    case, tokenizer = CASES[name], tokenizer_of(name)
    wave = sound(12 * case.hop, 2)
    tokens = tokenizer.encode(wave)
    fewer = tokenizer.encode(wave, codebooks=2)
    assert fewer.equal(tokens.keep(2))
    other = tokenizer.with_codebooks(2)
    assert (other.spec.codebooks, other.fingerprint) == (2, tokenizer.fingerprint)
    assert torch.equal(other.encode(wave).codes(), fewer.codes())
    [audio] = tokenizer.decode(fewer)
    with torch.no_grad():
        expected = case.decode(case.model(), fewer.codes()[0])
    heard = min(audio.shape[1], expected.shape[1])
    assert difference(audio[:, :heard], expected[:, :heard]) < 1e-4
    for wrong in (0, tokenizer.spec.codebooks + 1):
        with pytest.raises(zoo.InputError, match="codebooks must lie in"):
            tokenizer.encode(wave, codebooks=wrong)
        with pytest.raises(zoo.InputError, match="codebooks must lie in"):
            tokenizer.with_codebooks(wrong)
    with pytest.raises(zoo.InputError, match=r"with_codebooks\(3\) gives a tokenizer of more"):
        other.encode(wave, codebooks=3)


@every_family
def test_bad_checkpoints_are_refused(name: str) -> None:
    case = CASES[name]
    model = case.model()
    config, state = config_of(model), state_of(model)
    # X-Codec's ``decoder_semantic`` is not used, and dropped.
    key = next(key for key in state if key.startswith(("decoder.", "acoustic_decoder.")) and key.endswith("bias"))
    for change, reason in (
        (lambda own: own.pop(key), "missing"),
        (lambda own: own.update({"decoder.surplus": torch.zeros(1)}), "unexpected"),
        (lambda own: own.update({key: torch.zeros(99)}), "shape"),
    ):
        changed = dict(state)
        change(changed)
        with pytest.raises(zoo.KeysError, match=reason):
            zoo.load_upstream(case.family, config, changed)
    with pytest.raises(zoo.KeysError, match=r"pass config\.json"):
        zoo.load_upstream(case.family, None, state)
    with pytest.raises(zoo.WeightsError, match="configuration of bert"):
        zoo.load_upstream(case.family, {"model_type": "bert"}, state)


@one_family
def test_ids_survive_every_precision(name: str) -> None:
    case = CASES[name]
    tokenizer = adapter(case.family, case.model(), "cast")
    wave = sound(9 * case.hop + 3, 5)
    tokens = tokenizer.encode(wave)
    for dtype in (torch.bfloat16, torch.float64):
        tokenizer.to(dtype)
        assert tokenizer.encode(wave).equal(tokens)
        assert tokenizer.decode(tokens)[0].dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------------- the hub


def publish(repo: Any, model: Any, folder: str = "", **more: bytes) -> None:
    """What `save_pretrained` of the library writes, with a decoy for whoever would run code of a repository."""
    files = {f"{folder}modeling_x.py": b"raise SystemExit('code of a repository was run')"}
    config = config_of(model) | {"auto_map": {"AutoModel": "modeling_x.Model"}, "architectures": [type(model).__name__]}
    repo.commit(files | {f"{folder}config.json": json.dumps(config, default=str).encode(), **more})


@one_family
def test_entries_load_from_the_hub_without_its_code(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: HubServer
) -> None:
    case = CASES[name]
    model = case.model()
    model.save_pretrained(tmp_path / "library")
    catalogue = tmp_path / "own.yaml"
    catalogue.write_text(
        json.dumps(
            [
                {
                    "name": "tiny-adapter",
                    "family": case.family,
                    "modality": "audio",
                    "description": "tiny",
                    "config": {"codebooks": 2},
                    "weights": {"source": "hub", "repo": "org/tiny", "file": "model.safetensors", "config": "config.json"},
                    "licence": {"code": "MIT", "weights": "MIT"},
                    "card": f"{case.family}.md",
                }
            ]
        )
    )
    weights = (tmp_path / "library" / "model.safetensors").read_bytes()
    publish(server.repo("org/tiny"), model, **{"model.safetensors": weights})
    monkeypatch.setenv("ZOO_REGISTRY", str(catalogue))
    loaded = zoo.load("tiny-adapter")
    asked = {path for _, path, _ in server.requests}
    assert any(path.endswith("config.json") for path in asked) and any(path.endswith("model.safetensors") for path in asked)
    assert not any(path.endswith(".py") for path in asked)
    wave = sound(10 * case.hop, 1)
    expected = tokenizer_of(name).encode(wave)
    assert loaded.spec.codebooks == 2
    assert torch.equal(loaded.encode(wave).codes(), expected.codes()[..., :2])
    assert loaded.fingerprint == tokenizer_of(name).fingerprint
    # The library's own folder, recognised by its keys, and ours.
    for address in (tmp_path / "library", loaded.save_pretrained(tmp_path / "ours")):
        again = zoo.load(f"local-dir:{address}")
        assert torch.equal(again.encode(wave).codes()[..., :2], expected.codes()[..., :2])


@one_family
def test_halves_load_alone(name: str, tmp_path: Path) -> None:
    tokenizer, case = tokenizer_of(name), CASES[name]
    folder = tokenizer.save_pretrained(tmp_path / "both")
    tokens = tokenizer.encode(sound(5 * case.hop))
    encoder, decoder = (zoo.load(f"local-dir:{folder}", parts=part) for part in ("encoder", "decoder"))
    assert encoder.num_parameters < tokenizer.num_parameters > decoder.num_parameters
    assert encoder.encode(sound(5 * case.hop)).equal(tokens)
    assert difference(decoder.decode(tokens)[0], tokenizer.decode(tokens)[0]) < 1e-6
    with pytest.raises(zoo.WeightsError, match="decoder, which is not loaded"):
        encoder.decode(tokens)
    with pytest.raises(zoo.WeightsError, match="encoder, which is not loaded"):
        decoder.encode(sound(100))


@pytest.mark.parametrize("name", ["dac"])
def test_former_names_of_weight_norm(name: str) -> None:
    model = dac_model()
    state = state_of(model)
    for key in [key for key in state if key.endswith("conv1.weight")]:
        direction = state.pop(key)
        state[key.replace("weight", "weight_v")] = direction * 3
        axes = [axis for axis in range(direction.ndim) if axis]
        state[key.replace("weight", "weight_g")] = direction.norm(dim=axes, keepdim=True)
    found = zoo.load_upstream("dac", config_of(model), state)
    wave = sound(3000)
    assert found.encode(wave).equal(replace(tokenizer_of("dac").encode(wave), tokenizer=found.name))
    half = {key: tensor for key, tensor in state.items() if not key.endswith("conv1.weight_g")}
    with pytest.raises(zoo.KeysError, match=r"missing: .*weight_g"):
        zoo.load_upstream("dac", config_of(model), half)


def test_safetensors_without_metadata_load(tmp_path: Path) -> None:
    model = dac_model()
    save_file(state_of(model), tmp_path / "model.safetensors")
    found = zoo.load_upstream("dac", config_of(model), tmp_path / "model.safetensors")
    assert found.fingerprint == tokenizer_of("dac").fingerprint


def test_what_attention_sees_whole_is_not_streamed_and_not_endless(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of("xcodec")
    assert tokenizer.spec.streaming is None
    with pytest.raises(zoo.InputError, match="cannot encode a stream"):
        tokenizer.stream_encoder()
    monkeypatch.setattr("zoo.codecs.xcodec.LONGEST", 1)
    with pytest.raises(zoo.InputError, match="item 1: 2 s are too long"):
        tokenizer.encode([sound(320), sound(32_000)])
    # The decoder takes pieces all the same.
    tokens = tokenizer.encode(sound(40 * 320))[0]
    [whole] = tokenizer.decode(tokens)
    monkeypatch.setattr(type(tokenizer), "at_once", {"decode": Budget(7, 1)})
    assert difference(tokenizer.decode(tokens)[0], whole) < 1e-4 * whole.abs().max()

"""SNAC against the original code's outputs, and the promises that the original does not make."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import zoo
from small_models_snac import SMALL_SNAC, folded, old_weight_norm, small_snac
from zoo import registry
from zoo.checkpoint import as_ours, require_complete
from zoo.codecs.snac import SNAC, SNACConfig
from zoo.codecs.snac.checkpoint import CHECKPOINT
from zoo.tokenizer import Budget

CASES = Path(__file__).parent / "golden" / "snac"
MANIFESTS = Path(__file__).parent / "golden" / "manifests"
SPEECH, MUSIC = "speech24_w8", "music32_attn"
RUNS = [(SPEECH, 1), (SPEECH, 2048), (SPEECH, 5000), (SPEECH, 24001), (MUSIC, 100), (MUSIC, 12288), (MUSIC, 20001)]
# Odd strides, windows that coarse frames do not divide, levels of one rate, dense convolutions.
ODD = [
    SMALL_SNAC,
    SNACConfig(16_000, 4, (3, 5), 16, (5, 3), None, 16, 4, (6, 2, 3, 1), noise=False),
    SNACConfig(16_000, 16, (2, 3), 64, (6,), 5, 16, 4, (4, 2), depthwise=False),
    SNACConfig(16_000, 4, (9, 2), 16, (2, 9), None, 16, 4, (1, 1), depthwise=False),
    SNACConfig(16_000, 4, (2, 2), 16, (4,), None, 16, 4, (2,)),
]


@cache
def raw_config(case: str) -> dict[str, object]:
    content: dict[str, dict[str, object]] = json.loads((CASES / case / "config.json").read_text())
    return content["model"]


@cache
def model(case: str) -> SNAC:
    return zoo.load_upstream("snac", raw_config(case), CASES / case / "weights.safetensors")


@cache
def recorded(case: str) -> dict[str, Tensor]:
    return load_file(CASES / case / "io.safetensors")


def difference(left: Tensor, right: Tensor) -> float:
    assert left.shape == right.shape
    return (left - right).abs().max().item()


def speech_like(samples: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    envelope = F.interpolate(torch.rand(1, 1, samples // 500 + 2, generator=generator), samples, mode="linear")
    return torch.randn(samples, generator=generator) * envelope[0, 0] * 0.5


def codes_of_levels(tokenizer: SNAC, tokens: zoo.Tokens) -> list[Tensor]:
    """Codes of each level in time order, ``[batch, steps]``."""
    levels = range(len(tokenizer.config.vq_strides))
    return [tokens.codes()[..., tokenizer.config.places_of(level)].flatten(1) for level in levels]


def tokens_of_levels(tokenizer: SNAC, levels: list[Tensor]) -> Tensor:
    """Codes ``[batch, frames, places]`` from those of each level in time order."""
    config = tokenizer.config
    split = [
        own.unflatten(1, (-1, config.vq_strides[0] // stride)) for own, stride in zip(levels, config.vq_strides, strict=True)
    ]
    return torch.stack([split[level][..., index] for level, index in config.places], dim=-1)


# ------------------------------------------------------------------------------------------------------------ golden cases


@pytest.mark.parametrize(("case", "samples"), RUNS)
def test_golden_ids_latents_and_audio(case: str, samples: int) -> None:
    tokenizer, io = model(case), recorded(case)
    tokens = tokenizer.encode(io[f"wav_{samples}"])
    assert torch.equal(tokens.ids[0], io[f"flat_{samples}"])
    for level, codes in enumerate(codes_of_levels(tokenizer, tokens)):
        assert torch.equal(codes, io[f"codes_{samples}_{level}"])
    with torch.inference_mode():
        missing = -samples % (tokenizer.config.hop_length * tokenizer.config.unit)
        latents = tokenizer.encoder(F.pad(io[f"wav_{samples}"][:, 0] / 32768, (0, missing)))
        assert difference(latents.transpose(1, 2), io[f"z_{samples}"]) < 4e-4
        assert difference(tokenizer.vectors_of(tokens.codes()).transpose(1, 2), io[f"zq_{samples}"]) < 4e-4
    drawn = [io[f"noise_{samples}_{block}"] for block in range(4)]
    assert difference(tokenizer.decode(tokens, noise="zero", trim=False)[0], io[f"rec0_{samples}"][0]) < 2e-4
    assert difference(tokenizer.decode(tokens, noise=drawn, trim=False)[0], io[f"rec_{samples}"][0]) < 2e-4
    official = tokenizer.decode(tokens, noise="official", generator=torch.Generator().manual_seed(1234))[0]
    assert difference(official, io[f"rec_{samples}"][0, :, :samples]) < 2e-4


@pytest.mark.parametrize(("case", "name"), [(SPEECH, "1"), (SPEECH, "3"), (MUSIC, "1"), (MUSIC, "2")])
def test_golden_random_codes(case: str, name: str) -> None:
    tokenizer, io = model(case), recorded(case)
    levels = [io[f"rand_codes_{name}_{level}"] for level in range(len(tokenizer.config.vq_strides))]
    codes = tokens_of_levels(tokenizer, levels)
    assert difference(tokenizer.decode(codes, noise="zero")[0], io[f"rand_rec0_{name}"][0]) < 2e-4


@pytest.mark.parametrize("case", [SPEECH, MUSIC])
def test_golden_batch_and_ragged_batch(case: str) -> None:
    tokenizer, io = model(case), recorded(case)
    tokens = tokenizer.encode(list(io["batch_wav"]))
    for level, codes in enumerate(codes_of_levels(tokenizer, tokens)):
        assert torch.equal(codes, io[f"batch_codes_{level}"])
    assert difference(torch.stack(tokenizer.decode(tokens, noise="zero")), io["batch_rec0"]) < 2e-4
    lengths = [samples for own, samples in RUNS if own == case]
    ragged = tokenizer.encode([io[f"wav_{samples}"][0] for samples in lengths])
    for ids, audio, samples in zip(ragged.unpadded(), tokenizer.decode(ragged, noise="zero"), lengths, strict=True):
        assert torch.equal(ids, io[f"flat_{samples}"])
        assert difference(audio, io[f"rec0_{samples}"][0, :, :samples]) < 2e-4


@pytest.mark.parametrize("case", [SPEECH, MUSIC])
def test_golden_intermediates(case: str) -> None:
    tokenizer, io = model(case), recorded(case)
    samples = {SPEECH: 5000, MUSIC: 20001}[case]
    waveform = io[f"wav_{samples}"][:, 0] / 32768
    found: dict[str, Tensor] = {}
    with_attention = case == MUSIC
    encoder = {"stem": 0, **{f"stages.{i}": i + 1 for i in range(4)}, "out": 6 if with_attention else 5}
    decoder = {"stem": 0, "widen": 1, **{f"stages.{i}": i + 2 + with_attention for i in range(4)}}
    decoder["snake"] = 6 + with_attention
    if with_attention:
        encoder["attention"], decoder["attention"] = 5, 2
    hooks = [
        part.get_submodule(ours).register_forward_hook(
            lambda module, given, out, key=f"{kind}.{theirs}": found.__setitem__(key, out)
        )
        for kind, part, names in (("encoder.block", tokenizer.encoder, encoder), ("decoder.model", tokenizer.decoder, decoder))
        for ours, theirs in names.items()
    ]
    try:
        with torch.inference_mode():
            tokenizer.encoder(F.pad(waveform, (0, -samples % (tokenizer.config.hop_length * tokenizer.config.unit))))
            tokenizer.decoder(io[f"zq_{samples}"].transpose(1, 2), None)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(found) == len(encoder) + len(decoder)
    for key, out in found.items():
        expected, actual = io[f"mid.{key}"], out.transpose(1, 2)
        if actual.shape[2] > 192:
            actual = torch.cat([actual[..., :64], actual[..., -64:]], dim=2)
        assert difference(actual, expected) < 2e-4 * expected.square().mean().sqrt(), key


# --------------------------------------------------------------------------------------------------------- ids and their order


def config_of(rate: str) -> SNACConfig:
    """The catalogue's."""
    settings = registry.get(f"snac-{rate}").config
    return SNACConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()})


def test_order_and_rates_of_the_official_models() -> None:
    tokenizer, music = config_of("24khz"), config_of("32khz")
    assert tokenizer.frame.order == (0, 1, 2, 2, 1, 2, 2)
    assert tokenizer.frame.offsets == tuple(4096 * place for place in range(7))
    assert music.frame.order == (0, 1, 2, 3, 3, 2, 3, 3, 1, 2, 3, 3, 2, 3, 3)
    with torch.device("meta"):
        spec = SNAC(tokenizer).spec
    assert (round(spec.token_rate, 2), spec.bit_rate, spec.vocab_size) == (82.03, 984.375, 28672)


def test_prefixes_and_coarse_levels_decode() -> None:
    tokenizer = model(SPEECH)
    tokens = tokenizer.encode(recorded(SPEECH)["wav_24001"])
    whole = tokenizer.decode(tokens, trim=False)[0]
    prefix = tokenizer.decode(tokens.truncate(7 * 8), trim=False)[0]
    # The last three frames of a prefix hear its end.
    assert prefix.shape[1] == 8 * 2048
    assert difference(prefix[:, : 5 * 2048], whole[:, : 5 * 2048]) < 1e-5
    coarse = [tokenizer.decode(tokens.keep(levels))[0] for levels in (1, 2, 3)]
    errors = [difference(audio, tokenizer.decode(tokens)[0]) for audio in coarse]
    assert errors[0] > 0.01 and errors[1] > 0.01 and errors[2] == 0


def test_windows_of_attention_are_whole_or_completed() -> None:
    tokenizer = model(MUSIC)
    ids = recorded(MUSIC)["flat_20001"]
    with pytest.raises(zoo.InputError, match="item 1: 5 frames are no whole windows"):
        tokenizer.decode([ids, ids[: 5 * 15]])
    [audio] = tokenizer.decode([ids[: 5 * 15]], complete=True)
    repeated = tokenizer.tokens([torch.cat([ids[: 5 * 15], *[ids[4 * 15 : 5 * 15]] * 3])])
    assert audio.shape == (1, 5 * 8 * 384)
    assert torch.equal(audio, tokenizer.decode(repeated)[0][:, : audio.shape[1]])


# ------------------------------------------------------------------------------------------------- batches, chunks, streams


@pytest.mark.parametrize("config", ODD)
def test_windows_and_streams_give_the_numbers_of_the_whole(config: SNACConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = small_snac(1, config)
    unit = config.hop_length * config.unit
    sound = [(speech_like(round(units * unit) + 1, seed), config.sample_rate) for seed, units in enumerate((4.3, 3, 0.4, 2.7))]
    frames = [-(-len(waveform) // unit) * unit // config.coarse_hop for waveform, _ in sound]
    monkeypatch.setattr(SNAC, "at_once", {"encode": Budget(10**9, 1), "decode": Budget(10**9, 1)})
    alone = [tokenizer.encode(item) for item in sound]
    heard = [tokenizer.decode(tokens, trim=False)[0] for tokens in alone]
    assert [int(tokens.lengths) for tokens in alone] == [count * len(config.places) for count in frames]
    # One pass over the first item, with nothing of windows in it.
    with torch.inference_mode():
        padded = F.pad(sound[0][0], (0, -len(sound[0][0]) % unit))[None]
        codes = tokenizer.codes_of(tokenizer.encoder(padded))
        assert torch.equal(codes[0], alone[0].codes()[0])
        drawn = [torch.zeros(1, codes.shape[1] * config.vq_strides[0] * steps, 1) for steps in _steps(config)]
        silent = tokenizer.decoder(tokenizer.vectors_of(codes), drawn if config.noise else None)
    assert difference(silent, tokenizer.decode(alone[0], noise="zero", trim=False)[0]) < 2e-5
    for units, together in ((1, 1), (9, 3)):
        monkeypatch.setattr(SNAC, "_together", together)
        budget = Budget(units * unit, 1), Budget(units * config.unit, 1)
        monkeypatch.setattr(SNAC, "at_once", dict(zip(("encode", "decode"), budget, strict=True)))
        tokens = tokenizer.encode(sound)
        assert all(own.equal(other) for own, other in zip(tokens, alone, strict=True))
        for audio, other in zip(tokenizer.decode(tokens, trim=False), heard, strict=True):
            assert difference(audio, other) < 2e-5
    cuts = random.Random(0)
    with tokenizer.stream_encoder() as listening:
        for piece in _cut(sound[0][0], cuts, (1, unit // 2, 2 * unit)):
            listening.push(piece)
    assert listening.tokens.equal(alone[0])
    with tokenizer.stream_decoder() as speaking:
        parts = [speaking.push(ids) for ids in _cut(alone[0].ids[0], cuts, (1, 30))]
        parts.append(speaking.finish())
    assert difference(torch.cat(parts, dim=1), heard[0]) < 2e-5


def _steps(config: SNACConfig) -> list[int]:
    steps = [1]
    for rate in config.decoder_rates:
        steps.append(steps[-1] * rate)
    return steps[1:]


def _cut(sequence: Tensor, cuts: random.Random, sizes: tuple[int, ...]) -> list[Tensor]:
    pieces, start = [], 0
    while start < len(sequence):
        pieces.append(sequence[start : (start := start + cuts.choice(sizes))])
    return pieces


@pytest.mark.parametrize("case", [SPEECH, MUSIC])
def test_streams_of_the_golden_models(case: str) -> None:
    tokenizer, io = model(case), recorded(case)
    samples = {SPEECH: 24001, MUSIC: 20001}[case]
    waveform, flat = io[f"wav_{samples}"][0, 0], io[f"flat_{samples}"]
    stream = tokenizer.stream_encoder()
    ids = [stream.push(piece) for piece in waveform.split(1_111)]
    assert torch.equal(torch.cat([*ids, stream.finish()]), flat)
    assert int(torch.tensor([len(part) for part in ids]).sum()) > 0, "ids come before the end"
    speaking = tokenizer.stream_decoder(noise="zero")
    audio = [speaking.push(part) for part in flat.split(10)]
    assert difference(torch.cat([*audio, speaking.finish()], dim=1), io[f"rec0_{samples}"][0]) < 2e-4


def test_latency_of_streams_is_as_stated() -> None:
    tokenizer = model(SPEECH)
    stream, waveform = tokenizer.stream_encoder(), speech_like(24_000)
    assert round(stream.latency * 24_000) == 4757
    settled = 4 * 2048 + 4757
    assert len(stream.push(waveform[: settled - 1])) == 3 * 7
    assert len(stream.push(waveform[settled - 1 : settled])) == 7
    speaking = tokenizer.stream_decoder()
    assert round(speaking.latency * 24_000) == 3 * 2048
    ids = stream.tokens.ids[0]
    assert speaking.push(ids[: 3 * 7]).shape[1] == 0
    assert speaking.push(ids[3 * 7 :]).shape[1] == 2048


def test_streams_refuse_what_is_wrong() -> None:
    tokenizer = model(MUSIC)
    stream = tokenizer.stream_encoder(sample_rate=44_100)
    assert len(stream.finish()) == 0
    with pytest.raises(zoo.InputError, match="finished"):
        stream.push(torch.zeros(10))
    ids = recorded(MUSIC)["flat_100"]
    speaking = tokenizer.stream_decoder()
    with pytest.raises(zoo.InputError, match="does not belong to codebook"):
        speaking.push(ids.flip(0))
    for count, reason in ((16, "within a frame"), (30, "no whole windows")):
        speaking = tokenizer.stream_decoder()
        speaking.push(ids[:count])
        with pytest.raises(zoo.InputError, match=reason):
            speaking.finish()


_LONG = """
import resource, sys, torch
sys.path.insert(0, "tests")
from small_models_snac import small_snac
from zoo.codecs.snac import SNACConfig
tokenizer = small_snac(0, SNACConfig(8_000, 4, (8, 8, 8), 32, (8, 8, 8), None, 32, 4, (4, 2, 1)))
torch.set_num_threads(1)
waveform = torch.zeros(int(sys.argv[1])).normal_(generator=torch.Generator().manual_seed(0))
tokenizer.decode(tokenizer.encode((waveform[:300_000], 8_000)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tokens = tokenizer.encode((waveform, 8_000))
assert tokenizer.decode(tokens)[0].shape[1] == len(waveform)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_length() -> None:
    """Samples go in, come out and are cut; the first layer of a whole recording alone would be 4 times as many numbers."""
    done = subprocess.run([sys.executable, "-c", _LONG, "3000000"], check=True, capture_output=True, text=True)
    assert int(done.stdout) * 1024 < 6 * 4 * 3_000_000


# ------------------------------------------------------------------------------------------------------------------- noise


def test_seeded_noise_belongs_to_items() -> None:
    tokenizer = model(SPEECH)
    tokens = tokenizer.encode([speech_like(samples, samples) for samples in (9_000, 4_000, 9_000)])
    default, other = tokenizer.decode(tokens), tokenizer.decode(tokens, seed=1)
    assert all(torch.equal(left, right) for left, right in zip(default, tokenizer.decode(tokens), strict=True))
    assert all(difference(left, right) > 1e-3 for left, right in zip(default, other, strict=True))
    mixed = tokenizer.decode(tokens, seed=[1, 0, 1])
    for audio, expected in zip(mixed, (other[0], default[1], other[2]), strict=True):
        assert difference(audio, expected) < 1e-5
    assert difference(tokenizer.decode(tokens[1])[0], default[1]) < 1e-5


def test_seeded_noise_is_drawn_as_written_down() -> None:
    """Block ``k`` draws from a generator of ``seed + k``, one coarse frame after the other."""
    tokenizer = model(SPEECH)
    tokens = tokenizer.encode(recorded(SPEECH)["wav_5000"])
    blocks = []
    for block, steps in enumerate(_steps(tokenizer.config)):
        generator = torch.Generator().manual_seed(7 + block)
        frames = [torch.randn(4 * steps, generator=generator) for _ in range(3)]
        blocks.append(torch.cat(frames)[None, None])
    assert difference(tokenizer.decode(tokens, noise=blocks)[0], tokenizer.decode(tokens, seed=7)[0]) < 1e-6


def test_bad_noise() -> None:
    tokenizer = model(SPEECH)
    tokens = tokenizer.encode([speech_like(5_000), speech_like(100)])
    steps = _steps(tokenizer.config)
    for options, reason in (
        ({"noise": "pink"}, "must be seeded, zero, official"),
        ({"noise": "official"}, "items of one length"),
        ({"noise": [torch.zeros(1, 1, 12 * step) for step in steps[:3]]}, "noise of 3 blocks"),
        ({"noise": [torch.zeros(1, 1, 11 * step) for step in steps]}, r"noise must be \[2, 1, 96\]"),
        ({"seed": [1, 2, 3]}, "3 seeds do not fit 2 items"),
        ({"seed": 2**64}, "a seed is a whole number of 64 bits"),
    ):
        with pytest.raises(zoo.InputError, match=reason):
            tokenizer.decode(tokens, **options)


# -------------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("rate", ["24khz", "32khz", "44khz"])
def test_manifests_fill_the_models(rate: str) -> None:
    manifest = json.loads((MANIFESTS / f"snac-{rate}.json").read_text())
    entry = registry.get(f"snac-{rate}")
    config = CHECKPOINT.config(manifest["config"])
    assert config == config_of(rate)
    assert (entry.weights.repo, entry.weights.file) == (manifest["hf_repo"], manifest["file"])
    shapes = manifest["tensors"]
    assert len(shapes) == manifest["num_tensors"]
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
    found, named = CHECKPOINT.convert(state, config)
    require_complete(SNAC, found, named)
    last = list(shapes)[-1]
    with pytest.raises(zoo.KeysError, match=r"missing: decoder\.out\.weight"):
        as_ours(SNAC, {key: tensor for key, tensor in state.items() if key != last}, config)
    with pytest.raises(zoo.KeysError, match="unexpected"):
        as_ours(SNAC, state | {"encoder.block.1.extra": torch.zeros(1)}, config)


def test_other_spellings_of_weight_norm() -> None:
    io, state = recorded(SPEECH), load_file(CASES / SPEECH / "weights.safetensors")
    for spelling in (old_weight_norm, folded):
        tokenizer = zoo.load_upstream("snac", raw_config(SPEECH), spelling(state))
        assert tokenizer.fingerprint == model(SPEECH).fingerprint
        tokens = tokenizer.encode(io["wav_24001"])
        assert torch.equal(tokens.ids[0], io["flat_24001"])
        assert difference(tokenizer.decode(tokens, noise="zero", trim=False)[0], io["rec0_24001"][0]) < 2e-4


def test_contradictions_are_refused() -> None:
    state = load_file(CASES / SPEECH / "weights.safetensors")
    with pytest.raises(zoo.KeysError, match=r"pass config\.json"):
        zoo.load_upstream("snac", None, state)
    for changes, reason in (
        ({"vq_strides": [2, 1]}, "3 levels in the tensors and 2"),
        ({"attn_window_size": 32}, "no attention in the tensors"),
        ({"encoder_dim": 16}, "encoder_dim is 8 in the tensors and 16"),
        ({"noise": False}, "noise is True in the tensors"),
        ({"latent_dim": 64}, "latent_dim is 64"),
        ({"vq_strides": [4, 3, 1]}, "multiple of the others"),
        ({"decoder_rates": [8, 8, 8, 2]}, "different products"),
        ({"encoder_rates": [1, 8, 8, 8]}, "at least 2"),
        ({"bandwidth": 3}, "bandwidth"),
    ):
        with pytest.raises(zoo.WeightsError, match=reason):
            zoo.load_upstream("snac", raw_config(SPEECH) | changes, state)


# --------------------------------------------------------------------------------------------------------------- precision


def test_ids_survive_every_precision_setting() -> None:
    io = recorded(SPEECH)
    tokenizer = zoo.load_upstream("snac", raw_config(SPEECH), CASES / SPEECH / "weights.safetensors").to(torch.bfloat16)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            tokens = tokenizer.encode(io["wav_24001"])
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(tokens.ids[0], io["flat_24001"])
    audio = tokenizer.double().decode(tokens, noise="zero", trim=False)[0]
    assert audio.dtype == torch.float32


def test_training_path_has_gradients_and_equals_inference() -> None:
    config = SNACConfig(16_000, 16, (2, 3), 64, (6,), 5, 16, 4, (4, 2))
    tokenizer = small_snac(3, config).requires_grad_(True)
    sound = speech_like(config.unit * config.hop_length * 2)
    latents = tokenizer.encoder(sound[None])
    noise = [torch.ones(1, latents.shape[1] * steps, 1) for steps in _steps(config)]
    waveform = tokenizer.decoder(latents, noise)
    (waveform.square().mean() + tokenizer.quantizer.vectors(tokenizer.quantizer.ids(latents)).square().mean()).backward()
    # The search has no gradient, and so neither what is in front of it.
    missing = [name for name, own in tokenizer.named_parameters() if own.grad is None and "in_proj" not in name]
    assert not missing
    assert torch.equal(tokenizer.codes_of(latents), tokenizer.encode((sound, 16_000)).codes())


def test_channels_lengths_and_rates() -> None:
    tokenizer = model(SPEECH)
    left, right = speech_like(3_000, 1), speech_like(3_000, 2)
    stereo = tokenizer.encode(torch.stack([left, right]))
    assert stereo.tolist() == tokenizer.encode((left + right) / 2).tolist()
    assert tokenizer.decode(stereo)[0].shape == (1, 3_000)
    resampled = tokenizer.encode((torch.zeros(10_001), 44_100))
    assert tokenizer.decode(resampled, sample_rate="original")[0].shape == (1, 10_001)

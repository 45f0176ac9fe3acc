"""WavTokenizer against the original code's outputs, and the promises that the original does not make."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import zoo
from hash_weights import wavtokenizer_state
from small_models import SMALL, small_wavtokenizer, upstream_state
from small_models_adapters import config_of, refilled, state_of
from zoo import media, registry
from zoo.checkpoint import as_ours
from zoo.codecs.wavtokenizer import WavTokenizer, WavTokenizerConfig, decoder
from zoo.nn.conv import reflect_pad
from zoo.tokenizer import Budget

CASES = Path(__file__).parent / "golden" / "wavtokenizer"
MANIFESTS = Path(__file__).parent / "golden" / "manifests"
LENGTHS = (1, 3, 160, 319, 320, 321, 640, 1000, 2399, 7777, 24000)


@cache
def model(case: str) -> WavTokenizer:
    return zoo.load_upstream("wavtokenizer", CASES / case / "config.json", CASES / case / "weights.safetensors")


@cache
def recorded(case: str) -> dict[str, Tensor]:
    return load_file(CASES / case / "io.safetensors")


@cache
def full_size() -> WavTokenizer:
    """The official architecture with weights by formula."""
    manifest = json.loads((MANIFESTS / "wavtokenizer-small-320-24k-4096.json").read_text())
    config = json.loads((CASES / "full320_hash" / "config.json").read_text())
    return zoo.load_upstream("wavtokenizer", config, wavtokenizer_state(manifest["tensors"], config["weight_seed"]))


def difference(left: Tensor, right: Tensor) -> float:
    assert left.shape == right.shape
    return (left - right).abs().max().item()


def speech_like(samples: int, seed: int = 0) -> Tensor:
    """Noise through a slow random envelope, so that frames differ."""
    generator = torch.Generator().manual_seed(seed)
    envelope = torch.nn.functional.interpolate(
        torch.rand(1, 1, samples // 500 + 2, generator=generator), samples, mode="linear"
    )
    return torch.randn(samples, generator=generator) * envelope[0, 0] * 0.5


# ------------------------------------------------------------------------------------------------------------ golden cases


@pytest.mark.parametrize("length", LENGTHS)
def test_golden_codes_latents_and_audio(length: int) -> None:
    tokenizer, io = model("hop320_w4"), recorded("hop320_w4")
    tokens = tokenizer.encode(io[f"wav_{length}"])
    assert torch.equal(tokens.ids, io[f"codes_{length}"][0])
    with torch.inference_mode():
        latents = tokenizer.encoder(io[f"wav_{length}"]).transpose(1, 2)
    assert difference(latents, io[f"z_{length}"]) < 1e-3
    whole = tokenizer.decode(tokens, trim=False)[0]
    assert difference(whole, io[f"rec_{length}"]) < (1e-4 if len(tokens.ids[0]) == 1 else 3e-5)
    assert torch.equal(tokenizer.decode(tokens)[0], whole[:, :length])


@pytest.mark.parametrize("length", [1, 2, 3, 75])
def test_golden_random_codes(length: int) -> None:
    io = recorded("hop320_w4")
    audio = model("hop320_w4").decode(io[f"rand_codes_{length}"][0])[0]
    assert difference(audio, io[f"rand_rec_{length}"]) < (1e-4 if length == 1 else 3e-5)


def test_golden_bandwidth_ids() -> None:
    io = recorded("hop320_w4")
    names = [name for name in io if "_bw" in name]
    assert len(names) == 3
    for name in names:
        length, _, bandwidth = name.removeprefix("rec_").partition("_bw")
        audio = model("hop320_w4").decode(io[f"codes_{length}"][0], bandwidth_id=int(bandwidth))[0]
        assert difference(audio, io[name]) < 3e-5


def test_golden_intermediates() -> None:
    tokenizer, io = model("hop320_w4"), recorded("hop320_w4")
    with torch.inference_mode():
        vectors = tokenizer.embed(io["codes_2399"][0])
        assert torch.equal(vectors.transpose(1, 2), io["mid.quantized"])
        mixed, (scale, shift) = tokenizer.backbone.mix(vectors, None)
        assert difference((mixed * scale + shift).transpose(1, 2), io["mid.backbone.pos_net.5"]) < 1e-3
        refined = tokenizer.backbone.refine(mixed, (scale, shift), None, 0)
        assert difference(refined, io["mid.backbone.final_layer_norm"]) < 1e-3
        assert difference(tokenizer.head.out(refined), io["mid.head.out"]) < 1e-3


def test_golden_batch() -> None:
    tokenizer, io = model("hop320_w4"), recorded("hop320_w4")
    tokens = tokenizer.encode(list(io["batch_wav"]))
    assert torch.equal(tokens.ids, io["batch_codes"][0])
    assert difference(torch.cat(tokenizer.decode(tokens, trim=False)), io["batch_rec"]) < 3e-5


@pytest.mark.parametrize("length", [1, 321, 4801, 36000])
def test_golden_full_size(length: int) -> None:
    tokenizer, io = full_size(), recorded("full320_hash")
    tokens = tokenizer.encode(io[f"wav_{length}"])
    assert torch.equal(tokens.ids, io[f"codes_{length}"][0])
    with torch.inference_mode():
        latents = tokenizer.encoder(io[f"wav_{length}"]).transpose(1, 2)
    assert difference(latents[:, :: 512 // io[f"z_{length}"].shape[1]], io[f"z_{length}"]) < 2e-3
    assert difference(tokenizer.decode(tokens, trim=False)[0], io[f"rec_{length}"]) < 5e-5
    if length == 4801:
        assert difference(tokenizer.decode(tokens, trim=False, bandwidth_id=3)[0], io["rec_4801_bw3"]) < 5e-5


def test_golden_weights_by_formula() -> None:
    check = json.loads((CASES / "full320_hash" / "weight_check.json").read_text())
    manifest = json.loads((MANIFESTS / "wavtokenizer-small-320-24k-4096.json").read_text())
    state = wavtokenizer_state(manifest["tensors"], 1001)
    for key, expected in check.items():
        assert state[key].flatten()[:4].tolist() == expected["first4"], key
        assert state[key].double().sum().item() == pytest.approx(expected["sum"], abs=1e-6), key


def test_golden_long_recording() -> None:
    tokenizer, io = model("long_hop600"), recorded("long_hop600")
    tokens = tokenizer.encode((io["wav_int16"], 24_000))
    assert torch.equal(tokens.ids, io["codes"][0])
    audio = tokenizer.decode(tokens, trim=False)[0][0]
    for start, window in zip(io["rec_starts"].tolist(), io["rec_windows"], strict=True):
        assert difference(audio[start : start + len(window)], window) < 5e-5


@pytest.mark.parametrize("name", sorted(name for name in recorded("convert_audio") if name.startswith("in_")))
def test_golden_preparation(name: str) -> None:
    io = recorded("convert_audio")
    prepared = media.read_audio((io[name], int(name.split("_")[1])), sample_rate=24_000, mono=True)
    assert difference(prepared.waveform, io[name.replace("in_", "out_")]) < 2e-6


# ---------------------------------------------------------------------------------------------------- official checkpoints


@pytest.mark.parametrize("name", [n for n in registry.names("wavtokenizer-*") if not registry.get(n).embedded])
def test_manifest_maps_both_ways(name: str) -> None:
    """Every tensor of the official file is used or knowingly dropped, and every tensor of ours is filled."""
    entry = registry.get(name)
    manifests = [json.loads(path.read_text()) for path in MANIFESTS.glob("wavtokenizer-*.json")]
    [manifest] = [m for m in manifests if (m["hf_repo"], m["file"]) == (entry.weights.repo, entry.weights.file)]
    official = {key: torch.empty(shape, device="meta") for key, shape in manifest["tensors"].items()}
    official |= {
        f"{prefix}x": torch.empty(1, device="meta") for prefix in manifest["other_state_dict_prefixes_in_training_class"]
    }
    wanted = {key: tensor for key, tensor in official.items() if WavTokenizer.checkpoint.wanted(key)}
    statistics = {key for key in wanted if key.endswith("inited")}
    # 227 tensors count the codebook's two running statistics and the Hann window, which are not read.
    assert len(wanted) == manifest["inference_tensors"] - 3
    config = registry.check_config(entry)
    found, state = as_ours(WavTokenizer, {k: t for k, t in wanted.items() if k not in statistics}, config)
    assert found == config
    with torch.device("meta"):
        ours = WavTokenizer(config).state_dict()
    assert {key: tensor.shape for key, tensor in state.items()} == {key: tensor.shape for key, tensor in ours.items()}


def test_every_manifest_has_an_entry() -> None:
    files = {registry.get(name).weights.file for name in registry.names("wavtokenizer-*")}
    for path in MANIFESTS.glob("wavtokenizer-*.json"):
        assert json.loads(path.read_text())["file"] in files


def test_weight_norm_spellings_load_alike() -> None:
    old = load_file(CASES / "hop320_w4" / "weights.safetensors")
    new, folded = {}, {}
    for key, tensor in old.items():
        if key.endswith("weight_g"):
            new[key.replace("weight_g", "parametrizations.weight.original0")] = tensor
        elif key.endswith("weight_v"):
            new[key.replace("weight_v", "parametrizations.weight.original1")] = tensor
            norm = tensor.double().flatten(1).norm(dim=1)[:, None, None]
            folded[key.replace("weight_v", "weight")] = (old[key.replace("_v", "_g")] * tensor / norm).float()
        else:
            new[key] = folded[key] = tensor
    config = CASES / "hop320_w4" / "config.json"
    audio = recorded("hop320_w4")["wav_24000"]
    for state in (new, folded):
        assert zoo.load_upstream("wavtokenizer", config, state).encode(audio).equal(model("hop320_w4").encode(audio))


def test_sizes_follow_from_the_tensors_alone() -> None:
    weights = CASES / "long_hop600" / "weights.safetensors"
    assert zoo.load_upstream("wavtokenizer", None, weights).config == model("long_hop600").config


def test_upstream_yaml(tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(json.loads((CASES / "hop320_w4" / "config.json").read_text())))
    loaded = zoo.load_upstream("wavtokenizer", path, CASES / "hop320_w4" / "weights.safetensors")
    assert loaded.config == model("hop320_w4").config


def test_contradictory_upstream_config() -> None:
    raw = json.loads((CASES / "hop320_w4" / "config.json").read_text())
    raw["model"]["init_args"]["head"]["init_args"]["hop_length"] = 300
    with pytest.raises(zoo.WeightsError, match="do not fit ratios"):
        zoo.load_upstream("wavtokenizer", raw, CASES / "hop320_w4" / "weights.safetensors")


def test_uninitialised_codebook_is_refused() -> None:
    state = load_file(CASES / "hop320_w4" / "weights.safetensors")
    state["feature_extractor.encodec.quantizer.vq.layers.0._codebook.inited"] = torch.zeros(1)
    with pytest.raises(zoo.KeysError, match="never initialised"):
        zoo.load_upstream("wavtokenizer", None, state)


# ------------------------------------------------------------------------------------------------- batches, chunks, streams


def test_ragged_batch_equals_single_items() -> None:
    tokenizer, io = model("hop320_w4"), recorded("hop320_w4")
    tokens = tokenizer.encode([io[f"wav_{length}"] for length in LENGTHS])
    assert tokens.lengths.tolist() == [-(-length // 320) for length in LENGTHS]
    for ids, length in zip(tokens.unpadded(), LENGTHS, strict=True):
        assert torch.equal(ids, io[f"codes_{length}"][0, 0])
    for audio, length in zip(tokenizer.decode(tokens, trim=False), LENGTHS, strict=True):
        assert difference(audio, io[f"rec_{length}"]) < 1e-4


def test_masked_decoding_equals_single_items() -> None:
    """Very different lengths in one padded pass, which decode itself avoids."""
    tokenizer, io = model("hop320_w4"), recorded("hop320_w4")
    sequences = [io["codes_24000"][0, 0], io["codes_2399"][0, 0], io["rand_codes_2"][0, 0]]
    ids = tokenizer.tokens(sequences).ids
    with torch.inference_mode():
        synthesis = decoder.Synthesis(tokenizer.backbone, tokenizer.head, 60_000)
        total = synthesis.overlapped(tokenizer.codebook(ids.clamp(min=0)), (ids >= 0)[..., None], 0)
    for row, name in enumerate(["rec_24000", "rec_2399", "rand_rec_2"]):
        audio = synthesis.finish(total[row : row + 1], len(sequences[row]))
        assert difference(audio, io[name]) < 3e-5


@pytest.mark.parametrize("samples", [5_000, 20_000, 10**7])
def test_any_chunk_size_gives_the_same_ids(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WavTokenizer.at_once, "encode", Budget(samples, samples))
    io = recorded("long_hop600")
    assert torch.equal(model("long_hop600").encode((io["wav_int16"], 24_000)).ids, io["codes"][0])
    tokenizer, short = model("hop320_w4"), recorded("hop320_w4")
    tokens = tokenizer.encode([short[f"wav_{length}"] for length in LENGTHS])
    for ids, length in zip(tokens.unpadded(), LENGTHS, strict=True):
        assert torch.equal(ids, short[f"codes_{length}"][0, 0])


@pytest.mark.parametrize("ratios", [(4, 2, 2, 2), (2, 2, 2, 2), (3, 5, 2, 7), (6, 5, 5, 4)])
def test_chunks_are_exact_for_any_ratios(ratios: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    config = WavTokenizerConfig(**(vars(SMALL) | {"ratios": ratios}))
    tokenizer = small_wavtokenizer(1, config)
    audio = [speech_like(int(frames * config.hop_length), seed) for seed, frames in enumerate((70.3, 33, 17.5, 16.01, 2))]
    monkeypatch.setitem(WavTokenizer.at_once, "encode", Budget(10**9, 10**9))
    whole = tokenizer.encode(audio)
    monkeypatch.setitem(WavTokenizer.at_once, "encode", Budget(16 * config.hop_length, 16 * config.hop_length))
    assert tokenizer.encode(audio).equal(whole)


@pytest.mark.parametrize("seed", range(4))
def test_streaming_encoder_gives_the_ids_of_the_whole(seed: int) -> None:
    tokenizer, io = model("hop320_w4"), recorded("hop320_w4")
    cuts = random.Random(seed)
    audio = io["wav_24000"][0]
    ids, start = [], 0
    with tokenizer.stream_encoder() as stream:
        while start < len(audio):
            size = cuts.choice([1, 50, 320, 700, 5_000])
            ids.append(stream.push(audio[start : start + size]))
            start += size
        ids.append(stream.finish())
    assert torch.equal(torch.cat(ids), io["codes_24000"][0, 0])
    assert stream.tokens.equal(tokenizer.encode(audio))


def test_streaming_latency_is_as_stated() -> None:
    """The id of frame f is out once ``latency`` seconds have arrived since the frame began, and not a sample before."""
    tokenizer = model("hop320_w4")
    stream = tokenizer.stream_encoder()
    audio = speech_like(24_000)
    latency = round(stream.latency * 24_000)
    assert latency == 1515  # the specification counts the index of the last sample, 1514
    frame = 20
    settled = stream.push(audio[: frame * 320 + latency - 1])
    assert len(settled) == frame
    assert len(stream.push(audio[frame * 320 + latency - 1 : frame * 320 + latency])) == 1


def test_streaming_encoder_resamples() -> None:
    tokenizer = model("hop320_w4")
    audio = speech_like(44_100)
    with tokenizer.stream_encoder(sample_rate=44_100) as stream:
        for piece in audio.split(3_000):
            stream.push(piece)
    assert stream.tokens.equal(tokenizer.encode((audio, 44_100)))


@pytest.mark.parametrize("samples", [1, 319, 1_500, 2_000])
def test_streaming_encoder_on_short_audio(samples: int) -> None:
    tokenizer = model("hop320_w4")
    audio = speech_like(samples)
    with tokenizer.stream_encoder() as stream:
        for piece in audio.split(100):
            stream.push(piece)
    assert stream.tokens.equal(tokenizer.encode(audio))


def test_finished_stream_refuses_more() -> None:
    stream = model("hop320_w4").stream_encoder()
    assert len(stream.finish()) == 0
    with pytest.raises(zoo.InputError, match="finished"):
        stream.push(torch.zeros(10))


def test_blocked_decoding_equals_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = model("long_hop600")
    codes = recorded("long_hop600")["codes"][0]
    whole = tokenizer.decode(codes)[0]
    monkeypatch.setitem(WavTokenizer.at_once, "decode", Budget(100, 100))
    for module, block in ((decoder.GroupNorm, 50), (decoder.ResidualBlock, 77), (decoder.Attention, 64)):
        monkeypatch.setattr(module, "BLOCK", block)
    assert difference(tokenizer.decode(codes)[0], whole) < 5e-5


def test_windowed_decoding() -> None:
    """Approximate, but the same however the ids arrive, and of the right length."""
    tokenizer = model("long_hop600")
    codes = recorded("long_hop600")["codes"][0]
    exact = tokenizer.decode(codes)[0]
    windowed = tokenizer.decode(codes, window=200)[0]
    assert windowed.shape == exact.shape
    assert 10 * torch.log10(exact.square().sum() / (exact - windowed).square().sum()) > 3
    with tokenizer.stream_decoder(window=200) as stream:
        streamed = torch.cat([*(stream.push(ids) for ids in codes[0].split(37)), stream.finish()], dim=1)
    assert difference(streamed, windowed) < 1e-5
    short = codes[:, :150]
    assert difference(tokenizer.decode(short, window=200)[0], tokenizer.decode(short)[0]) < 1e-6
    with pytest.raises(zoo.InputError, match="too short"):
        tokenizer.stream_decoder(window=40)


# --------------------------------------------------------------------------------------------------------------- precision


def test_ids_survive_every_precision_setting() -> None:
    tokenizer = zoo.load_upstream(
        "wavtokenizer", CASES / "hop320_w4" / "config.json", CASES / "hop320_w4" / "weights.safetensors"
    )
    io = recorded("hop320_w4")
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            tokens = tokenizer.to(torch.bfloat16).encode(io["wav_24000"])
        assert torch.get_float32_matmul_precision() == "medium", "the user's setting must come back"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(tokens.ids, io["codes_24000"][0])


def test_bfloat16_decoding_stays_close() -> None:
    tokenizer = small_wavtokenizer(2)
    codes = torch.randint(64, (1, 200), generator=torch.Generator().manual_seed(0))
    exact = tokenizer.decode(codes)[0]
    tokenizer.set_precision("bf16")
    assert tokenizer.backbone.convnext[0].pwconv1.weight.dtype == torch.bfloat16
    noise = exact - tokenizer.decode(codes)[0]
    assert 10 * torch.log10(exact.square().sum() / noise.square().sum()) > 25
    with pytest.raises(ValueError, match="fp32, bf16"):
        tokenizer.set_precision("int3")


def test_training_path_has_gradients_and_equals_inference() -> None:
    tokenizer = small_wavtokenizer(3).requires_grad_(True)
    audio = speech_like(40 * SMALL.hop_length)[None]
    latents = tokenizer.encoder(audio)
    waveform = tokenizer.decode_latents(latents)
    waveform.square().mean().backward()
    missing = [name for name, parameter in tokenizer.named_parameters() if parameter.grad is None]
    assert not missing
    ids = tokenizer.codebook.nearest(latents)
    assert torch.equal(ids, tokenizer.encode(audio).ids)
    assert difference(tokenizer.decode_latents(tokenizer.codebook(ids)).detach(), tokenizer.decode(ids)[0]) < 1e-5


# --------------------------------------------------------------------------------------------------------------- bad input


def test_tokens_of_another_checkpoint_are_refused() -> None:
    ours, theirs = small_wavtokenizer(4), small_wavtokenizer(5)
    tokens = ours.encode(speech_like(1_000))
    with pytest.raises(zoo.MismatchError, match="mean nothing to another"):
        theirs.decode(tokens)


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (torch.tensor([[0, 64]]), "item 0: id 64 is outside the vocabulary, 0 to 63"),
        (torch.tensor([[0, 1], [-3, 2]]), "item 1: id -3"),
        (torch.tensor([[0, -1, 2]]), "padding of -1 stands before the end"),
        (torch.tensor([[0.5]]), "ids must be integers"),
        (torch.full((1, 3), -1), "item 0: the sequence is empty"),
        (torch.zeros(0, 3, dtype=torch.int64), "no tokens"),
        (torch.zeros(1, 1, 3, dtype=torch.int64), r"\[batch, length\]"),
    ],
)
def test_bad_ids(ids: Tensor, reason: str) -> None:
    with pytest.raises(zoo.InputError, match=reason):
        small_wavtokenizer().decode(ids)


def test_bad_bandwidth_id() -> None:
    with pytest.raises(zoo.InputError, match="bandwidth_id"):
        small_wavtokenizer().decode(torch.zeros(1, 3, dtype=torch.int64), bandwidth_id=4)


def test_bare_ids_decode_like_tokens() -> None:
    tokenizer = small_wavtokenizer()
    tokens = tokenizer.encode([speech_like(3_000), speech_like(1_000)])
    padded = tokenizer.decode(tokens.ids)
    for wrapped, bare in zip(tokenizer.decode(tokens, trim=False), padded, strict=True):
        assert torch.equal(wrapped, bare)
    assert torch.equal(tokenizer.decode(tokens.ids[0].numpy().tolist() and [tokens.ids[0]])[0], padded[0])


def test_channels_are_averaged_and_integers_scaled() -> None:
    tokenizer = small_wavtokenizer()
    left, right = speech_like(3_000, 1), speech_like(3_000, 2)
    stereo = tokenizer.encode(torch.stack([left, right]))
    assert stereo.tolist() == tokenizer.encode((left + right) / 2).tolist()
    integers = (left.clamp(-1, 0.99) * 32_768).to(torch.int16)
    assert tokenizer.encode(integers.numpy()).tolist() == tokenizer.encode(integers.float() / 32_768).tolist()
    assert len(tokenizer.encode(torch.zeros(3, 1, 500))) == 3, "a tensor [batch, channels, samples] is a list"


def test_decoding_at_the_original_rate_and_length() -> None:
    tokenizer = small_wavtokenizer()
    for rate, samples in ((44_100, 10_001), (16_000, 4_999), (8_000, 7)):
        tokens = tokenizer.encode((np.zeros(samples, np.float32) + 0.1, rate))
        assert tokenizer.decode(tokens, sample_rate="original")[0].shape == (1, samples)
        assert tokenizer.decode(tokens)[0].shape == (1, -(-samples * 24_000 // rate))


def test_upstream_round_trip_through_our_names() -> None:
    tokenizer = small_wavtokenizer(6)
    again = zoo.load_upstream("wavtokenizer", None, upstream_state(tokenizer))
    assert again.fingerprint == tokenizer.fingerprint
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in tokenizer.state_dict().items())


@pytest.mark.parametrize("length", [1, 2, 5])
def test_what_follows_a_short_item_does_not_reach_it(length: int) -> None:
    """Rows behind an item's end are whatever the memory held, a NaN as well."""
    x = torch.randn(1, length, 3, generator=torch.Generator().manual_seed(0))
    behind = torch.full((1, 6, 3), torch.nan)
    with torch.inference_mode():
        alone = reflect_pad(x, 4, 3, activate=True)
        padded = reflect_pad(torch.cat([x, behind], dim=1), 4, 3, lengths=torch.tensor([length]), activate=True)
    assert torch.equal(padded[:, : alone.shape[1]], alone)


# --------------------------------------------------------------------------------------------- the class of transformers


@cache
def library_model() -> Any:
    """A small ``WavTokenizerModel`` with random weights."""
    pytest.importorskip("transformers.models.wavtokenizer", reason="transformers has WavTokenizerModel from 5.24 on")
    from transformers import WavTokenizerConfig as TheirConfig
    from transformers import WavTokenizerModel

    config = TheirConfig(
        num_filters=4, upsampling_ratios=[5, 4, 2, 2], hidden_size=16, codebook_dim=16, codebook_size=64,
        decoder_hidden_size=64, decoder_intermediate_size=48, decoder_num_layers=2,
    )  # fmt: skip
    return refilled(WavTokenizerModel(config), gain=2.0)


@torch.no_grad()
def test_the_library_class_gives_the_same_ids_and_audio() -> None:
    """For an item alone; in its padded batch it gives others, which we do not."""
    theirs = library_model()
    ours = zoo.load_upstream("wavtokenizer", config_of(theirs), state_of(theirs))
    waves = [speech_like(samples, seed) for seed, samples in enumerate((1, 3, 79, 80, 81, 400, 1234, 7777))]
    tokens = ours.encode(waves)
    audio = ours.decode(tokens, trim=False)
    for wave, ids, own in zip(waves, tokens.unpadded(), audio, strict=True):
        assert torch.equal(theirs.encode(wave[None, None]).audio_codes[0, 0], ids)
        assert difference(theirs.decode(ids[None, None]).audio_values[0], own) < 3e-5
    assert len(tokens.ids.unique()) > 10
    padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(wave)) for wave in waves], batch_first=True)
    found = theirs.encode(padded[:, None], mask)
    assert torch.equal(found.audio_codes_mask[:, 0].sum(1).long(), tokens.lengths)
    assert any(
        not torch.equal(row[: len(ids)], ids) for row, ids in zip(found.audio_codes[:, 0], tokens.unpadded(), strict=True)
    )

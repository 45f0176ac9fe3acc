"""Vec-Tok against the public components' recorded outputs, and what it promises beyond them."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import zoo
from small_models_vectok import SMALL_LOGMEL_VECTOK, SMALL_VECTOK, noise, small_vectok
from zoo import media, registry
from zoo.checkpoint import as_ours
from zoo.codecs.vectok import (
    BPE,
    HiFiGANSizes,
    InverseSizes,
    ISTFTSizes,
    LogMelSizes,
    VecTok,
    VecTokConfig,
    Voice,
    WavLMSizes,
    training,
    voice,
    wavlm,
)
from zoo.codecs.vectok.inverse import InverseKMeans
from zoo.codecs.vectok.logmel import LogMel
from zoo.codecs.vectok.recording import overlapping_windows
from zoo.codecs.vectok.units import with_context
from zoo.codecs.vectok.vocoder import HiFiGAN, ISTFTVocoder
from zoo.codecs.vectok.wavlm import bucket
from zoo.tokenizer import Budget

CASES = Path(__file__).parent / "golden" / "vectok"
MANIFESTS = Path(__file__).parent / "golden" / "manifests"
SPEECH = sorted((Path(__file__).parent.parent / "eval" / "samples").glob("*.flac"))[0]


@cache
def recorded(case: str) -> dict[str, Tensor]:
    return load_file(CASES / case / "io.safetensors")


@cache
def settings(case: str) -> dict:
    return json.loads((CASES / case / "config.json").read_text())


@cache
def model(case: str) -> VecTok:
    return zoo.load_upstream("vectok", CASES / case / "config.json", CASES / case / "weights.safetensors")


@cache
def pipeline() -> VecTok:
    """All components of the case in one model: the union of their tensors, and their configurations side by side."""
    config = settings("pipeline-a")
    config = config | {"wavlm": settings(config["wavlm_case"]), "vocoder": settings(config["vocoder_case"])}
    cases = ("pipeline-a", config["wavlm_case"], config["vocoder_case"])
    weights = {key: tensor for case in cases for key, tensor in load_file(CASES / case / "weights.safetensors").items()}
    tokenizer = zoo.load_upstream("vectok", config, weights)
    tokenizer.set_bpe(BPE.from_tokenizer_json(CASES / "pipeline-a" / "tokenizer.json"))
    return tokenizer


@cache
def small(kind: str = "wavlm") -> VecTok:
    return small_vectok(config=SMALL_LOGMEL_VECTOK if kind == "logmel" else SMALL_VECTOK)


KINDS = pytest.mark.parametrize("kind", ["wavlm", "logmel"])


def difference(left: Tensor, right: Tensor) -> float:
    assert left.shape == right.shape
    return (left - right).abs().max().item()


def without_gradients(function):
    return torch.inference_mode()(function)


# ------------------------------------------------------------------------------------------------------------ golden cases


@pytest.mark.parametrize("kind", ["raw", "norm"])
@pytest.mark.parametrize("item", [0, 1])
@without_gradients
def test_golden_wavlm(kind: str, item: int) -> None:
    config = settings("wavlm-l7-d64") | {"normalize_waveform": kind == "norm"}
    tokenizer = zoo.load_upstream("vectok", config, CASES / "wavlm-l7-d64" / "weights.safetensors")
    io = recorded("wavlm-l7-d64")
    wave, expected = io[f"wave_{item}"], io[f"hidden_{kind}_{item}"]
    prepared = tokenizer.analysis.normalise(wave)[None]
    assert difference(tokenizer.analysis.features(prepared)[0], io[f"conv_{kind}_{item}"]) < 1e-4
    assert difference(torch.cat(list(tokenizer.analysis.hidden_states(prepared))), expected) < 1e-4
    assert difference(tokenizer.vectors(wave, pad=False)[0], expected[6]) < 1e-4
    assert expected.std() > 0.5


@without_gradients
def test_golden_wavlm_in_a_padded_batch() -> None:
    io, analysis = recorded("wavlm-l7-d64"), model("wavlm-l7-d64").analysis
    waves = torch.nn.utils.rnn.pad_sequence([io["wave_0"], io["wave_1"]], batch_first=True, padding_value=0.7)
    states = torch.stack(list(analysis.hidden_states(waves, [34, 49])))
    for item, frames in enumerate((34, 49)):
        assert difference(states[:, item, :frames], io[f"hidden_raw_{item}"]) < 1e-4


@without_gradients
def test_attention_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    io, analysis = recorded("wavlm-l7-d64"), model("wavlm-l7-d64").analysis
    monkeypatch.setitem(wavlm._BIAS_NUMBERS, "cpu", 4 * 49 * 10)
    monkeypatch.setattr(wavlm, "_FRONT_FRAMES", 16)
    assert difference(torch.cat(list(analysis.hidden_states(io["wave_1"][None]))), io["hidden_raw_1"]) < 1e-4


def test_golden_buckets_of_distances() -> None:
    assert torch.equal(bucket(torch.arange(-1600, 1601), 320, 800), recorded("wavlm-l7-d64")["bucket_of_distance"].long())


@without_gradients
def test_golden_knnvc_matching() -> None:
    io, analysis = recorded("knnvc-c64-k4"), model("wavlm-l7-d64").analysis
    queries, vectors = analysis(io["source_wave"][None])[0], analysis(io["reference_wave"][None])[0]
    assert difference(queries, io["query_seq"]) < 1e-4
    assert difference(vectors, io["matching_set"]) < 1e-4
    assert difference(voice.cosine_distance(queries, vectors), io["cosine_distance"]) < 2e-6
    assert difference(voice.cosine_distance(queries, vectors), io["cosine_distance_f64"]) < 2e-6
    [(distances, indices)] = voice.nearest_vectors(queries, vectors, settings("knnvc-c64-k4")["topk"])
    assert torch.equal(indices, io["topk_indices"])
    assert difference(distances, io["topk_values"]) < 2e-6
    assert difference(voice.match(queries, vectors, 4), io["matched"]) < 1e-4


def test_golden_knnvc_vocoder() -> None:
    io, tokenizer = recorded("knnvc-c64-k4"), model("knnvc-c64-k4")
    assert tokenizer.config.parts == ("vocoder",) and tokenizer.config.neighbours == 4
    assert difference(tokenizer.vocode(io["matched"])[0], io["vocoded_matched"]) < 1e-4
    assert difference(tokenizer.vocode(io["query_seq"])[0], io["vocoded_query"]) < 1e-4
    assert io["vocoded_query"].std() > 0.1
    loud = voice.to_loudness(io["match_wave_no_loudness"], 16_000, -16)
    assert difference(loud, io["match_wave_loudness_m16"]) < 1e-4
    samples = settings("knnvc-c64-k4")["target_duration"] * 16_000
    longer = voice.match(voice.stretch(io["query_seq"], samples / 320), io["matching_set"], 4)
    assert difference(tokenizer.vocode(longer)[0], io["match_wave_duration"]) < 1e-4


@without_gradients
def test_golden_vocoder_on_the_way() -> None:
    io, vocoder = recorded("knnvc-c64-k4"), model("knnvc-c64-k4").vocoder
    pre = vocoder.lin_pre(io["matched"])
    assert difference(pre, io["hifi_lin_pre"]) < 1e-4
    conv = vocoder.conv_pre(pre.T[None])
    assert difference(conv[0], io["hifi_conv_pre"]) < 1e-4
    assert difference(vocoder.ups[0](F.leaky_relu(conv, 0.1))[0], io["hifi_up0"]) < 1e-4


def test_golden_logmel() -> None:
    io = recorded("knnvc-c64-k4")
    assert difference(LogMel()(io["source_wave"][None])[0], io["logmel_of_source"]) < 1e-4


@without_gradients
def test_golden_inverse() -> None:
    io, tokenizer = recorded("inverse-d64"), model("inverse-d64")
    units = [io["units_0"].long(), io["units_1"].long()]
    prompts = [io["prompt_0"], io["prompt_1"]]
    together = tokenizer.inverse(prompts, [tokenizer.units.vectors[item] for item in units])
    for item in (0, 1):
        embedded = tokenizer.inverse.embed(prompts[item], tokenizer.units.vectors[units[item]])
        assert difference(embedded, io[f"conformer_in_{item}"]) < 1e-4
        assert difference(tokenizer.inverse.refine(embedded[None])[0], io[f"conformer_out_{item}"]) < 1e-4
        [alone] = tokenizer.inverse_vectors([units[item]], prompts[item])
        assert difference(alone, io[f"vectors_{item}"]) < 1e-4
        assert difference(together[item], io[f"vectors_{item}"]) < 1e-4, "padding must not leak into an item"
    assert difference(tokenizer.inverse.layers[0](embedded[None], None)[0], io["layer0_out_last"]) < 1e-4


def test_golden_units_and_pairs() -> None:
    io, case = recorded("units-k48-v256"), settings("units-k48-v256")
    bpe = BPE.from_tokenizer_json(CASES / "units-k48-v256" / "tokenizer.json")
    weights = {"centroids": io["centroids"], "pairs": torch.tensor(bpe.pairs)}
    tokenizer = zoo.load_upstream("vectok", case, weights)
    assert tokenizer.spec.vocab_size == case["vocab_size"] == bpe.vocab_size
    for item in range(3):
        vectors = io[f"vectors_{item}"]
        units = tokenizer.units.nearest(vectors - io[f"mean_{item}"])
        assert torch.equal(units, io[f"units_{item}"][: len(vectors)].long())
    for item in (*range(6), "one", "repeat", "ramp"):
        units, ids = io[f"units_{item}"].long(), io[f"bpe_ids_{item}"].long()
        assert torch.equal(bpe.encode(units), ids)
        assert torch.equal(tokenizer.units.expand(ids), units)
    expected = [tuple(unit for unit in row if unit >= 0) for row in io["expansion"].tolist()]
    assert bpe.expansions() == expected
    embedded = tokenizer.embed([torch.arange(256)])[0]
    means = torch.stack([io["centroids"][list(units)].mean(0) for units in expected])
    assert difference(embedded, means) < 1e-5


def test_golden_pairs_are_learnt_again() -> None:
    io, case = recorded("units-k48-v256"), settings("units-k48-v256")
    corpus = [units.tolist() for units in io["train_units"].split(io["train_lengths"].tolist())]
    learnt = BPE.train(corpus, case["num_units"], case["requested_vocab"], case["min_frequency"])
    assert learnt.pairs == BPE.from_tokenizer_json(CASES / "units-k48-v256" / "tokenizer.json").pairs


def test_golden_pipeline() -> None:
    io, tokenizer = recorded("pipeline-a"), pipeline()
    waves = [io["wave_0"], io["wave_1"]]
    for item, units in enumerate(tokenizer.unit_ids(waves)):
        assert torch.equal(units, io[f"units_{item}"].long())
        assert difference(tokenizer.vectors(waves)[item], io[f"vectors_{item}"]) < 1e-3
    tokens, voices = tokenizer.encode_with_voices(waves)
    assert tokens.tolist() == [io["tokens_0"].tolist(), io["tokens_1"].tolist()]
    assert tokens.equal(tokenizer.encode(waves))
    for item, prompt in ((0, 0), (0, 1), (1, 0)):
        name = f"{item}_prompt_{prompt}"
        own = io[f"vectors_{prompt}"][: settings("pipeline-a")["prompt_frames"]]
        assert difference(voices[prompt].vectors, own) < 1e-3
        [vectors] = tokenizer.inverse_vectors([io[f"units_{item}"].long()], own)
        assert difference(vectors, io[f"decoded_vectors_{name}"]) < 1e-3
        for given in (voices[prompt], own, [own]):
            [wave] = tokenizer.decode(tokens[item], prompt=given)
            assert difference(wave[0], io[f"decoded_wave_{name}"]) < 1e-3
    for item, latents in enumerate(waves):
        whole = tokenizer.vocode(tokenizer.vectors(latents))[0][: len(waves[item])]
        assert difference(whole, io[f"vocoded_vectors_{item}"]) < 1e-3


def test_a_whole_file_in_one_piece(tmp_path: Path) -> None:
    tokenizer = pipeline()
    again = zoo.load(f"local-dir:{tokenizer.save_pretrained(tmp_path)}")
    tokens, voices = tokenizer.encode_with_voices(recorded("pipeline-a")["wave_0"])
    assert again.spec == tokenizer.spec and again.config == tokenizer.config
    assert again.encode(recorded("pipeline-a")["wave_0"]).equal(tokens)
    assert difference(again.decode(tokens, prompt=voices)[0], tokenizer.decode(tokens, prompt=voices)[0]) == 0


# ---------------------------------------------------------------------------------------------------- public checkpoints

OFFICIAL = {
    "vectok-wavlm-large": ("vectors",),
    "vectok-inverse-kmeans-reference": ("units", "inverse"),
    "vectok-hifigan-wavlm": ("vocoder",),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_manifest_maps_both_ways(name: str) -> None:
    """Every tensor of the official file is used or knowingly dropped, and every tensor of ours is filled."""
    manifest = json.loads((MANIFESTS / f"{name}.json").read_text())
    state = {key: torch.empty(shape, device="meta") for key, shape in manifest["tensors"].items()}
    config = VecTok.checkpoint.config(manifest["config"])
    found, converted = as_ours(VecTok, {k: t for k, t in state.items() if VecTok.checkpoint.wanted(k)}, config)
    assert found.parts == OFFICIAL[name] == config.parts
    assert manifest["num_parameters"] == sum(torch.Size(shape).numel() for shape in manifest["tensors"].values())
    dropped = {key for key in state if not VecTok.checkpoint.wanted(key) and not key.endswith("num_batches_tracked")}
    assert dropped <= {"mask_emb", "encoder.layer_norm.weight", "encoder.layer_norm.bias"}
    with torch.device("meta"):
        assert {key: t.shape for key, t in VecTok(found).state_dict().items()} == {k: t.shape for k, t in converted.items()}


@pytest.mark.parametrize("name", [name for name in registry.names("vectok-*") if name != "vectok-tiny"])
def test_entries_have_the_official_sizes(name: str) -> None:
    """The union of the components' official tensors fills an entry's model, of WavLM the blocks up to the one that is read."""
    config = registry.check_config(registry.get(name))
    tensors = {}
    for manifest, parts in OFFICIAL.items():
        if set(parts) <= set(config.parts):
            tensors |= json.loads((MANIFESTS / f"{manifest}.json").read_text())["tensors"]
    state = {key: torch.empty(shape, device="meta") for key, shape in tensors.items() if VecTok.checkpoint.wanted(key)}
    if config.has_units:
        state["pairs"] = torch.empty(config.merges, 2, dtype=torch.int64, device="meta")
    found, converted = as_ours(VecTok, state, config)
    assert found == config
    assert sum(key.endswith("norm1.weight") for key in converted) == 6
    with pytest.raises(zoo.KeysError, match="unexpected"):
        as_ours(VecTok, state | {"quantizer.vars": torch.empty(1)}, config)
    with pytest.raises(zoo.KeysError, match=r"missing: .*conv_post"):
        as_ours(VecTok, {k: t for k, t in state.items() if k != "conv_post.bias"}, config)


def test_loading_what_was_never_published_explains() -> None:
    with pytest.raises(zoo.WeightsError, match="ever published; train it"):
        zoo.load("vectok-16k")
    with pytest.raises(zoo.WeightsError, match=r"prematch_g_02500000\.pt: not on the Hub; fetch"):
        zoo.load("vectok-knnvc")


def test_transformers_layout_gives_the_same() -> None:
    transformers = pytest.importorskip("transformers")
    io = recorded("wavlm-l7-d64")
    config = transformers.WavLMConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        conv_dim=(32,) * 7,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_buckets=320,
        max_bucket_distance=800,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = transformers.WavLMModel(config).eval()
        for parameter in theirs.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    ours = zoo.load_upstream("vectok", config.to_dict() | {"layer": 2}, theirs.state_dict())
    assert len(ours.analysis.blocks) == 2
    with torch.inference_mode():
        expected = theirs(io["wave_1"][None], output_hidden_states=True).hidden_states[2]
    assert difference(ours.vectors(io["wave_1"], pad=False)[0], expected[0]) < 1e-4
    with pytest.raises(zoo.WeightsError, match="do_stable_layer_norm"):
        zoo.load_upstream("vectok", config.to_dict() | {"do_stable_layer_norm": False}, theirs.state_dict())


def test_components_are_recognised() -> None:
    for case in ("wavlm-l7-d64", "knnvc-c64-k4", "inverse-d64"):
        assert VecTok.checkpoint.recognises(load_file(CASES / case / "weights.safetensors").keys())
    assert not VecTok.checkpoint.recognises({"head.out.weight", "quantize.embedding.weight"})


def test_settings_of_another_wavlm_are_refused() -> None:
    weights = CASES / "wavlm-l7-d64" / "weights.safetensors"
    for change in ({"extractor_mode": "default"}, {"layer_norm_first": False}, {"gru_rel_pos": False}):
        with pytest.raises(zoo.WeightsError, match=next(iter(change))):
            zoo.load_upstream("vectok", settings("wavlm-l7-d64") | change, weights)
    with pytest.raises(zoo.WeightsError, match="conv_feature_layers"):
        zoo.load_upstream("vectok", settings("wavlm-l7-d64") | {"conv_feature_layers": "__import__('os')"}, weights)


# ------------------------------------------------------------------------------------------------------- length and batch


def test_every_length_gives_its_frames_and_comes_back() -> None:
    """One vector for every begun 320 samples, and exactly the samples that went in."""
    lengths = [1, 2, 319, 320, 321, 399, 400, 401, 640, 641, 720, 721, 1999, 2000]
    for kind in ("wavlm", "logmel"):
        tokenizer = small(kind)
        items = [noise(samples, samples) for samples in lengths]
        frames = [len(units) for units in tokenizer.unit_ids(items)]
        assert frames == [-(-samples // 320) for samples in lengths]
        assert [wave.shape for wave in tokenizer.decode(tokenizer.encode(items))] == [(1, samples) for samples in lengths]


@KINDS
def test_batches_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where items share passes, as they do on a GPU."""
    tokenizer = small(kind)
    items = [noise(samples, samples) for samples in (4_000, 5_000, 321, 9_999, 5_100)]
    tokens, voices = tokenizer.encode_with_voices(items)
    waves = tokenizer.decode(tokens, prompt=voices)
    monkeypatch.setitem(VecTok.at_once, "encode", Budget(10_000, 10_000))
    monkeypatch.setitem(VecTok.at_once, "decode", Budget(10_000, 10_000))
    for module in ("analysis", "synthesis"):
        together = f"zoo.codecs.vectok.{module}.groups_of_similar_length"
        monkeypatch.setattr(together, lambda lengths, _: [list(range(len(lengths)))])
    together = tokenizer.encode(items)
    assert together.equal(tokens)
    for found, alone in zip(tokenizer.decode(together, prompt=voices), waves, strict=True):
        assert difference(found, alone) < 1e-4
    for vectors, item in zip(tokenizer.vectors(items), items, strict=True):
        assert difference(vectors, tokenizer.vectors(item)[0]) < 1e-4


@KINDS
def test_units_do_not_see_a_constant(kind: str) -> None:
    tokenizer = small(kind)
    [vectors] = tokenizer.vectors(noise(20_000))
    shift = torch.linspace(-2, 2, vectors.shape[1])
    moved = vectors + shift
    expected = tokenizer.units.nearest(vectors - vectors.mean(0))
    assert torch.equal(tokenizer.units.nearest(moved - moved.mean(0)), expected)
    assert torch.equal(tokenizer.unit_ids(noise(20_000))[0], expected)
    assert len(expected.unique()) > 5


def test_windows_keep_every_vector_once() -> None:
    for frames in (1, 99, 100, 101, 159, 160, 161, 1_000):
        spans = overlapping_windows(frames, 100, 20)
        kept = torch.cat([torch.arange(span.start, span.stop)[span.kept] for span in spans])
        assert torch.equal(kept, torch.arange(frames))
        assert all(span.stop - span.start <= 100 for span in spans)
        assert all(span.kept.start >= 20 or span.start == 0 for span in spans)


@KINDS
def test_long_recordings(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In windows: the same ids in any batch and whether or not vectors are kept, one mean for the whole recording."""
    tokenizer = small(kind)
    whole = tokenizer.encode(noise(60_000))
    monkeypatch.setitem(VecTok.WINDOW, "encode", 60)
    monkeypatch.setattr(VecTok, "OVERLAP", 12)
    windowed = tokenizer.encode(noise(60_000))
    assert tokenizer.encode([noise(500, 3), noise(60_000), noise(1_000, 4)])[1].equal(windowed)
    monkeypatch.setattr(VecTok, "KEPT_FRAMES", 0)
    assert tokenizer.encode(noise(60_000)).equal(windowed)
    changed = [a != b for a, b in zip(*(tokenizer.units.expand(t.ids[0]) for t in (whole, windowed)), strict=True)]
    assert sum(changed) <= (0 if kind == "logmel" else 0.2 * len(changed)), "log-mel windows are exact, attention's are not"


@KINDS
def test_long_decoding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = small(kind)
    tokens = tokenizer.encode(noise(60_000))
    [vectors] = tokenizer.vectors(noise(60_000))
    whole, vocoded = tokenizer.decode(tokens)[0], tokenizer.vocode(vectors)[0]
    monkeypatch.setitem(VecTok.WINDOW, "decode", 90)
    monkeypatch.setattr(VecTok, "OVERLAP", 20)
    assert difference(tokenizer.vocode(vectors)[0], vocoded) < 1e-5, "the vocoder's blocks are exact"
    windowed = tokenizer.decode(tokens)[0]
    assert windowed.shape == whole.shape
    assert (windowed - whole).square().sum() < 0.1 * whole.square().sum(), "attention within windows approximates"
    assert difference(tokenizer.decode([tokens.ids[0], tokens.ids[0, :3]])[0][:, :60_000], windowed) < 1e-5


@pytest.mark.parametrize("size", [2, 7, 23])
@without_gradients
def test_vocoders_know_how_far_they_see(size: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hifigan = HiFiGAN(HiFiGANSizes("2", 8, 16, (5, 4, 3), (7, 8, 5), (3, 7), ((1, 2), (2, 6))), 6).eval()
        istft = ISTFTVocoder(ISTFTSizes(8, 12, 3, 60), 6).eval()
        vectors = torch.randn(80, 6)
    for vocoder in (hifigan, istft):
        whole = vocoder(vectors[None])[0]
        assert whole.shape == (80 * 60,)
        hop, halo = vocoder.hop_length, vocoder.halo
        for start in range(0, 80, size):
            stop = min(start + size, 80)
            first, last = max(0, start - halo), min(80, stop + halo)
            block = vocoder(vectors[None, first:last])[0]
            expected = whole[start * hop : stop * hop]
            assert difference(block[(start - first) * hop : (stop - first) * hop], expected) < 1e-5


@without_gradients
def test_residual_blocks_of_both_kinds() -> None:
    from zoo.codecs.vectok.vocoder import ResidualBlock

    x = torch.randn(1, 4, 1, 50, generator=torch.Generator().manual_seed(0))
    for kind in ("1", "2"):
        block = ResidualBlock(kind, 4, 3, (1, 3))
        expected = x[:, :, 0]
        for index, dilation in enumerate((1, 3)):
            conv = block.convs[index]
            y = F.conv1d(F.leaky_relu(expected, 0.1), conv.weight, conv.bias, padding=dilation, dilation=dilation)
            if kind == "1":
                plain = block.plain[index]
                y = F.conv1d(F.leaky_relu(y, 0.1), plain.weight, plain.bias, padding=1)
            expected = expected + y
        assert difference(block(x, None)[:, :, 0], expected) < 1e-5


@pytest.mark.slow
@KINDS
def test_memory_does_not_grow_with_the_vectors(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 minutes: some copies of the waveform, 77 MB, and what one window takes, whatever the width of the vectors."""
    from zoo.bench.measure import peak_memory

    monkeypatch.setattr(VecTok, "KEPT_FRAMES", 3_000)
    tokenizer, samples = small(kind), 20 * 60 * 16_000
    recording = noise(samples)
    with peak_memory("cpu") as encoding:
        tokens = tokenizer.encode(recording)
    assert len(tokenizer.units.expand(tokens.ids[0])) == samples // 320
    with peak_memory("cpu") as decoding:
        [wave] = tokenizer.decode(tokens)
    assert wave.shape == (1, samples)
    print(f"\n{kind}: encode +{encoding[0] / 1e6:.0f} MB, decode +{decoding[0] / 1e6:.0f} MB")
    assert encoding[0] < 3 * 4 * samples + 200e6 and decoding[0] < 3 * 4 * samples + 200e6


# -------------------------------------------------------------------------------------------------- units and byte pairs


def test_byte_pairs_lose_nothing() -> None:
    """Any sequence of units comes back, also ones that no training saw."""
    bpe = BPE.from_tokenizer_json(CASES / "units-k48-v256" / "tokenizer.json")
    expansions = bpe.expansions()
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 3, 10, 100, 1_000, 5_000):
        for spread in (2, 5, 48):
            units = torch.randint(spread, (length,), generator=generator)
            ids = bpe.encode(units)
            assert 0 <= int(ids.min()) <= int(ids.max()) < bpe.vocab_size
            assert [unit for id in ids.tolist() for unit in expansions[id]] == units.tolist()
            assert len(ids) <= length
    assert expansions[:48] == [(unit,) for unit in range(48)]


def test_any_ids_decode() -> None:
    """What a language model makes up need not be how units would be encoded; it has a length all the same."""
    tokenizer = small()
    generator = torch.Generator().manual_seed(1)
    lengths = [len(units) for units in tokenizer.units.bpe.expansions()]
    assert max(lengths) > 1
    ids = [torch.randint(tokenizer.spec.vocab_size, (count,), generator=generator) for count in (1, 5, 40)]
    for item, wave in zip(ids, tokenizer.decode(ids), strict=True):
        frames = sum(lengths[id] for id in item.tolist())
        assert wave.shape == (1, 320 * frames)
        units = tokenizer.units.expand(item)
        assert torch.equal(tokenizer.units.expand(tokenizer.units.bpe.encode(units)), units)


def test_pairs_that_make_the_same_sequence_share_an_id() -> None:
    bpe = BPE(1, [(0, 0), (0, 1), (1, 0), (2, 2)])
    assert bpe.expansions() == [(0,), (0, 0), (0, 0, 0), (0,) * 6]
    assert bpe.vocab_size == 4
    for length in range(1, 20):
        expanded = [unit for id in bpe.encode(torch.zeros(length, dtype=torch.int64)).tolist() for unit in bpe.expansions()[id]]
        assert expanded == [0] * length


def test_tokenizer_files(tmp_path: Path) -> None:
    bpe = BPE.from_tokenizer_json(CASES / "units-k48-v256" / "tokenizer.json")
    again = BPE.from_tokenizer_json(bpe.save(tmp_path / "tokenizer.json"))
    assert again.pairs == bpe.pairs and again.num_units == bpe.num_units
    assert pickle.loads(pickle.dumps(bpe)).pairs == bpe.pairs
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    with pytest.raises(zoo.WeightsError, match="normalizer"):
        BPE.from_tokenizer_json(content | {"normalizer": {"type": "NFC"}})
    shuffled = {word: 255 - id for word, id in content["model"]["vocab"].items()}
    with pytest.raises(zoo.WeightsError):
        BPE.from_tokenizer_json(content | {"model": content["model"] | {"vocab": shuffled}})
    with pytest.raises(zoo.WeightsError, match="cannot be read"):
        BPE.from_tokenizer_json(tmp_path / "nowhere.json")
    with pytest.raises(zoo.WeightsError, match="pair 0 joins 0 and 9"):
        BPE(5, [(0, 9)])


def test_other_pairs_are_another_vocabulary() -> None:
    tokenizer = small_vectok()
    tokens = tokenizer.encode(noise(9_000))
    tokenizer.set_bpe(BPE(20))
    assert tokenizer.spec.vocab_size == 20
    units = tokenizer.encode(noise(9_000))
    assert units.ids[0].tolist() == tokenizer.unit_ids(noise(9_000))[0].tolist()
    with pytest.raises(zoo.MismatchError):
        tokenizer.decode(tokens)
    with pytest.raises(zoo.InputError, match="pairs of 21 units"):
        tokenizer.set_bpe(BPE(21))


def test_context_stands_between_neighbours() -> None:
    vectors = torch.arange(4.0)[:, None]
    expected = [[0, 0, 0, 1, 2], [0, 0, 1, 2, 3], [0, 1, 2, 3, 3], [1, 2, 3, 3, 3]]
    assert with_context(vectors, 5).tolist() == expected
    assert with_context(torch.ones(1, 2), 3).tolist() == [[1] * 6]


# ------------------------------------------------------------------------------------------------------------------ voices


@KINDS
def test_the_prompt_decides_the_sound_and_not_the_length(kind: str) -> None:
    tokenizer = small(kind)
    tokens = tokenizer.encode(noise(20_001))
    low, high = tokenizer.decode(tokens, prompt="low")[0], tokenizer.decode(tokens, prompt="high")[0]
    assert low.shape == high.shape == (1, 20_001)
    assert difference(low, high) > 1e-3
    assert torch.equal(tokenizer.decode(tokens, prompt="low")[0], low)
    assert torch.equal(tokenizer.decode(tokens)[0], low), "the first voice of the checkpoint is the default"
    assert torch.equal(tokenizer.decode(tokens, prompt=tokenizer.voices["high"])[0], high)


def test_own_voices_go_beside_the_tokens(tmp_path: Path) -> None:
    tokenizer = small()
    items = [noise(20_000), noise(9_000, 5)]
    tokens, voices = tokenizer.encode_with_voices(items)
    assert [len(own) for own in voices] == [63, 29]
    expected = tokenizer.decode(tokens, prompt=voices)
    for found, own in zip(tokenizer.reconstruct(items), expected, strict=True):
        assert difference(found, own) < 1e-4
    assert difference(tokenizer.decode(tokens)[0], expected[0]) > 1e-3

    file, own = tokens.save(tmp_path / "batch.zt"), voices[0].save(tmp_path / "own.safetensors")
    assert file.stat().st_size <= 64 + 12 + -(-int(tokens.lengths.sum()) * 5 // 8)
    assert voices[0].nbytes == 2 * 63 * 32 <= own.stat().st_size < voices[0].nbytes + 1_000
    again = Voice.load(own)
    assert difference(again.vectors, voices[0].vectors) < 1e-2
    loaded = tokenizer.decode(zoo.Tokens.load(file)[0], prompt=again)[0]
    assert difference(loaded, expected[0]) < 2e-2
    exact = Voice.load(voices[0].save(own, dtype=torch.float32))
    assert torch.equal(tokenizer.decode(tokens[0], prompt=exact)[0], tokenizer.decode(tokens[0], prompt=voices[0])[0])


def test_prompts_are_the_loudest_vectors() -> None:
    tokenizer = small()
    quiet, loud = 0.01 * noise(16_000), torch.sin(torch.arange(8_000) / 3)
    own = tokenizer.voice([quiet, loud, quiet])
    assert len(own) == 125
    assert torch.equal(own.prompt(), own.vectors)
    assert torch.equal(own.prompt(25), own.vectors[50:75])
    assert own.energy[50:75].min() > own.energy[:50].max()
    assert torch.equal(Voice(own.vectors).prompt(10), own.vectors[:10])
    many = Voice(torch.arange(600.0)[:, None], torch.arange(600).flip(0).float())
    assert torch.equal(many.prompt()[:, 0], torch.arange(500.0))


def test_bad_prompts_are_named(tmp_path: Path) -> None:
    tokenizer = small()
    tokens = tokenizer.encode([noise(4_000), noise(5_000)])
    with pytest.raises(zoo.InputError, match="item 1: a prompt must be finite vectors"):
        tokenizer.decode(tokens, prompt=["low", torch.full((9, 32), torch.nan)])
    with pytest.raises(zoo.InputError, match="3 prompts do not fit 2 items"):
        tokenizer.decode(tokens, prompt=["low"] * 3)
    with pytest.raises(zoo.InputError, match=r"needs at least 1 s of speech, there are 0\.5 s"):
        tokenizer.decode(tokens, prompt=noise(8_000))
    with pytest.raises(zoo.InputError, match="does not exist"):
        tokenizer.decode(tokens, prompt="nobody")
    with pytest.raises(zoo.MismatchError, match="another model's"):
        tokenizer.decode(tokens, prompt=small_vectok(7).voices["low"])
    with pytest.raises(zoo.InputError, match="has none of its own"):
        pipeline().decode(pipeline().encode(noise(4_000)))
    (tmp_path / "a").write_bytes(b"no voice")
    with pytest.raises(zoo.FormatError, match="not a file of a voice"):
        Voice.load(tmp_path / "a")
    latents = zoo.Latents((torch.zeros(32, 3),), "x", "").save(tmp_path / "b")
    with pytest.raises(zoo.FormatError, match="does not hold a voice"):
        Voice.load(latents)


def test_a_recording_as_a_prompt() -> None:
    tokenizer = small()
    tokens, reference = tokenizer.encode(noise(9_000)), noise(20_000, 8)
    expected = tokenizer.decode(tokens, prompt=tokenizer.voice(reference))[0]
    assert torch.equal(tokenizer.decode(tokens, prompt=reference)[0], expected)
    assert torch.equal(tokenizer.decode(tokens, prompt=(reference.numpy(), 16_000))[0], expected)
    assert torch.equal(tokenizer.convert(noise(9_000), voice=reference)[0], expected)


def test_conversion_by_neighbours() -> None:
    tokenizer, reference = small(), noise(48_000, 8)
    [wave] = tokenizer.convert(noise(9_001), voice=reference, decoder="knn", neighbours=3)
    [queries], vectors = tokenizer.vectors(noise(9_001)), tokenizer.vectors(reference)[0]
    similarity = F.cosine_similarity(queries[:, None].double(), vectors[None].double(), dim=-1)
    matched = vectors[similarity.topk(3).indices].mean(1)
    assert difference(wave, tokenizer.vocode(matched)[0][None, :9_001]) < 1e-4
    longer = tokenizer.convert([noise(9_001)], voice=[reference], decoder="knn", seconds=1.0)[0]
    assert longer.shape == (1, 16_000)
    [loud] = tokenizer.convert(noise(9_001), voice=reference, decoder="knn", neighbours=3, loudness=-16.0)
    gain = loud.abs().max() / wave.abs().max()
    assert difference(loud, gain * wave) < 1e-4
    assert tokenizer.convert((noise(9_001).numpy(), 8_000), voice="low", sample_rate="original")[0].shape == (1, 9_001)
    for options, reason in (
        ({"decoder": "magic"}, "decoder must be"),
        ({"seconds": 1.0}, "go with decoder='knn'"),
        ({"decoder": "knn", "neighbours": -1}, "must be positive"),
        ({"decoder": "knn", "voice": [reference] * 2}, "2 voices do not fit 1 items"),
    ):
        with pytest.raises(zoo.InputError, match=reason):
            tokenizer.convert(noise(9_001), **{"voice": reference, **options})


def test_few_neighbours_and_silence() -> None:
    queries, vectors = torch.randn(5, 8), torch.randn(2, 8)
    assert difference(voice.match(queries, vectors, 4), vectors.mean(0).expand(5, -1)) < 1e-6
    silence = torch.zeros(16_000)
    assert torch.equal(voice.to_loudness(silence, 16_000, -16), silence)
    assert torch.equal(voice.trim_silence(silence, 16_000, 7.0), silence)


def test_silence_around_a_reference_is_cut() -> None:
    speech = media.read_audio(SPEECH, sample_rate=16_000, mono=True).waveform[0]
    silence = 1e-4 * torch.randn(32_000, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([silence, speech, silence])
    trimmed = voice.trim_silence(padded, 16_000, 7.0)
    assert len(speech) * 0.6 < len(trimmed) < len(speech) + 20_000
    tokenizer = small()
    assert len(tokenizer.voice(padded, trigger_level=7.0)) == -(-len(trimmed) // 320)


def test_anonymous_voices() -> None:
    tokenizer = small()
    tokens = tokenizer.encode([noise(4_000), noise(5_000, 2)])
    first, second = tokenizer.anonymise(tokens, seed=[1, 2])
    assert torch.equal(tokenizer.anonymise(tokens, seed=[1, 2])[0], first)
    assert difference(tokenizer.anonymise(tokens[1], seed=2)[0], second) < 1e-4
    assert difference(tokenizer.anonymise(tokens[1], seed=3)[0], second) > 1e-4
    pool = [tokenizer.voice(noise(16_000, seed)) for seed in range(3)]
    mixed = voice.mixture(pool, 5)
    means = torch.stack([one.vectors.mean(0) for one in pool])
    shares = torch.linalg.lstsq(means.T, mixed.vectors.mean(0)[:, None]).solution[:, 0]
    assert shares.min() > 0 and abs(float(shares.sum()) - 1) < 1e-2, "the mean lies among those of the pool"
    assert not any(torch.allclose(mixed.vectors, one.vectors) for one in pool)
    assert tokenizer.anonymise(tokens, pool=pool)[0].shape == (1, 4_000)
    with pytest.raises(zoo.InputError, match="a pool of 1 voices hides nobody"):
        tokenizer.anonymise(tokens, pool=pool[:1])
    with pytest.raises(zoo.InputError, match="3 seeds do not fit 2 items"):
        tokenizer.anonymise(tokens, seed=[1, 2, 3])


# --------------------------------------------------------------------------------- without units: a continuous tokenizer


@cache
def continuous() -> VecTok:
    whole = small()
    tokenizer = VecTok(replace(whole.config, parts=("vectors", "vocoder"), voices=()), name="small-knnvc").eval()
    tokenizer.load_state_dict({k: v for k, v in whole.state_dict().items() if k.startswith(("analysis", "vocoder"))})
    tokenizer.requires_grad_(False).fingerprint = tokenizer.compute_fingerprint()
    return tokenizer


def test_without_units_there_are_latents(tmp_path: Path) -> None:
    tokenizer = continuous()
    assert tokenizer.spec.continuous and tokenizer.spec.token_rate == 50
    latents = tokenizer.encode([noise(4_000), noise(5_001)])
    assert isinstance(latents, zoo.Latents)
    assert [value.shape for value in latents.values] == [(32, 13), (32, 16)]
    waves = tokenizer.decode(zoo.Latents.load(latents.save(tmp_path / "a.safetensors")))
    assert [wave.shape for wave in waves] == [(1, 4_000), (1, 5_001)]
    assert difference(small().decode(latents)[1], waves[1]) == 0, "a whole model vocodes the same latents"
    assert tokenizer.embed(latents).shape == (2, 16, 32)
    again = zoo.load(f"local-dir:{tokenizer.save_pretrained(tmp_path / 'saved')}")
    assert again.encode(noise(4_000)).equal(tokenizer.encode(noise(4_000)))
    assert tokenizer.convert(noise(4_000), voice=noise(16_000, 2))[0].shape == (1, 4_000)


def test_voices_serve_every_model_of_the_same_vectors() -> None:
    tokens = small().encode(noise(4_000))
    own = continuous().voice(noise(16_000, 2))
    assert own.fingerprint == small().vectors_fingerprint
    small().decode(tokens, prompt=own)


def test_what_is_not_there_is_named() -> None:
    tokenizer = continuous()
    with pytest.raises(zoo.WeightsError, match="needs the units"):
        tokenizer.unit_ids(noise(500))
    with pytest.raises(zoo.WeightsError, match="needs the units"):
        tokenizer.convert(noise(500), voice=noise(16_000), decoder="inverse")
    with pytest.raises(zoo.InputError, match="has no units"):
        tokenizer.decode(small().encode(noise(500)))
    with pytest.raises(zoo.InputError, match="a prompt goes with tokens"):
        tokenizer.decode(tokenizer.encode(noise(500)), prompt="low")
    with pytest.raises(zoo.WeightsError, match="encoding needs the vectors"):
        model("inverse-d64").encode(noise(500))
    with pytest.raises(zoo.WeightsError, match="decoding needs the vocoder"):
        model("inverse-d64").decode(torch.zeros(1, 3, dtype=torch.int64))
    for bad in (torch.zeros(31, 4), torch.zeros(32, 0), torch.full((32, 2), torch.inf)):
        with pytest.raises(zoo.InputError, match="item 1"):
            tokenizer.decode([torch.zeros(32, 4), bad])


def test_parts_of_a_saved_model(tmp_path: Path) -> None:
    whole = small()
    folder = whole.save_pretrained(tmp_path)
    encoder = zoo.load(f"local-dir:{folder}", parts=["vectors", "units"])
    assert encoder.encode(noise(4_000)).equal(whole.encode(noise(4_000)))
    assert not hasattr(encoder, "vocoder")
    decoder = zoo.load(f"local-dir:{folder}", parts=["inverse", "vocoder"])
    tokens = whole.encode(noise(4_000))
    assert difference(decoder.decode(tokens)[0], whole.decode(tokens)[0]) == 0


# ------------------------------------------------------------------------------------------------------ bad input, precision


def test_bad_items_are_named() -> None:
    tokenizer = small()
    for item, reason in ((torch.zeros(0), "is empty"), (torch.tensor([0.0, torch.nan]), "NaN"), ("nowhere.wav", "not exist")):
        with pytest.raises(zoo.InputError, match=reason) as caught:
            tokenizer.encode([noise(500), item])
        assert caught.value.index == 1
    with pytest.raises(zoo.InputError, match="item 1: 399 samples are too short"):
        model("wavlm-l7-d64").vectors([noise(400), noise(399)], pad=False)
    with pytest.raises(zoo.InputError, match="outside the vocabulary"):
        tokenizer.decode(torch.tensor([[tokenizer.spec.vocab_size]]))


@KINDS
def test_strange_speech_is_taken_as_it_is(kind: str) -> None:
    """Silence, clipping and telephone speech."""
    tokenizer = small(kind)
    items = [torch.zeros(5_000), 7 * noise(5_000), (noise(2_500).numpy(), 8_000), (noise(9_000).numpy(), 44_100)]
    waves = tokenizer.decode(tokenizer.encode(items), sample_rate="original")
    assert [wave.shape[1] for wave in waves] == [5_000, 5_000, 2_500, 9_000]
    assert all(wave.isfinite().all() for wave in waves)


@KINDS
def test_ids_survive_reduced_precision(kind: str) -> None:
    tokenizer = small_vectok(config=SMALL_LOGMEL_VECTOK if kind == "logmel" else SMALL_VECTOK)
    tokens = tokenizer.encode(noise(9_000))
    exact = tokenizer.decode(tokens)[0]
    tokenizer.set_precision("bf16")
    assert tokenizer.vocoder.state_dict()["blocks.0.fc1.weight" if kind == "logmel" else "conv_pre.weight"].itemsize == 2
    assert {t.dtype for t in tokenizer.units.buffers()} == {torch.float32, torch.int64}
    assert tokenizer.encode(noise(9_000)).equal(tokens)
    rough = tokenizer.decode(tokens)[0]
    assert rough.dtype == torch.float32
    assert (exact - rough).square().sum() < 0.05 * exact.square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        assert tokenizer.encode(noise(9_000)).equal(tokens)


@KINDS
def test_pickle(kind: str) -> None:
    again = pickle.loads(pickle.dumps(small(kind)))
    assert again.encode(noise(4_000)).equal(small(kind).encode(noise(4_000)))


def test_impossible_configurations_are_refused() -> None:
    for change, reason in (
        ({"parts": ("ears",)}, "parts are"),
        ({"num_units": 7_000, "vocab_size": 7_000}, "1 to 6400"),
        ({"vocab_size": 99}, "do not make a vocabulary of 99"),
        ({"context": 2}, "context must be odd"),
        ({"vector_dim": 33}, "do not fit vector_dim 33"),
        ({"vectors": {"bands": 32, "hop_length": 160}}, "a hop of 160 samples in and 320 out"),
        ({"vocoder": {"flow": 1}}, "vocoder has no fields flow"),
    ):
        with pytest.raises(ValueError, match=reason):
            replace(SMALL_VECTOK, **change)
    for build, reason in (
        (lambda: WavLMSizes(layer=7, blocks=6), "layer must lie in 1 to 6"),
        (lambda: WavLMSizes(width=100), "not a multiple"),
        (lambda: InverseSizes(depthwise_kernel=4), "must be odd"),
        (lambda: HiFiGANSizes(resblock="3"), "resblock must be"),
        (lambda: HiFiGANSizes(kernels=(21, 16, 4, 4)), "by even numbers"),
        (lambda: HiFiGANSizes(channels=24), "cannot be halved"),
    ):
        with pytest.raises(ValueError, match=reason):
            build()
    read = VecTokConfig(vectors={"layer": 3, "blocks": 3}, vocoder={"blocks": 2, "width": 8, "ffn_dim": 8, "hop_length": 320})
    assert read.vectors == WavLMSizes(layer=3) and read.vocoder == ISTFTSizes(8, 8, 2)
    assert LogMelSizes().width == 80


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@KINDS
def test_gpu_gives_the_same(kind: str) -> None:
    tokenizer = small_vectok(config=SMALL_LOGMEL_VECTOK if kind == "logmel" else SMALL_VECTOK)
    items = [noise(samples, samples) for samples in (4_000, 20_000, 321, 19_000)]
    tokens, voices = tokenizer.encode_with_voices(items)
    waves = tokenizer.decode(tokens, prompt=voices)
    tokenizer.to("cuda")
    assert tokenizer.encode(items).tolist() == tokens.tolist()
    assert all(difference(a.cpu(), b) < 1e-3 for a, b in zip(tokenizer.decode(tokens, prompt=voices), waves, strict=True))


# ---------------------------------------------------------------------------------------------------------------- training


def blobs(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points around six centres, and the centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = 20 * torch.eye(6, 5)
    return (centres[:, None] + torch.randn(6, 200, 5, generator=generator)).flatten(0, 1), centres


def test_kmeans_finds_clusters() -> None:
    points, centres = blobs()
    start = training.choose_centres(points, 6, torch.Generator().manual_seed(0))
    assert (start[:, None] == points).all(-1).any(1).all(), "the first centres are points"
    found, inertias = training.fit_kmeans(points, start)
    assert torch.cdist(found, centres).min(1).values.max() < 0.5
    assert torch.cdist(centres, found).min(1).values.max() < 0.5, "one each"
    assert all(later <= earlier for earlier, later in pairwise(inertias))
    assert abs(inertias[-1] - torch.cdist(points, found).min(1).values.square().mean().item()) < 1e-3


def test_an_empty_cluster_gets_the_farthest_point() -> None:
    points = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    found, _ = training.fit_kmeans(points, torch.tensor([[1.0], [500.0]]), iterations=1)
    assert found.tolist() == [[3.25], [10.0]]
    found, inertias = training.fit_kmeans(points, torch.tensor([[1.0], [500.0]]))
    assert sorted(found.flatten().tolist()) == [1.0, 10.0] and abs(inertias[-1] - 0.5) < 1e-6
    with pytest.raises(ValueError, match="4 points do not make 5 centres"):
        training.choose_centres(points, 5, torch.Generator())


def test_mini_batches_come_to_the_mean_of_all_that_was_given() -> None:
    points, centres = blobs(1)
    kmeans = training.MiniBatchKMeans(centres)
    given = [kmeans.update(batch) for batch in points[torch.randperm(1_200)].split(100)]
    own = torch.cdist(points, centres).argmin(1)
    means = torch.stack([points[own == k].mean(0) for k in range(6)])
    assert difference(kmeans.centres, means) < 1e-4
    assert kmeans.counts.tolist() == [200] * 6 and len(given) == 12
    stuck = training.MiniBatchKMeans(torch.cat([centres[:5], torch.full((1, 5), 1e4)]), reseed_below=0.1)
    for batch in points[torch.randperm(1_200)].split(100):
        stuck.update(batch)
    assert torch.cdist(centres, stuck.centres).min(1).values.max() < 2


def test_corruption_hides_and_replaces_a_tenth_each() -> None:
    units = torch.full((400, 100), 7)
    changed, hidden = training.corrupt(units, 300, torch.Generator().manual_seed(0))
    assert abs(hidden.float().mean() - 0.1) < 0.01
    assert abs((changed != 7).float().mean() - 0.1 * 299 / 300) < 0.01
    assert not (hidden & (changed != 7)).any(), "hidden ones are not replaced"
    assert changed.min() >= 0 and changed.max() < 300


def test_prompts_are_drawn_beside_the_target() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        prompt = training.draw_prompt(500, slice(150, 310), generator)
        assert 75 <= prompt.stop - prompt.start <= 200
        assert prompt.stop <= 150 or (prompt.start >= 310 and prompt.stop <= 500)
    with pytest.raises(ValueError, match="leave no prompt of 75"):
        training.draw_prompt(160, slice(40, 100), generator)


def test_structural_similarity_is_scikit_images() -> None:
    from skimage.metrics import structural_similarity

    generator = torch.Generator().manual_seed(0)
    target = torch.randn(2, 30, 20, generator=generator).cumsum(1)
    predicted = target + 0.3 * torch.randn(2, 30, 20, generator=generator)
    for found, x, y in zip(training.ssim(predicted, target), predicted.numpy(), target.numpy(), strict=True):
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": y.max() - y.min()}
        assert abs(found.item() - structural_similarity(x, y, **options)) < 1e-4
    scale = torch.rand(20, generator=generator) + 0.5
    expected = ((predicted - target) / scale).square().mean() + 0.5 * (
        1 - training.ssim(predicted / scale, target / scale).mean()
    )
    assert difference(training.inverse_loss(predicted, target, scale, 0.5), expected) < 1e-5
    assert training.inverse_loss(target, target).abs() < 1e-5
    with pytest.raises(ValueError, match="at least 11 x 11"):
        training.ssim(target[:, :10], target[:, :10])


def test_the_inverse_model_learns() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inverse = InverseKMeans(InverseSizes(16, 2, 24, 1, 5), 12)
        table, prompt = torch.randn(20, 12), torch.randn(8, 12)
        units = torch.randint(20, (4, 30))
        target = table[units] + prompt.mean(0)
        optimizer = torch.optim.AdamW(inverse.parameters(), 1e-2)
        losses = []
        for _ in range(25):
            changed, hidden = training.corrupt(units, 20)
            embedded = [inverse.masked(table[row], mask) for row, mask in zip(changed, hidden, strict=True)]
            loss = training.inverse_loss(torch.stack(inverse([prompt] * 4, embedded)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad is not None for parameter in inverse.parameters())


def test_adversaries_have_hifigans_sizes() -> None:
    with torch.device("meta"):
        adversaries = training.HiFiGANDiscriminators()
    parts = (adversaries.periods, adversaries.scales)
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [41_105_770, 29_618_821]


def test_losses_of_the_vocoder() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adversaries = training.HiFiGANDiscriminators((2, 3), (4, 4, 4, 4, 4), (4, 4, 8, 8, 8, 8, 8))
        target = torch.randn(2, 7_040)
        estimate = torch.randn(2, 7_040, requires_grad=True)
    real, fake = adversaries(target), adversaries(estimate)
    assert len(real.scores) == 5 and [len(maps) for maps in real.features] == [6, 6, 8, 8, 8]
    mel = (LogMel()(estimate) - LogMel()(target)).abs().mean()
    pairs = [(r, f) for rs, fs in zip(real.features, fake.features, strict=True) for r, f in zip(rs, fs, strict=True)]
    features = sum((r - f).abs().mean() for r, f in pairs)
    adversarial = sum((1 - score).square().mean() for score in fake.scores)
    loss = training.generator_loss(real, fake, target, estimate, LogMel())
    assert abs(loss - (adversarial + 2 * features + 45 * mel)) < 1e-3
    loss.backward()
    assert estimate.grad.abs().sum() > 0
    expected = sum((1 - r).square().mean() + f.square().mean() for r, f in zip(real.scores, fake.scores, strict=True))
    assert abs(training.discriminator_loss(real, fake) - expected) < 1e-4

"""ByteFormer against the original code's outputs, and the promises that the original does not make."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import pickle
import threading
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import zoo
from small_models_byteformer import SMALL_BYTEFORMER, small_byteformer, upstream_weights
from zoo import registry
from zoo.bench import bytes as bench
from zoo.bench import peak_memory
from zoo.bench.measure import measure
from zoo.checkpoint import as_ours
from zoo.codecs.byteformer import ByteFormer, ByteFormerConfig, encodings, transforms
from zoo.codecs.byteformer.checkpoint import our_key, upstream_config
from zoo.tokenizer import Budget

CASES = Path(__file__).parent / "golden" / "byteformer"
MANIFESTS = Path(__file__).parent / "golden" / "manifests"
NETWORKS = ("tiff_k32_w64", "mixed_k4_w32", "layernorm_axis_k8")
TOLERANCE = 1e-4


@cache
def model(case: str) -> ByteFormer:
    return zoo.load_upstream("byteformer", CASES / case / "config.json", CASES / case / "weights.safetensors")


@cache
def recorded(case: str) -> dict[str, Tensor]:
    return load_file(CASES / case / "io.safetensors")


def difference(left: Tensor, right: Tensor) -> float:
    assert left.shape == right.shape
    return (left - right).abs().max().item()


def content(length: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, length, np.uint8).tobytes()


@pytest.fixture(scope="module")
def tok() -> ByteFormer:
    return small_byteformer()


# ------------------------------------------------------------------------------------------------------------ golden cases


@pytest.mark.parametrize("case", NETWORKS)
def test_golden_files_alone(case: str) -> None:
    tokenizer, io = model(case), recorded(case)
    files = [bytes(row[:length].tolist()) for row, length in zip(io["input_bytes"], io["lengths"], strict=True)]
    tokens = tokenizer.encode(files)
    assert tokens.equal(tokenizer.tokens([row[row >= 0] for row in io["input_bytes"].long()]))
    assert tokenizer.decode(tokens) == files
    vectors, features = tokenizer.embed(tokens), tokenizer.features(tokens)
    for index, found in enumerate(features.tokens):
        expected = io[f"single.{index}.reduced"]
        assert difference(vectors[index, : len(expected)], expected) < TOLERANCE
        assert (vectors[index, len(expected) :] == 0).all()
        assert difference(found, io[f"single.{index}.features"]) < TOLERANCE
    assert difference(features.pooled, io["single.pooled"]) < TOLERANCE
    assert difference(tokenizer.classify(tokens), io["single.logits"]) < TOLERANCE


@pytest.mark.parametrize("case", NETWORKS)
def test_golden_padded_batch(case: str) -> None:
    tokenizer, io = model(case), recorded(case)
    # Padded with -1, as the original takes them.
    ids = io["input_bytes"]
    before = ids.clone()
    assert difference(tokenizer.embed(ids, compat="padded"), io["padded.reduced"]) < TOLERANCE
    assert difference(tokenizer.embed(ids, compat="padded", positions=True), io["padded.backbone_in"]) < TOLERANCE
    features = tokenizer.features(ids, compat="padded")
    assert difference(torch.stack(features.tokens), io["padded.features"]) < TOLERANCE
    assert difference(features.pooled, io["padded.pooled"]) < TOLERANCE
    logits = tokenizer.classify(ids, compat="padded")
    assert difference(logits, io["padded.logits"]) < TOLERANCE
    assert torch.equal(ids, before), "the original writes into its input"
    moved = (logits - tokenizer.classify(ids)).abs().amax(1)
    assert difference(moved, io["padded_vs_single_maxdiff"]) < 2 * TOLERANCE


@pytest.mark.parametrize("case", NETWORKS)
def test_golden_on_the_way(case: str) -> None:
    tokenizer, io = model(case), recorded(case)
    x = io["padded.backbone_in"]
    for index, block in enumerate(tokenizer.transformer.blocks):
        whole = replace(tokenizer.config, shifts=tokenizer.config.shifts[: index + 1], merges=())
        part = type(tokenizer.transformer)(whole).requires_grad_(False)
        part.blocks = torch.nn.ModuleList([block])
        part.norm = torch.nn.Identity()
        part.norm.packed = lambda x, counts, rule: x
        found, counts = part(x.flatten(0, 1), [x.shape[1]] * len(x))
        x = io[f"padded.block_{index}"]
        assert difference(found.view_as(x), x) < TOLERANCE
        if str(index) in tokenizer.transformer.merges:
            merged, counts = tokenizer.transformer.merges[str(index)](x.flatten(0, 1), counts, True)
            x = io[f"padded.downsample_{index}"]
            assert counts == (x.shape[1],) * len(x)
            assert difference(merged.view_as(x), x) < TOLERANCE
    embedded = tokenizer.embedding.bytes[io["input_bytes"].long() % 257]
    assert torch.equal(embedded[:, :64], io["embedded_head"]) and torch.equal(embedded[:, -32:], io["embedded_tail"])


@cache
def production() -> tuple[dict[str, Tensor], dict[str, Any]]:
    return recorded("byte_production"), json.loads((CASES / "byte_production" / "config.json").read_text())


def expected_bytes(name: str) -> bytes:
    return production()[0][name].numpy().tobytes()


def test_golden_image_files() -> None:
    recordings, facts = production()
    pixels = recordings["image_uint8_hwc"].numpy()
    for source in (pixels, recordings["image"] * 2 - 1, Image.fromarray(pixels)):
        for encoding in ("fHWC", "fCHW", "TIFF", "PNG"):
            assert encodings.image_file(source, encoding) == expected_bytes(f"image.{encoding}")
        for quality in (100, 60):
            assert encodings.image_file(source, "JPEG", quality=quality) == expected_bytes(f"image.JPEG{quality}")
    y, x = np.mgrid[:224, :224]
    for a in (0, 77):
        channels = (3 * x + 2 * y + a, x * x // 16 + 5 * y, (x + y) * (x + 2 * y) // 8 + a)
        image = (np.stack(channels, axis=-1) % 256).astype(np.uint8)
        for name, fact in facts["facts_224"]["files"][f"a={a}"].items():
            quality = int(name.removeprefix("JPEG")) if name.startswith("JPEG") else 100
            file = encodings.image_file(image, name.rstrip("0123456789"), quality=quality)
            assert (len(file), hashlib.sha256(file).hexdigest()) == (fact["length"], fact["sha256"])


def test_golden_audio_files() -> None:
    wave, stereo = production()[0]["wave"], production()[0]["wave_stereo"]
    for kind in ("float32", "int32", "int16", "uint8"):
        assert encodings.audio_file(wave, sample_type=kind) == expected_bytes(f"wave.wav_{kind}")
    assert encodings.audio_file(stereo, sample_type="int16") == expected_bytes("wave_stereo.wav_int16")
    # What is inside the frames is up to the build of LAME.
    found, expected = encodings.audio_file(wave, "MP3"), expected_bytes("wave.mp3")
    assert len(found) == len(expected)
    assert [found[i : i + 4] for i in range(0, len(found), 108)] == [expected[i : i + 4] for i in range(0, len(found), 108)]


def test_golden_orders() -> None:
    file = expected_bytes("image.JPEG100")
    for mode in ("reverse", "cyclic_half_length", "stride", "window_shuffle", "random_shuffle"):
        permutation = production()[0].get(f"shuffle.{mode}.permutation")
        shuffled = transforms.shuffle(file, mode, permutation=permutation)
        assert shuffled.tobytes() == expected_bytes(f"shuffle.{mode}")
        assert transforms.unshuffle(shuffled, mode, permutation=permutation).tobytes() == file


def test_golden_obfuscation() -> None:
    recordings, facts = production()
    file, table = expected_bytes("image.fHWC"), transforms.EXCHANGED
    assert np.array_equal(table, recordings["byte_permutation.table"].numpy())
    assert hashlib.sha256(table.tobytes()).hexdigest() == facts["facts_224"]["byte_permutation_sha256_uint8"]
    assert transforms.exchange_values(file).tobytes() == expected_bytes("byte_permutation.out")
    assert transforms.restore_values(transforms.exchange_values(file)).tobytes() == file
    noisy = transforms.add_noise(file, -20, 20, noise=recordings["noise_20.noise"])
    assert noisy.tobytes() == expected_bytes("noise_20.out")
    assert transforms.exchange_values(noisy).tobytes() == expected_bytes("obfuscation_20.out")


def test_golden_privacy_camera() -> None:
    recordings, facts = production()
    file = expected_bytes("image.fHWC")
    for keep, fact in facts["facts_224"]["privacy_mask_150528"].items():
        assert np.array_equal(transforms.camera_positions(len(file), float(keep)), recordings[f"mask_{keep}.positions"].numpy())
        assert transforms.keep_bytes(file, float(keep)).tobytes() == expected_bytes(f"mask_{keep}.kept")
        positions = transforms.camera_positions(150_528, float(keep))
        digest = hashlib.sha256(positions.astype(np.int32).tobytes()).hexdigest()
        assert (len(positions), digest) == (fact["kept"], fact["sha256_int32_positions"])


# ------------------------------------------------- every configuration, against the specification written down once more


def reference(state: dict[str, Tensor], config: dict[str, Any], ids: Tensor) -> Tensor:
    """Logits of one file as the specification has them: dense windows, an embedded byte for every byte, no shortcut."""
    dim, heads, kernel = config["embed_dim"], config["n_attn_heads"], config["conv_kernel_size"]

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        if x.ndim > 2 and x.shape[1] == dim and config.get("layernorm_axis_rule", True):
            deviation = x.std(1, correction=0, keepdim=True) + 1e-5
            return (x - x.mean(1, keepdim=True)) / deviation * weight[:, None] + bias[:, None]
        return F.layer_norm(x, (dim,), weight, bias)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    embedded = state["embeddings.weight"][ids][None]
    x = F.conv1d(embedded.transpose(1, 2), state["token_reduction_net.weight"], stride=kernel // 2).transpose(1, 2)
    x = x + state["pos_embed.pos_embed.pos_embed"][0, :, : x.shape[1]]
    windows = config["window_sizes"] * (config["n_transformer_layers"] if len(config["window_sizes"]) == 1 else 1)
    for block, (window, shift, merged) in enumerate(zip(windows, config["window_shifts"], config["downsample"], strict=True)):
        count = x.shape[1]
        y = F.pad(x, (0, 0, 0, -count % window)).roll(-shift, 1).reshape(-1, window, dim)
        qkv = linear(norm(y, f"transformer.{block}.pre_norm_mha.0"), f"transformer.{block}.pre_norm_mha.1.qkv_proj")
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.split(dim, -1))
        mixed = ((q * (dim // heads) ** -0.5) @ k.transpose(2, 3)).softmax(-1) @ v
        y = y + linear(mixed.transpose(1, 2).flatten(2), f"transformer.{block}.pre_norm_mha.1.out_proj")
        inside = linear(norm(y, f"transformer.{block}.pre_norm_ffn.0"), f"transformer.{block}.pre_norm_ffn.1")
        y = y + linear(F.gelu(inside), f"transformer.{block}.pre_norm_ffn.4")
        x = y.reshape(1, -1, dim).roll(shift, 1)[:, :count]
        if merged:
            x = F.pad(x, (0, 0, 0, count % 2))
            pairs = torch.stack([x[:, 0::2], x[:, 1::2]], dim=-1).flatten(2)
            x = norm(linear(pairs, f"downsamplers.downsample_{block}.reduction"), f"downsamplers.downsample_{block}.norm")
    return linear(norm(x, "post_transformer_norm").mean(1), "classifier")[0]


UPSTREAM = {
    "mode": "custom",
    "embed_dim": 16,
    "n_transformer_layers": 3,
    "n_attn_heads": 2,
    "ffn_dim": 24,
    "n_classes": 5,
    "vocab_size": 257,
    "max_num_tokens": 400,
    "conv_kernel_size": 4,
    "window_sizes": [8],
    "window_shifts": [0, 4, 0],
    "downsample": [True, False, True],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "as usual": {},
    "one head": {"n_attn_heads": 1},
    "odd kernel": {"conv_kernel_size": 5},
    "smallest kernel": {"conv_kernel_size": 2},
    "a window for each block": {"window_sizes": [8, 4, 32]},
    "odd shifts": {"window_shifts": [3, 7, -1]},
    "shifts beyond the window": {"window_shifts": [8, 19, 40]},
    "windows of one token": {"window_sizes": [1], "window_shifts": [0, 1, 0]},
    "as many tokens in a window as channels": {"window_sizes": [16], "window_shifts": [0, 8, 5]},
    "as many in some": {"window_sizes": [8, 16, 16]},
    "the same without the rule": {"window_sizes": [16], "window_shifts": [0, 8, 5], "layernorm_axis_rule": False},
    "no merges": {"downsample": [False, False, False]},
    "merges everywhere": {"downsample": [True, True, True]},
    "more ids": {"vocab_size": 300},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_configuration(variant: str) -> None:
    config = UPSTREAM | VARIANTS[variant]
    state = upstream_weights(config)
    tokenizer = zoo.load_upstream("byteformer", config, state)
    # Among them lengths that give as many tokens as channels at the first norm, at a merge, and at the last norm.
    lengths = (config["conv_kernel_size"], 6, 13, 34, 35, 66, 67, 98, 130, 131, 132, 259)
    files = [torch.tensor(list(content(length, seed=length))) for length in lengths]
    expected = torch.stack([reference(state, config, ids) for ids in files])
    assert difference(tokenizer.classify(files), expected) < TOLERANCE
    padded = torch.nn.utils.rnn.pad_sequence(files, batch_first=True, padding_value=config["vocab_size"] - 1)
    expected = torch.stack([reference(state, config, ids) for ids in padded])
    assert difference(tokenizer.classify(files, compat="padded"), expected) < TOLERANCE


def test_sinusoidal_positions() -> None:
    """Sines of all frequencies first, then cosines; with the table in the file and without it."""
    config = UPSTREAM | {"sinusoidal_pos_emb": True, "embed_dim": 18}
    positions = torch.zeros(400, 18)
    for channel in range(9):
        angles = torch.arange(400) * 10_000 ** (-channel / 8)
        positions[:, channel], positions[:, 9 + channel] = angles.sin(), angles.cos()
    state = upstream_weights(config) | {"pos_embed.pos_embed.pos_embed": positions[None, None]}
    file = torch.tensor(list(content(300)))
    for weights in (state, {key: tensor for key, tensor in state.items() if "pos_embed" not in key}):
        tokenizer = zoo.load_upstream("byteformer", config, weights)
        assert difference(tokenizer.classify(file)[0], reference(state, config, file)) < TOLERANCE
        assert tokenizer.spec.dim == 18 and not isinstance(tokenizer.embedding.positions, torch.nn.Parameter)


# ---------------------------------------------------------------------------------------- official checkpoints and settings


def published() -> dict[str, dict[str, Any]]:
    found = {}
    for path in MANIFESTS.glob("byteformer-*.json"):
        manifest = json.loads(path.read_text())
        found[manifest["checkpoint_file"]] = manifest
    return found


def entries() -> list[registry.Entry]:
    return [registry.get(name) for name in zoo.list(family="byteformer") if not registry.get(name).embedded]


def test_every_published_file_is_an_entry() -> None:
    files = {entry.weights.file for entry in entries() if entry.weights.source == "local"}
    assert files == set(published()) and len(files) == 8
    # 45 official configurations, 8 of them with weights.
    assert len(entries()) == 45 and len({str(entry.config) for entry in entries()}) == 45


@pytest.mark.parametrize("file", sorted(published()))
def test_manifests_both_ways(file: str) -> None:
    """Every official tensor has a place, every place gets one, and the sizes are those of the entry."""
    manifest = published()[file]
    [entry] = [entry for entry in entries() if entry.weights.file == file]
    state = {key: torch.empty(shape, device="meta") for key, shape in manifest["tensors"].items()}
    expected = registry.check_config(entry)
    config, named = as_ours(ByteFormer, state, expected)
    assert config == expected and len(named) == len(state) == 169
    assert ByteFormer.checkpoint.recognises(state)
    with torch.device("meta"):
        own = ByteFormer(config).state_dict()
    assert {key: tensor.shape for key, tensor in own.items()} == {key: tensor.shape for key, tensor in named.items()}
    assert sum(tensor.numel() for tensor in own.values()) == manifest["num_parameters"]
    # The configuration in the original's own terms says the same, and so do the tensors alone, but for their windows.
    sizes = {"file", "quality", "sample_type", "keep", "noise", "shuffle", "permuted"}
    bare = replace(config, **{name: getattr(ByteFormerConfig(), name) for name in sizes})
    assert upstream_config(manifest["config"]) == bare
    assert replace(as_ours(ByteFormer, state, None)[0], windows=bare.windows) == bare


def test_a_training_run_s_configuration() -> None:
    settings = {key: value for key, value in UPSTREAM.items() if key != "n_classes"}
    run = {
        "model": {"audio_classification": {"n_classes": 5, "byteformer": settings | {"dropout": 0.0}}},
        "optim": {"name": "adamw"},
    }
    assert upstream_config(run) == upstream_config(UPSTREAM)
    assert upstream_config({"model": {"classification": {"name": "resnet"}}}) is None
    assert upstream_config({"unknown": 1}) is None


def test_presets() -> None:
    lists = {"window_shifts": [0, 64] * 16, "downsample": [True] * 6 + [False] * 26}
    sizes = {"tiny": (192, 3, 768, 12), "small": (384, 6, 1536, 12), "base": (768, 12, 3072, 12), "huge": (1280, 20, 5120, 32)}
    for mode, expected in sizes.items():
        config = upstream_config({"mode": mode, "conv_kernel_size": 8} | (lists if mode == "huge" else {}))
        assert config is not None
        assert (config.dim, config.heads, config.hidden, config.depth) == expected
    with pytest.raises(zoo.WeightsError, match="12 window_shifts for 32 blocks"):
        upstream_config({"mode": "huge", "conv_kernel_size": 8})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"conv_kernel_size": 1}, "at least 2"),
        ({"downsample": ["False", "True", "False"]}, "true and false"),
        ({"downsample": [True]}, "1 values of downsample"),
        ({"window_sizes": [8, 8, 4, 4]}, "4 windows for 3 blocks"),
        ({"window_sizes": [0]}, "positive"),
        ({"n_attn_heads": 3}, "no multiple"),
        ({"norm_layer": "batch_norm"}, "norm_layer batch_norm"),
        ({"embed_dim": None}, "embed_dim is missing"),
        ({"window_shifts": 3}, "not iterable"),
        ({"vocab_size": 256}, "no id for padding"),
    ],
)
def test_impossible_settings(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(zoo.WeightsError, match=reason):
        upstream_config(UPSTREAM | change)


def test_wrong_tensors_are_named() -> None:
    state = upstream_weights(UPSTREAM)
    for key in state:
        assert our_key(key) is not None
        with pytest.raises(zoo.errors.KeysError):
            zoo.load_upstream("byteformer", UPSTREAM, {name: tensor for name, tensor in state.items() if name != key})
        with pytest.raises(zoo.errors.KeysError):
            zoo.load_upstream("byteformer", UPSTREAM, state | {key: torch.zeros(3, 3, 3, 3)})
    with pytest.raises(zoo.errors.KeysError, match="unexpected in a ByteFormer checkpoint: transformer"):
        zoo.load_upstream("byteformer", UPSTREAM, state | {"transformer.0.pre_norm_ffn.2.weight": torch.zeros(1)})
    with pytest.raises(zoo.errors.KeysError, match="kernel is 4 in the tensors and 8 in the configuration"):
        zoo.load_upstream("byteformer", UPSTREAM | {"conv_kernel_size": 8}, state)


def test_loading_an_entry_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The official files are flat pickles that the user brings; without one the error says where it is."""
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    name = "byteformer-commands-mp3"
    file = registry.get(name).weights.file
    with pytest.raises(zoo.WeightsError, match=f"multimodal_classification/{file}"):
        zoo.load(name)
    with pytest.raises(zoo.WeightsError, match="were ever published"):
        zoo.load("byteformer-imagenet-png")
    shapes = published()[file]["tensors"]
    torch.save({key: torch.full(shape, 0.01) for key, shape in shapes.items()}, tmp_path / file)
    tokenizer = zoo.load(name, files={"main": tmp_path})
    assert tokenizer.config == registry.check_config(registry.get(name))
    assert tokenizer.classify(tokenizer.encode(content(3240))).shape == (1, 12)


# --------------------------------------------------------------------------------------------------- files to ids and back


def test_any_file_comes_back(tok: ByteFormer, tmp_path: Path) -> None:
    everything = bytes(range(256))
    (tmp_path / "empty").touch()
    (tmp_path / "some.bin").write_bytes(content(5000))
    items = [
        b"",
        b"\x00",
        everything,
        bytearray(b"text"),
        memoryview(b"abcdef")[::2],
        tmp_path / "empty",
        str(tmp_path / "some.bin"),
        np.frombuffer(b"array", np.uint8),
        torch.tensor([0, 255, 7], dtype=torch.uint8),
        np.array([1, 2, 3]),
        [104, 105],
    ]
    files = [b"", b"\0", everything, b"text", b"ace", b"", content(5000), b"array", b"\x00\xff\x07", b"\1\2\3", b"hi"]
    tokens = tok.encode(items)
    assert tokens.lengths.tolist() == [len(file) for file in files]
    assert tokens.tolist() == [list(file) for file in files]
    assert (tokens.ids[tokens.ids < 0] == -1).all()
    assert tok.decode(tokens) == tok.reconstruct(items) == files
    for file, item in zip(files, items, strict=True):
        assert tok.decode(tok.encode(item)) == [file]
    assert tok.decode(zoo.Tokens.load(tokens.save(tmp_path / "tokens.zt"))) == files
    assert tok.decode(tok.encode(b"")) == [b""] and tok.encode([b"", b""]).ids.shape == (2, 0)
    assert tok.decode(tok.encode(torch.ones(2, 3, dtype=torch.uint8))) == [b"\1\1\1"] * 2


def test_spec(tok: ByteFormer) -> None:
    assert tok.spec.lossless and tok.spec.modality == "bytes"
    assert (tok.spec.vocab_size, tok.spec.dim) == (257, 24)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (object(), "not object"),
        (3.5, "not float"),
        ((b"a", 3), "not tuple"),
        (np.zeros((2, 3), np.uint8)[None], "of shape"),
        (np.zeros(3, np.float32), "whole numbers"),
        (torch.tensor([True]), "whole numbers"),
        (torch.tensor([0, 256]), "reach from 0 to 256"),
        (np.array([-1, 4]), "reach from -1 to 4"),
        ([1, 300], "reach from 1 to 300"),
        (["a", "b"], "whole numbers"),
        ("nowhere.bin", "does not exist"),
        (".", "is a folder"),
        (bytes(101), "more than max_bytes = 100"),
    ],
)
def test_bad_items_are_named(tok: ByteFormer, item: Any, reason: str) -> None:
    with pytest.raises(zoo.InputError, match=reason) as caught:
        tok.encode([b"good", item], max_bytes=100)
    assert caught.value.index == 1


def test_nothing_to_encode(tok: ByteFormer) -> None:
    with pytest.raises(zoo.InputError, match="nothing to encode"):
        tok.encode([])


def test_bad_tokens_are_named(tok: ByteFormer) -> None:
    good = torch.tensor([1, 2, 3, 4])
    for ids, reason in (
        (torch.tensor([0, 257]), "id 257 is outside"),
        (torch.tensor([-2, 0]), "id -2 is outside"),
        (torch.tensor([1, -1, 1]), "padding"),
        (good.float(), "integers"),
        (torch.tensor([3, 256]), "stands for padding"),
    ):
        with pytest.raises(zoo.InputError, match=reason) as caught:
            tok.decode([good[:0], ids])
        assert caught.value.index == 1
    foreign = zoo.Tokens.from_sequences([good], tokenizer="another", fingerprint="f" * 16, vocab_size=257)
    for method in (tok.decode, tok.embed, tok.features, tok.classify):
        with pytest.raises(zoo.MismatchError, match="made by another"):
            method(foreign)
    with pytest.raises(zoo.InputError, match="no tokens"):
        tok.decode(tok.encode(b"abc")[:0])


def test_files_that_the_network_cannot_take(tok: ByteFormer) -> None:
    longest = tok.config.longest_file
    assert longest == 1203
    files = tok.encode([content(longest), content(4)])
    assert [len(tokens) for tokens in tok.features(files).tokens] == [150, 1]
    for bad, reason in ((b"", "0 bytes are fewer than the 4"), (b"abc", "3 bytes are fewer"), (content(1204), "at most 1203")):
        with pytest.raises(zoo.InputError, match=reason) as caught:
            tok.classify(tok.encode([content(9), bad]))
        assert caught.value.index == 1
    # Without positions there is no limit, and padding makes short files long enough.
    assert tok.embed(tok.encode(content(1204))).shape == (1, 601, 24)
    assert tok.classify(tok.encode([content(9), b""]), compat="padded").shape == (2, 7)
    with pytest.raises(zoo.InputError, match="compat must be"):
        tok.classify(files, compat="upstream")


def test_lengths_are_announced(tok: ByteFormer) -> None:
    for length in (4, 5, 6, 50, 51, 200, 333):
        tokens = tok.encode(content(length))
        assert tok.config.reduced_length(length) == tok.embed(tokens).shape[1]
        assert tok.config.final_length(length) == len(tok.features(tokens).tokens[0])
    assert [tok.config.reduced_length(length) for length in range(6)] == [0, 0, 0, 0, 1, 1]
    official = ByteFormerConfig()
    assert (official.reduced_length(150_668), official.final_length(150_668), official.longest_file) == (9415, 148, 800_031)


def test_files_of_any_size_go_through_in_chunks(tok: ByteFormer, tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    path.write_bytes(content(100_003))
    chunks = list(tok.encode_chunks(path, chunk_bytes=4096))
    assert zoo.Tokens.cat(chunks).lengths.tolist() == [4096] * 24 + [1699]
    assert b"".join(tok.decode_chunks(chunks)) == path.read_bytes()
    vectors = torch.cat(list(tok.embed_chunks(tok.encode_chunks(path, chunk_bytes=77))))
    assert difference(vectors, tok.embed(tok.encode(path))[0]) < 1e-5
    (tmp_path / "empty").touch()
    assert list(tok.encode_chunks(tmp_path / "empty")) == []
    for source, size, reason in ((tmp_path, 1, "folder"), (tmp_path / "nowhere", 1, "does not exist"), (path, 0, "at least 1")):
        with pytest.raises(zoo.InputError, match=reason):
            next(tok.encode_chunks(source, size))


def test_chunks_take_bounded_memory(tok: ByteFormer, tmp_path: Path) -> None:
    path = tmp_path / "huge.bin"
    with path.open("wb") as file:
        file.truncate(96 << 20)
    digest = hashlib.sha256()
    with peak_memory("cpu") as peak:
        for part in tok.decode_chunks(tok.encode_chunks(path)):
            digest.update(part)
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").digest() == digest.digest()
    # The whole file would take 100 MB as bytes and eight times as much as ids.
    assert peak[0] < 200e6


# -------------------------------------------------------------------------------------------------------- batches and numbers


LENGTHS = (4, 5, 30, 31, 33, 34, 64, 65, 129, 240, 401, 1000)


@pytest.mark.parametrize("budget", [1, 50, 10_000])
def test_batch_invariance(tok: ByteFormer, monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    """However files are packed, each has the numbers that it has alone."""
    monkeypatch.setitem(ByteFormer.at_once, "features", Budget(budget, budget))
    files = [content(length, seed=length) for length in LENGTHS]
    together = tok.features(tok.encode(files))
    logits = tok.classify(tok.encode(files[::-1])).flip(0)
    for index, file in enumerate(files):
        alone = tok.features(tok.encode(file))
        assert difference(together.tokens[index], alone.tokens[0]) < 1e-5
        assert difference(together.pooled[index], alone.pooled[0]) < 1e-5
        assert difference(logits[index], tok.classify(tok.encode(file))[0]) < 1e-5
        assert torch.equal(
            tok.embed(tok.encode(files))[index, : len(tok.embed(tok.encode(file))[0])], tok.embed(tok.encode(file))[0]
        )


def test_padding_is_not_what_an_item_gets_alone(tok: ByteFormer) -> None:
    files = tok.encode([content(40), content(400)])
    assert (tok.classify(files) - tok.classify(files, compat="padded")).abs().amax(1)[0] > 0.01
    same = tok.encode([content(100), content(100, seed=1)])
    assert difference(tok.classify(same), tok.classify(same, compat="padded")) < 1e-5


def test_norms_over_tokens_can_be_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    """As many tokens as channels at the last norm; there the rule makes the result all but independent of the file."""
    tokenizer = small_byteformer(seed=3)
    tokenizer.name = "small-byteformer-for-the-warning"
    # 24 tokens behind two merges.
    files = tokenizer.encode([content(2 * 94 + 3, seed=seed) for seed in range(3)])
    with caplog.at_level(logging.WARNING, logger="zoo"):
        ruled = tokenizer.classify(files)
        tokenizer.classify(files)
    assert [record.message for record in caplog.records] == [caplog.records[0].message]
    assert "layernorm_axis_rule=False" in caplog.records[0].message
    caplog.clear()
    free = tokenizer.classify(files, layernorm_axis_rule=False)
    assert not caplog.records
    assert (ruled[0] - ruled[1]).abs().max() < 0.1 * (free[0] - free[1]).abs().max()
    # Other lengths do not know the rule.
    other = tokenizer.encode(content(300))
    assert torch.equal(tokenizer.classify(other), tokenizer.classify(other, layernorm_axis_rule=False))


def test_reduced_precision_leaves_ids_and_embeddings_alone(tok: ByteFormer) -> None:
    reduced = small_byteformer()
    reduced.set_precision("bf16")
    files = [content(length) for length in LENGTHS]
    tokens = tok.encode(files)
    assert reduced.encode(files).equal(tokens) and reduced.decode(tokens) == files
    assert torch.equal(reduced.embed(tokens), tok.embed(tokens))
    exact, rough = tok.classify(tokens), reduced.classify(tokens)
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    assert (exact - rough).square().sum() < 0.001 * exact.square().sum()


def test_autocast_changes_nothing(tok: ByteFormer) -> None:
    tokens = tok.encode([content(100), content(333)])
    expected = tok.classify(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tok.classify(tokens), expected)


def test_save_load_and_pickle(tok: ByteFormer, tmp_path: Path) -> None:
    config = replace(SMALL_BYTEFORMER, noise=(-3, 3), shuffle="stride", permuted=True, file="fHWC", windows=(16, 8, 4))
    tokenizer = small_byteformer(1, config)
    tokens = tokenizer.encode(content(3000))
    logits = tokenizer.classify(tokens.truncate(1000))
    tokenizer.save_pretrained(tmp_path)
    for again in (zoo.load(f"local-dir:{tmp_path}"), pickle.loads(pickle.dumps(tokenizer))):
        assert (again.spec, again.config) == (tokenizer.spec, config)
        assert again.decode(tokens) == [content(3000)]
        assert difference(again.classify(tokens.truncate(1000)), logits) < 1e-5
    with pytest.raises(zoo.MismatchError):
        tok.decode(tokens)


def test_several_threads() -> None:
    tokenizer = small_byteformer(2)
    tokens = tokenizer.encode([content(length) for length in LENGTHS])
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(tokenizer.classify(tokens))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = tokenizer.classify(tokens)
    assert len(found) == 4 and all(torch.equal(logits, expected) for logits in found)


def test_the_table_follows_the_weights() -> None:
    tokenizer = small_byteformer(4)
    tokens = tokenizer.encode(content(50))
    before = tokenizer.embed(tokens)
    with torch.no_grad():
        tokenizer.embedding.reduction.mul_(2)
    assert difference(tokenizer.embed(tokens), 2 * before) < 1e-5
    tokenizer.load_state_dict(small_byteformer(5).state_dict(), assign=True)
    assert torch.equal(tokenizer.embed(tokens), small_byteformer(5).embed(tokens.ids))


def test_gradients_are_those_of_the_convolution() -> None:
    """Training goes through the table as well; the row of padding stays as it is."""
    tokenizer = small_byteformer(6).requires_grad_(True)
    ids = [torch.tensor([*content(60), 256, 256])]
    weights = torch.randn(30, 24)
    embedding = tokenizer.embedding
    (embedding(ids) * weights).sum().backward()
    found = [embedding.bytes.grad, embedding.reduction.grad, embedding.positions.grad]
    rows, taps = embedding.bytes.detach().requires_grad_(), embedding.reduction.detach().requires_grad_()
    embedded = F.embedding(ids[0], rows, padding_idx=256)
    (F.conv1d(embedded.T[None], taps, stride=2)[0].T * weights).sum().backward()
    assert difference(found[0], rows.grad) < 1e-4 and difference(found[1], taps.grad) < 1e-4
    assert torch.equal(found[2][:30], weights)
    logits = tokenizer([torch.tensor(list(content(n))) for n in (40, 101)])
    assert difference(logits.detach(), tokenizer.classify([torch.tensor(list(content(n))) for n in (40, 101)])) < 1e-5
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in tokenizer.parameters())


def test_gradients_of_the_transformer() -> None:
    """Full, partial and shifted windows pass the gradients on that the dense ones pass on."""
    state = {key: tensor.requires_grad_() for key, tensor in upstream_weights(UPSTREAM).items()}
    tokenizer = zoo.load_upstream("byteformer", UPSTREAM, {key: tensor.detach() for key, tensor in state.items()})
    tokenizer.requires_grad_(True)
    files = [torch.tensor(list(content(length))) for length in (40, 131, 9)]
    torch.stack([reference(state, UPSTREAM, ids) for ids in files]).square().sum().backward()
    tokenizer(files).square().sum().backward()
    found = dict(tokenizer.named_parameters())
    for key in state:
        if "transformer" in key and "reduction" not in key:
            expected = state[key].grad
            assert difference(found[our_key(key)].grad, expected) < 1e-3 * expected.abs().max(), key


def test_initialisation() -> None:
    torch.manual_seed(0)
    tokenizer = ByteFormer(replace(SMALL_BYTEFORMER, dim=64, hidden=128))
    assert (tokenizer.embedding.bytes[-1] == 0).all()
    for tensor in (tokenizer.embedding.bytes[:-1], tokenizer.embedding.positions):
        assert tensor.std().item() == pytest.approx(1 / 8, rel=0.05)
    block = tokenizer.transformer.blocks[0]
    assert block.mlp.fc1.weight.abs().max().item() == pytest.approx((6 / (64 + 128)) ** 0.5, rel=0.01)
    assert (block.mlp.fc1.bias == 0).all() and (block.norm1.weight == 1).all()


# --------------------------------------------------------------------------------------------------------------- file making


def picture(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 3 + columns, columns * 2, rows + columns // 3], axis=-1).astype(np.uint8)


def test_files_are_what_they_claim_to_be() -> None:
    pixels = picture(31, 45)
    for encoding in ("TIFF", "PNG"):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(encodings.image_file(pixels, encoding)))), pixels)
    jpeg = Image.open(io.BytesIO(encodings.image_file(pixels, "JPEG", quality=60)))
    assert (jpeg.format, jpeg.size) == ("JPEG", (45, 31))
    wave = torch.tensor([0.0, 0.5, -0.25, 0.999, -1.0])
    for kind, step in (("float32", 1e-7), ("int32", 1e-7), ("int16", 1e-4), ("uint8", 2e-2)):
        samples, rate = soundfile.read(io.BytesIO(encodings.audio_file(wave, sample_type=kind)), dtype="float32")
        assert rate == 16_000 and np.abs(samples - wave.numpy()).max() <= step
    second = encodings.audio_file(torch.sin(torch.arange(16_000) / 5), "MP3")
    assert len(second) == 3240
    assert soundfile.info(io.BytesIO(second)).samplerate == 16_000


def test_extreme_samples() -> None:
    loud = torch.tensor([1.0, 2.0, -1.0])
    values = {kind: encodings.audio_file(loud, sample_type=kind) for kind in ("float32", "int32", "int16", "uint8")}
    assert np.frombuffer(values["float32"][58:], "<f4").tolist() == [1, 1, -1]
    # The original's conversion overflows at 1.
    assert np.frombuffer(values["int32"][80:], "<i4").tolist() == [-(2**31)] * 3
    assert np.frombuffer(values["int16"][44:], "<i2").tolist() == [32767, 32767, -32767]
    assert list(values["uint8"][44:]) == [255, 255, 0, 0]
    for kind, file in values.items():
        assert int.from_bytes(file[4:8], "little") == len(file) - 8, kind


@pytest.mark.parametrize("size", [(300, 400), (401, 300), (256, 511), (224, 224), (999, 256)])
def test_evaluation_crop(size: tuple[int, int]) -> None:
    """Shorter side 256, longer one cut off to a whole number, margins halved and rounded down."""
    height, width = size
    factor = 256 / min(size)
    resized = (int(256 * height / min(size)), int(256 * width / min(size)))
    expected = Image.fromarray(picture(*size))
    if factor != 1:
        expected = expected.resize(resized[::-1], Image.Resampling.BICUBIC)
    top, left = (resized[0] - 224) // 2, (resized[1] - 224) // 2
    found = encodings.evaluation_crop(picture(*size))
    assert np.array_equal(found, np.asarray(expected)[top : top + 224, left : left + 224])


def test_evaluation_clip() -> None:
    short, long = torch.ones(2, 5) * torch.tensor([[0.5], [0.25]]), torch.linspace(0, 1, 20_000)
    assert torch.equal(encodings.evaluation_clip(short)[:7], torch.tensor([0.375] * 5 + [0] * 2))
    assert torch.equal(encodings.evaluation_clip(long), long[:16_000])
    assert len(encodings.evaluation_clip((torch.zeros(8000), 8000))) == 16_000


LENGTH_OF_FILE = {
    "byteformer-imagenet-tiff": 150_668,
    "byteformer-imagenet-png": 150_864,
    "byteformer-imagenet-fchw": 150_528,
    "byteformer-imagenet-obfuscation": 150_528,
    "byteformer-imagenet-camera-0.05": 7_526,
    "byteformer-imagenet-camera-0.75": 112_896,
    "byteformer-commands-wav": 64_058,
    "byteformer-commands-wav-int32-k16": 64_080,
    "byteformer-commands-wav-int16-k8": 32_044,
    "byteformer-commands-wav-uint8-k4": 16_044,
    "byteformer-commands-mp3": 3_240,
}


def unloaded(name: str) -> ByteFormer:
    """A model that makes files as an entry's does, and is small otherwise."""
    made = ("file", "quality", "sample_type", "keep", "noise", "shuffle", "permuted")
    config = registry.check_config(registry.get(name))
    return small_byteformer(config=replace(SMALL_BYTEFORMER, **{key: getattr(config, key) for key in made}))


@pytest.mark.parametrize("name", LENGTH_OF_FILE)
def test_prepared_files(name: str) -> None:
    tokenizer = unloaded(name)
    source = picture(240, 300) if "imagenet" in name else torch.sin(torch.arange(9_000) / 9)
    assert len(tokenizer.evaluation_file(source)) == LENGTH_OF_FILE[name]


def test_official_transforms_follow_each_other() -> None:
    """Noise is drawn before the exchange of values, and decoding undoes the exchange alone."""
    tokenizer, source = unloaded("byteformer-imagenet-obfuscation"), picture(240, 300)
    file = tokenizer.evaluation_file(source, generator=torch.Generator().manual_seed(1))
    raw = encodings.image_file(encodings.evaluation_crop(source), "fHWC")
    noise = (np.frombuffer(file, np.uint8).astype(int) - np.frombuffer(raw, np.uint8) + 128) % 256 - 128
    assert (noise.min(), noise.max()) == (-20, 20)
    tokens = tokenizer.encode(file)
    assert np.array_equal(tokens.ids[0].numpy(), transforms.EXCHANGED[np.frombuffer(file, np.uint8)])
    assert tokenizer.decode(tokens) == [file]

    backwards = unloaded("byteformer-imagenet-shuffle-reverse")
    file = backwards.evaluation_file(source)
    assert file == encodings.image_file(encodings.evaluation_crop(source), "JPEG")
    tokens = backwards.encode(file)
    assert tokens.tolist() == [list(file[::-1])] and backwards.decode(tokens) == [file]
    with pytest.raises(zoo.InputError, match="whole file"):
        next(backwards.encode_chunks("any"))

    random = unloaded("byteformer-imagenet-shuffle-random")
    file = random.evaluation_file(source, generator=torch.Generator().manual_seed(1))
    assert sorted(file) == sorted(backwards.evaluation_file(source)) and file != backwards.evaluation_file(source)
    assert random.encode(file).tolist() == [list(file)]


def test_making_files_of_the_wrong_kind(tok: ByteFormer) -> None:
    with pytest.raises(zoo.InputError, match="does not say which files"):
        tok.evaluation_file(picture(9, 9))
    for call, reason in (
        (lambda: encodings.image_file(picture(9, 9), "GIF"), "must be one of"),
        (lambda: encodings.image_file(picture(9, 9), "JPEG", quality=0), "quality"),
        (lambda: encodings.image_file(torch.rand(3, 9, 9) * 255, "TIFF"), r"\[-1, 1\]"),
        (lambda: encodings.audio_file(torch.zeros(0)), "empty"),
        (lambda: encodings.audio_file(torch.tensor([torch.nan])), "NaN"),
        (lambda: encodings.audio_file(torch.zeros(5), "FLAC"), "WAV or MP3"),
        (lambda: encodings.audio_file(torch.zeros(5), sample_type="int24"), "sample_type"),
        (lambda: encodings.audio_file(torch.zeros(5), "MP3", sample_rate=8000), "resample"),
        (lambda: transforms.shuffle(b"abc", "sort"), "must be one of"),
        (lambda: transforms.shuffle(b"abc", "random_shuffle", permutation=torch.arange(4)), "4 bytes"),
        (lambda: transforms.unshuffle(b"abc", "random_shuffle"), "permutation"),
        (lambda: transforms.keep_bytes(b"abc", 0.0), "share"),
        (lambda: transforms.add_noise(b"abc", 3, -3), "from 3 to -3"),
        (lambda: transforms.add_noise(b"abc", -3, 3, noise=torch.zeros(4, dtype=torch.int64)), "4 numbers"),
    ):
        with pytest.raises(zoo.InputError, match=reason):
            call()


@pytest.mark.parametrize("length", [0, 1, 2, 5, 1023, 1024, 1025, 3000])
def test_orders_at_every_length(length: int) -> None:
    file = content(length)
    for mode in ("reverse", "cyclic_half_length", "stride"):
        assert transforms.unshuffle(transforms.shuffle(file, mode), mode).tobytes() == file
    shuffled = transforms.shuffle(file, "window_shuffle", generator=torch.Generator().manual_seed(0)).tobytes()
    assert shuffled[length // 1024 * 1024 :] == file[length // 1024 * 1024 :]
    assert sorted(transforms.shuffle(file, "random_shuffle").tobytes()) == sorted(file)


# ----------------------------------------------------------------------------------------------------------------- benchmark


def test_the_dense_peer_computes_the_same_logits(tok: ByteFormer) -> None:
    files = bench.random_files([40, 333, 1001])
    expected = tok.classify(files, compat="padded", layernorm_axis_rule=False)
    assert difference(bench.dense_logits(tok, files), expected) < TOLERANCE
    embedded = bench.dense_embedding(tok, files)
    assert difference(embedded, tok.embed(files, compat="padded", positions=True)) < TOLERANCE


def test_benchmark_jobs(tmp_path: Path) -> None:
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(SMALL_BYTEFORMER).items()}
    entry = {
        "name": "micro-byteformer",
        "family": "byteformer",
        "modality": "bytes",
        "description": "for tests",
        "config": config | {"file": "JPEG"},
        "weights": {"source": "none"},
        "licence": {"code": "Apache-2.0", "weights": "Apache-2.0"},
        "card": "byteformer.md",
    }
    (tmp_path / "catalogue.yaml").write_text(yaml.safe_dump([entry]))
    [found] = registry.read(tmp_path / "catalogue.yaml")
    rates = dict.fromkeys((torch.float32, torch.bfloat16), 1e9)
    with torch.inference_mode():
        results = [measure(job, rates, 1, "cpu") for job in bench.jobs(found, "cpu", True, batches=(1, 3), lengths=(300,))]
    assert [(m.contender.removeprefix("micro-byteformer"), m.direction, m.case) for m in results] == [
        (contender, direction, f"{batch} x 300 bytes")
        for batch in (1, 3)
        for contender, direction in (
            ("", "embed"),
            ("", "classify"),
            (", bf16", "classify"),
            (", dense", "embed"),
            (", dense", "classify"),
        )
    ]
    assert 0 < results[1].flops < results[6].flops


# ------------------------------------------------------------------------------------- what a run's configuration may change


def test_spans_of_orders() -> None:
    """Distances and windows other than the usual 1024, written out."""
    file = bytes(range(23))
    strided = transforms.shuffle(file, "stride", span=7)
    assert strided.tolist() == [0, 7, 14, 21, 1, 8, 15, 22, 2, 9, 16, 3, 10, 17, 4, 11, 18, 5, 12, 19, 6, 13, 20]
    assert transforms.unshuffle(strided, "stride", span=7).tobytes() == file
    permutation = torch.tensor([2, 0, 4, 1, 3])
    expected = [start + place for start in (0, 5, 10, 15) for place in permutation.tolist()] + [20, 21, 22]
    for span in (None, 5):
        windows = transforms.shuffle(file, "window_shuffle", span=span, permutation=permutation)
        assert windows.tolist() == expected
        assert transforms.unshuffle(windows, "window_shuffle", span=span, permutation=permutation).tobytes() == file
    drawn = transforms.shuffle(file, "window_shuffle", span=8, generator=torch.Generator().manual_seed(0))
    assert sorted(drawn[:8]) == list(file[:8]) and sorted(drawn[8:16]) == list(file[8:16]) and drawn[16:].tobytes() == file[16:]
    with pytest.raises(zoo.InputError, match="5 bytes"):
        transforms.shuffle(file, "window_shuffle", span=6, permutation=permutation)
    with pytest.raises(zoo.InputError, match="at least 1"):
        transforms.shuffle(file, "stride", span=0)


def test_a_tokenizer_reads_at_its_own_stride(tmp_path: Path) -> None:
    tokenizer = small_byteformer(config=replace(SMALL_BYTEFORMER, shuffle="stride", shuffle_stride=3))
    tokens = tokenizer.encode(bytes(range(8)))
    assert tokens.tolist() == [[0, 3, 6, 1, 4, 7, 2, 5]] and tokenizer.decode(tokens) == [bytes(range(8))]
    tokenizer.save_pretrained(tmp_path)
    assert zoo.load(f"local-dir:{tmp_path}").decode(tokens) == [bytes(range(8))]


def test_a_run_says_how_its_files_were_made() -> None:
    model = {"classification": {"n_classes": 5, "byteformer": {k: v for k, v in UPSTREAM.items() if k != "n_classes"}}}
    image = {
        "pil_save": {"enable": True, "file_encoding": "JPEG", "quality": 60},
        "shuffle_bytes": {"enable": True, "mode": "window_shuffle", "stride": 512, "window_size": 300},
        "mask_positions": {"enable": True, "keep_frac": 0.25},
        "random_uniform": {"enable": True, "width_range": [-3, 9]},
        "byte_permutation": {"enable": True},
        "resize": {"enable": True, "size": 72, "interpolation": "bilinear"},
        "center_crop": {"enable": True, "size": 64},
    }
    plain = upstream_config(UPSTREAM)
    found = upstream_config({"model": model, "image_augmentation": image})
    assert plain is not None and found == replace(
        plain,
        file="JPEG",
        quality=60,
        resized=72,
        cropped=64,
        interpolation="bilinear",
        keep=0.25,
        noise=(-3, 9),
        shuffle="window_shuffle",
        shuffle_stride=512,
        shuffle_window=300,
        permuted=True,
    )
    # What is there and not switched on does not count, and what is on without values has the original's.
    off = {name: settings | {"enable": False} for name, settings in image.items()}
    assert upstream_config({"model": model, "image_augmentation": off}) == plain
    bare = {name: {"enable": True} for name in image}
    assert upstream_config({"model": model, "image_augmentation": bare}) == replace(
        plain, file="TIFF", interpolation="bilinear", keep=0.5, noise=(-5, 5), shuffle="reverse", permuted=True
    )
    audio = {"torchaudio_save": {"enable": True, "encoding_dtype": "uint8"}}
    assert upstream_config({"model": model, "audio_augmentation": audio}) == replace(plain, file="WAV", sample_type="uint8")
    audio = {"torchaudio_save": {"enable": True, "format": "mp3"}}
    assert upstream_config({"model": model, "audio_augmentation": audio}) == replace(plain, file="MP3")


def test_images_are_cut_as_the_run_did() -> None:
    tokenizer = small_byteformer(config=replace(SMALL_BYTEFORMER, file="fHWC", resized=20, cropped=9, interpolation="nearest"))
    source = picture(40, 60)
    # Every other pixel from the second, then the middle 9 x 9 of 20 x 30.
    assert tokenizer.evaluation_file(source) == source[1::2, 1::2][5:14, 10:19].tobytes()

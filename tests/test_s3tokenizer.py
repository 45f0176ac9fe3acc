"""S3Tokenizer against the original package's outputs, and the promises that the package does not make."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import zoo
from small_models_s3tokenizer import SMALL_V1, SMALL_V2, small_s3tokenizer
from zoo import registry
from zoo.checkpoint import as_ours
from zoo.codecs.s3tokenizer import S3Tokenizer, S3TokenizerConfig
from zoo.codecs.s3tokenizer.windows import official_windows, windows
from zoo.onnx_weights import read_onnx
from zoo.tokenizer import Budget

CASES = Path(__file__).parent / "golden" / "s3tokenizer"
MANIFESTS = Path(__file__).parent / "golden" / "manifests"
NAMES = sorted(path.name for path in CASES.iterdir())
ENTRIES = [name for name in registry.names(family="s3tokenizer") if not registry.get(name).embedded]


@cache
def model(case: str, file: str = "weights.safetensors") -> S3Tokenizer:
    return zoo.load_upstream("s3tokenizer", CASES / case / "config.json", CASES / case / file)


@cache
def recorded(case: str) -> dict[str, Tensor]:
    return load_file(CASES / case / "io.safetensors")


def tolerance(case: str, of: str) -> float:
    return json.loads((CASES / case / "config.json").read_text())["meta"]["tolerance"][of]


def short_ones(case: str) -> dict[str, tuple[Tensor, int]]:
    """The short recordings by their length, at their rate."""
    waves = {name.removeprefix("wav_"): (wave, 16_000) for name, wave in recorded(case).items() if name.startswith("wav_")}
    return {name: wave for name, wave in waves.items() if name != "long"}


def speech_like(samples: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    envelope = torch.nn.functional.interpolate(
        torch.rand(1, 1, samples // 800 + 2, generator=generator), samples, mode="linear"
    )
    return torch.randn(samples, generator=generator) * envelope[0, 0] * 0.3


# ------------------------------------------------------------------------------------------------------------ golden cases


@pytest.mark.parametrize("case", NAMES)
def test_golden_spectra_vectors_and_ids(case: str) -> None:
    tokenizer, io = model(case), recorded(case)
    for name, (wave, rate) in short_ones(case).items():
        mel = tokenizer.frontend(wave.float() / 32768)
        assert (mel.T - io[f"mel_{name}"]).abs().max() < tolerance(case, "mel_abs")
        vectors = tokenizer.encoder(mel, [len(mel)])
        assert (vectors - io[f"hidden_{name}"][0]).abs().max() < tolerance(case, "hidden_abs")
        if f"down_{name}" in io:
            projected = tokenizer.quantizer.project(vectors)
            assert (projected - io[f"down_{name}"][0]).abs().max() < tolerance(case, "hidden_abs")
        assert torch.equal(tokenizer.encode((wave, rate)).ids[0], io[f"ids_{name}"])


@pytest.mark.parametrize("case", NAMES)
def test_golden_ragged_batch_of_short_and_long_items(case: str) -> None:
    tokenizer, io = model(case), recorded(case)
    items = short_ones(case)
    longest = io["wav_long"]
    tokens = tokenizer.encode([*items.values(), (longest, 16_000)])
    expected = [io[f"ids_{name}"] for name in items] + [io[f"long_{len(longest)}_ids"]]
    assert all(torch.equal(found, wanted) for found, wanted in zip(tokens.unpadded(), expected, strict=True))


OPTIONS = {"ids": {}, "official_ids": {"compat": "official"}, "single_ids": {"long": "single"}}


@pytest.mark.parametrize(
    ("case", "key"),
    [(case, key) for case in NAMES for key in recorded(case) if key.startswith("long_") and key.endswith("_ids")],
)
def test_golden_long_recordings(case: str, key: str) -> None:
    io = recorded(case)
    _, samples, kind = key.split("_", 2)
    wave = io["wav_long"][: int(samples)]
    assert torch.equal(model(case).encode((wave, 16_000), **OPTIONS[kind]).ids[0], io[key])


@pytest.mark.parametrize("case", NAMES)
def test_golden_intermediates(case: str) -> None:
    tokenizer, io = model(case), recorded(case)
    seen: dict[str, Tensor] = {}
    modules = dict(tokenizer.named_modules())
    renamed = {
        name: name.replace("fsmn_memory", "memory") for name in (key.removeprefix("mid.") for key in io if "mid." in key)
    }
    hooks = [
        modules[ours].register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out))
        for name, ours in renamed.items()
    ]
    [length] = [name for name in short_ones(case) if f"hidden_{name}" in io and _rows(io, name) == _rows_of_middle(io)]
    wave, rate = short_ones(case)[length]
    tokenizer.encode((wave, rate))
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(renamed) > 8
    for name, found in seen.items():
        wanted = io[f"mid.{name}"][0]
        wanted = wanted.T if ".conv" in name else wanted
        assert (found - wanted).abs().max() < 2e-4 * wanted.square().mean().sqrt(), name


def _rows(io: dict[str, Tensor], name: str) -> int:
    return io[f"hidden_{name}"].shape[1]


def _rows_of_middle(io: dict[str, Tensor]) -> int:
    return io["mid.encoder.blocks.0"].shape[1]


# ---------------------------------------------------------------------------------------------------------- official files


@pytest.mark.parametrize("name", ENTRIES)
def test_manifest_maps_both_ways(name: str) -> None:
    """Every tensor of the official file is used, and every tensor of ours is filled."""
    entry = registry.get(name)
    manifests = [json.loads(path.read_text()) for path in MANIFESTS.glob("s3tokenizer-*.json")]
    [manifest] = [m for m in manifests if m["sha256"] == entry.weights.sha256]
    assert (manifest["hf_repo"], manifest["file"]) == (entry.weights.repo, entry.weights.file)
    official = {key: torch.empty(shape, device="meta") for key, shape in manifest["tensors"].items()}
    config = registry.check_config(entry)
    assert S3Tokenizer.checkpoint.config({"model": manifest["model"], "config": manifest["config"]}) == config
    found, state = as_ours(S3Tokenizer, official, config)
    assert found == config and len(state) == manifest["num_tensors"]
    assert sum(tensor.numel() for tensor in state.values()) == manifest["num_elements"]
    assert 16_000 / (160 * config.frames_per_id) == manifest["token_rate"]
    assert S3Tokenizer.checkpoint.recognises(official.keys())


def test_every_manifest_has_an_entry() -> None:
    files = {registry.get(name).weights.sha256 for name in ENTRIES}
    assert files == {json.loads(path.read_text())["sha256"] for path in MANIFESTS.glob("s3tokenizer-*.json")}


@pytest.mark.parametrize("case", NAMES)
def test_a_graph_gives_the_same_model_as_a_state_dict(case: str) -> None:
    from_graph, from_state = model(case, "weights.onnx"), model(case)
    assert from_graph.config == from_state.config
    assert from_graph.fingerprint == from_state.fingerprint
    for (name, found), wanted in zip(from_graph.state_dict().items(), from_state.state_dict().values(), strict=True):
        assert torch.equal(found, wanted), name


def test_what_a_graph_tells_needs_no_configuration() -> None:
    for case in ("v2_d128", "v3_d64"):
        found = zoo.load_upstream("s3tokenizer", None, CASES / case / "weights.onnx").config
        assert found == model(case).config
        assert zoo.load_upstream("s3tokenizer", None, CASES / case / "weights.safetensors").config == found
    with pytest.raises(zoo.KeysError, match="number of heads"):
        zoo.load_upstream("s3tokenizer", None, CASES / "v1_50hz_d48" / "weights.onnx")


def test_the_rate_of_version_1_is_told_or_asked_for() -> None:
    case = CASES / "v1_50hz_d48"
    raw = json.loads((case / "config.json").read_text())
    slow = raw | {"model": "speech_tokenizer_v1_25hz"}
    with pytest.raises(zoo.KeysError, match="stride is 1 in the tensors and 2"):
        zoo.load_upstream("s3tokenizer", slow, case / "weights.onnx")
    with pytest.raises(zoo.KeysError, match="speech_tokenizer_v1_25hz"):
        zoo.load_upstream("s3tokenizer", None, load_file(case / "weights.safetensors"))
    tokenizer = zoo.load_upstream("s3tokenizer", slow, case / "weights.safetensors")
    assert tokenizer.spec.token_rate == 25 and model("v1_50hz_d48").spec.token_rate == 50
    assert tokenizer.fingerprint != model("v1_50hz_d48").fingerprint


def test_the_25_hz_graph_is_told_by_its_names() -> None:
    """In that file the convolutions have names of their own, and here no node says its strides."""
    state = read_onnx(CASES / "v1_50hz_d48" / "weights.onnx")
    own = {"onnx::Conv_1519": "conv1.weight", "onnx::Conv_1520": "conv1.bias"}
    own |= {"onnx::Conv_1521": "conv2.weight", "onnx::Conv_1522": "conv2.bias"}
    slow = {own.get(key, key): tensor for key, tensor in state.items() if "/Conv" not in key}
    slow = {f"encoders.{key}" if key in own.values() else key: tensor for key, tensor in slow.items()}
    raw = json.loads((CASES / "v1_50hz_d48" / "config.json").read_text()) | {"model": "speech_tokenizer_v1_25hz"}
    assert zoo.load_upstream("s3tokenizer", raw, slow).config.stride == 2


def test_epsilons_are_those_of_the_graph() -> None:
    state = read_onnx(CASES / "v2_d128" / "weights.onnx")
    fine = {
        key: torch.tensor(1e-6) if "attn_ln" in key and key.endswith("@epsilon") else tensor for key, tensor in state.items()
    }
    found = zoo.load_upstream("s3tokenizer", CASES / "v2_d128" / "config.json", fine)
    assert (found.config.attention_eps, found.config.mlp_eps) == (1e-6, 1e-5)
    assert found.encoder.blocks[0].attn_ln.eps == 1e-6


def test_biases_may_be_constants_of_the_graph() -> None:
    """They have no names of their own then, and are found by the nodes that add them."""
    state = read_onnx(CASES / "v3_d64" / "weights.onnx")
    nameless = {key: tensor for key, tensor in state.items() if "#" in key or "@" in key or tensor.ndim != 1}
    found = zoo.load_upstream("s3tokenizer", CASES / "v3_d64" / "config.json", nameless)
    assert all(map(torch.equal, found.state_dict().values(), model("v3_d64").state_dict().values()))


def test_another_version_or_a_foreign_tensor_is_refused() -> None:
    raw = json.loads((CASES / "v1_50hz_d48" / "config.json").read_text())
    with pytest.raises(zoo.KeysError, match="memory"):
        zoo.load_upstream("s3tokenizer", raw, CASES / "v2_d128" / "weights.onnx")
    raw = json.loads((CASES / "v2_d128" / "config.json").read_text()) | {"model": "speech_tokenizer_v3_25hz"}
    del raw["config"]["n_audio_layer"]
    with pytest.raises(zoo.KeysError, match="depth is 2 in the tensors and 12"):
        zoo.load_upstream("s3tokenizer", raw, CASES / "v2_d128" / "weights.onnx")
    with pytest.raises(zoo.WeightsError, match="speech_tokenizer_v9"):
        zoo.load_upstream("s3tokenizer", raw | {"model": "speech_tokenizer_v9"}, CASES / "v2_d128" / "weights.onnx")
    state = load_file(CASES / "v2_d128" / "weights.safetensors")
    with pytest.raises(zoo.KeysError, match=r"encoder\.ln_post"):
        zoo.load_upstream("s3tokenizer", None, state | {"encoder.ln_post.weight": torch.zeros(128)})
    del state["encoder.blocks.1.mlp.2.bias"]
    with pytest.raises(zoo.KeysError, match=r"blocks\.1\.mlp\.2\.bias"):
        zoo.load_upstream("s3tokenizer", None, state)


def test_damaged_graphs_are_refused(tmp_path: Path) -> None:
    content = (CASES / "v1_50hz_d48" / "weights.onnx").read_bytes()
    path = tmp_path / "weights.onnx"
    for damaged in (b"", b"\x3a", content[:1000], content[: len(content) // 2], b"\xff" * 100, content[1:], b"not a graph" * 9):
        path.write_bytes(damaged)
        with pytest.raises(zoo.WeightsError, match=r"weights\.onnx"):
            zoo.load_upstream("s3tokenizer", None, path)


# ------------------------------------------------------------------------------------------------------------------ windows


@pytest.mark.parametrize("config", [S3TokenizerConfig(), replace(SMALL_V1, stride=1)], ids=["25 Hz", "50 Hz"])
def test_windows_lose_no_id(config: S3TokenizerConfig) -> None:
    for frames in [*range(1, 30), *range(2995, 3005), *range(5195, 8100, 13), 5400, 5600, 5601, 7801, 360_000]:
        cut = list(windows(frames, config))
        assert cut[0].start == 0 and cut[-1].stop == frames
        kept = [(w.start // config.frames_per_id + w.first, w.start // config.frames_per_id + w.last) for w in cut]
        assert kept[0][0] == 0 and kept[-1][1] == config.ids_of(frames)
        assert all(before[1] == after[0] for before, after in pairwise(kept)), frames
        assert frames <= 3000 or cut[-1].stop - cut[-1].start > 400
        if frames <= 3000 or not 1 <= frames % 2600 <= 400:
            assert list(official_windows(frames, config)) == cut


def test_official_windows_lose_what_the_package_loses() -> None:
    for config, margin in ((S3TokenizerConfig(), 50), (replace(SMALL_V1, stride=1), 100)):
        for frames in range(3001, 11_000, 31):
            kept = sum(max(0, window.last - window.first) for window in official_windows(frames, config))
            tail = config.ids_of(frames % 2600)
            lost = 0 if not 1 <= frames % 2600 <= 400 else margin if tail <= margin else 2 * margin - tail
            assert config.ids_of(frames) - kept == lost


@pytest.mark.parametrize("config", [SMALL_V1, SMALL_V2], ids=["v1", "v2"])
def test_batches_of_any_size_give_the_ids_of_single_items(config: S3TokenizerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = small_s3tokenizer(config)
    lengths = (201, 320, 16_000, 481, 1000, 16_000, 500_000)
    items = [speech_like(length, seed) for seed, length in enumerate(lengths)]
    alone = [tokenizer.encode(item) for item in items]
    assert [len(ids.ids[0]) for ids in alone] == [tokenizer.config.ids_of(length // 160) for length in lengths]
    for budget in (1, 5_000, 10**6):
        monkeypatch.setitem(S3Tokenizer.at_once, "encode", Budget(budget, budget))
        assert tokenizer.encode(items).tolist() == [ids.tolist()[0] for ids in alone]


def test_long_recordings_are_whole_recordings_where_windows_agree() -> None:
    """The spectrogram has the floor of the whole recording in every window, and in blocks it is that of one pass."""
    tokenizer = small_s3tokenizer()
    wave = speech_like(700_000) * 1e-3
    wave[-20_000:] *= 1e3
    mel = tokenizer.frontend(wave)
    spectrum = torch.stft(wave, 400, 160, window=torch.hann_window(400), return_complex=True)[:, :-1]
    power = torch.matmul(spectrum.abs().square().T, tokenizer.frontend.filters).clamp(min=1e-10).log10()
    expected = (power.clamp(min=power.max() - 8) + 4) / 4
    assert mel.shape == expected.shape and (mel - expected).abs().max() < 1e-5
    assert mel[:3000].min() > (power[:3000].max() - 8 + 4) / 4


def test_long_single_pass_needs_rotary_positions() -> None:
    wave = speech_like(1_600_000)
    single = small_s3tokenizer().encode(wave, long="single")
    assert single.lengths.tolist() == [2500]
    with pytest.raises(zoo.InputError, match="single"):
        small_s3tokenizer(SMALL_V1).encode(wave[:16_000], long="single")
    with pytest.raises(zoo.InputError, match="long must be one of"):
        small_s3tokenizer().encode(wave, long="never")
    with pytest.raises(zoo.InputError, match="compat"):
        small_s3tokenizer().encode(wave, compat="mine")


def test_channels() -> None:
    tokenizer = small_s3tokenizer()
    left, right = speech_like(16_000), speech_like(16_000, 1)
    both = (torch.stack([left, right]), 16_000)
    assert tokenizer.encode(both).tolist() == tokenizer.encode((left + right) / 2).tolist()
    assert tokenizer.encode(both, compat="official").tolist() == tokenizer.encode(left).tolist()


def test_recordings_that_are_too_short_are_named() -> None:
    tokenizer = small_s3tokenizer()
    assert tokenizer.encode(speech_like(201)).lengths.tolist() == [1]
    with pytest.raises(zoo.InputError, match="item 1: 200 samples at 16000 Hz are too few") as caught:
        tokenizer.encode([speech_like(500), speech_like(200)])
    assert caught.value.index == 1


MEMORY = """
import resource, sys, torch
sys.path.insert(0, "tests")
from small_models_s3tokenizer import small_s3tokenizer
tokenizer = small_s3tokenizer()
wave = torch.randn(1, 16_000).mul_(0.1).repeat(1, int(sys.argv[1]))
tokenizer.encode(wave[:, :1_000_000])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tokens = tokenizer.encode(wave)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, int(tokens.lengths[0]))
"""


@pytest.mark.slow
def test_an_hour_in_little_memory() -> None:
    root = Path(__file__).parent.parent
    found = subprocess.run([sys.executable, "-c", MEMORY, "3600"], cwd=root, check=True, capture_output=True, text=True)
    kilobytes, ids = map(int, found.stdout.split())
    assert ids == 90_000
    # The spectrogram takes 46 MB here (32 bands), a copy of the waveform 230 MB.
    assert kilobytes < 500_000


# ------------------------------------------------------------------------------------------------------------ encode only


def test_it_says_that_it_encodes_only() -> None:
    tokenizer = small_s3tokenizer()
    assert tokenizer.spec.parts == tokenizer.parts == ("encoder",)
    tokens = tokenizer.encode(speech_like(16_000))
    with pytest.raises(zoo.WeightsError, match=r"encode only.*flow-matching.*vocoder"):
        tokenizer.decode(tokens)
    with pytest.raises(zoo.InputError, match="id 6561 is outside"):
        tokenizer.decode([[6561]])


def test_embeddings_are_digits_or_rows() -> None:
    tokenizer = small_s3tokenizer()
    ids = [torch.tensor([0, 1, 3, 6560, 5]), torch.tensor([2])]
    vectors = tokenizer.embed(ids)
    assert vectors[0, 0].tolist() == [-1] * 8 and vectors[0, 3].tolist() == [1] * 8 and vectors[1, 4].tolist() == [0] * 8
    assert vectors[0, 1].tolist() == [0] + [-1] * 7 and vectors[0, 2].tolist() == [-1, 0] + [-1] * 6
    first = small_s3tokenizer(SMALL_V1)
    assert torch.equal(first.embed(torch.tensor([[7, 2]]))[0], first.quantizer.weight[[7, 2]])


def test_the_nearest_row_is_not_the_largest_cosine() -> None:
    """Rows stay as long as they are."""
    tokenizer = small_s3tokenizer(SMALL_V1)
    direction = torch.nn.functional.normalize(torch.ones(24), dim=0)
    tokenizer.quantizer.weight.zero_()
    tokenizer.quantizer.weight[1] = 3 * direction
    tokenizer.quantizer.weight[2] = 0.9 * torch.cat([direction[:20], torch.zeros(4)])
    assert tokenizer.quantizer.ids(5 * direction).item() == 2


# --------------------------------------------------------------------------------------------------------------- streaming


def pieces(wave: Tensor, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(1, len(wave), (6,), generator=generator).sort().values
    return list(torch.tensor_split(wave, cuts))


@pytest.mark.parametrize("config", [SMALL_V1, SMALL_V2], ids=["50 Hz", "25 Hz"])
@pytest.mark.parametrize("frames", [1.5, 2999, 3000, 3001, 5201, 8000.2])
def test_a_stream_gives_the_ids_of_the_recording(config: S3TokenizerConfig, frames: float) -> None:
    tokenizer = small_s3tokenizer(config)
    wave = speech_like(int(frames * 160), seed=int(frames))
    wave[: len(wave) // 3] *= 1e-4  # so that the floor matters
    whole = tokenizer.encode(wave)
    with tokenizer.stream_encoder(loudest=tokenizer.loudest(wave)) as stream:
        found = [stream.push(piece) for piece in pieces(wave, seed=1)]
    assert stream.tokens.equal(whole) and stream.exact
    # Whatever lies 2 s before the end of a complete window has come already.
    assert sum(map(len, found)) * config.frames_per_id == {5201: 2800, 8000.2: 5400}.get(frames, 0)


def test_a_stream_resamples_and_averages() -> None:
    tokenizer = small_s3tokenizer()
    wave = torch.stack([speech_like(3 * 22_050), speech_like(3 * 22_050, seed=1)])
    with tokenizer.stream_encoder(22_050, loudest=tokenizer.loudest((wave, 22_050))) as stream:
        for piece in wave.split(5_000, dim=1):
            stream.push(piece)
    assert stream.tokens.equal(tokenizer.encode((wave, 22_050)))


def test_a_stream_says_where_its_floor_was_another() -> None:
    tokenizer = small_s3tokenizer()
    loud = speech_like(36 * 16_000)
    rising = loud * torch.linspace(-4, 0, len(loud)).pow(3).exp()
    for wave, exact in ((loud, True), (loud.flip(0), True), (rising, False)):
        with tokenizer.stream_encoder() as stream:
            for piece in wave.split(8_000):
                stream.push(piece)
        ids = tokenizer.encode(wave).ids
        assert stream.exact == exact and stream.tokens.ids.shape == ids.shape
        assert torch.equal(stream.tokens.ids, ids) or not exact


def test_a_stream_ends_once_and_not_too_soon() -> None:
    tokenizer = small_s3tokenizer()
    stream = tokenizer.stream_encoder()
    assert len(stream.push(torch.zeros(200))) == 0
    with pytest.raises(zoo.InputError, match="200 samples are too few"):
        stream.finish()
    for call in (stream.finish, lambda: stream.push(torch.zeros(1))):
        with pytest.raises(zoo.InputError, match="has been finished"):
            call()
    assert 30 < stream.latency < 30.1

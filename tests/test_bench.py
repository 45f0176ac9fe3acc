"""Benchmarks measure what they say; how fast anything is, is nobody's business here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

import zoo
from small_models import SMALL, SMALL_FLEXTOK, SMALL_TOKENFLOW, small_flextok, small_tokenflow
from small_models_adapters_video import small_emu3_video, small_video_kl, small_vidtok
from small_models_s3tokenizer import SMALL_V2, small_s3tokenizer
from small_models_snac import SMALL_SNAC
from small_models_vectok import SMALL_VECTOK
from zoo import bench, registry
from zoo.bench import against, audio, image, image_originals, originals, print_table, run, sound_originals, video
from zoo.bench.codebook import Size
from zoo.bench.image_networks import FlexTokNetworks, TokenFlowDecoder, TokenFlowEncoder
from zoo.bench.measure import count_flops, peak_memory, random_model
from zoo.bench.quantized import Call, footprints, quantized_model
from zoo.cli import app
from zoo.machine import described
from zoo.nn.conv2d import Conv2d
from zoo.quantization.packed import quantized_layers


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models of two modalities, without weights."""
    entries = [
        {
            "name": f"micro-{family}",
            "family": family,
            "modality": modality,
            "description": "for tests",
            "config": {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()},
            "weights": {"source": "none"},
            "licence": {"code": "Apache-2.0", "weights": "Apache-2.0"},
            "card": "wavtokenizer.md",
        }
        for family, modality, config in (
            ("flextok", "image", SMALL_FLEXTOK),
            ("tokenflow", "image", SMALL_TOKENFLOW),
            ("wavtokenizer", "audio", SMALL),
            ("s3tokenizer", "audio", SMALL_V2),
        )
    ]
    path = tmp_path / "catalogue.yaml"
    path.write_text(yaml.safe_dump(entries))
    monkeypatch.setenv("ZOO_REGISTRY", str(path))


def test_images(catalogue: None, capsys: pytest.CaptureFixture[str]) -> None:
    content = run("micro-flextok", lengths=(2, 8, 99), steps=2, repetitions=1)
    assert [(m["contender"].removeprefix("micro-flextok"), m["direction"], m["case"]) for m in content["measurements"]] == [
        ("", "encode", "1"),
        ("", "decode", "1 x 2 tokens"),
        ("", "decode", "1 x 8 tokens"),
        (", dense", "decode", "1 x 2 tokens"),
        (", dense", "decode", "1 x 8 tokens"),
        (", bf16", "encode", "1"),
        (", bf16", "decode", "1 x 2 tokens"),
        (", bf16", "decode", "1 x 8 tokens"),
    ]
    ours = [m["flops"] for m in content["measurements"] if m["contender"] == "micro-flextok"]
    # More tokens are more work, even in a model this small.
    assert 0 < ours[1] < ours[2]
    print_table(content)
    assert "image/s" in capsys.readouterr().out


def test_the_usual_layout_computes_the_same(catalogue: None) -> None:
    content = run("micro-tokenflow", repetitions=1)
    assert [(m["contender"].removeprefix("micro-tokenflow"), m["direction"]) for m in content["measurements"]] == [
        (layout, direction) for layout in ("", ", NCHW", ", bf16") for direction in ("encode", "decode")
    ]
    tokenizer = random_model(registry.get("micro-tokenflow"), "cpu")
    pictures = image.pictures(1, 32, 32)
    tokens = tokenizer.encode(pictures)
    layouts: list[bool] = []
    hook = tokenizer.decoder.norm_out.register_forward_pre_hook(lambda _, inputs: layouts.append(inputs[0].is_contiguous()))
    plain = image.in_plain_layout(tokenizer, lambda: tokenizer.decode(tokens))()
    ours = tokenizer.decode(tokens)
    hook.remove()
    assert layouts == [True, False]
    assert (plain[0] - ours[0]).abs().max() < 1e-5


def test_ragged_clips_beside_the_padded_batch_and_the_loop() -> None:
    entry = zoo.registry.get("encodec-24khz")
    jobs = audio.jobs(entry, "cpu", True, batches=(2,), seconds=(), ragged=(0.05, 0.1))
    found = {(job.contender, job.direction): job for job in jobs if job.work is not None}
    kinds = ("encodec-24khz", "EncodecModel, padded batch", "EncodecModel, clip by clip")
    assert found.keys() >= {(kind, direction) for kind in kinds for direction in ("encode", "decode")}
    with torch.inference_mode():
        tokens, padded, each = (found[kind, "encode"].work() for kind in kinds)
    assert {job.case for job in found.values()} == {"2 x 0.05 to 0.1 s"}
    assert found[kinds[0], "encode"].amount == pytest.approx(0.15)
    assert tokens.frames().shape == (2, 8, 8) and padded.audio_codes.shape == (1, 2, 8, 8)
    assert [own.audio_codes.shape[-1] for own in each] == [4, 8]


@pytest.mark.parametrize("kind", ["vidtok", "video_kl", "emu3_video"])
def test_clips_beside_the_class(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    makers = {"vidtok": small_vidtok, "video_kl": small_video_kl, "emu3_video": small_emu3_video}
    tokenizer: Any = makers[kind]()
    monkeypatch.setattr(video, "random_model", lambda *_: tokenizer)
    monkeypatch.setattr(video, "SIDE", 16)
    entry = next(entry for entry in registry.entries().values() if entry.family == kind)
    shapes = []
    with torch.inference_mode():
        for job in video.jobs(entry, "cpu", True, batches=(2,), lengths=(6,)):
            assert (job.case, job.amount) == ("2 x 6 frames", 12)
            found = job.work() if job.work else None
            assert found is not None
            shapes.append((job.contender.removeprefix(entry.name), job.direction, found))
    names = [("", "encode"), ("", "decode"), (", bf16", "decode"), (", the class", "encode"), (", the class", "decode")]
    assert [(name, direction) for name, direction, _ in shapes] == names
    # As many latents, and frames for all that went in: those of the class are not cut to the clip.
    grid = tuple(tokenizer.grid(shapes[0][2])[0])
    assert all(tuple(own.shape)[-3:] == grid for own in shapes[3][2])
    assert [len(found) for _, direction, found in shapes if direction == "decode"] == [2, 2, 2]


def test_audio(catalogue: None) -> None:
    content = run("micro-wavtokenizer", seconds=(0.5,), batches=(1, 2), repetitions=1, peers=False)
    assert [(m["contender"], m["direction"], m["amount"]) for m in content["measurements"]] == [
        ("micro-wavtokenizer", "encode", 0.5),
        ("micro-wavtokenizer", "decode", 0.5),
        ("micro-wavtokenizer", "encode", 1.0),
        ("micro-wavtokenizer", "decode", 1.0),
        ("micro-wavtokenizer, bf16", "decode", 0.5),
        ("micro-wavtokenizer, bf16", "decode", 1.0),
    ]


def test_audio_that_is_only_encoded(catalogue: None) -> None:
    content = run("micro-s3tokenizer", seconds=(0.5,), batches=(1, 2), repetitions=1, peers=False)
    assert [(m["contender"], m["direction"], m["amount"]) for m in content["measurements"]] == [
        ("micro-s3tokenizer", "encode", 0.5),
        ("micro-s3tokenizer", "encode", 1.0),
    ]


@pytest.mark.skipif(find_spec("s3tokenizer") is None, reason="the package s3tokenizer is not installed")
def test_the_package_finds_the_same_ids() -> None:
    tokenizer = small_s3tokenizer(replace(SMALL_V2, bands=128))
    sound = torch.sin(torch.arange(16_000).square() / 1e6)
    codes, lengths = audio.original_s3tokenizer(tokenizer)([sound])
    assert codes[0, : lengths[0]].tolist() == tokenizer.encode(sound).tolist()[0]


@pytest.mark.skipif(find_spec("snac") is None or find_spec("s3tokenizer") is None, reason="the packages are not installed")
def test_originals_in_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configs = {"snac": SMALL_SNAC, "s3tokenizer": replace(SMALL_V2, bands=128)}
    monkeypatch.setattr(registry, "check_config", lambda entry: configs[entry.family])
    small = {
        "snac": lambda: originals.snac(seconds=0.5),
        "s3tokenizer": lambda: originals.s3tokenizer(seconds=0.5, longest=0.5),
        "lookup": lambda: originals.lookup({"emu3.5": (500, False), "ibq-262144": (3000, True)}, dim=8, side=3),
    }
    monkeypatch.setattr(originals, "PARTS", small)
    content = originals.run(repetitions=1, json_path=tmp_path / "originals.json")
    assert json.loads((tmp_path / "originals.json").read_text()) == content
    assert [(row["case"], row["equal"]) for row in content["rows"]] == [
        ("encode 0.5 s", 1.0),
        ("decode 0.5 s", None),
        ("encode 8 of 0.05 to 0.5 s", None),
        ("encode 0.5 s", 1.0),
        ("encode 8 of 0.05 to 0.5 s", None),
        ("9 cells, 500 codes", 1.0),
        ("9 cells, 3000 codes", 1.0),
    ]
    assert all(row["ours"] > 0 and row["original"] > 0 for row in content["rows"])
    originals.print_table(content)
    assert "100.00%" in capsys.readouterr().out
    with pytest.raises(zoo.InputError, match="no part 'dac'; there are snac, s3tokenizer, lookup"):
        originals.run(["dac"])


def test_images_beside_the_networks_of_their_authors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configs = {"flextok": SMALL_FLEXTOK, "tokenflow": SMALL_TOKENFLOW}
    monkeypatch.setattr(registry, "check_config", lambda entry: configs[entry.family])
    small = {
        "flextok": lambda: image_originals.flextok(lengths=(2, 8), steps=2),
        "tokenflow": image_originals.tokenflow,
    }
    monkeypatch.setattr(originals, "PARTS", small)
    content = originals.run(repetitions=1, json_path=tmp_path / "originals.json")
    assert json.loads((tmp_path / "originals.json").read_text()) == content
    found = {f"{row['name']}, {row['case']}": row for row in content["rows"]}
    assert len(found) == 13 and all(row["ours"] > 0 and row["original"] > 0 for row in found.values())
    for case, row in found.items():
        if row["apart"] is None:
            assert row["equal"] == 1 if "fp32" in case else row["equal"] > 0.5, case
        else:
            assert row["apart"] < (2e-5 if "fp32" in case else 0.1), case
    originals.print_table(content)


def test_networks_written_as_their_authors_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    configs = {"wavtokenizer": SMALL, "vectok": SMALL_VECTOK}
    monkeypatch.setattr(registry, "check_config", lambda entry: configs[entry.family])
    small = {
        "wavtokenizer": lambda: sound_originals.wavtokenizer(durations=(0.3, 0.5)),
        "vocoder": lambda: sound_originals.vocoder(seconds=0.4),
        "packed": lambda: sound_originals.packed(methods=("int8",), durations=(0.3,)),
    }
    monkeypatch.setattr(originals, "PARTS", small)
    content = originals.run(repetitions=1)
    found = [(row["name"], row["case"], row["equal"]) for row in content["rows"]]
    assert found == [
        ("wavtokenizer-small-75", "encode 0.3 s", 1.0),
        ("wavtokenizer-small-75", "decode 0.3 s", None),
        ("wavtokenizer-small-75, bf16", "decode 0.3 s", None),
        ("wavtokenizer-small-75", "encode 0.5 s", 1.0),
        ("wavtokenizer-small-75", "decode 0.5 s", None),
        ("wavtokenizer-small-75, bf16", "decode 0.5 s", None),
        ("vectok-knnvc", "vocoder 0.4 s", None),
        ("vectok-knnvc, bf16", "vocoder 0.4 s", None),
        ("wavtokenizer-small-75, int8, fp32", "decode 0.3 s", None),
        ("wavtokenizer-small-75, int8, bf16", "decode 0.3 s", None),
    ]
    sounds = [(row["name"], row["apart"]) for row in content["rows"] if row["apart"] is not None]
    assert len(sounds) == 6
    assert all(0 <= difference < (0.05 if name.endswith("bf16") else 2e-5) for name, difference in sounds), sounds
    assert all(row["floor_share"] > 0 for row in content["rows"][:8])
    originals.print_table(content)
    assert "e-0" in capsys.readouterr().out


@pytest.mark.skipif(find_spec("faiss") is None, reason="faiss is not installed")
def test_searches_beside_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (Size(8, 300, 70), Size(32, 500, 33), Size(100, 64, 5))
    monkeypatch.setattr(originals, "PARTS", {"search": lambda: sound_originals.search(sizes)})
    assert [row["equal"] for row in originals.run(repetitions=1)["rows"]] == [1.0] * 3


def test_networks_of_their_authors_have_no_layers_of_ours() -> None:
    tokenizer = small_tokenflow()
    for network in (TokenFlowEncoder(tokenizer), TokenFlowDecoder(tokenizer), FlexTokNetworks(small_flextok())):
        layers = [part for part in network.modules() if isinstance(part, nn.Conv2d | nn.Linear | nn.GroupNorm)]
        assert layers and all(type(part).__module__.startswith("torch.") for part in layers)
    assert type(tokenizer.decoder.conv_in) is Conv2d


def test_dense_lookups_multiply_what_they_found() -> None:
    generator = torch.Generator().manual_seed(0)
    codes, latents = torch.randn(40, 6, generator=generator), torch.randn(2, 6, 3, 5, generator=generator)
    expected = torch.stack([(latents[:, :, y, x] @ codes.T).argmax(1) for y in range(3) for x in range(5)], dim=1).flatten()
    for straight in (False, True):
        assert torch.equal(originals.dense_lookup(latents, codes, straight), expected)


def test_quantized_models(catalogue: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Sizes are the same in a thread, and it starts at once.
    monkeypatch.setattr("zoo.bench.quantized.ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count))
    content = run("micro-wavtokenizer", seconds=(0.5,), batches=(1,), repetitions=1, peers=False, quantize=("fp4-e2m1",))
    names = [(m["contender"], m["direction"]) for m in content["measurements"]]
    assert names[-2:] == [(f"micro-wavtokenizer, fp4-e2m1{precision}", "decode") for precision in ("", ", bf16")]
    plain, four = content["models"]
    assert (plain["contender"], four["contender"]) == (names[0][0], names[-2][0])
    layers = quantized_layers(quantized_model(registry.get("micro-wavtokenizer"), "cpu", "fp4-e2m1")).values()
    saved = sum(4 * layer.weight.numel() - sum(b.numel() * b.element_size() for b in layer.buffers()) for layer in layers)
    assert plain["weight_bytes"] - four["weight_bytes"] == saved > 0
    assert all(found["weight_bytes"] < found["file_bytes"] < found["weight_bytes"] + 100_000 for found in content["models"])
    print_table(content)
    assert "peak memory, MB" in capsys.readouterr().out
    with pytest.raises(zoo.InputError, match="no quantization method 'fp3'"):
        run("micro-wavtokenizer", quantize=("fp3",))


def test_the_command_names_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(bench, "run", lambda name, **options: asked.update(options) or {"name": name})
    done = CliRunner().invoke(app, ["bench", "x", "--quantize", "int8", "--quantize", "fp4", "--json"])
    assert done.exit_code == 0, done.output
    assert asked["quantize"] == ["int8", "fp4"] and asked["steps"] is None
    assert CliRunner().invoke(app, ["bench", "x", "--json"]).exit_code == 0
    assert asked["quantize"] is None


def test_packed_models_of_images_decode_the_same_ids(catalogue: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("zoo.bench.run"), "footprints", lambda *arguments: [])
    content = run("micro-flextok", lengths=(2, 8), steps=2, repetitions=1, peers=False, quantize=("fp6-e3m2",))
    cases = [(m["contender"], m["case"], m["flops"]) for m in content["measurements"]][-4:]
    names = [f"micro-flextok, fp6-e3m2{precision}" for precision in ("", ", bf16")]
    assert cases == [(name, f"1 x {k} tokens", None) for name in names for k in (2, 8)]
    call = image.smallest_call(registry.get("micro-flextok"), (3,), (2, 8), 5, ())
    assert (call.method, call.options) == ("decode", {"steps": 5})
    assert [len(ids) for ids in call.ids] == [2, 2, 2]


@pytest.mark.slow
def test_peak_memory_follows_the_packed_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that show beside what a call takes."""
    entry = registry.get("wavtokenizer-tiny")
    wide = {"dim": 512, "intermediate_dim": 6144, "num_layers": 8}
    monkeypatch.setenv("ZOO_REGISTRY", str(tmp_path / "catalogue.yaml"))
    entry = entry.model_dump(mode="json", exclude_none=True) | {"name": "wide", "weights": {"source": "none"}}
    (tmp_path / "catalogue.yaml").write_text(yaml.safe_dump([entry | {"config": entry["config"] | wide}]))
    plain, four = footprints(registry.get("wide"), "cpu", ["fp4-e2m1"], Call("decode", [[1, 2, 3]], {}))
    saved = plain.weight_bytes - four.weight_bytes
    assert saved > 150e6
    assert plain.peak_bytes > plain.weight_bytes
    assert abs(plain.peak_bytes - four.peak_bytes - saved) < 0.2 * saved


def test_the_dense_peer_computes_the_same_images(catalogue: None) -> None:
    """It is slower, not another model: at one step from a noise of zeros both give one image."""
    tokenizer = random_model(registry.get("micro-flextok"), "cpu")
    tokens = tokenizer.encode(image.pictures(2, 32, 48))
    for k in (1, 5, 8):
        dense = image.dense_decoding(tokenizer, tokens, k, steps=2)()
        ours = tokenizer.decode(tokens.truncate(k), noise=torch.zeros(2, 4, 4, 6), steps=2, guidance=7.5, guidance_method="cfg")
        assert (dense - torch.stack(ours)).abs().max() < 1e-4


def test_what_cannot_be_varied_is_named(catalogue: None) -> None:
    with pytest.raises(zoo.InputError, match="does not vary seconds"):
        run("micro-flextok", seconds=(1,))


def test_operations_are_counted() -> None:
    linear, lstm = torch.nn.Linear(10, 20), torch.nn.LSTM(8, 16, batch_first=True)
    assert count_flops(linear, lambda: linear(torch.zeros(3, 10))) == 2 * 3 * 10 * 20
    assert count_flops(lstm, lambda: lstm(torch.zeros(2, 5, 8))) == 2 * 10 * 4 * 16 * (8 + 16)


def test_peak_memory_sees_what_was_freed() -> None:
    with peak_memory("cpu") as peak:
        torch.ones(50_000_000)
    assert peak[0] > 100_000_000


def test_figures_say_what_they_were_measured_on() -> None:
    machine = described()
    assert machine["device"] and machine["threads"] == torch.get_num_threads() and machine["torch"] == torch.__version__
    assert isinstance(machine["amx"], bool) and machine["vectors"] == torch.backends.cpu.get_cpu_capability()


def test_against_another_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both sides are this environment here; every work is measured on both."""
    path = tmp_path / "figures.json"
    content = against.run("byteformer-*", sys.executable, batches=(2,), pairs=3, seconds=1e-3, json_path=path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(content))
    found = content["comparisons"]
    assert [(c["name"], c["work"], c["batch"]) for c in found] == [
        ("byteformer-tiny", "encode", 2),
        ("byteformer-tiny", "decode", 2),
        ("start", "import zoo", 0),
        ("start", "zoo list", 0),
    ]
    for c in found:
        assert c["cpu"] > 0 < c["other_cpu"] and c["spread"][0] <= c["ratio"] <= c["spread"][1]
    against.print_table(content)
    assert "zoo list" in capsys.readouterr().out


def test_pairs_take_turns() -> None:
    """Each side goes first as often as last, and the ratio is that of the pairs."""
    calls: list[str] = []

    def side(name: str, seconds: list[float]) -> Callable[[], float]:
        def measure() -> float:
            calls.append(name)
            return seconds[calls.count(name) - 1]

        return measure

    found = against.compare([side("a", [1.0, 4.0, 3.0]), side("b", [2.0, 4.0, 2.0])], 3)
    assert "".join(calls) == "baabba"
    assert (found["cpu"], found["other_cpu"], found["ratio"]) == (3.0, 2.0, 1.0)
    assert found["spread"] == (0.75, 1.25)


@pytest.mark.parametrize("place", ["nowhere", "empty", "broken"])
def test_an_environment_that_cannot_be_used(place: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'No module named zoo' >&2\nexit 1\n")
    broken.chmod(0o755)
    result = CliRunner().invoke(app, ["bench", "byteformer-tiny", "--against", str(tmp_path / place)])
    reason = {"broken": "No module named zoo"}.get(place, "no Python interpreter")
    assert isinstance(result.exception, zoo.errors.ArgumentError) and reason in str(result.exception)

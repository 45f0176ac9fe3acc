"""Graphs of tokenizers: plain modules that give what the tokenizer gives, and files that onnxruntime agrees with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zoo
from small_models_adapters import small_dac, small_encodec, small_mimi
from zoo import cli, onnx_export
from zoo.checkpoint import Checkpoint
from zoo.codecs.dac import DAC, DACConfig
from zoo.kernels.codebook import CodebookSearch
from zoo.spec import Spec
from zoo.tokenizer import Budget
from zoo.tokenizer.audio import AudioTokenizer
from zoo.tokenizer.graphs import Graph, Graphs

ABSENT = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
translated = pytest.mark.skipif(bool(ABSENT), reason=f"the extra onnx is not installed: no {', '.join(ABSENT)}")

MODELS: dict[str, Callable[[], Any]] = {
    "dac": small_dac,
    "mimi": small_mimi,
    "flextok": lambda: zoo.load("flextok-tiny"),
    "wavtokenizer": lambda: zoo.load("wavtokenizer-tiny"),
}


@dataclass(frozen=True)
class StepsConfig:
    wrong: int = 0


class ToSteps(nn.Module):
    """Samples in steps of 1/8; ids from ``wrong`` on are one too small."""

    def __init__(self, wrong: int) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, waveform: Tensor) -> Tensor:
        ids = (waveform[:, 0].clamp(-1, 1) * 8).round().long() + 8
        return ids - (ids >= self.wrong).long() if self.wrong else ids


class FromSteps(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        return ((ids - 8).float() / 8)[:, None]


class Steps(AudioTokenizer[StepsConfig]):
    """A tokenizer whose graphs take no time to translate."""

    Config, family, identity = StepsConfig, "steps", ("height",)
    checkpoint = Checkpoint(recognises=lambda keys: False, convert=lambda state, config: (StepsConfig(), dict(state)))
    at_once = dict.fromkeys(("encode", "decode"), Budget(1 << 20, 1 << 20))

    def __init__(self, config: StepsConfig | None = None, *, name: str = "steps") -> None:
        super().__init__(config or StepsConfig(), name)
        self.height = nn.Parameter(torch.tensor([8.0]), requires_grad=False)

    @property
    def spec(self) -> Spec:
        return Spec(self.name, "steps", "audio", 17, 1, fingerprint="0123456789abcdef", sample_rate=8000, hop_length=1)

    def encode_waveforms(self, waveforms: Tensor) -> Tensor:
        return ToSteps(0)(waveforms)

    def decode_values(self, values: Tensor) -> Tensor:
        return FromSteps()(values)

    def embed(self, tokens: Any) -> Tensor:
        return self.check(tokens).ids[..., None].float()

    def graphs(self) -> Graphs:
        return self.graphs_of(ToSteps(self.config.wrong), FromSteps())


# ------------------------------------------------------------------------------------------------------- plain modules


@pytest.mark.parametrize("family", ["dac", "mimi", "flextok", "wavtokenizer"])
def test_plain_modules_give_what_the_tokenizer_gives(family: str) -> None:
    """Before any translation; WavTokenizer's encoder is an LSTM of ONNX, which only a runtime computes."""
    for half, graph in MODELS[family]().graphs().items():
        if isinstance(graph, str):
            assert (family, half) == ("flextok", "decoder") and "loop" in graph
            continue
        if (family, half) == ("wavtokenizer", "encoder"):
            continue
        for trial in graph.trials[:2]:
            wanted = graph.answer(trial)
            found = graph.module(trial)
            assert found.shape == wanted.shape
            if wanted.is_floating_point():
                assert (found - wanted).abs().max() < 1e-4 * max(1, wanted.abs().max())
            else:
                assert torch.equal(found, wanted)
                assert len(wanted.unique()) > 5


@pytest.mark.parametrize(("widths", "metric"), [((), "distance"), ((6,), "distance"), ((), "dot")])
def test_the_plain_search_is_the_exact_one(widths: tuple[int, ...], metric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(50, 6, generator=generator)
    codebook[30] = codebook[7]
    queries = torch.cat([torch.randn(4, 60, 6, generator=generator), codebook[None].repeat(4, 1, 1)], dim=1)
    search = CodebookSearch(unit_widths=widths, metric=metric)
    exact = search(queries, codebook)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert torch.equal(search(queries, codebook), exact)
    assert 30 not in exact


# ---------------------------------------------------------------------------------------------------------- the export


@translated
def test_an_export_says_what_it_wrote_and_how_it_was_checked(tmp_path: Path) -> None:
    import onnxruntime

    description = zoo.export(Steps(), tmp_path / "deep" / "exported")
    folder = tmp_path / "deep" / "exported"
    assert sorted(path.name for path in folder.iterdir()) == ["decoder.onnx", "encoder.onnx", "export.json"]
    assert json.loads((folder / "export.json").read_text()) == description
    assert description["fingerprint"] == "0123456789abcdef" and description["hop_length"] == 1
    encoder, decoder = description["graphs"]["encoder"], description["graphs"]["decoder"]
    assert encoder["takes"] == {"name": "waveform", "axes": ["batch", 1, "samples"], "dtype": "float32"}
    assert encoder["gives"] == {"name": "ids", "axes": ["batch", "ids"], "dtype": "int64"}
    assert encoder["checked"]["differing_ids"] == 0 and encoder["checked"]["ids"] > 300
    assert decoder["checked"]["largest_difference"] == 0
    assert onnx_export.summary(description)[0] == f"encoder.onnx: 0 of {encoder['checked']['ids']} ids differ"
    session = onnxruntime.InferenceSession(str(folder / "encoder.onnx"))
    for shape in ((1, 1, 1), (5, 1, 77)):
        wave = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
        [ids] = session.run(None, {"waveform": wave})
        assert np.array_equal(ids, Steps().encode(list(torch.from_numpy(wave))).ids)


@translated
def test_other_ids_are_refused_or_counted(tmp_path: Path) -> None:
    wrong = Steps(StepsConfig(wrong=10))
    with pytest.raises(zoo.OutputError, match=r"\d+ of \d+ ids of the encoder of steps differ"):
        zoo.export(wrong, tmp_path)
    assert not list(tmp_path.iterdir())
    description = zoo.export(wrong, tmp_path, tolerate=True)
    assert 0 < description["graphs"]["encoder"]["checked"]["differing_ids"] < description["graphs"]["encoder"]["checked"]["ids"]


@translated
def test_without_the_runtime_nothing_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    description = zoo.export(Steps(StepsConfig(wrong=10)), tmp_path)
    assert description["graphs"]["encoder"]["checked"] is None
    assert "not checked" in onnx_export.summary(description)[0]


def test_what_is_needed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None)
    with pytest.raises(zoo.MissingExtraError, match=r"onnx and onnxscript: pip install .tokenizer-zoo\[onnx\]"):
        zoo.export(Steps(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: zoo.load("hat-words"), "which no network makes"),
        (lambda: zoo.load("byteformer-tiny"), "which no network makes"),
        (small_encodec, "reflect the ends"),
        (lambda: zoo.load("snac-tiny"), "nobody has written"),
    ],
)
def test_families_without_graphs_say_why(make: Callable[[], Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(zoo.ArgumentError, match=reason):
        zoo.export(make(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_half_that_is_not_loaded_is_said_to_be_absent() -> None:
    graphs = DAC(DACConfig(small_dac().config.library, parts=("encoder",))).graphs()
    assert isinstance(graphs["encoder"], Graph)
    assert "is not loaded" in str(graphs["decoder"])


@pytest.mark.slow  # tracing and translating takes half a minute for each half
@translated
@pytest.mark.parametrize("family", list(MODELS))
def test_onnxruntime_gives_the_tokenizers_ids_and_media(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    # Sizes are symbols while a graph is traced, and no integers.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    tokenizer = MODELS[family]()
    description = zoo.export(tokenizer, tmp_path)
    assert description["graphs"]["encoder"]["checked"]["differing_ids"] == 0
    encoder = onnxruntime.InferenceSession(str(tmp_path / "encoder.onnx"))
    generator = torch.Generator().manual_seed(1)
    if family == "flextok":
        assert not (tmp_path / "decoder.onnx").exists() and "loop" in description["graphs"]["decoder"]["reason"]
        pictures = torch.rand(4, 3, *tokenizer.spec.image_size, generator=generator) * 2 - 1
        [ids] = encoder.run(None, {"pixels": pictures.numpy()})
        assert np.array_equal(ids, tokenizer.encode(pictures).ids)
        return
    decoder = onnxruntime.InferenceSession(str(tmp_path / "decoder.onnx"))
    hop = tokenizer.spec.hop_length
    for batch, samples in ((1, 2), (1, hop), (2, hop + 1), (1, 12 * hop - 1), (4, 61 * hop + 5)):
        waves = torch.randn(batch, 1, samples, generator=generator) * 0.3
        tokens = tokenizer.encode(list(waves))
        [ids] = encoder.run(None, {"waveform": waves.numpy()})
        assert np.array_equal(ids, tokens.ids)
        [audio] = decoder.run(None, {"ids": ids})
        wanted = torch.stack(tokenizer.decode(tokens, trim=False)).numpy()
        assert audio.shape == wanted.shape
        assert np.abs(audio - wanted).max() < 1e-4 * max(1, np.abs(wanted).max())


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [("no-such-model", 3, "no-such-model"), ("hat-words", 1, "hat-words cannot be exported")],
)
def test_the_command_names_what_cannot_be_exported(
    name: str, code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["zoo", "export", name, "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setattr("sys.argv", ["zoo", "export", "wavtokenizer-tiny", "-o", str(tmp_path / "taken")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "taken" in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "a file"


@translated
def test_the_command_reports_each_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("zoo.hub.load", lambda name, **options: Steps())
    monkeypatch.setattr("sys.argv", ["zoo", "export", "steps", "-o", str(tmp_path / "out"), "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out" / "export.json").read_text())

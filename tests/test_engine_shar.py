"""Lhotse Shar as a source: cuts joined with their recordings, and what is known of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zoo
from test_engine import rows
from zoo import media
from zoo.errors import ArgumentError

lhotse = pytest.importorskip("lhotse", reason="Lhotse Shar needs lhotse")
pytest.importorskip("pyarrow")

from zoo import engine  # noqa: E402  (it needs pyarrow)
from zoo.engine import report  # noqa: E402  (likewise)
from zoo.engine.store import Store  # noqa: E402  (likewise)


def run(sources: Any, out: Path, **options: Any) -> engine.Summary:
    return engine.tokenize(zoo.load("wavtokenizer-tiny"), sources, out, **({"workers": 0, "unit_items": 3} | options))


def cut_of(recording: Any, name: str, start: float, seconds: float, channel: int | list[int] = 0, **custom: Any) -> Any:
    kind = lhotse.MonoCut if isinstance(channel, int) else lhotse.MultiCut
    speech = lhotse.SupervisionSegment(f"{name} said", recording.id, 0.0, seconds, text=f"words of {name}", speaker="ann")
    return kind(name, start, seconds, channel, [speech], recording=recording, custom=custom)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole recording, several parts of one, and one channel of a stereo recording; three cuts a shard."""
    import torch

    folder = tmp_path_factory.mktemp("shards")
    noise = np.random.default_rng(0)
    found = {}
    kinds = (("long", 16_000, 1, 24_000), ("other", 24_000, 1, 5_000), ("stereo", 8_000, 2, 6_000))
    for name, rate, channels, samples in kinds:
        sound = torch.from_numpy(noise.uniform(-0.4, 0.4, (channels, samples)).astype(np.float32))
        found[name] = lhotse.Recording.from_file(media.write_audio(folder / f"{name}.wav", sound, rate))
    cuts = [
        cut_of(found["other"], "whole", 0.0, found["other"].duration, snr=3.5, tags=["a", "b"]),
        cut_of(found["long"], "first", 0.0, 0.5, snr=1),
        cut_of(found["long"], "second", 0.5, 0.75),
        cut_of(found["long"], "across", 0.25, 0.5, snr=None),
        cut_of(found["stereo"], "right", 0.25, 0.25, 1),
        cut_of(found["stereo"], "both", 0.0, found["stereo"].duration, [0, 1]),
    ]
    (folder / "shar").mkdir()
    lhotse.CutSet.from_cuts(cuts).to_shar(folder / "shar", fields={"recording": "flac"}, shard_size=3)
    return folder / "shar"


def require_as_loaded(folder: Path, found: list[dict[str, Any]]) -> None:
    """Every row has the ids of the samples that lhotse loads for its cut."""
    tok = zoo.load("wavtokenizer-tiny")
    cuts = list(lhotse.CutSet.from_shar(in_dir=folder))
    assert [row["key"].partition("#")[2] for row in found] == [cut.id for cut in cuts]
    for row, cut in zip(found, cuts, strict=True):
        samples = cut.load_audio()
        tokens = tok.encode((samples, cut.sampling_rate))
        assert (row["ids"], row["error"]) == (tokens.tolist()[0], None), cut.id
        assert (row["samples"], row["sample_rate"]) == (samples.shape[1], cut.sampling_rate)


def test_cuts_are_rows(shards: Path, tmp_path: Path) -> None:
    """Of a folder, of its shards, and of a folder above it; with what is known of them, and their own fields."""
    for number, source in enumerate((shards, shards.parent / "shar" / "cuts.*.jsonl.gz")):
        summary = run(source, tmp_path / f"{number}")
        assert (summary.items, summary.failures) == (6, 0)
        found = rows(tmp_path / f"{number}")
        require_as_loaded(shards, found)
    assert [row["key"] for row in found[2:4]] == ["cuts.000000.jsonl.gz#second", "cuts.000001.jsonl.gz#across"]
    assert [row["id"] for row in found] == ["whole", "first", "second", "across", "right", "both"]
    assert {row["speaker"] for row in found} == {"ann"} and found[1]["text"] == "words of first"
    assert [row["snr"] for row in found] == [3.5, 1.0, None, None, None, None]
    assert found[0]["tags"] == '["a", "b"]' and found[2]["duration"] == 0.75
    run(shards, tmp_path / "kept", keep=["snr", "text"])
    [row, *_] = rows(tmp_path / "kept")
    assert (row["snr"], row["text"]) == (3.5, "words of whole") and not {"id", "speaker", "tags"} & row.keys()
    store = Store(tmp_path / "kept")
    plan = report.plan_in(store)
    assert list(report.problems(store, plan)) == []
    assert [reason for _, reason in report.recomputed(store, plan, 3, zoo.load("wavtokenizer-tiny"))] == [None] * 3


def rewritten(shards: Path, folder: Path, change: Any) -> Path:
    """The same shards with other cuts."""
    folder.mkdir()
    for path in shards.iterdir():
        content = path.read_bytes()
        if path.name.startswith("cuts."):
            lines = [change(json.loads(line)) for line in gzip.decompress(content).splitlines()]
            text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines if line)
            content = gzip.compress(text.encode())
        (folder / path.name).write_bytes(content)
    return folder


def test_cuts_that_are_parts_of_what_is_stored(shards: Path, tmp_path: Path) -> None:
    """Such as those of cuts that were trimmed behind the writer's back."""

    def trimmed(cut: dict[str, Any]) -> dict[str, Any]:
        return cut | ({"start": 0.0625, "duration": 0.125} if cut["id"] != "whole" else {})

    folder = rewritten(shards, tmp_path / "trimmed", trimmed)
    assert run(folder, tmp_path / "out", max_seconds=0.2).failures == 1
    assert run(folder, tmp_path / "all").failures == 0
    require_as_loaded(folder, rows(tmp_path / "all"))
    assert rows(tmp_path / "all")[1]["samples"] == 2000
    assert [row["error"] is None for row in rows(tmp_path / "out")] == [False] + [True] * 5

    def right(cut: dict[str, Any]) -> dict[str, Any]:
        return cut | ({"channel": [1]} if cut["id"] == "both" else {})

    folder = rewritten(shards, tmp_path / "right", right)
    run(folder, tmp_path / "channels")
    require_as_loaded(folder, rows(tmp_path / "channels"))
    assert rows(tmp_path / "channels")[5]["ids"] != rows(tmp_path / "all")[5]["ids"]


def test_shards_that_do_not_fit(shards: Path, tmp_path: Path) -> None:
    """Lines that are no cuts, cuts without a recording and recordings without a cut are rows; nothing is mixed up."""

    def broken(cut: dict[str, Any]) -> Any:
        return {"first": "{", "second": cut | {"id": "another"}, "right": cut | {"type": "PaddingCut"}}.get(cut["id"], cut)

    run(rewritten(shards, tmp_path / "broken", broken), tmp_path / "out")
    found = [(row["key"].partition("#")[2], row["error"]) for row in rows(tmp_path / "out")]
    assert [key for key, _ in found] == ["whole", "1", "another", "across", "1", "both"]
    reasons = [error for _, error in found]
    assert [error is None for error in reasons] == [True, False, False, True, False, True]
    assert reasons[1].startswith("the line is no cut: JSONDecodeError")
    assert reasons[2] == "recording.000000.tar has second.flac in its place"
    assert reasons[4] == "the line is no cut: ValueError: Unexpected cut type during deserialization: 'PaddingCut'"
    run(rewritten(shards, tmp_path / "fewer", lambda cut: cut if cut["id"] in ("whole", "first") else None), tmp_path / "less")
    found = {row["key"]: row["error"] for row in rows(tmp_path / "less")}
    assert found["recording.000000.tar#second.flac"] == "there is no cut for it" and len(found) == 6
    tar = tmp_path / "broken" / "recording.000000.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    run(tmp_path / "broken" / "cuts.000000.jsonl.gz", tmp_path / "cut")
    assert all(row["error"] for row in rows(tmp_path / "cut"))
    tar.unlink()
    with pytest.raises(ArgumentError, match=r"there is no recording\.000000\.tar beside it"):
        run(tmp_path / "broken", tmp_path / "none")


def test_there_and_back(shards: Path, tmp_path: Path) -> None:
    """Tokens of cuts, as Shar once more: ids, text and fields of their own are those of the cuts."""
    run(shards, tmp_path / "out")
    data = zoo.TokenDataset(tmp_path / "out")
    data.to_shar(tmp_path / "tokens", shard_items=4)
    for cut, row in zip(lhotse.CutSet.from_shar(in_dir=tmp_path / "tokens"), rows(tmp_path / "out"), strict=True):
        assert cut.load_codes().reshape(-1).tolist() == row["ids"]
        assert cut.supervisions[0].text == f"words of {row['id']}"
        assert (cut.custom.get("snr"), cut.custom["speaker"]) == (row["snr"], "ann")

"""Reading token data sets: rows, keys, selections, streams that resume, and the layouts of other libraries."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import zoo
from zoo.errors import ArgumentError, FormatError, IndexingError, MismatchError
from zoo.spec import Frame

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from zoo.engine import parts, stream  # noqa: E402  (it needs pyarrow)
from zoo.engine.store import Store  # noqa: E402  (likewise)

HEADER = parts.Header("codec", "0123456789abcdef", 1000, "audio", options={"tokens": 9})
#: Rows of each part; the third one has several row groups.
SIZES = (3, 1, 100, 0, 16)


def row(number: int) -> dict[str, Any]:
    """What is known about row ``number``: its ids start with the number, so that nothing can be mixed up."""
    failed = number % 7 == 5
    ids = None if failed else [number % 1000, *range(number % 5)]
    return {
        "key": f"clip-{number}.wav",
        "ids": ids,
        "length": None if ids is None else len(ids),
        "samples": None if failed else 320 * len(ids or ()),
        "sample_rate": None if failed else 16000,
        "scales": None,
        "segments": None,
        "text": f"text {number}",
        "speaker": number % 3,
        "error": "it is broken" if failed else None,
    }


def write(folder: Path, sizes: Sequence[int] = SIZES, header: parts.Header = HEADER) -> Path:
    with mock.patch.object(parts, "ROW_GROUP", 16):
        return _write(folder, sizes, header)


def _write(folder: Path, sizes: Sequence[int], header: parts.Header) -> Path:
    carried = pa.schema([("text", pa.string()), ("speaker", pa.int8())])
    numbers = iter(range(sum(sizes)))
    for unit, size in enumerate(sizes):
        schema = parts.schema_of(replace(header, unit=unit), carried)
        rows = [row(next(numbers)) for _ in range(size)]
        content = parts.part_bytes(schema, {name: [values[name] for values in rows] for name in schema.names})
        Store(folder).write(parts.part_name(unit), content)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("tokens"))


SOUND = [number for number in range(sum(SIZES)) if row(number)["error"] is None]


def keys(items: Iterable[Any]) -> list[str]:
    return [item.key for item in items]


def named(numbers: Iterable[int]) -> list[str]:
    return [f"clip-{number}.wav" for number in numbers]


# ---- items


def test_items_by_position_and_key(folder: Path) -> None:
    data = zoo.TokenDataset(folder)
    assert len(data) == len(SOUND) and (data.tokenizer, data.fingerprint, data.vocab_size) == (
        "codec",
        "0123456789abcdef",
        1000,
    )
    assert repr(data).endswith(f"codec, items={len(SOUND)}, vocab_size=1000)")
    for place in (0, 4, 80, -1, np.int64(2), torch.tensor(3)):
        number = SOUND[int(place)]
        for item in (data[place], data[f"clip-{number}.wav"]):
            expected = row(number)
            assert (item.key, item.error) == (expected["key"], None)
            assert item.columns == {"text": expected["text"], "speaker": expected["speaker"]}
            assert item.tokens.tolist() == [expected["ids"]]
            assert item.tokens.meta == ({"samples": expected["samples"], "sample_rate": 16000},)
            assert (item.tokens.tokenizer, item.tokens.fingerprint, item.tokens.vocab_size) == (
                "codec",
                HEADER.fingerprint,
                1000,
            )
    assert keys(data) == named(SOUND)
    assert "clip-0.wav" in data and "clip-5.wav" not in data and 3 not in data
    for wrong in (len(SOUND), -len(SOUND) - 1, "clip-5.wav", "nothing", 1.5, True, [True]):
        with pytest.raises(IndexingError):
            data[wrong]


def test_failures_are_shown_when_asked_for(folder: Path) -> None:
    data = zoo.TokenDataset(folder, failures=True)
    assert len(data) == sum(SIZES) and keys(data) == named(range(sum(SIZES)))
    item = data["clip-5.wav"]
    assert (item.tokens, item.error) == (None, "it is broken") and data[5].key == item.key
    assert data.lengths[:7].tolist() == [1, 2, 3, 4, 5, -1, 2]
    with pytest.raises(ArgumentError, match=r"clip-5\.wav failed"):
        data[4:6].tokens()
    assert keys(data.select()) == named(SOUND)


def test_selections_are_data_sets(folder: Path) -> None:
    data = zoo.TokenDataset(folder)
    assert keys(data[2:9:3]) == named(SOUND[2:9:3])
    assert keys(data[[80, 0, -1]]) == named([SOUND[80], SOUND[0], SOUND[-1]])
    mask = np.array([number % 3 == 1 for number in SOUND])
    chosen = data[mask]
    assert keys(chosen) == named(number for number in SOUND if number % 3 == 1) == keys(data[torch.from_numpy(mask)])
    assert chosen["clip-1.wav"].key == chosen[0].key and "clip-0.wav" not in chosen
    assert keys(chosen[1:3]) == keys(chosen)[1:3]
    middle = data.select(min_length=2, max_length=3)
    assert keys(middle) == named(number for number in SOUND if number % 5 in (1, 2))
    assert middle.lengths.tolist() == [len(row(number)["ids"]) for number in SOUND if number % 5 in (1, 2)]
    assert data[[7, 3]].tokens().tolist() == [row(SOUND[7])["ids"], row(SOUND[3])["ids"]]
    table = data[[7, 3, 80]].table(["ids", "text"])
    assert table.to_pydict() == {name: [row(SOUND[place])[name] for place in (7, 3, 80)] for name in ("ids", "text")}
    assert data.table(["key"])["key"].to_pylist() == named(SOUND)
    # All rows of one row group, in another order and one of them twice.
    everything = zoo.TokenDataset(folder, failures=True)
    for order in ([4, 6, 5, *range(7, 20)], [4, 4, *range(6, 20)]):
        assert everything[order].table(["key"])["key"].to_pylist() == named(order) == keys(everything[order])
    assert not len(data[[]]) and not list(data[[]]) and data[[]].table().num_rows == 0


def test_columns_that_are_not_asked_for_are_not_read(folder: Path) -> None:
    data = zoo.TokenDataset(folder, columns=["speaker"])
    assert data.columns == ("speaker",) and data[3].columns == {"speaker": 0}
    with pytest.raises(ArgumentError, match=r"'texts'.*text, speaker"):
        zoo.TokenDataset(folder, columns=["texts"])
    with pytest.raises(ArgumentError, match="'words'"):
        data.table(["words"])


def test_frames_and_segments_come_back(tmp_path: Path) -> None:
    frame = Frame((16, 16))
    header = parts.Header("books", "", 32, "bytes", frame)
    columns = {"key": ["a", "b"], "ids": [[1, 17, 2, 18], [3, 19]], "length": [4, 2], "segments": [[2, 4], [2]]}
    content = parts.part_bytes(parts.schema_of(header), columns | {"error": [None, None]})
    Store(tmp_path).write(parts.part_name(0), content)
    data = zoo.TokenDataset(tmp_path)
    assert data[0].tokens.codes().tolist() == [[[1, 1], [2, 2]]] and data[0].tokens.segments == (2, 4)
    assert data.tokens().segments == (2, 4) and data.tokens().frame == frame


# ---- whose ids they are


def test_another_tokenizer_is_refused(folder: Path) -> None:
    tok = zoo.load("byteformer-tiny")
    for expect in (tok, tok.spec, tok.spec.fingerprint):
        with pytest.raises(MismatchError, match=r"codec \(0123456789abcdef\)"):
            zoo.TokenDataset(folder, expect=expect)
    assert len(zoo.TokenDataset(folder, expect="0123456789abcdef"))
    with pytest.raises(MismatchError):
        tok.decode(zoo.TokenDataset(folder)[0].tokens)


def test_what_is_no_data_set(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ArgumentError, match="holds no parts"):
        zoo.TokenDataset(tmp_path / "missing")
    some = write(tmp_path / "some", [2, 2, 2])
    (some / parts.part_name(1)).unlink()
    with pytest.raises(ArgumentError, match=r"lacks 1 of 3 parts.*partial=True"):
        zoo.TokenDataset(some)
    assert keys(zoo.TokenDataset(some, partial=True, failures=True)) == named([0, 1, 4, 5])
    write(tmp_path / "other", [2], parts.Header("codec", "another", 1000, "audio"))
    (tmp_path / "other" / parts.part_name(0)).rename(some / parts.part_name(1))
    with pytest.raises(FormatError, match=r"part-000001\.parquet belongs to another run"):
        zoo.TokenDataset(some)
    (some / parts.part_name(1)).write_bytes(b"PAR1")
    with pytest.raises(FormatError, match=r"part-000001\.parquet"):
        zoo.TokenDataset(some)


def test_a_part_that_is_damaged_later_is_named(tmp_path: Path) -> None:
    data = zoo.TokenDataset(write(tmp_path, [2]))
    (tmp_path / parts.part_name(0)).write_bytes(b"")
    with pytest.raises(FormatError, match=r"part-000000\.parquet is damaged"):
        data[0]


def test_a_run_that_is_not_finished(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for number in range(4):
        (tmp_path / "files" / f"{number}.bin").write_bytes(bytes([number] * (number + 1)))
    zoo.engine.tokenize("byteformer-tiny", tmp_path / "files", tmp_path / "tokens", workers=0, unit_items=2)
    data = zoo.TokenDataset(tmp_path / "tokens", expect=zoo.load("byteformer-tiny"))
    assert [item.tokens.tolist() for item in data] == [[[number] * (number + 1)] for number in range(4)]
    # The last one: the plan alone knows that it is missing.
    (tmp_path / "tokens" / parts.part_name(1)).unlink()
    with pytest.raises(ArgumentError, match="lacks 1 of 2 parts"):
        zoo.TokenDataset(tmp_path / "tokens")


# ---- streams


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "WINDOW_ITEMS", 40)


@pytest.mark.parametrize("shuffle", [None, 3])
@pytest.mark.parametrize("chosen", ["all", "some"])
def test_every_item_once_over_ranks_and_workers(folder: Path, small_windows: None, shuffle: int | None, chosen: str) -> None:
    data = zoo.TokenDataset(folder, failures=chosen == "all")
    data = data if chosen == "all" else data[np.arange(len(data)) % 4 < 3]
    orders = []
    for world in (1, 3):
        streams = [data.stream(shuffle=shuffle, rank=rank, world=world) for rank in range(world)]
        shares = [keys(one) for one in streams]
        assert [len(one) for one in streams] == [len(share) for share in shares]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        orders.append([key for share in shares for key in share])
    assert orders[0] == orders[1] and sorted(orders[0]) == sorted(keys(data))
    if shuffle is None:
        assert orders[0] == keys(data)
    else:
        others = [data.stream(shuffle=4), data.stream(shuffle=3, epoch=1), data]
        assert all(keys(other) != orders[0] for other in others)
        assert keys(data.stream(shuffle=3)) == orders[0]


def test_items_of_a_window_come_from_several_blocks(tmp_path: Path) -> None:
    data = zoo.TokenDataset(write(tmp_path, [8] * 6), failures=True)
    first = [int(key[5:-4]) // 8 for key in keys(data.stream(shuffle=0))[:12]]
    assert len(set(first)) > 3


def test_a_data_loader_collates_items(folder: Path) -> None:
    data = zoo.TokenDataset(folder)[:30]
    for workers, start in ((0, None), (2, "fork")):
        loader = DataLoader(
            data.stream(shuffle=1, rank=1, world=2), batch_size=4, num_workers=workers, multiprocessing_context=start
        )
        batches = list(loader)
        assert sorted(key for batch in batches for key in batch.keys) == sorted(keys(data.stream(shuffle=1, rank=1, world=2)))
        for batch in batches:
            expected = [row(int(key[5:-4])) for key in batch.keys]
            assert batch.tokens.tolist() == [values["ids"] for values in expected]
            assert batch.columns["text"] == tuple(values["text"] for values in expected)
    again = pickle.loads(pickle.dumps(data))
    assert keys(again) == keys(data) and again["clip-3.wav"].key == "clip-3.wav"


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("shuffle", [None, 5])
def test_a_stream_goes_on_where_its_state_was_taken(folder: Path, small_windows: None, world: int, shuffle: int | None) -> None:
    data = zoo.TokenDataset(folder)[:90]
    for rank in range(world):
        options = {"shuffle": shuffle, "rank": rank, "world": world, "epoch": 2}
        whole = keys(data.stream(**options))
        for stop in (0, 1, 39, 41, len(whole) - 1, len(whole)):
            one = data.stream(**options)
            items = iter(one)
            assert keys(next(items) for _ in range(stop)) == whole[:stop]
            state = json.loads(json.dumps(one.state_dict()))
            other = data.stream(**(options | {"epoch": 0}))
            other.load_state_dict(state)
            assert other.state_dict() == state
            assert keys(other) == whole[stop:]
            # The next pass begins at the beginning.
            begun = iter(other)
            assert other.state_dict()["position"] == 0 and keys(begun) == whole


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 3)])
def test_stateful_loaders_resume_in_mid_epoch(folder: Path, small_windows: None, world: int, workers: int) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    data = zoo.TokenDataset(folder)[:61]
    seen: list[str] = []
    for rank in range(world):

        def loader(rank: int = rank) -> Any:
            tokens = data.stream(shuffle=7, rank=rank, world=world)
            return torchdata.StatefulDataLoader(tokens, batch_size=3, num_workers=workers)

        whole = [batch.keys for batch in loader()]
        for stop in (1, 5):
            first = loader()
            batches = iter(first)
            assert [next(batches).keys for _ in range(stop)] == whole[:stop]
            state = first.state_dict()
            del batches
            second = loader()
            second.load_state_dict(state)
            assert [batch.keys for batch in second] == whole[stop:]
        seen += [key for names in whole for key in names]
    assert sorted(seen) == sorted(keys(data))


def test_states_of_other_streams_are_refused(folder: Path) -> None:
    data = zoo.TokenDataset(folder)
    state = data.stream(shuffle=1).state_dict()
    for other in (data.stream(shuffle=2), data.stream(), data.stream(shuffle=1, rank=0, world=2), data[1:].stream(shuffle=1)):
        with pytest.raises(MismatchError, match="the state is one of"):
            other.load_state_dict(state)
    moved = data.stream(shuffle=1)
    moved.load_state_dict(state | {"workers": 4})
    with pytest.raises(MismatchError, match="workers 4"):
        iter(moved)
    for wrong in ({"position": -1}, {"position": 10**9}, {"position": 2.5}, {"position": None}, {"epoch": -1}):
        with pytest.raises(ArgumentError, match="has no position"):
            data.stream(shuffle=1).load_state_dict(state | wrong)
    with pytest.raises(ArgumentError, match="which of the 2 ranks is this"):
        data.stream(world=2)
    for wrong in ({}, {"position": 3}):
        with pytest.raises(ArgumentError, match="no state of a token stream"):
            data.stream().load_state_dict(wrong)
    for options in ({"rank": 2, "world": 2}, {"rank": -1, "world": 2}, {"shuffle": -1}, {"epoch": -1}):
        with pytest.raises(ArgumentError):
            data.stream(**options)
    again = data.stream(shuffle=1)
    list(again)
    again.set_epoch(1)
    assert keys(again) == keys(data.stream(shuffle=1, epoch=1))


# ---- other libraries


def test_other_readers_read_the_parts(folder: Path) -> None:
    expected = [row(number)["ids"] for number in range(sum(SIZES))]
    pattern = str(folder / "part-*.parquet")
    duckdb = pytest.importorskip("duckdb")
    table = duckdb.sql(
        f"SELECT key, ids, error FROM read_parquet('{pattern}') ORDER BY rowid_of(key)".replace(
            "rowid_of(key)", "CAST(regexp_extract(key, '[0-9]+') AS INT)"
        )
    )
    assert [values[1] for values in table.fetchall()] == expected
    polars = pytest.importorskip("polars")
    frame = polars.read_parquet(pattern)
    assert frame["ids"].to_list() == expected and frame["key"].to_list() == named(range(sum(SIZES)))


def test_to_datasets(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    found = zoo.TokenDataset(folder, columns=["text"])[3:90].to_datasets()
    assert found["ids"][:] == [row(number)["ids"] for number in SOUND[3:90]]
    assert "speaker" not in found.column_names and found[0]["text"] == row(SOUND[3])["text"]
    assert str(found.features["ids"].feature.dtype) == "uint16"


def test_to_webdataset(folder: Path, tmp_path: Path) -> None:
    data = zoo.TokenDataset(folder, failures=True)[:10]
    paths = data.to_webdataset(tmp_path / "shards", shard_items=4)
    assert [path.name for path in paths] == [f"shard-{number:06d}.tar" for number in range(3)]
    assert sorted((tmp_path / "shards").iterdir()) == paths
    members: dict[str, bytes] = {}
    for path in paths:
        with tarfile.open(path) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    for number in range(10):
        expected, record = row(number), json.loads(members[f"{number:09d}.json"])
        assert (record["key"], record["error"], record["columns"]["text"]) == (
            expected["key"],
            expected["error"],
            expected["text"],
        )
        if expected["ids"] is not None:
            ids = np.load(io.BytesIO(members[f"{number:09d}.npy"]))
            assert ids.dtype == np.uint16 and ids.tolist() == expected["ids"]
            assert record["meta"] == {"samples": expected["samples"], "sample_rate": 16000}
    before = [path.read_bytes() for path in paths]
    data.to_webdataset(tmp_path / "shards", shard_items=4)
    assert [path.read_bytes() for path in paths] == before
    with pytest.raises(ArgumentError, match=r"has shard-000002\.tar, which is none of the 2 files"):
        data.to_webdataset(tmp_path / "shards", shard_items=8)
    assert [path.read_bytes() for path in paths] == before
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False).decode())
    assert [sample["json"]["key"] for sample in samples] == keys(data)
    with pytest.raises(ArgumentError):
        data.to_webdataset(tmp_path / "shards", shard_items=0)


def read_megatron(path: Path) -> tuple[list[list[int]], list[int]]:
    """Sequences and document bounds; written from the layout alone."""
    kinds = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
    content = path.with_name(f"{path.name}.idx").read_bytes()
    assert content[:9] == b"MMIDIDX\x00\x00"
    version, kind, count, bounds = struct.unpack_from("<QBQQ", content, 9)
    assert version == 1
    place = 9 + 25
    lengths = np.frombuffer(content, "<i4", count, place)
    pointers = np.frombuffer(content, "<i8", count, place + 4 * count)
    documents = np.frombuffer(content, "<i8", bounds, place + 12 * count)
    assert len(content) == place + 12 * count + 8 * bounds
    ids = path.with_name(f"{path.name}.bin").read_bytes()
    width = np.dtype(kinds[kind]).itemsize
    assert len(ids) == width * lengths.sum()
    sequences = [np.frombuffer(ids, kinds[kind], n, at).tolist() for n, at in zip(lengths, pointers, strict=True)]
    return sequences, documents.tolist()


def test_to_megatron(folder: Path, tmp_path: Path) -> None:
    data = zoo.TokenDataset(folder)
    paths = data.to_megatron(tmp_path / "out" / "v1.0")
    assert [path.name for path in paths] == ["v1.0.bin", "v1.0.idx"]
    sequences, documents = read_megatron(tmp_path / "out" / "v1.0")
    assert sequences == [row(number)["ids"] for number in SOUND]
    assert documents == list(range(len(SOUND) + 1))
    backwards = data[::-1]
    backwards.to_megatron(tmp_path / "out" / "back")
    assert read_megatron(tmp_path / "out" / "back")[0] == sequences[::-1]
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(zoo.OutputError):
        data.to_megatron(tmp_path / "file" / "x")


def test_to_shar(folder: Path, tmp_path: Path) -> None:
    data = zoo.TokenDataset(folder)[:20]
    lhotse = pytest.importorskip("lhotse")
    data.to_shar(tmp_path / "shar", shard_items=8)
    cuts = list(lhotse.CutSet.from_shar(in_dir=tmp_path / "shar"))
    assert [cut.id for cut in cuts] == keys(data)
    for cut, item in zip(cuts, data, strict=True):
        assert cut.load_codes().reshape(-1).tolist() == item.tokens.tolist()[0]
        assert cut.supervisions[0].text == item.columns["text"] and cut.fingerprint == data.fingerprint
        assert cut.duration == pytest.approx(item.tokens.meta[0]["samples"] / 16000)
    data.to_shar(tmp_path / "shar", shard_items=8)
    with pytest.raises(ArgumentError, match=r"has cuts\.000002\.jsonl\.gz, which is none"):
        data.to_shar(tmp_path / "shar", shard_items=16)


def test_shar_is_for_recordings(tmp_path: Path) -> None:
    header = parts.Header("bytes", "", 256, "bytes")
    content = parts.part_bytes(
        parts.schema_of(header), {"key": ["a"], "ids": [[1]], "length": [1], "segments": [None], "error": [None]}
    )
    Store(tmp_path).write(parts.part_name(0), content)
    with pytest.raises(ArgumentError, match="tokens of bytes"):
        zoo.TokenDataset(tmp_path).to_shar(tmp_path / "shar")

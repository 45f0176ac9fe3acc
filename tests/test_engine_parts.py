"""Parts: the format of the engine's files."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from zoo.errors import ArgumentError, FormatError
from zoo.spec import Frame, Spec

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from zoo.engine import parts  # noqa: E402  (it needs pyarrow)
from zoo.engine.store import Store  # noqa: E402  (likewise)


def columns(**changes: object) -> dict[str, object]:
    filled = {
        "key": ["a", "b"],
        "ids": [[1, 1023], None],
        "length": [2, None],
        "samples": [640, None],
        "sample_rate": [16000, None],
        "scales": [None, None],
    }
    return filled | {"segments": [None, None], "text": ["one", "two"], "error": [None, "it is empty"]} | changes


def test_a_part_keeps_what_was_written() -> None:
    frame = Frame((512, 512))
    header = parts.Header("codec", "0123", 1024, "audio", frame, {"tokens": 4}, batch_exact=False, unit=7)
    schema = parts.schema_of(header, pa.schema([("text", pa.string())]))
    content = parts.part_bytes(schema, columns())
    found, read_schema, metadata = parts.read_header(io.BytesIO(content), "part")
    assert found == header
    assert read_schema.equals(schema, check_metadata=True)
    assert parts.failures_in(metadata) == 1
    assert parts.carried_of(read_schema, found) == ("text",)
    table = pq.read_table(io.BytesIO(content))
    assert table.schema.field("ids").type == pa.list_(pa.uint16())
    assert {name: table[name].to_pylist() for name in table.schema.names} == columns()
    assert parts.part_bytes(schema, columns()) == content


@pytest.mark.parametrize(("size", "kind"), [(65_536, "uint16"), (65_537, "int32")])
def test_ids_take_the_narrowest_type(size: int, kind: str) -> None:
    header = parts.Header("codec", "", size, "bytes")
    content = parts.part_bytes(
        parts.schema_of(header), {"key": ["a"], "ids": [[size - 1]], "length": [1], "segments": [[1]], "error": [None]}
    )
    table = pq.read_table(io.BytesIO(content))
    assert str(table.schema.field("ids").type.value_type) == kind
    assert table["ids"].to_pylist() == [[size - 1]]


def test_what_is_no_part_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(FormatError, match=r"other\.parquet is no part"):
        parts.read_header(tmp_path / "other.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "other.parquet").read_bytes()[:-5])
    with pytest.raises(FormatError, match=r"cut\.parquet cannot be read"):
        parts.read_header(tmp_path / "cut.parquet")
    with pytest.raises(FormatError, match="format 2 is not known"):
        parts.Header.from_dict({"format": 2})
    with pytest.raises(ArgumentError, match="'samples'"):
        parts.schema_of(parts.Header("codec", "", 2, "audio"), pa.schema([("samples", pa.int8())]))
    with pytest.raises(ArgumentError, match="has no ids"):
        parts.Header.of_spec(Spec("vae", "autoencoder_kl", "image", 0, 4), {}, True)


def test_names_of_parts() -> None:
    names = [
        "part-000010.parquet",
        "part-1234567.parquet",
        "part-000002.parquet",
        "part-0000003.parquet",
        "part-1.parquet",
        "_plan",
    ]
    assert list(parts.part_names(names)) == [2, 10, 1234567]


def test_a_store_writes_all_or_nothing(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    for store in (Store(tmp_path / "out"), Store(f"memory://{tmp_path}")):
        assert store.names() == []
        store.write("_plan/a.json", b"one")
        store.write("_plan/a.json", b"two")
        assert store.read("_plan/a.json") == b"two"
        assert store.names("_plan") == ["a.json"]
        assert store.open("_plan/a.json").read() == b"two"
        store.remove("_plan/a.json")
        assert store.names("_plan") == []
        with pytest.raises(FileNotFoundError):
            store.read("_plan/a.json")

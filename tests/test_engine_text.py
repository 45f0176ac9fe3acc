"""Texts and sequences of nucleotides as data sets: records of FASTA and FASTQ, strings in tables and lines, options by name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_genome import dna

import zoo
from test_engine import rows
from zoo.errors import ArgumentError
from zoo.media import genome

pytest.importorskip("dnaio")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from zoo import engine  # noqa: E402  (it needs pyarrow)
from zoo.engine import report  # noqa: E402  (likewise)
from zoo.engine.store import Store  # noqa: E402  (likewise)


def run(sources: Any, out: Path, name: str = "genome-tiny", **options: Any) -> engine.Summary:
    return engine.tokenize(zoo.load(name), sources, out, **({"workers": 0, "unit_items": 2} | options))


SEQUENCES = {"one": dna(500, 1), "two": "ACGTNNNNacgtRYK", "empty": "", "three": dna(9_000, 3), "bad": "ACGTJ"}


def fasta(width: int = 60, end: str = "\n") -> bytes:
    found = ""
    for name, sequence in SEQUENCES.items():
        lines = [sequence[at : at + width] for at in range(0, len(sequence), width)]
        found += end.join([f">{name} a record", *lines]) + end
    return found.encode()


def fastq() -> bytes:
    return "".join(f"@{name} a read\n{text}\n+\n{'I' * len(text)}\n" for name, text in SEQUENCES.items() if text).encode()


def test_records_are_rows(tmp_path: Path) -> None:
    """Whatever packs the file; each with the ids of its sequence alone, and a broken one with the reason."""
    tok = zoo.load("genome-tiny")
    packings = {"": bytes, ".bz2": bz2.compress, ".xz": lzma.compress}
    contents = {f"a.fa{packing}": pack(fasta()) for packing, pack in packings.items()}
    contents |= {"long.fna": fasta(10**9), "dos.fasta": fasta(7, "\r\n"), "q.fq.gz": gzip.compress(fastq())}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        keep = ["name", "qualities"] if "q." in name else ["*"]
        summary = run(tmp_path / name, tmp_path / f"{name} out", keep=keep, encode={"unknown": "fold"})
        wanted = {key: text for key, text in SEQUENCES.items() if text or "q." not in name}
        found = rows(tmp_path / f"{name} out")
        assert (summary.items, summary.failures) == (len(wanted), 1), name
        assert [row["key"] for row in found] == [f"{name}#{key}" for key in wanted]
        for row, text in zip(found, list(wanted.values())[:-1], strict=False):
            tokens = tok.encode(text, unknown="fold")
            assert (row["ids"], row["text"], row["residue"], row["error"]) == (
                tokens.tolist()[0],
                1,
                tokens.meta[0].get("residue"),
                None,
            )
        assert "'J' at position 4" in found[-1]["error"]
        assert [row["name"] for row in found] == [f"{key} {'a read' if 'q.' in name else 'a record'}" for key in wanted]
        assert [row["qualities"] for row in found] == ["I" * len(text) if "q." in name else None for text in wanted.values()]
        store = Store(tmp_path / f"{name} out")
        plan = report.plan_in(store)
        assert list(report.problems(store, plan)) == []
        assert [reason for _, reason in report.recomputed(store, plan, 2, tok)] == [None] * 2
    data = zoo.TokenDataset(tmp_path / "a.fa out")
    assert tok.decode(data["a.fa#two"].tokens) == [SEQUENCES["two"]]


def test_records_in_folders(tmp_path: Path) -> None:
    """Beside other texts, which are one item each; for tokenizers of files a file stays one."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "a.fa").write_bytes(b">x\nACGT\n>y\nAC\nGT\n")
    (tmp_path / "in" / "b.txt").write_bytes(b"GATTACA")
    run(tmp_path / "in", tmp_path / "out")
    assert {row["key"]: row["text"] for row in rows(tmp_path / "out")} == {"b.txt": 0, "deep/a.fa#x": 1, "deep/a.fa#y": 1}
    [_, one, other] = [row["ids"] for row in rows(tmp_path / "out")]
    assert one == other == zoo.load("genome-tiny").encode("ACGT").tolist()[0]
    run(tmp_path / "in", tmp_path / "bytes", "byteformer-tiny")
    assert [row["key"] for row in rows(tmp_path / "bytes")] == ["b.txt", "deep/a.fa"]


@pytest.mark.parametrize(
    ("name", "content", "sound", "reason"),
    [
        ("a.fa", b"ACGT\n>x\nACGT\n", 0, "not sound FASTA"),
        ("a.fa", b">x\nACGT\n>y\nAC>GT\n", 1, "'>' at position 2"),
        ("a.fq", b"@x\nACGT\n+\nIIII\n@y\nACGT\n+\nIII\n", 1, "qualities differ"),
        ("a.fq", b"@x\nACGT\n+\nIIII\nACGT\n+\nIIII\n", 1, "beyond byte 15: no record of FASTQ begins"),
        ("a.fq", b"@x\nACGT\n+\nIIII\n@y\nACGT\n", 1, "not sound FASTA or FASTQ"),
        ("a.fa.gz", gzip.compress(b"".join(b">%d\n" % i + dna(99, i).encode() + b"\n" for i in range(99)))[:-300], 0, "beyond"),
        ("a.fa.gz", b"no gzip at all", 0, "beyond byte 0"),
    ],
)
def test_broken_records(tmp_path: Path, name: str, content: bytes, sound: int, reason: str) -> None:
    """What comes before is there, and a row says what is wrong."""
    (tmp_path / name).write_bytes(content)
    summary = run(tmp_path / name, tmp_path / "out")
    found = rows(tmp_path / "out")
    assert summary.failures == 1 and summary.items > sound
    assert all(row["error"] is None for row in found[:sound])
    assert reason in found[-1]["error"]


def test_reasons_are_the_same_in_every_run(tmp_path: Path) -> None:
    """Without addresses of objects in memory, so that parts are the same byte for byte."""
    (tmp_path / "a.fa").write_bytes(b"no header")
    run(tmp_path / "a.fa", tmp_path / "out")
    [row] = rows(tmp_path / "out")
    assert "not sound FASTA" in row["error"] and not re.search("0x[0-9a-f]", row["error"])


def test_records_have_names_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.fa").write_bytes(b">x\nA\n>\nC\n>x other\nG\n")
    with pytest.raises(ArgumentError, match=r"two items have the key 'a\.fa#x': .*a\.fa .*holds two items of that name"):
        run(tmp_path / "a.fa", tmp_path / "out")
    (tmp_path / "a.fa").write_bytes(b">x\nA\n>\nC\n")
    run(tmp_path / "a.fa", tmp_path / "out")
    assert [row["key"] for row in rows(tmp_path / "out")] == ["a.fa#x", "a.fa#@1"]
    (tmp_path / "b.fa").write_bytes(b"\n \n")
    with pytest.raises(ArgumentError, match="nothing for text in it"):
        run(tmp_path / "b.fa", tmp_path / "other")


def test_spans_are_found_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """They follow each other, and cover all but empty lines at the ends."""
    chance = random.Random(0)
    for trial in range(60):
        records = [
            f">{number}{' a word' * chance.randrange(3)}\n"
            + "".join(dna(chance.randrange(9), number) + "\n" for _ in range(chance.randrange(4)))
            for number in range(chance.randrange(1, 9))
        ]
        text = "\n" * chance.randrange(3) + "".join(records)
        content = (text.rstrip("\n") if trial % 3 else text).encode()
        monkeypatch.setattr(genome, "_BLOCK", chance.choice([1, 2, 3, 7, 64, 1 << 20]))
        found = list(genome.spans(io.BytesIO(content)))
        pieces = [content[span.offset : span.offset + span.size] for span in found]
        assert b"".join(pieces) == content.lstrip(b"\n")
        assert [span.name for span in found] == [str(number) for number in range(len(records))]
        assert [piece.decode().strip() for piece in pieces] == [record.strip() for record in records]


# ---- strings


def test_strings_are_texts(tmp_path: Path) -> None:
    """In a column or field, unless it is one of those that hold paths."""
    tok = zoo.load("byte-ids")
    texts = ["zoo", "", "é\n", "a.txt"]
    (tmp_path / "a.txt").write_text("content")
    table = pa.table({"text": texts, "id": [1, 2, 3, 4], "path": ["a.txt"] * 4, "raw": [text.encode() for text in texts]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    large = table.set_column(0, "text", pa.array(texts, pa.large_string()))
    with pa.OSFile(str(tmp_path / "large.arrow"), "wb") as sink, pa.ipc.new_file(sink, large.schema) as writer:
        writer.write_table(large)
    records = [dict(zip(("text", "id", "path"), row, strict=True)) for row in zip(texts, range(4), ["a.txt"] * 4, strict=True)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("a.parquet", "large.arrow", "a.jsonl", "a.jsonl.gz"):
        for number, column in enumerate((None, "text", "path")):
            out = tmp_path / f"{name}-{number}"
            assert run(tmp_path / name, out, "byte-ids", column=column, keep=["id"]).failures == 0
            found = rows(out)
            wanted = ["content"] * 4 if column == "path" else texts
            assert [row["ids"] for row in found] == [tok.encode(text).tolist()[0] for text in wanted]
            assert [row["text"] for row in found] == [int(column != "path")] * 4
            store = Store(out)
            assert [reason for _, reason in report.recomputed(store, report.plan_in(store), 4, tok)] == [None] * 4
    run(tmp_path / "a.parquet", tmp_path / "raw", "byte-ids", column="raw")
    assert [(row["ids"], row["text"]) for row in rows(tmp_path / "raw")] == [
        (tok.encode(text).tolist()[0], 0) for text in texts
    ]
    # Of JSON lines all fields are carried over but the one that is the item, unless it is asked for.
    run(tmp_path / "a.jsonl", tmp_path / "all", "byte-ids")
    assert [(row["id"], row["path"]) for row in rows(tmp_path / "all")] == [(number, "a.txt") for number in range(4)]
    assert "source_text" not in rows(tmp_path / "all")[0]
    run(tmp_path / "a.jsonl", tmp_path / "asked", "byte-ids", keep=["text"])
    assert [row["source_text"] for row in rows(tmp_path / "asked")] == texts


def test_strings_that_are_no_texts(tmp_path: Path) -> None:
    lines = [{"text": "a"}, {"text": 3}, {"text": None}, {"text": "\ud800"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(tmp_path / "a.jsonl", tmp_path / "out", "byte-ids", keep=[]).failures == 3
    reasons = [row["error"] for row in rows(tmp_path / "out")]
    assert reasons[:3] == [None, "its 'text' is no text", "its 'text' is no text"]
    assert "lone surrogate U+D800" in reasons[3]
    odd = ['{"text": "a", "n": "x\\ud800y", "\\ud800": 1, "o": ["\\udfff"]}', '{"path": "\\ud800"}', '{"path": "a\\u0000"}']
    (tmp_path / "odd.jsonl").write_text("\n".join(odd))
    run(tmp_path / "odd.jsonl", tmp_path / "odd", "byte-ids")
    found = rows(tmp_path / "odd")
    assert (found[0]["n"], found[0]["o"], found[0]["error"]) == ("x\ufffdy", '["\ufffd"]', None)
    assert [row["error"] for row in found[1:]] == ["\ufffd does not exist", "its 'path' is no path"]
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    run(tmp_path / "a.parquet", tmp_path / "table", "byte-ids")
    assert [row["error"] for row in rows(tmp_path / "table")] == [None, "the column holds nothing for it"]
    (tmp_path / "some.jsonl").write_text('{"text": "a", "n": 1}\n{"n": 2}\n{"text": "b"}\n')
    for column, reason in ((None, "it has no field that holds one"), ("text", "it has no field 'text'")):
        run(tmp_path / "some.jsonl", tmp_path / f"some-{column}", "byte-ids", column=column)
        assert [row["error"] for row in rows(tmp_path / f"some-{column}")] == [None, reason, None]
        assert [row["n"] for row in rows(tmp_path / f"some-{column}")] == [1, 2, None]
    (tmp_path / "b.jsonl").write_text('{"words": "a"}\n')
    with pytest.raises(
        ArgumentError, match="no field that is known to hold a text or a path: say --column NAME; there are words"
    ):
        run(tmp_path / "b.jsonl", tmp_path / "other", "byte-ids")
    run(tmp_path / "b.jsonl", tmp_path / "other", "byte-ids", column="words")
    (tmp_path / "cut.jsonl.gz").write_bytes(
        gzip.compress(b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(999)))[:-500]
    )
    assert run(tmp_path / "cut.jsonl.gz", tmp_path / "cut", "byte-ids", unit_items=1000).failures == 1
    assert "the file cannot be read beyond byte" in rows(tmp_path / "cut")[-1]["error"]


# ---- the command line


def called(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    from zoo import cli

    monkeypatch.setattr("sys.argv", ["zoo", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_options_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tok = zoo.load("genome-tiny")
    (tmp_path / "a.fa").write_bytes(b">x\nACGUNNNNacgu\n")
    (tmp_path / "a.txt").write_bytes(b"ACGUNNNNacgu")
    given = {"case": "keep", "unknown": "fold", "rna": True, "specials": "upstream"}
    options = [word for name, value in given.items() for word in ("--option", f"{name}={json.dumps(value)}".replace('"', ""))]
    ids = tok.encode("ACGUNNNNacgu", **given).tolist()[0]
    assert ids != tok.encode("ACGUNNNNacgu").tolist()[0]
    tokenize = ["tokenize", "genome-tiny", tmp_path / "a.fa", "-o", tmp_path / "out", "--workers", 0]
    assert called(monkeypatch, *tokenize, *options) == 0
    [row] = rows(tmp_path / "out")
    assert (row["key"], row["ids"]) == ("a.fa#x", ids)
    # A later command must have the same ones.
    assert called(monkeypatch, *tokenize) == 2
    assert "options was" in capsys.readouterr().err
    assert called(monkeypatch, "encode", "genome-tiny", tmp_path / "a.txt", "-o", tmp_path / "a.zt", *options) == 0
    assert zoo.Tokens.load(tmp_path / "a.zt").tolist() == [ids]
    assert called(monkeypatch, "reconstruct", "genome-tiny", tmp_path / "a.txt", "-o", tmp_path / "back", *options) == 0
    assert (tmp_path / "back" / "a.txt").read_bytes() == b"ACGUNNNNacgu"
    for wrong, message in (
        ("case=lower", "the option case must not be 'lower': input should be 'upper' or 'keep'"),
        ("rna=perhaps", "the option rna must not be 'perhaps': input should be a valid boolean"),
        ("max_bytes=1.5", "the option max_bytes must not be 1.5"),
        ("depth=3", "option 'depth'|no --depth"),
        ("items=3", "option 'items'|no --items"),
        ("progress=true", "option 'progress'|no --progress"),
        ("case", "--option must be NAME=VALUE, not 'case'"),
    ):
        for code, other in (
            (1, ["encode", "genome-tiny", tmp_path / "a.txt", "-o", tmp_path / "wrong.zt"]),
            (2, ["tokenize", "genome-tiny", tmp_path / "a.fa", "-o", tmp_path / "wrong", "--workers", 0]),
        ):
            assert called(monkeypatch, *other, "--option", wrong) == code, (wrong, other)
            said = capsys.readouterr().err
            assert any(part in said for part in message.split("|")), wrong
    assert not (tmp_path / "wrong").exists() and not (tmp_path / "wrong.zt").exists()
    twice = ["--option", "case=keep", "--option", "case=upper"]
    assert called(monkeypatch, *tokenize, *twice) == 2 and "is given twice" in capsys.readouterr().err


# ---- much


MEMORY = """
import resource, sys, zoo
tok = zoo.load("genome-tiny")
tok.encode("ACGT" * 5000)
for wrong in ({"case": "lower"}, {"unknown": "drop"}):
    try:
        next(tok.encode_stream(["ACGT"], **wrong))
    except zoo.InputError as error:
        assert "must be" in str(error)
    else:
        raise AssertionError(wrong)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
summary = zoo.engine.tokenize(tok, sys.argv[1], sys.argv[2], workers=0)
assert (summary.items, summary.failures) == (2, 0), summary
print(summary.ids, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.slow
def test_a_long_record_takes_memory_for_its_letters(tmp_path: Path) -> None:
    """So few bytes a letter that the longest human chromosome, 249 Mb, stays below 2 GiB beside the model."""

    def letters(blocks: int) -> Iterator[bytes]:
        yield b">short\nACGT\n>long\n"
        for number in range(blocks):
            # Lower case and runs of N, as genomes have them.
            block = dna(9_000, number) + dna(8_000, -number).lower() + "N" * 400 + dna(22_600, number)
            yield b"".join(block[at : at + 60].encode() + b"\n" for at in range(0, len(block), 60))

    taken = []
    for blocks in (125, 625):
        with gzip.open(tmp_path / f"{blocks}.fa.gz", "wb", compresslevel=1) as file:
            file.writelines(letters(blocks))
        arguments = [sys.executable, "-c", MEMORY, str(tmp_path / f"{blocks}.fa.gz"), str(tmp_path / f"{blocks}")]
        # Arrays go back to the system at once, as those of the size of a chromosome do.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
        done = subprocess.run(arguments, check=True, capture_output=True, text=True, env=environment)
        ids, megabytes = map(int, done.stdout.split())
        assert ids > 6_000 * blocks
        taken.append(megabytes)
    assert ((taken[1] - taken[0]) << 20) / (500 * 40_000) < 8.5, taken

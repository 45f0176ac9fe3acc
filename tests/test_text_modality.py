"""Texts in the evaluation, the benchmark, the vocabulary, the command line and whole data sets."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

import zoo
from toys.mrt5 import small_mrt5
from zoo.bench import text as bench
from zoo.cli import main
from zoo.eval.modality import text as measures
from zoo.eval.reconstruct import run
from zoo.eval.report.html import print_summary

TEXT = "Müller saw 7 balls. наука καφές हिन्दी\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "texts" / "bytes.bin").write_bytes(b"\xff\xfe")
    (tmp_path / "texts" / "empty").touch()
    return tmp_path / "texts"


@pytest.fixture
def zoo_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """The command line, in a folder of its own; gives the exit code."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["zoo", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0)

    return command


def test_words_of_each_script() -> None:
    assert list(measures.words("aé1б हि")) == [("LATIN", 0, 3), ("CYRILLIC", 4, 6), ("DEVANAGARI", 7, 13)]
    tok = zoo.load("byte-ids")
    reference = measures.Text(TEXT.encode())
    tokens = tok.encode(bytes(reference), specials="upstream")
    found = {script: measures.tokens_per_word(script, tok, tokens, reference) for script in measures.SCRIPTS}
    assert {script: value for script, value in found.items() if value is not None} == {
        "LATIN": (7 + 3 + 5) / 3,
        "CYRILLIC": 10.0,
        "GREEK": 10.0,
        "DEVANAGARI": 18.0,
    }
    assert measures.tokens_per_word("LATIN", tok, tok.encode(b"a\xff"), measures.Text(b"a\xff")) is None
    genome = zoo.load("genome-tiny")
    sequence = measures.Text(b"GATTACA" * 9)
    own = genome.encode(bytes(sequence))
    assert measures.tokens_per_word("LATIN", genome, own, sequence) == int(own.lengths[0])


def test_report(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run("byte-ids", [str(folder)], tmp_path / "report")
    assert summary["metrics"]["exactness"]["ours"]["mean"] == 1 and summary["failed"] == 0
    assert summary["bytes_per_token"] == 1 and summary["words"] == 6
    assert summary["metrics"]["tokens_per_latin_word"]["ours"]["mean"] == pytest.approx(5)
    assert "Müller saw" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    print_summary(summary, tmp_path / "report")
    table, _, behind = capsys.readouterr().out.partition("undefined for these items: ")
    assert "tokens_per_latin_word" in table and "tokens_per_khmer_word" not in table and "tokens_per_khmer_word" in behind


def test_benchmark() -> None:
    for name, lengths in (("byte-ids", (500,)), ("genome-tiny", (9_000,))):
        jobs = list(bench.jobs(zoo.info(name), "cpu", True, (2,), lengths))
        assert [job.direction for job in jobs[:2]] == ["encode", "decode"]
        assert all(job.amount == 2 * lengths[0] / 1e6 for job in jobs)
    ours, _, theirs = jobs
    assert ours.work is not None and theirs.work is not None
    assert ours.work().tolist() == [ids.tolist() for ids in theirs.work()]
    assert len(bench.items(zoo.load("byte-ids"), 3)) == 3


def test_text_side_of_a_vocabulary() -> None:
    text, sound = zoo.load("byte-ids"), zoo.load("wavtokenizer-tiny")
    vocabulary = zoo.Vocabulary.build(text, {"audio": sound})
    assert vocabulary.sections[0].offset == 384
    tokens = sound.tokens([torch.tensor([5, 6])])
    ids = vocabulary.join(["é", tokens, "!"], text)
    assert ids.tolist() == [198, 172, 1408, 389, 390, 1409, 36]
    first, _, last = vocabulary.decode_media(ids, text)
    assert (first, last) == ("é", "!")
    with pytest.raises(zoo.InputError, match="cannot be extended"):
        vocabulary.extend(text)
    assert zoo.Vocabulary.build(small_mrt5(), {"audio": sound}).join(["a"], small_mrt5()).tolist() == [100]


def test_command_line(folder: Path, tmp_path: Path, zoo_command: Callable[..., int]) -> None:
    assert zoo_command("encode", "byte-ids", folder, "-o", "all.zt") == 0
    assert sorted(zoo.Tokens.load("all.zt").lengths.tolist()) == [0, 2, len(TEXT.encode())]
    assert zoo_command("reconstruct", "byte-ids", folder / "notes.txt", "-o", "again") == 0
    assert (tmp_path / "again" / "notes.txt").read_text(encoding="utf-8") == TEXT
    assert zoo_command("encode", "genome-tiny", folder / "notes.txt", "-o", "no.zt") == 1


def test_data_sets(tmp_path: Path, zoo_command: Callable[..., int]) -> None:
    (tmp_path / "genes").mkdir()
    for name, sequence in (("a.txt", "ACGTACGTnn"), ("b.txt", ""), ("c.txt", "GATTACA")):
        (tmp_path / "genes" / name).write_text(sequence, encoding="utf-8")
    assert zoo_command("tokenize", "genome-tiny", "genes", "-o", "tokens") == 0
    [part] = sorted((tmp_path / "tokens").rglob("part-*.parquet"))
    table = pq.read_table(part)
    tok = zoo.load("genome-tiny")
    alone = tok.encode([b"ACGTACGTnn", b"", b"GATTACA"])
    assert table["ids"].to_pylist() == alone.tolist()
    assert table["text"].to_pylist() == [0, 0, 0]
    assert table["residue"].to_pylist() == [alone.meta[0]["residue"], None, None]
    assert json.loads(table.schema.metadata[b"zoo"])["modality"] == "text"

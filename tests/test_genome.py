"""Genomes: the official files where they are at hand, and a byte-pair encoding trained by the recipe."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zoo
from zoo.codecs.genome import Genome
from zoo.codecs.genome import tokenizer as genome_tokenizer
from zoo.codecs.genome.bpe import Merges, Windows
from zoo.codecs.genome.letters import Residue
from zoo.media.genome import IUPAC, read, reverse_complement
from zoo.weights.recipes import genome as recipe

# Other people's files, which this repository does not hold.
OFFICIAL = Path(__file__).parents[2] / "shared" / "golden" / "text"
CASES = sorted(OFFICIAL.glob("bpe_*/tokenizer.json"))


@cache
def loaded() -> Genome:
    return zoo.load("genome-tiny")


@pytest.fixture
def tok() -> Genome:
    return loaded()


def dna(length: int, seed: int = 0, letters: str = "ACGT") -> str:
    return "".join(random.Random(seed).choices(letters, k=length))


@pytest.mark.skipif(not CASES, reason="the official tokenizer.json files are not beside this checkout")
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.parent.name)
def test_golden(path: Path) -> None:
    tok = zoo.load_upstream("genome", None, path)
    for case in json.loads((path.parent / "io.json").read_text(encoding="utf-8")):
        text = case["text"]
        assert tok.encode(text, compat="upstream").tolist() == [case["bare_ids"]]
        assert tok.encode(text, compat="upstream", specials="upstream").tolist() == [case["ids"]]
        assert tok.encode(reverse_complement(text), compat="upstream").tolist() == [case["reverse_complement_bare_ids"]]
        assert tok.decode([case["ids"]], compat="upstream") == [case["upstream_decode"]]
        if set(text.upper()) <= set(IUPAC):
            as_it_is = tok.encode(text, case="keep", specials="upstream")
            assert as_it_is.tolist() == [case["ids"]] and tok.decode(as_it_is) == [text]


@pytest.mark.skipif(not CASES, reason="the official tokenizer.json files are not beside this checkout")
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.parent.name)
def test_official_files_in_windows(path: Path) -> None:
    whole_and_windows_agree(path.read_bytes(), range(4))


def test_windows_give_the_ids_of_the_whole(tok: Genome) -> None:
    whole_and_windows_agree(tok.file.numpy().tobytes(), range(20))


def whole_and_windows_agree(file: bytes, seeds: range) -> None:
    short, long = Merges(file, window=1), Merges(file, window=5_000)
    for seed in seeds:
        draw = random.Random(seed)
        parts = [dna(draw.randrange(1, 9_000), seed), "N" * draw.randrange(300), dna(draw.randrange(3), seed), "RY"]
        parts += [draw.choice(["A", "CA", "GATTACA"]) * draw.randrange(1, 3_000), dna(draw.randrange(9_000), seed + 100)]
        sequence = "".join(parts)
        expected = short.library.encode(sequence, add_special_tokens=False).ids
        assert short.encode(sequence).tolist() == long.encode(sequence).tolist() == expected
        windows = Windows(short)
        cuts = sorted(draw.choices(range(len(sequence) + 1), k=9))
        pieces = [sequence[a:b] for a, b in zip([0, *cuts], [*cuts, len(sequence)], strict=True)]
        assert [number for piece in pieces for number in windows.push(piece)] + windows.push("", last=True) == expected


LETTERS = st.text(st.sampled_from("ACGT" * 4 + IUPAC + IUPAC.lower() + "N" * 9), max_size=120)


@settings(max_examples=60, deadline=None)
@given(
    items=st.lists(LETTERS | LETTERS.map(str.encode), min_size=1, max_size=3),
    case=st.sampled_from(["upper", "keep"]),
    unknown=st.sampled_from(["upstream", "fold"]),
    rna=st.booleans(),
    specials=st.sampled_from(["none", "upstream"]),
)
def test_every_sequence_comes_back(items: list[str | bytes], **options: Any) -> None:
    tok = loaded()
    tokens = tok.encode(items, **options)
    assert tok.decode(tokens) == items
    assert tok.decode(zoo.Tokens.from_bytes(tokens.to_bytes())) == items
    for item, spans in zip(items, tok.spans(tokens), strict=True):
        assert int(spans[-1, 1]) == len(item) if len(spans) else not item
        assert (spans[:, 0] <= spans[:, 1]).all() and torch.equal(spans[1:, 0], spans[:-1, 1])


def test_what_is_kept_beside_the_ids(tok: Genome) -> None:
    plain, lower, unknown, run = (tok.encode(text) for text in ("ACGT", "ACgt", "ACRRT", "A" + "N" * 1_000_000 + "C"))
    assert plain.meta == ({"text": 1},) and plain.tolist() == lower.tolist()
    assert lower.meta[0]["residue"] == bytes([4, 1, 2, 2]) and unknown.meta[0]["residue"] == bytes([2, 1, 2, 2, ord("R")])
    # N is what a letter without an id decodes to.
    assert run.meta == ({"text": 1},) and tok.decode(run) == ["A" + "N" * 1_000_000 + "C"]
    folded = tok.encode("A" + "N" * 1_000_000 + "C", unknown="fold")
    assert len(folded.meta[0]["residue"]) == 6 and folded.lengths.tolist() == [3]
    assert tok.spans(folded)[0].tolist() == [[0, 1], [1, 1_000_001], [1_000_001, 1_000_002]]
    assert tok.decode(folded) == tok.decode(run)
    assert tok.encode("NANNA", unknown="fold").lengths.tolist() == [4]
    assert tok.decode(unknown.tolist()) == [b"ACNNT"] and tok.decode(folded.truncate(2)) == ["A" + "N" * 1_000_000]
    assert tok.encode("ACGU", rna=True).tolist() == plain.tolist()
    assert tok.encode("ACGU").tolist() != plain.tolist()
    for damaged in (b"\x10", b"\x04", b"\x04\x01\x02", b"\x02\x01\x01\x01", b"\x04\x01\xff" + b"\xff" * 9):
        with pytest.raises(zoo.InputError, match="besides its ids"):
            Residue.from_bytes(damaged)


def test_bad_sequences_are_named(tok: Genome, tmp_path: Path) -> None:
    fasta = tmp_path / "one.fa"
    fasta.write_text(">one\nACGT\n", encoding="utf-8")
    for item, reason in (
        ("ACGTJ", r"'J' at position 4 is no letter of the IUPAC alphabet"),
        ("AC-GT", r"'-' at position 2"),
        ("ACG T", r"white space at position 3 of the sequence: pass strip_whitespace=True"),
        ("ACGé", r"'é' at position 3"),
        ("ACGſ", r"'ſ' at position 3"),
        (b"ACG\xff", r"0xff at offset 3 does not belong to UTF-8"),
        (fasta, r"this looks like FASTA, which zoo\.media\.genome\.read and the command zoo tokenize take apart"),
        (str(fasta), r"a string is the text itself: pass pathlib\.Path"),
        ("\ud800", r"lone surrogate"),
    ):
        with pytest.raises(zoo.ItemError, match=reason) as caught:
            tok.encode(["ACGT", item])
        assert caught.value.index == 1
    assert tok.reconstruct("") == [""]
    spaced = tok.encode(" AC\nGT\r\n", strip_whitespace=True)
    assert tok.decode(spaced) == ["ACGT"]


def test_streams(tok: Genome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(genome_tokenizer, "_BLOCK", 20_000)
    sequence = dna(50_000) + "n" * 30_000 + dna(40_000, 1).lower() + "RYK" + "N" * 3 + "AC" * 9_000
    pieces = [sequence[start : start + 7_001] for start in range(0, len(sequence), 7_001)]
    for unknown in ("upstream", "fold"):
        stretches = list(tok.encode_stream(pieces, unknown=unknown))
        assert len(stretches) > 3
        ids = [number for stretch in stretches for number in stretch.tolist()[0]]
        assert ids == tok.encode(sequence, unknown=unknown).tolist()[0]
        assert "".join(tok.decode(zoo.Tokens.cat(stretches))) == sequence
    assert list(tok.encode_stream([])) == [] == list(tok.encode_stream([""]))
    for pieces in ([b"AC", b"GT"], b"ACGT", "ACGT"):
        assert [tokens.tolist() for tokens in tok.encode_stream(pieces)] == [tok.encode("ACGT").tolist()]
    with pytest.raises(zoo.InputError, match="'!' at position 1"):
        list(tok.encode_stream(["ACGT", "A!"]))


def test_the_other_strand(tok: Genome) -> None:
    assert reverse_complement("AaRyKmBvDhSWNnU-*U") == "A*-AnNWSdHbVkMrYtT"
    assert reverse_complement(b"GATT") == b"AATC"
    tokens = tok.encode(["GATTACAnn", "ACGTR"])
    turned = tok.reverse_complement(tokens)
    assert tok.decode(turned) == ["nnTGTAATC", "YACGT"] == [tok.reverse_complement(text) for text in ("GATTACAnn", "ACGTR")]
    assert turned.equal(tok.encode(["nnTGTAATC", "YACGT"]))


def test_files_of_sequences(tmp_path: Path) -> None:
    fasta = b">one two\nACGT\nacg\r\n\n>empty\n>three\nNN\n"
    (tmp_path / "a.fa").write_bytes(fasta)
    (tmp_path / "b.fa.gz").write_bytes(gzip.compress(fasta))
    expected = [("one two", "ACGTacg", None), ("empty", "", None), ("three", "NN", None)]
    assert list(read(tmp_path / "a.fa")) == list(read(tmp_path / "b.fa.gz")) == list(read(io.BytesIO(fasta))) == expected
    (tmp_path / "c.fq").write_bytes(b"@r\nACGT\n+\nIIII\n")
    assert list(read(tmp_path / "c.fq")) == [("r", "ACGT", "IIII")]
    for content, reason in (
        (b"@r\nACGT\n+\nIII\n", "not sound FASTA or FASTQ: .*ength"),
        (b"@r\nACGT\n", "not sound"),
        (b"nothing of the kind", "not sound"),
        (gzip.compress(fasta)[:-9], "not sound|cannot be read"),
    ):
        name = "bad.fa.gz" if content[:2] == b"\x1f\x8b" else "bad.fq"
        (tmp_path / name).write_bytes(content)
        with pytest.raises(zoo.InputError, match=reason):
            list(read(tmp_path / name))
    with pytest.raises(zoo.InputError, match=r"nowhere\.fa cannot be read"):
        list(read(tmp_path / "nowhere.fa"))


class Repeated(io.RawIOBase):
    """A file of one record, repeated."""

    def __init__(self, record: bytes, times: int) -> None:
        self._record, self._left = record, times

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        many = min(self._left, len(buffer) // len(self._record))
        self._left -= many
        buffer[: many * len(self._record)] = self._record * many
        return many * len(self._record)


@pytest.mark.slow
def test_memory_does_not_grow_with_a_file(tok: Genome) -> None:
    """A FASTA file of 3 Gb, by repetition, read to its end; every hundredth record encoded."""
    import resource

    record = b">r\n" + b"ACGTTGCAAC" * 50 + b"\n"
    total = 0
    before = None
    for number, found in enumerate(read(Repeated(record, 3_000_000_000 // 500))):
        total += len(found.sequence)
        if number % 20_000 == 0:
            tok.encode(found.sequence)
        if number == 100_000:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert total == 3_000_000_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


@pytest.mark.slow
def test_a_line_of_a_gibibyte(tok: Genome, tmp_path: Path) -> None:
    """One record whose sequence is one line, read whole, of which the first windows are encoded."""
    block = dna(1 << 20).encode()
    path = tmp_path / "line.fa"
    with path.open("wb") as file:
        file.write(b">long\n")
        for _ in range(1 << 10):
            file.write(block)
    [record] = read(path)
    assert (record.name, len(record.sequence)) == ("long", 1 << 30)
    assert record.sequence[-(1 << 20) :].encode() == block
    first = next(iter(tok.encode_stream([record.sequence[: 1 << 21]])))
    assert record.sequence.startswith(tok.decode(first)[0])
    with pytest.raises(zoo.ItemError, match="1073741824 bytes are more than max_bytes"):
        tok.encode(record.sequence)


@pytest.mark.slow
def test_memory_does_not_grow_with_a_sequence(tok: Genome) -> None:
    import resource

    block = dna(1 << 20)

    def pieces(count: int) -> Iterator[str]:
        for _ in range(count):
            yield block

    sum(int(stretch.lengths[0]) for stretch in tok.encode_stream(pieces(2)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sum(int(stretch.lengths[0]) for stretch in tok.encode_stream(pieces(30)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def changed(tok: Genome, **model: Any) -> dict[str, Any]:
    content = json.loads(tok.file.numpy().tobytes())
    content["model"] |= model
    return content


SPLIT = {"type": "Split", "pattern": {"String": "T"}, "behavior": "Isolated", "invert": False}


def test_other_kinds_of_files_are_refused(tok: Genome, tmp_path: Path) -> None:
    merges = json.loads(tok.file.numpy().tobytes())["model"]["merges"]
    for content, reason in (
        (changed(tok, type="WordPiece"), "kind WordPiece"),
        (changed(tok, type="Unigram"), "kind Unigram"),
        (changed(tok, dropout=0.1), "BPE with dropout"),
        (changed(tok, fuse_unk=True), "BPE with fuse_unk"),
        (changed(tok, unk_token=None), "without an unknown token"),
        (changed(tok, merges=merges[::-1]), "before they are there"),
        (changed(tok, merges=[["A"]]), "no merge of two"),
        (changed(tok) | {"normalizer": {"type": "Lowercase"}}, "with a normalizer"),
        (changed(tok) | {"pre_tokenizer": SPLIT}, "cuts a sequence"),
        ({"version": "1.0"}, "no tokenizer.json"),
        ([], "no tokenizer.json"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(zoo.WeightsError, match=reason):
            zoo.load_upstream("genome", None, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_bytes(b"")
    with pytest.raises(zoo.WeightsError, match=r"no tokenizer\.json"):
        zoo.load_upstream("genome", None, tmp_path / "tokenizer.json")
    # A fork's truncation and padding are no part of the encoding.
    content = changed(tok) | {"truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    again = zoo.load_upstream("genome", None, tmp_path / "tokenizer.json")
    assert again.encode(dna(500)).tolist() == tok.encode(dna(500)).tolist()


def test_vectors_of_a_checkpoint(tok: Genome, tmp_path: Path) -> None:
    vectors = torch.randn(4096, 5, generator=torch.Generator().manual_seed(0))
    state = {"tokenizer.json": tok.file, "bert.embeddings.word_embeddings.weight": vectors}
    model = zoo.load_upstream("genome", None, state)
    tokens = model.encode(["ACGT", ""])
    assert torch.equal(model.embed(tokens)[0], vectors[tokens.ids[0]]) and model.parts == ("ids", "vectors")
    model.save_pretrained(tmp_path)
    assert torch.equal(zoo.load(f"local-dir:{tmp_path}").embed(tokens), model.embed(tokens))
    ids_alone = zoo.load(f"local-dir:{tmp_path}", parts="ids")
    assert ids_alone.encode("ACGT").equal(tokens[0])
    with pytest.raises(zoo.WeightsError, match="embedding needs the vectors"):
        ids_alone.embed(tokens)
    with pytest.raises(zoo.KeysError, match="has 7 rows"):
        zoo.load_upstream("genome", None, state | {"bert.embeddings.word_embeddings.weight": vectors[:7]})


def test_recipe(tmp_path: Path) -> None:
    (tmp_path / "some.fa").write_text(f">one\n{dna(20_000)}\n>two\n{'GATTACA' * 900}\n", encoding="utf-8")
    arguments = ["--vocab-size", "64", "--out", str(tmp_path / "own.safetensors"), str(tmp_path / "some.fa")]
    recipe.main(arguments)
    model = zoo.load(f"local-dir:{tmp_path / 'own.safetensors'}")
    assert model.spec.vocab_size == 64 and model.encode("GATTACA" * 3).lengths.tolist()[0] < 15
    assert recipe.held_out("A" * 80 + "C" * 20) == "C" * 20
    again = recipe.build([tmp_path / "some.fa"], recipe.Recipe(vocab_size=64))
    assert again.compute_fingerprint() == model.fingerprint
    assert pickle.loads(pickle.dumps(model)).encode("ACGT").equal(model.encode("ACGT"))

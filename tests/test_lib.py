"""LiB: the original's lexicon after every snapshot, its segmentation, and texts that come back."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import zoo
from zoo.codecs.lib import Lib, LibSettings, Reader, chunks, subchunks

SENTENCES = [["thecatsat", "adog", "thedogsat"], ["acat", "thecat", "thedog"], ["adogsat", "acatsat"]]


def test_the_originals_lexicon(golden: Path) -> None:
    config = json.loads((golden / "lib" / "config.json").read_text())
    io = json.loads((golden / "lib" / "io.json").read_text())
    parameters = LibSettings(**config["parameters"])
    initial = io["initial"]
    reader = Reader(
        config["documents"], config["python_random_seed"], parameters, list(initial), dict.fromkeys(initial, parameters.life)
    )
    for epoch, number in enumerate(io["document_order"], 1):
        assert reader.epoch() == number
        if epoch <= len(io["per_epoch"]):
            assert len(reader.lexicon) == io["per_epoch"][epoch - 1][4]
        if snapshot := io["snapshots"].get(str(epoch)):
            assert reader.lexicon == snapshot["lexicon"]
            assert reader.lives == snapshot["lives"]
    for window, expected in io["segmentations"].items():
        found = [chunks(reader.ranks, sentence, int(window)) for sentence in config["tests"]]
        assert found == expected["chunks"]
        assert [subchunks(reader.ranks, part) for part in found] == expected["subchunks"]
    tok = Lib.of(reader.lexicon, window=10, split=True)
    tokens = tok.encode(config["tests"])
    parts = [
        [text.encode()[start:end].decode() for start, end in spans.tolist()]
        for text, spans in zip(config["tests"], tok.spans(tokens), strict=True)
    ]
    assert parts == io["segmentations"]["10"]["subchunks"]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda reader: pickle.loads(pickle.dumps(reader))])
def test_a_training_goes_on_after_any_epoch(way: Any) -> None:
    straight, stopped = Reader(SENTENCES, seed=3), Reader(SENTENCES, seed=3)
    for _ in range(40):
        straight.epoch()
        stopped = way(stopped)
        stopped.epoch()
        assert (stopped.lexicon, stopped.lives) == (straight.lexicon, straight.lives)
    assert {"thecat", "cat", "the"} & set(straight.lexicon)


def test_the_first_lexicon_is_in_the_order_of_the_text() -> None:
    reader = Reader(SENTENCES)
    assert reader.lexicon == list("thecasdog".replace("cc", "c"))
    assert reader.lives == dict.fromkeys(reader.lexicon, 10)


@pytest.fixture(scope="module")
def tok() -> Lib:
    return zoo.load("lib-tiny")


@given(
    st.text(st.sampled_from("the cat of \n") | st.characters(exclude_categories=("Cs",)), max_size=60) | st.binary(max_size=60)
)
@settings(max_examples=30, deadline=None)
def test_everything_comes_back(tok: Lib, text: str | bytes) -> None:
    assert tok.decode(tok.encode(text)) == [text]


def test_ids() -> None:
    model = Lib.of(["the", "t", "é", "cat", "th"])
    assert model.encode("thecaté\u0301x").tolist() == [[256, 259, 258, *"\u0301x".encode()]]
    assert model.encode(b"t\xffh").tolist() == [[257, 0xFF, ord("h")]]
    assert model.spec.vocab_size == 261
    assert Lib.of(["ab", "c", "abc", "a"], split=True).encode("abc").tolist() == [[256, 257]]
    assert Lib.of(["abc", "ab", "c"], split=True).encode("abc").tolist() == [[256]]
    assert Lib.of(["abc"], window=2).encode("abc").tolist() == [[*b"abc"]]


def test_what_cannot_be_read() -> None:
    with pytest.raises(zoo.InputError, match="no documents"):
        Reader([])
    with pytest.raises(zoo.InputError, match="first document has no characters"):
        Reader([[""], ["a"]])
    with pytest.raises(zoo.InputError, match="different, and not empty"):
        Lib.of(["a", "a"])

"""Words of HAT and T-Free: the originals' splits, ids and scores, and texts that come back."""

from __future__ import annotations

import json
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import zoo
from zoo.codecs.word_pool import WordPool, WordPoolConfig, hat, tfree

TEXTS = st.text(st.sampled_from("aZ .,-_\n\t<|>1é今न्") | st.characters(exclude_categories=("Cs",)), max_size=40)


def test_the_originals_words(golden: Path) -> None:
    for case in json.loads((golden / "word_pool" / "hat_splitter" / "io.json").read_text()):
        words = hat.words(case["text"])
        assert words == case["words"]
        for limit, expected in case["limited"].items():
            assert [list(part) for part in hat.limited([word.encode() for word in words], int(limit))] == expected


def test_words_of_a_beginning_are_beginnings_of_words(golden: Path) -> None:
    for case in json.loads((golden / "word_pool" / "hat_splitter" / "io.json").read_text()):
        whole = case["words"]
        for end in range(len(case["text"])):
            words = hat.words(case["text"][:end])
            # Marks and joiners may come behind and change the last two.
            assert words[: max(0, len(words) - 2)] == whole[: max(0, len(words) - 2)]


def test_the_originals_trigrams(golden: Path) -> None:
    folder = golden / "word_pool" / "tfree_32k"
    config, io = json.loads((folder / "config.json").read_text()), json.loads((folder / "io.json").read_text())
    tensors = load_file(folder / "io.safetensors")
    trigrams = tfree.Trigrams(config["vocab_size"], config["vocab_population"], config["vocab_population_partial_lowercase"])
    for number, row in io["table_rows"].items():
        assert trigrams.row(int(number).to_bytes(3, "little")) == row
    for text in io["texts"]:
        assert tfree.words(text["text"]) == text["words"]
        assert tfree.joined(text["words"]) == text["back"]
        for word, expected in zip(text.get("kept_words", []), text.get("ids_per_word", []), strict=True):
            assert sorted(sorted(row) for row in trigrams.ids(word)) == expected
    scores = trigrams.log_probabilities(tensors["logits"], io["dictionary"])
    for row, word in enumerate(io["decoded"]):
        assert io["dictionary"][int(scores[row].argmax())] == word
        torch.testing.assert_close(scores[row].double(), tensors[f"log_probs.{row}"], atol=1e-5, rtol=0)
    for number, text in enumerate(io["texts"]):
        if (expected := tensors.get(f"embedded.text{number}")) is not None:
            # The table's other rows are left out of the case here.
            table = torch.full((config["vocab_size"], 8), torch.nan)
            table[tensors["embedding_rows"]] = tensors["embedding"]
            found = trigrams.embed(table, text["kept_words"])
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_lower_case_is_shared() -> None:
    trigrams = tfree.Trigrams(1000, 10, 2)
    upper, lower = trigrams.row(b" Th"), trigrams.row(b" th")
    assert upper[-2:] == lower[-2:] and upper[:8] == tfree.Trigrams(1000, 10, 0).row(b" Th")[:8]
    assert trigrams.row(b" T1") == tfree.Trigrams(1000, 10, 0).row(b" T1"), "letters alone"
    [special] = trigrams.ids("<|Eot|>")
    assert special[-2:] == [tfree._hash(f"<|eot|>_lower_{place}") % 1000 for place in range(2)]


@given(TEXTS)
@settings(max_examples=100, deadline=None)
def test_words_are_the_text(text: str) -> None:
    assert "".join(hat.words(text)) == text
    assert "".join(tfree.stretches(text)) == text
    if "<|" not in text:
        assert tfree.joined(tfree.words(text)) == text
    for word in hat.words(text):
        assert not any(
            unicodedata.category(one) == "Ll" and unicodedata.category(other) == "Lu" for one, other in pairwise(word)
        )


@given(TEXTS | st.binary(max_size=40))
@settings(max_examples=40, deadline=None)
def test_everything_comes_back(text: str | bytes) -> None:
    octets = text.encode() if isinstance(text, str) else text
    for boundaries in ("hat", "tfree", "whitespace"):
        tok = WordPool(WordPoolConfig(boundaries, 7))
        tokens = tok.encode(text)
        assert tok.decode(tokens) == [text]
        [ends] = tok.words(tokens)
        assert ends.tolist() == sorted(set(ends.tolist())) and ([*ends.tolist(), 0][0] > 0 or not octets)
        assert (int(ends[-1]) if len(ends) else 0) == len(octets)
        assert all(length <= 7 for length in ends.diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist())


def test_bytes_that_are_no_text_are_words() -> None:
    tok = WordPool(WordPoolConfig("hat", 0))
    assert tok.split(b"ab\xff\xfe cd") == [b"ab", b"\xff", b"\xfe", b" cd"]
    assert tok.words(tok.encode([b"", b"\xff"]))[1].tolist() == [1]
    assert zoo.load("hat-words").split(b"x" * 250) == [b"x" * 100, b"x" * 100, b"x" * 50]


def test_bad_settings() -> None:
    with pytest.raises(zoo.InputError, match="limit is a number"):
        WordPoolConfig("hat", -1)
    with pytest.raises(zoo.InputError, match="of 10 ids of 5"):
        tfree.Trigrams(5)

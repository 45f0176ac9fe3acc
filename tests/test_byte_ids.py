"""Byte ids of ByT5: the original's cases, and everything that is not in them."""

from __future__ import annotations

import json
import resource
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

import zoo
from zoo.codecs.byte_ids import ByteIds, ByteIdsConfig
from zoo.saving import write_saved_file

CASES = sorted((Path(__file__).parent / "golden" / "byte_ids").glob("**/io.json"))

#: Texts of scripts whose characters take one to four bytes, with marks, joiners and signs that look special.
SCRIPTS = st.text(
    st.sampled_from("aZ 09_-\n\té́ßЖдאבعرहिन्दीதமிழ்ಕನ್ನಡ今天かな한글👍🏽\u200d\0</s>") | st.characters(exclude_categories=("Cs",)),
    max_size=60,
)


@cache
def loaded() -> ByteIds:
    return zoo.load("byte-ids")


@pytest.fixture
def tok() -> ByteIds:
    return loaded()


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.parent.name)
def test_golden(path: Path, tok: ByteIds) -> None:
    case = json.loads(path.read_text(encoding="utf-8"))
    for text in case["texts"]:
        item, octets = text["text"], bytes(text["bytes"])
        assert tok.encode(octets, specials="upstream").tolist() == [text["plain_ids"]]
        if item.encode() == octets:
            tokens = tok.encode(item, specials="upstream")
            assert tokens.tolist() == [text["plain_ids"]] and tok.decode(tokens) == [item]
        parsed = tok.encode(octets, specials="upstream", parse_specials=True)
        assert parsed.tolist() == [text["transformers_ids"]]
        assert tok.decode(parsed, compat="upstream") == [text["transformers_decode"]]
    for sequence in case["sequences"]:
        for keep, key in ((False, "transformers_decode"), (True, "transformers_decode_all")):
            assert tok.decode([sequence["ids"]], compat="upstream", keep_specials=keep) == [sequence[key]]


@settings(max_examples=60, deadline=None)
@given(items=st.lists(SCRIPTS | st.binary(max_size=60), min_size=1, max_size=4))
def test_every_text_comes_back(items: list[str | bytes]) -> None:
    tok = loaded()
    tokens = tok.encode(items, specials="upstream")
    assert tok.decode(tokens) == items
    assert tok.decode(zoo.Tokens.from_bytes(tokens.to_bytes())) == items
    assert tok.decode(tok.encode(items)) == items


@settings(max_examples=40, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from(["<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_124>", "<extra_id_125>"]) | SCRIPTS, max_size=6
    )
)
def test_special_names_are_parsed_as_in_transformers(parts: list[str]) -> None:
    text, theirs = "".join(parts), ByT5Tokenizer()
    tokens = loaded().encode(text, specials="upstream", parse_specials=True)
    assert tokens.tolist() == [theirs(text)["input_ids"]]


def test_special_ids(tok: ByteIds) -> None:
    assert tok.decode([[0, 68, 259, 1, 0]]) == [b"A"]
    assert tok.decode([[68, 259, 1]], keep_specials=True, as_text=True) == ["A<extra_id_0></s>"]
    assert tok.spans([[0, 68, 259, 69]])[0].tolist() == [[0, 0], [0, 1], [1, 1], [1, 2]]
    for options in ({}, {"keep_specials": True}):
        with pytest.raises(zoo.ItemError, match="id 2 is the unknown one") as caught:
            tok.decode([[68], [68, 2]], **options)
        assert caught.value.index == 1


def test_bytes_that_are_no_text(tok: ByteIds) -> None:
    tokens = tok.encode("é👍")
    with pytest.raises(zoo.ItemError, match=r"item 0: the byte 0xf0 at offset 2 does not belong to UTF-8: pass errors="):
        tok.decode(tokens.truncate(4))
    assert tok.decode(tokens.truncate(4), errors="replace") == ["é\ufffd"]
    assert tok.decode(tokens.truncate(4), as_text=False) == [b"\xc3\xa9\xf0\x9f"]
    assert tok.decode([[258, 68]], keep_specials=True) == [b"\xffA"]
    with pytest.raises(zoo.ItemError, match="index 1 is the lone surrogate"):
        tok.encode(["fine", "a\udcff"])


def test_a_string_is_the_text_and_a_path_a_file(tok: ByteIds, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"\xff\r\n")
    assert tok.reconstruct([str(path), path]) == [str(path), b"\xff\r\n"]
    with pytest.raises(zoo.ItemError, match=r"more than max_bytes = 2; a string is the text itself"):
        tok.encode(str(path), max_bytes=2)
    with pytest.raises(zoo.ItemError, match=r"more than max_bytes = 2$"):
        tok.encode("neither", max_bytes=2)


def test_a_line_of_a_gibibyte(tok: ByteIds, tmp_path: Path) -> None:
    """Such a file is refused before it is read, and names the argument that lets it in."""
    path = tmp_path / "line.txt"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(zoo.ItemError, match=r"item 1: 1073741824 bytes are more than max_bytes = 268435456"):
        tok.encode(["short", path])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def test_vectors_of_a_checkpoint(tok: ByteIds, tmp_path: Path) -> None:
    shared = torch.randn(384, 6, generator=torch.Generator().manual_seed(0))
    torch.save({"shared.weight": shared, "lm_head.weight": shared}, tmp_path / "pytorch_model.bin")
    model = zoo.load_upstream("byte_ids", None, tmp_path / "pytorch_model.bin")
    assert (model.spec.dim, model.fingerprint) == (6, tok.fingerprint)
    tokens = tok.encode(["zoo", ""])
    vectors = model.embed(tokens)
    assert torch.equal(vectors[0], shared[[125, 114, 114]]) and not vectors[1].any()
    assert model.encode(["zoo", ""]).tolist() == tokens.tolist()
    write_saved_file(model, tmp_path / "own.safetensors")
    assert torch.equal(zoo.load(f"local-dir:{tmp_path / 'own.safetensors'}").embed(tokens), vectors)
    with pytest.raises(zoo.WeightsError, match=r"missing: shared\.weight"):
        torch.save({"lm_head.weight": shared}, tmp_path / "other.bin")
        zoo.load_upstream("byte_ids", None, tmp_path / "other.bin")


def test_the_embedded_file_is_what_the_class_gives(tmp_path: Path) -> None:
    """The recipe is the class itself: there is nothing to train."""
    model = ByteIds(ByteIdsConfig())
    write_saved_file(model, tmp_path / "byte-ids.safetensors")
    assert (tmp_path / "byte-ids.safetensors").read_bytes() == (
        Path(__file__).parents[1] / "weights" / "byte-ids.safetensors"
    ).read_bytes()

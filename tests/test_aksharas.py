"""Syllables of Tamil and Kannada: known words, and no text is lost."""

from __future__ import annotations

import unicodedata
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, trainers

from zoo.text import akshara_pre_tokenizer, aksharas

LETTERS = "ಕಷರಅಂಃ಼್ಾೇ\u200c\u200dகஷஸஶரஅஃ்ாிெேௗொa \n"
TEXTS = st.text(st.sampled_from(LETTERS) | st.characters(exclude_categories=("Cs",)), max_size=30)


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("ಕನ್ನಡ", "ಕ ನ್ನ ಡ"),
        ("ಕ್ಷೇತ್ರ", "ಕ್ಷೇ ತ್ರ"),
        ("ಸ್ವಾತಂತ್ರ್ಯ", "ಸ್ವಾ ತಂ ತ್ರ್ಯ"),
        ("ಅಂತಃ", "ಅಂ ತಃ"),
        ("ಫ಼್ರ", "ಫ಼್ರ"),
        ("ಕ್\u200dಷ", "ಕ್\u200dಷ"),
        ("ಕ್\u200c", "ಕ್ \u200c"),
        ("ವಿದ್ಯಾರ್ಥಿ", "ವಿ ದ್ಯಾ ರ್ಥಿ"),
        ("தமிழ்", "த மி ழ்"),
        ("வணக்கம்", "வ ண க் க ம்"),
        ("லக்ஷ்மி", "ல க்ஷ் மி"),
        ("ஸ்ரீதர்", "ஸ்ரீ த ர்"),
        ("ஶ்ரீ", "ஶ்ரீ"),
        ("அஃது", "அ ஃ து"),
        ("ab ௧", "a b   ௧"),
    ],
)
def test_known_words(text: str, units: str) -> None:
    assert " ".join(aksharas(text)) == units
    assert [piece for piece, _ in akshara_pre_tokenizer().pre_tokenize_str(text)] == aksharas(text)


def test_both_forms_of_a_sign_are_one_unit() -> None:
    for composed in ("கொ", "கோ", "கௌ", "ಕೊ", "ಕೋ"):
        decomposed = unicodedata.normalize("NFD", composed)
        assert len(decomposed) > len(composed)
        assert aksharas(composed) == [composed] and aksharas(decomposed) == [decomposed]


@given(TEXTS)
@example("ಕ್" * 9)
@settings(max_examples=100, deadline=None)
def test_the_pieces_are_the_text(text: str) -> None:
    found = aksharas(text)
    assert "".join(found) == text
    assert [piece for piece, _ in akshara_pre_tokenizer().pre_tokenize_str(text)] == found
    for one, other in pairwise(found):
        # What a virama or a sign belongs to, or binds, is in one unit with it.
        assert not (one[-1] == "\u0ccd" and other[0] in "ಕಷರ" and len(one) > 1)
        assert not (one[-1] in "ಕಷರகஷஸஶர" and other[0] in "ಾೇ್ாிெே்")


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_models_of_syllables(kind: str) -> None:
    text = "ಕನ್ನಡ ಭಾಷೆ ಕರ್ನಾಟಕ ರಾಜ್ಯದ ಭಾಷೆ தமிழ் மொழி தமிழ்நாட்டின் மொழி"
    settings: dict[str, Any] = {"vocab_size": 90, "show_progress": False}
    model, trainer = (
        (models.Unigram(), trainers.UnigramTrainer(**settings, unk_token="<unk>"))
        if kind == "unigram"
        else (models.BPE(), trainers.BpeTrainer(**settings))
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = akshara_pre_tokenizer(), decoders.Fuse()
    tokenizer.train_from_iterator([text] * 9, trainer)
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids) == text
    edges = {0}
    for unit in aksharas(text):
        edges.add(max(edges) + len(unit))
    assert edges <= {0, *(end for _, end in encoded.offsets)}, "no piece crosses the edge of a syllable"
    # The library's Unigram begins with what two different syllables share, and never learns one that stands alone.
    assert ("ನ್ನ" in tokenizer.get_vocab()) == (kind == "bpe")

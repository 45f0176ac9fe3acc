"""Errors: which of them are an item's fault, and what they carry."""

from __future__ import annotations

import pickle

import pytest
import torch

import zoo
from small_models import small_flextok, small_wavtokenizer
from zoo.errors import naming_item


def test_a_bad_item_is_told_from_a_bad_argument() -> None:
    with pytest.raises(zoo.ItemError, match="item 3: too dark") as caught, naming_item(3):
        raise zoo.InputError("too dark")
    assert (caught.value.index, caught.value.reason) == (3, "too dark")
    with pytest.raises(zoo.ArgumentError) as argument, naming_item(3):
        raise zoo.ArgumentError("fit must be crop")
    assert argument.value.index is None
    with pytest.raises(zoo.MismatchError) as mismatch, naming_item(2):
        raise zoo.MismatchError("of another checkpoint")
    assert mismatch.value.index == 2
    for error in (caught.value, argument.value, mismatch.value):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.index) == (type(error), str(error), error.index)


def test_arguments_of_methods() -> None:
    tokenizer = small_flextok()
    picture = torch.zeros(3, 32, 48)
    for call in (
        lambda: tokenizer.encode(picture, fit="squeeze"),
        lambda: tokenizer.encode(picture, encoder_precision="fp16"),
        lambda: zoo.load("byte-ids", dtype=torch.int32),
        lambda: tokenizer.set_precision("fp16"),
        lambda: small_wavtokenizer().set_precision(""),
    ):
        with pytest.raises(zoo.ArgumentError) as caught:
            call()
        assert caught.value.index is None
    with pytest.raises(zoo.ItemError) as item:
        tokenizer.encode([picture, picture * torch.nan])
    assert item.value.index == 1


def test_names_stay_in_their_old_home_for_a_release() -> None:
    from zoo import errors, progress, tokenizer

    assert tokenizer.listing is errors.listing and tokenizer.naming_item is errors.naming_item
    assert tokenizer.progress_bar is progress.progress_bar

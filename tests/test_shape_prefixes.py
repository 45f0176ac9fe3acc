"""The picture of shapes that are decoded from more and more tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trimesh

import zoo
from small_models_vat import small_vat
from zoo.eval.studies.shape_prefixes import picture


def test_a_row_for_each_shape_and_a_column_for_each_count(tmp_path: Path) -> None:
    paths = [tmp_path / "box.ply", tmp_path / "ball.stl"]
    trimesh.creation.box().export(paths[0])
    trimesh.creation.icosphere(2).export(paths[1])
    sheet = np.asarray(picture(small_vat(), paths, lengths=(1, 9, 99)))
    # Two prefixes, everything, the original, and the grid.
    assert sheet.shape == (2 * 170 + 40, 5 * 170, 3)
    tiles = sheet[:340].reshape(2, 170, 5, 170, 3).swapaxes(1, 2)
    shares = (tiles < 250).any(-1).mean((2, 3))
    assert (shares[:, 3:] > 0.1).all()
    assert (tiles[0, 3] != tiles[1, 3]).any()


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(zoo.InputError, match="no shape tokenizer"):
        picture(zoo.load("wavtokenizer-tiny"), [tmp_path / "box.ply"])

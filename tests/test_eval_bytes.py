"""Evaluation of file bytes: exactness, bits per byte, and accuracy by the names of folders."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from small_models_byteformer import SMALL_BYTEFORMER, small_byteformer
from zoo.codecs.byteformer import ByteFormer
from zoo.eval import reconstruct
from zoo.eval.modality import bytes as metrics
from zoo.eval.modality.base import Measures, measures_of

pytest.importorskip("jinja2")

LABELS = ("a", "b", "c", "d", "e", "f", "g")


def labelled() -> ByteFormer:
    return small_byteformer(config=replace(SMALL_BYTEFORMER, labels=LABELS))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for every class, with three files each of which two can be classified."""
    random = np.random.default_rng(0)
    for label in LABELS:
        (tmp_path / "files" / label).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "files" / label / f"{number}.bin").write_bytes(random.bytes(200))
        (tmp_path / "files" / label / "short.txt").write_bytes(b"abc")
    (tmp_path / "files" / "a" / "empty").touch()
    return tmp_path / "files"


def run(tokenizer: ByteFormer, data: Path, out: Path) -> dict[str, Any]:
    return reconstruct.run(tokenizer, data, out, progress=False, resume=False)


def test_it_is_a_modality() -> None:
    assert measures_of("bytes") is metrics and isinstance(metrics, Measures)


def test_report(folder: Path, tmp_path: Path) -> None:
    tokenizer = labelled()
    summary = run(tokenizer, folder, tmp_path / "out")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    contents = [path.read_bytes() for path in files]
    assert (summary["items"], summary["failed"], summary["file_bytes"]) == (22, 0, sum(map(len, contents)))
    assert summary["metrics"]["exactness"]["ours"]["mean"] == 1
    assert summary["tokens"]["bits_per_byte"] == tokenizer.spec.bits_per_token
    deflated = sum(len(zlib.compress(content, 9)) for content in contents)
    assert summary["deflate_bits_per_byte"] == pytest.approx(8 * deflated / summary["file_bytes"])

    classified = [path for path in files if path.suffix == ".bin"]
    chosen = tokenizer.classify(tokenizer.encode(classified)).argmax(1).tolist()
    right = np.mean([LABELS[index] == path.parent.name for index, path in zip(chosen, classified, strict=True)])
    accuracy = summary["metrics"]["accuracy"]
    assert accuracy["ours"]["n"] == 14 and accuracy["baseline"] is None
    assert accuracy["ours"]["mean"] == pytest.approx(right)
    assert summary["accuracy_by_kind"] == {"bin": {"n": 14, "accuracy": pytest.approx(right)}}
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "bits per byte by DEFLATE" in html
    assert any(content[:8].hex(" ") in html for content in contents if len(content) == 200), "the first bytes are shown"


def test_classes_without_names_are_the_folders_in_order(folder: Path, tmp_path: Path) -> None:
    named, nameless = (run(tokenizer, folder, tmp_path / "out") for tokenizer in (labelled(), small_byteformer()))
    assert named["metrics"]["accuracy"] == nameless["metrics"]["accuracy"]


def test_accuracy_is_undefined_without_classes(folder: Path, tmp_path: Path) -> None:
    for path in (folder / "g").iterdir():
        path.unlink()
    (folder / "g").rmdir()
    assert run(small_byteformer(), folder, tmp_path / "out")["metrics"]["accuracy"]["ours"] is None
    assert run(labelled(), folder, tmp_path / "out")["metrics"]["accuracy"]["ours"]["n"] == 12


def test_exactness_of_a_byte_that_changed() -> None:
    assert metrics.exactness(b"abc", b"abc") == 1 and metrics.exactness(b"abc", b"abd") == metrics.exactness(b"abc", b"ab") == 0

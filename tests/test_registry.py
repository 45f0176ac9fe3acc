"""The catalogue: what it holds, what it refuses, and how others add to it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import zoo
from zoo import registry

GOOD = {
    "name": "mine",
    "family": "wavtokenizer",
    "modality": "audio",
    "description": "a model",
    "config": {"dim": 64},
    "weights": {"source": "none"},
    "licence": {"code": "MIT", "weights": "MIT"},
    "card": "wavtokenizer.md",
}


@pytest.fixture(autouse=True)
def _clean_catalogue(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("ZOO_REGISTRY", raising=False)
    monkeypatch.setattr(registry, "_registered", [])
    yield


def written(folder: Path, *entries: dict[str, object], name: str = "catalogue.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(list(entries)))
    return path


def test_our_entries_are_complete() -> None:
    for name in zoo.list():
        entry = zoo.info(name)
        registry.check_config(entry)
        assert (Path(registry.catalogue_path()).parent / "cards" / entry.card).exists()
        assert all(figure.source for figure in entry.reported)


def test_listing() -> None:
    assert "wavtokenizer-tiny" in zoo.list("wav*", modality="audio", embedded=True)
    assert zoo.list("*-40") == ["wavtokenizer-large-unify-40", "wavtokenizer-small-40"]
    assert zoo.list(modality="image", family="wavtokenizer") == []


def test_unknown_name_suggests_near_ones() -> None:
    with pytest.raises(zoo.RegistryError, match="did you mean wavtokenizer-small-75"):
        zoo.info("wavtokeniser-smal-75")


def pieces(piece: dict[str, object], name: str = "extra", source: str = "hub") -> dict[str, object]:
    """An entry's weights with one piece besides the file."""
    return {"weights": {"source": source, "repo": "lab/model", "file": "model.pt", "pieces": {name: piece}}}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"colour": "red"}, "colour: Extra inputs"),
        ({"weights": {"source": "hub"}}, "weights.*needs 'repo'"),
        ({"weights": {"source": "none", "size": "big"}}, r"weights\.size"),
        ({"weights": {"source": "none", "sha256": "abc"}}, r"weights\.sha256"),
        ({"weights": {"source": "local", "file": "a.pt"}}, "weights.*needs 'note'"),
        (pieces({"part": "encoder", "note": "ask"}), r"pieces\.extra: .* either a 'file' or 'components'"),
        (pieces({"file": "a.pt", "components": ["unet"], "note": "ask"}), "either a 'file' or 'components'"),
        (pieces({"file": "a.pt"}), "needs a 'note' that says where to get it"),
        (pieces({"repo": "lab/unclip", "components": ["unet"]}), "need a 'config_field'"),
        (pieces({"repo": "lab/unclip", "file": "a.pt", "config_field": "diffusion"}), "nothing else has one"),
        (pieces({"file": "a.pt", "note": "ask"}, name="main"), "'main' is the name of the file itself"),
        (pieces({"file": "a.pt", "note": "ask"}, source="none"), "source 'none' has no pieces"),
        ({"modality": "smell"}, "modality"),
        ({"family": "nosuch"}, "family: unknown family 'nosuch'"),
        ({"name": "Has Spaces"}, "name"),
        ({"modality": "speech", "tags": None}, "TypeError"),
        ({"modality": "x" * 100_000}, "there is no modality"),
        ({"licence": None}, "licence"),
    ],
)
def test_bad_entries_name_file_entry_and_field(change: dict[str, object], reason: str, tmp_path: Path) -> None:
    path = written(tmp_path, GOOD | change)
    with pytest.raises(zoo.RegistryError, match=reason) as caught:
        zoo.register(path)
    assert str(path) in str(caught.value)
    assert repr((GOOD | change)["name"]) in str(caught.value)
    assert "mine" not in zoo.list()


def test_missing_field_duplicate_names_and_keys(tmp_path: Path) -> None:
    with pytest.raises(zoo.RegistryError, match="description: Field required"):
        zoo.register(written(tmp_path, {key: value for key, value in GOOD.items() if key != "description"}))
    with pytest.raises(zoo.RegistryError, match="occurs twice"):
        zoo.register(written(tmp_path, GOOD, GOOD))
    with pytest.raises(zoo.RegistryError, match="already taken"):
        zoo.register(written(tmp_path, GOOD | {"name": "wavtokenizer-tiny"}))
    (tmp_path / "twice.yaml").write_text("- name: a\n  name: b\n")
    with pytest.raises(zoo.RegistryError, match="duplicate key 'name'"):
        zoo.register(tmp_path / "twice.yaml")
    (tmp_path / "broken.yaml").write_text("- name: [\n")
    with pytest.raises(zoo.RegistryError, match="not valid YAML"):
        zoo.register(tmp_path / "broken.yaml")
    with pytest.raises(zoo.RegistryError, match="cannot be read"):
        zoo.register(tmp_path / "nowhere.yaml")


def test_register_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert zoo.register(written(tmp_path, GOOD)) == ["mine"]
    assert zoo.register(tmp_path / "catalogue.yaml") == ["mine"], "registering twice is harmless"
    monkeypatch.setenv("ZOO_REGISTRY", str(written(tmp_path, GOOD | {"name": "theirs"}, name="other.yaml")))
    assert {"mine", "theirs"} <= set(zoo.list())


def test_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, GOOD | {"name": "plugged"})

    class Point:
        def load(self) -> object:
            return lambda: path

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [Point()])
    registry._read_all.cache_clear()
    try:
        assert "plugged" in zoo.list()
    finally:
        monkeypatch.undo()
        registry._read_all.cache_clear()


def test_config_fields_are_checked(tmp_path: Path) -> None:
    zoo.register(written(tmp_path, GOOD | {"config": {"width": 3}}, GOOD | {"name": "uneven", "config": {"dim": 33}}))
    with pytest.raises(zoo.RegistryError, match="no field width"):
        zoo.load("mine")
    with pytest.raises(zoo.RegistryError, match="multiple of 32"):
        zoo.load("uneven")


def test_weights_that_nobody_published(tmp_path: Path) -> None:
    zoo.register(written(tmp_path, GOOD))
    with pytest.raises(zoo.WeightsError, match="train it with the recipe"):
        zoo.load("mine")


@pytest.mark.parametrize("code", ["import zoo", "import zoo; zoo.list()", "import zoo.cli, zoo; zoo.info('wavtokenizer-tiny')"])
def test_torch_is_not_imported_before_it_is_needed(code: str) -> None:
    subprocess.run([sys.executable, "-c", f"{code}; import sys; assert 'torch' not in sys.modules"], check=True)


def test_pieces(tmp_path: Path) -> None:
    piece = {"part": "decoder", "repo": "lab/unclip", "components": ["unet", "vae"], "config_field": "diffusion"}
    zoo.register(written(tmp_path, GOOD | pieces(piece)))
    found = zoo.info("mine").weights.all_pieces()
    assert list(found) == ["main", "extra"]
    assert (found["main"].repo, found["main"].file, found["main"].part) == ("lab/model", "model.pt", None)
    assert (found["extra"].part, found["extra"].components) == ("decoder", ["unet", "vae"])


def test_a_file_that_the_user_has_to_bring(tmp_path: Path) -> None:
    zoo.register(written(tmp_path, GOOD | {"weights": {"source": "local", "file": "model.ckpt", "note": "on a drive"}}))
    with pytest.raises(zoo.WeightsError, match=r"needs model\.ckpt: on a drive. Then pass files=.'main'"):
        zoo.load("mine")

"""The bench of the engine: every contender is a program that gives the ids that each item gets alone."""

import json
from pathlib import Path

import pytest

import zoo
from zoo.bench import contenders, engine


@pytest.mark.parametrize("contender", ["loop", "padded batches"])
def test_a_contender_writes_ids_in_the_order_of_names(contender: str, tmp_path: Path) -> None:
    tokenizer = zoo.load("wavtokenizer-tiny")
    files = engine.write_items(tokenizer, tmp_path / "items", 3)
    contenders.main("wavtokenizer-tiny", contender, str(tmp_path / "items"), str(tmp_path / "out"), "1")
    found, alone = json.loads((tmp_path / "out").read_text()), tokenizer.encode(files).tolist()
    assert list(map(len, found)) == list(map(len, alone))
    if contender == "loop":
        assert found == alone


def test_only_sound_and_pictures(tmp_path: Path) -> None:
    with pytest.raises(zoo.ArgumentError, match="not on bytes"):
        engine.write_items(zoo.load("byteformer-tiny"), tmp_path / "items", 1)


@pytest.mark.slow
def test_the_engine_beside_its_contenders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = engine.run(names=("wavtokenizer-tiny",), items=6, workers=1, json_path=tmp_path / "figures.json")
    assert json.loads((tmp_path / "figures.json").read_text())["machine"]["workers"] == 1
    measured = {one["contender"]: one for one in content["measurements"]}
    assert {"loop", engine.OURS, "DataLoader", "padded batches"} <= set(measured)
    # Padding is what makes ids differ.
    assert all(one["same"] == 1 and one["wall"] > 0 for name, one in measured.items() if name != "padded batches")
    engine.print_tables(content)
    assert engine.OURS in capsys.readouterr().out

"""The padding table."""

from zoo.bench import padding


def test_padded_batches_of_the_library_change_frames_and_ours_none(tmp_path, capsys):
    content = padding.run(["DacModel", "EncodecModel, not causal", "XcodecModel"], json_path=tmp_path / "table.json")
    assert (tmp_path / "table.json").exists()
    assert len(content["rows"]) == 3
    for row in content["rows"]:
        assert row["ours"] == 0
        assert 0 < row["library"] < row["frames"] == 138
    padding.print_table(content)
    assert "XcodecModel" in capsys.readouterr().out

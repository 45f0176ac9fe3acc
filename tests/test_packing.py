"""Packing: rows of one length from token data sets and texts, by the vocabulary alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import zoo
from zoo.errors import ArgumentError, FormatError, MismatchError
from zoo.spec import Spec
from zoo.tokens import Tokens

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from zoo.engine import packing, parts  # noqa: E402  (it needs pyarrow)
from zoo.engine.fitting import best_fit  # noqa: E402  (likewise)
from zoo.engine.store import Store  # noqa: E402  (likewise)
from zoo.engine.templates import parsed  # noqa: E402  (likewise)

IMAGE = Spec("pictures", "toy", "bytes", 300, 4, fingerprint="00000000000000aa")
SOUND = Spec("sounds", "toy", "bytes", 50, 4, fingerprint="00000000000000bb")


def bytes_tokenizer() -> Tokenizer:
    """One id for each byte."""
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


TEXT = bytes_tokenizer()
VOCABULARY = zoo.Vocabulary.build(TEXT, {"image": IMAGE, "sound": SOUND})


def item(spec: Spec, ids: Iterable[int]) -> Tokens:
    return Tokens.from_sequences([list(ids)], tokenizer=spec.name, fingerprint=spec.fingerprint, vocab_size=spec.vocab_size)


def write_items(folder: Path, spec: Spec, items: dict[str, list[int] | None], captions: list[str | None] | None = None) -> Path:
    """Two parts; items of ``None`` failed."""
    carried = pa.schema([("caption", pa.string()), ("number", pa.int64())])
    header = parts.Header.of_spec(spec, {}, True)
    names, ids = list(items), list(items.values())
    texts = captions or [None] * len(names)
    half = len(names) // 2
    for unit, chosen in enumerate((slice(0, half), slice(half, None))):
        some = ids[chosen]
        content = parts.part_bytes(
            parts.schema_of(parts.Header(**{**vars(header), "unit": unit}), carried),
            {
                "key": names[chosen],
                "ids": some,
                "length": [None if one is None else len(one) for one in some],
                "segments": [None] * len(some),
                "caption": texts[chosen],
                "number": list(range(len(some))),
                "error": ["it is broken" if one is None else None for one in some],
            },
        )
        Store(folder).write(parts.part_name(unit), content)
    return folder


def lines(path: Path, records: Iterable[Any]) -> Path:
    path.write_text("".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records))
    return path


def made(count: int, size: int, seed: int = 0) -> list[list[int]]:
    noise = np.random.default_rng(seed)
    return [noise.integers(0, size, noise.integers(1, 30)).tolist() for _ in range(count)]


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [row for part in sorted(out.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]


def documents_of(out: Path, length: int, pad: int = 0) -> dict[str, tuple[list[int], list[int]]]:
    """Ids and losses of documents by their keys, after a check of everything that rows promise."""
    found: dict[str, tuple[list[int], list[int]]] = {}
    for row in rows_of(out):
        ids, loss, positions, bounds = (row[name] for name in ("input_ids", "loss_mask", "position_ids", "cu_seqlens"))
        assert len(ids) == len(loss) == len(positions) == length
        assert bounds[0] == 0 and bounds[-1] == length and bounds == sorted(set(bounds))
        spans = list(pairwise(bounds))
        assert positions == [place for start, end in spans for place in range(end - start)]
        assert len(row["keys"]) == len(spans) - (row["padding"] > 0)
        if row["padding"]:
            start, end = spans[-1]
            assert end - start == row["padding"]
            assert ids[start:] == [pad] * row["padding"] and not any(loss[start:])
        for key, (start, end) in zip(row["keys"], spans, strict=False):
            assert key not in found
            found[key] = ids[start:end], loss[start:end]
    return found


def failures(out: Path) -> dict[str, str]:
    path = out / "failures.parquet"
    return {row["key"]: row["error"] for row in pq.read_table(path).to_pylist()} if path.exists() else {}


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def pack(sources: Any, out: Path, **options: Any) -> packing.PackSummary:
    """In rows of 64; with the text tokenizer where there is text."""
    places = [str(place) for place in (sources if isinstance(sources, list) else [sources])]
    wanted = any(place.endswith("jsonl") for place in places) or "caption" in options.get("template", "")
    return zoo.engine.pack(
        sources, out, **({"vocabulary": VOCABULARY, "length": 64, "text": TEXT if wanted else None} | options)
    )


# ---- which items share a row


def first_of_all(lengths: list[int], room: int) -> int:
    """Rows of best-fit-decreasing packing, the plain way."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(free, row) for row, free in enumerate(rooms) if free >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(room - length)
    return len(rooms)


def test_best_fit_is_that_of_the_plain_way() -> None:
    noise = np.random.default_rng(0)
    for _ in range(60):
        room, count = int(noise.integers(1, 40)), int(noise.integers(0, 60))
        lengths = noise.integers(1, room + 1, count)
        rows, number = best_fit(lengths, room)
        assert number == first_of_all(lengths.tolist(), room)
        filled = np.bincount(rows, weights=lengths, minlength=number)
        assert (filled <= room).all() and (filled > 0).all()
        assert list(dict.fromkeys(rows.tolist())) == list(range(number))
        assert np.array_equal(best_fit(lengths, room)[0], rows)


def test_rows_are_full_with_lengths_as_they_are() -> None:
    noise = np.random.default_rng(1)
    for lengths in (noise.lognormal(5.5, 1, 30_000), noise.lognormal(3.5, 0.7, 100_000), noise.integers(75, 2250, 8000)):
        sizes = np.clip(lengths.astype(int), 1, 8192)
        _, rows = best_fit(sizes, 8192)
        assert 1 - sizes.sum() / (rows * 8192) < 0.005


def test_stretches_of_a_template() -> None:
    names = {"image"}
    assert [stretch.section for stretch in parsed("{image}{image}", names)] == ["image", "image"]
    [first, learned, whole, picture, end] = parsed("{{{a}: {b}}}{image}.", names, ["a", "image"])
    assert first.parts == ((False, "{"),) and learned.fields == ("a",) and learned.loss
    assert whole.parts == ((False, ": "), (True, "b"), (False, "}")) and not whole.loss
    assert picture.loss and end.parts == ((False, "."),)
    for wrong in ("", "{", "{}", "{a!r}", "{a:3}", "}"):
        with pytest.raises(ArgumentError, match="template"):
            parsed(wrong, names)


# ---- documents


def test_items_and_texts_without_a_template(tmp_path: Path) -> None:
    images = {f"{number}.png": ids for number, ids in enumerate(made(40, 300))}
    images["7.png"] = None
    texts = [f"text number {number}, with ümlauts" for number in range(20)]
    write_items(tmp_path / "images", IMAGE, images)
    lines(tmp_path / "text.jsonl", [{"text": text, "more": 1} for text in texts])
    summary = pack([tmp_path / "images", tmp_path / "text.jsonl"], tmp_path / "out", pad=3, unit_rows=4)
    found = documents_of(tmp_path / "out", 64, pad=3)
    expected = {key: VOCABULARY.join([item(IMAGE, ids)]).tolist() for key, ids in images.items() if ids is not None}
    expected |= {f"text.jsonl#{number + 1}": VOCABULARY.join([text], TEXT).tolist() for number, text in enumerate(texts)}
    assert {key: ids for key, (ids, _) in found.items()} == expected
    assert all(all(loss) for _, loss in found.values())
    assert (summary.documents, summary.pieces, summary.failures) == (len(expected),) * 2 + (0,)
    rows = rows_of(tmp_path / "out")
    assert summary.rows == len(rows) and summary.tokens == sum(map(len, expected.values()))
    assert summary.padding == pytest.approx(1 - summary.tokens / (64 * len(rows)))
    assert summary.units > 2 and len(list((tmp_path / "out").glob("part-*.parquet"))) == summary.units
    schema = pq.read_schema(tmp_path / "out" / parts.part_name(0))
    assert str(schema.field("input_ids").type) == "fixed_size_list<element: uint16>[64]"
    assert json.loads(schema.metadata[b"zoo"])["length"] == 64
    # A model's sequence comes apart again.
    assert VOCABULARY.split(found["0.png"][0])[0].tokens.tolist() == [images["0.png"]]


def test_a_template_over_columns_of_the_data_set(tmp_path: Path) -> None:
    ids = made(12, 300)
    captions: list[str | None] = [f"caption {number}" for number in range(12)]
    captions[3] = None
    write_items(tmp_path / "images", IMAGE, {f"{number}.png": one for number, one in enumerate(ids)}, captions)
    summary = pack(tmp_path / "images", tmp_path / "out", template="Draw {caption}:{image}.", loss=["image"])
    found = documents_of(tmp_path / "out", 64)
    for number in set(range(12)) - {3}:
        before = VOCABULARY.join([f"Draw {captions[number]}:"], TEXT).tolist()
        picture = VOCABULARY.join([item(IMAGE, ids[number])]).tolist()
        after = VOCABULARY.join(["."], TEXT).tolist()
        assert found[f"{number}.png"] == (
            before + picture + after,
            [0] * len(before) + [1] * len(picture) + [0] * len(after),
        )
    assert summary.failures == 1 and failures(tmp_path / "out") == {"3.png": "it has no 'caption'"}


def test_a_template_over_lines_and_several_data_sets(tmp_path: Path) -> None:
    pictures, sounds = made(6, 300), made(6, 50, seed=1)
    write_items(tmp_path / "images", IMAGE, {f"{number}.png": ids for number, ids in enumerate(pictures)})
    write_items(tmp_path / "sounds", SOUND, {f"{number}.wav": ids for number, ids in enumerate(sounds)} | {"bad.wav": None})
    # In another order than the data sets', one of them twice.
    order = [5, 0, 3, 3]
    good = [{"q": f"q{number}", "a": f"a{number}", "image": f"{number}.png", "sound": f"{5 - number}.wav"} for number in order]
    wrong = [good[0] | {"image": "9.png"}, good[0] | {"sound": "bad.wav"}, good[0] | {"q": 3}, {"q": "x", "a": "y"}]
    wrong += [good[0] | {"a": "\ud800"}, "[1]", "{"]
    lines(tmp_path / "chat.jsonl", [*good, "", *wrong])
    sources = [tmp_path / "sounds", tmp_path / "chat.jsonl", tmp_path / "images"]
    options = {"template": "{image}{q}{sound}{a}", "loss": ["a", "sound"], "length": 96}
    summary = pack(sources, tmp_path / "out", **options)
    found = documents_of(tmp_path / "out", 96)
    for line, number in enumerate(order, 1):
        pieces = [item(IMAGE, pictures[number]), f"q{number}", item(SOUND, sounds[5 - number]), f"a{number}"]
        made_of = [VOCABULARY.join([piece], TEXT).tolist() for piece in pieces]
        ids = [one for piece in made_of for one in piece]
        loss = [flag for piece, flag in zip(made_of, (0, 0, 1, 1), strict=True) for flag in [flag] * len(piece)]
        assert found[f"chat.jsonl#{line}"] == (ids, loss)
    assert (summary.documents, summary.failures) == (4, 7)
    reasons = failures(tmp_path / "out")
    assert reasons["chat.jsonl#6"] == "'image' has no item '9.png'"
    assert reasons["chat.jsonl#7"] == "the item 'bad.wav' of 'sound' failed when it was tokenized"
    assert reasons["chat.jsonl#8"] == "the field 'q' is no text but int"
    assert reasons["chat.jsonl#9"] == "it names no item of 'image'"
    assert reasons["chat.jsonl#10"] == "the field 'a' holds half of a character"
    assert reasons["chat.jsonl#11"] == "the line is no JSON object"
    assert reasons["chat.jsonl#12"].startswith("the line is no JSON:")


def test_items_of_several_data_sets_belong_together_by_their_keys(tmp_path: Path) -> None:
    write_items(tmp_path / "images", IMAGE, {"a": [1], "b": [2], "c": [3]})
    write_items(tmp_path / "sounds", SOUND, {"c": [4], "a": [5]})
    pack([tmp_path / "images", tmp_path / "sounds"], tmp_path / "out", template="{sound}{image}")
    found = {key: ids for key, (ids, _) in documents_of(tmp_path / "out", 64).items()}
    assert found == {
        "a": VOCABULARY.join([item(SOUND, [5]), item(IMAGE, [1])]).tolist(),
        "c": VOCABULARY.join([item(SOUND, [4]), item(IMAGE, [3])]).tolist(),
    }
    assert failures(tmp_path / "out") == {}
    pack([tmp_path / "images", tmp_path / "sounds"], tmp_path / "other", template="{image}{sound}")
    assert failures(tmp_path / "other") == {"b": "'sound' has no item 'b'"}


def test_long_documents_fail_or_are_cut(tmp_path: Path) -> None:
    long = list(range(200))
    write_items(tmp_path / "images", IMAGE, {"long": long, "exact": list(range(62)), "short": [1, 2]})
    summary = pack(tmp_path / "images", tmp_path / "whole")
    assert summary.failures == 1 and set(documents_of(tmp_path / "whole", 64)) == {"exact", "short"}
    assert "has 202 tokens, more than the 64 of a row" in failures(tmp_path / "whole")["long"]
    summary = pack(tmp_path / "images", tmp_path / "cut", cut=True)
    assert (summary.documents, summary.pieces, summary.failures) == (3, 6, 0)
    expected = VOCABULARY.join([item(IMAGE, long)]).tolist()
    pieces = []
    for row in rows_of(tmp_path / "cut"):
        for key, start, end in zip(row["keys"], row["cu_seqlens"], row["cu_seqlens"][1:], strict=False):
            pieces += [row["input_ids"][start:end]] if key == "long" else []
    assert sorted(map(len, pieces)) == [10, 64, 64, 64]
    assert sorted(pieces) == sorted(expected[start : start + 64] for start in range(0, 202, 64))


def test_text_that_holds_a_marker_fails(tmp_path: Path) -> None:
    text = bytes_tokenizer()
    VOCABULARY.extend(text)
    lines(tmp_path / "text.jsonl", [{"text": "good"}, {"text": "an <image> of"}, {"text": "<image_00007>"}, {"text": ""}])
    summary = pack(tmp_path / "text.jsonl", tmp_path / "out", text=text)
    reasons = failures(tmp_path / "out")
    assert summary.documents == 1 and len(reasons) == 3
    assert all("'image'" in reasons[f"text.jsonl#{number}"] for number in (2, 3))
    assert reasons["text.jsonl#4"] == "it is empty"
    with pytest.raises(ArgumentError, match=r"the template cannot be used.*'sound'"):
        pack(tmp_path / "text.jsonl", tmp_path / "marks", text=text, template="{text}<sound>", loss=["text"])


def test_items_that_do_not_decode_fail(tmp_path: Path) -> None:
    whole = Spec("pictures", "toy", "bytes", 300, 4, fingerprint="00000000000000aa", max_tokens=3)
    vocabulary = zoo.Vocabulary.build(0, {"image": whole})
    write_items(tmp_path / "images", IMAGE, {"a": [1, 2, 3], "b": [1, 2], "c": [4, 5, 6]})
    pack(tmp_path / "images", tmp_path / "out", vocabulary=vocabulary)
    assert set(documents_of(tmp_path / "out", 64)) == {"a", "c"}
    assert failures(tmp_path / "out") == {"b": "an item of 'image' has 2 tokens, not 3"}


def test_tokenizers_of_transformers_do_as_well(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    lines(tmp_path / "text.jsonl", [{"text": f"text {number}"} for number in range(5)])
    pack(tmp_path / "text.jsonl", tmp_path / "one")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=TEXT)
    pack(tmp_path / "text.jsonl", tmp_path / "two", text=fast)
    TEXT.save(str(tmp_path / "tokenizer.json"))
    pack(tmp_path / "text.jsonl", tmp_path / "three", text=tmp_path / "tokenizer.json")
    assert documents_of(tmp_path / "one", 64) == documents_of(tmp_path / "two", 64) == documents_of(tmp_path / "three", 64)


# ---- files


def read_megatron(path: Path) -> list[list[list[int]]]:
    """Documents of sequences; written from the layout alone."""
    index, ids = (path.with_name(path.name + suffix).read_bytes() for suffix in (".idx", ".bin"))
    version, kind, count, bounds = struct.unpack_from("<9xQBQQ", index)
    assert (index[:9], version) == (b"MMIDIDX\x00\x00", 1)
    lengths = np.frombuffer(index, "<i4", count, 34)
    pointers = np.frombuffer(index, "<i8", count, 34 + 4 * count)
    documents = np.frombuffer(index, "<i8", bounds, 34 + 12 * count)
    assert len(index) == 34 + 12 * count + 8 * bounds
    values = {1: "u1", 4: "<i4", 8: "<u2"}[kind]
    sequences = [np.frombuffer(ids, values, n, at).tolist() for n, at in zip(lengths, pointers, strict=True)]
    return [sequences[first:last] for first, last in pairwise(documents)]


def test_megatron_holds_the_same_rows(tmp_path: Path) -> None:
    write_items(tmp_path / "images", IMAGE, {str(number): ids for number, ids in enumerate(made(40, 300))})
    lines(tmp_path / "text.jsonl", [{"text": "words", "key": str(number)} for number in range(40)])
    sources = [tmp_path / "images", tmp_path / "text.jsonl"]
    options = {"template": "{text}{image}", "loss": ["image"], "unit_rows": 6}
    pack(sources, tmp_path / "parquet", **options)
    pack(sources, tmp_path / "megatron", form="megatron", **options)
    units = sorted(path.stem for path in (tmp_path / "parquet").glob("part-*.parquet"))
    assert len(units) > 1
    assert sorted(path.stem for path in (tmp_path / "megatron").glob("*.bin")) == sorted(
        [*units, *(f"{unit}-loss_mask" for unit in units)]
    )
    for unit in units:
        rows = pq.read_table(tmp_path / "parquet" / f"{unit}.parquet").to_pylist()
        for name, stem in (("input_ids", unit), ("loss_mask", f"{unit}-loss_mask")):
            for row, sequences in zip(rows, read_megatron(tmp_path / "megatron" / stem), strict=True):
                assert [one for sequence in sequences for one in sequence] == row[name]
                assert np.cumsum([0, *map(len, sequences)]).tolist() == row["cu_seqlens"]


@pytest.mark.parametrize("form", ["parquet", "megatron"])
def test_an_interrupted_call_goes_on(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_items(tmp_path / "images", IMAGE, {str(number): ids for number, ids in enumerate(made(60, 300))})
    options = {"unit_rows": 4, "form": form}
    units = pack(tmp_path / "images", tmp_path / "whole", **options).units
    expected = files(tmp_path / "whole")
    assert units > 2
    real, left = Store.write, [0]

    def failing(store: Store, name: str, content: bytes) -> None:
        if not name.startswith("_plan/.lock") and not name.endswith("lock"):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        real(store, name, content)

    monkeypatch.setattr(Store, "write", failing)
    done = 0
    for _ in range(40):
        left[0] = 2 if form == "parquet" else 5
        try:
            summary = pack(tmp_path / "images", tmp_path / "out", **options)
        except KeyboardInterrupt:
            done += 1
            continue
        break
    assert done > 1 and summary.units == units
    assert files(tmp_path / "out") == expected
    # What is lost is made again, and nothing else.
    monkeypatch.setattr(Store, "write", real)
    next((tmp_path / "out").glob("part-000001.*")).unlink()
    again = pack(tmp_path / "images", tmp_path / "out", **options)
    assert 0 < again.packed < again.documents and files(tmp_path / "out") == expected
    assert pack(tmp_path / "images", tmp_path / "out", **options).packed == 0


def test_other_settings_are_refused(tmp_path: Path) -> None:
    write_items(tmp_path / "images", IMAGE, {"a": [1], "b": [2]})
    lines(tmp_path / "text.jsonl", [{"text": "a"}])
    sources = [tmp_path / "images", tmp_path / "text.jsonl"]
    pack(sources, tmp_path / "out")
    before = files(tmp_path / "out")
    text = bytes_tokenizer()
    text.add_tokens(["ab"])
    for changes, what in (
        ({"length": 32}, "length \\(64, now 32\\)"),
        ({"pad": 1}, "pad"),
        ({"cut": True}, "cut"),
        ({"form": "megatron"}, "form"),
        ({"loss": ["text"]}, "loss"),
        ({"text": text}, "the text tokenizer"),
        ({"vocabulary": zoo.Vocabulary.build(TEXT, {"image": IMAGE})}, "the vocabulary"),
        ({"new": True}, "is not empty"),
    ):
        with pytest.raises(ArgumentError, match=what):
            pack(sources, tmp_path / "out", **changes)
    with pytest.raises(ArgumentError, match="the text tokenizer, the sources"):
        pack(sources[:1], tmp_path / "out")
    lines(tmp_path / "text.jsonl", [{"text": "other"}])
    with pytest.raises(ArgumentError, match="the sources"):
        pack(sources, tmp_path / "out")
    assert files(tmp_path / "out") == before
    (tmp_path / "out" / "_plan" / "pack.json").write_text("{")
    with pytest.raises(FormatError, match=r"pack\.json is damaged"):
        pack(sources, tmp_path / "out")


def test_bad_input(tmp_path: Path) -> None:
    images = write_items(tmp_path / "images", IMAGE, {"a": [1], "b": [2]}, ["x", "y"])
    texts = lines(tmp_path / "text.jsonl", [{"text": "a"}])
    other = write_items(tmp_path / "other", Spec("other", "toy", "bytes", 300, 4, fingerprint="00000000000000cc"), {"a": [1]})
    (tmp_path / "words.txt").write_text("words")
    (tmp_path / "empty.jsonl").write_text("")
    for sources, changes, what in (
        (tmp_path / "missing", {}, "missing does not exist"),
        (tmp_path / "words.txt", {}, "neither a folder of tokens"),
        (tmp_path, {}, "holds no parts"),
        ([], {}, "nothing to pack"),
        (tmp_path / "empty.jsonl", {}, "the sources are empty"),
        ([images, images], {}, "both hold 'image'"),
        (images, {"template": "{image}{title}"}, "names 'title'.*caption"),
        (images, {"template": "{image}{number}", "text": TEXT}, "'number' is no text but int64"),
        (images, {"template": "{image}{sound}"}, "no source holds"),
        ([images, texts], {"template": "{text}"}, "where the tokens of 'image' go"),
        (images, {"template": "{image}", "loss": ["caption"]}, "'caption' to learn"),
        (images, {"loss": ["caption"]}, "'caption' to learn"),
        (texts, {"text": None}, "pass the text tokenizer"),
        (texts, {"text": tmp_path / "nothing.json"}, "nothing.json cannot be read"),
        (images, {"text": TEXT}, "no text to pack"),
        (images, {"pad": VOCABULARY.size}, "padding"),
        (images, {"length": 0}, "rows have 1"),
        (images, {"form": "csv"}, "parquet or megatron"),
        (images, {"unit_rows": 0}, "a unit has"),
    ):
        with pytest.raises(ArgumentError, match=what):
            pack(sources, tmp_path / "out", **changes)
        assert not (tmp_path / "out").exists(), what
    with pytest.raises(MismatchError, match="tokens of other have no place"):
        pack(other, tmp_path / "out")
    with pytest.raises(ArgumentError, match="holds other things"):
        pack(texts, images)
    with pytest.raises(FormatError):
        pack(images, tmp_path / "out", vocabulary=tmp_path / "words.txt")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo import cli

    images = write_items(tmp_path / "images", IMAGE, {"a": [1], "b": list(range(100))}, ["x", "y"])
    VOCABULARY.save(tmp_path / "vocabulary.json")
    TEXT.save(str(tmp_path / "tokenizer.json"))
    command = ["zoo", "pack", str(images), "-o", str(tmp_path / "out"), "--vocabulary", str(tmp_path / "vocabulary.json")]
    command += ["--length", "64", "--text", str(tmp_path / "tokenizer.json"), "--template", "{caption}{image}"]

    def run(*more: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", [*command, *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    code, _, notes = run()
    assert code == 1 and "1 documents, 4 tokens in 1 rows of 64, 93.75% padding" in notes and "1 of 2 documents failed" in notes
    code, out, _ = run("--allow-failures", "0.5", "--json")
    assert code == 0 and json.loads(out)["documents"] == 1
    code, _, notes = run("--pad", "7")
    assert code == 2 and "pad (0, now 7)" in notes

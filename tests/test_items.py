"""Items as programs and data sets hand them over: every form gives the ids that the plain one gives."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import zoo
from zoo import media
from zoo.media.items import as_array, audio_item, file_item, image_item, item_list, shape_item
from zoo.tokenizer.base import _bare_sequences
from zoo.tokens import Tokens

RATE = 16_000
RNG = np.random.default_rng(5)
SOUND = (RNG.uniform(-0.5, 0.5, 400)).astype(np.float32)
LEVELS = RNG.integers(0, 256, (6, 5, 3)).astype(np.uint8)
POINTS = RNG.normal(size=(80, 3))


def wav() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, SOUND, RATE, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(LEVELS).save(buffer, format="PNG")
    return buffer.getvalue()


class Arrow:
    """Whatever offers ``__array__``, as arrays of other libraries do."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.asarray(self.array, dtype)


class Decoder:
    """What a data set's AudioDecoder offers."""

    def get_all_samples(self) -> Any:
        return SimpleNamespace(data=torch.from_numpy(SOUND)[None], sample_rate=float(RATE), pts_seconds=0.0)


SOUNDS = {
    "pair": (SOUND, RATE),
    "list": (SOUND.tolist(), RATE),
    "tensor": (torch.from_numpy(SOUND), RATE),
    "half big-endian": (SOUND.astype(">f4"), RATE),
    "big-endian double": (SOUND.astype(">f8"), RATE),
    "negative strides": (SOUND[::-1].copy()[::-1], RATE),
    "not contiguous": (np.stack([SOUND, SOUND], axis=1)[:, 0], RATE),
    "array protocol": (Arrow(SOUND), RATE),
    "float rate": (SOUND, 16_000.0),
    "numpy rate": (SOUND, np.int32(RATE)),
    "tensor rate": (SOUND, torch.tensor(RATE)),
    "mapping": {"array": SOUND, "sampling_rate": RATE, "path": None},
    "mapping with a path": {"array": SOUND.tolist(), "sampling_rate": RATE, "path": "gone.wav"},
    "encoded": {"bytes": wav(), "path": "gone.wav"},
    "encoded without path": {"bytes": wav(), "path": None},
    "samples": SimpleNamespace(data=torch.from_numpy(SOUND)[None], sample_rate=RATE),
    "decoder": Decoder(),
    "file object": io.BytesIO(wav()),
    "memoryview": memoryview(wav()),
    "objects": (SOUND.astype(object), RATE),
}


@pytest.mark.parametrize("name", SOUNDS)
def test_sounds(name: str) -> None:
    audio = media.read_audio(SOUNDS[name])
    assert (audio.sample_rate, audio.waveform.dtype) == (RATE, torch.float32)
    assert torch.equal(audio.waveform, torch.from_numpy(SOUND)[None])


def test_paths_of_mappings(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(wav())
    assert torch.equal(media.read_audio({"bytes": None, "path": str(path)}).waveform[0], torch.from_numpy(SOUND))
    with path.open("rb") as file:
        file.seek(0)
        assert torch.equal(media.read_audio(file).waveform[0], torch.from_numpy(SOUND))
        assert file.tell() == 0 and not file.closed


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.int8, [-128, 0, 64], [-1.0, 0.0, 0.5]),
        (np.uint8, [0, 128, 192], [-1.0, 0.0, 0.5]),
        (np.int16, [-32768, 0, 16384], [-1.0, 0.0, 0.5]),
        (np.uint16, [0, 32768, 49152], [-1.0, 0.0, 0.5]),
        (np.int32, [-(2**31), 0, 2**30], [-1.0, 0.0, 0.5]),
        (np.uint32, [0, 2**31, 3 * 2**30], [-1.0, 0.0, 0.5]),
    ],
)
def test_integers_are_divided_by_half_their_range(dtype: Any, values: list[int], expected: list[float]) -> None:
    array = np.array(values, dtype)
    for form in (array, array.astype(array.dtype.newbyteorder(">")), torch.from_numpy(array)):
        assert media.read_audio((form, RATE)).waveform.tolist() == [expected]
    frozen = array.copy()
    frozen.flags.writeable = False
    assert media.read_audio((frozen, RATE)).waveform.tolist() == [expected]


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (None, "not NoneType"),
        ("a cat", "a cat does not exist"),
        (object(), "not object"),
        (b"", "empty"),
        ({}, '"array" or "bytes" or "path", this one has nothing'),
        ({"bytes": None, "path": None}, "this one has nothing"),
        ({"audio": [0.0]}, "this one has audio"),
        ({"array": SOUND}, "needs its sample rate"),
        ({"array": SOUND, "sampling_rate": None}, "needs its sample rate"),
        ({"bytes": "text", "path": None}, '"bytes" must be bytes, not str'),
        ((SOUND, 0), "positive whole number, not 0"),
        ((SOUND, -1), "positive whole number, not -1"),
        ((SOUND, 16_000.5), r"positive whole number, not 16000\.5"),
        ((SOUND, float("nan")), "positive whole number, not nan"),
        ((SOUND, float("inf")), "positive whole number, not inf"),
        ((SOUND, None), "needs its sample rate"),
        ((SOUND, True), "positive whole number"),
        ((SOUND, "16000"), "positive whole number"),
        ((RATE, SOUND), "audio: .*not int"),
        ((SOUND, RATE, 1), "not 3 values"),
        ((SOUND.astype(np.int64), RATE), r"not torch\.int64: convert .*astype\(np\.int16\)"),
        ((SOUND.astype(np.uint64), RATE), r"not torch\.uint64"),
        ((SOUND > 0, RATE), "not bool"),
        ((SOUND.astype(complex), RATE), "not complex128"),
        ((SOUND * 32_768, RATE), "reach 1.*divide those of 16-bit audio by 32768"),
        ((np.full(9, 9.0), RATE), r"in \[-1, 1\].*reach 9"),
        ((np.zeros((20, 4_000), np.float32), RATE), r"20 channels of 4000 samples.*\[batch, 1, samples\]"),
        ((np.zeros((2, 1, 1, 9), np.float32), RATE), r"not of shape \(2, 1, 1, 9\); a batch is a list"),
        ((np.zeros((0,), np.float32), RATE), "empty"),
        ((np.array(["a", "b"]), RATE), "must be floating point or integers"),
        ((np.array(["a", None], object), RATE), "array of objects"),
        ((np.array([0.0, np.nan], np.float32), RATE), "NaN"),
        (([[0.0, 1.0], [0.0]], RATE), "cannot read the list"),
        (io.StringIO("text"), 'mode "rb"'),
        (io.BytesIO(b""), "empty"),
    ],
)
def test_what_is_no_sound(item: Any, reason: str) -> None:
    with pytest.raises(zoo.InputError, match=reason):
        media.read_audio(item)


def test_open_files_are_read_from_where_they_stand() -> None:
    file = io.BytesIO(b"rest" + wav())
    file.seek(4)
    assert audio_item(file) == wav() and file.tell() == 4
    file.seek(0, io.SEEK_END)
    with pytest.raises(zoo.InputError, match=r"at its end, at byte \d+: call seek\(0\)"):
        audio_item(file)
    file.close()
    with pytest.raises(zoo.InputError, match=r"cannot be read: .*closed"):
        audio_item(file)


PIXELS = torch.from_numpy(LEVELS).permute(2, 0, 1) / 127.5 - 1
IMAGES = {
    "PIL": Image.fromarray(LEVELS),
    "array": LEVELS,
    "negative strides": LEVELS[::-1].copy()[::-1],
    "read-only": np.frombuffer(LEVELS.tobytes(), np.uint8).reshape(LEVELS.shape),
    "not contiguous": np.concatenate([LEVELS, LEVELS], axis=1)[:, :5],
    "array protocol": Arrow(LEVELS),
    "tensor": torch.from_numpy(LEVELS).permute(2, 0, 1),
    "encoded": {"bytes": png(), "path": None},
    "file object": io.BytesIO(png()),
    "bytes": png(),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str) -> None:
    pixels = media.prepare_image(IMAGES[name], (6, 5)).pixels
    assert (pixels - PIXELS).abs().max() < 1e-6


def test_wide_and_foreign_pixels() -> None:
    levels = LEVELS.astype(np.uint16) * 257
    for array in (levels, levels.astype(">u2"), (levels / 32767.5 - 1).astype(">f8")):
        assert (media.prepare_image(array, (6, 5)).pixels - PIXELS).abs().max() < 1e-6


@pytest.mark.parametrize(
    "item",
    [None, {}, {"bytes": None, "path": None}, {"image": LEVELS}, object(), 3, [[0.0]], (LEVELS, 1), io.StringIO("x"), "a cat"],
)
def test_what_is_no_image_or_shape(item: Any) -> None:
    with pytest.raises(zoo.InputError):
        media.prepare_image(item, (6, 5))
    with pytest.raises(zoo.InputError):
        media.read_shape(item)


def test_shapes() -> None:
    normals = POINTS / np.linalg.norm(POINTS, axis=1, keepdims=True)
    plain = media.read_shape((POINTS, normals))
    for item in (
        {"points": POINTS, "normals": normals},
        (POINTS.astype(">f8"), normals[::-1].copy()[::-1]),
        (Arrow(POINTS), torch.from_numpy(normals)),
        np.concatenate([POINTS, normals], axis=1).astype(">f8"),
    ):
        found = media.read_shape(item)
        assert np.array_equal(found.points, plain.points) and np.array_equal(found.normals, plain.normals)
    assert np.array_equal(media.read_shape({"points": POINTS, "normals": None}).points, POINTS)
    content = b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"
    for item in (io.BytesIO(content), {"bytes": content, "path": "gone.off"}, memoryview(content)):
        assert shape_item(item) == content


def test_files() -> None:
    for item in (b"abc", io.BytesIO(b"abc"), {"bytes": b"abc", "path": None}, memoryview(b"abc")):
        assert bytes(file_item(item)) == b"abc"
    for item in ([1, 2], np.array([1, 2], ">i4"), torch.tensor([1, 2]), Arrow(np.array([1, 2]))):
        assert list(np.asarray(file_item(item))) == [1, 2]
    for item in (None, {}, 3.5, object()):
        with pytest.raises(zoo.InputError):
            file_item(item)


# ----------------------------------------------------------------------------------------------------------------- batches


class Column(Sequence):
    """What a data set's column offers."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return [b"a", b"b"][index]


def test_batches() -> None:
    objects = np.empty(2, object)
    objects[:] = [SOUND, SOUND[:9]]
    assert [len(item) for item in item_list(objects, 3)] == [400, 9]
    assert item_list(Column(), 3) == [b"a", b"b"]
    assert len(item_list(np.zeros((4, 1, 9)), 3)) == 4 and len(item_list(np.zeros((4, 9)), 3)) == 1
    assert item_list([0.5, 1.0], 3) == [[0.5, 1.0]] and len(item_list([np.float32(1), np.float32(2)], 3)) == 1
    for single in ("a.wav", b"a", (SOUND, RATE), {"bytes": b"a"}, None, Path("a.wav")):
        assert item_list(single, 3) == [single]
    for empty in ([], np.empty(0, object), np.zeros((0, 1, 9)), torch.zeros(0, 1, 9)):
        with pytest.raises(zoo.InputError, match="nothing to encode"):
            item_list(empty, 3)


def test_arrow_and_pandas() -> None:
    pa = pytest.importorskip("pyarrow")
    assert item_list(pa.array([b"a", b"bc"]), 3) == [b"a", b"bc"]
    rows = item_list(pa.array([SOUND.tolist(), SOUND[:9].tolist()], pa.list_(pa.float32())), 3)
    assert np.array_equal(rows[1], SOUND[:9])
    structs = list(pa.array([{"bytes": b"a", "path": None}, {"bytes": None, "path": "b"}]))
    assert [file_item(item) for item in structs] == [b"a", "b"]
    assert np.array_equal(audio_item((pa.array(SOUND), RATE))[0][0], SOUND)
    [scalar] = list(pa.array([SOUND.tolist()], pa.list_(pa.float32())))
    assert np.array_equal(audio_item(scalar, RATE)[0][0], SOUND)
    with pytest.raises(zoo.InputError, match="null"):
        file_item(pa.scalar(None, pa.binary()))
    assert [row.tolist() for row in _bare_sequences(pa.array([[1, 2], [3]]))] == [[1, 2], [3]]
    assert [row.tolist() for row in _bare_sequences(pa.chunked_array([[[1, 2]], [[3], []]]))] == [[1, 2], [3], []]
    assert [row.tolist() for row in _bare_sequences(list(pa.array([[1, 2], [3]], pa.list_(pa.int16()))))] == [[1, 2], [3]]
    assert [row.tolist() for row in _bare_sequences(pa.array([1, 2, 3], pa.uint8()))] == [[1, 2, 3]]
    with pytest.raises(zoo.InputError, match=r"item 0: .*integers"):
        _bare_sequences(pa.array([[1, None]]))
    pd = pytest.importorskip("pandas")
    assert item_list(pd.Series([b"a", b"bc"]), 3) == [b"a", b"bc"]
    assert np.array_equal(audio_item((pd.Series(SOUND), RATE))[0][0], SOUND)
    assert [row.tolist() for row in _bare_sequences(pd.Series([[1, 2], [3]]))] == [[1, 2], [3]]


def test_data_sets(tmp_path: Path) -> None:
    """Real items of Hugging Face's library, decoded where it can decode them."""
    datasets = pytest.importorskip("datasets")
    rows = {"audio": [{"bytes": wav(), "path": None}] * 2, "image": [{"bytes": png(), "path": None}] * 2}
    # Cast, as a file of such rows is: to encode them, the library wants torchcodec, though they are encoded.
    data = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(decode=False))
    data = data.cast_column("image", datasets.Image())
    assert len(item_list(data["audio"], 3)) == len(item_list(data[:]["image"], 3)) == 2
    assert torch.equal(media.read_audio(data[0]["audio"]).waveform[0], torch.from_numpy(SOUND))
    assert (media.prepare_image(data[0]["image"], (6, 5)).pixels - PIXELS).abs().max() < 1e-6
    assert (media.prepare_image(data.with_format("numpy")[0]["image"], (6, 5)).pixels - PIXELS).abs().max() < 1e-6
    try:
        decoder = data.cast_column("audio", datasets.Audio())[0]["audio"]
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"torchcodec cannot be used here: {error}")
    audio = media.read_audio(decoder)
    assert audio.sample_rate == RATE and torch.equal(audio.waveform[0], torch.from_numpy(SOUND))


# --------------------------------------------------------------------------------------------------------------- ids


def tokens_of(sequences: Any, **changes: Any) -> Tokens:
    return Tokens.from_sequences(sequences, **({"tokenizer": "t", "fingerprint": "", "vocab_size": 1000} | changes))


def test_sequences_of_every_type() -> None:
    rows = [[1, 200], [3]]
    for kind in (np.uint8, np.uint16, np.uint32, np.uint64, np.int16, np.int32, np.int64, ">u2", ">i8"):
        arrays = [np.array(row, kind) for row in rows]
        assert tokens_of(arrays).tolist() == rows
        assert [row.tolist() for row in _bare_sequences(arrays)] == rows
    for kind in (torch.uint8, torch.uint16, torch.uint32, torch.int16, torch.int32, torch.int64):
        assert tokens_of([torch.tensor(row, dtype=kind) for row in rows]).tolist() == rows
    assert tokens_of(rows).tolist() == tokens_of([tuple(row) for row in rows]).tolist() == rows
    assert tokens_of([[], range(3), np.array([])]).tolist() == [[], [0, 1, 2], []]
    mixed = tokens_of([torch.tensor([1], dtype=torch.uint8), np.array([999], np.uint16)])
    assert mixed.ids.dtype == torch.int64 and mixed.tolist() == [[1], [999]]
    frozen = np.arange(3)
    frozen.flags.writeable = False
    tokens = tokens_of([frozen[::-1]])
    assert tokens.tolist() == [[2, 1, 0]]


@pytest.mark.parametrize(
    "row", [[0.5], "text", None, [True], [[1]], [1, None], np.array([2**63], np.uint64), torch.tensor([0.5]), 3, {"a": 1}]
)
def test_sequences_that_are_none(row: Any) -> None:
    with pytest.raises(zoo.InputError, match="item 1: "):
        tokens_of([[1], row])
    with pytest.raises(zoo.InputError, match="item 1: "):
        _bare_sequences([[1], row])


def test_ids_to_decode() -> None:
    objects = np.empty(2, object)
    objects[:] = [np.array([1, 2]), [3]]
    for ids in (
        [[1, 2], [3]],
        ([1, 2], [3]),
        [np.array([1, 2]), np.array([3])],
        [torch.tensor([1, 2]), np.array([3])],
        np.array([[1, 2], [3, -1]]),
        np.array([[1, 2], [3, -1]], ">i4")[::-1][::-1],
        torch.tensor([[1, 2], [3, -1]], dtype=torch.int32),
        objects,
        Arrow(np.array([[1, 2], [3, -1]])),
    ):
        assert [row.tolist() for row in _bare_sequences(ids)] == [[1, 2], [3]]
    for single in ([1, 2], np.array([1, 2]), torch.tensor([1, 2]), [np.int64(1), 2], range(1, 3)):
        assert [row.tolist() for row in _bare_sequences(single)] == [[1, 2]]
    for empty, expected in (
        (torch.zeros(1, 0), [[]]),
        (np.zeros((2, 0)), [[], []]),
        ([], []),
        (torch.zeros(0, 5), []),
        ([[]], [[]]),
    ):
        assert [row.tolist() for row in _bare_sequences(empty)] == expected
    for wrong in (None, "text", 3, 0.5, np.zeros((1, 1)), torch.zeros(2, 2, 2, dtype=torch.int64), {"ids": [1]}):
        with pytest.raises(zoo.InputError, match="ids must be"):
            _bare_sequences(wrong)


def test_indexing() -> None:
    """Ids, lengths and meta are chosen together, whatever the index is made of."""
    rows = [[1], [2, 2], [3, 3, 3]]
    tokens = tokens_of(rows, meta=[{"samples": i, "sample_rate": 1} for i in range(3)])
    mask = [True, False, True]
    for index, expected in (
        (np.int64(1), [1]),
        (torch.tensor(1), [1]),
        (np.array(2), [2]),
        (-1, [2]),
        (np.uint8(0), [0]),
        (mask, [0, 2]),
        (np.array(mask), [0, 2]),
        (torch.tensor(mask), [0, 2]),
        (tuple(mask), [0, 2]),
        ([False] * 3, []),
        (slice(None, None, -1), [2, 1, 0]),
        (slice(1, None), [1, 2]),
        ([2, 0, 2], [2, 0, 2]),
        ([-1, -3], [2, 0]),
        (np.array([2, 0]), [2, 0]),
        (torch.tensor([2, 0]), [2, 0]),
        (range(2), [0, 1]),
        ([], []),
        (np.array([], np.int64), []),
    ):
        for batch in (tokens, pickle.loads(pickle.dumps(tokens)), tokens_padded(tokens)):
            chosen = batch[index]
            assert chosen.tolist() == [rows[i] for i in expected], index
            assert [item["samples"] for item in chosen.meta] == expected
            assert chosen.lengths.tolist() == [len(rows[i]) for i in expected]
            assert chosen.ids.shape == (len(expected), max([len(rows[i]) for i in expected], default=0))
    for index in (
        3,
        -4,
        [0, 3],
        [True],
        [True] * 4,
        np.array([True]),
        torch.ones(2, dtype=torch.bool),
        0.5,
        "0",
        None,
        [[0]],
        [0.0],
    ):
        with pytest.raises(zoo.InputError) as caught:
            tokens[index]
        assert isinstance(caught.value, IndexError)


def tokens_padded(tokens: Tokens) -> Tokens:
    """The same tokens, made of padded ids."""
    return Tokens(tokens[:].ids, tokens.lengths, tokens.tokenizer, tokens.fingerprint, tokens.vocab_size, tokens.meta)


def test_changed_ids_are_the_batch() -> None:
    tokens = tokens_of([[1, 2], [3]])
    tokens.ids[0, 0] = 7
    assert tokens.tolist() == [[7, 2], [3]] and tokens[0].tolist() == [[7, 2]]
    assert Tokens.from_bytes(tokens.to_bytes()).tolist() == [[7, 2], [3]]
    part = tokens[0]
    part.ids[0, 0] = 8
    assert tokens.tolist() == [[7, 2], [3]]


def test_meta_of_every_item_or_none() -> None:
    with pytest.raises(zoo.InputError, match="meta of 1 items does not suit 2 sequences"):
        tokens_of([[1], [2]], meta=[{"samples": 1, "sample_rate": 1}])


def test_arrays_of_other_libraries() -> None:
    assert as_array(Arrow(np.arange(3, dtype=">i2"))).dtype == np.int16
    for wrong in ("text", {}, 3, None, object()):
        with pytest.raises(zoo.InputError):
            as_array(wrong)
    assert image_item(Arrow(LEVELS)).shape == LEVELS.shape

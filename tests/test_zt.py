"""The .zt format: frozen files, and a second reader written from its page alone."""

from __future__ import annotations

import json
import random
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

import zoo
from fuzz import targets_zt
from zoo import media, zt
from zoo.tokens import Tokens

ROOT = Path(__file__).parent.parent
VECTORS = Path(__file__).parent / "golden" / "zt"
CORPUS = Path(__file__).parent / "fuzz" / "corpus" / "zt"
EXPECTED: dict[str, dict[str, Any]] = json.loads((VECTORS / "expected.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------- a second implementation, from cards/zt.md alone


def second_reader(content: bytes) -> dict[str, Any]:
    """Read a .zt file bit by bit with nothing but the standard library."""
    assert content[:3] == b"\x89zt" and content[3] & 15 in (1, 2, 3)
    assert struct.unpack("<I", content[-4:])[0] == zlib.crc32(content[:-4])
    position = 4

    def take(size: int) -> bytes:
        nonlocal position
        position += size
        assert position <= len(content) - 4
        return content[position - size : position]

    def count() -> int:
        value = shift = 0
        while True:
            byte = take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def rate() -> int:
        value = count()
        return (value - 1) // 2 if value % 2 else value // 2 * 25

    def fit() -> str:
        return ("crop", "stretch", "pad", "none")[take(1)[0]]

    def number() -> float:
        return struct.unpack("<f", take(4))[0]

    layouts = (
        {},
        {"samples": count, "sample_rate": rate},
        {"width": count, "height": count, "fit": fit},
        dict.fromkeys(("x", "y", "z", "scale"), number),
        {"width": count, "height": count, "fit": fit, "rows": count},
        {"text": count},
        dict.fromkeys(("frames", "fps_num", "fps_den", "width", "height"), count) | {"fit": fit, "rows": count},
    )

    def text() -> str:
        return take(count()).decode()

    name, fingerprint = text(), take(8)
    if content[3] & 15 == 3:
        flags, books = take(1)[0], count()
        sizes = [count()] * books if flags & 1 else [count() for _ in range(books)]
        order = list(range(books)) if flags & 2 else [count() for _ in range(count())]
        placed = [sizes[book] for book in order]
        offsets = [sum(placed[:i]) for i in range(len(order))] if flags & 4 else [count() for _ in order]
        widths = [max(1, (size - 1).bit_length()) for size in placed]
        vocabulary = max(offset + size for offset, size in zip(offsets, placed, strict=True))
    else:
        vocabulary, offsets = count(), [0]
        widths = [take(1)[0] if content[3] & 15 == 2 else max(1, (vocabulary - 1).bit_length())]
    items = count()
    segments = [count() for _ in range(count())] if content[3] & 128 else []
    frames = [count() for _ in range(items)]
    if content[3] >> 4 & 7 == 7:
        kinds = {text(): take(1)[0] for _ in range(count())}
        readers = (count, lambda: struct.unpack("<d", take(8))[0], text, lambda: take(count()))
        meta = []
        for _ in range(items):
            present = "".join(f"{byte:08b}" for byte in take(-(-len(kinds) // 8)))
            meta.append(
                {key: readers[kind]() for (key, kind), flag in zip(kinds.items(), present, strict=False) if flag == "1"}
            )
    else:
        layout = layouts[content[3] >> 4 & 7]
        meta = [{key: read() for key, read in layout.items()} for _ in range(items)] if layout else []
    run = "".join(f"{byte:08b}" for byte in content[position:-4])
    assert -(-sum(frames) * sum(widths) // 8) == len(run) // 8
    ids, bit = [], 0
    for _ in range(sum(frames)):
        for offset, width in zip(offsets, widths, strict=True):
            ids.append(offset + int(run[bit : bit + width], 2))
            bit += width
    lengths = [count * len(widths) for count in frames]
    return {
        "tokenizer": name,
        "fingerprint": fingerprint.hex() if any(fingerprint) else "",
        "vocab_size": vocabulary,
        "ids": [ids[sum(lengths[:i]) : sum(lengths[: i + 1])] for i in range(items)],
        "meta": meta,
        "segments": [sum(segments[: i + 1]) for i in range(len(segments))],
    }


def as_dict(tokens: Tokens) -> dict[str, Any]:
    return {
        "tokenizer": tokens.tokenizer,
        "fingerprint": tokens.fingerprint,
        "vocab_size": tokens.vocab_size,
        "ids": tokens.tolist(),
        "meta": [dict(item) for item in tokens.meta],
        "segments": list(tokens.segments),
    }


def content_of(name: str) -> bytes:
    return (VECTORS / f"{name}.zt").read_bytes()


def test_every_vector_has_its_content() -> None:
    assert {path.stem for path in VECTORS.glob("*.zt")} == set(EXPECTED)
    assert len(EXPECTED) > 50


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_frozen_files(name: str) -> None:
    """They read as recorded, by both readers, and are written again byte for byte."""
    content, expected = content_of(name), EXPECTED[name]
    assert second_reader(content) == expected
    assert as_dict(Tokens.from_bytes(content)) == expected
    made = Tokens.from_sequences(expected["ids"], **{key: value for key, value in expected.items() if key != "ids"})
    assert made.to_bytes() == content
    assert Tokens.from_bytes(memoryview(content)).to_bytes() == Tokens.from_bytes(bytearray(content)).to_bytes() == content


def test_the_page_is_right() -> None:
    """The worked bytes of the page are files, and hold what stands beside them."""
    page = (ROOT / "cards" / "zt.md").read_text(encoding="utf-8")
    files = [
        bytes.fromhex("".join(re.match(r"(?:[0-9A-F]{2} {1,2})+", line)[0] for line in block.splitlines()))
        for block in re.findall(r"^```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    ]
    audio, octets, frames = map(as_dict, map(Tokens.from_bytes, files))
    assert [second_reader(file) for file in files] == [audio, octets, frames]
    assert [Tokens.from_bytes(file).to_bytes() for file in files] == files
    assert frames["ids"] == [[3, 9, 12, 16, 19, 7, 8, 13, 17, 18]] and frames["meta"] == [{"fps": 29.5, "frames": 2}]
    assert audio["ids"] == [[5, 1023, 0, 77], [300]]
    assert audio["meta"] == [{"samples": 1280, "sample_rate": 24_000}, {"samples": 320, "sample_rate": 8_001}]
    assert (audio["tokenizer"], audio["fingerprint"], audio["vocab_size"]) == ("wav-75", "0011223344556677", 1024)
    assert (bytes(octets["ids"][0]), octets["tokenizer"], octets["fingerprint"]) == (b"zoo", "bytes", "")


def test_fits_are_those_of_images() -> None:
    assert zt.FITS == media.FITS


def test_the_format_needs_no_torch() -> None:
    code = "import sys, zoo.zt; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---------------------------------------------------------------------------------------------------------- what is refused


def resealed(content: bytes) -> bytes:
    return content[:-4] + struct.pack("<I", zlib.crc32(content[:-4]))


def tokens_of(ids: list[list[int]], **changes: Any) -> Tokens:
    settings = {"tokenizer": "some", "fingerprint": "0123456789abcdef", "vocab_size": 1000}
    return Tokens.from_sequences(ids, **(settings | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokenizer": "n" * 256}, "256 bytes, more than the 255"),
        ({"tokenizer": "\ud800"}, "UTF-8"),
        ({"fingerprint": "0123"}, "no fingerprint"),
        ({"fingerprint": "0123456789ABCDEF"}, "no fingerprint"),
        ({"fingerprint": "0" * 16}, "no fingerprint"),
        ({"fingerprint": "x" * 16}, "no fingerprint"),
        ({"vocab_size": 0}, "id 3 is outside|1 to 2"),
        ({"vocab_size": 3}, "id 3 is outside the vocabulary of 3"),
        ({"vocab_size": (1 << 32) + 1}, r"1 to 2\^32"),
        ({"segments": (2, 2)}, "segments is empty"),
        ({"segments": (2, 1)}, "-1 cannot be written"),
        ({"meta": [{"samples": 1 << 48, "sample_rate": 1}]}, "item 0: samples of 281474976710656"),
        ({"meta": [{"samples": -1, "sample_rate": 1}]}, "item 0: samples of -1"),
        ({"meta": [{"samples": 1.5, "sample_rate": 1}]}, r"item 0: samples of 1\.5"),
        ({"meta": [{"samples": float("nan"), "sample_rate": 1}]}, "samples"),
        ({"meta": [{"samples": "many", "sample_rate": 1}]}, "samples"),
        ({"meta": [{"samples": 1, "sample_rate": 0}]}, "item 0: sample_rate is 0"),
        ({"meta": [{"samples": 1, "sample_rate": 1 << 47}]}, "cannot be written as a count"),
        ({"meta": [{"x": 0.0, "y": float("nan"), "z": 0.0, "scale": 1.0}]}, "item 0: y of nan"),
        ({"meta": [{"x": 0.0, "y": 0.0, "z": float("inf"), "scale": 1.0}]}, "item 0: z of inf"),
        ({"meta": [{"x": 0.0, "y": 0.0, "z": 0.0, "scale": 1e300}]}, "item 0: scale of 1e"),
        ({"meta": [{"samples": [1]}]}, r"samples of \[1\] cannot be written"),
    ],
)
def test_what_cannot_be_read_is_not_written(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(zoo.FormatError, match=reason):
        tokens_of([[1, 2, 3]], **changes).to_bytes()


def test_ids_below_zero_are_not_written() -> None:
    with pytest.raises(zoo.FormatError, match="id -1 is outside"):
        tokens_of([[1, -1]]).to_bytes()


def test_the_smallest_file() -> None:
    smallest = tokens_of([], tokenizer="", fingerprint="", vocab_size=2)
    assert len(smallest.to_bytes()) == 19
    assert Tokens.from_bytes(smallest.to_bytes()).equal(smallest)


def edited(name: str, old: bytes, new: bytes) -> bytes:
    content = content_of(name)
    assert content.count(old) == 1
    return resealed(content.replace(old, new))


def test_counts_end_below_two_to_the_48() -> None:
    """The largest count is read and written; one more is refused by both."""
    samples = b"\xbf\x0c"  # 1599
    largest = Tokens.from_bytes(edited("v1-audio", samples, b"\xff" * 6 + b"\x3f"))
    assert largest.meta[0]["samples"] == (1 << 48) - 1
    assert Tokens.from_bytes(largest.to_bytes()).equal(largest)
    for beyond, reason in ((b"\x80" * 6 + b"\x40", "out of bounds"), (b"\x80" * 7 + b"\x00", "too long")):
        with pytest.raises(zoo.FormatError, match=reason):
            Tokens.from_bytes(edited("v1-audio", samples, beyond))


def test_numbers_that_are_none() -> None:
    for bits in ("7fc00000", "7f800000", "ff800000", "7f800001"):
        with pytest.raises(zoo.FormatError, match="NaN or infinite"):
            Tokens.from_bytes(edited("v1-shape", struct.pack("<f", 1.25), bytes.fromhex(bits)[::-1]))
    with pytest.raises(zoo.FormatError, match="sample rate in the file is 0"):
        Tokens.from_bytes((CORPUS / "rate-0").read_bytes())


def test_a_fit_is_one_byte() -> None:
    content = tokens_of([[255]], vocab_size=256, meta=[{"width": 5, "height": 6, "fit": "stretch"}]).to_bytes()
    assert content[-8:-4] == b"\x05\x06\x01\xff"
    with pytest.raises(zoo.FormatError, match="fit 129 is not known"):
        Tokens.from_bytes(resealed(content[:-6] + b"\x81\x00\xff" + bytes(4)))


# ------------------------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("path", sorted([*CORPUS.iterdir(), *VECTORS.glob("*.zt")]), ids=lambda path: path.name)
def test_corpus(path: Path) -> None:
    targets_zt.target(path.read_bytes())


def test_damaged_files() -> None:
    """Bytes changed, put in and taken out behind a valid checksum: what loads can be written, anything else is a ZooError."""
    rng = random.Random(7)
    seeds = [path.read_bytes()[:-4] for path in sorted(VECTORS.glob("*.zt"))]
    for _ in range(4_000):
        body = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(3, len(body))
            special = rng.choice([b"", b"\x00", b"\x7f", b"\x80", b"\xff", b"\x80" * 6 + b"\x40", rng.randbytes(3)])
            body[place : place + rng.randint(0, 3)] = special
            if len(body) < 4:
                break
        targets_zt.target(bytes(body) + struct.pack("<I", zlib.crc32(body)))


def test_one_long_item_among_many_empty_ones() -> None:
    """A file of eight kilobytes takes memory for what it holds, and not for a rectangle about it."""
    code = """
import resource, zoo, torch
from zoo.tokens import Tokens
long = Tokens.from_sequences([[1] * 32_000, *[[]] * 4_000], tokenizer="t", fingerprint="", vocab_size=2)
content = long.to_bytes()
assert len(content) < 8_200, len(content)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tokens = Tokens.from_bytes(content)
assert tokens.to_bytes() == content and tokens.equal(long) and len(tokens[3_999].tolist()[0]) == 0
assert Tokens.cat([tokens, tokens.truncate(5)]).lengths[4_001] == 5
assert tokens[1:].lengths.sum() == 0 and tokens.to("cpu").equal(tokens) and sum(map(len, tokens.unpadded())) == 32_000
taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
assert taken < 50, taken
assert tokens.ids.shape == (4_001, 32_000) and tokens.to_bytes() == content
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""Token batches in memory, and .zt files that never lie, leak or run anything."""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import pytest
import torch

import zoo
from zoo import media
from zoo.tokens import Tokens


def batch(lengths: tuple[int, ...] = (5, 0, 9), vocab_size: int = 1000, seed: int = 0, **options: object) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]
    meta = [
        {"samples": 320 * length + 7, "sample_rate": rate}
        for length, rate in zip(lengths, (44_100, 8_001, 24_000), strict=False)
    ]
    settings = {"tokenizer": "some-model", "fingerprint": "0123456789abcdef", "vocab_size": vocab_size, "meta": meta}
    return Tokens.from_sequences(sequences, **(settings | options))


def test_a_single_sequence_is_copied_unless_it_need_not_be() -> None:
    ids = torch.tensor([1, 2, 3])
    settings = {"tokenizer": "mine", "fingerprint": "", "vocab_size": 10}
    copied, shared = Tokens.from_sequences([ids], **settings), Tokens.from_sequences([ids], **settings, copy=False)
    ids[0] = 7
    assert (copied.tolist(), shared.tolist()) == ([[1, 2, 3]], [[7, 2, 3]])


def resealed(content: bytes) -> bytes:
    """A tampered file with a checksum that fits."""
    return content[:-4] + struct.pack("<I", zlib.crc32(content[:-4]))


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 64, 1000, 4096, 65_537, 2**20])
def test_files_give_back_what_was_saved(vocab_size: int, tmp_path: Path) -> None:
    tokens = batch(vocab_size=vocab_size)
    path = tokens.save(tmp_path / "tokens.zt")
    loaded = Tokens.load(path)
    assert loaded.equal(tokens)
    assert (loaded.tokenizer, loaded.meta, loaded.lengths.tolist()) == ("some-model", tokens.meta, [5, 0, 9])
    assert list(tmp_path.iterdir()) == [path]


def test_long_sequences_cross_the_packing_blocks() -> None:
    tokens = batch((200_001, 3, 65_536), vocab_size=4096)
    assert Tokens.from_bytes(tokens.to_bytes()).equal(tokens)


@pytest.mark.parametrize(
    "meta",
    [
        [],
        [{"width": 640, "height": 481, "fit": "crop"}],
        [{"width": 1, "height": 16_384, "fit": "none"}],
        [{"x": 0.5, "y": -2.0, "z": 1.25, "scale": 3.0}],
        [{"samples": 7, "sample_rate": 192_000}],
    ],
)
def test_every_kind_of_meta(meta: list[dict[str, float]]) -> None:
    tokens = batch((4,), meta=meta, segments=(1, 4))
    loaded = Tokens.from_bytes(tokens.to_bytes())
    assert loaded.meta == tuple(meta)
    assert loaded.segments == (1, 4)


def test_overhead_of_a_single_item_with_the_longest_name() -> None:
    """At most 64 bytes, with the longest name of the catalogue and nearly four minutes of audio."""
    longest = max(zoo.list(), key=len)
    tokens = batch((16_383,), vocab_size=4096, tokenizer=longest, meta=[{"samples": 2_097_151, "sample_rate": 44_100}])
    assert len(tokens.to_bytes()) - -(-16_383 * 12 // 8) <= 64


def test_images_remember_how_they_were_fitted() -> None:
    meta = [{"width": 640, "height": 481, "fit": fit} for fit in media.FITS]
    tokens = batch((2, 1, 2, 3), meta=meta)
    assert [item["fit"] for item in Tokens.from_bytes(tokens.to_bytes()).meta] == ["crop", "stretch", "pad", "none"]
    with pytest.raises(zoo.FormatError, match="zoom"):
        batch((2,), meta=[{"width": 1, "height": 1, "fit": "zoom"}]).to_bytes()
    content = bytearray(batch((2,), meta=[{"width": 1, "height": 1, "fit": "pad"}], vocab_size=65_536).to_bytes())
    assert content[-9] == media.FITS.index("pad")  # before two ids of two bytes and the checksum
    content[-9] = 4
    with pytest.raises(zoo.FormatError, match="fit 4 is not known"):
        Tokens.from_bytes(resealed(bytes(content)))


def test_overhead_of_an_image() -> None:
    """Two bytes a token and at most 64 bytes around them, with the longest name that an image tokenizer has."""
    longest = max([*zoo.list(modality="image"), "flextok-d18-d28-in1k"], key=len)
    meta = [{"width": 16_000, "height": 6_250, "fit": "crop"}]
    assert len(batch((256,), vocab_size=64_000, tokenizer=longest, meta=meta).to_bytes()) <= 512 + 64


def test_meta_without_a_place_is_refused() -> None:
    with pytest.raises(zoo.FormatError, match="colour"):
        batch((3,), meta=[{"colour": [1, 2]}]).to_bytes()


def test_truncated_files_are_refused() -> None:
    content = batch().to_bytes()
    for size in range(len(content)):
        with pytest.raises(zoo.FormatError):
            Tokens.from_bytes(content[:size])
        if size > 8:
            with pytest.raises(zoo.FormatError):
                Tokens.from_bytes(resealed(content[:size]))


def test_every_flipped_bit_is_noticed() -> None:
    content = batch((4,)).to_bytes()
    for position in range(len(content) * 8):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(zoo.FormatError):
            Tokens.from_bytes(bytes(damaged))


def test_hostile_files_raise_and_allocate_nothing() -> None:
    """Random tampering behind a valid checksum either loads as sound tokens or raises FormatError, and nothing else."""
    content = batch().to_bytes()
    rng = random.Random(0)
    for _ in range(3_000):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(4, len(damaged) - 4)] = rng.randrange(256)
        try:
            tokens = Tokens.from_bytes(resealed(bytes(damaged)))
        except zoo.FormatError:
            continue
        assert all(0 <= i < tokens.vocab_size for row in tokens.tolist() for i in row)


@pytest.mark.parametrize(
    ("count", "what"), [(b"\xff" * 6 + b"\x7f", "too long|out of bounds"), (b"\xff\xff\xff\x7f", "out of bounds")]
)
def test_absurd_counts(count: bytes, what: str) -> None:
    head = b"\x89zt\x01" + b"\x01a" + bytes(8) + b"\x10"
    with pytest.raises(zoo.FormatError, match=what):
        Tokens.from_bytes(resealed(head + count + b"\x00" * 20))


def test_other_files_and_versions() -> None:
    with pytest.raises(zoo.FormatError, match=r"not a \.zt file"):
        Tokens.from_bytes(b"RIFF" + bytes(40))
    with pytest.raises(zoo.FormatError, match=r"not a \.zt file.*zoo\.Latents\.load"):
        Tokens.from_bytes(zoo.Latents((torch.zeros(2, 3),), "vae", "").to_bytes())
    content = bytearray(batch().to_bytes())
    content[3] = 9
    with pytest.raises(zoo.FormatError, match="version 9"):
        Tokens.from_bytes(bytes(content))


def test_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.zt").write_bytes(b"x")
    with pytest.raises(zoo.FormatError, match=r"broken\.zt"):
        Tokens.load(tmp_path / "broken.zt")


def test_indexing_iterating_and_joining() -> None:
    tokens = batch((5, 2, 9))
    assert len(tokens) == 3
    assert tokens[1].ids.shape == (1, 2)
    assert tokens[-1].tolist() == [tokens.tolist()[2]]
    assert tokens[:2].lengths.tolist() == [5, 2]
    assert tokens[[2, 0]].meta == (tokens.meta[2], tokens.meta[0])
    assert Tokens.cat(list(tokens)).equal(tokens)
    assert tokens.to("cpu").equal(tokens)
    assert "lengths=[5, 2, 9]" in repr(tokens)


def test_truncate_keeps_shorter_items() -> None:
    tokens = batch((5, 2, 9)).truncate(4)
    assert tokens.lengths.tolist() == [4, 2, 4]
    assert tokens.ids.shape == (3, 4)
    with pytest.raises(zoo.InputError):
        tokens.truncate(0)


def test_segments_of_a_prefix() -> None:
    tokens = batch((16, 16), segments=(1, 5, 16))
    assert tokens.truncate(20).segments == tokens.truncate(16).segments == (1, 5, 16)
    assert tokens.truncate(7).segments == (1, 5, 7)
    assert tokens.truncate(5).segments == (1, 5)
    assert tokens.truncate(1).segments == (1,)
    joined = Tokens.cat([tokens.truncate(7), tokens, tokens.truncate(1)])
    assert joined.segments == (1, 5, 16)
    assert joined.lengths.tolist() == [7, 7, 16, 16, 1, 1]
    with pytest.raises(zoo.MismatchError, match="item 1: segments"):
        Tokens.cat([tokens, batch((16,), segments=(2, 16))])
    with pytest.raises(zoo.FormatError, match="-1 cannot be written"):
        batch((4,), segments=(3, 2)).to_bytes()
    with pytest.raises(zoo.FormatError, match="segments is empty"):
        Tokens.from_bytes(batch((4,), segments=(3, 3)).to_bytes())


def test_different_checkpoints_do_not_join() -> None:
    with pytest.raises(zoo.MismatchError, match="item 1"):
        Tokens.cat([batch(), batch(fingerprint="f" * 16)])

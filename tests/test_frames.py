"""Several codebooks in a frame: ids and codes, fewer codebooks, files, vocabularies; on a codec of three at two rates."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
import torch

import zoo
from test_zt import as_dict, second_reader
from toys.two_rates import TwoRates
from zoo.spec import Frame, Spec
from zoo.tokens import Tokens

RVQ = Frame((1024,) * 8)
TWO_RATES = Frame((32, 16, 8), (0, 1, 2, 1, 2))
MIXED = Frame((5, 300), (0, 1, 1))
SHARED = Frame((7, 9), (0, 1), (0, 0))


def random_tokens(frame: Frame, counts: list[int], seed: int = 0) -> tuple[Tokens, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    codes = [
        torch.stack([torch.randint(size, (count,), generator=generator) for size in frame.placed_sizes], dim=1)
        for count in counts
    ]
    return Tokens.from_codes(codes, frame=frame, tokenizer="t", fingerprint="0123456789abcdef"), codes


@pytest.fixture(scope="module")
def codec() -> TwoRates:
    tokenizer = TwoRates().requires_grad_(False)
    tokenizer.fingerprint = tokenizer.compute_fingerprint()
    return tokenizer


def test_ids_say_their_place() -> None:
    assert TWO_RATES.offsets == (0, 32, 48, 56, 72) and TWO_RATES.vocab_size == 80
    assert TWO_RATES.bits == 5 + 4 + 3 + 4 + 3
    assert Frame((2048,) * 8).vocab_size == 16384 and Frame((10,)).vocab_size == 10


@pytest.mark.parametrize(
    "arguments", [((),), ((0,),), ((4, 4), (0, 2)), ((4, 4), (0, 0)), ((4, 4), (), (0,)), ((4, 4), (), (0, -1))]
)
def test_impossible_frames(arguments: tuple) -> None:
    with pytest.raises(zoo.InputError):
        Frame(*arguments)


def test_rates_count_all_codebooks() -> None:
    spec = Spec("mimi", "mimi", "audio", 16384, 512, frame=Frame((2048,) * 8), sample_rate=24_000, hop_length=1920)
    assert (spec.frame_rate, spec.token_rate, spec.bits_per_token, spec.bit_rate) == (12.5, 100, 11, 1100)
    assert (spec.codebooks, spec.ids_per_frame) == (8, 8)
    single = Spec("one", "one", "audio", 4096, 512, sample_rate=24_000, hop_length=320)
    assert (single.frame_rate, single.token_rate, single.bits_per_token, single.bit_rate) == (75, 75, 12, 900)
    with pytest.raises(zoo.InputError, match="the frame has 16384 ids"):
        Spec("mimi", "mimi", "audio", 2048, 512, frame=Frame((2048,) * 8))


@pytest.mark.parametrize("frame", [RVQ, TWO_RATES, MIXED, SHARED], ids=["rvq", "two rates", "mixed", "shared"])
def test_codes_come_back(frame: Frame) -> None:
    tokens, codes = random_tokens(frame, [3, 0, 5])
    assert tokens.lengths.tolist() == [count * frame.ids_per_frame for count in (3, 0, 5)]
    assert tokens.frames().shape == tokens.codes().shape == (3, 5, frame.ids_per_frame)
    for row, own in zip(tokens.codes(), codes, strict=True):
        assert torch.equal(row[: len(own)], own) and (row[len(own) :] == -1).all()
    for place, (offset, size) in enumerate(zip(frame.offsets, frame.placed_sizes, strict=True)):
        ids = tokens.frames()[2, :, place]
        assert (ids >= offset).all() and (ids < offset + size).all()


@pytest.mark.parametrize("frame", [RVQ, TWO_RATES, MIXED, SHARED], ids=["rvq", "two rates", "mixed", "shared"])
@pytest.mark.parametrize("counts", [[3, 0, 5], [1], [], [40_000]], ids=["ragged", "one", "none", "many"])
def test_files(frame: Frame, counts: list[int]) -> None:
    tokens, _ = random_tokens(frame, counts)
    content = tokens.to_bytes()
    assert content[3] & 15 == 3
    again = Tokens.from_bytes(content)
    assert again.equal(tokens) and again.frame == frame and again.to_bytes() == content
    if sum(counts) < 100:
        assert second_reader(content) == as_dict(tokens)
    # Codes take the bits of their codebooks, not those of the whole vocabulary.
    assert len(content) <= 64 + sum(counts) * frame.bits / 8


def test_a_single_codebook_is_written_as_before() -> None:
    tokens = Tokens.from_codes([torch.tensor([[5], [9]])], frame=Frame((10,)), tokenizer="t", fingerprint="")
    assert tokens.frame is None and tokens.to_bytes()[3] & 15 == 1
    assert tokens.equal(Tokens.from_sequences([[5, 9]], tokenizer="t", fingerprint="", vocab_size=10))


def test_fields_that_a_file_names_itself() -> None:
    meta = ({"frames": 3, "fps": 29.97, "title": "ä"}, {"frames": 2}, {})
    tokens = Tokens.from_sequences([[1, 2], [3], [4]], tokenizer="t", fingerprint="", vocab_size=10, meta=meta)
    assert Tokens.from_bytes(tokens.to_bytes()).meta == meta
    for wrong in ({"x": float("nan")}, {"x": [1]}, {"x": None}, {"x": True}, {"x": -1, "y": "\ud800"}):
        with pytest.raises(zoo.FormatError):
            Tokens.from_sequences([[1]], tokenizer="t", fingerprint="", vocab_size=10, meta=[wrong]).to_bytes()


def test_damaged_files_of_frames() -> None:
    meta = [{"frames": 3, "fps": 29.97, "title": "name"}] * 3
    codes = [codes for codes in random_tokens(TWO_RATES, [3, 0, 5])[1]]
    tokens = Tokens.from_codes(codes, frame=TWO_RATES, tokenizer="t", fingerprint="", meta=meta)
    content = tokens.to_bytes()
    for position in range(4, len(content) - 4):
        for flip in (1, 0x80, 0xFF):
            changed = bytearray(content[:-4])
            changed[position] ^= flip
            damaged = bytes(changed) + struct.pack("<I", zlib.crc32(changed))
            try:
                read = Tokens.from_bytes(damaged)
            except zoo.FormatError:
                continue
            # What can be read can be written, and says the same.
            assert Tokens.from_bytes(read.to_bytes()).equal(read)
    for end in range(len(content)):
        with pytest.raises(zoo.FormatError):
            Tokens.from_bytes(content[:end])


def test_fewer_codebooks_keep_their_ids() -> None:
    tokens, codes = random_tokens(TWO_RATES, [2, 4])
    kept = tokens.keep(2)
    assert kept.frame == Frame((32, 16), (0, 1, 1), (0, 32, 56)) and kept.lengths.tolist() == [6, 12]
    assert torch.equal(kept.frames()[1], tokens.frames()[1][:, [0, 1, 3]])
    assert torch.equal(kept.codes()[1], codes[1][:, [0, 1, 3]])
    assert Tokens.from_bytes(kept.to_bytes()).equal(kept)
    assert random_tokens(RVQ, [4])[0].keep(3).vocab_size == 3 * 1024
    for wrong in (0, 4, -1):
        with pytest.raises(zoo.InputError, match="codebooks must lie in"):
            tokens.keep(wrong)


def test_no_cut_through_a_frame() -> None:
    tokens, _ = random_tokens(TWO_RATES, [2, 4])
    assert tokens.truncate(10).lengths.tolist() == [10, 10]
    with pytest.raises(zoo.InputError, match="goes through a frame"):
        tokens.truncate(7)


def test_frames_do_not_mix() -> None:
    tokens, _ = random_tokens(TWO_RATES, [2])
    with pytest.raises(zoo.MismatchError):
        Tokens.cat([tokens, tokens.keep(2)])
    assert not tokens.equal(tokens.keep(2))
    assert Tokens.cat([tokens, tokens]).frame == TWO_RATES and tokens[0].frame == TWO_RATES


def test_more_codebooks_are_nearer(codec: TwoRates) -> None:
    sound = torch.sin(torch.arange(800) / 9)
    tokens = codec.encode([sound, sound[:123]])
    assert tokens.lengths.tolist() == [500, 80]
    errors = []
    for codebooks in (1, 2, 3):
        decoded = codec.decode(tokens.keep(codebooks))
        assert [wave.shape for wave in decoded] == [(1, 800), (1, 123)]
        halves = sound.unflatten(0, (-1, 4)).mean(1).repeat_interleave(4)
        errors.append(float((decoded[0][0] - halves).abs().max()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02


def test_codes_of_a_language_model(codec: TwoRates) -> None:
    tokens = codec.encode(torch.sin(torch.arange(800) / 9))
    bare, codes = codec.decode(tokens.ids), codec.decode(tokens.codes())
    assert torch.equal(bare[0], codes[0]) and torch.equal(bare[0], codec.decode(tokens)[0])
    assert codec.embed(tokens).shape == (1, 500, 1)
    assert torch.equal(codec.embed(tokens.keep(1))[0], codec.embed(tokens)[0, ::5])


def test_ids_of_another_codebook_are_named(codec: TwoRates) -> None:
    tokens = codec.encode([torch.zeros(16), torch.zeros(16)])
    ids = tokens.ids.clone()
    ids[1, 3] = 0
    with pytest.raises(zoo.InputError, match="id 0 at position 3 does not belong to codebook 1") as caught:
        codec.decode(ids)
    assert caught.value.index == 1
    with pytest.raises(zoo.InputError, match="whole number of frames"):
        codec.decode(tokens.ids[:, :7])
    with pytest.raises(zoo.InputError, match="a code is outside its codebook"):
        codec.decode(torch.full((1, 2, 5), 20))
    with pytest.raises(zoo.InputError, match="must be \\[frames, 5\\]"):
        codec.decode(torch.zeros(1, 2, 4, dtype=torch.int64))


def test_vocabulary(codec: TwoRates, tmp_path: Path) -> None:
    vocabulary = zoo.Vocabulary.build(100, {"sound": codec})
    assert vocabulary.size == 182
    tokens = codec.encode([torch.sin(torch.arange(40) / 9)])
    (sequence,) = vocabulary.flatten(tokens)
    (segment,) = vocabulary.split(sequence)
    assert segment.tokens is not None and segment.tokens.frame == codec.spec.frame
    assert torch.equal(codec.decode(segment.tokens)[0], codec.decode(tokens, trim=False)[0])
    (written,) = vocabulary.to_text(tokens)
    (read,) = vocabulary.from_text(written)
    assert isinstance(read, Tokens) and read.tolist() == tokens.tolist()
    swapped = sequence.clone()
    swapped[2], swapped[3] = sequence[3], sequence[2]
    with pytest.raises(zoo.InputError, match="does not belong to codebook"):
        vocabulary.split(swapped)
    with pytest.raises(zoo.InputError, match="whole number of frames"):
        vocabulary.split(torch.cat([sequence[:4], sequence[-1:]]))
    again = zoo.Vocabulary.load(vocabulary.save(tmp_path / "vocabulary.json"))
    assert again == vocabulary
    # A vocabulary of single codebooks is written as before.
    plain = zoo.Vocabulary.build(100, {"sound": Spec("one", "one", "audio", 10, 1, fingerprint="0123456789abcdef")})
    assert "frame" not in plain.save(tmp_path / "plain.json").read_text()


def test_a_plug_in_saves_and_loads(codec: TwoRates, tmp_path: Path) -> None:
    zoo.register_family("toys.two_rates")
    loaded = zoo.load(f"local-dir:{codec.save_pretrained(tmp_path / 'two-rates')}")
    sound = torch.sin(torch.arange(800) / 9)
    assert loaded.encode(sound).equal(codec.encode(sound))

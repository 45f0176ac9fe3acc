"""Packing beside the plain definition: in C and in NumPy, for all widths, rests and blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from zoo.kernels import bitfields, native

MIXED = [(1, 2), (10, 13), (3, 32, 1), (16, 8), (12, 11, 11, 10, 10), (32, 31)]
COUNTS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 72, 100, 1_000)


@pytest.fixture(params=["c", "numpy"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every count goes through C, or through NumPy in small blocks; the size of these."""
    if request.param == "c" and native.library("bitfields.c") is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(bitfields, "MANY", 1 if request.param == "c" else 1 << 40)
    monkeypatch.setattr(bitfields, "BLOCK", 1 << 10)
    return 1 << 10


def by_definition(codes: np.ndarray, bits: Sequence[int]) -> bytes:
    fields = [codes[:, place, None] >> np.arange(width - 1, -1, -1) & 1 for place, width in enumerate(bits)]
    return np.packbits(np.concatenate(fields, axis=1).astype(np.uint8)).tobytes()


def packed(codes: np.ndarray, bits: Sequence[int]) -> np.ndarray:
    """The packed bytes, written into the middle of others that must stay."""
    size = bitfields.packed_bytes(len(codes), bits)
    room = np.full(size + 32, 0xA5, np.uint8)
    bitfields.pack(codes, bits, room[13 : 13 + size])
    assert (room[:13] == 0xA5).all() and (room[13 + size :] == 0xA5).all()
    return room[13 : 13 + size]


@pytest.mark.parametrize("bits", [*((width,) for width in range(1, 33)), *MIXED], ids=str)
def test_packing(bits: tuple[int, ...], block: int) -> None:
    rng = np.random.default_rng(sum(bits))
    tops = np.array([1 << width for width in bits])
    for count in (*COUNTS, block - 1, block, block + 1, 2 * block + 3):
        codes = rng.integers(0, tops, (count, len(bits)))
        found = packed(codes, bits)
        assert found.tobytes() == by_definition(codes, bits), count
        assert np.array_equal(bitfields.unpack(found, count, bits), codes), count
    largest = np.tile(tops - 1, (77, 1))
    assert np.array_equal(bitfields.unpack(packed(largest, bits), 77, bits), largest)


def test_equal_places_are_one_run(block: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << 11, (301, 3))
    found = packed(codes, (11, 11, 11))
    assert found.tobytes() == by_definition(codes.reshape(-1, 1), (11,))
    assert np.array_equal(bitfields.unpack(found, 301, (11, 11, 11)), codes)


def test_packing_leaves_the_codes_alone(block: int) -> None:
    codes = np.arange(1_000)[::-1, None]
    before = codes.copy()
    assert packed(codes, (10,)).tobytes() == by_definition(codes, (10,))
    assert np.array_equal(codes, before)


def test_long_runs_take_the_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is short, and what NumPy converts as fast, does without."""
    asked = []
    monkeypatch.setattr(native, "library", asked.append)
    monkeypatch.setattr(bitfields, "MANY", 1_000)
    codes = np.random.default_rng(0).integers(0, 1 << 8, (1_000, 1))
    for count, width, expected in ((999, 9, 0), (1_000, 9, 2), (1_000, 8, 0), (1_000, 16, 0), (1_000, 32, 0)):
        asked.clear()
        found = packed(codes[:count], (width,))
        assert np.array_equal(bitfields.unpack(found, count, (width,)), codes[:count])
        assert asked == ["bitfields.c"] * expected

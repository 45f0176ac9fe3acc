"""Equal-information windows: the reference's ids, and the same ids from another implementation and another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import zoo
from zoo.codecs.equal_info import END, TOTAL, EqualInfo, EqualInfoConfig, WindowCoder, frequencies

TEXT = "The cat of the method, as described in the reference. 今天 é\n".encode() * 3 + bytes(range(256))


def table(io: Any) -> Any:
    """The case's model: counts behind the last byte, 256 at a window's start."""
    counts = {int(context): {int(byte): count for byte, count in row.items()} for context, row in io["counts"].items()}

    def model(recent: bytes) -> NDArray[np.int64]:
        found = np.zeros(256, np.int64)
        for byte, count in counts.get(recent[-1] if recent else 256, {}).items():
            found[byte] = count
        return found

    return model


def test_the_references_ids(golden: Path) -> None:
    config = json.loads((golden / "equal_info" / "config.json").read_text())
    io = json.loads((golden / "equal_info" / "io.json").read_text())
    model = table(io)
    for context, expected in io["frequencies"].items():
        recent = b"" if context == "256" else bytes([int(context)])
        assert frequencies(model(recent)).tolist() == expected
    for bits in config["widths"]:
        coder = WindowCoder(model, bits, context=1)
        for case in io["cases"]:
            octets, expected = bytes(case["bytes"]), case[str(bits)]
            codes, widths = coder.encode(octets)
            assert [str(code) for code in codes] == expected["ids"] and widths == expected["bytes_per_window"]
            assert b"".join(coder.decode(code) for code in codes) == octets
    coder = WindowCoder(model, 16, context=1)
    for case in io["arbitrary"]:
        assert b"".join(coder.decode(code) for code in case["ids"]) == bytes(case["bytes"])


class Plain:
    """The definition once more, in Python's integers alone and without anything remembered."""

    def __init__(self, model: Any, bits: int) -> None:
        self.model, self.bits = model, bits

    def encode(self, octets: bytes) -> list[int]:
        codes, place = [], 0
        while place < len(octets):
            low, size, start = 0, 2**self.bits, place
            while size > 1:
                shares = self.shares(octets[start:place], size)
                symbol = octets[place] if place < len(octets) and octets[place] in shares else END
                first, size = shares[symbol]
                low += first
                if symbol == END:
                    break
                place += 1
            codes.append(low)
        return codes

    def shares(self, window: bytes, size: int) -> dict[int, tuple[int, int]]:
        counts = [int(count) for count in self.model(window[-2:])] + [0]
        total = sum(counts)
        frequency = [1 + (count * (TOTAL - 257) // total if total else 0) for count in counts]
        order = sorted(range(257), key=lambda symbol: (-counts[symbol], symbol))
        for place in range(TOTAL - sum(frequency)):
            frequency[order[place % 257]] += 1
        ranked = sorted(range(257), key=lambda symbol: (-frequency[symbol], symbol))
        if size < 257:
            best = [symbol for symbol in ranked if symbol != END][: size - 1]
            return {symbol: (code, 1) for code, symbol in enumerate([*best, END])}
        numbers = [1 + frequency[symbol] * (size - 257) // TOTAL for symbol in range(257)]
        for symbol in ranked[: size - sum(numbers)]:
            numbers[symbol] += 1
        firsts = [0, *accumulate(numbers)]
        return {symbol: (firsts[symbol], numbers[symbol]) for symbol in range(257)}


@pytest.mark.parametrize("bits", [9, 16, 64])
def test_a_second_implementation_gives_the_same_ids(bits: int) -> None:
    tok = EqualInfo.of(TEXT, bits=bits)
    text = TEXT[40:70] + b"\x00\xff\xfe the"
    coder = tok.coder()
    codes, _ = coder.encode(text)

    def model(recent: bytes) -> NDArray[np.int64]:
        found = np.zeros(256, np.int64)
        for order, weight in ((0, 1), (1, 4), (2, 16)):
            if len(recent) >= order:
                behind = recent[len(recent) - order :]
                for byte in range(256):
                    grams = [TEXT[i : i + order + 1] for i in range(len(TEXT) - order)].count(behind + bytes([byte]))
                    found[byte] += weight * grams * (order == 0 or grams >= 2)
        return found

    known: dict[bytes, NDArray[np.int64]] = {}
    plain = Plain(lambda recent: known.setdefault(recent, model(recent)) if recent not in known else known[recent], bits)
    assert codes[:8] == plain.encode(text)[:8]
    assert tok.decode(tok.encode(text)) == [text]


@given(st.binary(max_size=80), st.sampled_from([9, 10, 16, 21, 24, 32, 48, 64]))
@settings(max_examples=25, deadline=None)
def test_all_bytes_come_back_at_all_widths(octets: bytes, bits: int) -> None:
    tok = EqualInfo.of(TEXT, bits=bits)
    tokens = tok.encode(octets)
    assert tok.decode(tokens) == [octets]
    assert tokens.lengths[0] % tok.config.ids == 0


@given(st.lists(st.integers(0, 65535), max_size=8))
@settings(max_examples=25, deadline=None)
def test_every_id_decodes(ids: list[int]) -> None:
    tok = zoo.load("equal-info-16")
    whole = tok.decode([torch.tensor(ids, dtype=torch.int64)])[0]
    parts = [tok.decode([torch.tensor([number])])[0] for number in ids]
    assert whole == b"".join(parts), "windows are independent"


SCRIPT = """
import sys, torch, numpy, zoo
torch.set_num_threads(int(sys.argv[1]))
torch.set_default_dtype(getattr(torch, sys.argv[2]))
tok = zoo.load("equal-info-16")
print(tok.encode(sys.stdin.buffer.read()).tolist()[0], tok.fingerprint)
"""


@pytest.mark.slow
def test_the_same_ids_in_every_process() -> None:
    """Under other numbers of threads, types by default, seeds of hashes and kinds of processors for the linear algebra."""
    found = set()
    for seed, threads, dtype, more in (
        ("0", "1", "float32", {}),
        ("17", "2", "float64", {"OPENBLAS_CORETYPE": "Prescott", "NPY_DISABLE_CPU_FEATURES": "AVX2"}),
        ("99", "3", "float32", {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "2"}),
    ):
        environment = os.environ | {"PYTHONHASHSEED": seed, **more}
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT, threads, dtype], input=TEXT, capture_output=True, check=True, env=environment
        )
        found.add(run.stdout)
    assert len(found) == 1


def test_what_the_ids_are_worth() -> None:
    tok = zoo.load("equal-info-16")
    text = Path(zoo.__file__).read_bytes()[:8000]
    assert len(text) / int(tok.encode(text).lengths[0]) > 2.2
    assert tok.spec.vocab_size == 65536 and EqualInfo.of(TEXT, bits=64).spec.vocab_size == 65536


def test_bad_settings_and_ids() -> None:
    for bits in (8, 25, 40, 80):
        with pytest.raises(zoo.InputError, match="a window has 9 to 24 bits"):
            EqualInfoConfig(bits)
    wide = EqualInfo.of(TEXT, bits=32)
    with pytest.raises(zoo.InputError, match="3 ids are no whole number of windows of 2"):
        wide.decode([torch.tensor([1, 2, 3])])
    assert wide.encode("").tolist() == [[]] and wide.decode([torch.zeros(0, dtype=torch.int64)]) == [b""]

"""The contract of every tokenizer (design: what `zoo.Tokenizer` promises), on every embedded model."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

import zoo

NAMES = zoo.list(embedded=True)


@cache
def load(name: str) -> zoo.Tokenizer:
    return zoo.load(name)


def audio_items(tokenizer: zoo.Tokenizer, folder: Path) -> list[Any]:
    """The same kind of media in every shape that is taken, of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    rate = tokenizer.spec.sample_rate

    def sound(samples: int, at: int) -> Tensor:
        time = torch.arange(samples) / at
        pitch = 100 + 100 * torch.rand(1, generator=generator)
        return 0.3 * torch.sin(2 * torch.pi * pitch * time) * (1 + torch.sin(9 * time)) / 2 + 0.01 * torch.randn(
            samples, generator=generator
        )

    path = folder / "sound.wav"
    soundfile.write(path, sound(44_100, 44_100).numpy(), 44_100)
    return [
        path,
        path.read_bytes(),
        (sound(8_000, 16_000).numpy(), 16_000),
        (torch.stack([sound(9_000, 48_000), sound(9_000, 48_000)]), 48_000),
        sound(rate, rate),
        sound(1, rate),
        (sound(12_345, rate) * 32_767).to(torch.int16).numpy(),
    ]


ITEMS = {"audio": audio_items}


@pytest.fixture(params=NAMES)
def tokenizer(request: pytest.FixtureRequest) -> zoo.Tokenizer:
    return load(request.param)


@pytest.fixture
def items(tokenizer: zoo.Tokenizer, tmp_path: Path) -> list[Any]:
    return ITEMS[tokenizer.spec.modality](tokenizer, tmp_path)


def close(left: Sequence[Tensor], right: Sequence[Tensor], tolerance: float) -> bool:
    return all(a.shape == b.shape and (a - b).abs().max() <= tolerance for a, b in zip(left, right, strict=True))


def test_there_are_embedded_models() -> None:
    assert NAMES


def test_tokens_are_flat_padded_and_in_range(tokenizer: zoo.Tokenizer, items: list[Any]) -> None:
    tokens = tokenizer.encode(items)
    assert tokens.ids.dtype == tokens.lengths.dtype == torch.int64
    assert tokens.ids.shape == (len(items), int(tokens.lengths.max()))
    positions = torch.arange(tokens.ids.shape[1])
    inside = positions < tokens.lengths[:, None]
    assert (tokens.ids[~inside] == -1).all()
    assert (tokens.ids[inside] >= 0).all() and (tokens.ids[inside] < tokenizer.spec.vocab_size).all()
    assert (tokens.tokenizer, tokens.fingerprint) == (tokenizer.spec.name, tokenizer.spec.fingerprint)


def test_batch_invariance(tokenizer: zoo.Tokenizer, items: list[Any]) -> None:
    together = tokenizer.encode(items)
    alone = [tokenizer.encode(item) for item in items]
    assert together.tolist() == [tokens.tolist()[0] for tokens in alone]
    assert close(tokenizer.decode(together), [tokenizer.decode(tokens)[0] for tokens in alone], 1e-4)


def test_media_of_the_size_it_had(tokenizer: zoo.Tokenizer, items: list[Any]) -> None:
    tokens = tokenizer.encode(items)
    for meta, media in zip(tokens.meta, tokenizer.decode(tokens, sample_rate="original"), strict=True):
        assert media.shape == (1, meta["samples"])
        assert torch.isfinite(media).all()


def test_embeddings(tokenizer: zoo.Tokenizer, items: list[Any]) -> None:
    tokens = tokenizer.encode(items)
    vectors = tokenizer.embed(tokens)
    assert vectors.shape == (*tokens.ids.shape, tokenizer.spec.dim)
    assert (vectors[tokens.ids < 0] == 0).all()
    assert torch.equal(vectors[0, : tokens.lengths[0]], tokenizer.embed(tokens[0])[0])


def test_deterministic(tokenizer: zoo.Tokenizer, items: list[Any]) -> None:
    assert tokenizer.encode(items).equal(tokenizer.encode(items))
    assert close(tokenizer.reconstruct(items), tokenizer.reconstruct(items), 0)


def test_files_of_tokens(tokenizer: zoo.Tokenizer, items: list[Any], tmp_path: Path) -> None:
    tokens = tokenizer.encode(items)
    tokens.save(tmp_path / "batch.zt")
    loaded = zoo.Tokens.load(tmp_path / "batch.zt")
    assert loaded.equal(tokens)
    assert close(tokenizer.decode(loaded), tokenizer.decode(tokens), 0)
    single = tokens[0]
    payload = -(-int(single.lengths[0]) * tokenizer.spec.bits_per_token // 8)
    assert single.save(tmp_path / "one.zt").stat().st_size <= payload + 64


def test_save_and_load(tokenizer: zoo.Tokenizer, items: list[Any], tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "saved")
    again = zoo.load(f"local-dir:{tmp_path / 'saved'}")
    assert again.spec == tokenizer.spec
    assert again.encode(items).equal(tokenizer.encode(items))


def test_pickle(tokenizer: zoo.Tokenizer, items: list[Any]) -> None:
    assert pickle.loads(pickle.dumps(tokenizer)).encode(items[0]).equal(tokenizer.encode(items[0]))


def test_several_threads(tokenizer: zoo.Tokenizer, items: list[Any]) -> None:
    expected = tokenizer.encode(items).tolist()
    found: dict[int, list[list[int]]] = {}

    def work(number: int) -> None:
        found[number] = tokenizer.encode(items).tolist()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), expected)


def test_inference_mode_and_autocast_change_nothing(tokenizer: zoo.Tokenizer, items: list[Any]) -> None:
    expected = tokenizer.encode(items)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert tokenizer.encode(items).equal(expected)


def test_reduced_precision_leaves_the_ids_alone(tokenizer: zoo.Tokenizer, items: list[Any]) -> None:
    reduced = zoo.load(tokenizer.spec.name, precision="bf16")
    tokens = tokenizer.encode(items)
    assert reduced.encode(items).equal(tokens)
    for exact, rough in zip(tokenizer.decode(tokens), reduced.decode(tokens), strict=True):
        assert exact.shape == rough.shape
        assert (exact - rough).square().sum() <= 0.1 * exact.square().sum() + 1e-6


COMPILED = """
import sys, torch, zoo
name = sys.argv[1]
plain, compiled = zoo.load(name), zoo.load(name, compile=True)
items = [torch.sin(torch.arange(samples) / 30) for samples in (24_000, 7_777, 24_000, 100)]
tokens = plain.encode(items)
assert compiled.encode(items).equal(tokens)
for left, right in zip(compiled.decode(tokens), plain.decode(tokens), strict=True):
    assert (left - right).abs().max() < 1e-4
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiled(name: str) -> None:
    """In a process of its own: the compiler cannot see through the test suite's type checks."""
    subprocess.run([sys.executable, "-c", COMPILED, name], check=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_same(tokenizer: zoo.Tokenizer, items: list[Any]) -> None:
    on_gpu = zoo.load(tokenizer.spec.name, device="cuda")
    tokens = tokenizer.encode(items)
    assert on_gpu.encode(items).tolist() == tokens.tolist()
    assert close([media.cpu() for media in on_gpu.decode(tokens)], tokenizer.decode(tokens), 1e-3)


def test_bad_items_are_named(tokenizer: zoo.Tokenizer, items: list[Any], tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "noise.wav").write_bytes(b"not audio at all" * 20)
    for bad, reason in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "empty", "is empty"),
        (tmp_path / "noise.wav", "is not an audio file"),
        (tmp_path, "is a folder"),
        (b"", "is empty"),
        (np.zeros(0, np.float32), "is empty"),
        (np.full(100, np.nan, np.float32), "NaN or infinite"),
        (np.array([0, np.inf], np.float32), "NaN or infinite"),
        (np.zeros((2, 3, 4), np.float32)[None], "of shape"),
        (object(), "not object"),
        ((np.zeros(10, np.float32), 0), "sample rate"),
        ((np.zeros(10, np.float32),), "a tuple must be"),
        (np.zeros((500, 2), np.float32), "transposed"),
        (np.zeros(10, np.complex64), "floating point"),
    ):
        with pytest.raises(zoo.InputError, match=reason) as caught:
            tokenizer.encode([items[0], bad])
        assert caught.value.index == 1
    with pytest.raises(zoo.InputError, match="nothing to encode"):
        tokenizer.encode([])

"""The contract of every tokenizer (design: what `zoo.Tokenizer` promises): on every embedded model, and on small random ones
of the families that have none or whose sizes differ."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import trimesh
from PIL import Image
from torch import Tensor

import zoo
from small_models import small_flextok, small_seed, small_tokenflow
from small_models_adapters import AUDIO_ADAPTERS
from small_models_adapters_image import small_deterministic, small_rae, small_vq
from small_models_adapters_video import (
    small_emu3_video,
    small_video_kl,
    small_vidtok,
    small_vidtok_kl,
    small_vidtok_noncausal,
)
from small_models_byteformer import small_byteformer
from small_models_ibq import small_ibq
from small_models_s3tokenizer import small_s3tokenizer
from small_models_snac import small_snac
from small_models_vat import small_vat
from small_models_vectok import SMALL_LOGMEL_VECTOK, small_vectok
from toys.mrt5 import small_mrt5
from toys.two_rates import TwoRates
from toys.words import small_hat, small_magnet
from zoo import media as zoo_media
from zoo.codecs.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from zoo.modality import modality

EMBEDDED = zoo.list(embedded=True)


def random_autoencoder() -> zoo.Tokenizer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoencoderKLConfig(widths=(16, 24), layers_per_block=1, groups=8, latent_channels=4)
        tokenizer = AutoencoderKL(config, name="random-autoencoder").eval().requires_grad_(False)
    tokenizer.fingerprint = tokenizer.compute_fingerprint()
    return tokenizer


def two_rates() -> zoo.Tokenizer:
    zoo.register_family("toys.two_rates")
    tokenizer = TwoRates().eval().requires_grad_(False)
    tokenizer.fingerprint = tokenizer.compute_fingerprint()
    return tokenizer


RANDOM = {
    "two-rates": two_rates,
    "flextok": small_flextok,
    "autoencoder_kl": random_autoencoder,
    "byteformer": small_byteformer,
    "vat": small_vat,
    "vectok": small_vectok,
    "vectok-logmel": partial(small_vectok, config=SMALL_LOGMEL_VECTOK),
    "tokenflow": small_tokenflow,
    "seed": small_seed,
    "ibq": small_ibq,
    "s3tokenizer": small_s3tokenizer,
    "snac": small_snac,
    "mrt5": small_mrt5,
    "hat": small_hat,
    "magnet": small_magnet,
    "vidtok": small_vidtok,
    "vidtok-kl": small_vidtok_kl,
    **AUDIO_ADAPTERS,
    "video-kl": small_video_kl,
    "vidtok-noncausal": small_vidtok_noncausal,
    "emu3-video": small_emu3_video,
}


# What the slow tests run: small models of families that have an embedded one, and relatives of those that the fast ones run.
RELATIVES = ("flextok", "magnet", "vat", "vectok", "tokenflow", "seed", "ibq", "snac", "vidtok-kl", "video-kl")
RELATIVES += ("vidtok-noncausal", "emu3-video")
RELATIVES += ("encodec", "encodec-chunks", "xcodec", "xcodec2", "neucodec", "oobleck", "pocket_tts", "vibevoice")

# Families around the networks of transformers and diffusers, which take long to import in every process of their own.
AROUND_LIBRARIES = {"emu3": partial(small_vq, "emu3"), "dc-ae": partial(small_deterministic, "dc"), "rae": small_rae}


@pytest.fixture(
    scope="session",
    params=[
        *EMBEDDED,
        *(name for name in RANDOM if name not in RELATIVES),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in RANDOM | AROUND_LIBRARIES
            if name in {*RELATIVES, *AROUND_LIBRARIES}
        ),
    ],
)
def address(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `zoo.load` loads the tokenizer by."""
    if request.param in EMBEDDED:
        return request.param
    make = (RANDOM | AROUND_LIBRARIES)[request.param]
    return f"local-dir:{make().save_pretrained(tmp_path_factory.mktemp(request.param))}"


@cache
def load(address: str) -> zoo.Tokenizer:
    return zoo.load(address)


@pytest.fixture
def tokenizer(address: str) -> zoo.Tokenizer:
    return load(address)


@pytest.fixture
def discrete(tokenizer: zoo.Tokenizer) -> zoo.Tokenizer:
    if tokenizer.spec.continuous:
        pytest.skip("latents have no ids")
    return tokenizer


@pytest.fixture
def ordered(tokenizer: zoo.Tokenizer) -> zoo.Tokenizer:
    if not tokenizer.spec.ordered:
        pytest.skip("its tokens are not ordered")
    return tokenizer


# Few steps where a decoder samples: what the contract says does not depend on their number.
QUICK: dict[str, dict[str, Any]] = {"flextok": {"steps": 3}, "seed": {"steps": 3}}


def decode(tokenizer: zoo.Tokenizer, tokens: zoo.Tokens | zoo.Latents, **options: Any) -> list[Any]:
    decoded: list[Any] = tokenizer.decode(tokens, **QUICK.get(tokenizer.family, {}), **options)
    return decoded


# ---- media of each modality


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
        sound(type(tokenizer).shortest, rate),
        (sound(12_345, rate) * 32_767).to(torch.int16).numpy(),
    ]


def image_items(tokenizer: zoo.Tokenizer, folder: Path) -> list[Any]:
    """The same kind of media in every shape that is taken, of very different sizes and modes."""
    random = np.random.default_rng(0)

    def picture(height: int, width: int, channels: int = 3) -> np.ndarray:
        rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
        waves = [np.sin(rows * random.uniform(2, 20) + columns * random.uniform(2, 20)) for _ in range(channels)]
        return ((np.stack(waves, axis=-1) + 1) * 120 + random.uniform(0, 15, (height, width, channels))).astype(np.uint8)

    path, jpeg = folder / "picture.png", io.BytesIO()
    Image.fromarray(picture(40, 75)).save(path)
    Image.fromarray(picture(130, 90)).save(jpeg, "JPEG")
    return [
        path,
        jpeg.getvalue(),
        Image.fromarray(picture(33, 65, 4)),
        picture(50, 50)[..., 0],
        picture(70, 20).astype(np.uint16) * 200,
        torch.from_numpy(picture(64, 64)).permute(2, 0, 1),
        torch.from_numpy(picture(21, 90)).permute(2, 0, 1) / 127.5 - 1,
        torch.zeros(1, 1, 1),
    ]


def file_items(tokenizer: zoo.Tokenizer, folder: Path) -> list[Any]:
    """Files of every length in every shape that is taken."""
    path = folder / "file.bin"
    path.write_bytes(bytes(range(256)) * 3)
    return [
        path,
        bytes(range(100, 200)),
        bytearray(b"some text that is longer than any kernel of convolution is"),
        memoryview(bytes(333)),
        np.arange(90, dtype=np.uint8),
        torch.full((64,), 255, dtype=torch.uint8),
    ]


def shape_items(tokenizer: zoo.Tokenizer, folder: Path) -> list[Any]:
    """Shapes in every form that is taken, of very different sizes and in very different places."""
    random = np.random.default_rng(0)
    normals = random.normal(size=(100, 3))
    ball, ring = trimesh.creation.icosphere(2, 3e-3), trimesh.creation.torus(40, 9, 24, 12).apply_translation((500, 0, -20))
    box = trimesh.creation.box((1, 2, 0.3))
    ring.export(folder / "ring.ply")
    return [
        folder / "ring.ply",
        box.export(file_type="glb"),
        ball,
        trimesh.Scene([box, ball.copy().apply_scale(300)]),
        (normals / np.linalg.norm(normals, axis=1, keepdims=True), normals),
        np.concatenate([normals, normals], axis=1),
        torch.from_numpy(random.uniform(7, 9, (400, 6))).float(),
    ]


def text_items(tokenizer: zoo.Tokenizer, folder: Path) -> list[Any]:
    """Texts in every shape that is taken, of very different lengths."""
    path = folder / "notes.txt"
    if tokenizer.family == "genome":
        path.write_text("GATTACA" * 900, encoding="utf-8")
        return [path, "ACGTNNNNNNacgtRYKU", b"acgt" * 20, bytearray(b"T"), memoryview(b"NNN"), {"text": "GGGCCC" * 99}, ""]
    path.write_text("A file is bytes,\nwhatever is in it: Müller.\n" * 20, encoding="utf-8")
    return [
        path,
        "A string is the text itself, and no path. Müller, 今天天气很好 👍",
        "तमिऴ் ಕನ್ನಡ שלום".encode(),
        bytearray(b"x"),
        memoryview(b"line\nbreak\t and \0"),
        {"text": "a row of a data set"},
        "",
    ]


def video_items(tokenizer: zoo.Tokenizer, folder: Path) -> list[Any]:
    """Clips in every shape that is taken, of different sizes and lengths."""
    random = np.random.default_rng(0)

    def clip(frames: int, height: int, width: int) -> np.ndarray:
        time, rows, columns = np.mgrid[0:frames, 0:height, 0:width]
        waves = [np.sin(rows / random.uniform(2, 9) + columns / random.uniform(2, 9) + time) for _ in range(3)]
        return ((np.stack(waves, axis=-1) + 1) * 120 + random.uniform(0, 15, (frames, height, width, 3))).astype(np.uint8)

    path, levels = folder / "film.mp4", torch.from_numpy(clip(5, 16, 20))
    zoo_media.write_video(path, levels.permute(3, 0, 1, 2) / 127.5 - 1, 12)
    return [
        path,
        path.read_bytes(),
        (clip(3, 9, 17), 30),
        torch.from_numpy(clip(8, 16, 8)).permute(3, 0, 1, 2),
        torch.from_numpy(clip(2, 8, 16)).permute(3, 0, 1, 2) / 127.5 - 1,
        tuple(Image.fromarray(frame) for frame in clip(4, 10, 10)),
        Image.fromarray(clip(1, 12, 24)[0]),
    ]


ITEMS = {
    "video": video_items,
    "audio": audio_items,
    "text": text_items,
    "image": image_items,
    "bytes": file_items,
    "shape": shape_items,
}


def bad_audio(folder: Path) -> list[tuple[Any, str]]:
    """Items that no audio tokenizer can use, with the reason."""
    (folder / "noise.wav").write_bytes(b"not audio at all" * 20)
    return [
        (folder / "noise.wav", "is not an audio file"),
        (np.zeros(0, np.float32), "is empty"),
        (np.full(100, np.nan, np.float32), "NaN or infinite"),
        (np.array([0, np.inf], np.float32), "NaN or infinite"),
        (np.zeros((2, 3, 4), np.float32)[None], "of shape"),
        ((np.zeros(10, np.float32), 0), "sample rate"),
        ((np.zeros(10, np.float32),), "a tuple must be"),
        (np.zeros((500, 2), np.float32), "transposed"),
        (np.zeros(10, np.complex64), "floating point"),
    ]


def bad_images(folder: Path) -> list[tuple[Any, str]]:
    """Items that no image tokenizer can use, with the reason."""
    content, animation = io.BytesIO(), io.BytesIO()
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    frames[0].save(content, "PNG")
    frames[0].save(animation, "GIF", save_all=True, append_images=frames[1:])
    return [
        (b"not an image at all" * 20, "is not an image file"),
        (content.getvalue()[: len(content.getvalue()) // 2], "is truncated"),
        (animation.getvalue(), "2 frames"),
        (np.zeros((0, 5, 3), np.uint8), "is empty"),
        (np.broadcast_to(np.uint8(0), (20_000, 20_000)), "max_pixels"),
        (torch.full((3, 9, 9), torch.nan), "NaN or infinite"),
        (torch.full((3, 9, 9), 255.0), r"must lie in \[-1, 1\]"),
        (np.zeros((9, 9, 2), np.uint8), "of shape"),
        (torch.zeros(9, 9), "of shape"),
        (np.zeros((9, 9), np.int64), "uint8, uint16 or floating point"),
    ]


def bad_files(folder: Path) -> list[tuple[Any, str]]:
    """Items that are no files, with the reason."""
    return [
        (np.zeros((2, 3, 4), np.uint8), "of shape"),
        (np.zeros(5, np.float32), "whole numbers"),
        (torch.tensor([3, 256]), "reach from 3 to 256"),
        ((b"bytes", 3), "not tuple"),
    ]


def bad_shapes(folder: Path) -> list[tuple[Any, str]]:
    """Items that no shape tokenizer can use, with the reason."""
    box = trimesh.creation.box()
    flat = trimesh.Trimesh([[0, 0, 0], [1, 1, 1], [2, 2, 2]], [[0, 1, 2]], process=False)
    return [
        (b"not a shape at all" * 20, "is not a shape file"),
        (box.export(file_type="stl")[:-60] + b"?", "is not a shape file|truncated"),
        (trimesh.Trimesh(), "no faces"),
        (trimesh.Scene(), "no faces and no points"),
        (trimesh.Trimesh(box.vertices * np.nan, box.faces, process=False), "NaN or infinite"),
        (flat, "no area"),
        (np.zeros((63, 3)), "too few"),
        (np.ones((80, 3)), "no extent"),
        (np.zeros((5, 80, 3)), "of shape"),
        ((np.ones((80, 3)),), "a tuple must be"),
        ((np.eye(80)[:, :3], np.zeros((80, 3))), "a normal has a length of 0"),
    ]


def bad_texts(folder: Path) -> list[tuple[Any, str]]:
    """Items that are no texts, with the reason."""
    return [
        ("half of a pair: \ud83d", "index 16 is the lone surrogate U\\+D83D"),
        ((b"bytes", 3), "not tuple"),
        (np.zeros(5, np.uint8), "not ndarray"),
        ({"text": None}, "a mapping needs"),
    ]


def bad_videos(folder: Path) -> list[tuple[Any, str]]:
    """Items that no video tokenizer can use, with the reason."""
    path = zoo_media.write_video(folder / "cut.mp4", torch.zeros(3, 9, 16, 16))
    (folder / "noise.mp4").write_bytes(b"not a film at all" * 20)
    return [
        (folder / "noise.mp4", "is not a video file"),
        (path.read_bytes()[:-300], "is not a video file|truncated"),
        (np.zeros((0, 5, 5, 3), np.uint8), "no frames"),
        (np.zeros((2, 0, 5, 3), np.uint8), "is empty"),
        (np.broadcast_to(np.uint8(0), (2, 2160, 3840, 3)), "max_pixels"),
        (np.broadcast_to(np.uint8(0), (2000, 4, 4, 3)), "max_frames"),
        (torch.full((3, 2, 9, 9), torch.nan), "NaN or infinite"),
        (torch.full((3, 2, 9, 9), 255.0), r"must lie in \[-1, 1\]"),
        (np.zeros((2, 9, 9, 2), np.uint8), "of shape"),
        (np.zeros((2, 9, 9, 3), np.int64), "uint8, uint16 or floating point"),
        ((np.zeros((2, 9, 9, 3), np.uint8), 0), "frame rate"),
        ((np.zeros((2, 9, 9, 3), np.uint8),), "a tuple must be"),
        ((Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))), "differ in size"),
    ]


BAD_ITEMS = {
    "video": bad_videos,
    "audio": bad_audio,
    "text": bad_texts,
    "image": bad_images,
    "bytes": bad_files,
    "shape": bad_shapes,
}


@pytest.fixture
def items(tokenizer: zoo.Tokenizer, tmp_path: Path) -> list[Any]:
    return ITEMS[tokenizer.spec.modality](tokenizer, tmp_path)


def close(left: Sequence[Any], right: Sequence[Any], tolerance: float) -> bool:
    """Whether media are alike: files equal, everything else within a tolerance, of meshes as a share of their size."""
    if isinstance(left[0], bytes | str):
        return list(left) == list(right)
    if isinstance(left[0], trimesh.Trimesh):
        return all(alike(*pair, tolerance) for pair in zip(left, right, strict=True))
    return all(a.shape == b.shape and (a - b).abs().max() <= tolerance for a, b in zip(left, right, strict=True))


def alike(left: trimesh.Trimesh, right: trimesh.Trimesh, tolerance: float) -> bool:
    """Whether meshes have the same faces, and vertices at the same places."""
    if left.is_empty or right.is_empty:
        return left.is_empty and right.is_empty
    if left.faces.shape != right.faces.shape or (left.faces != right.faces).any():
        return False
    return bool(np.abs(left.vertices - right.vertices).max() <= tolerance * np.ptp(left.vertices, axis=0).max())


def content_of(item: Any) -> str | bytes:
    """What a text or a file has to come back as."""
    if isinstance(item, dict):
        return item["text"]
    if isinstance(item, str | bytes):
        return item
    return item.read_bytes() if isinstance(item, Path) else bytes(memoryview(np.asarray(item)))


def decodes(tokenizer: zoo.Tokenizer) -> bool:
    """Whether there is a decoder."""
    return "decoder" in tokenizer.spec.parts


def numbers(tokenizer: zoo.Tokenizer, tokens: Any) -> list[Any]:
    """What tokens decode to; for a shape its occupancy about the original, which rounding does not give other faces."""
    if tokenizer.spec.modality != "shape":
        return [media.cpu() if isinstance(media, Tensor) else media for media in decode(tokenizer, tokens)]
    grid = torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    places = [grid.double() * meta["scale"] + torch.tensor([meta[axis] for axis in "xyz"]).double() for meta in tokens.meta]
    return list(tokenizer.occupancy(tokens, torch.stack(places)).cpu())


# ---- the contract


def test_a_tokenizer_without_a_decoder_says_what_it_would_be(discrete: zoo.Tokenizer, items: list[Any]) -> None:
    if decodes(discrete):
        pytest.skip("has a decoder")
    with pytest.raises(zoo.WeightsError, match="encode only"):
        discrete.reconstruct(items[:1])


def test_there_are_embedded_models() -> None:
    assert EMBEDDED


def test_tokens_are_flat_padded_and_in_range(discrete: zoo.Tokenizer, items: list[Any]) -> None:
    tokenizer, tokens = discrete, discrete.encode(items)
    assert tokens.ids.dtype == tokens.lengths.dtype == torch.int64
    assert tokens.ids.shape == (len(items), int(tokens.lengths.max()))
    positions = torch.arange(tokens.ids.shape[1])
    inside = positions < tokens.lengths[:, None]
    assert (tokens.ids[~inside] == -1).all()
    assert (tokens.ids[inside] >= 0).all() and (tokens.ids[inside] < tokenizer.spec.vocab_size).all()
    assert (tokens.tokenizer, tokens.fingerprint) == (tokenizer.spec.name, tokenizer.spec.fingerprint)
    if tokenizer.spec.max_tokens is not None:
        assert (tokens.lengths == tokenizer.spec.max_tokens).all()


def test_latents_are_finite_grids(tokenizer: zoo.Tokenizer, items: list[Any]) -> None:
    if not tokenizer.spec.continuous:
        pytest.skip("has ids")
    latents = tokenizer.encode(items)
    assert isinstance(latents, zoo.Latents) and len(latents) == len(latents.meta) == len(items)
    assert all(value.shape[0] == tokenizer.spec.dim and torch.isfinite(value).all() for value in latents.values)
    assert (latents.tokenizer, latents.fingerprint) == (tokenizer.spec.name, tokenizer.spec.fingerprint)


def test_prepared_items_are_all_that_the_network_needs(tokenizer: zoo.Tokenizer, items: list[Any]) -> None:
    """Reading is apart from computing: prepared items are on the CPU, travel between processes, and need no parameter."""
    prepared = tokenizer.prepare(items)
    assert len(prepared) == len(items)
    for item in prepared:
        assert item.amount >= 0 and all(tensor.device.type == "cpu" for tensor in item.tensors.values())
    without_weights = copy.deepcopy(tokenizer).to("meta")
    again = without_weights.prepare(items)
    for left, right in zip(prepared, again, strict=True):
        assert (left.meta, left.amount, left.tensors.keys()) == (right.meta, right.amount, right.tensors.keys())
        assert all(torch.equal(left.tensors[name], right.tensors[name]) for name in left.tensors)
    assert tokenizer.encode_prepared(pickle.loads(pickle.dumps(prepared))).equal(tokenizer.encode(items))


def test_options_are_those_of_the_methods(tokenizer: zoo.Tokenizer) -> None:
    for action in ("encode", "decode"):
        options = type(tokenizer).options(action)
        assert "progress" in options or tokenizer.spec.lossless
        assert not {"self", "items", "tokens"} & options.keys() - ({"tokens"} if action == "encode" else set())
    # Preparing and encoding apart take together what both at once do.
    apart = inspect.signature(tokenizer.prepare).parameters | inspect.signature(tokenizer.encode_prepared).parameters
    assert type(tokenizer).options("encode").keys() == apart.keys() - {"items"}


def test_items_remember_what_their_modality_says(tokenizer: zoo.Tokenizer, items: list[Any]) -> None:
    record = modality(tokenizer.spec.modality)
    assert record.name == type(tokenizer).modality
    fields = {name for name, _ in record.meta}
    assert all(set(item.meta) <= fields for item in tokenizer.prepare(items))


def test_batch_invariance(tokenizer: zoo.Tokenizer, items: list[Any]) -> None:
    together = tokenizer.encode(items)
    alone = [tokenizer.encode(item) for item in items]
    assert all(whole.equal(single) for whole, single in zip(together, alone, strict=True))
    if decodes(tokenizer):
        assert close(decode(tokenizer, together), [decode(tokenizer, tokens)[0] for tokens in alone], 1e-4)


def test_lossless(tokenizer: zoo.Tokenizer, items: list[Any]) -> None:
    if not tokenizer.spec.lossless:
        pytest.skip("loses something")
    contents = [content_of(item) for item in items]
    assert tokenizer.reconstruct([*items, b""]) == [*contents, b""]


def test_spans_are_those_of_the_text(tokenizer: zoo.Tokenizer, items: list[Any]) -> None:
    if tokenizer.spec.modality != "text":
        pytest.skip("has no text")
    for specials in ("none", "upstream"):
        tokens = tokenizer.encode(items, specials=specials)
        assert tokenizer.reconstruct(items) == decode(tokenizer, tokens)
        for item, length, spans in zip(items, tokens.lengths.tolist(), tokenizer.spans(tokens), strict=True):
            content = content_of(item)
            octets = content.encode() if isinstance(content, str) else content
            assert spans.dtype == torch.int64 and spans.shape == (length, 2)
            assert b"".join(octets[start:end] for start, end in spans.tolist()) == octets
            assert torch.equal(spans[1:, 0], spans[:-1, 1]) and (spans[:, 0] <= spans[:, 1]).all()


def test_texts_come_back_as_they_went_in(tokenizer: zoo.Tokenizer, items: list[Any]) -> None:
    if tokenizer.spec.modality != "text":
        pytest.skip("has no text")
    tokens = tokenizer.encode(items)
    whole = [content_of(item) for item in items]
    assert [type(text) for text in tokenizer.decode(tokens)] == [type(content) for content in whole]
    as_bytes = [content.encode() if isinstance(content, str) else content for content in whole]
    assert tokenizer.decode(tokens, as_text=False) == as_bytes
    assert tokenizer.decode(tokens, as_text=True) == [content.decode() for content in as_bytes]
    named = str(items[0])
    with pytest.raises(zoo.InputError, match=r"a string is the text itself: pass pathlib\.Path"):
        tokenizer.encode(named, max_bytes=3)


def test_media_of_the_size_it_had(tokenizer: zoo.Tokenizer, items: list[Any]) -> None:
    if tokenizer.spec.modality in ("bytes", "shape", "text"):
        pytest.skip("files and texts are compared as a whole, meshes by their place")
    if not decodes(tokenizer):
        pytest.skip("encodes only")
    tokens = tokenizer.encode(items)
    sound = {"sample_rate": "original"}
    original = {"size": "original"}
    own: dict[str, Any] = {"audio": sound, "image": original, "video": original}[tokenizer.spec.modality]
    for meta, media in zip(tokens.meta, decode(tokenizer, tokens, **own), strict=True):
        expected = (tokenizer.channels, meta["samples"]) if "samples" in meta else (3, meta["height"], meta["width"])
        expected = (3, meta["frames"], *expected[1:]) if "frames" in meta else expected
        assert media.shape == expected
        assert torch.isfinite(media).all()
    if size := tokenizer.spec.decoded_size or tokenizer.spec.image_size:
        assert all(media.shape == (3, *size) for media in decode(tokenizer, tokens))


def test_meshes_are_closed_and_where_they_were(tokenizer: zoo.Tokenizer, items: list[Any]) -> None:
    if tokenizer.spec.modality != "shape":
        pytest.skip("makes no meshes")
    tokens = tokenizer.encode(items)
    meshes = tokenizer.decode(tokens)
    assert not all(mesh.is_empty for mesh in meshes)
    for meta, mesh in zip(tokens.meta, meshes, strict=True):
        if not mesh.is_empty:
            assert mesh.is_watertight and mesh.volume > 0
            centre = np.array([meta[axis] for axis in "xyz"])
            assert (np.abs(mesh.vertices - centre) <= meta["scale"] * (1 + 1e-6)).all()


@pytest.mark.parametrize("fit", zoo_media.FITS)
def test_every_fit(tokenizer: zoo.Tokenizer, items: list[Any], fit: str) -> None:
    if tokenizer.spec.image_size is None:
        pytest.skip("takes any size as it is")
    height, width = tokenizer.spec.image_size
    chosen = [torch.zeros(3, height, width)] if fit == "none" else items
    tokens = tokenizer.encode(chosen, fit=fit)
    assert all(meta["fit"] == fit for meta in tokens.meta)
    for meta, image in zip(tokens.meta, decode(tokenizer, tokens, size="original"), strict=True):
        assert image.shape == (3, meta["height"], meta["width"])
    if fit == "none":
        # By default too: the size is right.
        both = [tokens, tokenizer.encode(chosen)]
        left, right = ([v.tolist() for v in own.values] if isinstance(own, zoo.Latents) else own.tolist() for own in both)
        assert left == right
        with pytest.raises(zoo.InputError, match="item 1"):
            tokenizer.encode([chosen[0], torch.zeros(3, height + 1, width)], fit=fit)


def test_embeddings(discrete: zoo.Tokenizer, items: list[Any]) -> None:
    tokenizer, tokens = discrete, discrete.encode(items)
    if not tokenizer.spec.dim:
        with pytest.raises(zoo.ArgumentError, match="no vectors"):
            tokenizer.embed(tokens)
        return
    vectors = tokenizer.embed(tokens)
    # ByteFormer's are those of groups of bytes.
    reduced = getattr(tokenizer.config, "reduced_length", int)
    lengths = torch.tensor([reduced(length) for length in tokens.lengths.tolist()])
    if tokenizer.family == "mrt5":
        lengths = torch.tensor([len(kept.ids) for kept in tokenizer.kept(tokens)])
    if tokenizer.family in ("word_pool", "magnet"):
        lengths = torch.tensor([len(ends) for ends in tokenizer.words(tokens)])
    assert vectors.shape == (len(items), int(lengths.max()), tokenizer.spec.dim)
    assert (vectors[torch.arange(vectors.shape[1]) >= lengths[:, None]] == 0).all()
    assert torch.equal(vectors[0, : lengths[0]], tokenizer.embed(tokens[0])[0])


def test_deterministic(tokenizer: zoo.Tokenizer, items: list[Any]) -> None:
    assert tokenizer.encode(items).equal(tokenizer.encode(items))
    if decodes(tokenizer):
        assert close(tokenizer.reconstruct(items), tokenizer.reconstruct(items), 0)


def test_files(tokenizer: zoo.Tokenizer, items: list[Any], tmp_path: Path) -> None:
    tokens = tokenizer.encode(items)
    loaded = type(tokens).load(tokens.save(tmp_path / "batch"))
    assert loaded.equal(tokens)
    if decodes(tokenizer):
        assert close(decode(tokenizer, loaded), decode(tokenizer, tokens), 0)


def test_files_of_tokens_are_small(discrete: zoo.Tokenizer, items: list[Any], tmp_path: Path) -> None:
    tokenizer, single = discrete, discrete.encode(items[0])
    payload = -(-int(single.lengths[0]) * tokenizer.spec.bits_per_token // 8)
    # What the ids cannot hold, such as lower case in a genome, has its own size; a file with such fields names them all.
    held = [value for value in single.meta[0].values() if isinstance(value, bytes)] if single.meta else []
    besides = sum(map(len, held)) + (sum(len(name) + 2 for name in single.meta[0]) if held else 0)
    assert single.save(tmp_path / "one.zt").stat().st_size <= payload + besides + 64


def test_save_and_load(tokenizer: zoo.Tokenizer, items: list[Any], tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "saved")
    again = zoo.load(f"local-dir:{tmp_path / 'saved'}")
    assert again.spec == tokenizer.spec
    assert again.encode(items).equal(tokenizer.encode(items))


def test_pickle(tokenizer: zoo.Tokenizer, items: list[Any]) -> None:
    assert pickle.loads(pickle.dumps(tokenizer)).encode(items[0]).equal(tokenizer.encode(items[0]))


def test_several_threads(tokenizer: zoo.Tokenizer, items: list[Any]) -> None:
    expected = tokenizer.encode(items)
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        found[number] = tokenizer.encode(items)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(tokens.equal(expected) for tokens in found.values())


def test_inference_mode_and_autocast_change_nothing(tokenizer: zoo.Tokenizer, items: list[Any]) -> None:
    expected = tokenizer.encode(items)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert tokenizer.encode(items).equal(expected)


def test_reduced_precision_leaves_the_ids_alone(tokenizer: zoo.Tokenizer, address: str, items: list[Any]) -> None:
    reduced = zoo.load(address, precision="bf16")
    tokens = tokenizer.encode(items)
    assert reduced.encode(items).equal(tokens)
    if tokenizer.spec.lossless:
        assert decode(reduced, tokens) == decode(tokenizer, tokens)
        return
    if not decodes(tokenizer):
        return
    for exact, rough in zip(numbers(tokenizer, tokens), numbers(reduced, tokens), strict=True):
        assert exact.shape == rough.shape
        # Of images, 30 dB of their range: a grey one has hardly any power to compare with.
        image = tokenizer.spec.modality in ("image", "video") and not tokenizer.spec.continuous
        assert (exact - rough).square().mean() <= (4e-3 if image else 0.1 * exact.square().mean() + 1e-4)


COMPILED = """
import sys, torch, zoo
name = sys.argv[1]
plain, compiled = zoo.load(name), zoo.load(name, compile=True)
if plain.spec.modality == "bytes":
    items = [bytes(range(n)) for n in (200, 7, 77)]
elif plain.spec.modality == "text":
    items = ["zoo" * n for n in (200, 7, 0)]
elif plain.spec.modality == "image":
    items = [torch.sin(torch.arange(3 * h * w) / 30).reshape(3, h, w) for h, w in ((64, 64), (50, 81), (64, 64), (3, 9))]
elif plain.spec.modality == "video":
    items = [torch.sin(torch.arange(3 * n * 16 * 20) / 30).reshape(3, n, 16, 20) for n in (5, 2, 5)]
elif plain.spec.modality == "shape":
    items = [torch.sin(torch.arange(6 * n) / 30 + n).reshape(n, 6) for n in (500, 77, 500, 2048)]
else:
    items = [torch.sin(torch.arange(samples) / 30) for samples in (24_000, 7_777, 24_000, plain.shortest)]
tokens, found = plain.encode(items), compiled.encode(items)
if plain.spec.modality == "shape":
    places = torch.sin(torch.arange(3000.0)).reshape(1000, 3)
    pairs = list(zip(compiled.occupancy(tokens, places), plain.occupancy(tokens, places), strict=True))
else:
    quick = {"steps": 3} if plain.family in ("flextok", "seed") else {}
    decoders = "decoder" in plain.spec.parts
    pairs = list(zip(compiled.decode(tokens, **quick), plain.decode(tokens, **quick), strict=True)) if decoders else []
if plain.spec.continuous:
    pairs += zip(found.values, tokens.values, strict=True)
else:
    assert found.equal(tokens)
for left, right in pairs:
    assert left == right if isinstance(left, bytes | str) else (left - right).abs().max() < 1e-4
"""


@pytest.mark.slow
def test_compiled(address: str) -> None:
    """In a process of its own: the compiler cannot see through the test suite's type checks."""
    if type(load(address)).compile_modules is zoo.Tokenizer.compile_modules:
        pytest.skip("has nothing to compile")
    subprocess.run([sys.executable, "-c", COMPILED, address], check=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_same(tokenizer: zoo.Tokenizer, address: str, items: list[Any]) -> None:
    on_gpu = zoo.load(address, device="cuda")
    tokens, found = tokenizer.encode(items), on_gpu.encode(items)
    if tokenizer.spec.continuous:
        assert close(found.to("cpu").values, tokens.values, 1e-3)
    else:
        assert found.tolist() == tokens.tolist()
    if decodes(tokenizer):
        assert close(numbers(on_gpu, tokens), numbers(tokenizer, tokens), 1e-3)


def test_bad_items_are_named(tokenizer: zoo.Tokenizer, items: list[Any], tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    bad = [
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path, "is a folder"),
        (object(), "not object"),
        *BAD_ITEMS[tokenizer.spec.modality](tmp_path),
    ]
    if not tokenizer.may_be_empty:
        bad += [(tmp_path / "empty", "is empty"), (b"", "is empty")]
    for item, reason in bad:
        with pytest.raises(zoo.InputError, match=reason) as caught:
            tokenizer.encode([items[0], item])
        assert caught.value.index == 1
    with pytest.raises(zoo.InputError, match="nothing to encode"):
        tokenizer.encode([])


def test_bad_tokens_are_named(discrete: zoo.Tokenizer, items: list[Any]) -> None:
    size = discrete.spec.vocab_size
    sound = torch.zeros(4, dtype=torch.int64)
    for ids, reason in (
        (torch.tensor([0, size]), f"id {size} is outside"),
        (torch.tensor([0, -2]), "id -2 is outside"),
        (sound.float(), "integers"),
        (torch.tensor([1, -1, 1]), "padding"),
        *([] if discrete.may_be_empty else [(sound[:0], "is empty")]),
    ):
        with pytest.raises(zoo.InputError, match=reason) as caught:
            discrete.decode([sound, ids])
        assert caught.value.index == 1
    foreign = zoo.Tokens.from_sequences([sound], tokenizer="another", fingerprint="f" * 16, vocab_size=size)
    with pytest.raises(zoo.MismatchError, match="made by another"):
        discrete.decode(foreign)
    with pytest.raises(zoo.InputError, match="no tokens"):
        discrete.decode(discrete.encode(items[0])[:0])


def test_bad_latents_are_named(tokenizer: zoo.Tokenizer) -> None:
    if not tokenizer.spec.continuous:
        pytest.skip("has ids")
    sound = torch.zeros(tokenizer.spec.dim, *(4, 2, 3)[3 - len(tokenizer.latent_axes) :])
    if tokenizer.spec.image_size is not None:
        [sound] = tokenizer.encode(torch.zeros(3, *tokenizer.spec.image_size)).values
    assert len(tokenizer.decode([sound, sound])) == 2
    for values in (sound[:1], sound[:, 0], sound * torch.nan, sound[:, :0]):
        with pytest.raises(zoo.InputError) as caught:
            tokenizer.decode([sound, values])
        assert caught.value.index == 1
    with pytest.raises(zoo.MismatchError, match="made by another"):
        tokenizer.decode(zoo.Latents((sound,), "another", "f" * 16))


# ---- ordered tokenizers: coarse to fine


def test_every_prefix_decodes_alike_alone_and_among_others(ordered: zoo.Tokenizer, items: list[Any]) -> None:
    tokens = ordered.encode(items[:2])
    longest = int(tokens.lengths.max())
    prefixes = [tokens.truncate(k) for k in (1, 2, 3, longest // 2, longest - 1, longest)]
    for prefix in prefixes:
        assert zoo.Tokens.from_bytes(prefix.to_bytes()).equal(prefix)
    mixed = numbers(ordered, zoo.Tokens.cat(prefixes))
    alone = [image for prefix in prefixes for image in numbers(ordered, prefix)]
    assert all(torch.isfinite(image).all() for image in mixed)
    assert close(mixed, alone, 1e-4)
    # A longer prefix says more, unless it adds nothing but zero vectors: its picture is another one.
    for shorter, longer, before, after in zip(prefixes, prefixes[1:], alone[:-2:2], alone[2::2], strict=False):
        if ordered.embed(longer[0])[:, shorter.ids.shape[1] :].any():
            assert not torch.equal(before, after)


def test_the_first_ids_can_be_had_alone(ordered: zoo.Tokenizer, items: list[Any]) -> None:
    everything = ordered.encode(items)
    for k in (1, 2, int(everything.lengths.max()) - 1):
        assert ordered.encode(items, tokens=k).equal(everything.truncate(k))


def test_impossible_prefixes(ordered: zoo.Tokenizer, items: list[Any]) -> None:
    tokens = ordered.encode(items[:1])
    longest = int(tokens.lengths.max())
    for k in (0, -1, longest + 1):
        with pytest.raises(zoo.InputError):
            ordered.encode(items[:1], tokens=k)
    with pytest.raises(zoo.InputError):
        tokens.truncate(0)
    too_long = torch.zeros(longest + 1, dtype=torch.int64)
    with pytest.raises(zoo.InputError, match="item 1"):
        ordered.decode([too_long[:-1], too_long])


# ---- decoders that sample


def test_seeds_belong_to_items_not_to_places(tokenizer: zoo.Tokenizer, items: list[Any]) -> None:
    if "seed" not in inspect.signature(tokenizer.decode).parameters:
        pytest.skip("decoding is not random")
    tokens = tokenizer.encode(items[:3])
    default, other = decode(tokenizer, tokens), decode(tokenizer, tokens, seed=1)
    assert all(not torch.equal(left, right) for left, right in zip(default, other, strict=True))
    assert close(decode(tokenizer, tokens[::-1], seed=1)[::-1], other, 1e-4)
    assert close(decode(tokenizer, tokens, seed=[1, 0, 1]), [other[0], default[1], other[2]], 1e-4)

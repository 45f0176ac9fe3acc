"""Images of every depth, sign, photometric interpretation and transparency, against NumPy and other readers."""

from __future__ import annotations

import importlib.util
import io
import itertools
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from typer.testing import CliRunner

import zoo
from small_images import chunk, png_file, tiff_file
from zoo import media
from zoo.cli import app

CASES = Path(__file__).parent / "media_image"
codecs = pytest.mark.skipif(importlib.util.find_spec("imagecodecs") is None, reason="needs imagecodecs (the extra image)")
heic = pytest.mark.skipif(importlib.util.find_spec("pillow_heif") is None, reason="needs pillow-heif (the extra heic)")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

GREY_WHITE, GREY, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
ASSOCIATED, UNASSOCIATED = 1, 2


def unit(source: Any, **options: Any) -> np.ndarray:
    """Pixels ``[height, width, 3]`` on a scale from black 0 to white 1."""
    pixels = media.prepare_image(source, size=(1, 1), fit="none", **options).pixels
    assert pixels.dtype == torch.float32
    return ((pixels.double() + 1) / 2).permute(1, 2, 0).numpy()


def random_samples(bits: int, channels: int, height: int = 7, width: int = 11, seed: int = 0) -> np.ndarray:
    """Integers of all levels, with black and full scale among them."""
    samples = np.random.default_rng(seed).integers(0, 1 << bits, (height, width, channels), np.int64)
    samples[0, 0], samples[0, 1] = 0, (1 << bits) - 1
    return samples


def on_white(colours: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    return colours * opacity + 1 - opacity


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.broadcast_to(grey, (*grey.shape[:2], 3))


def tolerance(bits: int) -> float:
    """Pillow keeps what has 8 bits or less at 8 bits; everything else is exact but for float32."""
    return 1.01 / 255 if bits <= 8 else 1e-6


# ---- the cases of the issue


@pytest.mark.parametrize(
    ("name", "left", "right"),
    [
        ("grey-12bit-full-scale.tif", (255,) * 3, (255,) * 3),
        ("grey-16bit-min-is-white-zeros.tif", (255,) * 3, (255,) * 3),
        ("rgb-16bit-planar.tif", (16, 128, 240), (16, 128, 240)),
        ("grey-2bit-trns.png", (255,) * 3, (170,) * 3),
        ("rgb-16bit-trns.png", (255,) * 3, (127.5,) * 3),
        ("float-zeros.tif", (0,) * 3, (0,) * 3),
        ("float-ones.tif", (255,) * 3, (255,) * 3),
        ("apng-hidden-default.png", (255, 0, 0), (255, 0, 0)),
    ],
)
@codecs
def test_cases(name: str, left: tuple[float, ...], right: tuple[float, ...]) -> None:
    for source in (CASES / name, (CASES / name).read_bytes(), Image.open(CASES / name)):
        pixels = unit(source) * 255
        assert np.abs(pixels[:, 0] - left).max() < 1 and np.abs(pixels[:, -1] - right).max() < 1
    assert media.image_info(CASES / name) == (pixels.shape[1], pixels.shape[0])


def test_deep_jpeg2000_of_other_colours_is_refused_by_name() -> None:
    with pytest.raises(zoo.InputError, match=r"12, 12, 12 bits in the colour space sYCC.*convert it to RGB"):
        unit(CASES / "rgb-12bit.jp2")


# ---- TIFF


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 32])
@pytest.mark.parametrize("layout", ["grey", "grey white", "grey alpha", "rgb", "rgb alpha", "rgb other", "cmyk", "ycbcr"])
@codecs
def test_tiff_of_every_depth(bits: int, layout: str) -> None:
    largest = (1 << bits) - 1
    photometric, channels = {
        "grey": (GREY, 1),
        "grey white": (GREY_WHITE, 1),
        "grey alpha": (GREY, 2),
        "rgb": (RGB, 3),
        "rgb alpha": (RGB, 4),
        "rgb other": (RGB, 4),
        "cmyk": (CMYK, 4),
        "ycbcr": (YCBCR, 3),
    }[layout]
    samples = random_samples(bits, channels)
    if layout == "ycbcr" and bits < 4:
        pytest.skip("chroma has no zero")
    share = samples / largest
    expected = {
        "grey": lambda: rgb(share),
        "grey white": lambda: rgb(1 - share),
        "grey alpha": lambda: rgb(on_white(share[..., :1], share[..., 1:])),
        "rgb": lambda: share,
        "rgb alpha": lambda: on_white(share[..., :3], share[..., 3:]),
        "rgb other": lambda: share[..., :3],
        "cmyk": lambda: (1 - share[..., :3]) * (1 - share[..., 3:]),
        "ycbcr": lambda: from_ycbcr(samples, bits),
    }[layout]()
    extra = {"grey alpha": {338: UNASSOCIATED}, "rgb alpha": {338: UNASSOCIATED}, "rgb other": {338: 0}}.get(layout, {})
    if layout == "ycbcr":
        extra = {530: (1, 1)}
    for order, planar, tile, deflate in itertools.product("<>", (False, True), (0, 16), (False, True)):
        content = tiff_file(samples, bits, photometric, order=order, planar=planar, tile=tile, deflate=deflate, tags=extra)
        assert np.abs(unit(content) - expected).max() < 2 * tolerance(bits), (order, planar, tile, deflate)


def from_ycbcr(samples: np.ndarray, bits: int) -> np.ndarray:
    """The matrix of Rec. 601, written out as JFIF does."""
    luma, blue, red = np.moveaxis(samples.astype(np.float64), 2, 0)
    blue, red = blue - (1 << (bits - 1)), red - (1 << (bits - 1))
    colours = [luma + 1.402 * red, luma - 0.344136286 * blue - 0.714136286 * red, luma + 1.772 * blue]
    return (np.stack(colours, axis=-1) / ((1 << bits) - 1)).clip(0, 1)


@pytest.mark.parametrize("bits", [8, 12, 16])
@codecs
def test_associated_opacity_is_not_multiplied_again(bits: int) -> None:
    largest = (1 << bits) - 1
    samples = random_samples(bits, 4)
    samples[..., :3] = np.minimum(samples[..., :3], samples[..., 3:])
    samples[0, 0] = (0, 0, 0, 0)
    share = samples / largest
    expected = share[..., :3] + 1 - share[..., 3:]
    pixels = unit(tiff_file(samples, bits, RGB, tags={338: ASSOCIATED}))
    assert np.abs(pixels - expected).max() < (2 / 255 if bits == 8 else 1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
@codecs
def test_palettes_of_every_depth(bits: int) -> None:
    colours = np.random.default_rng(1).integers(0, 1 << 16, (3, 1 << bits))
    samples = random_samples(bits, 1)
    expected = colours.T[samples[..., 0]] / 65_535
    for order in "<>":
        content = tiff_file(samples, bits, PALETTE, order=order, tags={320: tuple(colours.ravel().tolist())})
        assert np.abs(unit(content) - expected).max() < tolerance(bits)


@pytest.mark.parametrize("compression", ["none", "zlib", "lzw", "packbits", "zstd", "lzma", "webp", "jpeg", "jpeg2000"])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "float16", "float32", "float64"])
@codecs
def test_tiff_compressions_predictors_and_floats(compression: str, kind: str) -> None:
    dtype = np.dtype(kind)
    if (compression in ("webp", "jpeg") and kind != "uint8") or (compression == "jpeg2000" and dtype.itemsize > 2):
        pytest.skip("not a depth of this compression")
    if compression == "jpeg2000" and dtype.kind == "f":
        pytest.skip("not a depth of this compression")
    rows, columns = np.mgrid[0:48, 0:64]
    smooth = np.stack([rows / 48, columns / 64, (rows + columns) / 112], axis=-1)
    scale = 1 if dtype.kind == "f" else np.iinfo(dtype).max
    array = (smooth * scale).astype(dtype)
    limit = {"webp": 0.03, "jpeg": 0.03}.get(compression, tolerance(8 * dtype.itemsize))
    predictors = [False, True] if compression in ("zlib", "lzw", "zstd") else [False]
    for order, planar, predictor, tile in itertools.product("<>", ("contig", "separate"), predictors, (None, (16, 16))):
        if compression in ("webp", "jpeg", "jpeg2000") and planar == "separate":
            continue
        if compression == "jpeg2000" and order == ">":
            continue  # tifffile writes the bytes of its samples in the wrong order
        options: dict[str, Any] = {"compression": None if compression == "none" else compression, "byteorder": order}
        data = np.moveaxis(array, 2, 0) if planar == "separate" else array
        buffer = io.BytesIO()
        bigtiff = tile is not None
        tifffile.imwrite(
            buffer, data, photometric="rgb", planarconfig=planar, predictor=predictor, tile=tile, bigtiff=bigtiff, **options
        )
        pixels = unit(buffer.getvalue())
        assert np.abs(pixels - array.astype(np.float64) / scale).max() < max(limit, 1e-6), (order, planar, predictor, tile)


@codecs
def test_tiff_orientation() -> None:
    samples = random_samples(12, 3)
    share = samples / 4095
    turned = {
        2: share[:, ::-1],
        3: share[::-1, ::-1],
        4: share[::-1],
        5: share.transpose(1, 0, 2),
        6: np.rot90(share, -1),
        7: share[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(share),
        9: share,
    }
    for orientation, expected in turned.items():
        content = tiff_file(samples, 12, RGB, tags={274: orientation})
        assert np.abs(unit(content) - expected).max() < 1e-6
        assert media.image_info(content) == (expected.shape[1], expected.shape[0])
        eight_bits = tiff_file(samples >> 4, 8, RGB, tags={274: orientation})
        assert media.image_info(eight_bits) == (expected.shape[1], expected.shape[0]) == unit(eight_bits).shape[1::-1]


@codecs
def test_deep_grey_equals_what_other_readers_give() -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    samples = random_samples(16, 3, 20, 30).astype(np.uint16)
    content = imagecodecs.tiff_encode(samples) if hasattr(imagecodecs, "tiff_encode") and imagecodecs.TIFF.available else None
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, samples, photometric="rgb", compression="lzw", predictor=True)
    for file in (buffer.getvalue(), content):
        if file is None:
            continue
        assert np.array_equal(imagecodecs.tiff_decode(file), samples)
        assert np.abs(unit(file) - samples / 65_535).max() < 1e-6


def pages(*arrays: np.ndarray, **first: Any) -> bytes:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for index, (array, subfile) in enumerate(zip(arrays, first.pop("subfiles", [0] * len(arrays)), strict=True)):
            options = first if index == 0 else {}
            if subfile & 4:
                array, options = array.astype(bool), {**options, "photometric": "mask"}
            writer.write(array, subfiletype=subfile, metadata=None, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_smaller_copies_and_masks_are_no_pages(dtype: str) -> None:
    scale = 1 if dtype == "float32" else np.iinfo(dtype).max
    full = (np.linspace(0, 1, 64).reshape(8, 8) * scale).astype(dtype)
    small, mask = full[::2, ::2], np.ones((8, 8), np.uint8)
    expected = rgb((full / scale)[..., None])
    for file in (
        pages(full, small, subfiles=[0, 1]),
        pages(full, mask, small, mask, subfiles=[0, 4, 1, 5]),
        pages(small, full, subfiles=[1, 0]),
        pages(full, small, subfiles=[0, 1], subifds=1),
    ):
        assert np.abs(unit(file) - expected).max() < 1e-6 + (0.5 / 255 if dtype == "uint8" else 0)
        assert media.image_info(file) == (8, 8)
    # A preview comes first, and the picture hangs on it.
    assert np.abs(unit(pages(small, full, subfiles=[1, 0], subifds=1)) - expected).max() < 1e-2
    # The old SubfileType.
    samples = random_samples(8, 1)
    assert unit(tiff_file(samples, 8, GREY, tags={255: 2})).shape == (7, 11, 3)
    for several in (pages(full, full), pages(full, small, full, subfiles=[0, 1, 2])):
        with pytest.raises(zoo.InputError, match="has pages, 2 frames in all"):
            unit(several)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tiff_file(random_samples(16, 1), 16, GREY, tags={339: 2}), r"signed integers.*range=\(-32768, 32767\)"),
        (tiff_file(random_samples(8, 1), 8, GREY, tags={339: 2}), "signed integers"),
        (tiff_file(random_samples(12, 1), 12, 32_803), "CFA.*convert it to RGB"),
        (tiff_file(random_samples(16, 3), 16, 8), "CIELAB"),
        (tiff_file(random_samples(16, 1), 16, GREY, tags={339: 6}), "16-bit COMPLEXIEEEFP samples"),
        (tiff_file(random_samples(12, 3), 12, RGB, tags={258: (5, 6, 5)}), "differ in kind"),
        (tiff_file(random_samples(12, 2), 12, RGB), "2 samples a pixel where 3 are needed"),
        (tiff_file(random_samples(12, 1), 12, GREY)[:60], "without a page"),
        (tiff_file(random_samples(12, 1), 12, GREY, tags={257: 60_000, 278: 60_000}), "bytes cannot hold"),
        (tiff_file(random_samples(12, 1), 12, GREY, tags={257: 60_000, 256: 60_000}), "max_pixels"),
        (tiff_file(random_samples(12, 1), 12, PALETTE), "palette is missing"),
        (tiff_file(random_samples(12, 1), 12, GREY, tags={259: 34_712}), "truncated, damaged"),
        (tiff_file(random_samples(12, 1), 12, GREY, tags={259: 65_123}), "65123"),
    ],
)
def test_tiff_that_cannot_be_read(content: bytes, reason: str) -> None:
    with pytest.raises(zoo.InputError, match=reason):
        unit(content)


@codecs
def test_signed_tiff_with_its_range() -> None:
    samples = random_samples(16, 3)
    signed = (samples - 32_768).astype(np.int16)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, signed, photometric="rgb", compression="zlib")
    assert np.abs(unit(buffer.getvalue(), range=(-32_768, 32_767)) - samples / 65_535).max() < 1e-6
    with pytest.raises(zoo.InputError, match="lie in"):
        unit(buffer.getvalue(), range=(-100, 100))


# ---- floating point


def float_tiff(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **{"photometric": "rgb" if array.ndim == 3 else "minisblack", **options})
    return buffer.getvalue()


def pfm_file(array: np.ndarray, order: str) -> bytes:
    height, width = array.shape[:2]
    header = f"{'PF' if array.ndim == 3 else 'Pf'}\n{width} {height}\n{-1.0 if order == '<' else 1.0}\n".encode()
    return header + array[::-1].astype(f"{order}f4").tobytes()


def test_range_of_floating_point() -> None:
    share = np.random.default_rng(0).random((6, 9, 3), np.float32)
    share[0, 0], share[0, 1] = 0, 1
    files = [float_tiff, lambda a: pfm_file(a, "<"), lambda a: pfm_file(a, ">")]
    for file in files:
        assert np.abs(unit(file(share)) - share).max() < 1e-6
        assert np.abs(unit(file(share[..., 0])) - share[..., :1]).max() < 1e-6
        assert np.abs(unit(file(share), range="unit") - share).max() < 1e-6
        assert np.abs(unit(file(share * 2 - 1), range="signed") - share).max() < 1e-6
        assert np.abs(unit(file(share * 80 - 30), range=(-30, 50)) - share).max() < 1e-6
        with pytest.raises(zoo.InputError, match=r"reach from -1 to 1: pass range='signed'"):
            unit(file(share * 2 - 1))
        with pytest.raises(zoo.InputError, match=r"range=\(0, 255\)"):
            unit(file(share * 255))
        with pytest.raises(zoo.InputError, match=r"range=\(0, 65535\)"):
            unit(file(share * 65_535))
        with pytest.raises(zoo.InputError, match="NaN or infinite"):
            unit(file(np.where(share > 0.5, np.nan, share)))
    # Arrays are signed unless something else is said.
    for array in (share, torch.from_numpy(share).permute(2, 0, 1)):
        assert np.abs(unit(array) - (share + 1) / 2).max() < 1e-6
        assert np.abs(unit(array, range="unit") - share).max() < 1e-6
        assert np.abs(unit(array * 255, range=(0, 255)) - share).max() < 1e-6
    grey = Image.fromarray(share[..., 0])
    assert np.abs(unit(grey) - (share[..., :1] + 1) / 2).max() < 1e-6
    assert np.abs(unit(grey, range="unit") - share[..., :1]).max() < 1e-6
    opened = Image.open(io.BytesIO(float_tiff(share[..., 0])))
    assert np.abs(unit(opened) - share[..., :1]).max() < 1e-6
    opened.load()
    assert np.abs(unit(opened) - share[..., :1]).max() < 1e-6


def test_min_is_white_of_floating_point() -> None:
    share = np.random.default_rng(0).random((6, 9), np.float32)
    assert np.abs(unit(float_tiff(share, photometric="miniswhite")) - (1 - share[..., None])).max() < 1e-6


def test_opacity_of_floating_point() -> None:
    share = np.random.default_rng(0).random((6, 9, 4), np.float32)
    expected = on_white(share[..., :3], share[..., 3:])
    file = float_tiff(share, photometric="rgb", extrasamples=["unassalpha"])
    assert np.abs(unit(file) - expected).max() < 1e-6
    assert np.abs(unit(share, range="unit") - expected).max() < 1e-6


@pytest.mark.parametrize(
    ("array", "hint"),
    [
        (np.array([[0.0, 255.0]]), r"pass 0\.\.255 as uint8, or range=\(0, 255\)"),
        (np.array([[0.0, 300.0]]), r"0\.\.65535 as uint16, or range=\(0, 65535\)"),
        (np.array([[-32_768.0, 32_767.0]]), r"range=\(-32768, 32767\)"),
        (np.array([[-1e9, 1e9]]), r"pass range=\(black, white\)"),
    ],
)
def test_arrays_of_integers_in_floating_point(array: np.ndarray, hint: str) -> None:
    for source in (array, torch.from_numpy(array)[None]):
        with pytest.raises(zoo.InputError, match=hint):
            unit(source)


@pytest.mark.parametrize("wrong", ["signal", (1, 1), (2, 1), (0, float("inf")), (1.0, 2.0, 3.0), (0.5,)])
def test_wrong_ranges(wrong: Any) -> None:
    with pytest.raises(zoo.InputError, match="range must"):
        media.prepare_image(np.zeros((2, 2), np.uint8), (1, 1), range=wrong)


# ---- PNG


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_transparent_grey_of_png(bits: int) -> None:
    largest = (1 << bits) - 1
    samples = random_samples(bits, 1)
    for key in {0, 1, largest, largest // 2}:
        samples[3, 4] = key
        file = png_file(samples, bits, 0, tRNS=struct.pack(">H", key))
        expected = rgb(np.where(samples == key, 1, samples / largest))
        assert np.abs(unit(file) - expected).max() < tolerance(bits)
        assert np.abs(unit(Image.open(io.BytesIO(file))) - expected).max() < tolerance(bits)


@pytest.mark.parametrize("bits", [8, 16])
def test_transparent_colour_of_png(bits: int) -> None:
    largest = (1 << bits) - 1
    samples = random_samples(bits, 3)
    key = samples[2, 2]
    # Other pixels that agree with it in all but the last bit.
    samples[5] = key ^ 1
    file = png_file(samples, bits, 2, tRNS=struct.pack(">3H", *key))
    expected = np.where((samples == key).all(-1, keepdims=True), 1, samples / largest)
    assert np.abs(unit(file) - expected).max() < tolerance(bits)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_transparent_palettes_of_png(bits: int) -> None:
    colours = np.random.default_rng(2).integers(0, 256, (1 << bits, 3))
    opacity = np.random.default_rng(3).integers(0, 256, 1 << bits)
    samples = random_samples(bits, 1)
    file = png_file(samples, bits, 3, PLTE=colours.astype(np.uint8).tobytes(), tRNS=opacity.astype(np.uint8).tobytes())
    index = samples[..., 0]
    expected = on_white(colours[index] / 255, opacity[index][..., None] / 255)
    assert np.abs(unit(file) - expected).max() < 1.01 / 255


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_png_of_sixteen_bits(colour_type: int, channels: int) -> None:
    samples = random_samples(16, channels)
    share = samples / 65_535
    expected = share if channels in (1, 3) else on_white(share[..., :-1], share[..., -1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.rot90(np.broadcast_to(expected, (7, 11, 3)), -1)
    file = png_file(samples, 16, colour_type)
    assert np.abs(unit(file) - expected).max() < 1e-6
    before = png_file(samples, 16, colour_type, eXIf=exif.tobytes()[6:])
    assert np.abs(unit(before) - turned).max() < 1e-6
    # The chunk may stand behind the pixels.
    behind = file[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + file[-12:]
    assert np.abs(unit(behind) - turned).max() < 1e-6
    assert media.image_info(before) == media.image_info(behind) == (7, 11)
    for size in (len(file) - 30, len(file) * 2 // 3):
        with pytest.raises(zoo.InputError, match="truncated"):
            unit(file[:size])


def test_interlaced_png_of_sixteen_bits() -> None:
    samples = random_samples(16, 3, 4, 5)
    rows = b""
    for top, left, down, right in (
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ):
        part = samples[top::down, left::right]
        rows += b"".join(b"\0" + row.astype(">u2").tobytes() for row in part if row.size)
    header = struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 1)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.abs(unit(file) - samples / 65_535).max() < 1e-6


# ---- Netpbm


@pytest.mark.parametrize("largest", [1, 100, 255, 256, 1023, 4095, 32_767, 65_535])
@pytest.mark.parametrize("channels", [1, 3])
def test_netpbm_of_every_maxval(largest: int, channels: int) -> None:
    samples = np.random.default_rng(0).integers(0, largest + 1, (5, 6, channels))
    samples[0, 0] = largest
    size = f"# a comment\n6 5 # of two\n{largest}\n"
    kind = ">u2" if largest > 255 else "u1"
    binary = f"P{5 if channels == 1 else 6}\n{size}".encode() + samples.astype(kind).tobytes()
    digits = " ".join(map(str, samples.ravel())) + "\n# the end"
    plain = f"P{2 if channels == 1 else 3}\n{size}{digits}".encode()
    for file in (binary, plain):
        assert np.abs(unit(file) - samples / largest).max() < (1.01 / 255 if largest <= 255 else 1e-6)
        assert media.image_info(file) == (6, 5)
    if largest > 255:
        for wrong in (binary[:-1], plain[: -len(digits) // 2], plain.replace(b" ", b" x", 30)):
            with pytest.raises(zoo.InputError, match=r"truncated|damaged"):
                unit(wrong)
        with pytest.raises(zoo.InputError, match="max_pixels = 29"):
            unit(binary, max_pixels=29)
    if 255 < largest < 65_535:
        with pytest.raises(zoo.InputError, match="more than its maxval"):
            unit(binary[:-2] + b"\xff\xff")


# ---- JPEG 2000


@pytest.mark.parametrize("bits", [4, 8, 10, 12, 16])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", ["jp2", "j2k"])
@codecs
def test_jpeg2000_of_every_depth(bits: int, channels: int, kind: str) -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    samples = random_samples(bits, channels, 40, 50)
    share = samples / ((1 << bits) - 1)
    expected = on_white(share[..., :3], share[..., 3:]) if channels == 4 else share
    for signed in (False, True):
        shift = (1 << (bits - 1)) if signed else 0
        dtype = np.dtype(f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}")
        array = (samples - shift).astype(dtype).squeeze()
        file = imagecodecs.jpeg2k_encode(array, level=0, reversible=True, bitspersample=bits, codecformat=kind)
        assert np.abs(unit(file) - expected).max() < (1.01 / 255 if bits == 8 else 1e-6)
        assert media.image_info(file) == (50, 40)
    if bits != 8:
        with pytest.raises(zoo.InputError, match=r"truncated|damaged"):
            unit(file[: len(file) // 3])
        with pytest.raises(zoo.InputError, match="max_pixels"):
            unit(file, max_pixels=1999)


# ---- HEIC


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@heic
def test_heic_of_every_depth(bits: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    monkeypatch.setattr(pillow_heif.options, "SAVE_HDR_TO_12_BIT", bits == 12)
    rows, columns = np.mgrid[0:64, 0:96]
    smooth = np.stack([rows / 63, columns / 95, rows / 126 + columns / 190, 1 - rows / 63], axis=-1)
    smooth = smooth[..., : len(mode)]
    dtype = np.uint8 if bits == 8 else np.uint16
    array = (smooth * np.iinfo(dtype).max).round().astype(dtype)
    file = pillow_heif.from_bytes(mode if bits == 8 else f"{mode};16", (96, 64), array.tobytes())
    buffer = io.BytesIO()
    file.save(buffer, quality=-1, chroma=444)
    expected = on_white(smooth[..., :3], smooth[..., 3:]) if mode == "RGBA" else smooth
    pixels = unit(buffer.getvalue())
    assert np.abs(pixels - expected).max() < 3 / 255
    assert pixels.max() == 1
    assert media.image_info(buffer.getvalue()) == (96, 64)
    with pytest.raises(zoo.InputError, match="max_pixels"):
        unit(buffer.getvalue(), max_pixels=100)
    with pytest.raises(zoo.InputError, match="truncated"):
        unit(buffer.getvalue()[: len(buffer.getvalue()) // 2])


# ---- what is missing is named


def test_missing_extras_are_named(tmp_path: Path) -> None:
    """Without imagecodecs and pillow-heif the files that need them are refused, and all others are read."""
    (tmp_path / "deep.tif").write_bytes(tiff_file(random_samples(12, 1), 12, GREY))
    (tmp_path / "deep.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40))
    (tmp_path / "read.tif").write_bytes(tiff_file(random_samples(16, 3), 16, RGB, planar=True, deflate=True))
    (tmp_path / "deep.j2k").write_bytes((CASES / "rgb-12bit.jp2").read_bytes().replace(b"\0\0\0\x12", b"\0\0\0\x10"))
    program = f"""
        import importlib.util, sys
        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name in ("imagecodecs", "pillow_heif") else real(name, *rest)
        sys.modules["imagecodecs"] = sys.modules["pillow_heif"] = None
        import zoo
        from zoo import media
        from pathlib import Path
        for path in sorted(Path({str(tmp_path)!r}).iterdir()):
            try:
                print(path.name, media.prepare_image(path, (1, 1), fit="none").pixels.shape[0])
            except zoo.InputError as error:
                print(path.name, error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert lines["read.tif"] == "3"
    assert "pip install 'tokenizer-zoo[image]'" in lines["deep.tif"]
    assert "pip install 'tokenizer-zoo[image]'" in lines["deep.j2k"]
    assert "pip install 'tokenizer-zoo[heic]'" in lines["deep.heic"]


# ---- sizes without pixels


def test_image_info_reads_headers_alone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF"):
        buffer = io.BytesIO()
        image.save(buffer, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
        expected = (20, 30) if kind in ("PNG", "JPEG", "WEBP") else (30, 20)
        assert media.image_info(buffer.getvalue()) == expected, kind
        assert unit(buffer.getvalue()).shape[1::-1] == expected
    assert media.image_info(image) == (30, 20)
    assert media.image_info(np.zeros((20, 30), np.uint8)) == media.image_info(torch.zeros(3, 20, 30)) == (30, 20)
    header = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 50_000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"\0")
    )
    assert media.image_info(header) == (40_000, 50_000)
    for wrong in (b"", b"no image", 3, "/nowhere.png"):
        with pytest.raises(zoo.InputError):
            media.image_info(wrong)


def test_encode_takes_a_range(tmp_path: Path) -> None:
    share = np.random.default_rng(0).random((64, 64, 3), np.float32)
    (tmp_path / "unit.tif").write_bytes(float_tiff(share))
    (tmp_path / "signed.tif").write_bytes(float_tiff(share * 2 - 1))
    for name in ("flextok-tiny", "tokenflow-tiny"):
        tokenizer = zoo.load(name)
        expected = tokenizer.encode(share * 2 - 1).ids
        assert torch.equal(tokenizer.encode(tmp_path / "unit.tif").ids, expected)
        assert torch.equal(tokenizer.encode(tmp_path / "signed.tif", range="signed").ids, expected)
        assert torch.equal(tokenizer.encode(share, range="unit").ids, expected)
        assert torch.equal(tokenizer.encode(share * 4, range=(0, 4)).ids, expected)
        with pytest.raises(zoo.InputError, match=r"item 0.*range='signed'"):
            tokenizer.encode(tmp_path / "signed.tif")
    runner = CliRunner()
    for file, given in (("unit.tif", "unit"), ("signed.tif", "signed"), ("signed.tif", "-1,1")):
        result = runner.invoke(app, ["encode", name, str(tmp_path / file), "-o", str(tmp_path / "x.zt"), "--range", given])
        assert result.exit_code == 0, result.output
        assert torch.equal(zoo.Tokens.load(tmp_path / "x.zt").ids, expected)


# ---- damage


DAMAGED = {
    "tiff": lambda: tiff_file(random_samples(12, 3), 12, RGB),
    "tiff tiles": lambda: tiff_file(random_samples(12, 3), 12, RGB, order=">", tile=16, deflate=True),
    "tiff 24": lambda: tiff_file(random_samples(24, 1), 24, GREY, deflate=True),
    "tiff palette": lambda: tiff_file(random_samples(4, 1), 4, PALETTE, tile=16, tags={320: [7] * 48}),
    "tiff pages": lambda: pages(np.zeros((8, 8), np.uint16), np.zeros((4, 4), np.uint16), subfiles=[0, 1], subifds=1),
    "tiff float": lambda: float_tiff(np.random.default_rng(0).random((6, 9, 3), np.float32)),
    "png": lambda: png_file(random_samples(16, 4), 16, 6),
    "png grey": lambda: png_file(random_samples(1, 1), 1, 0, tRNS=b"\0\1"),
    "ppm": lambda: b"P6\n5 5\n1023\n" + np.zeros(75, ">u2").tobytes(),
    "ppm digits": lambda: b"P3\n2 2\n1023\n" + b" 77" * 12,
    "pfm": lambda: pfm_file(np.zeros((4, 4, 3)), "<"),
    "jp2": lambda: (CASES / "rgb-12bit.jp2").read_bytes().replace(b"\0\0\0\x12", b"\0\0\0\x10"),
}


@pytest.mark.parametrize("kind", DAMAGED)
@codecs
def test_damage_raises_nothing_but_input_errors(kind: str) -> None:
    content = DAMAGED[kind]()
    random = np.random.default_rng(0)
    assert unit(content).shape[2] == 3
    for _ in range(120):
        damaged = bytearray(content)
        for place in random.integers(0, len(content), random.integers(1, 4)):
            damaged[place] = random.choice([0, 1, 127, 128, 255])
        if random.random() < 0.2:
            del damaged[random.integers(1, len(content)) :]
        for read in (unit, media.image_info):
            try:
                read(bytes(damaged))
            except zoo.InputError as error:
                assert "image bytes" in str(error)


def test_claims_of_small_files_take_no_memory() -> None:
    """Headers of nearly 100 million pixels in front of a few bytes."""
    program = """
        import resource, struct, sys, zlib
        import numpy as np
        import zoo
        from small_images import chunk, png_file, tiff_file
        from zoo import media

        def png(depth, colour):
            header = chunk(b"IHDR", struct.pack(">IIBBBBB", 9900, 9900, depth, colour, 0, 0, 0))
            return b"\\x89PNG\\r\\n\\x1a\\n" + header + chunk(b"IDAT", zlib.compress(b"\\0")) + chunk(b"IEND", b"")

        black = np.zeros((3, 4, 3), int)
        size = {256: 9900, 257: 9900}
        files = [png(16, 6), png(8, 2), png(16, 0)]
        files += [tiff_file(black, bits, 2, tags=size | {278: 9900}) for bits in (8, 12, 16, 24)]
        files += [tiff_file(black, 16, 2, deflate=True, tags=size | {278: 9900})]
        files += [tiff_file(black, 16, 2, deflate=True, tile=16, tags={322: 30_000, 323: 30_000})]
        files += [b"P6 9900 9900 65535 ab", b"P3 9900 9900 1023 1 2", b"PF 9900 9900 -1.0 ab"]
        media.prepare_image(tiff_file(black, 16, 2, planar=True), (1, 1), fit="none")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for content in files:
            try:
                media.prepare_image(content, (1, 1), fit="none")
            except zoo.InputError as error:
                assert "truncated" in str(error) or "damaged" in str(error), error
            else:
                raise SystemExit("was read")
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60 * 1024

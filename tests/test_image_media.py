"""Reading, fitting, restoring and writing images."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, features
from torch import Tensor
from torchvision import transforms

import zoo
from zoo import media

# Pillow warns of damage before it raises.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """An 8-bit RGB image in which every pixel differs."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def smooth(height: int, width: int) -> Tensor:
    """A float image that survives resizing."""
    rows, columns = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    return torch.stack([rows.expand(height, width), columns.expand(height, width), 0.5 * rows * columns])


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def as_is(source: Any, **options: Any) -> Tensor:
    return media.prepare_image(source, size=(1, 1), fit="none", **options).pixels


def levels(pixels: Tensor) -> list[float]:
    """The first pixel on the scale of 0..255."""
    return ((pixels[:, 0, 0] + 1) * 127.5).tolist()


def png_header(width: int, height: int) -> bytes:
    """A black-and-white PNG that claims a size and ends before its pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(b"\0")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) for body in (chunk, pixels)
    )


# ---- sources


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    array = noise(5, 7)
    image = Image.fromarray(array)
    image.save(tmp_path / "image.png")
    content = (tmp_path / "image.png").read_bytes()
    expected = torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1
    for source in (
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
        content,
        bytearray(content),
        memoryview(content),
        image,
        array,
        array[::-1][::-1],
        torch.from_numpy(array).permute(2, 0, 1),
        array.astype(np.uint16) * 257,
        array.astype(">u2") * 257,
        (torch.from_numpy(array).permute(2, 0, 1).int() * 257).to(torch.uint16),
        array / 127.5 - 1,
        (array / 127.5 - 1).astype(np.float32),
        expected,
        expected.double().requires_grad_(),
    ):
        prepared = media.prepare_image(source, size=(5, 7))
        assert prepared.pixels.dtype == torch.float32
        assert (prepared.pixels - expected).abs().max() < 1e-6
        assert prepared.meta == {"width": 7, "height": 5, "fit": "crop"}


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("YCbCr", (90, 128, 128), (90, 90, 90)),
        ("RGBA", (200, 100, 0, 255), (200, 100, 0)),
        ("RGBA", (200, 100, 0, 0), (255, 255, 255)),
        ("RGBA", (200, 100, 0, 51), (244, 224, 204)),
        ("LA", (100, 51), (224, 224, 224)),
        ("PA", (0, 0), (255, 255, 255)),
        ("I;16", 1000, (3.8911,) * 3),
        ("I;16B", 65_535, (255, 255, 255)),
        ("I", 32_896, (128, 128, 128)),
        ("F", -0.5, (63.75, 63.75, 63.75)),
    ],
)
def test_modes(mode: str, colour: Any, expected: tuple[float, ...]) -> None:
    assert levels(as_is(Image.new(mode, (3, 2), colour))) == pytest.approx(expected, abs=1e-3)


def test_palettes_and_transparent_colours() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 8, 7, 50, 60, 70])
    palette.putdata([1, 0])
    assert levels(as_is(encoded(palette))) == pytest.approx((50, 60, 70), abs=1e-3)
    assert levels(as_is(encoded(palette, transparency=1))) == pytest.approx((255,) * 3, abs=1e-3)
    for mode, colour in (("RGB", (1, 2, 3)), ("L", 5), ("I;16", 300)):
        content = encoded(Image.new(mode, (1, 1), colour), transparency=colour)
        assert levels(as_is(content)) == pytest.approx((255,) * 3, abs=1e-3)


def test_sixteen_bits_keep_their_steps() -> None:
    ramp = np.arange(0, 65_536, 13, dtype=np.uint16)[None]
    expected = torch.from_numpy(ramp.astype(np.float64) / 32_767.5 - 1).float()
    for source in (ramp, encoded(Image.fromarray(ramp)), encoded(Image.fromarray(ramp), "TIFF")):
        assert (as_is(source) - expected).abs().max() < 1e-6


def test_alpha_of_arrays_and_tensors_is_laid_on_white() -> None:
    pixels = torch.tensor([0.5, -0.25, -1.0, -0.5])[:, None, None]  # a quarter opaque
    expected = [0.25 * 0.5 + 0.75, 0.25 * -0.25 + 0.75, 0.25 * -1 + 0.75]
    assert as_is(pixels).flatten().tolist() == pytest.approx(expected)
    assert as_is(pixels.permute(1, 2, 0).numpy()).flatten().tolist() == pytest.approx(expected)
    shorts = ((pixels + 1) * 32_767.5).round().to(torch.int32).to(torch.uint16)
    assert as_is(shorts).flatten().tolist() == pytest.approx(expected, abs=1e-4)


def test_exif_orientation() -> None:
    stored = noise(4, 6)
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored),
    }
    for orientation, expected in upright.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        prepared = media.prepare_image(encoded(Image.fromarray(stored), exif=exif), size=(4, 4), fit="none")
        assert prepared.meta == {"width": expected.shape[1], "height": expected.shape[0], "fit": "none"}
        assert (prepared.pixels - (torch.tensor(expected.copy()).permute(2, 0, 1) / 127.5 - 1)).abs().max() < 1e-6


def test_photographs_with_a_second_picture_inside_are_one_image() -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (4, 4), "blue")
    pixels = as_is(encoded(first, "MPO", save_all=True, append_images=[second]))
    assert pixels.shape == (3, 8, 8)
    assert levels(pixels) == pytest.approx((255, 0, 0), abs=3)


# ---- geometry


@pytest.mark.parametrize(("height", "width"), [(48, 48), (100, 37), (37, 100), (1000, 999), (20, 31), (1, 1), (64, 300)])
@pytest.mark.parametrize("side", [48, 64])
def test_crop_equals_the_transform_that_tokenizers_were_trained_with(height: int, width: int, side: int) -> None:
    upstream = transforms.Compose(
        [
            transforms.Resize(side),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    array = noise(height, width)
    assert torch.equal(media.prepare_image(array, size=(side, side)).pixels, upstream(Image.fromarray(array)))


@pytest.mark.parametrize("fit", media.FITS)
def test_an_image_of_the_right_size_is_not_touched(fit: str) -> None:
    exact = torch.randn(3, 32, 48, generator=torch.Generator().manual_seed(0)).clamp(-1.4, 1.4)
    prepared = media.prepare_image(exact, size=(32, 48), fit=fit)
    assert torch.equal(prepared.pixels, exact)
    assert torch.equal(media.restore_image(prepared.pixels, prepared.meta), exact)


def test_crop_shows_the_middle_and_pad_shows_everything() -> None:
    wide = torch.full((3, 32, 96), -1.0)
    wide[:, :, 32:64] = 1
    cropped = media.prepare_image(wide, size=(16, 16)).pixels
    assert (cropped[:, :, 1:-1] == 1).all()
    padded = media.prepare_image(wide, size=(48, 48), fit="pad").pixels
    assert (padded[:, :16] == 0).all() and (padded[:, 32:] == 0).all()
    assert (padded[:, 16:32, 18:30] == 1).all() and (padded[:, 16:32, :14] == -1).all()
    stretched = media.prepare_image(wide, size=(48, 48), fit="stretch").pixels
    assert (stretched[:, :, 18:30] == 1).all() and (stretched[:, :, :14] == -1).all()


def test_eight_bits_and_floats_are_fitted_alike() -> None:
    array = noise(90, 130)
    for fit in ("crop", "stretch", "pad"):
        from_bytes = media.prepare_image(array, size=(40, 56), fit=fit).pixels
        from_floats = media.prepare_image(array / 127.5 - 1, size=(40, 56), fit=fit).pixels
        assert (from_bytes - from_floats).abs().max() < 2 / 127.5


@pytest.mark.parametrize("fit", media.FITS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (31, 17), (64, 64), (65, 200), (300, 7), (1, 400)])
def test_restoring_gives_the_original_size_and_place(fit: str, height: int, width: int) -> None:
    original = smooth(height, width)
    for size in ((64, 64), (32, 96)):
        prepared = media.prepare_image(original, size=size, fit=fit)
        assert prepared.pixels.shape == (3, *(size if fit != "none" else (height, width)))
        restored = media.restore_image(prepared.pixels, prepared.meta)
        assert restored.shape == (3, height, width)
        if min(height, width) < 16:
            continue
        kept = (restored != 0).any(0) if fit == "crop" else torch.ones(height, width, dtype=torch.bool)
        # Edges lose a little to the resizing; a picture in the wrong place would be off everywhere.
        assert (restored - original)[:, kept].abs().mean() < 0.02
        scale = max(size[0] / height, size[1] / width)
        share = (size[0] / height / scale) * (size[1] / width / scale) if fit == "crop" else 1
        assert kept.float().mean() == pytest.approx(share, abs=0.05)


def test_oblong_images() -> None:
    line = np.zeros((1, 2_000_000), np.uint8)
    with pytest.raises(zoo.InputError, match="too oblong to crop"):
        media.prepare_image(line, size=(256, 256))
    assert media.prepare_image(line, size=(256, 256), fit="pad").pixels.shape == (3, 256, 256)


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"width": 4, "height": 4},
        {"width": 0, "height": 4, "fit": "crop"},
        {"width": 4, "height": 4, "fit": "zoom"},
        {"width": 5, "height": 4, "fit": "none"},
        {"width": 1 << 40, "height": 1 << 40, "fit": "crop"},
    ],
)
def test_meta_that_cannot_be_restored(meta: dict[str, Any]) -> None:
    with pytest.raises(zoo.InputError):
        media.restore_image(torch.zeros(3, 4, 4), meta)


# ---- bad input


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"])
def test_truncated_files(kind: str, tmp_path: Path) -> None:
    content = encoded(Image.fromarray(noise(64, 64)), kind)
    for size in (len(content) // 3, len(content) * 9 // 10):
        (tmp_path / "cut").write_bytes(content[:size])
        with pytest.raises(zoo.InputError, match=r"cut is truncated|cut is not an image"):
            as_is(tmp_path / "cut")
    for size in range(1, 32):
        with pytest.raises(zoo.InputError):
            as_is(content[:size])


def test_damaged_files_raise_nothing_else() -> None:
    random = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF"):
        content = np.frombuffer(encoded(Image.fromarray(noise(16, 16)), kind), np.uint8)
        for _ in range(60):
            damaged = content.copy()
            damaged[random.integers(0, min(200, len(damaged)), 3)] = random.integers(0, 256, 3)
            try:
                assert as_is(damaged.tobytes(), max_pixels=10**6).shape[0] == 3
            except zoo.InputError:
                continue


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames_are_refused_until_one_is_chosen(kind: str) -> None:
    frames = [Image.new("RGB", (9, 8), colour) for colour in ("red", "lime", "blue")]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    for source in (content, Image.open(io.BytesIO(content))):
        with pytest.raises(zoo.InputError, match="3 frames"):
            as_is(source)
    image = Image.open(io.BytesIO(content))
    image.seek(1)
    assert levels(as_is(image)) == pytest.approx((0, 255, 0), abs=4)
    image.seek(0)
    assert levels(as_is(image.copy())) == pytest.approx((255, 0, 0), abs=4)


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    limit, truncated = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    for source in (png_header(20_000, 20_000), png_header(2**31 - 1, 2**31 - 1)):
        with pytest.raises(zoo.InputError, match="max_pixels = 100000000"):
            as_is(source)
    for source in (noise(10, 11), Image.fromarray(noise(10, 11)), encoded(Image.fromarray(noise(10, 11)))):
        assert as_is(source, max_pixels=110).shape == (3, 10, 11)
        with pytest.raises(zoo.InputError, match="11 x 10 = 110 pixels, more than max_pixels = 109"):
            as_is(source, max_pixels=109)
    # Beyond Pillow's own limit, which is the process's and not ours: decoding starts, without its warning or error.
    with warnings.catch_warnings(), pytest.raises(zoo.InputError, match="truncated"):
        warnings.simplefilter("error")
        as_is(png_header(13_500, 13_500), max_pixels=200_000_000)
    assert (limit, truncated) == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"", "is empty"),
        (b"not an image at all" * 9, "not an image file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image file"),
        ("/nowhere/image.png", "does not exist"),
        ("/", "is a folder"),
        (Image.new("RGB", (0, 3)), "is empty"),
        (np.zeros((0, 4, 3), np.uint8), "is empty"),
        (torch.zeros(3, 4, 0), "is empty"),
        (np.zeros((2, 4, 4, 3), np.uint8), "of shape"),
        (np.zeros(5, np.uint8), "of shape"),
        (np.zeros((3, 8, 8), np.uint8), "of shape"),
        (torch.zeros(8, 8), "of shape"),
        (torch.zeros(2, 8, 8), "of shape"),
        (torch.zeros(8, 8, 3), "of shape"),
        (np.zeros((4, 4), np.int64), "not int64"),
        (np.zeros((4, 4), bool), "not bool"),
        (torch.zeros(3, 4, 4, dtype=torch.complex64), "not complex64"),
        (torch.full((3, 4, 4), torch.nan), "NaN or infinite"),
        (np.full((4, 4), -np.inf), "NaN or infinite"),
        (torch.full((3, 4, 4), 255.0), r"reach from 255 to 255: pass 0\.\.255 as uint8"),
        (Image.new("F", (2, 2), 1000.0), "reach from"),
        (Image.new("I", (2, 2), 70_000), r"0\.\.65535"),
        (Image.new("I", (2, 2), -1), r"0\.\.65535"),
        ([[0.0, 1.0]], "not list"),
        (None, "not NoneType"),
    ],
)
def test_bad_sources(source: Any, reason: str) -> None:
    with pytest.raises(zoo.InputError, match=reason):
        media.prepare_image(source, size=(8, 8))


def test_unknown_fit() -> None:
    with pytest.raises(zoo.InputError, match="crop, stretch, pad, none"):
        media.prepare_image(noise(2, 2), size=(8, 8), fit="squeeze")


# ---- writing


@pytest.mark.parametrize(
    ("extension", "tolerance"), [("png", 0), ("tiff", 0), ("bmp", 0), ("jpg", 12), ("webp", 12), ("PNG", 0), ("ppm", 0)]
)
def test_written_images_are_read_back(extension: str, tolerance: int, tmp_path: Path) -> None:
    pixels = smooth(32, 40) * 1.2
    path = media.write_image(tmp_path / "new" / f"image.{extension}", pixels)
    assert [p.name for p in path.parent.iterdir()] == [f"image.{extension}"]
    expected = ((pixels.clamp(-1, 1) + 1) * 127.5).round()
    assert ((as_is(path) + 1) * 127.5 - expected).abs().max() <= tolerance + 1e-3


@pytest.mark.parametrize("taught", [False, True])
def test_every_extension_can_be_written_and_read(taught: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever other libraries have taught Pillow: imageio, when it is imported, makes it write HEIC."""
    Image.init()
    monkeypatch.delitem(Image.SAVE, "HEIF", raising=False)
    if taught:
        monkeypatch.setitem(Image.SAVE, "HEIF", lambda image, file, name: file.write(b"HEIC"))
    read_alone = {".heic", ".heif"}
    optional = {".avif": "avif", ".webp": "webp", ".jp2": "jpg_2000", ".j2k": "jpg_2000"}
    not_compiled = {extension for extension, feature in optional.items() if not features.check(feature)}
    for extension in sorted(read_alone):
        with pytest.raises(zoo.InputError, match="cannot write"):
            media.write_image(tmp_path / f"image{extension}", smooth(4, 4))
    for extension in sorted(set(media.IMAGE_EXTENSIONS) - read_alone - not_compiled):
        path = media.write_image(tmp_path / f"image{extension}", smooth(16, 16))
        assert (as_is(path) - smooth(16, 16)).abs().mean() < 0.7, extension
    with pytest.raises(zoo.InputError, match=r"\.xyz"):
        media.write_image(tmp_path / "image.xyz", smooth(4, 4))
    assert not (tmp_path / "image.xyz").exists()


def test_bicubic_is_pillows_and_does_not_overshoot() -> None:
    levels = 255 * np.random.default_rng(0).integers(0, 2, (40, 40, 3), np.uint8)
    expected = np.asarray(Image.fromarray(levels).resize((13, 17), Image.Resampling.BICUBIC), np.float32)
    floats = torch.from_numpy(levels).permute(2, 0, 1) / 127.5 - 1
    for source in (levels, floats):
        prepared = media.prepare_image(source, (17, 13), "stretch", interpolation="bicubic").pixels
        assert torch.allclose(prepared, torch.from_numpy(expected).permute(2, 0, 1) / 127.5 - 1, atol=1e-6)
    between = media.prepare_image(floats * 0.5001, (17, 13), "stretch", interpolation="bicubic").pixels
    assert between.min() >= -0.5002 and between.max() <= 0.5002
    bilinear = media.prepare_image(levels, (17, 13), "stretch").pixels
    assert not torch.allclose(bilinear, torch.from_numpy(expected).permute(2, 0, 1) / 127.5 - 1, atol=1e-2)
    with pytest.raises(zoo.InputError, match="interpolation must be one of bilinear, bicubic"):
        media.prepare_image(levels, (17, 13), interpolation="nearest")

"""Images and audio to the files that official checkpoints were trained and evaluated on (sections 3 and 4 of the paper).

The files are those of the original code byte for byte, with one exception: MP3 depends on the build of LAME that libsndfile
brings. TIFF and WAV are written here because what the original used writes other headers today, or none; PNG and JPEG are
Pillow's.
"""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from zoo import media
from zoo.codecs.byteformer.config import IMAGE_FILES, SAMPLE_TYPES
from zoo.errors import InputError, MissingExtraError

Pixels = UInt8[np.ndarray, "height width 3"]

#: Shorter side to which images are resized, and side of the square cut out of it.
RESIZED, CROPPED = 256, 224
#: Samples of a clip of Speech Commands, and their rate.
CLIP_SAMPLES, CLIP_RATE = 16_000, 16_000

_TIFF_HEADER = 140
_LONG, _SHORT = 4, 3
_FLOAT_FORMAT, _PCM_FORMAT, _EXTENSIBLE_FORMAT = 3, 1, 0xFFFE
# KSDATAFORMAT_SUBTYPE_PCM and the speaker "front centre".
_PCM_SUBFORMAT, _FRONT_CENTRE = bytes.fromhex("0100000000001000800000aa00389b71"), 4
# MPEG-2 Layer III at 16 kHz: a frame is 72 * bitrate / 16,000 bytes, 108 at LAME's default for mono.
_MP3_BIT_RATE = 24_000


# ----------------------------------------------------------------------------------------------------------------- images


def evaluation_crop(
    source: Any,
    max_pixels: int = media.MAX_PIXELS,
    *,
    resized: int = RESIZED,
    cropped: int = CROPPED,
    interpolation: str = "bicubic",
) -> Pixels:
    """The pixels that the original evaluates on: shorter side resized (bicubic) to 256, centre 224 x 224.

    Args:
        source: whatever `zoo.media.prepare_image` takes; floats in [-1, 1]. Images are turned upright and laid on white first,
            which the original does not do: hand over an array to keep them as they are stored.
        max_pixels: refuse larger images.
        resized, cropped: other sizes than those.
        interpolation: ``nearest``, ``bilinear`` or ``bicubic``.

    Raises:
        InputError: the source cannot be read.
    """
    from PIL import Image

    image = Image.fromarray(pixels_of(source, max_pixels))
    width, height = image.size
    shorter, longer = min(width, height), max(width, height)
    if shorter != resized:
        other = int(resized * longer / shorter)
        size = (resized, other) if width <= height else (other, resized)
        image = image.resize(size, Image.Resampling[interpolation.upper()])
    # The original rounds odd margins down, where torchvision's centre crop rounds to the nearest even number.
    left, top = (image.width - cropped) // 2, (image.height - cropped) // 2
    return np.asarray(image.crop((left, top, left + cropped, top + cropped)))


def pixels_of(source: Any, max_pixels: int = media.MAX_PIXELS) -> Pixels:
    """The 8-bit pixels of an image, in its own size; see `evaluation_crop` for what it takes."""
    pixels = media.prepare_image(source, size=(0, 0), fit="none", max_pixels=max_pixels).pixels
    levels = pixels.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return np.ascontiguousarray(levels.permute(1, 2, 0).numpy())


def image_file(source: Any, encoding: str, *, quality: int = 100, max_pixels: int = media.MAX_PIXELS) -> bytes:
    """An image as a file, in its own size.

    Args:
        source: as in `evaluation_crop`.
        encoding: ``fHWC``: the bytes of the pixels, row by row; ``fCHW``: those of the red plane, the green and the blue one;
            ``TIFF``, uncompressed: 140 bytes and those of fHWC; ``PNG``, stored without compression; ``JPEG``: baseline, 4:2:0.
        quality: of JPEG, 1 to 100; official models use 100 and 60.
        max_pixels: refuse larger images.

    Raises:
        InputError: the source cannot be read, or there is no such encoding.
    """
    if encoding not in IMAGE_FILES:
        raise InputError(f"the encoding of an image must be one of {', '.join(IMAGE_FILES)}, not {encoding!r}")
    if not 1 <= quality <= 100:
        raise InputError(f"quality must lie in [1, 100], not {quality}")
    pixels = pixels_of(source, max_pixels)
    if encoding == "fHWC":
        return pixels.tobytes()
    if encoding == "fCHW":
        return np.moveaxis(pixels, 2, 0).tobytes()
    if encoding == "TIFF":
        return _tiff_header(pixels.shape[1], pixels.shape[0]) + pixels.tobytes()
    options = {"compress_level": 0} if encoding == "PNG" else {"quality": quality}
    return _pillow_file(pixels, encoding, options)


def _pillow_file(pixels: Pixels, encoding: str, options: dict[str, int]) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=encoding, **options)
    return file.getvalue()


def _tiff_header(width: int, height: int) -> bytes:
    """Little-endian TIFF with one strip of 8-bit RGB: a directory of ten tags, then what does not fit in it."""
    tags = (
        (256, _LONG, 1, width),
        (257, _LONG, 1, height),
        (258, _SHORT, 3, _TIFF_HEADER - 6),  # bits per sample, three numbers at the end of the header
        (259, _SHORT, 1, 1),  # not compressed
        (262, _SHORT, 1, 2),  # RGB
        (273, _LONG, 1, _TIFF_HEADER),  # where the strip begins
        (277, _SHORT, 1, 3),  # samples per pixel
        (278, _LONG, 1, height),  # rows per strip
        (279, _LONG, 1, 3 * height * width),  # bytes of the strip
        (284, _SHORT, 1, 1),  # channels interleaved
    )
    directory = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + struct.pack("<I3H", 0, 8, 8, 8)


# ------------------------------------------------------------------------------------------------------------------ audio


def evaluation_clip(source: Any) -> Float[Tensor, " samples"]:
    """The samples that the original evaluates on: one second at 16 kHz, cut or completed with zeros; channels averaged.

    Args:
        source: whatever `zoo.media.read_audio` takes; arrays without a rate are at 16 kHz.

    Raises:
        InputError: the source cannot be read.
    """
    waveform = media.read_audio(source, sample_rate=CLIP_RATE, mono=True, default_sample_rate=CLIP_RATE).waveform[0]
    return torch.nn.functional.pad(waveform[:CLIP_SAMPLES], (0, max(0, CLIP_SAMPLES - len(waveform))))


def audio_file(
    waveform: Float[Tensor, "*channels samples"],
    encoding: str = "WAV",
    *,
    sample_type: str = "float32",
    sample_rate: int = CLIP_RATE,
) -> bytes:
    """Audio as a mono file, at its own length.

    Args:
        waveform: float32 ``[samples]`` or ``[channels, samples]``, which are averaged; clipped to [-1, 1].
        encoding: ``WAV`` or ``MP3``: constant bit rate (24 kbit/s at 16 kHz), without tags.
        sample_type: of WAV: ``float32``, ``int32``, ``int16`` or ``uint8``, with the original's roundings, which change every
            other sample of 16-bit audio by 1, and its overflow of int32 at 1.0.
        sample_rate: samples per second.

    Raises:
        InputError: the audio is empty or not finite, or there is no such encoding.
        MissingExtraError: the installed soundfile cannot write MP3.
    """
    mono = waveform.detach().float().cpu()
    mono = mono if mono.ndim == 1 else mono.mean(0)
    if not mono.numel():
        raise InputError("the audio is empty")
    if not torch.isfinite(mono).all():
        raise InputError("the audio holds NaN or infinite samples")
    samples = mono.clamp(-1, 1).numpy()
    if encoding == "MP3":
        return _mp3_file(samples, sample_rate)
    if encoding != "WAV":
        raise InputError(f"the encoding of audio must be WAV or MP3, not {encoding!r}")
    if sample_type not in SAMPLE_TYPES:
        raise InputError(f"sample_type must be one of {', '.join(SAMPLE_TYPES)}, not {sample_type!r}")
    return _wav_file(_quantised(samples, sample_type), sample_rate)


def _quantised(samples: Float[np.ndarray, " samples"], sample_type: str) -> np.ndarray:
    """Samples in [-1, 1] as the original stores them."""
    if sample_type == "uint8":
        return ((samples + np.float32(1)) * np.float32(127.5)).astype(np.uint8)
    if sample_type == "int16":
        return (samples * np.float32(32_767)).astype("<i2")
    scaled = np.trunc(samples.astype(np.float64) * 2.0**31).astype(np.int64)
    if sample_type == "int32":
        return np.where(scaled > 2**31 - 1, -(2**31), scaled).astype("<i4")
    # 32-bit integers on the way, of which 24 bits are kept.
    kept = (np.minimum(scaled, 2**31 - 1) + 64) & ~127
    return (kept / 2.0**31).astype("<f4")


def _wav_file(samples: np.ndarray, sample_rate: int) -> bytes:
    """A mono WAV file with the header that libsox writes for the type of the samples."""
    size = samples.dtype.itemsize
    layout = struct.pack("<HIIHH", 1, sample_rate, sample_rate * size, size, 8 * size)
    fact = b"fact" + struct.pack("<II", 4, len(samples))
    if samples.dtype.kind == "f":
        header = struct.pack("<H", _FLOAT_FORMAT) + layout + struct.pack("<H", 0)
    elif size == 4:
        extension = struct.pack("<HHI", 22, 32, _FRONT_CENTRE) + _PCM_SUBFORMAT
        header = struct.pack("<H", _EXTENSIBLE_FORMAT) + layout + extension
    else:
        header, fact = struct.pack("<H", _PCM_FORMAT) + layout, b""
    payload = samples.tobytes()
    body = b"".join(
        [
            b"WAVEfmt ",
            struct.pack("<I", len(header)),
            header,
            fact,
            b"data",
            struct.pack("<I", len(payload)),
            payload,
            bytes(len(payload) % 2),
        ]
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _mp3_file(samples: Float[np.ndarray, " samples"], sample_rate: int) -> bytes:
    """Frames of 108 bytes, 24 kbit/s, as LAME makes them by default at this rate; 3240 bytes for a second."""
    import soundfile

    if sample_rate != CLIP_RATE:
        raise InputError(f"MP3 files are made at {CLIP_RATE} Hz, not at {sample_rate}: resample the audio")
    if "MP3" not in soundfile.available_formats():
        raise MissingExtraError('this libsndfile writes no MP3: pip install "soundfile>=0.13"')
    # libsndfile counts from the highest bit rate of MPEG-2, 160 kbit/s, down to the lowest, 8.
    compression = (160_000 - _MP3_BIT_RATE) / (160_000 - 8_000)
    file = io.BytesIO()
    soundfile.write(file, samples, sample_rate, format="MP3", compression_level=compression, bitrate_mode="CONSTANT")
    return file.getvalue()

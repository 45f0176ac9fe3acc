"""Read and write media. Files, arrays and tensors go in; float tensors come out."""

from zoo.media.audio import AUDIO_EXTENSIONS, Audio, Resampler, read_audio, resample, resampled_length, write_audio
from zoo.media.files import expand_paths, replacing
from zoo.media.image import (
    FITS,
    IMAGE_EXTENSIONS,
    MAX_PIXELS,
    PreparedImage,
    prepare_image,
    restore_image,
    write_image,
)

__all__ = [
    "AUDIO_EXTENSIONS",
    "FITS",
    "IMAGE_EXTENSIONS",
    "MAX_PIXELS",
    "Audio",
    "PreparedImage",
    "Resampler",
    "expand_paths",
    "prepare_image",
    "read_audio",
    "replacing",
    "resample",
    "resampled_length",
    "restore_image",
    "write_audio",
    "write_image",
]

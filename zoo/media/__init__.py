"""Read and write media. Files, arrays and tensors go in; float tensors come out."""

from zoo.media.audio import (
    AUDIO_EXTENSIONS,
    READ_ONLY_AUDIO_EXTENSIONS,
    Audio,
    AudioInfo,
    audio_info,
    read_audio,
    restore_audio,
    write_audio,
)
from zoo.media.files import expand_paths, replacing, write_bytes, write_json
from zoo.media.image import (
    FITS,
    IMAGE_EXTENSIONS,
    INTERPOLATIONS,
    MAX_PIXELS,
    PreparedImage,
    image_info,
    prepare_image,
    restore_image,
    write_image,
)
from zoo.media.resampling import Resampler, resample, resampled_length
from zoo.media.shape import (
    MAX_FACES,
    SHAPE_EXTENSIONS,
    PreparedShape,
    frame_of,
    prepare_shape,
    read_shape,
    require_shape_packages,
    write_shape,
)
from zoo.media.solid import contains, is_closed

__all__ = [
    "AUDIO_EXTENSIONS",
    "FITS",
    "IMAGE_EXTENSIONS",
    "INTERPOLATIONS",
    "MAX_FACES",
    "MAX_PIXELS",
    "READ_ONLY_AUDIO_EXTENSIONS",
    "SHAPE_EXTENSIONS",
    "Audio",
    "AudioInfo",
    "PreparedImage",
    "PreparedShape",
    "Resampler",
    "audio_info",
    "contains",
    "expand_paths",
    "frame_of",
    "image_info",
    "is_closed",
    "prepare_image",
    "prepare_shape",
    "read_audio",
    "read_shape",
    "replacing",
    "require_shape_packages",
    "resample",
    "resampled_length",
    "restore_audio",
    "restore_image",
    "write_audio",
    "write_bytes",
    "write_image",
    "write_json",
    "write_shape",
]

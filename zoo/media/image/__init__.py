"""Images: files, PIL images, arrays and tensors, brought to a model's size and back again.

An image tensor is float32 ``[3, height, width]`` in [-1, 1]. Decoders overshoot that range a little, and nothing clips them
before they are written.
"""

from zoo.media.image.levels import Range
from zoo.media.image.prepare import FITS, INTERPOLATIONS, PreparedImage, prepare_image, restore_image, write_image
from zoo.media.image.reading import IMAGE_EXTENSIONS, MAX_PIXELS, image_info

__all__ = [
    "FITS",
    "IMAGE_EXTENSIONS",
    "INTERPOLATIONS",
    "MAX_PIXELS",
    "PreparedImage",
    "Range",
    "image_info",
    "prepare_image",
    "restore_image",
    "write_image",
]

"""The colour photographs that scikit-image ships, as PNG files: images for `zoo eval --data` that need no network.

    zoo study photographs photographs/

Scenes (astronaut, chelsea, coffee, motorcycle, rocket) and what telescopes and microscopes see (hubble_deep_field, retina,
immunohistochemistry). Licences and sources are in the docstrings of ``skimage.data``.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

from zoo.errors import MissingExtraError
from zoo.eval.options import Folder
from zoo.media import write_image

#: Those of ``skimage.data`` that lie inside its wheel, so that nothing is downloaded.
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "motorcycle", "retina", "rocket")


def write_photographs(folder: str | Path) -> list[Path]:
    """Write the photographs into a folder, at their own sizes, and return their paths.

    Raises:
        MissingExtraError: scikit-image is not installed.
    """
    if find_spec("skimage") is None:
        raise MissingExtraError('skimage is not installed: pip install "tokenizer-zoo[eval]"')
    import skimage.data

    written = []
    for name in PHOTOGRAPHS:
        # The left one of a stereo pair, which comes with its disparities.
        levels = skimage.data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(skimage.data, name)()
        pixels = torch.from_numpy(levels).permute(2, 0, 1).float() / 127.5 - 1
        written.append(write_image(Path(folder) / f"{name}.png", pixels))
    return written


def main(folder: Folder) -> None:
    """Write the photographs that scikit-image ships as PNG files."""
    for path in write_photographs(folder):
        print(path)

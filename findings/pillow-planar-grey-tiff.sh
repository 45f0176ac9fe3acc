#!/usr/bin/env bash
# Pillow 13.0.0 reads an uncompressed grey TIFF that says PlanarConfiguration = 2 wrongly, without a word: MinIsWhite comes out
# inverted (8 bits), and samples of 2 and 4 bits are not unpacked. For one sample a pixel TIFF 6.0 makes the tag irrelevant
# ("If SamplesPerPixel is 1, PlanarConfiguration is irrelevant, and need not be included"), so one would expect the pixels of
# the same file with PlanarConfiguration = 1, which Pillow reads rightly.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pillow==13.0.0
"$folder/venv/bin/python" - <<'PYTHON'
import io
import struct

from PIL import Image


def grey_file(bits, photometric, planar, content):
    """One row of 8 grey samples, uncompressed, written by hand from TIFF 6.0."""
    tags = [(256, 8), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 1), (279, len(content))]
    tags.append((284, planar))
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHIH2x", tag, 3, 1, value) for tag, value in tags)
    return b"II" + struct.pack("<HI", 42, 8 + len(content)) + content + directory + struct.pack("<I", 0)


def read(*file):
    return list(Image.open(io.BytesIO(grey_file(*file))).convert("L").tobytes())


white, packed = bytes([0, 10, 20, 30, 40, 50, 60, 255]), bytes([0x01, 0x23, 0x45, 0xEF])
for bits, photometric, content, meaning in ((8, 0, white, "8 bits, MinIsWhite"), (4, 1, packed, "4 bits, MinIsBlack")):
    chunky, planar = (read(bits, photometric, planar, content) for planar in (1, 2))
    print(meaning, "PlanarConfiguration 1:", chunky, "PlanarConfiguration 2:", planar)
    assert chunky != planar
assert read(8, 0, 1, white) == [255 - level for level in white] and read(8, 0, 2, white) == list(white)
PYTHON

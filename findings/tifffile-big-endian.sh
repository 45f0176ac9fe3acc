#!/usr/bin/env bash
# tifffile 2026.3.3 with imagecodecs 2026.3.6 loses the values of two kinds of big-endian ("MM") TIFF files, without a word:
#
# 1. Samples of 24 bits, which TIFF stores as three bytes in the file's order. Little-endian files come out with the bytes of
#    each sample reversed (1 becomes 0x010000), big-endian ones shifted by a byte as well (1 becomes 0x01000000, which 24 bits
#    cannot even hold). One would expect 1 twice, as for 20 or 28 bits, which both orders get right.
# 2. 16-bit samples that imwrite itself compresses as JPEG 2000 (lossless): imread gives other values than were written if
#    byteorder=">". One would expect a round trip, as with byteorder="<".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 tifffile==2026.3.3 imagecodecs==2026.3.6
"$folder/venv/bin/python" - <<'PYTHON'
import io
import struct

import numpy as np
import tifffile


def three_byte_file(order, values):
    """One row of grey samples of 24 bits, uncompressed, written by hand from TIFF 6.0."""
    content = b"".join(value.to_bytes(3, "little" if order == "<" else "big") for value in values)
    tags = [(256, len(values)), (257, 1), (258, 24), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, len(content))]
    content += b"\0" * (len(content) % 2)
    mark = b"II" if order == "<" else b"MM"
    directory = struct.pack(order + "H", len(tags))
    for tag, value in tags:
        directory += struct.pack(order + "HHIH2x", tag, 3, 1, value)
    return mark + struct.pack(order + "HI", 42, 8 + len(content)) + content + directory + struct.pack(order + "I", 0)


values = [0, 1, 0x10203, 0xFFFFFF]
seen = {}
for order in "<>":
    seen[order] = [hex(v) for v in tifffile.imread(io.BytesIO(three_byte_file(order, values))).ravel().tolist()]
    print("24 bits, byte order", order, "written", [hex(v) for v in values], "read", seen[order])
array = np.arange(48 * 64 * 3, dtype=np.uint16).reshape(48, 64, 3)
same = {}
for order in "<>":
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, photometric="rgb", compression="jpeg2000", byteorder=order)
    same[order] = bool((tifffile.imread(io.BytesIO(buffer.getvalue())) == array).all())
    print("16-bit JPEG 2000, byte order", order, "round trip is exact:", same[order])
assert seen["<"] == ["0x0", "0x10000", "0x30201", "0xffffff"]
assert seen[">"] == ["0x0", "0x1000000", "0x3020100", "0xffffff00"]
assert same == {"<": True, ">": False}
PYTHON

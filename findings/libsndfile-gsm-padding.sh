#!/usr/bin/env bash
# libsndfile 1.2.2 (in soundfile 0.13.1) reads a WAV file of GSM 06.10 with an odd number of blocks as one block longer.
#
# A block has 65 bytes and 320 samples; an odd number of blocks is followed by the byte that makes a RIFF chunk even, which the
# chunk's length does not count. libsndfile takes that byte for another block: 11,025 samples, written by itself as 35 blocks
# (11,200 samples, as ffmpeg and SoX read them), come back as 11,520. The fact chunk, which it wrote, says 11,025. The same sound
# in W64 comes back as 11,200 samples, and in AIFF as 11,025. One would expect one number for one sound.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q soundfile==0.13.1 numpy==2.2.6
"$work/venv/bin/python" - <<'PY'
import io
import struct

import numpy as np
import soundfile

print("libsndfile", soundfile.__libsndfile_version__)
found = {}
for kind in ("WAV", "W64", "AIFF"):
    file = io.BytesIO()
    soundfile.write(file, 0.3 * np.sin(np.arange(11_025) / 9), 8_000, format=kind, subtype="GSM610")
    content = file.getvalue()
    found[kind] = len(soundfile.read(io.BytesIO(content))[0])
    print(kind, "samples read:", found[kind])
    if kind == "WAV":
        data, fact = content.index(b"data"), content.index(b"fact")
        length, samples = (struct.unpack("<I", content[place : place + 4])[0] for place in (data + 4, fact + 8))
        print("WAV data bytes:", length, "= blocks:", length / 65, "fact:", samples)
        assert length == 35 * 65 and samples == 11_025
assert found == {"WAV": 11_520, "W64": 11_200, "AIFF": 11_025}, found
PY

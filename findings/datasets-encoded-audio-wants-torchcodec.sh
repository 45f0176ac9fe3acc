#!/usr/bin/env bash
# datasets 5.2.0: rows {"bytes", "path"} of a feature `Audio(decode=False)` cannot be put into a data set where torchcodec is not
# installed. Nothing has to be encoded or decoded: the bytes are a WAV file, and they are what the table holds in the end. The same
# rows without features, cast to that feature afterwards, work, and so do rows of `Image(decode=False)`. One would expect only
# arrays to need an encoder.
#
# Whoever converts a folder of recordings with `Dataset.from_dict(..., features=...)` or a generator meets it.
#
# Exits with 0 while it holds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pillow==12.0.0 2>/dev/null || "$folder/venv/bin/pip" install -q datasets==5.2.0 pillow
"$folder/venv/bin/python" - <<'PYTHON'
import io
import sys
import wave

import datasets
from PIL import Image

sound, picture = io.BytesIO(), io.BytesIO()
with wave.open(sound, "wb") as file:
    file.setnchannels(1)
    file.setsampwidth(2)
    file.setframerate(16_000)
    file.writeframes(bytes(3_200))
Image.new("RGB", (8, 8)).save(picture, "PNG")


def put(name, content, feature):
    row = {name: [{"bytes": content, "path": None}]}
    try:
        return datasets.Dataset.from_dict(row, features=datasets.Features({name: feature}))[0][name]["bytes"] == content
    except ImportError as error:
        return f"ImportError: {error}"


encoded = put("audio", sound.getvalue(), datasets.Audio(decode=False))
image = put("image", picture.getvalue(), datasets.Image(decode=False))
cast = datasets.Dataset.from_dict({"audio": [{"bytes": sound.getvalue(), "path": None}]})
cast = cast.cast_column("audio", datasets.Audio(decode=False))[0]["audio"]["bytes"] == sound.getvalue()
print("audio with features:", encoded)
print("image with features:", image)
print("audio cast afterwards:", cast)
sys.exit(not ("torchcodec" in str(encoded) and image is True and cast))
PYTHON

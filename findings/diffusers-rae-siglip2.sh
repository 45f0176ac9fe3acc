#!/usr/bin/env bash
# diffusers 0.42.1 with transformers 5.23.0: `AutoencoderRAE(encoder_type="siglip2")` raises an AttributeError while it is built.
# It reaches for `vision_model` inside of `SiglipVisionModel`, which that release of transformers no longer has. The other two
# encoders can be built.
#
# Whoever loads nyu-visionx/RAE-siglip2-base-p16-i256-ViTXL-n08 with these two meets it.
#
# Exits with 0 while it holds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.11.0 diffusers==0.42.1 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

from diffusers import AutoencoderRAE

outcome = {}
for kind in ("dinov2", "mae", "siglip2"):
    try:
        AutoencoderRAE(
            encoder_type=kind, encoder_hidden_size=64, encoder_num_hidden_layers=1, encoder_patch_size=16, encoder_input_size=64,
            decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=64,
        )
        outcome[kind] = "works"
    except AttributeError as error:
        outcome[kind] = f"AttributeError: {error}"
    print(kind, outcome[kind])
sys.exit([text == "works" for text in outcome.values()] != [True, True, False])
PYTHON

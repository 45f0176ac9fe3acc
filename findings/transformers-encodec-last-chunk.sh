#!/usr/bin/env bash
# transformers 5.23.0: `EncodecModel` with chunks and loudness (the settings of facebook/encodec_48khz) raises a RuntimeError on a
# recording whose last chunk is no whole number of frames, in a batch of one with nothing padded. Lengths that are a whole number
# of strides work. Nothing in the documentation restricts the length.
#
# Whoever encodes recordings as they come with the 48 kHz model meets it.
#
# Exits with 0 while it holds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.11.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from transformers import EncodecConfig, EncodecModel

torch.manual_seed(0)
# The 48 kHz model made small: chunks of 1,600 samples that overlap by 100.
config = EncodecConfig(
    sampling_rate=1600, audio_channels=2, normalize=True, chunk_length_s=1.0, overlap=0.0625, target_bandwidths=[1.0],
    num_filters=4, hidden_size=8, upsampling_ratios=[4, 4], codebook_size=16, norm_type="time_group_norm", use_causal_conv=False,
    num_lstm_layers=1,
)
model = EncodecModel(config).eval()
stride = model.config.chunk_stride
print("chunk", model.config.chunk_length, "stride", stride)
outcome = {}
for samples in (stride, 2 * stride, 1580, 3081, 3090):
    wave = torch.randn(1, 2, samples) * 0.1
    try:
        with torch.no_grad():
            model(wave, torch.ones(1, samples, dtype=torch.bool), bandwidth=1.0)
        outcome[samples] = "works"
    except RuntimeError as error:
        outcome[samples] = f"RuntimeError: {str(error).splitlines()[0][:100]}"
    print(samples, outcome[samples])
works = [samples for samples, text in outcome.items() if text == "works"]
sys.exit(works != [stride, 2 * stride])
PYTHON

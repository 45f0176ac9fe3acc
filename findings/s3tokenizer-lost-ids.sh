#!/usr/bin/env bash
# s3tokenizer 0.3.0 loses ids of recordings of more than 30 seconds. It cuts a recording into windows of 30 s every 26 s for as
# long as a window would begin before the end, and drops 2 s of ids on both sides of a window that is neither the first nor the
# last. Where the window before the last one reaches the end already, the last one is too short to bring back what was dropped:
# up to 2 s of ids vanish from the middle of the recording, for 14.7 % of all lengths, without a word. One would expect one id
# for every four frames (40 ms), as up to 30 s. Weights are random here: the count does not depend on them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q s3tokenizer==0.3.0 torch==2.11.0 torchaudio==2.11.0 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from s3tokenizer.model_v2 import ModelConfig, S3TokenizerV2

sizes = ModelConfig(n_audio_state=64, n_audio_head=1, n_audio_layer=1)
model = S3TokenizerV2("speech_tokenizer_v2_25hz", sizes).eval()
print("frames  seconds  ids  expected")
lost = {}
with torch.inference_mode():
    for frames in (3000, 5200, 5201, 5240, 5400, 5600, 5601):
        codes, lengths = model.quantize(torch.randn(1, 128, frames), torch.tensor([frames]))
        expected = -(-frames // 4)
        lost[frames] = expected - int(lengths[0])
        print(f"{frames:6d}  {frames / 100:7.2f}  {int(lengths[0]):3d}  {expected:8d}")
assert lost == {3000: 0, 5200: 0, 5201: 50, 5240: 50, 5400: 50, 5600: 0, 5601: 0}, lost
PYTHON

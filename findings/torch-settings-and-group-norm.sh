#!/usr/bin/env bash
# torch 2.11.0 on a CPU, two surprises for who wants the same numbers everywhere.
#
# 1. GroupNorm loses digits in the channels_last layout: at 128 x 256 x 256 in float32 the result is about 60 times further
#    from float64 than for the same numbers in the contiguous layout. Its kernel adds up all numbers of a group, and their
#    squares, one after the other. One would expect both layouts to round alike, as convolutions and other norms do.
# 2. `torch.backends.mkldnn.fp32_precision = ...` does not set what reading it gives: it sets the switch of all backends,
#    `torch.backends.fp32_precision`. One would expect the other backends to keep their own.
#
# Exits with 0 while both hold.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.11.0 numpy==2.3.5
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import torch.nn.functional as F

torch.manual_seed(0)
x = torch.randn(1, 128, 256, 256) * 1.5 + 0.7
exact = F.group_norm(x.double(), 32)
contiguous = (F.group_norm(x, 32) - exact).abs().max().item()
channels_last = (F.group_norm(x.to(memory_format=torch.channels_last), 32) - exact).abs().max().item()
print(f"GroupNorm against float64: contiguous {contiguous:.1e}, channels_last {channels_last:.1e}")

before = torch.backends.fp32_precision
torch.backends.mkldnn.fp32_precision = "bf16"
after = torch.backends.fp32_precision
print(f"torch.backends.fp32_precision: {before!r}, and {after!r} once mkldnn's was set to 'bf16'")
sys.exit(not (channels_last > 10 * contiguous and (before, after) == ("none", "bf16")))
PYTHON

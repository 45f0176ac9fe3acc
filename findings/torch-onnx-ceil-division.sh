#!/usr/bin/env bash
# torch 2.11.0 with onnxscript 0.7.2: `-(-size // k)`, Python's usual way to round a division up, comes out one too small in an
# exported ONNX graph when `size` is a dynamic dimension. Python's `//` rounds down, so that the negated form rounds up; the graph
# divides towards zero. Nothing warns: the export's own shapes are right for the size that it was traced with only if that
# is a multiple of `k`. `(size + k - 1) // k` comes out right.
#
# Whoever exports a codec that pads to whole frames meets it: the last frame is missing for most lengths.
#
# Exits with 0 while it holds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.11.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch


class Frames(torch.nn.Module):
    """A signal cut into frames of 4, the last one filled up; ``ceil`` says how many there are."""

    def __init__(self, ceil):
        super().__init__()
        self.ceil = ceil

    def forward(self, signal):
        frames = self.ceil(signal.shape[1], 4)
        return torch.zeros(1, frames * 4) + signal[:, :1]


ways = {"negated": lambda size, k: -(-size // k), "added": lambda size, k: (size + k - 1) // k}
found = {}
for name, ceil in ways.items():
    module = Frames(ceil)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frames.onnx"
        time = torch.export.Dim("time", min=5, max=4096)
        torch.onnx.export(module, (torch.zeros(1, 18),), path, dynamo=True, dynamic_shapes=({1: time},), verbose=False)
        session = onnxruntime.InferenceSession(path)
        entry = session.get_inputs()[0].name
        for size in (16, 17, 18, 19, 20):
            graph = session.run(None, {entry: np.zeros((1, size), np.float32)})[0].shape[1]
            found[name, size] = (module(torch.zeros(1, size)).shape[1], graph)
for (name, size), (eager, graph) in found.items():
    print(f"{name:8} size {size}: {eager} in Python, {graph} in the graph")
wrong = [size for (name, size), (eager, graph) in found.items() if name == "negated" and eager != graph]
right = all(eager == graph for (name, _), (eager, graph) in found.items() if name == "added")
sys.exit(not (wrong == [17, 18, 19] and right))
PYTHON
